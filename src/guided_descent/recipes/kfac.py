"""K-FAC, EKFAC and FOOF: natural gradient with a Kronecker-factored Fisher matrix."""

from __future__ import annotations

from dataclasses import dataclass, field

from guided_descent.parts import DECAYS, L2, Descend, Momentum, Part, Parts
from guided_descent.parts.clip import KlClip
from guided_descent.parts.damping import LevenbergMarquardt, QuadraticStep
from guided_descent.parts.geometry.ekfac import Ekfac
from guided_descent.parts.geometry.kfac import CHOICES, FORMS, RULES, Kfac
from guided_descent.parts.geometry.kfac_inverse import KfacInverse
from guided_descent.parts.geometry.kronecker import CARRIES
from guided_descent.recipes.adam import AdamW
from guided_descent.recipes.base import (
    Recipe,
    decay_kind,
    hyper,
    lag,
    product_dtype,
    recipe,
    schedule,
    static,
    tolerance,
)
from guided_descent.routing.roles import Block, Role

FISHERS = ("mc", "exact", "empirical", "forward")
APPROXES = ("expand", "reduce")
STEPS = ("momentum", "quadratic", "quadratic_factored")


@recipe(
    "kfac",
    paper="Martens and Grosse 2015, arXiv:1503.05671; Eschenhagen et al. 2023, arXiv:2311.00636",
    family="curvature",
    use="classifiers, regressions and autoencoders, in a third of the steps",
    avoid="layers that cannot be read, and compiled models whose step must not leave the graph",
    start="lr 0.03 to 0.1, damping 1e-3 to 1e-1, momentum 0.9",
)
@dataclass(frozen=True, kw_only=True)
class KFAC(Recipe):
    """K-FAC: the gradient of each layer times the inverse of its Kronecker-factored, damped Fisher matrix.

    ``A = mean a a^T``, ``B = mean d d^T`` from layer inputs a and output gradients d of sampled labels;
    ``Ghat = (B + sqrt(lam) / pi I)^-1 G (A + pi sqrt(lam) I)^-1``, or with ``damping_form="eigenbasis"`` and
    ``refresh_method="eigh"`` exactly damped, ``Q_B [(Q_B^T G Q_A) / (l_B l_A^T + lam)] Q_A^T``; all layers times
    ``nu = min(1, sqrt(kl_clip / |sum lr^2 <Ghat, G>|))``; ``b <- mu b + nu Ghat``; ``p <- p - lr b``. Needs the
    model and its ``loss``. Linear layers and convolutions (in groups too; depthwise ones by a rule ``role="conv"``)
    with their biases, embeddings and heads are preconditioned.

    With ``step="quadratic"`` step size and momentum minimise the quadratic model of the batch, whose curvature is exact
    and couples layers: call ``opt.step(Objective(outputs=..., likelihood=..., closure=...))`` with lr 1.
    """

    matrix = True
    reads_layers = True
    joins_bias = True

    lr: float = hyper(0.1, ge=0, help="learning rate; a multiplier of the model's own step unless step='momentum'")
    momentum: float = hyper(0.9, ge=0, lt=1, help="momentum of the preconditioned gradient")
    dampening: float = hyper(0.0, ge=0, le=1, help="share of a new direction that the momentum leaves out")
    damping: float = hyper(0.03, ge=0, help="lam, in units of the curvature; grows with the loss")
    kl_clip: float | None = hyper(1e-3, gt=0, optional=True, help="bound on the step's length in the metric, or None")
    weight_decay: float = hyper(0.0, ge=0, help="decay; its form is chosen by decay")
    factor_decay: float = hyper(0.95, ge=0, lt=1, help="memory of the factors, in captures")
    factor_frequency: int = hyper(5, ge=1, help="steps between captures of the layers")
    precondition_frequency: int = hyper(10, ge=1, help="steps between refreshes of the bases")
    damping_interval: int = hyper(5, ge=1, help="steps between adaptations of the damping, for damping_rule='lm'")
    damping_omega: float = hyper(0.95, gt=0, lt=1, help="factor on the damping for each step of the interval")
    refresh_schedule: str = schedule()
    refresh_tolerance: float = tolerance()
    refresh_lag: int = lag()
    refresh_method: str = static(
        "cholesky", of=("eigh", "qr", "cholesky"), help="inverses (with pi), a full solve, or one orthogonal iteration"
    )
    fisher: str = static("mc", of=FISHERS, help="sampled labels, all of them, the true ones, or inputs alone")
    approx: str = static("expand", of=APPROXES, help="positions as data, or averaged first")
    sides: str = static("both", of=tuple(CHOICES), help="right: the inputs alone (FOOF); left: the gradients alone")
    damping_form: str = static("pi", of=FORMS, help="factored with pi, or the exact inverse")
    damping_rule: str = static("fixed", of=RULES, help="fixed, Levenberg-Marquardt, or generalised cross-validation")
    step: str = static("momentum", of=STEPS, help="quadratic: step and momentum from the batch's curvature, or factors")
    decay: str = decay_kind(coupled=True, help="coupled: into the gradient, before the metric")
    max_dim: int = static(8192, help="longer sides have a diagonal factor")
    product_dtype: str = product_dtype()
    aux: Recipe = field(default_factory=lambda: AdamW(lr=1e-3, betas=(0.9, 0.95)))

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.fisher == "forward" and self.sides != "right":
            raise ValueError(
                f"fisher='forward' of {self.label} sees inputs alone, and sides={self.sides!r} needs output gradients: "
                "use sides='right', or another fisher"
            )
        if self.damping_rule == "gcv" and (self.fisher != "empirical" or self.sides == "left"):
            raise ValueError(
                f"damping_rule='gcv' of {self.label} fits the gradients of the true labels on the inputs, and fisher "
                f"is {self.fisher!r} and sides {self.sides!r}: use fisher='empirical' and sides 'both' or 'right'"
            )
        if self.damping_form == "pi" and self.sides != "both":
            raise ValueError(
                f"damping_form='pi' of {self.label} splits the damping between two factors, and sides={self.sides!r} "
                "has one: use damping_form='eigenbasis'"
            )

        if self.refresh_method == "cholesky" and (self.damping_form != "pi" or self.damping_rule == "gcv"):
            raise ValueError(
                f"refresh_method='cholesky' of {self.label} inverts each factor with a damping of its own, and "
                f"damping_form is {self.damping_form!r} and damping_rule {self.damping_rule!r}: use damping_form='pi' "
                "and damping_rule 'fixed' or 'lm', or else refresh_method='eigh'"
            )

    def route(self, block: Block) -> Recipe:
        """Matrices, embeddings and heads stay; stacks and the rest go to the auxiliary recipe."""
        takes = block.is_matrix or block.role in (Role.EMBEDDING, Role.HEAD)
        if block.role == Role.EMBEDDING and self.fisher == "forward":  # its inputs are counts, and no matrix
            takes = False
        return self if takes and len(block.shape) == 2 and min(block.shape) > 0 else self.aux

    def geometry(self) -> Kfac:
        """The metric."""
        metric = KfacInverse if self.refresh_method == "cholesky" else Kfac
        return metric(sides=self.sides, form=self.damping_form, rule=self.damping_rule, max_dim=self.max_dim)

    def parts(self, block: Block) -> Parts:
        """Decay into the gradient, metric, clip, momentum, decay, step."""
        coupled = "weight_decay" if self.decay == "coupled" else ""
        decay: Part = L2() if coupled else DECAYS[self.decay]
        parts: list[Part] = [self.geometry(), KlClip(coupled=coupled), decay, Descend()]
        exact = self.step == "quadratic"
        if self.step == "momentum":
            parts.append(Momentum().at("momentum"))
        else:
            parts.append(QuadraticStep(rule=self.damping_rule, coupled=coupled, exact=exact))
        if self.damping_rule == "lm":
            parts.append(LevenbergMarquardt(exact=exact))
        return Parts(*parts)


