"""The step: closures, hooks, gradients, missing and late gradients, accumulation, exchange of parameters, memory."""

from __future__ import annotations

import gc
import tracemalloc
from collections.abc import Iterator

import pytest
import torch
from drive import (
    Net,
    Plain,
    always,
    assert_close,
    assert_same,
    bits,
    drive,
    evaluations,
    exact,
    feed,
    fill,
    has_sums,
    loss_of,
    make,
    parameters,
    push,
    reads_layers,
    recipe_of,
    snapshot,
    steady,
    take,
    undrawn,
)
from torch import nn

import guided_descent as gd


def test_every_way_to_call_step(key: str) -> None:
    net = Net()
    opt = make(key, net)
    passes = evaluations(opt)
    calls: list[bool] = []
    fired: list[str] = []
    opt.register_step_pre_hook(lambda *_: fired.append("pre"))
    opt.register_step_post_hook(lambda *_: fired.append("post"))

    def closure() -> str:
        calls.append(torch.is_grad_enabled())
        opt.zero_grad()
        loss_of(net, len(calls)).backward()
        return "the loss"

    assert opt.step(closure) == "the loss"
    assert opt.step(closure=closure) == "the loss"
    assert calls == [True] * (2 * passes)
    assert fired == ["pre", "post"] * 2
    if passes == 1:
        assert opt.step() is None
        assert opt.step(None) is None
        assert fired == ["pre", "post"] * 4
        assert opt.steps == 4
    else:
        with pytest.raises(ValueError, match="closure"):
            opt.step()


def test_a_step_without_any_gradient_changes_nothing(key: str) -> None:
    net = Net()
    opt = make(key, net)
    before = snapshot(opt)
    opt.step(lambda: 3.0)
    assert_same(before, snapshot(opt))
    assert opt.steps == 0


def test_gradients_are_not_written(key: str) -> None:
    net = Net()
    for more in ({}, {"maximize": True}, {"foreach": False}):
        opt = make(key, net, **more)
        params = list(net.parameters())
        for number in range(4):
            feed(opt, lambda params=params, number=number: fill(params, number), number)
            written = [bits(p.grad).clone() for p in params]
            fill(params, number)
            assert all(torch.equal(w, bits(p.grad)) for w, p in zip(written, params))


def test_training_lowers_the_loss_of_a_fixed_batch(key: str) -> None:
    net = Net()
    opt = make(key, net)
    first = loss_of(net, 5).item()
    for _ in range(60):
        take(opt, lambda: (opt.zero_grad(), loss_of(net, 5).backward())[1], evaluations(opt))
    assert loss_of(net, 5).item() < first


def test_maximize_is_descent_on_the_negative(key: str) -> None:
    up, down = Net(torch.float64), Net(torch.float64)
    push(make(key, up, maximize=True, **exact(key)), 5, scale=1.0)
    push(make(key, down, sign=-1.0, **exact(key)), 5, scale=-1.0)
    assert_close(parameters(up), parameters(down), 1e-12)


@pytest.mark.parametrize("slow", [{"foreach": False}, {"fused": False}])
def test_the_plain_loop_equals_the_kernels(key: str, slow: dict[str, bool]) -> None:
    a, b = Net(torch.float64), Net(torch.float64)
    push(make(key, a, **exact(key)), 8)
    push(make(key, b, **exact(key), **slow), 8)
    assert_close(parameters(a), parameters(b), 1e-11)


def test_accumulated_micro_batches_equal_the_full_batch(key: str) -> None:
    # square, so that no factor of a first gradient is singular: bases of a null space depend on rounding alone
    def build() -> nn.Module:
        net = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4))
        return net.double()

    torch.manual_seed(3)
    whole, split = build(), build()
    split.load_state_dict(whole.state_dict())
    data = torch.randn(6, 32, 4, dtype=torch.float64)
    more = exact(key) | ({"loss": "mse", **undrawn(key)} if reads_layers(key) else {})
    a, b = make(key, whole, **more), make(key, split, **more)
    for batch in data:

        def full(batch: torch.Tensor = batch) -> None:
            a.zero_grad()
            whole(batch).square().mean().backward()

        def accumulate(batch: torch.Tensor = batch) -> None:
            b.zero_grad()
            for micro in batch.chunk(4):
                (split(micro).square().mean() / 4).backward()

        take(a, full, evaluations(a))
        take(b, accumulate, evaluations(b))
    assert_close(parameters(whole), parameters(split), 1e-6)


