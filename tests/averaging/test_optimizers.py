"""Optimizers as sources of evaluation weights: the context, ``eval()`` and ``train()``, checkpoints of either mode."""

from __future__ import annotations

import copy
import io
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict

import guided_descent as gd
from guided_descent.averaging import EMA, EvaluationSource, evaluating, export

MAKERS: dict[str, Any] = {
    "schedule_free_sgd": lambda model, **more: gd.ScheduleFreeSGD(model, lr=0.1, **more),
    "schedule_free_adamw": lambda model, **more: gd.ScheduleFreeAdamW(model, lr=0.05, **more),
    "gpa_adamw": lambda model, **more: gd.GPAAdamW(model, lr=0.05, mu_x=0.8, **more),
    "lookahead": lambda model, **more: gd.AdamW(model, lr=0.05, add=[gd.parts.Lookahead(k=3)], **more),
    "muon": lambda model, **more: gd.Muon(model, lr=0.05, add=[gd.parts.ScheduleFree()], **more),
    "kfac": lambda model, **more: gd.KFAC(model, loss="mse", lr=0.05, add=[gd.parts.ScheduleFree()], **more),
}
NAMES = pytest.mark.parametrize("name", MAKERS)


def net(dtype: torch.dtype = torch.float32, norm: bool = False) -> nn.Module:
    made = torch.Generator().manual_seed(1)
    model = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6) if norm else nn.Tanh(), nn.Linear(6, 5), nn.Linear(5, 3))
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.randn(p.shape, generator=made) * 0.4)
    return model.to(dtype)


def drive(opt: Any, model: nn.Module, steps: int, first: int = 0) -> None:
    for number in range(first, first + steps):
        made = torch.Generator().manual_seed(number)
        x = torch.randn(16, 4, generator=made).to(next(model.parameters()).dtype)
        opt.zero_grad()
        (model(x).float() - 1).square().mean().backward()
        opt.step()


