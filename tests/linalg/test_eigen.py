"""Eigenbases: reconstruction in float64, degenerate and broken input, failing solvers, and SOAP's warm-started step."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from guided_descent.linalg import eigenbasis, refresh_basis
from guided_descent.linalg.eigen import FAILED

F64 = torch.float64


def rotation(d: int, seed: int = 0) -> Tensor:
    return torch.linalg.qr(torch.randn(d, d, dtype=F64, generator=torch.Generator().manual_seed(seed))).Q


def symmetric(values: Tensor, seed: int = 0) -> Tensor:
    q = rotation(len(values), seed)
    return (q * values.to(F64)) @ q.mT


def identity_error(q: Tensor) -> float:
    eye = torch.eye(q.shape[-1], dtype=F64)
    return float((q.mT.to(F64) @ q.to(F64) - eye).abs().max())


SPECTRA = {
    "well": torch.linspace(1, 2, 8),
    "kappa 1e12": torch.logspace(0, -12, 8, dtype=F64),
    "repeated": torch.tensor([3.0, 3.0, 3.0, 1.0, 1.0, 0.0, 0.0, 0.0]),
    "rank one": torch.tensor([5.0, 0, 0, 0, 0, 0, 0, 0]),
    "indefinite": torch.linspace(-1, 2, 8),
    "zero": torch.zeros(8),
}


@pytest.mark.parametrize("spectrum", SPECTRA)
@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 2e-6), (F64, 1e-13)])
@pytest.mark.parametrize("scale", [1e-25, 1.0, 1e25])
def test_reconstruction(spectrum, dtype, bound, scale):
    a = (symmetric(SPECTRA[spectrum]) * scale).to(dtype)
    values, q, fallbacks = eigenbasis(a)
    assert int(fallbacks) == 0
    assert values.dtype == q.dtype == dtype
    assert identity_error(q) < 10 * bound
    back = (q.to(F64) * values.to(F64)) @ q.mT.to(F64)
    assert float((back - a.to(F64)).abs().max()) <= 10 * bound * scale
    assert bool((values[:-1] >= values[1:]).all())
    ascending = eigenbasis(a, descending=False)
    assert torch.equal(ascending.values.flip(-1), values)
    assert torch.equal(ascending.basis.flip(-1), q)


def test_half_precision_is_solved_in_float32():
    a = symmetric(torch.linspace(1, 2, 6)).bfloat16()
    values, q, _ = eigenbasis(a)
    assert values.dtype == q.dtype == torch.float32
    assert identity_error(q) < 1e-5


def test_rounding_asymmetry_is_removed():
    a = symmetric(torch.linspace(1, 2, 6))
    skew = torch.triu(torch.full((6, 6), 1e-3, dtype=F64), 1)
    expected = eigenbasis(a + (skew + skew.mT) / 2).values
    assert torch.allclose(eigenbasis(a + skew).values, expected, atol=1e-14)


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 9), st.integers(1, 3), st.integers(1, 3), st.integers(0, 10**6))
def test_a_batch_is_its_matrices(d, b, e, seed):
    x = torch.randn(b, e, d, d + 2, dtype=F64, generator=torch.Generator().manual_seed(seed))
    a = x @ x.mT
    values, q, fallbacks = eigenbasis(a)
    assert (values.shape, q.shape, fallbacks.shape) == ((b, e, d), (b, e, d, d), (b, e))
    for i in range(b):
        for j in range(e):
            alone = eigenbasis(a[i, j])
            assert torch.allclose(values[i, j], alone.values, rtol=1e-10)
            assert torch.allclose((q[i, j] * values[i, j]) @ q[i, j].mT, a[i, j], atol=1e-11)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_broken_row_is_reported_and_stays_alone(bad):
    a = torch.stack([symmetric(torch.linspace(1, 2, 5), seed) for seed in range(3)])
    expected = eigenbasis(a)
    a[1, 2, 2] = bad
    found = eigenbasis(a)
    assert found.failed.tolist() == [False, True, False]
    assert found.fallbacks.tolist() == [0, FAILED, 0]
    assert torch.equal(found.basis[1], torch.eye(5, dtype=F64))
    assert not found.values[1].any()
    for row in (0, 2):
        assert torch.allclose(found.values[row], expected.values[row], rtol=1e-12)


def _refuse(monkeypatch, refuses) -> list[tuple[torch.Size, torch.dtype]]:
    """Make torch.linalg.eigh raise where ``refuses(a)``; returns the log of calls."""
    eigh, calls = torch.linalg.eigh, []

    def patched(a):
        calls.append((a.shape, a.dtype))
        if refuses(a):
            raise torch.linalg.LinAlgError("failed to converge")
        return eigh(a)

    monkeypatch.setattr(torch.linalg, "eigh", patched)
    return calls


def _batch() -> Tensor:
    return torch.stack([symmetric(torch.linspace(1, 2, 5), seed) for seed in range(3)]).float()


def test_a_failing_batch_is_solved_row_by_row(monkeypatch):
    expected = eigenbasis(_batch())
    calls = _refuse(monkeypatch, lambda a: a.ndim == 3)
    found = eigenbasis(_batch())
    assert found.fallbacks.tolist() == [0, 0, 0]
    assert torch.allclose(found.values, expected.values, atol=1e-6)
    assert len(calls) == 4


def test_jitter_then_float64_then_give_up(monkeypatch):
    a = _batch()
    expected = eigenbasis(a)
    seen: list[Tensor] = []

    def until_jittered(m: Tensor) -> bool:
        seen.append(m)
        return m.ndim == 3 or len([s for s in seen if s.ndim == 2]) % 2 == 1

    _refuse(monkeypatch, until_jittered)
    jittered = eigenbasis(a)
    assert jittered.fallbacks.tolist() == [1, 1, 1]
    assert torch.allclose(jittered.values, expected.values, atol=1e-5)
    monkeypatch.undo()

    calls = _refuse(monkeypatch, lambda m: m.dtype == torch.float32)
    wide = eigenbasis(a)
    assert wide.fallbacks.tolist() == [2, 2, 2]
    assert torch.allclose(wide.values, expected.values, atol=1e-6)
    assert len(calls) == 1 + 3 * 3
    monkeypatch.undo()

    _refuse(monkeypatch, lambda m: True)
    none = eigenbasis(a)
    assert none.failed.all()
    assert torch.equal(none.basis, torch.eye(5).repeat(3, 1, 1))


def test_non_finite_output_of_the_solver_counts_as_failure(monkeypatch):
    eigh = torch.linalg.eigh

    def poisoned(a):
        values, basis = eigh(a)
        if a.ndim == 3:
            values[1] = math.nan
        return values, basis

    monkeypatch.setattr(torch.linalg, "eigh", poisoned)
    found = eigenbasis(_batch())
    assert bool(found.values.isfinite().all())
    assert not found.failed.any()


# ---- SOAP's step ---------------------------------------------------------------------------------------------------


def test_refresh_is_the_published_step():
    a = symmetric(torch.tensor([1.0, 5.0, 3.0, 2.0, 4.0]))
    q = rotation(5, seed=3)
    new, order = refresh_basis(a, q)
    estimate = torch.diag(q.mT @ a @ q)
    expected = torch.argsort(estimate, descending=True)
    assert torch.equal(order, expected)
    reference = torch.linalg.qr(a @ q[:, expected]).Q
    assert torch.allclose(new, reference, atol=1e-13)
    assert identity_error(new) < 1e-13


def test_an_exact_basis_stays_and_the_order_is_returned():
    values = torch.tensor([1.0, 5.0, 3.0, 2.0])
    q = rotation(4, seed=1)
    a = (q * values.to(F64)) @ q.mT
    new, order = refresh_basis(a, q)
    assert order.tolist() == [1, 2, 3, 0]
    assert torch.allclose((new.mT @ q[:, order]).abs(), torch.eye(4, dtype=F64), atol=1e-12)


def test_repeated_steps_converge_to_the_eigenbasis():
    a = symmetric(torch.tensor([16.0, 8.0, 4.0, 2.0, 1.0]))
    q = torch.eye(5, dtype=F64)
    for _ in range(60):
        q, order = refresh_basis(a, q)
    assert order.tolist() == [0, 1, 2, 3, 4]
    assert torch.allclose((q.mT @ eigenbasis(a).basis).abs(), torch.eye(5, dtype=F64), atol=1e-10)


@pytest.mark.parametrize("spectrum", ["kappa 1e12", "repeated", "rank one"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, F64])
@pytest.mark.parametrize("scale", [1e-25, 1.0, 1e25])
def test_refresh_stays_orthonormal(spectrum, dtype, scale):
    a = (symmetric(SPECTRA[spectrum]) * scale).to(dtype)
    q = rotation(8, seed=5).to(dtype)
    for _ in range(5):
        q, order = refresh_basis(a, q)
    assert q.dtype == dtype
    assert identity_error(q) < {torch.bfloat16: 0.02, torch.float32: 1e-5, F64: 1e-13}[dtype]
    assert sorted(order.tolist()) == list(range(8))


def test_refresh_of_a_batch_keeps_the_rows_it_cannot_improve():
    a = torch.stack(
        [symmetric(torch.linspace(1, 2, 4)), torch.zeros(4, 4, dtype=F64), torch.eye(4, dtype=F64) * math.nan]
    )
    q = torch.stack([rotation(4, s) for s in range(3)])
    new, order = refresh_basis(a[:, None], q[:, None])
    assert new.shape == (3, 1, 4, 4)
    alone, first = refresh_basis(a[0], q[0])
    assert torch.allclose(new[0, 0], alone, atol=1e-13)
    assert torch.equal(order[0, 0], first)
    for row in (1, 2):
        assert torch.equal(new[row, 0], q[row])
        assert order[row, 0].tolist() == [0, 1, 2, 3]


def test_errors_say_the_rule():
    with pytest.raises(ValueError, match="must be real and square"):
        eigenbasis(torch.ones(2, 3))
    with pytest.raises(ValueError, match="must be real and square"):
        eigenbasis(torch.ones(2, 2, dtype=torch.int64))
    with pytest.raises(ValueError, match="both must be the same"):
        refresh_basis(torch.eye(3), torch.eye(4))
