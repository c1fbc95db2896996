"""Does one stable run serve several horizons? Branches of a warmup-stable-decay run beside full runs of their own.

    python benchmarks/branching.py     # writes results/branching.json, about half an hour on one core

AdamW on ``lm-source``. One trunk with a constant rate is saved where each horizon's cooldown begins, and ``branch``
continues from there. Beside each branch stand full runs of its length with the same seed: one with the same schedule
from the first step, and one with a cosine to zero. The difference of final metrics is paired by seed; the noise is the
standard deviation over seeds of the full runs. The saving is in optimizer steps, of the trunk and all branches against
one full run for each horizon.
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import platform
import shlex
import statistics
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

import guided_descent as gd
from guided_descent import schedules
from guided_descent.bench.files import to_json
from guided_descent.bench.problem import Problem, load_problem
from guided_descent.bench.scoring import paired_difference
from guided_descent.schedules import Schedule

RESULTS = Path(__file__).parent / "results" / "branching.json"


@dataclass(frozen=True)
class Plan:
    """What is run.

    Attributes:
        problem: A workload.
        horizons: Lengths of the runs, in steps.
        seeds: One trunk, its branches and the full runs for each.
        lr: The peak learning rate of AdamW with betas (0.9, 0.99) and weight decay 0.1.
        warmup: Steps of the warmup, the same for all.
        cooldown: The cooldown's share of each run.
    """

    problem: str = "lm-source"
    horizons: tuple[int, ...] = (300, 600, 1200)
    seeds: tuple[int, ...] = (0, 1, 2)
    lr: float = 3e-3
    warmup: int = 30
    cooldown: float = 0.2

    def __post_init__(self) -> None:
        if min(self.starts().values()) < self.warmup:
            raise SystemExit(
                f"horizons={self.horizons}: a cooldown would begin within the warmup of {self.warmup} steps"
            )

    def starts(self) -> dict[int, int]:
        """The step at which the cooldown of each horizon begins."""
        return {total: total - schedules.curves.steps_of("cooldown", self.cooldown, total) for total in self.horizons}

    def steps(self) -> dict[str, float]:
        """Optimizer steps of the trunk with its branches, of full runs, and the share that is saved."""
        starts = self.starts()
        branched = max(starts.values()) + sum(total - start for total, start in starts.items())
        return {"branched": branched, "full": sum(self.horizons), "saving": 1 - branched / sum(self.horizons)}


class Run:
    """One model with its optimizer and schedule, on batches that are a function of the step."""

    def __init__(self, plan: Plan, seed: int, schedule: Callable[[gd.Optimizer], Schedule]) -> None:
        self.problem: Problem = load_problem(plan.problem, seed)
        self.opt = gd.AdamW(self.problem.model, lr=plan.lr, betas=(0.9, 0.99), weight_decay=0.1, seed=seed)
        self.schedule = schedule(self.opt)

    def advance(self, to: int) -> None:
        """Train until this step."""
        for step in range(self.opt.steps, to):
            self.opt.zero_grad()
            self.problem.loss(self.problem.model, self.problem.batch(step)).backward()
            self.opt.step()
            self.schedule.step()

    def save(self) -> dict[str, Any]:
        """A checkpoint, as copies."""
        held = {"model": self.problem.model, "optimizer": self.opt, "schedule": self.schedule}
        return copy.deepcopy({name: each.state_dict() for name, each in held.items()})

    def final(self) -> float:
        """The metric at the end of the schedule, which must have come."""
        self.schedule.finish()
        assert self.problem.evaluate is not None
        self.problem.model.eval()
        with torch.no_grad():
            return self.problem.evaluate(self.problem.model)[self.problem.metric]


def branch(plan: Plan, seed: int, saved: Mapping[str, Any], total: int) -> Run:
    """Continue a checkpoint of the trunk to a horizon."""

    def continued(opt: gd.Optimizer) -> Schedule:
        opt.load_state_dict(saved["optimizer"])
        return schedules.branch(opt, saved["schedule"], total, cooldown=plan.cooldown)

    run = Run(plan, seed, continued)
    run.problem.model.load_state_dict(saved["model"])
    run.advance(total)
    return run


def full(plan: Plan, seed: int, total: int, schedule: str) -> Run:
    """A run of this length from its first step."""
    more = {"cooldown": plan.cooldown} if schedule == "wsd" else {}
    make = getattr(schedules, schedule)
    run = Run(plan, seed, lambda opt: make(opt, total, warmup=plan.warmup, **more))
    run.advance(total)
    return run


def one_seed(plan: Plan, seed: int) -> dict[int, dict[str, Any]]:
    """The trunk of a seed, its branches and the full runs beside them, by horizon."""
    trunk = Run(plan, seed, lambda opt: schedules.constant(opt, warmup=plan.warmup))
    saved = {}
    for total, start in sorted(plan.starts().items(), key=lambda item: item[1]):
        trunk.advance(start)
        saved[total] = trunk.save()
    found = {}
    for total in plan.horizons:
        continued, own = branch(plan, seed, saved[total], total), full(plan, seed, total, "wsd")
        pairs = zip(continued.problem.trainable(), own.problem.trainable(), strict=True)
        found[total] = {
            "branch": continued.final(),
            "wsd": own.final(),
            "cosine": full(plan, seed, total, "cosine").final(),
            "same_weights": all(torch.equal(a, b) for a, b in pairs),
        }
        print(f"seed {seed}, {total} steps: {found[total]}", flush=True)
    return found


def study(plan: Plan) -> dict[str, Any]:
    """Everything, as the document that is written."""
    by_seed = {seed: one_seed(plan, seed) for seed in plan.seeds}
    rows = []
    for total in plan.horizons:
        runs = {seed: found[total] for seed, found in by_seed.items()}
        finals = {arm: {seed: run[arm] for seed, run in runs.items()} for arm in ("branch", "wsd", "cosine")}
        rows.append(
            {
                "horizon": total,
                "cooldown_from": plan.starts()[total],
                "finals": finals,
                "same_weights": all(run["same_weights"] for run in runs.values()),
                "noise_percent": _noise(list(finals["wsd"].values())),
                "to_wsd_percent": paired_difference(finals["branch"], finals["wsd"]).of("min"),
                "to_cosine_percent": paired_difference(finals["branch"], finals["cosine"]).of("min"),
            }
        )
    return {
        "format": 1,
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "machine": f"{platform.machine()}, {os.cpu_count()} cores",
        "torch": torch.__version__,
        "plan": asdict(plan),
        "steps": plan.steps(),
        "rows": rows,
    }


def _noise(finals: Sequence[float]) -> float | None:
    """Standard deviation over seeds, in percent of the mean."""
    return 100 * statistics.stdev(finals) / statistics.fmean(finals) if len(finals) > 1 else None


def main(arguments: Sequence[str] | None = None) -> None:
    """Run, print and write JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--problem", default=Plan.problem)
    parser.add_argument("--horizons", type=int, nargs="+", default=Plan.horizons)
    parser.add_argument("--seeds", type=int, nargs="+", default=Plan.seeds)
    parser.add_argument("--lr", type=float, default=Plan.lr)
    parser.add_argument("--warmup", type=int, default=Plan.warmup)
    parser.add_argument("--cooldown", type=float, default=Plan.cooldown)
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = vars(parser.parse_args(arguments))
    out = options.pop("out")
    torch.set_num_threads(1)
    plan = Plan(**options | {"horizons": tuple(options["horizons"]), "seeds": tuple(options["seeds"])})
    given = sys.argv[1:] if arguments is None else arguments
    document = {"command": shlex.join(["python", "benchmarks/branching.py", *given])} | study(plan)
    for row in document["rows"]:
        mean = {arm: statistics.fmean(finals.values()) for arm, finals in row["finals"].items()}
        noise = "unknown, one seed" if row["noise_percent"] is None else f"{row['noise_percent']:.2f} %"
        print(
            f"{row['horizon']:>6} steps: branch {mean['branch']:.4f}, own run {mean['wsd']:.4f} "
            f"({'the same weights' if row['same_weights'] else 'other weights'}; noise {noise}), "
            f"cosine {mean['cosine']:.4f} (branch {row['to_cosine_percent'][0]:+.2f} %)"
        )
    steps = document["steps"]
    print(f"steps: {steps['branched']} in place of {steps['full']}, {steps['saving']:.1%} saved")
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(to_json(document), indent=1) + "\n")


if __name__ == "__main__":
    main()
