"""Steps on a sphere: weights keep the norm with which they begin, and move by a fixed share of it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from guided_descent.parts.base import Batch, Hyper, Part, Slot, State, Unit
from guided_descent.parts.step import StepRule, writable
from guided_descent.routing.roles import Block


@dataclass(frozen=True)
class Radius(Part):
    """The norm of each tensor before its first update, kept for ``SphereStep``, which brings it along.

    State: ``radius``, one number, or one for each expert of a stack.
    """

    slot: ClassVar[str] = "clip"
    unit: ClassVar[Unit] = "block"

    @property
    def reads_parameter(self) -> bool:
        """For its norm."""
        return True

    def slots(self, block: Block) -> dict[str, Slot]:
        """The norm."""
        return {"radius": Slot("factor", (block.batch,) if _stacked(block) else ())}

    def update(self, x: Batch, s: State, h: Hyper, total: Mapping[str, Tensor]) -> None:
        """Measure once, also where a method makes no step at first."""
        if x.first:
            for row, radius in zip(x.p.list, s["radius"].unbind()):
                radius.copy_(_norm(row, radius.ndim == 1).view_as(radius))


@dataclass(frozen=True)
class SphereStep(StepRule):
    """Hyperball: ``p <- R normalise(p - lr R normalise(u))`` with ``normalise(x) = x / ||x||_F`` and ``R = ||p_0||_F``.

    The length of a direction does not matter, nor does decay, whose parts it takes out. Works on every recipe that
    steps by ``p - lr u``, as in ``gd.AdamW(model, add=[gd.parts.SphereStep()])``, for its matrices, each expert of a
    stack by itself; the rest keeps the recipe's own step and decay. A matrix of zeros is on no sphere and takes the
    recipe's step. State: that of ``Radius``. Source: Wen et al. 2026, 2606.16899.
    """

    unit: ClassVar[Unit] = "block"
    replaces: ClassVar[frozenset[str]] = frozenset({"decay_before", "step", "decay_after"})

    def takes(self, block: Block) -> bool:
        """Matrices only."""
        return block.is_matrix

    def among(self, parts: tuple[Part, ...]) -> tuple[Part, ...]:
        """Neither step nor decay of the recipe, but the radius."""
        return (*super().among(parts), Radius())

    def update(self, x: Batch, s: State, h: Hyper, total: Mapping[str, Tensor]) -> None:
        """Step along the sphere of each tensor."""
        w, u = writable(x), x.own()
        rate = h[self.lr] * x.lr_scale
        for row, direction, radius in zip(w.list, u.list, s["radius"].unbind()):
            stacked = radius.ndim == 1
            r = radius.view(-1, *[1] * (row.ndim - 1)) if stacked else radius
            length = _norm(direction, stacked)
            share = torch.where(length > 0, r / length, 0.0)
            row.sub_(direction.mul_(torch.where(r > 0, share, x.factor) * rate))
            norm = _norm(row, stacked)
            row.mul_(torch.where((r > 0) & (norm > 0), r / norm, 1.0))

    def flops(self, block: Block) -> float:
        """About 8 per element."""
        return 8.0 * block.numel


def _stacked(block: Block) -> bool:
    """Whether axis 0 of its tensor counts matrices."""
    return block.batch > 1 and block.pieces[0].shape[0] == block.batch


def _norm(row: Tensor, stacked: bool) -> Tensor:
    """The norm of a tensor, or of each matrix along axis 0 ``[E, 1, ...]``."""
    dims = tuple(range(1, row.ndim)) if stacked else None
    norm: Tensor = torch.linalg.vector_norm(row, dim=dims, keepdim=stacked)
    return norm
