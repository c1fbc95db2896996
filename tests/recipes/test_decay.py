"""Weight decay: coupled to the learning rate or independent of it, and the multipliers of blocks on every path."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import guided_descent as gd
from oracles.elementwise import adamw, nadamw, sgd
from oracles.muon import muon
from oracles.soap import soap
from oracles.training import Bag, far, stream, train

DECOUPLED = ["adamw", "nadamw", "muon", "soap"]
MATRIX = [gd.rule("*", role="matrix")]


def shrinkage(name: str, lr: float, factor: float, **options: Any) -> Tensor:
    """What two steps without a gradient leave of a weight of 1, the second with the learning rate times a factor."""
    p = Bag({"w": torch.ones(3, 4, dtype=torch.float64)})
    opt = gd.optimizer(name, p, lr=lr, rules=MATRIX, **options)
    [w] = p.parameters()
    for step in range(2 if name != "soap" else 3):  # SOAP's first call is silent
        w.grad = torch.zeros_like(w)
        for group in opt.param_groups:
            group["lr"] = lr if step < 1 + (name == "soap") else factor * lr
        opt.step()
    return w.detach()


@pytest.mark.parametrize("name", DECOUPLED)
def test_independent_decay_follows_the_schedule_and_not_the_learning_rate(name: str) -> None:
    options: dict[str, Any] = {"decay": "independent", "weight_decay": 0.01}
    whole = shrinkage(name, 1e-3, 0.5, **options)
    half = shrinkage(name, 0.5e-3, 0.5, **options)
    torch.testing.assert_close(half, whole, atol=1e-7, rtol=0)
    torch.testing.assert_close(whole, torch.full_like(whole, 0.99 * 0.995), atol=1e-12, rtol=0)


@pytest.mark.parametrize("name", DECOUPLED)
def test_coupled_decay_follows_the_learning_rate(name: str) -> None:
    left = shrinkage(name, 0.1, 0.5, weight_decay=0.2)
    torch.testing.assert_close(left, torch.full_like(left, 0.98 * 0.99), atol=1e-12, rtol=0)


def test_independent_decay_under_a_torch_schedule_counts_from_its_peak() -> None:
    start, grad = torch.randn(5, dtype=torch.float64), stream((5,), 1)
    p = torch.nn.Parameter(start.clone())
    opt = gd.AdamW([p], lr=0.1, weight_decay=0.05, decay="independent")
    schedule = torch.optim.lr_scheduler.LambdaLR(opt, lambda step: min(1.0, (step + 1) / 4))
    path = []
    for t in range(1, 13):
        path += train(opt, [p], [grad], 1, start=t)[0]
        schedule.step()
    reference = adamw(start, grad, 12, lambda t: 0.1 * min(1.0, t / 4), weight_decay=0.05, independent=0.1)
    assert far(path, reference) < 1e-12


@pytest.mark.parametrize("name", DECOUPLED)
@pytest.mark.parametrize("decay", ["decoupled", "independent"])
@pytest.mark.parametrize("built_with", [0.0, 0.1])
def test_nothing_moves_at_a_learning_rate_of_zero(name: str, decay: str, built_with: float) -> None:
    start = torch.randn(4, 4)
    model = Bag({"w": start, "v": start[0]})
    opt = gd.optimizer(name, model, lr=built_with, weight_decay=0.7, decay=decay, rules=[gd.rule("w", role="matrix")])
    for group in opt.param_groups:
        group["lr"] = 0.0
    train(opt, list(model.parameters()), [stream((4, 4)), stream((4,))], 4)
    assert torch.equal(model.w.detach(), start)
    assert torch.equal(model.v.detach(), start[0])


def test_independent_decay_needs_a_peak() -> None:
    p = torch.nn.Parameter(torch.ones(3))
    opt = gd.AdamW([p], lr=0.0, decay="independent")
    opt.param_groups[0]["lr"] = 0.1
    p.grad = torch.ones(3)
    with pytest.raises(ValueError, match="build with the peak learning rate"):
        opt.step()


@settings(max_examples=20, deadline=None)
@given(
    lr=st.floats(1e-4, 1.0),
    weight_decay=st.floats(0.0, 1.0),
    steps=st.integers(1, 6),
    name=st.sampled_from(["adamw", "nadamw", "muon"]),
)
def test_decay_alone_is_geometric(lr: float, weight_decay: float, steps: int, name: str) -> None:
    model = Bag({"w": torch.ones(2, 3, dtype=torch.float64)})
    opt = gd.optimizer(name, model, lr=lr, weight_decay=weight_decay, rules=MATRIX)
    train(opt, list(model.parameters()), [lambda t, p: torch.zeros_like(p)], steps)
    torch.testing.assert_close(model.w.detach(), torch.full_like(model.w, (1 - lr * weight_decay) ** steps))


# -- multipliers of blocks ---------------------------------------------------------------------------------------------

SCALES: dict[str, float] = {"lr_scale": 0.5, "wd_scale": 3.0, "eps_scale": 10.0}
PATHS: dict[str, dict[str, Any]] = {"default": {}, "lists": {"fused": False}, "plain": {"foreach": False}}


def scaled(name: str, start: Tensor, scales: dict[str, float], path: str, **options: Any) -> Any:
    """An optimizer whose only block has multipliers."""
    model = Bag({"w": start})
    opt = gd.optimizer(name, model, rules=MATRIX, **options, **PATHS.get(path, {}))
    blocks = opt._engine.binder.blocks
    blocks["w"] = tuple(replace(block, **scales) for block in blocks["w"])
    opt._engine.forget()
    opt._engine.bind()
    if path == "compiled":
        opt.compile(backend="eager")
    return model, opt


@pytest.mark.parametrize("path", ["default", "lists", "plain", "compiled"])
@pytest.mark.parametrize("scales", [SCALES, {"wd_scale": 0.0}, {"wd_scale": 3.0, "eps_scale": 10.0}], ids=str)
def test_adamw_honours_them(path: str, scales: dict[str, float]) -> None:
    start, grad = torch.randn(3, 4, dtype=torch.float64), stream((3, 4), 1)
    model, opt = scaled("adamw", start, scales, path, lr=0.1, eps=1e-2, weight_decay=0.1)
    got = train(opt, list(model.parameters()), [grad], 12)[0]
    reference = adamw(
        start,
        grad,
        12,
        0.1,
        lr_scale=scales.get("lr_scale", 1.0),
        eps=1e-2 * scales.get("eps_scale", 1.0),
        weight_decay=0.1 * scales.get("wd_scale", 1.0),
    )
    assert far(got, reference) < 1e-12


@pytest.mark.parametrize("path", ["default", "lists", "plain", "compiled"])
def test_nadamw_honours_them(path: str) -> None:
    start, grad = torch.randn(3, 4, dtype=torch.float64), stream((3, 4), 2)
    model, opt = scaled("nadamw", start, {"wd_scale": 3.0, "eps_scale": 10.0}, path, lr=0.1, eps=1e-2, weight_decay=0.1)
    got = train(opt, list(model.parameters()), [grad], 12)[0]
    assert far(got, nadamw(start, grad, 12, 0.1, eps=0.1, weight_decay=0.3)) < 1e-12
    # Without decay a scaled step is a scaled learning rate.
    model, opt = scaled("nadamw", start, {"lr_scale": 0.5}, path, lr=0.1, weight_decay=0.0)
    got = train(opt, list(model.parameters()), [grad], 12)[0]
    assert far(got, nadamw(start, grad, 12, 0.05)) < 1e-12


@pytest.mark.parametrize("path", ["default", "lists", "plain", "compiled"])
def test_sgd_honours_them(path: str) -> None:
    start, grad = torch.randn(3, 4, dtype=torch.float64), stream((3, 4), 3)
    model, opt = scaled("sgd", start, SCALES, path, lr=0.1, momentum=0.9, weight_decay=0.1)
    got = train(opt, list(model.parameters()), [grad], 12)[0]
    assert far(got, sgd(start, grad, 12, 0.05, momentum=0.9, weight_decay=0.3)) < 1e-12  # decay is in the gradient


@pytest.mark.parametrize("path", ["default", "plain", "compiled"])
def test_muon_honours_them(path: str) -> None:
    start, grad = torch.randn(3, 4, dtype=torch.float64), stream((3, 4), 4)
    numbers: dict[str, Any] = {"lr": 0.1, "weight_decay": 0.1, "coefficients": "polar_express"}
    model, opt = scaled("muon", start, {"wd_scale": 3.0}, path, **numbers)
    got = train(opt, list(model.parameters()), [grad], 12)[0]
    assert far(got, muon(start, grad, 12, 0.1, weight_decay=0.3, coefficients="polar_express")) < 1e-9
    model, opt = scaled("muon", start, {"lr_scale": 0.5}, path, **numbers)
    got = train(opt, list(model.parameters()), [grad], 12)[0]
    assert far(got, muon(start, grad, 12, 0.05, weight_decay=0.2, coefficients="polar_express")) < 1e-9


@pytest.mark.parametrize("path", ["default", "plain", "compiled"])
def test_soap_honours_them(path: str) -> None:
    start, grad = torch.randn(4, 4, dtype=torch.float64), stream((4, 4), 5)
    model, opt = scaled("soap", start, SCALES, path, lr=0.1, eps=1e-2, weight_decay=0.1, refresh_schedule="every")
    got = train(opt, list(model.parameters()), [grad], 25)[0]
    # Half the step at the same decay is half the rate at twice the decay.
    assert far(got, soap(start, grad, 25, 0.05, eps=0.1, weight_decay=0.6)) < 1e-9


@pytest.mark.parametrize("name", DECOUPLED)
def test_corrected_decay_follows_the_square_of_the_schedule(name: str) -> None:
    left = shrinkage(name, 0.1, 0.5, weight_decay=0.2, decay="corrected")
    torch.testing.assert_close(left, torch.full_like(left, 0.98 * 0.995), atol=1e-12, rtol=0)


@pytest.mark.parametrize("path", [{}, {"foreach": False}, {"compile": True}], ids=["lists", "plain", "compiled"])
def test_cautious_decay_leaves_weights_alone_that_grow(path: dict[str, bool]) -> None:
    start, grad = torch.randn(4, 5, dtype=torch.float64), stream((4, 5), 2)
    p, q = torch.nn.Parameter(start.clone()), torch.nn.Parameter(start.clone())
    plain = gd.AdamW([p], lr=0.03, weight_decay=0.0)
    opt = gd.AdamW([q], lr=0.03, weight_decay=0.4, decay="cautious", **path)
    if path.get("compile"):
        opt._engine.compiled.backend = "eager"
    spared = 0
    for t in range(1, 41):
        before = q.detach().clone()
        p.data.copy_(before)
        p.grad = q.grad = grad(t, before)
        plain.step()
        opt.step()
        step = before - p.detach()
        shrinks = step * before > 0
        spared += int((~shrinks).sum())
        want = p.detach() - 0.03 * 0.4 * before * shrinks
        torch.testing.assert_close(q.detach(), want, atol=1e-14, rtol=1e-12)
    assert 100 < spared < 700


def test_cautious_decay_of_a_weight_and_bias_that_are_one_block() -> None:
    x, y = torch.randn(16, 4).double(), torch.randint(3, (16,))
    nets = []
    for decay in (0.0, 0.5):
        torch.manual_seed(3)
        net = torch.nn.Sequential(torch.nn.Linear(4, 5), torch.nn.Linear(5, 3)).double()
        opt = gd.KFAC(net, loss="cross_entropy", fisher="exact", lr=0.1, weight_decay=decay, decay="cautious")
        before = [p.detach().clone() for p in net.parameters()]
        torch.nn.functional.cross_entropy(net(x), y).backward()
        opt.step()
        nets.append([p.detach() for p in net.parameters()])
    for old, plain, decayed in zip(before, *nets):
        shrinks = (old - plain) * old > 0 if old.ndim == 2 else torch.zeros_like(old, dtype=torch.bool)
        torch.testing.assert_close(decayed, plain - 0.1 * 0.5 * old * shrinks, atol=1e-12, rtol=1e-9)
