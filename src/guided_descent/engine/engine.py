"""The engine: binds parameters to buckets and runs their parts in one order. The only code that mutates parameters.

It knows names, groups and tensors, and nothing of what a part computes. One step is: bind, check the gradients, take
extra gradients where a part needs them, run every bucket stage by stage (a stage ends where a part asks for a global
sum), refresh what is due, apply constraints, count.
"""

from __future__ import annotations

import logging
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from guided_descent.engine import rounding
from guided_descent.engine.ballot import Ballot
from guided_descent.engine.binding import Binder, Plan
from guided_descent.engine.buckets import Bucket, Parameter, Slice
from guided_descent.engine.compiled import Compiled
from guided_descent.engine.constraints import constrain
from guided_descent.engine.hessian import Diagonal
from guided_descent.engine.joint import check_joint
from guided_descent.engine.observing import Observer
from guided_descent.engine.policies import PATIENCE, NonFiniteError, all_finite, culprits
from guided_descent.engine.probing import again, probe
from guided_descent.engine.refresh import Refresher
from guided_descent.engine.stages import stages
from guided_descent.engine.state import HALF, real, work_dtype
from guided_descent.linalg.workspace import Workspace
from guided_descent.parallel.boxes import local
from guided_descent.parallel.owners import News, heed
from guided_descent.parallel.ranks import Ranks, join
from guided_descent.parts.base import WRITERS, Batch, Part
from guided_descent.parts.rows import Rows
from guided_descent.routing import Block, canonical_name

log = logging.getLogger("guided_descent")
Totals = dict[Part, dict[str, Tensor]]
#: Events that are logged when they first happen to a parameter.
LOGGED = {
    "fallbacks": "a factorisation failed and fell back to a jitter, to float64 or to the last good result",
    "repairs": "statistics were not finite and have been restarted",
    "incomplete": "another parameter of its block has no gradient; the block is not updated",
    "uncaptured": "no statistics of its layer have been captured; it is not updated",
}


@dataclass(eq=False)
class Scratch:
    """Where the scratch of a slice lies. A batch refers to this and never to its ``Work``.

    The two would keep each other, and the gradients of every step, until Python looks for cycles.

    Attributes:
        tag: Its own in stages, or shared with the slices after it.
        started: Whether it has taken some.
    """

    tag: str = ""
    started: bool = False


@dataclass(eq=False)
class Work:
    """A slice on its way through the stages of one step."""

    slice: Slice
    bucket: Bucket
    step: int
    gradients: Rows
    parts: tuple[Part, ...]
    probed: Rows | None = None  # gradients at another point, where they are kept apart
    batch: Batch | None = None
    position: int = 0
    scratch: Scratch = field(default_factory=Scratch)
    unpacked: bool = False  # whether packed state is in scratch
    news: Sequence[News] = ()  # what the owners of its blocks say, where it is a second half
    unusual: bool = False  # whether they say anything beside their directions

    @property
    def left(self) -> tuple[Part, ...]:
        """Parts still to run."""
        return self.parts[self.position :]

    @property
    def ended(self) -> bool:
        """Whether nothing is left to run."""
        return self.position == len(self.parts) or (self.batch is not None and self.batch.held)


