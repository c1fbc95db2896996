"""Adagrad and its kin beyond what torch has: other forms, kinds of decay, first steps, errors."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import guided_descent as gd
from guided_descent.parts.adaptive import rectification
from oracles.adaptive import radam, rmsprop_tensorflow
from oracles.training import far, stream, train

PATHS: list[dict[str, bool]] = [{}, {"foreach": False}]


@pytest.mark.parametrize("path", PATHS, ids=["lists", "plain"])
@pytest.mark.parametrize("momentum", [0.0, 0.9])
@pytest.mark.parametrize("centered", [False, True])
def test_rmsprop_has_the_form_of_tensorflow(path: dict[str, bool], momentum: float, centered: bool) -> None:
    start, grad = torch.randn(4, 5, dtype=torch.float64), stream((4, 5), 1)
    options: dict[str, Any] = {"alpha": 0.9, "eps": 1e-3, "momentum": momentum, "centered": centered}
    p = torch.nn.Parameter(start.clone())
    opt = gd.RMSprop([p], lr=0.05, form="tensorflow", **options, **path)

    def rate(t: int) -> float:
        return 0.05 / t

    def change(t: int) -> None:
        opt.param_groups[0]["lr"] = rate(t)

    got = train(opt, [p], [grad], 40, change)[0]
    assert far(got, rmsprop_tensorflow(start, grad, 40, rate, **options)) < 1e-13


def test_the_first_step_is_the_sign_times_a_length() -> None:
    g = torch.randn(9, dtype=torch.float64)
    lengths: dict[str, Any] = {
        "adagrad": 1.0,
        "adamax": 1.0,
        "rmsprop": 10.0,  # 1 / sqrt(1 - alpha): no correction of the bias
    }
    for name, length in lengths.items():
        p = torch.nn.Parameter(torch.zeros_like(g))
        opt = gd.optimizer(name, [p], lr=0.1, eps=0.0)
        p.grad = g.clone()
        opt.step()
        torch.testing.assert_close(p.detach(), -0.1 * length * g.sign(), atol=0, rtol=1e-9)


def test_steps_of_adagrad_under_a_constant_gradient_fall_like_one_over_the_root() -> None:
    p = torch.nn.Parameter(torch.zeros(3, dtype=torch.float64))
    opt = gd.Adagrad([p], lr=0.1, eps=0.0)
    path = train(opt, [p], [lambda t, p: torch.full((3,), 7.0, dtype=torch.float64)], 36)[0]
    want = torch.tensor([-0.1 * sum(k**-0.5 for k in range(1, t + 1)) for t in range(1, 37)], dtype=torch.float64)
    torch.testing.assert_close(torch.stack(path)[:, 0], want)


@pytest.mark.parametrize("name", ["adagrad", "rmsprop", "adadelta", "adamax", "radam"])
def test_decoupled_decay_is_beside_the_direction(name: str) -> None:
    # With zero gradients the direction is 0, so that only the decay moves: (1 - lr wd)^t, or (1 - wd)^t at the peak.
    for decay, factor in (("decoupled", 1 - 0.1 * 0.2), ("independent", 1 - 0.2)):
        p = torch.nn.Parameter(torch.ones(3, dtype=torch.float64))
        opt = gd.optimizer(name, [p], lr=0.1, weight_decay=0.2, decay=decay)
        path = train(opt, [p], [lambda t, p: torch.zeros(3, dtype=torch.float64)], 5)[0]
        torch.testing.assert_close(path[-1], torch.full((3,), factor**5, dtype=torch.float64))


def test_the_first_step_of_adadelta_is_set_by_eps() -> None:
    g = torch.tensor([1e-2, -1.0, 30.0], dtype=torch.float64)
    p = torch.nn.Parameter(torch.zeros_like(g))
    opt = gd.Adadelta([p], eps=1e-6)
    p.grad = g.clone()
    opt.step()
    torch.testing.assert_close(p.detach(), -((1e-6 / (0.1 * g**2 + 1e-6)) ** 0.5) * g)


def test_the_maximum_of_adamax_fades_after_a_spike() -> None:
    p = torch.nn.Parameter(torch.zeros(2, dtype=torch.float64))
    opt = gd.Adamax([p], betas=(0.9, 0.5), eps=0.0)
    train(opt, [p], [lambda t, p: torch.full((2,), 64.0 if t == 1 else 1.0, dtype=torch.float64)], 5)
    assert opt.state[p]["exp_inf"].tolist() == [4.0, 4.0]
    train(opt, [p], [lambda t, p: torch.ones(2, dtype=torch.float64)], 5)
    assert opt.state[p]["exp_inf"].tolist() == [1.0, 1.0]


@pytest.mark.parametrize(
    ("t", "rho", "r"),
    [
        (5, 4.995998, 0.0173115),
        (6, 5.994164, 0.0258211),
        (10, 9.983492, 0.0489980),
        (100, 98.332944, 0.2153354),
        (1000, 835.967376, 0.6453257),
    ],
)
def test_published_rectifications_of_radam(t: int, rho: float, r: float) -> None:
    found, square = rectification(t, 0.999)
    assert found == pytest.approx(rho, abs=1e-6)
    assert square**0.5 == pytest.approx(r, abs=5e-8)


@pytest.mark.parametrize("path", [*PATHS, {"compile": True}], ids=["lists", "plain", "compiled"])
@pytest.mark.parametrize("warmup", ["momentum", "skip"])
@pytest.mark.parametrize("decay", ["decoupled", "independent"])
def test_radam_takes_the_references_steps(path: dict[str, bool], warmup: str, decay: str) -> None:
    start, grad = torch.randn(4, 5, dtype=torch.float64), stream((4, 5), 3)
    options: dict[str, Any] = {"betas": (0.8, 0.95), "eps": 1e-3, "weight_decay": 0.3}
    p = torch.nn.Parameter(start.clone())
    opt = gd.RAdam([p], lr=0.05, warmup=warmup, decay=decay, **options, **path)
    if path.get("compile"):
        opt._engine.compiled.backend = "eager"
    want = radam(
        start, grad, 40, 0.05, skip=warmup == "skip", independent=0.05 if decay == "independent" else None, **options
    )
    assert far(train(opt, [p], [grad], 40)[0], want) < 1e-13


def test_torchs_decoupled_radam() -> None:
    start, grad = torch.randn(4, 5, dtype=torch.float64), stream((4, 5), 4)
    options: dict[str, Any] = {"lr": 0.05, "betas": (0.8, 0.95), "weight_decay": 0.3}
    p, q = torch.nn.Parameter(start.clone()), torch.nn.Parameter(start.clone())
    ours = train(gd.RAdam([p], decay="decoupled", **options), [p], [grad], 40)[0]
    theirs = train(torch.optim.RAdam([q], decoupled_weight_decay=True, **options), [q], [grad], 40)[0]
    assert far(ours, theirs) < 1e-13


@pytest.mark.parametrize("beta2", [0.95, 0.99, 0.999])
def test_radam_divides_from_step_six_on(beta2: float) -> None:
    g = torch.tensor([1e-3, 1e3], dtype=torch.float64)
    p = torch.nn.Parameter(torch.zeros_like(g))
    path = train(gd.RAdam([p], lr=1.0, betas=(0.9, beta2), eps=0.0, warmup="skip"), [p], [lambda t, p: g], 7)[0]
    assert all(not step.any() for step in path[:5])
    sizes = path[5]
    torch.testing.assert_close(sizes[0], sizes[1])  # the length of the gradient is gone
    assert float(sizes[0]) == pytest.approx(-(rectification(6, beta2)[1] ** 0.5))


@pytest.mark.parametrize("value", [-1.0, float("inf"), float("nan")])
def test_a_sum_of_squares_begins_at_a_finite_number_not_below_zero(value: float) -> None:
    with pytest.raises(ValueError, match="initial_accumulator_value"):
        gd.Adagrad([torch.nn.Parameter(torch.zeros(3))], initial_accumulator_value=value)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("adagrad", {"initial_accumulator_value": 0.5}),
        ("rmsprop", {"form": "tensorflow"}),
        ("yogi", {"initial_accumulator": 0.5}),
    ],
)
def test_state_that_does_not_begin_at_zero_does_so_in_both_parts_of_a_complex_number(
    name: str, options: dict[str, Any]
) -> None:
    start = torch.randn(3, 4, dtype=torch.complex128)
    pairs, p = torch.nn.Parameter(torch.view_as_real(start).clone()), torch.nn.Parameter(start.clone())
    grad = stream((3, 4, 2), 1, pull=0.0)
    train(gd.optimizer(name, [pairs], lr=0.1, **options), [pairs], [grad], 8)
    train(gd.optimizer(name, [p], lr=0.1, **options), [p], [lambda t, q: torch.view_as_complex(grad(t, pairs))], 8)
    torch.testing.assert_close(torch.view_as_real(p.detach()), pairs.detach())
