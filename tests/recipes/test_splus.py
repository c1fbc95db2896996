"""SPlus against a plain float64 reference, and what its bases and scales do."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor

import guided_descent as gd
from guided_descent.recipes import SPlus
from oracles.elementwise import adamw
from oracles.shampoo import splus
from oracles.training import Bag, far, stream, train

STEPS = 25


def run(
    start: Tensor, grad: Any, steps: int = STEPS, role: str = "matrix", **options: Any
) -> tuple[list[Tensor], dict[str, Tensor], Any]:
    """Train one tensor: its path, its state at the end, and the optimizer."""
    model = Bag({"w": start})
    opt = gd.build(model, SPlus(**{"refresh_schedule": "every"} | options), rules=[gd.rule("w", role=role)])
    params = list(model.parameters())
    path = train(opt, params, [grad], steps)[0]
    return path, opt.state[params[0]], opt


@pytest.mark.parametrize("decay", ["shaped", "after", "decoupled"])
def test_it_takes_the_references_steps(decay: str) -> None:
    # square: the sign in the null space of a singular factor is arbitrary
    start, grad = torch.randn(5, 5, dtype=torch.float64), stream((5, 5), 1)
    numbers: dict[str, Any] = {"lr": 0.3, "betas": (0.8, 0.9), "weight_decay": 0.5, "decay": decay}
    path, _, opt = run(start, grad, precondition_frequency=4, **numbers)
    assert far(path, splus(start, grad, STEPS, frequency=4, **numbers)) < 1e-8
    assert far(path[-1:], [start]) > 0.3
    assert opt.audit() == {"w": {"refreshes": 12}}
    others = {"shaped", "after", "decoupled"} - {decay}
    for other in others:
        assert far(path, splus(start, grad, STEPS, frequency=4, **numbers | {"decay": other})) > 1e-3


def test_the_papers_numbers() -> None:
    start, grad = torch.randn(6, 6, dtype=torch.float64), stream((6, 6), 2)
    path, _, opt = run(start, grad, steps=105, decay="after", weight_decay=0.01)
    assert far(path, splus(start, grad, 105, 0.1, weight_decay=0.01, decay="after")) < 1e-8
    group = opt.param_groups[0]
    assert (group["lr"], group["betas"], group["precondition_frequency"]) == (0.1, (0.9, 0.999), 100)


@pytest.mark.parametrize("shape", [(7, 4), (3, 6)])
def test_a_step_has_the_length_of_its_shape(shape: tuple[int, int]) -> None:
    start, grad = torch.zeros(shape, dtype=torch.float64), stream(shape, 3, pull=0.0)
    path, _, _ = run(start, grad, lr=1.0, weight_decay=0.0, precondition_frequency=3)
    scale = 2 / sum(shape)
    torch.testing.assert_close(path[0], -scale * grad(1, start).sign())  # the identity at first
    for before, after in pairwise(path):
        norm = (shape[0] * shape[1]) ** 0.5  # of a matrix of signs, in any bases
        assert abs(float((after - before).norm()) / (scale * norm) - 1) < 1e-10


def test_a_long_side_keeps_the_identity_and_the_scale_of_a_vector() -> None:
    start, grad = torch.zeros(12, 4, dtype=torch.float64), stream((12, 4), 4, pull=0.0)
    path, state, _ = run(start, grad, role="embedding", max_precond_dim=10, lr=1.0, weight_decay=0.0)
    assert "left" not in state
    assert state["right_basis"].shape == (4, 4)
    for before, after in zip([start, *path], path):
        assert abs(float((after - before).norm()) / (0.001 * 48**0.5) - 1) < 1e-10


@pytest.mark.parametrize("method", ["eigh", "qr"])
def test_signs_and_order_of_a_basis_do_not_matter(method: str) -> None:
    start, grad = torch.randn(5, 5, dtype=torch.float64), stream((5, 5), 5)
    options: dict[str, Any] = {"precondition_frequency": 3, "refresh_method": method}
    plain, _, _ = run(start, grad, steps=3, **options)
    model = Bag({"w": start})
    opt = gd.build(model, SPlus(refresh_schedule="every", **options), rules=[gd.rule("w", role="matrix")])
    path = train(opt, list(model.parameters()), [grad], 1)[0]
    for side in ("left", "right"):
        q = opt.state[model.w][f"{side}_basis"]
        q.copy_((q * torch.tensor([1.0, -1.0, 1.0, -1.0, -1.0]))[:, torch.randperm(5)])
    path += train(opt, list(model.parameters()), [grad], 2, start=2)[0]
    assert far(path, plain) < 1e-10


def test_it_follows_rotations_after_the_first_step_and_not_the_scale() -> None:
    grads = [torch.randn(4, 4, dtype=torch.float64) for _ in range(12)]
    u, v = (torch.linalg.qr(torch.randn(4, 4, dtype=torch.float64)).Q for _ in range(2))
    zero = torch.zeros(4, 4, dtype=torch.float64)
    options: dict[str, Any] = {"precondition_frequency": 3, "weight_decay": 0.0}
    plain, _, _ = run(zero, lambda t, p: grads[t - 1], steps=12, **options)
    turned, _, _ = run(zero, lambda t, p: u @ grads[t - 1] @ v.T, steps=12, **options)
    large, _, _ = run(zero, lambda t, p: 2.0**20 * grads[t - 1], steps=12, **options)
    assert far([p - turned[0] for p in turned], [u @ (p - plain[0]) @ v.T for p in plain]) < 1e-10
    assert far(large, plain) < 1e-12


def test_experts_and_vectors() -> None:
    start, grads = torch.randn(3, 5, 5, dtype=torch.float64), torch.randn(9, 3, 5, 5, dtype=torch.float64)
    path, _, _ = run(start, lambda t, p: grads[t - 1], steps=9, role="expert", precondition_frequency=3)
    for e in range(3):
        alone, _, _ = run(start[e], lambda t, p, e=e: grads[t - 1, e], steps=9, precondition_frequency=3)
        assert far([p[e] for p in path], alone) < 1e-10
    vector, grad = torch.randn(6, dtype=torch.float64), stream((6,), 6)
    model = Bag({"w": vector, "m": torch.randn(4, 4, dtype=torch.float64)})
    opt = gd.build(model, SPlus(lr=0.5), rules=[gd.rule("m", role="matrix")])
    rest = train(opt, list(model.parameters()), [grad, stream((4, 4))], 20)[0]
    assert far(rest, adamw(vector, grad, 20, 1e-3)) < 1e-12  # a rate of its own, and no decay of a vector


@pytest.mark.parametrize("decay", ["shaped", "after", "independent"])
def test_a_schedule_moves_step_and_decay(decay: str) -> None:
    start, grad = torch.randn(5, 5, dtype=torch.float64), stream((5, 5), 7)
    model = Bag({"w": start})
    opt = gd.build(model, SPlus(lr=0.4, weight_decay=0.3, decay=decay), rules=[gd.rule("w", role="matrix")])

    def set_rate(t: int) -> None:
        opt.param_groups[0]["lr"] = 0.4 / t

    path = train(opt, list(model.parameters()), [grad], STEPS, set_rate)[0]
    if decay == "independent":
        steps = [q - p for p, q in zip([start, *path], path)]
        signs = [step + (0.3 / t) * p for t, (step, p) in enumerate(zip(steps, [start, *path]), 1)]
        assert all(abs(float(s.norm()) - 0.4 / t * 0.2 * 5) < 1e-10 for t, s in enumerate(signs, 1))
    else:
        assert far(path, splus(start, grad, STEPS, lambda t: 0.4 / t, weight_decay=0.3, decay=decay)) < 1e-8


@pytest.mark.parametrize("scale", [0.0, 1e-25, 1e20])
def test_trouble_stays_finite(scale: float) -> None:
    shapes = {"a": (8, 8), "b": (20, 5), "c": (1, 7)}
    model = Bag({key: torch.randn(shape) for key, shape in shapes.items()})
    rules = [gd.rule("a", role="matrix"), gd.rule("b", role="matrix"), gd.rule("c", role="embedding")]
    opt = gd.build(model, SPlus(precondition_frequency=3, weight_decay=0.0), rules=rules)
    params = list(model.parameters())
    starts = [p.detach().clone() for p in params]
    train(opt, params, [lambda t, p: scale * torch.randn_like(p)] * 3, 20)
    for p, start in zip(params, starts):
        assert p.isfinite().all()
        moved = float((p.detach() - start).norm())
        assert (moved == 0) == (scale == 0)
        assert moved <= 20 * 0.1 * 2 / sum(p.shape) * p.numel() ** 0.5 * 1.001


def test_a_poisoned_momentum_is_seen() -> None:
    # torch.sign(NaN) is 0: the matrix would stand still for ever, and nobody would know why
    grad = stream((4, 4), 9)
    for poisoned in (1, 3):
        model = Bag({"w": torch.randn(4, 4)})
        opt = gd.build(model, SPlus(), rules=[gd.rule("w", role="matrix")], nonfinite="ignore")
        train(opt, list(model.parameters()), [lambda t, p, k=poisoned: grad(t, p) * (torch.nan if t == k else 1)], 3)
        assert model.w.isnan().all()


def test_the_average_of_the_weights_is_another_matter() -> None:
    # the paper's evaluation weights: a zero start, corrected, taken after each step
    start, grad = torch.randn(5, 5), stream((5, 5), 8)
    model = Bag({"w": start})
    opt = gd.build(model, SPlus(), rules=[gd.rule("w", role="matrix")])
    average = gd.averaging.EMA(model, decay=0.999, optimizer=opt)
    sums = torch.zeros(5, 5, dtype=torch.float64)
    for t in range(1, 11):
        train(opt, list(model.parameters()), [grad], 1, start=t)
        average.update()
        sums = 0.999 * sums + 0.001 * model.w.detach().double()
    with gd.averaging.evaluating(model, average):
        torch.testing.assert_close(model.w.detach().double(), sums / (1 - 0.999**10), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("method", ["eigh", "qr"])
def test_a_factor_that_is_zero_is_no_failure(method: str) -> None:
    start = torch.randn(5, 4, dtype=torch.float64)
    options: dict[str, Any] = {"precondition_frequency": 2, "refresh_method": method}
    _, _, opt = run(start, lambda t, p: torch.zeros_like(p), steps=7, **options)
    assert opt.audit()["w"]["refreshes"] > 0
    assert "fallbacks" not in opt.audit()["w"]
