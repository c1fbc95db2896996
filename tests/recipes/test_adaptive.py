"""Adagrad and its kin beyond what torch has: other forms, kinds of decay, first steps, errors."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import guided_descent as gd
from oracles.adaptive import rmsprop_tensorflow
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


@pytest.mark.parametrize("name", ["adagrad", "rmsprop", "adadelta", "adamax"])
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


@pytest.mark.parametrize("value", [-1.0, float("inf"), float("nan")])
def test_a_sum_of_squares_begins_at_a_finite_number_not_below_zero(value: float) -> None:
    with pytest.raises(ValueError, match="initial_accumulator_value"):
        gd.Adagrad([torch.nn.Parameter(torch.zeros(3))], initial_accumulator_value=value)
