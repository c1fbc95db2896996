"""Time one optimizer step against its peers: alternating, in one process, process CPU seconds on one thread.

    python benchmarks/step_time.py kronecker      # results/step_time-kronecker.json, and docs/step-time.md
    python benchmarks/step_time.py                # all families
    python benchmarks/step_time.py elementwise --sets small-1000 --methods adamw --rounds 50 --out one.json

Sets: the parameters of a GPT of 6 layers and width 512, of one of 4 layers and width 768 (matrices alone for matrix
methods; a smaller one where factors are kept), of the autoencoder 784-1000-500-250-30, and 1,000 small tensors. Each
round times every contestant once, in turn; a contestant is a block of steps that covers whole refresh periods. The
ratio is the median over rounds of ours / peer within the same round. The tail is the 99th percentile of single steps
over their mean. Python's garbage collector is off while steps are timed, as in ``timeit``: a full collection costs
0.2 s with torch loaded and falls on whichever contestant is running. Each contestant is timed for at least 60 steps,
and for up to 400 where all of them take less than 20 s; ours go on alone to 200 steps, since the 99th percentile of
fewer than 100 is their maximum. For our matrix methods the rates say how near the matrix products and factorisations
of a step come to the bare calls; see ``rates.py``.
"""

from __future__ import annotations

import argparse
import functools
import gc
import json
import math
import os
import platform
import statistics
import sys
import time
import warnings
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from torch import nn

import guided_descent as gd
from contestants import FAMILIES, SETS, Contestant, Method, methods
from rates import measure

#: Steps of each contestant, CPU seconds of all of them together that bound the steps between, and steps of our tails.
LEAST_STEPS, MOST_STEPS, SECONDS, TAIL_STEPS = 60, 400, 20.0, 200
RESULTS = Path(__file__).parent / "results"
PAGE = Path(__file__).parent.parent / "docs" / "step-time.md"


def parameters(shapes: list[tuple[int, ...]]) -> list[nn.Parameter]:
    """Parameters with gradients, the same for every contestant."""
    generator = torch.Generator().manual_seed(0)
    made = [nn.Parameter(torch.randn(shape, generator=generator) * 0.02) for shape in shapes]
    for p in made:
        p.grad = torch.randn(p.shape, generator=generator) * 1e-3
    return made


def cpu(function: Callable[[], object], times: int) -> list[float]:
    """Process CPU seconds of each of some calls."""
    found = []
    for _ in range(times):
        start = time.process_time()
        function()
        found.append(time.process_time() - start)
    return found


def fed(optimizer: torch.optim.Optimizer, params: list[nn.Parameter]) -> Callable[[], object]:
    """A step that finds its gradients: some libraries clear them."""
    gradients = [p.grad for p in params]

    def step() -> object:
        for p, g in zip(params, gradients, strict=True):
            if p.grad is None:
                p.grad = g
        return optimizer.step()

    return step


def percentile(values: list[float], share: float) -> float:
    """The smallest value that is not below this share of all, by nearest rank."""
    return sorted(values)[math.ceil(share * len(values)) - 1]


def largest_task(optimizer: gd.Optimizer) -> float:
    """CPU seconds of the longest piece of slow work that cannot be divided: one factorisation and what goes with it."""
    engine, longest = optimizer._engine, 0.0
    for bucket in engine.bind().buckets:
        h = engine.groups[bucket.group]
        for part in bucket.parts:
            for task in part.tasks(bucket.blocks[0]):
                inputs = part.inputs(task, engine.cut(bucket, [0]).state, h)
                longest = max(longest, min(cpu(functools.partial(part.solve, inputs, h), 3)))
    return longest


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


def numel(shapes: list[tuple[int, ...]]) -> int:
    """Elements of a set."""
    return sum(map(math.prod, shapes))


def bytes_moved(optimizer: gd.Optimizer, shapes: list[tuple[int, ...]]) -> int:
    """What a step must move: gradients are read, parameters and state read and written."""
    return 12 * numel(shapes) + 2 * optimizer.state_bytes()


