"""Write the README's tables of measurements from the committed results, between their markers.

    python benchmarks/readme.py

A marker is ``<!-- NAME -->`` on a line of its own, closed by ``<!-- /NAME -->``; the names are those of ``TABLES``.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
README, RESULTS = ROOT / "README.md", ROOT / "benchmarks" / "results"
Row = dict[str, Any]


def load(name: str) -> Any:
    """One file of results."""
    return json.loads((RESULTS / f"{name}.json").read_text())


def table(heads: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    """A Markdown table."""
    heads = list(heads)
    lines = [heads, ["---"] * len(heads), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def timed(family: str) -> dict[tuple[str, str], dict[str, Row]]:
    """Rows of the step times by method and set, then by contestant."""
    return {
        (result["method"], result["set"]): {row["contestant"]: row for row in result["rows"]}
        for result in load(f"step_time-{family}")["results"]
    }


def matrices() -> str:
    """Matrix methods: ratio to the fastest peer, share of the bare products, tails."""
    found = timed("spectral") | timed("kronecker")
    names = {
        "Muon (GPT 6 × 512)": ("muon", "gpt-6x512", "ours"),
        "NorMuon (6 × 512)": ("normuon", "gpt-6x512", "ours"),
        "AdaMuon (6 × 512)": ("adamuon", "gpt-6x512", "ours"),
        "Shampoo, refresh every 10 (GPT 2 × 256)": ("shampoo", "gpt-2x256", "ours"),
        "SOAP, every 10": ("soap", "gpt-2x256", "ours"),
        "SOAP with bfloat16 products": ("soap", "gpt-2x256", "ours bfloat16"),
        "SPlus, every 20": ("splus", "gpt-2x256", "ours"),
        "SPlus with bfloat16 products": ("splus", "gpt-2x256", "ours bfloat16"),
        "KL-Shampoo, every 10": ("kl_shampoo", "gpt-2x256", "ours"),
        "PSGD Kron": ("psgd_kron", "gpt-2x256", "ours"),
        "PSGD Kron, triangular": ("psgd_kron triangular", "gpt-2x256", "ours"),
    }
    lines = []
    for label, (method, first, mine) in names.items():
        cells = [label]
        for name in (first, "autoencoder"):
            rows = found[method, name]
            row, peers = rows[mine], [r for r in rows.values() if not r["ours"]]
            fastest = min(peers, key=lambda r: r["ratio"]) if peers else None
            ratio = f"{row['ratio'] / fastest['ratio']:.2f}" if fastest else ""
            tail = f"{row['tail']:.2f}" + (f" / {fastest['tail']:.2f}" if fastest else "")
            cells += [ratio, f"{row['share_of_bare_products']:.0%}".replace("%", " %"), tail]
        lines.append(cells)
    return table(["", "GPT: ratio", "bare", "tail, ours / peer's", "autoencoder: ratio", "bare", "tail"], lines)


def elementwise() -> str:
    """Elementwise methods: ratio to torch."""
    found = timed("elementwise")
    sets = {"GPT 6 × 512": "gpt-6x512", "GPT 4 × 768": "gpt-4x768", "1,000 small tensors": "small-1000"}
    names = {
        '`gd.AdamW`, `nonfinite="ignore"` / torch\'s fused AdamW': ("adamw", "ours ignore"),
        '`gd.AdamW`, `nonfinite="skip"` / torch\'s fused AdamW': ("adamw", "ours skip"),
        '`gd.SGD`, `nonfinite="ignore"` / torch\'s fused SGD': ("sgd", "ours ignore"),
        '`gd.SGD`, `nonfinite="skip"` / torch\'s fused SGD': ("sgd", "ours skip"),
        "`gd.NAdamW`, `skip` / torch's foreach NAdam": ("nadamw", "ours skip"),
    }
    rows = [
        [label, *(f"{found[method, name][mine]['ratio']:.2f}" for name in sets.values())]
        for label, (method, mine) in names.items()
    ]
    return table(["", *sets], rows)


def usefulness() -> str:
    """Steps and time to the final value of tuned NAdamW."""

    def share(three: list[float]) -> str:
        return f"{three[0]:.2f} ({three[1]:.2f} to {three[2]:.2f})"

    rows = []
    for name, label in {"ae-mnist": "deep autoencoder, training error", "lm-source": "byte GPT, validation"}.items():
        document = load(f"usefulness-{name}")
        rows += [
            [
                f"{label}, {len(document['seeds'])} seeds: {r['method']}",
                share(r["steps_ratio"]),
                share(r["seconds_ratio"]),
            ]
            for r in document["rows"][1:]
        ]
    return table(["", "steps, share of NAdamW's", "time, share of NAdamW's"], rows)


def curvature() -> str:
    """What K-FAC adds to forward and backward, and the tail of its steps beside the bound."""
    results = load("kfac")["results"]
    heads = [""]
    for label in ("autoencoder, batch 256", "GPT of width 256, 1,024 tokens"):
        heads += [f"{label}: added to forward + backward", "tail", "bound"]
    rows = []
    for label in (
        "kfac",
        "kfac, bfloat16",
        "kfac, all at once",
        "kfac, background",
        "kfac, exact",
        "ekfac",
        "foof",
        "singd",
    ):
        cells = [f"`{label}`"]
        for task in ("autoencoder", "gpt-2x256"):
            row = next(r for r in results[task] if r["recipe"] == label)
            cells += [f"{row['added_share']:.0%}".replace("%", " %")]
            cells += [f"{row['optimizer_tail']:.2f}", f"{row['tail_bound']:.2f}"]
        rows.append(cells)
    return table(heads, rows)


def burgers() -> str:
    """Evaluations of the solvers to a relative error of 5e-3."""
    rows = []
    for name, found in load("pinn")["methods"].items():
        run = found["runs"][0]
        rows.append([f"`{name}`", *(f"{run[key]:,}" for key in ("step", "evaluations", "products", "jacobians"))])
    return table(["", "steps", "evaluations", "products", "Jacobians"], rows)


def sharing() -> str:
    """A step of ranks that share the work beside one in which each does all of it."""
    rows: dict[str, list[str]] = {}
    for row in load("sharing")["results"]:
        held = row["ranks"][0]["state_bytes"]
        half = held["shared"] / held["all do all"]
        rows.setdefault(row["method"], [f"`{row['method']}`"]).extend([f"{row['wall_ratio']:.2f}", f"{half:.2f}"])
    heads = ["", "GPT 2 × 256: wall time", "state of a rank", "GPT 1 × 512: wall time", "state of a rank"]
    return table(heads, rows.values())


TABLES: dict[str, Callable[[], str]] = {
    "matrices": matrices,
    "elementwise": elementwise,
    "usefulness": usefulness,
    "curvature": curvature,
    "burgers": burgers,
    "sharing": sharing,
}


def filled(text: str) -> str:
    """The README with its tables made anew.

    Raises:
        ValueError: A marker is missing.
    """
    for name, make in TABLES.items():
        pattern = re.compile(rf"<!-- {name} -->\n.*?<!-- /{name} -->", re.DOTALL)
        if not pattern.search(text):
            raise ValueError(f"README.md has no place <!-- {name} --> ... <!-- /{name} --> for this table")
        before, after = pattern.split(text)[0], pattern.split(text)[-1]
        text = f"{before}<!-- {name} -->\n{make()}\n<!-- /{name} -->{after}"
    return text


if __name__ == "__main__":
    README.write_text(filled(README.read_text()))
