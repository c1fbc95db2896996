"""Buckets: blocks that one update can serve together, and the slices in which they are run.

A bucket gathers the blocks of a group that share parts, dtype and device, and for matrix methods the shape. It owns
their factor state as stacks. It runs in slices: as many same-shape matrices as the workspace allows, or a chunk of
tensors large enough to hide the cost of a call and small enough to stay in cache.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal, TypeAlias

import torch
from torch import Tensor

from guided_descent.engine import packing
from guided_descent.engine.packing import Form
from guided_descent.engine.state import HALF, real, work_dtype
from guided_descent.kernels import Kernel, Scales
from guided_descent.linalg.workspace import Workspace
from guided_descent.parallel.boxes import local
from guided_descent.parts.base import Parts, Slot, State
from guided_descent.parts.rows import Rows
from guided_descent.routing.roles import Block, Piece

Half: TypeAlias = Literal["", "first", "second"]
#: Elements of a chunk: 1 MiB in float32, so that the tensors of one update stay in cache between its operations.
CHUNK = 262_144
#: As many chunks in one graph, which reads and writes each tensor once and has a cost for each call.
GRAPH = 16
#: Bytes of a stack of matrices on a CPU, for the same reason; one matrix may exceed it.
STACK = 4 * 2**20


@dataclass(eq=False)
class Parameter:
    """A parameter as the engine sees it.

    Attributes:
        index: Number of its gradient.
        name: Canonical name.
        group: Index of its param group.
        tensor: What the group holds, by which its state is found.
        blocks: Its blocks.
        part: What the parts of an update work on: the tensor, or its part on this rank.
        home: Index of the parameter whose updates it counts: its own.
    """

    index: int
    name: str
    group: int
    tensor: Tensor
    blocks: tuple[Block, ...]
    part: Tensor
    home: int

    @classmethod
    def of(cls, index: int, name: str, group: int, tensor: Tensor, blocks: tuple[Block, ...]) -> Parameter:
        """A parameter of a group."""
        return cls(index, name, group, tensor, blocks, local(tensor), index)

    @property
    def lone(self) -> bool:
        """Whether it is one block."""
        return len(self.blocks) == 1


@dataclass(frozen=True, eq=False)
class Entry:
    """A block on its way into a bucket.

    Attributes:
        block: The block.
        group: Index of its param group.
        parts: What updates it.
        owners: The parameter of each piece.
        half: ``first`` or ``second`` where ranks divide its update, see ``parallel.halves``; ``""`` is all of it.
        kind: Blocks of different kinds are batched apart: those of which other ranks hold copies.
        place: Name of this rank's part among those of a kind, the same for copies.
    """

    block: Block
    group: int
    parts: Parts
    owners: list[Parameter]
    half: Half = ""
    kind: Hashable = None
    place: str = ""


@dataclass(eq=False)
class Bucket:
    """Blocks with the same parts, group, dtype and device, and their state."""

    group: int
    parts: Parts
    dtype: torch.dtype
    device: torch.device
    half: Half
    place: str
    slots: dict[str, Slot]
    packed: dict[str, Form]  # slots that are stored in few bits, and how
    loop: bool
    blocks: list[Block] = field(default_factory=list)
    owners: list[list[Parameter]] = field(default_factory=list)  # for each block, the parameters of its pieces
    tensors: dict[str, list[list[Tensor]]] = field(default_factory=dict)  # param slots: block -> piece views
    stacks: dict[str, Tensor] = field(default_factory=dict)  # factor slots
    shared: State = field(default_factory=dict)  # group slots
    capacity: int = 1
    slices: list[Slice] = field(default_factory=list)
    kernel: Kernel | None = None
    graphs: bool = False  # whether its slices are compiled

    @property
    def stacked(self) -> bool:
        """Whether its blocks are stacked: matrix methods only."""
        return self.parts.unit == "matrix"

    @property
    def scales(self) -> Scales:
        """The multipliers that its blocks share."""
        return Scales(self.blocks[0].lr_scale, self.blocks[0].wd_scale, self.blocks[0].eps_scale)

    @property
    def blind(self) -> bool:
        """Whether the parameters are not there to be read."""
        return self.half == "first" and not any(part.reads_parameter for part in self.parts)

    def members(self) -> Iterator[tuple[int, Block, list[Parameter]]]:
        """Position, block and owning parameters."""
        return zip(range(len(self.blocks)), self.blocks, self.owners)

    def cut(self, chosen: Sequence[int]) -> list[Slice]:
        """Slices that cover these blocks: equal stacks, one list for a kernel, or chunks of elements.

        Those to be compiled are larger and ordered by shape, so that few graphs serve many.
        """
        if self.kernel is not None:
            return [Slice(self, list(chosen))]
        if self.stacked:
            runs = [chosen[i : i + self.capacity] for i in range(0, len(chosen), self.capacity)]
            return [Slice(self, list(run)) for run in runs]
        slices: list[Slice] = []
        gathered: list[int] = []
        elements, chunk = 0, CHUNK
        if self.graphs:
            chunk, chosen = GRAPH * CHUNK, sorted(chosen, key=lambda i: self.blocks[i].shape)
        for i in chosen:
            numel = sum(piece.of(real(p.part)).numel() for p, piece in zip(self.owners[i], self.blocks[i].pieces))
            if self.parts.unit == "element" and numel > 2 * chunk and self._flat(i):
                slices += [Slice(self, [i], (a, min(a + chunk, numel))) for a in range(0, numel, chunk)]
                continue
            gathered.append(i)
            elements += numel
            if elements >= chunk:
                slices.append(Slice(self, gathered))
                gathered, elements = [], 0
        if gathered:
            slices.append(Slice(self, gathered))
        return slices

    def offer(self, kernel: Kernel | None) -> None:
        """Take a kernel if every block is a whole dense parameter, as kernels walk through memory."""
        if kernel is not None and all(self._flat(i) for i in range(len(self.blocks))):
            self.kernel = kernel

    def _flat(self, i: int) -> bool:
        whole = len(self.blocks[i].pieces) == 1 and not self.blocks[i].pieces[0].index
        views = [real(self.owners[i][0].part), *(tensors[i][0] for tensors in self.tensors.values())]
        return whole and all(view.is_contiguous() for view in views)


class Slice:
    """The unit of execution: rows of a bucket with their views of parameters and state, made once, used each step."""

    def __init__(self, bucket: Bucket, chosen: list[int], span: tuple[int, int] | None = None) -> None:
        self.bucket = bucket
        self.chosen = chosen
        self.span = span
        self.blocks = tuple(bucket.blocks[i] for i in chosen)
        self.pieces: list[tuple[Parameter, Piece, int]] = [
            (owner, piece, row)
            for row, i in enumerate(chosen)
            for owner, piece in zip(bucket.owners[i], bucket.blocks[i].pieces)
        ]
        self.whole = all(not piece.index for _, piece, _ in self.pieces)
        as_they_are = self.whole and span is None and not bucket.dtype.is_complex
        self._indices = [owner.index for owner, _, _ in self.pieces] if as_they_are else None
        self.p = self._rows([self._view(real(owner.part), piece) for owner, piece, _ in self.pieces])
        self.half = bucket.dtype in HALF
        self.work = work_dtype(bucket.dtype)
        self.state: State = dict(bucket.shared)
        self.codes: dict[str, Rows] = {}
        for name, tensors in bucket.tensors.items():
            rows = self._rows([self._cut(view) for i in chosen for view in tensors[i]])
            (self.codes if name in bucket.packed else self.state)[name] = rows
        lo, hi = chosen[0], chosen[-1] + 1
        self._scattered = chosen != list(range(lo, hi))
        for name, stack in bucket.stacks.items():
            self.state[name] = stack[chosen] if self._scattered else stack[lo:hi]
        self._cache: dict[str, tuple[int, Rows]] = {}
        self._form: Hashable = None

    @property
    def leads(self) -> bool:
        """Whether it holds the beginning of its blocks: the later cuts of a large tensor do not."""
        return self.span is None or self.span[0] == 0

    @property
    def form(self) -> Hashable:
        """What a graph of its update depends on: slices of one form differ in the tensors alone."""
        if self.bucket.parts.unit != "element":
            return self
        if self._form is None:
            blocks = tuple(replace(block, key="", pieces=(), why="", module="") for block in self.blocks)
            pieces = tuple((piece.wd_scale, row) for _, piece, row in self.pieces)
            rows = tuple((tuple(p.shape), p.stride()) for p in self.p.list)
            self._form = (self.bucket, blocks, pieces, rows)
        return self._form

    def gradients(self, gradients: Sequence[Tensor | None]) -> Rows:
        """The rows of the gradients, by parameter index; views wherever the layout allows."""
        if self._indices is not None:
            return self._rows([g for g in map(gradients.__getitem__, self._indices) if g is not None])
        rows = []
        for owner, piece, _ in self.pieces:
            g = gradients[owner.index]
            assert g is not None
            g = real(g)
            rows.append(g if self.whole and self.span is None else self._view(g, piece))
        return self._rows(rows)

    def aligned(self, gradients: Rows) -> bool:
        """Whether the gradients lie in memory as the parameters do, in their dtype."""
        return all(g.dtype is self.bucket.dtype and g.is_contiguous() for g in gradients.list)

    def gather(self) -> None:
        """Read factor state that is not contiguous in its stack."""
        if self._scattered:
            for name, stack in self.bucket.stacks.items():
                torch.index_select(stack, 0, self._index(stack), out=self.state[name])

    def scatter(self) -> None:
        """Write it back."""
        if self._scattered:
            for name, stack in self.bucket.stacks.items():
                stack.index_copy_(0, self._index(stack), self.state[name])

    def unpack(self, tag: str, work: Workspace) -> None:
        """Bring packed state into scratch, where parts work on it."""
        for name, codes in self.codes.items():
            rows = self.state[name] = self.scratch(f"state.{name}{tag}", work)
            for row, code, scales in zip(rows.list, codes.list, self._scales(name)):
                self.bucket.packed[name].load(row, code, scales)

    def pack(self, step: int) -> None:
        """Store it again."""
        for name, codes in self.codes.items():
            for row, code, scales in zip(self.state[name].list, codes.list, self._scales(name)):
                self.bucket.packed[name].store(row, code, scales, step)

    def _scales(self, name: str) -> Iterable[Tensor | None]:
        """The scales of each row of a packed slot, where it has some."""
        if not self.bucket.packed[name].scaled:
            return [None] * len(self.codes[name].list)
        scales: Tensor = self.state[packing.scales_of(name)]
        if self.span is None:
            return scales
        return scales[:, self.span[0] // packing.GROUP : -(-self.span[1] // packing.GROUP)]

    def scratch(self, tag: str, work: Workspace) -> Rows:
        """Scratch of the direction's shape: one stack ``[B, *shape]``, or tensors shaped like the rows."""
        shape = (
            (len(self.blocks), *self.blocks[0].shape) if self.bucket.stacked else (sum(map(Tensor.numel, self.p.list)),)
        )
        flat = work.take(tag, shape, self.work, self.bucket.device)
        cached = self._cache.get(tag)
        if cached is not None and cached[0] == flat.data_ptr() and flat.numel():
            return cached[1]
        if self.bucket.stacked:
            rows = Rows([self._within(flat[row], piece, row) for _, piece, row in self.pieces], flat, self.bucket.loop)
        else:
            views = torch.split(flat, [row.numel() for row in self.p.list])
            rows = self._rows([view.view(row.shape) for view, row in zip(views, self.p.list)])
        self._cache[tag] = (flat.data_ptr(), rows)
        return rows

    def fresh(self, work: Workspace, tag: str = "direction") -> Rows:
        """Scratch of the direction's shape that nobody remembers, for graphs."""
        if not self.bucket.stacked:
            shapes = [(row.shape or (1,), row.device) for row in self.p.list]
            return Rows([torch.empty(shape, dtype=self.work, device=device) for shape, device in shapes], loop=True)
        shape = (len(self.blocks), *self.blocks[0].shape)
        flat = work.take(tag, shape, self.work, self.bucket.device)
        return Rows([self._within(flat[row], piece, row) for _, piece, row in self.pieces], flat, loop=True)

    def _within(self, matrix: Tensor, piece: Piece, row: int) -> Tensor:
        block = self.blocks[row]
        if len(block.pieces) == 1:
            return piece.within(matrix)
        widths = [math.prod(p.shape[1:]) for p in block.pieces]
        k = next(i for i, own in enumerate(block.pieces) if own is piece)
        columns = matrix.narrow(-1, sum(widths[:k]), widths[k])
        return torch.unflatten(columns, -1, piece.shape[1:]) if len(piece.shape) > 1 else columns.squeeze(-1)

    def _view(self, tensor: Tensor, piece: Piece) -> Tensor:
        return self._cut(piece.of(tensor))

    def _cut(self, tensor: Tensor) -> Tensor:
        return tensor if self.span is None else tensor.reshape(-1)[self.span[0] : self.span[1]]

    def _rows(self, tensors: list[Tensor]) -> Rows:
        return Rows(tensors, loop=self.bucket.loop)

    def _index(self, stack: Tensor) -> Tensor:
        return torch.tensor(self.chosen, device=stack.device)


def capacity(blocks: Sequence[Block], parts: Parts, limit: int, dtype: torch.dtype) -> int:
    """How many blocks of one shape may be stacked so that all scratch fits ``limit`` bytes; at least one."""
    block = blocks[0]
    size = torch.empty((), dtype=work_dtype(dtype)).element_size()
    copies = 4 if dtype in HALF else 1  # direction; and gradient, parameter and written parameter in the work dtype
    each = size * block.numel * copies + max((part.scratch(block) for part in parts), default=0)
    return max(1, limit // max(each, 1))


def factor_stack(slot: Slot, count: int, device: torch.device, work: torch.dtype) -> Tensor:
    """A fresh stack ``[count, *shape]`` of a factor slot."""
    return torch.full((count, *slot.shape), slot.fill, dtype=slot.dtype or work, device=device)
