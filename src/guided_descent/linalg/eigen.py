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
    ``track_basis`` is the same step, and says which matrices kept their basis.

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
    tracked = track_basis(a, q)
    return tracked.basis, tracked.order


class Tracked(NamedTuple):
    """A basis after one step, and how it relates to the one before.

    Attributes:
        basis: Orthonormal bases [..., d, d].
        order: int64 [..., d]: column j of the new basis grew from column ``order[..., j]`` of the old one.
        failed: Bool [...]: a zero or non-finite matrix, which kept its old basis in its old order.
    """

    basis: Tensor
    order: Tensor
    failed: Tensor


def track_basis(a: Tensor, q: Tensor, sort: bool = True) -> Tracked:
    """The step of ``refresh_basis``, Q ← qr(A Q), with or without its sort, and with a report.

    Args:
        a: Symmetric matrices [..., d, d].
        q: Their last orthonormal bases [..., d, d].
        sort: Whether the columns are first put in descending order of diag(QᵀAQ), as in SOAP. ``False`` keeps every
            column at its place, so that nothing stored in the basis has to move, as in KL-Shampoo.

    Returns:
        ``Tracked(basis, order, failed)``; without the sort ``order`` is 0, 1, ..., d - 1.

    Raises:
        ValueError: The shapes differ or are not square.

    Source:
        Vyas et al. 2024, arXiv:2409.11321 (sorted); Lin et al. 2025, arXiv:2509.03378 (not sorted).

    Example:
        >>> a = torch.diag(torch.tensor([1.0, 4.0]))
        >>> track_basis(a, torch.eye(2), sort=False).order.tolist(), bool(track_basis(0 * a, torch.eye(2)).failed)
        ([0, 1], True)
    """
    flat, old = _pair(a, q)
    flat = flat / _scale(flat)[:, None, None]
    product = flat @ old
    estimate = (old * product).sum(-2)
    identity = torch.arange(old.shape[-1], device=old.device).expand_as(estimate)
    order = estimate.argsort(dim=-1, descending=True, stable=True) if sort else identity
    if sort:
        product = product.gather(-1, order.unsqueeze(-2).expand_as(product))
    new = torch.linalg.qr(product).Q
    good = new.isfinite().flatten(1).all(-1) & estimate.isfinite().all(-1) & (flat != 0).flatten(1).any(-1)
    order = torch.where(good[:, None], order, identity)
    new = torch.where(good[:, None, None], new, old)
    return Tracked(new.to(q.dtype).reshape(q.shape), order.reshape(q.shape[:-1]), ~good.reshape(q.shape[:-2]))


class Diagonal(NamedTuple):
    """A basis in which a matrix is diagonal to a tolerance.

    Attributes:
        values: diag(QᵀAQ) [..., d], one for each column.
        basis: Orthonormal bases Q [..., d, d].
        order: int64 [..., d]: column j of the new basis grew from column ``order[..., j]`` of the old one.
        error: ``off_diagonal(a, basis)`` [...], measured on A itself.
        steps: int64 [...]: QR steps taken.
        failed: Bool [...]: a zero or non-finite matrix, which kept its old basis; its values are 0.
    """

    values: Tensor
    basis: Tensor
    order: Tensor
    error: Tensor
    steps: Tensor
    failed: Tensor


