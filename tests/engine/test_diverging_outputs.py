"""Outputs that are not finite never stop a forward: the policy for gradients decides, and factors leave them out."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import guided_descent as gd
from guided_descent.engine.policies import NonFiniteError
from guided_descent.recipes import KFAC

LOSSES = {
    "cross_entropy": lambda out, y: F.cross_entropy(out, y),
    "mse": lambda out, y: F.mse_loss(out, F.one_hot(y, 4).to(out.dtype)),
    "bce": lambda out, y: F.binary_cross_entropy_with_logits(out, F.one_hot(y, 4).to(out.dtype)),
}


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 4))


def batch(seed: int, bad: float | None = None) -> tuple[Tensor, Tensor]:
    made = torch.Generator().manual_seed(seed)
    x, y = torch.randn(8, 3, generator=made), torch.randint(0, 4, (8,), generator=made)
    if bad is not None:
        x[3, 1] = bad
    return x, y


def step(model: nn.Module, opt: Any, data: tuple[Tensor, Tensor], loss: str) -> None:
    opt.zero_grad()
    LOSSES[loss](model(data[0]), data[1]).backward()
    opt.step()


def everything(model: nn.Module, opt: Any) -> dict[str, Tensor]:
    """Parameters and state, copied."""
    found = {name: p.detach().clone() for name, p in model.named_parameters()}
    for name, p in model.named_parameters():
        found |= {f"{name}/{key}": value.clone() for key, value in opt.state[p].items() if isinstance(value, Tensor)}
    return found


@pytest.mark.parametrize("fisher", ["mc", "exact"])
@pytest.mark.parametrize("loss", LOSSES)
def test_a_step_with_a_nan_input_is_skipped_and_the_run_is_as_if_it_had_not_been(loss: str, fisher: str) -> None:
    runs = []
    for bad in (True, False):
        model = net()
        opt = gd.build(model, KFAC(factor_frequency=1, precondition_frequency=2, fisher=fisher), loss=loss)
        for seed in range(3):
            step(model, opt, batch(seed), loss)
        if bad:
            before = everything(model, opt)
            step(model, opt, batch(9, math.nan), loss)
            after = everything(model, opt)
            assert before.keys() == after.keys()
            assert all(torch.equal(before[name], after[name]) for name in before)
            assert (opt.steps, opt.skipped) == (3, 1)
        for seed in range(3, 6):
            step(model, opt, batch(seed), loss)
        assert opt.steps == 6
        runs.append(everything(model, opt))
        assert opt.audit()["0.weight"]["captures"] == 6
    assert all(torch.equal(runs[0][name], runs[1][name]) for name in runs[1])
    assert all(bool(value.isfinite().all()) for value in runs[0].values())


@pytest.mark.parametrize("loss", LOSSES)
def test_raise_names_the_gradient_at_the_step_and_not_the_draw_in_the_forward(loss: str) -> None:
    model = net()
    opt = gd.build(model, KFAC(), nonfinite="raise", loss=loss)
    x, y = batch(0, math.nan)
    out = model(x)
    LOSSES[loss](out, y).backward()
    with pytest.raises(NonFiniteError, match="non-finite gradient in"):
        opt.step()


class Spoiled(nn.Module):
    """Makes the first output of the first sample what it is told."""

    value: float | None = None

    def forward(self, out: Tensor) -> Tensor:
        if self.value is None:
            return out
        spoil = torch.zeros_like(out)
        spoil[0, 0] = self.value
        return out + spoil


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_factors_leave_out_what_is_not_finite_though_the_gradients_are(loss: str, value: float) -> None:
    """The loss of the other samples goes on; the curvature of the whole batch is no number and is counted."""
    spoiled = Spoiled()
    model = net().append(spoiled)
    opt = gd.build(model, KFAC(factor_frequency=1), loss=loss)
    step(model, opt, batch(0), loss)
    before = everything(model, opt)
    spoiled.value = value
    x, y = batch(1)
    opt.zero_grad()
    LOSSES[loss](model(x)[1:], y[1:]).backward()
    opt.step()
    assert (opt.steps, opt.skipped) == (2, 0)
    after = everything(model, opt)
    for name in ("0.weight", "2.weight"):
        assert opt.audit()[name]["repairs"] == 1
        assert opt.audit()[name]["captures"] == 1
        assert not torch.equal(before[name], after[name])
        assert torch.equal(before[f"{name}/left"], after[f"{name}/left"])
        assert torch.equal(before[f"{name}/right"], after[f"{name}/right"])
    spoiled.value = None
    step(model, opt, batch(2), loss)
    assert opt.audit()["0.weight"]["captures"] == 2
    assert all(bool(value.isfinite().all()) for value in everything(model, opt).values())
