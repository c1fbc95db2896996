"""State in few bits: parameter-shaped averages in bfloat16, or in 8 bits with a scale for every 256 elements.

A part sees its state in the work dtype: a slice is unpacked before its parts run and packed when they have. Only slots
that say how are packed. In 8 bits a ``signed`` number has a sign, 4 bits of exponent and 3 of mantissa, and goes down
to 2^-16 of the largest magnitude of its block; an ``unsigned`` one has 5 and 3, and goes down to 2^-32. An unsigned
number that is not 0 never becomes 0, so that no second moment vanishes under a first moment that does not.

Packing rounds up or down so that the mean over time is right: a number between two codes takes the upper one in as many
steps as its distance says, by a sequence that depends on the step and the place alone. With rounding to nearest an
average would stand still as soon as a step changes it by less than half a code: a second moment at beta2 = 0.999
changes by 0.1%, while codes are 6% to 12% apart in 8 bits and 0.4% to 0.8% in bfloat16. Nothing is drawn, so that a
resumed run repeats the uninterrupted one.

In 8 bits one number that is not finite makes all of its block so.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from guided_descent.parts.base import Parts, Slot
from guided_descent.routing.roles import Block

#: How state may be held.
MODES = ("8bit", "bfloat16")
#: Elements that share a scale, and the least elements of a tensor that is packed.
GROUP, LEAST = 256, 4096
#: Bits of a float32 below the three of the mantissa that 8 bits keep, and below those of bfloat16.
_LOW, _HALF = 20, 16
#: The upper bits of 1.0, which is the largest code.
_ONE = 127 << 3
#: All bits of a float32 but the sign, and those of a number that is none.
_SIZE, _NAN = 0x7FFFFFFF, 0x7FC00000
#: Turns of the rounding sequence from step to step and from place to place: the golden ratio and the plastic number.
_STEP, _PLACE = 0.6180339887498949, 0.7548776662466927


@dataclass(frozen=True)
class Form:
    """How one slot is packed.

    Attributes:
        mode: ``8bit`` or ``bfloat16``.
        signed: Whether its numbers have signs.
    """

    mode: str
    signed: bool

    @property
    def scaled(self) -> bool:
        """Whether there are scales beside the codes."""
        return self.mode == "8bit"

    def store(self, row: Tensor, codes: Tensor, scales: Tensor | None, step: int) -> None:
        """Write a contiguous tensor as codes of its shape, and scales where it has some."""
        if scales is None:
            halve(row, codes, step)
        else:
            pack(row, codes, scales, self.signed, step)

    def load(self, row: Tensor, codes: Tensor, scales: Tensor | None) -> None:
        """Fill a contiguous tensor with what they say."""
        if scales is None:
            row.copy_(codes)
        else:
            unpack(row, codes, scales, self.signed)


def canonical(value: Any) -> str | None:
    """The value of ``state_dtype`` as groups hold it: a mode for all slots, or ``slot=mode`` for some, with commas.

    Raises:
        ValueError: It names no mode.

    Example:
        >>> canonical({"exp_avg": torch.bfloat16, "exp_avg_sq": "8bit"})
        'exp_avg=bfloat16,exp_avg_sq=8bit'
    """
    if isinstance(value, Mapping):
        value = ",".join(f"{name}={str(mode).removeprefix('torch.')}" for name, mode in value.items())
    elif isinstance(value, torch.dtype):
        value = str(value).removeprefix("torch.")
    valid = value is None or (isinstance(value, str) and all(mode in MODES for mode in chosen(value).values()))
    if not valid or value == "":
        raise ValueError(
            f"state_dtype={value!r} must be one of None, {', '.join(map(repr, MODES))}, or say so by slot, as "
            "{'exp_avg': 'bfloat16', 'exp_avg_sq': '8bit'}"
        )
    return None if value is None else str(value)


def chosen(value: str | None) -> dict[str, str]:
    """The mode of each slot that a canonical value names; under the empty name that of all."""
    if value is None:
        return {}
    if "=" not in value:
        return {"": value}
    return {name.strip(): mode.strip() for name, _, mode in (item.partition("=") for item in value.split(","))}


def choose(parts: Parts, slots: Mapping[str, Slot], value: str | None, tensor: Tensor) -> dict[str, Form]:
    """The slots of a block of a parameter that are packed, and how.

    Matrix methods, complex numbers and small tensors keep theirs.
    """
    if value is None or parts.unit == "matrix" or tensor.is_complex() or tensor.numel() < LEAST:
        return {}
    modes = chosen(value)
    named = ((name, slot, modes.get(name, modes.get(""))) for name, slot in slots.items() if slot.packs)
    return {name: Form(mode, slot.packs == "signed") for name, slot, mode in named if mode}


def check_names(value: str | None, slots: Sequence[Mapping[str, Slot]]) -> None:
    """Every slot that a canonical value names is one of these, and may be packed.

    Raises:
        ValueError: One is not; the message lists those that may.
    """
    valid = sorted({name for each in slots for name, slot in each.items() if slot.packs})
    for name in chosen(value):
        if name and name not in valid:
            raise ValueError(
                f"state_dtype names the slot {name!r}; slots that can be packed here: {', '.join(valid) or 'none'}"
            )


def declare(slots: Mapping[str, Slot], packed: Mapping[str, Form], block: Block) -> dict[str, Slot]:
    """The slots as they are stored: codes in the place of numbers, and their scales."""
    found = dict(slots)
    for name, form in packed.items():
        fill = slots[name].fill
        if form.scaled:
            found[name] = Slot(dtype=torch.uint8, fill=_top(form.signed) if fill else 0)
            found[scales_of(name)] = Slot("factor", (-(-block.numel // GROUP),), torch.float32, fill=fill)
        else:
            found[name] = Slot(dtype=torch.bfloat16, fill=fill)
    return found


def scales_of(name: str) -> str:
    """The slot with the scales of a packed slot."""
    return f"{name}_scale"


@torch.no_grad()
def halve(row: Tensor, codes: Tensor, step: int) -> None:
    """Write a contiguous tensor into one of bfloat16, of its shape in any layout, so that the mean over steps is right.

    Example:
        >>> row, codes = torch.tensor([0.5, -2.0, 0.0]), torch.empty(3, dtype=torch.bfloat16)
        >>> halve(row, codes, step=1)
        >>> codes.tolist()
        [0.5, -2.0, 0.0]
    """
    bits = row.reshape(-1).to(torch.float32).view(torch.int32)
    size = bits.bitwise_and(_SIZE).clamp_(max=_NAN)  # so that nothing that is not finite grows out of its range
    dither = _dither(step, row.device, _HALF)
    whole = bits.numel() // GROUP * GROUP
    size[:whole].view(-1, GROUP).add_(dither)
    size[whole:].add_(dither[: bits.numel() - whole])
    size.bitwise_and_(-(1 << _HALF)).bitwise_or_(bits.bitwise_and(~_SIZE))  # a float32 that bfloat16 holds exactly
    codes.copy_(size.view(torch.float32).view(row.shape))


@torch.no_grad()
def pack(row: Tensor, codes: Tensor, scales: Tensor, signed: bool, step: int) -> None:
    """Write a contiguous tensor as codes ``[...]`` of its shape, in any layout, and scales ``[elements / 256]``.

    Example:
        >>> row, codes, scales = torch.tensor([0.5, -2.0, 0.0]), torch.empty(3, dtype=torch.uint8), torch.empty(1)
        >>> pack(row, codes, scales, signed=True, step=1)
        >>> unpack(row.zero_(), codes, scales, signed=True)
        >>> row.tolist(), scales.tolist()
        ([0.5, -2.0, 0.0], [2.0])
    """
    flat = row.reshape(-1)
    found = codes.view(-1) if codes.is_contiguous() else torch.empty(flat.shape, dtype=torch.uint8, device=row.device)
    whole = flat.numel() // GROUP * GROUP
    dither = _dither(step, row.device, _LOW)
    for a, b, shape in ((0, whole, (-1, GROUP)), (whole, flat.numel(), (1, -1))):
        if a < b:
            part = scales[a // GROUP : -(-b // GROUP)]
            _encode(flat[a:b].view(shape), found[a:b].view(shape), part, dither, signed)
    if not codes.is_contiguous():
        codes.copy_(found.view(codes.shape))


@torch.no_grad()
def unpack(row: Tensor, codes: Tensor, scales: Tensor, signed: bool) -> None:
    """Fill a contiguous tensor with what its codes and scales say."""
    flat, table = row.view(-1), _table(signed, row.device)
    values = flat if flat.dtype == torch.float32 else torch.empty(flat.shape, device=row.device)
    torch.index_select(table, 0, codes.reshape(-1).int(), out=values)
    if values is not flat:
        flat.copy_(values)
    whole = flat.numel() // GROUP * GROUP
    flat[:whole].view(-1, GROUP).mul_(scales[: whole // GROUP, None])
    if whole < flat.numel():
        flat[whole:].mul_(scales[-1])


def _encode(x: Tensor, codes: Tensor, scales: Tensor, dither: Tensor, signed: bool) -> None:
    """Codes of rows [n, at most 256] with a scale each, on the bits of float32: comparisons cost several times more."""
    x = x if x.dtype == torch.float32 else x.float()
    size = x.abs()
    scales.copy_(size.amax(1))
    bits = size.div_(torch.where(scales == 0, 1.0, scales)[:, None]).view(torch.int32)
    least, half = _least(signed)
    kept = torch.sub((half if signed else 1) - 1, bits).bitwise_right_shift_(31)  # all ones where it does not become 0
    bits.clamp_(min=least).add_(dither[: x.shape[1]])
    bits.bitwise_right_shift_(_LOW).sub_(_ONE - _top(signed)).bitwise_and_(kept)
    if signed:
        bits.bitwise_or_(x.view(torch.int32).bitwise_right_shift(24).bitwise_and_(128))
    codes.copy_(bits)


def _top(signed: bool) -> int:
    """The largest code of a magnitude."""
    return 127 if signed else 255


@lru_cache(maxsize=2)
def _least(signed: bool) -> tuple[int, int]:
    """The bits of the magnitude of code 1 and of half of it, as numbers; they rise with it."""
    value = _table(signed, torch.device("cpu"))[1]
    return int(value.view(torch.int32)), int((value / 2).view(torch.int32))


@lru_cache(maxsize=16)
def _table(signed: bool, device: torch.device) -> Tensor:
    """What each code stands for, relative to the scale [256]."""
    code = torch.arange(256, dtype=torch.int32)
    size = ((code & _top(signed)) + (_ONE - _top(signed))).bitwise_left_shift(_LOW).view(torch.float32)
    size = torch.where((code & _top(signed)) == 0, 0.0, size)
    return (torch.where(code >= 128, -size, size) if signed else size).to(device)


def _dither(step: int, device: torch.device, bits: int) -> Tensor:
    """What is added below the last bit that is kept in this step, by place in the block [256]."""
    places = torch.arange(GROUP, dtype=torch.float64) * _PLACE + step * _STEP
    return (places.frac() * (1 << bits)).to(device, torch.int32)
