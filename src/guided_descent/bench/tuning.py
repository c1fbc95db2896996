"""Equal-budget tuning: the same number of trials, seeds and steps for every optimizer, kept as one JSON file.

The rule (stated in every file it writes), for every optimizer alike:

1. six learning rates: the documented default times 1/4, 1/2, 1, 2, 4 and 8; where the recipe bounds its step by a
   ``kl_clip``, which is quadratic in the step, that is multiplied by the factor's square, or a learning rate would
   change nothing while the bound is active;
2. at the best of them four values of one further knob: the damping where there is one (default times 0.1, 0.3, 3 and
   10); the learning rate of the auxiliary optimizer where the recipe is a hybrid that has one of its own (default times
   4, 8, 16 and 32); else the weight decay;
3. two more learning rates around the best pair: half and double, or a square root of 2 away where those are known;
4. while any optimizer's best sits at an end of its grid, and at most twice, one more trial for *each*: beyond that end,
   or, where its best is inside, halfway (in logarithms) between its best learning rate and the better neighbour.

The smallest mean final metric over the tuning seeds 0 and 1 wins. These seeds are never used in a comparison.
"""

from __future__ import annotations

import math
import os
import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from guided_descent.bench.display import Display
from guided_descent.bench.files import FORMAT, BenchError, read_json, write_json
from guided_descent.bench.pool import Job, run_jobs, train_run
from guided_descent.bench.runner import BuildOptimizer, build_optimizer
from guided_descent.bench.scoring import Budget, score
from guided_descent.bench.specs import format_hyper
from guided_descent.bench.store import Goal, OptimizerSpec, RunConfig, slug

FACTORS = (0.25, 0.5, 1.0, 2.0, 4.0, 8.0)
AUX_FACTORS = (4.0, 8.0, 16.0, 32.0)
DAMPING_FACTORS = (0.1, 0.3, 3.0, 10.0)
DECAYS = (0.0, 0.01, 0.03, 0.1, 0.3)
SPACING = 2.0
EXTENSIONS = 2
SEEDS = (0, 1)
FOLDER = Path(__file__).parent / "tuned"

Point = tuple[float, float]
"""A learning rate and a value of the knob."""


@dataclass(frozen=True)
class Space:
    """What is searched for one optimizer.

    Attributes:
        lr: The documented default learning rate, above 0.
        knob: Name of the second hyperparameter, dotted where it is the auxiliary recipe's.
        default: Its documented default.
        values: The four other values tried.
        kl_clip: Its documented bound on the step, which moves with the square of the learning rate; ``None`` without.
        steps: Length of its trials; 0 is the length of the tuning.
        fixed: Hyperparameters that are set in every trial and not searched.
    """

    lr: float
    knob: str
    default: float
    values: tuple[float, ...]
    kl_clip: float | None = None
    steps: int = 0
    fixed: Mapping[str, Any] = field(default_factory=dict)

    def hyper(self, point: Point) -> dict[str, Any]:
        """The hyperparameters at a point; a knob at its default is left out.

        Example:
            >>> Space(0.02, "aux.lr", 3e-4, (1e-3,)).hyper((0.04, 1e-3))
            {'lr': 0.04, 'aux': {'lr': 0.001}}
        """
        lr, value = point
        hyper: dict[str, Any] = {**self.fixed, "lr": lr}
        if self.kl_clip is not None and lr != self.lr:
            hyper["kl_clip"] = self.kl_clip * (lr / self.lr) ** 2
        if value != self.default:
            outer, dot, inner = self.knob.partition(".")
            hyper[outer] = {inner: value} if dot else value
        return hyper


def space_of(name: str) -> Space:
    """The space of a registered optimizer, from its documented defaults.

    Raises:
        BenchError: Its learning rate is not a positive number, or it has neither an auxiliary rate nor a decay.
    """
    from guided_descent.recipes.base import Recipe, lookup

    made = lookup(name)()
    values = made.values()
    lr, aux = values.get("lr"), getattr(made, "aux", None)
    if not isinstance(lr, float | int) or not lr > 0:
        raise BenchError(f"{name} has the default learning rate {lr}; a grid needs one above 0")
    if values.get("damping"):
        damping = float(values["damping"])
        return Space(
            float(lr),
            "damping",
            damping,
            tuple(damping * factor for factor in DAMPING_FACTORS),
            kl_clip=values.get("kl_clip"),
        )
    if isinstance(aux, Recipe) and "lr" in aux.values():
        default = float(aux.values()["lr"])
        return Space(float(lr), "aux.lr", default, tuple(default * factor for factor in AUX_FACTORS))
    if "weight_decay" not in values:
        raise BenchError(f"{name} has neither an auxiliary learning rate nor a weight_decay to tune")
    default = float(values["weight_decay"])
    return Space(float(lr), "weight_decay", default, tuple(d for d in DECAYS if d != default)[-4:])


