"""Gradients that are long beside those before them: clipped by their history, or their step left out."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from guided_descent.parts.base import Batch, Hyper, Part, Slot, State, Unit, key
from guided_descent.parts.clip import block_norms, bounded, shorten, square
from guided_descent.parts.numbers import hyper, static
from guided_descent.parts.wrapper import Wrapper, wrapper
from guided_descent.routing.roles import Block


@dataclass(frozen=True)
class DeviationClip(Part):
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

    slot: ClassVar[str] = "clip"
    z_max: str = key("zclip_z_max")
    beta: str = key("zclip_beta")
    max_norm: str = key("zclip_max_norm")
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
        bound, beta, most = float(h[self.max_norm]), float(h[self.beta]), float(h[self.z_max])
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
class HistoryClip(Part):
    """Norm clipping of each block by the norms that it has had.

    The first ``warmup`` updates clip the norm of all gradients to ``max_norm``, as ``ClipNorm`` does, while gamma
    becomes the least clipped norm of the block. Then ``u <- u min(1, rel gamma / ||u||)`` and, with the clipped u,
    ``gamma <- beta gamma + (1 - beta) ||u||``. A gradient of norm 0 teaches nothing, since a gamma of 0 would stay 0.
    Counted as ``adagc``. State: ``adagc``, one number for each block. Source: Wang et al. 2025, 2502.11034.
    """

    slot: ClassVar[str] = "clip"
    unit: ClassVar[Unit] = "block"
    rel: str = key("adagc_rel")
    beta: str = key("adagc_beta")
    max_norm: str = key("adagc_max_norm")
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
            factors = bounded(total["square"].sqrt(), h[self.max_norm]).expand_as(norms)
            learned = torch.minimum(gamma, factors * norms)
        else:
            bound, beta = h[self.rel] * gamma, h[self.beta]
            factors = torch.where((gamma > 0) & (norms > bound), bound / norms, 1.0)
            learned = beta * gamma + (1 - beta) * factors * norms
        learned = torch.where(gamma > 0, learned, factors * norms)
        s["adagc"].copy_(torch.where(norms > 0, learned, gamma))
        shorten(x, factors)
        x.tick("adagc_seen")
        x.tick("adagc_clipped", factors < 1)


@dataclass(frozen=True)
class SpikeRefusal(Part):
    """Leave out a step whose gradient is far longer than those before it: ``n > factor m``.

    n is the norm of all gradients as they come, before any clipping, and m the average of the n of accepted steps,
    ``m <- beta m + (1 - beta) n``, bias-corrected. A refused step changes nothing at all; it is counted as skipped, and
    25 steps in a row, refused or not finite, raise. The first ``warmup`` steps are accepted. State of the group:
    ``spikes``, float64: number of accepted steps, m.
    """

    slot: ClassVar[str] = "clip"
    factor: str = key("skip_spikes_factor")
    beta: str = key("skip_spikes_beta")
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
        usual, factor = mean / (1 - float(h[self.beta]) ** steps), float(h[self.factor])
        return (
            f"its gradient has norm {n:.4g}, over {factor:g} times the usual {usual:.4g}" if n > factor * usual else ""
        )

    def combine(self, total: Mapping[str, Tensor], shared: State, h: Hyper) -> None:
        """Advance the average by an accepted norm."""
        n, (steps, mean), beta = float(total["square"].sqrt()), shared["spikes"].tolist(), float(h[self.beta])
        if math.isfinite(n):
            shared["spikes"].copy_(torch.tensor([steps + 1, beta * mean + (1 - beta) * n], dtype=torch.float64))

    def update(self, x: Batch, s: State, h: Hyper, total: Mapping[str, Tensor]) -> None:
        """Nothing: an accepted step is as it was."""


# -- for any recipe ----------------------------------------------------------------------------------------------------


@wrapper(
    "zclip",
    paper="Kumar et al. 2025, arXiv:2504.02507",
    use="spikes of the gradient norm in long runs, without a threshold to choose",
    avoid="the first steps: it learns from 25 of them",
)
@dataclass(frozen=True, kw_only=True)
class ZClip(Wrapper):
    """Bound the norm of all gradients by the mean and deviation of the norms before it.

    Where ``z = (n - mean) / std`` exceeds ``z_max``, n becomes ``mean + z_max^2 std / z``; at most ``max_norm`` always.
    """

    z_max: float = hyper(2.5, gt=0, help="deviations from the mean norm that are let through")
    beta: float = hyper(0.97, ge=0, lt=1, help="memory of mean and variance")
    max_norm: float = hyper(1.0, gt=0, help="largest norm in any case, and in the warmup; inf bounds nothing")
    warmup: int = static(25, ge=1, help="first steps, whose norms make the first mean and variance")

    def part(self) -> Part:
        """The clip."""
        z_max, beta, max_norm, _ = self.numbers()
        return DeviationClip(z_max, beta, max_norm, self.warmup)


@wrapper(
    "adagc",
    paper="Wang et al. 2025, arXiv:2502.11034",
    use="spikes of single tensors in long runs",
    avoid="runs shorter than its first hundred steps",
)
@dataclass(frozen=True, kw_only=True)
class AdaGC(Wrapper):
    """Bound the norm of each gradient by the average of its own clipped norms: ``g <- g min(1, rel gamma / ||g||)``."""

    rel: float = hyper(1.05, gt=0, help="largest norm over the average of those before it")
    beta: float = hyper(0.98, ge=0, lt=1, help="memory of the average")
    max_norm: float = hyper(1.0, gt=0, help="largest norm of all gradients together in the warmup")
    warmup: int = static(100, ge=1, help="first updates, whose least norm begins the average")

    def part(self) -> Part:
        """The clip."""
        rel, beta, max_norm, _ = self.numbers()
        return HistoryClip(rel, beta, max_norm, self.warmup)


@wrapper(
    "skip_spikes",
    paper="common practice",
    use="batches that are broken now and then",
    avoid="gradients that are large for a reason",
)
@dataclass(frozen=True, kw_only=True)
class SkipSpikes(Wrapper):
    """Leave out a step whose gradient is ``factor`` times as long as those before it on average; it changes nothing."""

    factor: float = hyper(5.0, gt=0, help="largest norm of all gradients over the average of accepted ones")
    beta: float = hyper(0.98, ge=0, lt=1, help="memory of the average")
    warmup: int = static(20, ge=1, help="first steps, all of which are accepted")

    def part(self) -> Part:
        """What refuses."""
        factor, beta, _ = self.numbers()
        return SpikeRefusal(factor, beta, self.warmup)
