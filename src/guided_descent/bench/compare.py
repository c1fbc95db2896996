"""The main job: train every optimizer with the same budget and seeds, time them side by side, judge, and write it down.

``compare`` fills one folder: the runs (see ``store.py``), and ``comparison.json`` with everything a table, a verdict or
a report needs. The same call again continues where it stopped.
"""

from __future__ import annotations

import copy
import math
import os
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from torch.optim import Optimizer

from guided_descent.bench.display import Display
from guided_descent.bench.files import FORMAT, BenchError, make_folder, read_json, to_json, write_json
from guided_descent.bench.pool import Job, run_jobs, train_run
from guided_descent.bench.problem import load_problem
from guided_descent.bench.runner import BuildOptimizer, build_optimizer, knowing
from guided_descent.bench.scoring import (
    Budget,
    Contestant,
    Difference,
    Verdict,
    judge,
    mean_sd,
    paired_difference,
    pick_baseline,
    score,
    steps_to_target,
)
from guided_descent.bench.specs import unique_labels
from guided_descent.bench.store import OptimizerSpec, Run, RunConfig
from guided_descent.bench.timing import Timing, time_steps
from guided_descent.bench.tuning import Tuning, committed

FIRST_SEED = 100  # seeds below are for tuning
POINTS = 400  # of a curve in the document; longer ones are thinned, never smoothed

# What may not differ between arms of a fair comparison; machine, versions and git are printed when they do.
PROTOCOL = ("steps", "schedule", "eval_every", "clip", "metric", "goal", "data", "init", "dtype", "device", "threads")
CIRCUMSTANCES = ("versions", "git", "machine")


@dataclass(frozen=True)
class Arm:
    """One optimizer of a comparison and the budget its hyperparameters were found with."""

    spec: OptimizerSpec
    budget: Budget


@dataclass
class Comparison:
    """The outcome on one problem: a plain document (``comparison.json``) and the verdict.

    Attributes:
        document: See ``build_document``.
        verdict: The sentence and the winner, if any.
        out: The folder.
    """

    document: dict[str, Any]
    verdict: Verdict
    out: Path

    @property
    def failed(self) -> bool:
        """Whether some run diverged."""
        return any(run["status"] != "complete" for arm in self.document["arms"] for run in arm["runs"])


def arms_for(
    specs: Sequence[OptimizerSpec], problem: str, steps: int, tuning: Tuning | None = None, search: bool = True
) -> tuple[list[Arm], list[str]]:
    """Give each optimizer its hyperparameters and budget; also notes for the user about what was chosen.

    Hyperparameters in a spec are "set by hand". The others come from ``tuning``; without one (and with ``search``) from
    the tuning that is committed for this problem and length if it covers *all* of them; else all stay at their
    documented defaults, since a comparison of tuned with untuned optimizers would be worth nothing.
    """
    specs, notes = unique_labels(specs), []
    open_names = [spec.name for spec in specs if not spec.hyper]
    if tuning is None and search and open_names and (path := committed(problem, steps)).exists():
        tuning = Tuning.load(path)
        if missing := [name for name in dict.fromkeys(open_names) if name not in tuning.optimizers]:
            notes.append(
                f"the committed tuning for {problem} at {steps} steps lacks {', '.join(missing)}: all run "
                "at their documented defaults; for an equal tuning run guided-descent tune"
            )
            tuning = None
    arms = []
    for spec in specs:
        if spec.hyper:
            arms.append(Arm(spec, Budget("hand")))
        elif tuning is not None:
            tuned, budget = tuning.spec(spec.name)
            arms.append(Arm(replace(tuned, label=spec.label), budget))
        else:
            arms.append(Arm(spec, Budget("defaults")))
    if tuning is not None and (tuning.problem, tuning.steps) != (problem, steps):
        notes.append(f"the tuning was made on {tuning.problem} at {tuning.steps} steps, this is {problem} at {steps}")
    return arms, notes


