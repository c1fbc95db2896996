"""SPlus: the sign of the momentum in Shampoo's eigenbases."""

from __future__ import annotations

from dataclasses import dataclass, field

from guided_descent.parts import Parts
from guided_descent.parts.geometry.splus import ShapedDecay, SignEigenbasis
from guided_descent.parts.step import Descend
from guided_descent.recipes.adam import AdamW
from guided_descent.recipes.base import Recipe, decay_kind, hyper, recipe, static
from guided_descent.recipes.kronecker import Kronecker
from guided_descent.routing.roles import Block


@recipe(
    "splus",
    paper="Frans, Levine and Abbeel 2025, arXiv:2506.07254",
    family="kronecker",
    use="fast early progress at large learning rates, evaluated on an average",
    avoid="evaluation of the live weights",
    start="lr 0.1, an EMA with memory 0.999",
)
@dataclass(frozen=True, kw_only=True)
class SPlus(Kronecker):
    """SPlus: the sign of the momentum in slowly refreshed eigenbases, with a step that depends on the shape.

    ``u = Q_L sign(Q_L^T m Q_R) Q_R^T``; ``p <- p (1 - lr wd) - lr s u`` with ``s = 2 / (m + n)``, or 0.001 where a side
    is longer than ``max_precond_dim``. In the paper decay has the scale as well, ``1 - lr s wd`` with ``wd = 0.01``:
    ``decay="shaped"``, and ``"after"`` in its code; the default, of a usual size, does not depend on the shape. The
    bases are the identity in the first step. AdamW takes the rest, with a learning rate of its own.

    The paper evaluates an average of the weights with memory 0.999, which is a matter of its own here::

        average = gd.averaging.EMA(model, decay=0.999, optimizer=optimizer)
        ...
        optimizer.step()
        average.update()

    and ``with gd.evaluating(model, average): ...`` around the evaluation.
    """

    lr: float = hyper(0.1, ge=0, help="learning rate; the shape's scale 2 / (m + n) comes on top")
    betas: tuple[float, float] = hyper((0.9, 0.999), ge=0, lt=1, help="memory of the momentum and of the factors")
    precondition_frequency: int = hyper(100, ge=1, help="steps between refreshes of the bases")
    refresh_method: str = static("eigh", of=("eigh", "qr"), help="a full solve, or one step of orthogonal iteration")
    weight_decay: float = hyper(1e-4, ge=0, help="decay; lr * weight_decay is taken off in a step")
    decay: str = decay_kind(
        "decoupled",
        *("shaped", "after"),
        help="shaped: lr * s * weight_decay; after: the same, following the step, as in the paper's code",
    )
    aux: Recipe | None = field(default_factory=lambda: AdamW(lr=1e-3))

    def parts(self, block: Block) -> Parts:
        """Signs in the eigenbases, decay, step."""
        geometry = SignEigenbasis(max_dim=self.max_precond_dim)
        if self.decay not in ("shaped", "after"):
            return self.finish(geometry)
        decay = ShapedDecay(max_dim=self.max_precond_dim)
        return Parts(geometry, decay.at("decay_after") if self.decay == "after" else decay, Descend())
