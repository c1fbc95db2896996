"""Muon: momentum, orthogonalised."""

from __future__ import annotations

from dataclasses import dataclass, field

from guided_descent.linalg.polar import METHODS, NAMES
from guided_descent.parts import DECAYS, NS_DTYPES, SCALES, Descend, Ema, MatrixScale, Parts, Polar
from guided_descent.recipes.adam import AdamW
from guided_descent.recipes.base import Recipe, decay_kind, hyper, recipe, static
from guided_descent.routing.roles import Block


@recipe(
    "muon",
    paper="Jordan et al. 2024; Liu et al. 2025, arXiv:2502.16982",
    family="spectral",
    use="hidden matrices of transformers: fewer steps than AdamW at little more cost",
    avoid="embeddings, heads and vectors, which it leaves to adamw",
    start="lr 0.02, momentum 0.95; the auxiliary lr as for AdamW",
)
@dataclass(frozen=True, kw_only=True)
class Muon(Recipe):
    """Muon: the polar factor of the momentum for matrices, AdamW for the rest.

    ``m <- mu m + (1 - mu) g``; ``O = UV^T`` of ``(1 - mu) g + mu m``; ``p <- p (1 - lr wd) - lr scale(m, n) O``.
    """

    matrix = True

    lr: float = hyper(0.02, ge=0, help="learning rate of the matrices; not comparable across scales")
    momentum: float = hyper(0.95, ge=0, lt=1, help="memory of the momentum")
    weight_decay: float = hyper(0.01, ge=0, help="decay; lr * weight_decay is taken off in a step")
    eps: float | None = hyper(None, gt=0, optional=True, help="absolute eps of the norm; None is relative to it")
    nesterov: bool = static(True, help="orthogonalise the look-ahead momentum")
    scale: str = static("original", of=SCALES, help="length convention of the update")
    coefficients: str = static("adaptive", of=NAMES, help="polynomials, fitted to each matrix or fixed; or exact")
    ns_steps: int | None = static(None, help="number of polynomial steps; None takes the table's")
    ns_dtype: str = static("auto", of=NS_DTYPES, help="dtype of the orthogonalisation")
    ns_method: str = static("auto", of=METHODS, help="standard: the order of operations of torch.optim.Muon")
    decay: str = decay_kind()
    aux: Recipe = field(default_factory=lambda: AdamW(lr=3e-4, betas=(0.9, 0.95)))

    def route(self, block: Block) -> Recipe:
        """Matrices stay, the rest goes to the auxiliary recipe."""
        return self if block.is_matrix else self.aux

    def parts(self, block: Block) -> Parts:
        """Momentum, polar factor, scale, decay, step."""
        return Parts(
            Ema(nesterov=self.nesterov),
            Polar(),
            MatrixScale(),
            DECAYS[self.decay],
            Descend(),
        )
