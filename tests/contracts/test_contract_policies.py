"""Non-finite gradients, GradScaler, and the errors of wrong input."""

from __future__ import annotations

import copy
import math
import re
from typing import Any

import pytest
import torch
from drive import (
    Net,
    Plain,
    assert_close,
    assert_same,
    drive,
    evaluations,
    fill,
    has,
    loss_of,
    make,
    options,
    parameters,
    push,
    reads_layers,
    refuses_lists,
    snapshot,
    take,
)
from torch import Tensor, nn

import guided_descent as gd
from guided_descent.recipes import REGISTRY, Recipe


def spoil(opt: Any, net: nn.Module, name: str = "wide.weight", value: float = math.nan) -> Any:
    """A step whose gradient holds one bad element."""

    def closure() -> Tensor:
        opt.zero_grad()
        loss = loss_of(net, 99)
        loss.backward()
        dict(net.named_parameters())[name].grad.view(-1)[3] = value
        return loss

    if evaluations(opt) > 1:
        return opt.step(closure)
    closure()
    return opt.step()


@pytest.mark.thin(value=[math.inf])
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("after", [0, 3])
def test_skip_is_a_bitwise_no_op(key: str, value: float, after: int) -> None:
    net, other = Net(), Net()
    opt, clean = make(key, net), make(key, other)
    drive(opt, net, after)
    drive(clean, other, after)
    before = snapshot(opt, net)
    audit = copy.deepcopy(opt.audit())
    spoil(opt, net, value=value)
    now = snapshot(opt, net)
    counters = [name for name in before if name.endswith("/skipped")]
    assert all(now.pop(name) == 1 and before.pop(name) == 0 for name in counters)
    assert_same(before, now)
    assert opt.audit() == audit
    assert (opt.steps, opt.skipped) == (after, 1)
    drive(opt, net, 4, first=after)
    drive(clean, other, 4, first=after)
    assert_same(parameters(net), parameters(other))


def test_twenty_five_in_a_row_raise_and_name_the_parameter(key: str) -> None:
    net = Net()
    opt = make(key, net)
    drive(opt, net, 1)
    before = parameters(net)
    for _ in range(24):
        spoil(opt, net)
    with pytest.raises(gd.NonFiniteError, match=r"wide\.weight"):
        spoil(opt, net)
    assert opt.skipped == 25
    assert_same(before, parameters(net))


def test_a_good_step_resets_the_patience(key: str) -> None:
    net = Net()
    opt = make(key, net)
    for _ in range(3):
        for _ in range(20):
            spoil(opt, net)
        drive(opt, net, 1)
    assert (opt.steps, opt.skipped) == (3, 60)


def test_raise_names_the_parameter_and_changes_nothing(key: str) -> None:
    net = Net()
    opt = make(key, net, nonfinite="raise")
    drive(opt, net, 2)
    before = snapshot(opt, net)
    with pytest.raises(gd.NonFiniteError, match=r"wide\.weight.*step 3"):
        spoil(opt, net)
    assert_same(before, snapshot(opt, net))
    drive(opt, net, 1)


def test_ignore_lets_it_through(key: str) -> None:
    net = Net()
    opt = make(key, net, nonfinite="ignore")
    drive(opt, net, 2)
    spoil(opt, net)
    assert (opt.steps, opt.skipped) == (3, 0)
    assert not bool(torch.isfinite(dict(net.named_parameters())["wide.weight"]).all())
    assert bool(torch.isfinite(net.gain))


@pytest.mark.parametrize("numel", [4, 40_000], ids=["small", "large"])
def test_a_sum_that_overflows_on_finite_values_does_not_skip(key: str, numel: int) -> None:
    p = nn.Parameter(torch.ones(numel))
    opt = make(key, [("p", p), ("q", nn.Parameter(torch.ones(3)))], lr=1e-3)

    def closure() -> None:
        p.grad = torch.full_like(p, 3e38)

    for _ in range(2):
        closure()
        opt.step(closure if evaluations(opt) > 1 else None)
    assert (opt.steps, opt.skipped) == (2, 0)


