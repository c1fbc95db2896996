"""Routing under every recipe: tied heads, every shape once, experts and fused maps, flattened shards, the audit."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from drive import (
    SAMPLES,
    Net,
    Unscaled,
    assert_close,
    evaluations,
    exact,
    feed,
    make,
    parameters,
    parts_of,
    per_tensor,
    push,
    reads_layers,
    recipe_of,
    refuses_lists,
    takes_biases,
)
from torch import Tensor, nn
from torch.nn import functional as F

import guided_descent as gd
from guided_descent.parts import Descend, Polar
from guided_descent.recipes import REGISTRY


class Gpt(nn.Module):
    """A tiny language model with a tied head and neutral names."""

    def __init__(self, head_first: bool) -> None:
        super().__init__()
        first, second = ("out", "tok") if head_first else ("tok", "out")
        made = {"tok": nn.Embedding(19, 8), "out": nn.Linear(8, 19, bias=False)}
        self.add_module(first, made[first])
        self.mid = nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 8))
        self.add_module(second, made[second])
        self.out.weight = self.tok.weight

    def forward(self, tokens: Tensor) -> Tensor:
        return self.out(torch.tanh(self.mid(self.tok(tokens))))


MIDDLE = ["mid.0.weight", "mid.0.bias", "mid.2.weight", "mid.2.bias"]


@pytest.mark.parametrize("head_first", [False, True])
def test_a_tied_head_has_one_owner(key: str, head_first: bool) -> None:
    net = Gpt(head_first)
    opt = make(key, net)
    lines = gd.explain(opt).lines
    shared = next(line for line in lines if line.parameter in ("tok.weight", "out.weight"))
    assert {shared.parameter, *shared.aliases} == {"tok.weight", "out.weight"}
    assert shared.role in ("embedding", "head")
    joined = {name: line for line in lines for name in line.aliases if name in MIDDLE}  # biases, in blocks of weights
    assert sorted([*(line.parameter for line in lines), *joined]) == sorted([*MIDDLE, shared.parameter])
    assert all(line.why and line.lr > 0 and line.recipe for line in lines)
    if recipe_of(key).joins_bias:
        assert {name: line.parameter for name, line in joined.items()} == dict(zip(MIDDLE[1::2], MIDDLE[::2]))
        assert all(line.view == (8, 9) for line in joined.values())
    else:
        assert not joined
    if REGISTRY[key].family == "spectral":
        assert shared.recipe != key
        assert {line.parameter for line in lines if line.recipe == key} == {"mid.0.weight", "mid.2.weight"}
    owned = [name for group in opt.param_groups for name in group["param_names"]]
    assert sorted(owned) == sorted([*MIDDLE, shared.parameter])
    text = str(gd.explain(opt))
    assert all(line.parameter in text and line.why in text for line in lines)


class Zoo(nn.Module):
    """One of every awkward kind."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)
        self.depthwise = nn.Conv2d(4, 4, 3, groups=4)
        self.line = nn.Conv1d(4, 5, 3)
        self.first = nn.Linear(5, 5)
        self.row = nn.Parameter(torch.randn(1, 7))
        self.column = nn.Parameter(torch.randn(7, 1))
        self.vector = nn.Parameter(torch.randn(6))
        self.scalar = nn.Parameter(torch.tensor(0.5))
        self.empty = nn.Parameter(torch.zeros(0, 4))
        self.waves = nn.Parameter(torch.randn(3, 3, dtype=torch.complex64))
        self.frozen = nn.Parameter(torch.randn(3, 3), requires_grad=False)
        self.head = nn.Linear(5, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.depthwise(self.conv(x))[..., 0]
        return self.head(self.first(self.line(x)[..., 0]))

    def sample(self, made: torch.Generator) -> Tensor:
        return torch.randn(SAMPLES, 3, 7, 7, generator=made)


def test_every_shape_is_owned_once_and_trains(key: str) -> None:
    net = Zoo()
    opt = make(key, net)
    owned = [name for group in opt.param_groups for name in group["param_names"]]
    assert sorted(owned) == sorted(name for name, _ in net.named_parameters())
    frozen = net.frozen.detach().clone()
    before = parameters(net)
    push(opt, 5)
    for name, p in net.named_parameters():
        assert bool(torch.isfinite(p).all())
        assert name in ("frozen", "empty") or not torch.equal(p, before[name]), name
    assert torch.equal(net.frozen, frozen)
    line = next(line for line in gd.explain(opt).lines if line.parameter == "frozen")
    assert (line.recipe, line.state_bytes) == ("frozen", 0)
    if recipe_of(key).matrix:
        takes = {line.parameter for line in gd.explain(opt).lines if line.recipe == key}
        assert {"conv.weight", "line.weight", "first.weight"} <= takes
        others = {"depthwise.weight", "row", "column", "vector", "scalar", "empty", "waves"}
        assert not takes & (others if takes_biases(key) else others | {"conv.bias"})


class Experts(nn.Module):
    """Stacked maps ``[E, out, in]``."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.experts = nn.Parameter(weight.clone())

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([x @ weight.T for weight in self.experts], 1)

    def sample(self, made: torch.Generator) -> Tensor:
        return torch.randn(SAMPLES, self.experts.shape[-1], generator=made)


class Apart(nn.Module):
    """The same maps as separate Linears."""

    def __init__(self, *weights: Tensor) -> None:
        super().__init__()
        self.maps = nn.ModuleList(nn.Linear(w.shape[1], w.shape[0], bias=False) for w in weights)
        self.double()
        with torch.no_grad():
            for module, weight in zip(self.maps, weights):
                module.weight.copy_(weight)

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([module(x) for module in self.maps], 1)


def train_both(key: str, joint: nn.Module, rules: list[Any], split: Any) -> tuple[Tensor, Tensor]:
    """Train a joint weight and its separate copies on the same gradients."""
    [p] = joint.parameters()
    apart = Apart(*split(p.detach()))
    asked = [gd.rule("*", role="matrix")] if recipe_of(key).matrix else []
    more = exact(key) | ({"parametrization": Unscaled()} if recipe_of(key).parametrization else {})
    one, two = make(key, joint, rules=rules, **more), make(key, apart, rules=asked, **more)
    made = torch.Generator().manual_seed(3)
    for number in range(7):
        g = torch.randn(p.shape, generator=made, dtype=torch.float64)

        def whole(g: Tensor = g) -> None:
            p.grad = g

        def parts(g: Tensor = g) -> None:
            for module, piece in zip(apart.maps, split(g)):
                module.weight.grad = piece.contiguous()

        feed(one, whole, number)
        feed(two, parts, number)
    return torch.cat([x.flatten() for x in split(p.detach())]), torch.cat(
        [module.weight.detach().flatten() for module in apart.maps]
    )


#: Refreshes spread over a period fall on other steps for other sets of blocks.
TOGETHER = {"refresh_schedule": "every"}


def together(key: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Refresh all at once, where a recipe has the choice."""
    import drive

    if "refresh_schedule" in REGISTRY[key].cls.numbers():
        monkeypatch.setattr(drive, "SMALL", drive.SMALL | TOGETHER)


def test_stacked_experts_equal_separate_maps(key: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if per_tensor(key):
        return  # a stack is one tensor to it
    together(key, monkeypatch)
    joint = Experts(torch.randn(3, 4, 4, dtype=torch.float64))
    rules = [gd.rule("experts", role="expert")] if recipe_of(key).matrix else []
    if reads_layers(key):  # a stack is the weight of no layer
        [line] = gd.explain(make(key, joint, rules=rules)).lines
        assert line.recipe == recipe_of(key)().spare().label
        return
    a, b = train_both(key, joint, rules, lambda w: list(w))
    torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-9)


def test_fused_grouped_queries_equal_separate_maps(key: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if per_tensor(key):
        return  # a fused map is one tensor to it
    together(key, monkeypatch)
    joint = nn.Linear(8, 4 * 4 + 2 * 4 + 2 * 4, bias=False).double()  # four query heads, two of keys and of values
    rules = [gd.rule("weight", role="fused", split=(16, 8, 8))] if recipe_of(key).matrix else []
    a, b = train_both(key, joint, rules, lambda w: list(w.split([16, 8, 8])))
    torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)


def test_a_flattened_shard_is_never_silent(key: str) -> None:
    net = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 8), nn.Linear(8, 2))
    for module in net:
        if isinstance(module, nn.Linear):
            module.weight = nn.Parameter(module.weight.detach().flatten()[:20])
    if recipe_of(key).matrix:
        with pytest.raises(ValueError, match=r"'0\.weight'.*flattened.*fully_shard"):
            make(key, net)
    else:
        push(make(key, net), 2)


