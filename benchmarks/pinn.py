"""Second-order methods on a physics-informed network: what each needs to bring the relative error to 5e-3.

    python benchmarks/pinn.py                                       # all methods, seed 0, writes results/pinn.json
    python benchmarks/pinn.py --methods gauss_newton --seeds 3

The workload is ``pinn-burgers`` (3,297 parameters, 2,200 residuals, float64, full batch) from the same weights for
every method. The clock is the CPU time of this process on one thread, around the steps alone: the error is measured
after every step and is not in it. A run ends at the target or at the budget. Evaluations count the loss with or
without gradient, products count J v and J' w, Jacobians are the workload's own, about five gradients each. The
hyperparameters are the defaults but for what the table names.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from guided_descent.bench import environment
from guided_descent.bench.burgers import relative_error
from guided_descent.bench.problem import Problem, load_problem
from guided_descent.solvers import LBFGS, GaussNewton, HessianFree, LevenbergMarquardt, Solver

RESULTS = Path(__file__).parent / "results" / "pinn.json"
TARGET = 5e-3
COUNTS = ("evaluations", "gradients", "products", "jacobians")
#: Evaluations within which each of ours has to reach the target: the measured number with room for another machine.
BARS = {"gauss_newton": 2000, "levenberg_marquardt": 500, "hessian_free": 1000, "lbfgs": 15000}
#: L-BFGS: absolute tolerances would end it at losses around 1e-5.
EXACT: dict[str, Any] = {"tolerance_grad": 0.0, "tolerance_change": 0.0, "history_size": 50}
METHODS: dict[str, tuple[Callable[[nn.Module], torch.optim.Optimizer], dict[str, Any]]] = {
    "levenberg_marquardt": (LevenbergMarquardt, {}),
    "gauss_newton": (GaussNewton, {}),
    "lbfgs": (LBFGS, EXACT),
    "hessian_free": (HessianFree, {}),
    "torch.optim.LBFGS": (
        lambda model, **options: torch.optim.LBFGS(model.parameters(), line_search_fn="strong_wolfe", **options),
        EXACT,
    ),
}


def closure_for(optimizer: torch.optim.Optimizer, problem: Problem) -> Callable[[], Tensor]:
    """The loss and its gradient for an optimizer of torch."""

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = problem.loss(problem.model, None)
        loss.backward()
        return loss

    return closure


def run(name: str, seed: int, budget: float) -> dict[str, Any]:
    """Train until the target or the budget; the curve has one point per step."""
    problem = load_problem("pinn-burgers", seed)
    make, options = METHODS[name]
    optimizer = make(problem.model, **options)  # type: ignore[call-arg]
    objective = problem.objective(None) if isinstance(optimizer, Solver) else closure_for(optimizer, problem)
    curve: list[dict[str, float]] = []
    seconds, said = 0.0, 0.0
    while True:
        began = time.process_time()
        loss = float(optimizer.step(objective).detach())
        seconds += time.process_time() - began
        point = {"step": len(curve) + 1, "seconds": seconds, "loss": loss, "error": relative_error(problem.model)}
        point |= counts(optimizer)
        curve.append(point)
        done = point["error"] <= TARGET
        if done or seconds > budget or seconds - said > 20:
            said = seconds
            print(f"{name}, seed {seed}: step {point['step']}, {seconds:.0f} s, error {point['error']:.2e}", flush=True)
        if done or seconds > budget:
            keep = max(1, len(curve) // 200)
            return {"seed": seed, "reached": done, **point, "curve": [*curve[::keep], point]}


def counts(optimizer: torch.optim.Optimizer) -> dict[str, int]:
    """Evaluations, gradients, products and Jacobians so far."""
    if isinstance(optimizer, Solver):
        return {name: getattr(optimizer, name) for name in COUNTS}
    evaluations = next(iter(optimizer.state.values()))["func_evals"]
    return {"evaluations": evaluations, "gradients": evaluations, "products": 0, "jacobians": 0}


def table(methods: dict[str, Any]) -> str:
    """The medians over the seeds."""
    head = f"{'method':<20} {'reached':>8} {'error':>9} {'steps':>6} " + " ".join(f"{c:>11}" for c in COUNTS)
    lines = [f"{head} {'CPU s':>7} {'s / evaluation':>15}"]
    for name, method in methods.items():
        runs = method["runs"]
        middle = {key: statistics.median(r[key] for r in runs) for key in ("error", "step", "seconds", *COUNTS)}
        reached = f"{sum(r['reached'] for r in runs)}/{len(runs)}"
        line = f"{name:<20} {reached:>8} {middle['error']:>9.2e} {middle['step']:>6.0f} "
        line += " ".join(f"{middle[c]:>11.0f}" for c in COUNTS)
        lines.append(f"{line} {middle['seconds']:>7.0f} {middle['seconds'] / middle['evaluations']:>15.3f}")
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--budget", type=float, default=600.0, help="CPU seconds of a run")
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args()
    torch.set_num_threads(1)
    methods: dict[str, Any] = {}
    document: dict[str, Any] = {
        "target": TARGET,
        "bars": BARS,
        "budget": options.budget,
        "machine": environment.machine(),
        "versions": environment.versions(),
        "git": environment.git_commit(),
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": "python " + " ".join(sys.argv),
        "methods": methods,
    }
    for name in options.methods:
        runs = [run(name, seed, options.budget) for seed in range(options.seeds)]
        bar = BARS.get(name)
        met = None if bar is None else all(r["reached"] and r["evaluations"] <= bar for r in runs)
        methods[name] = {"options": METHODS[name][1], "bar_met": met, "runs": runs}
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(json.dumps(document, indent=1) + "\n")
    print(table(methods))
    missed = [name for name, method in methods.items() if method["bar_met"] is False]
    for name in missed:
        print(f"{name} did not reach {TARGET:g} within {BARS[name]} evaluations")
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
