"""Inverse roots A^(-1/p) of symmetric positive semi-definite matrices: by eigenvalues, or by products alone."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from guided_descent.linalg.eigen import FAILED, _scale, _square, eigenbasis
from guided_descent.linalg.minimax import Triple
from guided_descent.linalg.norms import full_float32, power_iteration, spectral_norm_bound

METHODS = ("eigh", "newton", "cans")

LEFT_TO_EIGH = 4  # added to the code in ``fallbacks`` of a matrix that an iteration did not solve

# Minimax steps: a step never fits eigenvalues of M further apart than this, or it would press some in between so far
# down that rounding swamps them; and rounding may push M this far, relatively, above the range that a step expects.
CUSHION = 0.005
MARGIN = 0.01
POWER_STEPS = 32  # of power iteration, where a relative eps needs the largest eigenvalue


class Root(NamedTuple):
    """An inverse root per matrix, and how it was come by.

    Attributes:
        root: A^(-1/p) [..., d, d], symmetric.
        error: [...]: ‖AQ - QΛ‖_F / ‖A‖_F for ``"eigh"``; max |M - I| of the coupled M = X^p A for the iterations.
            Infinity where there is no root.
        fallbacks: int8 [...]: 0 solved at once; 1 by ``eigh`` after a jitter of the diagonal, 2 by ``eigh`` in float64;
            4, 5, 6 the same after an iteration did not converge and left the matrix to ``eigh``; ``FAILED`` (3) not at
            all: the root is then the identity, and the caller should keep its last good one.
    """

    root: Tensor
    error: Tensor
    fallbacks: Tensor

    @property
    def failed(self) -> Tensor:
        """Bool [...]: the matrices that have no root."""
        return self.fallbacks == FAILED


@torch.no_grad()
def inverse_root(
    a: Tensor,
    p: int | float,
    *,
    eps: float = 0.0,
    relative: bool = True,
    method: str = "eigh",
    rank_cutoff: bool = False,
    tol: float | None = None,
    max_steps: int = 100,
) -> Root:
    """(A + εI)^(-1/p) of each symmetric positive semi-definite matrix of a batch.

    - ``"eigh"``: A = QΛQᵀ, then Q (Λ - min(λ_min, 0) + ε)^(-1/p) Qᵀ, with the ladder of ``eigenbasis`` for matrices
      that the solver refuses. With ε = 0 eigenvalues below λ_max times the dtype's resolution, which are rounding
      noise, are raised to that.
    - ``"newton"``: coupled Newton. z = (p + 1) / (2 ‖A‖_F), X = z^(1/p) I, M = zA; then T = (1 + 1/p) I - M/p, X ← XT,
      M ← T^p M until max |M - I| < ``tol``, or it grows by a factor of more than 1.2, or rounding keeps it from
      falling further. M = X^p A throughout, so X tends to the root. Eigenvalues grow by (1 + 1/p)^p a step.
    - ``"cans"``: the same pair of matrices with T = h(M) = αI + βM + γM², in the spirit of CANS (Chebyshev-accelerated
      Newton-Schulz): x h(x^p) is the polynomial in x, x^(p+1), x^(2p+1) that is closest to 1 on the interval in which
      the p-th roots of M's eigenvalues lie, by Remez exchange, anew for what each step leaves; then Taylor's step at 1.
      For p = 2 these are the quintic steps of the polar factor. A is divided by ‖A²‖_F^(1/2). The schedule is made for
      the smallest eigenvalue that ε (or the dtype, where ε is 0 or absolute) allows, so the work does not depend on
      the matrix: half of Newton's for ill-conditioned matrices, up to twice as much in float64 for others.

    The iterations use products alone, never TF32, and stop matrix by matrix: one that is done is left as it is.
    A matrix that does not converge or blows up (A + εI is not positive definite) is left to ``"eigh"``. In exact
    arithmetic all methods agree; in floating point the error grows with the condition of A + εI, and above 1/resolution
    (about 1e7 in float32) no method knows the small eigenvalues. In float32 ``eigh`` errs by a few resolutions of λ_max
    in every eigenvalue: from a condition of 1e4 the iterations are 10 times more accurate, and ``eigh`` of
    ``a.double()`` 100 times, for less than twice its own time on a CPU, where it is also the fastest.
    ``docs/accuracy.md`` has the figures.

    Args:
        a: Symmetric matrices [..., d, d], any real floating dtype; half precision is solved in float32. Asymmetry is
            averaged out. The batch may be empty.
        p: The root: any positive number for ``"eigh"``, a whole one for the iterations.
        eps: ε ≥ 0.
        relative: ε is ``eps`` times the largest eigenvalue, which the iterations take from 32 steps of power iteration
            (from below, a few percent at most); ``False``: ε is ``eps``.
        method: ``"eigh"``, ``"newton"`` or ``"cans"``.
        rank_cutoff: The root of the pseudo-inverse: eigenvalues up to λ_max d times the dtype's resolution count as
            zero and stay zero. Only with ``"eigh"`` and ``eps=0``. A zero matrix then gives zero.
        tol: For the iterations; None is 1e-6, in float64 1e-13.
        max_steps: Steps of an iteration at most.

    Returns:
        ``Root(root, error, fallbacks)`` in ``a``'s dtype, float32 at least. A matrix with a non-finite element, and one
        without a positive eigenvalue (a zero matrix, unless ε is absolute), has no root: ``FAILED`` and the identity.

    Raises:
        ValueError: ``a`` is no batch of square matrices, or an argument is out of range or does not fit the method.

    Source:
        Gupta, Koren, Singer 2018, arXiv:1802.09568 (use); Guo, Higham 2006, SIAM J. Matrix Anal. Appl. 28, and Anil et
        al. 2020, arXiv:2002.09018 (coupled Newton); Grishina, Smirnov, Rakhuba 2025, arXiv:2506.10935, and Amsel,
        Persson, Musco, Gower 2025, arXiv:2505.16932 (minimax steps, for p = 2).

    Example:
        >>> inverse_root(torch.diag(torch.tensor([1.0, 16.0])), 4).root.diagonal().tolist()
        [1.0, 0.5]
        >>> bool(inverse_root(torch.zeros(2, 2), 4).failed)
        True
    """
    _check(p, eps, method, rank_cutoff, tol, max_steps)
    flat = _square(a)
    lead = a.shape[:-2]
    if flat.numel() == 0:
        return Root(flat.reshape(a.shape), flat.new_zeros(lead), flat.new_zeros(lead, dtype=torch.int8))
    flat = _symmetric(flat)
    scale = _scale(flat)
    if not relative:
        scale = scale.clamp_min(eps)
    flat = flat / scale[:, None, None]
    ridge = None if relative else eps / scale
    if method == "eigh":
        root, error, fallbacks = _by_eigenvalues(flat, p, eps, ridge, rank_cutoff)
    else:
        tol = tol or (1e-13 if flat.dtype == torch.float64 else 1e-6)
        root, error, fallbacks = _by_products(flat, int(p), eps, ridge, method, tol, max_steps)
    root = root * (scale ** (-1.0 / p))[:, None, None]
    failed = (fallbacks == FAILED) | ~root.isfinite().flatten(1).all(-1)
    root[failed] = torch.eye(root.shape[-1], dtype=root.dtype, device=root.device)
    error[failed], fallbacks[failed] = torch.inf, FAILED
    return Root(root.reshape(a.shape), error.reshape(lead), fallbacks.reshape(lead))


# -- by eigenvalues ----------------------------------------------------------------------------------------------------


def _by_eigenvalues(
    a: Tensor, p: float, eps: float, ridge: Tensor | None, rank_cutoff: bool = False
) -> tuple[Tensor, Tensor, Tensor]:
    """Q f(Λ) Qᵀ of a scaled symmetric batch [B, d, d]; a root that does not exist comes out non-finite."""
    values, basis, fallbacks = eigenbasis(a, descending=False)
    a = torch.where((fallbacks == FAILED)[:, None, None], torch.zeros_like(a), a)
    resolution = torch.finfo(a.dtype).eps
    with full_float32():
        error = torch.linalg.matrix_norm(a @ basis - basis * values[:, None, :])
        error = error / torch.linalg.matrix_norm(a).clamp_min(torch.finfo(a.dtype).tiny)
        top = values[:, -1:].clamp_min(0.0)
        if rank_cutoff:
            kept = values > top * values.shape[-1] * resolution
            powers = torch.where(kept, values, torch.ones_like(values)) ** (-1.0 / p) * kept
        elif eps == 0.0:
            powers = torch.maximum(values, top * resolution) ** (-1.0 / p)
        else:
            values = values - values[:, :1].clamp_max(0.0)
            values = values + (eps * values[:, -1:] if ridge is None else ridge[:, None])
            powers = values ** (-1.0 / p)
        root = (basis * powers[:, None, :]) @ basis.mT
    return _symmetric(root), error, fallbacks


def _symmetric(a: Tensor) -> Tensor:
    """(A + Aᵀ) / 2, equal to its transpose bit for bit (``torch.lerp`` is not)."""
    return (a + a.mT) * 0.5


# -- by products -------------------------------------------------------------------------------------------------------


def _by_products(
    a: Tensor, p: int, eps: float, ridge: Tensor | None, method: str, tol: float, max_steps: int
) -> tuple[Tensor, Tensor, Tensor]:
    """The coupled iteration on a scaled symmetric batch [B, d, d], and ``_by_eigenvalues`` where it fails."""
    d, resolution = a.shape[-1], torch.finfo(a.dtype).eps
    shifted = a.clone()
    if eps:
        extra = eps * power_iteration(a, POWER_STEPS) if ridge is None else ridge
        shifted.diagonal(dim1=-2, dim2=-1).add_(extra[:, None])
    if method == "newton":
        start = (p + 1) / (2.0 * torch.linalg.matrix_norm(shifted))
        steps: Sequence[Triple] = ()
        tail = (1.0 + 1.0 / p, -1.0 / p, 0.0)
    else:
        start = 1.0 / spectral_norm_bound(shifted, squarings=1)
        lower = max(resolution, eps if ridge is None else 0.0)
        steps, tail = root_schedule(min(lower, 0.5) * d**-0.25, p), taylor_step(p)
    with full_float32():
        root, error = _coupled(shifted, p, start, steps, tail, tol, max_steps)
    fallbacks = torch.zeros_like(error, dtype=torch.int8)
    rest = (~(error <= max(tol, d * resolution))).nonzero().flatten()
    if len(rest):
        root[rest], error[rest], codes = _by_eigenvalues(a[rest], p, eps, None if ridge is None else ridge[rest])
        fallbacks[rest] = torch.where(codes == FAILED, codes, codes + LEFT_TO_EIGH)
    return _symmetric(root), error, fallbacks


def _coupled(
    a: Tensor, p: int, start: Tensor, steps: Sequence[Triple], tail: Triple, tol: float, max_steps: int
) -> tuple[Tensor, Tensor]:
    """X ← X h(M), M ← h(M)^p M from X = start^(1/p) I, M = start A; h from ``steps``, then ``tail``.

    Only the matrices that are still under way are multiplied; what is done is not touched again. ``steps`` may raise
    max |M - I| for a while, ``tail`` may not.

    Returns:
        X [B, d, d] and max |M - I| [B], both of the last step that was no worse; infinity where A is not finite.
    """
    floor = a.shape[-1] * torch.finfo(a.dtype).eps
    eye = torch.eye(a.shape[-1], dtype=a.dtype, device=a.device)
    x, m = (start ** (1.0 / p))[:, None, None] * eye, start[:, None, None] * a
    last = (m - eye).abs().amax((-2, -1)).nan_to_num(nan=torch.inf)
    root, error = x.clone(), last.clone()
    rows = ((last >= tol) & last.isfinite()).nonzero().flatten()
    x, m, last = x[rows], m[rows], last[rows]
    for k in range(max_steps):
        if not len(rows):
            break
        alpha, beta, gamma = steps[k] if k < len(steps) else tail
        t = torch.baddbmm(m, m, m, beta=beta, alpha=gamma) if gamma else beta * m
        t.diagonal(dim1=-2, dim2=-1).add_(alpha)
        x, m = x @ t, _times_power(t, p, m)
        now = (m - eye).abs().amax((-2, -1)).nan_to_num(nan=torch.inf)
        worse = ~now.isfinite() | (now > 1.2 * last) if k >= len(steps) else ~now.isfinite()
        kept = ~worse
        root[rows[kept]], error[rows[kept]] = x[kept], now[kept]
        going = kept & (now >= tol) & ~((now <= floor) & (now > 0.5 * last))
        last = now
        if not bool(going.all()):
            rows, x, m, last = rows[going], x[going], m[going], last[going]
    return root, error


def _times_power(t: Tensor, p: int, m: Tensor) -> Tensor:
    """T^p M, in about log₂ p products and one more."""
    while p > 2:
        if p % 2:
            m = t @ m
        t, p = t @ t, p // 2
    return t @ (t @ m) if p == 2 else t @ m


# -- minimax steps -----------------------------------------------------------------------------------------------------


def taylor_step(p: int) -> Triple:
    """(α, β, γ) of the Taylor polynomial αI + βM + γM² of M^(-1/p) at I: cubic convergence once M is near I.

    Example:
        >>> taylor_step(2)
        (1.875, -1.25, 0.375)
    """
    b, c = -1.0 / p, (p + 1) / (2.0 * p * p)
    return 1.0 - b + c, b - 2.0 * c, c


@lru_cache(maxsize=64)
def root_schedule(lower: float, p: int) -> tuple[Triple, ...]:
    """Steps h that bring the eigenvalues [lower, 1] of M close to 1 by M ← h(M)^p M.

    Each is the best for what the one before left over, but for the cushion: it fits no range of eigenvalues wider than
    1/200, and is scaled so that what it makes of the whole range has 1 in its middle.

    Args:
        lower: The smallest eigenvalue over the largest.
        p: The root.

    Example:
        >>> [len(root_schedule(x, 2)) for x in (1e-2, 1e-7, 1e-14)]
        [3, 8, 13]
    """
    lo, hi = lower ** (1.0 / p), 1.0 + MARGIN  # p-th roots of eigenvalues
    steps: list[Triple] = []
    while lo < 1.0 - 1e-3:
        (a, b, c), error = best_root_step(max(lo, CUSHION ** (1.0 / p) * hi), hi, p)
        reached = lo * (a + b * lo**p + c * lo ** (2 * p))
        k = 2.0 / (reached + 1.0 + error)
        steps.append((k * a, k * b, k * c))
        lo, hi = k * reached, k * (1.0 + error) * (1.0 + MARGIN)
    return tuple(steps)


def best_root_step(lo: float, hi: float, p: int) -> tuple[Triple, float]:
    """The (a, b, c) for which ax + bx^(p+1) + cx^(2p+1) is closest to 1 on [lo, hi], and E = max |... - 1|.

    By Remez exchange: the best one takes 1 - E, 1 + E, 1 - E and 1 + E at lo, its two extrema and hi. For p = 2 it is
    ``minimax.best_step``.

    Args:
        lo: Lower end, positive.
        hi: Upper end, above ``lo``.
        p: The root.

    Raises:
        ValueError: The interval is empty.

    Example:
        >>> (a, b, c), error = best_root_step(0.9, 1.1, 4)
        >>> round(a + b + c, 3), error < 3e-3
        (1.0, True)
    """
    if not 0.0 < lo < hi:
        raise ValueError(f"best_root_step({lo}, {hi}, {p}): needs 0 < lo < hi")
    nodes = [lo + (hi - lo) * i / 3 for i in range(4)]
    previous = math.inf
    for _ in range(200):
        (a, b, c), error = _interpolate(nodes, p)
        if abs(error - previous) <= 1e-14:
            break
        previous = error
        quadratic, linear = (2 * p + 1) * c, (p + 1) * b  # a + linear y + quadratic y² is the derivative, y = x^p
        root = math.sqrt(max(linear * linear - 4.0 * quadratic * a, 0.0))
        nodes[1:3] = sorted(max((-linear + s * root) / (2.0 * quadratic), 0.0) ** (1.0 / p) for s in (-1.0, 1.0))
    return (a, b, c), abs(error)


def _interpolate(nodes: Sequence[float], p: int) -> tuple[Triple, float]:
    """The polynomial that takes 1 - E, 1 + E, 1 - E, 1 + E at the four nodes, and that E."""
    powers = [x**p for x in nodes]
    signs = (1.0, -1.0, 1.0, -1.0)
    # Weights that annihilate every polynomial of this kind: they determine E without solving a system.
    weights = [1.0 / (x * math.prod(y - other for other in powers if other != y)) for x, y in zip(nodes, powers)]
    error = sum(weights) / sum(w * s for w, s in zip(weights, signs))
    f = [(1.0 - s * error) / x for x, s in zip(nodes, signs)]
    y0, y1, y2 = powers[:3]
    d1 = (f[1] - f[0]) / (y1 - y0)
    d2 = ((f[2] - f[1]) / (y2 - y1) - d1) / (y2 - y0)
    return (f[0] - d1 * y0 + d2 * y0 * y1, d1 - d2 * (y0 + y1), d2), error


def _check(p: float, eps: float, method: str, rank_cutoff: bool, tol: float | None, max_steps: int) -> None:
    if method not in METHODS:
        raise ValueError(f"method={method!r} is unknown; choose one of {', '.join(METHODS)}")
    if isinstance(p, bool) or not 0.0 < p < math.inf:
        raise ValueError(f"p={p!r} must be a positive number: the root is A^(-1/p)")
    if method != "eigh" and p != int(p):
        raise ValueError(f"p={p!r} must be a whole number for method={method!r}; method='eigh' takes any root")
    if not 0.0 <= eps < math.inf:
        raise ValueError(f"eps={eps!r} must be a finite number of at least 0")
    if rank_cutoff and (method != "eigh" or eps):
        raise ValueError(f"rank_cutoff=True needs method='eigh' and eps=0, not {method!r} and {eps!r}")
    if tol is not None and not 0.0 < tol < 1.0:
        raise ValueError(f"tol={tol!r} must lie in (0, 1); None takes the dtype's own")
    if isinstance(max_steps, bool) or not isinstance(max_steps, int) or max_steps < 1:
        raise ValueError(f"max_steps={max_steps!r} must be an integer of at least 1")
