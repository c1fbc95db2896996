"""The timing pass on a fake clock: alternation, medians, shares, the first step apart, one thread."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from guided_descent.bench.problem import Problem
from guided_descent.bench.timing import time_steps


class Clock:
    """A clock that only moves when something says what it costs."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def harness(costs: dict[str, list[float]], forward: float = 0.010):
    """Problem and builders whose steps take the listed seconds (cycled), and the log of who stepped when."""
    clock, log = Clock(), []

    def make() -> Problem:
        def loss(model, batch):
            clock.now += forward
            return model(batch).square().mean()

        return Problem(model=nn.Linear(3, 1), loss=loss, batches=lambda step: torch.ones(2, 3) * (step + 1), clip=1.0)

    def builder(name: str):
        class Slow(torch.optim.SGD):
            calls = 0

            def step(self, closure=None):
                clock.now += costs[name][self.calls % len(costs[name])]
                self.calls += 1
                log.append((name, torch.get_num_threads(), self.param_groups[0]["lr"]))
                return super().step(closure)

        return lambda model: Slow(model.parameters(), lr=0.5)

    return clock, log, make, [builder(name) for name in costs]


def test_means_shares_and_the_first_step_apart():
    # SOAP-like: nine cheap steps and a dear one; its first call is dearer still and must not count.
    slow = [5.0, 0.001, *([0.001] * 9 + [0.051]) * 10]
    clock, _, make, builds = harness({"fast": [0.002], "slow": slow})
    fast, periodic = time_steps(make, builds, rounds=3, clock=clock)
    assert fast.step_ms == pytest.approx(12.0)
    assert fast.optimizer_ms == pytest.approx(2.0)
    assert fast.share == pytest.approx(1 / 6)
    assert fast.spread == pytest.approx(0.0)
    assert periodic.optimizer_ms == pytest.approx(6.0)
    assert periodic.first_ms == pytest.approx(5010.0)
    assert periodic.steps == 30


def test_one_disturbed_block_does_not_move_the_median():
    costs = [0.001] * 2 + [0.001] * 10 + [0.9] * 10 + [0.001] * 10
    clock, _, make, builds = harness({"a": costs})
    (timing,) = time_steps(make, builds, rounds=3, clock=clock)
    assert timing.optimizer_ms == pytest.approx(1.0)
    assert timing.spread > 10


def test_optimizers_take_turns_on_one_thread_and_a_calm_learning_rate():
    before = torch.get_num_threads()
    clock, log, make, builds = harness({"a": [0.001], "b": [0.001]})
    time_steps(make, builds, rounds=2, block=3, clock=clock)
    order = "".join(name for name, _, _ in log)
    assert order == "ab" + "ab" + "aaabbb" * 2
    assert {threads for _, threads, _ in log} == {1}
    assert {lr for *_, lr in log} == {0.05}
    assert torch.get_num_threads() == before


def test_equal_optimizers_cost_the_same_within_noise():
    def make() -> Problem:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, 64))
        data = torch.randn(128, 64)
        return Problem(model=model, loss=lambda m, x: (m(x) - x).square().mean(), batches=lambda step: data)

    def adamw(model: nn.Module) -> torch.optim.Optimizer:
        return torch.optim.AdamW(model.parameters(), fused=True)

    one, two = time_steps(make, [adamw, adamw], rounds=9)
    assert one.step_ms == pytest.approx(two.step_ms, rel=0.3)
    assert 0 < one.share < 1


def test_impossible_sizes_are_refused():
    with pytest.raises(ValueError, match="got 0 and 10"):
        time_steps(lambda: None, [], rounds=0)
