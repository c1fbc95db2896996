"""Boxes: where the parts of a tensor lie.

A rank holds one box of a parameter: a range of places along each axis. ``DTensor`` placements say which; what several
ranks hold alike are copies, of which one counts.
"""

from __future__ import annotations

import itertools
import math
import sys
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, TypeAlias

import torch
from torch import Tensor

from guided_descent.routing.roles import Block, Piece

Box: TypeAlias = tuple[range, ...]


def is_dtensor(tensor: object) -> bool:
    """Whether a tensor is spread over ranks, without importing ``torch.distributed.tensor``."""
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(tensor, module.DTensor)


def local(tensor: Tensor) -> Tensor:
    """What lies on this rank of a tensor, as an alias without a graph: all of a plain one."""
    if not is_dtensor(tensor):
        return tensor
    with torch.no_grad():
        found: Tensor = tensor.to_local()  # type: ignore[attr-defined]
        return found.wait() if hasattr(found, "wait") else found.detach()  # a collective may still run


def addresses(tensors: Sequence[Tensor]) -> list[int]:
    """Where in memory the parts on this rank begin."""
    if "torch.distributed.tensor" in sys.modules:
        tensors = [local(tensor) for tensor in tensors]
    return list(map(Tensor.data_ptr, tensors))


def like(part: Tensor, tensor: Tensor, shape: Sequence[int] | None = None) -> Tensor:
    """A tensor of which ``part`` lies on this rank, spread as ``tensor`` is.

    Args:
        part: What lies here.
        tensor: The example; where it is plain, so is the result.
        shape: Shape of a tensor that is not like the example, but cut along its first axis over the ranks of its mesh.
    """
    if not is_dtensor(tensor):
        return part
    from torch.distributed.tensor import DTensor, Shard

    mesh: Any = tensor.device_mesh  # type: ignore[attr-defined]
    places, size, stride = tensor.placements, tensor.shape, tensor.stride()  # type: ignore[attr-defined]
    if shape is not None:
        places, size = [Shard(0)] * mesh.ndim, torch.Size(shape)
        stride = torch.empty(shape, device="meta").stride()
    made: Tensor = DTensor.from_local(part, mesh, places, shape=size, stride=stride)
    return made


def assign(own: Tensor, given: Tensor) -> None:
    """Copy a tensor into one that may be spread in another way over other ranks; collective where it is."""
    if is_dtensor(given):
        spread = (own.device_mesh, own.placements) if is_dtensor(own) else None  # type: ignore[attr-defined]
        if spread == (given.device_mesh, given.placements):  # type: ignore[attr-defined]
            local(own).copy_(local(given))
            return
        given = given.full_tensor()  # type: ignore[attr-defined]
    if is_dtensor(own):
        box = layout(own, "state").boxes[torch.distributed.get_rank()]
        local(own).copy_(given[within(box, whole(given.shape))])
    else:
        own.copy_(given)


# -- ranges ------------------------------------------------------------------------------------------------------------


def whole(shape: Sequence[int]) -> Box:
    """All of a tensor."""
    return tuple(map(range, shape))


def sizes(box: Box) -> tuple[int, ...]:
    """The shape of a box."""
    return tuple(map(len, box))


def numel(box: Box) -> int:
    """The elements of a box."""
    return math.prod(sizes(box))


def meet(a: Box, b: Box) -> Box:
    """What two boxes share."""
    return tuple(range(max(x.start, y.start), max(min(x.stop, y.stop), x.start, y.start)) for x, y in zip(a, b))


def within(inner: Box, outer: Box) -> tuple[slice, ...]:
    """The slices that select ``inner`` from a tensor that holds ``outer``, which contains it."""
    return tuple(
        slice(x.start - y.start, x.stop - y.start) if len(x) else slice(0, 0) for x, y in zip(inner, outer, strict=True)
    )