def weights(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def through_file(value: Any) -> Any:
    file = io.BytesIO()
    torch.save(value, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


@NAMES
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_the_context_and_the_mode_show_the_same_weights_and_restore_to_the_bit(name: str, dtype: torch.dtype) -> None:
    model = net(dtype)
    opt = MAKERS[name](model, rounding="master")
    assert isinstance(opt, EvaluationSource)
    drive(opt, model, 7)
    live = weights(model)
    with evaluating(model, opt):
        shown = weights(model)
    assert same(weights(model), live)
    assert not same(shown, live)
    held = opt.state_bytes()
    opt.eval()
    assert same(weights(model), shown)
    opt.eval()
    assert same(weights(model), shown)
    with evaluating(model, opt):  # they are there already
        assert same(weights(model), shown)
    assert same(weights(model), shown)
    opt.train()
    assert same(weights(model), live)
    opt.train()
    assert same(weights(model), live)
    assert opt.state_bytes() == held


@NAMES
def test_evaluation_leaves_training_alone(name: str) -> None:
    model, plain = net(), net()
    opt, other = MAKERS[name](model), MAKERS[name](plain)
    for number in range(10):
        opt.train()
        drive(opt, model, 1, first=number)
        with torch.no_grad():
            opt.eval()
            model(torch.ones(2, 4))
            opt.train()
            with evaluating(model, opt):
                model(torch.ones(2, 4))
    drive(other, plain, 10)
    assert same(weights(model), weights(plain))


@NAMES
@pytest.mark.parametrize("rounding", ["nearest", "stochastic", "compensated", "master"])
@pytest.mark.parametrize("mode", ["train", "eval"])
def test_a_checkpoint_of_either_mode_continues_to_the_bit(name: str, rounding: str, mode: str) -> None:
    model, other = net(torch.bfloat16), net(torch.bfloat16)
    opt = MAKERS[name](model, rounding=rounding)
    drive(opt, model, 8)
    if mode == "eval":
        opt.eval()
    saved = through_file({"model": model.state_dict(), "optimizer": opt.state_dict()})
    fresh = MAKERS[name](other, rounding=rounding)
    other.load_state_dict(saved["model"])
    fresh.load_state_dict(saved["optimizer"])
    if mode == "eval":
        with pytest.raises(RuntimeError, match=r"call optimizer\.train"):
            fresh.step()
        assert same(weights(other), weights(model))
        fresh.train()
        opt.train()
    assert same(weights(other), weights(model))
    drive(opt, model, 6, first=8)
    drive(fresh, other, 6, first=8)
    assert same(weights(other), weights(model))


def test_what_is_saved_in_evaluation_mode_needs_no_parameters_of_the_same_mode() -> None:
    """The live weights come from the state, whatever the model holds when they are put back."""
    model, other = net(), net()
    opt, fresh = MAKERS["schedule_free_sgd"](model), MAKERS["schedule_free_sgd"](other)
    drive(opt, model, 5)
    live = weights(model)
    opt.eval()
    fresh.load_state_dict(through_file(opt.state_dict()))
    fresh.train()
    assert same(weights(other), live)


def test_loading_replaces_the_live_weights_that_wait() -> None:
    model, other = net(), net()
    opt, target = MAKERS["schedule_free_sgd"](model), MAKERS["schedule_free_sgd"](other)
    drive(opt, model, 5)
    drive(target, other, 3)
    trained = through_file({"model": model.state_dict(), "optimizer": opt.state_dict()})
    opt.eval()
    shown = through_file({"model": model.state_dict(), "optimizer": opt.state_dict()})
    for saved in (trained, shown, trained):
        target.eval()
        other.load_state_dict(saved["model"])
        target.load_state_dict(saved["optimizer"])
        target.train()
        assert same(weights(other), dict(trained["model"]))
    target.eval()
    held, state = weights(other), copy.deepcopy(target.state_dict())
    broken = copy.deepcopy(shown["optimizer"])
    for spoil in ("live", "shape"):
        entry = broken["state"][2]
        entry["live"] = torch.zeros(2) if spoil == "shape" else None
        with pytest.raises(ValueError, match=r"'2.weight'.*|lacks its live weights.*optimizer\.train\(\)"):
            target.load_state_dict(broken)
        assert same(weights(other), held)
        for number, values in state["state"].items():
            assert all(torch.equal(v, target.state_dict()["state"][number][k]) for k, v in values.items())


def test_copies_in_evaluation_mode() -> None:
    model = net()
    opt = MAKERS["schedule_free_adamw"](model)
    drive(opt, model, 4)
    live = weights(model)
    opt.eval()
    other, twin = copy.deepcopy((model, opt))
    twin.train()
    assert same(weights(other), live)
    assert not same(weights(model), live)


@pytest.mark.parametrize("mode", ["train", "eval"])
def test_the_distributed_checkpoint_of_either_mode(mode: str, tmp_path: Path) -> None:
    model, other = net(), net()
    opt, fresh = MAKERS["schedule_free_adamw"](model), MAKERS["schedule_free_adamw"](other)
    drive(opt, model, 5)
    if mode == "eval":
        opt.eval()
        with pytest.raises(ValueError, match=r"lacks its live weights.* call eval\(\) before"):
            load(model, opt, other, fresh, tmp_path / "fails")
        fresh.eval()
    load(model, opt, other, fresh, tmp_path / "works")
    fresh.train()
    opt.train()
    drive(opt, model, 4, first=5)
    drive(fresh, other, 4, first=5)
    assert same(weights(other), weights(model))


def load(model: nn.Module, opt: Any, other: nn.Module, fresh: Any, folder: Path) -> None:
    state = {"model": model.state_dict(), "optimizer": get_optimizer_state_dict(model, opt)}
    into = {"model": other.state_dict(), "optimizer": get_optimizer_state_dict(other, fresh)}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        dcp.save(state, checkpoint_id=folder)
        dcp.load(into, checkpoint_id=folder)
    other.load_state_dict(into["model"])
    set_optimizer_state_dict(other, fresh, into["optimizer"])


def test_a_trainer_that_swaps_around_evaluation_and_saving() -> None:
    """What Hugging Face's Trainer calls: ``train()`` in every step, ``eval()`` in evaluation, then a checkpoint."""
    model, plain = net(), net()
    opt, other = MAKERS["schedule_free_adamw"](model), MAKERS["schedule_free_adamw"](plain)
    checkpoints = []
    for number in range(9):
        opt.train()
        drive(opt, model, 1, first=number)
        if number % 3 == 2:
            opt.eval()
            checkpoints.append(through_file({"model": model.state_dict(), "optimizer": opt.state_dict()}))
    resumed = net()
    again = MAKERS["schedule_free_adamw"](resumed)
    resumed.load_state_dict(checkpoints[1]["model"])
    again.load_state_dict(checkpoints[1]["optimizer"])
    for number in range(6, 9):
        again.train()
        drive(again, resumed, 1, first=number)
    drive(other, plain, 9)
    opt.train()
    assert same(weights(model), weights(plain))
    assert same(weights(resumed), weights(plain))
    with evaluating(plain, other):
        deployed = weights(plain)
    assert same(deployed, dict(checkpoints[2]["model"]))


def test_before_the_first_step_there_is_nothing_else_to_evaluate() -> None:
    model = net()
    opt = MAKERS["schedule_free_adamw"](model)
    first = weights(model)
    assert opt.evaluation_weights(model) == {}
    opt.eval()
    assert same(weights(model), first)
    opt.train()
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(2)  # loaded after the build
    drive(opt, model, 1)
    for p in model.parameters():
        torch.testing.assert_close(opt.state[p]["z"], p.detach())  # of the first step, so it began at the new weights


def test_late_and_frozen_parameters_are_shown_as_they_are() -> None:
    model = net()
    model[2].requires_grad_(False)
    opt = MAKERS["schedule_free_sgd"](model)
    drive(opt, model, 4)
    frozen = model[2].weight.detach().clone()
    assert set(opt.evaluation_weights(model)) == {"0.weight", "0.bias", "3.weight", "3.bias"}
    opt.eval()
    assert torch.equal(model[2].weight, frozen)
    opt.train()
    model[2].requires_grad_(True)
    model(torch.ones(2, 4)).sum().backward()  # known from its first gradient on
    opt.step()
    assert "2.weight" in opt.evaluation_weights(model)


def test_names_and_copies() -> None:
    model = net()
    opt = MAKERS["schedule_free_sgd"](model)
    drive(opt, model, 4)
    wrapped = nn.Sequential()
    wrapped.add_module("module", model)
    want = opt.evaluation_weights(model)
    twin = copy.deepcopy(model)
    for other in (wrapped, twin):
        found = opt.evaluation_weights(other)
        assert same(found, want)
    with evaluating(twin, opt):
        assert same(weights(twin), want)
    listed = gd.ScheduleFreeSGD(list(model.parameters()), lr=0.1)
    drive(listed, model, 2)
    assert set(listed.evaluation_weights(model)) == set(want)
    with pytest.raises(ValueError, match=r"the model has no parameter of this optimizer, .*'param\.0'"):
        listed.evaluation_weights(twin)
    exported = export(model, opt)
    assert exported.keys() == model.state_dict().keys()


def test_other_recipes_evaluate_what_they_train() -> None:
    model = net()
    opt = gd.AdamW(model)
    drive(opt, model, 3)
    live = weights(model)
    assert opt.evaluation_weights(model) == {}
    opt.eval()
    assert same(weights(model), live)
    assert not any("live" in state for state in opt.state.values())


def test_running_statistics_need_a_policy() -> None:
    model = net(norm=True)
    opt = MAKERS["schedule_free_sgd"](model)
    drive(opt, model, 5)
    with pytest.raises(ValueError, match="running statistics"), evaluating(model, opt):
        pass
    before = model[1].running_mean.clone()
    x = torch.randn(32, 4)
    with evaluating(model, opt, buffers=[x]):
        torch.testing.assert_close(model[1].running_mean, model[0](x).mean(0).detach(), rtol=1e-5, atol=1e-6)
    assert torch.equal(model[1].running_mean, before)


def test_the_mode_may_not_change_while_others_have_the_weights() -> None:
    model = net()
    opt = MAKERS["schedule_free_sgd"](model)
    drive(opt, model, 3)
    ema = EMA(model, decay=0.5)
    ema.update()
    live = weights(model)
    for source in (opt, ema):
        with evaluating(model, source), pytest.raises(RuntimeError, match=r"optimizer\.eval\(\) inside evaluating"):
            opt.eval()
        assert same(weights(model), live)
    with evaluating(model, opt):
        opt.train()  # nothing to do
        with pytest.raises(RuntimeError, match="state_dict"):
            opt.state_dict()
    opt.eval()
    with evaluating(model, ema), pytest.raises(RuntimeError, match=r"optimizer\.train\(\) inside evaluating"):
        opt.train()
    opt.train()
    assert same(weights(model), live)
    plain = gd.AdamW(model)
    with evaluating(model, ema):
        plain.eval()  # a mode and nothing else
    plain.train()


def test_a_group_added_in_evaluation_mode_is_in_that_mode() -> None:
    model = net()
    opt = MAKERS["schedule_free_sgd"](model)
    drive(opt, model, 2)
    opt.eval()
    opt.add_param_group({"params": [("more", nn.Parameter(torch.ones(3)))]})
    assert {group["mode"] for group in opt.param_groups} == {"eval"}
    opt.train()
    assert {group["mode"] for group in opt.param_groups} == {"train"}
    opt.state_dict()
