"""What is measured in a run, and what its rows say in the end."""

from __future__ import annotations

import statistics
import time
from typing import Any

import torch

from guided_descent.bench.store import Metrics, RunConfig, RunResult, Status

WARM_STEPS = 10  # steps left out of the mean step time


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


def norm(items: Any) -> float:
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
