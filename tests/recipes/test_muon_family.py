"""NorMuon, AdaMuon, Moonlight, MuonClip and spectral descent against dense references, and QK-clip against logits."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import guided_descent as gd
from guided_descent.capture.attention import AttentionLogits
from guided_descent.parts import SCALES
from guided_descent.recipes import Recipe, spectral
from guided_descent.recipes.spectral import AdaMuon, Moonlight, MuonClip, NorMuon, Outputs, QkClip, SpectralDescent
from guided_descent.routing import route
from oracles import muon_family as oracle
from oracles.muon import muon, polynomial_polar, svd_polar
from oracles.training import Bag, far, stream, train

F64 = torch.float64
SHAPES = [(12, 5), (5, 12), (7, 7)]
RECIPES: dict[str, type[Recipe]] = {
    "moonlight": Moonlight,
    "muonclip": MuonClip,
    "normuon": NorMuon,
    "adamuon": AdaMuon,
    "spectral_descent": SpectralDescent,
}
EXACT: dict[str, Any] = {"coefficients": "exact", "ns_dtype": "float64"}


def matrices(role: str = "matrix", **more: Any) -> list[gd.routing.Rule]:
    return [gd.rule("*", role=role, **more)]


def path_of(key: str, start: Tensor, grad: Any, steps: int, **options: Any) -> list[Tensor]:
    model = Bag({"w": start})
    opt = gd.optimizer(key, model, rules=matrices(), **EXACT | options)
    return train(opt, list(model.parameters()), [grad], steps)[0]


def one_step(key: str, g: Tensor, role: str = "matrix", **options: Any) -> Tensor:
    """What one step takes off a parameter, per unit of learning rate."""
    model = Bag({"w": torch.zeros_like(g)})
    opt = gd.optimizer(key, model, rules=matrices(role), **{"weight_decay": 0.0, "lr": 1.0} | options)
    model.w.grad = g.clone()
    opt.step()
    return -model.w.detach()


def rms(x: Tensor) -> float:
    return float(x.double().square().mean().sqrt())


# -- step by step ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("nesterov", [True, False])
def test_moonlight_and_muonclip_take_the_references_steps(shape: tuple[int, int], nesterov: bool) -> None:
    start, grad = torch.randn(shape, dtype=F64), stream(shape, 1)
    numbers: dict[str, Any] = {"momentum": 0.9, "weight_decay": 0.3, "nesterov": nesterov}
    expected = oracle.moonlight(start, grad, 25, 0.05, **numbers)
    for key in ("moonlight", "muonclip"):  # without attention, QK-clip has nothing to do
        assert far(path_of(key, start, grad, 25, lr=0.05, **numbers), expected) < 1e-10


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("nesterov", [True, False])
@pytest.mark.parametrize("scale", ["match_rms", "original", "spectral"])
def test_normuon_takes_the_references_steps(shape: tuple[int, int], nesterov: bool, scale: str) -> None:
    start, grad = torch.randn(shape, dtype=F64), stream(shape, 2)
    numbers: dict[str, Any] = {"momentum": 0.9, "beta2": 0.8, "weight_decay": 0.3, "nesterov": nesterov, "scale": scale}
    expected = oracle.normuon(start, grad, 25, 0.05, **numbers)
    assert far(path_of("normuon", start, grad, 25, lr=0.05, **numbers), expected) < 1e-10


@pytest.mark.parametrize("shape", SHAPES)
def test_normuon_on_the_longer_side(shape: tuple[int, int]) -> None:
    start, grad = torch.randn(shape, dtype=F64), stream(shape, 3)
    numbers: dict[str, Any] = {"momentum": 0.9, "beta2": 0.8, "weight_decay": 0.3}
    expected = oracle.normuon(start, grad, 25, 0.05, longer=True, **numbers)
    assert far(path_of("normuon", start, grad, 25, lr=0.05, neurons="longer", **numbers), expected) < 1e-10
    other = path_of("normuon", start, grad, 25, lr=0.05, **numbers)
    assert (far(other, expected) > 1e-3) == (shape[0] < shape[1])


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("nesterov", [True, False])
def test_adamuon_takes_the_references_steps(shape: tuple[int, int], nesterov: bool) -> None:
    start, grad = torch.randn(shape, dtype=F64), stream(shape, 4)
    numbers: dict[str, Any] = {"momentum": 0.9, "weight_decay": 0.3, "nesterov": nesterov}
    numbers["coefficients"] = "jordan" if shape == (7, 7) else "exact"  # square matrices of signs are often singular
    expected = oracle.adamuon(start, grad, 25, 0.05, **numbers)
    assert far(path_of("adamuon", start, grad, 25, lr=0.05, **numbers), expected) < 1e-10


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(("momentum", "nesterov"), [(0.0, True), (0.9, True), (0.9, False)])
def test_spectral_descent_takes_the_references_steps(shape: tuple[int, int], momentum: float, nesterov: bool) -> None:
    start, grad = torch.randn(shape, dtype=F64), stream(shape, 5)
    numbers: dict[str, Any] = {"momentum": momentum, "weight_decay": 0.3, "nesterov": nesterov}
    expected = oracle.spectral_descent(start, grad, 25, 0.01, **numbers)
    assert far(path_of("spectral_descent", start, grad, 25, lr=0.01, **numbers), expected) < 1e-10


def test_moonlight_is_muon_with_other_numbers() -> None:
    start, grad = torch.randn(6, 9, dtype=F64), stream((6, 9), 6)
    found = path_of("moonlight", start, grad, 20, scale="spectral", lr=0.02, weight_decay=0.2)
    expected = muon(start, grad, 20, 0.02, scale="spectral", weight_decay=0.2)
    assert far(found, expected) < 1e-10


def test_independent_decay_follows_the_schedule_alone() -> None:
    for key in RECIPES:
        model = Bag({"w": torch.ones(3, 4, dtype=F64)})
        opt = gd.optimizer(key, model, lr=0.5, weight_decay=0.1, decay="independent", rules=matrices(), **EXACT)
        opt.param_groups[0]["lr"] = 0.25
        model.w.grad = torch.zeros_like(model.w)
        opt.step()
        torch.testing.assert_close(model.w.detach(), torch.full((3, 4), 1 - 0.5 * 0.1, dtype=F64))


# -- every form of the polar factor is within reach --------------------------------------------------------------------


@pytest.mark.parametrize("key", ["muon", *RECIPES])
@pytest.mark.parametrize("method", ["auto", "standard", "symmetric", "gram"])
@pytest.mark.parametrize("name", ["turbo", "polar_express", "jordan"])
def test_polynomials_by_name_and_form(key: str, name: str, method: str) -> None:
    g = torch.randn(6, 15, dtype=F64)
    signs = torch.sign(g) if key == "adamuon" else g
    o = oracle.turbo_polar(signs) if name == "turbo" else polynomial_polar(signs, name)
    if key == "normuon":  # at first each row is divided by its own norm
        o = o / o.norm(dim=1, keepdim=True)
    if key == "adamuon":
        o = torch.sign(o)
    if key == "spectral_descent":
        expected = float((o * g).sum()) * o
    elif key in ("normuon", "adamuon"):
        expected = 0.2 * math.sqrt(90) / o.norm() * o
    else:
        expected = (1.0 if key == "muon" else 0.2 * math.sqrt(15)) * o
    found = one_step(key, g, coefficients=name, ns_method=method, ns_dtype="float64")
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("coefficients", ["exact", "adaptive"])
def test_exact_and_adaptive_come_close_to_the_polar_factor(coefficients: str) -> None:
    g = torch.randn(6, 30, dtype=F64)
    found = one_step("moonlight", g, coefficients=coefficients, scale="original", ns_dtype="float64")
    tolerance = 1e-10 if coefficients == "exact" else 0.16
    assert float(torch.linalg.matrix_norm(found - svd_polar(g), 2)) < tolerance


def test_nvidias_scale_has_unit_rms() -> None:
    for shape in SHAPES:
        step = one_step("moonlight", torch.randn(shape, dtype=F64), scale="nvidia_spectral", **EXACT)
        assert rms(step) == pytest.approx(1.0, rel=1e-12)
        assert float(torch.linalg.matrix_norm(step, 2)) == pytest.approx(math.sqrt(max(shape)), rel=1e-12)
        assert SCALES["nvidia_spectral"](*shape) == math.sqrt(max(shape))


# -- what the formulas imply -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("key", ["moonlight", "muonclip", "normuon", "adamuon"])
@pytest.mark.parametrize("factor", [1e-12, 1e-3, 1e6])
def test_the_length_of_the_gradient_does_not_matter(key: str, factor: float) -> None:
    start, grad = torch.zeros(5, 8, dtype=F64), stream((5, 8), 7, pull=0.0)
    ends = [path_of(key, start, lambda t, p, c=c: c * grad(t, p), 6, weight_decay=0.0)[-1] for c in (1.0, factor)]
    assert float((ends[1] - ends[0]).norm() / ends[0].norm()) < 1e-9


def test_the_step_of_spectral_descent_is_proportional_to_the_gradient() -> None:
    g = torch.randn(5, 8, dtype=F64)
    step = one_step("spectral_descent", g, **EXACT)
    for factor in (1e-6, 7.0, 1e5):
        torch.testing.assert_close(one_step("spectral_descent", factor * g, **EXACT), factor * step)
    # it minimises <g, d> + |d|_2^2 / 2, with the value -|g|_*^2 / 2
    nuclear = float(torch.linalg.svdvals(g).sum())

    def value(d: Tensor) -> float:
        return float((g * d).sum() + torch.linalg.matrix_norm(d, 2) ** 2 / 2)

    assert value(-step) == pytest.approx(-(nuclear**2) / 2, rel=1e-12)
    for _ in range(50):
        assert value(-step + 0.1 * torch.randn_like(step)) > value(-step)


def test_the_rms_of_a_step_is_the_one_named() -> None:
    for key in ("normuon", "adamuon"):
        for shape in SHAPES:
            grad = stream(shape, 8)
            found = path_of(key, torch.zeros(shape, dtype=F64), grad, 8, lr=1.0, weight_decay=0.0)
            path = [torch.zeros(shape, dtype=F64), *found]
            assert all(rms(b - a) == pytest.approx(0.2, rel=1e-12) for a, b in pairwise(path))
            other = one_step(key, torch.randn(shape), update_rms=0.7)
            assert rms(other) == pytest.approx(0.7, rel=1e-5)


def test_neurons_take_first_steps_of_one_length() -> None:
    g = torch.randn(9, 4, dtype=F64) * torch.logspace(-2, 2, 9, dtype=F64)[:, None]
    rows = one_step("normuon", g, **EXACT).norm(dim=1)
    torch.testing.assert_close(rows, rows.mean().expand(9))
    columns = one_step("normuon", g.T.contiguous(), neurons="longer", **EXACT).norm(dim=0)
    torch.testing.assert_close(columns, columns.mean().expand(9))
    rows = one_step("moonlight", g, **EXACT).norm(dim=1)
    assert float(rows.max() / rows.min()) > 2


def test_normuon_keeps_the_norm_of_the_polar_factor() -> None:
    for scale, length in (("original", 1.0), ("match_rms_adamw", 0.2 * math.sqrt(11))):
        start, grad = torch.zeros(6, 11, dtype=F64), stream((6, 11), 9)
        path = [start, *path_of("normuon", start, grad, 8, lr=1.0, weight_decay=0.0, scale=scale)]
        for before, after in pairwise(path):
            assert float((after - before).norm()) == pytest.approx(length * math.sqrt(6), rel=1e-10)


def test_adamuon_sees_signs_alone() -> None:
    g = torch.randn(6, 9, dtype=F64)
    lengths = torch.rand(6, 9, dtype=F64) + 0.1
    torch.testing.assert_close(one_step("adamuon", g * lengths, **EXACT), one_step("adamuon", g, **EXACT))
    assert float((one_step("moonlight", g * lengths, **EXACT) - one_step("moonlight", g, **EXACT)).abs().max()) > 0.01


@pytest.mark.parametrize("key", ["moonlight", "spectral_descent", "normuon"])
def test_rotations_pass_through(key: str) -> None:
    start, g = torch.randn(2, 6, 9, dtype=F64)
    right = torch.linalg.qr(torch.randn(9, 9, dtype=F64)).Q
    left = torch.linalg.qr(torch.randn(6, 6, dtype=F64)).Q
    if key == "normuon":  # neurons are rows: they may be permuted, and rotated inside
        left = torch.eye(6, dtype=F64)[torch.randperm(6)]
    grads = [g, g.flip(0), start]
    plain = path_of(key, start, lambda t, p: grads[t - 1], 3)
    turned = path_of(key, left @ start @ right, lambda t, p: left @ grads[t - 1] @ right, 3)
    assert far(turned, [left @ p @ right for p in plain]) < 1e-10


# -- degenerate input --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("key", RECIPES)
@pytest.mark.parametrize("coefficients", ["turbo", "adaptive", "jordan", "exact"])
@pytest.mark.parametrize("ns_dtype", ["float32", "bfloat16"])
def test_zero_and_rank_one_gradients(key: str, coefficients: str, ns_dtype: str) -> None:
    zero = torch.zeros(5, 8)
    inputs: list[Callable[[int, Tensor], Tensor]] = [
        lambda t, p: zero,
        lambda t, p: zero if t < 4 else torch.randn(5, 8),
        lambda t, p: torch.outer(torch.randn(5), torch.randn(8)),
        lambda t, p: torch.eye(5, 8) * (torch.arange(8) == 1),
        lambda t, p: 1e-25 * torch.randn(5, 8),
    ]
    for case, grad in enumerate(inputs):
        model = Bag({"w": torch.ones(5, 8)})
        options = {"coefficients": coefficients, "ns_dtype": ns_dtype, "lr": 0.01, "weight_decay": 0.0}
        opt = gd.optimizer(key, model, rules=matrices(), **options)
        [path] = train(opt, [model.w], [grad], 12)
        assert all(bool(p.isfinite().all()) for p in path)
        assert all(bool(value.isfinite().all()) for value in opt.state[model.w].values())
        if case == 0:
            assert torch.equal(path[-1], torch.ones(5, 8))
        elif key != "spectral_descent" or case != 4:
            assert 0.003 < float((path[-1] - 1).abs().max()) < 2.0


def test_not_a_number_is_not_hidden() -> None:
    for key in RECIPES:
        g = torch.randn(4, 5)
        g[1, 2] = math.nan
        assert bool(one_step(key, g, nonfinite="ignore").isnan().any())


@pytest.mark.parametrize("key", RECIPES)
def test_an_idle_expert_stays_and_the_others_do_not_notice(key: str) -> None:
    whole = torch.randn(3, 4, 6, dtype=F64)
    grads = [torch.randn(3, 4, 6, dtype=F64) for _ in range(6)]
    for g in grads:
        g[1] = 0.0
    model = Bag({"w": whole})
    options: dict[str, Any] = {"lr": 0.05, "weight_decay": 0.1, **EXACT}
    opt = gd.optimizer(key, model, rules=matrices("expert"), **options)
    [path] = train(opt, [model.w], [lambda t, p: grads[t - 1]], 6)
    torch.testing.assert_close(path[-1][1], whole[1] * (1 - 0.05 * 0.1) ** 6)
    for i in (0, 2):
        alone = path_of(key, whole[i], lambda t, p, i=i: grads[t - 1][i], 6, **options)
        assert far([step[i] for step in path], alone) < 1e-10


# -- equal maps take equal steps ---------------------------------------------------------------------------------------


def apart(key: str, whole: Tensor, rules: list[gd.routing.Rule], cut: Callable[[Tensor], Sequence[Tensor]]) -> float:
    """Train one stored tensor, and its maps as parameters of their own; the largest difference."""
    options: dict[str, Any] = {"lr": 0.02, "weight_decay": 0.1, **EXACT}
    together, separate = Bag({"w": whole}), Bag({f"w{i}": part for i, part in enumerate(cut(whole))})
    a = gd.optimizer(key, together, rules=rules, **options)
    b = gd.optimizer(key, separate, rules=matrices(), **options)
    worst = 0.0
    for t in range(1, 7):
        g = stream(whole.shape, 1)(t, together.w)
        together.w.grad = g
        for p, part in zip(separate.parameters(), cut(g)):
            p.grad = part.clone()
        a.step()
        b.step()
        worst = max(worst, far(list(cut(together.w.detach())), [p.detach() for p in separate.parameters()]))
    assert far([together.w.detach()], [whole]) > 0.01
    return worst


@pytest.mark.parametrize("key", ["muon", *RECIPES])
def test_fused_maps_heads_and_experts_are_maps_of_their_own(key: str) -> None:
    dim, inner = 4, 10  # 4 query heads, 2 key and value heads
    sizes = (4 * dim, 2 * dim, 2 * dim)
    whole = torch.randn(8 * dim, inner, dtype=F64)
    assert apart(key, whole, matrices("fused", split=sizes), lambda w: w.split(list(sizes))) < 1e-10
    assert apart(key, whole, matrices("fused", split=sizes, heads=4), lambda w: w.split(dim)) < 1e-10
    assert apart(key, whole, matrices(heads=8), lambda w: w.split(dim)) < 1e-10
    assert apart(key, whole.T.contiguous(), matrices(transposed=True, heads=8), lambda w: w.T.split(dim)) < 1e-10
    stack = torch.randn(3, 4, 6, dtype=F64)
    assert apart(key, stack, matrices("expert"), list) < 1e-10


@pytest.mark.filterwarnings("ignore:muonclip knows no attention logits")
@pytest.mark.parametrize("key", ["muon", *RECIPES])
def test_multi_head_attention_in_one_weight_or_three(key: str) -> None:
    one = nn.ModuleDict({"a": nn.MultiheadAttention(8, 2, bias=False), "b": nn.Linear(8, 2)}).double()
    three = nn.ModuleDict({"q": nn.Linear(8, 8, bias=False), "k": nn.Linear(8, 8, bias=False)}).double()
    three["v"] = nn.Linear(8, 8, bias=False).double()
    three["last"] = nn.Linear(8, 2).double()
    with torch.no_grad():
        for name, part in zip("qkv", one["a"].in_proj_weight.chunk(3)):
            three[name].weight.copy_(part)
    opts = [gd.optimizer(key, model, lr=0.02, **EXACT) for model in (one, three)]
    for t in range(4):
        g = torch.randn(24, 8, dtype=F64, generator=torch.Generator().manual_seed(t))
        one["a"].in_proj_weight.grad = g
        for name, part in zip("qkv", g.chunk(3)):
            three[name].weight.grad = part.clone()
        for opt in opts:
            opt.step()
    found = torch.cat([three[name].weight for name in "qkv"])
    torch.testing.assert_close(found, one["a"].in_proj_weight, atol=1e-11, rtol=0)


# -- state and the auxiliary recipe ------------------------------------------------------------------------------------


def test_state_by_recipe() -> None:
    expected = {
        "moonlight": {"momentum_buffer": (4, 7)},
        "muonclip": {"momentum_buffer": (4, 7)},
        "normuon": {"momentum_buffer": (4, 7), "neuron_avg_sq": (4, 1)},
        "adamuon": {"momentum_buffer": (4, 7), "exp_avg_sq": (4, 7)},
        "spectral_descent": {},
    }
    for key, shapes in expected.items():
        model = Bag({"w": torch.randn(4, 7)})
        opt = gd.optimizer(key, model, rules=matrices())
        opt.materialize_state()
        state = {name: tuple(value.shape) for name, value in opt.state[model.w].items() if name != "step"}
        assert state == shapes
    for shape, kept in (((4, 7), (1, 7)), ((7, 4), (7, 1))):
        model = Bag({"w": torch.randn(shape)})
        opt = gd.optimizer("normuon", model, neurons="longer", rules=matrices())
        opt.materialize_state()
        assert tuple(opt.state[model.w]["neuron_avg_sq"].shape) == kept


def test_defaults_are_those_of_the_papers() -> None:
    names = ("lr", "momentum", "weight_decay", "nesterov")
    defaults = {key: tuple(recipe().values()[name] for name in names) for key, recipe in RECIPES.items()}
    assert defaults == {
        "moonlight": (1e-3, 0.95, 0.1, True),
        "muonclip": (1e-3, 0.95, 0.1, False),
        "normuon": (1e-3, 0.95, 0.1, True),
        "adamuon": (1e-3, 0.95, 0.1, True),
        "spectral_descent": (0.01, 0.0, 0.0, True),
    }
    assert Moonlight().scale == MuonClip().scale == "match_rms_adamw"
    assert (MuonClip().tau, MuonClip().shared_keys) == (100.0, "query")
    norm = NorMuon()
    assert (norm.beta2, norm.moment_eps, norm.update_rms, norm.scale, norm.neurons) == (
        0.95,
        1e-10,
        0.2,
        "match_rms",
        "rows",
    )
    assert (AdaMuon().moment_eps, AdaMuon().update_rms) == (1e-8, 0.2)


def test_one_learning_rate_for_all_where_steps_have_adamws_size() -> None:
    def rates(key: str, **options: Any) -> list[tuple[str, float, float]]:
        net = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2))
        opt = gd.optimizer(key, net, **options)
        return [(group["recipe"], group["lr"], group["weight_decay"]) for group in opt.param_groups]

    for key in ("moonlight", "muonclip", "normuon", "adamuon"):
        assert rates(key, lr=2e-3, weight_decay=0.2) == [(key, 2e-3, 0.2), ("adamw", 2e-3, 0.2)]
        assert rates(key, aux={"lr": 1e-2})[1] == ("adamw", 1e-2, 0.1)
    for key in ("moonlight", "muonclip", "normuon"):
        assert rates(key, lr=0.02, scale="original") == [(key, 0.02, 0.1), ("adamw", 3e-4, 0.1)]
        assert rates(key, lr=2e-3, scale="match_rms_adamw")[1][1] == 2e-3
    assert rates("spectral_descent", lr=0.5) == [("spectral_descent", 0.5, 0.0), ("adamw", 3e-4, 0.01)]


# -- QK-clip -----------------------------------------------------------------------------------------------------------


class Attention(nn.Module):
    """Attention with grouped queries, whose maps are stored as asked."""

    def __init__(self, stored: str, heads: int = 4, kv: int = 2, dim: int = 3, width: int = 12, bias: bool = True):
        super().__init__()
        self.n_heads, self.n_kv_heads, self.head_dim = heads, kv, dim
        self.stored = stored
        q, k = heads * dim, kv * dim
        if stored == "qkv":
            self.qkv = nn.Linear(width, q + 2 * k, bias=bias)
        elif stored == "q, kv":
            self.to_q, self.to_kv = nn.Linear(width, q, bias=bias), nn.Linear(width, 2 * k, bias=bias)
        else:
            self.q_proj, self.k_proj = nn.Linear(width, q, bias=bias), nn.Linear(width, k, bias=bias)
            self.v_proj = nn.Linear(width, k, bias=bias)
        self.out = nn.Linear(q, width, bias=bias)

    def heads(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        q, k = self.n_heads * self.head_dim, self.n_kv_heads * self.head_dim
        if self.stored == "qkv":
            maps = self.qkv(x).split([q, k, k], -1)
        elif self.stored == "q, kv":
            maps = (self.to_q(x), *self.to_kv(x).split([k, k], -1))
        else:
            maps = (self.q_proj(x), self.k_proj(x), self.v_proj(x))
        a, b, c = (y.unflatten(-1, (-1, self.head_dim)).transpose(1, 2) for y in maps)
        return a, b, c

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.heads(x)
        return self.out(F.scaled_dot_product_attention(q, k, v, enable_gqa=True).transpose(1, 2).flatten(2))


class Model(nn.Module):
    def __init__(self, attention: nn.Module, width: int = 12) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([nn.ModuleDict({"attn": attention})])
        self.head = nn.Linear(width, 5)
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.blocks[0]["attn"](x))


NAME = "blocks.0.attn"


def clip_once(
    model: nn.Module, peak: Tensor, tau: float, rules: Sequence[gd.routing.Rule] = (), **options: Any
) -> None:
    """What the engine does after a step: call the constraints of MuonClip on the parameters."""
    recipe = MuonClip(tau=tau, **options)
    params = {name: p.detach() for name, p in model.named_parameters()}
    blocks = [block for block in route(model, list(rules)).blocks if recipe.route(block) is recipe]
    [constraint] = recipe.constraints(blocks)
    assert constraint.note == "max_logits"
    assert constraint.module == NAME
    tensors = [*(params[name] for name in constraint.names), *(params.get(name) for name in constraint.optional)]
    constraint.apply(tensors, {"tau": tau}, {NAME: peak})


def peaks(attention: Attention, x: Tensor) -> Tensor:
    q, k, _ = attention.heads(x)
    return oracle.logits(q, k).amax((0, 2, 3)).detach()


def strong(model: nn.Module, factor: float = 3.0) -> None:
    """Weights that make large logits."""
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.randn_like(p) * factor)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("stored", ["qkv", "q, kv", "apart"])
@pytest.mark.parametrize(("kv", "shared"), [(4, "query"), (2, "query"), (2, "group"), (1, "group")])
def test_the_largest_logit_becomes_tau(stored: str, kv: int, shared: str, bias: bool) -> None:
    model, x = Model(Attention(stored, kv=kv, bias=bias)), torch.randn(2, 7, 12, dtype=F64)
    strong(model)
    attention = model.blocks[0]["attn"]
    before = peaks(attention, x)
    values = attention.heads(x)[2].detach()
    tau = float(before.sort().values[1:3].mean())  # two heads are above
    # routing takes a map as wide as the input of the next one for undivided
    rules = [gd.rule("*.to_kv.weight", split=2)] if stored == "q, kv" and kv == 2 else []
    clip_once(model, before, tau, rules, shared_keys=shared)
    after = peaks(attention, x)
    if kv == 4 or shared == "query":
        torch.testing.assert_close(after, before.clamp(max=tau), rtol=1e-12, atol=0)
    else:  # the group's largest sets the factor of all its heads
        group = before.view(kv, -1).amax(1).repeat_interleave(4 // kv)
        torch.testing.assert_close(after, before * (tau / group).clamp(max=1), rtol=1e-12, atol=0)
        assert float(after.max()) == pytest.approx(tau, rel=1e-12)
    assert torch.equal(attention.heads(x)[2], values)


def test_queries_and_keys_share_the_factor() -> None:
    model, x = Model(Attention("apart", kv=4, bias=True)), torch.randn(2, 7, 12, dtype=F64)
    strong(model)
    attention = model.blocks[0]["attn"]
    old = {name: p.detach().clone() for name, p in attention.named_parameters()}
    peak = peaks(attention, x)
    clip_once(model, peak, 10.0)
    gamma = (10.0 / peak).clamp(max=1).sqrt().repeat_interleave(3)
    assert float(gamma.max()) < 1
    for name in ("q_proj", "k_proj"):
        torch.testing.assert_close(attention.get_parameter(f"{name}.weight"), old[f"{name}.weight"] * gamma[:, None])
        torch.testing.assert_close(attention.get_parameter(f"{name}.bias"), old[f"{name}.bias"] * gamma)
    for name in ("v_proj.weight", "v_proj.bias", "out.weight", "out.bias"):
        assert torch.equal(attention.get_parameter(name), old[name])


@pytest.mark.parametrize("more", [{}, {"kdim": 12, "vdim": 10}, {"add_bias_kv": True}, {"bias": False}])
def test_torchs_own_attention_is_clipped(more: dict[str, Any]) -> None:
    mha = nn.MultiheadAttention(12, 4, batch_first=True, **more).double()
    model = Model(mha)
    strong(model, 2.0)
    x = torch.randn(2, 7, 12, dtype=F64)
    if mha.bias_k is not None:
        mha.bias_k.data.mul_(20)  # the largest logits are those of the key that is added
    value = torch.randn(2, 7, 10, dtype=F64) if "vdim" in more else x
    seen: dict[str, Tensor] = {}
    watcher = AttentionLogits(model, [NAME], seen.update)
    mha(x, x, value)
    before = seen[NAME]
    tau = float(before.median()) * 0.9
    bias = None if mha.in_proj_bias is None else mha.in_proj_bias.detach().clone()
    clip_once(model, before, tau)
    mha(x, x, value)
    watcher.remove()
    torch.testing.assert_close(seen[NAME], before.clamp(max=tau), rtol=1e-12, atol=0)
    if bias is not None:
        assert torch.equal(mha.in_proj_bias[24:], bias[24:])
        assert not torch.equal(mha.in_proj_bias[:12], bias[:12])
        assert not torch.equal(mha.in_proj_bias[12:24], bias[12:24])


class Conv1D(nn.Module):
    """GPT-2's map: y = x W + b, stored (in, out)."""

    def __init__(self, nf: int, nx: int) -> None:
        super().__init__()
        self.nf = nf
        self.weight, self.bias = nn.Parameter(torch.randn(nx, nf)), nn.Parameter(torch.randn(nf))

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weight + self.bias