@recipe(
    "ekfac",
    paper="George et al. 2018, arXiv:1806.03884",
    family="curvature",
    use="kfac whose eigenvalues are kept fresh",
    avoid="memory: one more matrix",
    start="kfac's numbers",
)
@dataclass(frozen=True, kw_only=True)
class EKFAC(KFAC):
    """EKFAC: K-FAC whose eigenvalues are the second moments of per-sample gradients in its eigenbases.

    ``s = E_n[(Q_B^T g_n Q_A)^2]``; ``Ghat = Q_B [(Q_B^T G Q_A) / (s + lam)] Q_A^T``; the rest as in K-FAC.
    """

    damping: float = hyper(1e-2, ge=0, help="lam, in units of the curvature; grows with the loss")
    refresh_method: str = static("eigh", of=("eigh", "qr"), help="a full solve, or one step of orthogonal iteration")
    damping_form: str = static("eigenbasis", of=("eigenbasis",), help="the exact inverse")
    second_moment: str = static("rotate", of=CARRIES, help="how s follows a change of basis")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.fisher == "forward":
            raise ValueError("fisher='forward' of ekfac sees inputs alone, and s needs gradients: use another fisher")

    def geometry(self) -> Kfac:
        """The metric."""
        return Ekfac(sides=self.sides, rule=self.damping_rule, max_dim=self.max_dim)


@recipe(
    "foof",
    paper="Benzing 2022, arXiv:2201.12250",
    family="curvature",
    use="kfac's right side alone: inputs decide, no labels are sampled",
    avoid="narrow inputs and wide outputs",
    start="kfac's numbers, larger damping",
)
@dataclass(frozen=True, kw_only=True)
class FOOF(KFAC):
    """FOOF: the gradient of each layer times the inverse second moment of its inputs, ``G (A + lam I)^-1``.

    K-FAC with the identity for the output side: it needs no extra backward pass and no loss. The damping is in units of
    the squared inputs.
    """

    lr: float = hyper(0.03, ge=0, help="learning rate; a multiplier of the model's own step unless step='momentum'")
    damping: float = hyper(0.1, ge=0, help="lam, in units of the squared inputs")
    kl_clip: float | None = hyper(None, gt=0, optional=True, help="bound on lr^2 <Ghat, G>, or None")
    factor_frequency: int = hyper(1, ge=1, help="steps between captures of the layers, which cost little here")
    fisher: str = static("forward", of=FISHERS, help="inputs alone; empirical for damping_rule='gcv'")
    sides: str = static("right", of=("right",), help="the inputs alone")
    refresh_method: str = static("eigh", of=("eigh", "qr"), help="a full solve, or one step of orthogonal iteration")
    damping_form: str = static("eigenbasis", of=("eigenbasis",), help="the exact inverse")
