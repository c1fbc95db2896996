"""Muon against a plain float64 reference, and equal steps for equal maps however they are stored."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import guided_descent as gd
from oracles.muon import muon, scale_of, svd_polar
from oracles.training import Bag, far, stream, train

SHAPES = [(12, 5), (5, 12), (7, 7)]
SCALES = ["original", "match_rms_adamw", "spectral"]
COEFFICIENTS = gd.recipes.Muon.numbers()["coefficients"].metadata["of"]
EXACT: dict[str, Any] = {"coefficients": "exact"}


def matrices(*names: str, role: str = "matrix") -> list[gd.routing.Rule]:
    return [gd.rule(name, role=role) for name in names or ("*",)]


def one_step(start: Tensor, g: Tensor, role: str = "matrix", **options: Any) -> Tensor:
    """What one step adds to a parameter, per unit of learning rate."""
    model = Bag({"w": start})
    opt = gd.Muon(model, rules=matrices(role=role), **{"weight_decay": 0.0, "lr": 1.0} | options)
    [p] = model.parameters()
    p.grad = g.clone()
    opt.step()
    return (start - p.detach()).clone()


@pytest.mark.parametrize("nesterov", [True, False])
@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("coefficients", ["exact", "jordan", "polar_express"])
def test_it_takes_the_references_steps(coefficients: str, scale: str, nesterov: bool) -> None:
    numbers: dict[str, Any] = {"momentum": 0.9, "nesterov": nesterov, "weight_decay": 0.3, "scale": scale}
    starts = [torch.randn(shape, dtype=torch.float64) for shape in SHAPES]
    model = Bag({f"w{i}": start for i, start in enumerate(starts)})
    opt = gd.Muon(model, lr=0.05, coefficients=coefficients, rules=matrices(), **numbers)
    grads = [stream(shape, i) for i, shape in enumerate(SHAPES)]
    paths = train(opt, list(model.parameters()), grads, 20)
    for path, start, grad in zip(paths, starts, grads):
        reference = muon(start, grad, 20, 0.05, coefficients=coefficients, **numbers)
        assert far(path, reference) < 1e-9


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("nesterov", [True, False])
def test_the_first_step_is_the_polar_factor_of_the_gradient(shape: tuple[int, int], nesterov: bool) -> None:
    start, g = torch.randn(shape, dtype=torch.float64), torch.randn(shape, dtype=torch.float64)
    for momentum in (0.0, 0.95):
        step = one_step(start, g, momentum=momentum, nesterov=nesterov, scale="spectral", **EXACT)
        torch.testing.assert_close(step, math.sqrt(shape[0] / shape[1]) * svd_polar(g), atol=1e-10, rtol=0)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("scale", SCALES)
def test_lengths_by_name(scale: str, shape: tuple[int, int]) -> None:
    (m, n), c = shape, max(shape)
    step = one_step(
        torch.zeros(shape, dtype=torch.float64), torch.randn(shape, dtype=torch.float64), scale=scale, **EXACT
    )
    spectral = {
        "original": max(1.0, math.sqrt(m / n)),
        "match_rms_adamw": 0.2 * math.sqrt(c),
        "spectral": math.sqrt(m / n),
    }[scale]
    assert float(torch.linalg.matrix_norm(step, 2)) == pytest.approx(spectral, rel=1e-9)
    rms = float(step.square().mean().sqrt())
    assert rms == pytest.approx(spectral / math.sqrt(c), rel=1e-9)
    if scale == "match_rms_adamw":
        assert rms == pytest.approx(0.2, rel=1e-9)


@pytest.mark.parametrize(
    ("coefficients", "floor", "low", "high"),
    [("jordan", 3e-3, 0.68, 1.21), ("polar_express", 1e-3, 0.85, 1.15), ("adaptive", 1e-3, 0.85, 1.15)],
)
@pytest.mark.parametrize("ns_dtype", ["float32", "float64"])
def test_singular_values_of_the_polynomials(
    coefficients: str, floor: float, low: float, high: float, ns_dtype: str
) -> None:
    u, v = (torch.linalg.qr(torch.randn(24, 24, dtype=torch.float64)).Q for _ in range(2))
    s = torch.logspace(math.log10(1.2 * floor), 0, 24, dtype=torch.float64)
    g = (u * (s / s.norm())) @ v.T  # s / ||s|| reaches down to about half the floor
    step = one_step(torch.zeros_like(g), g, coefficients=coefficients, ns_dtype=ns_dtype)
    values = torch.linalg.svdvals(step)
    counted = int((s / s.norm() >= floor).sum())
    assert 15 < counted <= 24
    assert float(values[:counted].max()) < high
    assert float((u.T @ step @ v).diagonal()[s / s.norm() >= floor].min()) > low


@pytest.mark.parametrize(("dtype", "limit"), [(torch.float32, 1e-4), (torch.float64, 1e-10)])
def test_exact_is_orthogonal(dtype: torch.dtype, limit: float) -> None:
    step = one_step(torch.zeros(9, 20, dtype=dtype), torch.randn(9, 20, dtype=dtype), **EXACT).double()
    assert float((step @ step.T - torch.eye(9)).abs().max()) < limit


# -- equal maps take equal steps ---------------------------------------------------------------------------------------


def same_as_apart(whole: Tensor, role: str, parts: list[Tensor], apart_of: Any, steps: int = 8, **rule: Any) -> float:
    """Train one stored tensor and its parts as matrices of their own; the largest difference of the two."""
    options: dict[str, Any] = {"lr": 0.05, "weight_decay": 0.1, "ns_dtype": "float32"}
    together = Bag({"w": whole})
    rules = [gd.rule("w", role=role, **rule)]
    opt = gd.Muon(together, rules=rules, **options)
    apart = Bag({f"w{i}": part for i, part in enumerate(parts)})
    other = gd.Muon(apart, rules=matrices(), **options)
    assert all(recipe.key == "muon" for recipe in (*opt.recipes, *other.recipes))
    worst = 0.0
    for t in range(1, steps + 1):
        g = stream(whole.shape, 1)(t, torch.zeros_like(whole))
        [w] = together.parameters()
        w.grad = g
        for p, part in zip(apart.parameters(), apart_of(g)):
            p.grad = part.clone()
        opt.step()
        other.step()
        worst = max([worst, *(far([a], [p.detach()]) for a, p in zip(apart_of(w.detach()), apart.parameters()))])
    assert far([w.detach()], [whole]) > 0.1
    return worst


def test_stacked_experts() -> None:
    for shape in [(4, 6, 10), (4, 10, 6)]:
        whole = torch.randn(shape)
        assert same_as_apart(whole, "expert", list(whole), list) < 1e-6


def test_fused_grouped_queries() -> None:
    dim, inner = 8, 20  # 4 query heads and 2 key and value heads

    def qkv(w: Tensor) -> list[Tensor]:
        return list(w.split([4 * dim, 2 * dim, 2 * dim]))

    def heads(w: Tensor) -> list[Tensor]:
        return list(w.split(dim))

    whole = torch.randn(8 * dim, inner)
    sizes = (4 * dim, 2 * dim, 2 * dim)
    assert same_as_apart(whole, "fused", qkv(whole), qkv, split=sizes) < 1e-6
    assert same_as_apart(whole, "fused", heads(whole), heads, split=sizes, heads=4) < 1e-6


def test_grouped_queries_of_a_module_that_declares_its_heads() -> None:
    class Attention(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.n_heads, self.n_kv_heads, self.head_dim = 4, 2, 8
            self.qkv = nn.Linear(32, 64, bias=False)
            self.out = nn.Linear(32, 32, bias=False)

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.blocks = nn.ModuleList([Attention(), Attention()])
            self.last = nn.Linear(32, 3)

    model = Model()
    options: dict[str, Any] = {"lr": 0.05, "ns_dtype": "float32"}
    opt = gd.Muon(model, **options)
    parts = dict(zip("qkv", model.blocks[0].qkv.weight.detach().clone().split([32, 16, 16])))
    apart = Bag(parts)
    other = gd.Muon(apart, rules=matrices(), **options)
    for p in model.parameters():
        p.grad = torch.randn_like(p)
    for p, g in zip(apart.parameters(), model.blocks[0].qkv.weight.grad.split([32, 16, 16])):
        p.grad = g.clone()
    opt.step()
    other.step()
    fused = model.blocks[0].qkv.weight.detach()
    assert far([fused], [torch.cat([p.detach() for p in apart.parameters()])]) < 1e-6
    assert opt.audit()["blocks.0.qkv.weight"] == {"orthogonalizations": 3}


def test_convolutions_are_their_view_as_a_matrix() -> None:
    whole = torch.randn(6, 3, 2, 2)

    def flat(w: Tensor) -> list[Tensor]:
        return [w.reshape(6, 12)]

    assert same_as_apart(whole, "conv", flat(whole), flat) < 1e-6


def test_channels_last_convolutions_take_the_same_step() -> None:
    start, g = torch.randn(8, 3, 3, 3), torch.randn(8, 3, 3, 3)
    plain = one_step(start, g, role="conv", ns_dtype="float32")
    last = torch.channels_last
    turned = one_step(
        start.contiguous(memory_format=last), g.contiguous(memory_format=last), role="conv", ns_dtype="float32"
    )
    torch.testing.assert_close(turned, plain, atol=1e-6, rtol=0)


class Conv1D(nn.Module):
    """GPT-2's map: y = x W + b, stored (in, out)."""

    def __init__(self, nf: int, nx: int) -> None:
        super().__init__()
        self.nf, self.nx = nf, nx
        self.weight = nn.Parameter(torch.randn(nx, nf))
        self.bias = nn.Parameter(torch.zeros(nf))

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weight + self.bias


