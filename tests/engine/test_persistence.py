"""Errors of loading: each says what does not fit."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import guided_descent as gd


def trained(**options: Any) -> tuple[nn.Module, gd.Optimizer]:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 4), nn.Linear(4, 2))
    opt = gd.Muon(net, **options)
    for p in net.parameters():
        p.grad = torch.ones_like(p)
    opt.step()
    return net, opt


def drop(key: str) -> Callable[[dict[str, Any]], None]:
    return lambda saved: saved.pop(key)


def group(**values: Any) -> Callable[[dict[str, Any]], None]:
    return lambda saved: saved["param_groups"][0].update(values)


def state(**values: Any) -> Callable[[dict[str, Any]], None]:
    return lambda saved: saved["state"][saved["param_groups"][0]["params"][0]].update(values)


ERRORS: list[tuple[Callable[[dict[str, Any]], Any], str]] = [
    (drop("state"), r"no 'state'; it holds 'param_groups'"),
    (drop("param_groups"), r"no 'param_groups'; it holds 'state'"),
    (lambda s: s["param_groups"].pop(), r"1 param groups and this optimizer 2"),
    (group(recipe="soap"), r"saved by 'soap' and is now 'muon'"),
    (group(scale="spectral"), r"scale of param group 0 was 'spectral'.*'original'"),
    (group(rounding="master"), r"rounding of param group 0 was 'master'"),
    (group(lr=-1.0), r"lr=-1\.0 of muon must be >= 0"),
    (group(momentum=1.5), r"momentum=1\.5 of muon must be < 1"),
    (group(param_names=["x", "y"]), r"lacks \['0\.weight'"),
    (state(momentum_buffer=torch.zeros(2, 2)), r"'momentum_buffer'.*\(2, 2\)|shape"),
    (state(exp_avg=torch.zeros(4, 3)), r"holds 'exp_avg', which muon does not keep"),
    (lambda s: s["state"][s["param_groups"][0]["params"][0]].pop("momentum_buffer"), r"lacks 'momentum_buffer'"),
    (lambda s: s["state"].pop(s["param_groups"][0]["params"][0]), r"no state for '0\.weight', which has been trained"),
]


@pytest.mark.parametrize(("spoil", "message"), ERRORS, ids=[str(i) for i in range(len(ERRORS))])
def test_what_does_not_fit_is_named(spoil: Callable[[dict[str, Any]], Any], message: str) -> None:
    _, source = trained()
    net, opt = trained()
    saved = copy.deepcopy(source.state_dict())
    spoil(saved)
    before = copy.deepcopy(opt.state_dict())
    with pytest.raises(ValueError, match=message):
        opt.load_state_dict(saved)
    after = opt.state_dict()
    assert before["param_groups"] == after["param_groups"]
    for number, values in before["state"].items():
        assert all(torch.equal(value, after["state"][number][name]) for name, value in values.items())
    assert all(bool(torch.isfinite(p).all()) for p in net.parameters())


def test_sets_of_parameters_must_agree() -> None:
    net, opt = trained()
    rules = [gd.rule("1.*", lr=0.5)]
    other = gd.Muon(net, rules=[gd.rule("0.*", lr=0.5)])
    with pytest.raises(ValueError, match=r"another param group|keeps in one"):
        other.load_state_dict(gd.Muon(net, rules=rules).state_dict())
    assert opt.steps == 1


def test_integer_keys_may_come_back_as_strings() -> None:
    net, source = trained()
    _, opt = trained()
    saved = copy.deepcopy(source.state_dict())
    saved["state"] = {str(number): values for number, values in saved["state"].items()}
    opt.load_state_dict(saved)
    assert opt.steps == 1
    assert len(list(net.parameters())) == len(opt.state)
