"""More than one evaluation of a batch: gradients at displaced parameters, with nothing else of the model moved."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, TypeAlias

import torch
from torch import Tensor

from guided_descent.engine.binding import Plan
from guided_descent.parts.base import Part

if TYPE_CHECKING:
    from guided_descent.engine.engine import Engine, Totals, Work

Gradients: TypeAlias = list[Tensor | None]


def probe(engine: Engine, plan: Plan, gradients: Gradients, closure: Callable[[], Any] | None) -> Gradients:
    """The gradients at the point to which the parts move the parameters, which come back to the bit.

    The layers are not read there, and the buffers of the model, such as running statistics, end as they were.

    Raises:
        ValueError: There is no closure to evaluate again, or the parts disagree on what the gradient is for.
    """
    probing = {bucket.parts.probing: None for bucket in plan.buckets if bucket.parts.probing is not None}
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
            displace(engine, engine.schedule(plan, gradients, active))
            again(engine, closure)
        finally:
            for i, value in zip(active, saved):
                plan.parameters[i].tensor.detach().copy_(value)
        gradients = engine.gradients(plan)
    return gradients


def displace(engine: Engine, works: Sequence[Work]) -> None:
    """Move the parameters to where their parts want the next gradient."""
    prepared: list[tuple[Work, Part]] = []
    totals: Totals = {}
    for number, w in enumerate(works):
        part = w.bucket.parts.probing
        if part is not None:
            w.batch = engine.batch(w, tag=f".{number}")
            engine.unpack(w)
            engine.add(totals, part, part.sums(w.batch, w.slice.state, engine.groups[w.bucket.group]))
            prepared.append((w, part))
    for w, part in prepared:
        x = w.batch
        assert x is not None
        part.probe(x, w.slice.state, engine.groups[w.bucket.group], totals[part])
        w.slice.p.add_(x.u, alpha=x.factor)
        if w.unpacked:
            w.slice.pack(w.step)


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
