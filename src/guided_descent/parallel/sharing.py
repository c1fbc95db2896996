"""Sharing: how the ranks of a run divide its blocks, decided when tensors are bound and kept from plan to plan."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import distributed as dist
from torch import nn

from guided_descent.engine.buckets import Entry, Parameter
from guided_descent.engine.state import work_dtype
from guided_descent.parallel.assignment import Cost, balance
from guided_descent.parallel.boxes import Layout, cut, everywhere, is_dtensor, layout
from guided_descent.parallel.exchange import Cargo, Exchange, Tally
from guided_descent.parallel.halves import halve
from guided_descent.parallel.owners import Job, Owners, Team
from guided_descent.parallel.ranks import Ranks
from guided_descent.parts.base import Hyper, Parts
from guided_descent.routing.roles import Block

#: Dtypes of gradients and directions on the way, by the names that ``build`` takes; ``None`` is their own.
WIRE: dict[str | None, torch.dtype | None] = {None: None, "bfloat16": torch.bfloat16}


class Sharing:
    """Makes the plans of all ranks alike, and keeps what a plan must not change: who owns which block.

    Args:
        members: The ranks that take steps together; left out, those of the meshes on which the parameters lie.
        plain: Whether they share the work on matrices of plain tensors too, which each of them holds.
        wire: Dtype of gradients and directions on the way; ``None`` is their own.
        limit: Bytes of a message.
    """

    def __init__(
        self, members: Sequence[int] = (), plain: bool = False, wire: torch.dtype | None = None, limit: int = 2**26
    ) -> None:
        self.members = tuple(members)
        self.plain = plain
        self.wire = wire
        self.limit = limit
        self.owners: dict[str, int] = {}
        self.tally = Tally()
        self._groups: dict[tuple[int, ...], Any] = {}

    def __getstate__(self) -> dict[str, Any]:
        """Everything but process groups, which are found or made again."""
        return self.__dict__ | {"_groups": {}}

    def divide(self, entries: Sequence[Entry], groups: Sequence[Hyper], first: int) -> Owners | None:
        """What the ranks make of all blocks; ``None`` where there is nothing to share.

        Args:
            entries: All blocks with their parts and parameters.
            groups: The param groups.
            first: Number of parameters.

        Raises:
            TypeError: A block cannot be updated in parts, or its parameters lie on different ranks.
            ValueError: The ranks cannot be put into one group.
        """
        parameters = {p.index: p for entry in entries for p in entry.owners}
        layouts = {i: layout(p.tensor, p.name) for i, p in parameters.items() if is_dtensor(p.tensor)}
        if not layouts and not self.plain:
            return None
        for entry in entries:
            if any(p.index in layouts for p in entry.owners):
                check(entry, groups[entry.group])
        members = self._members(layouts.values())
        device = next(iter(parameters.values())).part.device
        everyone = Ranks(members, self._group(members, layouts, parameters), device)
        for i, p in parameters.items():
            layouts.setdefault(i, everywhere(p.part.shape, members))
        shared = [entry for entry in entries if self._shares(entry)]
        alone = [entry for entry in entries if not self._shares(entry)]
        costs = [self._cost(entry, groups[entry.group], layouts) for entry in shared]
        self.owners |= balance(costs, self.owners)
        teams: dict[tuple[int, ...], list[Job]] = {}
        for entry, cost in zip(shared, costs):
            held = [layouts[p.index] for p in entry.owners]
            owner = self.owners[cost.key]
            here = cut(entry.block, [each.shape for each in held], [each.boxes[everyone.here] for each in held])
            cargo = [Cargo.of(piece, each, owner) for piece, each in zip(entry.block.pieces, held)]
            teams.setdefault(cost.among, []).append(Job(entry, halve(entry.parts), owner, cost, here, cargo))
        made = [
            Team(
                Exchange(Ranks(among, self._group(among, layouts, parameters), device), self.limit, self.tally),
                jobs,
                self.wire,
            )
            for among, jobs in sorted(teams.items(), key=lambda item: (-len(item[0]), item[0]))
        ]

        def describe() -> list[str]:
            lines = [f"{len(groups)} param groups", f"wire {self.wire}", f"seeds {[h['seed'] for h in groups]}"]
            for entry in entries:
                where = [(p.name, layouts[p.index].shape, str(p.part.dtype)) for p in entry.owners]
                owner = self.owners.get(entry.block.key) if self._shares(entry) else None
                among = layouts[entry.owners[0].index].members
                place = "" if owner is None else f", owned by number {among.index(owner)} of {len(among)}"
                lines.append(f"{entry.block.key} {where} in group {entry.group} by {entry.parts!r}{place}")
            return lines

        return Owners(everyone, made, layouts, alone, first, describe)

    def _shares(self, entry: Entry) -> bool:
        """Whether a block is whole at an owner."""
        parts = entry.parts
        if any(is_dtensor(p.tensor) for p in entry.owners):
            return parts.unit != "element"
        return self.plain and parts.unit == "matrix" and not why_not(parts)

    def _cost(self, entry: Entry, h: Hyper, layouts: Mapping[int, Layout]) -> Cost:
        block, first = entry.block, halve(entry.parts).first
        sets = {layouts[p.index].members for p in entry.owners}
        if len(sets) > 1:
            raise TypeError(
                f"{' and '.join(p.name for p in entry.owners)} are one block and lie on different ranks: shard them on "
                "one mesh"
            )
        work = work_dtype(entry.owners[0].tensor.dtype)
        size = sum(
            (slot.dtype or work).itemsize * (block.numel if slot.layout == "param" else math.prod(slot.shape))
            for slot in first.slots(block).values()
            if slot.layout != "group"
        )
        return Cost(block.key, flops(first, block, h), size, sets.pop())

    def _members(self, layouts: Any) -> tuple[int, ...]:
        """The ranks that take steps together: those of the largest mesh, which must hold all others."""
        if self.members:
            return self.members
        sets = {each.members for each in layouts}
        union = tuple(sorted({rank for each in sets for rank in each}))
        if union not in sets and union != tuple(range(dist.get_world_size())):
            raise ValueError(
                f"the parameters lie on the ranks {sorted(sets)}, none of which holds all others: give the mesh of all "
                "ranks that train together to build, mesh=..."
            )
        return union

    def _group(
        self, members: tuple[int, ...], layouts: Mapping[int, Layout], parameters: Mapping[int, Parameter]
    ) -> Any:
        """A process group of these ranks: one that exists, else a new one."""
        if len(members) == 1:
            return None
        if members == tuple(range(dist.get_world_size())):
            return dist.group.WORLD
        for i, each in layouts.items():
            if each.members == members and is_dtensor(parameters[i].tensor):
                mesh: Any = parameters[i].tensor.device_mesh  # type: ignore[attr-defined]
                if mesh.ndim == 1:
                    return mesh.get_group()
        if members not in self._groups:
            self._groups[members] = dist.new_group(list(members), use_local_synchronization=True)
        return self._groups[members]


def flops(parts: Parts, block: Block, h: Hyper) -> float:
    """Floating point operations of a block in a step, refreshes at their share."""
    found = 0.0
    for part in parts:
        period = part.policy(h).period
        found += part.flops(block) + sum(task.flops / period for task in part.tasks(block).values() if period)
    return found


def why_not(parts: Parts) -> str:
    """Why the work on a block cannot be shared out among ranks, or nothing."""
    for part in parts:
        if part.curvature:
            return f"{type(part).__name__} reads the diagonal of the curvature, which needs second derivatives"
        if part.multiplies:
            return f"{type(part).__name__} multiplies by the curvature of the batch, which needs whole parameters"
        if part.observes_state:
            return f"{type(part).__name__} projects what it sees of a layer by its state, which every rank would need"
    return ""


def check(entry: Entry, h: Hyper) -> None:
    """Whether a block of sharded parameters can be updated.

    Raises:
        TypeError: It cannot; the message says why and what to do.
    """
    name, parts = entry.block.key, entry.parts
    why = why_not(parts)
    if not why and parts.unit != "element" and entry.block.complex:
        why = f"it is complex, and {h['recipe']} needs whole tensors"
    if not why and h["state_dtype"] is not None:
        why = f"state_dtype={h['state_dtype']!r} packs runs of elements, which shards would cut"
    if why:
        raise TypeError(
            f"{name!r} is sharded and cannot be trained by {h['recipe']}: {why}; use DistributedDataParallel, another "
            "recipe for it (rules=[...]), or leave the option out"
        )


def settle(params: Any, parallel: bool | None, mesh: Any, wire_dtype: str | None, workspace_mb: float) -> Sharing:
    """What ``build`` was told about ranks.

    Args:
        params: What is trained, for its ``DistributedDataParallel`` wrapper.
        parallel: Whether ranks share the work on plain tensors; sharded ones are always shared.
        mesh: The mesh of all ranks that train together, where the parameters do not tell.
        wire_dtype: A key of ``WIRE``.
        workspace_mb: Bound of the messages, in MiB.

    Raises:
        ValueError: Nothing says which ranks there are, or a value is none of the valid ones.
    """
    if parallel not in (True, False, None):
        raise ValueError(f"parallel={parallel!r} must be True, False or None")
    if wire_dtype not in WIRE:
        raise ValueError(f"wire_dtype={wire_dtype!r} must be one of {', '.join(map(repr, WIRE))}")
    members: tuple[int, ...] = ()
    if mesh is not None:
        members = tuple(sorted(mesh.mesh.flatten().tolist()))
    elif parallel and isinstance(params, nn.parallel.DistributedDataParallel):
        members = tuple(sorted(dist.get_process_group_ranks(params.process_group)))
    sharded = isinstance(params, nn.Module) and any(map(is_dtensor, params.parameters()))
    if parallel is False and sharded:
        raise ValueError(
            "parallel=False is for DistributedDataParallel: sharded parameters are updated by their ranks together; "
            "leave it out"
        )
    if parallel and not members and not sharded:
        raise ValueError(
            "parallel=True needs to know the ranks: pass the DistributedDataParallel module, or mesh=... with the mesh "
            "of all ranks that hold these parameters and their gradients alike"
        )
    return Sharing(members, bool(parallel), WIRE[wire_dtype], int(workspace_mb * 2**20))


def check_readable(model: nn.Module, label: str) -> None:
    """Where layers are to be read, each rank sees all of them for its part of the batch, as with ``fully_shard`` alone.

    Raises:
        TypeError: Some layer is divided among ranks.
    """
    from torch.distributed.fsdp import FSDPModule

    inside = {id(p) for module in model.modules() if isinstance(module, FSDPModule) for p in module.parameters()}
    for name, p in model.named_parameters():
        if is_dtensor(p):
            places = [place.is_replicate() for place in p.placements]  # type: ignore[attr-defined]
            if id(p) not in inside or places not in ([False], [True, False]):
                raise TypeError(
                    f"{label} reads layers, and that of {name!r} is divided among ranks (tensor or expert parallel), "
                    "of which none sees all of it; shard with fully_shard alone, or use a recipe that reads no layers, "
                    "such as muon, soap or shampoo"
                )
