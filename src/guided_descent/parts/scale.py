"""Scales: how long the step of a direction is, by shape."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from guided_descent.parts.base import Batch, Hyper, Part, State

#: Lengths of an orthogonal update of shape (m, n) = (out, in). Learning rates are not comparable across them.
SCALES: dict[str, Callable[[int, int], float]] = {
    # Jordan et al. 2024: unit spectral norm for wide matrices, more for tall ones
    "original": lambda m, n: max(1.0, m / n) ** 0.5,
    # Liu et al. 2025, 2502.16982: update RMS 0.2, as AdamW's, so its learning rate and decay carry over
    "match_rms_adamw": lambda m, n: 0.2 * max(m, n) ** 0.5,
    # Bernstein 2025; Pethick et al. 2025, 2502.07529: unit RMS-to-RMS operator norm, carries over widths
    "spectral": lambda m, n: (m / n) ** 0.5,
}


@dataclass(frozen=True)
class MatrixScale(Part):
    """Multiply an orthogonal direction ``[m, n]`` by its convention's factor; see ``SCALES``."""

    slot: ClassVar[str] = "scale"
    scale: str = "scale"

    @property
    def keys(self) -> tuple[str, ...]:
        """Group keys it reads."""
        return (self.scale,)

    def update(self, x: Batch, s: State, h: Hyper, total: Mapping[str, Tensor]) -> None:
        """Scale the direction; the step applies it."""
        x.scale(SCALES[h[self.scale]](*x.shape[-2:]))
