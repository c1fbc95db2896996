"""What the methods that read layers share: when they look, the sums that they gather, and blocks that wait for them."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor

from guided_descent.parts.base import Batch, Hyper, Needs, Part, Slot, State, Unit, key
from guided_descent.routing.roles import Block

if TYPE_CHECKING:
    from guided_descent.capture import LayerIO

#: Elements of per-sample gradients that are made at once.
CHUNK = 1 << 22


class Reading(Part):
    """A metric of matrices that is made of layer inputs and output gradients, captured every few steps.

    A subclass has three fields that name group keys, each at its own place among the others: ``every``: steps between
    captures; ``approx``: whether positions are data (``expand``) or averaged first (``reduce``); ``fisher``: where the
    labels come from. State: ``captures``, their number for each block.
    """

    slot: ClassVar[str] = "geometry"
    unit: ClassVar[Unit] = "matrix"
    needs: ClassVar[Needs] = Needs(layer_io=True)
    every: str = key()
    approx: str = key()
    fisher: str = key()

    def slots(self, block: Block) -> dict[str, Slot]:
        """The number of captures."""
        return super().slots(block) | {"captures": Slot("factor", (), torch.int64)}

    def observes(self, h: Hyper, step: int) -> bool:
        """Every ``factor_frequency`` steps, beginning with the first."""
        return (step - 1) % int(h[self.every]) == 0

    def empirical(self, h: Hyper) -> bool:
        """Whether the passes are those of the losses, which k micro-batches divide by k."""
        return bool(h[self.fisher] == "empirical")


# -- sums --------------------------------------------------------------------------------------------------------------


def gather(seen: dict[str, Tensor], name: str, value: Tensor) -> None:
    """Add to a sum."""
    seen[name] = seen[name] + value if name in seen else value


def over(rows: Tensor, like: Tensor) -> Tensor:
    """A value for each row, shaped to broadcast over ``like``."""
    return rows.reshape(-1, *[1] * (like.ndim - 1))


def estimate(seen: Mapping[str, Tensor], side: str, empirical: bool) -> tuple[Tensor, Tensor]:
    """The factor of one side by block [B, ...], the sum of its sources, and which blocks have seen one [B]."""
    value: Tensor | None = None
    has: Tensor | None = None
    for source in ("inputs", "gradients"):
        name = f"{side}.{source}"
        if name not in seen:
            continue
        count = seen[f"{name}.count"]
        mean = seen[name] / over(count.clamp(min=1), seen[name]).to(seen[name].dtype)
        if source == "gradients" and empirical:  # the loss of each of k passes was divided by k
            mean = mean * over(seen["count"].square(), mean).to(mean.dtype)
        value = mean if value is None else value + mean
        has = count > 0 if has is None else has | (count > 0)
    if value is None or has is None:
        rows = len(seen["count"])
        return seen["count"].new_zeros(rows, 1), seen["count"].new_zeros(rows, dtype=torch.bool)
    return value, has


def finite(value: Tensor) -> Tensor:
    """Which rows of [B, ...] hold neither NaN nor infinity [B]; both ends of their range, which is one pass each."""
    flat = value.flatten(1)
    if not flat.numel():
        return torch.ones(len(flat), dtype=torch.bool, device=flat.device)
    return flat.amax(1).isfinite() & flat.amin(1).isfinite()


def chunks(io: LayerIO, each: int) -> Iterator[LayerIO]:
    """The samples of a layer in runs whose per-sample matrices of ``each`` elements fit the memory that is allowed."""
    step = max(1, CHUNK // max(each, 1))
    for i in range(0, len(io.a), step):
        yield dataclasses.replace(io, a=io.a[i : i + step], d=None if io.d is None else io.d[i : i + step])


# -- blocks ------------------------------------------------------------------------------------------------------------


def admit(x: Batch, s: State, fresh: Tensor, finite: Tensor) -> Tensor:
    """Count the captures of the blocks that saw something finite, which it returns [B]; others count as repairs."""
    bad = fresh & ~finite
    if bool(bad.any()):
        x.tick("repairs", bad.long().tolist())
    good = fresh & finite
    x.tick("captures", good.long().tolist())
    s["captures"].add_(good)
    return good


def hold_uncaptured(x: Batch, s: State) -> bool:
    """Hold blocks that no capture has reached; whether that is all of them. Compiled code looks at no value."""
    if isinstance(x.step, Tensor):
        return False
    ready: list[bool] = (s["captures"] > 0).tolist()
    if all(ready):
        return False
    x.tick("uncaptured", [int(not yes) for yes in ready])
    if not any(ready):
        x.hold()
        return True
    scales = x.wd_scale if isinstance(x.wd_scale, list) else [x.wd_scale] * sum(len(b.pieces) for b in x.blocks)
    owners = [yes for block, yes in zip(x.blocks, ready) for _ in block.pieces]
    x.wd_scale = [scale if yes else 0.0 for scale, yes in zip(scales, owners)]
    return False
