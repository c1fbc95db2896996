"""A pool of one-thread worker processes with a live display: many independent runs on a few cores.

Each worker is a fresh process (spawn) with its own pipe, so that a worker that is killed can neither block the others
nor lose their messages. A job that raises stops the pool: no new job starts, the running ones are asked to stop with
SIGTERM (which a training run answers with a checkpoint), and the error is raised here.
"""

from __future__ import annotations

import multiprocessing
import os
import pickle
import signal
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import pairwise
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from typing import TYPE_CHECKING, Any, Protocol

from rich.console import Console

from guided_descent.bench.display import Display
from guided_descent.bench.files import BenchError

if TYPE_CHECKING:
    from guided_descent.bench.store import OptimizerSpec, Run

THREADS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")
GRACE = 30.0  # seconds a worker has to save and stop


class Tick(Protocol):
    """What a job reports with: steps finished, the loss, and now and then a line for the user."""

    def __call__(self, step: int, loss: float | None, line: str = "") -> None:
        """Report; cheap enough for every step."""


@dataclass(frozen=True)
class Job:
    """One call ``function(*args, tick=tick, **kwargs)`` in a worker; the function must be importable by name."""

    title: str
    steps: int
    function: Callable[..., Any]
    args: tuple[Any, ...] = ()
    kwargs: dict[str, Any] = field(default_factory=dict)


class Stopped(BaseException):
    """SIGINT or SIGTERM stopped a job or the pool; what ran was saved. ``signal`` is its number."""

    def __init__(self, number: int) -> None:
        super().__init__(f"stopped by {signal.Signals(number).name}")
        self.signal = number


def run_jobs(jobs: Sequence[Job], workers: int = 2, display: Display | None = None) -> list[Any]:
    """Run all jobs and return their results in order.

    Args:
        jobs: What to run.
        workers: Processes; 0 runs the jobs one after the other in this process, without touching its threads.
        display: Shows progress; None is silent.

    Raises:
        Stopped: SIGINT or SIGTERM arrived; running jobs had ``GRACE`` seconds to save.
        BenchError: A worker died (killed by the system, most often for memory).
        Exception: Whatever a job raised first.
    """
    display = display or Display(Console(quiet=True))
    with display.open(jobs):
        if workers < 1:
            return [_run_here(number, job, display) for number, job in enumerate(jobs)]
        return _Pool(jobs, min(workers, len(jobs)), display).run()


def _run_here(number: int, job: Job, display: Display) -> Any:
    display.started(0, number)

    def tick(step: int, loss: float | None, line: str = "") -> None:
        display.ticked(0, step, loss, line)

    result = job.function(*job.args, tick=tick, **job.kwargs)
    display.finished(0, result)
    return result


@dataclass
class _Worker:
    process: BaseProcess
    pipe: Connection
    number: int
    job: int | None = None


class _Pool:
    def __init__(self, jobs: Sequence[Job], workers: int, display: Display) -> None:
        self.jobs, self.display = jobs, display
        self.waiting = deque(range(len(jobs)))
        self.results: dict[int, Any] = {}
        context = multiprocessing.get_context("spawn")
        self.workers: list[_Worker] = []
        with _one_thread_environment():
            for number in range(workers):
                ours, theirs = context.Pipe()
                process = context.Process(target=_work, args=(theirs, os.getpid()), name=f"worker {number + 1}")
                process.daemon = True
                process.start()
                theirs.close()
                self.workers.append(_Worker(process, ours, number))

    def run(self) -> list[Any]:
        try:
            with _signals_raise():
                for worker in self.workers:
                    self._next(worker)
                while len(self.results) < len(self.jobs):
                    for pipe in wait([worker.pipe for worker in self.workers if worker.job is not None], timeout=0.5):
                        self._receive(next(worker for worker in self.workers if worker.pipe is pipe))
                    self.display.refresh()
            return [self.results[number] for number in range(len(self.jobs))]
        finally:
            self._stop()

    def _next(self, worker: _Worker) -> None:
        worker.job = self.waiting.popleft() if self.waiting else None
        if worker.job is not None:
            worker.pipe.send(self.jobs[worker.job])
            self.display.started(worker.number, worker.job)

    def _receive(self, worker: _Worker) -> None:
        assert worker.job is not None
        try:
            kind, *content = worker.pipe.recv()
        except (EOFError, ConnectionError):
            worker.process.join(GRACE)
            raise BenchError(
                f"the worker that ran {self.jobs[worker.job].title!r} died (exit code {worker.process.exitcode}), most "
                "often because memory ran out; use fewer workers or a smaller task, then run the same command again"
            ) from None
        if kind == "tick":
            self.display.ticked(worker.number, *content)
        elif kind == "done":
            self.results[worker.job] = content[0]
            self.display.finished(worker.number, content[0])
            self._next(worker)
        else:
            raise _joined(content[0])

    def _stop(self) -> None:
        """Idle workers end at once; busy ones are told to save, and killed only when they do not answer."""
        for worker in self.workers:
            if worker.process.is_alive():
                if worker.job is None:
                    _quietly(worker.pipe.send, None)
                else:
                    worker.process.terminate()
        deadline = time.monotonic() + GRACE
        for worker in self.workers:
            while worker.process.is_alive() and time.monotonic() < deadline:
                # A full pipe would block the worker while it saves: read on until it is gone.
                if worker.pipe.poll(0.05):
                    try:
                        worker.pipe.recv()
                    except (EOFError, OSError):
                        worker.process.join(max(0.0, deadline - time.monotonic()))
            if worker.process.is_alive():
                worker.process.kill()
            worker.process.join()
            worker.pipe.close()


