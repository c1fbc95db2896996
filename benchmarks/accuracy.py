"""How accurate the linear algebra is: coefficient tables, inverse roots and eigenbasis tracking, against exact answers.

Coefficient tables act on singular values one by one, so that their maps are evaluated exactly, in float64, and compared
with reference values that were computed from the published triples independently of this library. Roots are compared
with Q diag(λ^(-1/p)) Qᵀ in float64, for random Q and λ spread evenly on a logarithmic scale over the stated condition;
A = Q diag(λ) Qᵀ is rounded to the dtype of the test, so that part of an error is that rounding, which no method can
undo. Bases are turned by a stated angle and then refreshed.

    python benchmarks/accuracy.py [--rounds 9] [--out benchmarks/results/accuracy.json] [--page docs/accuracy.md]
"""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from guided_descent.linalg import COEFFICIENTS, diagonalise, eigenbasis, inverse_root, off_diagonal, track_basis
from guided_descent.linalg.coefficients import _POLAR_EXPRESS, TURBO
from guided_descent.linalg.minimax import Triple

F64 = torch.float64
ALL = COEFFICIENTS | {TURBO.name: TURBO}
POINTS = (1e-3, 1e-2, 0.1, 0.5, 1.0)
FLOORS = (1e-3, 3e-3, 1e-2, 2e-2)

#: Reference values after five steps at POINTS, to six decimals, and after the stated steps at 1e-4, to four.
REFERENCE = {
    "jordan": (0.470544, 0.698917, 0.712120, 0.765439, 0.696436),
    "polar_express_raw, 5 unscaled": (0.876441, 1.103386, 1.111040, 0.933756, 1.123559),
    "polar_express": (0.858873, 1.027110, 1.059161, 0.910611, 0.859129),
}
REFERENCE_LOW = {
    "jordan": 0.0485,
    "you": 0.0493,
    "polar_express_raw, 5 unscaled": 0.1024,
    "polar_express_raw": 0.5747,
    "modula": 0.1134,
    "deepseek_v4": 1.002,
}

CONDITIONS = tuple(10.0**k for k in range(1, 13))
SIZES = (64, 256)
SEEDS = 3
ROOTS: dict[str, Callable[[Tensor, int], Tensor]] = {
    "eigh": lambda a, p: inverse_root(a, p, method="eigh").root,
    "newton": lambda a, p: inverse_root(a, p, method="newton").root,
    "cans": lambda a, p: inverse_root(a, p, method="cans").root,
}
WIDE = "eigh in float64"  # of a float32 matrix


# -- coefficient tables ------------------------------------------------------------------------------------------------


def apply(triples: Sequence[Triple], x: Tensor) -> Tensor:
    for a, b, c in triples:
        x = x * (a + b * x**2 + c * x**4)
    return x


def tables() -> list[dict[str, Any]]:
    sets: dict[str, tuple[Sequence[Triple], str]] = {n: (t.take(), t.source) for n, t in ALL.items()}
    sets["polar_express_raw, 5 unscaled"] = (_POLAR_EXPRESS[:5], COEFFICIENTS["polar_express_raw"].source)
    rows = []
    for name, (triples, source) in sets.items():
        values = apply(triples, torch.tensor(POINTS, dtype=F64)).tolist()
        low = float(apply(triples, torch.tensor(1e-4, dtype=F64)))
        ranges = {}
        for floor in FLOORS:
            out = apply(triples, torch.logspace(math.log10(floor), 0, 200_001, dtype=F64))
            ranges[f"{floor:g}"] = [float(out.min()), float(out.max())]
        row = {"name": name, "steps": len(triples), "values": values, "at_1e-4": low, "ranges": ranges}
        row["source"] = source
        if name in REFERENCE:
            row["off_reference"] = max(abs(a - b) for a, b in zip(values, REFERENCE[name]))
        if name in REFERENCE_LOW:
            row["off_reference_at_1e-4"] = abs(low - REFERENCE_LOW[name])
        rows.append(row)
    return rows


# -- inverse roots -----------------------------------------------------------------------------------------------------


def rotation(d: int, seed: int) -> Tensor:
    return torch.linalg.qr(torch.randn(d, d, dtype=F64, generator=torch.Generator().manual_seed(seed))).Q