def test_the_audit_counts_every_use(key: str) -> None:
    net = Net()
    opt = make(key, net)
    push(opt, 10)
    audit = opt.audit()
    lines = [line for line in gd.explain(opt).lines if line.recipe == key]
    own = [line.parameter for line in lines]
    if any(isinstance(part, Polar) for part in parts_of(key)):
        binder = opt._engine.binder
        parts = {line.parameter: binder.parts(line.group, binder.blocks[line.parameter][0]) for line in lines}
        own = [name for name in own if any(isinstance(part, Polar) for part in parts[name])]  # not tables, in scion
        assert {name: audit[name]["orthogonalizations"] for name in own} == dict.fromkeys(own, 10)
        assert not set(audit) - set(own)
    if reads_layers(key):
        assert {name: audit[name]["captures"] for name in own} == dict.fromkeys(own, 5)  # every second step
    group = next(g for g in opt.param_groups if "up.weight" in g["param_names"])
    for part in parts_of(key):
        if part.policy(group).period:
            assert part.policy(group).period == 3
            for name in own:
                [made] = (b for b in opt._engine.binder.blocks[name] if b.key == name)
                assert audit[name]["refreshes"] == 3 * len(part.tasks(made))  # in steps 2 to 10, every third one
    if recipe_of(key).matrix:
        assert own
        assert all(sum(audit.get(name, {}).values()) > 0 for name in own)