def test_a_scaler_that_overflows_leaves_everything_alone(key: str) -> None:
    net = Net()
    opt = make(key, net)
    drive(opt, net, 2)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    before = snapshot(opt, net)
    opt.zero_grad()
    scaler.scale(loss_of(net, 2)).backward()
    next(iter(net.parameters())).grad.fill_(math.inf)
    scaler.step(opt)
    scaler.update()
    assert_same(before, snapshot(opt, net))
    assert scaler.get_scale() == 2.0**9


def test_a_scaler_with_clipping_equals_plain_training(key: str) -> None:
    scaled, plain = Net(), Net()
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    a, b = make(key, scaled, **({"scaler": scaler} if reads_layers(key) else {})), make(key, plain)
    if evaluations(a) > 1:
        scaler.scale(loss_of(scaled, 0)).backward()
        with pytest.raises(ValueError, match="closure"):
            scaler.step(a)
        return
    for number in range(5):
        a.zero_grad()
        scaler.scale(loss_of(scaled, number)).backward()
        scaler.unscale_(a)
        nn.utils.clip_grad_norm_(scaled.parameters(), 0.5)
        scaler.step(a)
        scaler.update()
        b.zero_grad()
        loss_of(plain, number).backward()
        nn.utils.clip_grad_norm_(plain.parameters(), 0.5)
        b.step()
    assert_close(parameters(scaled), parameters(plain), 1e-6)


# -- wrong input ---------------------------------------------------------------------------------------------------


def test_unknown_keywords_are_errors_that_list_the_valid_ones(key: str) -> None:
    with pytest.raises(TypeError, match=r"has no option 'learning_rate'.*lr"):
        gd.optimizer(key, Plain(), learning_rate=0.1)
    with pytest.raises(TypeError, match=r"did you mean 'nonfinite'"):
        gd.optimizer(key, Plain(), nonfinit="skip")
    with pytest.raises(TypeError, match=r"did you mean 'lr'"):
        REGISTRY[key].cls().replace(lrr=1.0)


def test_every_declared_bound_is_enforced(key: str) -> None:
    signs = {"gt": (">", 0.0), "ge": (">=", -1.0), "lt": ("<", 0.0), "le": ("<=", 1.0)}
    checked = 0
    for name, item in REGISTRY[key].cls.numbers().items():
        if item.metadata["kind"] != "hyper":
            continue
        for rule, bound in item.metadata["bounds"].items():
            sign, shift = signs[rule]
            value = bound + shift
            given: Any = (value,) * len(item.default) if isinstance(item.default, tuple) else value
            shown = re.escape(f"{name}={given!r} of {key}" if not isinstance(given, tuple) else f"{name}=")
            with pytest.raises(ValueError, match=rf"{shown}.*must be {re.escape(sign)} {bound:g}"):
                gd.optimizer(key, Plain(), **options(key, **{name: given}))
            checked += 1
        if not isinstance(item.default, tuple):
            with pytest.raises((TypeError, ValueError), match=name):
                gd.optimizer(key, Plain(), **{name: "much"})
            with pytest.raises(ValueError, match=rf"{name}=nan of {key} must not be nan"):
                gd.optimizer(key, Plain(), **{name: math.nan})
    assert checked


def test_a_negative_rate_says_value_and_rule(key: str) -> None:
    if has(key, "lr"):
        with pytest.raises(ValueError, match=rf"^lr=-1\.0 of {key} must be >= 0$|^lr=-1\.0 of {key} must be > 0$"):
            gd.optimizer(key, Plain(), lr=-1.0)


def test_choices_are_listed(key: str) -> None:
    for name, item in REGISTRY[key].cls.numbers().items():
        if item.metadata["kind"] == "static" and item.metadata["of"]:
            with pytest.raises(ValueError, match=rf"{name}='bogus' of {key} must be one of"):
                gd.optimizer(key, Plain(), **{name: "bogus"})
    for name, value in (("nonfinite", "hope"), ("rounding", "up"), ("foreach", "yes"), ("maximize", 2)):
        with pytest.raises(ValueError, match=rf"{name}={value!r} must be"):
            gd.optimizer(key, Plain(), **{name: value})
    for name in ("capturable", "differentiable"):
        with pytest.raises(ValueError, match=name):
            gd.optimizer(key, Plain(), **{name: True})


