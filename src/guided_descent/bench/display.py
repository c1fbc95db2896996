"""Progress of many runs on one console: a total bar with the time left, a line per worker with step and loss."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn

if TYPE_CHECKING:
    from guided_descent.bench.pool import Job


class Display:
    """Progress of a pool on one console: a total bar with the time left, and a line per worker with step and loss.

    On a terminal this is a live display; elsewhere one line is printed per finished job. ``describe`` turns a job's
    result into the text of that line.
    """

    def __init__(self, console: Console, title: str = "runs", describe: Callable[[Any], str] = str) -> None:
        self.console, self.title, self.describe = console, title, describe
        self.jobs: Sequence[Job] = ()
        self.current: dict[int, int] = {}
        self.steps: dict[int, int] = {}
        self.done = 0
        self.finished_steps = 0
        self.trained = 0  # steps seen being trained: neither found finished nor resumed
        self.began: float | None = None  # when the first of them was seen; loading and imports are before
        self.announced = False
        self.progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=28),
            MofNCompleteColumn(),
            TextColumn("{task.fields[note]}"),
            console=console,
            transient=True,
            disable=not console.is_terminal,
        )
        self.bars: dict[int, TaskID] = {}
        self.total: TaskID | None = None

    def open(self, jobs: Sequence[Job]) -> Self:
        """Prepare for these jobs; use as a context manager."""
        self.jobs, self.current, self.steps, self.bars = jobs, {}, {}, {}
        self.done, self.finished_steps, self.trained, self.began, self.announced = 0, 0, 0, None, False
        self.total = self.progress.add_task(self.title, total=len(jobs), note="")
        return self

    def __enter__(self) -> Self:
        self.progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.progress.stop()

    def started(self, worker: int, job: int) -> None:
        """A worker began a job."""
        self.current[worker], self.steps[worker] = job, 0
        if worker not in self.bars:
            self.bars[worker] = self.progress.add_task("", total=self.jobs[job].steps, note="")
        self.progress.reset(self.bars[worker], total=self.jobs[job].steps, description=f"  {self.jobs[job].title}")

    def say(self, line: str) -> None:
        """Print a line above the bars."""
        self.console.print(line, markup=False, highlight=False, soft_wrap=True)

    def ticked(self, worker: int, step: int, loss: float | None, line: str = "") -> None:
        """A job finished a step, or has something to say."""
        if line:
            self.say(f"{self.jobs[self.current[worker]].title}: {line}")
        before = self.steps[worker]
        self.steps[worker] = step
        if self.began is None:
            self.began = time.monotonic()
        elif before:  # the first tick of a run may be a resumed one's
            self.trained += max(0, step - before)
        note = "" if loss is None else f"loss {loss:.4g}"
        self.progress.update(self.bars[worker], completed=step, note=note)
        self.refresh()

    def finished(self, worker: int, result: Any) -> None:
        """A job returned."""
        job = self.jobs[self.current[worker]]
        self.done += 1
        self.finished_steps += job.steps
        self.steps[worker] = 0
        if self.total is not None:
            self.progress.update(self.total, completed=self.done)
        left = f", {self.time_left()}" if self.done < len(self.jobs) else ""
        self.say(f"[{self.done}/{len(self.jobs)}] {job.title}: {self.describe(result)}{left}")

    def refresh(self) -> None:
        """Bring the time left up to date; print the first estimate once as a line."""
        if self.total is None or self.done == len(self.jobs):
            return
        self.progress.update(self.total, note=self.time_left())
        if not self.announced and self.trained >= 10 and self.began and time.monotonic() - self.began > 5:
            self.announced = True
            self.say(f"{len(self.jobs)} {self.title} on {max(1, len(self.current))} workers: {self.time_left()}")

    def time_left(self) -> str:
        """The time left in words, from the steps done so far."""
        left = sum(job.steps for job in self.jobs) - self.finished_steps - sum(self.steps.values())
        if left <= 0:
            return "nearly done"
        if not self.trained or self.began is None:
            return "estimating the time left"
        return f"about {duration((time.monotonic() - self.began) * left / self.trained)} left"


def duration(seconds: float) -> str:
    """Seconds as a person says them.

    Example:
        >>> duration(8.2), duration(222), duration(7300)
        ('8 s', '3 min 42 s', '2 h 1 min')
    """
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600} h {whole % 3600 // 60} min"
