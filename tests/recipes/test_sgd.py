"""SGD and its momentum: identities, and the edges of stability that are known on a quadratic."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import guided_descent as gd
from oracles.elementwise import sgd
from oracles.momentum import average_sgd
from oracles.training import far, stream, train


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"momentum": 0.9, "dampening": 0.3, "weight_decay": 0.1},
        {"momentum": 0.8, "nesterov": True, "weight_decay": 0.1},
    ],
)
@pytest.mark.parametrize("path", [{}, {"fused": False}, {"foreach": False}], ids=["kernel", "lists", "plain"])
def test_it_takes_the_references_steps(options: dict[str, Any], path: dict[str, bool]) -> None:
    start, grad = torch.randn(4, 5, dtype=torch.float64), stream((4, 5), 1)
    p = torch.nn.Parameter(start.clone())
    assert (
        far(train(gd.SGD([p], lr=0.1, **options, **path), [p], [grad], 30)[0], sgd(start, grad, 30, 0.1, **options))
        < 1e-13
    )


def test_the_first_buffer_is_not_damped() -> None:
    g = torch.randn(5)
    p = torch.nn.Parameter(torch.zeros(5))
    opt = gd.SGD([p], lr=0.5, momentum=0.9, dampening=0.9)
    p.grad = g.clone()
    opt.step()
    assert torch.equal(p.detach(), -0.5 * g)
    assert torch.equal(opt.state[p]["momentum_buffer"], g)


def grows(make: Any, lr: float) -> bool:
    """Whether the iterates of f = x^2 / 2 leave the starting point behind."""
    p = torch.nn.Parameter(torch.tensor(1.0, dtype=torch.float64))
    opt = make(p, lr)
    sizes = []
    for _ in range(400):
        p.grad = p.detach().clone()
        opt.step()
        sizes.append(abs(p.item()))
    return max(sizes[-20:]) > max(sizes[:20])


@pytest.mark.parametrize(
    ("make", "edge"),
    [
        (lambda p, lr: gd.SGD([p], lr=lr), 2.0),
        (lambda p, lr: gd.SGD([p], lr=lr, momentum=0.9), 3.8),
        (lambda p, lr: gd.SGD([p], lr=lr, momentum=0.5), 3.0),
        (lambda p, lr: gd.SGD([p], lr=lr, momentum=0.9, nesterov=True), 3.8 / 2.8),
        (lambda p, lr: gd.SGD([p], lr=lr, momentum=0.9, form="average"), 38.0),
    ],
    ids=["descent", "heavy-ball", "heavy-ball-0.5", "nesterov", "average"],
)
def test_the_edge_of_stability(make: Any, edge: float) -> None:
    assert not grows(make, edge * 0.99)
    assert grows(make, edge * 1.01)


# -- forms of momentum -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("nesterov", [False, True])
@pytest.mark.parametrize("form", ["average", "corrected"])
@pytest.mark.parametrize("shape", [(4, 5), (7,), (3, 2, 3, 3), ()])
def test_averages_take_the_references_steps(nesterov: bool, form: str, shape: tuple[int, ...]) -> None:
    start, grad = torch.randn(shape, dtype=torch.float64), stream(shape, 3)
    p = torch.nn.Parameter(start.clone())
    numbers: dict[str, Any] = {"momentum": 0.8, "weight_decay": 0.1, "nesterov": nesterov}
    expected = average_sgd(start, grad, 40, 0.1, corrected=form == "corrected", **numbers)
    assert far(train(gd.SGD([p], lr=0.1, form=form, **numbers), [p], [grad], 40)[0], expected) < 1e-12


@pytest.mark.parametrize("nesterov", [False, True])
@pytest.mark.parametrize("weight_decay", [0.0, 0.2])
def test_the_average_at_lr_over_1_minus_mu_is_the_heavy_ball(nesterov: bool, weight_decay: float) -> None:
    """m_t = (1 - mu) b_t exactly, from the first step on and whatever the schedule, where dampening is 0."""
    mu, shape = 0.8, (4, 5)
    start, grad = torch.randn(shape, dtype=torch.float64), stream(shape, 2)
    paths, buffers = [], []
    for form, scale in (("sum", 1.0), ("average", 1 / (1 - mu))):
        p = torch.nn.Parameter(start.clone())
        opt = gd.SGD([p], lr=0.1, momentum=mu, nesterov=nesterov, weight_decay=weight_decay, form=form)

        def schedule(t: int, opt: gd.Optimizer = opt, scale: float = scale) -> None:
            opt.param_groups[0]["lr"] = scale * 0.1 / (1 + 0.1 * t)

        paths.append(train(opt, [p], [grad], 40, before=schedule)[0])
        buffers.append(opt.state[p]["momentum_buffer" if form == "sum" else "exp_avg"])
    assert far(paths[1], paths[0]) < 1e-12
    torch.testing.assert_close(buffers[1], (1 - mu) * buffers[0], rtol=1e-12, atol=1e-14)


def test_torchs_dampening_differs_from_the_average_by_the_first_gradient() -> None:
    """With tau = mu torch's b_t exceeds m_t by mu^t g_1, since its first buffer is not damped."""
    mu, shape = 0.7, (6,)
    grad = stream(shape, 4, pull=0.0)
    first = grad(1, torch.zeros(shape, dtype=torch.float64))
    p, q = (torch.nn.Parameter(torch.zeros(shape, dtype=torch.float64)) for _ in range(2))
    damped = gd.SGD([p], lr=0.1, momentum=mu, dampening=mu)
    average = gd.SGD([q], lr=0.1, momentum=mu, form="average")
    for t in range(1, 20):
        train(damped, [p], [grad], 1, start=t)
        train(average, [q], [grad], 1, start=t)
        excess = damped.state[p]["momentum_buffer"] - average.state[q]["exp_avg"]
        torch.testing.assert_close(excess, mu**t * first)