def compare(
    problem: str,
    arms: Sequence[Arm],
    *,
    seeds: Sequence[int],
    steps: int,
    out: str | os.PathLike[str],
    build: BuildOptimizer = build_optimizer,
    workers: int = 2,
    timing_rounds: int = 3,
    display: Display | None = None,
    options: Mapping[str, Any] | None = None,
    command: str = "",
    notes: Sequence[str] = (),
) -> Comparison:
    """Train all arms on all seeds, time them, judge them and write ``comparison.json``.

    Args:
        problem: A workload or ``package.module:function``.
        arms: The optimizers, see ``arms_for``.
        seeds: One run per arm and seed; the same weights and batches for every arm of a seed.
        steps: Length of every run.
        out: Folder; finished runs in it are not run again.
        build: Makes an optimizer from model and spec; importable by name.
        workers: Worker processes with one thread each; 0 runs in this process.
        timing_rounds: Blocks of 10 steps per optimizer in the timing pass; 0 leaves it out.
        display: Shows progress.
        options: Passed on to ``runner.train``.
        command: Recorded: how to repeat this.
        notes: Recorded and shown beside the verdict.

    Raises:
        BenchError: No arm or seed, a seed twice, or a run that fails.
    """
    if not arms or not seeds:
        raise BenchError("a comparison needs at least one optimizer and one seed")
    if len(set(seeds)) < len(seeds):
        raise BenchError(f"the seeds {list(seeds)} name one twice; name each once")
    out = Path(out)
    make_folder(out)
    pairs = [(arm, seed) for seed in seeds for arm in arms]
    jobs = [
        Job(
            title=f"{arm.spec.label}, seed {seed}",
            steps=steps,
            function=train_run,
            args=(problem, arm.spec),
            kwargs={"seed": seed, "steps": steps, "out": str(out), "build_optimizer": build, **(options or {})},
        )
        for arm, seed in pairs
    ]
    runs: dict[str, list[Run]] = {arm.spec.label: [] for arm in arms}
    for (arm, _), run in zip(pairs, run_jobs(jobs, workers, display), strict=True):
        runs[arm.spec.label].append(run)
    timings: list[Timing | None] = [None] * len(arms)
    task = load_problem(problem, seeds[0])
    specs = [knowing(arm.spec, task) for arm in arms]
    if timing_rounds:
        if display:
            display.say(f"timing pass: {len(arms)} optimizers take turns in this process")
        builds = [lambda model, spec=spec: build(model, spec) for spec in specs]
        timings = list(time_steps(lambda: load_problem(problem, seeds[0]), builds, rounds=timing_rounds))
    rates = [main_lr(build(copy.deepcopy(task.model), spec), spec.name) for spec in specs]
    document, verdict = build_document(arms, runs, timings, rates=rates, command=command, notes=notes, workers=workers)
    write_json(out / "comparison.json", document)
    return Comparison(to_json(document), verdict, out)


def main_lr(optimizer: Optimizer, name: str) -> float:
    """The learning rate of the method itself: of a hybrid's groups the one of its own recipe, not the auxiliary's."""
    groups = optimizer.param_groups
    return float(next((group for group in groups if group.get("recipe") == name), groups[0])["lr"])


def load_comparison(folder: str | os.PathLike[str]) -> dict[str, Any]:
    """Read ``comparison.json`` of a folder.

    Raises:
        BenchError: No comparison there, or a damaged file.
    """
    path = Path(folder) / "comparison.json"
    if not path.exists():
        raise BenchError(f"{folder} holds no comparison.json; make one with: guided-descent compare --out {folder}")
    document = read_json(path)
    if missing := [key for key in ("arms", "verdict", "protocol", "target") if key not in document]:
        raise BenchError(
            f"{path}: damaged, {missing[0]!r} is missing; run the comparison again, finished runs are kept"
        )
    return document


def build_document(
    arms: Sequence[Arm],
    runs: Mapping[str, Sequence[Run]],
    timings: Sequence[Timing | None],
    *,
    rates: Sequence[float | None] | None = None,
    command: str = "",
    notes: Sequence[str] = (),
    workers: int = 0,
) -> tuple[dict[str, Any], Verdict]:
    """Everything a comparison found, as JSON types.

    Keys: ``format, kind, problem, metric, goal, unit, steps, seeds, target {value, from}, arms [...], verdict, notes,
    differences, protocol, machine, versions, git, load, created, command``. An arm: ``label, optimizer, hyper, lr,
    budget, runs [{seed, status, final, train_loss, eval {step, seconds, value}, train {step, seconds, value}}], row``.
    A row: ``final_mean, final_sd, difference, steps_to_target, time_to_target, step_ms, optimizer_ms,
    optimizer_share, timing_spread, state_bytes, state_bytes_per_parameter, update_rms, skipped``.
    """
    first = runs[arms[0].spec.label][0].config
    differences, circumstances = config_differences(runs)
    contestants = [
        Contestant(arm.spec.label, arm.spec.name, _finals(runs[arm.spec.label], first), arm.budget) for arm in arms
    ]
    verdict = judge(contestants, first.metric.replace("_", " "), first.goal, differences)
    baseline = pick_baseline(contestants) or contestants[0]
    target, origin = first.target, "given by the task"
    if target is None:
        finals = [run.result.final for run in runs[baseline.label] if run.result and run.result.final is not None]
        target, origin = (statistics.median(finals) if finals else None), f"median final of {baseline.label}"
    seeds = sorted({run.config.seed for group in runs.values() for run in group})
    document = {
        "format": FORMAT,
        "kind": "comparison",
        "problem": first.workload,
        "metric": first.metric,
        "goal": first.goal,
        "unit": first.unit,
        "steps": first.steps,
        "seeds": seeds,
        "parameters": first.parameters,
        "target": {"value": target, "from": origin},
        "baseline": baseline.label,
        "arms": [
            _arm(arm, contestant, baseline, runs[arm.spec.label], timing, target) | {"lr": lr}
            for arm, contestant, timing, lr in zip(arms, contestants, timings, rates or [None] * len(arms), strict=True)
        ],
        "verdict": verdict.to_dict(),
        "notes": list(notes),
        "differences": [*differences, *circumstances],
        "protocol": {
            "schedule": {"name": first.schedule.name, **first.schedule.options},
            "clip": first.clip,
            "eval_every": first.eval_every,
            "dtype": first.dtype,
            "device": first.device,
            "threads": first.threads,
            "workers": workers,
            "data": first.data,
        },
        "machine": dict(first.machine),
        "versions": dict(first.versions),
        "git": first.git,
        "load": os.getloadavg()[0] if hasattr(os, "getloadavg") else None,
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": command,
    }
    return document, verdict


