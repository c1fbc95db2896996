"""Bounds of the spectral norm that need no decomposition, and products in full float32."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor


@contextmanager
def full_float32() -> Iterator[None]:
    """Inside, float32 products are float32 products: no TF32 on CUDA, no bfloat16 or TF32 in oneDNN.

    The settings belong to the process; they are restored on the way out. Float64 products never need this.
    """
    backends = (torch.backends.cuda.matmul, torch.backends.mkldnn.matmul)  # type: ignore[attr-defined]
    before = [backend.fp32_precision for backend in backends]
    for backend in backends:
        backend.fp32_precision = "ieee"
    try:
        yield
    finally:
        for backend, value in zip(backends, before):
            backend.fp32_precision = value


@torch.no_grad()
def spectral_norm_bound(a: Tensor, squarings: int = 0) -> Tensor:
    """An upper bound of ‖A‖₂ for each matrix: the least of those that the given work allows.

    - no product: ‖A‖_F and sqrt(‖A‖₁ ‖A‖_∞), with the largest column and row sums of |A|;
    - ``squarings`` s ≥ 1: also ‖(AᵀA)^k‖_F^(1/2k) with k = 2^(s-1), the Schatten norm of order 4k. It exceeds ‖A‖₂ by a
      factor of r^(1/4k) at most, r the shorter side; it costs s products of the shorter side's size.

    The result is rounded up by (m + n) ε, so that rounding does not turn it into less than ‖A‖₂.

    Args:
        a: Matrices [..., m, n]; half precision is worked on in float32.
        squarings: Products to spend, s.

    Returns:
        [...] in ``a``'s dtype, float32 at least: 0 for a zero matrix, infinity for a non-finite one.

    Raises:
        ValueError: ``a`` is no batch of real matrices, or ``squarings`` is negative.

    Example:
        >>> a = torch.tensor([[2.0, -1.0], [1.0, 2.0]])  # sqrt(5) times a rotation
        >>> [round(float(spectral_norm_bound(a, s)), 3) for s in (0, 1, 2, 3)]
        [3.0, 2.659, 2.438, 2.335]
    """
    if isinstance(squarings, bool) or not isinstance(squarings, int) or squarings < 0:
        raise ValueError(f"squarings={squarings!r} must be an integer of at least 0")
    flat, peak = _scaled(a)
    m, n = flat.shape[-2:]
    if flat.numel() == 0:
        return flat.new_zeros(a.shape[:-2])
    absolute = flat.abs()
    holder = (absolute.sum(-1).amax(-1) * absolute.sum(-2).amax(-1)).sqrt()
    bound = torch.minimum(torch.linalg.matrix_norm(flat), holder)
    if squarings:
        bound = torch.minimum(bound, _gelfand(flat, squarings))
    bound = peak * bound * (1.0 + (m + n) * torch.finfo(flat.dtype).eps)
    return bound.masked_fill(~peak.isfinite(), torch.inf).reshape(a.shape[:-2])


@torch.no_grad()
def power_iteration(a: Tensor, steps: int = 20, generator: torch.Generator | None = None) -> Tensor:
    """A lower bound of ‖A‖₂ for each matrix: ‖Av‖ after v ← AᵀA v / ‖AᵀA v‖, ``steps`` times.

    It never exceeds ‖A‖₂ but for rounding, and 10 to 20 steps come within a few percent; whoever needs an upper bound
    multiplies by a safety factor of 1.01 to 1.1, or takes ``spectral_norm_bound``.

    Args:
        a: Matrices [..., m, n]; half precision is worked on in float32.
        steps: Steps, each two products with a vector.
        generator: Where the start comes from, a Gaussian vector that the whole batch shares. ``None`` takes the same
            start every time and leaves the global generator alone.

    Returns:
        [...] in ``a``'s dtype, float32 at least: 0 for a zero matrix, NaN for a non-finite one.

    Raises:
        ValueError: ``a`` is no batch of real matrices, or ``steps`` is less than 1.

    Example:
        >>> round(float(power_iteration(torch.diag(torch.tensor([3.0, -4.0])))), 4)
        4.0
    """
    if isinstance(steps, bool) or not isinstance(steps, int) or steps < 1:
        raise ValueError(f"steps={steps!r} must be an integer of at least 1")
    flat, peak = _scaled(a)
    if flat.numel() == 0:
        return flat.new_zeros(a.shape[:-2])
    generator = torch.Generator().manual_seed(0) if generator is None else generator
    v = torch.randn(flat.shape[-1], 1, dtype=torch.float64, device=generator.device, generator=generator)
    v = v.to(flat.device, flat.dtype).expand(len(flat), -1, -1)
    tiny = torch.finfo(flat.dtype).tiny
    with full_float32():
        for _ in range(steps):
            v = flat.mT @ (flat @ v)
            v = v / torch.linalg.vector_norm(v, dim=-2, keepdim=True).clamp_min(tiny)
        bound: Tensor = peak * torch.linalg.vector_norm(flat @ v, dim=(-2, -1))
    return bound.reshape(a.shape[:-2])


def _gelfand(a: Tensor, squarings: int) -> Tensor:
    """‖(AᵀA)^k‖_F^(1/2k) with k = 2^(squarings - 1), normalised on the way so that nothing over- or underflows."""
    tiny = torch.finfo(a.dtype).tiny
    bound = torch.ones_like(a[:, 0, 0])
    with full_float32():
        power = a @ a.mT if a.shape[-2] < a.shape[-1] else a.mT @ a
        for i in range(1, squarings + 1):
            norm = torch.linalg.matrix_norm(power)
            bound = bound * norm**0.5**i
            if i < squarings:
                power = power / norm.clamp_min(tiny)[:, None, None]
                power = power @ power
    return bound


def _scaled(a: Tensor) -> tuple[Tensor, Tensor]:
    """A / peak as [B, m, n] in float32 at least, and peak [B], the largest |element|; A = 0 stays 0 with peak 0."""
    if a.ndim < 2 or not a.dtype.is_floating_point:
        raise ValueError(f"a has shape {tuple(a.shape)} and dtype {a.dtype}; it must be real matrices [..., m, n]")
    flat = a.reshape(a.shape[:-2].numel(), *a.shape[-2:]).to(torch.promote_types(a.dtype, torch.float32))
    if flat.numel() == 0:
        return flat, flat.new_zeros(len(flat))
    peak = flat.abs().amax((-2, -1))
    return flat / torch.where(peak == 0, torch.ones_like(peak), peak)[:, None, None], peak
