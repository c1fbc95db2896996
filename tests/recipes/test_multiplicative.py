"""Multiplicative steps against references, and what they promise: signs, zeros, relative steps, gamma."""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import guided_descent as gd
from guided_descent.parts import Descend, HAbs, MAbs, Parts
from guided_descent.recipes import SGD, Lion, Multiplicative
from guided_descent.schedules import Schedule, curves
from oracles import step_rules as oracle
from oracles.training import far, stream, train

F64 = torch.float64
SHAPES = [(7, 4), (5,), (3, 2, 2, 3)]
PATHS: list[dict[str, bool]] = [{}, {"foreach": False}, {"compile": True}]
IDS = ["lists", "plain", "compiled"]
EVERYWHERE = {"vectors": "multiplicative"}


def paths_of(name: str, starts: list[Tensor], steps: int, *, pull: float = 0.3, **options: Any) -> list[list[Tensor]]:
    """What a recipe makes of the streams of these tensors."""
    params = [nn.Parameter(p.clone()) for p in starts]
    opt = gd.optimizer(name, params, **options)
    if options.get("compile"):
        opt._engine.compiled.backend = "eager"
    return train(opt, params, [stream(tuple(p.shape), i, pull) for i, p in enumerate(starts)], steps)


def starts_of(*shapes: tuple[int, ...], dtype: torch.dtype = F64) -> list[Tensor]:
    return [torch.randn(shape, dtype=F64).to(dtype) for shape in shapes or SHAPES]


@pytest.mark.parametrize("path", PATHS, ids=IDS)
@pytest.mark.parametrize("rule", ["m_abs", "m_spow", "h_abs"])
@pytest.mark.parametrize("base", ["sgd", "adam"])
def test_the_references_steps(base: str, rule: str, path: dict[str, bool]) -> None:
    own = {"momentum": 0.8} if base == "sgd" else {"betas": (0.8, 0.95)}
    share = {"gamma": 0.7} if rule == "h_abs" else {}
    starts = starts_of()
    numbers: dict[str, Any] = {"lr_in": 2.0, "weight_decay": 0.2, "rule": rule}
    found = paths_of(
        f"multiplicative_{base}", starts, 40, lr=0.05, lr_out_scale=3.0, **numbers, **own, **share, **EVERYWHERE, **path
    )
    for i, (start, got) in enumerate(zip(starts, found)):
        want = oracle.walk(
            start, stream(tuple(start.shape), i), 40, 0.05, base=base, lr_out=0.15, **numbers, **own, **share
        )
        assert far(got, want) < 1e-12


@pytest.mark.parametrize("path", PATHS, ids=IDS)
@pytest.mark.parametrize("numbers", [{}, {"beta": 0.9, "p_scale": 1.1, "g_bound": 0.8}])
def test_madam_takes_the_references_steps(numbers: dict[str, float], path: dict[str, bool]) -> None:
    starts = starts_of()
    found = paths_of("madam", starts, 40, lr=0.1, **numbers, **EVERYWHERE, **path)
    for i, (start, got) in enumerate(zip(starts, found)):
        want = oracle.madam(start, stream(tuple(start.shape), i), 40, 0.1, **numbers)
        assert far(got, want) < 1e-12


@pytest.mark.parametrize("dtype", [torch.float32, F64, torch.bfloat16])
@pytest.mark.parametrize("path", PATHS, ids=IDS)
@pytest.mark.parametrize("base", ["sgd", "adam"])
def test_without_a_share_the_hybrid_is_the_base_recipe_to_the_bit(
    base: str, path: dict[str, bool], dtype: torch.dtype
) -> None:
    own = {"momentum": 0.9, "nesterov": True} if base == "sgd" else {"amsgrad": True}
    starts = starts_of(dtype=dtype)
    # torch's fused kernels, which the base recipe may run on, round in another order
    numbers: dict[str, Any] = {"lr": 0.05, "weight_decay": 0.1, "rounding": "master", "fused": False, **own, **path}
    hybrid = paths_of(f"multiplicative_{base}", starts, 40, rule="h_abs", gamma=0.0, **numbers)
    plain = paths_of(base, starts, 40, **numbers)
    assert all(torch.equal(a, b) for one, other in zip(hybrid, plain) for a, b in zip(one, other))


def test_with_the_whole_share_the_hybrid_is_the_multiplicative_step() -> None:
    starts = starts_of()
    for base in ("sgd", "adam"):
        one = paths_of(f"multiplicative_{base}", starts, 40, lr=0.05, rule="h_abs")
        other = paths_of(f"multiplicative_{base}", starts, 40, lr=0.05, rule="m_abs")
        assert all(torch.equal(a, b) for x, y in zip(one, other) for a, b in zip(x, y))


