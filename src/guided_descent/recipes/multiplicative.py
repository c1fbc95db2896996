"""Multiplicative methods: weights change by a share of themselves, and keep their signs."""

from __future__ import annotations

from dataclasses import dataclass

from guided_descent.parts import RULES, BoundedRatio, Descend, Exponential, Parts
from guided_descent.recipes.adam import Adam
from guided_descent.recipes.base import Recipe, hyper, recipe, static
from guided_descent.recipes.sgd import SGD
from guided_descent.routing.roles import Block

#: How tensors of one dimension and none are updated: many begin at 0, where a multiplicative step would leave them.
VECTORS = ("additive", "multiplicative")


def _additive(block: Block, vectors: str) -> bool:
    return vectors == "additive" and len(block.shape) < 2


@dataclass(frozen=True, kw_only=True)
class Multiplicative(Recipe):
    """What turns a recipe into a multiplicative one: ``class MLion(Multiplicative, Lion)`` and it is done."""

    rule: str = static("m_abs", of=RULES, help="the step: m_abs, m_spow, or their mixture with the additive one, h_abs")
    lr_in: float = hyper(1.0, ge=0, help="factor of the direction inside tanh")
    lr_out_scale: float = hyper(1.0, ge=0, help="lr_out / lr: a multiplicative step is at most the share lr_out")
    gamma: float = hyper(1.0, ge=0, le=1, help="share of the multiplicative step in h_abs; 0 is the base recipe")
    vectors: str = static(
        "additive", of=VECTORS, help="the step of biases and gains; from 0 only an additive one moves"
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.rule != "h_abs" and self.gamma != 1:
            raise ValueError(
                f"gamma={self.gamma} of {self.label} is the mixture of rule='h_abs', and the rule is {self.rule!r}: "
                "leave gamma at 1 or choose rule='h_abs'"
            )

    def parts(self, block: Block) -> Parts:
        """Those of the recipe beneath, with another step."""
        step = () if _additive(block, self.vectors) else (RULES[self.rule],)
        return super().parts(block) + step


@recipe(
    "multiplicative_sgd",
    paper="Kirtas, Passalis and Tefas 2023, arXiv:2307.07189",
    family="multiplicative",
    use="studies of multiplicative steps, sparse solutions",
    avoid="zero-initialised layers under a pure rule",
)
@dataclass(frozen=True, kw_only=True)
class MultiplicativeSGD(Multiplicative, SGD):
    """SGD whose steps are shares of the weights, so that the scale of the initialisation matters little.

    With the direction ``u`` of sgd and ``lr_out = lr lr_out_scale``: ``p <- p - lr_out |p| tanh(lr_in u)`` (m_abs),
    ``p <- p 2^(-sign(p) lr_out tanh(lr_in u))`` (m_spow), or ``p <- p - gamma lr_out |p| tanh(lr_in u) - (1 - gamma) lr
    u`` (h_abs). The first two keep signs (m_abs for ``lr_out < 1``) and leave weights of 0 there. The paper moves gamma
    along ``Schedule(opt, curves.powers(0.9, every=steps_of_an_epoch), key="gamma")``.
    """


@recipe(
    "multiplicative_adam",
    paper="Kirtas, Passalis and Tefas 2023, arXiv:2307.07189",
    family="multiplicative",
    use="studies of multiplicative steps with Adam's direction",
    avoid="zero-initialised layers under a pure rule",
)
@dataclass(frozen=True, kw_only=True)
class MultiplicativeAdam(Multiplicative, Adam):
    """Adam whose steps are shares of the weights, so that the scale of the initialisation matters little.

    The rules of multiplicative_sgd with ``u = m / (sqrt(v / bc2) + eps)`` and both rates divided by ``bc1``: the
    correction of the momentum is outside tanh.
    """


@recipe(
    "madam",
    paper="Bernstein et al. 2020, arXiv:2006.14560",
    family="multiplicative",
    use="weights in a logarithmic number format, rates that need no tuning",
    avoid="weights that must change sign",
    start="lr 0.01",
)
@dataclass(frozen=True, kw_only=True)
class Madam(Recipe):
    """Weights multiplied by powers: a relative step of ``lr`` for each, whatever its size, that keeps its sign.

    ``v <- b v + (1 - b) g^2``; ``u = clip(g / sqrt(v / bc), +- g_bound)``; ``p <- p exp(-lr sign(p) u)``;
    ``|p| <= p_scale r``, with ``r`` the root mean square of the tensor before its first update. Vectors take
    ``p <- p - lr u`` unless told otherwise.
    """

    lr: float = hyper(1e-2, ge=0, help="relative change of a weight in a step")
    beta: float = hyper(0.999, ge=0, lt=1, help="memory of the mean square")
    p_scale: float = hyper(3.0, gt=0, help="largest weight, in first root mean squares of its tensor")
    g_bound: float = hyper(10.0, gt=0, help="largest element of a direction")
    vectors: str = static(
        "additive", of=VECTORS, help="the step of biases and gains; from 0 only an additive one moves"
    )

    def parts(self, block: Block) -> Parts:
        """Bounded quotient, step."""
        return Parts(BoundedRatio(), Descend() if _additive(block, self.vectors) else Exponential())
