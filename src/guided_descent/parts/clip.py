"""Clipping: of the gradient before anything sees it, of the update by its length, and by what curvature says.

Wrappers carry it to any recipe: ``gd.build(model, recipe, add=[gd.parts.AGC()])``. Each part counts what it has seen
and what it has cut, under names such as ``norm_seen`` and ``norm_clipped``, so that ``optimizer.audit()`` tells the
share that was clipped.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import ClassVar, TypeVar

import torch
from torch import Tensor

from guided_descent.parts.base import Batch, Hyper, Part, State, Unit, key
from guided_descent.parts.damping import inner
from guided_descent.parts.numbers import hyper, static
from guided_descent.parts.rows import Number
from guided_descent.parts.wrapper import Wrapper, wrapper
from guided_descent.routing.roles import Block, Piece, Role

T = TypeVar("T")


def square(x: Batch) -> Tensor:
    """The squared norm of the direction, a float64 scalar."""
    return x.u.norms().double().square().sum() * x.factor**2


def bounded(length: Tensor, bound: Number) -> Tensor:
    """What shortens a length to a bound, ``min(1, bound / (length + 1e-6))`` as in torch."""
    return (bound / (length + 1e-6)).clamp(max=1.0)


def grouped(x: Batch, rows: Sequence[T]) -> list[Sequence[T]]:
    """What belongs to the rows of a batch, block by block: the pieces of a block are rows of their own."""
    ends = list(accumulate(len(block.pieces) for block in x.blocks))
    return [rows[end - len(block.pieces) : end] for end, block in zip(ends, x.blocks)]


def block_norms(x: Batch) -> Tensor:
    """Norm of each block of the direction [B], over all its pieces, in float64."""
    norms = x.u.norms().double() * x.factor
    if len(norms) == len(x.blocks):
        return norms
    return torch.stack([torch.stack(list(each)).square().sum().sqrt() for each in grouped(x, norms.unbind())])


def shorten(x: Batch, factors: Tensor) -> None:
    """Multiply each block of the direction by its own factor [B]; free where all are one number."""
    each = x.by_block(factors)
    if isinstance(each, float):
        x.scale(each)
    else:
        x.take().mul_(each)


def count(x: Batch, name: str, clipped: list[Tensor], seen: list[int]) -> None:
    """Count what was clipped in each row, and of how much."""
    x.tick(f"{name}_clipped", torch.stack([torch.stack(list(each)).sum() for each in grouped(x, clipped)]))
    x.tick(f"{name}_seen", [sum(each) for each in grouped(x, seen)])


# -- by norms of the whole ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class NormClip(Part):
    """Global norm clipping: ``u <- u min(1, c / (n + 1e-6))`` with n the norm of all gradients.

    The norm is summed over all tensors, groups and ranks that have this part, each counted once, in float64. Under
    Adam it matters through bursts, under Muon through the share that a spike has of the momentum, under Lion hardly.
    Counted as ``norm``, once for each parameter. Source: Pascanu, Mikolov and Bengio 2013, 1211.5063.
    """

    slot: ClassVar[str] = "clip"
    max_norm: str = key("clip_norm_max_norm")

    def idle(self, h: Hyper) -> bool:
        """Nothing to do without a bound."""
        return math.isinf(h[self.max_norm])

    def sums(self, x: Batch, s: State, h: Hyper) -> dict[str, Tensor]:
        """The squared norm."""
        return {"square": square(x)}

    def update(self, x: Batch, s: State, h: Hyper, total: Mapping[str, Tensor]) -> None:
        """Shorten the gradient."""
        factor = float(bounded(total["square"].sqrt(), h[self.max_norm]))
        x.scale(factor)
        x.tick("norm_seen")
        x.tick("norm_clipped", int(factor < 1))

    def flops(self, block: Block) -> float:
        """Two per element."""
        return 2.0 * block.numel


# -- tensor by tensor --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class BlockClip(Part):
    """Norm clipping of each block by itself: ``u <- u min(1, c / (||u|| + 1e-6))``; it turns the whole gradient.

    A block is a tensor, or one of several maps in it, where a recipe for matrices takes them apart. Counted as
    ``each``.
    """

    slot: ClassVar[str] = "clip"
    unit: ClassVar[Unit] = "block"
    max_norm: str = key("clip_each_max_norm")

    def idle(self, h: Hyper) -> bool:
        """Nothing to do without a bound."""
        return math.isinf(h[self.max_norm])

    def update(self, x: Batch, s: State, h: Hyper, total: Mapping[str, Tensor]) -> None:
        """Measure and shorten."""
        factors = bounded(block_norms(x), h[self.max_norm])
        shorten(x, factors)
        x.tick("each_seen")
        x.tick("each_clipped", factors < 1)

    def flops(self, block: Block) -> float:
        """Two per element."""
        return 2.0 * block.numel


@dataclass(frozen=True)
class ValueClip(Part):
    """Clipping of the elements of the gradient: ``u <- min(max(u, -c), c)``. Counted as ``value``, by elements."""

    slot: ClassVar[str] = "clip"
    max_value: str = key("clip_value_max_value")

    def idle(self, h: Hyper) -> bool:
        """Nothing to do without a bound."""
        return math.isinf(h[self.max_value])

    def update(self, x: Batch, s: State, h: Hyper, total: Mapping[str, Tensor]) -> None:
        """Cut."""
        bound, u = h[self.max_value], x.take()
        count(x, "value", [(row.abs() > bound).sum() for row in u.list], [row.numel() for row in u.list])
        u.clamp_(-bound, bound)

    def flops(self, block: Block) -> float:
        """Two per element."""
        return 2.0 * block.numel


@dataclass(frozen=True)
class UpdateClip(Part):
    """Clipping of the update by its root mean square: ``u <- u / max(1, RMS(u) / d)``, block by block.

    For directions whose elements should be about 1, before the learning rate and any decay beside the step, as in
    Adafactor. Counted as ``update``. Source: Shazeer and Stern 2018, 1804.04235.
    """

    slot: ClassVar[str] = "scale"
    unit: ClassVar[Unit] = "block"
    max_rms: str = key("clip_update_max_rms")

    def idle(self, h: Hyper) -> bool:
        """Nothing to do without a bound."""
        return math.isinf(h[self.max_rms])

    def update(self, x: Batch, s: State, h: Hyper, total: Mapping[str, Tensor]) -> None:
        """Measure and shorten."""
        norms = block_norms(x)
        roots = norms.new_tensor([max(block.numel, 1) ** 0.5 for block in x.blocks])
        excess = norms / (roots * h[self.max_rms])
        shorten(x, 1 / excess.clamp(min=1.0))
        x.tick("update_seen")
        x.tick("update_clipped", excess > 1)

    def flops(self, block: Block) -> float:
        """Two per element."""
        return 2.0 * block.numel


# -- row by row --------------------------------------------------------------------------------------------------------


def places(x: Batch) -> list[tuple[Block, Piece]]:
    """Block and piece of each row."""
    return [(block, piece) for block in x.blocks for piece in block.pieces]


def unit_axes(block: Block, piece: Piece) -> tuple[int, ...] | None:
    """The axes of a piece, in its own layout, that one output of its map runs over; ``None``: all, for a vector.

    For a matrix [out, in] it is 1, for a convolution [out, in, kh, kw] it is (1, 2, 3), for a stack of experts
    [E, out, in] it is 2, and for a matrix stored [in, out] it is 0.
    """
    order = list(piece.perm or range(len(piece.shape)))
    if sum(size != 1 for size in piece.shape) < 2:
        return None
    lead = math.prod(block.shape[:-1]) if block.is_matrix else piece.shape[order[0]]
    kept = 1
    while math.prod(piece.shape[axis] for axis in order[:kept]) < lead and kept < len(order) - 1:
        kept += 1
    return tuple(sorted(order[kept:]))


def unit_norm(row: Tensor, axes: tuple[int, ...] | None, piece: Piece) -> Tensor:
    """Norm over these axes, which are kept with length 1, in float32 at least."""
    if axes is not None and row.ndim > len(piece.shape):  # a pair of reals
        axes = (*axes, row.ndim - 1)
    norm: Tensor = torch.linalg.vector_norm(row, dim=axes, keepdim=True)
    return norm


@dataclass(frozen=True)
class RowClip(Part):
    """Adaptive gradient clipping: no row of a gradient is longer than a part of its row of weights.

    Row i, one output of its map (over (1, 2, 3) of a convolution; a vector is one row): with
    ``c = clip max(||p_i||, floor)``, where ``||u_i|| > c`` it is ``u_i <- u_i c / max(||u_i||, 1e-6)``. Heads are left
    alone, since the method was found to need that; ``head`` takes them too. Counted as ``agc``, by rows. Source: Brock
    et al. 2021, 2102.06171.
    """

    slot: ClassVar[str] = "clip"
    unit: ClassVar[Unit] = "block"
    clip: str = key("agc_clip")
    floor: str = key("agc_floor")
    head: bool = False

    @property
    def reads_parameter(self) -> bool:
        """For the norms of its rows."""
        return True

    def idle(self, h: Hyper) -> bool:
        """Nothing to do without a bound."""
        return math.isinf(h[self.clip])

    def update(self, x: Batch, s: State, h: Hyper, total: Mapping[str, Tensor]) -> None:
        """Measure and shorten, row by row."""
        clipped, seen = [], []
        for u, p, (block, piece) in zip(x.take().list, x.p.list, places(x)):
            if block.role == Role.HEAD and not self.head:
                clipped.append(torch.zeros((), dtype=torch.long, device=u.device))
                seen.append(0)
                continue
            axes = unit_axes(block, piece)
            norm = unit_norm(u, axes, piece)
            bound = h[self.clip] * unit_norm(p, axes, piece).clamp(min=h[self.floor])
            over = norm > bound
            u.mul_(torch.where(over, bound / norm.clamp(min=1e-6), 1.0))
            clipped.append(over.sum())
            seen.append(over.numel())
        count(x, "agc", clipped, seen)

    def flops(self, block: Block) -> float:
        """Five per element."""
        return 5.0 * block.numel


@dataclass(frozen=True)
class Centralize(Part):
    """Gradient centralisation: each row of a gradient, one output of its map, loses its mean; vectors stay.

    Source: Yong et al. 2020, 2004.01461.
    """

    slot: ClassVar[str] = "clip"
    unit: ClassVar[Unit] = "block"

    def update(self, x: Batch, s: State, h: Hyper, total: Mapping[str, Tensor]) -> None:
        """Subtract the means."""
        for u, (block, piece) in zip(x.take().list, places(x)):
            axes = unit_axes(block, piece)
            if axes is not None and u.numel():
                u.sub_(u.mean(axes, keepdim=True))

    def flops(self, block: Block) -> float:
        """Two per element."""
        return 2.0 * block.numel


# -- for any recipe ----------------------------------------------------------------------------------------------------


@wrapper(
    "clip_norm",
    paper="Pascanu, Mikolov and Bengio 2013, arXiv:1211.5063",
    use="the usual guard of language models and recurrent networks",
    avoid="sign methods, which see no length",
)
@dataclass(frozen=True, kw_only=True)
class ClipNorm(Wrapper):
    """Bound the norm of all gradients together, over all groups: ``g <- g min(1, max_norm / (||g|| + 1e-6))``."""

    max_norm: float = hyper(1.0, gt=0, help="largest norm of all gradients; inf bounds nothing")

    def part(self) -> Part:
        """The clip."""
        return NormClip(*self.numbers())


@wrapper(
    "clip_each",
    paper="Pascanu, Mikolov and Bengio 2013, arXiv:1211.5063",
    use="one layer's burst that must not slow the others",
    avoid="models whose direction must stay that of the gradient",
)
@dataclass(frozen=True, kw_only=True)
class ClipEach(Wrapper):
    """Bound the norm of each gradient by itself: ``g <- g min(1, max_norm / (||g|| + 1e-6))``."""

    max_norm: float = hyper(1.0, gt=0, help="largest norm of a block's gradient; inf bounds nothing")

    def part(self) -> Part:
        """The clip."""
        return BlockClip(*self.numbers())


@wrapper(
    "clip_value", paper="Mikolov 2012", use="published settings that name it", avoid="new work: it turns the gradient"
)
@dataclass(frozen=True, kw_only=True)
class ClipValue(Wrapper):
    """Bound the elements of the gradients: ``g <- min(max(g, -max_value), max_value)``."""

    max_value: float = hyper(1.0, gt=0, help="largest magnitude of an element; inf bounds nothing")

    def part(self) -> Part:
        """The clip."""
        return ValueClip(*self.numbers())


@wrapper(
    "clip_update",
    paper="Shazeer and Stern 2018, arXiv:1804.04235",
    use="updates that must stay small whatever the second moment says",
    avoid="recipes that normalise their update",
)
@dataclass(frozen=True, kw_only=True)
class ClipUpdate(Wrapper):
    """Bound the root mean square of each update, before the learning rate: ``u <- u / max(1, RMS(u) / max_rms)``."""

    max_rms: float = hyper(1.0, gt=0, help="largest root mean square of an update; inf bounds nothing")

    def part(self) -> Part:
        """The clip."""
        return UpdateClip(*self.numbers())


@wrapper(
    "agc",
    paper="Brock et al. 2021, arXiv:2102.06171",
    use="networks without normalisation layers",
    avoid="heads and embeddings, which it leaves alone",
)
@dataclass(frozen=True, kw_only=True)
class AGC(Wrapper):
    """Bound each row of a gradient by a part of its row of weights; heads are left alone.

    Where ``||g_i|| > c`` with ``c = clip max(||w_i||, floor)``: ``g_i <- g_i c / max(||g_i||, 1e-6)``. Batches of 4096
    take a ``clip`` of 0.01, smaller ones up to 0.16.
    """

    clip: float = hyper(0.01, gt=0, help="largest norm of a row over that of its weights; inf bounds nothing")
    floor: float = hyper(1e-3, gt=0, help="least norm that weights count with")
    head: bool = static(False, help="clip the output layer too")

    def part(self) -> Part:
        """The clip."""
        clip, floor, _ = self.numbers()
        return RowClip(clip, floor, self.head)


# -- by curvature ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class KlClip(Part):
    """Scale all layers by ``nu = min(1, sqrt(kappa / |sum lr^2 <Ghat, G>|))``.

    Ghat is the preconditioned gradient and G the gradient, so that the sum, over all layers, groups and ranks that have
    this part and in float64, is about twice the change that the step makes in KL divergence. With ``signed`` a sum that
    is not positive is left alone, which is the norm constraint of kfac-jax: it differs only where coupled decay turns
    Ghat against G. ``coupled`` names the key of a coupled decay, which then counts as a part of G. Source: Ba, Grosse
    and Martens 2017; kfac-pytorch; kfac-jax.
    """

    slot: ClassVar[str] = "scale"
    kappa: str = key("kl_clip")
    lr: str = key("lr")
    signed: bool = False
    coupled: str = key("")

    @property
    def reads_parameter(self) -> bool:
        """Where decay is a part of the gradient."""
        return bool(self.coupled)

    def idle(self, h: Hyper) -> bool:
        """Nothing to do without a bound."""
        return h[self.kappa] is None

    def sums(self, x: Batch, s: State, h: Hyper) -> dict[str, Tensor]:
        """``lr^2 <Ghat, G>``."""
        rate: Number = h[self.lr] * x.lr_scale
        product = inner(x.u.list, x.g.list)
        if self.coupled:
            decay = h[self.coupled]
            scales = x.wd_scale if isinstance(x.wd_scale, list) else [x.wd_scale] * len(x.u)
            for u, p, scale in zip(x.u.list, x.p.list, scales):
                product = product + decay * scale * torch.sum(u * p, dtype=torch.float64)
        return {"kl": product * (rate * rate * x.factor)}

    def update(self, x: Batch, s: State, h: Hyper, total: Mapping[str, Tensor]) -> None:
        """Shorten the direction."""
        kl = total["kl"] if self.signed else total["kl"].abs()
        ratio = h[self.kappa] / torch.where(kl > 0, kl, torch.inf)
        nu = torch.where(kl > 0, ratio.sqrt().clamp(max=1.0), 1.0)
        x.scale(float(nu))
        if float(nu) < 1:
            x.tick("clipped")

    def flops(self, block: Block) -> float:
        """Two per element."""
        return 2.0 * block.numel