@settings(max_examples=25, deadline=None)
@given(
    name=st.sampled_from(["m_abs", "m_spow", "madam"]),
    base=st.sampled_from(["sgd", "adam"]),
    rate=st.floats(1e-4, 0.9),
    inner=st.floats(0.01, 100),
    scale=st.floats(1e-6, 1e6),
    seed=st.integers(0, 1000),
)
def test_signs_stay_zeros_stay_and_steps_are_shares(
    name: str, base: str, rate: float, inner: float, scale: float, seed: int
) -> None:
    made = torch.Generator().manual_seed(seed)
    start = torch.randn(6, 5, generator=made, dtype=F64)
    start[start.abs() < 0.3] = 0.0
    p = nn.Parameter(start.clone())
    if name == "madam":
        opt = gd.Madam([p], lr=rate)
    else:
        own = {"betas": (0.0, 0.9)} if base == "adam" else {"momentum": 0.5}
        opt = gd.optimizer(f"multiplicative_{base}", [p], lr=rate, lr_in=inner, rule=name, **own)
    path = [start, *train(opt, [p], [lambda t, p: scale * torch.randn(6, 5, generator=made, dtype=F64)], 15)[0]]
    for before, after in pairwise(path):
        assert torch.equal(before.sign(), after.sign())
        if name == "m_abs":
            assert bool(((after - before).abs() <= rate * before.abs() * (1 + 1e-9)).all())
        elif name == "m_spow":
            assert bool(((after / before).nan_to_num(1.0).log2().abs() <= rate * (1 + 1e-9)).all())
        else:
            assert bool((after.abs() <= 3 * start.square().mean().sqrt() * (1 + 1e-12)).all())


def test_a_power_of_two_near_one_is_exact_in_float32() -> None:
    """2^x - 1 of a tiny x is x ln 2: a rounded power would lose it."""
    p = nn.Parameter(torch.full((2, 2), 1e-30))
    opt = gd.MultiplicativeSGD([p], lr=1e-7, rule="m_spow", rounding="nearest")
    for _ in range(1000):
        p.grad = torch.full_like(p, 1e3)
        opt.step()
    q = torch.full((2, 2), 1e-30, dtype=F64) * 2.0 ** (-1e-4)
    assert float((p.double() / q - 1).abs().max()) < 3e-5


def test_biases_that_begin_at_zero_are_trained() -> None:
    for name in ("multiplicative_sgd", "multiplicative_adam", "madam"):
        layer = nn.Linear(3, 4)
        nn.init.zeros_(layer.bias)
        opt = gd.optimizer(name, layer)
        layer(torch.randn(5, 3)).square().sum().backward()
        opt.step()
        assert bool(layer.bias.detach().all()), name
        frozen = gd.optimizer(name, [p := nn.Parameter(torch.zeros(4))], **EVERYWHERE)
        p.grad = torch.ones(4)
        frozen.step()
        assert not p.detach().any(), name


def test_layers_may_trade_scale() -> None:
    """A net whose function two scaled layers leave alone learns the same: the additive step would not."""
    torch.manual_seed(0)
    x, y = torch.randn(32, 6, dtype=F64), torch.randn(32, 2, dtype=F64)

    def losses(name: str, scale: float, **options: Any) -> list[float]:
        torch.manual_seed(1)
        net = nn.Sequential(nn.Linear(6, 16, bias=False), nn.ReLU(), nn.Linear(16, 2, bias=False)).double()
        with torch.no_grad():
            net[0].weight.mul_(scale)
            net[2].weight.div_(scale)
        opt = gd.optimizer(name, net, **options)
        found = []
        for _ in range(40):
            opt.zero_grad()
            loss = (net(x) - y).square().mean()
            loss.backward()
            opt.step()
            found.append(float(loss.detach()))
        return found

    for name, options in (
        ("multiplicative_adam", {"rule": "m_abs", "eps": 0.0}),
        ("multiplicative_adam", {"rule": "m_spow", "eps": 0.0}),
        ("madam", {}),
    ):
        plain = losses(name, 1.0, lr=0.01, **options)
        assert losses(name, 1e3, lr=0.01, **options) == pytest.approx(plain, rel=1e-9)
        assert plain[-1] < plain[0]
    assert losses("adam", 1e3, lr=0.01)[-1] > 2 * losses("adam", 1.0, lr=0.01)[-1]


# -- gamma and its schedules -----------------------------------------------------------------------------------------