def run(name: str, method: Method, set_name: str, rounds: int) -> dict[str, object]:
    """Time a method on a set, 0 rounds being as many as fit; medians, quartiles and the ratio to the reference."""
    shapes = SETS[set_name](method.matrices)
    arms: list[tuple[Contestant, Callable[[], object], torch.optim.Optimizer]] = []
    first: dict[str, float] = {}
    failed: dict[str, str] = {}
    cost = 0.0  # CPU seconds of a round
    for contestant in method.contestants:
        params = parameters(shapes)
        optimizer = contestant.make(params)
        step = fed(optimizer, params)
        try:
            first[contestant.name] = cpu(step, 1)[0]
            cpu(step, 2)  # graphs are made at the third step
            warm = sum(cpu(step, max(2, method.block))) / max(2, method.block)
        except Exception as error:  # another library's step may fail here, and the table says so
            if contestant.ours:
                raise
            failed[contestant.name] = f"{type(error).__name__}: {' '.join(str(error).split())}"[:120]
            continue
        arms.append((contestant, step, optimizer))
        cost += warm * method.block
    least, most = -(-LEAST_STEPS // method.block), -(-MOST_STEPS // method.block)
    rounds = rounds or min(max(math.ceil(SECONDS / cost), least), most)
    gc.collect()
    gc.disable()
    times: dict[str, list[float]] = {contestant.name: [] for contestant, _, _ in arms}
    single: dict[str, list[float]] = {contestant.name: [] for contestant, _, _ in arms}
    for number in range(rounds):
        for contestant, step, _ in arms if number % 2 else reversed(arms):
            found = cpu(step, method.block)
            single[contestant.name] += found
            times[contestant.name].append(sum(found) / method.block)
    for contestant, step, _ in arms:
        while contestant.ours and method.matrices and len(single[contestant.name]) < TAIL_STEPS:
            single[contestant.name] += cpu(step, method.block)
    gc.enable()
    reference = arms[0][0].name
    rows = []
    for contestant, step, optimizer in arms:
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
            "tail": percentile(single[contestant.name], 0.99) / statistics.mean(single[contestant.name]),
        }
        if isinstance(optimizer, gd.Optimizer):
            longest = largest_task(optimizer)
            if method.matrices:
                rates = measure(step, method.block)
                longest = max(longest, rates.longest)
                row |= rates.row()
            row["tail_bound"] = max(1.3, 1 + longest / statistics.mean(single[contestant.name]))
            row["refreshes"] = sum(c.get("refreshes", 0) for c in optimizer.audit().values())
            row["skipped_refreshes"] = sum(c.get("skipped_refreshes", 0) for c in optimizer.audit().values())
            row["state_bytes"] = optimizer.state_bytes()
            if method.floor:
                row["over_floor"] = statistics.median(ratios) / (bytes_moved(optimizer, shapes) / (28 * numel(shapes)))
            row["workspace_mb"] = optimizer.workspace_bytes / 2**20
        rows.append(row)
    return {
        "method": name,
        "set": set_name,
        "tensors": len(shapes),
        "elements": numel(shapes),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "rounds": rounds,
        "failed": failed,
        "rows": rows,
    }


def show(result: dict[str, object], errors: dict[str, float]) -> None:
    """Print one table."""
    print(f"\n{result['method']} on {result['set']}: {result['tensors']} tensors, {result['elements']:,} elements")
    print(f"  {'':<20}{'ms':>9}{'ratio':>7}  quartiles      p99/mean  workspace  products   factorisations")
    rows, failed = result["rows"], result["failed"]
    assert isinstance(rows, list)
    assert isinstance(failed, dict)
    for name, reason in failed.items():
        print(f"  {name:<20}left out: {reason}")
    for row in rows:
        low, high = row["ratio_quartiles"]
        scratch = f"{row['workspace_mb']:.1f} MiB" if "workspace_mb" in row else "-"
        products = f"{row['share_of_bare_products']:.0%} of bare" if "share_of_bare_products" in row else ""
        solvers = f"{row['over_bare_factorisations']:.2f} x bare" if row.get("over_bare_factorisations") else ""
        error = f"; distance from orthogonal {errors[row['contestant']]:.3f}" if row["contestant"] in errors else ""
        spread = f"{low:.2f} to {high:.2f}"
        error += f"  {row['over_floor']:.2f} x floor" if "over_floor" in row else ""
        print(
            f"  {row['contestant']:<20}{row['ms']:>9.2f}{row['ratio']:>7.2f}  {spread}  {row['tail']:>8.2f}"
            f"  {scratch:>10}  {products:>11}  {solvers}{error}",
            flush=True,
        )


