"""The training loop of one run: from start or checkpoint to the end, to divergence or to a signal."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from guided_descent.bench import environment
from guided_descent.bench.checkpoint import Checkpoints
from guided_descent.bench.files import BenchError
from guided_descent.bench.problem import Problem, ProblemError, short, tensor_hash, tensors
from guided_descent.bench.signals import Interrupted, SignalFlag
from guided_descent.bench.store import (
    METRICS,
    Metrics,
    MetricsWriter,
    Row,
    RunConfig,
    RunResult,
    Status,
    read_metrics,
)
from guided_descent.engine import NonFiniteError
from guided_descent.solvers.objective import Objective

PROBE_EVERY = 10  # steps between measurements of gradient norm and update size; they are outside the timers
WARM_STEPS = 10  # steps left out of the mean step time
CPU_FLUSH, GPU_FLUSH = 1, 16  # losses that are read at a time: reading one makes the host wait for the GPU
TICK_SECONDS = 0.1
BREAKDOWN = (NonFiniteError, FloatingPointError, torch.linalg.LinAlgError)  # type: ignore[attr-defined]  # ends a run as diverged


@dataclass(frozen=True)
class Tick:
    """Where a run stands; given to ``progress`` at most ten times a second and after the last step.

    Attributes:
        workload: As in the config.
        label: The optimizer's label.
        seed: The seed.
        step: Steps finished.
        steps: Steps planned.
        loss: Last training loss that was read, or None.
        value: Last value of the metric, or None.
        seconds_left: Estimated wall seconds to the end, evaluations included; None before the first step.
    """

    workload: str
    label: str
    seed: int
    step: int
    steps: int
    loss: float | None
    value: float | None
    seconds_left: float | None


@dataclass
class Session:
    """One process's share of a run.

    Attributes:
        folder: The run's folder.
        config: What is run.
        problem: Model, loss and batches.
        optimizer: Over the model's parameters.
        scheduler: Stepped after every optimizer step.
        checkpoints: Where states are saved.
        save_every: Steps between checkpoints; 0: only an interrupted run is saved.
        progress: Called with a ``Tick``.
        warn: Called with one line.
    """

    folder: Path
    config: RunConfig
    problem: Problem
    optimizer: Optimizer
    scheduler: LRScheduler
    checkpoints: Checkpoints
    save_every: int
    progress: Callable[[Tick], None] | None
    warn: Callable[[str], None]

    def __post_init__(self) -> None:
        self.model, self.parameters = self.problem.model, self.problem.trainable()
        self.flush_every = CPU_FLUSH if self.config.device == "cpu" else GPU_FLUSH
        self.step = 0  # steps finished
        self.evaluated = -1  # step of the last evaluation
        self.seconds = 0.0  # wall seconds of all steps
        self.recent: list[float] = []  # training losses since the last evaluation
        self.pending: list[tuple[Row, Tensor]] = []  # rows whose loss is still on the device
        self.diverged = False
        self.loss: float | None = None
        self.value: float | None = None
        self.writer = MetricsWriter(self.folder / METRICS, self._restore())
        self.first_step, self.began, self.ticked = self.step, time.perf_counter(), 0.0

    def run(self, flag: SignalFlag) -> RunResult:
        """Train to the end, or to the first safe point after a signal."""
        self.model.train()
        try:
            while True:
                self._evaluate_if_due(flag)
                if self.diverged or self.step == self.config.steps:
                    return self._finish()
                stop = flag.received
                if stop is not None or (self.save_every and self.step and self.step % self.save_every == 0):
                    self._save()
                if stop is not None:
                    return self._result("interrupted", stop)
                self._one_step()
        except Interrupted:
            return self._result("interrupted", flag.received)
        finally:
            self.writer.close()

    def _one_step(self) -> None:
        """Batch, forward, backward, optimizer, schedule: timed; then the probes: not timed."""
        probe = self.step % PROBE_EVERY == 0
        before = [p.detach().clone() for p in self.parameters] if probe else []
        rate = float(self.optimizer.param_groups[0]["lr"])
        losses: list[Tensor] = []
        norms: list[Tensor] = []
        model = Stopwatch()
        whole = Stopwatch().start()
        batch = self._call("batches", self.problem.batch, self.step)

        def closure() -> Tensor:
            model.start()
            self.optimizer.zero_grad(set_to_none=True)
            loss: Tensor = self._call("the loss", self.problem.loss, self.model, batch)
            self._call("backward", loss.backward)
            if self.config.clip is not None:
                norms.append(nn.utils.clip_grad_norm_(self.parameters, self.config.clip))
            losses.append(loss.detach())
            model.stop()
            return loss

        step = Stopwatch().start()
        objective = self._timed(self.problem.objective(batch, closure), model)
        returned: Any = None
        try:
            returned = self.optimizer.step(objective)  # type: ignore[arg-type]  # torch's closures return a float
        except BREAKDOWN as error:
            self.warn(f"step {self.step + 1}: the optimizer gave up with {short(error)}")
            self.diverged = True
        step.stop()
        self.scheduler.step()
        whole.stop()
        self.step += 1
        self.seconds += whole.wall
        row: Row = {"kind": "train", "step": self.step, "loss": None, "lr": rate, "seconds": self.seconds,
                    "wall": whole.wall, "cpu": whole.cpu, "optimizer_wall": step.wall - model.wall,
                    "optimizer_cpu": step.cpu - model.cpu}  # fmt: skip
        if norms or probe:
            row["grad_norm"] = (
                float(norms[0]) if norms else _norm(p.grad for p in self.parameters if p.grad is not None)
            )
        if probe:
            moved = _norm(p.detach() - old for p, old in zip(self.parameters, before, strict=True))
            row["update_rms"] = moved / math.sqrt(sum(p.numel() for p in self.parameters))
        first = losses[0] if losses else returned  # a solver evaluates the objective itself and returns the loss
        self.pending.append((row, first if isinstance(first, Tensor) else torch.tensor(math.nan)))
        if len(self.pending) >= self.flush_every:
            self._flush()
        self._tick()

    def _timed(self, objective: Objective, watch: Stopwatch) -> Objective:
        """The objective with forward passes on the model's clock and errors that name the step."""

        def wrap(name: str) -> Callable[[], Tensor] | None:
            function = getattr(objective, name)
            if function is None:
                return None

            def timed() -> Tensor:
                watch.start()
                result: Tensor = self._call("the loss" if name == "loss" else name, function)
                watch.stop()
                return result

            return timed

        return replace(
            objective,
            loss=wrap("loss"),
            residuals=wrap("residuals"),
            outputs=wrap("outputs"),
            jacobian=wrap("jacobian"),
        )

    def _call(self, what: str, function: Callable[..., Any], *arguments: Any) -> Any:
        try:
            return function(*arguments)
        except (*BREAKDOWN, BenchError):
            raise
        except Exception as error:
            raise ProblemError(
                f"{self.config.workload}: {what} failed at step {self.step} with {short(error)}"
            ) from error

    def _flush(self) -> None:
        """Read the losses from the device and write their rows."""
        if not self.pending:
            return
        losses = torch.stack([loss.reshape(()) for _, loss in self.pending]).tolist()
        for (row, _), loss in zip(self.pending, losses, strict=True):
            self.writer.write(row | {"loss": loss})
            self.diverged |= not math.isfinite(loss)
        self.pending = []
        self.loss = losses[-1]
        if self.problem.evaluate is None:
            self.recent += losses

    def _evaluate_if_due(self, flag: SignalFlag) -> None:
        due = self.step % self.config.eval_every == 0 or self.step == self.config.steps
        if not due or self.evaluated == self.step:
            return
        self._flush()
        if self.diverged or (self.problem.evaluate is None and not self.recent):
            return
        start = time.perf_counter()
        values = self._evaluate(flag) if self.problem.evaluate else {"loss": statistics.fmean(self.recent)}
        if self.config.metric not in values:
            known = ", ".join(values) or "nothing"
            raise ProblemError(
                f"{self.config.workload}: evaluate returns {known}, not the metric {self.config.metric!r}"
            )
        self.evaluated, self.value, self.recent = self.step, values[self.config.metric], []
        self.diverged = not math.isfinite(self.value)
        self.writer.write({"kind": "eval", "step": self.step, "seconds": self.seconds,
                           "eval_wall": time.perf_counter() - start, "values": values})  # fmt: skip
        self._tick()

    def _evaluate(self, flag: SignalFlag) -> dict[str, float]:
        """Evaluate with averaged weights where the optimizer has them; training notices nothing of it.

        A signal ends the evaluation at once. That is safe because the state is saved only if the weights are bitwise
        what they were before; the continued run begins with this evaluation.
        """
        rng, weights = environment.rng_state(), self._weights()
        interrupted = False
        self._mode(training=False)
        try:
            with flag.interruptible(), torch.no_grad():
                values = self._call("evaluate", self.problem.evaluate or dict, self.model)
        except Interrupted:
            interrupted = True
        finally:
            self._mode(training=True)
            environment.set_rng_state(rng)
        if interrupted:
            if self._weights() == weights:
                self._save()
            else:
                self.warn("the evaluation was interrupted while it changed the weights: the last checkpoint stands")
            raise Interrupted
        try:
            return {str(name): float(value) for name, value in values.items()}
        except (AttributeError, TypeError, ValueError) as error:
            raise ProblemError(f"{self.config.workload}: evaluate must return {{name: number}} ({error})") from error

    def _mode(self, *, training: bool) -> None:
        self.model.train(training)
        switch = getattr(self.optimizer, "train" if training else "eval", None)
        if switch is not None:
            switch()

    def _weights(self) -> str:
        return tensor_hash(tensors(self.model.state_dict()))

    def _save(self) -> None:
        self._flush()
        state = {
            "step": self.step,
            "evaluated": self.evaluated,
            "seconds": self.seconds,
            "recent": self.recent,
            "diverged": self.diverged,
            "metrics_bytes": self.writer.sync(),
            "model": dict(self.model.state_dict()),
            "optimizer": self.optimizer.state_dict(),
            "scheduler": self.scheduler.state_dict(),
            "rng": environment.rng_state(),
        }
        self.checkpoints.save(self.step, state)

    def _restore(self) -> int:
        """Load the newest intact checkpoint; the number of bytes of the metrics that belong to it."""
        latest = self.checkpoints.latest(self.warn)
        if latest is None:
            return 0
        _, state = latest
        self.step, self.evaluated, self.seconds = state["step"], state["evaluated"], state["seconds"]
        self.recent, self.diverged = state["recent"], state["diverged"]
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.scheduler.load_state_dict(state["scheduler"])
        environment.set_rng_state(state["rng"])
        return int(state["metrics_bytes"])

    def _finish(self) -> RunResult:
        self._flush()
        if self.save_every and not self.diverged:
            self._save()
        elif not self.save_every:
            self.checkpoints.clear()
        self.writer.sync()
        self._tick(last=True)
        return self._result("diverged" if self.diverged else "complete", None)

    def _result(self, status: Status, signal: int | None) -> RunResult:
        size = sum(t.numel() * t.element_size() for t in tensors(self.optimizer.state_dict()))
        skipped = int(getattr(self.optimizer, "skipped", 0))
        return summarise(read_metrics(self.folder / METRICS), self.config, status, signal, size, skipped)

    def _tick(self, *, last: bool = False) -> None:
        now = time.perf_counter()
        if self.progress is None or (now - self.ticked < TICK_SECONDS and not last):
            return
        self.ticked = now
        done, c = self.step - self.first_step, self.config
        left = (now - self.began) / done * (c.steps - self.step) if done else None
        self.progress(Tick(c.workload, c.optimizer.label, c.seed, self.step, c.steps, self.loss, self.value, left))


