"""Second moments in far fewer numbers than a tensor has: Adafactor, CAME, SM3, Adam-mini."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from guided_descent.parts.base import Batch, Hyper, Part, Slot, State, Unit, key
from guided_descent.parts.rows import Number, Rows
from guided_descent.routing.roles import Block, Role


@dataclass(frozen=True)
class Factored(Part):
    """What methods with a rank-one second moment share: which blocks are factored, and over which axes.

    Of a tensor with two or more axes the two longest ones are factored, the later of equal ones, or with ``last`` the
    last two; the others are a batch, and so is the axis of experts. Where one of the two is shorter than ``least`` the
    second moment is kept whole.
    """

    unit: ClassVar[Unit] = "block"
    least: int = 128
    last: bool = False

    def axes(self, block: Block) -> tuple[int, int] | None:
        """The factored axes (rows, columns), or ``None`` where the moment is whole."""
        shape = block.stored
        free: Sequence[int] = range(int(block.role is Role.EXPERT), len(shape))
        if len(block.pieces) > 1 or len(free) < 2 or not block.numel:
            return None
        i, j = sorted((free if self.last else sorted(free, key=lambda axis: (shape[axis], axis)))[-2:])
        return (i, j) if min(shape[i], shape[j]) >= self.least else None

    def moment(self, block: Block, row: str, column: str, whole: str = "") -> dict[str, Slot]:
        """The slots of a second moment: averages of rows and of columns, or one number for each element."""
        axes = self.axes(block)
        if axes is None:
            return {whole: Slot()} if whole else {}
        return {
            row: Slot("factor", without(block.stored, axes[1])),
            column: Slot("factor", without(block.stored, axes[0])),
        }


def without(shape: tuple[int, ...], *axes: int) -> tuple[int, ...]:
    """A shape with these axes cut down to 1."""
    return tuple(1 if axis in axes else side for axis, side in enumerate(shape))


def means(rows: Rows, axes: int | tuple[int, ...]) -> Tensor:
    """The mean of each tensor over some axes, which are kept, ``[rows, ...]``."""
    return torch.stack([row.mean(axes, keepdim=True) for row in rows.list])


def follow(average: Tensor, value: Tensor, gain: Number) -> Tensor:
    """``a <- a + gain (b - a)``."""
    return average.lerp_(value, gain.to(average.dtype) if isinstance(gain, Tensor) else gain)


def rank_one(
    squares: Rows, row: Tensor, column: Tensor, axes: tuple[int, int], gain: Number, eps: Number
) -> tuple[Tensor, Tensor]:
    """Advance a factored second moment v and return the two factors of ``1 / sqrt(v)``, ``[rows, ...]``.

    ``R <- R + gain (mean over columns of a^2 + eps - R)``, C likewise over rows, ``v = R C / mean(R)``.
    """
    i, j = axes
    follow(row, means(squares, j).add_(eps), gain)
    follow(column, means(squares, i).add_(eps), gain)
    return (row / row.mean(i + 1, keepdim=True)).rsqrt_(), column.rsqrt()


def spread(u: Rows, value: Rows, factors: tuple[Tensor, Tensor]) -> None:
    """``u <- a r c``, r and c broadcast."""
    for out, a, r, c in zip(u.list, value.list, *factors):
        torch.mul(a, r, out=out).mul_(c)


def beside(x: Batch, g: Rows) -> Rows:
    """Scratch beside g: that of the direction, unless g is in it."""
    return x.fresh() if g is x.g else x.spare("beside")


def larger(a: Number, b: Number) -> Number:
    """The maximum of two numbers, which may be tensors."""
    if isinstance(a, Tensor) or isinstance(b, Tensor):
        return torch.maximum(torch.as_tensor(a), torch.as_tensor(b))
    return max(a, b)


@dataclass(frozen=True)
class FactoredRoot(Factored):
    """A quotient: ``u <- u / sqrt(v)``, v an average of ``u^2 + eps[0]`` of rank one.

    R [m] is the average of the means of rows and C [n] that of columns, ``v_ij = R_i C_j / mean(R)``; see ``Factored``
    for what is factored, and ``gain`` for the share of a new square in the average. State: ``row_var`` and ``col_var``,
    with the axis over which they are means of length 1, or ``variance``.
    """

    eps: str = key("eps")

    def slots(self, block: Block) -> dict[str, Slot]:
        """The second moment."""
        return self.moment(block, "row_var", "col_var", "variance")

    def gain(self, x: Batch, h: Hyper) -> Number:
        """The share of the new square in the average."""
        raise TypeError(f"{type(self).__name__} does not define gain")

    def update(self, x: Batch, s: State, h: Hyper, total: Mapping[str, Tensor]) -> None:
        """Advance the moment and divide."""
        g, axes = x.read(), self.axes(x.blocks[0])
        gain, eps = self.gain(x, h), h[self.eps][0] * x.eps_scale**2
        squares = beside(x, g).copy_(g).mul_(g)
        if axes is not None:
            spread(x.fresh(), g, rank_one(squares, s["row_var"], s["col_var"], axes, gain, eps))
        else:
            s["variance"].lerp_(squares.add_(eps), gain)
            x.lend(squares.copy_(s["variance"]).sqrt_().rdiv_(g))

    def flops(self, block: Block) -> float:
        """About 6 per element."""
        return 6.0 * block.numel


@dataclass(frozen=True)
class AdafactorRoot(FactoredRoot):
    """Adafactor's quotient: at step t the average takes up ``t^decay`` of the new square, at least ``1 - cap``.

    So the first average is the first square, and there is no bias to correct. Source: Shazeer and Stern 2018,
    1804.04235.
    """

    decay: str = key("beta2_decay")
    cap: str = key("beta2_cap")

    def gain(self, x: Batch, h: Hyper) -> Number:
        """A power of the step."""
        return larger(x.step ** h[self.decay], 1 - h[self.cap])


@dataclass(frozen=True)
class CameRoot(FactoredRoot):
    """CAME's quotient: the average has the second of ``betas`` as its memory. Source: Luo et al. 2023, 2307.02047."""

    betas: str = key("betas")

    def gain(self, x: Batch, h: Hyper) -> Number:
        """The same in every step."""
        share: Number = 1 - h[self.betas][1]
        return share