def test_a_steady_gradient_takes_steady_corrected_steps() -> None:
    g = torch.randn(5, dtype=torch.float64)
    for nesterov in (False, True):
        p = torch.nn.Parameter(torch.zeros(5, dtype=torch.float64))
        opt = gd.SGD([p], lr=0.5, momentum=0.9, nesterov=nesterov, form="corrected")
        [path] = train(opt, [p], [lambda t, q: g], 6)
        for t, found in enumerate(path, 1):
            torch.testing.assert_close(found, -0.5 * t * g)


def test_forms_do_not_take_each_others_state() -> None:
    p = torch.nn.Parameter(torch.ones(3))
    opt = gd.SGD([p], momentum=0.9)
    train(opt, [p], [stream((3,))], 2)
    other = gd.SGD([torch.nn.Parameter(torch.ones(3))], momentum=0.9, form="average")
    with pytest.raises(ValueError, match="form of param group 0 was 'sum' when the state was saved"):
        other.load_state_dict(opt.state_dict())
    old = opt.state_dict()
    del old["param_groups"][0]["form"]  # saved before there was a choice
    with pytest.raises(ValueError, match="form of param group 0 was 'sum' when the state was saved"):
        other.load_state_dict(old)
    torchs = torch.optim.SGD([p], momentum=0.9)
    train(torchs, [p], [stream((3,))], 2)
    with pytest.raises(ValueError, match="exp_avg"):
        other.load_state_dict(torchs.state_dict())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"form": "average"}, "form='average' of sgd needs momentum > 0"),
        (
            {"form": "corrected", "momentum": 0.9, "dampening": 0.5},
            "form='corrected' of sgd needs momentum > 0 and dam",
        ),
        ({"nesterov": True}, "nesterov=True of sgd needs momentum > 0"),
        ({"form": "ema", "momentum": 0.9}, "form='ema' of sgd must be one of 'sum', 'average', 'corrected'"),
    ],
)
def test_options_that_would_do_nothing_are_errors(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        gd.SGD([torch.nn.Parameter(torch.ones(3))], **options)
