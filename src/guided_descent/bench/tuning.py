"""Equal-budget tuning: the same number of learning rates, seeds and steps for every optimizer, kept as one JSON file.

The rule (stated in every file it writes): learning rates at the documented default times 1/4, 1/2, 1, 2, 4 and 8, the
tuning seeds 0 and 1, the smallest mean final metric wins. While any optimizer's best sits at an end of its grid, and at
most twice, *every* optimizer gets one more learning rate: beyond the end where its best is at one, else halfway (in
logarithms) between its best and the better neighbour. So budgets stay equal whatever the grids look like. Seeds used
here are never used in a comparison.
"""

from __future__ import annotations

import math
import os
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any, Literal

from guided_descent.bench.files import FORMAT, BenchError, read_json, write_json
from guided_descent.bench.pool import Display, Job, run_jobs, train_run
from guided_descent.bench.scoring import Budget, score
from guided_descent.bench.store import Goal, OptimizerSpec, slug

FACTORS = (0.25, 0.5, 1.0, 2.0, 4.0, 8.0)
SPACING = 2.0
EXTENSIONS = 2
SEEDS = (0, 1)
FOLDER = Path(__file__).parent / "tuned"


@dataclass
class Trials:
    """The learning rates tried for one optimizer and the scores they got; lower is better, ``inf`` is diverged.

    Example:
        >>> trials = Trials("adamw", 1e-3, {1e-3: {0: 2.0, 1: 2.2}, 2e-3: {0: 1.9, 1: 2.0}})
        >>> trials.best, trials.edge, trials.next_lr()
        (0.002, 'high', 0.004)
    """

    optimizer: str
    default: float
    scores: dict[float, dict[int, float]] = field(default_factory=dict)

    def means(self) -> dict[float, float]:
        """Mean score by learning rate, ascending."""
        return {lr: statistics.fmean(self.scores[lr].values()) for lr in sorted(self.scores)}

    @property
    def best(self) -> float:
        """The learning rate with the smallest mean score; of equals the smallest."""
        means = self.means()
        return min(means, key=lambda lr: means[lr])

    @property
    def edge(self) -> Literal["", "low", "high"]:
        """Where the best learning rate sits at an end of those tried."""
        rates = sorted(self.scores)
        return "low" if self.best == rates[0] else "high" if self.best == rates[-1] else ""

    def next_lr(self) -> float:
        """The learning rate that an extension adds."""
        rates, best = sorted(self.scores), self.best
        if self.edge == "low":
            return best / SPACING
        if self.edge == "high":
            return best * SPACING
        means, place = self.means(), rates.index(best)
        return math.sqrt(best * min(rates[place - 1], rates[place + 1], key=lambda lr: means[lr]))


@dataclass
class Tuning:
    """A finished tuning: what was searched, with what budget, and what was found.

    Attributes:
        problem: The workload.
        steps: Run length of every trial.
        metric: What was compared, with its ``goal``.
        goal: Which way it is better.
        data: Hash of the data; a tuning holds for this data only.
        seeds: Seeds of every trial.
        optimizers: The trials by optimizer.
        facts: Command, date, machine and versions.
    """

    problem: str
    steps: int
    metric: str
    goal: Goal
    data: str
    seeds: tuple[int, ...]
    optimizers: dict[str, Trials]
    facts: dict[str, Any] = field(default_factory=dict)

    def spec(self, name: str) -> tuple[OptimizerSpec, Budget]:
        """The tuned optimizer and the budget it was found with.

        Raises:
            BenchError: This optimizer was not tuned here.
        """
        if name not in self.optimizers:
            known = ", ".join(self.optimizers)
            raise BenchError(f"no tuning for {name!r} on {self.problem} at {self.steps} steps; tuned there: {known}")
        trials = self.optimizers[name]
        key = f"{self.problem}, {self.steps} steps, data {self.data[:12]}"
        budget = Budget("tuned", len(trials.scores), self.seeds, trials.edge, key)
        return OptimizerSpec(name, {"lr": trials.best}), budget

    def save(self, path: Path) -> None:
        """Write the file, atomically."""
        rules = {
            "factors": FACTORS,
            "around": "the documented default",
            "spacing": SPACING,
            "extensions": f"at most {EXTENSIONS}, for every optimizer alike while any best is at an end of its grid",
            "other hyperparameters": "documented defaults",
            "selection": "smallest mean final metric over the seeds",
        }
        optimizers = {
            name: {
                "default_lr": trials.default,
                "chosen": {"lr": trials.best},
                "edge": trials.edge,
                "trials": [
                    {"lr": lr, "scores": {str(seed): value for seed, value in scores.items()}}
                    for lr, scores in sorted(trials.scores.items())
                ],
            }
            for name, trials in self.optimizers.items()
        }
        head = {"format": FORMAT, "kind": "tuning", "problem": self.problem, "steps": self.steps, "metric": self.metric}
        more = {"goal": self.goal, "data": self.data, "seeds": self.seeds, "space": {"lr": rules}}
        write_json(path, head | more | {"optimizers": optimizers} | self.facts)

    @classmethod
    def load(cls, path: Path) -> Tuning:
        """Read a tuning file.

        Raises:
            BenchError: Missing, damaged, or not a tuning.
        """
        data = read_json(path)
        try:
            optimizers = {
                name: Trials(
                    name,
                    entry["default_lr"],
                    {
                        float(t["lr"]): {int(s): math.inf if v is None else v for s, v in t["scores"].items()}
                        for t in entry["trials"]
                    },
                )
                for name, entry in data["optimizers"].items()
            }
            if not all(trials.scores and all(trials.scores.values()) for trials in optimizers.values()):
                raise ValueError("an optimizer without trials")
            known = {"format", "kind", "problem", "steps", "metric", "goal", "data", "seeds", "space", "optimizers"}
            facts = {key: value for key, value in data.items() if key not in known}
            head = (str(data["problem"]), int(data["steps"]), str(data["metric"]), data["goal"], str(data["data"]))
            return cls(*head, tuple(data["seeds"]), optimizers, facts)
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise BenchError(f"{path}: no tuning file ({type(error).__name__}: {error}); make one with tune") from None