@dataclass(frozen=True)
class BoundUpdate(Part):
    """Bound the root mean square of each tensor's direction: ``u <- u / max(1, RMS(u) / d)``; d ``None`` bounds none.

    Where ``floor`` names a pair, the direction is then given its parameter's size, ``u <- max(pair[1], RMS(p)) u``.
    Source: Shazeer and Stern 2018, 1804.04235.
    """

    slot: ClassVar[str] = "scale"
    unit: ClassVar[Unit] = "block"
    limit: str = key("d")
    floor: str = key("")

    @property
    def reads_parameter(self) -> bool:
        """For its size."""
        return bool(self.floor)

    def update(self, x: Batch, s: State, h: Hyper, total: Mapping[str, Tensor]) -> None:
        """Measure and scale."""
        limit, factor = h[self.limit], None
        if limit is not None:
            factor = 1 / (roots_of_mean_squares(x.read()) / limit).clamp(min=1.0)
        if self.floor:
            size = roots_of_mean_squares(x.p).clamp(min=h[self.floor][1])
            factor = size if factor is None else factor * size
        if factor is not None:
            x.take().mul_(x.by_row(factor))

    def flops(self, block: Block) -> float:
        """About 5 per element."""
        return (5.0 if self.floor else 3.0) * block.numel


def roots_of_mean_squares(rows: Rows) -> Tensor:
    """The root mean square of each tensor ``[rows]``; 0 for an empty one."""
    lengths = rows.norms()
    return lengths / lengths.new_tensor([max(row.numel(), 1) ** 0.5 for row in rows.list])


@dataclass(frozen=True)
class RelativeStep(Part):
    """A rate that falls by itself: ``u <- u min(1, 1 / (lr sqrt(t)))``, so that ``lr u`` becomes ``min(lr, t^-1/2) u``.

    Source: Shazeer and Stern 2018, 1804.04235.
    """

    slot: ClassVar[str] = "scale"
    lr: str = key("lr")

    def update(self, x: Batch, s: State, h: Hyper, total: Mapping[str, Tensor]) -> None:
        """Scale the direction; the step applies it."""
        x.scale(1 / larger(h[self.lr] * x.step**0.5, 1.0))


