"""Commands that plan: schedule."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from guided_descent import schedules
from guided_descent.cli.common import Json, command, count, print_json
from guided_descent.cli.errors import CommandError
from guided_descent.schedules import Curve, Tokens, curves

POINTS = 129  # of a curve in JSON


@command(
    examples=[
        "schedule",
        "schedule 'warmup(200) >> constant(7800) >> linear(2000)' --lr 3e-4",
        "schedule 'wsd(10000, warmup=0.02)' 'warmup(200) >> cosine(9800)' --png schedule.png",
        "schedule 'inverse_sqrt(500)' --steps 20000 --json",
        "schedule 'wsd(2_000_000_000, warmup=0.01)' --tokens-per-step 524288",
    ]
)
def schedule(
    curve: Annotated[
        list[str] | None, typer.Argument(help="Curves joined by >>, or one of wsd, trapezoid, noam, one_cycle.")
    ] = None,
    steps: Annotated[int | None, count(1, "How much of it to show.", "all of it")] = None,
    lr: Annotated[float, typer.Option(help="The peak learning rate.", show_default="show factors")] = 1.0,
    tokens_per_step: Annotated[
        int | None, count(1, "Tokens of an optimizer step, where lengths are in tokens.", "lengths are steps")
    ] = None,
    png: Annotated[Path | None, typer.Option(help="Write a picture of them all, too.", dir_okay=False)] = None,
    as_json: Json = False,
) -> None:
    """Draw learning-rate schedules in the terminal or as PNG; without one, list the curves that they are made of."""
    if not curve:
        if png is not None or steps is not None:
            raise CommandError("there is nothing to draw; give a curve, such as 'warmup(200) >> cosine(9800)'")
        _list(as_json)
        return
    found = {text: curves.parse(text, {name: partial(_whole, name) for name in WHOLE}) for text in curve}
    lengths = {text: _shown(each, steps) for text, each in found.items()}
    if png is not None:
        from guided_descent.bench.figures import write_curves

        unit = "step" if tokens_per_step is None else "token"
        write_curves(found, png, max(lengths.values()), peak=lr, unit=unit)
    if as_json:
        rows = [_document(each, lengths[text], lr, tokens_per_step) for text, each in found.items()]
        print_json({"schedules": rows})
        return
    for text, each in found.items():
        print(repr(each))
        print(schedules.sketch(each, lengths[text], peak=lr))
        if tokens_per_step is not None:
            print(f"{Tokens(lengths[text], per_step=tokens_per_step).steps:,} optimizer steps")
    if png is not None:
        print(png)


#: Schedules of a whole run whose names are no curve's.
WHOLE = ("wsd", "trapezoid", "noam", "one_cycle")


def _whole(name: str, *arguments: Any, **options: Any) -> Curve:
    """The curve of a named schedule, by what it makes of an optimizer."""
    opt = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    options |= {"momentum": None} if name == "one_cycle" else {}
    made = getattr(schedules, name)(opt, *arguments, **options)
    return made.curve if isinstance(made, schedules.Schedule) else made.schedules[0].curve


def _shown(curve: Curve, steps: int | None) -> int:
    length = steps or curve.length
    if length is None:
        raise CommandError(f"{curve!r} has no end; say by --steps how much of it to show")
    return length


def _document(curve: Curve, steps: int, lr: float, per_step: int | None) -> dict[str, Any]:
    places = sorted({round(i * (steps - 1) / (POINTS - 1)) for i in range(POINTS)})
    return {
        "curve": repr(curve),
        "length": curve.length,
        "unit": "steps" if per_step is None else "tokens",
        "optimizer_steps": steps if per_step is None else Tokens(steps, per_step=per_step).steps,
        "points": [[place, lr * curve(place)] for place in places],
    }


def _list(as_json: bool) -> None:
    functions: list[Callable[..., Any]] = [*curves.FUNCTIONS.values(), *(getattr(schedules, name) for name in WHOLE)]
    rows = [(_call(function), (inspect.getdoc(function) or "").partition("\n")[0]) for function in functions]
    if as_json:
        print_json({"curves": [{"call": call, "what": what} for call, what in rows]})
        return
    table = Table(box=None, pad_edge=False, header_style="bold")
    for title in ("curve", "factor f by step t"):
        table.add_column(title, overflow="fold")
    for call, what in rows:
        table.add_row(Text(call), Text(what))
    Console().print(table)


def _call(function: Callable[..., Any]) -> str:
    """How it is written, without the optimizer."""
    given = [p for p in inspect.signature(function).parameters.values() if p.name not in ("optimizer", "momentum")]
    texts = [p.name if p.default is p.empty or p.default is None else f"{p.name}={p.default!r}" for p in given]
    return f"{function.__name__}({', '.join(texts)})"
