"""PowerEMA: the average whose memory is a share of the run, and the relation of its width and exponent."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from .evaluating import EvaluationSource
from .running import RunningAverage

#: Version of snapshots.
FORMAT = 1
WIDEST = 1 / math.sqrt(12)  # of the plain mean


class PowerEMA(RunningAverage):
    """Power-function average: a <- a + c_t (w_t - a) with c_t = 1 - (1 - 1/t)^(gamma+1), so that older weights fade.

    The weight of w_s in a_t grows as s^gamma; exactly, it is (s^(gamma+1) - (s-1)^(gamma+1)) / t^(gamma+1). The profile
    keeps its form as the run goes on, and its relative width sigma, the standard deviation of s/t, is the one number to
    choose. The first tick copies the weights. From snapshots of two of them any other is made after training, see
    ``PostHocEMA``.

    Args:
        model: the module to average.
        sigma: relative width, in (0, 0.2887]; sigma = sqrt((gamma+1)/((gamma+2)^2 (gamma+3))).
        gamma: the exponent, at least 0, in place of ``sigma``; 0 is the plain mean.
        optimizer: with it, only its accepted steps count (``optimizer.steps``); without, every call of ``update`` does.
        source: averages what this evaluates, such as a schedule-free optimizer; None (default): the live weights.
        dtype: least precision of the shadows, float32 (default) or float64.
        start: accepted steps to let pass before averaging, 0 by default.
        buffers: whether to average floating-point buffers too, for ``evaluating(..., buffers="average")``.

    Raises:
        ValueError: none or both of ``sigma`` and ``gamma``, or a value out of range.
        TypeError: ``optimizer`` does not count its accepted steps, or ``source`` evaluates nothing.

    Source: Karras et al. 2023, arXiv:2312.02696.

    Example:
        >>> model = torch.nn.Linear(1, 1, bias=False)
        >>> average = PowerEMA(model, gamma=1)
        >>> for w in (1.0, 5.0):
        ...     _ = torch.nn.init.constant_(model.weight, w)
        ...     average.update()
        >>> average.evaluation_weights(model)["weight"].item()  # (1 * 1 + 3 * 5) / 4
        4.0
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        sigma: float | None = None,
        gamma: float | None = None,
        optimizer: Optimizer | None = None,
        source: EvaluationSource | None = None,
        dtype: torch.dtype = torch.float32,
        start: int = 0,
        buffers: bool = False,
    ) -> None:
        self.gamma = exponent_of(sigma, gamma)
        super().__init__(model, optimizer=optimizer, source=source, dtype=dtype, start=start, buffers=buffers)

    @property
    def sigma(self) -> float:
        """The relative width."""
        return gamma_to_sigma(self.gamma)

    @property
    def ticks(self) -> int:
        """Accepted steps that the average is over."""
        return max(0, self.steps - self.start)

    def snapshot(self) -> dict[str, Any]:
        """Return a copy of the average with its profile, for ``synthesize``: numbers and tensors only.

        Raises:
            RuntimeError: nothing has been averaged yet.
        """
        if not self.started:
            raise RuntimeError("there is nothing to take a snapshot of before the first update() after the start")
        return {
            "format": FORMAT,
            "gamma": self.gamma,
            "ticks": self.ticks,
            "weights": {name: shadow.clone() for name, shadow in self._mean(buffers=False).items()},
            "buffers": {name: shadow.clone() for name, shadow in self._mean(buffers=True).items()},
        }

    def _rate(self, elapsed: int) -> float:
        return float(1 - (1 - elapsed / self.ticks) ** (self.gamma + 1))

    def _settings(self) -> dict[str, float | str]:
        return {"gamma": self.gamma}

    def _progress(self) -> dict[str, float]:
        return {}

    def _set_progress(self, progress: Mapping[str, float]) -> None:
        pass


def gamma_to_sigma(gamma: float) -> float:
    """Return the relative width of the profile s^gamma: sqrt((gamma+1)/((gamma+2)^2 (gamma+3))).

    Raises:
        ValueError: ``gamma`` is below 0.
    """
    if not 0 <= gamma < math.inf:
        raise ValueError(f"gamma={gamma!r}: must be a number >= 0, such as 6.94")
    return math.sqrt((gamma + 1) / (gamma + 3)) / (gamma + 2)


def sigma_to_gamma(sigma: float) -> float:
    """Return the exponent of a relative width: the root of g^3 + 7 g^2 + (16 - sigma^-2) g + 12 - sigma^-2 above 0.

    Raises:
        ValueError: ``sigma`` is not in (0, 0.2887], whose end is the plain mean.

    Example:
        >>> [round(sigma_to_gamma(sigma), 3) for sigma in (0.05, 0.1, 0.15, 0.2)]
        [16.972, 6.937, 3.558, 1.826]
    """
    if not 0 < sigma <= WIDEST * (1 + 1e-12):
        raise ValueError(f"sigma={sigma!r}: must lie in (0, {WIDEST:.4f}], the width of the plain mean")
    c = sigma**-2
    gamma = 1 / sigma  # to the right of the root, where the cubic is convex: Newton comes down on it
    for _ in range(100):
        value = ((gamma + 7) * gamma + 16 - c) * gamma + 12 - c
        step = value / ((3 * gamma + 14) * gamma + 16 - c)
        gamma -= step
        if abs(step) <= 1e-15 * gamma:
            break
    return max(0.0, gamma)


def exponent_of(sigma: float | None, gamma: float | None) -> float:
    """Return gamma, given as itself or by the width.

    Raises:
        ValueError: none or both are given, or one out of range.
    """
    if (sigma is None) == (gamma is None):
        raise ValueError(f"sigma={sigma}, gamma={gamma}: give exactly one of them, such as sigma=0.1")
    if gamma is None:
        assert sigma is not None
        return sigma_to_gamma(sigma)
    gamma_to_sigma(gamma)  # checks it
    return float(gamma)