def test_structure_cannot_be_changed_later(key: str) -> None:
    net = Plain()
    opt = make(key, net)

    def closure() -> None:
        fill(net.parameters(), 0)

    for name, item in REGISTRY[key].cls.numbers().items():
        group = next(g for g in opt.param_groups if g["recipe"] == key)
        if item.metadata["kind"] == "static":
            built, group[name] = group[name], "another"
            with pytest.raises(ValueError, match=f"{name} of {key}.*build a new optimizer"):
                take(opt, closure, evaluations(opt))
            group[name] = built
        elif item.metadata["structural"]:
            built, group[name] = group[name], 0.0 if group[name] else 0.5
            with pytest.raises(ValueError, match=f"{name} of {key}.*build a new optimizer"):
                take(opt, closure, evaluations(opt))
            group[name] = built
    push(opt)


def test_groups_keep_notes_and_refuse_near_misses(key: str) -> None:
    net = Plain()
    named = list(net.named_parameters())
    if refuses_lists(key):
        return
    group = {"params": named, "fused": False, "foreach": False, "note": "mine", "lr": 0.3}
    opt = make(key, [group])
    assert all(g["note"] == "mine" and g["fused"] is False for g in opt.param_groups)
    assert {g["lr"] for g in opt.param_groups if g["recipe"] == key} == {0.3}
    assert sorted(n for g in opt.param_groups for n in g["param_names"]) == sorted(n for n, _ in named)
    bare = {"params": [p for _, p in named], "param_names": [n for n, _ in named], "foreach": None}
    assert sorted(n for g in make(key, [bare]).param_groups for n in g["param_names"]) == sorted(n for n, _ in named)
    for wrong in ("weight_decy", "l_r", "nonfinit"):
        if wrong == "weight_decy" and not has(key, "weight_decay"):
            continue
        with pytest.raises(TypeError, match=f"{wrong}.*did you mean"):
            make(key, [{"params": named, wrong: 0.1}])


def test_duplicates_and_other_wrong_parameters(key: str) -> None:
    p = nn.Parameter(torch.ones(3, 3))
    with pytest.raises(ValueError, match=r"'b' and 'a' are the same tensor|'a' and 'b' are the same tensor"):
        gd.optimizer(key, [("a", p), ("b", p)])
    with pytest.raises(ValueError, match="named 'a'"):
        gd.optimizer(key, [("a", p), ("a", nn.Parameter(torch.ones(3)))])
    with pytest.raises(ValueError, match="empty"):
        gd.optimizer(key, [])
    with pytest.raises(TypeError, match="one tensor"):
        gd.optimizer(key, p)
    with pytest.raises(TypeError, match="ordered"):
        gd.optimizer(key, {p})
    with pytest.raises(ValueError, match="non-leaf"):
        gd.optimizer(key, [("a", p * 2)])
    with pytest.raises(TypeError, match="int"):
        gd.optimizer(key, [("a", 3)])
    number = nn.Parameter(torch.ones(3, dtype=torch.int64), requires_grad=False)
    number.grad = torch.ones(3, dtype=torch.int64)
    with pytest.raises(TypeError, match=r"'a'.*int64"):
        gd.optimizer(key, [("a", number)]).step()


def test_sparse_gradients_are_refused_by_name(key: str) -> None:
    net = nn.Embedding(5, 3, sparse=True)
    opt = make(key, net)

    def closure() -> Tensor:
        loss = net(torch.tensor([1])).sum()
        loss.backward()
        return loss

    with pytest.raises(TypeError, match=r"'weight'.*sparse=False"):
        opt.step(closure)


def test_recipes_describe_themselves(key: str) -> None:
    cls = REGISTRY[key].cls
    assert issubclass(cls, Recipe)
    text = str(gd.describe(key))
    assert all(name in text for name in cls.numbers())
    assert all(item.metadata["help"] for item in cls.numbers().values())
    assert REGISTRY[key].paper
    assert REGISTRY[key].family