@dataclass(frozen=True)
class Confidence(Factored):
    """CAME's momentum, divided by how far directions are from it: ``u <- m / sqrt(S)``.

    ``m <- b1 m + (1 - b1) u``; S is the average with memory b3 of ``(u - m)^2 + eps[1]``, of rank one as in
    ``FactoredRoot``. Tensors whose moment is whole have no S: ``u <- m``. State: ``exp_avg``, shaped like the
    parameter, ``res_row``, ``res_col``. Source: Luo et al. 2023, 2307.02047.
    """

    slot: ClassVar[str] = "momentum"
    betas: str = key("betas")
    eps: str = key("eps")

    def slots(self, block: Block) -> dict[str, Slot]:
        """The momentum and the factors of S."""
        return {"exp_avg": Slot()} | self.moment(block, "res_row", "res_col")

    def update(self, x: Batch, s: State, h: Hyper, total: Mapping[str, Tensor]) -> None:
        """Advance the momentum, then S with the new one, and divide."""
        beta1, _, beta3 = h[self.betas]
        axes, average = self.axes(x.blocks[0]), s["exp_avg"].lerp_(x.read(), 1 - beta1)
        if axes is None:
            x.lend(average)
            return
        away = x.take().add_(average, alpha=-1.0)
        factors = rank_one(away.mul_(away), s["res_row"], s["res_col"], axes, 1 - beta3, h[self.eps][1])
        spread(x.fresh(), average, factors)

    def flops(self, block: Block) -> float:
        """About 9 per element."""
        return 9.0 * block.numel


@dataclass(frozen=True)
class CoverMaxima(Part):
    """SM3's direction: Adagrad's, with a bound of each element's sum of squares in the place of the sum.

    Each slice across an axis has one number, its cover; an element lies in one slice of every axis.
    ``v <- min(covers of the element) + u^2``; ``cover <- max(v of its elements)``; ``u <- u / (sqrt(v) + eps)``. So v
    is never below the sum of squares, and equal to it on a vector. State: ``cover_0``, ``cover_1``, ..., with the
    length of their axis. Source: Anil et al. 2019, 1901.11150 (SM3-II).
    """

    unit: ClassVar[Unit] = "block"
    eps: str = key("eps")

    def slots(self, block: Block) -> dict[str, Slot]:
        """The covers of each axis."""
        axes = range(len(block.stored))
        return {f"cover_{axis}": Slot("factor", without(block.stored, *others(axes, axis))) for axis in axes}

    def update(self, x: Batch, s: State, h: Hyper, total: Mapping[str, Tensor]) -> None:
        """Bound the sums, renew the covers, divide."""
        g, axes = x.read(), range(len(x.blocks[0].stored))
        bounds = beside(x, g)
        covers = [s[f"cover_{axis}"] for axis in axes]
        for v, a, *own in zip(bounds.list, g.list, *covers):
            v.copy_(own[0])
            for cover in own[1:]:
                torch.minimum(v, cover, out=v)
            v.addcmul_(a, a)
            for axis, cover in zip(axes, own):
                cover.copy_(v.amax(others(axes, axis), keepdim=True))
        x.lend(bounds.sqrt_().add_(h[self.eps] * x.eps_scale).rdiv_(g))

    def flops(self, block: Block) -> float:
        """About 4 per element, and 2 for each axis."""
        return (4.0 + 2.0 * len(block.stored)) * block.numel


def others(axes: Sequence[int], axis: int) -> tuple[int, ...]:
    """All axes but one."""
    return tuple(other for other in axes if other != axis)