class Stored(nn.Module):
    """One fused map of any kind, as ``name``, and how its outputs are laid out."""

    def __init__(self, name: str, fused: nn.Module, layout: str) -> None:
        super().__init__()
        self.num_heads, self.layout = 4, layout
        self.name = name
        self.add_module(name, fused)
        self.out = nn.Linear(12, 12)

    def heads(self, x: Tensor) -> tuple[Tensor, Tensor]:
        y = self.get_submodule(self.name)(x)
        shape = (3, 4, 3) if self.layout == "q k v" else (4, 3, 3)
        maps = y.unflatten(-1, shape).movedim(-3 if self.layout == "q k v" else -2, 0)
        return maps[0].transpose(1, 2), maps[1].transpose(1, 2)


GPTNeoXAttention = type("GPTNeoXAttention", (Stored,), {})


@pytest.mark.parametrize("kind", ["conv1d", "head by head", "split by a rule", "split by a rule into heads"])
def test_other_ways_to_store_queries_and_keys(kind: str) -> None:
    rules: list[gd.routing.Rule] = []
    if kind == "conv1d":
        attention = Stored("c_attn", Conv1D(36, 12), "q k v")
    elif kind == "head by head":
        attention = GPTNeoXAttention("query_key_value", nn.Linear(12, 36), "head by head")
    else:
        attention = Stored("qkv_proj", nn.Linear(12, 36), "q k v")
        del attention.num_heads  # nothing says that it is attention
        rules = [gd.rule("*.qkv_proj.weight", role="fused", split=3, heads=4 if "heads" in kind else None)]
    model, x = Model(attention), torch.randn(2, 7, 12, dtype=F64)
    strong(model)

    def largest() -> Tensor:
        return oracle.logits(*attention.heads(x)).amax((0, 2, 3)).detach()

    before = largest()
    clip_once(model, before, 8.0, rules)
    torch.testing.assert_close(largest(), before.clamp(max=8.0), rtol=1e-12, atol=0)