class Stopwatch:
    """Adds up wall and process CPU seconds between ``start`` and ``stop``."""

    def __init__(self) -> None:
        self.wall = self.cpu = 0.0

    def start(self) -> Stopwatch:
        """Begin, or go on."""
        self._wall, self._cpu = time.perf_counter(), time.process_time()
        return self

    def stop(self) -> None:
        """Add the seconds since ``start``."""
        self.wall += time.perf_counter() - self._wall
        self.cpu += time.process_time() - self._cpu


def _norm(items: Any) -> float:
    """The 2-norm of all tensors together."""
    norms = [torch.linalg.vector_norm(t) for t in items]
    return float(torch.linalg.vector_norm(torch.stack(norms))) if norms else 0.0


def summarise(
    metrics: Metrics, config: RunConfig, status: Status, signal: int | None, state_bytes: int, skipped: int
) -> RunResult:
    """The result of a run: a function of its rows alone, so a resumed run and an uninterrupted one agree."""
    rows, evals = metrics.train, metrics.evals
    values = [(e["values"].get(config.metric), e["step"]) for e in evals]
    known = [(v, step) for v, step in values if v is not None]
    best = (min if config.goal == "min" else max)(known, key=lambda item: item[0], default=(None, None))
    final = values[-1][0] if status == "complete" and values else None
    tail = [r["loss"] for r in rows[-max(1, len(rows) // 20) :] if r["loss"] is not None]
    warm = rows[WARM_STEPS:] if len(rows) >= 2 * WARM_STEPS else rows[1:]
    updates = [r["update_rms"] for r in rows if r.get("update_rms") is not None]

    def mean_ms(name: str) -> float | None:
        return 1e3 * statistics.fmean(r[name] for r in warm) if warm else None

    step_ms, optimizer_ms = mean_ms("cpu"), mean_ms("optimizer_cpu")
    return RunResult(
        status=status,
        steps=len(rows),
        skipped=skipped,
        final=final,
        best=best[0],
        best_step=best[1],
        values=evals[-1]["values"] if evals else {},
        train_loss=statistics.fmean(tail) if tail else None,
        wall_seconds=sum(r["wall"] for r in rows),
        cpu_seconds=sum(r["cpu"] for r in rows),
        optimizer_cpu_seconds=sum(r["optimizer_cpu"] for r in rows),
        eval_seconds=sum(e["eval_wall"] for e in evals),
        first_step_ms=1e3 * rows[0]["wall"] if rows else None,
        step_ms=step_ms,
        step_ms_median=1e3 * statistics.median(r["cpu"] for r in warm) if warm else None,
        step_wall_ms=mean_ms("wall"),
        optimizer_ms=optimizer_ms,
        optimizer_share=optimizer_ms / step_ms if optimizer_ms is not None and step_ms else None,
        state_bytes=state_bytes,
        update_rms=statistics.median(updates) if updates else None,
        signal=signal,
    )