def test_a_late_gradient_meets_a_fresh_optimizer(key: str) -> None:
    net, late = Net(torch.float64), "wide.weight"
    more = exact(key) | always(key)
    opt = make(key, net, **more)
    named = dict(net.named_parameters())
    held = named[late].detach().clone()

    def without() -> None:
        fill(net.parameters(), 3)
        named[late].grad = None

    for number in range(5):
        feed(opt, without, number)
    assert torch.equal(named[late], held)
    assert int(opt.state[named[late]]["step"]) == 0
    other = Net(torch.float64)
    fresh = make(key, other, **more)
    for _ in range(3):  # its steps 6, 7 and 8 are the fresh one's 1, 2 and 3
        push(opt, seed=9)
        push(fresh, seed=9)
    if reads_layers(key):  # what a layer sees depends on the others, which have moved on
        assert int(opt.state[named[late]]["captures"]) == 1  # at step 7, since every second step captures
        assert not torch.equal(named[late], held)
    elif has_sums(key):  # its steps depend on those of the others
        assert not torch.equal(named[late], held)
    else:
        torch.testing.assert_close(named[late], dict(other.named_parameters())[late], rtol=1e-12, atol=1e-14)
    assert int(opt.state[named[late]]["step"]) == 3
    assert int(opt.state[named["up.weight"]]["step"]) == 8


def test_a_block_of_weight_and_bias_waits_for_both_gradients(key: str) -> None:
    net = Net()
    opt = make(key, net)
    weight, bias = net.wide.weight, net.wide.bias
    before = snapshot(opt)

    def without() -> None:
        fill(net.parameters(), 3)
        bias.grad = None

    for number in range(4):
        feed(opt, without, number)
    joined = recipe_of(key).joins_bias
    assert torch.equal(bias, before["wide.bias"])
    assert torch.equal(weight, before["wide.weight"]) == joined
    assert [int(opt.state[p]["step"]) for p in (weight, bias)] == [0 if joined else 4, 0]
    assert opt.audit().get("wide.weight", {}).get("incomplete", 0) == (4 if joined else 0)


def test_a_row_that_comes_and_goes_equals_one_trained_alone(key: str) -> None:
    net, alone = Net(torch.float64), Net(torch.float64)
    more = exact(key) | steady(key) | always(key)
    if reads_layers(key):  # what the layer sees depends on the others, which stay where they are
        rules = [gd.rule("up.weight", lr=0.05), gd.rule("*", lr=0.0)]
        more |= undrawn(key) | {"rules": rules, "factor_frequency": 1}
    opt, single = make(key, net, **more), make(key, alone, **more)
    named, only = dict(net.named_parameters()), dict(alone.named_parameters())["up.weight"]

    def everything(number: int) -> None:
        fill(net.parameters(), number)
        if number % 2:
            named["up.weight"].grad = None

    def one(number: int) -> None:
        fill(alone.parameters(), number)
        for p in alone.parameters():
            p.grad = p.grad if p is only else None

    for number in range(8):
        feed(opt, lambda n=number: everything(n), number)
        if number % 2 == 0:
            feed(single, lambda n=number: one(n), number)
    if has_sums(key) and not reads_layers(key):  # the length of its step depends on the others, what it holds does not
        for name, value in single.state[only].items():
            torch.testing.assert_close(value, opt.state[named["up.weight"]][name], rtol=1e-11, atol=1e-13)
        return
    torch.testing.assert_close(only, named["up.weight"], rtol=1e-11, atol=1e-13)
    assert not torch.equal(only, Net(torch.float64).up.weight)


def test_frozen_parameters_hold_no_state_until_they_train(key: str) -> None:
    net = Net()
    net.wide.requires_grad_(False)
    opt = make(key, net)
    drive(opt, net, 3)
    frozen = list(net.wide.parameters())
    assert not any(p in opt.state for p in frozen)
    held = [p.detach().clone() for p in frozen]
    net.wide.requires_grad_(True)
    drive(opt, net, 3, first=3)
    assert all(int(opt.state[p]["step"]) == 3 for p in frozen)
    assert not any(torch.equal(p, old) for p, old in zip(frozen, held))


def test_parameters_replaced_in_the_groups_are_trained(key: str) -> None:
    net, reference = Net(), Net()
    opt, plain = make(key, net), make(key, reference)
    drive(opt, net, 2)
    drive(plain, reference, 2)
    old = list(net.parameters())
    held = [p.detach().clone() for p in old]
    new = {id(p): nn.Parameter(p.detach().clone()) for p in old}
    for group in opt.param_groups:
        group["params"] = [new[id(p)] for p in group["params"]]
    for module in net.modules():
        for name, p in list(module.named_parameters(recurse=False)):
            setattr(module, name, new[id(p)])
    drive(opt, net, 4, first=2)
    drive(plain, reference, 4, first=2)
    assert all(torch.equal(p, value) for p, value in zip(old, held))
    assert_same(parameters(net), parameters(reference))  # the state has followed


