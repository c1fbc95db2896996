"""What ``build`` says to options that are not its own, and that the fix it names works."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import nn

import guided_descent as gd
from guided_descent.recipes import Recipe, hyper
from guided_descent.recipes.base import REGISTRY


def net() -> nn.Sequential:
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))


@dataclass(frozen=True, kw_only=True)
class Own(Recipe):
    """A recipe of the user's."""

    lr: float = hyper(0.1, ge=0)


@pytest.mark.parametrize("recipe", ["kfac", gd.recipes.KFAC()])
def test_a_hyperparameter_given_to_build_is_an_error_that_shows_the_fix(recipe: Any) -> None:
    model = net()
    with pytest.raises(TypeError, match="lr is a hyperparameter of kfac: give it to the recipe") as error:
        gd.build(model, recipe, lr=0.25)
    fixes = re.findall(r"build\(model, guided_descent\.\S+\(.*?\)\)|guided_descent\.KFAC\(.*?\)", str(error.value))
    assert len(fixes) == 2
    for fix in fixes:
        opt = eval(fix, {"build": gd.build, "model": model, "guided_descent": gd})
        assert (type(opt).__name__, opt.param_groups[0]["lr"]) == ("KFAC", 0.25)


@pytest.mark.parametrize("key", sorted(REGISTRY))
def test_every_recipe_is_where_the_message_says(key: str) -> None:
    cls = REGISTRY[key].cls
    assert getattr(gd.recipes, cls.__name__) is cls
    assert getattr(gd, cls.__name__).recipe_class is cls
    with pytest.raises(TypeError, match=rf"guided_descent\.recipes\.{cls.__name__}\(lr=0\.5\)"):
        gd.build(net(), key, lr=0.5)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: gd.build(net(), "kfac", lr=torch.tensor(0.1)), r"recipes\.KFAC\(lr=\.\.\.\)"),
        (lambda: gd.build(net(), "adamw", betas=(0.5, 0.9)), r"recipes\.AdamW\(betas=\(0\.5, 0\.9\)\)"),
        (lambda: gd.build(net(), "muon", aux="sgd"), r"recipes\.Muon\(aux='sgd'\)"),
        (lambda: gd.build(net(), Own(), lr=0.5), r"lr is a hyperparameter of Own: .*, build\(model, Own\(lr=0\.5\)\)$"),
        (
            lambda: gd.build(net(), "kfac", los="mse"),
            r"unknown build option 'los'; did you mean 'loss'\? \(valid: rules",
        ),
        (lambda: gd.build(net(), "adamw", damping=0.1), r"unknown build option 'damping' \(valid: rules"),
    ],
)
def test_other_options(make: Callable[[], Any], message: str) -> None:
    with pytest.raises(TypeError, match=message):
        make()


@pytest.mark.parametrize("make", [gd.AdamW, gd.MuonClip])
def test_a_loss_is_for_recipes_that_read_layers(make: Any) -> None:
    model = nn.TransformerEncoderLayer(8, 2, 8)  # whose attention MuonClip watches
    with pytest.raises(ValueError, match="loss= and scaler= are for recipes that read layers"):
        make(model, loss="mse")
