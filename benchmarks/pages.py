"""Write docs/first-order.md from the committed results: CLARS beside LARS, state in 8 bits, step times by the floor."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
PAGE = HERE.parent / "docs" / "first-order.md"


def load(name: str) -> Any:
    """The committed results of one script."""
    return json.loads((HERE / "results" / f"{name}.json").read_text())


def clars() -> list[str]:
    """CLARS beside LARS."""
    data = load("clars")
    lines = [
        "## CLARS without warmup, LARS with and without",
        "",
        f"`{data['command']}`: a convolutional network on real digits at batch {data['batch']:,}, {data['epochs']}",
        "epochs, five seeds. The rate follows linear scaling, times 1, 4 and 8, and is not searched; LARS's warmup",
        "is, on a seed of its own. Mean held-out accuracy with its 95 % interval, and the largest training loss of any",
        "seed: a run that left the ground has one far above ln 10 = 2.3. The exact rule of the paper is unverified.",
        "",
        "| rate | method | accuracy | largest loss |",
        "|---|---|---|---|",
    ]
    for table in data["tables"]:
        for row in table["rows"]:
            mean, low, high = row["accuracy"]
            worst = max(run["worst_loss"] for run in row["runs"])
            lines.append(
                f"| {table['rate']:.1f} | {row['method']} | {mean:.3f} ({low:.3f} to {high:.3f}) | {worst:.1f} |"
            )
    return lines


def eight_bit() -> list[str]:
    """State in 8 bits beside float32."""
    data = load("eight_bit")
    lines = [
        "## State in 8 bits",
        "",
        f"`{data['command']}`: Adam on `lm-source`, {data['steps']} steps. Mean change {data['mean_change']:+.2%}.",
        "",
        "| seed | float32, bits per byte | 8 bits | change | bytes of state for each parameter |",
        "|---|---|---|---|---|",
    ]
    for row in data["rows"]:
        whole, small = row["float32"], row["8bit"]
        lines.append(
            f"| {row['seed']} | {whole['bits_per_byte']:.4f} | {small['bits_per_byte']:.4f} | {row['change']:+.2%} | "
            f"{whole['bytes_each']:.2f}, {small['bytes_each']:.2f} |"
        )
    return lines


def floors() -> list[str]:
    """Step times over the floor, one line a recipe."""
    data = load("step_time-first_order")
    lines = [
        "## Steps beside the bytes that they must move",
        "",
        f"`{data['command']}`, {data['date'][:10]}: {data['results'][0]['elements']:,} parameters, one thread.",
        "The floor is the time of the step's bytes (gradients once, parameters and state twice) at the rate of torch's",
        "fused AdamW in the same rounds. Eager and compiled are without the check for non-finite gradients, which no",
        "peer has; it costs the difference to the first column. All contestants are in [step-time.md](step-time.md).",
        *([data["note"]] if "note" in data else []),
        "",
        "| recipe | ms, with check | eager, ms | over floor | compiled, ms | over floor | fastest peer, ms | MB |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for result in data["results"]:
        rows = {row["contestant"]: row for row in result["rows"]}
        peers = {name: row["ms"] for name, row in rows.items() if not row["ours"] and name != "torch fused adamw"}
        best = min(peers, key=lambda name: peers[name]) if peers else ""
        found = f"{peers[best]:.1f} ({best})" if best else ""
        eager, made = rows["ours ignore"], rows["ours compiled"]
        lines.append(
            f"| `{result['method'].removesuffix(' floor')}` | {rows['ours']['ms']:.1f} | {eager['ms']:.1f} | "
            f"{eager['over_floor']:.2f} | {made['ms']:.1f} | {made['over_floor']:.2f} | {found} | "
            f"{eager['state_bytes'] / 1e6:.1f} |"
        )
    return lines


def page() -> str:
    """The whole page."""
    head = ["# First-order methods: what was measured", "", "Made by `python benchmarks/pages.py`.", ""]
    return "\n".join([*head, *clars(), "", *eight_bit(), "", *floors()]) + "\n"


if __name__ == "__main__":
    PAGE.write_text(page())