def test_only_queries_and_keys_are_found() -> None:
    net = nn.Sequential(nn.Linear(4, 4), nn.LSTM(4, 4), nn.Linear(4, 4), nn.Linear(4, 2))
    assert not MuonClip().constraints(route(net).blocks)
    found = MuonClip().constraints(route(Model(Attention("apart"))).blocks)
    assert [(c.names, c.optional) for c in found] == [
        (
            ("blocks.0.attn.q_proj.weight", "blocks.0.attn.k_proj.weight"),
            ("blocks.0.attn.q_proj.bias", "blocks.0.attn.k_proj.bias"),
        )
    ]
    bare = [(name, torch.randn(6, 6)) for name in ("self_attn.query.weight", "self_attn.key.weight", "mlp.up.weight")]
    [constraint] = MuonClip().constraints(route(bare).blocks)
    assert constraint.module == "self_attn"


def simple(heads: int = 2) -> tuple[QkClip, Tensor, Tensor]:
    clip = QkClip("attn", (Outputs("q", 0, 0, 6),), (Outputs("k", 0, 0, 6),))
    return clip, torch.ones(6, 5), torch.ones(6, 5)


def test_small_negative_and_broken_maxima_change_nothing() -> None:
    clip, q, k = simple()
    for values in ([-5.0, 3.9], [math.nan, math.inf], [-math.inf, 4.0], [-400.0, 0.0]):
        clip([q, k], {"tau": 4.0}, {"attn": torch.tensor(values)})
        assert bool((q == 1).all())
        assert bool((k == 1).all())
    clip([q, k], {"tau": torch.tensor(4.0)}, {"attn": torch.tensor([16.0, 4.0], dtype=torch.bfloat16)})
    assert q[:, 0].tolist() == k[:, 0].tolist() == [0.5] * 3 + [1.0] * 3


