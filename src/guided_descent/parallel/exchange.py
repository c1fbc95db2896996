"""The exchange: boxes go from where they lie to the owner of the whole, and back. Grouped, with bounded buffers."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch import distributed as dist

from guided_descent.parallel.boxes import Box, Layout, extent, meet, numel, sizes, within
from guided_descent.parallel.boxes import whole as all_of
from guided_descent.parallel.ranks import Ranks
from guided_descent.routing.roles import Piece

#: Bytes to which each part of a message is rounded up, so that it can be seen in any dtype.
ALIGN = 8


@dataclass(frozen=True)
class Cargo:
    """A tensor that is whole at its owner and in boxes elsewhere.

    Attributes:
        owner: The rank that has it whole.
        shape: Its whole shape.
        boxes: What each rank holds of it.
        sources: The ranks whose boxes together are the whole, from which it is gathered.
    """

    owner: int
    shape: tuple[int, ...]
    boxes: dict[int, Box] = field(hash=False)
    sources: tuple[int, ...]

    @classmethod
    def of(cls, piece: Piece, layout: Layout, owner: int) -> Cargo:
        """A piece of a parameter; its boxes are counted from where the piece begins."""
        span = extent(piece, layout.shape)
        boxes = {}
        for rank, box in layout.boxes.items():
            boxes[rank] = tuple(
                range(x.start - y.start, x.stop - y.start) for x, y in zip(meet(span, box), span, strict=True)
            )
        return cls(owner, sizes(span), boxes, layout.sources(owner))


@dataclass(frozen=True)
class Move:
    """One box on its way from a rank to another: the number of its cargo, and the box."""

    source: int
    target: int
    number: int
    box: Box


@dataclass(frozen=True)
class Round:
    """What this rank does in one round: what it keeps, sends and gets, with the bytes for and from each rank."""

    kept: list[Move]
    out: list[Move]
    back: list[Move]
    sends: list[int]
    receives: list[int]
    talks: bool  # whether any rank sends anything


@dataclass(frozen=True)
class Route:
    """The rounds of an exchange, made once and used each step."""

    cargo: Sequence[Cargo]
    wire: Sequence[torch.dtype]
    rounds: list[Round]


@dataclass(eq=False)
class Tally:
    """What has been sent: bytes that have gone from this rank to others."""

    sent: int = 0


class Exchange:
    """Moves cargo between the ranks of a group, in rounds whose messages fit a bound on every rank.

    Args:
        ranks: The ranks.
        limit: Bytes that a rank sends, and receives, in one round; a single larger tensor may exceed it.
        tally: Where they are counted.
    """

    def __init__(self, ranks: Ranks, limit: int, tally: Tally) -> None:
        self.ranks = ranks
        self.limit = limit
        self.tally = tally

    def route(self, cargo: Sequence[Cargo], wire: Sequence[torch.dtype], *, inward: bool) -> Route:
        """The rounds that bring cargo to its owners, or from them to the ranks.

        Args:
            cargo: What is moved; the same on all ranks.
            wire: Dtype of each on the way.
            inward: Whether to the owners.
        """
        return Route(cargo, wire, [self._round(moves, wire) for moves in self._rounds(cargo, wire, inward)])

    def gather(self, route: Route, mine: Sequence[Tensor | None], wholes: Sequence[Tensor | None]) -> None:
        """Bring the boxes that lie here to their owners, and those of others into what is owned here."""
        self._run(route, lambda m: mine[m.number], lambda m: _box(wholes[m.number], m, route))

    def scatter(self, route: Route, wholes: Sequence[Tensor | None], mine: Sequence[Tensor | None]) -> None:
        """Bring from what is owned here to every rank its box."""
        self._run(route, lambda m: _box(wholes[m.number], m, route), lambda m: mine[m.number])

    def _run(self, route: Route, take: Callable[[Move], Tensor | None], put: Callable[[Move], Tensor | None]) -> None:
        for each in route.rounds:
            for move in each.kept:
                source, target = take(move), put(move)
                assert source is not None
                assert target is not None
                target.copy_(source.to(route.wire[move.number]))  # rounded as on the way to others
            if not each.talks:
                continue
            message, answer = (
                torch.empty(sum(sizes), dtype=torch.uint8, device=self.ranks.device)
                for sizes in (each.sends, each.receives)
            )
            for move, view in _views(each.out, route.wire, message):
                source = take(move)
                assert source is not None
                view.copy_(source)
            dist.all_to_all_single(answer, message, each.receives, each.sends, group=self.ranks.group)
            self.tally.sent += len(message)
            for move, view in _views(each.back, route.wire, answer):
                target = put(move)
                assert target is not None
                target.copy_(view)

    def _rounds(self, cargo: Sequence[Cargo], wire: Sequence[torch.dtype], inward: bool) -> Iterator[list[Move]]:
        """All moves in their order, cut where the next tensor would be too much for some rank."""
        found: list[Move] = []
        load: Counter[tuple[str, int]] = Counter()
        for number, each in enumerate(cargo):
            own = list(moves(number, each, inward))
            adds: Counter[tuple[str, int]] = Counter()
            for m in (m for m in own if m.source != m.target):
                size = bytes_of(m.box, wire[number])
                adds["out", m.source] += size
                adds["in", m.target] += size
            if found and any(load[end] + adds[end] > self.limit for end in adds):
                yield found
                found, load = [], Counter()
            found += own
            load += adds
        if found:
            yield found

    def _round(self, moving: Sequence[Move], wire: Sequence[torch.dtype]) -> Round:
        here, order = self.ranks.here, {rank: i for i, rank in enumerate(self.ranks.members)}
        away = [m for m in moving if m.source != m.target]
        out = sorted((m for m in away if m.source == here), key=lambda m: order[m.target])
        back = sorted((m for m in away if m.target == here), key=lambda m: order[m.source])
        sends, receives = [0] * len(order), [0] * len(order)
        for m in out:
            sends[order[m.target]] += bytes_of(m.box, wire[m.number])
        for m in back:
            receives[order[m.source]] += bytes_of(m.box, wire[m.number])
        kept = [m for m in moving if m.source == m.target == here]
        return Round(kept, out, back, sends, receives, bool(away))


def moves(number: int, cargo: Cargo, inward: bool) -> Iterator[Move]:
    """The boxes of one tensor on their way to its owner, or from it to all ranks; empty ones stay where they are."""
    for rank in cargo.sources if inward else cargo.boxes:
        if numel(cargo.boxes[rank]):
            ends = (rank, cargo.owner) if inward else (cargo.owner, rank)
            yield Move(*ends, number, cargo.boxes[rank])


def bytes_of(box: Box, dtype: torch.dtype) -> int:
    """Bytes of a box in a message."""
    return -(-numel(box) * dtype.itemsize // ALIGN) * ALIGN


def forecast(cargo: Sequence[Cargo], wire: Sequence[torch.dtype], *, inward: bool) -> Counter[int]:
    """Bytes that each rank sends to others when the cargo is moved once."""
    found: Counter[int] = Counter()
    for number, each in enumerate(cargo):
        for move in moves(number, each, inward):
            if move.source != move.target:
                found[move.source] += bytes_of(move.box, wire[number])
    return found


def _views(chosen: Sequence[Move], wire: Sequence[torch.dtype], flat: Tensor) -> Iterator[tuple[Move, Tensor]]:
    """Each move with its place in a message."""
    start = 0
    for move in chosen:
        dtype = wire[move.number]
        size = numel(move.box) * dtype.itemsize
        yield move, flat[start : start + size].view(dtype).view(sizes(move.box))
        start += bytes_of(move.box, dtype)


def _box(tensor: Tensor | None, move: Move, route: Route) -> Tensor | None:
    """The box of a move in a whole tensor."""
    return None if tensor is None else tensor[within(move.box, all_of(route.cargo[move.number].shape))]
