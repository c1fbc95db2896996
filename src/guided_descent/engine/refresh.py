"""When slow work is redone, and how: staggered by cost, skipped where nothing drifted, or on a background thread.

When a task is due is a pure function of names, shapes and step, and work that was started after update t lands after
update t + lag exactly, so that a resumed run refreshes as the uninterrupted one does. What waits to land is finished
before a state dict is made and is held in it. Work that reads the gradient starts, and lands, before the update.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from guided_descent.engine.buckets import Bucket, Slice
from guided_descent.parts.base import Found, Hyper, Part, Parts, Policy, Slot
from guided_descent.routing.roles import Block

if TYPE_CHECKING:
    from guided_descent.engine.engine import Engine, Work

#: Sides up to which inputs of one shape are solved as one batch on a CPU, where batching saves calls and no arithmetic.
SMALL = 64


def phases(costs: Mapping[str, float], period: int, crowded: int = 0) -> dict[str, int]:
    """Spread tasks over a period so that the dearest step is as cheap as can be: longest first, least loaded step.

    Args:
        costs: FLOPs of each task, by its name.
        period: Steps between two refreshes of a task.
        crowded: Every so many steps there is other work; of equally loaded steps the others come first.

    Returns:
        The phase of each task in ``range(period)``.

    Example:
        >>> phases({"a": 8.0, "b": 3.0, "c": 4.0}, 2)
        {'a': 0, 'c': 1, 'b': 1}
    """
    load = [0.0] * max(period, 1)
    apart = crowded if crowded > 1 and period % crowded == 0 else 0  # else no phase is crowded more than another
    order = sorted(range(len(load)), key=lambda phase: bool(apart) and phase % apart == 0)
    found = {}
    for key in sorted(costs, key=lambda key: (-costs[key], key)):
        phase = min(order, key=load.__getitem__)
        load[phase] += costs[key]
        found[key] = phase
    return found


def due(step: int, phase: int, period: int) -> bool:
    """Whether a task is due after update number ``step`` of its block (from 1; the first one never is)."""
    return step > 1 and (step - 1 + phase) % period == 0


def name_of(block: Block, task: str) -> str:
    """The name of a task of a block."""
    return f"{block.key}:{task}"


def waiting_slots(parts: Parts, block: Block, h: Hyper) -> dict[str, Slot]:
    """State for work that has been started and has not landed: when it lands (0: nothing waits), and the results."""
    slots = {}
    for part in parts:
        if part.policy(h).lag:
            for task, spec in part.tasks(block).items():
                slots[f"waiting.{task}"] = Slot("factor", (), torch.int64)
                slots |= {f"next.{task}.{name}": slot for name, slot in spec.results.items()}
    return slots


@dataclass(eq=False)
class Job:
    """Rows of a bucket whose task is due."""

    work: Work
    part: Part
    task: str
    rows: list[int]
    policy: Policy


@dataclass(eq=False)
class Waiting:
    """A started task of one block: it lands after update ``landing``; without a future its results are in the state."""

    landing: int
    future: Future[Found] | None = None
    row: int = 0


class Refresher:
    """Runs the slow work of an engine.

    Args:
        engine: The engine.
    """

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self.waiting: dict[str, Waiting] = {}
        self._pool: ThreadPoolExecutor | None = None
        self._read = False  # whether ``waiting`` tells what the state holds

    def __getstate__(self) -> dict[str, Any]:
        """A copy knows what waits from its state; see ``settle``."""
        return {"engine": self.engine, "waiting": {}, "_pool": None, "_read": False}

    def forget(self) -> None:
        """Read again from the state what waits, which has been loaded."""
        self.waiting.clear()
        self._read = False

    def run(self, works: Iterable[Work], ahead: bool = False) -> None:
        """Land what has its time, and redo or start what is due: after the updates of a step.

        With ``ahead``, before them, for the parts whose work reads the gradient. One job is then done at a time, so
        that the gradients of one slice are copied and not those of the model.
        """
        self._restore()
        jobs: list[Job] = []
        for work in works:
            if work.step == 1:
                continue
            for part in work.parts:
                if part.reads_gradient is not ahead:
                    continue
                policy = part.policy(self.engine.groups[work.bucket.group])
                if policy.period:
                    jobs += self._plan(work, part, policy)
        for together in [[job] for job in jobs] if ahead else [jobs]:
            for batch in self._batches(together):
                self._solve(batch)

    def settle(self) -> None:
        """Finish what runs in the background and put its results into the state."""
        self._restore()
        if any(entry.future is not None for entry in self.waiting.values()):
            for bucket, i, name, task in self._places():
                self._keep(bucket, i, task, self.waiting[name])

    # -- what is due -----------------------------------------------------------------------------------------------

    def _plan(self, work: Work, part: Part, policy: Policy) -> list[Job]:
        phase = self._phases(policy) if policy.staggered else {}
        blocks, jobs = work.slice.blocks, []
        for task in part.tasks(blocks[0]):
            names = [name_of(block, task) for block in blocks]
            if policy.lag:
                self._land(work, part, task, [i for i, name in enumerate(names) if self._lands(name, work.step)])
            rows = [i for i, name in enumerate(names) if due(work.step, phase.get(name, 0), policy.period)]
            jobs += [Job(work, part, task, run, policy) for run in _runs([work.slice.chosen[i] for i in rows])]
        return jobs

    def _lands(self, name: str, step: int) -> bool:
        return name in self.waiting and self.waiting[name].landing <= step

    def _phases(self, policy: Policy) -> dict[str, int]:
        plan = self.engine.bind_current()
        kind = (policy.period, policy.crowded)
        if kind not in plan.phases:
            costs: dict[str, float] = {}
            for entry in plan.entries.values():
                for part in entry.parts:
                    other = part.policy(self.engine.groups[entry.group])
                    if (other.period, other.crowded) == kind:
                        block = entry.block
                        costs |= {name_of(block, task): spec.flops for task, spec in part.tasks(block).items()}
            plan.phases[kind] = phases(costs, *kind)
        return plan.phases[kind]

    # -- doing it --------------------------------------------------------------------------------------------------

    def _batches(self, jobs: Sequence[Job]) -> list[list[tuple[Job, Slice, tuple[Tensor, ...]]]]:
        """Jobs with their inputs, those together whose inputs have one shape: they are solved as one batch."""
        found: dict[Any, list[tuple[Job, Slice, tuple[Tensor, ...]]]] = {}
        for number, job in enumerate(jobs):
            h = self.engine.groups[job.work.bucket.group]
            piece = self.engine.cut(job.work.bucket, job.rows)
            state = piece.state
            if job.part.reads_gradient:
                state = state | {"gradient": self.engine.view(job.work, piece).own().whole}
            inputs = job.part.inputs(job.task, state, h)
            if job.policy.tolerance:
                rows = self._drifted(job, piece, job.part.drift(inputs, h))
                if not rows:
                    continue
                if len(rows) < len(job.rows):
                    at = [job.rows.index(row) for row in rows]
                    inputs = tuple(value[at] for value in inputs)
                    job.rows, piece = rows, self.engine.cut(job.work.bucket, rows)
            shapes = tuple(tuple(value.shape[1:]) for value in inputs)
            largest = max((side for shape in shapes for side in shape), default=0)
            alone = inputs[0].device.type == "cpu" and largest > SMALL
            key = number if alone else (job.part, job.work.bucket.group, shapes, inputs[0].dtype, inputs[0].device)
            found.setdefault(key, []).append((job, piece, inputs))
        return list(found.values())

    def _drifted(self, job: Job, piece: Slice, drift: Tensor) -> list[int]:
        moved = (~(drift <= job.policy.tolerance)).tolist()  # not a number counts as drifted
        for block, yes in zip(piece.blocks, moved):
            if not yes:
                self.engine.count(block, "skipped_refreshes")
        return [row for row, yes in zip(job.rows, moved) if yes]

    def _solve(self, batch: Sequence[tuple[Job, Slice, tuple[Tensor, ...]]]) -> None:
        job, _, inputs = batch[0]
        h = self.engine.groups[job.work.bucket.group]
        if len(batch) > 1:
            inputs = tuple(map(torch.cat, zip(*(each for _, _, each in batch))))
        if job.policy.lag:
            future = self._start(job.part, [value.clone() for value in inputs], dict(h))
            row = 0
            for job, piece, _ in batch:
                for block in piece.blocks:
                    landing = job.work.step + job.policy.lag
                    self.waiting[name_of(block, job.task)] = Waiting(landing, future, row)
                    row += 1
            return
        found = job.part.solve(inputs, h)
        row = 0
        for job, piece, _ in batch:
            mine = {name: value[row : row + len(job.rows)] for name, value in found.items()}
            self._take(job.work, piece, job.part, job.task, mine)
            row += len(job.rows)

    def _take(self, work: Work, piece: Slice, part: Part, task: str, found: Found) -> None:
        """Let a part take results into the state of some rows."""
        x = self.engine.view(work, piece)
        part.land(x, piece.state, self.engine.groups[work.bucket.group], task, found)
        piece.scatter()
        self.engine.collect(piece, x)
        fallbacks = (
            (found["fallbacks"] > 0).reshape(len(piece.blocks), -1).sum(1).tolist() if "fallbacks" in found else []
        )
        for i, block in enumerate(piece.blocks):
            self.engine.count(block, "refreshes")
            if fallbacks and fallbacks[i]:
                self.engine.count(block, "fallbacks", fallbacks[i])

    # -- in the background -----------------------------------------------------------------------------------------

    def _start(self, part: Part, inputs: Sequence[Tensor], h: Hyper) -> Future[Found]:
        if self._pool is None:
            self._pool = ThreadPoolExecutor(1, thread_name_prefix="guided-descent-refresh")
        ready = None
        if inputs[0].device.type == "cuda":
            ready = torch.cuda.Event()  # type: ignore[no-untyped-call]
            ready.record()
        return self._pool.submit(_background, part, inputs, h, ready)

    def _land(self, work: Work, part: Part, task: str, rows: Sequence[int]) -> None:
        for run in _runs([work.slice.chosen[i] for i in rows]):
            piece = self.engine.cut(work.bucket, run)
            for i in run:
                self._keep(work.bucket, i, task, self.waiting.pop(name_of(work.bucket.blocks[i], task)))
                work.bucket.stacks[f"waiting.{task}"][i] = 0
            results = part.tasks(piece.blocks[0])[task].results
            found = {name: piece.state[f"next.{task}.{name}"] for name in results}
            self._take(work, piece, part, task, found)

    def _keep(self, bucket: Bucket, i: int, task: str, entry: Waiting) -> None:
        """Wait for the results of one block and write them into its state."""
        if entry.future is None:
            return
        for name, value in entry.future.result().items():
            bucket.stacks[f"next.{task}.{name}"][i] = value[entry.row]
        bucket.stacks[f"waiting.{task}"][i] = entry.landing
        entry.future = None

    def _restore(self) -> None:
        if self._read:
            return
        self._read = True
        for bucket, i, name, task in self._places(all_rows=True):
            landing = int(bucket.stacks[f"waiting.{task}"][i])
            if landing:
                self.waiting[name] = Waiting(landing)

    def _places(self, all_rows: bool = False) -> list[tuple[Bucket, int, str, str]]:
        """Bucket, row, name and task of what waits, or of all that can."""
        found = []
        for bucket in self.engine.bind_current().buckets:
            tasks = [name.removeprefix("waiting.") for name in bucket.stacks if name.startswith("waiting.")]
            for i, block in enumerate(bucket.blocks if tasks else ()):
                for task in tasks:
                    name = name_of(block, task)
                    if all_rows or name in self.waiting:
                        found.append((bucket, i, name, task))
        return found


def _runs(rows: Sequence[int]) -> list[list[int]]:
    """Rows cut into runs of neighbours, which are views of their stacks.

    Example:
        >>> _runs([1, 2, 5])
        [[1, 2], [5]]
    """
    found: list[list[int]] = []
    for row in rows:
        if found and found[-1][-1] == row - 1:
            found[-1].append(row)
        else:
            found.append([row])
    return found


@torch.no_grad()
def _background(part: Part, inputs: Sequence[Tensor], h: Hyper, ready: Any) -> Found:
    if ready is None:
        return part.solve(inputs, h)
    stream = torch.cuda.Stream(inputs[0].device)  # type: ignore[no-untyped-call]
    stream.wait_event(ready)
    with torch.cuda.stream(stream):
        found = part.solve(inputs, h)
    stream.synchronize()
    return found
