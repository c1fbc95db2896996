"""Ten architectures against their frozen routing tables, which were reviewed line by line."""

from __future__ import annotations

import difflib
from pathlib import Path

import pytest
import torch
from architectures import ARCHITECTURES, example

from guided_descent.routing import Role, route

ORACLES = Path(__file__).parent.parent / "oracles" / "routing"


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_table_equals_the_frozen_one(name: str) -> None:
    expected = (ORACLES / f"{name}.txt").read_text(encoding="utf-8")
    actual = f"{route(ARCHITECTURES[name]())}\n"
    diff = "\n".join(difflib.unified_diff(expected.splitlines(), actual.splitlines(), "frozen", "now", "", "", 1, ""))
    assert actual == expected, f"the routing of {name} changed:\n{diff}"


def test_every_frozen_table_has_its_architecture() -> None:
    assert {path.stem for path in ORACLES.glob("*.txt")} == set(ARCHITECTURES)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_wrapped_compiled_and_meta_models_route_alike(name: str) -> None:
    expected = route(ARCHITECTURES[name]())
    assert route(torch.nn.DataParallel(ARCHITECTURES[name]())) == expected
    assert route(torch.compile(ARCHITECTURES[name]())) == expected
    with torch.device("meta"):
        assert route(ARCHITECTURES[name]()) == expected


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_the_model_runs_and_every_routed_parameter_takes_part(name: str) -> None:
    model = ARCHITECTURES[name]()
    out = model(example(name))
    sum(o.square().mean() for o in (out if isinstance(out, tuple) else (out,))).backward()
    assert [entry.name for entry in route(model)] == [n for n, p in model.named_parameters() if p.grad is not None]


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_outputs_and_tables_are_never_matrices(name: str) -> None:
    """An independent check from the sizes chosen here: 50 tokens, 10 classes, 2 segments and 17 or 16 positions."""
    for block in route(ARCHITECTURES[name]()).blocks:
        if {50, 10, 2, 17} & set(block.shape[:1]):
            assert block.role in (Role.EMBEDDING, Role.HEAD, Role.BIAS), block
