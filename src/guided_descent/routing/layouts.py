"""How a stored tensor is cut and turned into blocks: axes, parts and batches, all as views."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from guided_descent.routing.roles import Block, Piece, Role


@dataclass(frozen=True)
class Layout:
    """Where a tensor keeps its outputs, and how they are divided.

    Attributes:
        out: Axis of the outputs; all axes but it and the batch axis form the columns, in order.
        stacked: Whether axis 0 is a batch of matrices (experts).
        parts: Name and size of each part along the output axis; empty for one undivided block.
        groups: Matrices per part, stacked along its rows (the groups of a convolution).
        head: Rows per matrix (heads); in the place of ``groups`` where the parts have different sizes.
        slices: Equal slices of axis 0, each a block of its own (the groups of a transposed convolution).
    """

    out: int = 0
    stacked: bool = False
    parts: tuple[tuple[str, int], ...] = ()
    groups: int = 1
    head: int | None = None
    slices: int = 1


def equal_parts(names: Sequence[str], total: int) -> tuple[tuple[str, int], ...]:
    """Name and size of equal parts of ``total``.

    >>> equal_parts("qkv", 12)
    (('q', 4), ('k', 4), ('v', 4))
    """
    return tuple((name, total // len(names)) for name in names)


def matrix_blocks(
    name: str, shape: tuple[int, ...], role: Role, layout: Layout, module: str, why: str
) -> tuple[Block, ...]:
    """The blocks of a parameter that holds linear maps; a part with one row or one column becomes a vector."""
    out = layout.out
    first = (0,) if layout.stacked else ()
    rest = tuple(axis for axis in range(len(shape)) if axis != out and axis not in first)
    perm = (*first, out, *rest)
    turned = None if perm == tuple(range(len(shape))) else perm
    blocks = []
    for label, index, piece_shape in _cuts(shape, layout):
        size = piece_shape[out]
        groups = size // layout.head if layout.head else layout.groups
        batch = groups * (shape[0] if layout.stacked else 1)
        matrix = (size // groups, math.prod(piece_shape[axis] for axis in rest))
        view = (batch, *matrix) if layout.stacked or groups > 1 else matrix
        key = f"{name}.{label}" if label else name
        blocks.append(narrow(Block(key, (Piece(name, piece_shape, index, turned),), view, role, module, why)))
    return tuple(blocks)


def _cuts(shape: tuple[int, ...], layout: Layout) -> Iterator[tuple[str, tuple[slice, ...], tuple[int, ...]]]:
    """Label, index and shape of each part of a tensor; no label and no index when it stays whole."""
    if layout.slices > 1:
        cuts = [(0, f"group{group}", shape[0] // layout.slices) for group in range(layout.slices)]
    elif layout.parts:
        cuts = [(layout.out, label, size) for label, size in layout.parts]
    else:
        yield "", (), shape
        return
    start = 0
    for axis, label, size in cuts:
        index = (*(slice(None),) * axis, slice(start, start + size))
        yield label, index, (*shape[:axis], size, *shape[axis + 1 :])
        start += size


def plain_block(name: str, shape: tuple[int, ...], role: Role, module: str, why: str) -> Block:
    """A block that is the parameter as it stands."""
    return Block(name, (Piece(name, shape),), shape, role, module, why)


def narrow(block: Block) -> Block:
    """A matrix block with one row or one column is a vector, in the shape in which it is stored."""
    if min(block.shape[-2:]) > 1:
        return block
    piece = replace(block.pieces[0], perm=None)
    role = Role.SCALAR if block.numel == 1 else Role.VECTOR
    sides = "x".join(map(str, block.shape))
    return replace(block, pieces=(piece,), shape=piece.shape, role=role, why=f"{block.why}, but only {sides}")