def test_gamma_follows_the_papers_schedule() -> None:
    p, every, patience = nn.Parameter(torch.ones(2, 3)), 4, 8
    for rising in (False, True):
        opt = gd.MultiplicativeSGD([("p", p), ("b", nn.Parameter(torch.ones(2)))], rule="h_abs", lr=0.5)
        sched = Schedule(opt, curves.powers(0.9, every=every, patience=patience, rising=rising), key="gamma")
        rates = Schedule(opt, curves.linear(40))
        seen = []
        for _ in range(20):
            seen.append(opt.param_groups[0]["gamma"])
            p.grad = torch.ones_like(p)
            opt.step()
            sched.step()
            rates.step()
        powers = [0] * patience + [1 + i // every for i in range(20 - patience)]
        want = [1 - 0.1**k if rising else 0.9**k for k in powers]
        assert seen == pytest.approx(want)
        assert opt.param_groups[0]["lr"] == pytest.approx(0.25)
        # a resumed run goes on where it was
        saved, place = opt.state_dict(), sched.state_dict()
        fresh = gd.MultiplicativeSGD([("p", p), ("b", nn.Parameter(torch.ones(2)))], rule="h_abs", lr=0.5)
        again = Schedule(fresh, curves.powers(0.9, every=every, patience=patience, rising=rising), key="gamma")
        fresh.load_state_dict(saved)
        again.load_state_dict(place)
        assert fresh.param_groups[0]["gamma"] == sched.get_last_lr()[0] == again.get_last_lr()[0]


def test_a_moving_gamma_takes_the_references_steps() -> None:
    start = torch.randn(4, 5, dtype=F64)
    p = nn.Parameter(start.clone())
    opt = gd.MultiplicativeAdam([p], lr=0.05, rule="h_abs")
    sched = Schedule(opt, curves.powers(0.9, every=3), key="gamma")
    found = []
    grad = stream((4, 5), 0)
    for t in range(1, 41):
        p.grad = grad(t, p)
        opt.step()
        sched.step()
        found.append(p.detach().clone())
    want = oracle.walk(
        start, grad, 40, 0.05, base="adam", rule="h_abs", lr_out=0.05, gamma=lambda t: 0.9 ** (1 + (t - 1) // 3)
    )
    assert far(found, want) < 1e-12


def test_a_schedule_of_a_key_that_is_nowhere() -> None:
    opt = gd.SGD([nn.Parameter(torch.ones(2))])
    with pytest.raises(ValueError, match=r"key='gamma' is in no param group; they have .*lr"):
        Schedule(opt, curves.constant(), key="gamma")
    for wrong in ({"ratio": 1.5}, {"ratio": 0.5, "every": 0}, {"ratio": 0.5, "patience": -1}):
        with pytest.raises(ValueError, match=f"{list(wrong)[-1]}="):
            curves.powers(**wrong)


def test_gamma_belongs_to_the_hybrid() -> None:
    with pytest.raises(ValueError, match=r"gamma=0\.5 of multiplicative_sgd is the mixture of rule='h_abs'"):
        gd.MultiplicativeSGD([nn.Parameter(torch.ones(2, 2))], gamma=0.5)


# -- rules beside the registered recipes -----------------------------------------------------------------------------


def test_any_recipe_becomes_multiplicative() -> None:
    @dataclass(frozen=True, kw_only=True)
    class MLion(Multiplicative, Lion):
        """Lion with a multiplicative step."""

    p = nn.Parameter(torch.ones(3, 4, dtype=F64))
    opt = gd.build([p], MLion(lr=0.1, weight_decay=0.0))
    p.grad = torch.ones_like(p)
    opt.step()
    torch.testing.assert_close(p.detach(), torch.full_like(p, 1 - 0.1 * math.tanh(1)))


def test_a_rule_takes_the_place_of_the_step() -> None:
    added = (MAbs(),)
    for step in (Descend(), HAbs()):
        assert list(Parts(step) + added) == [MAbs()]
    with pytest.raises(ValueError, match=r"MAbs takes the place of a step p - lr u.* steps with Displace"):
        gd.recipes.RMSprop(momentum=0.9, form="tensorflow").parts(_block()) + added
    with pytest.raises(ValueError, match="MAbs reads 'lr_in', 'lr_out_scale', which sgd does not have"):
        gd.build([nn.Parameter(torch.ones(2, 2))], SGD(), add=[MAbs()])


def _block() -> Any:
    from guided_descent.routing.roles import Block, Piece, Role

    return Block("w", (Piece("w", (3, 4)),), (3, 4), Role.MATRIX)
