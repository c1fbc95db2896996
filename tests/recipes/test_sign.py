"""The sign methods: references, first steps, the length of a step, what decay confines."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
import torch

import guided_descent as gd
from oracles.sign import lion, signum
from oracles.training import far, stream, train

PATHS: list[dict[str, bool]] = [{}, {"foreach": False}, {"compile": True}]
IDS = ["lists", "plain", "compiled"]
SHAPES = [(4, 5), (7,), (), (2, 3, 4)]


def compare(name: str, reference: Any, path: dict[str, bool], options: dict[str, Any], decay: str) -> float:
    """How far a recipe is from its reference over 40 steps under a learning rate that changes."""
    starts = [torch.randn(shape, dtype=torch.float64) for shape in SHAPES]
    grads = [stream(shape, seed) for seed, shape in enumerate(SHAPES)]
    params = [torch.nn.Parameter(start.clone()) for start in starts]
    opt = gd.optimizer(name, params, lr=0.05, decay=decay, **options, **path)
    if path.get("compile"):
        opt._engine.compiled.backend = "eager"

    def rate(t: int) -> float:
        return 0.05 / t**0.5

    def change(t: int) -> None:
        opt.param_groups[0]["lr"] = rate(t)

    found = train(opt, params, grads, 40, change)
    peak = 0.05 if decay == "independent" else None
    return max(
        far(ours, reference(start, grad, 40, rate, independent=peak, **options))
        for ours, start, grad in zip(found, starts, grads)
    )


@pytest.mark.parametrize("path", PATHS, ids=IDS)
@pytest.mark.parametrize("decay", ["decoupled", "independent"])
@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("signsgd", {}),
        ("signsgd", {"weight_decay": 0.3}),
        ("signum", {"momentum": 0.9}),
        ("signum", {"momentum": 0.6, "weight_decay": 0.3}),
    ],
)
def test_signs_take_the_references_steps(name: str, options: dict[str, Any], decay: str, path: dict[str, bool]) -> None:
    assert compare(name, signum, path, options, decay) < 1e-13


@pytest.mark.parametrize("path", PATHS, ids=IDS)
@pytest.mark.parametrize("decay", ["decoupled", "independent"])
@pytest.mark.parametrize(
    "options",
    [
        {"weight_decay": 0.0},
        {"betas": (0.95, 0.98), "weight_decay": 0.3},
        {"betas": (0.6, 0.9), "weight_decay": 0.3},
        {"betas": (0.0, 0.9), "weight_decay": 0.0},
    ],
)
def test_lion_takes_the_references_steps(options: dict[str, Any], decay: str, path: dict[str, bool]) -> None:
    assert compare("lion", lion, path, options, decay) < 1e-13


def test_lion_steps_by_the_old_momentum() -> None:
    # At the second step m is 0.5. The gradient -0.4 gives (0.5 - 0.4) / 2 > 0 with it; with the new momentum, 0.05, the
    # mixture would be -0.175. The gradient -0.6 gives a negative one both ways.
    p = torch.nn.Parameter(torch.zeros(2, dtype=torch.float64))
    opt = gd.Lion([p], lr=1.0, betas=(0.5, 0.5), weight_decay=0.0)
    second = torch.tensor([-0.6, -0.4], dtype=torch.float64)
    path = train(opt, [p], [lambda t, p: torch.ones(2, dtype=torch.float64) if t == 1 else second], 2)[0]
    assert (path[1] - path[0]).tolist() == [1.0, -1.0]
    assert opt.state[p]["exp_avg"].tolist() == pytest.approx([-0.05, 0.05])


@pytest.mark.parametrize("name", ["signsgd", "signum", "lion"])
def test_the_first_step_is_the_sign_whatever_the_length(name: str) -> None:
    g = torch.tensor([1e-30, -1e-8, 0.0, -0.0, 3.0, -1e30], dtype=torch.float64)
    p = torch.nn.Parameter(torch.zeros_like(g))
    opt = gd.optimizer(name, [p], lr=0.1)
    p.grad = g.clone()
    opt.step()
    torch.testing.assert_close(p.detach(), -0.1 * torch.sign(g), rtol=1e-15, atol=0)


@pytest.mark.parametrize("name", ["signsgd", "signum", "lion"])
def test_the_learning_rate_is_the_root_mean_square_of_a_step(name: str) -> None:
    start, grad = torch.randn(6, 9, dtype=torch.float64), stream((6, 9), 5)
    p = torch.nn.Parameter(start.clone())
    path = [start, *train(gd.optimizer(name, [p], lr=0.01, weight_decay=0.0), [p], [grad], 40)[0]]
    for before, after in pairwise(path):
        assert float((after - before).square().mean().sqrt()) == pytest.approx(0.01, rel=1e-12)


@pytest.mark.parametrize("name", ["signsgd", "signum", "lion"])
def test_decay_confines_every_weight_to_one_over_its_strength(name: str) -> None:
    # p <- p (1 - lr wd) - lr u with |u| <= 1 cannot leave |p| <= 1 / wd, and a constant gradient drives it to the edge.
    p = torch.nn.Parameter(torch.tensor([0.0, 3.9], dtype=torch.float64))
    opt = gd.optimizer(name, [p], lr=0.1, weight_decay=0.25)
    path = train(opt, [p], [lambda t, p: torch.tensor([-1.0, 1.0], dtype=torch.float64)], 600)[0]
    assert all(float(step.abs().max()) <= 4 for step in path)
    torch.testing.assert_close(path[-1], torch.tensor([4.0, -4.0], dtype=torch.float64), rtol=1e-5, atol=0)
