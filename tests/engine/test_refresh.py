"""Refreshes: every block once in a period, spread by cost, a function of names and steps alone."""

from __future__ import annotations

import copy
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
@given(costs=COSTS, period=st.integers(1, 12), crowded=st.integers(0, 6))
def test_phases_cover_and_balance(costs: dict[str, float], period: int, crowded: int) -> None:
    found = phases(costs, period, crowded)
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


def test_dear_tasks_keep_out_of_crowded_steps() -> None:
    costs = {"large": 100.0, "other": 100.0} | {f"small{i}": 1.0 for i in range(4)}
    found = phases(costs, 6, 3)
    crowded = {key for key, phase in found.items() if any(due(step, phase, 6) for step in (7, 10))}  # 1, 4, 7, 10 ...
    assert not {"large", "other"} & crowded
    assert len(crowded) == 2
    assert phases(costs, 6, 4) == phases(costs, 6)  # every step of the period is as crowded as another in the long run


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
    assert counts[-1] == [6] * 6  # twelve steps after the first, one in four, two sides
    new = [sum(b) - sum(a) for a, b in pairwise(counts)]
    assert max(new) == (12 if schedule == "every" else 3)


# -- tolerance, background, resume -------------------------------------------------------------------------------------

MODES: dict[str, dict[str, object]] = {
    "staggered": {},
    "every": {"refresh_schedule": "every"},
    "drift": {"refresh_tolerance": 0.3},
    "background": {"refresh_lag": 2},
    "background every, eigh, drift": {
        "refresh_lag": 3,
        "refresh_schedule": "every",
        "refresh_method": "eigh",
        "refresh_tolerance": 0.2,
    },
}


def small_net() -> nn.Sequential:
    torch.manual_seed(3)
    return nn.Sequential(nn.Linear(5, 7), nn.Linear(7, 7), nn.Linear(7, 7, bias=False), nn.Linear(7, 4))


def feed(opt: torch.optim.Optimizer, net: nn.Module, first: int, steps: int) -> None:
    for step in range(first, first + steps):
        made = torch.Generator().manual_seed(step)
        for p in net.parameters():
            p.grad = torch.randn(p.shape, generator=made)
        opt.step()


def same(a: gd.Optimizer, b: gd.Optimizer) -> bool:
    left, right = a.state_dict()["state"], b.state_dict()["state"]
    return all(torch.equal(left[i][key], right[i][key]) for i in left for key in left[i])


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("stop", range(1, 10))
def test_a_resumed_run_equals_the_uninterrupted_one_bit_for_bit(mode: str, stop: int, tmp_path: object) -> None:
    net, options = small_net(), {"precondition_frequency": 4, **MODES[mode]}
    opt = gd.SOAP(net, **options)
    feed(opt, net, 0, stop)
    torch.save((net.state_dict(), opt.state_dict()), f"{tmp_path}/saved")
    other = small_net()
    weights, state = torch.load(f"{tmp_path}/saved", weights_only=True)
    other.load_state_dict(weights)
    resumed = gd.SOAP(other, **options)
    resumed.load_state_dict(state)
    for run, its in ((opt, net), (resumed, other)):
        feed(run, its, stop, 12)
    assert all(torch.equal(a, b) for a, b in zip(net.parameters(), other.parameters()))
    assert same(opt, resumed)


@pytest.mark.parametrize("lag", [1, 3])
def test_background_work_lands_exactly_lag_steps_later(lag: int) -> None:
    """The basis of step t + lag is the one that the factors of step t give, to the bit."""
    nets = [small_net(), small_net()]
    options = {"precondition_frequency": 5, "refresh_schedule": "every", "lr": 0.0, "second_moment": "keep"}
    now, late = gd.SOAP(nets[0], **options), gd.SOAP(nets[1], refresh_lag=lag, **options)
    history: list[list[torch.Tensor]] = []
    weights = [[p for p in net.parameters() if p.ndim == 2] for net in nets]
    for step in range(1, 10):
        feed(now, nets[0], step, 1)
        feed(late, nets[1], step, 1)
        history.append([now.state[p]["left_basis"].clone() for p in weights[0]])
        landed = [late.state[p]["left_basis"] for p in weights[1]]
        then = history[step - 1 - lag] if step > lag + 1 else history[0]
        assert all(torch.equal(a, b) for a, b in zip(landed, then)), step
    assert late.audit()["0.weight"]["refreshes"] == 2


