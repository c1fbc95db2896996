"""Scales: how long the step of a direction is, by shape."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from guided_descent.parts.base import Batch, Hyper, Part, State, Unit, key
from guided_descent.routing.roles import Block

#: Lengths of an orthogonal update of shape (m, n) = (out, in). Learning rates are not comparable across them.
SCALES: dict[str, Callable[[int, int], float]] = {
    # Jordan et al. 2024: unit spectral norm for wide matrices, more for tall ones
    "original": lambda m, n: max(1.0, m / n) ** 0.5,
    # Liu et al. 2025, 2502.16982: update RMS 0.2, as AdamW's, so its learning rate and decay carry over
    "match_rms_adamw": lambda m, n: 0.2 * max(m, n) ** 0.5,
    # Bernstein 2025; Pethick et al. 2025, 2502.07529: unit RMS-to-RMS operator norm, carries over widths
    "spectral": lambda m, n: (m / n) ** 0.5,
    # NVIDIA 2025, Emerging-Optimizers, there called "spectral": update RMS 1, so that lr is the RMS of a step
    "nvidia_spectral": lambda m, n: float(max(m, n)) ** 0.5,
}


@dataclass(frozen=True)
class MatrixScale(Part):
    """Multiply an orthogonal direction ``[m, n]`` by its convention's factor; see ``SCALES``."""

    slot: ClassVar[str] = "scale"
    scale: str = key("scale")

    def update(self, x: Batch, s: State, h: Hyper, total: Mapping[str, Tensor]) -> None:
        """Scale the direction; the step applies it."""
        x.scale(SCALES[h[self.scale]](*x.shape[-2:]))


@dataclass(frozen=True)
class MatchRms(Part):
    """Give each matrix the root mean square that the group names: ``u <- rms sqrt(m n) / ||u||_F u``; 0 stays 0."""

    slot: ClassVar[str] = "scale"
    unit: ClassVar[Unit] = "matrix"
    rms: str = key("update_rms")

    def update(self, x: Batch, s: State, h: Hyper, total: Mapping[str, Tensor]) -> None:
        """Measure each matrix and scale it."""
        u = x.take().whole
        norm = torch.linalg.matrix_norm(u, keepdim=True)
        target = h[self.rms] * (u.shape[-2] * u.shape[-1]) ** 0.5
        u.mul_(torch.where(norm > 0, target / norm, 0.0))

    def flops(self, block: Block) -> float:
        """About 3 per element."""
        return 3.0 * block.numel


@dataclass(frozen=True)
class InverseTime(Part):
    """A step that shrinks with the parameter's own count of updates: ``u <- u / (1 + (t - 1) lr_decay)``."""

    slot: ClassVar[str] = "scale"
    lr_decay: str = key("lr_decay")

    def update(self, x: Batch, s: State, h: Hyper, total: Mapping[str, Tensor]) -> None:
        """Scale the direction; the step applies it."""
        x.scale(1 / (1 + (x.step - 1) * h[self.lr_decay]))