def problem(d: int, condition: float, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """Q, λ and A in float64."""
    q, values = rotation(d, seed), torch.logspace(0, -math.log10(condition), d, dtype=F64)
    a = (q * values) @ q.mT
    return q, values, (a + a.mT) / 2


def off(x: Tensor, exact: Tensor) -> float:
    return float((x.to(F64) - exact).abs().max() / exact.abs().max())


def accuracy(d: int) -> list[dict[str, Any]]:
    rows = []
    for dtype in (torch.float32, F64):
        for condition in CONDITIONS:
            for p in (2, 4):
                errors: dict[str, float] = {}
                given_up = dict.fromkeys(ROOTS, 0)
                for seed in range(SEEDS):
                    q, values, a = problem(d, condition, seed)
                    exact = (q * values ** (-1 / p)) @ q.mT
                    for name, run in ROOTS.items():
                        errors[name] = max(errors.get(name, 0.0), off(run(a.to(dtype), p), exact))
                        given_up[name] += int(inverse_root(a.to(dtype), p, method=name).fallbacks > 0)
                    if dtype == torch.float32:
                        wide = off(ROOTS["eigh"](a.to(dtype).double(), p), exact)
                        errors[WIDE] = max(errors.get(WIDE, 0.0), wide)
                rows.append(
                    {"d": d, "dtype": str(dtype)[6:], "condition": condition, "p": p, "errors": errors}
                    | {"left_to_eigh": given_up}
                )
    return rows


def seconds(rounds: int) -> list[dict[str, Any]]:
    """Contestants alternate; the median."""
    rows = []
    for d in SIZES:
        for dtype in (torch.float32, F64):
            for condition in (1e2, 1e6):
                a = problem(d, condition, 0)[2].to(dtype)
                for p in (2, 4):
                    runs = dict(ROOTS)
                    if dtype == torch.float32:
                        runs[WIDE] = lambda a, p: inverse_root(a.double(), p).root.float()
                    spent: dict[str, list[float]] = {name: [] for name in runs}
                    for i in range(rounds + 1):
                        for name, run in runs.items():
                            start = time.process_time()
                            run(a, p)
                            if i:  # the first is the warm-up
                                spent[name].append(time.process_time() - start)
                    ms = {name: 1e3 * statistics.median(v) for name, v in spent.items()}
                    rows.append({"d": d, "dtype": str(dtype)[6:], "condition": condition, "p": p, "ms": ms})
    return rows


# -- tracking ----------------------------------------------------------------------------------------------------------


def turned(q: Tensor, angle: float, seed: int) -> Tensor:
    x = torch.randn(q.shape, dtype=F64, generator=torch.Generator().manual_seed(seed))
    skew = x - x.mT
    return q @ torch.linalg.matrix_exp(angle * skew / torch.linalg.matrix_norm(skew, 2))


STEPS = (0, 1, 2, 3, 5, 10, 20)


def tracking(d: int = 64) -> list[dict[str, Any]]:
    spectra = {
        "k^-1": torch.arange(1, d + 1, dtype=F64) ** -1.0,
        "k^-2": torch.arange(1, d + 1, dtype=F64) ** -2.0,
        "logarithmic, condition 1e6": torch.logspace(0, -6, d, dtype=F64),
    }
    rows = []
    for spectrum, values in spectra.items():
        for angle in (0.01, 0.1, 1.0):
            ratios: dict[int, list[float]] = {k: [] for k in STEPS}
            needed: dict[str, list[int]] = {"0.1": [], "0.01": [], "0.001": []}
            for seed in range(SEEDS):
                q = rotation(d, seed)
                a = ((q * values) @ q.mT).float()
                start = turned(q, angle, seed + 100).float()
                basis = start
                for k in range(STEPS[-1] + 1):
                    if k in ratios:
                        ratios[k].append(float(off_diagonal(a, basis)))
                    basis = track_basis(a, basis).basis
                for tol, counts in needed.items():
                    counts.append(int(diagonalise(a, start, float(tol), 200).steps))
            rows.append(
                {
                    "spectrum": spectrum,
                    "angle": angle,
                    "ratio": {str(k): statistics.mean(v) for k, v in ratios.items()},
                    "qr_steps_to": {tol: statistics.mean(v) for tol, v in needed.items()},
                    "eigh": float(off_diagonal(a, eigenbasis(a).basis)),
                }
            )
    return rows


# -- the page ----------------------------------------------------------------------------------------------------------


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    return "\n".join(lines + ["| " + " | ".join(row) + " |" for row in rows])


def page(data: dict[str, Any]) -> str:
    m = data["machine"]
    maps = table(
        ("table", "steps", *(f"{x:g}" for x in POINTS), "1e-4", *(f"[{x:g}, 1] to" for x in FLOORS), "off reference"),
        [
            (
                f"`{r['name']}`" if r["name"] in ALL else r["name"],
                str(r["steps"]),
                *(f"{v:.6f}" for v in r["values"]),
                f"{r['at_1e-4']:.4f}",
                *(f"[{lo:.3f}, {hi:.3f}]" for lo, hi in r["ranges"].values()),
                ", ".join(f"{r[k]:.0e}" for k in ("off_reference", "off_reference_at_1e-4") if k in r) or "-",
            )
            for r in data["tables"]
        ],
    )
    sources = "\n".join(f"- `{t.name}`: {t.source}." for t in ALL.values())
    names = (*ROOTS, WIDE)

    def error(r: dict[str, Any], name: str) -> str:
        if name not in r["errors"]:
            return "-"
        return f"{r['errors'][name]:.0e}" + ("*" if r["left_to_eigh"].get(name) else "")

    roots = []
    for d in SIZES:
        for dtype in ("float32", "float64"):
            rows = [r for r in data["roots"] if r["d"] == d and r["dtype"] == dtype]
            shown = names if dtype == "float32" else tuple(ROOTS)
            by = {(r["condition"], r["p"]): r for r in rows}
            head = ("condition", *(f"p = {p}, {n}" for p in (2, 4) for n in shown))
            lines = [(f"{c:.0e}", *(error(by[c, p], n) for p in (2, 4) for n in shown)) for c in CONDITIONS]
            roots.append(f"### d = {d}, {dtype}\n\n{table(head, lines)}")
    times = table(
        ("d", "dtype", "condition", "p", *names),
        [
            (
                *(str(r["d"]), r["dtype"], f"{r['condition']:.0e}", str(r["p"])),
                *(f"{r['ms'][n]:.2f}" if n in r["ms"] else "-" for n in names),
            )
            for r in data["seconds"]
        ],
    )
    steps = table(
        ("spectrum", "angle", *(f"{k} steps" for k in STEPS), *(f"to {t}" for t in ("0.1", "0.01", "0.001")), "eigh"),
        [
            (
                *(r["spectrum"], f"{r['angle']:g}"),
                *(f"{v:.1e}" for v in r["ratio"].values()),
                *(f"{v:.1f}" for v in r["qr_steps_to"].values()),
                f"{r['eigh']:.0e}",
            )
            for r in data["tracking"]
        ],
    )
    return f"""# How accurate the linear algebra is

Written by `{data["command"]}`; the numbers are in `benchmarks/results/accuracy.json`.
{m["cpu"]}, one thread, torch {m["torch"]}.

## Newton-Schulz tables

What each table of `linalg.coefficients` makes of a singular value x in all its steps, in float64, without the division
by `safety`; and the smallest and largest value that it makes of [x, 1]. `polar_express_raw` holds p(x / 1.01) in every
step but the last; the published triples without that factor follow in a row of their own. `turbo` is meant for input
that AOL has rescaled, in which small singular values are rare. "Off reference" is the largest difference from reference
values computed independently; they are known to six decimals at the five points and to four digits at 1e-4, so 5e-07
and 5e-05 are agreement (5e-04 for a value above 1).

{maps}

{sources}

## Inverse roots

Largest |X - A^(-1/p)| over largest |A^(-1/p)|, the worst of {SEEDS} matrices with exactly known roots, with `eps=0`. A
star: at least one of them did not converge and was left to `eigh`. In float32 the last column of each p shows `eigh` of
the same float32 matrix in float64: what remains there is the rounding of A, which moves eigenvalues by some 1e-8 of the
largest. Beyond a condition of 1e8 the small ones are lost, and some are negative: `eps` must be set above that.

{chr(10).join(r + chr(10) for r in roots)}
### CPU milliseconds

Median of {data["rounds"]} runs, one matrix at a time.

{times}

## Following an eigenbasis

‖B - diag B‖_F / ‖B‖_F of B = QᵀAQ after k steps of `track_basis` from the exact basis turned by an angle (radians), in
float32, d = 64, the mean of {SEEDS}; then how many QR steps `diagonalise` takes to reach a tolerance; then what `eigh`
leaves.

{steps}
"""


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
    root = Path(__file__).parent
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--out", type=Path, default=root / "results" / "accuracy.json")
    parser.add_argument("--page", type=Path, default=root.parent / "docs" / "accuracy.md")
    args = parser.parse_args()
    torch.set_num_threads(1)
    data = {
        "command": " ".join(["python", "benchmarks/accuracy.py", *sys.argv[1:]]),
        "machine": machine(),
        "rounds": args.rounds,
        "tables": tables(),
        "roots": [row for d in SIZES for row in accuracy(d)],
        "seconds": seconds(args.rounds),
        "tracking": tracking(),
    }
    text = page(data)
    print(text)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(data, indent=1) + "\n")
    args.page.write_text(text)


if __name__ == "__main__":
    main()