@dataclass
class Trials:
    """The points tried for one optimizer and the scores they got; lower is better, ``inf`` is diverged.

    Example:
        >>> trials = Trials(Space(1e-3, "weight_decay", 0.01, (0.0, 0.1)))
        >>> trials.scores = {(1e-3, 0.01): {0: 2.0, 1: 2.2}, (2e-3, 0.01): {0: 1.9, 1: 2.0}}
        >>> trials.best, trials.edge, trials.next()
        ((0.002, 0.01), 'high end of lr', (0.004, 0.01))
    """

    space: Space
    scores: dict[Point, dict[int, float]] = field(default_factory=dict)

    def means(self) -> dict[Point, float]:
        """Mean score by point, ascending."""
        return {point: statistics.fmean(self.scores[point].values()) for point in sorted(self.scores)}

    @property
    def best(self) -> Point:
        """The point with the smallest mean score; of equals the one with the smallest learning rate."""
        means = self.means()
        return min(means, key=lambda point: means[point])

    @property
    def hyper(self) -> dict[str, Any]:
        """The hyperparameters of the best point."""
        return self.space.hyper(self.best)

    @property
    def edge(self) -> str:
        """At which end of its grid the best point sits; empty where it is bracketed."""
        rates, knobs = self._rates(), self._knobs()
        lr, knob = self.best
        if len(rates) > 1 and lr in (rates[0], rates[-1]):
            return f"{'low' if lr == rates[0] else 'high'} end of lr"
        if len(knobs) > 1 and knob == knobs[-1]:
            return f"high end of {self.space.knob}"
        if len(knobs) > 1 and knob == knobs[0] != 0:  # zero is a bound of nature and no edge
            return f"low end of {self.space.knob}"
        return ""

    def _rates(self) -> list[float]:
        """The learning rates tried at the best knob."""
        return sorted(lr for lr, knob in self.scores if knob == self.best[1])

    def _knobs(self) -> list[float]:
        return sorted({knob for _, knob in self.scores})

    def neighbours(self) -> list[Point]:
        """Two learning rates around the best point that were not tried yet."""
        lr, knob = self.best
        far = [lr / SPACING, lr * SPACING]
        near = [lr / math.sqrt(SPACING), lr * math.sqrt(SPACING)]
        known = self._rates()
        return [(b if any(math.isclose(a, x) for x in known) else a, knob) for a, b in zip(far, near, strict=True)]

    def next(self) -> Point:
        """The point that an extension adds."""
        lr, knob = self.best
        step = {"low": 1 / SPACING, "high": SPACING, "": 1.0}[self.edge.partition(" ")[0]]
        if self.edge.endswith("end of lr"):
            return lr * step, knob
        if self.edge:
            return lr, knob * step
        rates, means = self._rates(), self.means()
        place = rates.index(lr)
        near = [rates[i] for i in (place - 1, place + 1) if 0 <= i < len(rates)]
        return math.sqrt(lr * min(near, key=lambda rate: means[rate, knob])), knob


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
        return OptimizerSpec(name, trials.hyper), Budget("tuned", len(trials.scores), self.seeds, trials.edge, key)

    def save(self, path: Path) -> None:
        """Write the file, atomically."""
        rules = {
            "learning rates": f"documented default x {FACTORS}, a kl_clip x the squares",
            "knob": f"damping: default x {DAMPING_FACTORS}; else aux.lr: default x {AUX_FACTORS}; else weight_decay: "
            f"four of {DECAYS}",
            "then": "two learning rates around the best pair",
            "extensions": f"at most {EXTENSIONS}: one more trial for each while any best is at an end of its grid",
            "other hyperparameters": "documented defaults",
            "selection": "smallest mean final metric over the seeds; scores are 1 / metric where it is maximised",
        }
        optimizers = {
            name: {
                "chosen": trials.hyper,
                "edge": trials.edge,
                "space": {
                    "lr": trials.space.lr,
                    "knob": trials.space.knob,
                    "default": trials.space.default,
                    "values": trials.space.values,
                    "kl_clip": trials.space.kl_clip,
                    "steps": trials.space.steps,
                    "fixed": dict(trials.space.fixed),
                },
                "trials": [
                    {"lr": lr, "knob": knob, "mean": trials.means()[lr, knob], "scores": dict(scores)}
                    for (lr, knob), scores in sorted(trials.scores.items())
                ],
            }
            for name, trials in self.optimizers.items()
        }
        head = {"format": FORMAT, "kind": "tuning", "problem": self.problem, "steps": self.steps, "metric": self.metric}
        more = {"goal": self.goal, "data": self.data, "seeds": self.seeds, "rules": rules}
        write_json(path, head | more | self.facts | {"optimizers": optimizers})

    @classmethod
    def load(cls, path: Path) -> Tuning:
        """Read a tuning file.

        Raises:
            BenchError: Missing, damaged, or not a tuning.
        """
        data = read_json(path)
        try:
            optimizers = {name: _read_trials(entry) for name, entry in data["optimizers"].items()}
            known = {"format", "kind", "problem", "steps", "metric", "goal", "data", "seeds", "rules", "optimizers"}
            facts = {key: value for key, value in data.items() if key not in known}
            head = (str(data["problem"]), int(data["steps"]), str(data["metric"]), data["goal"], str(data["data"]))
            return cls(*head, tuple(data["seeds"]), optimizers, facts)
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            what = f"{type(error).__name__}: {error}"
            raise BenchError(f"{path}: damaged or no tuning ({what}); make one with guided-descent tune") from None