def test_a_model_converted_after_the_constructor(key: str) -> None:
    net, reference = Net(), Net(torch.float64)
    opt = make(key, net, **exact(key))
    net.to(torch.float64)
    plain = make(key, reference, **exact(key))
    drive(opt, net, 4)
    drive(plain, reference, 4)
    assert_close(parameters(net), parameters(reference), 1e-9)
    for p in net.parameters():
        assert all(v.dtype == torch.float64 for k, v in opt.state[p].items() if v.is_floating_point() and k != "step")


def test_storage_moved_by_a_device_swap_keeps_the_state(key: str) -> None:
    net, reference = Net(), Net()
    opt, plain = make(key, net), make(key, reference)
    drive(opt, net, 3)
    drive(plain, reference, 3)
    for p in net.parameters():  # what model.to(device) does: the tensor stays, its storage goes
        p.data = p.data.clone()
    drive(opt, net, 3, first=3)
    drive(plain, reference, 3, first=3)
    assert_same(parameters(net), parameters(reference))


def test_a_meta_model_gets_its_state_when_it_is_materialized(key: str) -> None:
    with torch.device("meta"):
        net = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 4), nn.Linear(4, 2))
    opt = make(key, net)
    assert not opt.state
    net.to_empty(device="cpu")
    for group in opt.param_groups:
        group["params"] = [dict(net.named_parameters())[name] for name in group["param_names"]]
    with torch.no_grad():
        for p in net.parameters():
            p.fill_(0.5)
    opt.materialize_state()
    assert set(opt.state) == set(net.parameters())
    push(opt, 3)
    assert all(bool(torch.isfinite(p).all()) for p in net.parameters())


def test_a_group_added_later_joins(key: str) -> None:
    net = Net()
    opt = make(key, net)
    drive(opt, net, 2)
    more = {"weight": nn.Parameter(torch.randn(7, 5)), "bias": nn.Parameter(torch.randn(7))}
    if reads_layers(key):
        with pytest.raises(TypeError, match="build a new optimizer"):
            opt.add_param_group({"params": list(more.items())})
        assert sum(len(group["params"]) for group in opt.param_groups) == len(list(net.parameters()))
        more["weight"] = nn.Parameter(torch.randn(7))
    opt.add_param_group({"params": list(more.items()), "lr": 0.5})
    added = [group for group in opt.param_groups if set(group["param_names"]) & {"weight", "bias"}]
    assert sum(len(group["params"]) for group in added) == 2
    assert added[0]["lr"] == 0.5
    fresh = more["bias"].detach().clone()
    push(opt, 2, seed=4)  # the first one may only look
    assert all(int(opt.state[p]["step"]) == 2 for p in more.values())
    assert not torch.equal(more["bias"], fresh)
    with pytest.raises(ValueError, match="another name"):
        opt.add_param_group({"params": [("bias", nn.Parameter(torch.ones(7)))]})


@pytest.fixture
def young_heap() -> Iterator[None]:
    """What is there already does not count and is not walked through."""
    gc.freeze()
    yield
    gc.unfreeze()


def test_memory_does_not_grow(key: str, young_heap: None) -> None:
    net = Plain()
    opt = make(key, net)
    params = list(net.parameters())
    sets = [[torch.randn(p.shape) for p in params] for _ in range(4)]

    def closure(number: int) -> None:
        for p, g in zip(params, sets[number % 4]):
            p.grad = g if number % 3 or p is not params[1] else None  # sometimes one is missing

    def run(steps: int) -> None:
        for number in range(steps):
            feed(opt, lambda number=number: closure(number), number)

    def tensors() -> int:
        gc.collect()
        return sum(isinstance(o, torch.Tensor) for o in gc.get_objects())

    run(40)
    bytes_before, held = tensors(), (opt.workspace_bytes, opt.state_bytes())
    tracemalloc.start()
    run(20)
    gc.collect()
    first = tracemalloc.get_traced_memory()[0]
    tracemalloc.stop()
    run(240)
    tracemalloc.start()
    run(20)
    gc.collect()
    last = tracemalloc.get_traced_memory()[0]
    tracemalloc.stop()
    assert tensors() <= bytes_before + 2
    assert (opt.workspace_bytes, opt.state_bytes()) == held
    assert last <= first + 4096
