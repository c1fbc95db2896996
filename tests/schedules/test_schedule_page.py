"""The formulas of docs/schedules.md are those of the code, and every curve is there."""

from __future__ import annotations

import math
import re
from pathlib import Path

import pytest

from guided_descent import schedules
from guided_descent.schedules import curves

PAGE = (Path(__file__).parents[2] / "docs" / "schedules.md").read_text()
ROWS = re.findall(r"^\| `(\w+\(.*?\))` \| `(.*?)` \| (.*?) ?\|$", PAGE, re.MULTILINE)
NUMBERS = {"steps": 37, "n": 1.7, "end": 0.02, "h": 6.5, "w": 8, "scale": 11.5, "b": -0.7, "ratio": 0.8, "k": 5}
MATHS = {"cos": math.cos, "sqrt": math.sqrt, "pi": math.pi, "min": min, "max": max, "__builtins__": {}}


@pytest.mark.parametrize(("call", "formula", "source"), ROWS, ids=[row[0] for row in ROWS])
def test_the_formula_is_the_curve(call, formula, source):
    curve = eval(call, {"__builtins__": {}} | curves.FUNCTIONS | NUMBERS)  # a page of ours, and no names but these
    assert curve.length == 37
    for t in range(37):
        assert curve(t) == pytest.approx(eval(formula, MATHS | NUMBERS | {"t": t, "p": t / 37}), abs=1e-12)
    name = call.partition("(")[0]
    if source:
        assert source.split(", ")[-1] in curves.FUNCTIONS[name].__doc__


def test_every_curve_and_every_schedule_is_there():
    assert {call.partition("(")[0] for call, _, _ in ROWS} == set(curves.FUNCTIONS)
    named = PAGE[PAGE.index("By name:") : PAGE.index("Lengths are ints")]
    lower = {name for name in schedules.__all__ if name[0].islower()}
    apart = {"accepted_steps", "branch", "curves", "power_timescale", "sketch"}
    assert set(re.findall(r"`(\w+)`", named)) == lower - apart
    for name in apart - {"accepted_steps", "power_timescale"}:
        assert name in PAGE