def test_a_lag_must_be_shorter_than_the_period() -> None:
    with pytest.raises(ValueError, match=r"refresh_lag=4 .* below .* 4"):
        gd.SOAP(small_net(), precondition_frequency=4, refresh_lag=4)


def test_waiting_state_is_declared_and_counted() -> None:
    net = small_net()
    opt = gd.SOAP(net, precondition_frequency=4, refresh_lag=2)
    assert gd.explain(opt).state_bytes == opt.state_bytes() > gd.SOAP(net, precondition_frequency=4).state_bytes()
    keys = set(opt.state_dict()["state"][0])
    feed(opt, net, 0, 6)
    assert set(opt.state_dict()["state"][0]) == keys  # a fresh state dict is a whole template


def test_a_copy_takes_over_what_waits() -> None:
    net = small_net()
    opt = gd.SOAP(net, precondition_frequency=4, refresh_lag=3, refresh_schedule="every")
    feed(opt, net, 0, 6)  # the refresh of step 5 waits for step 8
    twin_net, twin = copy.deepcopy((net, opt))
    feed(opt, net, 6, 6)
    feed(twin, twin_net, 6, 6)
    assert same(opt, twin)


@pytest.mark.parametrize("tolerance", [0.0, 0.05, 2.0])
def test_nothing_that_has_not_drifted_is_refreshed(tolerance: float) -> None:
    """A constant gradient of full rank: after the first solve no factor turns, and every refresh can be skipped."""
    net = nn.Sequential(nn.Linear(6, 6, bias=False), nn.Linear(6, 6, bias=False))
    rules = [gd.rule("*", role="matrix")]
    options = {"precondition_frequency": 3, "refresh_tolerance": tolerance}
    opt = gd.SOAP(net.double(), rules=rules, refresh_schedule="every", **options)
    fixed = [torch.randn(6, 6, dtype=torch.float64) for _ in range(2)]
    for step in range(1, 13):
        for p, g in zip(net.parameters(), fixed):
            p.grad = g if step < 7 else g.flip(0)  # then one side turns
        opt.step()
    for counts in opt.audit().values():
        refreshes, skipped = counts.get("refreshes", 0), counts.get("skipped_refreshes", 0)
        assert refreshes + skipped == 2 * 3  # at steps 4, 7 and 10
        if tolerance == 0:
            assert skipped == 0
        elif tolerance > 1:
            assert refreshes == 0
        else:  # the left side turns and the right one does not
            assert refreshes == 2
            assert skipped == 4


def test_a_factor_that_a_huge_gradient_made_infinite_starts_again() -> None:
    net = nn.Sequential(nn.Linear(6, 6, bias=False), nn.Linear(6, 6, bias=False))
    opt = gd.SOAP(net, rules=[gd.rule("*", role="matrix")], lr=0.01, precondition_frequency=2)
    weight = net[0].weight
    for step in range(1, 30):
        for p in net.parameters():
            p.grad = torch.randn_like(p) * (1e25 if step == 8 and p is weight else 1.0)
        opt.step()
        assert all(p.isfinite().all() for p in net.parameters())
    assert all(value.isfinite().all() for value in opt.state[weight].values())
    assert opt.audit()["0.weight"]["repairs"] == 2
    assert opt.audit()["0.weight"]["fallbacks"] >= 2
    assert "repairs" not in opt.audit()["1.weight"]


def test_the_first_fallback_of_a_parameter_is_logged(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse(a: torch.Tensor) -> None:
        raise torch.linalg.LinAlgError("no")

    monkeypatch.setattr(torch.linalg, "eigh", refuse)
    net = small_net()
    opt = gd.SOAP(net, precondition_frequency=2, refresh_method="eigh")
    with caplog.at_level("WARNING", logger="guided_descent"):
        feed(opt, net, 0, 8)
    lines = [record.getMessage() for record in caplog.records]
    assert len(lines) == 4
    assert all("fell back" in line for line in lines)
    assert lines[0].startswith("0.weight at step 1")
