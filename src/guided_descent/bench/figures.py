"""Pictures as PNG: of a comparison, by step, by time and final values with every seed; and of schedules."""

from __future__ import annotations

import statistics
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from guided_descent.bench.tables import metric_label
from guided_descent.schedules import Curve

COLOURS = ("#3b6fd4", "#d9822b", "#0f8a68", "#b5488e", "#6c55c9", "#9a7b14", "#1c93b8", "#7a7f87")
LATE = 0.2  # the part of a run that is outside the frame
INK, SOFT, GRID = "#1b1d21", "#5d636d", "#ececee"


def write_figures(document: Mapping[str, Any], out: Path) -> list[Path]:
    """Write ``curves-step.png``, ``curves-time.png`` and ``finals.png`` and return their paths.

    Raises:
        OSError: A file cannot be written.
    """
    paths = []
    for name, draw, size in (
        ("curves-step", _curves_by_step, (8.0, 4.6)),
        ("curves-time", _curves_by_time, (8.0, 4.6)),
        ("finals", _finals, (8.0, 1.2 + 0.45 * len(document["arms"]))),
    ):
        figure, axes = _empty(size)
        draw(axes, document)
        paths.append(out / f"{name}.png")
        figure.savefig(paths[-1])
    return paths


def write_curves(curves: Mapping[str, Curve], path: Path, steps: int, *, peak: float = 1.0, unit: str = "step") -> None:
    """Write a PNG of schedules over their first ``steps`` units, named by their keys.

    Raises:
        OSError: The file cannot be written.
    """
    figure, axes = _empty((8.0, 4.0))
    count = min(steps, 2000)
    places = sorted({round(i * (steps - 1) / max(1, count - 1)) for i in range(count)})
    for number, (label, curve) in enumerate(curves.items()):
        values = [peak * curve(place) for place in places]
        axes.plot(places, values, color=COLOURS[number % len(COLOURS)], linewidth=2.2, label=label)
    axes.set_ylim(bottom=0)
    axes.set_xlabel(unit, color=SOFT)
    axes.set_ylabel("factor" if peak == 1 else "learning rate", color=SOFT)
    axes.legend(frameon=False, labelcolor=INK, fontsize=8, loc="upper center", bbox_to_anchor=(0.5, -0.12))
    figure.savefig(path, format="png")


def _empty(size: tuple[float, float]) -> tuple[Any, Any]:
    """A figure and its axes, drawn without a display."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=size, dpi=160, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    axes.tick_params(colors=SOFT, length=0, labelsize=9)
    axes.grid(color=GRID, linewidth=0.8)
    axes.set_axisbelow(True)
    for side in axes.spines.values():
        side.set_visible(False)
    return figure, axes


def _curves_by_step(axes: Any, document: Mapping[str, Any]) -> None:
    _curves(axes, document, "step")


def _curves_by_time(axes: Any, document: Mapping[str, Any]) -> None:
    _curves(axes, document, "time")


def _curves(axes: Any, document: Mapping[str, Any], by: str) -> None:
    """Runs thin, their mean strong; the first fifth of the run is outside the frame, as the page shows it at first."""
    ends: list[float] = []
    inside: list[float] = []
    for number, arm in enumerate(document["arms"]):
        colour, cost = COLOURS[number % len(COLOURS)], arm["row"]["step_ms"]
        sums: dict[int, list[tuple[float, float]]] = {}
        for run in arm["runs"]:
            steps, values = run["eval"]["step"], run["eval"]["value"]
            x = steps if by == "step" else [s * cost / 1e3 for s in steps] if cost else run["eval"]["seconds"]
            axes.plot(x, values, color=colour, linewidth=0.8, alpha=0.5)
            for step, place, value in zip(steps, x, values, strict=True):
                sums.setdefault(step, []).append((place, value))
            ends.extend(x[-1:])
            inside.extend(v for s, v in zip(steps, values, strict=True) if s >= LATE * document["steps"])
        whole = [sums[step] for step in sorted(sums) if len(sums[step]) == len(arm["runs"])]
        mean_x, mean_y = ([statistics.fmean(p[i] for p in points) for points in whole] for i in (0, 1))
        axes.plot(mean_x, mean_y, color=colour, linewidth=2.2, label=arm["label"])
    if inside:
        room = 0.06 * (max(inside) - min(inside) or abs(max(inside)) or 1.0)
        axes.set_ylim(min(inside) - room, max(inside) + room)
        axes.set_xlim(LATE * max(ends), max(ends) * 1.01)
    axes.set_xlabel("step" if by == "step" else "CPU seconds of training (steps × ms per step)", color=SOFT)
    axes.set_ylabel(metric_label(document), color=SOFT)
    axes.legend(frameon=False, labelcolor=INK, fontsize=9)


def _finals(axes: Any, document: Mapping[str, Any]) -> None:
    labels = [arm["label"] for arm in document["arms"]]
    for number, arm in enumerate(document["arms"]):
        finals = [run["final"] for run in arm["runs"] if run["final"] is not None]
        colour = COLOURS[number % len(COLOURS)]
        axes.plot(finals, [number] * len(finals), "o", color=colour, alpha=0.65, markersize=6)
        if finals:
            axes.plot([statistics.fmean(finals)], [number], "|", color=colour, markersize=20, markeredgewidth=2.2)
    axes.set_yticks(range(len(labels)), labels, color=INK)
    axes.set_ylim(len(labels) - 0.5, -0.5)
    axes.grid(visible=False, axis="y")
    axes.set_xlabel(f"final {metric_label(document)}, every seed", color=SOFT)
