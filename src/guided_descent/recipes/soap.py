"""SOAP: Adam in the eigenbasis of Shampoo."""

from __future__ import annotations

from dataclasses import dataclass

from guided_descent.parts import CARRIES, Decoupled, Descend, Eigenbasis, Parts
from guided_descent.recipes.adam import DECAYS, AdamW
from guided_descent.recipes.base import Recipe, hyper, lag, recipe, schedule, static, tolerance
from guided_descent.routing.roles import Block, Role


@recipe("soap", paper="Vyas et al. 2024, arXiv:2409.11321", family="kronecker")
@dataclass(frozen=True, kw_only=True)
class SOAP(Recipe):
    """SOAP: Adam in the slowly refreshed eigenbases of both sides of a matrix; plain AdamW for the rest.

    ``g' = Q_L^T g Q_R``; Adam's ``u'`` of ``g'``; ``p <- p (1 - lr wd) - lr Q_L u' Q_R^T``. The first call makes no
    update. Embeddings and heads are preconditioned as well, each side up to ``max_precond_dim``.
    """

    matrix = True

    lr: float = hyper(3e-3, ge=0, help="learning rate")
    betas: tuple[float, float] = hyper((0.95, 0.95), ge=0, lt=1, help="memory of the first and second moment")
    shampoo_beta: float | None = hyper(None, ge=0, lt=1, optional=True, help="memory of the factors; None is betas[1]")
    eps: float = hyper(1e-8, ge=0, help="added to the root of the second moment")
    weight_decay: float = hyper(0.01, ge=0, help="decay; lr * weight_decay is taken off in a step")
    precondition_frequency: int = hyper(10, ge=1, help="steps between refreshes of the bases")
    refresh_schedule: str = schedule()
    refresh_tolerance: float = tolerance()
    refresh_lag: int = lag()
    refresh_method: str = static("qr", of=("qr", "eigh"), help="one step of orthogonal iteration, or a full solve")
    second_moment: str = static("permute", of=CARRIES, help="how the second moment follows a change of basis")
    max_precond_dim: int = static(10_000, help="longer sides keep the identity")
    one_sided: bool = static(False, help="precondition the shorter side alone")
    decay: str = static(
        "decoupled", of=(*DECAYS, "after"), help="after: decay follows the step, as in the paper's code"
    )
    aux: Recipe | None = None

    def default_aux(self) -> Recipe:
        """AdamW with the same numbers."""
        decay = self.decay if self.decay in DECAYS else "decoupled"
        return AdamW(lr=self.lr, betas=self.betas, eps=self.eps, weight_decay=self.weight_decay, decay=decay)

    def route(self, block: Block) -> Recipe:
        """Matrices, embeddings and heads stay; the rest goes to the auxiliary recipe."""
        takes = block.is_matrix or (block.role in (Role.EMBEDDING, Role.HEAD) and len(block.shape) == 2)
        return self if takes and min(block.shape) > 0 else self.aux or self.default_aux()

    def parts(self, block: Block) -> Parts:
        """Adam between two rotations, decay, step."""
        decay = Decoupled(independent=self.decay == "independent")
        return Parts(
            Eigenbasis(max_dim=self.max_precond_dim, one_sided=self.one_sided),
            decay.at("decay_after") if self.decay == "after" else decay,
            Descend(),
        )
