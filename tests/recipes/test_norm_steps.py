"""Scion against references for each role, the balls it never leaves, initial weights; Hyperball and its sphere."""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import guided_descent as gd
from guided_descent.parts import SphereStep
from oracles import adam_family as family
from oracles import norm_balls as balls
from oracles import step_rules
from oracles.muon import svd_polar
from oracles.training import Bag, far, stream, train

F64 = torch.float64
PATHS: list[dict[str, bool]] = [{}, {"foreach": False}, {"compile": True}]
IDS = ["lists", "plain", "compiled"]
EXACT: dict[str, Any] = {"coefficients": "exact", "ns_dtype": "float64"}
#: Role, field of the recipe and its value, the key of the radius, the reference's ball, shape.
CASES = [
    ("matrix", "hidden", "spectral", "radius", "spectral", (9, 4)),
    ("matrix", "hidden", "spectral", "radius", "spectral", (4, 9)),
    ("matrix", "hidden", "spectral_max", "radius", "spectral_max", (4, 9)),
    ("matrix", "hidden", "spectral_max", "radius", "spectral_max", (9, 4)),
    ("matrix", "hidden", "sign", "radius", "sign", (5, 7)),
    ("matrix", "hidden", "rows", "radius", "rows", (5, 7)),
    ("matrix", "hidden", "columns", "radius", "columns", (5, 7)),
    ("conv", "conv", "spectral", "conv_radius", "conv", (6, 3, 2, 2)),
    ("conv", "conv", "spectral", "conv_radius", "conv", (3, 2, 3, 3)),
    ("head", "head", "sign", "head_radius", "sign", (5, 7)),
    ("head", "head", "rows", "head_radius", "rows", (5, 7)),
    ("head", "head", "spectral", "head_radius", "spectral", (5, 7)),
    ("embedding", "embedding", "columns", "embedding_radius", "table", (11, 6)),
    ("embedding", "embedding", "sign", "embedding_radius", "plain", (11, 6)),
    ("bias", "bias", "rms", "bias_radius", "rms", (6,)),
    ("bias", "bias", "sign", "bias_radius", "plain", (6,)),
]


def run(
    key: str, start: Tensor, grad: Any, steps: int, role: str, rules: dict[str, Any] | None = None, **options: Any
) -> list[Tensor]:
    model = Bag({"w": start})
    opt = gd.optimizer(key, model, rules=[gd.rule("w", role=role, **(rules or {}))], **EXACT | options)
    if options.get("compile"):
        opt._engine.compiled.backend = "eager"
    assert [group["recipe"] for group in opt.param_groups] == [key]
    return train(opt, list(model.parameters()), [grad], steps)[0]


@pytest.mark.parametrize("path", PATHS, ids=IDS)
@pytest.mark.parametrize("constrained", [True, False])
@pytest.mark.parametrize(("role", "field", "value", "key", "ball", "shape"), CASES)
def test_scion_takes_the_references_steps(
    role: str,
    field: str,
    value: str,
    key: str,
    ball: str,
    shape: tuple[int, ...],
    constrained: bool,
    path: dict[str, bool],
) -> None:
    start, grad = torch.randn(shape, dtype=F64), stream(shape, 1)
    numbers: dict[str, Any] = {"momentum": 0.8, "constrained": constrained}
    found = run("scion", start, grad, 36, role, lr=0.05, **{key: 3.0, field: value}, **numbers, **path)
    want = balls.scion(start, grad, 36, 0.05, ball=ball, radius=3.0, **numbers)
    assert far(found, want) < 1e-11


def test_a_transposed_weight_has_its_own_sides() -> None:
    start, grad = torch.randn(4, 9, dtype=F64), stream((4, 9), 1)  # stored (in, out)
    for value in ("spectral", "sign", "rows", "columns"):
        found = run("scion", start, grad, 8, "matrix", {"transposed": True}, lr=0.05, radius=3.0, hidden=value)
        want = balls.scion(start.T, lambda t, p: grad(t, p.T).T, 8, 0.05, ball=value, radius=3.0)
        assert far(found, [w.T for w in want]) < 1e-11, value


