"""More than one evaluation of a batch: gradients at displaced parameters, with nothing else of the model moved."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, TypeAlias

import torch
from torch import Tensor

from guided_descent.engine.binding import Plan
from guided_descent.parallel.ranks import join
from guided_descent.parts.base import Part

if TYPE_CHECKING:
    from guided_descent.engine.engine import Engine, Totals, Work

Gradients: TypeAlias = list[Tensor | None]


def probe(
    engine: Engine, plan: Plan, gradients: Gradients, whole: Gradients, closure: Callable[[], Any] | None
) -> Gradients:
    """The gradients at the point to which the parts move the parameters, which come back to the bit.

    The layers are not read there, and the buffers of the model, such as running statistics, end as they were. ``whole``
    holds, behind the gradients, those of whole blocks that this rank owns.

    Raises:
        ValueError: There is no closure to evaluate again, or the parts disagree on what the gradient is for.
    """
    probing = {parts.probing: None for _, parts in plan.uses if parts.probing is not None}
    names = ", ".join(sorted({type(part).__name__ for part in probing}))
    if len({part.needs for part in probing}) > 1:
        raise ValueError(f"{names} of different groups need gradients at points of their own: keep one of them")
    evaluations = max(part.needs.evaluations for part in probing)
    if closure is None:
        raise ValueError(
            f"{names} needs {evaluations} gradient evaluations a step: call step(closure) with a closure that clears "
            "the gradients, computes the loss, calls backward and returns the loss; a GradScaler cannot do that, so "
            "train in bfloat16 or float32 without one"
        )
    for _ in range(evaluations - 1):
        active = [i for i, g in enumerate(gradients) if g is not None]
        saved = [plan.parameters[i].tensor.detach().clone() for i in active]
        try:
            displace(engine, plan, engine.schedule(plan, whole, active))
            again(engine, closure)
        finally:
            for i, value in zip(active, saved):
                plan.parameters[i].tensor.detach().copy_(value)
        gradients = engine.gradients(plan)
        whole = engine.gather(plan, gradients)
    return gradients


def displace(engine: Engine, plan: Plan, works: Sequence[Work]) -> None:
    """Move the parameters to where their parts want the next gradient."""
    prepared: list[tuple[Work, Part]] = []
    totals: Totals = {}
    for number, w in enumerate(works):
        part = w.bucket.parts.probing
        if part is not None:
            w.batch = engine.batch(w, tag=f".{number}")
            engine.unpack(w)
            values = part.sums(w.batch, w.slice.state, engine.groups[w.bucket.group])
            engine.add(totals, part, values if engine.counts(w) else {})
            prepared.append((w, part))
    totals = _over_ranks(engine, plan, totals)
    for w, part in prepared:
        x = w.batch
        assert x is not None
        part.probe(x, w.slice.state, engine.groups[w.bucket.group], totals[part])
        if w.bucket.half == "first":
            w.slice.p.copy_(x.u).mul_(x.factor)
        else:
            w.slice.p.add_(x.u, alpha=x.factor)
        if w.unpacked:
            w.slice.pack(w.step)
    if plan.owners is not None:
        moves, news = plan.owners.hand_out(displacing=True)
        for bucket in (bucket for bucket in plan.buckets if bucket.half == "second"):
            rows = [i for i, block, _ in bucket.members() if block.key in news]
            for piece in engine.cut_all(bucket, rows) if rows else ():
                piece.p.add_(piece.gradients(moves))


def _over_ranks(engine: Engine, plan: Plan, totals: Totals) -> Totals:
    """The totals of the probing parts over all ranks."""
    order = [part for part in dict.fromkeys(parts.probing for _, parts in plan.uses) if part is not None]
    mine = {order.index(part): (set[int](), total) for part, total in totals.items()}
    joined = join(engine.ranks, mine)
    return {order[number]: dict(total) for number, (_, total) in joined.items()}


def again(engine: Engine, closure: Callable[[], Any]) -> Any:
    """Evaluate a batch once more: no layer is read, and the buffers of the model end as they were."""
    if engine.observer is not None:
        engine.observer.capture.disarm()
    with unmoved(engine), torch.enable_grad():
        return closure()


@contextmanager
def unmoved(engine: Engine) -> Iterator[None]:
    """Restore the buffers of the model at the end, where the engine knows the model."""
    kept = [(buffer, buffer.detach().clone()) for buffer in engine.buffers()] if engine.buffers is not None else []
    try:
        yield
    finally:
        for buffer, value in kept:
            buffer.copy_(value)
