"""Tokens: sums over steps whose size changes, and their inverse."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from guided_descent.schedules import Tokens

plans = st.dictionaries(st.integers(1, 60), st.integers(1, 50), max_size=5).flatmap(
    lambda later: st.integers(1, 50).map(lambda first: {0: first} | later)
)


@given(plans)
def test_sums(plan):
    tokens = Tokens(per_step=plan)
    seen = 0
    for t in range(100):
        assert tokens.before(t) == seen
        here = plan[max(first for first in plan if first <= t)]
        assert tokens.at(t) == here
        seen += here


@given(plans, st.integers(1, 5000))
def test_steps_are_the_fewest_that_see_the_total(plan, total):
    tokens = Tokens(total, per_step=plan)
    assert tokens.before(tokens.steps) >= total > tokens.before(tokens.steps - 1)


def test_one_number():
    tokens = Tokens(1000, per_step=64)
    assert (tokens.at(10**9), tokens.before(10**9), tokens.steps) == (64, 64 * 10**9, 16)
    assert tokens == Tokens(1000, per_step={0: 64})


@pytest.mark.parametrize(
    ("make", "match"),
    [
        (lambda: Tokens(10, per_step=0), "per_step=0"),
        (lambda: Tokens(10, per_step=2.5), r"per_step=2\.5"),
        (lambda: Tokens(10, per_step={0: 5, 3: 0}), r"per_step\[3\]=0"),
        (lambda: Tokens(10, per_step={1: 5}), "give it a key 0"),
        (lambda: Tokens(10, per_step={}), "give it a key 0"),
        (lambda: Tokens(10, per_step={0: 5, -1: 5}), "-1 is no optimizer step"),
        (lambda: Tokens(10, per_step={0: 5, 0.5: 5}), r"0\.5 is no optimizer step"),
        (lambda: Tokens(0, per_step=5), "total=0"),
        (lambda: Tokens(per_step=5).steps, "have no total"),
    ],
)
def test_impossible_plans_say_why(make, match):
    with pytest.raises(ValueError, match=match):
        make()
