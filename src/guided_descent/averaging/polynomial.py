"""PolynomialAverage: an average over a fixed share of the run, however long it gets; made for DoG."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import nn
from torch.optim import Optimizer

from .evaluating import EvaluationSource
from .running import RunningAverage


class PolynomialAverage(RunningAverage):
    """Polynomial-decay average: a_t = a_(t-1) + c_t (w_t - a_(t-1)) with c_t = (gamma + 1) / (t + gamma), c_1 = 1.

    The weight of w_s in a_t grows as about s^gamma, and the mean age of what is averaged is t / (gamma + 2): no
    half-life has to be chosen, which suits methods without a schedule, such as DoG.

    Args:
        model: the module to average.
        gamma: 8 by default; 0 is the plain mean.
        optimizer: with it, only its accepted steps count (``optimizer.steps``); without, every call of ``update`` does.
        source: averages what this evaluates, such as a schedule-free optimizer; None (default): the live weights.
        dtype: least precision of the shadows, float32 (default) or float64.
        start: accepted steps to let pass before averaging, 0 by default.
        buffers: whether to average floating-point buffers too, for ``evaluating(..., buffers="average")``.

    Raises:
        ValueError: a value out of range.
        TypeError: ``optimizer`` does not count its accepted steps, or ``source`` evaluates nothing.

    Source: Shamir and Zhang 2013, 1212.1824; gamma as in Ivgi, Hinder and Carmon 2023, 2302.12022.

    Example:
        >>> model = torch.nn.Linear(1, 1, bias=False)
        >>> average = PolynomialAverage(model, gamma=1)
        >>> for w in (1.0, 4.0):
        ...     _ = torch.nn.init.constant_(model.weight, w)
        ...     average.update()
        >>> average.evaluation_weights(model)["weight"].item()  # 1 + 2/3 (4 - 1)
        3.0
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        gamma: float = 8.0,
        optimizer: Optimizer | None = None,
        source: EvaluationSource | None = None,
        dtype: torch.dtype = torch.float32,
        start: int = 0,
        buffers: bool = False,
    ) -> None:
        if not 0 <= gamma < math.inf:
            raise ValueError(f"gamma={gamma}: must be a number >= 0, such as 8")
        super().__init__(model, optimizer=optimizer, source=source, dtype=dtype, start=start, buffers=buffers)
        self.gamma = float(gamma)
        self._ticks = 0

    def _rate(self, elapsed: int) -> float:
        kept = 1.0
        for t in range(self._ticks + 1, self._ticks + elapsed + 1):
            kept *= (t - 1) / (t + self.gamma)
        self._ticks += elapsed
        return 1 - kept

    def _settings(self) -> dict[str, float | str]:
        return {"gamma": self.gamma}

    def _progress(self) -> dict[str, float]:
        return {"ticks": self._ticks}

    def _set_progress(self, progress: Mapping[str, float]) -> None:
        self._ticks = int(progress["ticks"])
