"""Does state in 8 bits train as well as state in float32? Adam on ``lm-source``, 600 steps, three seeds.

    python benchmarks/eight_bit.py     # results/eight_bit.json

Both runs of a seed see the same model and data. The learning rate is linear to zero after 30 steps of warmup. The bound
is half a percent of the final validation bits per byte. Bytes are those of the state that is held.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

import guided_descent as gd
from guided_descent.bench.problem import load_problem

RESULTS = Path(__file__).parent / "results" / "eight_bit.json"
WARMUP, RATE = 30, 3e-3


def run(seed: int, steps: int, **options: Any) -> dict[str, Any]:
    """One run: final metric and bytes of state for each parameter."""
    problem = load_problem("lm-source", seed)
    opt = gd.Adam(problem.model, lr=RATE, betas=(0.9, 0.99), seed=seed, **options)
    curve = torch.optim.lr_scheduler.LambdaLR(
        opt, lambda step: min((step + 1) / WARMUP, max(steps - step, 0) / (steps - WARMUP))
    )
    for step in range(steps):
        opt.zero_grad()
        problem.loss(problem.model, problem.batch(step)).backward()
        opt.step()
        curve.step()
    assert problem.evaluate is not None
    with torch.no_grad():
        final = problem.evaluate(problem.model)[problem.metric]
    count = sum(p.numel() for p in problem.model.parameters())
    return {
        "seed": seed,
        "bits_per_byte": final,
        "state_bytes": opt.state_bytes(),
        "bytes_each": opt.state_bytes() / count,
    }


def main() -> None:
    """Run, print and write JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--seeds", type=int, nargs="*", default=[0, 1, 2])
    options = parser.parse_args()
    torch.set_num_threads(1)
    rows = []
    for seed in options.seeds:
        whole, small = run(seed, options.steps), run(seed, options.steps, state_dtype="8bit")
        change = small["bits_per_byte"] / whole["bits_per_byte"] - 1
        rows.append({"seed": seed, "float32": whole, "8bit": small, "change": change})
        print(
            f"seed {seed}: float32 {whole['bits_per_byte']:.4f} ({whole['bytes_each']:.2f} bytes each), "
            f"8 bits {small['bits_per_byte']:.4f} ({small['bytes_each']:.2f}), change {change:+.3%}",
            flush=True,
        )
    document = {
        "format": 1,
        "command": "python benchmarks/eight_bit.py",
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "machine": f"{platform.machine()}, {os.cpu_count()} cores",
        "torch": torch.__version__,
        "steps": options.steps,
        "mean_change": sum(row["change"] for row in rows) / len(rows),
        "rows": rows,
    }
    print(f"mean change {document['mean_change']:+.3%} (bound: 0.5 %)")
    RESULTS.write_text(json.dumps(document, indent=1) + "\n")


if __name__ == "__main__":
    main()
