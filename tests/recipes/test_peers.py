"""Steps beside those of optax and pytorch_optimizer, in float64, where they follow the same rule.

``pip install 'guided-descent[peers]'`` brings them; without them these tests are skipped. Left out are rules that they
have otherwise: optax's Adan takes the first gradient for a difference, and pytorch_optimizer's Adafactor, Grams,
AdEMAMix, LARS, LAMB, Prodigy, D-Adaptation, APOLLO, Fira, AdaHessian and ASAM depart from their papers.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import guided_descent as gd
from oracles.training import stream, train

SHAPES = [(4, 5), (6,), (3, 2, 2)]
LR = 0.05


def starts() -> list[Tensor]:
    made = torch.Generator().manual_seed(3)
    return [torch.randn(shape, generator=made, dtype=torch.float64) for shape in SHAPES]


def streams() -> list[Callable[..., Tensor]]:
    return [stream(shape, i) for i, shape in enumerate(SHAPES)]


def ours(name: str, **options: Any) -> list[list[Tensor]]:
    params = [nn.Parameter(p.clone()) for p in starts()]
    return train(gd.optimizer(name, params, lr=LR, **options), params, streams(), 40)


def check(found: list[list[Tensor]], wanted: list[list[Tensor]], tolerance: float) -> None:
    for a, b in zip(found, wanted, strict=True):
        for p, q in zip(a, b, strict=True):
            torch.testing.assert_close(p, q, rtol=tolerance, atol=tolerance)


OPTAX: dict[str, tuple[str, dict[str, Any], Callable[[Any], Any]]] = {
    "sgd, momentum": ("sgd", {"momentum": 0.9}, lambda o: o.sgd(LR, momentum=0.9)),
    "sgd, nesterov": (
        "sgd",
        {"momentum": 0.9, "nesterov": True},
        lambda o: o.sgd(LR, momentum=0.9, nesterov=True),
    ),
    "adam": ("adam", {}, lambda o: o.adam(LR)),
    "adamw": ("adamw", {"weight_decay": 0.0}, lambda o: o.adamw(LR, weight_decay=0.0)),
    "adamax": ("adamax", {"eps": 1e-30}, lambda o: o.adamax(LR, eps=1e-30)),
    "lion": ("lion", {"weight_decay": 0.0}, lambda o: o.lion(LR, weight_decay=0.0)),
    "lamb": (
        "lamb",
        {"weight_decay": 0.1, "adapt": "all"},
        lambda o: o.lamb(LR, weight_decay=0.1),
    ),
    "signsgd": ("signsgd", {}, lambda o: o.sign_sgd(LR)),
    "rmsprop": (
        "rmsprop",
        {"alpha": 0.9, "eps": 1e-8},
        lambda o: o.rmsprop(LR, decay=0.9, eps=1e-8, eps_in_sqrt=False),
    ),
    "adadelta": ("adadelta", {"rho": 0.9, "eps": 1e-6}, lambda o: o.adadelta(LR, rho=0.9, eps=1e-6)),
}


@pytest.mark.parametrize("case", OPTAX)
def test_the_steps_of_optax(case: str) -> None:
    optax = pytest.importorskip("optax")
    jax = pytest.importorskip("jax")
    jax.config.update("jax_enable_x64", True)
    name, options, make = OPTAX[case]
    tx = make(optax)
    p = [jax.numpy.array(q.numpy()) for q in starts()]
    state, wanted, given = tx.init(p), [[] for _ in p], streams()
    for t in range(1, 41):
        now = [torch.from_numpy(jax.device_get(q).copy()) for q in p]
        g = [jax.numpy.array(make(t, q).numpy()) for make, q in zip(given, now)]
        updates, state = tx.update(g, state, p)
        p = optax.apply_updates(p, updates)
        for path, q in zip(wanted, p):
            path.append(torch.from_numpy(jax.device_get(q).copy()))
    check(ours(name, **options), wanted, 1e-9)


OTHERS: dict[str, tuple[str, dict[str, Any], str, dict[str, Any]]] = {
    "lion": ("lion", {"weight_decay": 0.1}, "Lion", {"weight_decay": 0.1}),
    "adan": ("adan", {"decay": "decoupled"}, "Adan", {"weight_decay": 0.0}),
    "adabelief": ("adabelief", {}, "AdaBelief", {"rectify": False}),
    "yogi": ("yogi", {"eps": 1e-3, "initial_accumulator": 0.0}, "Yogi", {"initial_accumulator": 0.0}),
    # it counts the first call, which makes no step
    "adopt": ("adopt", {}, "ADOPT", {"clip_lambda": lambda step: (step - 1) ** 0.25}),
    "signsgd": ("signsgd", {}, "SignSGD", {"momentum": 0.0}),
}


@pytest.mark.parametrize("case", OTHERS)
def test_the_steps_of_pytorch_optimizer(case: str) -> None:
    other = pytest.importorskip("pytorch_optimizer")
    name, options, cls, theirs = OTHERS[case]
    params = [nn.Parameter(p.clone()) for p in starts()]
    wanted = train(getattr(other, cls)(params, lr=LR, **theirs), params, streams(), 40)
    check(ours(name, **options), wanted, 1e-9)
