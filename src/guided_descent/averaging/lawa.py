"""LAWA: the mean of the latest weights, some steps apart."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from guided_descent.schedules.curves import check_steps

from .evaluating import EvaluationSource
from .running import Average
from .shadows import Shadows
from .swa import crossed


class LAWA(Average):
    """Latest weight averaging: the mean of the last ``window`` weights, taken every so many steps.

    What is older is forgotten at once and not little by little, for which it keeps ``window`` copies of the weights.

    Args:
        model: the module to average.
        window: how many weights are kept, at least 1; 5 to 20 are usual.
        every: accepted steps from one that is taken to the next; the first is taken ``every`` steps after the start.
        optimizer: with it, only its accepted steps count (``optimizer.steps``); without, every call of ``update`` does.
        source: averages what this evaluates, such as a schedule-free optimizer; None (default): the live weights.
        dtype: least precision of the copies and of their mean, float32 (default) or float64.
        start: accepted steps to let pass before the first, 0 by default.
        buffers: whether to average floating-point buffers too, for ``evaluating(..., buffers="average")``.

    Raises:
        ValueError: a value out of range.
        TypeError: ``optimizer`` does not count its accepted steps, or ``source`` evaluates nothing.

    Source: Kaddour 2022, arXiv:2209.14981.

    Example:
        >>> model = torch.nn.Linear(1, 1, bias=False)
        >>> lawa = LAWA(model, window=2, every=1)
        >>> for w in (1.0, 2.0, 4.0):
        ...     _ = torch.nn.init.constant_(model.weight, w)
        ...     lawa.update()
        >>> lawa.evaluation_weights(model)["weight"].item()  # (2 + 4) / 2
        3.0
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        window: int,
        every: int,
        optimizer: Optimizer | None = None,
        source: EvaluationSource | None = None,
        dtype: torch.dtype = torch.float32,
        start: int = 0,
        buffers: bool = False,
    ) -> None:
        self.window, self.every = check_count("window", window), check_steps("every", every)
        super().__init__(model, optimizer=optimizer, source=source, dtype=dtype, start=start, buffers=buffers)
        self._ring = [Shadows(model, dtype, buffers) for _ in range(window)]
        self.taken = 0  # how many weights were taken, those included that are forgotten

    @property
    def started(self) -> bool:
        """Whether the average holds anything yet."""
        return self.taken > 0

    def _take(self, elapsed: int) -> None:
        if crossed(self.steps - self.start, elapsed, self.every):
            for shadows in self._ring:
                shadows.adopt_unfrozen()  # all of them, so that they hold the same names
            place = self.taken % self.window
            self._ring[place].lerp_(1.0, used=self.taken >= self.window, values=self._values())
            self.taken += 1

    def _sets(self) -> Mapping[str, Shadows]:
        return {f"{place}.": shadows for place, shadows in enumerate(self._ring)}

    @torch.no_grad()
    def _mean(self, *, buffers: bool) -> Mapping[str, Tensor]:
        """The mean of the copies, as new tensors."""
        filled = [shadows.named(buffers=buffers) for shadows in self._ring[: self.taken]]
        means = {name: shadow.clone() for name, shadow in filled[0].items()}
        for name, mean in means.items():
            for copy in filled[1:]:
                mean.add_(copy[name])
            mean.div_(len(filled))
        return means

    def _settings(self) -> dict[str, float | str]:
        return {"window": self.window, "every": self.every}

    def _progress(self) -> dict[str, float]:
        return {"taken": self.taken}

    def _set_progress(self, progress: Mapping[str, float]) -> None:
        self.taken = int(progress["taken"])


def check_count(name: str, value: int) -> int:
    """Return ``value`` if it is a positive integer.

    Raises:
        ValueError: it is not.
    """
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ValueError(f"{name}={value!r}: must be a positive integer")
    return value
