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
from guided_descent.engine.buckets import Bucket, Slice
from guided_descent.engine.compiled import Compiled
from guided_descent.engine.hessian import Diagonal
from guided_descent.engine.joint import check_joint
from guided_descent.engine.observing import Observer
from guided_descent.engine.policies import PATIENCE, NonFiniteError, all_finite, culprits
from guided_descent.engine.probing import again, probe
from guided_descent.engine.refresh import Refresher
from guided_descent.engine.state import HALF, work_dtype
from guided_descent.linalg.workspace import Workspace
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
                self._judge(judging, closure, _number(loss))
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
        if self.observer is None and any(bucket.parts.layer_io for bucket in plan.buckets):
            raise RuntimeError(
                "this copy of the optimizer watches no model: call optimizer.watch(model, loss=...) first"
            )
        ballot = self._ballot(plan, gradients, active)
        refusal = ballot.refusal()
        if refusal is not None:
            self._skip(refusal)
            return
        probed: list[Tensor | None] | None = None
        asked = [bucket.parts.probing for bucket in plan.buckets if bucket.parts.probing is not None]
        if asked:
            apart = asked[0].needs.apart
            first = [g.clone() if g is not None else None for g in gradients] if apart else gradients
            found = probe(self, plan, gradients, closure)
            if apart:
                gradients, probed = [None if other is None else g for g, other in zip(first, found)], found
            else:
                gradients = found
            active = [i for i, g in enumerate(gradients) if g is not None]
            if not active or not self._finite(plan, found, active, {}):
                return
        self.skipped_in_row = 0
        ballot.remember()
        if self.observer is not None:
            self.observer.reduce()
        active = self._whole(plan, gradients, active)
        work = self.schedule(plan, gradients, active, probed)
        self.refresher.run(work, ahead=True)
        self._run(work)
        self.refresher.run(work)
        self._constrain(plan, gradients)
        self._count(plan, active)

    def _judging(self, plan: Plan, closure: Callable[[], Any] | None) -> list[tuple[int, Part]]:
        """The parts, with their groups, that want to know what this step does to the loss of its batch."""
        judging = {(b.group, part): None for b in plan.buckets for part in b.parts.judging}
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
        names = sorted({type(part).__name__ for b in plan.buckets for part in b.parts if part.multiplies})
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
        after = _number(again(self, closure))
        for tensor, grad in zip(tensors, kept):
            tensor.grad = grad
        for group, part in judging:
            part.judge(self.groups[group]["extra"], self.groups[group], before, after)

    def gradients(self, plan: Plan) -> list[Tensor | None]:
        """The gradient of each parameter, checked."""
        gradients = [p.tensor.grad for p in plan.parameters]
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

    def _finite(
        self, plan: Plan, gradients: Sequence[Tensor | None], active: Sequence[int], curvature: Mapping[int, Tensor]
    ) -> bool:
        """Whether gradients and curvature, by parameter, may be used; if not, the policy has had its way."""
        policy = self.groups[0]["nonfinite"]
        if policy == "ignore":
            return True
        present = [g for g in gradients if g is not None] + list(curvature.values())
        active = [*active, *curvature]
        if all_finite(present, self.work):
            return True
        names = list(dict.fromkeys(plan.parameters[active[i]].name for i in culprits(present)))
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
        ballot = Ballot(self.groups, plan.buckets)
        for w in self.schedule(plan, gradients, active) if ballot else ():
            for part in (part for part in w.parts if part.gauges):
                ballot.add(part, part.gauge(self.batch(w), self.groups[w.bucket.group]))
        return ballot

    def _check_groups(self, plan: Plan) -> None:
        """Structure is fixed: a changed static key, or a momentum that was zero, is an error and not ignored."""
        for bucket in plan.buckets:
            for part in bucket.parts.checking:
                part.check(self.groups[bucket.group])
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
        for bucket in plan.buckets:
            for _, block, owners in bucket.members() if bucket.parts.layer_io else ():
                have = [p.index for p in owners if gradients[p.index] is not None]
                if 0 < len(have) < len(owners):
                    self.count(block, "incomplete")
                    waiting.update(have)
        return [i for i in active if i not in waiting]

    def schedule(
        self,
        plan: Plan,
        gradients: Sequence[Tensor | None],
        active: Sequence[int],
        probed: Sequence[Tensor | None] | None = None,
    ) -> list[Work]:
        """The slices to run: whole buckets where every row is active and at one step, else rows by step."""
        together = len(active) == len(plan.parameters) and len(set(plan.counts)) == 1
        found = []
        for bucket in plan.buckets:
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
                found.setdefault(plan.counts[owners[0].index] + 1, []).append(i)
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

    def _run(self, works: list[Work]) -> None:
        """Run all slices. Those with global sums go in stages, so that a total is complete before any part sees it."""
        staged = [w for w in works if any(part.has_sums and part.needs.evaluations == 1 for part in w.parts)]
        for number, w in enumerate(staged):
            w.batch = self._begin(w, tag=f".{number}")
        totals: Totals = {}
        waiting = staged
        while waiting:
            for w in waiting:
                if not w.scratch.started and not any(part.has_sums and part not in totals for part in w.left):
                    w.scratch.tag = ""  # it runs to its end at once: scratch need not be its own
                self._advance(w, totals)
                if w.ended:  # at once: the working copies of half-precision parameters share their scratch
                    self._finish(w)
            waiting = [w for w in waiting if not w.ended]
            totals |= self._sums(waiting)
        for w in works:
            if w.batch is None:
                self._run_one(w)

    def _run_one(self, w: Work) -> None:
        h = self.groups[w.bucket.group]
        if w.bucket.kernel is not None and self.compiled is None and w.slice.aligned(w.gradients):
            step = torch.tensor(float(w.step), device=w.bucket.device)
            w.bucket.kernel.run(w.slice.p, w.gradients, w.slice.state, h, step, w.bucket.scales)
            return
        w.batch = self._begin(w)
        fresh = w.batch.seen is not None or w.batch.curvature is not None
        if self.compiled is not None and w.step > 2 and not fresh:
            self.unpack(w)
            rows = self._open(w, w.batch)
            w.batch.ticks = self.compiled.run(w.slice, w.parts, w.batch, rows, h, w.step)
        else:
            self._advance(w, {})
        self._finish(w)

    def _sums(self, waiting: Sequence[Work]) -> Totals:
        """Global sums of the parts that every slice with them has reached."""
        reached = {w.parts[w.position] for w in waiting}
        ready = {part for part in reached if all(w.parts[w.position] == part for w in waiting if part in w.left)}
        if waiting and not ready:
            raise ValueError(f"global sums in an order that differs between groups: {', '.join(map(repr, reached))}")
        found: Totals = {}
        for w in waiting:
            part = w.parts[w.position]
            if part in ready and w.batch is not None:
                if any(slot.layout == "param" for slot in part.slots(w.slice.blocks[0]).values()):
                    self.unpack(w)
                self.add(found, part, part.sums(w.batch, w.slice.state, self.groups[w.bucket.group]))
        for part in ready:
            if part.multiplies:
                found[part]["products"] = self._products(part, [w for w in waiting if w.parts[w.position] == part])
        for part, total in found.items():
            groups = sorted({w.bucket.group for w in waiting if w.parts[w.position] == part}, reverse=True)
            for group in {self.groups[i]["recipe"] if part.joint else i: self.groups[i] for i in groups}.values():
                part.combine(total, group["extra"], group)
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
        return batch

    def batch(self, w: Work, tag: str = "") -> Batch:
        """The view of a slice that its parts work on."""
        piece, group, work = w.slice, self.groups[w.bucket.group], self.work
        piece.gather()
        place = w.scratch = Scratch(tag)

        def gradient(g: Rows, name: str) -> Rows:
            if not group["maximize"] and all(row.dtype == piece.work for row in g.list):
                return g
            converted = piece.scratch(f"{name}{tag}", work).copy_(g)
            return converted.neg_() if group["maximize"] else converted

        def scratch(name: str) -> Rows:
            place.started = True
            return piece.scratch(f"{name}{place.tag}", work)

        def read() -> Rows:
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
            seen=self.observer.seen_by(piece.blocks) if self.observer is not None else None,
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
        generator = w.batch.generator(f"round{w.slice.span}") if mode == "stochastic" and w.batch else None
        for p, row, extra in zip(w.slice.p.list, rows.list, self._extras(w.slice, mode)):
            rounding.store(p, row, extra, mode, generator)
        if mode == "nearest":
            _warn_half_once(w.bucket.dtype)

    @staticmethod
    def _extras(piece: Slice, mode: str) -> Sequence[Tensor | None]:
        name = {"compensated": "comp", "master": "master"}.get(mode)
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

    # -- constraints, counters --------------------------------------------------------------------

    def _constrain(self, plan: Plan, gradients: Sequence[Tensor | None]) -> None:
        coupled = [i for i, recipe in enumerate(self.recipes) if recipe.couples]
        if coupled and self.process_group is not None:
            self._join_notes()
        named = {p.name: p for p in plan.parameters} if coupled else {}
        for index in coupled:
            recipe = self.recipes[index]
            blocks = [block for p in plan.parameters if p.group == index for block in p.blocks]
            for constraint in recipe.constraints(blocks):
                missing = [name for name in constraint.names if name not in named]
                if missing:
                    raise ValueError(f"a constraint of {recipe.label} names {missing[0]!r}, which is no parameter here")
                members = [named[name] for name in constraint.names]
                if all(gradients[p.index] is not None for p in members):
                    more = [named.get(name) for name in constraint.optional]
                    tensors = [p and p.tensor.detach() for p in (*members, *more)]
                    notes = self.notes.get(constraint.note, {})
                    constraint.apply(tensors, self.groups[members[0].group], notes)

    def _join_notes(self) -> None:
        """The largest notes of all ranks."""
        dist = torch.distributed
        theirs: list[Any] = [None] * dist.get_world_size(self.process_group)
        mine = {kind: {name: value.cpu() for name, value in notes.items()} for kind, notes in self.notes.items()}
        dist.all_gather_object(theirs, mine, group=self.process_group)
        for notes in theirs:
            for kind, values in notes.items():
                self.note(kind, values)

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


def _number(loss: Any) -> float:
    """A loss as a number, whether or not it has a graph."""
    return float(loss.detach() if isinstance(loss, Tensor) else loss)
