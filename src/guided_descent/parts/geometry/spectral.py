"""Spectral geometry: the direction of unit spectral norm, the polar factor of the momentum."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from guided_descent.linalg.polar import polar
from guided_descent.parts.base import Batch, Hyper, Part, Slot, State, Unit
from guided_descent.routing.roles import Block

#: Dtypes in which the orthogonalisation may run; ``auto`` is bfloat16 where the device multiplies it natively.
NS_DTYPES: dict[str, torch.dtype | None] = {
    "auto": None,
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float64": torch.float64,
}


@dataclass(frozen=True)
class Polar(Part):
    """Orthogonalise the direction: ``u <- U V^T`` of ``u = U S V^T``, for each matrix ``[m, n]`` of the stack.

    Counted as ``orthogonalizations``. Source: Jordan et al. 2024; coefficients in ``guided_descent.linalg``.
    """

    slot: ClassVar[str] = "geometry"
    unit: ClassVar[Unit] = "matrix"
    coefficients: str = "coefficients"
    steps: str = "ns_steps"
    dtype: str = "ns_dtype"
    method: str = "ns_method"
    eps: str = "eps"

    @property
    def keys(self) -> tuple[str, ...]:
        """Group keys it reads."""
        return (self.coefficients, self.steps, self.dtype, self.method, self.eps)

    def slots(self, block: Block) -> dict[str, Slot]:
        """None: the polar factor remembers nothing."""
        return {}

    def update(self, x: Batch, s: State, h: Hyper, total: Mapping[str, Tensor]) -> None:
        """Replace each matrix of the direction by its polar factor; the length of the input does not matter."""
        u = x.take().whole
        polar(
            u,
            coefficients=h[self.coefficients],
            steps=h[self.steps],
            dtype=NS_DTYPES[h[self.dtype]],
            eps=h[self.eps],
            method=h[self.method],
            out=u,
            work=x.work,
        )
        x.tick("orthogonalizations")

    def flops(self, block: Block) -> float:
        """At most five standard quintic steps: ``20 r^2 c + 10 r^3`` with r the smaller side."""
        short, long = sorted(block.shape[-2:])
        return block.batch * (20.0 * short**2 * long + 10.0 * short**3)

    def scratch(self, block: Block) -> int:
        """None: one matrix at a time is orthogonalised, and the bound may be exceeded by one matrix."""
        return 0
