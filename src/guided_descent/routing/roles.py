"""The unit of geometry: a Block, its Pieces, and the Role that decides which optimizer takes it.

A parameter is how a model stores numbers; a block is one linear map (or one vector) inside them. A Linear is one block,
a fused QKV weight is three, a stack of experts ``[E, m, n]`` is one block with batch ``E``. Blocks depend on global
shapes only, never on ranks, and know nothing of optimizers.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from enum import StrEnum

from torch import Tensor


class Role(StrEnum):
    """What a block is in the network; the matrix roles are those a matrix optimizer may take."""

    MATRIX = "matrix"  # a hidden linear map, y = W x
    FUSED = "fused"  # one of several linear maps stored in one parameter (QKV, gate-up)
    CONV = "conv"  # a convolution kernel, viewed as (out, in * kernel)
    EXPERT = "expert"  # a stack of linear maps, batched over the experts
    RECURRENT = "recurrent"  # one gate of an RNN, GRU or LSTM weight
    ADAPTER = "adapter"  # a low-rank (LoRA-style) factor
    EMBEDDING = "embedding"  # a table of vectors: tokens, positions, classes
    HEAD = "head"  # the map to the outputs (also when tied to an embedding)
    ROUTER = "router"  # the gate that picks experts
    NORM = "norm"  # gain or shift of a normalisation layer
    BIAS = "bias"
    DEPTHWISE = "depthwise"  # a convolution that acts on each channel alone
    VECTOR = "vector"  # 1-D, [1, N] or [N, 1]
    SCALAR = "scalar"  # 0-D or one element
    OTHER = "other"  # anything whose meaning is not known: never a matrix by shape alone

    @property
    def is_matrix(self) -> bool:
        """Whether a matrix optimizer may take blocks of this role."""
        return self in _MATRIX_ROLES


_MATRIX_ROLES = frozenset({Role.MATRIX, Role.FUSED, Role.CONV, Role.EXPERT, Role.RECURRENT, Role.ADAPTER})


@dataclass(frozen=True)
class Piece:
    """A part of one parameter, and how it lies inside its block.

    Attributes:
        name: Canonical full name of the parameter.
        shape: Shape of ``parameter[index]``.
        index: Slices that select the piece; ``()`` is the whole parameter.
        perm: Permutation that brings the axes of the piece to (batch, rows, columns) order; ``None`` leaves them.
        wd_scale: Multiplier on the weight decay beside the block's: 0 for the bias in a block of weight and bias.
    """

    name: str
    shape: tuple[int, ...]
    index: tuple[slice, ...] = field(default=(), hash=False)  # slices have no hash before Python 3.12
    perm: tuple[int, ...] | None = None
    wd_scale: float = 1.0

    def of(self, tensor: Tensor) -> Tensor:
        """The piece as a view of a parameter-shaped tensor (the parameter, its gradient or its state)."""
        return tensor[self.index] if self.index else tensor

    def within(self, block: Tensor) -> Tensor:
        """A contiguous block-shaped tensor seen in the layout of the piece; a view, so writes go through."""
        if self.perm is None:
            return block.view(self.shape)
        inverse = sorted(range(len(self.perm)), key=self.perm.__getitem__)
        return block.view([self.shape[axis] for axis in self.perm]).permute(inverse)


@dataclass(frozen=True)
class Block:
    """What one update rule acts on: a matrix ``[m, n]`` = (out, in), a batch of them, or a tensor of any shape.

    Attributes:
        key: Unique name: the parameter's, or ``<parameter>.<part>`` where a parameter holds several blocks.
        pieces: The parts of parameters that make it up, in the order in which they fill it.
        shape: ``(m, n)`` or ``(E, m, n)`` for matrix roles, else the parameter's own shape.
        role: What it is in the network.
        module: Full name of the module that owns it, ``""`` for the root or when unknown.
        why: One sentence that says how the role was found.
        lr_scale: Multiplier on the learning rate, written by parametrizations only.
        wd_scale: Multiplier on the weight decay.
        eps_scale: Multiplier on eps.
        complex: Whether its numbers are complex, which parts see as pairs of reals.
    """

    key: str
    pieces: tuple[Piece, ...]
    shape: tuple[int, ...]
    role: Role
    module: str = ""
    why: str = ""
    lr_scale: float = 1.0
    wd_scale: float = 1.0
    eps_scale: float = 1.0
    complex: bool = False

    @property
    def is_matrix(self) -> bool:
        """Whether a matrix optimizer may take it."""
        return self.role.is_matrix

    @property
    def batch(self) -> int:
        """Number of matrices in it; 1 for anything that is not a stack."""
        return math.prod(self.shape[:-2]) if self.is_matrix else 1

    @property
    def numel(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)

    @property
    def stored(self) -> tuple[int, ...]:
        """Shape of its first piece as parts see it: complex numbers are pairs, on a last axis of their own."""
        return (*self.pieces[0].shape, 2) if self.complex else self.pieces[0].shape

    @property
    def names(self) -> tuple[str, ...]:
        """Canonical names of the parameters it draws from."""
        return tuple(piece.name for piece in self.pieces)
