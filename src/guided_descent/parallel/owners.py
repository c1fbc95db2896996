"""Owners: blocks whose update needs all of them are whole at one rank each, which computes for all.

In a step their gradients come to the owners, the owners run the first half of the parts on whole blocks, and the
directions go back to where the parameters lie, which run the second half. Everything else runs where it lies. Parts
never see a rank.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from guided_descent.engine.buckets import Entry, Parameter
from guided_descent.engine.state import real, work_dtype
from guided_descent.parallel.assignment import Assignment, Cost, Share
from guided_descent.parallel.boxes import Layout, cut
from guided_descent.parallel.exchange import Cargo, Exchange, Route, forecast
from guided_descent.parallel.halves import Halves
from guided_descent.parallel.ranks import Ranks
from guided_descent.parts.base import Batch, Hyper
from guided_descent.routing.roles import Block

Gradients = list[Tensor | None]


@dataclass(frozen=True)
class News:
    """What the second half of a block learns from its owner beside the direction.

    Attributes:
        held: Whether the parameters stay as they are this time.
        rate: Multiplier of the learning rate of the decay.
        wd_scales: Multiplier of the decay, for each piece.
    """

    held: bool
    rate: float
    wd_scales: tuple[float, ...]


@dataclass(eq=False)
class Job:
    """A block that is whole at its owner.

    Attributes:
        entry: The block with its parts and parameters.
        halves: The parts, divided.
        owner: The rank that has it.
        cost: What it costs.
        here: The block as it lies on this rank.
        cargo: Its pieces on their way.
        own: The whole pieces, on the owner: buffers for the parameter and, later, for the direction.
    """

    entry: Entry
    halves: Halves
    owner: int
    cost: Cost
    here: Block
    cargo: list[Cargo]
    own: list[Parameter] = field(default_factory=list)

    @property
    def block(self) -> Block:
        """The block as a tensor of its own, no part of a parameter."""
        block = self.entry.block
        return replace(block, pieces=tuple(replace(piece, index=()) for piece in block.pieces))

    def parts_of(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """What lies here of each piece, of tensors that lie as its parameters do."""
        return [piece.of(tensor) for piece, tensor in zip(self.here.pieces, tensors, strict=True)]


class Team:
    """The ranks that own blocks together, and these blocks.

    Args:
        exchange: Moves tensors between them.
        jobs: The blocks.
        wire: Dtype of gradients and directions on the way; ``None`` is their own.
    """

    def __init__(self, exchange: Exchange, jobs: list[Job], wire: torch.dtype | None) -> None:
        self.exchange = exchange
        self.ranks = exchange.ranks
        self.jobs = jobs
        self.wire = wire
        self._routes: dict[Hashable, Route] = {}

    # -- to the owners ---------------------------------------------------------------------------------------------

    def gather(self, chosen: Sequence[int], gradients: Gradients, into: Gradients) -> None:
        """Bring the gradients of some jobs to their owners; those that are there already are lent."""
        cargo: list[Cargo] = []
        mine: list[Tensor | None] = []
        wholes: Gradients = []
        for job in (self.jobs[k] for k in chosen):
            found = [gradients[p.index] for p in job.entry.owners]
            parts = job.parts_of([real(g) for g in found if g is not None])
            for i, (each, part) in enumerate(zip(job.cargo, parts, strict=True)):
                place: Tensor | None = None
                if each.owner == self.ranks.here:
                    lent = each.sources == (each.owner,)
                    place = part if lent else torch.empty(each.shape, dtype=self.wire or part.dtype, device=part.device)
                    into[job.own[i].index] = place
                if each.sources != (each.owner,):
                    cargo.append(each)
                    mine.append(part)
                    wholes.append(place)
        wire = tuple(self.wire or part.dtype for part in mine if part is not None)
        self.exchange.gather(self._route("gradients", chosen, cargo, wire, inward=True), mine, wholes)

    def gather_parameters(self, chosen: Sequence[int], read: Callable[[Parameter], Tensor]) -> None:
        """Bring the parameters of some jobs to their owners, in the work dtype, where a direction will come."""
        cargo: list[Cargo] = []
        mine: list[Tensor | None] = []
        wholes: Gradients = []
        for job in (self.jobs[k] for k in chosen):
            cargo += job.cargo
            mine += job.parts_of([read(p) for p in job.entry.owners])
            wholes += [p.part for p in job.own] or [None] * len(job.cargo)
        wire = tuple(part.dtype for part in mine if part is not None)
        self.exchange.gather(self._route("parameters", chosen, cargo, wire, inward=True), mine, wholes)

    # -- from the owners -------------------------------------------------------------------------------------------

    def scatter(self, chosen: Sequence[int], directions: Gradients, exact: bool = False) -> None:
        """Bring what the owners have made to where the parameters lie."""
        cargo: list[Cargo] = []
        mine: list[Tensor | None] = []
        wholes: Gradients = []
        wire: list[torch.dtype] = []
        for job in (self.jobs[k] for k in chosen):
            for p in job.entry.owners:
                if directions[p.index] is None:
                    like = real(p.part)
                    directions[p.index] = torch.empty_like(like, dtype=work_dtype(like.dtype))
            parts = job.parts_of([d for d in (directions[p.index] for p in job.entry.owners) if d is not None])
            cargo += job.cargo
            mine += parts
            wholes += [p.part for p in job.own] or [None] * len(job.cargo)
            rounded = self.wire is not None and not job.halves.whole and not exact
            wire += [self.wire if rounded and self.wire else part.dtype for part in parts]
        self.exchange.scatter(self._route("directions", chosen, cargo, tuple(wire), inward=False), wholes, mine)

    def news(self, chosen: Sequence[int], told: Mapping[str, News]) -> dict[str, News]:
        """What all owners say of some jobs, by block."""
        jobs = [self.jobs[k] for k in chosen]
        table = torch.zeros(sum(2 + len(job.cargo) for job in jobs), dtype=torch.float64)
        rows = torch.split(table, [2 + len(job.cargo) for job in jobs])
        for job, row in zip(jobs, rows):
            if job.owner == self.ranks.here:
                mine = told[job.entry.block.key]
                row.copy_(torch.tensor([float(mine.held), mine.rate, *mine.wd_scales], dtype=torch.float64))
        numbers = iter(self.ranks.added(table).tolist())
        return {
            job.entry.block.key: News(bool(next(numbers)), next(numbers), tuple(next(numbers) for _ in job.cargo))
            for job in jobs
        }

    def _route(
        self, what: str, chosen: Sequence[int], cargo: Sequence[Cargo], wire: tuple[torch.dtype, ...], *, inward: bool
    ) -> Route:
        key = (what, tuple(chosen), wire)
        if key not in self._routes:
            if len(self._routes) >= 16:
                self._routes.clear()
            self._routes[key] = self.exchange.route(cargo, wire, inward=inward)
        return self._routes[key]


class Owners:
    """What a plan needs where ranks share it.

    Args:
        ranks: All ranks that take steps together.
        teams: Those that own blocks together.
        layouts: How each parameter lies, by index.
        entries: What runs where it lies, of which each rank has a part.
        first: Number of the first gradient that is whole.
    """

    def __init__(
        self,
        ranks: Ranks,
        teams: list[Team],
        layouts: Mapping[int, Layout],
        entries: list[Entry],
        first: int,
        describe: Callable[[], list[str]],
    ) -> None:
        self.ranks = ranks
        self.teams = teams
        self.layouts = layouts
        self.loose = entries
        self.finite = True  # whether the gradients of all ranks were, when they last agreed
        self.told: dict[str, News] = {}
        self.chosen: list[list[int]] = [[] for _ in teams]
        self._describe = describe
        self._apart: set[tuple[int, ...]] = set()  # ranks that hold again what others do
        self._checked = False
        self._count = first
        for job in (job for job in self.jobs if job.owner == ranks.here):
            for p, each in zip(job.entry.owners, job.cargo):
                data = torch.zeros(each.shape, dtype=work_dtype(p.tensor.dtype), device=p.part.device)
                job.own.append(replace(p, index=self._count, part=data, home=p.index))
                self._count += 1

    @property
    def jobs(self) -> list[Job]:
        """All blocks that have an owner."""
        return [job for team in self.teams for job in team.jobs]

    def entries(self) -> Iterator[Entry]:
        """What this rank computes: whole blocks that it owns, and its part of every block."""
        for entry in self.loose:
            yield self._here(entry, cut(entry.block, *self._places(entry)))
        for job in self.jobs:
            if job.own:
                yield replace(job.entry, block=job.block, parts=job.halves.first, owners=job.own, half="first")
            yield self._here(replace(job.entry, parts=job.halves.second, half="second"), job.here)

    def _here(self, entry: Entry, block: Block) -> Entry:
        layout = self.layouts[entry.owners[0].index]
        begins = tuple(span.start for span in layout.boxes[self.ranks.here])
        return replace(entry, block=block, kind=layout.kind, place=str(begins) if any(begins) else "")

    def _places(self, entry: Entry) -> tuple[list[tuple[int, ...]], list[Any]]:
        layouts = [self.layouts[p.index] for p in entry.owners]
        return [layout.shape for layout in layouts], [layout.boxes[self.ranks.here] for layout in layouts]

    def counts(self, p: Parameter, half: str) -> bool:
        """Whether what this rank has of a parameter counts in sums over all ranks, of which it may be a copy."""
        layout = self.layouts[p.home]
        return layout.members not in self._apart and (half == "first" or layout.counts(self.ranks.here))

    # -- one step --------------------------------------------------------------------------------------------------

    def check(self) -> None:
        """Before the first message: all ranks have found the same plan.

        Raises:
            ValueError: They have not; the message says what differs and on which rank.
        """
        if self._checked:
            return
        lines = self._describe()
        digest = hashlib.blake2b("\n".join(lines).encode(), digest_size=16).hexdigest()
        sets = {name: self.layouts[i].members for i, name in self._names().items()}
        told = self.ranks.tell((digest, sets))
        if any(theirs != digest for theirs, _ in told):
            first, *others = self.ranks.tell([*lines, "nothing more"])
            for rank, theirs in zip(self.ranks.members[1:], others):
                for a, b in zip(first, theirs):
                    if a != b:
                        raise ValueError(
                            f"the plans of the ranks differ: rank {self.ranks.members[0]} has {a!r} where rank {rank} "
                            f"has {b!r}; build the optimizer of one model with the same options on every rank"
                        )
        for _, theirs in told:
            for name, members in theirs.items():
                if members < sets[name]:
                    self._apart.add(sets[name])
        self._checked = True

    def _names(self) -> dict[int, str]:
        found: dict[int, str] = {}
        for entry in [*self.loose, *(job.entry for job in self.jobs)]:
            found |= {p.index: p.name for p in entry.owners}
        return found

    def agree(self, gradients: Sequence[Tensor | None], parts: Sequence[Tensor], finite: bool) -> Gradients:
        """The gradients that all ranks will use; see ``Ranks.agree``."""
        found, self.finite = self.ranks.agree(gradients, parts, finite)
        return found

    def collect(self, gradients: Gradients, groups: Sequence[Hyper], read: Callable[[Parameter], Tensor]) -> Gradients:
        """The gradients, with those of the whole blocks that are owned here behind them.

        Args:
            gradients: What lies here, by index of parameter, as agreed.
            groups: The param groups.
            read: Gives the part of a parameter that lies here, in the work dtype.
        """
        found: Gradients = [*gradients, *[None] * (self._count - len(gradients))]
        self.told = {}
        for i, team in enumerate(self.teams):
            have = [all(gradients[p.index] is not None for p in job.entry.owners) for job in team.jobs]
            self.chosen[i] = chosen = [k for k, yes in enumerate(have) if yes]
            team.gather(chosen, gradients, found)
            reading = [k for k in chosen if team.jobs[k].halves.reads(groups[team.jobs[k].entry.group])]
            team.gather_parameters(reading, read)
        return found

    def tell(self, blocks: Iterable[Block], x: Batch | None) -> None:
        """Note what an owner's batch says beside its directions; ``None``: nothing out of the ordinary."""
        rows = 0
        for block in blocks:
            count = len(block.pieces)
            own = tuple(block.wd_scale * piece.wd_scale for piece in block.pieces)
            if x is None:
                self.told[block.key] = News(False, 1.0, own)
                continue
            scales = x.wd_scale
            mine = tuple(scales[rows : rows + count]) if isinstance(scales, list) else (scales,) * count
            self.told[block.key] = News(x.held, float(x.rate), mine)
            rows += count

    def hand_out(self, *, displacing: bool = False) -> tuple[Gradients, dict[str, News]]:
        """The directions of what lies here, by index of parameter, and what their owners say, by block.

        Args:
            displacing: Whether they lead to the point of a probe, which nobody holds.
        """
        directions: Gradients = [None] * self._count
        news: dict[str, News] = {}
        for team, chosen in zip(self.teams, self.chosen):
            if displacing:
                probing = [k for k in chosen if team.jobs[k].entry.parts.probing is not None]
                team.scatter(probing, directions, exact=True)
                news |= {team.jobs[k].entry.block.key: News(False, 1.0, ()) for k in probing}
                continue
            news |= team.news(chosen, self.told)
            team.scatter(chosen, directions)
        return directions, news

    # -- what it costs ---------------------------------------------------------------------------------------------

    def assignment(self, groups: Sequence[Hyper]) -> Assignment:
        """Who owns what, and what a step sends."""
        shares, sent = [], dict.fromkeys(self.ranks.members, 0)
        for team in self.teams:
            for job in team.jobs:
                shares.append(Share(job.entry.block.key, job.owner, job.cost.flops, job.cost.size))
                kinds = [real(p.part).dtype for p in job.entry.owners]
                work = [work_dtype(kind) for kind in kinds]
                away = [team.wire or kind for kind in kinds]
                back = work if job.halves.whole else [team.wire or kind for kind in work]
                routes = [(job.cargo, away, True), (job.cargo, back, False)]
                if job.halves.reads(groups[job.entry.group]):
                    routes.append((job.cargo, work, True))
                for cargo, wire, inward in routes:
                    for rank, size in forecast(cargo, wire, inward=inward).items():
                        sent[rank] += size
        return Assignment(self.ranks.members, tuple(shares), sent)


def heed(x: Batch, news: Sequence[News]) -> bool:
    """Let the second half of some blocks follow what their owners say; whether that is out of the ordinary."""
    scales = [scale for each in news for scale in each.wd_scales]
    scale: float | list[float] = scales[0] if len(set(scales)) == 1 else scales
    unusual = news[0].held or news[0].rate != 1 or scale != x.wd_scale
    x.held, x.rate, x.wd_scale = news[0].held, news[0].rate, scale
    return unusual
