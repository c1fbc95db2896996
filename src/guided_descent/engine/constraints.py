"""Edits that couple parameters: applied after a step to whole tensors, or to their parts where that is the same."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from guided_descent.engine.binding import Plan
from guided_descent.engine.buckets import Parameter
from guided_descent.engine.state import work_dtype
from guided_descent.parallel.boxes import whole, within
from guided_descent.recipes.base import Constraint

if TYPE_CHECKING:
    from guided_descent.engine.engine import Engine


def constrain(engine: Engine, plan: Plan, gradients: Sequence[Tensor | None]) -> None:
    """Apply the constraints whose parameters have all been updated.

    Raises:
        ValueError: One names a parameter that is not here.
        TypeError: One needs whole tensors, and they are sharded.
    """
    coupled = [i for i, recipe in enumerate(engine.recipes) if recipe.couples]
    if coupled and engine.process_group is not None:
        join_notes(engine)
    named = {p.name: p for p in plan.parameters} if coupled else {}
    for index in coupled:
        recipe = engine.recipes[index]
        blocks = [block for p in plan.parameters if p.group == index for block in p.blocks]
        for constraint in recipe.constraints(blocks):
            missing = [name for name in constraint.names if name not in named]
            if missing:
                raise ValueError(f"a constraint of {recipe.label} names {missing[0]!r}, which is no parameter here")
            members = [named[name] for name in constraint.names]
            if all(gradients[p.index] is not None for p in members):
                more = [named.get(name) for name in constraint.optional]
                _apply(engine, plan, constraint, [*members, *more], members[0].group)


def _apply(engine: Engine, plan: Plan, constraint: Constraint, members: Sequence[Parameter | None], group: int) -> None:
    notes, h = engine.notes.get(constraint.note, {}), engine.groups[group]
    parts = [p for p in members if p is not None and p.part is not p.tensor]
    if not parts:
        constraint.apply([p and p.tensor.detach() for p in members], h, notes)
        return
    if not constraint.multiplies:
        raise TypeError(
            f"a constraint of {h['recipe']} edits {parts[0].name!r}, which is sharded: only one that multiplies "
            "elements, Constraint(multiplies=True), can be applied to parts of tensors"
        )
    assert plan.owners is not None
    factors = [None if p is None else _ones(p) for p in members]
    constraint.apply(factors, h, notes)
    for p, factor in zip(members, factors):
        if p is not None and factor is not None:
            box = plan.owners.layouts[p.index].boxes[plan.owners.ranks.here]
            p.part.mul_(factor[within(box, whole(factor.shape))])


def _ones(p: Parameter) -> Tensor:
    return torch.ones(p.tensor.shape, dtype=work_dtype(p.part.dtype), device=p.part.device)


def join_notes(engine: Engine) -> None:
    """The largest notes of all ranks."""
    dist = torch.distributed
    theirs: list[Any] = [None] * dist.get_world_size(engine.process_group)
    mine = {kind: {name: value.cpu() for name, value in notes.items()} for kind, notes in engine.notes.items()}
    dist.all_gather_object(theirs, mine, group=engine.process_group)
    for notes in theirs:
        for kind, values in notes.items():
            engine.note(kind, values)
