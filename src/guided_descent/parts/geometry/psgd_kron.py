"""PSGD with a Kronecker-factored Q: one factor for each side of a matrix."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from guided_descent.parts.base import Slot
from guided_descent.parts.geometry.psgd import BALANCE, HUGE, TINY, Fit, Fitted, clip_rms_, peak, start, track
from guided_descent.routing.roles import Block

#: Ways to fit the factors; see ``KronWhiten``.
UPDATES = ("pro", "triangular")
SIDES = ("left", "right")
#: Power iterations for a spectral norm.
POWER_STEPS = 3


@dataclass(frozen=True)
class KronWhiten(Fitted):
    """PSGD for matrices: ``u <- P_L m P_R`` with ``P_i = Q_iᵀ Q_i``, so that ``P_L g P_R`` is white.

    A fit takes ``g + (1e-9 + eps |g|) N`` for g, with N standard normal. ``X_i`` is a matrix X [m, n] for the left side
    and its transpose for the right one, d_i the length of the side, mu the rate of the fit. With ``fit``

    - ``pro``, for ``W = P_L g P_R`` and ``T = W_i W_iᵀ``: L_i follows ``||T|| + c`` with ``c = m n / d_i``, and
      ``Q_i <- Q_i - (mu / L_i)(T - c I) Q_i``; then one step of the orthogonal Procrustes problem turns Q_i towards the
      symmetric positive factor of the same P: products only (Q0.5EQ1.5);
    - ``triangular``, for ``A = Q_L g Q_Rᵀ`` and ``B = Q_L^-T N Q_R^-1``: L_i follows ``||A_i A_iᵀ + B_i B_iᵀ||``, and
      ``Q_i <- Q_i - (mu / L_i) triu(A_i A_iᵀ - B_i B_iᵀ) Q_i``: Q_i stays upper triangular (EQ, the original).

    A side with ``d > max_size`` or ``d^2 > max_skew m n`` has a diagonal Q_i, kept as a vector. The draw that decides
    whether a step fits is one for all blocks. ``||.||`` is estimated by ``spectral_norm``. State: ``momentum_buffer``,
    shaped like the parameter; ``left`` and ``right``, [m, m] and [n, n] (or [m], [n]); ``lipschitz`` [2]. The factors
    are at least float32, or bfloat16 where ``half`` (``pro`` alone). Source: Li 2015, 1512.04202; 2402.11858.
    """

    fitted: ClassVar[tuple[str, ...]] = (*SIDES, "lipschitz")
    fit: str = "pro"
    max_size: int = 8192
    max_skew: float = 1.0
    half: bool = False

    def dense(self, block: Block) -> tuple[bool, bool]:
        """Whether the left and the right factor are matrices."""
        m, n = block.shape[-2:]
        left, right = (1 < d <= self.max_size and d * d <= self.max_skew * m * n for d in (m, n))
        return left, right

    def slots(self, block: Block) -> dict[str, Slot]:
        """Momentum, both factors and their curvature bounds."""
        lead, dtype = block.shape[:-2], torch.bfloat16 if self.half else None
        slots = {"momentum_buffer": Slot(), "lipschitz": Slot("factor", (*lead, 2))}
        for side, d, dense in zip(SIDES, block.shape[-2:], self.dense(block)):
            slots[side] = Slot("factor", (*lead, d, d) if dense else (*lead, d), dtype)
        return slots

    def whiten(self, g: Tensor, m: Tensor, q: Sequence[Tensor], now: Fit) -> None:
        """Fit the factors to ``g`` or ``m``, [B, ..., rows, columns], and write ``P_L m P_R`` over g."""
        u, m, bounds = g.view(-1, *g.shape[-2:]), m.view(-1, *g.shape[-2:]), q[2].view(-1, 2)
        target = m if self.source == "momentum" else u
        kept = [a.view(-1, *a.shape[(-2 if a.ndim == g.ndim else -1) :]) for a in q[:2]]
        pair = [_wide(a, u.dtype, side, now) for a, side in zip(kept, SIDES)]
        if now.first:
            _begin(pair, start(target.flatten(1), now.init).sqrt())
        due = now.due()
        if due:
            if now.coin("balance") < BALANCE:
                _balance(pair)
            (_fit_pro if self.fit == "pro" else _fit_triangular)(pair, *now.perturbed(target), bounds, now)
        if now.first or due:
            for a, wide in zip(kept, pair):
                if wide is not a:
                    a.copy_(wide)
        top = peak(m)
        clip_rms_(_apply(pair, m.div_(top), u, now), top, now.clip)

    def flops(self, block: Block) -> float:
        """Of a step that fits: two applications of P, the Gram products and the products of the factors."""
        m, n = block.shape[-2:]
        sides = [d for d, dense in zip((m, n), self.dense(block)) if dense]
        return block.batch * sum(6.0 * d * m * n + (10.0 if self.fit == "pro" else 6.0) * d**3 for d in sides)

    def scratch(self, block: Block) -> int:
        """Four matrices of the block's shape and three of each dense factor's, in float32."""
        m, n = block.shape[-2:]
        squares = sum(d * d for d, dense in zip((m, n), self.dense(block)) if dense)
        return 4 * block.batch * (4 * m * n + 3 * squares)


def _fit_pro(pair: list[Tensor], y: Tensor, noise: Tensor, bounds: Tensor, now: Fit) -> None:
    """One step of Q0.5EQ1.5 on both factors, to y; ``noise`` is overwritten."""
    top = peak(y)
    w = _apply(pair, y.div_(top), noise, now)
    w.mul_(torch.minimum(top, HUGE / peak(w)))
    for i, q in enumerate(pair):
        side, c = (w, w.shape[2]) if i == 0 else (w.mT, w.shape[1])
        if q.ndim == 2:
            t = torch.linalg.vector_norm(side, dim=2).square_()
            bound = track(bounds[:, i], t.amax(1) + c)
            q.mul_(1 - (now.mu / bound)[:, None] * (t - c))
            continue
        t, step = (now.spare(k, q) for k in "01")
        torch.bmm(side, side.mT, out=t)
        bound = track(bounds[:, i], spectral_norm(t) + c)
        each = (now.mu / bound)[:, None, None]
        torch.bmm(t, q, out=step)
        q.mul_(1 + each * c).sub_(step.mul_(each))
        _turn(q, now)


def _turn(q: Tensor, now: Fit) -> None:
    """One Procrustes step: ``Q <- Q + a (R Q + a R R Q / 2)``, ``R = (Qᵀ - Q) / ||Qᵀ - Q||``, to larger trace.

    ``a = min(-tr(R Q) / tr(R R Q), 1/8)`` where the second trace is negative, else 1/8.
    """
    r, first, second = (now.spare(k, q) for k in "012")
    torch.sub(q.mT, q, out=r)
    r.div_(spectral_norm(r).clamp_min_(TINY)[:, None, None])
    torch.bmm(r, q, out=first)
    torch.bmm(r, first, out=second)
    slope, curve = _trace(first), _trace(second)
    a = torch.where(curve < 0, -slope / torch.where(curve < 0, curve, -1.0), 0.125).clamp_(max=0.125)[:, None, None]
    q.add_(first.add_(second.mul_(a / 2)).mul_(a))


def _fit_triangular(pair: list[Tensor], y: Tensor, noise: Tensor, bounds: Tensor, now: Fit) -> None:
    """One step of EQ on both factors, to y; y and ``noise`` are overwritten."""
    half = now.spare("half", y)
    left, right = pair
    top = peak(y)
    _left(left, y.div_(top), half)
    a = _right(half, right.mT if right.ndim == 3 else right, y)
    a.mul_(torch.minimum(top, HUGE / peak(a)))
    if left.ndim == 3:
        torch.linalg.solve_triangular(left.mT, noise, upper=False, out=half)
    else:
        torch.div(noise, left[:, :, None], out=half)
    if right.ndim == 3:
        torch.linalg.solve_triangular(right, half, upper=True, left=False, out=noise)
    else:
        torch.div(half, right[:, None, :], out=noise)
    b = noise.mul_((HUGE / peak(noise)).clamp_(max=1.0))
    for i, q in enumerate(pair):
        one, two = (a, b) if i == 0 else (a.mT, b.mT)
        if q.ndim == 2:
            t1, t2 = (torch.linalg.vector_norm(side, dim=2).square_() for side in (one, two))
            bound = track(bounds[:, i], (t1 + t2).amax(1))
            q.mul_(1 - (now.mu / bound)[:, None] * (t1 - t2))
            continue
        t1, t2, both = (now.spare(k, q) for k in "012")
        torch.bmm(one, one.mT, out=t1)
        torch.bmm(two, two.mT, out=t2)
        bound = track(bounds[:, i], spectral_norm(torch.add(t1, t2, out=both)))
        torch.bmm(t1.sub_(t2).triu_(), q, out=both)
        q.sub_(both.mul_((now.mu / bound)[:, None, None]))


def _apply(pair: list[Tensor], value: Tensor, out: Tensor, now: Fit) -> Tensor:
    """``P_L X P_R`` into ``out``, which must not be ``value``."""
    half = now.spare("half", value)
    _left(_square(pair[0], now), value, half)
    return _right(half, _square(pair[1], now), out)


def _square(q: Tensor, now: Fit) -> Tensor:
    """``QᵀQ``, symmetric; valid until the next call where it is dense."""
    if q.ndim == 2:
        return q.square()
    p = now.spare("0", q)
    torch.bmm(q.mT, q, out=p)
    return p


def _left(a: Tensor, value: Tensor, out: Tensor) -> Tensor:
    """``A X``, with a vector for a diagonal A."""
    return torch.bmm(a, value, out=out) if a.ndim == 3 else torch.mul(a[:, :, None], value, out=out)


def _right(value: Tensor, a: Tensor, out: Tensor) -> Tensor:
    """``X A``, with a vector for a diagonal A."""
    return torch.bmm(value, a, out=out) if a.ndim == 3 else torch.mul(value, a[:, None, :], out=out)


def _begin(pair: list[Tensor], scale: Tensor) -> None:
    """Both factors ``scale I``."""
    for q in pair:
        if q.ndim == 3:
            q.zero_().diagonal(dim1=1, dim2=2).copy_(scale[:, None])
        else:
            q.copy_(scale[:, None])


def _balance(pair: list[Tensor]) -> None:
    """Scale both factors to one largest element; their product stays."""
    left, right = (peak(q) for q in pair)
    share = (right.flatten() / left.flatten()).sqrt_()
    pair[0].mul_(share.view(left.shape))
    pair[1].div_(share.view(right.shape))


def _trace(a: Tensor) -> Tensor:
    return a.diagonal(dim1=1, dim2=2).sum(1)


def _wide(q: Tensor, dtype: torch.dtype, side: str, now: Fit) -> Tensor:
    """A factor in the dtype of the arithmetic, as it is or copied."""
    return q if q.dtype == dtype else now.spare(side, q, dtype).copy_(q)


def spectral_norm(a: Tensor) -> Tensor:
    """An estimate of ``||A||_2`` of symmetric or antisymmetric matrices [N, d, d], without randomness.

    Three power iterations from the row of the largest sum, times 1.1, and at most the largest sum of a row: between
    0.8 and 1.1 times the norm in practice. Neither overflows where the norm is finite. 0 for A = 0.
    """
    sums = torch.linalg.vector_norm(a, ord=1, dim=2)
    top, where = sums.max(1)
    scale = top.clamp_min(TINY)[:, None]
    v = a[torch.arange(len(a), device=a.device), where] / scale
    for _ in range(POWER_STEPS):
        v = v / torch.linalg.vector_norm(v, dim=1, keepdim=True).clamp_min_(TINY)
        v = torch.bmm(a, v[:, :, None])[:, :, 0] / scale
    norm: Tensor = torch.linalg.vector_norm(v, dim=1).mul_(1.1).clamp_(max=1.0).mul_(top)
    return norm