def test_a_note_of_another_shape_is_an_error() -> None:
    clip, q, k = simple()
    for wrong in (torch.ones(4), torch.ones(2, 1), torch.ones(0), torch.tensor(3.0)):
        with pytest.raises(ValueError, match=r"max_logits of 'attn' has shape .* 6 query and 6 key outputs"):
            clip([q, k], {"tau": 4.0}, {"attn": wrong})
    shared = QkClip("attn", (Outputs("q", 0, 0, 6),), (Outputs("k", 0, 0, 2),))
    with pytest.raises(ValueError, match="whole heads of one size"):
        shared([q, k[:2]], {"tau": 4.0}, {"attn": torch.ones(2)})


def test_without_a_note_nothing_is_clipped_and_it_says_so_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(spectral, "_warned", set())
    clip, q, k = simple()
    with pytest.warns(UserWarning, match="knows no attention logits of 'attn'"):
        clip([q, k], {"tau": 4.0}, {"other": torch.ones(2)})
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        clip([q, k], {"tau": 4.0}, {})
    assert bool((q == 1).all())


@pytest.mark.parametrize("stored", ["qkv", "apart"])
def test_training_with_notes_is_moonlight_and_then_the_clip(stored: str) -> None:
    model = Model(Attention(stored))
    strong(model, 1.5)
    twin = Model(Attention(stored))
    twin.load_state_dict(model.state_dict())
    options: dict[str, Any] = {"lr": 0.01, "nesterov": False, **EXACT}
    opt, plain = gd.optimizer("muonclip", model, tau=5.0, **options), gd.optimizer("moonlight", twin, **options)
    seen: dict[str, Tensor] = {}
    watchers = [
        AttentionLogits(model, [NAME], lambda values: opt.note("max_logits", values)),
        AttentionLogits(
            twin,
            [NAME],
            lambda values: seen.update({n: torch.maximum(v, seen.get(n, v)) for n, v in values.items()}),
        ),
    ]
    clipped = 0
    for step in range(6):
        seen.clear()
        made = torch.Generator().manual_seed(step)
        for net, one in ((model, opt), (twin, plain)):
            made.manual_seed(step)
            one.zero_grad()
            for _ in range(2):  # micro-batches: the largest counts
                net(torch.randn(2, 5, 12, dtype=F64, generator=made)).square().mean().backward()
            one.step()
        clipped += int((seen[NAME] > 5.0).sum())
        clip_once(twin, seen[NAME], 5.0)
        for a, b in zip(model.parameters(), twin.parameters()):
            torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-13)
    assert clipped > 3
    for watcher in watchers:
        watcher.remove()
