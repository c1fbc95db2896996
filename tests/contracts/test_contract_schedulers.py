"""Learning rates: torch's schedulers with numbers and tensors, ratios between groups, independent decay."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from drive import Net, Plain, assert_close, exact, feed, finds_rate, has, make, parameters, push, sequence, steady
from torch import nn
from torch.optim import lr_scheduler as lrs

import guided_descent as gd

STEPS = 24
SCHEDULERS: dict[str, Callable[[Any], Any]] = {
    "lambda": lambda opt: lrs.LambdaLR(opt, lambda step: 1 / (1 + step)),
    "cosine": lambda opt: lrs.CosineAnnealingLR(opt, STEPS),
    "sequential": lambda opt: lrs.SequentialLR(
        opt, [lrs.LinearLR(opt, 0.1, total_iters=10), lrs.CosineAnnealingLR(opt, STEPS - 10)], [10]
    ),
    "onecycle": lambda opt: lrs.OneCycleLR(opt, 0.01, total_steps=STEPS + 1, cycle_momentum=False),
    "plateau": lambda opt: lrs.ReduceLROnPlateau(opt, factor=0.5, patience=3),
}


def advance(scheduler: Any) -> None:
    scheduler.step(1.0) if isinstance(scheduler, lrs.ReduceLROnPlateau) else scheduler.step()


@pytest.mark.thin(name=["cosine"])
@pytest.mark.parametrize("tensor", [False, True], ids=["float", "tensor"])
@pytest.mark.parametrize("name", SCHEDULERS)
def test_torch_schedulers(key: str, name: str, tensor: bool) -> None:
    net = Plain()
    opt = make(key, net, lr=torch.tensor(0.01) if tensor else 0.01)
    first = [float(group["lr"]) for group in opt.param_groups]
    reference = torch.optim.SGD([{"params": [nn.Parameter(torch.zeros(1))], "lr": rate} for rate in first])
    ours, theirs = SCHEDULERS[name](opt), SCHEDULERS[name](reference)
    held = [group["lr"] for group in opt.param_groups]
    for _ in range(STEPS):
        push(opt)
        reference.step()
        advance(ours)
        advance(theirs)
        for group, other, before in zip(opt.param_groups, reference.param_groups, held):
            assert float(group["lr"]) == pytest.approx(float(other["lr"]), abs=1e-7)
            assert isinstance(group["lr"], float) or group["lr"] is before
    assert any(isinstance(group["lr"], torch.Tensor) for group in opt.param_groups) == tensor
    assert len({id(group["lr"]) for group in opt.param_groups if isinstance(group["lr"], torch.Tensor)}) == sum(
        isinstance(group["lr"], torch.Tensor) for group in opt.param_groups
    )


def test_a_cycle_of_the_momentum(key: str) -> None:
    more = {"momentum": 0.9} if has(key, "momentum") else {}
    if not more and not has(key, "betas"):
        assert not {"momentum", "betas"} & set(gd.recipes.REGISTRY[key].cls.numbers())  # nothing to cycle
        return
    opt = make(key, Plain(), **more)
    scheduler = lrs.OneCycleLR(opt, 0.01, total_steps=20, base_momentum=0.8, max_momentum=0.9)
    seen = []
    for _ in range(15):
        push(opt)
        scheduler.step()
        group = opt.param_groups[0]
        seen.append(group["betas"][0] if "betas" in group else group["momentum"])
    assert min(seen) < 0.81
    assert all(bool(torch.isfinite(p).all()) for g in opt.param_groups for p in g["params"])


def test_a_tensor_rate_steps_like_a_number(key: str) -> None:
    a, b = Net(torch.float64), Net(torch.float64)
    one, two = (
        make(key, a, lr=0.01, **exact(key)),
        make(key, b, lr=torch.tensor(0.01, dtype=torch.float64), **exact(key)),
    )
    push(one, 5)
    push(two, 5)
    assert_close(parameters(a), parameters(b), 1e-12)


def test_the_ratio_of_two_rates_outlives_schedule_and_resume(key: str) -> None:
    def build() -> tuple[Any, Any]:
        net = Net()
        opt = make(key, net, lr=0.02, rules=[gd.rule("*.bias", lr=3e-4)])
        warm = lrs.LinearLR(opt, 0.05, total_iters=10)
        scheduler = lrs.SequentialLR(opt, [warm, lrs.CosineAnnealingLR(opt, 101, eta_min=0.0)], [10])
        return opt, scheduler

    opt, scheduler = build()
    ratio = 3e-4 / 0.02
    saved: Any = None
    rates: list[float] = []

    def check() -> None:
        main = next(g for g in opt.param_groups if "up.weight" in g["param_names"])
        bias = next(g for g in opt.param_groups if "up.bias" in g["param_names"])
        assert float(bias["lr"]) / float(main["lr"]) == pytest.approx(ratio, rel=1e-7)
        rates.append(float(main["lr"]))

    for number in range(100):
        if number == 50:
            saved = opt.state_dict(), scheduler.state_dict()
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", UserWarning)  # torch's, about the order of calls in a new scheduler
                opt, scheduler = build()
            opt.load_state_dict(saved[0])
            scheduler.load_state_dict(saved[1])
            assert opt.steps == 50
        push(opt, seed=number)
        check()
        scheduler.step()
    assert rates[0] == pytest.approx(0.05 * 0.02)
    assert max(rates) == pytest.approx(0.02)
    assert rates[-1] < 0.001


def test_independent_decay_follows_the_schedule_and_not_the_rate(key: str) -> None:
    if not has(key, "decay"):
        with pytest.raises(TypeError, match="decay"):
            make(key, Plain(), decay="independent")
        return
    if finds_rate(key):
        return  # a step without gradients changes nothing; its decay is tested with the recipe
    for rate in (0.02, 0.01):
        net = Plain(torch.float64)
        rules = [gd.rule("*", weight_decay=0.1)]
        opt = make(key, net, lr=rate, weight_decay=0.1, decay="independent", rules=rules, **steady(key))
        scheduler = lrs.LambdaLR(opt, lambda step: 1 / (1 + step))

        def zero(net: nn.Module = net) -> None:
            for p in net.parameters():
                p.grad = torch.zeros_like(p)

        feed(opt, zero)  # the silent first step of some recipes
        scheduler.step()
        for number in range(1, 4):
            before, decaying = sequence(opt), sequence(opt, decaying=True)
            feed(opt, zero, number)
            scheduler.step()
            own = [n for g in opt.param_groups if g["recipe"] == key for n in g["param_names"]]
            assert own
            for name in own:
                want = before[name] - decaying[name] * 0.1 / (1 + number)
                torch.testing.assert_close(sequence(opt)[name], want, rtol=1e-7, atol=1e-9)


def test_coupled_decay_shrinks_by_the_rate(key: str) -> None:
    if not has(key, "decay") or finds_rate(key):
        return  # its decay is part of the gradient, or by a rate that it finds: it is tested with the recipe
    net = Plain(torch.float64)
    rules = [gd.rule("*", lr=0.02, weight_decay=0.1)]
    opt = make(key, net, lr=0.02, weight_decay=0.1, decay="decoupled", rules=rules, **steady(key))

    def zero() -> None:
        for p in net.parameters():
            p.grad = torch.zeros_like(p)

    for number in range(3):
        before, decaying = sequence(opt), sequence(opt, decaying=True)
        feed(opt, zero, number)
        for name, p in sequence(opt).items():
            if number:
                torch.testing.assert_close(p, before[name] - decaying[name] * 0.02 * 0.1, rtol=1e-7, atol=1e-12)