def _work(pipe: Connection, parent: int) -> None:
    """The worker's loop: receive a job, run it, send ticks and the result, until the parent says None or is gone."""
    os.setpgrp()  # Ctrl-C reaches the parent alone, which then asks each worker once, with SIGTERM
    import torch

    torch.set_num_threads(1)
    while True:
        try:
            job = pipe.recv()
        except (EOFError, OSError):
            return
        if job is None:
            return
        last = 0.0

        def tick(step: int, loss: float | None, line: str = "") -> None:
            nonlocal last
            if os.getppid() != parent:  # the parent was killed: leave as if asked to
                signal.raise_signal(signal.SIGTERM)
            elif line or (now := time.monotonic()) - last > 0.2:
                last = last if line else now
                _quietly(pipe.send, ("tick", step, loss, line))

        try:
            message = ("done", job.function(*job.args, tick=tick, **job.kwargs))
        except Stopped as stop:
            raise SystemExit(128 + stop.signal) from None
        except Exception as error:
            message = ("fail", _portable(error))
        _quietly(pipe.send, message)


def _portable(error: BaseException) -> list[BaseException]:
    """The error and what caused it, each as itself if it survives pickling, else as text."""
    chain: list[BaseException] = []
    link: BaseException | None = error
    while link is not None:
        try:
            chain.append(pickle.loads(pickle.dumps(link)))
        except Exception:
            chain.append(RuntimeError(f"{type(link).__name__}: {link}"))
        link = link.__cause__ or link.__context__
    return chain


def _joined(chain: Sequence[BaseException]) -> BaseException:
    """The error with its causes, which pickling drops, behind it again."""
    for error, cause in pairwise(chain):
        error.__cause__ = cause
    return chain[0]


def _quietly(send: Callable[[Any], None], message: Any) -> None:
    try:
        send(message)
    except (OSError, ValueError):  # the other side is gone; its own end is handled where it is noticed
        return


@contextmanager
def _one_thread_environment() -> Iterator[None]:
    """Children started inside see one thread per library before they import it."""
    before = {name: os.environ.get(name) for name in THREADS}
    os.environ.update(dict.fromkeys(THREADS, "1"))
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


@contextmanager
def _signals_raise() -> Iterator[None]:
    """SIGINT and SIGTERM raise ``Stopped`` in the main thread."""

    def handler(number: int, frame: Any) -> None:
        raise Stopped(number)

    try:
        before = {number: signal.signal(number, handler) for number in (signal.SIGINT, signal.SIGTERM)}
    except ValueError:  # not the main thread: signals stay whose they are
        before = {}
    try:
        yield
    finally:
        for number, old in before.items():
            signal.signal(number, old)


def train_run(problem: str, spec: OptimizerSpec, *, seed: int, steps: int, out: str, tick: Tick, **options: Any) -> Run:
    """The job of ``compare`` and ``tune``: run one training, or find it finished, and read its folder.

    Raises:
        Stopped: A signal interrupted the training; it was saved.
        BenchError: What ``runner.train`` raises.
    """
    from guided_descent.bench.runner import train
    from guided_descent.bench.store import RunStore, read_run

    result = train(
        problem,
        spec,
        seed=seed,
        steps=steps,
        out=out,
        progress=lambda now: tick(now.step, now.loss),
        warn=lambda line: tick(0, None, line),
        **options,
    )
    if result.signal is not None:
        raise Stopped(result.signal)
    return read_run(RunStore(out).path(problem, spec.label, seed))