def diagonalise(a: Tensor, q: Tensor, tol: float = 0.01, max_steps: int = 50) -> Diagonal:
    """The QR algorithm from a warm start: B = QᵀAQ; (q, r) = qr(B), B ← rq, Q ← Qq, until B is diagonal.

    A matrix stops when ‖B - diag B‖_F ≤ tol ‖B‖_F and is frozen from then on: one that is diagonal enough keeps its
    basis, sorted by diag(QᵀAQ), at the price of QᵀAQ alone. No shift is used, so the entry of columns i and j shrinks
    by |λ_j / λ_i| a step; close eigenvalues need no separation, because their entry is small to begin with.

    Args:
        a: Symmetric matrices [..., d, d].
        q: Their last orthonormal bases [..., d, d].
        tol: Bound of the off-diagonal part, relative.
        max_steps: QR steps at most; ``error`` says what is left where that was too few.

    Returns:
        ``Diagonal(values, basis, order, error, steps, failed)``, the basis in ``q``'s dtype, values and error in
        ``a``'s, float32 at least.

    Raises:
        ValueError: The shapes differ or are not square, or ``tol`` or ``max_steps`` is out of range.

    Source:
        Eschenhagen et al. 2025, arXiv:2506.03595, section 4.

    Example:
        >>> a = torch.tensor([[2.0, 1.0], [1.0, 2.0]])
        >>> found = diagonalise(a, torch.eye(2), tol=1e-5)
        >>> found.values.round(decimals=4).tolist(), bool(found.error <= 1e-5)
        ([3.0, 1.0], True)
    """
    if not 0.0 < tol < 1.0:
        raise ValueError(f"tol={tol!r} must lie in (0, 1): the off-diagonal part of the norm that may stay")
    if isinstance(max_steps, bool) or not isinstance(max_steps, int) or max_steps < 1:
        raise ValueError(f"max_steps={max_steps!r} must be an integer of at least 1")
    flat, old = _pair(a, q)
    scale = _peak(flat)
    flat = flat / scale[:, None, None]
    flat = torch.lerp(flat, flat.mT, 0.5)
    b = old.mT @ flat @ old
    good = b.isfinite().flatten(1).all(-1) & (flat != 0).flatten(1).any(-1)
    order = b.diagonal(dim1=-2, dim2=-1).argsort(dim=-1, descending=True, stable=True)
    order = torch.where(good[:, None], order, torch.arange(old.shape[-1], device=old.device))
    basis = old.gather(-1, order.unsqueeze(-2).expand_as(old))
    b = b.gather(-1, order.unsqueeze(-2).expand_as(b)).gather(-2, order.unsqueeze(-1).expand_as(b))
    steps = torch.zeros_like(good, dtype=torch.int64)
    for _ in range(max_steps):
        rows = (good & (_ratio(b) > tol)).nonzero().flatten()
        if not len(rows):
            break
        turn, r = torch.linalg.qr(b[rows])
        b[rows], basis[rows] = r @ turn, basis[rows] @ turn
        steps[rows] += 1
    basis = torch.where(basis.isfinite().flatten(1).all(-1)[:, None, None], basis, old).to(q.dtype)
    b = basis.to(flat.dtype).mT @ flat @ basis.to(flat.dtype)
    values = torch.where(good[:, None], b.diagonal(dim1=-2, dim2=-1) * scale[:, None], torch.zeros_like(order))
    lead = q.shape[:-2]
    return Diagonal(
        values.reshape(q.shape[:-1]),
        basis.reshape(q.shape),
        order.reshape(q.shape[:-1]),
        _ratio(b).reshape(lead),
        steps.reshape(lead),
        ~good.reshape(lead),
    )


def off_diagonal(a: Tensor, q: Tensor) -> Tensor:
    """How far Q is from the eigenbasis of A: ‖B - diag B‖_F / ‖B‖_F of B = QᵀAQ, in [0, 1].

    Args:
        a: Symmetric matrices [..., d, d].
        q: Orthonormal bases [..., d, d].

    Returns:
        [...] in ``a``'s dtype, float32 at least: 0 for a zero matrix, infinity for a non-finite one.

    Raises:
        ValueError: The shapes differ or are not square.

    Source:
        Eschenhagen et al. 2025, arXiv:2506.03595, equation 8: the bases are renewed where it exceeds a tolerance.

    Example:
        >>> a = torch.tensor([[2.0, 1.0], [1.0, 2.0]])
        >>> round(float(off_diagonal(a, torch.eye(2))) ** 2, 3), float(off_diagonal(0 * a, torch.eye(2)))
        (0.2, 0.0)
    """
    flat, basis = _pair(a, q)
    flat = flat / _peak(flat)[:, None, None]
    return _ratio(basis.mT @ flat @ basis).reshape(q.shape[:-2])


class Alignment(NamedTuple):
    """Which old column each new one continues: ``new[..., j] ≈ sign[..., j] old[..., order[..., j]]``.

    Attributes:
        order: int64 [..., d], a permutation.
        sign: 1 or -1 [..., d], in the bases' dtype, float32 at least.
    """

    order: Tensor
    sign: Tensor


def align(old: Tensor, new: Tensor) -> Alignment:
    """Match the columns of a new basis to those of the old one, signs included.

    Neither ``eigh`` nor ``qr`` promises the sign or the order of its columns. What was stored in the coordinates of
    the old basis follows by ``stored[..., order] * sign``.

    Args:
        old: Orthonormal bases [..., d, d].
        new: Orthonormal bases [..., d, d].

    Returns:
        ``Alignment(order, sign)``; ``order`` is that of ``matching``.

    Raises:
        ValueError: The shapes differ or are not square.

    Example:
        >>> align(torch.eye(2), torch.tensor([[0.0, -1.0], [1.0, 0.0]]))
        Alignment(order=tensor([1, 0]), sign=tensor([ 1., -1.]))
    """
    order = matching(old, new)
    columns = old.gather(-1, order.unsqueeze(-2).expand_as(old))
    overlap = (columns.to(_wide(old)) * new.to(_wide(new))).sum(-2)
    return Alignment(order, torch.where(overlap < 0, -1.0, 1.0).to(overlap.dtype))