def _read_trials(entry: Mapping[str, Any]) -> Trials:
    space = entry["space"]
    more = {key: space[key] for key in ("kl_clip", "steps", "fixed") if key in space}
    trials = Trials(Space(space["lr"], space["knob"], space["default"], tuple(space["values"]), **more))
    for trial in entry["trials"]:
        scores = {int(seed): math.inf if value is None else float(value) for seed, value in trial["scores"].items()}
        if not scores:
            raise ValueError("a trial without scores")
        trials.scores[float(trial["lr"]), float(trial["knob"])] = scores
    if not trials.scores:
        raise ValueError("an optimizer without trials")
    return trials


def committed(problem: str, steps: int) -> Path:
    """Where the tuning that comes with the package lies, if there is one for this workload and length."""
    return FOLDER / f"{slug(problem)}-{steps}.json"


def stages(found: Mapping[str, Trials]) -> Iterator[dict[str, list[Point]]]:
    """The points to try next for every optimizer, equally many for each; read after the ones before were scored."""
    yield {name: [(t.space.lr * factor, t.space.default) for factor in FACTORS] for name, t in found.items()}
    yield {name: [(t.best[0], value) for value in t.space.values] for name, t in found.items()}
    yield {name: t.neighbours() for name, t in found.items()}
    for _ in range(EXTENSIONS):
        if any(t.edge for t in found.values()):
            yield {name: [t.next()] for name, t in found.items()}


def tune(
    problem: str,
    spaces: Mapping[str, Space],
    *,
    steps: int,
    out: str | os.PathLike[str],
    seeds: Sequence[int] = SEEDS,
    workers: int = 2,
    build: BuildOptimizer = build_optimizer,
    display: Display | None = None,
    options: Mapping[str, Any] | None = None,
    facts: Mapping[str, Any] | None = None,
) -> Tuning:
    """Tune every optimizer on one problem with the same budget; finished trials in ``out`` are not run again.

    Args:
        problem: A workload or ``package.module:function``.
        spaces: What to search by optimizer, see ``space_of``.
        steps: Length of every trial whose space has none of its own.
        out: Folder of the trials; the result is saved there as ``tuning.json``.
        seeds: Seeds of every trial.
        workers: Worker processes; 0 runs in this process.
        build: Makes an optimizer from model and spec; importable by name.
        display: Shows progress.
        options: Passed on to ``runner.train``.
        facts: Recorded in the result: the command and whatever else should stand there.

    Raises:
        BenchError: No optimizer, no seed, spaces of different sizes, or what a run raises.
    """
    if not spaces or not seeds:
        raise BenchError("tuning needs at least one optimizer and one seed")
    if len({len(space.values) for space in spaces.values()}) > 1:
        raise BenchError("the spaces have different numbers of knob values; budgets must be equal")
    found = {name: Trials(space) for name, space in spaces.items()}
    record: RunConfig | None = None
    for stage in stages(found):
        todo = [(name, point, seed) for seed in seeds for name, points in stage.items() for point in points]
        jobs = []
        for name, point, seed in todo:
            hyper = spaces[name].hyper(point)
            spec = OptimizerSpec(name, hyper, f"{name} {format_hyper(hyper)}")
            length = spaces[name].steps or steps
            kwargs = {"seed": seed, "steps": length, "out": str(out), "build_optimizer": build, **(options or {})}
            jobs.append(Job(f"{spec.label}, seed {seed}", length, train_run, (problem, spec), kwargs))
        for (name, point, seed), run in zip(todo, run_jobs(jobs, workers, display), strict=True):
            record = run.config
            result = score(run.result.final if run.result else None, record.goal)
            found[name].scores.setdefault(point, {})[seed] = result
    assert record is not None
    about = {
        **(facts or {}),
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "machine": record.machine,
        "versions": record.versions,
        "git": record.git,
    }
    tuning = Tuning(problem, steps, record.metric, record.goal, record.data, tuple(seeds), found, about)
    tuning.save(Path(out) / "tuning.json")
    return tuning
