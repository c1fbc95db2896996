"""Directions on the ball of a norm: the linear minimisation oracles (LMO) of Scion and the duality maps of Modula.

For a norm, ``lmo(u)`` is the point of its unit ball that has the largest product with ``u``. Steps along it have one
length in that norm, whatever the gradient's. Matrices are (out, in); ``d_o`` and ``d_i`` are their sides.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from guided_descent.linalg.workspace import Workspace
from guided_descent.parts.base import Batch, Hyper, Part, State, Unit, key
from guided_descent.parts.geometry.spectral import Polar, sign_
from guided_descent.routing.roles import Block, Role


def sides(block: Block) -> tuple[int, int]:
    """``(d_o, columns)`` of a block: its matrix view, or that of a tensor ``[out, ...]``."""
    if block.is_matrix:
        return block.shape[-2], block.shape[-1]
    return block.shape[0], math.prod(block.shape[1:])


def positions(block: Block) -> int:
    """Number of positions of a convolution's kernel, ``k^2``; 1 for other maps."""
    convolution = block.role is Role.CONV or (not block.is_matrix and len(block.shape) > 2)
    return math.prod(block.pieces[0].shape[2:]) if convolution else 1


@dataclass(frozen=True)
class Lmo(Part):
    """``u <- rho lmo(u)``; ``radius`` names the key of rho, and ``""`` is 1. Subclasses say which norm.

    Source: Pethick et al. 2025, 2502.07529; Bernstein and Newhouse 2024, 2410.21265.
    """

    slot: ClassVar[str] = "geometry"
    radius: str = key("radius")

    def ball(self, u: Tensor, block: Block, h: Hyper, work: Workspace | None = None) -> float:
        """Replace ``u`` by ``lmo(u)`` in place, but for the factor that it returns.

        Args:
            u: A tensor like the block, or a stack of such where the unit is ``matrix``.
            block: The block, of which the shape matters.
            h: The group's numbers.
            work: Scratch memory.
        """
        raise TypeError(f"{type(self).__name__} does not define ball")

    def update(self, x: Batch, s: State, h: Hyper, total: Mapping[str, Tensor]) -> None:
        """Replace the direction by a point on the ball."""
        u = x.take()
        if self.unit == "matrix":
            factors = [self.ball(u.whole, x.blocks[0], h, x.work)]
        else:
            factors = [self.ball(row, block, h) for row, block in zip(u.list, x.blocks)]
        if len(set(factors)) > 1:
            u.mul_(factors)
        else:
            x.scale(factors[0])
        if self.radius:
            x.scale(h[self.radius])

    def flops(self, block: Block) -> float:
        """About 3 per element."""
        return 3.0 * block.numel


@dataclass(frozen=True)
class SpectralLmo(Lmo, Polar):
    """RMS to RMS: ``lmo(u) = sqrt(d_o / d_i) U V^T``, of spectral norm ``sqrt(d_o / d_i)``.

    A convolution with k positions, seen as ``[d_o, d_i k]``, has ``sqrt(d_o / d_i) / k U V^T``; with ``each`` every
    position of its kernel is a matrix ``[d_o, d_i]`` of its own, as in Modula. With ``least`` the factor is at least 1,
    for inputs that are not wide. Counted as ``orthogonalizations``.
    """

    each: bool = False
    least: bool = False

    def update(self, x: Batch, s: State, h: Hyper, total: Mapping[str, Tensor]) -> None:
        """Replace the direction, and count."""
        super().update(x, s, h, total)
        x.tick("orthogonalizations")

    def ball(self, u: Tensor, block: Block, h: Hyper, work: Workspace | None = None) -> float:
        """The scaled polar factors."""
        (rows, columns), k = sides(block), positions(block)
        matrices = u if block.is_matrix else u.view(-1, rows, columns)
        if self.each and k > 1:
            matrices = matrices.view(*matrices.shape[:-1], columns // k, k).movedim(-1, -3)
        self.orthogonalize(matrices, h, work)
        factor = math.sqrt(rows * k / columns) / k
        return max(factor, 1.0) if self.least else factor

    def flops(self, block: Block) -> float:
        """Those of the polar factor."""
        return Polar.flops(self, block)


@dataclass(frozen=True)
class SignLmo(Lmo):
    """RMS to the largest element: ``lmo(u) = sign(u) / d_i``; ``plain`` is ``sign(u)``, for one-hot inputs, biases."""

    plain: bool = False

    def ball(self, u: Tensor, block: Block, h: Hyper, work: Workspace | None = None) -> float:
        """The scaled signs."""
        sign_(u)
        return 1.0 if self.plain else 1 / sides(block)[1]


#: Length of the lines of a matrix ``[d_o, d_i]``, or of a table ``[vocabulary, d_o]``.
LINES: dict[str, Callable[[int, int], float]] = {
    "rows": lambda rows, columns: 1 / math.sqrt(columns),
    "columns": lambda rows, columns: math.sqrt(rows),
    "table": lambda rows, columns: math.sqrt(columns),
}


@dataclass(frozen=True)
class LineLmo(Lmo):
    """Lines of one length; a line of zeros stays so.

    ``columns``, for one-hot inputs: each to a root mean square of 1, so a norm of ``sqrt(d_o)``. ``table`` is the same
    for an embedding, which stores them as rows ``[vocabulary, d_o]``. ``rows``, for outputs: each to a norm of
    ``1 / sqrt(d_i)``.
    """

    unit: ClassVar[Unit] = "matrix"
    lines: str = "rows"

    def ball(self, u: Tensor, block: Block, h: Hyper, work: Workspace | None = None) -> float:
        """The scaled lines."""
        rows, columns = sides(block)
        if self.lines == "table":
            rows, columns = math.prod(block.shape[:-1]), block.shape[-1]
        matrices = u if block.is_matrix else u.view(-1, rows, columns)
        norms = torch.linalg.vector_norm(matrices, dim=-2 if self.lines == "columns" else -1, keepdim=True)
        matrices.mul_(torch.where(norms > 0, 1 / norms, 0.0))
        return LINES[self.lines](rows, columns)


@dataclass(frozen=True)
class RmsLmo(Lmo):
    """The whole tensor to a root mean square of 1: ``lmo(u) = sqrt(N) u / ||u||``; 0 stays 0."""

    unit: ClassVar[Unit] = "block"

    def ball(self, u: Tensor, block: Block, h: Hyper, work: Workspace | None = None) -> float:
        """The scaled tensor."""
        norm = torch.linalg.vector_norm(u)
        u.mul_(torch.where(norm > 0, 1 / norm, 0.0))
        return math.sqrt(block.numel)