def matching(old: Tensor, new: Tensor) -> Tensor:
    """For each new column the old one that it continues: the largest |overlap| first, each column used once.

    Of all pairs (i, j) the one with the largest |old_iᵀ new_j| is matched, then the largest among the columns that are
    left, and so on. Pairs that are each other's best are matched together, which gives the same result in a few
    rounds.

    Args:
        old: Orthonormal bases [..., d, d].
        new: Orthonormal bases [..., d, d].

    Returns:
        ``order`` [..., d] (int64), a permutation: new column j continues old column ``order[..., j]``. A non-finite
        overlap counts as none.

    Raises:
        ValueError: The shapes differ or are not square.

    Example:
        >>> matching(torch.eye(3), torch.eye(3)[:, [2, 0, 1]]).tolist()
        [2, 0, 1]
    """
    before, after = _pair(old, new, names=("old", "new"))
    overlap = (before.mT @ after).abs().nan_to_num_(nan=0.0, posinf=0.0)
    batch, d = overlap.shape[:2]
    order = torch.empty(batch, d, dtype=torch.int64, device=overlap.device)
    rows = columns = torch.arange(d, device=overlap.device).expand(batch, d)  # what the overlaps left stand for
    while rows.shape[1]:
        (best, wanted), (worth, wanting) = overlap.max(-2), overlap.max(-1)  # what new and old columns prefer
        places = torch.arange(rows.shape[1], device=overlap.device)
        taken = (wanting.gather(-1, wanted) == places) & (best >= 0)  # they prefer each other
        given = (wanted.gather(-1, wanting) == places) & (worth >= 0)
        order.scatter_(1, columns, torch.where(taken, rows.gather(-1, wanted), order.gather(1, columns)))
        used_columns, used_rows = taken | (best < 0), given | (worth < 0)
        left = int((~used_columns).sum(-1).max())
        column, row = (used.int().argsort(stable=True)[:, :left] for used in (used_columns, used_rows))
        columns, rows = columns.gather(-1, column), rows.gather(-1, row)
        overlap = overlap.gather(1, row[:, :, None].expand(-1, -1, overlap.shape[2]))
        overlap = overlap.gather(2, column[:, None, :].expand(-1, left, -1))
        if batch > 1:  # a matrix with less left than another is filled up with what is used
            overlap.masked_fill_(used_rows.gather(-1, row)[:, :, None], -1.0)
            overlap.masked_fill_(used_columns.gather(-1, column)[:, None, :], -1.0)
    return order.reshape(new.shape[:-1])


def _wide(a: Tensor) -> torch.dtype:
    return torch.promote_types(a.dtype, torch.float32)


def _pair(a: Tensor, q: Tensor, names: tuple[str, str] = ("a", "q")) -> tuple[Tensor, Tensor]:
    """Both as [B, d, d], in float32 at least."""
    if a.shape != q.shape:
        raise ValueError(
            f"{names[0]} has shape {tuple(a.shape)} and {names[1]} {tuple(q.shape)}; both must be the same [..., d, d]"
        )
    return _square(a), _square(q)


def _peak(a: Tensor) -> Tensor:
    """The largest |element| of each matrix [B]; 1 where that is useless (a zero or non-finite matrix)."""
    peak = a.abs().flatten(1).amax(-1)
    return torch.where((peak > 0) & peak.isfinite(), peak, torch.ones_like(peak))


def _ratio(b: Tensor) -> Tensor:
    """‖B - diag B‖_F / ‖B‖_F [B]: 0 for zero, infinity for non-finite."""
    whole = torch.linalg.matrix_norm(b)
    diagonal = torch.diag_embed(b.diagonal(dim1=-2, dim2=-1))
    ratio = torch.linalg.matrix_norm(b - diagonal) / whole
    ratio = torch.where(whole == 0, torch.zeros_like(ratio), ratio)
    return torch.where(whole.isfinite(), ratio, torch.full_like(ratio, torch.inf))


def _square(a: Tensor) -> Tensor:
    """As [B, d, d] in float32 at least."""
    if a.ndim < 2 or a.shape[-1] != a.shape[-2] or not a.dtype.is_floating_point:
        raise ValueError(f"a has shape {tuple(a.shape)} and dtype {a.dtype}; it must be real and square, [..., d, d]")
    return a.reshape(a.shape[:-2].numel(), *a.shape[-2:]).to(_wide(a))


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
