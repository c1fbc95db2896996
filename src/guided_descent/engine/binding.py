"""Binding: from groups, recipes and blocks to a plan of buckets with their state, remade when the tensors change.

State is matched by the name of its parameter: a model moved to another device, parameters replaced one for one, and
parameters unfrozen late all keep what they have.
"""

from __future__ import annotations

import operator
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import Field, dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from guided_descent import kernels
from guided_descent.engine import packing, rounding
from guided_descent.engine.buckets import STACK, Bucket, Entry, Parameter, Slice, capacity, factor_stack
from guided_descent.engine.refresh import waiting_slots
from guided_descent.engine.state import param_slot, real, slot_key, work_dtype
from guided_descent.parallel.boxes import addresses, local
from guided_descent.parallel.owners import Owners
from guided_descent.parallel.sharing import Sharing
from guided_descent.parts.base import Part, Parts, Slot
from guided_descent.parts.numbers import Numbers
from guided_descent.parts.wrapper import Wrapper
from guided_descent.recipes.base import Recipe
from guided_descent.routing.roles import Block, Piece

Group = dict[str, Any]


@dataclass(eq=False)
class Plan:
    """What ``bind`` makes: parameters, buckets, counters.

    ``entries`` are all blocks, by key, the same on every rank; ``buckets`` hold what this rank updates of them.
    """

    parameters: list[Parameter]
    groups: list[list[Tensor]]  # the tensors of each group, as bound
    pointers: list[int]
    buckets: list[Bucket]
    options: list[tuple[Any, ...]]  # of each group, those that shape the plan
    entries: dict[str, Entry]
    places: dict[str, tuple[Bucket, int]]  # of each block that is whole here, by key
    steps: Tensor  # float32 [parameters], the storage of every state["step"]
    counts: list[int]  # the same on the host
    owners: Owners | None = None  # where ranks share the work
    cuts: dict[tuple[Bucket, tuple[int, ...]], list[Slice]] = field(default_factory=dict)
    phases: dict[tuple[int, int], dict[str, int]] = field(default_factory=dict)  # by period, and what is crowded

    @cached_property
    def uses(self) -> list[tuple[int, Parts]]:
        """The parts of all blocks with their groups, each once."""
        return list(dict.fromkeys((entry.group, entry.parts) for entry in self.entries.values()))


def stored_slots(
    parts: Parts, block: Block, group: Mapping[str, Any], tensor: Tensor
) -> tuple[dict[str, Slot], dict[str, packing.Form]]:
    """All state of a block as it is stored, and which of it is packed, and how."""
    slots = parts.slots(block)
    packed = packing.choose(parts, slots, group["state_dtype"], tensor)
    stored = packing.declare(slots, packed, block) | rounding.rounding_slots(group["rounding"], tensor.dtype)
    return stored | waiting_slots(parts, block, group), packed