def page() -> str:
    """The tables of all families whose results are there, as Markdown."""
    lines = [
        "# The time of one step",
        "",
        "Process CPU milliseconds of one optimizer step on one thread, contestants in turn, median over rounds. The",
        "ratio is to the first row of a group, of the same round, with quartiles. The tail is the 99th percentile of",
        "single steps over their mean, Python's garbage collector off; its bound, for ours, 1 + the longest piece of",
        "slow work that cannot be divided over the mean, at least 1.3. Products: the rate of our matrix products as a",
        "share of that of `torch.mm` of the same shapes and dtype. Solvers: the time of our factorisations over",
        "that of the bare `torch.linalg` calls. Floor: the bytes that a step must move (gradients once, parameters and",
        "state twice) at the rate at which torch's fused AdamW moves its 28 for each element, in the same rounds;",
        "MB: of state. 'ours ignore' and 'ours compiled' leave out the check for non-finite gradients, which no peer",
        "has.",
    ]
    for family in FAMILIES:
        path = RESULTS / f"step_time-{family}.json"
        if path.exists():
            lines += table(json.loads(path.read_text()))
    return "\n".join(lines) + "\n"


def table(document: dict[str, Any]) -> list[str]:
    """The table of one family."""
    lines = [
        "",
        f"## `{document['command'].strip()}`",
        "",
        f"{document['date'][:10]}, {document['machine']}, torch {document['torch']}.",
        "",
        "| method | set | contestant | ms | ratio | floor | quartiles | tail | bound | products | solvers | MB |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for result in document["results"]:
        for name, reason in result["failed"].items():
            lines.append(f"| {result['method']} | {result['set']} | {name} | failed: {reason} | | | | | | | | |")
        for row in result["rows"]:
            low, high = row["ratio_quartiles"]
            products = f"{row['share_of_bare_products']:.0%}" if row.get("share_of_bare_products") else ""
            solvers = f"{row['over_bare_factorisations']:.2f}" if row.get("over_bare_factorisations") else ""
            bound = f"{row['tail_bound']:.2f}" if "tail_bound" in row else ""
            state = f"{row['state_bytes'] / 1e6:.1f}" if "state_bytes" in row else ""
            floor = f"{row['over_floor']:.2f}" if "over_floor" in row else ""
            lines.append(
                f"| {result['method']} | {result['set']} | {row['contestant']} | {row['ms']:.2f} | "
                f"{row['ratio']:.2f} | {floor} | {low:.2f} to {high:.2f} | {row['tail']:.2f} | {bound} | {products} | "
                f"{solvers} | {state} |"
            )
    return lines


def main() -> None:
    """Run the chosen families, print tables, write JSON and the page."""
    known = methods()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("family", nargs="?", choices=list(FAMILIES), help="left out: all of them")
    parser.add_argument("--sets", nargs="*", default=list(SETS), choices=list(SETS))
    parser.add_argument("--methods", nargs="*", default=list(known), choices=list(known))
    parser.add_argument("--rounds", type=int, default=0, help="rounds of each table; 0: by cost, see above")
    parser.add_argument("--update", action="store_true", help="keep the other methods of the file that is written")
    parser.add_argument("--out", type=Path, help="where the JSON goes instead; the page stays as it is")
    options = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    for family in [options.family] if options.family else FAMILIES:
        results = []
        for name in (name for name in options.methods if name in FAMILIES[family]):
            errors = orthogonality(name)
            for set_name in (set_name for set_name in options.sets if set_name in known[name].sets):
                result = run(name, known[name], set_name, options.rounds)
                if errors:
                    result["non_orthogonality"] = errors
                show(result, errors)
                results.append(result)
        document = {
            "format": 2,
            "command": " ".join(["python benchmarks/step_time.py", family, *sys.argv[2:]]),
            "unit": "process CPU milliseconds of one step, one thread, median over alternating rounds",
            "date": datetime.now(UTC).isoformat(timespec="seconds"),
            "machine": f"{platform.machine()}, {os.cpu_count()} cores",
            "load_average": os.getloadavg(),
            "torch": torch.__version__,
            "results": results,
        }
        out = options.out or RESULTS / f"step_time-{family}.json"
        if options.update and out.exists():
            kept = json.loads(out.read_text())
            fresh = {(result["method"], result["set"]): result for result in results}
            whole = [fresh.pop((old["method"], old["set"]), old) for old in kept["results"]]
            document = kept | {"results": [*whole, *fresh.values()]}
        out.write_text(json.dumps(document, indent=1) + "\n")
        print(f"\nload average {os.getloadavg()[0]:.1f}; wrote {out}")
    if options.out is None:
        PAGE.write_text(page())


if __name__ == "__main__":
    main()
