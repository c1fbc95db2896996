"""Shadows: the stored averages of a model's weights, in enough precision, moved in place and without allocation."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .weights import Slot, local, slots_of

_SCRATCH = 1 << 22  # elements; narrower weights are widened through a buffer of this size, or of the largest tensor


@dataclass(frozen=True)
class _Batch:
    """Tensors moved by one call: their places in the list of slots, their shadows and, if they need it, scratch."""

    places: list[int]
    shadows: list[Tensor]
    scratch: list[Tensor] | None


class Shadows:
    """One shadow per trainable parameter and, on request, per floating-point buffer.

    Args:
        model: the averaged module.
        dtype: least precision of a shadow; a float64 weight keeps float64.
        buffers: whether to shadow floating-point buffers.
    """

    def __init__(self, model: nn.Module, dtype: torch.dtype, buffers: bool) -> None:
        self.model = model
        self.dtype = dtype
        self.slots: list[Slot] = []
        self.frozen: list[Slot] = []
        for slot in slots_of(model):
            if slot.is_buffer:
                if buffers and (slot.tensor.is_floating_point() or slot.tensor.is_complex()):
                    self.slots.append(slot)
            else:
                (self.slots if slot.tensor.requires_grad else self.frozen).append(slot)
        self.tensors = [self._zeros(slot.tensor) for slot in self.slots]
        self._layout: list[Any] = []
        self._batches: list[_Batch] = []

    def named(self, *, buffers: bool) -> dict[str, Tensor]:
        """Return the shadows of the parameters, or of the buffers, by canonical name.

        Raises:
            RuntimeError: a module was replaced since the shadows were made.
        """
        now = {slot.name: slot for slot in slots_of(self.model)}
        for slot in self.slots:
            if slot.name not in now or now[slot.name].holder is not slot.holder:
                raise RuntimeError(
                    f"{slot.name!r} is no longer where it was: a module was added, removed or replaced after the "
                    "average was made; make the average last, or a new one"
                )
        return {slot.name: t for slot, t in zip(self.slots, self.tensors, strict=True) if slot.is_buffer == buffers}

    @torch.no_grad()
    def lerp_(self, rate: float, *, used: bool, values: Mapping[str, Tensor] | None = None) -> None:
        """Move every shadow: a <- a + rate (w - a).

        Args:
            rate: in (0, 1]; at 1 the shadow becomes the weight exactly.
            used: whether the shadows hold anything; unused ones are made anew where the weights have changed place.
            values: what to take in the place of live weights, by canonical name.
        """
        self.adopt_unfrozen()
        taken = values or {}
        live = [local(taken.get(slot.name, slot.tensor)) for slot in self.slots]
        layout = [(w.dtype, w.device, w.shape) for w in live]
        if layout != self._layout:  # the first call, or the model was moved, cast or sharded since
            self._settle(live, used)
            self._layout = layout
        for batch in self._batches:
            weights = [live[i] for i in batch.places]
            if batch.scratch is not None:
                torch._foreach_copy_(batch.scratch, weights)
                weights = batch.scratch
            torch._foreach_lerp_(batch.shadows, weights, rate)

    def _zeros(self, tensor: Tensor) -> Tensor:
        return torch.zeros_like(tensor, dtype=torch.promote_types(tensor.dtype, self.dtype), requires_grad=False)

    def adopt_unfrozen(self) -> None:
        """Give shadows to parameters that were frozen: their average so far is their (constant) value."""
        for slot in [slot for slot in self.frozen if slot.tensor.requires_grad]:
            self.frozen.remove(slot)
            self.slots.append(slot)
            self.tensors.append(self._zeros(slot.tensor).copy_(slot.tensor))

    def _settle(self, live: list[Tensor], used: bool) -> None:
        """Bring the shadows to where the weights are now and group them into batches."""
        for i, (slot, weight) in enumerate(zip(self.slots, live, strict=True)):
            shadow = self.tensors[i]
            if not used:
                self.tensors[i] = self._zeros(slot.tensor)
            elif local(shadow).shape != weight.shape:
                raise RuntimeError(
                    f"{slot.name!r} now has the shape {list(weight.shape)} here, its average "
                    f"{list(local(shadow).shape)}: shard or resize the model before its average is made"
                )
            else:
                self.tensors[i] = shadow.to(weight.device)
        kinds: dict[tuple[Any, ...], list[int]] = {}
        for i, (shadow, weight) in enumerate(zip(self.tensors, live, strict=True)):
            kinds.setdefault((weight.device, shadow.dtype, weight.dtype), []).append(i)
        self._batches = []
        for (device, wide, narrow), places in kinds.items():
            shadows = [local(self.tensors[i]) for i in places]
            if wide == narrow:
                self._batches.append(_Batch(places, shadows, None))
                continue
            sizes = [t.numel() for t in shadows]
            room = torch.empty(max(min(_SCRATCH, sum(sizes)), max(sizes)), dtype=wide, device=device)
            self._batches += _through(room, places, shadows)


def _through(scratch: Tensor, places: list[int], shadows: list[Tensor]) -> list[_Batch]:
    """Split tensors into batches that fit the scratch buffer, each with its views of it."""
    batches: list[_Batch] = []
    room = -1
    for place, shadow in zip(places, shadows, strict=True):
        if shadow.numel() > room:
            batches.append(_Batch([], [], []))
            room = scratch.numel()
        offset = scratch.numel() - room
        batch = batches[-1]
        assert batch.scratch is not None
        batch.places.append(place)
        batch.shadows.append(shadow)
        batch.scratch.append(scratch[offset : offset + shadow.numel()].view(shadow.shape))
        room -= shadow.numel()
    return batches
