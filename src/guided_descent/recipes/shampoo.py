"""The Shampoo family: roots, corrected eigenvalues, KL factors, one side alone."""

from __future__ import annotations

from dataclasses import dataclass

from guided_descent.parts import CARRIES, DECAYS, L2, Descend, Momentum, Part, Parts
from guided_descent.parts.geometry.klshampoo import KLEigenbasis, KLRoots
from guided_descent.parts.geometry.kronecker import sides
from guided_descent.parts.geometry.shampoo import ROOT_METHODS, CorrectedEigenbasis, GramRoot, KroneckerRoots
from guided_descent.parts.graft import GRAFTS, Graft
from guided_descent.recipes.base import Recipe, decay_kind, hyper, recipe, static
from guided_descent.recipes.kronecker import Kronecker
from guided_descent.routing.blocking import subdivide
from guided_descent.routing.roles import Block


@recipe(
    "shampoo",
    paper="Gupta et al. 2018, arXiv:1802.09568; Shi et al. 2023, arXiv:2309.06497",
    family="kronecker",
    use="large batches and ill-conditioned matrices, grafted to Adam's length",
    avoid="sides above a few thousand without blocking",
    start="lr 1e-3 to 1e-2, betas (0.9, 0.99), refresh 10 to 100",
)
@dataclass(frozen=True, kw_only=True)
class Shampoo(Kronecker):
    """Shampoo with grafting: inverse roots of both sides' statistics, and the length of Adam's step.

    ``L, R`` are averages of ``G G^T, G^T G`` and ``m`` of ``G``; ``P = L^(-1/4) m R^(-1/4)``, scaled to the norm of the
    graft's direction; ``p <- p (1 - lr wd) - lr P``. Matrices are cut into blocks with sides up to ``block_size``, each
    with roots and a graft of its own; convolutions are ``[out, in * kernel]``. With one side (an embedding or a head
    whose other side is longer than ``max_precond_dim``) the exponent is -1/2. ``exponent`` ``half`` is -1/2 for each
    side with the trace normalisation ``L (x) R / tr L``; ``statistics`` ``sum`` is Adagrad's.

    In the order of Distributed Shampoo: coupled decay, factors and graft from the raw gradient, filter, roots, graft,
    decay of the direction, momentum. A refresh takes effect one step later than there. With f steps between refreshes,
    a ``start_preconditioning_step`` above 2 f lets every root that is used have seen f gradients.
    """

    lr: float = hyper(1e-3, ge=0, help="learning rate")
    eps: float = hyper(1e-6, ge=0, help="damping of the roots, as a share of the largest eigenvalue")
    graft_eps: float = hyper(1e-8, ge=0, help="added to the root of the graft's second moment")
    start_preconditioning_step: int = hyper(21, ge=1, help="first step with roots; the graft's direction before")
    momentum: float = hyper(0.0, ge=0, lt=1, structural=True, help="heavy ball on the finished direction")
    dampening: float = hyper(0.0, ge=0, le=1, help="share of the direction that the momentum leaves out")
    nesterov: bool = static(False, help="look-ahead form of the momentum; needs momentum > 0")
    graft: str = static("adam", of=("none", *GRAFTS), help="method whose length each block's step takes")
    exponent: str = static("quarter", of=("quarter", "half"), help="-1/4 for each side, or -1/2 over the trace")
    statistics: str = static("ema", of=("ema", "sum"), help="corrected averages, or sums without memory")
    root_method: str = static("eigh", of=ROOT_METHODS, help="eigenvalues, or iterations of products alone")
    block_size: int = static(1024, help="longest side of a block")
    max_precond_dim: int = static(2048, help="longer sides, of embeddings and heads, keep the identity")
    decay: str = decay_kind(
        "decoupled",
        *("l2", "direction"),
        help="l2: added to the gradient; direction: to the direction, before the momentum",
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.nesterov and self.momentum == 0:
            raise ValueError("nesterov=True of shampoo needs momentum > 0, got momentum=0")
        if self.block_size < 1:
            raise ValueError(f"block_size={self.block_size} of shampoo must be at least 1: it is a number of rows")
        if self.block_size > self.max_precond_dim:
            raise ValueError(
                f"block_size={self.block_size} of shampoo must be at most max_precond_dim={self.max_precond_dim}, or "
                "the sides of its blocks would keep the identity: change one of them"
            )

    def route(self, block: Block) -> Recipe:
        """Matrices stay, and embeddings and heads with a side that is short enough."""
        owner = super().route(block)
        if owner is self and not block.is_matrix and not sides(block, self.max_precond_dim):  # a matrix is cut
            return self.spare()
        return owner

    def cut(self, block: Block) -> tuple[Block, ...]:
        """Blocks with sides up to ``block_size``; embeddings and heads stay whole."""
        return subdivide(block, self.block_size) if block.is_matrix else (block,)

    def parts(self, block: Block) -> Parts:
        """Roots with a graft, decay, momentum, step."""
        both = len(sides(block, self.max_precond_dim)) == 2
        roots = KroneckerRoots(
            root=4 if both and self.exponent == "quarter" else 2,
            trace=both and self.exponent == "half",
            cumulative=self.statistics == "sum",
            method=self.root_method,
            graft=None if self.graft == "none" else Graft(self.graft),
            max_dim=self.max_precond_dim,
        )
        kinds: dict[str, Part] = {"l2": L2(), "direction": L2().at("decay_direction"), **DECAYS}
        momentum = (Momentum(nesterov=self.nesterov).at("momentum"),) if self.momentum else ()
        return Parts(roots, kinds[self.decay], *momentum, Descend())


@recipe(
    "ec_shampoo",
    paper="Eschenhagen et al. 2025, arXiv:2506.03595",
    family="kronecker",
    use="shampoo whose eigenvalues are kept fresh between slow refreshes",
    avoid="short memory",
    start="shampoo's numbers",
)
@dataclass(frozen=True, kw_only=True)
class ECShampoo(Kronecker):
    """Eigenvalue-corrected Shampoo: Adam's second moment in the eigenbases of both sides, the momentum outside.

    ``D`` is the average of ``(Q_L^T G Q_R)^2``, ``m`` of ``G``; ``p <- p (1 - lr wd) - lr Q_L [(Q_L^T m Q_R / bc1) /
    (sqrt(D / bc2) + eps)] Q_R^T``. ``D`` is not moved when the bases change. With ``refresh_tolerance`` > 0 (0.01 to
    0.1) a basis is refreshed only where ``||offdiag(Q^T A Q)||_F`` exceeds that share of ``||Q^T A Q||_F``. The first
    call makes no update. No grafting is needed.
    """

    eps: float = hyper(1e-8, ge=0, help="added to the root of the second moment")
    refresh_method: str = static("qr", of=("qr", "eigh"), help="one step of orthogonal iteration, or a full solve")
    second_moment: str = static("keep", of=CARRIES, help="how the second moment follows a change of basis")
    one_sided: bool = static(False, help="precondition the shorter side alone")

    def parts(self, block: Block) -> Parts:
        """Corrected eigenbases, decay, step."""
        return self.finish(CorrectedEigenbasis(max_dim=self.max_precond_dim, one_sided=self.one_sided))


@recipe(
    "kl_shampoo",
    paper="Lin et al. 2025, arXiv:2509.03378",
    family="kronecker",
    use="shampoo without grafting, by factors that correct each other",
    avoid="memory",
    start="lr 1e-4 to 1e-3, betas (0.9, 0.98)",
)
@dataclass(frozen=True, kw_only=True)
class KLShampoo(Kronecker):
    """KL-Shampoo: factors that are whitened by each other, with the exponent -1/2 and no grafting.

    ``S_L`` averages ``G S_R^-1 G^T / n`` and ``S_R`` averages ``G^T S_L^-1 G / m``; ``u = S_L^(-1/2) m S_R^(-1/2)``, by
    slow bases and eigenvalues of their own; ``p <- p (1 - lr wd) - lr u``. The first call makes no update, and the
    momentum is not corrected. ``decay="after"`` is the paper's code.
    """

    lr: float = hyper(1e-4, ge=0, help="learning rate")
    betas: tuple[float, float] = hyper((0.9, 0.98), ge=0, lt=1, help="memory of the momentum and of the factors")
    eps: float = hyper(1e-8, ge=0, help="damping: a factor d of the direction becomes d / (1 + eps d)")
    refresh_method: str = static("qr", of=("qr", "eigh"), help="one step of orthogonal iteration, or a full solve")

    def parts(self, block: Block) -> Parts:
        """KL roots, decay, step."""
        return self.finish(KLRoots(max_dim=self.max_precond_dim))


@recipe(
    "kl_soap",
    paper="Lin et al. 2025, arXiv:2509.03378",
    family="kronecker",
    use="soap in kl_shampoo's basis",
    avoid="memory",
    start="soap's numbers",
)
@dataclass(frozen=True, kw_only=True)
class KLSOAP(Kronecker):
    """KL-SOAP: Adam in the eigenbases of KL-Shampoo's factors.

    As SOAP, but a side's statistic is whitened by the other side and columns keep their places in a refresh. Adam's
    moments are corrected as in SOAP; the paper's code leaves the correction out.
    """

    betas: tuple[float, float] = hyper((0.95, 0.95), ge=0, lt=1, help="memory of the first and second moment")
    eps: float = hyper(1e-8, ge=0, help="added to the root of the second moment")
    refresh_method: str = static("qr", of=("qr", "eigh"), help="one step of orthogonal iteration, or a full solve")

    def parts(self, block: Block) -> Parts:
        """Adam between two rotations, decay, step."""
        return self.finish(KLEigenbasis(max_dim=self.max_precond_dim))


@recipe(
    "asgo",
    paper="An et al. 2025, arXiv:2503.20762; Xie et al. 2025, arXiv:2503.10537",
    family="kronecker",
    use="one-sided shampoo: a factor of the smaller side alone",
    avoid="matrices that are ill-conditioned on both sides",
    start="shampoo's numbers",
)
@dataclass(frozen=True, kw_only=True)
class ASGO(Kronecker):
    """ASGO, one-sided Shampoo: the momentum times the inverse square root of the shorter side's Gram.

    ``V`` averages (or sums) ``G G^T`` or ``G^T G``, whichever is smaller; ``p <- p (1 - lr wd) - lr (V^(1/2) + eps
    sqrt(lambda) I)^-1 m`` with ``lambda`` the largest eigenvalue. Both averages are corrected. Of a single gradient of
    full rank it makes the polar factor.
    """

    eps: float = hyper(1e-3, ge=0, help="damping of the root, as a share of its largest eigenvalue")
    statistics: str = static("ema", of=("ema", "sum"), help="corrected averages, or sums without memory")

    def parts(self, block: Block) -> Parts:
        """One root, decay, step."""
        return self.finish(GramRoot(cumulative=self.statistics == "sum", max_dim=self.max_precond_dim))
