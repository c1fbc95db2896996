"""The table of a comparison as text cells: written once here, shown by the terminal, the report page and Markdown."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rich.table import Table
from rich.text import Text

from guided_descent.bench.specs import format_hyper


@dataclass(frozen=True)
class Column:
    """A column: its title, and what it means in one sentence."""

    title: str
    meaning: str


def columns(document: Mapping[str, Any]) -> list[Column]:
    """The columns for a comparison."""
    base = document["baseline"]
    target = document["target"]["value"]
    goal = "no target" if target is None else f"{number(target)}, the {document['target']['from']}"
    return [
        Column(
            "optimizer", "The optimizer; its hyperparameters stand in the protocol where they are not the defaults."
        ),
        Column("lr", "Peak learning rate; the schedule is the same for all."),
        Column(metric_label(document), "Mean ± standard deviation of the final value over seeds; a diverged run is ∞."),
        Column(f"vs {base}", "Difference with its 95 % t interval over seed pairs (of the logarithms)."),
        Column(
            "steps to target", f"First evaluation at the target ({goal}), median over seeds; in-run: never a headline."
        ),
        Column("time to target (s)", "Steps to target times the ms per step of the timing pass."),
        Column("ms/step", "CPU milliseconds per training step on one thread, from a separate alternating pass."),
        Column("optimizer share", "Part of that step spent in the optimizer."),
        Column("state (B/param)", "Bytes of optimizer state, in all and per parameter."),
        Column("update RMS", "Root mean square change of a parameter per step, median over the run."),
    ]


def rows(document: Mapping[str, Any]) -> Iterator[list[str]]:
    """One row of cells per arm, best first."""
    arms = document["arms"]
    sign = 1 if document["goal"] == "min" else -1

    def order(arm: Mapping[str, Any]) -> float:
        mean = arm["row"]["final_mean"]
        return math.inf if mean is None or not math.isfinite(mean) else sign * mean

    for arm in sorted(arms, key=order):
        row = arm["row"]
        mark = " *" if arm["budget"]["edge"] else ""
        yield [
            arm["label"],
            (f"{arm['lr']:.3g}" if arm["lr"] is not None else "–") + mark,
            plus_minus(row["final_mean"], row["final_sd"]),
            difference(row["difference"]) if row["difference"] else "baseline",
            number(row["steps_to_target"], 0, none="not reached"),
            seconds(row["time_to_target"], "not reached" if row["step_ms"] is not None else "not timed"),
            number(row["step_ms"], 1, none="not timed"),
            percent(row["optimizer_share"]),
            f"{size(row['state_bytes'])} ({row['state_bytes_per_parameter']:.1f})",
            f"{row['update_rms']:.2g}" if row["update_rms"] else "–",
        ]


def metric_label(document: Mapping[str, Any]) -> str:
    """The metric's name with its unit, unless the name says it.

    Example:
        >>> metric_label({"metric": "bits_per_byte", "unit": "bits/byte"})
        'bits per byte'
        >>> metric_label({"metric": "test_loss", "unit": "nats"})
        'test loss (nats)'
    """
    name, unit = str(document["metric"]).replace("_", " "), str(document["unit"])
    return name if not unit or unit == name.replace(" per ", "/") else f"{name} ({unit})"


def number(value: float | None, digits: int | None = None, none: str = "–") -> str:
    """A number with a sensible number of digits; ``none`` for None and for what is not finite.

    Example:
        >>> number(2.33214), number(0.000123), number(120.0, 0), number(None)
        ('2.332', '0.000123', '120', '–')
    """
    if value is None or not math.isfinite(value):
        return none
    return f"{value:,.{digits}f}" if digits is not None else f"{value:.4g}"


def seconds(value: float | None, none: str) -> str:
    """Seconds with three digits.

    Example:
        >>> seconds(18.153, "-"), seconds(1234.5, "-"), seconds(None, "not reached")
        ('18.2', '1,234', 'not reached')
    """
    if value is None or not math.isfinite(value):
        return none
    return f"{value:,.0f}" if value >= 100 else f"{value:#.3g}"


def plus_minus(mean: float | None, sd: float | None) -> str:
    """Mean and standard deviation with the same decimals.

    Example:
        >>> plus_minus(2.33214, 0.0152), plus_minus(2.5, None), plus_minus(None, None)
        ('2.332 ± 0.015', '2.5', '∞ (diverged)')
    """
    if mean is None or not math.isfinite(mean):
        return "∞ (diverged)"
    if sd is None or not math.isfinite(sd):
        return number(mean)
    digits = 6 if sd == 0 else min(8, max(0, 1 - math.floor(math.log10(sd))))
    if sd == 0:
        return f"{number(mean)} ± 0"
    return f"{mean:.{digits}f} ± {sd:.{digits}f}" if digits < 8 else f"{mean:.3g} ± {sd:.2g}"


def difference(entry: Mapping[str, Any]) -> str:
    """A difference and its interval in percent, or why there is none.

    Example:
        >>> difference({"percent": -11.3, "low": -12.5, "high": -10.1, "outcome": "better", "why": ""})
        '−11.3 % [−12.5, −10.1]'
    """
    if entry["why"] or entry["low"] is None or entry["high"] is None:
        return str(entry["why"] or entry["outcome"])

    def signed(value: float) -> str:
        if abs(value) < 0.05:
            return "0.0"
        return f"{value:+,.1f}".replace("-", "−")

    text = f"{signed(entry['percent'])} % [{signed(entry['low'])}, {signed(entry['high'])}]"
    return f"{text} no difference" if entry["outcome"] == "no difference" else text


def percent(share: float | None) -> str:
    """A share as percent."""
    return "not timed" if share is None else f"{100 * share:.1f} %" if share < 0.1 else f"{100 * share:.0f} %"


def size(count: float) -> str:
    """Bytes as a person says them.

    Example:
        >>> size(999), size(3_120_000)
        ('999 B', '3.1 MB')
    """
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000 or unit == "GB":
            return f"{count:.0f} B" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    raise AssertionError("unreachable")


def protocol(document: Mapping[str, Any]) -> list[tuple[str, str]]:
    """What was held equal, with what budget, on what machine and when: the small print as pairs."""
    p, machine = document["protocol"], document["machine"]
    seeds = document["seeds"]
    schedule = dict(p["schedule"])
    name = schedule.pop("name")
    options = ", ".join(f"{key} {value}" for key, value in schedule.items())
    budgets = {arm["label"]: arm["budget"]["text"] for arm in document["arms"]}
    same = len(set(budgets.values())) == 1
    budget = next(iter(budgets.values())) if same else "; ".join(f"{k}: {v}" for k, v in budgets.items())
    few = "" if len(seeds) >= 5 else " (fewer than 5: preliminary)"
    versions = ", ".join(f"{k} {v}" for k, v in document["versions"].items())
    load = document.get("load")
    facts = [
        ("task", f"{document['problem']}, {document['parameters']:,} parameters, {p['dtype']} on {p['device']}"),
        ("steps", f"{document['steps']} per run, evaluated every {p['eval_every']}"),
        ("seeds", f"n = {len(seeds)}{few}: {', '.join(map(str, seeds))}"),
        ("tuning budget", budget + (" for each" if same else "")),
        (
            "hyperparameters",
            "; ".join(f"{arm['label']}: {format_hyper(arm['hyper']) or 'defaults'}" for arm in document["arms"]),
        ),
        ("schedule", f"{name}{f' ({options})' if options else ''}, the same for all"),
        ("clipping", f"global gradient norm {p['clip']}" if p["clip"] else "none"),
        ("data", f"sha256 {p['data'][:16]}" if p["data"] else "–"),
        ("arms differ in", "; ".join(document["differences"]) or "the optimizer only"),
        ("machine", f"{machine.get('processor')}, {machine.get('cores')} cores, {machine.get('system')}"),
        ("threads", f"{p['threads']} per run, {p['workers'] or 1} runs at a time"),
        ("load average", f"{load:.1f} at the end" if load is not None else "unknown"),
        ("versions", versions + (f", commit {document['git'][:12]}" if document["git"] else "")),
        ("date", document["created"].replace("T", " ").replace("+00:00", " UTC")),
    ]
    if edges := [f"{arm['label']} ({arm['budget']['edge']})" for arm in document["arms"] if arm["budget"]["edge"]]:
        facts.insert(4, ("* best lr at grid edge", ", ".join(edges)))
    return facts


def rich_table(document: Mapping[str, Any]) -> Table:
    """The table for the terminal."""
    table = Table(box=None, pad_edge=False, header_style="bold", show_edge=False)
    for place, column in enumerate(columns(document)):
        table.add_column(Text(column.title), justify="left" if place == 0 else "right", overflow="fold")
    winner = document["verdict"]["winner"]
    for cells in rows(document):
        table.add_row(*(Text(cell) for cell in cells), style="bold green" if cells[0] == winner else "")
    return table


def stacked(document: Mapping[str, Any]) -> Iterator[str]:
    """The table as one block of lines per arm, for terminals too narrow for columns."""
    titles = [column.title for column in columns(document)]
    width = max(map(len, titles))
    for cells in rows(document):
        yield cells[0]
        for title, cell in zip(titles[1:], cells[1:], strict=True):
            yield f"  {title:<{width}}  {cell}"


def markdown(document: Mapping[str, Any]) -> str:
    """The table as Markdown."""

    def line(cells: Sequence[str]) -> str:
        return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"

    head = [column.title for column in columns(document)]
    return "\n".join([line(head), line(["---"] * len(head)), *map(line, rows(document))])
