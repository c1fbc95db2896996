"""The Adam family: references, first steps, published numbers, the equilibrium of decay."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import guided_descent as gd
from oracles.elementwise import adamw, nadam_mu, nadamw
from oracles.training import far, stream, train

PATHS: list[dict[str, bool]] = [{}, {"fused": False}, {"foreach": False}]


@pytest.mark.parametrize("path", PATHS, ids=["kernel", "lists", "plain"])
@pytest.mark.parametrize("amsgrad", [False, True])
def test_adamw_takes_the_references_steps(path: dict[str, bool], amsgrad: bool) -> None:
    start, grad = torch.randn(4, 5, dtype=torch.float64), stream((4, 5), 1)
    options: dict[str, Any] = {"betas": (0.8, 0.9), "eps": 1e-3, "weight_decay": 0.3, "amsgrad": amsgrad}
    p = torch.nn.Parameter(start.clone())
    got = train(gd.AdamW([p], lr=0.05, **options, **path), [p], [grad], 40)[0]
    assert far(got, adamw(start, grad, 40, 0.05, **options)) < 1e-13


@pytest.mark.parametrize("path", PATHS[1:], ids=["lists", "plain"])
def test_nadamw_takes_the_references_steps(path: dict[str, bool]) -> None:
    start, grad = torch.randn(4, 5, dtype=torch.float64), stream((4, 5), 2)
    options: dict[str, Any] = {"betas": (0.8, 0.9), "eps": 1e-3, "weight_decay": 0.3, "momentum_decay": 0.05}
    p = torch.nn.Parameter(start.clone())
    got = train(gd.NAdamW([p], lr=0.05, **options, **path), [p], [grad], 40)[0]
    assert far(got, nadamw(start, grad, 40, 0.05, **options)) < 1e-13


@pytest.mark.parametrize(("t", "mu"), [(1, 0.4500735), (10, 0.4507342), (100, 0.4572883), (1000, 0.5177940)])
def test_published_momenta_of_nadam(t: int, mu: float) -> None:
    assert nadam_mu(t, 0.9, 4e-3) == pytest.approx(mu, abs=5e-8)
    p = torch.nn.Parameter(torch.zeros(3))
    opt = gd.NAdamW([p])
    saved = opt.state_dict()
    saved["state"][0]["step"] = torch.tensor(float(t - 1))
    opt.load_state_dict(saved)
    p.grad = torch.ones(3)
    opt.step()
    assert float(opt.state[p]["mu_product"]) == pytest.approx(mu, abs=5e-8)  # the product was 1 before


def test_the_first_step_of_adam_is_the_sign() -> None:
    g = torch.cat([torch.logspace(-5, 3, 9, dtype=torch.float64), -torch.logspace(-5, 3, 9, dtype=torch.float64)])
    p = torch.nn.Parameter(torch.zeros_like(g))
    opt = gd.AdamW([p], lr=0.1, eps=1e-8, weight_decay=0.0)
    p.grad = g.clone()
    opt.step()
    torch.testing.assert_close(p.detach(), -0.1 * g.sign() / (1 + 1e-8 / g.abs()), atol=0, rtol=1e-9)


def test_the_first_step_of_nadam() -> None:
    g = torch.randn(9, dtype=torch.float64)
    p = torch.nn.Parameter(torch.zeros_like(g))
    opt = gd.NAdamW([p], lr=0.1, eps=0.0, weight_decay=0.0)
    p.grad = g.clone()
    opt.step()
    one, two = nadam_mu(1, 0.9, 4e-3), nadam_mu(2, 0.9, 4e-3)
    torch.testing.assert_close(p.detach(), -0.1 * g.sign() * (1 + two * 0.1 / (1 - one * two)))


def test_the_equilibrium_of_decay_and_noise() -> None:
    # Under pure noise the weights settle where decay balances steps: RMS .2199 at these numbers, sqrt(lr / (2 wd)) =
    # .2236 in the limit of small steps.
    p = torch.nn.Parameter(torch.zeros(30_000))
    opt = gd.AdamW([p], lr=0.01, weight_decay=0.1, betas=(0.9, 0.99), nonfinite="ignore")
    p.grad = torch.empty_like(p)
    for _ in range(2500):  # five time constants 1 / (2 lr wd)
        p.grad.normal_()
        opt.step()
    assert float(p.detach().square().mean().sqrt()) == pytest.approx(0.2199, rel=0.015)


@settings(max_examples=25, deadline=None)
@given(
    name=st.sampled_from(["adamw", "nadamw"]),
    factor=st.floats(1e-8, 1e8),
    seed=st.integers(0, 10_000),
    kernel=st.booleans(),
)
def test_the_length_of_the_gradient_does_not_matter(name: str, factor: float, seed: int, kernel: bool) -> None:
    torch.manual_seed(seed)
    grads = [torch.randn(7, dtype=torch.float64) for _ in range(6)]
    ends = []
    for c in (1.0, factor):
        p = torch.nn.Parameter(torch.ones(7, dtype=torch.float64))
        opt = gd.optimizer(name, [p], lr=0.1, eps=0.0, fused=None if kernel else False)
        train(opt, [p], [lambda t, p, c=c: c * grads[t - 1]], 6)
        ends.append(p.detach())
    torch.testing.assert_close(ends[1], ends[0], atol=1e-10, rtol=0)


@settings(max_examples=25, deadline=None)
@given(
    seed=st.integers(0, 10_000),
    betas=st.tuples(st.floats(0.0, 0.99), st.floats(0.5, 0.999)),
    spike=st.floats(1e-3, 1e6),
)
def test_no_step_of_adam_is_longer_than_its_bound(seed: int, betas: tuple[float, float], spike: float) -> None:
    torch.manual_seed(seed)
    p = torch.nn.Parameter(torch.zeros(5, dtype=torch.float64))
    opt = gd.AdamW([p], lr=1.0, betas=betas, weight_decay=0.0)
    beta1, beta2 = betas
    for t in range(1, 13):
        before = p.detach().clone()
        p.grad = torch.randn(5, dtype=torch.float64) * (spike if t == 9 else 1.0)
        opt.step()
        # By Cauchy and Schwarz: |sum a_i g_i| <= sqrt(sum a_i^2 / c_i) sqrt(sum c_i g_i^2).
        ages = range(t)
        ratio = sum(((1 - beta1) * beta1**i) ** 2 / ((1 - beta2) * beta2**i) for i in ages)
        bound = ratio**0.5 * (1 - beta2**t) ** 0.5 / (1 - beta1**t)
        assert float((p.detach() - before).abs().max()) <= bound * (1 + 1e-9)
