"""Following an eigenbasis: one step with a report, the convergent QR algorithm, its measure, matching of columns."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from guided_descent.linalg import align, diagonalise, eigenbasis, matching, off_diagonal, refresh_basis, track_basis

F64 = torch.float64


def rotation(d: int, seed: int = 0) -> Tensor:
    return torch.linalg.qr(torch.randn(d, d, dtype=F64, generator=torch.Generator().manual_seed(seed))).Q


def drifted(q: Tensor, angle: float, seed: int = 0) -> Tensor:
    """Q turned by about ``angle``."""
    x = torch.randn(q.shape, dtype=F64, generator=torch.Generator().manual_seed(seed))
    skew = x - x.mT
    return q @ torch.linalg.matrix_exp(angle * skew / torch.linalg.matrix_norm(skew, 2))


def built(values: Tensor, seed: int = 0) -> Tensor:
    q = rotation(len(values), seed)
    return (q * values.to(F64)) @ q.mT


def batch() -> tuple[Tensor, Tensor]:
    """A good matrix, a zero and a non-finite one, and three bases."""
    a = torch.stack([built(torch.linspace(1, 2, 4)), torch.zeros(4, 4, dtype=F64), torch.full((4, 4), math.nan)])
    return a, torch.stack([rotation(4, seed) for seed in range(5, 8)])


# ---- one step ------------------------------------------------------------------------------------------------------


def test_the_sorted_step_is_refresh_basis():
    a, q = batch()
    basis, order = refresh_basis(a, q)
    tracked = track_basis(a, q)
    assert torch.equal(tracked.basis, basis)
    assert torch.equal(tracked.order, order)
    assert tracked.failed.tolist() == [False, True, True]


def test_without_the_sort_columns_keep_their_places():
    a, q = batch()
    tracked = track_basis(a[:, None], q[:, None], sort=False)
    assert tracked.order.tolist() == [[[0, 1, 2, 3]]] * 3
    assert tracked.failed.tolist() == [[False], [True], [True]]
    assert torch.allclose(tracked.basis[0, 0], torch.linalg.qr(a[0] @ q[0]).Q, atol=1e-13)
    assert torch.equal(tracked.basis[1:, 0], q[1:])


# ---- the measure ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("angle", [0.0, 0.1, 0.7, math.pi / 4])
@pytest.mark.parametrize("scale", [1e-35, 1.0, 1e30])
def test_off_diagonal_of_a_turned_pair(angle, scale):
    """B = RᵀΛR has the off-diagonal entries (λ₁ - λ₂) sin 2θ / 2."""
    values = torch.tensor([3.0, 1.0])
    c, s = math.cos(angle), math.sin(angle)
    q = torch.tensor([[c, -s], [s, c]])
    expected = math.sqrt(2) * abs((values[0] - values[1]) * math.sin(2 * angle) / 2) / values.norm()
    assert float(off_diagonal(torch.diag(values) * scale, q)) == pytest.approx(float(expected), abs=1e-6)


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 8), st.integers(0, 10**6))
def test_off_diagonal_is_a_part_of_the_norm(d, seed):
    a = torch.randn(2, 3, d, d, dtype=F64, generator=torch.Generator().manual_seed(seed))
    a = a + a.mT
    q = torch.stack([rotation(d, seed + i) for i in range(6)]).view(2, 3, d, d)
    found = off_diagonal(a, q)
    assert found.shape == (2, 3)
    b = q.mT @ a @ q
    outside = b - torch.diag_embed(b.diagonal(dim1=-2, dim2=-1))
    assert torch.allclose(found, outside.norm(dim=(-2, -1)) / a.norm(dim=(-2, -1)), atol=1e-13)
    assert bool((off_diagonal(a, eigenbasis(a).basis) < 1e-13).all())


def test_off_diagonal_of_zero_and_broken_matrices():
    a, q = batch()
    found = off_diagonal(a, q)
    assert 0.0 < float(found[0]) < 1.0
    assert found[1:].tolist() == [0.0, math.inf]
    assert float(off_diagonal(torch.eye(2) * math.inf, torch.eye(2))) == math.inf
    assert off_diagonal(torch.eye(2).bfloat16(), torch.eye(2).bfloat16()).dtype == torch.float32


# ---- the QR algorithm ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tol", [0.1, 1e-2, 1e-6, 1e-10])
def test_diagonalise_reaches_its_tolerance(tol):
    values = torch.logspace(0, -3, 12, dtype=F64)
    a, q = built(values), drifted(rotation(12), 0.2)
    found = diagonalise(a, q, tol, max_steps=200)
    assert float(found.error) <= tol * (1 + 1e-9)
    assert float(found.error) == pytest.approx(float(off_diagonal(a, found.basis)), abs=1e-14)
    assert torch.allclose(found.basis.mT @ found.basis, torch.eye(12, dtype=F64), atol=1e-13)
    assert torch.allclose(found.values, torch.diag(found.basis.mT @ a @ found.basis), atol=1e-14)
    if tol < 1e-9:
        assert torch.allclose(found.values, values, atol=1e-10)


def test_diagonalise_is_the_published_loop():
    a, q = built(torch.tensor([9.0, 5.0, 2.0, 1.0])), drifted(rotation(4), 0.3)
    found = diagonalise(a, q, tol=1e-3)
    q = q[:, found.order]
    b, steps = q.mT @ a @ q, 0
    while (b - torch.diag(torch.diag(b))).norm() > 1e-3 * b.norm():
        turn, r = torch.linalg.qr(b)
        b, q, steps = r @ turn, q @ turn, steps + 1
    assert int(found.steps) == steps > 0
    assert torch.allclose(found.basis, q, atol=1e-12)


def test_a_good_basis_is_kept_and_sorted():
    values = torch.tensor([1.0, 5.0, 3.0, 2.0])
    q = rotation(4, seed=1)
    found = diagonalise((q * values.to(F64)) @ q.mT, q)
    assert found.order.tolist() == [1, 2, 3, 0]
    assert torch.equal(found.basis, q[:, found.order])
    assert torch.allclose(found.values, torch.tensor([5.0, 3.0, 2.0, 1.0], dtype=F64), atol=1e-13)
    assert int(found.steps) == 0


def test_each_matrix_of_a_batch_stops_by_itself():
    values = torch.tensor([8.0, 4.0, 2.0, 1.0])
    a = torch.stack([built(values)] * 3)
    q = torch.stack([drifted(rotation(4), angle) for angle in (1e-4, 0.1, 0.6)])
    found = diagonalise(a[:, None], q[:, None], tol=1e-3)
    assert found.basis.shape == (3, 1, 4, 4)
    assert found.steps.shape == found.error.shape == found.failed.shape == (3, 1)
    steps = found.steps.flatten().tolist()
    assert steps[0] == 0 < steps[1] < steps[2]
    for i in range(3):
        alone = diagonalise(a[i], q[i], tol=1e-3)
        assert torch.allclose(alone.basis, found.basis[i, 0], atol=1e-13)
        assert int(alone.steps) == steps[i]


def test_diagonalise_keeps_what_it_cannot_improve():
    a, q = batch()
    found = diagonalise(a, q, tol=1e-3)
    assert found.failed.tolist() == [False, True, True]
    assert torch.equal(found.basis[1:], q[1:])
    assert not found.values[1:].any()
    assert found.error[1:].tolist() == [0.0, math.inf]
    assert found.order[1:].tolist() == [[0, 1, 2, 3]] * 2


def test_diagonalise_says_what_too_few_steps_leave():
    a, q = built(torch.linspace(1, 2, 8)), rotation(8, 3)
    found = diagonalise(a, q, tol=1e-12, max_steps=2)
    assert int(found.steps) == 2
    assert float(found.error) > 1e-3
    assert not found.failed


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("scale", [1e-25, 1e25])
def test_diagonalise_in_narrow_dtypes(dtype, scale):
    a = (built(torch.logspace(0, -6, 8, dtype=F64)) * scale).to(dtype)
    found = diagonalise(a, rotation(8, 2).to(dtype))
    assert found.basis.dtype == dtype
    assert found.values.dtype == torch.float32
    assert float(found.error) < 0.05
    exact = eigenbasis(a).values
    assert float((found.values - exact).abs().max() / exact[0]) < 0.02


# ---- matching ------------------------------------------------------------------------------------------------------


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 12), st.integers(0, 10**6))
def test_matching_takes_the_largest_overlap_first(d, seed):
    old, new = rotation(d, seed), rotation(d, seed + 1)
    overlap = (old.mT @ new).abs()
    expected = torch.full((d,), -1)
    for _ in range(d):
        i, j = divmod(int(overlap.argmax()), d)
        expected[j] = i
        overlap[i], overlap[:, j] = -1.0, -1.0
    assert torch.equal(matching(old, new), expected)


@settings(max_examples=20, deadline=None)
@given(st.integers(2, 10), st.integers(0, 10**6))
def test_align_finds_a_permutation_with_signs(d, seed):
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(d, generator=generator)
    sign = torch.randint(0, 2, (d,), generator=generator).to(F64) * 2 - 1
    old = rotation(d, seed)
    new = drifted(old[:, order] * sign, 0.1, seed)
    found = align(old, new)
    assert torch.equal(found.order, order)
    assert torch.equal(found.sign, sign)
    x = torch.randn(3, d, dtype=F64, generator=torch.Generator().manual_seed(seed))
    carried = (x @ old)[:, found.order] * found.sign
    assert bool(((x @ new - carried).norm(dim=-1) <= 0.101 * x.norm(dim=-1)).all())  # the drift, and no more


def test_matching_of_batches_ties_and_broken_columns():
    old = torch.stack([rotation(5, s) for s in range(6)]).view(2, 3, 5, 5)
    new = torch.stack([rotation(5, s + 9) for s in range(6)]).view(2, 3, 5, 5)
    found = align(old, new)
    assert found.order.shape == found.sign.shape == (2, 3, 5)
    for i in range(2):
        for j in range(3):
            assert torch.equal(found.order[i, j], matching(old[i, j], new[i, j]))
    hadamard = torch.tensor([[1.0, 1, 1, 1], [1, -1, 1, -1], [1, 1, -1, -1], [1, -1, -1, 1]]) / 2
    assert matching(torch.eye(4), hadamard).tolist() == [0, 1, 2, 3]  # every overlap is 1/2
    broken = torch.eye(3)
    broken[0, 1] = math.nan
    assert sorted(matching(torch.eye(3), broken).tolist()) == [0, 1, 2]


def test_tracking_errors_say_the_rule():
    for function in (track_basis, diagonalise, off_diagonal, matching, align):
        with pytest.raises(ValueError, match="both must be the same"):
            function(torch.eye(3), torch.eye(4))
    with pytest.raises(ValueError, match=r"tol=2.0 must lie in \(0, 1\)"):
        diagonalise(torch.eye(2), torch.eye(2), tol=2.0)
    with pytest.raises(ValueError, match="max_steps=0 must be"):
        diagonalise(torch.eye(2), torch.eye(2), max_steps=0)
