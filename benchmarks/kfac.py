"""What curvature costs: a training step with a recipe that reads layers, against forward and backward alone.

    python benchmarks/kfac.py                         # writes results/kfac.json

The autoencoder 784-1000-500-250-30 (batch 256), a byte GPT of 2 layers and width 256 (16 x 64 tokens), and one linear
layer of width 512 (batch 512) for every structure of SINGD. Process CPU milliseconds on one thread. Every round times,
in turn, plain steps (forward, backward and nothing else) and whole steps with each recipe, over whole refresh periods.
Added: what the whole step costs beyond the plain one, as a share of it. Capture: the part of that which is spent in
forward and backward. Tail: the 99th percentile over the mean of single steps, of the optimizer alone and of the whole
step; its bound is 1 + the longest factorisation over the mean step of the optimizer, and at least 1.3. Python's
garbage collector is off. Skipped: the share of refreshes that were due and found nothing drifted.
"""

from __future__ import annotations

import argparse
import gc
import itertools
import json
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import guided_descent as gd
from guided_descent.bench.models import ByteGPT
from guided_descent.parts.geometry.singd import STRUCTURES
from step_time import largest_task, percentile

RESULTS = Path(__file__).parent / "results" / "kfac.json"
Task = tuple[nn.Module, Callable[[nn.Module], Tensor], str]
#: Recipes, with what differs from their defaults.
EXACT = {"damping_form": "eigenbasis", "refresh_method": "eigh"}
RECIPES: dict[str, tuple[str, dict[str, Any]]] = {
    "kfac": ("kfac", {}),
    "kfac, bfloat16": ("kfac", {"product_dtype": "bfloat16"}),
    "kfac, all at once": ("kfac", {"refresh_schedule": "every"}),
    "kfac, background": ("kfac", {"refresh_lag": 5}),
    "kfac, drift .1": ("kfac", {"refresh_tolerance": 0.1}),
    "kfac, exact": ("kfac", EXACT),
    "kfac, exact, at once": ("kfac", EXACT | {"refresh_schedule": "every"}),
    "kfac, exact, background": ("kfac", EXACT | {"refresh_lag": 5}),
    "ekfac": ("ekfac", {}),
    "foof": ("foof", {}),
    "singd": ("singd", {}),
    "singd, every 5": ("singd", {"factor_frequency": 5}),
    "singd, every 5, in turns": ("singd", {"factor_frequency": 5, "factor_schedule": "staggered"}),
    "adamw": ("adamw", {}),
}
#: The structures of SINGD, on one layer.
SINGD = {f"singd, {name}": ("singd", {"structure": name}) for name in STRUCTURES}


def autoencoder() -> Task:
    """The deep autoencoder, on noise: its cost does not depend on the data."""
    torch.manual_seed(0)
    widths = [784, 1000, 500, 250, 30, 250, 500, 1000, 784]
    layers: list[nn.Module] = []
    for i, (n, m) in enumerate(itertools.pairwise(widths)):
        layers += [nn.Linear(n, m), nn.Identity() if i == 3 else nn.Sigmoid() if i == 7 else nn.Tanh()]
    x = torch.rand(256, 784)
    return nn.Sequential(*layers), lambda model: F.mse_loss(model(x), x, reduction="sum") / len(x), "sum_mse"