def test_a_fused_map_is_read_piece_by_piece() -> None:
    start, grad = torch.randn(12, 4, dtype=F64), stream((12, 4), 1)
    found = run("scion", start, grad, 8, "fused", {"split": (6, 3, 3)}, lr=0.05, radius=3.0)
    for lo, hi in ((0, 6), (6, 9), (9, 12)):
        memory = {"p": start}

        def piece(t: int, p: Tensor, lo: int = lo, hi: int = hi, memory: dict[str, Tensor] = memory) -> Tensor:
            whole = torch.zeros(12, 4, dtype=F64)
            whole[lo:hi] = p
            return grad(t, whole)[lo:hi]

        want = balls.scion(start[lo:hi], piece, 8, 0.05, ball="spectral", radius=3.0)
        assert far([p[lo:hi] for p in found], want) < 1e-11


def test_a_grouped_convolution_and_a_convolutional_head() -> None:
    net = nn.Sequential(
        nn.Conv2d(4, 6, 2, groups=2, bias=False), nn.Flatten(2), nn.Conv1d(6, 2, 3, bias=False)
    ).double()
    opt = gd.Scion(net, lr=0.5, conv_radius=2.0, head_radius=3.0, constrained=False, momentum=0.0, **EXACT)
    assert [line.role for line in gd.explain(opt).lines] == ["conv", "head"]
    before = [p.detach().clone() for p in net.parameters()]
    for p in net.parameters():
        p.grad = torch.randn_like(p)
    opt.step()
    steps = [old - p.detach() for old, p in zip(before, net.parameters())]
    for g, step in zip(net[0].weight.grad.chunk(2), steps[0].chunk(2)):
        torch.testing.assert_close(step, 0.5 * 2 * balls.conv(g))
    torch.testing.assert_close(steps[1], 0.5 * 3 * net[2].weight.grad.sign() / 18)


def test_the_defaults_are_those_of_the_paper_s_table() -> None:
    """Roles of a whole model, and what has no ball."""
    net = nn.Sequential(nn.Embedding(7, 4), nn.Linear(4, 6), nn.LayerNorm(6), nn.Linear(6, 7))
    opt = gd.Scion(net)
    assert {line.parameter: line.recipe for line in gd.explain(opt).lines} == {
        "0.weight": "scion",
        "1.weight": "scion",
        "1.bias": "scion",
        "2.weight": "adamw",
        "2.bias": "adamw",
        "3.weight": "scion",
        "3.bias": "scion",
    }
    before = {name: p.detach().clone() for name, p in net.named_parameters()}
    for p in net.parameters():
        p.grad = torch.randn_like(p)
    net[0].weight.grad[3] = 0.0  # a token that was not seen
    opt.step()
    lr = 2**-12
    steps = {name: (before[name] * (1 - lr) - p.detach()) / lr for name, p in net.named_parameters()}
    rows = steps["0.weight"].square().mean(1).sqrt()
    torch.testing.assert_close(rows, torch.tensor([50.0, 50, 50, 0, 50, 50, 50]), rtol=1e-2, atol=1e-2)
    singular = torch.linalg.svdvals(steps["1.weight"])
    torch.testing.assert_close(singular, torch.full((4,), 50 * math.sqrt(6 / 4)), rtol=0.16, atol=0)
    torch.testing.assert_close(steps["3.weight"], 500 * net[3].weight.grad.sign(), rtol=1e-2, atol=0)
    torch.testing.assert_close(steps["1.bias"].square().mean().sqrt(), torch.tensor(50.0), rtol=1e-2, atol=0)


