"""Orthonormal columns of tall matrices: by randomized Cholesky QR, or by Householder where that does not do."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch._compile import _disable_dynamo

from guided_descent.linalg.norms import full_float32

#: Rows of a sketch over the columns of the matrix, and the multiple to which they are rounded up.
OVERSAMPLE, MULTIPLE = 1.25, 128


@_disable_dynamo
@torch.no_grad()
def orthonormal(a: Tensor, generator: torch.Generator | None = None) -> tuple[Tensor, Tensor]:
    """P with orthonormal columns and A = P R, R upper triangular, for each matrix of a batch; opaque to compilation.

    Up to the signs of its columns P is unique where A has full rank. A Gaussian sketch S A [s, k] with
    s = 128 ceil(1.25 k / 128) rows gives a first R₁ (Householder), so that A R₁⁻¹ is well conditioned; the Cholesky
    factor of its Gram matrix then makes it orthonormal. All of it but the small QR are products and triangular solves.
    Matrices with no more than s rows take Householder at once. Columns are scaled before, so that the lengths of A's
    columns cost no accuracy.

    Args:
        a: Matrices [B, m, k] with m >= k; half precision is worked on in float32.
        generator: Where the sketch comes from, the same for the whole batch; ``None`` takes the same one every time and
            leaves the global generator alone.

    Returns:
        P [B, m, k], and [B] whether the Cholesky route failed and Householder did the work: A is singular to working
        precision (columns of P beyond the rank are then any that complete the others), or not finite. A = 0 gives some
        orthonormal columns and is no failure.

    Raises:
        ValueError: ``a`` is no batch of tall real matrices.

    Source:
        Balabanov 2022, arXiv:2210.09953; Ahn et al. 2025, arXiv:2504.05295.

    Example:
        >>> p, failed = orthonormal(torch.tensor([[[3.0], [4.0]]]))
        >>> [round(abs(x), 3) for x in p[0, :, 0].tolist()], failed.tolist()
        ([0.6, 0.8], [False])
    """
    if a.ndim != 3 or not a.dtype.is_floating_point or a.shape[1] < a.shape[2]:
        raise ValueError(f"a has shape {tuple(a.shape)} and dtype {a.dtype}; it must be tall real matrices [B, m, k]")
    wide = a.to(torch.promote_types(a.dtype, torch.float32))
    rows = MULTIPLE * math.ceil(OVERSAMPLE * a.shape[2] / MULTIPLE)
    failed = torch.zeros(len(a), dtype=torch.bool, device=a.device)
    if a.numel() == 0:
        return torch.zeros_like(a), failed
    peak = torch.maximum(wide.amax(1, keepdim=True), -wide.amin(1, keepdim=True))
    wide = wide / torch.where(peak == 0, 1.0, peak)
    with full_float32():
        if rows >= a.shape[1]:
            return _householder(wide).to(a.dtype), failed
        p, good = _cholesky(wide, rows, generator)
    if not bool(good.all()):
        p[~good] = _householder(wide[~good])
        failed = ~good & (peak != 0).any(2)[:, 0]
    return p.to(a.dtype), failed


def _householder(a: Tensor) -> Tensor:
    q: Tensor = torch.linalg.qr(a).Q
    return q


def _cholesky(a: Tensor, rows: int, generator: torch.Generator | None) -> tuple[Tensor, Tensor]:
    """P, and whether it can be trusted [B]."""
    generator = torch.Generator(a.device).manual_seed(0) if generator is None else generator
    sketch = torch.randn(rows, a.shape[1], dtype=a.dtype, device=a.device, generator=generator)
    r = torch.linalg.qr(torch.matmul(sketch, a), mode="r").R
    pivots = r.diagonal(dim1=1, dim2=2).abs()
    p = torch.linalg.solve_triangular(r, a, upper=True, left=False)
    lower, info = torch.linalg.cholesky_ex(p.mT @ p)
    p = torch.linalg.solve_triangular(lower.mT, p, upper=True, left=False)
    regular = pivots.amin(1) > math.sqrt(a.shape[1]) * torch.finfo(a.dtype).eps * pivots.amax(1)
    return p, regular & (info == 0) & p.isfinite().flatten(1).all(1)
