"""PSGD: preconditioned stochastic gradient descent, with Kronecker, diagonal or low-rank preconditioners."""

from __future__ import annotations

from dataclasses import dataclass

from guided_descent.parts import DECAYS, Descend, Part, Parts
from guided_descent.parts.geometry.psgd import DiagonalWhiten
from guided_descent.parts.geometry.psgd_kron import UPDATES, KronWhiten
from guided_descent.parts.geometry.psgd_lowrank import LowRankWhiten
from guided_descent.recipes.base import Recipe, decay_kind, hyper, recipe, static
from guided_descent.routing.roles import Block, Role

SOURCES = ("gradient", "momentum")
DTYPES = ("float32", "bfloat16")


@dataclass(frozen=True, kw_only=True)
class _Whitening(Recipe):
    """The numbers that all forms share; subclasses name the part that whitens."""

    lr: float = hyper(3e-4, ge=0, help="learning rate; the direction has an RMS of about 1, so about a third of Adam's")
    momentum: float = hyper(0.9, ge=0, lt=1, help="memory of the momentum, from the plain mean of the first gradients")
    weight_decay: float = hyper(0.1, ge=0, help="decay; lr * weight_decay is taken off in a step")
    precond_lr: float = hyper(0.1, ge=0, lt=1, help="step of the fit of Q; falls to a tenth over a million steps")
    precond_init: float | None = hyper(
        None, gt=0, optional=True, help="first Q as a multiple of the identity; None takes it from the first gradient"
    )
    clip_rms: float | None = hyper(
        1.1, gt=0, optional=True, help="largest RMS of a tensor's direction; None is no limit"
    )
    whiten: str = static("gradient", of=SOURCES, help="what Q is fitted to; momentum shortens the step accordingly")
    decay: str = decay_kind()

    def whitener(self, block: Block) -> Part:
        """The part that fits Q and whitens the direction of a block."""
        return DiagonalWhiten(source=self.whiten)

    def parts(self, block: Block) -> Parts:
        """Whitening, decay, step."""
        return Parts(self.whitener(block), DECAYS[self.decay], Descend())


@dataclass(frozen=True, kw_only=True)
class _Drawing(_Whitening):
    """The numbers of the forms that fit Q at random steps."""

    update_probability: float = hyper(0.03, ge=0, le=1, help="probability that a late step fits Q")
    update_always: int = hyper(
        500, ge=0, help="first steps, which all fit Q; then the probability falls by 1/e per 1000"
    )


@recipe(
    "psgd_diagonal",
    paper="Li 2015, arXiv:1512.04202; 2024, arXiv:2402.11858",
    family="psgd",
    use="a fitted diagonal in the place of Adam's second moment",
    avoid="matrices: psgd_kron knows more",
)
@dataclass(frozen=True, kw_only=True)
class PSGDDiagonal(_Whitening):
    """PSGD with a diagonal preconditioner: ``P -> 1 / sqrt(E g^2)``, fitted by relative steps.

    ``m`` is an average of g; ``q <- q - (mu / L) (p^2 (g^2 + 1e-18) - 1) q`` with ``p = q^2``;
    ``p <- p (1 - lr wd) - lr min(1, 1.1 / RMS) q^2 m``.
    """


@recipe(
    "psgd_kron",
    paper="Li 2015, arXiv:1512.04202; 2024, arXiv:2402.11858",
    family="psgd",
    use="preconditioning without factorisations, in low precision too",
    avoid="the cheapest step: its factors are fitted in every step",
    start="lr 3e-4 to 1e-3, preconditioner lr 0.1",
)
@dataclass(frozen=True, kw_only=True)
class PSGDKron(_Drawing):
    """PSGD with one factor for each side of a matrix, fitted so that ``P_L g P_R`` is white.

    ``m`` is an average of g; ``p <- p (1 - lr wd) - lr min(1, 1.1 / RMS) P_L m P_R``, ``P_i = Q_iᵀ Q_i``. The fit is in
    ``parts.geometry.psgd_kron``: ``pro`` takes products alone and is the one to use; ``triangular`` is the original.
    Matrices, embeddings and heads have two factors, a long side's being diagonal; the rest, scalars included, goes to
    ``psgd_diagonal`` with the same numbers.
    """

    matrix = True

    update: str = static("pro", of=UPDATES, help="pro: products only; triangular: the original, with triangular solves")
    max_size: int = static(8192, help="longer sides have a diagonal factor")
    max_skew: float = static(1.0, help="sides with d^2 above max_skew times the elements have a diagonal factor")
    precond_dtype: str = static("float32", of=DTYPES, help="dtype of Q, or wider for float64; bfloat16 with pro alone")
    aux: Recipe | None = None

    def __post_init__(self) -> None:
        """Check what the fields allow together."""
        super().__post_init__()
        if self.update == "triangular" and self.precond_dtype == "bfloat16":
            raise ValueError(
                f"precond_dtype={self.precond_dtype!r} of psgd_kron needs update='pro': triangular solves lose all "
                "accuracy in bfloat16; use float32"
            )

    def default_aux(self) -> Recipe:
        """The diagonal form with the same numbers."""
        return PSGDDiagonal(**{name: getattr(self, name) for name in PSGDDiagonal.numbers()})

    def route(self, block: Block) -> Recipe:
        """Matrices with two sides, embeddings and heads stay; the rest goes to the auxiliary recipe."""
        matrix = block.is_matrix or (block.role in (Role.EMBEDDING, Role.HEAD) and len(block.shape) == 2)
        return self if matrix and min(block.shape[-2:]) > 1 else self.aux or self.default_aux()

    def whitener(self, block: Block) -> Part:
        """Two factors."""
        return KronWhiten(
            source=self.whiten,
            fit=self.update,
            max_size=self.max_size,
            max_skew=self.max_skew,
            half=self.precond_dtype == "bfloat16",
        )


@recipe(
    "psgd_lra",
    paper="Li 2024, arXiv:2402.11858",
    family="psgd",
    use="a few strong directions of curvature over a whole matrix",
    avoid="matrices without such directions",
)
@dataclass(frozen=True, kw_only=True)
class PSGDLowRank(_Drawing):
    """PSGD with ``Q = (I + U Vᵀ) diag(d)`` on the vector of all elements of a tensor.

    ``m`` is an average of g; ``p <- p (1 - lr wd) - lr min(1, 1.1 / RMS) Qᵀ Q m``. The fit is in
    ``parts.geometry.psgd_lowrank``. Each tensor has a Q of its own, where the paper has one for the whole model; memory
    is ``2 rank + 2`` numbers for each element. Scalars, complex and unknown tensors are fitted as in ``psgd_diagonal``.
    """

    rank: int = static(10, help="columns of U and V")

    def __post_init__(self) -> None:
        """Check the rank."""
        super().__post_init__()
        if self.rank < 1:
            raise ValueError(f"rank={self.rank!r} of psgd_lra must be at least 1; psgd_diagonal is the form of rank 0")

    def whitener(self, block: Block) -> Part:
        """The low-rank form, or the diagonal one where a vector is too short or its meaning is not known."""
        if block.role is Role.OTHER or block.numel < 2:
            return super().whitener(block)
        return LowRankWhiten(source=self.whiten, rank=self.rank)
