"""Products with slow matrices in bfloat16: close to those in float32, exact where the values are float64."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

import guided_descent as gd
from guided_descent.linalg.workspace import Workspace
from guided_descent.parts.geometry.kronecker import sandwich
from guided_descent.recipes.base import REGISTRY, lookup

RECIPES = [name for name in sorted(REGISTRY) if "product_dtype" in lookup(name)().values()]


class Work:
    """What ``sandwich`` needs of a batch."""

    work = Workspace()


def change(name: str, product: str, dtype: torch.dtype) -> Tensor:
    """What eight steps change in the weights of a small net."""
    torch.manual_seed(3)
    model = nn.Sequential(nn.Linear(24, 20), nn.Tanh(), nn.Linear(20, 4)).to(dtype)
    before = copy.deepcopy(model)
    early = {"start_preconditioning_step": 2} if name == "shampoo" else {}
    recipe = lookup(name)(product_dtype=product, **early)
    optimizer = gd.build(model, recipe, **({"loss": "half_mse"} if recipe.reads_layers else {}))
    for _ in range(8):
        x, y = torch.randn(64, 24, dtype=dtype), torch.randn(64, 4, dtype=dtype)
        optimizer.zero_grad()
        ((model(x) - y).square().sum() / 128).backward()
        optimizer.step()
    pairs = zip(model.parameters(), before.parameters(), strict=True)
    return torch.cat([(new - old).detach().flatten() for new, old in pairs if new.ndim == 2])


def test_the_family_has_it() -> None:
    assert {"kfac", "ekfac", "foof", "shampoo", "soap", "splus", "asgo"} <= set(RECIPES)


@pytest.mark.parametrize("name", RECIPES)
def test_bfloat16_is_close_and_not_the_same(name: str) -> None:
    exact, rounded = (change(name, dtype, torch.float32) for dtype in ("float32", "bfloat16"))
    assert float(exact.norm()) > 0
    assert not torch.equal(exact, rounded)
    assert float(torch.cosine_similarity(exact, rounded, dim=0)) > (0.95 if name == "splus" else 0.99)
    assert abs(float(rounded.norm() / exact.norm()) - 1) < 0.05


@pytest.mark.parametrize("name", RECIPES)
def test_float64_stays(name: str) -> None:
    exact, rounded = (change(name, dtype, torch.float64) for dtype in ("float32", "bfloat16"))
    assert torch.equal(exact, rounded)


@pytest.mark.parametrize("sides", [(True, True), (True, False), (False, True), (False, False)])
@pytest.mark.parametrize("turned", [False, True])
def test_the_product_is_the_product(sides: tuple[bool, bool], turned: bool) -> None:
    value = torch.randn(3, 9, 6)
    left, right = (torch.randn(3, d, d) if has else None for d, has in zip((9, 6), sides, strict=True))
    if turned:
        left, right = (None if a is None else a.mT for a in (left, right))
    expected = value.clone()
    if left is not None:
        expected = left @ expected
    if right is not None:
        expected = expected @ right
    for dtype, bound in (("float32", 1e-5), ("bfloat16", 0.02)):
        found = value.clone()
        sandwich(Work(), found, left, right, dtype)  # type: ignore[arg-type]
        assert float((found - expected).norm() / expected.norm()) < bound