def gpt() -> Task:
    """A byte GPT."""
    torch.manual_seed(0)
    tokens = torch.randint(0, 256, (16, 65))
    model = ByteGPT(d=256, layers=2, heads=4, context=64)
    return (
        model,
        lambda model: F.cross_entropy(model(tokens[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten()),
        "cross_entropy",
    )


def linear() -> Task:
    """One layer of width 512."""
    torch.manual_seed(0)
    x, y = torch.randn(512, 512), torch.randn(512, 512)
    # the last layer goes to the auxiliary recipe: it is small
    model = nn.Sequential(nn.Linear(512, 512), nn.Tanh(), nn.Linear(512, 8))
    return model, lambda model: F.mse_loss(model(x), y[:, :8]), "mse"


TASKS: dict[str, Callable[[], Task]] = {"autoencoder": autoencoder, "gpt-2x256": gpt, "linear-512": linear}


class Arm:
    """One model with one optimizer, or with none."""

    def __init__(self, task: Callable[[], Task], recipe: str = "", options: dict[str, Any] | None = None) -> None:
        self.model, self.loss, loss = task()
        self.opt = None
        if recipe:
            reads = gd.recipes.lookup(recipe).reads_layers
            self.opt = gd.optimizer(recipe, self.model, lr=1e-4, **({"loss": loss} if reads else {}), **(options or {}))
        self.passes: list[float] = []
        self.steps: list[float] = []

    def run(self, steps: int) -> None:
        """Train, and keep the CPU seconds of the passes and of the optimizer."""
        for _ in range(steps):
            start = time.process_time()
            self.model.zero_grad()
            self.loss(self.model).backward()
            middle = time.process_time()
            if self.opt is not None:
                self.opt.step()
            self.passes.append(middle - start)
            self.steps.append(time.process_time() - middle)


def _share(row: dict[str, Any]) -> str:
    """The share of refreshes that were skipped."""
    tried = row["refreshes"] + row["skipped_refreshes"]
    return f"{row['skipped_refreshes'] / tried:.0%} of {tried} refreshes" if tried else ""


def tail(values: list[float]) -> float:
    """99th percentile over the mean."""
    return percentile(values, 0.99) / statistics.mean(values)


def run(name: str, rounds: int, block: int) -> list[dict[str, Any]]:
    """Time every recipe on one model."""
    plain = Arm(TASKS[name])
    chosen = RECIPES if name != "linear-512" else SINGD | {k: RECIPES[k] for k in ("kfac", "kfac, exact", "adamw")}
    arms = {label: Arm(TASKS[name], recipe, options) for label, (recipe, options) in chosen.items()}
    for arm in (plain, *arms.values()):
        arm.run(block + 1)
        arm.passes.clear()
        arm.steps.clear()
    gc.collect()
    gc.disable()
    for _ in range(rounds):
        for arm in (plain, *arms.values()):
            arm.run(block)
    gc.enable()
    base = statistics.mean(plain.passes)
    rows = []
    for label, arm in arms.items():
        whole = [a + b for a, b in zip(arm.passes, arm.steps, strict=True)]
        assert arm.opt is not None
        counts = arm.opt.audit().values()
        rows.append(
            {
                "recipe": label,
                "forward_backward_ms": 1e3 * base,
                "step_ms": 1e3 * statistics.mean(arm.steps),
                "capture_ms": 1e3 * (statistics.mean(arm.passes) - base),
                "added_share": (statistics.mean(whole) - base) / base,
                "optimizer_tail": tail(arm.steps),
                "tail_bound": max(1.3, 1 + largest_task(arm.opt) / statistics.mean(arm.steps)),
                "whole_tail": tail(whole),
                "plain_tail": tail(plain.passes),
                "refreshes": sum(c.get("refreshes", 0) for c in counts),
                "skipped_refreshes": sum(c.get("skipped_refreshes", 0) for c in counts),
                "state_bytes": arm.opt.state_bytes(),
            }
        )
    return rows


def main() -> None:
    """Run, print and write JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tasks", nargs="*", default=list(TASKS), choices=list(TASKS))
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument("--block", type=int, default=20)
    options = parser.parse_args()
    torch.set_num_threads(1)
    results = {}
    for name in options.tasks:
        results[name] = rows = run(name, options.rounds, options.block)
        print(f"\n{name}: forward and backward {rows[0]['forward_backward_ms']:.1f} ms")
        heads = f"{'step ms':>9}{'capture ms':>12}{'added':>8}{'p99/mean: step':>16}{'bound':>7}{'whole':>7}  skipped"
        print(f"  {'':<26}{heads}")
        for row in rows:
            print(
                f"  {row['recipe']:<26}{row['step_ms']:>9.1f}{row['capture_ms']:>12.1f}{row['added_share']:>8.0%}"
                f"{row['optimizer_tail']:>16.2f}{row['tail_bound']:>7.2f}{row['whole_tail']:>7.2f}  {_share(row)}"
            )
    RESULTS.write_text(
        json.dumps(
            {
                "format": 1,
                "command": " ".join(["python benchmarks/kfac.py", *sys.argv[1:]]),
                "unit": "process CPU milliseconds, one thread, mean over whole refresh periods",
                "date": datetime.now(UTC).isoformat(timespec="seconds"),
                "machine": f"{platform.machine()}, {os.cpu_count()} cores",
                "load_average": os.getloadavg(),
                "torch": torch.__version__,
                "results": results,
            },
            indent=1,
        )
        + "\n"
    )


if __name__ == "__main__":
    main()
