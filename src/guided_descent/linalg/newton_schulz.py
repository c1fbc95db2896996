"""Newton-Schulz in three forms: as in the textbook, with symmetric products, and on the Gram matrix.

X [..., m, n] is multiplied from its shorter side, so a tall matrix needs no transposed copy: G = X Xᵀ and X ← aX + PX
when wide, G = XᵀX and X ← aX + XP when tall, with P = bG + cG². All three forms are equal in exact arithmetic.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from guided_descent.linalg.minimax import Triple
from guided_descent.linalg.workspace import Workspace

# Half of a symmetric product is free, but its mirror image must be copied. Cheaper than the whole product from about
# 384 rows, in strips of about 192 (measured in bfloat16 on AVX-512, float32 gains more).
STRIP = 192

# Q is large where X is small, so rounding in G, which tilts its eigenvectors, makes QX overshoot in proportion to the
# slopes of all steps of a segment but its last. What the last segment does wrong stays in the result. Limits of that
# product for bfloat16, to be multiplied by the square root of the gain in precision: at 12 the overshoot is 1 % over a
# transformer's momentum matrices and power-law spectra, yet sums of a few rank-one gradients with few rows diverge (a
# negative eigenvalue of the rounded G grows by the square of the product); at 4 those overshoot by 4 % as well.
_LAST, _EARLIER = 4.0, 4.0
_SLACK = 1.02  # what that error may add to the largest singular value at a restart


def textbook(x: Tensor, triples: Sequence[Triple]) -> Tensor:
    """The iteration as published, on a normalised X; the operations and their order are those of ``torch.optim.Muon``.

    Args:
        x: [..., m, n]; not changed.
        triples: (a, b, c) of each step.
    """
    tall = x.shape[-2] > x.shape[-1]
    x = x.mT if tall else x
    fused = torch.addmm if x.ndim == 2 else torch.baddbmm
    for a, b, c in triples:
        gram = x @ x.mT
        x = fused(x, fused(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.mT if tall else x


def row_factors(gram: Tensor) -> Tensor:
    """The AOL factors d_i = (Σ_j |G_ij|)^(-1/2) of G = X Xᵀ, with which ‖diag(d) X‖₂ ≤ 1; 0 for a row of zeros.

    Args:
        gram: [..., r, r].

    Returns:
        [..., r], in float32 at least.

    Source:
        Prach and Lampert 2022, arXiv:2208.03160; Boissin et al. 2025, arXiv:2512.04632.

    Example:
        >>> row_factors(torch.tensor([[2.0, -2.0, 0.0], [-2.0, 2.0, 0.0], [0.0, 0.0, 0.0]])).tolist()
        [0.5, 0.5, 0.0]
    """
    wide = torch.promote_types(gram.dtype, torch.float32)
    sums: Tensor = torch.linalg.vector_norm(gram, ord=1, dim=-1, dtype=wide)
    return torch.where(sums > 0, sums.rsqrt(), 0.0)


def rescale(x: Tensor) -> Tensor:
    """X with the rows of its shorter side scaled by AOL, as a new tensor [..., m, n]."""
    tall = x.shape[-2] > x.shape[-1]
    x = x.mT if tall else x
    x = (x * row_factors(x @ x.mT).unsqueeze(-1)).to(x.dtype)
    return x.mT if tall else x


def segments(triples: Sequence[Triple], dtype: torch.dtype, top: float = 1.0) -> list[Sequence[Triple]]:
    """The schedule cut where the Gram form has to start anew from X to stay accurate in ``dtype``.

    Args:
        triples: (a, b, c) of each step.
        dtype: Of the Gram matrix.
        top: The largest singular value that the first step meets; what counts is its slope relative to that.

    Example:
        >>> [len(s) for s in segments([(3.4445, -4.7750, 2.0315)] * 5, torch.bfloat16)]
        [1, 2, 2]
    """
    gain = math.sqrt(torch.finfo(torch.bfloat16).eps / torch.finfo(dtype).eps)
    slopes = [a * (top if i == 0 else 1.0) for i, (a, _, _) in enumerate(triples)]
    parts: list[Sequence[Triple]] = []
    end = len(triples)
    while end:
        limit = (_EARLIER if parts else _LAST) * gain
        start = end - 1
        while start and math.prod(slopes[start - 1 : end - 1]) <= limit:
            start -= 1
        parts.append(triples[start:end])
        end = start
    return parts[::-1]


def prefers_gram(shape: Sequence[int], triples: Sequence[Triple], parts: int) -> bool:
    """Whether the Gram form in this many segments needs fewer multiply-adds than the symmetric one.

    Example:
        >>> jordan = [(3.4445, -4.7750, 2.0315)] * 5
        >>> [prefers_gram((1024, n), jordan, 2) for n in (1024, 2048)]
        [False, True]
    """
    rows, columns = sorted(shape[-2:])
    ratio, half = columns / rows, 0.75 if rows >= 2 * STRIP else 1.0
    quintic = [c != 0.0 for _, _, c in triples]
    symmetric = len(triples) * ratio * (1 + half) + half * sum(quintic)
    inner = len(triples) - parts  # a step inside a segment costs QZ, GZ and their symmetric h(G) G h(G)
    return parts * ratio * (1 + half) + half * sum(quintic) + (2 + half) * inner < symmetric


class Iteration:
    """One run on a scratch matrix; holds the buffers and knows which side is short.

    Args:
        x: [m, n] or [B, m, n] in the iteration's dtype; overwritten.
        work: Where the other buffers come from.

    Attributes:
        top: An upper bound of the largest singular value of x; lower it where a better one is known.
    """

    def __init__(self, x: Tensor, work: Workspace) -> None:
        def take(tag: str, shape: Sequence[int]) -> Tensor:
            return work.take(f"newton_schulz.{tag}", tuple(shape), x.dtype, x.device)

        self.x, self.top = x, 1.0
        self._scale = 1.0  # the run goes on with _scale x; the factor is folded into the products
        self.tall = x.shape[-2] > x.shape[-1]
        small = (*x.shape[:-2], min(x.shape[-2:]), min(x.shape[-2:]))
        self._g, self._z, self._q, self._t = (take(tag, small) for tag in "gzqt")
        self._other = take("x", x.shape)
        self._known = False  # _g and _z hold G and G² of this x
        self._scaled = False  # _g holds G of this x, as rescale left it

    def run(self, triples: Sequence[Triple], method: str = "auto", out: Tensor | None = None) -> Tensor:
        """The result of the cheaper form, or of the one named, in ``out`` or in a buffer."""
        if method == "auto" and self.x.ndim > 2:
            method = "symmetric"  # in half precision the Gram form is only accurate with the shift of _polynomial
        if method == "auto":
            parts = len(segments(triples, self.x.dtype, self.top))
            method = "gram" if prefers_gram(self.x.shape, triples, parts) else "symmetric"
        return self.gram(triples, out) if method == "gram" else self.symmetric(triples, out)

    def square(self) -> Tensor:
        """G² of x; the first step will use it."""
        self._gram()
        _symmetric(self._z, self._g, self._g)
        self._known = True
        return self._z

    def rescale(self) -> None:
        """AOL: X ← DX from the short side, with D = diag(``row_factors``), so that ‖X‖₂ ≤ 1.

        G ← DGD goes along, and the first step uses it: the rescaling costs no product.
        """
        self._gram()
        d = row_factors(self._g)
        self.x.mul_(d.unsqueeze(-2 if self.tall else -1))
        self._g.mul_(torch.mul(d.unsqueeze(-1), d.unsqueeze(-2), out=self._z))  # at once, so that G stays symmetric
        self._scaled = True

    def symmetric(self, triples: Sequence[Triple], out: Tensor | None = None) -> Tensor:
        """X ← h(G) X with h(G) = aI + bG + cG², once per triple. The result is ``out``, or a buffer."""
        for i, triple in enumerate(triples):
            self._gram()
            self._apply(*self._polynomial(*triple), out if i == len(triples) - 1 else None)
        return self.x

    def gram(self, triples: Sequence[Triple], out: Tensor | None = None) -> Tensor:
        """The same on the short side: Q ← Q h(G) and G ← h(G) G h(G), and X ← QX at the end of each segment.

        Source:
            Zhang, Amsel, Chen, Dao 2026, Gram Newton-Schulz.
        """
        parts = segments(triples, self.x.dtype, self.top)
        for part in parts:
            self._gram()
            for i, triple in enumerate(part):
                p, alpha, f = self._polynomial(*triple)  # h(G) = alpha I + fP
                if i == 0:
                    torch.mul(p, f, out=self._q)
                    mean = alpha  # Q = mean I + q
                else:
                    _multiply(self._t, self._q, p, add=p, beta=mean * f, alpha=f)
                    self._q, self._t = self._t.add_(self._q, alpha=alpha), self._q
                    mean *= alpha
                if i < len(part) - 1:
                    _multiply(self._t, self._g, p, add=self._g, beta=alpha, alpha=f)
                    _symmetric(self._g, p, self._t, add=self._t, beta=alpha, alpha=f)
            last = part is parts[-1]
            self._apply(self._q, mean, 1.0, out if last else None)
            self._scale = 1.0 if last else 1.0 / _SLACK
        return self.x

    def _gram(self) -> None:
        scaled, self._scaled = self._scaled, False
        if not (self._known or scaled):
            left, right = (self.x.mT, self.x) if self.tall else (self.x, self.x.mT)
            _symmetric(self._g, left, right, alpha=self._scale * self._scale)

    def _polynomial(self, a: float, b: float, c: float) -> tuple[Tensor, float, float]:
        """P, alpha and f with alpha I + fP = aI + bG + cG².

        Of a single matrix, alpha takes the mean of the diagonal with it: what is stored of Q and h(G) is then small
        where they are close to a multiple of I, as they are for a flat spectrum, and rounding does not swamp them.
        """
        known, self._known = self._known, False
        p, f = self._z, 1.0
        if c == 0.0:
            p.copy_(self._g)
            f = b
        elif known:
            p.add_(self._g, alpha=b / c)
            f = c
        else:
            _symmetric(p, self._g, self._g, add=self._g, beta=b, alpha=c)
        if p.ndim > 2:
            return p, a, f
        diagonal = p.diagonal()
        mean = float(diagonal.mean())
        diagonal.sub_(mean)
        return p, a + f * mean, f

    def _apply(self, p: Tensor, alpha: float, f: float, out: Tensor | None) -> None:
        """X ← alpha X + fPX from the short side, into ``out`` or the other large buffer."""
        target = self._other if out is None else out
        left, right = (self.x, p) if self.tall else (p, self.x)
        _multiply(target, left, right, add=self.x, beta=alpha * self._scale, alpha=f * self._scale)
        self.x, self._other, self._scale = target, self.x, 1.0


def _multiply(
    out: Tensor, left: Tensor, right: Tensor, *, add: Tensor | None = None, beta: float = 0.0, alpha: float = 1.0
) -> None:
    """Into ``out``: beta add + alpha left right, in one kernel."""
    add = out if beta == 0.0 or add is None else add
    (torch.addmm if out.ndim == 2 else torch.baddbmm)(add, left, right, beta=beta, alpha=alpha, out=out)


def _symmetric(
    out: Tensor, left: Tensor, right: Tensor, *, add: Tensor | None = None, beta: float = 0.0, alpha: float = 1.0
) -> None:
    """The same where the result is known to be symmetric: strips of the upper triangle, and their mirror images."""
    n = out.shape[-1]
    if out.ndim > 2 or n < 2 * STRIP:
        _multiply(out, left, right, add=add, beta=beta, alpha=alpha)
        return
    height = -(-n // (n // STRIP * 32)) * 32
    for i in range(0, n, height):
        j = min(i + height, n)
        strip = None if add is None else add[i:j, i:]
        _multiply(out[i:j, i:], left[i:j], right[:, i:], add=strip, beta=beta, alpha=alpha)
        if j < n:
            out[j:, i:j].copy_(out[i:j, j:].T)
