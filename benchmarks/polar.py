"""CPU seconds and orthogonality of ``linalg.polar`` against the Newton-Schulz of ``torch.optim.Muon``.

Contestants alternate in one process on one thread, on the matrices of a GPT: for each width d and layer four d × d
(query, key, value, output), one 4d × d and one d × 4d (the MLP). Three spectra: Gaussian (random gradients), and power
laws k^-0.5 and k^-1, which bracket the momentum matrices of a small transformer trained on source code (‖X‖_F / ‖X‖₂
between 1.0 and 2.9). Torch runs its own settings: bfloat16, five steps of (3.4445, -4.7750, 2.0315), eps 1e-7.

    python benchmarks/polar.py [--rounds 9] [--out benchmarks/results/polar.json]
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.optim._muon import _zeropower_via_newtonschulz

from guided_descent.linalg import Workspace, polar

JORDAN = (3.4445, -4.7750, 2.0315)
SETS = {512: 6, 768: 4}  # width: layers
SPECTRA: dict[str, float | None] = {"gaussian": None, "k^-0.5": 0.5, "k^-1": 1.0}
CONTESTANTS = ("torch", "fast", "adaptive", "polar_express", "jordan")


def matrix(m: int, n: int, power: float | None, seed: int) -> Tensor:
    g = torch.randn(m, n, generator=torch.Generator().manual_seed(seed))
    if power is None:
        return g
    u, s, vh = torch.linalg.svd(g, full_matrices=False)
    return (u * torch.arange(1, len(s) + 1) ** -power) @ vh


def quality(u: Tensor, exact: Tensor) -> dict[str, float]:
    s = torch.linalg.svdvals(u.double())
    return {
        "error": float((s.square() - 1).square().mean().sqrt()),
        "smallest": float(s.min()),
        "largest": float(s.max()),
        "distance": float((u.double() - exact).norm() / exact.norm()),
    }


def contestant(name: str, work: Workspace) -> Callable[[Tensor, Tensor], Tensor]:
    if name == "torch":
        return lambda x, out: out.copy_(_zeropower_via_newtonschulz(x, JORDAN, 5, 1e-7))
    return lambda x, out: polar(x, coefficients=name, out=out, work=work)


def measure(width: int, layers: int, spectrum: str, rounds: int) -> dict[str, Any]:
    """One layer is timed and stands for all of them: they are alike."""
    shapes = [(width, width)] * 4 + [(4 * width, width), (width, 4 * width)]
    inputs = [matrix(m, n, SPECTRA[spectrum], seed) for seed, (m, n) in enumerate(shapes)]
    outs = [torch.empty_like(x) for x in inputs]
    work = Workspace()
    runs = {name: contestant(name, work) for name in CONTESTANTS}
    checks = (0, 4)
    exact = {i: polar(inputs[i], coefficients="exact").double() for i in checks}
    result: dict[str, Any] = {"width": width, "layers": layers, "spectrum": spectrum, "quality": {}}
    for name, run in runs.items():  # the warm-up, and the quality
        for x, out in zip(inputs, outs):
            run(x, out)
        result["quality"][name] = {f"{shapes[i][0]}x{shapes[i][1]}": quality(outs[i], exact[i]) for i in checks}
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(rounds):
        for name, run in runs.items():
            start = time.process_time()
            for x, out in zip(inputs, outs):
                run(x, out)
            seconds[name].append(time.process_time() - start)
    result["ms_per_step"] = {name: 1e3 * layers * statistics.median(v) for name, v in seconds.items()}
    ratios = {name: [a / b for a, b in zip(v, seconds["torch"])] for name, v in seconds.items() if name != "torch"}
    result["ratio"] = {
        name: {"median": statistics.median(v), "low": min(v), "high": max(v)} for name, v in ratios.items()
    }
    result["scratch_mb"] = work.nbytes / 2**20
    return result


def machine() -> dict[str, Any]:
    cpu = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists():
        names = [
            line.split(":", 1)[1].strip() for line in info.read_text().splitlines() if line.startswith("model name")
        ]
        cpu = names[0] if names else cpu
    return {"cpu": cpu, "threads": 1, "torch": torch.__version__, "load": os.getloadavg()[0]}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "polar.json")
    args = parser.parse_args()
    torch.set_num_threads(1)
    results = []
    for width, layers in SETS.items():
        for spectrum in SPECTRA:
            r = measure(width, layers, spectrum, args.rounds)
            results.append(r)
            torch_ms = r["ms_per_step"]["torch"]
            print(f"\nd = {width}, {layers} layers, spectrum {spectrum}: torch {torch_ms:.0f} ms per step")
            for name in CONTESTANTS:
                speed = r["ratio"].get(name)
                text = f"{speed['median']:.3f} [{speed['low']:.3f}, {speed['high']:.3f}]" if speed else "1"
                print(f"  {name:<14} {text:<22}", end="")
                for shape, q in r["quality"][name].items():
                    values = f"[{q['smallest']:.3f}, {q['largest']:.3f}]"
                    print(f" {shape:>9}: error {q['error']:.3f} values {values} off exact {q['distance']:.3f}", end="")
                print(flush=True)
    command = " ".join(["python", "benchmarks/polar.py", *sys.argv[1:]])
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps({"command": command, "machine": machine(), "results": results}, indent=1) + "\n")


if __name__ == "__main__":
    main()