def committed(problem: str, steps: int) -> Path:
    """Where the tuning that comes with the package lies, if there is one for this workload and length."""
    return FOLDER / f"{slug(problem)}-{steps}.json"


def tune(
    problem: str,
    optimizers: Mapping[str, float],
    *,
    steps: int,
    out: str | os.PathLike[str],
    seeds: Sequence[int] = SEEDS,
    workers: int = 2,
    display: Display | None = None,
    options: Mapping[str, Any] | None = None,
    facts: Mapping[str, Any] | None = None,
) -> Tuning:
    """Tune every optimizer on one problem with the same budget; finished trials in ``out`` are not run again.

    Args:
        problem: A workload or ``package.module:function``.
        optimizers: The documented default learning rate by optimizer.
        steps: Length of every trial.
        out: Folder of the trials; the result is saved there as ``tuning.json``.
        seeds: Seeds of every trial.
        workers: Worker processes; 0 runs in this process.
        display: Shows progress.
        options: Passed on to ``runner.train``.
        facts: Recorded in the result: the command and whatever else should stand there.

    Raises:
        BenchError: No optimizer, no seed, or a default learning rate that is not positive.
    """
    if not optimizers or not seeds:
        raise BenchError("tuning needs at least one optimizer and one seed")
    for name, default in optimizers.items():
        if not default > 0:
            raise BenchError(f"{name} has the default learning rate {default}; a grid needs one above 0")
    found = {name: Trials(name, default) for name, default in optimizers.items()}
    wanted = {name: [default * factor for factor in FACTORS] for name, default in optimizers.items()}
    record = None
    for extension in range(EXTENSIONS + 1):
        todo = [(name, lr, seed) for seed in seeds for name in found for lr in wanted[name]]
        call = partial(Job, function=train_run, steps=steps)
        jobs = [
            call(
                title=f"{name} lr={lr:.3g} seed {seed}",
                args=(problem, OptimizerSpec(name, {"lr": lr}, f"{name} lr={lr:.6g}")),
                kwargs={"seed": seed, "steps": steps, "out": str(out), **(options or {})},
            )
            for name, lr, seed in todo
        ]
        for (name, lr, seed), run in zip(todo, run_jobs(jobs, workers, display), strict=True):
            record = run.config
            found[name].scores.setdefault(lr, {})[seed] = score(run.result.final if run.result else None, record.goal)
        if extension == EXTENSIONS or not any(trials.edge for trials in found.values()):
            break
        wanted = {name: [trials.next_lr()] for name, trials in found.items()}
    assert record is not None
    about = {
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "machine": record.machine,
        "versions": record.versions,
        "git": record.git,
        **(facts or {}),
    }
    tuning = Tuning(problem, steps, record.metric, record.goal, record.data, tuple(seeds), found, about)
    tuning.save(Path(out) / "tuning.json")
    return tuning
