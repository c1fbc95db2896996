"""The step itself. It and the decay are the only parts that write parameters, through ``x.w``."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from guided_descent.parts.base import Batch, Hyper, Part, State
from guided_descent.parts.rows import Rows
from guided_descent.routing.roles import Block


def writable(x: Batch) -> Rows:
    """The parameters that a part in a writing slot may change; an error anywhere else."""
    if x.w is None:
        raise RuntimeError("parameters can be written only in the slots decay_before, step, decay_after and average")
    return x.w


@dataclass(frozen=True)
class Descend(Part):
    """The additive step: ``p <- p - lr u``."""

    slot: ClassVar[str] = "step"
    lr: str = "lr"

    @property
    def keys(self) -> tuple[str, ...]:
        """Group keys it reads."""
        return (self.lr,)

    def update(self, x: Batch, s: State, h: Hyper, total: Mapping[str, Tensor]) -> None:
        """Subtract the direction, scaled."""
        writable(x).add_(x.u, alpha=-(h[self.lr] * x.lr_scale * x.factor))

    def flops(self, block: Block) -> float:
        """Two per element."""
        return 2.0 * block.numel


@dataclass(frozen=True)
class Displace(Part):
    """The step of a direction that holds its learning rate: ``p <- p - u``."""

    slot: ClassVar[str] = "step"

    def update(self, x: Batch, s: State, h: Hyper, total: Mapping[str, Tensor]) -> None:
        """Subtract the direction."""
        writable(x).add_(x.u, alpha=-x.factor)

    def flops(self, block: Block) -> float:
        """Two per element."""
        return 2.0 * block.numel
