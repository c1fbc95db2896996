"""Turbo: AOL rescaling and its four steps, against a dense reference, and what both guarantee."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from guided_descent.linalg import COEFFICIENTS, METHODS, NAMES, Workspace, polar
from guided_descent.linalg.coefficients import TURBO, table
from guided_descent.linalg.newton_schulz import Iteration, rescale, row_factors
from guided_descent.linalg.polar import _batch
from oracles import muon_family as oracle

F64 = torch.float64
SHAPES = [(12, 12), (9, 25), (25, 9), (1, 7), (7, 1)]


def gauss(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=F64, generator=torch.Generator().manual_seed(seed))


def relative(a: Tensor, b: Tensor) -> float:
    return float((a.double() - b.double()).norm() / b.double().norm())


def top(x: Tensor) -> float:
    return float(torch.linalg.matrix_norm(x.double(), 2))


def awkward(m: int, n: int, seed: int) -> Tensor:
    """Few directions, rows of very different length."""
    rank = 1 + seed % min(m, n)
    return (10.0 ** gauss(m, 1, seed=seed + 1)) * (gauss(m, rank, seed=seed) @ gauss(rank, n, seed=seed + 2))


# ---- the rescaling ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", SHAPES)
def test_rows_of_the_shorter_side_are_scaled_as_published(shape: tuple[int, int]) -> None:
    x = gauss(*shape)
    assert relative(rescale(x), oracle.aol(x)) < 1e-13
    both = torch.stack([x, 3 * gauss(*shape, seed=1)])
    torch.testing.assert_close(rescale(both), torch.stack([oracle.aol(y) for y in both]))


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 14), st.integers(1, 14), st.integers(0, 10**6))
def test_the_spectral_norm_is_at_most_one(m: int, n: int, seed: int) -> None:
    for x in (gauss(m, n, seed=seed), awkward(m, n, seed)):
        assert top(rescale(x)) <= 1 + 1e-12


def test_the_bound_is_reached_by_rank_one_and_by_orthogonal_rows() -> None:
    assert top(rescale(torch.outer(gauss(6), gauss(9, seed=1)))) == pytest.approx(1.0, abs=1e-12)
    q = torch.linalg.qr(gauss(9, 6)).Q.T
    torch.testing.assert_close(rescale(5 * q), q)


def test_a_row_of_zeros_stays_zero() -> None:
    x = gauss(5, 8)
    x[2] = 0.0
    scaled = rescale(x)
    assert bool(scaled.isfinite().all())
    assert not scaled[2].any()
    assert row_factors(torch.zeros(3, 4, 4)).tolist() == [[0.0] * 4] * 3


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", [F64, torch.float32, torch.bfloat16])
def test_the_gram_matrix_goes_along(shape: tuple[int, int], dtype: torch.dtype) -> None:
    x = (gauss(*shape) / gauss(*shape).norm()).to(dtype)
    run = Iteration(x.clone(), Workspace())
    run.rescale()
    tolerance = {F64: 1e-13, torch.float32: 1e-5, torch.bfloat16: 3e-2}[dtype]
    assert relative(run.x, rescale(x.double())) < tolerance
    kept = run._g.clone()
    run._gram()  # the first one is spared
    assert torch.equal(kept, run._g)
    run._gram()
    assert relative(kept, run._g) < tolerance


# ---- the four steps --------------------------------------------------------------------------------------------------


def mapped(x: Tensor, steps: int | None = None) -> Tensor:
    for a, b, c in TURBO.take(steps):
        x = a * x + b * x**3 + c * x**5
    return x


@pytest.mark.parametrize("steps", [4, 5, 6, 9])
def test_singular_values_end_in_the_stated_interval(steps: int) -> None:
    x = torch.linspace(0.02, 1.0, 100_001, dtype=F64)
    found = mapped(x, steps)
    assert float(found.min()) >= 0.9409
    assert float(found.max()) <= 1.0501
    if steps == 4:
        assert float(found.min()) < 0.942  # as stated, and no better
        assert float(found.max()) > 1.049
    assert float((mapped(torch.logspace(-12, 0, 10_001, dtype=F64), steps)).min()) > 0.0  # no sign flips


def test_rounding_above_one_does_no_harm() -> None:
    found = mapped(torch.linspace(1.0, 1.1, 10_001, dtype=F64))
    assert 0.94 < float(found.min()) < float(found.max()) < 1.06


def test_the_table_is_never_used_without_the_rescaling() -> None:
    assert TURBO.rescaled
    assert not any(plan.rescaled for plan in COEFFICIENTS.values())
    assert "turbo" not in COEFFICIENTS
    assert table("turbo") is TURBO
    assert "turbo" in NAMES
    with pytest.raises(ValueError, match=r"eps=1e-07 has no meaning with coefficients='turbo'; leave it None"):
        polar(torch.ones(2, 3), coefficients="turbo", eps=1e-7)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("method", METHODS)
def test_every_form_is_the_reference(shape: tuple[int, int], method: str) -> None:
    for x in (gauss(*shape), 1e-9 * awkward(*shape, seed=4)):
        assert relative(polar(x, coefficients="turbo", method=method), oracle.turbo_polar(x)) < 1e-9
    if shape[0] != shape[1]:  # of a square matrix the rows are scaled, whichever they are
        turned = polar(x.T, coefficients="turbo", method=method)
        assert relative(turned.T, polar(x, coefficients="turbo", method=method)) < 1e-9


def test_strips_and_mirrors_change_nothing() -> None:
    x = gauss(400, 460)
    expected = polar(x, coefficients="turbo", method="standard")
    for method in ("symmetric", "gram"):
        assert relative(polar(x, coefficients="turbo", method=method), expected) < 1e-9


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("dtype", [F64, torch.float32, torch.bfloat16])
def test_what_comes_out_is_nearly_orthogonal(method: str, dtype: torch.dtype) -> None:
    for seed in range(8):
        x = gauss(40, 160, seed=seed)
        values = torch.linalg.svdvals(polar(x.to(dtype), coefficients="turbo", dtype=dtype, method=method).double())
        assert float(values.min()) > 0.9
        assert float(values.max()) < 1.09
        hard = awkward(40, 60, seed).to(dtype)
        assert top(polar(hard, coefficients="turbo", dtype=dtype, method=method)) < 1.12


def test_closer_to_the_polar_factor_than_the_classic_coefficients() -> None:
    x = gauss(64, 128)
    exact = polar(x, coefficients="exact")
    error = {name: relative(polar(x, coefficients=name), exact) for name in ("turbo", "jordan", "polar_express")}
    assert error["turbo"] < 0.06 < error["polar_express"] < error["jordan"]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("dtype", [F64, torch.bfloat16])
def test_rank_one_keeps_its_sign(shape: tuple[int, int], method: str, dtype: torch.dtype) -> None:
    for seed in range(5):
        u, v = gauss(shape[0], seed=seed) ** 3, gauss(shape[1], seed=seed + 50) ** 3
        x = torch.outer(u, v)
        got = polar(x.to(dtype), coefficients="turbo", dtype=dtype, method=method).double()
        assert float((got * x).sum()) > 0.5 * float(got.norm() * x.norm())
        if dtype == F64:
            assert torch.equal(got.sign(), x.sign())
        assert 0.9 < top(got) < 1.08


@pytest.mark.parametrize("shape", [(3, 10, 24), (2, 3, 24, 10), (12, 12)])
@pytest.mark.parametrize("method", ["auto", "symmetric", "gram"])
def test_the_batched_path_of_accelerators(shape: tuple[int, ...], method: str) -> None:
    x = gauss(*shape) * 1e-20
    if len(shape) > 2:
        x.flatten(0, -3)[1] = 0.0
    work, out = Workspace(), torch.empty_like(x)
    got = _batch(x, out, TURBO.take(), TURBO.safety, F64, None, work, method, True)
    assert got is out
    assert relative(got, polar(x, coefficients="turbo")) < 1e-9
    held = work.nbytes
    _batch(x.clone(), x, TURBO.take(), TURBO.safety, F64, None, work, method, True)
    assert work.nbytes == held


@pytest.mark.parametrize("c", [1e-30, 1e-6, 1e30])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_the_scale_does_not_matter(c: float, dtype: torch.dtype) -> None:
    x = gauss(24, 60).float()
    a = polar(x, coefficients="turbo", dtype=dtype)
    assert relative(polar(x * c, coefficients="turbo", dtype=dtype), a) < 0.01