@pytest.mark.parametrize("scale", SCALES)
def test_storage_in_out_takes_the_step_of_its_linear_twin(scale: str) -> None:
    class Net(nn.Module):
        def __init__(self, first: nn.Module, second: nn.Module) -> None:
            super().__init__()
            self.first, self.second, self.last = first, second, nn.Linear(6, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.last(self.second(torch.tanh(self.first(x))))

    stored = Net(Conv1D(15, 6), Conv1D(6, 15)).double()  # float64, as gradients of rank 2 leave noise to amplify
    twin = Net(nn.Linear(6, 15), nn.Linear(15, 6)).double()
    with torch.no_grad():
        for mine, theirs in ((stored.first, twin.first), (stored.second, twin.second)):
            theirs.weight.copy_(mine.weight.T)
            theirs.bias.copy_(mine.bias)
        twin.last.load_state_dict(stored.last.state_dict())
    x, y = torch.randn(20, 6).double(), torch.randn(20, 2).double()
    opts = [gd.Muon(net, lr=0.02, scale=scale) for net in (stored, twin)]
    for _ in range(5):
        for net, opt in zip((stored, twin), opts):
            opt.zero_grad()
            (net(x) - y).square().mean().backward()
            opt.step()
    assert opts[0].audit() == opts[1].audit() == {f"{n}.weight": {"orthogonalizations": 5} for n in ("first", "second")}
    for mine, theirs in ((stored.first, twin.first), (stored.second, twin.second)):
        torch.testing.assert_close(mine.weight.T, theirs.weight, atol=1e-9, rtol=0)


# -- invariances -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ns_dtype", ["auto", "float32", "bfloat16"])
@pytest.mark.parametrize("coefficients", COEFFICIENTS)
@pytest.mark.parametrize("factor", [1e-12, 1e-6, 1e6])
def test_the_length_of_the_gradient_does_not_matter(factor: float, coefficients: str, ns_dtype: str) -> None:
    grads = [torch.randn(16, 24) for _ in range(3)]
    ends = []
    for c in (1.0, factor):
        model = Bag({"w": torch.zeros(16, 24)})
        opt = gd.Muon(model, lr=1.0, coefficients=coefficients, ns_dtype=ns_dtype, rules=matrices())
        [p] = model.parameters()
        train(opt, [p], [lambda t, p, c=c: c * grads[t - 1]], 3)
        ends.append(p.detach())
    assert float((ends[1] - ends[0]).norm() / ends[0].norm()) < 0.01


@settings(max_examples=25, deadline=None)
@given(
    m=st.integers(2, 7),
    n=st.integers(2, 7),
    seed=st.integers(0, 10_000),
    coefficients=st.sampled_from(["exact", "jordan", "polar_express"]),
)
def test_rotations_of_both_sides_pass_through(m: int, n: int, seed: int, coefficients: str) -> None:
    torch.manual_seed(seed)
    g, start = torch.randn(2, m, n, dtype=torch.float64)
    u = torch.linalg.qr(torch.randn(m, m, dtype=torch.float64)).Q
    v = torch.linalg.qr(torch.randn(n, n, dtype=torch.float64)).Q
    options: dict[str, Any] = {"coefficients": coefficients, "weight_decay": 0.1}
    plain = one_step(start, g, **options)
    turned = one_step(u @ start @ v.T, u @ g @ v.T, **options)
    torch.testing.assert_close(turned, u @ plain @ v.T, atol=1e-7, rtol=0)


def test_zero_gradients_give_zero_and_not_nan() -> None:
    for coefficients in COEFFICIENTS:
        assert not one_step(torch.randn(5, 8), torch.zeros(5, 8), coefficients=coefficients).any()


def test_scales_of_the_reference_are_its_table() -> None:
    assert [scale_of(name, 4, 1) for name in SCALES] == [2.0, 0.4, 2.0]
    assert [scale_of(name, 1, 4) for name in SCALES] == [1.0, 0.4, 0.5]


def test_an_eps_of_zero_is_refused_when_it_is_given() -> None:
    with pytest.raises(ValueError, match="eps=0"):
        gd.recipes.Muon(eps=0.0)
