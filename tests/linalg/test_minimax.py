"""The computed schedules: equioscillation, the published first step, the promised ranges; and the tables."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from guided_descent.linalg import COEFFICIENTS, cheapest, schedule
from guided_descent.linalg.coefficients import table
from guided_descent.linalg.minimax import CUSHION, best_step
from guided_descent.linalg.polar import COMPUTED


def value(triple, x):
    a, b, c = triple
    return x * (a + x * x * (b + x * x * c))


def grid(lo: float, hi: float, n: int = 20001) -> torch.Tensor:
    return torch.logspace(math.log10(lo), math.log10(hi), n, dtype=torch.float64)


@settings(max_examples=60, deadline=None)
@given(st.floats(1e-3, 0.95), st.floats(0.3, 3.0), st.sampled_from([3, 5]))
def test_equioscillation(ratio, hi, degree):
    lo = ratio * hi
    triple, error = best_step(lo, hi, degree)
    deviation = value(triple, grid(lo, hi)) - 1
    assert float(deviation.abs().max()) == pytest.approx(error, rel=1e-3, abs=1e-9)
    if error > 1e-9:  # the alternation theorem: as many extrema of one size and alternating sign as free numbers + 1
        signs = deviation[deviation.abs() > error * 0.999].sign()
        alternations = 1 + int((signs[1:] != signs[:-1]).sum())
        assert alternations == (degree + 1) // 2 + 1
    assert (triple[2] == 0.0) == (degree == 3)


def test_the_published_first_step():
    """Polar Express' first step is the best step for [0.0241, 1], centred anew for [0.001, 1], with safety 0.01."""
    lo, cushion = 1e-3, 0.02407327424182761
    triple, error = best_step(cushion, 1.0)
    k = 2.0 / (value(triple, lo) + 1.0 + error)
    published = table("polar_express_raw").triples[0]
    s = 1.01
    got = (k * triple[0] / s, k * triple[1] / s**3, k * triple[2] / s**5)
    assert got == pytest.approx(published, rel=1e-9)


@pytest.mark.parametrize("lower", [1e-3, 3e-3, 0.01, 0.05, 0.3])
@pytest.mark.parametrize("degrees", [(5,) * 5, (5, 5, 5, 3, 3), (3, 3, 3), (5,)])
def test_a_schedule_says_where_it_ends(lower, degrees):
    found = schedule(lower, degrees)
    x = grid(lower, 1.0)
    for triple in found.triples:
        x = value(triple, x)
    assert float(x.min()) >= found.low - 1e-9
    assert float(x.max()) <= found.high + 1e-9
    assert found.low + found.high == pytest.approx(2.0, abs=1e-9)


@settings(max_examples=40, deadline=None)
@given(st.floats(1e-4, 0.9), st.floats(0.02, 0.5))
def test_the_cheapest_schedule_keeps_its_promise(lower, tolerance):
    found = cheapest(lower, tolerance)
    x = grid(lower, 1.0)
    for triple in found.triples:
        x = value(triple, x)
    assert float((x - 1).abs().max()) <= tolerance + 1e-9


def test_a_wider_spectrum_never_costs_less():
    costs = [
        sum(2.7 if c else 1.9 for _, _, c in cheapest(x).triples) for x in (0.9, 0.1, 0.01, 0.004, 0.002, 0.001, 1e-4)
    ]
    assert costs == sorted(costs)
    assert [c != 0.0 for _, _, c in cheapest(1e-3).triples] == [True] * 5


def test_small_values_grow_by_the_product_of_slopes():
    found = cheapest(1e-3)
    x = 1e-9
    for triple in found.triples:
        x = value(triple, x)
    assert x / 1e-9 == pytest.approx(math.prod(a for a, _, _ in found.triples), rel=1e-6)
    assert x / 1e-9 > 3.4445**5  # more than the classic coefficients


