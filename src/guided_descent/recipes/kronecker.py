"""What the recipes with Kronecker factors share: where blocks go, how they decay, and most of their numbers."""

from __future__ import annotations

from dataclasses import dataclass

from guided_descent.parts import DECAYS, Descend, Part, Parts
from guided_descent.recipes.adam import AdamW
from guided_descent.recipes.base import Recipe, decay_kind, hyper, lag, product_dtype, schedule, static, tolerance
from guided_descent.routing.roles import Block, Role


@dataclass(frozen=True, kw_only=True)
class Kronecker(Recipe):
    """Slow factors of both sides, decay, AdamW for what is no matrix."""

    matrix = True

    lr: float = hyper(1e-3, ge=0, help="learning rate")
    betas: tuple[float, float] = hyper((0.9, 0.99), ge=0, lt=1, help="memory of the first and second moment")
    shampoo_beta: float | None = hyper(None, ge=0, lt=1, optional=True, help="memory of the factors; None is betas[1]")
    weight_decay: float = hyper(0.01, ge=0, help="decay; lr * weight_decay is taken off in a step")
    precondition_frequency: int = hyper(10, ge=1, help="steps between refreshes")
    refresh_schedule: str = schedule()
    refresh_tolerance: float = tolerance()
    refresh_lag: int = lag()
    max_precond_dim: int = static(10_000, help="longer sides keep the identity")
    product_dtype: str = product_dtype()
    decay: str = decay_kind("decoupled", "after", help="after: decoupled, following the step, as in the paper's code")
    aux: Recipe | None = None

    def default_aux(self) -> AdamW:
        """AdamW with the same numbers."""
        decay = self.decay if self.decay in DECAYS else "decoupled"
        return AdamW(lr=self.lr, betas=self.betas, weight_decay=self.weight_decay, decay=decay)

    def route(self, block: Block) -> Recipe:
        """Matrices, embeddings and heads stay; the rest goes to the auxiliary recipe."""
        takes = block.is_matrix or (block.role in (Role.EMBEDDING, Role.HEAD) and len(block.shape) == 2)
        return self if takes and min(block.shape) > 0 else self.spare()

    def finish(self, *parts: Part) -> Parts:
        """These parts, decay, step."""
        decay = DECAYS["decoupled"].at("decay_after") if self.decay == "after" else DECAYS[self.decay]
        return Parts(*parts, decay, Descend())
