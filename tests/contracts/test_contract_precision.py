"""Dtypes and layouts: half and double precision, complex, strided, empty and degenerate tensors."""

from __future__ import annotations

import functools
import warnings
from typing import Any

import pytest
import torch
from drive import (
    Net,
    Plain,
    assert_close,
    assert_same,
    evaluations,
    exact,
    feed,
    fill,
    has,
    lone,
    make,
    parameters,
    parts_of,
    push,
    reads_layers,
    recipe_of,
    snapshot,
    steady,
    take,
    undrawn,
)
from torch import nn

from guided_descent.engine import engine
from guided_descent.parts import DAdaptDual

HALVES = [torch.bfloat16, torch.float16]


@pytest.mark.parametrize("dtype", [*HALVES, torch.float32, torch.float64])
def test_every_dtype_trains(key: str, dtype: torch.dtype) -> None:
    # square matrices: a basis of the null space of a singular factor would depend on rounding alone
    def build() -> nn.Module:
        torch.manual_seed(4)
        return nn.Sequential(nn.Linear(6, 6), nn.LayerNorm(6), nn.Linear(6, 6), nn.Linear(6, 6))

    net = build().to(dtype)
    reference = build().double()
    reference.load_state_dict(net.state_dict())
    opt = make(key, net, lr=0.05, rounding="master", **undrawn(key))
    wide = make(key, reference, lr=0.05, **undrawn(key))
    first = parameters(reference)
    for number in range(5):

        def closure(number: int = number) -> None:
            fill(net.parameters(), number)

        def same(number: int = number) -> None:
            for p, q in zip(net.parameters(), reference.parameters()):
                q.grad = p.grad.double()

        feed(opt, closure, number)
        feed(wide, same, number)
    assert all(p.dtype == dtype and bool(torch.isfinite(p).all()) for p in net.parameters())
    tolerance = {torch.float64: 1e-6, torch.float32: 2e-3}.get(dtype, 0.02)
    for name, p in net.named_parameters():
        moved = (reference.get_parameter(name) - first[name]).abs().max()
        error = (p.double() - reference.get_parameter(name)).abs().max()
        size = reference.get_parameter(name).abs().max()
        assert float(error) <= tolerance * float(moved) + (0.005 * float(size) if dtype in HALVES else 0.0), name
        assert float(moved) > 0


@pytest.mark.parametrize("dtype", HALVES)
def test_the_parameter_is_a_rounding_of_the_master(key: str, dtype: torch.dtype) -> None:
    net = Net(dtype)
    opt = make(key, net, rounding="master")
    push(opt, 4)
    for p in net.parameters():
        assert torch.equal(opt.state[p]["master"].to(dtype), p)
    with torch.no_grad():
        net.head.weight.mul_(2)  # written by somebody: the master follows
    push(opt, 1, scale=0.0)
    assert torch.equal(opt.state[net.head.weight]["master"].to(dtype), net.head.weight)


@pytest.mark.parametrize("dtype", HALVES)
def test_stochastic_rounding_repeats(key: str, dtype: torch.dtype) -> None:
    runs = []
    for seed in (0, 0, 1):
        net = Net(dtype)
        push(make(key, net, rounding="stochastic", seed=seed), 4)
        runs.append(parameters(net))
    assert_same(runs[0], runs[1])
    assert any(not torch.equal(runs[0][name], runs[2][name]) for name in runs[0])


@functools.cache
def drift(key: str, dtype: torch.dtype, rounding: str, rate: float, steps: int) -> torch.Tensor:
    """How far each element of a matrix of ones has moved under a constant gradient, what rounding keeps included."""
    made = torch.Generator().manual_seed(5)
    p = nn.Parameter(torch.ones(24, 24, dtype=dtype))
    g = torch.randn(24, 24, generator=made).to(torch.bfloat16)
    once: dict[str, Any] = {"factor_frequency": 10**6} if reads_layers(key) else {}  # a metric that stays
    once |= {"kl_clip": None} if has(key, "kl_clip") else {}
    once |= {"weight_decay": 0.0} if has(key, "weight_decay") else {}
    once |= steady(key)
    opt = make(key, lone(key, "p", p), lr=rate, rounding=rounding, **once)

    def closure() -> None:
        p.grad = g.to(dtype)

    for _ in range(steps):
        feed(opt, closure)
    held = opt.state[p].get("master", p).detach().double()
    return held + opt.state[p].get("comp", torch.zeros(())).double() - 1


