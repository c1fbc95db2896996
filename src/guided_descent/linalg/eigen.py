"""Eigenbases of symmetric factors that survive degenerate, huge, tiny and broken input."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Eigen(NamedTuple):
    """An eigenbasis per matrix, and how it was come by.

    Attributes:
        values: Eigenvalues [..., d].
        basis: Orthonormal eigenvectors [..., d, d], one a column, in the order of ``values``.
        fallbacks: int8 [...]: 0 solved at once, 1 after a jitter of the diagonal, 2 in float64, and ``FAILED`` (3) not
            at all (non-finite input, or the solver gave up): values are then 0, the basis is the identity, and the
            caller should keep its last good basis.
    """

    values: Tensor
    basis: Tensor
    fallbacks: Tensor

    @property
    def failed(self) -> Tensor:
        """Bool [...]: the rows that have no basis."""
        return self.fallbacks == FAILED


FAILED = 3


def eigenbasis(a: Tensor, *, descending: bool = True) -> Eigen:
    """Eigenvalues and eigenvectors of each symmetric matrix: A = Q diag(λ) Qᵀ.

    A is symmetrised and divided by its mean eigenvalue trace/d, so that neither tiny nor huge factors trouble the
    solver. A matrix that the solver refuses is tried again with a jitter, then in float64, alone: its neighbours in
    the batch keep their result.

    Args:
        a: Symmetric matrices [..., d, d], any real floating dtype; half precision is solved in float32.
        descending: Largest eigenvalue first (SOAP's order); False gives LAPACK's ascending order.

    Returns:
        ``Eigen(values [..., d], basis [..., d, d], fallbacks [...])`` in ``a``'s dtype, float32 at least.

    Raises:
        ValueError: ``a`` is not a batch of square matrices.

    Example:
        >>> values, basis, fallbacks = eigenbasis(torch.diag(torch.tensor([1.0, 4.0])))
        >>> values.tolist(), int(fallbacks)
        ([4.0, 1.0], 0)
    """
    flat = _square(a)
    scale = _scale(flat)
    flat = flat / scale[:, None, None]
    flat = torch.lerp(flat, flat.mT, 0.5)
    values, basis, fallbacks = _solve(flat)
    values = values * scale[:, None]
    if descending:
        values, basis = values.flip(-1), basis.flip(-1)
    basis[fallbacks == FAILED] = torch.eye(basis.shape[-1], dtype=basis.dtype, device=basis.device)
    lead = a.shape[:-2]
    return Eigen(values.reshape(*lead, -1), basis.reshape(a.shape), fallbacks.reshape(lead))


def refresh_basis(a: Tensor, q: Tensor) -> tuple[Tensor, Tensor]:
    """One warm-started step towards the eigenbasis of A: sort Q by diag(QᵀAQ), descending, then Q ← qr(A Q).

    Orthogonal iteration: far cheaper than an eigendecomposition, and exact when Q already is the eigenbasis.

    Args:
        a: Symmetric matrices [..., d, d].
        q: Their last orthonormal bases [..., d, d].

    Returns:
        The new bases [..., d, d] in ``q``'s dtype, and ``order`` [..., d] (int64): column j of the sorted basis is
        column ``order[..., j]`` of ``q``. What is stored in the old basis follows by that index. A zero matrix, or one
        with a non-finite result, keeps its ``q``, in its old order.

    Raises:
        ValueError: The shapes differ or are not square.

    Source:
        Vyas et al. 2024, arXiv:2409.11321 (SOAP), algorithm 4.

    Example:
        >>> q, order = refresh_basis(torch.diag(torch.tensor([1.0, 4.0])), torch.eye(2))
        >>> order.tolist(), q.abs().tolist()
        ([1, 0], [[0.0, 1.0], [1.0, 0.0]])
    """
    if a.shape != q.shape:
        raise ValueError(f"a has shape {tuple(a.shape)} and q {tuple(q.shape)}; both must be the same [..., d, d]")
    flat, old = _square(a), _square(q)
    flat = flat / _scale(flat)[:, None, None]
    product = flat @ old
    estimate = (old * product).sum(-2)
    order = estimate.argsort(dim=-1, descending=True, stable=True)
    columns = order.unsqueeze(-2).expand_as(product)
    new = torch.linalg.qr(product.gather(-1, columns)).Q
    good = new.isfinite().flatten(1).all(-1) & estimate.isfinite().all(-1) & (flat != 0).flatten(1).any(-1)
    identity = torch.arange(order.shape[-1], device=order.device).expand_as(order)
    order = torch.where(good[:, None], order, identity)
    new = torch.where(good[:, None, None], new, old)
    return new.to(q.dtype).reshape(q.shape), order.reshape(q.shape[:-1])


def _square(a: Tensor) -> Tensor:
    """As [B, d, d] in float32 at least."""
    if a.ndim < 2 or a.shape[-1] != a.shape[-2] or not a.dtype.is_floating_point:
        raise ValueError(f"a has shape {tuple(a.shape)} and dtype {a.dtype}; it must be real and square, [..., d, d]")
    return a.reshape(-1, *a.shape[-2:]).to(torch.promote_types(a.dtype, torch.float32))


def _scale(a: Tensor) -> Tensor:
    """trace/d of each matrix [B]; 1 where that is useless (a zero or non-finite matrix)."""
    mean = a.diagonal(dim1=-2, dim2=-1).abs().mean(-1)
    return torch.where((mean > torch.finfo(a.dtype).tiny) & mean.isfinite(), mean, torch.ones_like(mean))


def _solve(a: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Ascending eigenpairs of a symmetric batch [B, d, d]; the whole batch at once, then the rows it cost, alone."""
    b, d = a.shape[:2]
    finite = a.isfinite().flatten(1).all(-1)
    eye = torch.eye(d, dtype=a.dtype, device=a.device)
    fallbacks = torch.zeros(b, dtype=torch.int8, device=a.device)
    a = torch.where(finite[:, None, None], a, eye)
    pair = _attempt(a)
    if pair is None:
        values, basis = a.new_zeros(b, d), eye.repeat(b, 1, 1)
        good = torch.zeros_like(finite)
    else:
        values, basis = pair
        good = _finite(pair)
    for row in (finite & ~good).nonzero().flatten().tolist():
        values[row], basis[row], fallbacks[row] = _retry(a[row])
    values[~finite], basis[~finite], fallbacks[~finite] = 0.0, eye, FAILED
    return values, basis, fallbacks


def _retry(a: Tensor) -> tuple[Tensor, Tensor, int]:
    """One matrix that the batch did not solve: alone, jittered, in float64; what worked, or the identity."""
    eye = torch.eye(len(a), dtype=a.dtype, device=a.device)
    jitter = torch.finfo(a.dtype).eps * a.abs().amax()
    for kind, matrix in ((0, a), (1, a + jitter * eye), (2, a.double())):
        pair = _attempt(matrix)
        if pair is not None and bool(_finite(pair)):
            return pair[0].to(a.dtype), pair[1].to(a.dtype), kind
    return torch.zeros_like(a[0]), eye, FAILED


def _attempt(a: Tensor) -> tuple[Tensor, Tensor] | None:
    try:
        values, basis = torch.linalg.eigh(a)
    except torch.linalg.LinAlgError:  # type: ignore[attr-defined]
        return None
    return values, basis


def _finite(pair: tuple[Tensor, Tensor]) -> Tensor:
    values, basis = pair
    return values.isfinite().all(-1) & basis.isfinite().flatten(-2).all(-1)
