"""Compiled mode: one set of graphs for a whole schedule, and the numbers of the eager mode."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from drive import Net, Plain, assert_close, evaluations, exact, make, parameters, parts_of, push, recipe_of
from torch._dynamo.utils import counters

import guided_descent as gd


@pytest.fixture(autouse=True)
def _fresh_graphs() -> None:
    torch._dynamo.reset()
    counters.clear()


def scheduled(opt: gd.Optimizer) -> torch.optim.lr_scheduler.LambdaLR:
    return torch.optim.lr_scheduler.LambdaLR(opt, lambda step: 1 / (1 + 0.1 * step))


def graphs() -> int:
    return counters["stats"]["unique_graphs"]


@pytest.mark.thin(early=[True])
@pytest.mark.parametrize("early", [True, False], ids=["compiled-first", "scheduled-first-with-a-tensor-rate"])
def test_new_numbers_need_no_new_graph(key: str, early: bool) -> None:
    net, other = Plain(torch.float64), Plain(torch.float64)
    rate: Any = 0.01 if early else torch.tensor(0.01, dtype=torch.float64)
    opt, eager = make(key, net, lr=rate, **exact(key)), make(key, other, lr=0.01, **exact(key))
    if early:
        opt.compile(backend="eager")
    schedule, reference = scheduled(opt), scheduled(eager)
    if not early:
        opt.compile(backend="eager")
    seen = []
    for number in range(16):
        for target in (opt, eager):
            for group in target.param_groups:
                if "betas" in group:
                    group["betas"] = (0.9 - 0.01 * number, 0.95, *group["betas"][2:])
                if group.get("weight_decay"):
                    group["weight_decay"] = 0.01 * (number + 1)
            push(target, seed=number)
        schedule.step()
        reference.step()
        seen.append(graphs())
    staged = any(part.has_sums and not part.idle(opt.param_groups[0]) for part in parts_of(key))  # never compiled
    assert (seen[9] > 0) != staged  # the first steps stay eager, and those that have just read the layers
    assert seen[-1] - seen[9] <= 1
    assert_close(parameters(net), parameters(other), 1e-9)
    assert opt.audit() == eager.audit()
    assert evaluations(opt) == evaluations(eager)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_scalars_are_written_by_graphs(key: str, dtype: torch.dtype) -> None:
    """Torch 2.13 loses writes to 0-d float64 inputs of a traced graph; this backend traces as Inductor does."""
    if recipe_of(key).matrix:  # no matrix: it is for the auxiliary recipe, which is in the table as well
        assert recipe_of(key)().spare().key in gd.list_optimizers()
        return
    a, b = torch.nn.Parameter(torch.tensor(1.0, dtype=dtype)), torch.nn.Parameter(torch.tensor(1.0, dtype=dtype))
    opt, eager = make(key, [("p", a)]), make(key, [("p", b)])
    opt.compile(backend="aot_eager")
    push(opt, 5)
    push(eager, 5)
    torch.testing.assert_close(a, b, rtol=1e-6, atol=0.0)


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("compiled_key", ["adamw", "muon"])
def test_inductor_equals_eager(compiled_key: str) -> None:
    net, other = Net(torch.float64), Net(torch.float64)
    opt = make(compiled_key, net, compile=True, **exact(compiled_key))
    eager = make(compiled_key, other, **exact(compiled_key))
    schedule, reference = scheduled(opt), scheduled(eager)
    for number in range(50):
        push(opt, seed=number)
        push(eager, seed=number)
        schedule.step()
        reference.step()
        if number == 3:
            settled = graphs()
    assert graphs() - settled <= 1
    assert_close(parameters(net), parameters(other), 1e-6)