@settings(max_examples=40, deadline=None)
@given(
    case=st.sampled_from(CASES),
    rates=st.lists(st.floats(0, 1), min_size=1, max_size=8),
    radius=st.floats(1e-3, 1e3),
    momentum=st.floats(0, 0.99),
    seed=st.integers(0, 1000),
)
def test_constrained_weights_stay_in_their_ball(
    case: tuple[str, str, str, str, str, tuple[int, ...]], rates: list[float], radius: float, momentum: float, seed: int
) -> None:
    role, field, value, key, ball, shape = case
    model = Bag({"w": torch.randn(shape, dtype=F64)})
    rules = [gd.rule("w", role=role)]
    opt = gd.Scion(model, rules=rules, momentum=momentum, **{key: radius, field: value}, **EXACT)
    gd.initialize(opt, generator=torch.Generator().manual_seed(seed))
    norm = balls.BALLS[ball][1]
    start = norm(model.w.detach())
    assert start == pytest.approx(0 if role == "bias" else radius, rel=1e-9)
    made = torch.Generator().manual_seed(seed)
    for rate in rates:
        opt.param_groups[0]["lr"] = rate
        model.w.grad = torch.randn(shape, generator=made, dtype=F64)
        opt.step()
        assert norm(model.w.detach()) <= radius * (1 + 1e-9)


@pytest.mark.parametrize(("role", "field", "value", "key", "ball", "shape"), CASES)
def test_an_lmo_has_the_largest_product_on_its_ball(
    role: str, field: str, value: str, key: str, ball: str, shape: tuple[int, ...]
) -> None:
    g = torch.randn(shape, dtype=F64)
    options: dict[str, Any] = {"lr": 1.0, "momentum": 0.0, "constrained": False, key: 2.0, field: value}
    [point] = [-w for w in run("scion", torch.zeros_like(g), lambda t, p: g, 1, role, **options)]
    norm = balls.BALLS[ball][1]
    assert norm(point) == pytest.approx(2.0)
    best = float((g * point).sum())
    for _ in range(50):
        other = torch.randn(shape, dtype=F64)
        assert float((g * other).sum()) * 2.0 / norm(other) <= best + 1e-12


@pytest.mark.parametrize(("role", "field", "value", "key", "ball", "shape"), CASES)
@pytest.mark.parametrize("factor", [1e-12, 1e-6, 1e6])
def test_the_length_of_the_gradient_does_not_matter(
    role: str, field: str, value: str, key: str, ball: str, shape: tuple[int, ...], factor: float
) -> None:
    start, grad = torch.randn(shape), stream(shape, 2, pull=0.0)
    options: dict[str, Any] = {"lr": 0.1, field: value}
    one = run("scion", start, grad, 5, role, **options)
    other = run("scion", start, lambda t, p: factor * grad(t, p), 5, role, **options)
    assert far(other, one) < 1e-3


def test_lines_of_zeros_and_zero_gradients_make_no_step() -> None:
    for role, field, value, _, _, shape in CASES:
        start = torch.randn(shape, dtype=F64)
        options: dict[str, Any] = {"lr": 0.1, field: value, "constrained": False}
        assert torch.equal(run("scion", start, lambda t, p: torch.zeros_like(p), 3, role, **options)[-1], start)
        g = torch.randn(shape, dtype=F64)
        g[0] = 0.0
        end = run("scion", start, lambda t, p, g=g: g, 3, role, **options)[-1]
        assert bool(end.isfinite().all())
        if value in ("rows", "sign") or (role, value) == ("embedding", "columns"):
            assert torch.equal(end[0], start[0])


def test_a_rate_above_one_would_leave_the_ball() -> None:
    with pytest.raises(ValueError, match=r"lr=1\.5 of scion must be <= 1"):
        gd.Scion(nn.Linear(3, 3), lr=1.5)


# -- initial weights -------------------------------------------------------------------------------------------------


