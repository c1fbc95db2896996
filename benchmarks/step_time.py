"""Time one optimizer step against its peers: alternating, in one process, process CPU seconds on one thread.

    python benchmarks/step_time.py                      # every set and method, writes results/step_time.json
    python benchmarks/step_time.py --sets small --methods adamw --rounds 50

Sets: the parameters of a GPT of 6 layers and width 512, of one of 4 layers and width 768 (matrices alone for Muon; a
smaller one for SOAP), and 1,000 small tensors. Each round times every contestant once, in turn; a contestant is a
block of steps that covers whole refresh periods. The ratio is the median over rounds of ours / peer within the same
round.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import sys
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

import torch
from torch import nn

import guided_descent as gd

RESULTS = Path(__file__).parent / "results" / "step_time.json"


def gpt_shapes(layers: int, d: int, matrices: bool) -> list[tuple[int, ...]]:
    """Parameter shapes of a GPT: q, k, v, o and the MLP of each layer; with embedding, norms and biases unless told."""
    hidden: list[tuple[int, ...]] = [(d, d)] * 4 + [(4 * d, d), (d, 4 * d)]
    if matrices:
        return hidden * layers
    vectors: list[tuple[int, ...]] = [(d,)] * 4 + [(d,)] * 5 + [(4 * d,)]
    return [(256, d), (1024, d), *((hidden + vectors) * layers), (d,), (d,)]


SETS: dict[str, Callable[[bool], list[tuple[int, ...]]]] = {
    "gpt-6x512": lambda matrices: gpt_shapes(6, 512, matrices),
    "gpt-4x768": lambda matrices: gpt_shapes(4, 768, matrices),
    "gpt-2x256": lambda matrices: gpt_shapes(2, 256, matrices),
    "small-1000": lambda matrices: [(64, 16)] * 400 + [(32,)] * 400 + [(16, 16)] * 200,
}


@dataclass
class Contestant:
    """An optimizer on its own copy of the parameters."""

    name: str
    make: Callable[[list[nn.Parameter]], torch.optim.Optimizer]
    ours: bool = False


@dataclass
class Method:
    """A method with its contestants, the first one being the reference that ratios are printed against."""

    contestants: list[Contestant]
    matrices: bool = False
    block: int = 1
    sets: tuple[str, ...] = ("gpt-6x512", "gpt-4x768", "small-1000")


def methods() -> dict[str, Method]:
    """Our recipes, each beside torch's optimizer and, where installed, other libraries'."""
    t = torch.optim
    found = {
        "sgd": Method(
            [
                Contestant("torch fused", lambda p: t.SGD(p, lr=1e-3, momentum=0.9, fused=True)),
                Contestant("torch foreach", lambda p: t.SGD(p, lr=1e-3, momentum=0.9, foreach=True)),
                Contestant("ours skip", lambda p: gd.SGD(p, lr=1e-3, momentum=0.9), True),
                Contestant("ours ignore", lambda p: gd.SGD(p, lr=1e-3, momentum=0.9, nonfinite="ignore"), True),
            ]
        ),
        "adamw": Method(
            [
                Contestant("torch fused", lambda p: t.AdamW(p, lr=1e-4, fused=True)),
                Contestant("torch foreach", lambda p: t.AdamW(p, lr=1e-4, foreach=True)),
                Contestant("ours skip", lambda p: gd.AdamW(p, lr=1e-4), True),
                Contestant("ours ignore", lambda p: gd.AdamW(p, lr=1e-4, nonfinite="ignore"), True),
                Contestant("ours parts", lambda p: gd.AdamW(p, lr=1e-4, nonfinite="ignore", fused=False), True),
            ]
        ),
        "nadamw": Method(
            [
                Contestant("torch foreach", lambda p: t.NAdam(p, lr=1e-4, decoupled_weight_decay=True, foreach=True)),
                Contestant("torch single", lambda p: t.NAdam(p, lr=1e-4, decoupled_weight_decay=True, foreach=False)),
                Contestant("ours skip", lambda p: gd.NAdamW(p, lr=1e-4), True),
            ]
        ),
        "muon": Method(
            [
                Contestant("torch", lambda p: t.Muon(p, lr=1e-3)),
                Contestant("ours", lambda p: gd.Muon(p, lr=1e-3), True),
            ],
            matrices=True,
            sets=("gpt-6x512", "gpt-4x768"),
        ),
        "soap": Method([Contestant("ours", lambda p: gd.SOAP(p, lr=1e-3), True)], True, 10, ("gpt-2x256",)),
    }
    try:
        import pytorch_optimizer

        found["soap"].contestants.insert(
            0, Contestant("pytorch_optimizer", lambda p: pytorch_optimizer.SOAP(p, lr=1e-3, precondition_frequency=10))
        )
        found["muon"].contestants.append(
            Contestant(
                "pytorch_optimizer", lambda p: pytorch_optimizer.Muon([{"params": p, "use_muon": True}], lr=1e-3)
            )
        )
    except ImportError:
        pass
    return found


def parameters(shapes: list[tuple[int, ...]]) -> list[nn.Parameter]:
    """Parameters with gradients, the same for every contestant."""
    generator = torch.Generator().manual_seed(0)
    made = [nn.Parameter(torch.randn(shape, generator=generator) * 0.02) for shape in shapes]
    for p in made:
        p.grad = torch.randn(p.shape, generator=generator) * 1e-3
    return made


def cpu(function: Callable[[], object], times: int) -> float:
    """Process CPU seconds of one call, over ``times`` calls."""
    start = time.process_time()
    for _ in range(times):
        function()
    return (time.process_time() - start) / times


def orthogonality(method: str) -> dict[str, float]:
    """Largest and mean of ||U^T U - I||_F / sqrt(r) of the update that each Muon makes of Gaussian gradients."""
    if method != "muon":
        return {}
    errors = {}
    for contestant in methods()["muon"].contestants:
        found = []
        for shape in ((512, 512), (2048, 512), (512, 2048), (768, 3072)):
            torch.manual_seed(1)
            p = nn.Parameter(torch.zeros(shape))
            p.grad = torch.randn(shape)
            contestant.make([p]).step()
            u = p.detach().double()
            u = u if shape[0] <= shape[1] else u.mT
            gram = u @ u.mT
            gram /= gram.diagonal().mean()  # the learning rate and the shape rule
            found.append(float((gram - torch.eye(len(gram))).norm() / len(gram) ** 0.5))
        errors[contestant.name] = statistics.mean(found)
    return errors


def run(name: str, method: Method, set_name: str, rounds: int) -> dict[str, object]:
    """Time a method on a set; medians, quartiles and the ratio to the reference."""
    shapes = SETS[set_name](method.matrices)
    arms: list[tuple[Contestant, torch.optim.Optimizer]] = []
    first: dict[str, float] = {}
    for contestant in method.contestants:
        optimizer = contestant.make(parameters(shapes))
        first[contestant.name] = cpu(optimizer.step, 1)
        cpu(optimizer.step, max(2, method.block))
        arms.append((contestant, optimizer))
    times: dict[str, list[float]] = {contestant.name: [] for contestant, _ in arms}
    for number in range(rounds):
        for contestant, optimizer in arms if number % 2 else reversed(arms):
            times[contestant.name].append(cpu(optimizer.step, method.block))
    reference = method.contestants[0].name
    rows = []
    for contestant, optimizer in arms:
        mine = times[contestant.name]
        ratios = [a / b for a, b in zip(mine, times[reference])]
        quartiles = statistics.quantiles(ratios, n=4) if len(ratios) > 1 else [ratios[0]] * 3
        row: dict[str, object] = {
            "contestant": contestant.name,
            "ours": contestant.ours,
            "ms": 1e3 * statistics.median(mine),
            "first_ms": 1e3 * first[contestant.name],
            "ratio": statistics.median(ratios),
            "ratio_quartiles": [quartiles[0], quartiles[2]],
        }
        if isinstance(optimizer, gd.Optimizer):
            row["state_bytes"] = optimizer.state_bytes()
            row["workspace_mb"] = optimizer.workspace_bytes / 2**20
        rows.append(row)
    elements = sum(torch.Size(shape).numel() for shape in shapes)
    return {
        "method": name,
        "set": set_name,
        "tensors": len(shapes),
        "elements": elements,
        "rounds": rounds,
        "rows": rows,
    }


def show(result: dict[str, object], errors: dict[str, float]) -> None:
    """Print one table."""
    print(f"\n{result['method']} on {result['set']}: {result['tensors']} tensors, {result['elements']:,} elements")
    print(f"  {'':<20}{'ms':>10}{'ratio':>8}  quartiles       workspace  non-orthogonality")
    rows = result["rows"]
    assert isinstance(rows, list)
    for row in rows:
        low, high = row["ratio_quartiles"]
        scratch = f"{row['workspace_mb']:.1f} MiB" if "workspace_mb" in row else "-"
        error = f"{errors[row['contestant']]:.3f}" if row["contestant"] in errors else ""
        spread = f"{low:.2f} to {high:.2f}"
        print(f"  {row['contestant']:<20}{row['ms']:>10.2f}{row['ratio']:>8.2f}  {spread}  {scratch:>11}  {error}")


def main() -> None:
    """Run the chosen sets and methods, print tables and write JSON."""
    known = methods()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sets", nargs="*", default=list(SETS), choices=list(SETS))
    parser.add_argument("--methods", nargs="*", default=list(known), choices=list(known))
    parser.add_argument("--rounds", type=int, default=0, help="rounds for each table; 0 chooses by cost")
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    results = []
    for name in options.methods:
        errors = orthogonality(name)
        for set_name in options.sets:
            if set_name in known[name].sets:
                rounds = options.rounds or (7 if known[name].matrices else 41)
                result = run(name, known[name], set_name, rounds)
                if errors:
                    result["non_orthogonality"] = errors
                show(result, errors)
                results.append(result)
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(
        json.dumps(
            {
                "format": 1,
                "command": "python benchmarks/step_time.py " + " ".join(sys.argv[1:]),
                "unit": "process CPU milliseconds of one step, one thread, median over alternating rounds",
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
    print(f"\nload average {os.getloadavg()[0]:.1f}; wrote {options.out}")


if __name__ == "__main__":
    main()
