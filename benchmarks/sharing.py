"""A step of ranks that share the work on matrices beside one in which each does all of it: DistributedDataParallel.

    python benchmarks/sharing.py                  # results/sharing.json
    python benchmarks/sharing.py --methods muon --sets gpt-2x256 --rounds 5 --out one.json

Two ranks on gloo hold the matrices of a GPT and equal gradients. Both forms are timed in turn, over whole refresh
periods: CPU seconds of a rank's process, all threads, and wall seconds of a step between two barriers. Wall time means
what it says only where every rank has a core of its own; the number of cores is in the file.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import tempfile
import time
import warnings
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import guided_descent as gd
from contestants import SETS

RESULTS = Path(__file__).parent / "results"
#: Options, and steps of a refresh period.
METHODS: dict[str, tuple[dict[str, Any], int]] = {
    "muon": ({}, 1),
    "soap": ({"precondition_frequency": 10}, 10),
    "shampoo": ({"precondition_frequency": 10, "start_preconditioning_step": 2}, 10),
}


def model(shapes: list[tuple[int, ...]]) -> nn.Module:
    """The matrices as hidden layers, which no forward pass connects."""
    torch.manual_seed(0)
    layers = [nn.Linear(n, m, bias=False) for m, n in shapes]
    return nn.Sequential(*layers, nn.Linear(4, 4, bias=False).requires_grad_(False))


def push(params: list[nn.Parameter]) -> None:
    """Equal gradients on every rank."""
    made = torch.Generator().manual_seed(1)
    for p in params:
        p.grad = torch.randn(p.shape, generator=made) * 1e-3


def worker(rank: int, world: int, path: str, names: list[str], sets: list[str], rounds: int) -> None:
    """Time both forms in turn; rank 0 writes what all have found."""
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{path}", rank=rank, world_size=world)
    results = []
    for name in names:
        options, period = METHODS[name]
        for which in sets:
            shapes = SETS[which](True)
            arms = {}
            for form, shared in (("all do all", None), ("shared", True)):
                ddp = DistributedDataParallel(model(shapes))
                rules = [gd.rule("*", role="matrix")]
                opt = gd.optimizer(name, ddp, rules=rules, parallel=shared, **options)
                params = [p for p in ddp.parameters() if p.requires_grad]
                push(params)
                for _ in range(2 + period):
                    opt.step()
                arms[form] = opt
            cpu: dict[str, list[float]] = {form: [] for form in arms}
            wall: dict[str, list[float]] = {form: [] for form in arms}
            for number in range(rounds):
                for form in list(arms) if number % 2 else reversed(list(arms)):
                    dist.barrier()
                    start = time.process_time(), time.perf_counter()
                    for _ in range(period):
                        arms[form].step()
                    cpu[form].append((time.process_time() - start[0]) / period)
                    dist.barrier()
                    wall[form].append((time.perf_counter() - start[1]) / period)
            mine = {
                "cpu_ms": {form: 1e3 * statistics.median(found) for form, found in cpu.items()},
                "wall_ms": {form: 1e3 * statistics.median(found) for form, found in wall.items()},
                "state_bytes": {form: opt.state_bytes() for form, opt in arms.items()},
            }
            told: list[Any] = [None] * world
            dist.all_gather_object(told, mine)
            plan = arms["shared"].assignment
            assert plan is not None
            ratio = [each["cpu_ms"]["shared"] / each["cpu_ms"]["all do all"] for each in told]
            results.append(
                {
                    "method": name,
                    "set": which,
                    "rounds": rounds,
                    "ranks": told,
                    "cpu_ratio": max(ratio),
                    "wall_ratio": told[0]["wall_ms"]["shared"] / told[0]["wall_ms"]["all do all"],
                    "imbalance": plan.imbalance,
                    "bytes_sent": dict(plan.bytes_sent),
                }
            )
            if rank == 0:
                print(json.dumps(results[-1]), flush=True)
    if rank == 0:
        Path(path).with_name("found.json").write_text(json.dumps(results))
    dist.barrier()
    os._exit(0)


def main() -> None:
    """Run two ranks and write what they found."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--methods", nargs="*", default=list(METHODS), choices=list(METHODS))
    parser.add_argument("--sets", nargs="*", default=["gpt-2x256", "gpt-1x512"], choices=list(SETS))
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--world", type=int, default=2)
    parser.add_argument("--out", type=Path, default=RESULTS / "sharing.json")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        arguments = (options.world, f"{folder}/store", options.methods, options.sets, options.rounds)
        mp.start_processes(worker, arguments, nprocs=options.world, start_method="spawn")
        results = json.loads((Path(folder) / "found.json").read_text())
    document = {
        "format": 1,
        "command": f"python benchmarks/sharing.py --rounds {options.rounds} --world {options.world}",
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "machine": f"{platform.machine()}, {len(os.sched_getaffinity(0))} of {os.cpu_count()} cores",
        "load_average": os.getloadavg(),
        "torch": torch.__version__,
        "results": results,
    }
    options.out.write_text(json.dumps(document, indent=1) + "\n")


if __name__ == "__main__":
    main()
