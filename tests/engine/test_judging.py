"""Parts that compare the loss of a batch before and after the step: one more evaluation, and nothing else changes."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import guided_descent as gd


def problem() -> tuple[nn.Sequential, Tensor, Tensor]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 2)).double()
    return model, torch.randn(30, 4).double(), torch.randn(30, 2).double()


@pytest.mark.parametrize(("lr", "factor"), [(0.05, 0.95**3), (300.0, 0.95**-3)])
def test_the_damping_follows_the_ratio_of_actual_to_predicted(lr: float, factor: float) -> None:
    """A short step lowers the loss as the model says, so that the damping falls; a wild one raises it."""
    model, x, y = problem()
    numbers = {"damping_interval": 3, "damping": 1.0, "kl_clip": None, "momentum": 0.0, "lr": 1e-9}
    opt = gd.optimizer("kfac", model, loss="mse", damping_rule="lm", fisher="exact", **numbers)
    calls = []

    def closure() -> Tensor:
        opt.zero_grad()
        loss = F.mse_loss(model(x), y)
        loss.backward()
        calls.append(loss.item())
        return loss

    for step in range(1, 4):
        for group in opt.param_groups:
            group["lr"] = lr if step == 3 else 1e-9
        opt.step(closure)
    assert len(calls) == 4  # once more after the third step
    group = next(g for g in opt.param_groups if g["recipe"] == "kfac")
    assert float(group["extra"]["damping_factor"]) == pytest.approx(factor)
    assert (calls[3] < calls[2]) == (factor < 1)


def test_the_gradients_stay_and_a_missing_closure_is_an_error_before_anything_changes() -> None:
    model, x, y = problem()
    opt = gd.optimizer("kfac", model, loss="mse", damping_rule="lm", damping_interval=1)
    F.mse_loss(model(x), y).backward()
    before = [p.detach().clone() for p in model.parameters()]
    with pytest.raises(ValueError, match=r"LevenbergMarquardt compares .* step\(closure\)"):
        opt.step()
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters()))
    grads: list[Tensor] = []

    def closure() -> Tensor:
        opt.zero_grad()
        loss = F.mse_loss(model(x), y)
        loss.backward()
        if not grads:
            grads.extend(p.grad.clone() for p in model.parameters())
        return loss

    opt.step(closure)
    assert all(torch.equal(a, p.grad) for a, p in zip(grads, model.parameters()))