def wanted(key: str, steps: int) -> tuple[float, torch.Tensor]:
    """The learning rate at which updates are 1e-4 of the weights on average, and where float32 then leads.

    The way is proportional to the rate, and found at the second attempt, unless updates depend on the weights.
    """
    rate = 1e-3
    for _ in range(8):
        way = drift(key, torch.float32, "nearest", rate, steps)
        share = 1e-4 * steps / float(way.abs().mean())
        if 0.8 < share < 1.25:
            return rate, way
        rate *= share
    raise AssertionError(f"no rate makes the updates of {key} 1e-4 of the weights")


STEPS = 10_000


def check_drift(key: str, rounding: str, steps: int) -> None:
    """The way in bfloat16 is that in float32, measured along it: random rounding adds what has a mean of 0."""
    rate, way = wanted(key, steps)
    found = drift(key, torch.bfloat16, rounding, rate, steps)
    assert float((found * way).sum() / way.square().sum()) == pytest.approx(1, rel=0.05)


@pytest.mark.filterwarnings("ignore:.*without their model")
@pytest.mark.parametrize("rounding", ["stochastic", "compensated", "master"])
def test_small_updates_survive_in_bfloat16(key: str, rounding: str) -> None:
    check_drift(key, rounding, 300)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*without their model")
@pytest.mark.parametrize("rounding", ["stochastic", "compensated", "master"])
def test_ten_thousand_small_updates_survive_in_bfloat16(key: str, rounding: str) -> None:
    check_drift(key, rounding, STEPS)


@pytest.mark.filterwarnings("ignore:.*without their model")
def test_rounding_to_nearest_loses_small_updates_and_says_so_once(key: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine, "_warned", set())
    drift.cache_clear()
    rate, way = wanted(key, 200)
    with pytest.warns(UserWarning, match="rounding='stochastic'") as caught:
        moved = drift(key, torch.bfloat16, "nearest", rate, 200)
    assert sum("rounded to nearest" in str(w.message) for w in caught) == 1
    if any(isinstance(part, DAdaptDual) for part in parts_of(key)):  # it goes a share of the way to a float32 place
        assert float((moved - way).abs().max()) < 1.1 * 2**-8 / (1 - recipe_of(key)().values()["momentum"])
    else:
        assert float(moved.abs().mean()) < 0.5 * float(way.abs().mean())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", message=".*without their model")
        drift(key, torch.bfloat16, "nearest", rate, 2)


# -- layouts -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.complex64, torch.complex128])
def test_complex_parameters_are_pairs_of_reals(key: str, dtype: torch.dtype) -> None:
    made = torch.Generator().manual_seed(0)
    value = torch.randn(3, 5, dtype=torch.complex128, generator=made).to(dtype)
    p, q = nn.Parameter(value.clone()), nn.Parameter(torch.view_as_real(value).clone())
    one, two = make(key, [("p", p)]), make(key, [("p", q)])
    for number in range(4):
        g = torch.randn(3, 5, dtype=dtype, generator=made)

        def closure(g: torch.Tensor = g) -> None:
            p.grad, q.grad = g, torch.view_as_real(g)

        take(one, closure, evaluations(one))
        take(two, closure, evaluations(two))
        assert int(one.state[p]["step"]) == number + 1
    torch.testing.assert_close(torch.view_as_real(p.detach()), q.detach(), rtol=1e-5, atol=1e-6)
    assert not torch.equal(p, value)


def test_channels_last_weights_equal_contiguous_ones(key: str) -> None:
    def build(layout: torch.memory_format) -> nn.Module:
        torch.manual_seed(0)
        net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 3), nn.Flatten(), nn.Linear(4, 6))
        return net.double().to(memory_format=layout)

    a, b = build(torch.contiguous_format), build(torch.channels_last)
    one, two = make(key, a, **exact(key)), make(key, b, **exact(key))
    push(one, 6)
    push(two, 6)
    assert_close(parameters(a), parameters(b), 1e-9)
    weight = b[2].weight
    assert weight.is_contiguous(memory_format=torch.channels_last)
    for name, value in two.state[weight].items():
        if value.shape == weight.shape:
            assert value.is_contiguous(memory_format=torch.channels_last), name


def strided(g: torch.Tensor, how: str) -> torch.Tensor:
    """The same values in another layout in memory."""
    if how == "transposed" and g.ndim == 2:
        return g.t().contiguous().t()
    if how == "expanded" and g.ndim:
        return g.flatten()[:1].reshape([1] * g.ndim).expand(g.shape)
    if how == "sliced" and g.ndim:
        return torch.stack([g, g], -1)[..., 0]
    return g


