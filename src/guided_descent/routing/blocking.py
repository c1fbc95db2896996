"""Blocking: a large matrix as a grid of smaller blocks, each with an update rule and state of its own."""

from __future__ import annotations

import math
from dataclasses import replace
from itertools import accumulate, pairwise

from guided_descent.routing.roles import Block, Piece

Spans = list[tuple[int, int]]


def subdivide(block: Block, limit: int) -> tuple[Block, ...]:
    """Cut a matrix into blocks whose sides are no longer than ``limit``, as equal as can be; nothing is padded.

    Columns that are made of several axes are cut along the first of them: those of a convolution ``[out, in, kh, kw]``
    between input channels, so that a block's columns are whole kernels. A side that cannot be made short enough so,
    and the rows of matrices that share one axis (the groups of a convolution, heads), stay as they are.

    Args:
        block: A block ``[..., m, n]`` that is one piece of a parameter; any other one is returned as it is.
        limit: Longest side, at least 1.

    Returns:
        The blocks in row-major order, with keys ``<key>.r<i>c<j>``; the block itself where nothing is cut.

    Raises:
        ValueError: ``limit`` is less than 1.

    Example:
        >>> from guided_descent.routing.roles import Role
        >>> whole = Block("w", (Piece("w", (5, 4)),), (5, 4), Role.MATRIX)
        >>> [(part.key, part.shape) for part in subdivide(whole, 4)]
        [('w.r0c0', (3, 4)), ('w.r1c0', (2, 4))]
    """
    if limit < 1:
        raise ValueError(f"limit={limit} must be at least 1: it is the longest side of a block")
    if len(block.pieces) != 1 or len(block.shape) < 2 or min(block.shape) < 1 or max(block.shape[-2:]) <= limit:
        return (block,)
    [piece] = block.pieces
    m, n = block.shape[-2:]
    axes = piece.perm or tuple(range(len(piece.shape)))  # (batch,) rows, columns, ...
    stacked = len(block.shape) > 2 and piece.shape[axes[0]] != math.prod(block.shape[:-1])
    row, *columns = axes[int(stacked) :]
    column = next((axis for axis in columns if piece.shape[axis] > 1), row)
    height, width = piece.shape[row], piece.shape[column]
    across = _spans(width, n // width, limit) if column != row else [(0, 1)]
    down = _spans(height, 1, limit) if height == m else [(0, height)]
    if len(down) * len(across) == 1:
        return (block,)
    found = []
    for i, (top, bottom) in enumerate(down):
        for j, (left, right) in enumerate(across):
            part = _narrow(piece, row, top, bottom)
            part = _narrow(part, column, left, right) if column != row else part
            rows, unit = bottom - top if height == m else m, n // width if column != row else n
            shape = (*block.shape[:-2], rows, unit * (right - left))
            why = f"{block.why}; block {i}, {j} of {len(down)} x {len(across)}".removeprefix("; ")
            found.append(replace(block, key=f"{block.key}.r{i}c{j}", pieces=(part,), shape=shape, why=why))
    return tuple(found)


def _spans(size: int, unit: int, limit: int) -> Spans:
    """Spans of an axis whose steps are ``unit`` long, none longer than ``limit`` if it can be, equal but for one."""
    count = min(math.ceil(size / max(limit // unit, 1)), size)
    short, longer = divmod(size, count)
    return list(pairwise(accumulate([short + 1] * longer + [short] * (count - longer), initial=0)))


def _narrow(piece: Piece, axis: int, start: int, end: int) -> Piece:
    """The part of a piece between two places of one axis."""
    if (start, end) == (0, piece.shape[axis]):
        return piece
    index = [*piece.index, *[slice(None)] * (len(piece.shape) - len(piece.index))]
    offset = index[axis].start or 0
    index[axis] = slice(offset + start, offset + end)
    return replace(piece, index=tuple(index), shape=(*piece.shape[:axis], end - start, *piece.shape[axis + 1 :]))
