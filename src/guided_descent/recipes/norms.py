"""Methods whose weights or steps lie on the balls of norms, chosen by what a tensor does: Scion, Modula, Hyperball."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

from guided_descent.linalg.polar import METHODS, NAMES
from guided_descent.parts import (
    DECAYS,
    NS_DTYPES,
    AdamMoments,
    Descend,
    Ema,
    FrankWolfe,
    LineLmo,
    Lmo,
    Parts,
    Polar,
    RmsLmo,
    SignLmo,
    SpectralLmo,
    SphereStep,
)
from guided_descent.recipes.adam import AdamW
from guided_descent.recipes.base import Recipe, decay_kind, hyper, recipe, static
from guided_descent.routing.roles import Block, Role


@dataclass(frozen=True, kw_only=True)
class Orthogonal(Recipe):
    """What the recipes of this file share: a momentum, the numbers of the polar factor, AdamW for what they leave."""

    matrix = True

    lr: float = hyper(0.02, ge=0, help="learning rate of the matrices")
    momentum: float = hyper(0.95, ge=0, lt=1, help="memory of the momentum")
    eps: float | None = hyper(None, gt=0, optional=True, help="absolute eps of the polar factor; None is relative")
    coefficients: str = static("adaptive", of=NAMES, help="polynomials, fitted to each matrix or fixed; or exact")
    ns_steps: int | None = static(None, help="number of polynomial steps; None takes the table's")
    ns_dtype: str = static("auto", of=NS_DTYPES, help="dtype of the orthogonalisation")
    ns_method: str = static("auto", of=METHODS, help="standard: the order of operations of torch.optim.Muon")
    aux: Recipe = field(default_factory=lambda: AdamW(lr=3e-4, betas=(0.9, 0.95)))

    def route(self, block: Block) -> Recipe:
        """Matrices stay, the rest goes to the auxiliary recipe."""
        return self if block.is_matrix else self.aux


#: LMOs by the names that Scion's fields give them, for maps (out, in).
MAPS: dict[str, Lmo] = {
    "spectral": SpectralLmo(),
    "spectral_max": SpectralLmo(least=True),
    "sign": SignLmo(),
    "rows": LineLmo(lines="rows"),
    "columns": LineLmo(lines="columns"),
}
#: The same for embedding tables (vocabulary, width), whose inputs are one-hot: their columns are rows here.
TABLES: dict[str, Lmo] = {"columns": LineLmo(lines="table"), "sign": SignLmo(plain=True)}
#: The same for biases.
BIASES: dict[str, Lmo] = {"rms": RmsLmo(), "sign": SignLmo(plain=True)}


@recipe(
    "scion",
    paper="Pethick et al. 2025, arXiv:2502.07529",
    family="norm",
    use="language models whose numbers carry over from narrow to wide",
    avoid="models whose roles the routing cannot tell",
    start="lr 2^-12, momentum 0.9, radius 50 hidden and 3000 head",
)
@dataclass(frozen=True, kw_only=True)
class Scion(Orthogonal):
    """Steps of one length in the norm that belongs to each layer, on a ball of that norm; carries over widths.

    ``d <- b d + (1 - b) g``; ``p <- (1 - lr) p - lr rho lmo(d)``, or ``p <- p - lr rho lmo(d)`` unconstrained, with a
    radius rho and an LMO by role: hidden maps ``sqrt(d_o / d_i) U V^T``, convolutions the same over ``k^2``, the head
    ``sign(d) / d_i``, embeddings rows of root mean square 1, biases ``d / RMS(d)``. Gains and other roles take the
    auxiliary recipe. Constrained weights stay in their ball, ``||p|| <= rho``, where they begin there
    (``guided_descent.initialize``); a polynomial polar factor exceeds it by its error, of up to 15 %. The authors take
    radii 50 and 3000 with ``lr = 2^-12`` for a GPT (``momentum`` 0.5 in short runs), 1 and 1024 with ``2^-6`` for an
    MLP, 8 and 128 with ``2^-4`` for a CNN, and scale ReLU and GELU by ``sqrt(2)``. For inputs that are not one-hot and
    not wide, ``rule("0.weight", hidden="spectral_max")``; for a table that is the head as well, ``rule("tok.weight",
    role="head")``.
    """

    lr: float = hyper(2**-12, ge=0, le=1, help="share of a step in the way to the sphere")
    momentum: float = hyper(0.9, ge=0, lt=1, help="memory of the momentum; one minus the paper's alpha")
    constrained: bool = static(True, help="stay in the balls, as decay does; or steps without decay")
    radius: float = hyper(50.0, gt=0, help="rho of hidden maps")
    conv_radius: float = hyper(50.0, gt=0, help="rho of convolutions")
    head_radius: float = hyper(3000.0, gt=0, help="rho of the map to the outputs")
    embedding_radius: float = hyper(50.0, gt=0, help="rho of embeddings")
    bias_radius: float = hyper(50.0, gt=0, help="rho of biases")
    hidden: str = static("spectral", of=MAPS, help="LMO of hidden maps")
    conv: str = static("spectral", of=("spectral", "sign"), help="LMO of convolutions")
    head: str = static("sign", of=("sign", "rows", "spectral"), help="LMO of the map to the outputs")
    embedding: str = static("columns", of=TABLES, help="LMO of embeddings")
    bias: str = static("rms", of=BIASES, help="LMO of biases")

    def route(self, block: Block) -> Recipe:
        """What has an LMO stays, the rest goes to the auxiliary recipe."""
        return self if block.is_matrix or block.role in (Role.EMBEDDING, Role.HEAD, Role.BIAS) else self.aux

    def lmo(self, block: Block) -> Lmo:
        """The LMO of a block, with its radius."""
        match block.role:
            case Role.EMBEDDING:
                return replace(TABLES[self.embedding], radius="embedding_radius")
            case Role.HEAD:
                return replace(MAPS[self.head], radius="head_radius")
            case Role.BIAS:
                return replace(BIASES[self.bias], radius="bias_radius")
            case Role.CONV:
                return replace(MAPS[self.conv], radius="conv_radius")
            case _:
                return MAPS[self.hidden]

    def parts(self, block: Block) -> Parts:
        """Momentum, LMO, the pull to the centre, step."""
        pull = (FrankWolfe(),) if self.constrained else ()
        return Parts(Ema(), self.lmo(block), *pull, Descend())


@recipe(
    "modula",
    paper="Large et al. 2024, arXiv:2405.14813; Bernstein and Newhouse 2024, 2410.21265",
    family="norm",
    use="rates that carry over in width and depth, from the structure of the model",
    avoid="models that cannot be traced, unless a tree is declared",
    start="lr 0.1",
)
@dataclass(frozen=True, kw_only=True)
class Modula(Orthogonal):
    """Steepest descent in the modular norm: each weight moves by its share of one step of the whole network.

    ``p <- p (1 - lr wd) - lr t lmo(d)`` of the momentum ``d <- mu d + (1 - mu) g``, or of the direction of Adam. The
    LMO is ``sqrt(d_o / d_i) U V^T`` for Linears, the same over ``k^2`` at each position of a convolution's kernel, and
    rows of root mean square 1 for embeddings. The target ``t`` is the weight's share of the mass of the network, over
    the sensitivity of what comes after it; it is read off the forward pass (``guided_descent.modula.read``), or follows
    from a tree that is declared, ``parametrization=modula.Sequence(...)``. Given tensors without a model, they are a
    tuple. Biases and gains take the auxiliary recipe.
    """

    parametrization = "modula"

    lr: float = hyper(0.1, ge=0, help="length of a step of the whole network, in the modular norm")
    weight_decay: float = hyper(0.0, ge=0, help="decay; lr * weight_decay is taken off in a step")
    direction: str = static("momentum", of=("momentum", "adam"), help="what is dualized")
    betas: tuple[float, float] = hyper((0.9, 0.99), ge=0, lt=1, help="memories of the moments, for direction='adam'")
    adam_eps: float = hyper(1e-8, ge=0, help="added to the root of the second moment, for direction='adam'")
    decay: str = decay_kind()

    def route(self, block: Block) -> Recipe:
        """Weights with a norm of their own stay, the rest goes to the auxiliary recipe."""
        return self if block.is_matrix or block.role in (Role.EMBEDDING, Role.HEAD) else self.aux

    def parts(self, block: Block) -> Parts:
        """Direction, LMO, decay, step."""
        direction = Ema() if self.direction == "momentum" else AdamMoments(eps="adam_eps")
        table = block.role is Role.EMBEDDING
        lmo = LineLmo(lines="table", radius="") if table else SpectralLmo(each=True, radius="")
        return Parts(direction, lmo, DECAYS[self.decay], Descend())


@recipe(
    "hyperball",
    paper="Wen et al. 2026, arXiv:2606.16899",
    family="norm",
    use="normalised networks, whose weights' norms do not matter",
    avoid="layers whose scale is learnt by the weight itself",
    start="lr 0.01 to 0.03",
)
@dataclass(frozen=True, kw_only=True)
class Hyperball(Orthogonal):
    """Muon on a sphere: matrices keep the Frobenius norm with which they begin and turn by a fixed angle in each step.

    ``m <- mu m + (1 - mu) g``; ``O = UV^T`` of ``(1 - mu) g + mu m``; ``p <- R (p - lr R O / |O|_F) / |...|_F`` with
    ``R = |p_0|_F``. The auxiliary recipe updates the rest. On another recipe, such as AdamW (AdamH), it is
    ``add=[guided_descent.parts.SphereStep()]``.
    """

    lr: float = hyper(0.02, ge=0, help="length of a step, as a share of the weights' norm")
    nesterov: bool = static(True, help="orthogonalise the look-ahead momentum")

    def parts(self, block: Block) -> Parts:
        """Momentum, polar factor, step on the sphere."""
        sphere = (SphereStep(),)
        return Parts(Ema(nesterov=self.nesterov), Polar()) + sphere