def chunk(span: range, count: int, i: int) -> range:
    """The i-th of ``count`` parts as ``torch.chunk`` cuts them: equal ones, then a shorter one, then none.

    Example:
        >>> [chunk(range(10, 15), 4, i) for i in range(4)]
        [range(10, 12), range(12, 14), range(14, 15), range(15, 15)]
    """
    size = -(-len(span) // count)
    start, stop = (min(span.start + k * size, span.stop) for k in (i, i + 1))
    return range(start, stop)


def extent(piece: Piece, shape: Sequence[int]) -> Box:
    """The box of a piece in its parameter."""
    index = (*piece.index, *[slice(None)] * (len(shape) - len(piece.index)))
    return tuple(range(*each.indices(size)) for each, size in zip(index, shape))


def cut(block: Block, shapes: Sequence[Sequence[int]], held: Sequence[Box]) -> Block:
    """The block with the parts of its pieces that lie in the boxes held here; its own shape stays that of the whole.

    Args:
        block: The block.
        shapes: Shape of the parameter of each piece.
        held: The box of it that lies here.
    """
    return replace(block, pieces=tuple(_cut(*each) for each in zip(block.pieces, shapes, held, strict=True)))


def _cut(piece: Piece, shape: Sequence[int], held: Box) -> Piece:
    mine = meet(extent(piece, shape), held)
    index = () if mine == held else within(mine, held)
    return replace(piece, shape=sizes(mine), index=index)


# -- layouts -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Layout:
    """How a tensor lies on ranks.

    Attributes:
        shape: Its whole shape.
        members: The ranks that hold some of it, in order.
        boxes: What each holds.
        copies: Which copy of the whole a rank's box belongs to; ranks of one copy hold it together.
        kind: Equal for tensors of which the same ranks hold copies of each other's parts.
    """

    shape: tuple[int, ...]
    members: tuple[int, ...]
    boxes: Mapping[int, Box] = field(compare=False)
    copies: Mapping[int, tuple[int, ...]] = field(compare=False)
    kind: Hashable = None

    def counts(self, rank: int) -> bool:
        """Whether a rank's box is of the copy that counts in sums."""
        return self.copies[rank] == self.copies[self.members[0]]

    def sources(self, rank: int) -> tuple[int, ...]:
        """The ranks that together hold the copy that a rank is nearest to: its own."""
        return tuple(other for other in self.members if self.copies[other] == self.copies[rank])


def layout(tensor: Tensor, name: str) -> Layout:
    """The layout of a ``DTensor``.

    Raises:
        TypeError: It is a sum that is still to be added up, or placed in a way that is not known.
        ValueError: This rank holds another part than its placements say.
    """
    placements: tuple[Any, ...] = tensor.placements  # type: ignore[attr-defined]
    for place in placements:
        if not (place.is_replicate() or hasattr(place, "dim")):
            raise TypeError(f"parameter {name!r} is placed as {place}; only shards and replicas can be trained")
    axes = [None if place.is_replicate() else place.dim % tensor.ndim for place in placements]
    strided = [hasattr(place, "split_factor") for place in placements]
    found = _spread(tensor.device_mesh, tuple(tensor.shape), axes, strided)  # type: ignore[attr-defined]
    me, held = torch.distributed.get_rank(), tuple(local(tensor).shape)
    if sizes(found.boxes[me]) != held:
        raise ValueError(
            f"rank {me} holds a part {held} of {name!r}, and by its placements {placements} it would be "
            f"{sizes(found.boxes[me])}: shard it with fully_shard, parallelize_module or distribute_tensor"
        )
    return found


def by_rows(tensor: Tensor, shape: Sequence[int], members: Sequence[int]) -> Layout:
    """How a tensor beside a parameter is saved, see ``like``: numbers, and what is beside plain ones, everywhere."""
    if not shape or not is_dtensor(tensor):
        return everywhere(shape, members)
    mesh: Any = tensor.device_mesh  # type: ignore[attr-defined]
    return _spread(mesh, tuple(shape), [0] * mesh.ndim, [False] * mesh.ndim)


def _spread(mesh: Any, shape: tuple[int, ...], axes: Sequence[int | None], strided: Sequence[bool]) -> Layout:
    """The layout by mesh dimension: the axis that is cut there, ``None`` for copies, and whether it is cut last."""
    extents = tuple(mesh.mesh.shape)
    apart = [i for i, axis in enumerate(axes) if axis is not None]
    # a strided shard cuts what the mesh dimensions after it have left: TP first, then FSDP before it
    order = [i for i in apart if not strided[i]] + [i for i in reversed(apart) if strided[i]]
    boxes, copies = {}, {}
    for rank, at in zip(mesh.mesh.flatten().tolist(), itertools.product(*map(range, extents))):
        box = list(whole(shape))
        for i in order:
            axis = axes[i]
            assert axis is not None
            box[axis] = chunk(box[axis], extents[i], at[i])
        boxes[rank] = tuple(box)
        copies[rank] = tuple(k for i, k in enumerate(at) if i not in apart)
    kind = (tuple(mesh.mesh.flatten().tolist()), extents, tuple(apart))
    return Layout(shape, tuple(sorted(boxes)), boxes, copies, kind)


def everywhere(shape: Sequence[int], members: Sequence[int]) -> Layout:
    """The layout of a tensor of which each rank has a copy."""
    copies = {rank: (i,) for i, rank in enumerate(members)}
    boxes = dict.fromkeys(members, whole(shape))
    return Layout(tuple(shape), tuple(members), boxes, copies, ("copies", tuple(members)))