def _finals(runs: Sequence[Run], first: RunConfig) -> dict[int, float]:
    return {run.config.seed: score(run.result.final if run.result else None, first.goal) for run in runs}


def _arm(
    arm: Arm,
    contestant: Contestant,
    baseline: Contestant,
    runs: Sequence[Run],
    timing: Timing | None,
    target: float | None,
) -> dict[str, Any]:
    curves = [_curves(run) for run in runs]
    goal, metric = runs[0].config.goal, runs[0].config.metric
    results = [run.result for run in runs if run.result]
    finals = [result.final if result.final is not None else math.inf for result in results]
    mean, sd = mean_sd(finals)
    difference = paired_difference(contestant.finals, baseline.finals) if contestant is not baseline else None
    reached = math.inf
    if target is not None:
        sign = 1 if goal == "min" else -1
        each = []
        for run in runs:
            steps, _, values = run.metrics().curve(metric)
            each.append(steps_to_target(steps, [sign * value for value in values], sign * target))
        reached = statistics.median_high(each)
    state = max((result.state_bytes for result in results), default=0)
    updates = [result.update_rms for result in results if result.update_rms is not None]
    return {
        "label": arm.spec.label,
        "optimizer": arm.spec.name,
        "hyper": dict(arm.spec.hyper),
        "budget": {
            "source": arm.budget.source,
            "trials": arm.budget.trials,
            "seeds": list(arm.budget.seeds),
            "edge": arm.budget.edge,
            "key": arm.budget.key,
            "text": str(arm.budget),
        },
        "runs": curves,
        "row": {
            "final_mean": mean,
            "final_sd": sd,
            "difference": _difference(difference, goal),
            "steps_to_target": reached,
            "time_to_target": reached * timing.step_ms / 1e3 if timing else None,
            "step_ms": timing.step_ms if timing else None,
            "optimizer_ms": timing.optimizer_ms if timing else None,
            "optimizer_share": timing.share if timing else None,
            "timing_spread": timing.spread if timing else None,
            "state_bytes": state,
            "state_bytes_per_parameter": state / runs[0].config.parameters,
            "update_rms": statistics.median(updates) if updates else None,
            "skipped": sum(result.skipped for result in results),
        },
    }


def _difference(difference: Difference | None, goal: Any) -> dict[str, Any] | None:
    if difference is None:
        return None
    percent, low, high = difference.of(goal)
    return {
        "percent": percent,
        "low": low,
        "high": high,
        "n": difference.n,
        "outcome": difference.outcome,
        "why": difference.why,
    }


def _curves(run: Run) -> dict[str, Any]:
    metrics, result = run.metrics(), run.result
    curves = {"eval": run.config.metric, "train": "loss"}
    if not metrics.evals:
        curves["eval"] = "loss"
    values: dict[str, Any] = {"seed": run.config.seed, "status": run.status, "folder": run.path.name}
    values |= {"final": result.final if result else None, "train_loss": result.train_loss if result else None}
    values["stopped_at"] = result.steps if result else None
    rows = {"train": metrics.train, "eval": [{**row, **row["values"]} for row in metrics.evals] or metrics.train}
    for kind, name in curves.items():
        points = [(row["step"], row["seconds"], row.get(name)) for row in rows[kind] if row.get(name) is not None]
        points = thin(points, POINTS)
        values[kind] = {key: [point[i] for point in points] for i, key in enumerate(("step", "seconds", "value"))}
    return values


def thin(points: Sequence[Any], most: int) -> list[Any]:
    """At most ``most`` points at even distances, the first and the last among them.

    Example:
        >>> thin(range(10), 4)
        [0, 3, 6, 9]
    """
    if len(points) <= most:
        return list(points)
    return [points[round(i * (len(points) - 1) / (most - 1))] for i in range(most)]


def config_differences(runs: Mapping[str, Sequence[Run]]) -> tuple[list[str], list[str]]:
    """In what arms differ besides their optimizer: what breaks the protocol, and mere circumstances.

    Runs are compared within a seed, since the initial weights belong to it.
    """
    found: dict[str, None] = {}
    mild: dict[str, None] = {}
    by_seed: dict[int, list[Run]] = {}
    for group in runs.values():
        for run in group:
            by_seed.setdefault(run.config.seed, []).append(run)
    for group in by_seed.values():
        base = group[0].config
        for run in group[1:]:
            for names, place in ((PROTOCOL, found), (CIRCUMSTANCES, mild)):
                for name in names:
                    ours, theirs = getattr(base, name), getattr(run.config, name)
                    if ours != theirs:
                        text = f"{name}: {ours} for {base.optimizer.label}, {theirs} for {run.config.optimizer.label}"
                        place[text] = None
    return list(found), list(mild)