class Binder:
    """Makes plans, and knows whether the last one still holds.

    Args:
        groups: The optimizer's ``param_groups``.
        state: The optimizer's ``state``.
        recipes: The recipe of each group.
        blocks: The blocks of each parameter, by canonical name.
        add: Parts added to every recipe.
        carried: The wrappers of each group, whose parts are among the added ones.
        workspace_mb: Bound of the scratch memory; a single larger matrix may exceed it.
        sharing: How ranks divide the work.
    """

    def __init__(
        self,
        groups: list[Group],
        state: dict[Tensor, dict[str, Any]],
        recipes: list[Recipe],
        blocks: dict[str, tuple[Block, ...]],
        add: tuple[Part, ...],
        carried: list[tuple[Wrapper, ...]],
        workspace_mb: float,
        sharing: Sharing,
    ) -> None:
        self.groups = groups
        self.state = state
        self.recipes = recipes
        self.blocks = blocks
        self.add = add
        self.carried = carried
        self.workspace_mb = workspace_mb
        self.sharing = sharing
        self.graphs = False  # whether the parts are compiled
        self.plan: Plan | None = None
        self._parts: dict[tuple[int, Block], Parts] = {}

    def __getstate__(self) -> dict[str, Any]:
        """Everything but what ``bind`` makes again."""
        return self.__dict__ | {"plan": None, "_parts": {}}

    def bind(self) -> Plan:
        """The plan for the tensors that the groups hold now, remade where they are not the ones bound before."""
        plan = self.plan
        if plan is None or not self._is_current(plan):
            plan = self.plan = self._make_plan(plan)
        return plan

    def parts(self, group: int, block: Block) -> Parts:
        """The parts that update a block of a group.

        Raises:
            ValueError: A part reads a number that the recipe does not have.
        """
        key = (group, block)
        if key not in self._parts:
            recipe = self.recipes[group]
            parts = recipe.parts(block) + tuple(part for part in self.add if part.takes(block))
            if parts.average is not None and recipe.couples:
                raise ValueError(
                    f"{recipe.label} edits parameters after the step, of which {type(parts.average).__name__} would "
                    "know nothing: leave one of them out"
                )
            for part in parts:
                lacking = [name for name in part.keys if name not in self.groups[group]]
                if lacking:
                    raise ValueError(
                        f"{type(part).__name__} reads {', '.join(map(repr, lacking))}, which {recipe.label} does not "
                        "have: add the field to the recipe, or name another of its numbers in the part"
                    )
            self._parts[key] = parts
        return self._parts[key]

    def sources(self, group: int) -> tuple[Numbers, ...]:
        """Who declares keys of a group: its recipe and its wrappers."""
        return (self.recipes[group], *self.carried[group])

    def declared(self, group: int) -> Iterator[tuple[Numbers, str, Field[Any]]]:
        """The keys that a group has from them: who declares it, its name, the field."""
        for source in self.sources(group):
            for name, item in source.numbers().items():
                yield source, name, item

    def forget(self) -> None:
        """Bind anew at the next use; state is kept."""
        self.plan = None

    def _is_current(self, plan: Plan) -> bool:
        if len(plan.groups) != len(self.groups) or plan.options != self._options():
            return False
        tensors: list[Tensor] = []
        for group, bound in zip(self.groups, plan.groups):
            now = group["params"]
            if len(now) != len(bound) or not all(map(operator.is_, now, bound)):
                return False
            tensors += now
        return addresses(tensors) == plan.pointers

    def _options(self) -> list[tuple[Any, ...]]:
        return [tuple(group[key] for key in ("state_dtype", "rounding", "foreach", "fused")) for group in self.groups]

    def _make_plan(self, old: Plan | None) -> Plan:
        for group, built in zip(self.groups, old.options if old is not None else ()):
            if group["state_dtype"] != built[0]:
                raise ValueError(
                    f"state_dtype was {built[0]!r} when the optimizer was built and is now {group['state_dtype']!r}: "
                    "state that is held cannot change its form; build a new optimizer"
                )
        parameters: list[Parameter] = []
        for index, group in enumerate(self.groups):
            names = group["param_names"]
            if len(names) != len(group["params"]):
                raise ValueError(
                    f"param group {index} holds {len(group['params'])} tensors but {len(names)} param_names: replace "
                    "tensors one for one, or use add_param_group"
                )
            for name, tensor in zip(names, group["params"]):
                self._follow(old, name, index, tensor)
                parameters.append(Parameter.of(len(parameters), name, index, tensor, self.blocks[name]))
        plan = Plan(
            parameters,
            [list(group["params"]) for group in self.groups],
            addresses([p.tensor for p in parameters]),
            [],
            self._options(),
            {},
            {},
            torch.zeros(len(parameters)),
            [0] * len(parameters),
        )
        live = [p for p in parameters if self._holds_state(p)]
        for p in live:
            count = self.state[p.tensor].get("step", 0)
            plan.counts[p.index] = int(count)
            plan.steps[p.index] = plan.counts[p.index]
            self.state[p.tensor]["step"] = plan.steps[p.index]
        plan.entries = self._make_entries(live)
        for index, group in enumerate(self.groups):
            own = [entry for entry in plan.entries.values() if entry.group == index]
            if own and group["state_dtype"]:
                packing.check_names(group["state_dtype"], [entry.parts.slots(entry.block) for entry in own])
        plan.owners = self.sharing.divide(list(plan.entries.values()), self.groups, len(parameters))
        mine = plan.entries.values() if plan.owners is None else plan.owners.entries()
        plan.buckets = self._make_buckets(mine, self._shared(plan.entries.values()), plan.places)
        if plan.owners is not None:
            self._tidy(plan.owners)
        return plan

    def _tidy(self, owners: Owners) -> None:
        """Drop what this rank held before its parameters were sharded and others own now."""
        for job in owners.jobs:
            for name, slot in job.halves.first.slots(job.block).items():
                for p in job.entry.owners:
                    state = self.state[p.tensor]
                    stale = state.pop(name, None) if slot.layout == "param" and not p.lone else None
                    if stale is not None and int(state["step"]):
                        raise ValueError(
                            f"state {name!r} of {p.name!r} has been used, and the blocks of the parameter are now "
                            "shared out among ranks: build a new optimizer and load the state into it"
                        )
                    if not job.own:
                        state.pop(slot_key(job.block, name, p.lone), None)

    def _follow(self, old: Plan | None, name: str, group: int, tensor: Tensor) -> None:
        """Let state follow a parameter that was replaced by another tensor of the same name."""
        if old is None or tensor in self.state:
            return
        for p in old.parameters:
            if p.name == name and p.group == group and p.tensor in self.state:
                state = self.state.pop(p.tensor)
                if p.tensor.shape != tensor.shape:
                    if int(state.get("step", 0)):
                        raise ValueError(
                            f"parameter {name!r} was replaced by one of shape {tuple(tensor.shape)} after its state of "
                            f"shape {tuple(p.tensor.shape)} had been used: build a new optimizer for the new model"
                        )
                    state = {}
                self.state[tensor] = state
                return

    def _holds_state(self, p: Parameter) -> bool:
        t = p.tensor
        if t.is_meta or not (t.requires_grad or t.grad is not None or t in self.state):
            return False
        if not (t.is_floating_point() or t.is_complex()):
            raise TypeError(
                f"parameter {p.name!r} has dtype {t.dtype}; only floating and complex dtypes can be trained"
            )
        self.state.setdefault(t, {})
        return True

    def _make_entries(self, live: Sequence[Parameter]) -> dict[str, Entry]:
        """All blocks of these parameters, by key."""
        found: dict[str, Entry] = {}
        named = {p.name: p for p in live}
        for p in live:
            for block in p.blocks:
                if block.key not in found:
                    owners = [self._owner(named, block, name) for name in block.names]
                    found[block.key] = Entry(block, p.group, self.parts(p.group, block), owners)
        return found

    def _make_buckets(
        self, entries: Iterable[Entry], shared: Mapping[tuple[int, str], Tensor], places: dict[str, tuple[Bucket, int]]
    ) -> list[Bucket]:
        buckets: dict[tuple[Any, ...], Bucket] = {}
        for entry in entries:
            group, block, parts, p = self.groups[entry.group], entry.block, entry.parts, entry.owners[0]
            kept = rounding.rounding_slots(group["rounding"], p.tensor.dtype)
            for name in rounding.NAMES - kept.keys():  # of a mode left behind: it would be stale on return
                self.state[p.tensor].pop(name, None)
            slots, packed = stored_slots(parts, block, group, p.part)
            scales = (block.lr_scale, block.wd_scale, block.eps_scale, *(x.wd_scale for x in block.pieces))
            shape = block.shape if parts.unit == "matrix" else ()
            factors = tuple((n, slot.shape) for n, slot in slots.items() if slot.layout == "factor")
            apart = (entry.half, entry.kind, *packed.items())
            key = (entry.group, parts, p.part.dtype, p.part.device, scales, shape, factors, apart)
            if key not in buckets:
                buckets[key] = Bucket(
                    group=entry.group,
                    parts=parts,
                    dtype=p.part.dtype,
                    device=p.part.device,
                    half=entry.half,
                    place=entry.place,
                    slots=slots,
                    packed=packed,
                    loop=group["foreach"] is False,
                    graphs=self.graphs,
                )
            bucket = buckets[key]
            bucket.blocks.append(block)
            bucket.owners.append(entry.owners)
            if entry.half != "second":
                places[block.key] = (bucket, len(bucket.blocks) - 1)
        for bucket in buckets.values():
            self._allocate(bucket, shared)
            if bucket.stacked:
                limit = int(self.workspace_mb * 2**20)
                if bucket.device.type == "cpu":
                    limit = min(limit, STACK)
                bucket.capacity = capacity(bucket.blocks, bucket.parts, limit, bucket.dtype)
            bucket.offer(self._kernel(bucket))
            bucket.slices = bucket.cut(range(len(bucket.blocks)))
        return list(buckets.values())

    @staticmethod
    def _owner(named: Mapping[str, Parameter], block: Block, name: str) -> Parameter:
        if name not in named:
            raise ValueError(
                f"{' and '.join(map(repr, block.names))} are one block and {name!r} takes no gradient: train or freeze "
                "them together, or build a new optimizer after freezing"
            )
        return named[name]

    def _allocate(self, bucket: Bucket, shared: Mapping[tuple[int, str], Tensor]) -> None:
        for name, slot in bucket.slots.items():
            if slot.layout == "param":
                rows = bucket.tensors[name] = []
                for _, block, owners in bucket.members():
                    rows.append([self._beside(bucket, name, slot, block, *each) for each in zip(owners, block.pieces)])
            elif slot.layout == "factor":
                stack = factor_stack(slot, len(bucket.blocks), bucket.device, work_dtype(bucket.dtype))
                for i, block, owners in bucket.members():
                    state, key = self.state[owners[0].tensor], slot_key(block, name, owners[0].lone)
                    if isinstance(state.get(key), Tensor):
                        stack[i].copy_(state[key])
                    state[key] = stack[i]
                bucket.stacks[name] = stack
            else:
                bucket.shared[name] = shared[bucket.group, name]

    def _beside(self, bucket: Bucket, name: str, slot: Slot, block: Block, p: Parameter, piece: Piece) -> Tensor:
        """The state of a piece of a parameter that is shaped like it: a part of the parameter's, or an owner's own."""
        state = self.state[p.tensor]
        used = bool(int(state["step"]))
        if bucket.half == "first":
            return param_slot(state, slot_key(block, name, p.lone), p.part, slot, used)
        fresh = name not in state
        whole = param_slot(state, name, p.tensor, slot, used)
        if fresh and name == "master":
            whole.copy_(p.tensor)
        return piece.of(real(local(whole)))

    def _shared(self, entries: Iterable[Entry]) -> dict[tuple[int, str], Tensor]:
        """The state that whole groups share, by group and name, made on every rank."""
        made: dict[tuple[int, str], Tensor] = {}
        for entry in {(entry.group, entry.parts): entry for entry in entries}.values():
            group, like = self.groups[entry.group], entry.owners[0].part
            joint = {name for part in entry.parts.joint for name in part.slots(entry.block)}
            for name, slot in entry.parts.slots(entry.block).items():
                if slot.layout != "group" or (entry.group, name) in made:
                    continue
                extra = group["extra"]
                if name in joint:
                    same = (other["extra"] for other in self.groups if other["recipe"] == group["recipe"])
                    extra |= next(({name: held[name]} for held in same if name in held), {})
                if name not in extra:
                    dtype, device = slot.dtype or work_dtype(like.dtype), "cpu" if name in joint else like.device
                    extra[name] = torch.full(slot.shape, slot.fill, dtype=dtype, device=device)
                made[entry.group, name] = extra[name]
        return made

    def _kernel(self, bucket: Bucket) -> kernels.Kernel | None:
        """The kernel that equals a bucket's parts, unless the group asks for the plain loop."""
        group = self.groups[bucket.group]
        if group["fused"] is False or group["foreach"] is False or bucket.packed or bucket.half:
            return None
        return kernels.find(bucket.parts, bucket.device, bucket.dtype, bucket.scales)
