"""Gradients that are long beside those before them: clipped by their history, or their step left out."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from guided_descent.parts.base import Batch, Hyper, Slot, State, Unit
from guided_descent.parts.clip import Clip, Setting, block_norms, bounded, number, shorten, square
from guided_descent.routing.roles import Block


@dataclass(frozen=True)
class ZClip(Clip):
    """Global norm clipping at a distance from the mean norm that is measured in standard deviations.

    n is the norm of all gradients as in ``ClipNorm``. The first ``warmup`` steps take the mean and the (population)
    variance of their n and clip to ``max_norm``. Then with ``z = (n - mean) / (std + 1e-6)`` the bound is
    ``mean + z_max^2 std / z`` where ``z > z_max``, at most ``max_norm`` (``inf`` for none) in every case;
    ``n' = min(n, bound)``; ``mean <- beta mean + (1 - beta) n'`` and, with the new mean,
    ``var <- beta var + (1 - beta)(n' - mean)^2``. The gradient is multiplied by ``min(1, bound / (n + 1e-6))``. Norms
    that are not finite are not learned.

    Counted as ``zclip``. State of the group: ``zclip``, float64: number of steps, mean, variance, last factor. A group
    that is added later begins with its own warmup. Source: Kumar et al. 2025, 2504.02507.
    """

    settings: ClassVar[tuple[str, ...]] = ("z_max", "beta", "max_norm")
    z_max: Setting = 2.5
    beta: Setting = 0.97
    max_norm: Setting = 1.0
    warmup: int = 25

    def slots(self, block: Block) -> dict[str, Slot]:
        """Steps, mean, variance and factor."""
        return {"zclip": Slot("group", (4,), torch.float64)}

    def sums(self, x: Batch, s: State, h: Hyper) -> dict[str, Tensor]:
        """The squared norm."""
        return {"square": square(x)}

    def combine(self, total: Mapping[str, Tensor], shared: State, h: Hyper) -> None:
        """Find the factor and advance the statistics."""
        n, (steps, mean, var, _) = math.sqrt(float(total["square"])), shared["zclip"].tolist()
        bound, beta, most = float(number(h, self.max_norm)), float(number(h, self.beta)), float(number(h, self.z_max))
        if not math.isfinite(n):
            shared["zclip"][3] = 1.0
            return
        if steps < self.warmup:
            before, mean = mean, mean + (n - mean) / (steps + 1)
            var += ((n - before) * (n - mean) - var) / (steps + 1)
        else:
            std = math.sqrt(var)
            z = (n - mean) / (std + 1e-6)
            bound = min(bound, mean + most**2 * std / z) if z > most else bound
            mean = beta * mean + (1 - beta) * min(n, bound)
            var = beta * var + (1 - beta) * (min(n, bound) - mean) ** 2
        factor = min(1.0, bound / (n + 1e-6))
        shared["zclip"].copy_(torch.tensor([steps + 1, mean, var, factor], dtype=torch.float64))

    def update(self, x: Batch, s: State, h: Hyper, total: Mapping[str, Tensor]) -> None:
        """Shorten the gradient."""
        factor = float(s["zclip"][3])
        x.scale(factor)
        x.tick("zclip_seen")
        x.tick("zclip_clipped", int(factor < 1))


@dataclass(frozen=True)
class AdaGC(Clip):
    """Norm clipping of each block by the norms that it has had.

    The first ``warmup`` updates clip the norm of all gradients to ``max_norm``, as ``ClipNorm`` does, while gamma
    becomes the least clipped norm of the block. Then ``u <- u min(1, rel gamma / ||u||)`` and, with the clipped u,
    ``gamma <- beta gamma + (1 - beta) ||u||``. A gradient of norm 0 teaches nothing, since a gamma of 0 would stay 0.
    Counted as ``adagc``. State: ``adagc``, one number for each block. Source: Wang et al. 2025, 2502.11034.
    """

    unit: ClassVar[Unit] = "block"
    settings: ClassVar[tuple[str, ...]] = ("rel", "beta", "max_norm")
    rel: Setting = 1.05
    beta: Setting = 0.98
    max_norm: Setting = 1.0
    warmup: int = 100

    def slots(self, block: Block) -> dict[str, Slot]:
        """Gamma; 0 until a norm has been seen."""
        return {"adagc": Slot("factor", ())}

    def sums(self, x: Batch, s: State, h: Hyper) -> dict[str, Tensor]:
        """The squared norm, for the warmup."""
        return {"square": square(x)}

    def update(self, x: Batch, s: State, h: Hyper, total: Mapping[str, Tensor]) -> None:
        """Measure, shorten, advance gamma."""
        norms, gamma = block_norms(x), s["adagc"].double()
        if x.step <= self.warmup:
            factors = bounded(total["square"].sqrt(), number(h, self.max_norm)).expand_as(norms)
            learned = torch.minimum(gamma, factors * norms)
        else:
            bound, beta = number(h, self.rel) * gamma, number(h, self.beta)
            factors = torch.where((gamma > 0) & (norms > bound), bound / norms, 1.0)
            learned = beta * gamma + (1 - beta) * factors * norms
        learned = torch.where(gamma > 0, learned, factors * norms)
        s["adagc"].copy_(torch.where(norms > 0, learned, gamma))
        shorten(x, factors)
        x.tick("adagc_seen")
        x.tick("adagc_clipped", factors < 1)


@dataclass(frozen=True)
class SkipSpikes(Clip):
    """Leave out a step whose gradient is far longer than those before it: ``n > factor m``.

    n is the norm of all gradients as they come, before any clipping, and m the average of the n of accepted steps,
    ``m <- beta m + (1 - beta) n``, bias-corrected. A refused step changes nothing at all; it is counted as skipped, and
    25 steps in a row, refused or not finite, raise. The first ``warmup`` steps are accepted. State of the group:
    ``spikes``, float64: number of accepted steps, m.
    """

    settings: ClassVar[tuple[str, ...]] = ("factor", "beta")
    factor: Setting = 5.0
    beta: Setting = 0.98
    warmup: int = 20

    def slots(self, block: Block) -> dict[str, Slot]:
        """Steps and average."""
        return {"spikes": Slot("group", (2,), torch.float64)}

    def gauge(self, x: Batch, h: Hyper) -> dict[str, Tensor]:
        """The squared norm."""
        return {"square": square(x)}

    def refuses(self, total: Mapping[str, Tensor], shared: State, h: Hyper) -> str:
        """Whether the norm is a spike."""
        n, (steps, mean) = math.sqrt(float(total["square"])), shared["spikes"].tolist()
        if steps < self.warmup:
            return ""
        usual, factor = mean / (1 - float(number(h, self.beta)) ** steps), float(number(h, self.factor))
        return (
            f"its gradient has norm {n:.4g}, over {factor:g} times the usual {usual:.4g}" if n > factor * usual else ""
        )

    def combine(self, total: Mapping[str, Tensor], shared: State, h: Hyper) -> None:
        """Advance the average by an accepted norm."""
        n, (steps, mean), beta = float(total["square"].sqrt()), shared["spikes"].tolist(), float(number(h, self.beta))
        if math.isfinite(n):
            shared["spikes"].copy_(torch.tensor([steps + 1, beta * mean + (1 - beta) * n], dtype=torch.float64))

    def update(self, x: Batch, s: State, h: Hyper, total: Mapping[str, Tensor]) -> None:
        """Nothing: an accepted step is as it was."""
