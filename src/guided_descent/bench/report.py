"""The report of a comparison: one self-contained page, pictures, and the data beside them.

The page needs no network: style, script, data and plotly (once) are inside it. It is a pure function of the comparison
document, so it can be made again at any time from ``comparison.json``.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup

from guided_descent.bench import tables
from guided_descent.bench.figures import write_figures
from guided_descent.bench.files import BenchError, make_folder, os_line, write_json

TEMPLATES = Path(__file__).parent / "templates"
DIGITS = 6  # of a number on a curve


def write_report(document: Mapping[str, Any], out: str | os.PathLike[str]) -> list[Path]:
    """Write ``report.html`` and the PNGs into a folder, and ``comparison.json`` if it is not there.

    Args:
        document: See ``compare.build_document``.
        out: The folder; made if missing.

    Returns:
        The files that make up the report.

    Raises:
        BenchError: The folder or a file cannot be written.
    """
    out = Path(out)
    make_folder(out)
    page, data = out / "report.html", out / "comparison.json"
    if not data.exists():
        write_json(data, document)
    text = render(document)
    try:
        temporary = page.with_name(".report.html.tmp")
        temporary.write_text(text, encoding="utf-8")
        os.replace(temporary, page)
        pictures = write_figures(document, out)
    except OSError as error:
        raise BenchError(os_line("cannot write", page, error)) from error
    return [page, *pictures, data]


def render(document: Mapping[str, Any]) -> str:
    """The page as text."""
    from plotly.offline import get_plotlyjs

    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(TEMPLATES), autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True
    )
    metric = document["metric"].replace("_", " ")
    budgets = {arm["budget"]["text"] for arm in document["arms"]}
    return environment.get_template("report.html.j2").render(
        d=document,
        metric=metric,
        nbsp="\u00a0",
        budget=budgets.pop() if len(budgets) == 1 else "unequal",
        timed=all(arm["row"]["step_ms"] for arm in document["arms"]),
        columns=tables.columns(document),
        rows=list(tables.rows(document)),
        outcomes={arm["label"]: (arm["row"]["difference"] or {"outcome": ""})["outcome"] for arm in document["arms"]},
        runs=[_run(arm, run) for arm in document["arms"] for run in arm["runs"]],
        protocol=tables.protocol(document),
        data=_script_safe(_data(document, metric)),
        css=Markup((TEMPLATES / "report.css").read_text(encoding="utf-8")),
        js=Markup((TEMPLATES / "report.js").read_text(encoding="utf-8")),
        plotly=Markup(get_plotlyjs()),
    )


def _run(arm: Mapping[str, Any], run: Mapping[str, Any]) -> dict[str, Any]:
    none = "∞" if run["status"] == "diverged" else "–"
    texts = {key: tables.number(run[key], none=none) for key in ("final", "train_loss")}
    return {"label": arm["label"], "seed": run["seed"], "status": run["status"], "steps": run["stopped_at"], **texts}


def _data(document: Mapping[str, Any], metric: str) -> dict[str, Any]:
    """What the script draws, with numbers cut to the digits one can see."""
    arms = [
        {
            "label": arm["label"],
            "step_ms": arm["row"]["step_ms"],
            "optimizer_ms": arm["row"]["optimizer_ms"],
            "mean": arm["row"]["final_mean"],
            "difference": arm["row"]["difference"],
            "runs": [
                {"seed": run["seed"], "status": run["status"], "final": run["final"]}
                | {kind: {key: _cut(values) for key, values in run[kind].items()} for kind in ("eval", "train")}
                for run in arm["runs"]
            ],
        }
        for arm in document["arms"]
    ]
    head = {"metric": metric, "label": tables.metric_label(document), "baseline": document["baseline"]}
    return head | {"target": document["target"]["value"], "arms": arms}


def _cut(numbers: list[float | None]) -> list[float | None]:
    return [float(f"{x:.{DIGITS}g}") if isinstance(x, float) else x for x in numbers]


def _script_safe(value: Any) -> Markup:
    """JSON that can stand inside a script element: no ``<`` can close it or open a comment."""
    return Markup(json.dumps(value, separators=(",", ":"), allow_nan=False).replace("<", "\\u003c"))
