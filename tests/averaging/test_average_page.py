"""The rates of docs/averaging.md are those of the code, and every average is there."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from random_walks import close, net, walk

from guided_descent import averaging
from guided_descent.averaging import ramps

PAGE = (Path(__file__).parents[2] / "docs" / "averaging.md").read_text()
ROWS = re.findall(r"^\| `(\w+\(model, .*?\))` \| `(.*?)` \| .* \| (.*?) ?\|$", PAGE, re.MULTILINE)
NUMBERS = {"d": 0.97, "n": 12, "g": 2.5, "k": 3, "f": 0.2}


@pytest.mark.parametrize(("call", "formula", "source"), ROWS, ids=[row[0] for row in ROWS])
def test_the_formula_is_the_rate(call, formula, source):
    model, generator = net(torch.float64), torch.Generator().manual_seed(1)
    names = {name: getattr(averaging, name) for name in averaging.__all__}
    average = eval(call, {"__builtins__": {}} | names | NUMBERS | {"model": model, "ramps": ramps})
    expected = {name: torch.zeros_like(p) for name, p in model.named_parameters()}
    for t in range(1, 41):
        walk(model, generator)
        average.update()
        rate = eval(formula, {"__builtins__": {}, "min": min, "t": t} | NUMBERS)
        assert 0 <= rate <= 1
        for name, p in model.named_parameters():
            expected[name] += rate * (p.detach() - expected[name])
        if average.started:
            close(average.evaluation_weights(model), expected, 1e-12)
    if source:
        number = source.split("arXiv:")[1]
        made = getattr(ramps, re.search(r"ramps\.(\w+)", call)[1]) if "ramp=" in call else type(average)
        assert number in made.__doc__


def test_every_average_is_there():
    kinds = {name for name in averaging.__all__ if isinstance(getattr(averaging, name), type)}
    apart = {"Average", "RunningAverage", "Synthesis", "BufferSource", "EvaluationSource"}
    for name in kinds - apart:
        assert f"{name}(model, " in PAGE
    assert {call.partition("(")[0] for call, _, _ in ROWS} == kinds - apart - {"LAWA", "PostHocEMA"}
    assert len(ROWS) == 7
