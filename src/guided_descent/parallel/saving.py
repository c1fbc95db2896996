"""Saving: state that lies at owners leaves in parts, as every rank saves its own, and comes back from any layout.

What is shaped like a parameter leaves placed like it, other tensors cut along their first axis over the ranks of its
mesh, numbers whole. Where parameters are plain, everything leaves whole.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from guided_descent.engine.buckets import Parameter
from guided_descent.engine.state import slot_key, work_dtype
from guided_descent.parallel.boxes import by_rows, is_dtensor, like, local
from guided_descent.parallel.exchange import Cargo
from guided_descent.parallel.owners import Job, Owners, Team
from guided_descent.parallel.ranks import Ranks
from guided_descent.parts.base import Slot
from guided_descent.routing.roles import Piece

Placed = dict[int, dict[str, Tensor]]  # by index of parameter and key


@dataclass(eq=False)
class Lot:
    """What one owner has of a state tensor: all of it, or that of one block.

    Attributes:
        cargo: It, on its way.
        key: Its key in the owner's state.
        here: Its place in the part of the state tensor that lies here.
    """

    cargo: Cargo
    key: str
    here: Piece


@dataclass(eq=False)
class Item:
    """One tensor of a state dict that lies at owners.

    Attributes:
        p: Its parameter.
        shape: Its shape, where that is not the parameter's.
        dtype: Its dtype.
        fill: What it holds where no block has it.
        team: The ranks among which it moves.
        lots: What it is made of.
    """

    p: Parameter
    shape: tuple[int, ...] | None
    dtype: torch.dtype
    fill: float
    team: Team
    lots: list[Lot] = field(default_factory=list)

    def empty(self) -> Tensor:
        """The tensor, placed as it leaves, without its contents."""
        ranks = self.team.ranks
        size = self.p.part.shape
        if self.shape is not None:
            size = torch.Size(map(len, by_rows(self.p.tensor, self.shape, ranks.members).boxes[ranks.here]))
        part = torch.full(size, self.fill, dtype=self.dtype, device=self.p.part.device)
        whole_number = self.shape == ()
        return part if whole_number else like(part, self.p.tensor, self.shape)


class Store:
    """What the owners of a plan hold for others, as a state dict names it.

    Args:
        owners: The owners.
        stored: Gives all state of the first half of a job as it is stored.
    """

    def __init__(self, owners: Owners, stored: Callable[[Job], Mapping[str, Slot]]) -> None:
        self.items: dict[tuple[int, str], Item] = {}
        self.raw: dict[int, set[str]] = {}  # keys of the owners' own state
        for team in owners.teams:
            for job in team.jobs:
                for name, slot in stored(job).items():
                    if slot.layout != "group":
                        self._add(team, job, name, slot)

    def _add(self, team: Team, job: Job, name: str, slot: Slot) -> None:
        block, pairs = job.entry.block, list(zip(job.entry.owners, job.cargo, job.here.pieces))
        if slot.layout == "factor":
            p = job.entry.owners[0]
            layout = by_rows(p.tensor, slot.shape, team.ranks.members)
            cargo = Cargo(job.owner, slot.shape, dict(layout.boxes), layout.sources(job.owner))
            pairs = [(p, cargo, Piece(p.name, slot.shape))]
        for p, cargo, here in pairs:
            key = slot_key(block, name, p.lone)
            shared = key if slot.layout == "factor" else name
            self.raw.setdefault(p.index, set()).add(key)
            dtype = slot.dtype or work_dtype(p.part.dtype)
            shape = slot.shape if slot.layout == "factor" else None
            item = self.items.setdefault((p.index, shared), Item(p, shape, dtype, slot.fill, team))
            item.lots.append(Lot(cargo, key, here))

    def empty(self) -> Placed:
        """All tensors, placed as they leave, without their contents."""
        found: Placed = {}
        for (index, key), item in self.items.items():
            found.setdefault(index, {})[key] = item.empty()
        return found

    def leave(self, state: Mapping[Tensor, Mapping[str, Any]]) -> Placed:
        """All tensors as they are; collective."""
        found = self.empty()
        self._move(state, found, inward=False)
        return found

    def enter(self, state: Mapping[Tensor, Mapping[str, Any]], placed: Placed) -> None:
        """Take all tensors into the owners' state; collective."""
        self._move(state, placed, inward=True)

    def _move(self, state: Mapping[Tensor, Mapping[str, Any]], placed: Placed, *, inward: bool) -> None:
        for team in dict.fromkeys(item.team for item in self.items.values()):
            lots = [(k, item, lot) for k, item in self.items.items() if item.team is team for lot in item.lots]
            owned = [lot.cargo.owner == team.ranks.here for _, _, lot in lots]
            wholes = [state[item.p.tensor][lot.key] if own else None for own, (_, item, lot) in zip(owned, lots)]
            mine = [lot.here.of(local(placed[index][key])) for (index, key), _, lot in lots]
            wire = [item.dtype for _, item, _ in lots]
            route = team.exchange.route([lot.cargo for _, _, lot in lots], wire, inward=inward)
            if inward:
                team.exchange.gather(route, mine, wholes)
            else:
                team.exchange.scatter(route, wholes, mine)


def prove_equal(ranks: Ranks, named: Mapping[str, Any]) -> None:
    """Check that the numbers which every rank saves are the same on all of them.

    Raises:
        RuntimeError: They are not; the message names the first that differs, and the ranks.
    """
    mine = {name: value.tolist() for name, value in named.items() if _is_number(value)}
    first, *others = ranks.tell(mine)
    for rank, theirs in zip(ranks.members[1:], others):
        for name in (name for name in first if name in theirs):
            if repr(first[name]) != repr(theirs[name]):  # not a number equals itself here
                raise RuntimeError(
                    f"{name} is {first[name]} on rank {ranks.members[0]} and {theirs[name]} on rank {rank}: they have "
                    "not taken the same steps; give all ranks the same learning rates, seeds and number of steps"
                )


def _is_number(value: Any) -> bool:
    return isinstance(value, Tensor) and not is_dtensor(value) and value.numel() <= 64
