"""The catalogue: every recipe and wrapper says what a user asks, and the page of all of them is what the code says."""

from __future__ import annotations

from pathlib import Path

import pytest

import guided_descent as gd
from guided_descent.catalogue import table
from guided_descent.parts import WRAPPERS
from guided_descent.recipes import REGISTRY

PAGE = Path(__file__).parent.parent / "docs" / "optimizers.md"


@pytest.mark.parametrize("key", [*REGISTRY, *WRAPPERS])
def test_every_entry_says_what_a_user_asks(key: str) -> None:
    found = gd.describe(key)
    text = str(found)
    for part in (found.paper, found.formula, found.use, found.avoid):
        assert part
        assert part in text
    assert "Needs: " in text
    assert found.memory >= 0
    if key in REGISTRY:
        assert found.flops > 0
    assert all(item["help"] for item in found.hyperparameters)


def test_the_page_is_up_to_date() -> None:
    assert PAGE.read_text() == table(), "guided-descent list --markdown > docs/optimizers.md"


def test_needs() -> None:
    assert gd.describe("adamw").needs == ()
    assert gd.describe("sam").needs == ("step(closure): 2 gradients in a step",)
    assert gd.describe("kfac").needs == ("the model and the name of its loss",)
    assert gd.describe("clars").needs == ("the model",)
    assert gd.describe("sophia_h").needs == ("loss.backward(create_graph=optimizer.due('hessian'))",)
    assert gd.describe("adamw").memory == 2
    assert gd.describe("lion").memory == 1
