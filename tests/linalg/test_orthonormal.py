"""Orthonormal columns against Householder's, over conditions, scales and degenerate input."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from guided_descent.linalg import orthonormal

F64 = torch.float64


def gauss(*shape: int, seed: int = 0, dtype: torch.dtype = F64) -> Tensor:
    return torch.randn(*shape, dtype=F64, generator=torch.Generator().manual_seed(seed)).to(dtype)


def conditioned(m: int, k: int, condition: float, seed: int = 0) -> Tensor:
    u, _, vh = torch.linalg.svd(gauss(m, k, seed=seed), full_matrices=False)
    return (u * torch.logspace(0, -math.log10(condition), k, dtype=F64)) @ vh


def defect(p: Tensor) -> float:
    """The largest element of PᵀP - I."""
    p = p.double()
    return float((p.mT @ p - torch.eye(p.shape[-1], dtype=F64)).abs().max())


def signed(p: Tensor, reference: Tensor) -> Tensor:
    """Columns with the signs of the reference's."""
    return p * torch.sign((p * reference).sum(-2, keepdim=True))


@pytest.mark.parametrize(("m", "k"), [(300, 7), (700, 130), (129, 1), (40, 40), (90, 5), (3, 1)])
def test_it_is_householders_up_to_signs(m: int, k: int) -> None:
    a = gauss(2, m, k)
    p, failed = orthonormal(a)
    assert not bool(failed.any())
    assert defect(p) < 1e-13
    reference = torch.linalg.qr(a).Q
    torch.testing.assert_close(signed(p, reference), reference, rtol=0.0, atol=1e-12)
    r = p.mT @ a
    assert float(r.tril(-1).abs().max()) < 1e-11


@pytest.mark.parametrize("condition", [1e1, 1e3, 1e4])
def test_float32_stays_orthonormal_where_columns_are_nearly_parallel(condition: float) -> None:
    p, failed = orthonormal(conditioned(900, 24, condition)[None].float())
    assert not bool(failed.any())
    assert defect(p) < 2e-5


@pytest.mark.parametrize("span", [1e-30, 1e-8, 1e30])
def test_lengths_of_columns_cost_nothing(span: float) -> None:
    a = gauss(1, 400, 6)
    lengths = torch.logspace(0, math.log10(span), 6, dtype=F64)
    p, failed = orthonormal((a * lengths).float())
    assert not bool(failed.any())
    reference = torch.linalg.qr(a).Q
    torch.testing.assert_close(signed(p.double(), reference), reference, rtol=0.0, atol=1e-5)


def test_singular_matrices_fall_back_alone_and_stay_orthonormal() -> None:
    a = gauss(4, 500, 6, dtype=torch.float32)
    a[1, :, 3] = a[1, :, 0] - 2 * a[1, :, 1]
    a[3] = 0.0
    p, failed = orthonormal(a)
    assert failed.tolist() == [False, True, False, False]
    assert defect(p) < 1e-5
    # what A spans is kept: P Pᵀ A = A
    torch.testing.assert_close(p @ (p.mT @ a), a, rtol=0.0, atol=1e-4)
    assert torch.equal(p[0], orthonormal(a[:1])[0][0])


def test_what_is_not_finite_is_seen() -> None:
    a = gauss(2, 300, 3)
    a[1, 5, 1] = math.nan
    p, failed = orthonormal(a)
    assert failed.tolist() == [False, True]
    assert bool(p[0].isfinite().all())
    assert bool(p[1].isnan().any())


def test_the_sketch_is_a_draw_of_its_own() -> None:
    a = gauss(1, 300, 3)
    state = torch.get_rng_state()
    first, _ = orthonormal(a)
    assert torch.equal(first, orthonormal(a)[0])
    assert torch.equal(state, torch.get_rng_state())
    other, _ = orthonormal(a, torch.Generator().manual_seed(5))
    assert not torch.equal(first, other)
    torch.testing.assert_close(signed(other, first), first, rtol=0.0, atol=1e-13)


def test_half_precision_empty_and_wrong_input() -> None:
    a = gauss(1, 300, 3).to(torch.bfloat16)
    p, _ = orthonormal(a)
    assert p.dtype == torch.bfloat16
    assert defect(p) < 0.02
    assert orthonormal(a[:0])[0].shape == (0, 300, 3)
    for wrong in (gauss(3, 2), gauss(1, 2, 3), torch.ones(1, 3, 2, dtype=torch.int64)):
        with pytest.raises(ValueError, match="must be tall real matrices"):
            orthonormal(wrong)
