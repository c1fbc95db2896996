"""Curves equal their closed forms at every step, join where they should and refuse what makes no sense."""

from __future__ import annotations

import math
import pickle

import pytest
from hypothesis import given
from hypothesis import strategies as st

from guided_descent.schedules import curves

lengths = st.integers(1, 300)
floors = st.floats(0, 1)


@given(lengths)
def test_warmup_rises_from_one_share_to_the_peak(n):
    curve = curves.warmup(n)
    assert [curve(t) for t in range(n)] == pytest.approx([(t + 1) / n for t in range(n)], abs=1e-15)
    assert curve(0) > 0
    assert curve(n - 1) == 1


@given(lengths, floors)
def test_decays_equal_their_closed_forms(n, floor):
    forms = {
        curves.linear: lambda p: 1 - p,
        curves.cosine: lambda p: (1 + math.cos(math.pi * p)) / 2,
        curves.one_minus_sqrt: lambda p: 1 - math.sqrt(p),
    }
    for make, form in forms.items():
        curve = make(n, floor=floor)
        expected = [floor + (1 - floor) * form(t / n) for t in range(n)]
        assert [curve(t) for t in range(n)] == pytest.approx(expected, abs=1e-12)
        assert curve(0) == pytest.approx(1, abs=1e-15)


@pytest.mark.parametrize("make", [curves.linear, curves.cosine, curves.one_minus_sqrt])
@pytest.mark.parametrize("n", [1, 2, 10, 10_000_000])
def test_the_last_step_is_just_above_zero_and_is_held(make, n):
    curve = make(n)
    assert 0 < curve(n - 1) <= 1 / math.sqrt(n)
    assert curve(n) == curve(n + 1000) == curve(n - 1)


@given(lengths, lengths, lengths)
def test_chains_place_each_curve_at_its_own_start(a, b, c):
    chain = curves.warmup(a) >> curves.constant(b) >> curves.linear(c)
    assert chain.length == a + b + c
    parts = [curves.warmup(a), curves.constant(b), curves.linear(c)]
    assert [chain(t) for t in range(a + b + c)] == [p(t) for p in parts for t in range(p.length)]
    assert chain == curves.warmup(a) >> (curves.constant(b) >> curves.linear(c))
    assert pickle.loads(pickle.dumps(chain)) == chain


def test_an_endless_curve_may_only_come_last():
    curve = curves.warmup(3) >> curves.constant()
    assert curve.length is None
    assert curve(10**9) == 1
    with pytest.raises(ValueError, match=r"constant\(\) has no end"):
        curve >> curves.linear(3)


def test_a_curve_of_ones_own_joins():
    class InverseSqrt(curves.Curve):
        length = None

        def factor(self, step):
            return 1 / math.sqrt(step + 1)

    curve = curves.warmup(2) >> InverseSqrt()
    assert [curve(t) for t in (0, 1, 2, 5)] == [0.5, 1, 1, 0.5]
    with pytest.raises(TypeError):
        curve >> (lambda t: 1.0)


@pytest.mark.parametrize("steps", [0, -1, 2.0, True, "3"])
@pytest.mark.parametrize("make", [curves.warmup, curves.constant, curves.linear, curves.cosine, curves.one_minus_sqrt])
def test_lengths_must_be_positive_integers(make, steps):
    with pytest.raises(ValueError, match="positive integer"):
        make(steps)


@pytest.mark.parametrize("floor", [-0.1, 1.5, math.nan])
def test_floors_are_shares(floor):
    with pytest.raises(ValueError, match=r"floor=.*\[0, 1\]"):
        curves.cosine(10, floor=floor)


def test_negative_steps_are_refused():
    with pytest.raises(ValueError, match="step=-1"):
        curves.linear(3)(-1)


def test_durations():
    assert [curves.steps_of("warmup", v, 1000) for v in (0, 0.0, 7, 0.02, 0.5, 1e-9)] == [0, 0, 7, 20, 500, 1]
    assert curves.steps_of("warmup", 7, None) == 7
    for bad, match in [(1.5, "must lie below 1"), (-1, "number of steps"), (True, "number"), (math.nan, "number")]:
        with pytest.raises(ValueError, match=match):
            curves.steps_of("warmup", bad, 1000)
    with pytest.raises(ValueError, match="needs total_steps"):
        curves.steps_of("warmup", 0.1, None)
