"""Layer-wise rates from the gradients of single samples."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from guided_descent.parts.base import Batch, Hyper, Slot, State, key
from guided_descent.parts.geometry.reading import Reading, admit, gather, hold_uncaptured
from guided_descent.parts.layerwise import LarsRatio
from guided_descent.routing.roles import Block

if TYPE_CHECKING:
    from guided_descent.capture import LayerIO


@dataclass(frozen=True)
class ClarsRatio(Reading, LarsRatio):
    """CLARS: LARS with the mean norm of the samples' gradients in the place of the norm of their mean.

    ``lam = eta ||p|| / (1/N sum_i ||g_i|| + wd ||p|| + eps)``, where ``g_i`` is the gradient of sample i. The mean is
    never below the norm of the mean, and far above it while samples disagree, so that the rate begins low by itself.
    The norms come from the inputs and output gradients of the layer, exactly, positions of a sequence or image summed
    within each sample; a table used by two layers (embedding and head) has the sum of both norms, which is at least
    that of the sum. Loss scales and the division by the number of micro-batches are undone. Layers are looked at every
    ``factor_frequency`` steps; between two looks the larger of the last mean and the batch's norm counts. A block that
    no capture has reached makes no update (``uncaptured``); a capture that is not finite is left out (``repairs``).

    State: ``sample_norm``, the last mean, and ``captures``.

    Source: Huo, Gu and Huang 2020, 2002.01576. The paper's text could not be had: this is the rule as it is known from
    its abstract and secondary notes, with LARS's handling of decay and of zeros.
    """

    every: str = key("factor_frequency")

    def slots(self, block: Block) -> dict[str, Slot]:
        """The mean norm of the samples' gradients, and the number of captures."""
        return super().slots(block) | {"sample_norm": Slot("factor", ())}

    def observe(self, seen: dict[str, Tensor], io: LayerIO, s: State, block: Block, h: Hyper) -> None:
        """Add the norms of the samples' gradients, and the number of loss terms."""
        norms = io.per_sample_squared_norms().sqrt().double().sum()
        gather(seen, "norms", norms)
        gather(seen, "terms", norms.new_tensor(io.terms / io.users))

    def update(self, x: Batch, s: State, h: Hyper, total: Mapping[str, Tensor]) -> None:
        """Take the means if there are any, then as LARS."""
        if x.seen is not None and "norms" in x.seen:
            # the loss of each of k passes was divided by k
            mean = x.seen["norms"] * x.seen["count"] / x.seen["terms"].clamp(min=1e-9)
            good = admit(x, s, x.seen["terms"] > 0, mean.isfinite())
            s["sample_norm"].copy_(torch.where(good, mean.to(s["sample_norm"].dtype), s["sample_norm"]))
        if not hold_uncaptured(x, s):
            super().update(x, s, h, total)

    def lengths(self, x: Batch, s: State) -> Tensor:
        """The mean norm of the samples' gradients of each row."""
        return torch.maximum(s["sample_norm"], super().lengths(x, s))

    def flops(self, block: Block) -> float:
        """About 7 per element, and the norms of the samples, which depend on the data."""
        return 7.0 * block.numel
