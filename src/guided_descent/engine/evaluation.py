"""Evaluation weights: what a method evaluates where that is not what it trains, and the swap of the two.

The parameters hold the live weights, except between ``eval()`` and ``train()``. In that time the live ones lie in the
state, so that a checkpoint goes on from them whichever mode it was made in.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from guided_descent.engine.binding import Plan
from guided_descent.engine.buckets import Parameter
from guided_descent.engine.guard import forbid_while_evaluating
from guided_descent.engine.state import work_dtype
from guided_descent.parallel.boxes import assign, local

if TYPE_CHECKING:
    from guided_descent.engine.engine import Engine

#: The state that holds a parameter's live weights in evaluation mode.
LIVE = "live"


def averaged(plan: Plan) -> list[Parameter]:
    """The parameters whose method keeps an average of them."""
    found = {p.index: p for bucket in plan.buckets if bucket.parts.average for _, _, ps in bucket.members() for p in ps}
    return [found[index] for index in sorted(found)]


def evaluation_weights(engine: Engine) -> dict[int, Tensor]:
    """The averages of the parameters that have been updated, by index, as new tensors in the work dtype."""
    plan = engine.bind()
    found: list[Tensor | None] = [None] * len(plan.parameters)
    for bucket in plan.buckets:
        part = bucket.parts.average
        if part is None:
            continue
        rows = [i for i, _, owners in bucket.members() if all(plan.counts[p.index] for p in owners)]
        if not rows:
            continue
        for p in (p for i in rows for p in bucket.owners[i] if found[p.index] is None):
            wide = work_dtype(p.tensor.dtype)
            dtype = torch.promote_types(wide, torch.complex32) if p.tensor.is_complex() else wide
            found[p.index] = p.tensor.detach().to(dtype, copy=True)
        whole = len(rows) == len(bucket.blocks)
        for piece in bucket.slices if whole else engine.cut_all(bucket, rows):
            w, x = engine.look(bucket, piece)
            x.w = engine.working_copy(w)
            part.evaluate(x, piece.state, engine.groups[bucket.group])
            parts = [None if value is None else local(value) for value in found]
            for view, row in zip(piece.gradients(parts).list, x.w.list):
                view.copy_(row)
    return {index: value for index, value in enumerate(found) if value is not None}


def show(engine: Engine) -> None:
    """Put the evaluation weights into the parameters and the live ones into the state."""
    plan = engine.bind()
    shown = averaged(plan)
    forbid_while_evaluating((p.tensor for p in shown), "optimizer.eval()", "there they hold them already")
    weights = evaluation_weights(engine)
    for p in shown:
        engine.state[p.tensor][LIVE] = p.tensor.detach().clone()
        p.tensor.copy_(weights.pop(p.index, p.tensor))
    torch.clear_autocast_cache()


def hide(engine: Engine) -> None:
    """Put the live weights back into the parameters, to the bit."""
    plan = engine.bind()
    shown = averaged(plan)
    forbid_while_evaluating((p.tensor for p in shown), "optimizer.train()", "call it after the context")
    for p in shown:
        if LIVE in engine.state[p.tensor]:
            p.tensor.copy_(engine.state[p.tensor].pop(LIVE))
    torch.clear_autocast_cache()


def loaded(engine: Engine, plan: Plan, mode: str, saved: Mapping[int, Mapping[str, Any]]) -> dict[int, Tensor | None]:
    """The live weights of each averaged parameter that a checkpoint holds, to be kept once everything fits.

    Args:
        engine: The engine that loads.
        plan: Its plan.
        mode: The mode in which the checkpoint was made.
        saved: State by index of parameter.

    Raises:
        ValueError: It was made in evaluation mode and its live weights are missing, or have another shape.
    """
    found: dict[int, Tensor | None] = {}
    for p in averaged(plan):
        value = saved.get(p.index, {}).get(LIVE)
        if value is None and mode == "eval" and saved.get(p.index):
            raise ValueError(
                f"the state of {p.name!r} was saved in evaluation mode and lacks its live weights, {LIVE!r}: save "
                "after optimizer.train(); where a state dict of this optimizer is the template, call eval() before"
            )
        if value is not None and value.shape != p.tensor.shape:
            raise ValueError(
                f"state {LIVE!r} of {p.name!r} has shape {tuple(value.shape)} in the state dict and "
                f"{tuple(p.tensor.shape)} here: it belongs to another model"
            )
        found[p.index] = value
    return found


def keep(engine: Engine, plan: Plan, live: Mapping[int, Tensor | None]) -> None:
    """Take over the live weights of a checkpoint."""
    for index, value in live.items():
        p = plan.parameters[index].tensor
        engine.state[p].pop(LIVE, None)
        if value is not None:
            engine.state[p][LIVE] = torch.empty_like(p, requires_grad=False)
            assign(engine.state[p][LIVE], value.detach())