class Engine:
    """Everything an optimizer holds beside ``param_groups`` and ``state``; made once and never replaced.

    Args:
        binder: Makes the plan.
    """

    def __init__(self, binder: Binder) -> None:
        self.binder = binder
        self.groups = binder.groups
        self.state = binder.state
        self.recipes = binder.recipes
        self.work = Workspace()
        self.audit: dict[str, Counter[str]] = {}
        self.skipped_in_row = 0
        self.notes: dict[str, dict[str, Tensor]] = {}
        self.compiled: Compiled | None = None
        self.refresher = Refresher(self)
        self.observer: Observer | None = None
        self.diagonal = Diagonal(self)
        self.process_group: Any = None  # the ranks of a DistributedDataParallel model
        self.objective: Any = None  # what the running step was given
        self.buffers: Callable[[], Iterable[Tensor]] | None = None  # of the model, where it is known

    def __getstate__(self) -> dict[str, Any]:
        """Everything but scratch, graphs and hooks on the model."""
        work = Workspace()
        compiled = self.compiled and Compiled(work, self.compiled.backend)
        return self.__dict__ | {
            "work": work,
            "compiled": compiled,
            "observer": None,
            "notes": {},
            "process_group": None,
            "buffers": None,
        }

    def bind(self) -> Plan:
        """The plan for the tensors that the groups hold now."""
        return self.binder.bind()

    def bind_current(self) -> Plan:
        """The plan of the step that is running."""
        return self.binder.plan or self.bind()

    @property
    def ranks(self) -> Ranks | None:
        """The ranks that take the steps together, where more than one part of a tensor is known."""
        owners = self.bind_current().owners
        return None if owners is None else owners.ranks

    def forget(self) -> None:
        """Bind anew at the next use; state is kept."""
        self.binder.plan = None

    def reload(self) -> None:
        """Take up the run from state that has been loaded."""
        self.skipped_in_row = 0
        self.refresher.forget()
        if self.observer is not None:
            self.observer.arm()
        self.diagonal.arm()

    # -- one step --------------------------------------------------------------------------------------------------

    def step(self, closure: Callable[[], Any] | None) -> Any:
        """One update; the value of the closure, if there is one."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        plan = self.bind()
        if plan.owners is not None:
            plan.owners.check()
        self._check_groups(plan)
        check_joint(plan, self.groups)
        gradients = self.gradients(plan)
        plan = self.bind_current()
        active = [i for i, g in enumerate(gradients) if g is not None]
        judging = self._judging(plan, closure)
        self._check_products(plan, closure)
        self.objective = closure
        steps = self.groups[0]["steps"]
        try:
            if active:
                self.diagonal.complete(gradients, closure)
            self._update(plan, gradients, active, closure)
            if judging and closure is not None and loss is not None and self.groups[0]["steps"] > steps:
                self._judge(judging, closure, self._mean(loss))
            return loss
        finally:
            self.objective = None
            self.notes.clear()
            if self.observer is not None:
                self.observer.arm()
            self.diagonal.arm()

    def _update(
        self,
        plan: Plan,
        gradients: list[Tensor | None],
        active: list[int],
        closure: Callable[[], Any] | None,
    ) -> None:
        if not active or not self._finite(plan, gradients, active, self.diagonal.reduce()):
            return
        if self.observer is None and any(parts.layer_io for _, parts in plan.uses):
            raise RuntimeError(
                "this copy of the optimizer watches no model: call optimizer.watch(model, loss=...) first"
            )
        whole = self.gather(plan, gradients)
        ballot = self._ballot(plan, whole, active)
        refusal = ballot.refusal()
        if refusal is not None:
            self._skip(refusal)
            return
        probed: list[Tensor | None] | None = None
        asked = [parts.probing for _, parts in plan.uses if parts.probing is not None]
        if asked:
            apart = asked[0].needs.apart
            first = [g.clone() if g is not None else None for g in gradients] if apart else gradients
            found = probe(self, plan, gradients, whole, closure)
            if apart:
                gradients, probed = [None if other is None else g for g, other in zip(first, found)], found
            else:
                gradients = found
            active = [i for i, g in enumerate(gradients) if g is not None]
            if not active or not self._finite(plan, found, active, {}):
                return
            probed = None if probed is None else self.gather(plan, probed)
            whole = self.gather(plan, gradients)
        self.skipped_in_row = 0
        ballot.remember()
        if self.observer is not None:
            self.observer.reduce()
        active = self._whole(plan, gradients, active)
        work = self.schedule(plan, whole, active, probed)
        self.refresher.run(work, ahead=True)
        self._run(work, self._stages(plan))
        if plan.owners is not None:
            self._run(self._second(plan))
        self.refresher.run(work)
        constrain(self, plan, gradients)
        self._count(plan, active)

    def _judging(self, plan: Plan, closure: Callable[[], Any] | None) -> list[tuple[int, Part]]:
        """The parts, with their groups, that want to know what this step does to the loss of its batch."""
        judging = {(group, part): None for group, parts in plan.uses for part in parts.judging}
        found = [(i, p) for i, p in judging if p.judges(self.groups[i], self.groups[i]["steps"] + 1)]
        if found and closure is None:
            names = ", ".join(sorted({type(part).__name__ for _, part in found}))
            raise ValueError(
                f"{names} compares the loss of a batch before and after a step: call step(closure) with a closure that "
                "clears the gradients, computes the loss, calls backward and returns the loss"
            )
        return found

    @staticmethod
    def _check_products(plan: Plan, closure: Callable[[], Any] | None) -> None:
        """Before anything changes: a part that multiplies by the curvature has been given what it takes."""
        if hasattr(closure, "products") and getattr(closure, "curved", True):
            return
        names = sorted({type(part).__name__ for _, parts in plan.uses for part in parts if part.multiplies})
        if names:
            raise ValueError(
                f"{', '.join(names)} multiplies by the Gauss-Newton matrix of the batch: call step(Objective(outputs="
                "lambda: model(x), likelihood=Likelihood('cross_entropy', y), closure=closure)) of "
                "guided_descent.solvers, or choose the factored form"
            )

    def _judge(self, judging: Sequence[tuple[int, Part]], closure: Callable[[], Any], before: float) -> None:
        """Evaluate the batch again; the gradients stay those of the step."""
        tensors = [tensor for group in self.groups for tensor in group["params"]]
        kept = [tensor.grad for tensor in tensors]
        for tensor in tensors:
            tensor.grad = None
        after = self._mean(again(self, closure))
        for tensor, grad in zip(tensors, kept):
            tensor.grad = grad
        for group, part in judging:
            part.judge(self.groups[group]["extra"], self.groups[group], before, after)

    def _mean(self, loss: Any) -> float:
        """A loss as a number, with or without a graph: the mean over ranks, which each see a part of the batch."""
        value = float(loss.detach() if isinstance(loss, Tensor) else loss)
        if self.process_group is None:
            return value
        message = torch.tensor(value, dtype=torch.float64, device=self.bind_current().parameters[0].part.device)
        torch.distributed.all_reduce(message, group=self.process_group)
        return float(message) / torch.distributed.get_world_size(self.process_group)

    def gradients(self, plan: Plan) -> list[Tensor | None]:
        """The gradient of each parameter, or its part on this rank, checked; all ranks agree on which there are."""
        gradients = [None if p.tensor.grad is None else self._placed(p) for p in plan.parameters]
        if plan.owners is not None:
            present = [g for g in gradients if g is not None]
            finite = self.groups[0]["nonfinite"] == "ignore" or all_finite(present, self.work)
            gradients = plan.owners.agree(gradients, [p.part for p in plan.parameters], finite)
        for p, g in zip(plan.parameters, gradients):
            if g is None:
                continue
            if g.layout != torch.strided:
                raise TypeError(
                    f"the gradient of {p.name!r} has layout {g.layout}; sparse gradients are not supported: build the "
                    "embedding with sparse=False"
                )
            if p.tensor not in self.state:  # frozen until now
                self.state[p.tensor] = {}
                self.forget()
        return gradients

    @staticmethod
    def _placed(p: Parameter) -> Tensor:
        """The gradient of a parameter as it lies here: placed like the parameter, which a sum over ranks may not be."""
        g: Any = p.tensor.grad
        if p.tensor is not p.part and g.placements != p.tensor.placements:  # type: ignore[attr-defined]
            g = g.redistribute(p.tensor.device_mesh, p.tensor.placements)  # type: ignore[attr-defined]
        return local(g)

    def gather(self, plan: Plan, gradients: list[Tensor | None]) -> list[Tensor | None]:
        """The gradients, with those of whole blocks that this rank owns behind them."""
        if plan.owners is None:
            return gradients
        return plan.owners.collect(gradients, self.groups, self._wide)

    def _wide(self, p: Parameter) -> Tensor:
        """The part of a parameter on this rank in the work dtype and in all the precision that there is."""
        part = real(p.part)
        if part.dtype not in HALF:
            return part
        mode = self.groups[p.group]["rounding"]
        extra = self.state[p.tensor].get(rounding.EXTRA.get(mode, ""))
        wide = torch.empty_like(part, dtype=work_dtype(part.dtype))
        rounding.load(wide, part, None if extra is None else local(extra), mode)
        return wide

    def _second(self, plan: Plan) -> list[Work]:
        """What is left to do where the parameters of whole blocks lie, with the directions of their owners."""
        assert plan.owners is not None
        directions, news = plan.owners.hand_out()
        found = []
        for bucket in (bucket for bucket in plan.buckets if bucket.half == "second"):
            alike: dict[tuple[int, bool, float], list[int]] = {}
            for i, block, owners in bucket.members():
                if block.key in news:
                    told = news[block.key]
                    alike.setdefault((plan.counts[owners[0].home] + 1, told.held, told.rate), []).append(i)
            for (step, _, _), rows in alike.items():
                for piece in bucket.slices if len(rows) == len(bucket.blocks) else self.cut_all(bucket, rows):
                    told_all = [news[block.key] for block in piece.blocks]
                    w = Work(piece, bucket, step, piece.gradients(directions), self._awake(bucket), news=told_all)
                    found.append(w)
        return found

    def _finite(
        self, plan: Plan, gradients: Sequence[Tensor | None], active: Sequence[int], curvature: Mapping[int, Tensor]
    ) -> bool:
        """Whether gradients and curvature, by parameter, may be used; if not, the policy has had its way."""
        policy = self.groups[0]["nonfinite"]
        if policy == "ignore":
            return True
        present = [g for g in gradients if g is not None] + list(curvature.values())
        active = [*active, *curvature]
        if plan.owners is None:
            if all_finite(present, self.work):
                return True
        elif plan.owners.finite and all_finite(list(curvature.values()), self.work):
            return True
        names = list(dict.fromkeys(plan.parameters[active[i]].name for i in culprits(present)))
        if plan.owners is not None:
            names = list(dict.fromkeys(name for theirs in plan.owners.ranks.tell(names) for name in theirs))
        what = "gradient or curvature" if curvature else "gradient"
        shown = ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
        if policy == "raise":
            raise NonFiniteError(
                f"non-finite {what} in {shown} at step {self.groups[0]['steps'] + 1}: nothing was changed; lower the "
                "learning rate, clip, or use nonfinite='skip'"
            )
        self._skip(
            NonFiniteError(
                f"{PATIENCE} steps in a row had non-finite gradients, now in {shown}: training cannot go on; look at "
                "the loss and the data, lower the learning rate, or load the last checkpoint"
            )
        )
        return False

    def _skip(self, error: RuntimeError) -> None:
        """Count a step that is left out; many in a row are an error."""
        self.skipped_in_row += 1
        for group in self.groups:
            group["skipped"] += 1
        if self.skipped_in_row >= PATIENCE:
            raise error

    def _ballot(self, plan: Plan, gradients: Sequence[Tensor | None], active: Sequence[int]) -> Ballot:
        """What the parts that may refuse the step find in its gradients; nothing is changed."""
        ballot = Ballot(self.groups, plan.uses)
        for w in self.schedule(plan, gradients, active) if ballot else ():
            for part in (part for part in w.parts if part.gauges):
                ballot.add(part, part.gauge(self.batch(w), self.groups[w.bucket.group]), self.counts(w))
        if ballot:
            ballot.join(self.ranks)
        return ballot

    def counts(self, w: Work) -> bool:
        """Whether what a slice adds to global sums is added by this rank, and not by one that has a copy."""
        owners = self.bind_current().owners
        return owners is None or owners.counts(w.slice.pieces[0][0], w.bucket.half)

    def _check_groups(self, plan: Plan) -> None:
        """Structure is fixed: a changed static key, or a momentum that was zero, is an error and not ignored."""
        for number, parts in plan.uses:
            for part in parts.checking:
                part.check(self.groups[number])
        for index, group in enumerate(self.groups):
            for source, name, item in self.binder.declared(index):
                meta = item.metadata
                built = getattr(source, item.name)
                now = group[name]
                if meta["kind"] == "static" and now != built:
                    raise ValueError(
                        f"{name} of {source.label} was {built!r} when the optimizer was built and is now {now!r}: it "
                        "chooses structure; build a new optimizer"
                    )
                if meta["kind"] == "hyper" and meta["structural"] and bool(now) != bool(built):
                    raise ValueError(
                        f"{name} of {source.label} went from {built!r} to {now!r}: a part comes or goes with zero; "
                        "build a new optimizer"
                    )

    def _whole(self, plan: Plan, gradients: Sequence[Tensor | None], active: list[int]) -> list[int]:
        """The active parameters but for those whose block also holds one without a gradient: it waits, counted."""
        if len(active) == len(plan.parameters):
            return active
        waiting: set[int] = set()
        for entry in plan.entries.values():
            if entry.parts.layer_io:
                have = [p.index for p in entry.owners if gradients[p.index] is not None]
                if 0 < len(have) < len(entry.owners):
                    self.count(entry.block, "incomplete")
                    waiting.update(have)
        return [i for i in active if i not in waiting]

    def schedule(
        self,
        plan: Plan,
        gradients: Sequence[Tensor | None],
        active: Sequence[int],
        probed: Sequence[Tensor | None] | None = None,
    ) -> list[Work]:
        """The slices to run first: whole buckets where every row is active and at one step, else rows by step."""
        together = len(active) == len(plan.parameters) and len(set(plan.counts)) == 1
        found = []
        for bucket in (bucket for bucket in plan.buckets if bucket.half != "second"):
            parts = self._awake(bucket)
            by_step: dict[int, Sequence[int]] = {plan.counts[0] + 1: range(len(bucket.blocks))}
            if not together:
                by_step = self._by_step(plan, bucket, gradients)
            for step, rows in by_step.items():
                slices = bucket.slices
                if len(rows) != len(bucket.blocks):
                    slices = self.cut_all(bucket, rows)
                for piece in slices:
                    other = None if probed is None else piece.gradients(probed)
                    found.append(Work(piece, bucket, step, piece.gradients(gradients), parts, other))
        return found

    @staticmethod
    def _by_step(plan: Plan, bucket: Bucket, gradients: Sequence[Tensor | None]) -> dict[int, Sequence[int]]:
        """The blocks that have gradients, by the number of the update that they now get."""
        found: dict[int, list[int]] = {}
        for i, _, owners in bucket.members():
            if all(gradients[p.index] is not None for p in owners):
                found.setdefault(plan.counts[owners[0].home] + 1, []).append(i)
        return dict(found)

    def cut(self, bucket: Bucket, rows: Sequence[int]) -> Slice:
        """One slice of some blocks of a stacked bucket."""
        if len(rows) == len(bucket.slices[0].chosen) and list(rows) == bucket.slices[0].chosen:
            return bucket.slices[0]
        [found] = self.cut_all(bucket, rows)
        return found

    def cut_all(self, bucket: Bucket, rows: Sequence[int]) -> list[Slice]:
        """Slices of some blocks of a bucket, remembered, since the same ones come back."""
        cuts = self.bind_current().cuts
        key = (bucket, tuple(rows))
        if key not in cuts:
            if len(cuts) >= 256:
                cuts.clear()
            cuts[key] = bucket.cut(rows)
        return cuts[key]

    def _awake(self, bucket: Bucket) -> tuple[Part, ...]:
        h = self.groups[bucket.group]
        return tuple(part for part in bucket.parts if not part.idle(h))

    def _run(self, works: Sequence[Work], stages: Sequence[tuple[Part, ...]] = ()) -> None:
        """Run all slices. Those with global sums go in stages, so that a total is complete before any part sees it."""
        waiting = [w for w in works if any(part in stage for stage in stages for part in w.parts)]
        for number, w in enumerate(waiting):
            w.batch = self._begin(w, tag=f".{number}")
        totals: Totals = {}
        for stage in (*stages, ()):
            for w in waiting:
                if not w.scratch.started and not any(part.has_sums and part not in totals for part in w.left):
                    w.scratch.tag = ""  # it runs to its end at once: scratch need not be its own
                self._advance(w, totals)
                if w.ended:  # at once: the working copies of half-precision parameters share their scratch
                    self._finish(w)
            waiting = [w for w in waiting if not w.ended]
            totals |= self._sums(stage, waiting)
        for w in works:
            if w.batch is None:
                self._run_one(w)

    def _stages(self, plan: Plan) -> list[tuple[Part, ...]]:
        """The parts with global sums that are awake, in the order of their totals."""
        awake = (
            [p for p in parts if p.has_sums and p.needs.evaluations == 1 and not p.idle(self.groups[group])]
            for group, parts in plan.uses
        )
        return stages([parts for parts in awake if parts])

    def _run_one(self, w: Work) -> None:
        h = self.groups[w.bucket.group]
        if w.bucket.kernel is not None and self.compiled is None and w.slice.aligned(w.gradients):
            step = torch.tensor(float(w.step), device=w.bucket.device)
            w.bucket.kernel.run(w.slice.p, w.gradients, w.slice.state, h, step, w.bucket.scales)
            return
        w.batch = self._begin(w)
        eager = w.unusual or w.batch.seen is not None or w.batch.curvature is not None
        if self.compiled is not None and w.step > 2 and not eager:
            self.unpack(w)
            rows = self._open(w, w.batch)
            w.batch.ticks = self.compiled.run(w.slice, w.parts, w.batch, rows, h, w.step)
        else:
            self._advance(w, {})
        self._finish(w)

    def _sums(self, stage: Sequence[Part], waiting: Sequence[Work]) -> Totals:
        """The totals of one stage, over all slices and ranks."""
        mine: dict[int, tuple[set[int], Mapping[str, Tensor]]] = {}
        at = {part: [w for w in waiting if w.parts[w.position] == part] for part in stage}
        for number, part in enumerate(stage):
            sums: Totals = {part: {}}
            for w in at[part]:
                assert w.batch is not None
                if any(slot.layout == "param" for slot in part.slots(w.slice.blocks[0]).values()):
                    self.unpack(w)
                values = part.sums(w.batch, w.slice.state, self.groups[w.bucket.group])
                self.add(sums, part, values if self.counts(w) else {})
            if at[part]:
                mine[number] = ({w.bucket.group for w in at[part]}, sums[part])
        found: Totals = {}
        for number, (groups, total) in sorted(join(self.ranks, mine).items()) if stage else ():
            part = stage[number]
            found[part] = dict(total)
            if part.multiplies:
                found[part]["products"] = self._products(part, at[part])
            ordered = sorted(groups, reverse=True)
            for group in {self.groups[i]["recipe"] if part.joint else i: self.groups[i] for i in ordered}.values():
                part.combine(found[part], group["extra"], group)
        return found

    def _products(self, part: Part, works: Sequence[Work]) -> Tensor:
        """``v_i^T G v_j`` of a part's directions, G the Gauss-Newton matrix of the batch, the mean over ranks."""
        parameters = self.bind_current().parameters
        vectors: list[list[Tensor]] = []
        for w in works:
            assert w.batch is not None
            for k, rows in enumerate(part.directions(w.batch, w.slice.state, self.groups[w.bucket.group])):
                if k == len(vectors):
                    vectors.append([torch.zeros_like(p.tensor, dtype=work_dtype(p.tensor.dtype)) for p in parameters])
                for view, row in zip(w.slice.gradients(vectors[k]).list, rows.list):
                    view.copy_(row)
        if self.observer is not None:
            self.observer.capture.disarm()
        products: Tensor = self.objective.products([p.tensor for p in parameters], vectors)
        if self.process_group is not None:
            torch.distributed.all_reduce(products, group=self.process_group)
            products /= torch.distributed.get_world_size(self.process_group)
        return products

    @staticmethod
    def add(totals: Totals, part: Part, values: Mapping[str, Tensor]) -> None:
        """Add a part's sums to the totals."""
        into = totals.setdefault(part, {})
        for name, value in values.items():
            into[name] = into[name] + value if name in into else value.clone()

    def _begin(self, w: Work, tag: str = "") -> Batch:
        batch = self.batch(w, tag)
        if w.step == 1:
            for name, slot in w.bucket.slots.items():
                if slot.copies:
                    w.slice.state[name].copy_(w.slice.p)
        if w.slice.leads:
            for part in w.parts:
                part.begin(w.slice.state, self.groups[w.bucket.group], w.step)
        if w.news:
            w.unusual = heed(batch, w.news)
        return batch

    def batch(self, w: Work, tag: str = "") -> Batch:
        """The view of a slice that its parts work on."""
        piece, group, work = w.slice, self.groups[w.bucket.group], self.work
        piece.gather()
        place = w.scratch = Scratch(tag)

        ascends = group["maximize"] and w.bucket.half != "second"  # where a direction comes, it has been turned

        def gradient(g: Rows, name: str) -> Rows:
            if not ascends and all(row.dtype == piece.work for row in g.list):
                return g
            converted = piece.scratch(f"{name}{tag}", work).copy_(g)
            return converted.neg_() if ascends else converted

        def scratch(name: str) -> Rows:
            place.started = True
            return piece.scratch(f"{name}{place.tag}", work)

        bucket = w.bucket

        def read() -> Rows:  # without w, which holds the batch and would be held by it
            if bucket.blind:
                names = ", ".join(type(part).__name__ for part in bucket.parts)
                raise TypeError(f"one of {names} reads x.p and does not say so: define its reads_parameter")
            return self._load(piece, f"parameter{place.tag}") if piece.half else piece.p

        x = Batch(
            g=gradient(w.gradients, "gradient"),
            p=read,
            blocks=piece.blocks,
            scratch=scratch,
            step=float(w.step),
            first=w.step == 1,
            work=work,
            seed=group["seed"],
            seen=self.observer.seen_by(piece.blocks) if self.observer is not None and bucket.parts.layer_io else None,
            probed=None if w.probed is None else gradient(w.probed, "probed"),
        )
        self.diagonal.show(x, w)
        return x

    def _advance(self, w: Work, totals: Totals) -> None:
        """Run parts up to the next one that still lacks its total."""
        x, h = w.batch, self.groups[w.bucket.group]
        assert x is not None
        while w.position < len(w.parts) and not x.held:
            part = w.parts[w.position]
            if part.has_sums and part.needs.evaluations == 1 and part not in totals:
                if x.w is not None:
                    raise ValueError(
                        f"{part!r} asks for global sums in {part.where!r}: use a slot before 'decay_before'"
                    )
                return
            if part.where in WRITERS and x.w is None:
                self._open(w, x)
            self.unpack(w)
            part.update(x, w.slice.state, h, totals.get(part, {}))
            w.position += 1

    def _finish(self, w: Work) -> None:
        x = w.batch
        assert x is not None
        if x.w is not None and w.slice.half:
            self._close(w, x.w)
        if w.unpacked:
            w.slice.pack(w.step)
        w.slice.scatter()
        owners = self.bind_current().owners
        if owners is not None and w.bucket.half == "first":
            owners.tell(w.slice.blocks, x)
        self.collect(w.slice, x)

    def unpack(self, w: Work) -> None:
        """Bring packed state into scratch, once in a step."""
        if w.slice.codes and not w.unpacked:
            w.slice.unpack(w.scratch.tag, self.work)
            w.scratch.started = w.unpacked = True

    def _open(self, w: Work, x: Batch) -> Rows:
        """The parameters to write: themselves, or a float32 working copy of half-precision ones."""
        x.w = self.working_copy(w) if w.slice.half else w.slice.p
        if w.bucket.parts.before:
            x.before = w.slice.scratch("before", self.work).copy_(x.w)
        return x.w

    def working_copy(self, w: Work) -> Rows:
        """The parameters in the work dtype and in all the precision that there is, in scratch."""
        return self._load(w.slice, "written")

    def _load(self, piece: Slice, tag: str) -> Rows:
        """Parameters in the work dtype, with what the rounding of half-precision ones keeps."""
        copy = piece.scratch(tag, self.work)
        if not piece.half:
            return copy.copy_(piece.p)
        mode = self.groups[piece.bucket.group]["rounding"]
        for row, p, extra in zip(copy.list, piece.p.list, self._extras(piece, mode)):
            rounding.load(row, p, extra, mode)
        return copy

    def _close(self, w: Work, rows: Rows) -> None:
        mode = self.groups[w.bucket.group]["rounding"]
        salt = f"round{w.slice.span}{w.bucket.place}"
        generator = w.batch.generator(salt) if mode == "stochastic" and w.batch else None
        for p, row, extra in zip(w.slice.p.list, rows.list, self._extras(w.slice, mode)):
            rounding.store(p, row, extra, mode, generator)
        if mode == "nearest":
            _warn_half_once(w.bucket.dtype)

    @staticmethod
    def _extras(piece: Slice, mode: str) -> Sequence[Tensor | None]:
        name = rounding.EXTRA.get(mode)
        return piece.state[name].list if name else [None] * len(piece.p)

    def view(self, w: Work, piece: Slice) -> Batch:
        """Some rows of a slice for slow work."""
        chosen = set(piece.chosen)
        rows = [g for (_, _, row), g in zip(w.slice.pieces, w.gradients.list) if w.slice.chosen[row] in chosen]
        return self.batch(Work(piece, w.bucket, w.step, Rows(rows, loop=w.bucket.loop), w.parts))

    def look(self, bucket: Bucket, piece: Slice) -> tuple[Work, Batch]:
        """A slice outside a step, for what reads no gradient and minds no step."""
        w = Work(piece, bucket, 1, piece.p, tuple(bucket.parts))
        w.batch = self.batch(w)
        return w, w.batch

    def collect(self, piece: Slice, x: Batch) -> None:
        """Count the events of a batch."""
        for counter, each in x.ticks.items():
            times = each.tolist() if isinstance(each, Tensor) else each
            for row, block in enumerate(piece.blocks):
                self.count(block, counter, times if isinstance(times, int) else int(times[row]))
        x.ticks = {}

    def count(self, block: Block, counter: str, times: int = 1) -> None:
        """Count an event for the parameters of a block; the first fallback or repair of each is logged."""
        for name in dict.fromkeys(block.names if times else ()):
            counts = self.audit.setdefault(name, Counter())
            if counter in LOGGED and not counts[counter]:
                log.warning("%s at step %d: %s", name, self.groups[0]["steps"] + 1, LOGGED[counter])
            counts[counter] += times

    # -- notes, counters --------------------------------------------------------------------

    def note(self, kind: str, values: Mapping[str, Tensor]) -> None:
        """Keep the largest value noted since the last step, elementwise, by the module's name without wrappers."""
        kept = self.notes.setdefault(kind, {})
        for name, value in ((canonical_name(given), value) for given, value in values.items()):
            kept[name] = (
                torch.maximum(kept[name], value.to(kept[name].device)) if name in kept else value.detach().clone()
            )

    def _count(self, plan: Plan, active: Sequence[int]) -> None:
        if len(active) == len(plan.counts):
            plan.steps.add_(1)
            plan.counts = [count + 1 for count in plan.counts]
        else:
            plan.steps[torch.tensor(active)] += 1
            for i in active:
                plan.counts[i] += 1
        for group in self.groups:
            group["steps"] += 1


_warned: set[torch.dtype] = set()


def _warn_half_once(dtype: torch.dtype) -> None:
    if dtype in HALF and dtype not in _warned:
        _warned.add(dtype)
        digits = "2^-9" if dtype == torch.bfloat16 else "2^-12"
        warnings.warn(
            f"parameters are {str(dtype).removeprefix('torch.')} and updates are rounded to nearest: those below about "
            f"{digits} of a weight vanish; pass rounding='stochastic', 'compensated' or 'master'",
            UserWarning,
            stacklevel=6,
        )
