"""Which form of the damping serves K-FAC best, at equal tuning? Factored with pi, exact, and EKFAC's exact scales.

    python benchmarks/damping_form.py                  # writes results/damping_form.json, about three minutes

Each form is searched by itself with the rule of ``guided_descent.bench.tuning`` (12 trials, one or two more where its
best lies at an end) on the seeds 0 and 1, and compared on ten others. It decides the default of ``KFAC.damping_form``.
"""

from __future__ import annotations

import argparse
import json
import platform
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from guided_descent.bench.pool import Job, run_jobs, train_run
from guided_descent.bench.scoring import t_interval
from guided_descent.bench.tuning import space_of, tune

RESULTS = Path(__file__).parent / "results" / "damping_form.json"
PROBLEMS = {"mlp-digits": 300, "mnist1d": 400}
FORMS: dict[str, tuple[str, dict[str, Any]]] = {
    "kfac, pi": ("kfac", {}),
    "kfac, exact": ("kfac", {"damping_form": "eigenbasis", "refresh_method": "eigh"}),
    "ekfac": ("ekfac", {}),
}
SEEDS = range(100, 110)


def compare(problem: str, steps: int, form: str, out: Path, workers: int) -> dict[str, Any]:
    """Search one form on one workload and run it on fresh seeds."""
    name, fixed = FORMS[form]
    options = {"eval_every": steps, "checkpoint_every": 0}
    folder = out / problem / form.replace(", ", "-")
    space = replace(space_of(name), fixed=fixed)
    tuning = tune(problem, {name: space}, steps=steps, out=folder / "tuning", workers=workers, options=options)
    spec, budget = tuning.spec(name)
    jobs = []
    for seed in SEEDS:
        kwargs = {"seed": seed, "steps": steps, "out": str(folder / "runs"), **options}
        jobs.append(Job(f"{form}, seed {seed}", steps, train_run, (problem, spec), kwargs))
    finals = [run.result.final for run in run_jobs(jobs, workers, None)]
    mean, low, high = t_interval(finals)
    print(f"{problem:<12}{form:<14}{mean:.4f} ({low:.4f} to {high:.4f})  {dict(spec.hyper)}", flush=True)
    return {
        "problem": problem,
        "form": form,
        "steps": steps,
        "hyper": dict(spec.hyper),
        "trials": budget.trials,
        "edge": budget.edge,
        "finals": finals,
        "mean": mean,
        "interval": [low, high],
    }


def main() -> None:
    """Compare all forms on all workloads."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=Path, default=Path("runs/damping-form"), help="finished runs are kept here")
    parser.add_argument("--workers", type=int, default=2)
    options = parser.parse_args()
    torch.set_num_threads(1)
    rows = [
        compare(problem, steps, form, options.runs, options.workers)
        for problem, steps in PROBLEMS.items()
        for form in FORMS
    ]
    document = {
        "format": 1,
        "command": "python benchmarks/damping_form.py",
        "metric": "final test log-loss in nats, seeds 100 to 109, with 95 % intervals",
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "machine": platform.machine(),
        "torch": torch.__version__,
        "rows": rows,
    }
    RESULTS.write_text(json.dumps(document, indent=1) + "\n")


if __name__ == "__main__":
    main()
