"""PSGD with a Kronecker-factored Q: one factor for each side of a matrix."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch._compile import _disable_dynamo

from guided_descent.linalg.workspace import Workspace
from guided_descent.parts.base import Batch, Hyper, Slot, State
from guided_descent.parts.geometry.psgd import (
    BALANCE,
    HUGE,
    TINY,
    Fitted,
    clip_rms_,
    coin,
    normals,
    peak,
    perturb,
    probability,
    rate,
    start,
    track,
    warm,
)
from guided_descent.parts.rows import Number
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

    def update(self, x: Batch, s: State, h: Hyper, total: Mapping[str, Tensor]) -> None:
        """Advance the momentum, fit the factors where this step does, whiten."""
        u = x.take()
        m = s["momentum_buffer"].lerp_(u, 1 - warm(h[self.momentum], x.step))
        whiten_matrices(
            u.whole,
            x.spare("whiten").copy_(m).whole,
            (s["left"], s["right"]),
            s["lipschitz"],
            keys=tuple(block.key for block in x.blocks),
            first=x.first,
            fit=self.fit,
            source=self.source,
            numbers=(x.step, h[self.rate], h[self.probability]),
            always=h[self.always],
            init=h[self.init],
            clip=h[self.clip],
            seed=h[self.seed],
            work=x.work,
            ticks=x.ticks,
        )
        self.shorten(x, h)

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


@_disable_dynamo
@torch.no_grad()
def whiten_matrices(
    g: Tensor,
    m: Tensor,
    factors: tuple[Tensor, Tensor],
    bounds: Tensor,
    *,
    keys: Sequence[str],
    first: bool,
    fit: str,
    source: str,
    numbers: tuple[Number, Number, Number],
    always: int,
    init: Number | None,
    clip: Number | None,
    seed: int,
    work: Workspace,
    ticks: dict[str, int | Sequence[int]],
) -> None:
    """Fit the factors to ``g`` or ``m``, [B, ..., rows, columns], and write ``P_L m P_R`` over g; opaque to graphs."""
    if g.numel() == 0:
        return
    step, base, least = int(numbers[0]), float(numbers[1]), float(numbers[2])
    u, m, bounds = g.view(-1, *g.shape[-2:]), m.view(-1, *g.shape[-2:]), bounds.view(-1, 2)
    target = m if source == "momentum" else u
    kept = [q.view(-1, *q.shape[(-2 if q.ndim == g.ndim else -1) :]) for q in factors]
    pair = [_wide(q, u.dtype, f"psgd.{side}", work) for q, side in zip(kept, SIDES)]
    if first:
        _begin(pair, start(target.flatten(1), init).sqrt())
    fits = coin(seed, step, "fit") < probability(step, least, always)
    if fits:
        ticks["fits"] = 1
        if coin(seed, step, "balance") < BALANCE:
            _balance(pair)
        noise = normals(g, keys, seed, step, "psgd", work).view(u.shape)
        y = perturb(work.take("psgd.y", u.shape, u.dtype, u.device), target, noise)
        (_fit_pro if fit == "pro" else _fit_triangular)(pair, y, noise, bounds, rate(base, step), work)
    if first or fits:
        for q, wide in zip(kept, pair):
            if wide is not q:
                q.copy_(wide)
    top = peak(m)
    clip_rms_(_apply(pair, m.div_(top), u, work), top, None if clip is None else float(clip))


def _fit_pro(pair: list[Tensor], y: Tensor, noise: Tensor, bounds: Tensor, mu: Number, work: Workspace) -> None:
    """One step of Q0.5EQ1.5 on both factors, to y; ``noise`` is overwritten."""
    top = peak(y)
    w = _apply(pair, y.div_(top), noise, work)
    w.mul_(torch.minimum(top, HUGE / peak(w)))
    for i, q in enumerate(pair):
        side, c = (w, w.shape[2]) if i == 0 else (w.mT, w.shape[1])
        if q.ndim == 2:
            t = torch.linalg.vector_norm(side, dim=2).square_()
            bound = track(bounds[:, i], t.amax(1) + c)
            q.mul_(1 - (mu / bound)[:, None] * (t - c))
            continue
        t, step = (work.take(f"psgd.{k}", q.shape, q.dtype, q.device) for k in (0, 1))
        torch.bmm(side, side.mT, out=t)
        bound = track(bounds[:, i], spectral_norm(t) + c)
        each = (mu / bound)[:, None, None]
        torch.bmm(t, q, out=step)
        q.mul_(1 + each * c).sub_(step.mul_(each))
        _turn(q, work)


def _turn(q: Tensor, work: Workspace) -> None:
    """One Procrustes step: ``Q <- Q + a (R Q + a R R Q / 2)``, ``R = (Qᵀ - Q) / ||Qᵀ - Q||``, to larger trace.

    ``a = min(-tr(R Q) / tr(R R Q), 1/8)`` where the second trace is negative, else 1/8.
    """
    r, first, second = (work.take(f"psgd.{k}", q.shape, q.dtype, q.device) for k in (0, 1, 2))
    torch.sub(q.mT, q, out=r)
    r.div_(spectral_norm(r).clamp_min_(TINY)[:, None, None])
    torch.bmm(r, q, out=first)
    torch.bmm(r, first, out=second)
    slope, curve = _trace(first), _trace(second)
    a = torch.where(curve < 0, -slope / torch.where(curve < 0, curve, -1.0), 0.125).clamp_(max=0.125)[:, None, None]
    q.add_(first.add_(second.mul_(a / 2)).mul_(a))


def _fit_triangular(pair: list[Tensor], y: Tensor, noise: Tensor, bounds: Tensor, mu: Number, work: Workspace) -> None:
    """One step of EQ on both factors, to y; y and ``noise`` are overwritten."""
    half = work.take("psgd.half", y.shape, y.dtype, y.device)
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
            q.mul_(1 - (mu / bound)[:, None] * (t1 - t2))
            continue
        t1, t2, both = (work.take(f"psgd.{k}", q.shape, q.dtype, q.device) for k in (0, 1, 2))
        torch.bmm(one, one.mT, out=t1)
        torch.bmm(two, two.mT, out=t2)
        bound = track(bounds[:, i], spectral_norm(torch.add(t1, t2, out=both)))
        torch.bmm(t1.sub_(t2).triu_(), q, out=both)
        q.sub_(both.mul_((mu / bound)[:, None, None]))


def _apply(pair: list[Tensor], value: Tensor, out: Tensor, work: Workspace) -> Tensor:
    """``P_L X P_R`` into ``out``, which must not be ``value``."""
    half = work.take("psgd.half", value.shape, value.dtype, value.device)
    _left(_square(pair[0], work), value, half)
    return _right(half, _square(pair[1], work), out)


def _square(q: Tensor, work: Workspace) -> Tensor:
    """``QᵀQ``, symmetric; valid until the next call where it is dense."""
    if q.ndim == 2:
        return q.square()
    p = work.take("psgd.0", q.shape, q.dtype, q.device)
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


def _wide(q: Tensor, dtype: torch.dtype, tag: str, work: Workspace) -> Tensor:
    """A factor in the dtype of the arithmetic, as it is or copied."""
    return q if q.dtype == dtype else work.take(tag, q.shape, dtype, q.device).copy_(q)


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
