"""PSGD: preconditioners P = QᵀQ fitted online so that P g is white; what its forms share, and the diagonal form.

All forms fit Q by relative gradient steps on E[gᵀPg + vᵀP⁻¹v], whose minimum is P = E[g gᵀ]^(-1/2): Q stays invertible
and nothing is factorised. Steps are normalised by a running bound L of the curvature, ``L <- max(0.9 L + 0.1 l, l)``.
Random draws are fixed by (seed, name of the block, step), the decision to fit at all by (seed, step) alone, so that
every rank and every batching of the blocks draws the same, and nothing has to be saved.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch._compile import _disable_dynamo

from guided_descent.linalg.workspace import Workspace
from guided_descent.parts.base import Batch, Count, Hyper, Part, Slot, State, Unit, key
from guided_descent.parts.rows import Number, Rows
from guided_descent.routing.roles import Block

#: Standard deviation of the noise that is added to a gradient before Q is fitted to it: P stays below its inverse.
NOISE = 1e-9
#: Memory of the curvature bounds.
MEMORY = 0.9
#: Decay of the probability of a fit for each step after the first ones, and the probability of balancing with a fit.
FADE, BALANCE = 1e-3, 0.01
#: Whitened numbers above it count as this, so that their squares are finite in float32.
HUGE = 1e15
TINY = torch.finfo(torch.float32).tiny


@dataclass(frozen=True)
class Whiten(Part):
    """What all forms of PSGD share: ``m <- b_t m + (1 - b_t) g`` and ``u <- P m``, of RMS at most ``clip``.

    ``b_t = min((t - 1) / t, momentum)``: the plain mean of the first gradients, so that there is no bias to correct.
    Q is fitted to the gradient, or with ``source`` ``momentum`` to m; then ``u`` is multiplied by
    ``sqrt((1 - b) / (1 + b))``, the length that a mean of independent gradients has. Fields name group keys:

    - ``rate``: step of the fit, ``rate max(1 / sqrt(1 + t / 10^4), 1 / 10)`` at step t;
    - ``init``: first Q as a multiple of the identity; ``None`` takes ``(mean |g|^4 + 1e-36)^(-1/8)`` of the first one;
    - ``clip``: largest RMS of the direction of a tensor; ``None`` leaves it.
    """

    slot: ClassVar[str] = "geometry"
    source: str = "gradient"
    momentum: str = key("momentum")
    rate: str = key("precond_lr")
    init: str = key("precond_init")
    clip: str = key("clip_rms")

    def shorten(self, x: Batch, h: Hyper) -> None:
        """Shorten the direction of a whitened momentum."""
        if self.source == "momentum":
            b = h[self.momentum]
            x.scale(((1 - b) / (1 + b)) ** 0.5)


@dataclass(frozen=True)
class Fitted(Whiten):
    """What the forms with random draws share: Q is fitted with a probability that falls with the step.

    ``always``: the first steps, all of which fit; then the probability falls as ``exp(-(t - always) / 1000)`` to the
    group's ``probability``. A fit balances the factors with probability 0.01. Counted: ``fits``.
    """

    unit: ClassVar[Unit] = "matrix"
    #: Slots of Q and of the curvature bounds, as ``whiten`` gets them.
    fitted: ClassVar[tuple[str, ...]] = ()
    probability: str = key("update_probability")
    always: str = key("update_always")
    seed: str = key("seed")

    def update(self, x: Batch, s: State, h: Hyper, total: Mapping[str, Tensor]) -> None:
        """Advance the momentum, fit Q where this step does, whiten."""
        u = x.take()
        m = s["momentum_buffer"].lerp_(u, 1 - warm(h[self.momentum], x.step))
        now = Fit(
            keys=tuple(block.key for block in x.blocks),
            first=x.first,
            step=x.step,
            base=h[self.rate],
            least=h[self.probability],
            always=h[self.always],
            init=h[self.init],
            clip=h[self.clip],
            seed=h[self.seed],
            work=x.work,
            ticks=x.ticks,
        )
        opaque(self, u.whole, x.spare("whiten").copy_(m).whole, tuple(s[name] for name in self.fitted), now)
        self.shorten(x, h)

    def whiten(self, g: Tensor, m: Tensor, q: Sequence[Tensor], now: Fit) -> None:
        """Fit Q to ``g`` or ``m``, [B, ...], and write ``P m`` over g; m is overwritten."""
        raise TypeError(f"{type(self).__name__} does not define whiten")


@dataclass(frozen=True, eq=False)
class Fit:
    """One step of one stack of blocks: its numbers, which may be tensors in compiled mode, its draws and its scratch.

    Attributes:
        keys: Names of the blocks.
        first: Whether Q is still to be set.
        step: Number of the step, from 1.
        base: Rate of the fit, before its decay.
        least: Probability of a fit in late steps.
        always: First steps, all of which fit.
        init: First Q as a multiple of the identity, or ``None``.
        clip: Largest RMS of the direction, or ``None``.
        seed: Seed of the draws.
        work: Scratch memory.
        ticks: Counters of the step.
    """

    keys: tuple[str, ...]
    first: bool
    step: Number
    base: Number
    least: Number
    always: int
    init: Number | None
    clip: Number | None
    seed: int
    work: Workspace
    ticks: dict[str, Count]

    @property
    def mu(self) -> Number:
        """Rate of the fit at this step."""
        return rate(float(self.base), int(self.step))

    def due(self) -> bool:
        """Whether this step fits Q, which is counted."""
        due = self.coin("fit") < probability(int(self.step), float(self.least), self.always)
        if due:
            self.ticks["fits"] = 1
        return due

    def coin(self, salt: str) -> float:
        """A number in [0, 1), the same for all blocks of the step."""
        return coin(self.seed, int(self.step), salt)

    def normals(self, like: Tensor, salt: str) -> Tensor:
        """Standard normals shaped like a stack [B, ...]."""
        return normals(like, self.keys, self.seed, int(self.step), salt, self.work)

    def perturbed(self, g: Tensor) -> tuple[Tensor, Tensor]:
        """``g + (1e-9 + eps |g|) N`` and the standard normal N, both shaped like g, the rows of all blocks."""
        noise = self.normals(g.view(len(self.keys), -1), "psgd").view(g.shape)
        return perturb(self.spare("y", g), g, noise), noise

    def spare(self, tag: str, like: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        """Scratch shaped like a tensor, contents undefined."""
        return self.work.take(f"psgd.{tag}", like.shape, dtype or like.dtype, like.device)


@_disable_dynamo
@torch.no_grad()
def opaque(part: Fitted, g: Tensor, m: Tensor, q: Sequence[Tensor], now: Fit) -> None:
    """``part.whiten`` where there are elements; a graph does not look inside."""
    if g.numel():
        part.whiten(g, m, q, now)


@dataclass(frozen=True)
class DiagonalWhiten(Whiten):
    """PSGD with a diagonal Q, for tensors of any shape: ``P -> 1 / sqrt(E g^2)`` elementwise.

    ``T = (P g)^2 + (1e-9 P)^2`` with ``P = q^2``; L follows ``max T + 1``; ``q <- q - (mu / L)(T - 1) q``. The noise of
    the other forms enters by its variance, and every step fits: there is nothing to draw. State: ``q`` and
    ``momentum_buffer``, shaped like the parameter, and ``lipschitz``, one number for each tensor, for whose maximum it
    needs whole tensors. Source: Li 2015, 1512.04202; 2402.11858.
    """

    unit: ClassVar[Unit] = "block"

    def slots(self, block: Block) -> dict[str, Slot]:
        """Momentum, the diagonal of Q, and a curvature bound for each piece of the block."""
        return {"momentum_buffer": Slot(), "q": Slot(fill=1.0), "lipschitz": Slot("factor", (len(block.pieces),))}

    def update(self, x: Batch, s: State, h: Hyper, total: Mapping[str, Tensor]) -> None:
        """Advance the momentum, fit q, whiten."""
        u, m, q, bounds = x.take(), s["momentum_buffer"], s["q"], s["lipschitz"].view(-1)
        m.lerp_(u, 1 - warm(h[self.momentum], x.step))
        if self.source == "momentum":
            u.copy_(m)
        if x.first:
            for row, g in zip(q.list, u.list):
                row.fill_(start(g.reshape(1, -1), h[self.init])[0] if g.numel() else 1.0)
        p = x.spare("whiten").copy_(q).mul_(q)
        u.mul_(p).apply_(bound).mul_(u)
        u.addcmul_(p, p, NOISE**2)
        track(bounds, peaks(u) + 1)
        u.add_(-1.0)
        q.addcmul_(q, u, x.by_row(-rate(h[self.rate], x.step) / bounds))
        u = x.fresh().copy_(m).mul_(q).mul_(q).apply_(bound)
        if h[self.clip] is not None:
            roots = bounds.new_tensor([max(row.numel(), 1) ** 0.5 for row in u.list])
            u.mul_(x.by_row(shrinkage(u.norms() / roots, h[self.clip])))
        self.shorten(x, h)

    def flops(self, block: Block) -> float:
        """About 20 per element."""
        return 20.0 * block.numel


def bound(row: Tensor) -> None:
    """Cut elements to ``±HUGE``, in place."""
    row.clamp_(-HUGE, HUGE)


def peaks(rows: Rows) -> Tensor:
    """Largest element of each row ``[rows]``; 0 for an empty one."""
    return torch.stack([row.amax() if row.numel() else row.new_zeros(()) for row in rows.list])


# -- numbers -----------------------------------------------------------------------------------------------------------


def warm(beta: Number, step: Number) -> Number:
    """Memory of the momentum at step t = 1, 2, ...: ``min((t - 1) / t, beta)``."""
    share = 1 - 1 / step
    if isinstance(share, Tensor) or isinstance(beta, Tensor):
        return torch.minimum(torch.as_tensor(share), torch.as_tensor(beta))
    return min(share, beta)


def rate(base: Number, step: Number) -> Number:
    """Step of the fit at step t: ``base max(1 / sqrt(1 + t / 10^4), 1 / 10)``."""
    share: Number = (1 + step / 1e4) ** -0.5
    return base * (share.clamp(min=0.1) if isinstance(share, Tensor) else max(share, 0.1))


def probability(step: float, least: float, always: int) -> float:
    """Probability of a fit at step t: 1 up to ``always``, then ``exp(-(t - always) / 1000)`` down to ``least``."""
    return max(math.exp(min(FADE * (always - step), 0.0)), least)


def start(g: Tensor, init: Number | None) -> Tensor:
    """Scale of the first Q for each row of ``[N, elements]``: given, or ``(mean |g|^4 + 1e-36)^(-1/8)``."""
    if init is not None:
        return torch.full((len(g),), float(init), dtype=g.dtype, device=g.device)
    top = g.abs().amax(1).clamp_min(NOISE)
    return ((g / top[:, None]).pow(4).mean(1) + (NOISE / top) ** 4) ** -0.125 * top**-0.5


def track(bounds: Tensor, now: Tensor) -> Tensor:
    """``L <- max(0.9 L + 0.1 l, l)``, in place."""
    return bounds.copy_(torch.maximum(bounds * MEMORY + now * (1 - MEMORY), now))


def shrinkage(rms: Tensor, clip: Number) -> Tensor:
    """``min(1, clip / rms)``."""
    return (clip / rms.clamp_min(TINY)).clamp(max=1.0).to(rms.dtype)


# -- draws -------------------------------------------------------------------------------------------------------------


def number(text: str) -> int:
    """A number below 2^56, fixed by a text."""
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=7).digest())


def coin(seed: int, step: int, salt: str) -> float:
    """A number in [0, 1), fixed by (seed, step, salt): the same for all blocks and ranks."""
    return number(f"{seed}/{step}/{salt}") / 2**56


def normals(like: Tensor, keys: Sequence[str], seed: int, step: int, salt: str, work: Workspace) -> Tensor:
    """Standard normals shaped like a stack ``[B, ...]``, row by row from (seed, name of the block, step, salt).

    They are drawn in float32 whatever the dtype, which then sees the same numbers.
    """
    raw = work.take("psgd.normals", like.shape, torch.float32, like.device)
    for row, name in zip(raw, keys):
        row.normal_(generator=torch.Generator(like.device).manual_seed(number(f"{seed}/{name}/{step}/{salt}")))
    return raw if like.dtype == raw.dtype else work.take("psgd.draw", like.shape, like.dtype, like.device).copy_(raw)


# -- rows [N, ...] -----------------------------------------------------------------------------------------------------


def peak(a: Tensor) -> Tensor:
    """``max |a|`` of each row, shaped to multiply ``a``; not zero."""
    flat = a.flatten(1)
    top = torch.maximum(flat.amax(1), -flat.amin(1))  # the infinity norm reads once, and is 20 times slower on a CPU
    return top.clamp_min_(TINY).view(-1, *[1] * (a.ndim - 1))


def perturb(out: Tensor, g: Tensor, noise: Tensor) -> Tensor:
    """``out <- g + (1e-9 + eps |g|) noise``, with ``eps`` that of the dtype."""
    return torch.abs(g, out=out).mul_(torch.finfo(g.dtype).eps).add_(NOISE).mul_(noise).add_(g)


def clip_rms_(u: Tensor, scale: Tensor, clip: Number | None) -> Tensor:
    """``u <- c u`` with ``c`` the scale or, where less, what makes the RMS of a row ``clip``; in place."""
    if clip is not None:
        rms = torch.linalg.vector_norm(u.flatten(1), dim=1) / u[0].numel() ** 0.5
        scale = torch.minimum(scale, (float(clip) / rms.clamp_min(TINY)).view(scale.shape))
    return u.mul_(scale)
