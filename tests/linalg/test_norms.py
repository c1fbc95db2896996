"""Bounds of the spectral norm against the singular value decomposition."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from guided_descent.linalg import power_iteration, spectral_norm_bound
from guided_descent.linalg.norms import full_float32

F64 = torch.float64


def gauss(*shape: int, seed: int = 0, dtype: torch.dtype = F64) -> Tensor:
    return torch.randn(*shape, dtype=F64, generator=torch.Generator().manual_seed(seed)).to(dtype)


def norm(a: Tensor) -> Tensor:
    return torch.linalg.matrix_norm(a.to(F64), 2)


@settings(max_examples=60, deadline=None)
@given(
    st.integers(1, 9),
    st.integers(1, 9),
    st.integers(1, 9),
    st.integers(0, 4),
    st.floats(-25, 25),
    st.sampled_from([torch.float32, F64]),
    st.integers(0, 10**6),
)
def test_the_bounds_enclose_the_norm(m, n, rank, squarings, exponent, dtype, seed):
    a = (gauss(m, rank, seed=seed) @ gauss(rank, n, seed=seed + 1) * 10.0**exponent).to(dtype)
    exact = float(norm(a))
    above = float(spectral_norm_bound(a, squarings))
    below = float(power_iteration(a, 15))
    assert above >= exact * (1 - 1e-14)
    assert below <= exact * (1 + 4 * torch.finfo(dtype).eps * math.sqrt(m * n) + 1e-14)
    if squarings:
        assert above <= exact * min(m, n) ** (1 / 2 ** (squarings + 1)) * (1 + 1e-4)


def test_the_upper_bound_is_the_least_of_its_formulas():
    a = gauss(7, 5)
    frobenius = a.norm()
    holder = (a.abs().sum(0).max() * a.abs().sum(1).max()).sqrt()
    free = torch.minimum(frobenius, holder)
    assert float(spectral_norm_bound(a)) == pytest.approx(float(free), rel=1e-13)
    for s in (1, 2, 3):
        k = 2 ** (s - 1)
        schatten = torch.linalg.matrix_norm(torch.linalg.matrix_power(a.mT @ a, k)) ** (1 / (2 * k))
        assert float(spectral_norm_bound(a, s)) == pytest.approx(float(torch.minimum(free, schatten)), rel=1e-13)
    sparse = torch.diag(torch.ones(9, dtype=F64))  # Hölder wins: ‖I‖_F = 3
    assert float(spectral_norm_bound(sparse)) == pytest.approx(1.0, rel=1e-13)


def test_squarings_converge_to_the_norm_and_power_iteration_from_below():
    a = gauss(20, 30)
    exact = float(norm(a))
    above = [float(spectral_norm_bound(a, s)) for s in range(9)]
    assert above == sorted(above, reverse=True)
    assert above[8] == pytest.approx(exact, rel=1e-2)
    below = [float(power_iteration(a, s)) for s in (1, 4, 20, 200)]
    assert below == sorted(below)
    assert below[2] == pytest.approx(exact, rel=0.03)
    assert below[3] == pytest.approx(exact, rel=1e-4)


@pytest.mark.parametrize("bound", [spectral_norm_bound, lambda a: spectral_norm_bound(a, 3), power_iteration])
def test_batches_zeros_and_half_precision(bound):
    a = gauss(3, 2, 4, 6)
    a[1, 0] = 0.0
    found = bound(a)
    assert found.shape == (3, 2)
    assert found[1, 0] == 0.0
    for i in range(3):
        for j in range(2):
            assert torch.allclose(found[i, j], bound(a[i, j]), rtol=1e-13)
    half = bound(a.bfloat16())
    assert half.dtype == torch.float32
    assert torch.allclose(half, bound(a.bfloat16().double()).float(), rtol=1e-5)
    assert bound(torch.zeros(0, 3, 3)).shape == (0,)
    assert bound(torch.zeros(2, 0, 3)).tolist() == [0.0, 0.0]


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_non_finite_matrices(bad):
    a = torch.stack([torch.eye(3), torch.eye(3)])
    a[1, 0, 2] = bad
    assert spectral_norm_bound(a, 2)[1] == math.inf
    assert spectral_norm_bound(a, 2)[0] == pytest.approx(1.0, rel=1e-5)
    assert power_iteration(a)[1].isnan()
    assert power_iteration(a)[0] == pytest.approx(1.0, rel=1e-5)


def test_the_start_is_the_generators():
    a = gauss(6, 6)
    state = torch.get_rng_state()
    assert torch.equal(power_iteration(a, 2), power_iteration(a, 2))
    assert torch.equal(torch.get_rng_state(), state)
    seeds = [float(power_iteration(a, 2, torch.Generator().manual_seed(s))) for s in (1, 1, 2)]
    assert seeds[0] == seeds[1] != seeds[2]


def test_full_float32_is_restored_after_an_error():
    backends = (torch.backends.cuda.matmul, torch.backends.mkldnn.matmul)
    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("medium")
        outside = [b.fp32_precision for b in backends]
        with pytest.raises(RuntimeError), full_float32():
            assert [b.fp32_precision for b in backends] == ["ieee", "ieee"]
            raise RuntimeError
        assert [b.fp32_precision for b in backends] == outside
        assert torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_float32_matmul_precision(before)


def test_norm_errors_say_the_rule():
    with pytest.raises(ValueError, match="squarings=-1 must be"):
        spectral_norm_bound(torch.eye(2), -1)
    with pytest.raises(ValueError, match="steps=0 must be"):
        power_iteration(torch.eye(2), 0)
    with pytest.raises(ValueError, match="must be real matrices"):
        spectral_norm_bound(torch.ones(3))
