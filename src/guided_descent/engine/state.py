"""State: one tensor for each slot of a parameter, declared by the parts, bound by name, never stacked when saved.

Parameter-shaped slots are tensors of their own, with the parameter's shape and memory format. Factor-shaped slots and
step counters live in stacks; ``optimizer.state[p]`` shows their rows as views, and ``state_dict`` exports copies.
"""

from __future__ import annotations

from collections.abc import MutableMapping
from typing import Any

import torch
from torch import Tensor

from guided_descent.parallel.boxes import assign, is_dtensor, like, local
from guided_descent.parts.base import Slot
from guided_descent.routing.roles import Block

HALF = (torch.float16, torch.bfloat16)


def work_dtype(dtype: torch.dtype) -> torch.dtype:
    """Dtype of the arithmetic: float64 for float64 (and complex128) parameters, else float32."""
    return torch.float64 if dtype in (torch.float64, torch.complex128) else torch.float32


def slot_key(block: Block, name: str, lone: bool) -> str:
    """Key of a factor slot in a parameter's state: the slot's name, with the part's where there are several blocks."""
    return name if lone else f"{block.key.removeprefix(block.pieces[0].name).lstrip('.')}.{name}"


def param_slot(state: MutableMapping[str, Any], name: str, p: Tensor, slot: Slot, used: bool) -> Tensor:
    """The parameter-shaped state tensor of this name, adopted where there is one, else made.

    A tensor that came from elsewhere (another device, a narrower work dtype) is moved; its own dtype is kept unless
    arithmetic needs a wider one.
    """
    dtype = slot.dtype or work_dtype(p.dtype)
    if p.is_complex():
        dtype = torch.complex128 if dtype == torch.float64 else torch.complex64
    old = state.get(name)
    if isinstance(old, Tensor) and old.shape == p.shape and is_dtensor(old) == is_dtensor(p):
        if old.device != p.device or (slot.dtype is None and old.dtype != dtype):
            old = old.to(p.device, dtype if slot.dtype is None else old.dtype)
            state[name] = old
        return old
    if isinstance(old, Tensor) and used and old.shape != p.shape:
        raise ValueError(
            f"state {name!r} has shape {tuple(old.shape)} but its parameter now has {tuple(p.shape)}: build a new "
            "optimizer for the new shapes, or load the checkpoint that belongs to them"
        )
    fill = complex(slot.fill, slot.fill) if p.is_complex() else slot.fill  # a complex number is a pair of reals
    made = like(torch.full_like(local(p), fill, dtype=dtype, requires_grad=False), p)
    if isinstance(old, Tensor) and used:
        assign(made, old)  # of a parameter that has been sharded since, or is whole again
    state[name] = made
    return made


def real(tensor: Tensor) -> Tensor:
    """A detached tensor, complex numbers seen as pairs of reals."""
    tensor = tensor.detach()
    return torch.view_as_real(tensor) if tensor.is_complex() else tensor


def state_bytes(state: MutableMapping[str, Any]) -> int:
    """Bytes of the tensors in one parameter's state on this rank."""
    return sum(local(v).numel() * v.element_size() for v in state.values() if isinstance(v, Tensor))