@pytest.mark.parametrize("how", ["transposed", "sliced", "expanded"])
def test_gradients_in_other_layouts(key: str, how: str) -> None:
    a, b = Net(torch.float64), Net(torch.float64)
    one, two = make(key, a, **exact(key)), make(key, b, **exact(key))
    for number in range(5):

        def dense(number: int = number) -> None:
            fill(a.parameters(), number)
            for p in a.parameters():
                p.grad = strided(p.grad, how).contiguous()

        def other(number: int = number) -> None:
            fill(b.parameters(), number)
            for p in b.parameters():
                p.grad = strided(p.grad, how)

        feed(one, dense, number)
        feed(two, other, number)
    # expanded gradients are of rank one: the bases of their null space depend on rounding
    assert_close(parameters(a), parameters(b), 1e-9 if how != "expanded" else 1e-6)


def test_parameters_that_are_views_in_memory(key: str) -> None:
    storage = torch.randn(6, 8, dtype=torch.float64)
    p, q = nn.Parameter(storage.t()[1:5]), nn.Parameter(storage.t()[1:5].contiguous())
    outside = storage[:, 5:].clone()
    one, two = make(key, lone(key, "p", p), **exact(key)), make(key, lone(key, "p", q), **exact(key))
    push(one, 5)
    push(two, 5)
    torch.testing.assert_close(p, q, rtol=1e-9, atol=1e-12)
    assert torch.equal(storage[:, 5:], outside)


def test_empty_scalar_and_thin_tensors(key: str) -> None:
    shapes = [(), (1,), (5,), (0,), (0, 4), (4, 0), (1, 6), (6, 1), (2, 3, 4), (2, 3, 2, 2), (3, 0, 2)]
    params = [(f"p{i}", nn.Parameter(torch.full(shape, 0.5))) for i, shape in enumerate(shapes)]
    opt = make(key, params)
    assert sum(len(group["params"]) for group in opt.param_groups) == len(shapes)
    push(opt, 5)
    for _, p in params:
        assert bool(torch.isfinite(p).all())
        assert int(opt.state[p]["step"]) == 5
        assert not p.numel() or not torch.equal(p, torch.full_like(p, 0.5))


def test_zero_gradients_stay_finite(key: str) -> None:
    for weights in (0.0, 1.0):
        net = Plain()
        with torch.no_grad():
            for p in net.parameters():
                p.fill_(weights)
        opt = make(key, net)
        for _ in range(20):
            push(opt, 1, scale=0.0)
        assert all(bool(torch.isfinite(v).all()) for v in snapshot(opt).values() if isinstance(v, torch.Tensor))


@pytest.mark.parametrize("kind", ["rank1", "ill", "repeated", "tiny", "huge"])
def test_hard_spectra_stay_finite(key: str, kind: str) -> None:
    made = torch.Generator().manual_seed(0)
    p = nn.Parameter(torch.randn(6, 6, generator=made))
    q, r = (torch.linalg.qr(torch.randn(6, 6, generator=made, dtype=torch.float64)).Q for _ in range(2))
    spectrum = {
        "rank1": torch.tensor([1.0, 0, 0, 0, 0, 0]),
        "ill": torch.logspace(0, -12, 6),
        "repeated": torch.ones(6),
        "tiny": torch.full((6,), 1e-20),
        "huge": torch.full((6,), 1e12),
    }[kind]
    opt = make(key, lone(key, "p", p), lr=1e-3 if kind != "huge" else 1e-14)

    def closure() -> None:
        p.grad = ((q * spectrum.double()) @ r.mT).float()

    for number in range(20):
        feed(opt, closure, number)
    assert all(bool(torch.isfinite(v).all()) for v in snapshot(opt).values() if isinstance(v, torch.Tensor))
    assert opt.skipped == 0


def test_a_solver_that_fails_is_survived_and_counted(key: str, monkeypatch: pytest.MonkeyPatch) -> None:
    solve, calls = torch.linalg.eigh, [0]

    def failing(a: torch.Tensor, *args: object) -> object:
        calls[0] += 1
        if calls[0] % 3:
            raise torch.linalg.LinAlgError("the solver has been told to fail")
        return solve(a, *args)

    monkeypatch.setattr(torch.linalg, "eigh", failing)
    net = Net()
    opt = make(key, net)
    push(opt, 20)
    assert all(bool(torch.isfinite(v).all()) for v in snapshot(opt).values() if isinstance(v, torch.Tensor))
    fallbacks = sum(counts.get("fallbacks", 0) for counts in opt.audit().values())
    assert (fallbacks > 0) == (calls[0] > 0)
