"""The training loop of one run: from start or checkpoint to the end, to divergence or to a signal."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from guided_descent.bench import environment
from guided_descent.bench.checkpoint import CheckpointError, Checkpoints
from guided_descent.bench.files import BenchError
from guided_descent.bench.problem import Batch, Problem, ProblemError, short, tensor_hash, tensors
from guided_descent.bench.ranks import Ranks
from guided_descent.bench.shares import divide
from guided_descent.bench.signals import Interrupted, SignalFlag
from guided_descent.bench.snapshot import capture, restore
from guided_descent.bench.store import (
    METRICS,
    MetricsWriter,
    Row,
    RunConfig,
    RunResult,
    Status,
    read_metrics,
)
from guided_descent.bench.summary import Stopwatch, norm, summarise
from guided_descent.engine import NonFiniteError
from guided_descent.solvers.objective import Objective

PROBE_EVERY = 10  # steps between measurements of gradient norm and update size; they are outside the timers
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
        module: What the loss is called with: the model, or what ``ranks`` has wrapped around it.
        optimizer: Over the model's parameters.
        scheduler: Stepped after every optimizer step.
        checkpoints: Where states are saved.
        save_every: Steps between checkpoints; 0: only an interrupted run is saved.
        keep_best: How many of the best evaluated states are saved and kept.
        ranks: The processes that share the run.
        progress: Called with a ``Tick``.
        warn: Called with one line.
    """

    folder: Path
    config: RunConfig
    problem: Problem
    module: nn.Module
    optimizer: Optimizer
    scheduler: LRScheduler
    checkpoints: Checkpoints
    save_every: int
    keep_best: int
    progress: Callable[[Tick], None] | None
    warn: Callable[[str], None]
    ranks: Ranks = field(default_factory=Ranks)

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
        self.scores: dict[int, float] = {}  # the metric by step
        length = restore(self)
        self.writer = MetricsWriter(self.folder / METRICS, length) if self.ranks.lead else None
        if self.keep_best:
            evals = read_metrics(self.folder / METRICS).evals if self.ranks.lead else []
            self.scores = self.ranks.told({row["step"]: row["values"][self.config.metric] for row in evals})
        self.first_step, self.began, self.ticked = self.step, time.perf_counter(), 0.0

    def run(self, flag: SignalFlag) -> RunResult:
        """Train to the end, or to the first safe point after a signal: the end of a step with all its micro-batches."""
        self.model.train()
        try:
            while True:
                improved = self._evaluate_if_due(flag)
                if self.diverged or self.step == self.config.steps:
                    return self._finish()
                stop = self.ranks.agree(flag.received)
                due = self.save_every and self.step % self.save_every == 0
                if stop is not None or (self.step and (due or improved)):
                    self._save()
                if stop is not None:
                    return self._interrupted(stop)
                self._one_step()
                if self.step == self.first_step + 1:
                    self._check_ranks()
        except Interrupted:
            return self._interrupted(flag.received)
        except BaseException:
            with suppress(CheckpointError):  # what ended the run is told, not what came of the last save
                self.checkpoints.wait()
            raise
        finally:
            if self.writer is not None:
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
        batch = self.ranks.share(self._call("batches", self.problem.batch, self.step))
        pieces = divide(batch, self.config.micro_batches)

        def closure() -> Tensor:
            model.start()
            self.optimizer.zero_grad(set_to_none=True)
            loss = self.ranks.mean(self._gradients(pieces))
            if self.config.clip is not None:
                norms.append(nn.utils.clip_grad_norm_(self.parameters, self.config.clip))
            losses.append(loss)
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
            row["grad_norm"] = float(norms[0]) if norms else norm(p.grad for p in self.parameters if p.grad is not None)
        if probe:
            moved = norm(p.detach() - old for p, old in zip(self.parameters, before, strict=True))
            row["update_rms"] = moved / math.sqrt(sum(p.numel() for p in self.parameters))
        first = losses[0] if losses else returned  # a solver evaluates the objective itself and returns the loss
        self.pending.append((row, first if isinstance(first, Tensor) else torch.tensor(math.nan)))
        if len(self.pending) >= self.flush_every:
            self._flush()
        self._tick()

    def _gradients(self, pieces: list[Batch]) -> Tensor:
        """Forward and backward passes of the micro-batches; the mean of their losses."""
        losses: list[Tensor] = []
        for number, piece in enumerate(pieces, start=1):
            with self.ranks.adding(self.module, last=number == len(pieces)):
                loss: Tensor = self._call("the loss", self.problem.loss, self.module, piece)
                loss = loss / len(pieces) if len(pieces) > 1 else loss
                self._call("backward", loss.backward)
            losses.append(loss.detach())
        return losses[0] if len(losses) == 1 else torch.stack(losses).sum()

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
        except BenchError:
            raise
        except Exception as error:
            if self.ranks.size == 1 and isinstance(error, BREAKDOWN):
                raise  # with several, the others know nothing of it and wait: it is an error
            hint = ""
            if isinstance(error, AttributeError) and f"'{type(self.module).__name__}' object" in str(error):
                hint = "; where ranks share a run the loss calls the model and uses no attribute of it"
            raise ProblemError(
                f"{self.config.workload}: {what} failed at step {self.step} with {short(error)}{hint}"
            ) from error

    def _flush(self) -> None:
        """Read the losses from the device and write their rows."""
        if not self.pending:
            return
        losses = torch.stack([loss.reshape(()) for _, loss in self.pending]).tolist()
        for (row, _), loss in zip(self.pending, losses, strict=True):
            self._write(row | {"loss": loss})
            self.diverged |= not math.isfinite(loss)
        self.pending = []
        self.loss = losses[-1]
        if self.problem.evaluate is None:
            self.recent += losses

    def _write(self, row: Row) -> None:
        if self.writer is not None:
            self.writer.write(row)

    def _evaluate_if_due(self, flag: SignalFlag) -> bool:
        """Whether an evaluation has found one of the best states, which is to be saved."""
        due = self.step % self.config.eval_every == 0 or self.step == self.config.steps
        if not due or self.evaluated == self.step:
            return False
        self._flush()
        if self.diverged or (self.problem.evaluate is None and not self.recent):
            return False
        start = time.perf_counter()
        values = self._evaluate(flag) if self.problem.evaluate else {"loss": statistics.fmean(self.recent)}
        if self.config.metric not in values:
            known = ", ".join(values) or "nothing"
            raise ProblemError(
                f"{self.config.workload}: evaluate returns {known}, not the metric {self.config.metric!r}"
            )
        self.evaluated, self.value, self.recent = self.step, values[self.config.metric], []
        self.diverged = not math.isfinite(self.value)
        self._write({"kind": "eval", "step": self.step, "seconds": self.seconds,
                     "eval_wall": time.perf_counter() - start, "values": values})  # fmt: skip
        self._tick()
        if not self.diverged:
            self.scores[self.step] = self.value
        return self.step in self._best()

    def _best(self) -> list[int]:
        """The steps of the best evaluations, as many as are kept; of equal ones the earlier."""
        sign = 1 if self.config.goal == "min" else -1
        known = [(sign * value, step) for step, value in self.scores.items() if step and value is not None]
        return [step for _, step in sorted(known)[: self.keep_best]]

    def _evaluate(self, flag: SignalFlag) -> dict[str, float]:
        """Evaluate with averaged weights where the optimizer has them; training notices nothing of it.

        A signal ends the evaluation at once. That is safe because the state is saved only if the weights are bitwise
        what they were before; the continued run begins with this evaluation. Rank 0 evaluates for all.
        """
        flag.received = self.ranks.agree(flag.received)
        found: dict[str, Any] = self.ranks.told(self._evaluate_here(flag) if self.ranks.lead else None)
        if found["interrupted"]:
            flag.received = self.ranks.agree(flag.received)
            if found["unchanged"]:
                self._save()
            else:
                self.warn("the evaluation was interrupted while it changed the weights: the last checkpoint stands")
            raise Interrupted
        return dict(found["values"])

    def _evaluate_here(self, flag: SignalFlag) -> dict[str, Any]:
        """The values; or whether the weights are what they were, where a signal came."""
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
            return {"interrupted": True, "unchanged": self._weights() == weights}
        try:
            numbers = {str(name): float(value) for name, value in values.items()}
        except (AttributeError, TypeError, ValueError) as error:
            raise ProblemError(f"{self.config.workload}: evaluate must return {{name: number}} ({error})") from error
        return {"interrupted": False, "values": numbers}

    def _mode(self, *, training: bool) -> None:
        self.model.train(training)
        switch = getattr(self.optimizer, "train" if training else "eval", None)
        if switch is not None:
            switch()

    def _weights(self) -> str:
        return tensor_hash(tensors(self.model.state_dict()))

    def _save(self) -> None:
        self._flush()
        self._check_ranks()
        state = capture(self)
        if self.ranks.lead:
            self.checkpoints.save(self.step, state, self._best())

    def _check_ranks(self) -> None:
        """All ranks hold the same parameters, to the bit."""
        if self.ranks.size > 1:
            self.ranks.check_same(
                tensor_hash(self.parameters),
                f"their parameters after step {self.step}; the loss must call the model that it is given, in which the "
                "gradients of the ranks are joined",
            )

    def _finish(self) -> RunResult:
        self._flush()
        if (self.save_every and not self.diverged) or self.step in self._best():
            self._save()
        elif not self.save_every and not self.keep_best and self.ranks.lead:
            self.checkpoints.clear()
        self.checkpoints.wait()
        if self.writer is not None:
            self.writer.sync()
        self._tick(last=True)
        return self._result("diverged" if self.diverged else "complete", None)

    def _interrupted(self, signal: int | None) -> RunResult:
        self.checkpoints.wait()
        return self._result("interrupted", signal)

    def _result(self, status: Status, signal: int | None) -> RunResult:
        """What the rows say; the lead reads them for all."""
        size = sum(t.numel() * t.element_size() for t in tensors(self.optimizer.state_dict()))
        skipped = int(getattr(self.optimizer, "skipped", 0))
        found = None
        if self.ranks.lead:
            rows = read_metrics(self.folder / METRICS)
            found = asdict(summarise(rows, self.config, status, signal, size, skipped))
        return RunResult(**self.ranks.told(found))

    def _tick(self, *, last: bool = False) -> None:
        now = time.perf_counter()
        if self.progress is None or (now - self.ticked < TICK_SECONDS and not last):
            return
        self.ticked = now
        done, c = self.step - self.first_step, self.config
        left = (now - self.began) / done * (c.steps - self.step) if done else None
        self.progress(Tick(c.workload, c.optimizer.label, c.seed, self.step, c.steps, self.loss, self.value, left))