# -- spectral methods ----------------------------------------------------------------------------------------------


def spectral(*, pure: bool = False) -> list[str]:
    """Recipes with a polar factor whose length does not depend on the gradient's; pure: nothing reshapes it."""
    found = []
    for key in gd.list_optimizers():
        geometry = [part for part in parts_of(key) if part.where == "geometry"]
        kinds = [type(part) for part in geometry]
        along = any(isinstance(part, Descend) for part in parts_of(key))
        if Polar in kinds and along and (not pure or kinds == [Polar]):
            found.append(key)
    return found


def update_of(key: str, g: Tensor, **more: Any) -> Tensor:
    """The direction of a first step from zero, at learning rate 1 and without decay."""
    p = nn.Parameter(torch.zeros_like(g))
    opt = make(key, [("p", p)], lr=1.0, weight_decay=0.0, **more)
    p.grad = g.clone()
    opt.step((lambda: 0.0) if evaluations(opt) > 1 else None)
    return -p.detach()


@pytest.mark.filterwarnings("ignore:.*without their model")
@pytest.mark.parametrize("spectral_key", spectral(pure=True))
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-4), (torch.float64, 1e-10)])
def test_the_exact_polar_factor_is_orthogonal(spectral_key: str, dtype: torch.dtype, tolerance: float) -> None:
    for shape in ((6, 6), (5, 9), (9, 5)):
        u = update_of(spectral_key, torch.randn(shape, dtype=dtype), coefficients="exact", scale="original")
        u = u / max(1.0, shape[0] / shape[1]) ** 0.5
        gram = u @ u.mT if shape[0] <= shape[1] else u.mT @ u
        assert float((gram - torch.eye(min(shape), dtype=dtype)).abs().max()) < tolerance


@pytest.mark.filterwarnings("ignore:.*without their model")
@pytest.mark.parametrize("spectral_key", spectral(pure=True))
@pytest.mark.parametrize(
    ("name", "low", "high", "floor"), [("jordan", 0.68, 1.21, 3e-3), ("polar_express", 0.85, 1.15, 1e-3)]
)
def test_polynomials_bring_singular_values_near_one(
    spectral_key: str, name: str, low: float, high: float, floor: float
) -> None:
    q, r = (torch.linalg.qr(torch.randn(24, 24, dtype=torch.float64)).Q for _ in range(2))
    sigma = torch.logspace(0, math.log10(floor) + 0.05, 24, dtype=torch.float64)
    g = (q * (sigma / sigma.norm())) @ r.mT
    kept = sigma / sigma.norm() >= floor
    u = update_of(spectral_key, g, coefficients=name, ns_dtype="float64", scale="original")
    found = ((q.mT @ u) @ r).diagonal()[kept]
    assert kept.sum() > 15
    assert low <= float(found.min())
    assert float(found.max()) <= high


@pytest.mark.filterwarnings("ignore:.*without their model")
@pytest.mark.parametrize("spectral_key", spectral())
@pytest.mark.parametrize("factor", [1e-12, 1e-6, 1e6])
def test_the_scale_of_the_gradient_does_not_matter(spectral_key: str, factor: float) -> None:
    g = torch.randn(8, 12)
    one, other = update_of(spectral_key, g), update_of(spectral_key, g * factor)
    assert float((one - other).norm()) < 0.01 * float(one.norm())


def test_a_bare_list_says_that_it_goes_by_shape_once(key: str) -> None:
    if refuses_lists(key):
        return
    params = [nn.Parameter(torch.randn(4, 4)), nn.Parameter(torch.randn(4))]
    if recipe_of(key).matrix:
        with pytest.warns(UserWarning, match="without their model") as caught:
            opt = make(key, params)
        assert len(caught) == 1
    else:
        opt = make(key, params)
    assert "shape" in gd.explain(opt).lines[0].why
    loss = F.mse_loss(params[0], torch.zeros(4, 4))
    loss.backward()
    opt.step((lambda: 0.0) if evaluations(opt) > 1 else None)
    assert_close({"p": params[1]}, {"p": params[1]}, 0.0)
