"""Refreshes: every block once in a period, spread by cost, a function of names and steps alone."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import guided_descent as gd
from guided_descent.engine.refresh import due, phases

COSTS = st.dictionaries(st.text("abcdef", min_size=1, max_size=4), st.floats(0, 1e9), min_size=1, max_size=30)


@settings(max_examples=60, deadline=None)
@given(costs=COSTS, period=st.integers(1, 12))
def test_phases_cover_and_balance(costs: dict[str, float], period: int) -> None:
    found = phases(costs, period)
    assert found.keys() == costs.keys()
    assert all(0 <= phase < period for phase in found.values())
    load = [sum(costs[key] for key, at in found.items() if at == phase) for phase in range(period)]
    # greedy, longest first: no step is dearer than the mean by more than one block
    assert max(load) <= sum(load) / period + max(costs.values()) + 1e-6 * sum(load)


@settings(max_examples=40, deadline=None)
@given(costs=COSTS, period=st.integers(1, 12), seed=st.randoms())
def test_phases_do_not_depend_on_the_order(costs: dict[str, float], period: int, seed: object) -> None:
    items = list(costs.items())
    seed.shuffle(items)  # type: ignore[attr-defined]
    assert phases(dict(items), period) == phases(costs, period)


@settings(max_examples=60, deadline=None)
@given(phase=st.integers(0, 40), period=st.integers(1, 12), start=st.integers(2, 500))
def test_due_once_in_every_period(phase: int, period: int, start: int) -> None:
    assert sum(due(step, phase, period) for step in range(start, start + period)) == 1
    assert not due(1, phase, period)


def test_equal_costs_spread_evenly() -> None:
    found = phases({str(i): 1.0 for i in range(20)}, 5)
    assert sorted(found.values()) == sorted(list(range(5)) * 4)


@pytest.mark.parametrize("schedule", ["staggered", "every"])
def test_refreshes_happen_when_they_are_due(schedule: str) -> None:
    net = nn.Sequential(*[nn.Linear(4, 4) for _ in range(5)], nn.Linear(4, 3))
    opt = gd.SOAP(net, precondition_frequency=4, refresh_schedule=schedule)
    counts: list[list[int]] = []
    for _ in range(13):
        for p in net.parameters():
            p.grad = torch.randn_like(p)
        opt.step()
        counts.append([opt.audit().get(f"{i}.weight", {}).get("refreshes", 0) for i in range(6)])
    assert counts[0] == [0] * 6
    assert counts[-1] == [3] * 6  # twelve steps after the first, one in four
    new = [sum(b) - sum(a) for a, b in pairwise(counts)]
    assert max(new) == (6 if schedule == "every" else 2)
