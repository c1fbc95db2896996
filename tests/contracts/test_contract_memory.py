"""The forecast of memory is the memory: state by shape, dtype and rounding mode, and what a checkpoint writes."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch
from drive import Net, assert_close, exact, has_sums, make, parameters, parts_of, push
from torch import nn

import guided_descent as gd


class Shapes(nn.Module):
    """Convolutions, fused maps, experts, recurrent gates and degenerate shapes."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)
        self.depthwise = nn.Conv1d(4, 4, 3, groups=4)
        self.attention = nn.MultiheadAttention(8, 2)
        self.lstm = nn.LSTM(4, 6)
        self.tall = nn.Linear(3, 9)
        self.same = nn.Linear(3, 9)
        self.norm = nn.BatchNorm1d(5)
        self.row = nn.Parameter(torch.randn(1, 7))
        self.column = nn.Parameter(torch.randn(7, 1))
        self.scalar = nn.Parameter(torch.tensor(1.0))
        self.empty = nn.Parameter(torch.zeros(0, 4))
        self.none = nn.Parameter(torch.zeros(0))
        self.frozen = nn.Parameter(torch.randn(4, 4), requires_grad=False)
        self.to(dtype)


@pytest.mark.thin(rounding=["master"])
@pytest.mark.parametrize("rounding", ["nearest", "compensated", "master", "stochastic"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("model", [Net, Shapes])
def test_the_forecast_is_what_is_held(key: str, model: type[nn.Module], dtype: torch.dtype, rounding: str) -> None:
    net = model(dtype)
    opt = make(key, net, rounding=rounding)
    forecast = gd.explain(opt).state_bytes
    assert forecast == opt.state_bytes()
    push(opt, 4)
    assert opt.state_bytes() == forecast == gd.explain(opt).state_bytes
    saved = opt.state_dict()
    held = [*saved["state"].values(), *(group["extra"] for group in saved["param_groups"])]
    tensors = [value for values in held for value in values.values() if isinstance(value, torch.Tensor)]
    assert sum(t.numel() * t.element_size() for t in tensors) == forecast
    # a view of a stack would write the whole stack into the file
    assert all(t.untyped_storage().nbytes() == t.numel() * t.element_size() for t in tensors)


def test_complex_state_is_forecast_too(key: str) -> None:
    p = nn.Parameter(torch.randn(3, 4, dtype=torch.complex64))
    opt = make(key, [("p", p)])
    push(opt, 2)
    assert gd.explain(opt).state_bytes == opt.state_bytes()


def test_materialized_state_is_all_of_it(key: str) -> None:
    net = Net()
    opt = make(key, net)
    opt.materialize_state()
    shapes = {p: {name: tuple(v.shape) for name, v in opt.state[p].items()} for p in net.parameters()}
    assert all("step" in names for names in shapes.values())
    push(opt, 3)
    assert shapes == {p: {name: tuple(v.shape) for name, v in opt.state[p].items()} for p in net.parameters()}


@pytest.mark.thin(dtype=[torch.bfloat16])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_workspace_keeps_its_bound(key: str, dtype: torch.dtype) -> None:
    stacked = parts_of(key).unit == "matrix"  # else chunks of a mebibyte for each use, whatever the bound
    side, count, limits = (64, 40, (0.15, 0.3)) if stacked else (96, 160, (5.5,))  # 0.6 and 5.6 MiB in float32
    net = nn.Sequential(*[nn.Linear(side, side, bias=False) for _ in range(count)], nn.Linear(side, 3)).to(dtype)
    wide = make(key, net, rounding="master")
    push(wide, 2 if stacked else 1)
    beside = 2**20 + 8 * 4 * side**2 if stacked else 0  # the check of the gradients, and one matrix in eight copies
    # a global sum waits for all directions, and half-precision gradients and parameters wait with them
    waiting = 4 * side**2 * count * (5 if dtype == torch.bfloat16 else 3) if has_sums(key) else 0
    found = []
    for limit in limits:
        opt = make(key, net, workspace_mb=limit, rounding="master")
        push(opt, 2 if stacked else 1)
        found.append(opt.workspace_bytes)
        assert found[-1] <= limit * 2**20 + beside + waiting
    assert found[0] <= found[-1] <= wide.workspace_bytes
    assert found[0] < wide.workspace_bytes or waiting or not stacked


def test_the_slices_of_a_bound_do_not_change_the_numbers(key: str) -> None:
    nets = [nn.Sequential(*[nn.Linear(24, 24) for _ in range(9)], nn.Linear(24, 30)).double() for _ in range(2)]
    for layer in nets[0]:
        nn.init.orthogonal_(layer.weight)  # what the layers see is well conditioned, however deep they are
    nets[1].load_state_dict(nets[0].state_dict())
    push(make(key, nets[0], workspace_mb=64, **exact(key)), 6)
    push(make(key, nets[1], workspace_mb=0.05, **exact(key)), 6)
    assert_close(parameters(nets[0]), parameters(nets[1]), 1e-11)


def test_a_step_leaves_nothing_for_the_collector_of_cycles(key: str) -> None:
    """Gradients and scratch of a step go when it ends, and not when Python comes to look for cycles."""
    net = Net()
    opt = make(key, net)
    push(opt, 3)
    gc.collect()
    gc.disable()
    try:
        push(opt, 1, seed=5)
        held = [weakref.ref(p.grad) for p in net.parameters() if p.grad is not None]
        opt.zero_grad()
        assert held
        assert not any(ref() is not None for ref in held)
    finally:
        gc.enable()
