"""Rounding of half-precision parameters: unbiased at random, nothing lost where it is kept."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from guided_descent.engine.rounding import load, rounding_slots, stochastic, store

HALVES = [torch.bfloat16, torch.float16]
VALUES = st.floats(-60_000, 60_000, width=32)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("value", [1.0, 1.0001, 0.9997, -3.3333, 1e-5, -2e-7, 12_345.678, 3e-8])
def test_the_mean_is_the_value(dtype: torch.dtype, value: float) -> None:
    count = 200_000
    w = torch.full((count,), value)
    rounded = stochastic(w, dtype, generator()).double()
    exact = float(w[0].double())
    low, high = float(rounded.min()), float(rounded.max())
    assert low <= exact <= high
    deviation = math.sqrt(max((exact - low) * (high - exact), 0.0) / count)  # of the mean of a two-point draw
    assert abs(float(rounded.mean()) - exact) <= 5 * deviation + 1e-12 * abs(exact)
    assert len(rounded.unique()) <= 2


@pytest.mark.parametrize("dtype", HALVES)
@settings(max_examples=150, deadline=None)
@given(value=VALUES, seed=st.integers(0, 1000))
def test_only_the_two_neighbours_are_drawn(dtype: torch.dtype, value: float, seed: int) -> None:
    w = torch.full((64,), value)
    near = w.to(dtype)
    rounded = stochastic(w, dtype, generator(seed))
    up = torch.nextafter(near, torch.full_like(near, math.inf))
    down = torch.nextafter(near, torch.full_like(near, -math.inf))
    assert bool(((rounded == near) | (rounded == up) | (rounded == down)).all())
    error = (rounded.double() - w.double()).abs().max()
    # the gaps on both sides differ at powers of two
    gap = torch.maximum(up.double() - near.double(), near.double() - down.double()).max()
    assert float(error) <= float(gap) * 1.0001 or not math.isfinite(float(up[0]))


@pytest.mark.parametrize("dtype", HALVES)
def test_what_is_representable_stays(dtype: torch.dtype) -> None:
    w = torch.randn(1000).to(dtype).float()
    assert torch.equal(stochastic(w, dtype, generator()).float(), w)


@pytest.mark.parametrize("dtype", HALVES)
def test_non_finite_values_stay(dtype: torch.dtype) -> None:
    rounded = stochastic(torch.tensor([math.nan, math.inf, -math.inf]), dtype, generator())
    assert math.isnan(rounded[0])
    assert rounded[1:].tolist() == [math.inf, -math.inf]


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize(("mode", "tolerance"), [("master", 0.0), ("compensated", 2e-5)])
def test_kept_bits_come_back(dtype: torch.dtype, mode: str, tolerance: float) -> None:
    w = torch.randn(500)
    p = torch.zeros(500, dtype=dtype)
    [slot] = rounding_slots(mode, dtype).values()
    extra = torch.zeros(500, dtype=slot.dtype)
    store(p, w.clone(), extra, mode, None)
    assert torch.equal(p, w.to(dtype))
    back = torch.empty(500)
    load(back, p, extra, mode)
    assert float((back - w).abs().max()) <= tolerance * float(w.abs().max())


def test_a_parameter_that_somebody_wrote_wins_over_the_master() -> None:
    w, p, master = torch.tensor([1.001, 2.0]), torch.zeros(2, dtype=torch.bfloat16), torch.zeros(2)
    store(p, w, master, "master", None)
    p[1] = 5.0
    back = torch.empty(2)
    load(back, p, master, "master")
    assert back.tolist() == pytest.approx([1.001, 5.0])


def test_full_precision_needs_no_state() -> None:
    for mode in ("nearest", "stochastic", "compensated", "master"):
        assert rounding_slots(mode, torch.float32) == {}
        assert rounding_slots(mode, torch.float64) == {}
    assert rounding_slots("nearest", torch.bfloat16) == rounding_slots("stochastic", torch.bfloat16) == {}
