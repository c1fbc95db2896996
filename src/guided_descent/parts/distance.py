"""Learning rates found from the distance to the start: Prodigy, D-Adaptation, DoG and DoWG.

What they know of the distance is one number for all groups of a recipe, in the ``extra`` of each, and is made of sums
over all parameters. A group whose learning rate is 0 is left out of the sums and stays as it is.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from guided_descent.parts.base import Batch, Hyper, Part, Slot, State, Unit, key
from guided_descent.parts.rows import Rows
from guided_descent.routing.roles import Block

#: Where estimates end whose problem has no solution, such as a linear loss: float32 holds its square over d0.
LARGEST = 1e15


class Distance(Part):
    """What these parts share: their scalars and the sums that they read. A subclass names its numbers in ``agreed``."""

    joint: ClassVar[bool] = True
    scalars: ClassVar[tuple[str, ...]] = ()
    agreed: ClassVar[tuple[str, ...]] = ()
    lr: str = key()

    def slots(self, block: Block) -> dict[str, Slot]:
        """The scalars, 0 until the first update."""
        return {name: Slot("group", (), torch.float64) for name in self.scalars}

    def agrees(self, h: Hyper) -> Mapping[str, Any]:
        """The numbers of the estimate."""
        return {getattr(self, name): h[getattr(self, name)] for name in self.agreed}


def absolute(rows: Rows) -> Tensor:
    """``||a||_1`` over all rows, in float64."""
    return torch.stack([row.abs().sum(dtype=torch.float64) for row in rows.list]).sum()


def inner(a: Rows, b: Rows) -> Tensor:
    """``<a, b>`` over all rows, added in float64."""
    return torch.stack([torch.sum(x * y, dtype=torch.float64) for x, y in zip(a.list, b.list)]).sum()


def square(rows: Rows) -> Tensor:
    """``||a||^2`` over all rows, in float64."""
    return torch.stack([torch.linalg.vector_norm(row, dtype=torch.float64) for row in rows.list]).square().sum()


def gaps(a: Rows, b: Rows) -> Tensor:
    """``||a - b||`` of each row [rows], in float64."""
    pairs = zip(a.list, b.list)
    return torch.stack([torch.linalg.vector_norm(x - y, dtype=torch.float64) for x, y in pairs])


def numbers(total: Mapping[str, Tensor], *names: str) -> list[float]:
    """Totals as numbers; 0 where nobody has added anything."""
    return [float(total[name]) if name in total else 0.0 for name in names]


# -- an estimate of the distance from products of gradients and displacements ------------------------------------------


class Adapted(Distance):
    """What Prodigy and D-Adaptation share: d, a lower bound of the distance that grows; ``dlr = d lr`` is the rate.

    State: ``s``; for all groups ``d``, ``d_numerator`` and ``d_denominator``, by which d was last measured. A step in
    which the denominator is 0, because all gradients or all learning rates have been 0, changes nothing.
    """

    scalars: ClassVar[tuple[str, ...]] = ("d", "d_numerator", "d_denominator")
    agreed: ClassVar[tuple[str, ...]] = ("d0", "growth")
    d0: str = key()
    growth: str = key()

    def slots(self, block: Block) -> dict[str, Slot]:
        """The weighted sum of gradients and the scalars."""
        return super().slots(block) | {"s": Slot()}

    def d(self, s: State, h: Hyper) -> float:
        """The estimate, d0 at first."""
        return float(s["d"]) or float(h[self.d0])

    def measure(self, total: Mapping[str, Tensor], shared: State, memory: float, share: float = 1.0) -> float | None:
        """Advance numerator and denominator; their quotient, or ``None`` where there is none.

        ``numerator <- memory numerator + share sum``. Sums that are not finite leave it as it is.
        """
        added, norm = numbers(total, "numerator", "denominator")
        shared["d_denominator"].fill_(norm)
        if not math.isfinite(added) or not math.isfinite(norm) or norm == 0:
            return None
        shared["d_numerator"].mul_(memory).add_(share * added)
        return float(shared["d_numerator"]) / norm

    def waits(self, x: Batch, s: State, h: Hyper) -> bool:
        """Whether these parameters stay as they are this time."""
        if float(h[self.lr]) == 0 or float(s["d_denominator"]) == 0:
            x.hold()
        return x.held

    def flops(self, block: Block) -> float:
        """About 20 per element."""
        return 20.0 * block.numel


def correction(h: Hyper, betas: str, x: Batch, wanted: bool) -> float:
    """``sqrt(1 - b2^t) / (1 - b1^t)``, or 1."""
    beta1, beta2 = h[betas]
    return float((1 - beta2**x.step) ** 0.5 / (1 - beta1**x.step)) if wanted else 1.0


@dataclass(frozen=True)
class ProdigyMoments(Adapted):
    """Prodigy's direction and learning rate, from the way that has been gone: ``p0 - p``.

    With d from the step before and ``dlr = d lr``, times ``sqrt(1 - b2^t) / (1 - b1^t)`` with ``bias_correction``:

    ``num <- b3 num + (d / d0) dlr <u, p0 - p>``, ``m <- b1 m + d (1 - b1) u``, ``v <- b2 v + d^2 (1 - b2) u^2``,
    ``s <- b3 s + (d / d0) dlr u``; then ``d' = d_coef num / ||s||_1``, ``d <- max(d, d')`` while ``d = d0``,
    ``d_max <- max(d_max, d')``, ``d <- min(d_max, growth d)``; the direction is ``d lr m / (sqrt(v) + d eps)`` with the
    new d beside eps and the old one before. ``b3`` is ``sqrt(b2)`` unless given. With ``safeguard`` s takes
    ``(d / d0) d u``, so that a warmup of the learning rate does not inflate d. Sums are over all parameters. State:
    ``exp_avg``, ``exp_avg_sq``, ``p0``, ``s``; for all groups ``d``, ``d_max``, ``d_numerator``, ``d_denominator``.
    Source: Mishchenko and Defazio 2023, 2306.06101.
    """

    scalars: ClassVar[tuple[str, ...]] = (*Adapted.scalars, "d_max")
    agreed: ClassVar[tuple[str, ...]] = ("d0", "growth", "coefficient", "beta3")
    lr: str = key("lr")
    betas: str = key("betas")
    beta3: str = key("beta3")
    eps: str = key("eps")
    d0: str = key("d0")
    coefficient: str = key("d_coef")
    growth: str = key("growth_rate")
    bias_correction: bool = False
    safeguard: bool = False

    @property
    def reads_parameter(self) -> bool:
        """For the way from the start."""
        return True

    def slots(self, block: Block) -> dict[str, Slot]:
        """Moments, start and weighted sum."""
        return super().slots(block) | {"exp_avg": Slot(), "exp_avg_sq": Slot(), "p0": Slot()}

    def agrees(self, h: Hyper) -> Mapping[str, Any]:
        """The numbers of the estimate, b3 as it is used."""
        return {**super().agrees(h), self.beta3: self.memory(h)}

    def memory(self, h: Hyper) -> float:
        """b3."""
        given = h[self.beta3]
        return float(h[self.betas][1]) ** 0.5 if given is None else float(given)

    def sums(self, x: Batch, s: State, h: Hyper) -> dict[str, Tensor]:
        """``(d / d0) dlr <u, p0 - p>`` with the old d, and ``||s||_1``; advances the moments and s."""
        start, weighted = self.kept(s, "p0"), self.kept(s, "s")
        if x.first:
            start.copy_(self.chosen(x, x.p))
        rate, d = float(h[self.lr]), self.d(s, h)
        if rate == 0:
            return {}
        x.rate = d * correction(h, self.betas, x, self.bias_correction)
        weight = d / float(h[self.d0])
        g, (beta1, beta2) = x.read(), h[self.betas]
        seen = self.chosen(x, g)
        product = inner(seen, self.way(x, start))
        s["exp_avg"].mul_(beta1).add_(g, alpha=d * (1 - beta1))
        s["exp_avg_sq"].mul_(beta2).addcmul_(g, g, d * d * (1 - beta2))
        weighted.mul_(self.memory(h)).add_(seen, alpha=weight * (d if self.safeguard else rate * x.rate))
        return {"numerator": product * (weight * rate * x.rate), "denominator": absolute(weighted) * x.lr_scale}

    def kept(self, s: State, name: str) -> Rows:
        """A state of the elements from which d is estimated."""
        rows: Rows = s[name]
        return rows

    def chosen(self, x: Batch, rows: Rows) -> Rows:
        """These elements: all of them."""
        return rows

    def way(self, x: Batch, start: Rows) -> Rows:
        """``p0 - p`` of these elements."""
        return x.spare("way").copy_(start).add_(x.p, alpha=-1.0)

    def combine(self, total: Mapping[str, Tensor], shared: State, h: Hyper) -> None:
        """The new d."""
        d0, d = float(h[self.d0]), self.d(shared, h)
        shared["d"].fill_(d)
        quotient = self.measure(total, shared, self.memory(h))
        if quotient is None:
            return
        found = float(h[self.coefficient]) * quotient
        if d == d0:
            d = max(d, found)
        largest = max(float(shared["d_max"]) or d0, found)
        shared["d_max"].fill_(largest)
        shared["d"].fill_(min(largest, d * float(h[self.growth]), LARGEST))

    def update(self, x: Batch, s: State, h: Hyper, total: Mapping[str, Tensor]) -> None:
        """Divide the moments."""
        if not self.waits(x, s, h):
            least = self.d(s, h) * h[self.eps] * x.eps_scale
            x.fresh().copy_(s["exp_avg_sq"]).sqrt_().add_(least).rdiv_(s["exp_avg"])
            x.scale(x.rate)


@dataclass(frozen=True)
class SlicedProdigy(ProdigyMoments):
    """Prodigy that estimates d from every k-th element, so that ``p0`` and ``s`` take 1/k of the memory.

    It keeps them flat, ``[ceil(n / k)]`` for a tensor of n elements.
    """

    unit: ClassVar[Unit] = "block"
    every: int = 11

    def slots(self, block: Block) -> dict[str, Slot]:
        """Moments, and start and sum of the chosen elements."""
        flat = Slot("factor", (-(-block.numel // self.every),))
        return super().slots(block) | {"p0": flat, "s": flat}

    def kept(self, s: State, name: str) -> Rows:
        """The flat state, row by row."""
        return Rows(list(s[name].unbind()))

    def chosen(self, x: Batch, rows: Rows) -> Rows:
        """Every k-th element; of the real parts alone where they are complex."""
        strides = [self.every * (row.numel() // max(block.numel, 1)) for row, block in zip(rows.list, x.blocks)]
        return Rows([row.reshape(-1)[:: max(stride, 1)] for row, stride in zip(rows.list, strides)])

    def way(self, x: Batch, start: Rows) -> Rows:
        """``p0 - p`` of these elements."""
        return Rows([a - b for a, b in zip(start.list, self.chosen(x, x.p).list)])


@dataclass(frozen=True)
class DAdaptMoments(Adapted):
    """D-Adaptation's form of Adam: the learning rate is in the momentum, and ``Displace`` applies the direction.

    With d from the step before and ``dlr = d lr``, times ``sqrt(1 - b2^t) / (1 - b1^t)`` with ``bias_correction``:

    ``sum = dlr <u, s / (sqrt(v) + eps)>`` with the old v, ``m <- b1 m + dlr (1 - b1) u``, ``v <- b2 v + (1 - b2) u^2``,
    ``s <- c s + dlr (1 - c) u`` with ``c = sqrt(b2)``, ``num <- c num + (1 - c) sum``; then
    ``d <- max(d, min(num / ((1 - c) ||s||_1), growth d))`` and ``u <- m / (sqrt(v) + eps)``. A block's multiplier r of
    the learning rate is in m, in the sum, and weighs its part of the norm. Sums are over all parameters. State:
    ``exp_avg``, ``exp_avg_sq``, ``s``; for all groups ``d``, ``d_numerator``, ``d_denominator``. Source: Defazio and
    Mishchenko 2023, 2301.07733.
    """

    agreed: ClassVar[tuple[str, ...]] = ("d0", "growth")
    lr: str = key("lr")
    betas: str = key("betas")
    eps: str = key("eps")
    d0: str = key("d0")
    growth: str = key("growth_rate")
    bias_correction: bool = False

    def slots(self, block: Block) -> dict[str, Slot]:
        """Moments and weighted sum."""
        return super().slots(block) | {"exp_avg": Slot(), "exp_avg_sq": Slot()}

    def agrees(self, h: Hyper) -> Mapping[str, Any]:
        """The numbers of the estimate, among them the memory of the numerator."""
        return {**super().agrees(h), f"{self.betas}[1]": h[self.betas][1]}

    def sums(self, x: Batch, s: State, h: Hyper) -> dict[str, Tensor]:
        """``dlr <u, s / (sqrt(v) + eps)>`` with the old d and v, and ``||s||_1``; advances moments and s."""
        rate = float(h[self.lr])
        if rate == 0:
            return {}
        x.rate = self.d(s, h) * correction(h, self.betas, x, self.bias_correction)
        dlr, g, (beta1, beta2) = rate * x.rate, x.read(), h[self.betas]
        memory = float(beta2) ** 0.5
        scaled = x.spare("scaled").copy_(s["exp_avg_sq"]).sqrt_().add_(h[self.eps] * x.eps_scale).rdiv_(s["s"])
        product = inner(g, scaled)
        s["exp_avg"].mul_(beta1).add_(g, alpha=dlr * x.lr_scale * (1 - beta1))
        s["exp_avg_sq"].mul_(beta2).addcmul_(g, g, 1 - beta2)
        s["s"].mul_(memory).add_(g, alpha=dlr * (1 - memory))
        return {"numerator": product * (dlr * x.lr_scale), "denominator": absolute(s["s"]) * x.lr_scale}

    def combine(self, total: Mapping[str, Tensor], shared: State, h: Hyper) -> None:
        """The new d."""
        memory, d = float(h[self.betas][1]) ** 0.5, self.d(shared, h)
        quotient = self.measure(total, shared, memory, 1 - memory)
        found = d if quotient is None else quotient / (1 - memory)
        shared["d"].fill_(max(d, min(found, float(h[self.growth]) * d, LARGEST)))

    def update(self, x: Batch, s: State, h: Hyper, total: Mapping[str, Tensor]) -> None:
        """Divide the moments."""
        if not self.waits(x, s, h):
            x.fresh().copy_(s["exp_avg_sq"]).sqrt_().add_(h[self.eps] * x.eps_scale).rdiv_(s["exp_avg"])


@dataclass(frozen=True)
class DAdaptDual(Adapted):
    """D-Adaptation's form of SGD: dual averaging from the start, applied by ``Displace``.

    With d from the step before and ``dlr = d lr / ||g0||``, g0 the first gradient of all parameters:
    ``num <- num + dlr <u, s>``, ``s <- s + dlr u``, ``d <- max(d, min(2 num / ||s||, growth d))``, ``z = p0 - s`` and
    ``p <- mu p + (1 - mu) z``. Sums are over all parameters. State: ``p0``, ``s`` (times ``||g0||``); for all groups
    ``d``, ``d_numerator``, ``d_denominator`` (both in the same units) and ``g0_norm``. Source: Defazio and Mishchenko
    2023, 2301.07733.
    """

    scalars: ClassVar[tuple[str, ...]] = (*Adapted.scalars, "g0_norm")
    lr: str = key("lr")
    momentum: str = key("momentum")
    d0: str = key("d0")
    growth: str = key("growth_rate")

    @property
    def reads_parameter(self) -> bool:
        """For the way from the start."""
        return True

    def slots(self, block: Block) -> dict[str, Slot]:
        """Start and weighted sum."""
        return super().slots(block) | {"p0": Slot()}

    def sums(self, x: Batch, s: State, h: Hyper) -> dict[str, Tensor]:
        """``d lr <u, s>`` with the old d and s, and ``||s||^2``; advances s. At first ``||u||^2``, too."""
        if x.first:
            s["p0"].copy_(x.p)
        rate = float(h[self.lr])
        if rate == 0:
            return {}
        dlr, g = self.d(s, h) * rate * x.lr_scale, x.read()
        found = {"numerator": dlr * inner(g, s["s"])}
        if float(s["g0_norm"]) == 0:
            found["first"] = square(g)
        s["s"].add_(g, alpha=dlr)
        return found | {"square": square(s["s"])}

    def combine(self, total: Mapping[str, Tensor], shared: State, h: Hyper) -> None:
        """The new d."""
        d = self.d(shared, h)
        first, whole = (value**0.5 for value in numbers(total, "first", "square"))
        if float(shared["g0_norm"]) == 0 and math.isfinite(first):
            shared["g0_norm"].fill_(first)
        norm = shared["g0_norm"] * whole
        quotient = self.measure({**total, "denominator": norm}, shared, 1.0)
        shared["d"].fill_(d if quotient is None else max(d, min(2 * quotient, float(h[self.growth]) * d, LARGEST)))

    def update(self, x: Batch, s: State, h: Hyper, total: Mapping[str, Tensor]) -> None:
        """The displacement, ``(1 - mu) (p - p0 + s)``."""
        if not self.waits(x, s, h) and float(s["g0_norm"]):
            gone = x.fresh().copy_(x.p).add_(s["p0"], alpha=-1.0)
            gone.add_(s["s"], alpha=1 / float(s["g0_norm"]))
            x.scale(1 - h[self.momentum])


# -- the distance itself -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class DistanceOverGradients(Distance):
    """DoG's learning rate: the largest distance from the start so far, over the root of the squared gradients.

    ``r <- max(r, ||p - p0||)``, ``G <- G + ||u||^2``, ``u <- r / sqrt(G + eps) u``; r begins with
    ``r_eps (1 + ||p0||)``. With ``weighted`` it is DoWG's: ``G <- G + r^2 ||u||^2``, ``u <- r^2 / (sqrt(G) + eps) u``.
    Norms are over all parameters. State: ``p0``; for all groups ``distance`` and ``gradients``, r and G. Source: Ivgi,
    Hinder and Carmon 2023, 2302.12022; Khaled, Mishchenko and Jin 2023, 2305.16284.
    """

    scalars: ClassVar[tuple[str, ...]] = ("distance", "gradients")
    agreed: ClassVar[tuple[str, ...]] = ("first", "eps")
    lr: str = key("lr")
    first: str = key("r_eps")
    eps: str = key("eps")
    weighted: bool = False

    @property
    def reads_parameter(self) -> bool:
        """For the way from the start."""
        return True

    def slots(self, block: Block) -> dict[str, Slot]:
        """The start, and the scalars."""
        return super().slots(block) | {"p0": Slot()}

    def sums(self, x: Batch, s: State, h: Hyper) -> dict[str, Tensor]:
        """``||p - p0||^2`` and ``||u||^2``; at first ``||p0||^2``, too."""
        if x.first:
            s["p0"].copy_(x.p)
        if float(h[self.lr]) == 0:
            return {}
        found = {"way": gaps(x.p, s["p0"]).square().sum(), "gradient": square(x.read())}
        return found if float(s["distance"]) else found | {"start": square(s["p0"])}

    def combine(self, total: Mapping[str, Tensor], shared: State, h: Hyper) -> None:
        """The new distance, and the sum of squares."""
        way, gradient, start = numbers(total, "way", "gradient", "start")
        if not math.isfinite(way + gradient + start) or not total:
            return
        distance = max(float(shared["distance"]) or float(h[self.first]) * (1 + start**0.5), way**0.5)
        shared["distance"].fill_(distance)
        shared["gradients"].add_(gradient * (distance**2 if self.weighted else 1.0))

    def update(self, x: Batch, s: State, h: Hyper, total: Mapping[str, Tensor]) -> None:
        """Scale the gradient; the step applies it."""
        distance, gradients, eps = float(s["distance"]), float(s["gradients"]), float(h[self.eps])
        if self.weighted:
            x.scale(distance**2 / (gradients**0.5 + eps) if distance else 0.0)
        else:
            x.scale(distance / (gradients + eps) ** 0.5 if distance else 0.0)

    def flops(self, block: Block) -> float:
        """About 6 per element."""
        return 6.0 * block.numel


@dataclass(frozen=True)
class DistanceByLayer(Part):
    """DoG's learning rate for each tensor by itself, L-DoG; see ``DistanceOverGradients``.

    State: ``p0``, and the numbers ``distance`` and ``gradients``.
    """

    unit: ClassVar[Unit] = "block"
    first: str = key("r_eps")
    eps: str = key("eps")

    @property
    def reads_parameter(self) -> bool:
        """For the way from the start."""
        return True

    def slots(self, block: Block) -> dict[str, Slot]:
        """The start, the distance from it, and the sum of squares."""
        number = Slot("factor", (), torch.float64)
        return {"p0": Slot(), "distance": number, "gradients": number}

    def update(self, x: Batch, s: State, h: Hyper, total: Mapping[str, Tensor]) -> None:
        """Measure and scale."""
        start, distance, gradients, u = s["p0"], s["distance"], s["gradients"], x.take()
        if x.first:
            start.copy_(x.p)
            distance.copy_(h[self.first] * (1 + start.norms()))
        distance.copy_(torch.maximum(distance, gaps(x.p, start)))
        gradients.add_(u.norms().double().square())
        u.mul_(x.by_row(distance / (gradients + h[self.eps]).sqrt()))

    def flops(self, block: Block) -> float:
        """About 7 per element."""
        return 7.0 * block.numel
