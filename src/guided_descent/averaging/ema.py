"""EMA: the exponential moving average of a model's weights, free of the bias towards its start."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import nn
from torch.optim import Optimizer

from guided_descent.schedules.curves import check_steps

from .evaluating import EvaluationSource
from .ramps import Ramp
from .running import RunningAverage


class EMA(RunningAverage):
    """Bias-corrected exponential moving average: a_t = sum_s d^(t-s) w_s / sum_s d^(t-s), s = 1..t.

    It is kept in corrected form, a <- a + c_t (w_t - a) with c_t = (1 - d)/(1 - d^t), so it needs no first value and
    no division when it is read: the first tick copies the weights. This equals a zero start divided by 1 - d^t.

    With a ramp r the decay of a tick is d_t = min(d, r(t - 1)), and c_t = 1 - d_t: the first tick copies the weights,
    and early ones are forgotten soon.

    Args:
        model: the module to average.
        half_life: accepted steps after which a weight counts half, d = 0.5^(1/half_life). Good values are 1-10 % of
            the run. With ``total_steps``, a float below 1 is a share of the run.
        decay: d itself, in [0, 1), in place of ``half_life``.
        total_steps: accepted steps of the run, for a half-life that is a share of it.
        ramp: one of ``averaging.ramps``: ``fraction()``, ``power()`` or ``share()``, or your own; None (default): the
            correction alone.
        optimizer: with it, only its accepted steps count (``optimizer.steps``); without, every call of ``update`` does.
        source: averages what this evaluates, such as a schedule-free optimizer; None (default): the live weights.
        dtype: least precision of the shadows, float32 (default) or float64.
        start: accepted steps to let pass before averaging, 0 by default.
        buffers: whether to average floating-point buffers too, for ``evaluating(..., buffers="average")``.

    Raises:
        ValueError: none or both of ``half_life`` and ``decay``, or a value out of range.
        TypeError: ``optimizer`` does not count its accepted steps, ``source`` evaluates nothing, or ``ramp`` is none.

    Example:
        >>> model = torch.nn.Linear(1, 1, bias=False)
        >>> ema = EMA(model, decay=0.5)
        >>> for w in (1.0, 4.0):
        ...     _ = torch.nn.init.constant_(model.weight, w)
        ...     ema.update()
        >>> ema.evaluation_weights(model)["weight"].item()  # (0.5 * 1 + 4) / 1.5
        3.0
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        half_life: float | None = None,
        decay: float | None = None,
        total_steps: int | None = None,
        ramp: Ramp | None = None,
        optimizer: Optimizer | None = None,
        source: EvaluationSource | None = None,
        dtype: torch.dtype = torch.float32,
        start: int = 0,
        buffers: bool = False,
    ) -> None:
        if (half_life is None) == (decay is None):
            raise ValueError(f"half_life={half_life}, decay={decay}: give exactly one of them, such as half_life=500")
        if half_life is not None and not 0 < half_life < math.inf:
            raise ValueError(f"half_life={half_life}: must be a positive number of steps")
        if decay is not None and not 0 <= decay < 1:
            raise ValueError(f"decay={decay}: must lie in [0, 1); 0.999 has a half-life of about 693 steps")
        if total_steps is not None:
            check_steps("total_steps", total_steps)
            if half_life is None or not isinstance(half_life, float) or half_life >= 1:
                raise ValueError(
                    f"half_life={half_life}, total_steps={total_steps}: the total is for a half-life that is a share "
                    "of the run; give a float below 1, or leave total_steps out"
                )
            half_life *= total_steps
        if ramp is not None and not isinstance(ramp, Ramp):
            raise TypeError(f"ramp is a {type(ramp).__name__}; pass one of averaging.ramps, such as ramps.share(0.05)")
        super().__init__(model, optimizer=optimizer, source=source, dtype=dtype, start=start, buffers=buffers)
        self.decay = 0.5 ** (1 / half_life) if half_life is not None else float(decay or 0.0)
        self.ramp = ramp
        self._discount = 1.0  # product of all decays so far; 1 - discount is the total weight of what was seen

    def _rate(self, elapsed: int) -> float:
        now = self.steps - self.start
        if self.ramp is None:
            decay = self.decay**elapsed
        else:
            decay = math.prod(min(self.decay, self.ramp(t)) for t in range(now - elapsed, now))
        self._discount *= decay
        return (1 - decay) / (1 - self._discount)

    def _settings(self) -> dict[str, float | str]:
        return {"decay": self.decay} | ({} if self.ramp is None else {"ramp": repr(self.ramp)})

    def _progress(self) -> dict[str, float]:
        return {"discount": self._discount}

    def _set_progress(self, progress: Mapping[str, float]) -> None:
        self._discount = float(progress["discount"])
