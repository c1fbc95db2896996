"""SWA: the equal mean of the weights at the ends of cycles or epochs."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import nn
from torch.optim import Optimizer

from guided_descent.schedules.curves import check_steps

from .evaluating import EvaluationSource
from .running import RunningAverage


class SWA(RunningAverage):
    """Stochastic weight averaging: a <- (n a + w)/(n + 1) every so many steps, the mean of all weights taken so far.

    It belongs to a constant or cyclic learning rate: ``every`` is an epoch or a cycle. Running statistics of BatchNorm
    need a policy, see ``evaluating``; the paper measures them afresh.

    Args:
        model: the module to average.
        every: accepted steps from one that is taken to the next, such as those of an epoch; the first is taken
            ``every`` steps after the start.
        optimizer: with it, only its accepted steps count (``optimizer.steps``); without, every call of ``update`` does.
        source: averages what this evaluates, such as a schedule-free optimizer; None (default): the live weights.
        dtype: least precision of the shadows, float32 (default) or float64.
        start: accepted steps to let pass before averaging, 0 by default; the paper starts after three quarters.
        buffers: whether to average floating-point buffers too, for ``evaluating(..., buffers="average")``.

    Raises:
        ValueError: a value out of range.
        TypeError: ``optimizer`` does not count its accepted steps, or ``source`` evaluates nothing.

    Source: Izmailov et al. 2018, arXiv:1803.05407.

    Example:
        >>> model = torch.nn.Linear(1, 1, bias=False)
        >>> swa = SWA(model, every=2)
        >>> for w in (1.0, 2.0, 3.0, 6.0):
        ...     _ = torch.nn.init.constant_(model.weight, w)
        ...     swa.update()
        >>> swa.evaluation_weights(model)["weight"].item()  # (2 + 6) / 2
        4.0
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        every: int,
        optimizer: Optimizer | None = None,
        source: EvaluationSource | None = None,
        dtype: torch.dtype = torch.float32,
        start: int = 0,
        buffers: bool = False,
    ) -> None:
        self.every = check_steps("every", every)
        super().__init__(model, optimizer=optimizer, source=source, dtype=dtype, start=start, buffers=buffers)
        self.taken = 0  # how many weights the mean is of

    @property
    def started(self) -> bool:
        """Whether the average holds anything yet."""
        return self.taken > 0

    def _rate(self, elapsed: int) -> float:
        if not crossed(self.steps - self.start, elapsed, self.every):
            return 0.0
        self.taken += 1
        return 1 / self.taken

    def _holds(self, elapsed: int) -> bool:
        return self.taken > 0

    def _settings(self) -> dict[str, float | str]:
        return {"every": self.every}

    def _progress(self) -> dict[str, float]:
        return {"taken": self.taken}

    def _set_progress(self, progress: Mapping[str, float]) -> None:
        self.taken = int(progress["taken"])


def crossed(now: int, elapsed: int, every: int) -> bool:
    """Return whether a multiple of ``every`` lies among the last ``elapsed`` steps up to ``now``."""
    return now // every > (now - elapsed) // every