# -- Adam-mini ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Cells:
    """How a tensor is divided into runs of rows that share a number.

    Attributes:
        axis: Axis of the rows.
        count: Number of runs along it.
        batch: Axes whose places each have runs of their own.
    """

    axis: int
    count: int
    batch: tuple[int, ...] = ()

    def split(self, tensor: Tensor) -> Tensor:
        """A view in which the axis of the rows is (runs, rows of a run)."""
        return tensor.view(*tensor.shape[: self.axis], self.count, -1, *tensor.shape[self.axis + 1 :])

    def shared(self, tensor: Tensor) -> tuple[int, ...]:
        """The axes of such a view that share a number."""
        return tuple(axis for axis in range(tensor.ndim) if axis != self.axis and axis not in self.batch)

    def shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """Shape of the numbers, which broadcasts over the view."""
        view = (*shape[: self.axis], self.count, 1, *shape[self.axis + 1 :])
        return tuple(side if axis == self.axis or axis in self.batch else 1 for axis, side in enumerate(view))


def cells(block: Block) -> Cells | None:
    """The runs of rows that share a second moment in Adam-mini; ``None`` where each element has its own.

    One for each output of a map (a row of its matrix), each channel of a convolution, each token of a table. The maps
    of queries and keys, where a rule or their storage divides them into heads, have one for each head; of a map whose
    part in a fused one is not known every head counts as such. Vectors and tensors of unknown meaning have none.
    """
    if len(block.pieces) > 1 or not block.numel:
        return None
    if block.is_matrix:
        [piece] = block.pieces
        stacked = int(block.role is Role.EXPERT)
        axes = piece.perm or tuple(range(len(piece.shape)))
        rows = piece.shape[axes[stacked]]
        label = block.key.removeprefix(piece.name).lstrip(".")
        if block.role is Role.FUSED and re.fullmatch(r"[qk]\d+", label):
            rows = 1  # the whole block is one head
        elif block.role in (Role.MATRIX, Role.FUSED) and block.batch > 1 and label != "v":
            rows = block.batch
        return Cells(axes[stacked], rows, axes[:stacked])
    if block.role in (Role.HEAD, Role.ROUTER, Role.DEPTHWISE):
        return Cells(0, block.shape[0])
    if block.role is Role.EMBEDDING and len(block.shape) > 1:
        return Cells(len(block.shape) - 2, block.shape[-2], tuple(range(len(block.shape) - 2)))
    return None


@dataclass(frozen=True)
class CellMoments(Part):
    """Adam-mini's direction: Adam's, with one second moment for all elements of a cell; see ``cells``.

    ``m <- b1 m + (1 - b1) u``, ``v <- b2 v + (1 - b2) mean of u^2 over the cell``,
    ``u <- (m / bc1) / (sqrt(v / bc2) + eps)`` with ``bc = 1 - b^t``. State: ``exp_avg``, shaped like the parameter;
    ``exp_avg_sq``, one number for each cell. Source: Zhang et al. 2024, 2406.16793.
    """

    unit: ClassVar[Unit] = "block"
    betas: str = key("betas")
    eps: str = key("eps")

    def slots(self, block: Block) -> dict[str, Slot]:
        """The first moment, and the second one of the cells."""
        return {"exp_avg": Slot(), "exp_avg_sq": Slot("factor", _cells(block).shape(block.stored))}

    def update(self, x: Batch, s: State, h: Hyper, total: Mapping[str, Tensor]) -> None:
        """Advance both moments and divide."""
        beta1, beta2 = h[self.betas]
        g, divided = x.read(), _cells(x.blocks[0])
        first, second = s["exp_avg"].lerp_(g, 1 - beta1), s["exp_avg_sq"]
        squares = Rows([divided.split(row) for row in beside(x, g).copy_(g).mul_(g).list])
        follow(second, means(squares, divided.shared(squares.list[0])), 1 - beta2)
        root = second.sqrt().div_((1 - beta2**x.step) ** 0.5).add_(h[self.eps] * x.eps_scale)
        for out, m, v in zip(x.fresh().list, first.list, root):
            torch.div(divided.split(m), v, out=divided.split(out))
        x.scale(1 / (1 - beta1**x.step))

    def flops(self, block: Block) -> float:
        """About 6 per element."""
        return 6.0 * block.numel


def _cells(block: Block) -> Cells:
    found = cells(block)
    if found is None:
        raise TypeError(f"{block.key} of role {block.role.value!r} has no cells: each element has a moment of its own")
    return found
