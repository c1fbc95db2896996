"""How a half-precision parameter takes a float32 update: rounded, at random, compensated, or from a master copy.

With a bfloat16 weight an update below about 2^-9 of it vanishes under rounding to nearest. ``stochastic`` rounds up or
down with the probability that keeps the expectation, ``compensated`` keeps the lost low bits in a second bfloat16
tensor (``comp``), ``master`` keeps a float32 copy (``master``) of which the parameter is always a rounding.
"""

from __future__ import annotations

import torch
from torch import Tensor

from guided_descent.parts.base import Slot

ROUNDINGS = ("nearest", "stochastic", "compensated", "master")
#: The state that a mode keeps.
EXTRA = {"compensated": "comp", "master": "master"}
NAMES = frozenset(EXTRA.values())


def rounding_slots(mode: str, dtype: torch.dtype) -> dict[str, Slot]:
    """State that a rounding mode adds to a parameter of this dtype; none for full precision."""
    if dtype not in (torch.bfloat16, torch.float16):
        return {}
    if mode == "compensated":
        return {"comp": Slot(dtype=dtype)}
    if mode == "master":
        return {"master": Slot(dtype=torch.float32)}
    return {}


def load(w: Tensor, p: Tensor, extra: Tensor | None, mode: str) -> None:
    """Fill the float32 working copy ``w`` of ``p``.

    A master of which ``p`` is no rounding any more (somebody has written the parameter) is taken from ``p`` again.
    """
    if mode == "master" and extra is not None:
        w.copy_(torch.where(extra.to(p.dtype) == p, extra, p.float()))
    else:
        w.copy_(p)
        if mode == "compensated" and extra is not None:
            w.add_(extra)


def store(p: Tensor, w: Tensor, extra: Tensor | None, mode: str, generator: torch.Generator | None) -> None:
    """Write the working copy back into the half-precision parameter."""
    if mode == "stochastic" and generator is not None:
        p.copy_(stochastic(w, p.dtype, generator))
        return
    p.copy_(w)
    if extra is not None:
        extra.copy_(w if mode == "master" else w.sub_(p))


def stochastic(w: Tensor, dtype: torch.dtype, generator: torch.Generator) -> Tensor:
    """Round float32 to bfloat16 or float16 at random, so that the expectation is the value.

    The random bits are added below the last bit kept, which carries with the right probability; float16 goes through
    the two neighbours, since its exponent differs from float32's.
    """
    if dtype == torch.bfloat16:
        bits = w.contiguous().view(torch.int32)
        noise = torch.randint(0, 1 << 16, bits.shape, dtype=torch.int32, device=w.device, generator=generator)
        rounded = ((bits + noise) & -65536).view(torch.float32)
        return torch.where(torch.isfinite(w), rounded, w).to(dtype)
    near = w.to(dtype)
    error = w - near.float()
    toward = torch.where(error > 0, torch.inf, -torch.inf).to(dtype)
    other = torch.nextafter(near, toward)
    gap = (other.float() - near.float()).abs()
    share = torch.where(gap > 0, error.abs() / gap, torch.zeros_like(gap))
    draw = torch.rand(w.shape, device=w.device, generator=generator)
    return torch.where((draw < share) & torch.isfinite(other), other, near)
