"""SOAP: Adam in the eigenbasis of Shampoo."""

from __future__ import annotations

from dataclasses import dataclass, replace

from guided_descent.parts import CARRIES, Eigenbasis, Parts
from guided_descent.recipes.adam import AdamW
from guided_descent.recipes.base import hyper, recipe, static
from guided_descent.recipes.kronecker import Kronecker
from guided_descent.routing.roles import Block


@recipe(
    "soap",
    paper="Vyas et al. 2024, arXiv:2409.11321",
    family="kronecker",
    use="the fewest steps of the common methods on language models",
    avoid="memory: two factors and two bases for each matrix",
    start="lr 3e-3, betas (0.95, 0.95), refresh 10",
)
@dataclass(frozen=True, kw_only=True)
class SOAP(Kronecker):
    """SOAP: Adam in the slowly refreshed eigenbases of both sides of a matrix; plain AdamW for the rest.

    ``g' = Q_L^T g Q_R``; Adam's ``u'`` of ``g'``; ``p <- p (1 - lr wd) - lr Q_L u' Q_R^T``. The first call makes no
    update. Embeddings and heads are preconditioned as well, each side up to ``max_precond_dim``.
    """

    lr: float = hyper(3e-3, ge=0, help="learning rate")
    betas: tuple[float, float] = hyper((0.95, 0.95), ge=0, lt=1, help="memory of the first and second moment")
    eps: float = hyper(1e-8, ge=0, help="added to the root of the second moment")
    refresh_method: str = static("qr", of=("qr", "eigh"), help="one step of orthogonal iteration, or a full solve")
    second_moment: str = static("permute", of=CARRIES, help="how the second moment follows a change of basis")
    one_sided: bool = static(False, help="precondition the shorter side alone")

    def default_aux(self) -> AdamW:
        """AdamW with the same numbers."""
        return replace(super().default_aux(), eps=self.eps)

    def parts(self, block: Block) -> Parts:
        """Adam between two rotations, decay, step."""
        return self.finish(Eigenbasis(max_dim=self.max_precond_dim, one_sided=self.one_sided))
