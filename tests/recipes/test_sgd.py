"""SGD and its momentum: identities, and the edges of stability that are known on a quadratic."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch

import guided_descent as gd
from guided_descent.parts import Descend, Ema, Parts
from guided_descent.recipes.base import Recipe, hyper
from guided_descent.routing import Block
from oracles.elementwise import sgd
from oracles.training import far, stream, train


@dataclass(frozen=True, kw_only=True)
class AverageDescent(Recipe):
    """Descent along the average gradient: the EMA form of the heavy ball."""

    lr: float = hyper(1.0, ge=0)
    momentum: float = hyper(0.9, ge=0, lt=1)

    def parts(self, block: Block) -> Parts:
        return Parts(Ema(), Descend())


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
        (lambda p, lr: gd.build([p], AverageDescent(lr=lr)), 38.0),
    ],
    ids=["descent", "heavy-ball", "heavy-ball-0.5", "nesterov", "average"],
)
def test_the_edge_of_stability(make: Any, edge: float) -> None:
    assert not grows(make, edge * 0.99)
    assert grows(make, edge * 1.01)


def test_the_average_is_torchs_buffer_times_what_is_forgotten() -> None:
    start, grad = torch.randn(6, dtype=torch.float64), stream((6,), 2, pull=0.0)
    p = torch.nn.Parameter(start.clone())
    path = train(gd.build([p], AverageDescent(lr=0.1, momentum=0.8)), [p], [grad], 20)[0]
    assert far(path, sgd(start, grad, 20, 0.1 * 0.2, momentum=0.8)) < 1e-13