def value_range(name: str, hi: float, lo: float = 3e-3) -> tuple[float, float]:
    x = grid(lo, hi)
    for triple in table(name).triples:
        x = value(triple, x)
    return float(x.min()), float(x.max())


@pytest.mark.parametrize("ratio", [1.0, 1.3, 1.8, 2.5, 4.0, 7.5])
@pytest.mark.parametrize("name", ["adaptive", "fast"])
def test_the_computed_schedules_beat_the_classic_one(name, ratio):
    """Above every floor the worst singular value ends closer to 1, whatever ‖X‖_F / ‖X‖_S8 was measured."""
    lower, tolerance = COMPUTED[name]
    x = grid(1e-6, 1.0 / ratio)
    ours, theirs = x * ratio, x
    for triple in cheapest(lower * ratio, tolerance).triples:
        ours = value(triple, ours)
    for triple in table("jordan").triples:
        theirs = value(triple, theirs)
    classic = value_range("jordan", 1.0)
    worst = [v.flip(0).cummin(0).values.clamp(max=classic[0]) for v in (ours, theirs)]
    assert bool((worst[0] >= worst[1]).all())
    assert classic[0] == pytest.approx(0.682, abs=1e-3)
    assert float(ours.max()) <= classic[1]


def test_no_step_presses_a_value_to_zero():
    for lower in (1e-4, 1e-3, 1e-2):
        (a, b, c), *_ = cheapest(lower).triples
        x = grid(CUSHION, 1.0)
        assert float(value((a, b, c), x).min()) > 0.9 * a * lower


@pytest.mark.parametrize("args", [(0.0, 1.0, 5), (1.0, 1.0, 5), (0.1, 1.0, 7)])
def test_impossible_steps(args):
    with pytest.raises(ValueError, match="0 < lo < hi"):
        best_step(*args)


@pytest.mark.parametrize(
    ("args", "message"),
    [((0.0,), "must lie in"), ((1.0,), "must lie in"), ((1e-9,), "exact"), ((0.1, 0.0), "tolerance=0.0 must lie in")],
)
def test_impossible_spectra(args, message):
    with pytest.raises(ValueError, match=message):
        cheapest(*args)


def test_a_range_that_is_a_point():
    for degree in (3, 5):
        triple, error = best_step(2.0, 2.0 * (1 + 1e-6), degree)
        assert value(triple, 2.0) == pytest.approx(1.0, abs=1e-5)
        assert error < 1e-5


# ---- tables --------------------------------------------------------------------------------------------------------

RANGES = {  # lower end of the domain: where its singular values end
    "jordan": (3e-3, 0.68, 1.205),
    "polar_express": (1e-3, 0.85, 1.15),
    "polar_express_raw": (1e-3, 0.99, 1.01),
    "you": (1e-2, 0.97, 1.04),
    "cans": (1e-3, 0.86, 1.12),
    "modula": (1e-3, 0.86, 1.0),
    "deepseek_v4": (1e-3, 0.999, 1.002),
    "convergent": (1e-2, 0.99, 1.0),
}


def test_every_table_has_a_range_and_a_source():
    assert sorted(RANGES) == sorted(COEFFICIENTS)
    assert all(plan.source and plan.name == name for name, plan in COEFFICIENTS.items())


@pytest.mark.parametrize("name", RANGES)
def test_ranges(name):
    plan, (lower, low, high) = table(name), RANGES[name]
    x = grid(lower, 1.0) / plan.safety
    for triple in plan.take():
        x = value(triple, x)
    assert low <= float(x.min())
    assert float(x.max()) <= high


def test_longer_runs_repeat_what_the_table_says():
    last, cycle = table("polar_express"), table("you")
    assert last.take(7)[5:] == (last.triples[-1],) * 2
    assert cycle.take(7)[5:] == cycle.triples[:2]
    assert last.take(2) == last.triples[:2]
    with pytest.raises(ValueError, match="choose one of: adaptive, exact, fast, cans, convergent"):
        table("polar")