class Net(nn.Module):
    """Every role that has a ball, and one that has none."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(9, 6)
        self.mix = nn.MultiheadAttention(6, 2, bias=False)
        self.norm = nn.LayerNorm(6)
        self.conv = nn.Conv1d(6, 8, 3)
        self.head = nn.Linear(8, 9)


def test_initial_weights_are_on_the_spheres_of_their_norms() -> None:
    net = Net()
    opt = gd.Scion(net, radius=2.0, conv_radius=3.0, head_radius=4.0, embedding_radius=5.0)
    gains = net.norm.weight.detach().clone()
    gd.initialize(opt, generator=torch.Generator().manual_seed(0))
    w = {name: p.detach().double() for name, p in net.named_parameters()}
    for piece in w["mix.in_proj_weight"].chunk(3):
        torch.testing.assert_close(piece @ piece.T, 4 * torch.eye(6, dtype=F64), atol=1e-5, rtol=0)
    flat = w["conv.weight"].flatten(1)
    torch.testing.assert_close(flat @ flat.T, 9 * 8 / 6 / 9 * torch.eye(8, dtype=F64), atol=1e-5, rtol=0)
    assert set(w["head.weight"].unique().tolist()) == {-0.5, 0.5}
    torch.testing.assert_close(w["table.weight"].square().mean(1).sqrt(), torch.full((9,), 5.0, dtype=F64))
    assert not w["conv.bias"].any()
    assert not w["head.bias"].any()
    assert torch.equal(net.norm.weight, gains)
    again = Net()
    gd.initialize(gd.Scion(again, radius=2.0), generator=torch.Generator().manual_seed(0), zero_head=True)
    assert not again.head.weight.any()
    assert torch.equal(again.mix.in_proj_weight, net.mix.in_proj_weight)  # equal draws


def test_initialize_says_when_it_has_nothing_to_do() -> None:
    net = nn.Linear(3, 3)
    with pytest.raises(ValueError, match=r"no recipe of this optimizer \(adamw\) steps in a norm"):
        gd.initialize(gd.AdamW(net))
    opt = gd.Scion(net)
    net.weight.grad, net.bias.grad = torch.ones(3, 3), torch.ones(3)
    opt.step()
    with pytest.raises(ValueError, match="has taken 1 steps"):
        gd.initialize(opt)


# -- the sphere ------------------------------------------------------------------------------------------------------

SHAPES = [(7, 4), (4, 7), (3, 2, 2, 3)]


def muon(momentum: float, nesterov: bool) -> family.Rule:
    """The polar factor of a momentum, of the matrix (out, rest)."""

    def rule(t: int, g: Tensor, p: Tensor, memory: dict[str, Any]) -> Tensor:
        m = family.ema(memory, "m", momentum, g)
        u = (1 - momentum) * g + momentum * m if nesterov else m
        return svd_polar(u.flatten(1)).view(g.shape)

    return rule


@pytest.mark.parametrize("path", PATHS, ids=IDS)
@pytest.mark.parametrize("nesterov", [True, False])
@pytest.mark.parametrize("shape", SHAPES)
def test_hyperball_takes_the_references_steps(shape: tuple[int, ...], nesterov: bool, path: dict[str, bool]) -> None:
    start, grad = torch.randn(shape, dtype=F64), stream(shape, 1)
    role = "conv" if len(shape) > 2 else "matrix"
    found = run("hyperball", start, grad, 40, role, lr=0.05, momentum=0.8, nesterov=nesterov, **path)
    assert far(found, step_rules.on_sphere(start, grad, 40, 0.05, muon(0.8, nesterov))) < 1e-11


@pytest.mark.parametrize("path", PATHS, ids=IDS)
@pytest.mark.parametrize("shape", SHAPES)
def test_adam_on_the_sphere_takes_the_references_steps(shape: tuple[int, ...], path: dict[str, bool]) -> None:
    start, grad = torch.randn(shape, dtype=F64), stream(shape, 1)
    model = Bag({"w": start})
    rules = [gd.rule("w", role="conv" if len(shape) > 2 else "matrix")]
    opt = gd.AdamW(model, lr=0.05, weight_decay=0.3, rules=rules, add=[SphereStep()], **path)
    if path.get("compile"):
        opt._engine.compiled.backend = "eager"
    found = train(opt, [model.w], [grad], 40)[0]
    assert far(found, step_rules.on_sphere(start, grad, 40, 0.05, family.adam())) < 1e-11


@settings(max_examples=30, deadline=None)
@given(
    name=st.sampled_from(["adamw", "muon", "lion", "sgd", "soap", "normuon", "hyperball"]),
    rate=st.floats(1e-4, 0.5),
    size=st.floats(1e-3, 1e3),
    seed=st.integers(0, 1000),
)
def test_the_norm_stays_and_the_step_has_its_length(name: str, rate: float, size: float, seed: int) -> None:
    made = torch.Generator().manual_seed(seed)
    model = Bag({"w": size * torch.randn(6, 5, generator=made, dtype=F64)})
    add = [] if name == "hyperball" else [SphereStep()]
    opt = gd.optimizer(name, model, lr=rate, rules=[gd.rule("w", role="matrix")], add=add)
    radius = float(model.w.detach().norm())
    path = [model.w.detach().clone()]
    path += train(opt, [model.w], [lambda t, p: torch.randn(6, 5, generator=made, dtype=F64)], 12)[0]
    for before, after in pairwise(path):
        assert float(after.norm()) == pytest.approx(radius, rel=1e-12)
        # |p - lr R u|^2 lies between (1 - lr)^2 and (1 + lr)^2 R^2, and so does the angle
        cosine = float((before * after).sum()) / radius**2
        assert cosine >= math.sqrt(1 - rate**2) - 1e-12
        assert cosine < 1 - rate**2 / 100 or (name == "soap" and torch.equal(before, after))  # its first step is none


@pytest.mark.parametrize("name", ["hyperball", "adamw", "sgd"])
@pytest.mark.parametrize("factor", [1e-6, 1e6])
def test_the_sphere_does_not_see_the_length_of_the_gradient(name: str, factor: float) -> None:
    ends = []
    for scale in (1.0, factor):
        model = Bag({"w": torch.ones(5, 8, dtype=F64)})
        add = [] if name == "hyperball" else [SphereStep()]
        more = {"eps": 0.0} if name == "adamw" else {}
        opt = gd.optimizer(name, model, lr=0.1, rules=[gd.rule("w", role="matrix")], add=add, **more)
        ends.append(train(opt, [model.w], [lambda t, p, s=scale: s * stream((5, 8), 3, pull=0.0)(t, p)], 8)[0])
    assert far(*ends) < 1e-9


def test_experts_are_on_spheres_of_their_own_and_vectors_on_none() -> None:
    stack = torch.randn(3, 4, 4, dtype=F64) * torch.tensor([1.0, 10.0, 0.1], dtype=F64)[:, None, None]
    for name in ("hyperball", "adamw"):
        model = Bag({"w": stack, "b": torch.zeros(4, dtype=F64)})
        add = [] if name == "hyperball" else [SphereStep()]
        opt = gd.optimizer(name, model, lr=0.1, rules=[gd.rule("w", role="expert")], add=add)
        for _ in range(5):
            model.w.grad, model.b.grad = torch.randn(3, 4, 4, dtype=F64), torch.ones(4, dtype=F64)
            opt.step()
        torch.testing.assert_close(model.w.detach().norm(dim=(1, 2)), stack.norm(dim=(1, 2)), rtol=1e-12, atol=0)
        assert bool(model.b.detach().all())  # it begins at 0 and moves
        assert opt.state[model.w]["radius"].shape == (3,)
        assert "radius" not in opt.state[model.b]


def test_a_matrix_of_zeros_takes_the_plain_step() -> None:
    ends = []
    for add in ([], [SphereStep()]):
        model = Bag({"w": torch.zeros(5, 4, dtype=F64)})
        opt = gd.AdamW(model, lr=0.1, weight_decay=0.0, rules=[gd.rule("w", role="matrix")], add=add)
        ends.append(train(opt, [model.w], [stream((5, 4), 1)], 5)[0])
    assert far(*ends) < 1e-14


def test_half_precision_weights_stay_near_the_sphere() -> None:
    model = Bag({"w": torch.randn(32, 32).bfloat16()})
    radius = float(model.w.detach().double().norm())
    opt = gd.Hyperball(model, lr=0.02, rounding="master", rules=[gd.rule("w", role="matrix")])
    train(opt, [model.w], [stream((32, 32), 1)], 50)
    assert float(opt.state[model.w]["master"].double().norm()) == pytest.approx(radius, rel=1e-6)
    assert float(model.w.detach().double().norm()) == pytest.approx(radius, rel=1e-3)
