"""The spectral family beside Muon: Moonlight, MuonClip, NorMuon, AdaMuon and spectral descent; and QK-clip."""

from __future__ import annotations

import re
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from guided_descent.linalg.polar import METHODS, NAMES
from guided_descent.parts import DECAYS, NS_DTYPES, SCALES, Descend, Ema, MatrixScale, Part, Parts, Polar
from guided_descent.parts.geometry.spectral import DualPolar, ElementRms, NeuronRms, Sign
from guided_descent.parts.scale import MatchRms
from guided_descent.recipes.adam import AdamW
from guided_descent.recipes.base import Constraint, Recipe, decay_kind, hyper, recipe, static
from guided_descent.routing.roles import Block

#: Scales under which a step is as long as one of AdamW, so that both share a learning rate.
ADAM_SIZED = ("match_rms", "match_rms_adamw")


@dataclass(frozen=True, kw_only=True)
class Matrices(Recipe):
    """What recipes for matrices share: the first numbers, and AdamW for what is no matrix."""

    matrix = True

    lr: float = hyper(1e-3, ge=0, help="learning rate; as AdamW's, since steps have its size")
    momentum: float = hyper(0.95, ge=0, lt=1, help="memory of the momentum")
    weight_decay: float = hyper(0.1, ge=0, help="decay; lr * weight_decay is taken off in a step")
    decay: str = decay_kind()
    aux: Recipe | None = None

    def default_aux(self) -> Recipe:
        """AdamW with the same learning rate and decay."""
        return AdamW(lr=self.lr, betas=(0.9, 0.95), weight_decay=self.weight_decay, decay=self.decay)

    def route(self, block: Block) -> Recipe:
        """Matrices stay, the rest goes to the auxiliary recipe."""
        return self if block.is_matrix else self.spare()


@dataclass(frozen=True, kw_only=True)
class Orthogonal(Matrices):
    """The numbers of the polar factor."""

    eps: float | None = hyper(None, gt=0, optional=True, help="absolute eps of the norm; None is relative to it")
    coefficients: str = static("adaptive", of=NAMES, help="polynomials, fitted to each matrix or fixed; or exact")
    ns_steps: int | None = static(None, help="number of polynomial steps; None takes the table's")
    ns_dtype: str = static("auto", of=NS_DTYPES, help="dtype of the orthogonalisation")
    ns_method: str = static("auto", of=METHODS, help="standard: the order of operations of torch.optim.Muon")


@dataclass(frozen=True, kw_only=True)
class Spectral(Orthogonal):
    """What the recipes of this file share: the polar factor of an averaged momentum."""

    nesterov: bool = static(True, help="orthogonalise the look-ahead momentum")

    def around(self, *parts: Part) -> Parts:
        """These parts between the momentum and the decayed step."""
        return Parts(Ema(nesterov=self.nesterov), *parts, DECAYS[self.decay], Descend())


def sized(made: Recipe, scale: str) -> Recipe:
    """The auxiliary recipe at a rate of its own, where the matrices' steps have another size than AdamW's."""
    return made if scale in ADAM_SIZED else made.replace(lr=3e-4)


@recipe(
    "moonlight",
    paper="Liu et al. 2025, arXiv:2502.16982",
    family="spectral",
    use="muon with AdamW's learning rate and decay",
    avoid="transfer over widths: its scale follows the larger side",
    start="AdamW's lr, decay 0.1",
)
@dataclass(frozen=True, kw_only=True)
class Moonlight(Spectral):
    """Muon with steps of AdamW's size: one learning rate and one decay for all parameters.

    ``m <- mu m + (1 - mu) g``; ``O = UV^T`` of ``(1 - mu) g + mu m``;
    ``p <- p (1 - lr wd) - lr 0.2 sqrt(max(m, n)) O``. With another scale the auxiliary rate is 3e-4 unless given.
    """

    scale: str = static("match_rms_adamw", of=SCALES, help="length convention of the update")

    def default_aux(self) -> Recipe:
        """AdamW, with the same learning rate where both take steps of one size."""
        return sized(super().default_aux(), self.scale)

    def parts(self, block: Block) -> Parts:
        """Momentum, polar factor, scale, decay, step."""
        return self.around(Polar(), MatrixScale())


@recipe(
    "muonclip",
    paper="Kimi Team 2025, arXiv:2507.20534",
    family="spectral",
    use="long runs of large models, whose attention logits might grow",
    avoid="models without attention",
    start="moonlight's numbers, threshold 100",
)
@dataclass(frozen=True, kw_only=True)
class MuonClip(Moonlight):
    """Moonlight with QK-clip: attention logits that grow too large are brought back by scaling queries and keys.

    ``m <- mu m + (1 - mu) g``; ``O = UV^T`` of ``m``; ``p <- p (1 - lr wd) - lr 0.2 sqrt(max(m, n)) O``. Then, with
    ``S_h`` the largest logit of head ``h`` in the forward of this step and ``gamma_h = min(1, tau / S_h)``, the rows of
    that head in ``W_q`` and ``W_k`` and their biases are multiplied by ``sqrt(gamma_h)``. Built from a model, the
    optimizer reads ``S`` off the attention calls of the forward pass by itself (``capture.attention``); where none is
    seen, as in attention written out by hand, give it by ``optimizer.note("max_logits", {attention module: S})`` before
    each step. Queries and keys of a module must be in one param group.
    """

    nesterov: bool = static(False, help="orthogonalise the look-ahead momentum")
    tau: float = hyper(100.0, gt=0, help="largest attention logit")
    shared_keys: str = static(
        "query", of=("query", "group"), help="keys shared by heads: scale queries alone, or all by the group's maximum"
    )

    def constraints(self, blocks: Sequence[Block]) -> Sequence[Constraint]:
        """QK-clip for every attention module whose queries and keys are here."""
        return [
            Constraint(clip.names, clip, note="max_logits", module=clip.module, optional=clip.biases, multiplies=True)
            for clip in qk_clips(tuple(blocks), self.shared_keys)
        ]


@recipe(
    "normuon",
    paper="Li et al. 2025, arXiv:2510.05491",
    family="spectral",
    use="muon whose rows have equal length, at the cost of one number for each row",
    avoid="parity with published muon runs",
    start="AdamW's lr",
)
@dataclass(frozen=True, kw_only=True)
class NorMuon(Spectral):
    """NorMuon: Muon whose neurons (rows) take steps of one length on average.

    ``O = UV^T`` of the momentum; ``v <- b2 v + (1 - b2) mean_j(O_ij^2)``, ``O_i <- O_i / (sqrt(v_i) + eps)``, rescaled
    to the norm before; ``p <- p (1 - lr wd) - lr 0.2 sqrt(m n) / |O|_F O``. The authors' code takes
    ``scale="original"`` and ``lr=0.02``. With a scale that is not AdamW's the auxiliary rate is 3e-4 unless given.
    """

    beta2: float = hyper(0.95, ge=0, lt=1, help="memory of the rows' mean squares")
    moment_eps: float = hyper(1e-10, gt=0, help="added to their roots")
    update_rms: float = hyper(0.2, gt=0, help="root mean square of an update, for scale='match_rms'")
    neurons: str = static("rows", of=("rows", "longer"), help="longer: columns of a wide matrix")
    scale: str = static("match_rms", of=("match_rms", *SCALES), help="length convention of the update")

    def default_aux(self) -> Recipe:
        """AdamW, with the same learning rate where both take steps of one size."""
        return sized(super().default_aux(), self.scale)

    def parts(self, block: Block) -> Parts:
        """Momentum, polar factor, equal rows, scale, decay, step."""
        scale = MatchRms() if self.scale == "match_rms" else MatrixScale()
        return self.around(Polar(), NeuronRms(longer=self.neurons == "longer"), scale)


@recipe(
    "adamuon",
    paper="Si, Zhang and Shen 2025, arXiv:2507.11005",
    family="spectral",
    use="muon with a second moment of its update",
    avoid="short memory: two matrices",
    start="AdamW's lr",
)
@dataclass(frozen=True, kw_only=True)
class AdaMuon(Spectral):
    """AdaMuon: the polar factor of the momentum's signs, divided by an averaged root of its squares.

    ``O = UV^T`` of ``sign((1 - mu) g + mu m)``; ``v <- mu v + (1 - mu) O^2``; ``O <- O / (sqrt(v) + eps)``;
    ``p <- p (1 - lr wd) - lr 0.2 sqrt(m n) / |O|_F O``.
    """

    moment_eps: float = hyper(1e-8, gt=0, help="added to the root of v")
    update_rms: float = hyper(0.2, gt=0, help="root mean square of an update")

    def parts(self, block: Block) -> Parts:
        """Momentum, signs, polar factor, second moment, scale, decay, step."""
        return self.around(Sign(), Polar(), ElementRms(), MatchRms())


@recipe(
    "spectral_descent",
    paper="Carlson et al. 2015",
    family="spectral",
    use="small studies of steepest descent in the spectral norm",
    avoid="noise: it has no momentum of its own by default",
)
@dataclass(frozen=True, kw_only=True)
class SpectralDescent(Spectral):
    """Steepest descent in the spectral norm: Muon's direction with the length that it leaves out.

    ``p <- p (1 - lr wd) - lr |u|_* UV^T`` of ``u = U S V^T``, where ``|u|_*`` is the sum of ``S`` and ``u`` the
    gradient, or its momentum. The learning rate is in units of 1 / curvature, as for gradient descent.
    """

    lr: float = hyper(0.01, ge=0, help="learning rate of the matrices; steps shrink with the gradient")
    momentum: float = hyper(0.0, ge=0, lt=1, structural=True, help="memory of the momentum; 0 takes the gradient")
    weight_decay: float = hyper(0.0, ge=0, help="decay; lr * weight_decay is taken off in a step")
    aux: Recipe | None = field(default_factory=lambda: AdamW(lr=3e-4, betas=(0.9, 0.95)))

    def parts(self, block: Block) -> Parts:
        """Momentum, polar factor with the nuclear norm, decay, step."""
        momentum: tuple[Part, ...] = (Ema(nesterov=self.nesterov),) if self.momentum else ()
        return Parts(*momentum, DualPolar(), DECAYS[self.decay], Descend())


# -- QK-clip -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Outputs:
    """Some outputs of a query or key map: rows of its weight, or elements of its bias.

    Attributes:
        name: The parameter.
        axis: Axis of the outputs.
        start: Where they begin on it.
        size: Their number.
        first: Number of the first of them among all queries, or all keys, of the module.
    """

    name: str
    axis: int
    start: int
    size: int
    first: int = 0

    def scale(self, tensor: Tensor, factors: Tensor) -> None:
        """Multiply each output by its own of the factors of all queries or keys, in place."""
        shape = [1] * tensor.ndim
        shape[self.axis] = self.size
        own = factors[self.first : self.first + self.size].to(tensor.device)
        tensor.narrow(self.axis, self.start, self.size).mul_(own.view(shape))


@dataclass(frozen=True)
class QkClip:
    """QK-clip of one attention module, as the ``apply`` of a constraint.

    With ``gamma_h = min(1, tau / S_h)`` a head's queries and keys are each scaled by ``sqrt(gamma_h)``. Where several
    heads share keys, its queries alone are scaled, by ``gamma_h`` (``shared`` is ``query``); or the group's largest
    ``S`` stands for all its heads (``group``). Heads without a finite ``S`` are left alone.

    Attributes:
        module: Name of the attention module.
        queries: Weights of the queries, in the order of the heads.
        keys: Weights of the keys.
        query_biases: The biases that may belong to them.
        key_biases: The same for the keys.
        shared: What to do where heads share keys.
    """

    module: str
    queries: tuple[Outputs, ...]
    keys: tuple[Outputs, ...]
    query_biases: tuple[Outputs, ...] = ()
    key_biases: tuple[Outputs, ...] = ()
    shared: str = "query"

    @property
    def names(self) -> tuple[str, ...]:
        """The weights, each once."""
        return tuple(dict.fromkeys(part.name for part in (*self.queries, *self.keys)))

    @property
    def biases(self) -> tuple[str, ...]:
        """The biases that may be there, each once."""
        return tuple(dict.fromkeys(part.name for part in (*self.query_biases, *self.key_biases)))

    def __call__(self, tensors: Sequence[Tensor | None], h: Mapping[str, Any], notes: Mapping[str, Tensor]) -> None:
        """Scale the tensors of ``names`` and ``biases``, in this order; ``None`` for a bias that is not there."""
        if self.module not in notes:
            _warn_once(self.module)
            return
        found = {name: t for name, t in zip((*self.names, *self.biases), tensors) if t is not None}
        query, key = self.factors(notes[self.module], h["tau"])
        for part in (*self.queries, *self.query_biases):
            if part.name in found:
                part.scale(found[part.name], query)
        for part in (*self.keys, *self.key_biases):
            if part.name in found:
                part.scale(found[part.name], key)

    def factors(self, peak: Tensor, tau: float | Tensor) -> tuple[Tensor, Tensor]:
        """What each output of the queries and of the keys is multiplied by, given the largest logits ``[H]``."""
        rows, key_rows = (sum(part.size for part in parts) for parts in (self.queries, self.keys))
        heads = peak.numel()
        width = rows // max(heads, 1)
        if peak.ndim != 1 or not heads or rows % heads or key_rows % width or rows % key_rows:
            raise ValueError(
                f"the note max_logits of {self.module!r} has shape {tuple(peak.shape)}; it must be one number for each "
                f"head, and {rows} query and {key_rows} key outputs must be whole heads of one size"
            )
        group = rows // key_rows
        peak = peak.to(torch.promote_types(peak.dtype, torch.float32))
        if group > 1 and self.shared == "group":
            peak = peak.view(-1, group).amax(1).repeat_interleave(group)
        gamma = torch.where(peak.isfinite() & (peak > tau), tau / peak, 1.0)
        if group > 1 and self.shared == "query":
            query, key = gamma, torch.ones_like(gamma[::group])
        else:
            query, key = gamma.sqrt(), gamma[::group].sqrt()
        return query.repeat_interleave(width), key.repeat_interleave(width)


@lru_cache(maxsize=64)
def qk_clips(blocks: tuple[Block, ...], shared: str = "query") -> tuple[QkClip, ...]:
    """The attention modules of which these blocks hold queries and keys.

    A block is one or the other by the label that routing gives to the parts of a fused map (``q``, ``k``, or ``q0``,
    ``k0``, ... head by head), else by the last word of its map's name, as in ``q_proj``, ``to_k`` or ``query``; parts
    that a rule has split are read in the order of the name, as in ``qkv``. The module that holds both maps is the
    attention module.
    """
    labels: dict[str, list[str]] = {}
    for block in blocks:
        labels.setdefault(block.pieces[0].name, []).append(block.key[len(block.pieces[0].name) + 1 :])
    found: dict[str, dict[str, list[Outputs]]] = {}
    for block in blocks:
        piece = block.pieces[0]
        if not block.is_matrix or len(block.pieces) > 1 or len(piece.shape) != 2 or ".parametrizations." in piece.name:
            continue
        path, _, leaf = piece.name.rpartition(".")
        module, _, own = path.rpartition(".") if leaf == "weight" else (path, "", leaf.removesuffix("_weight"))
        side = _side(own, block.key[len(piece.name) + 1 :], labels[piece.name])
        if side:
            axis = piece.perm[0] if piece.perm else 0
            start = piece.index[axis].start if piece.index else 0
            weights = found.setdefault(module, {"q": [], "k": []})[side]
            first = sum(weight.size for weight in weights)
            weights.append(Outputs(piece.name, axis, start, piece.shape[axis], first))
    return tuple(
        QkClip(
            module,
            tuple(sides["q"]),
            tuple(sides["k"]),
            tuple(bias for weight in sides["q"] for bias in _biases(weight, "q")),
            tuple(bias for weight in sides["k"] for bias in _biases(weight, "k")),
            shared,
        )
        for module, sides in found.items()
        if sides["q"] and sides["k"]
    )


_NAMES = {"q": "q", "query": "q", "queries": "q", "wq": "q", "k": "k", "key": "k", "keys": "k", "wk": "k"}
_FUSED = {"qkv": "qkv", "wqkv": "qkv", "query key value": "qkv", "qk": "qk", "kv": "kv", "wkv": "kv", "key value": "kv"}
_FILLERS = {"proj", "projection", "lin", "linear", "layer", "to", "w", "fc", "dense", "attn", "in"}


def _side(name: str, label: str, labels: Sequence[str]) -> str:
    """``q``, ``k`` or nothing: what a part of a map of this name is."""
    labelled = re.fullmatch(r"([qk])\d*", label)
    if labelled:
        return labelled[1]
    words = " ".join(word for word in name.lower().split("_") if word not in _FILLERS)
    if not label:
        return _NAMES.get(words, "")
    order = _FUSED.get(words, "")
    side = order[int(label)] if label.isdigit() and len(order) == len(labels) else ""
    return side if side in ("q", "k") else ""


def _biases(weight: Outputs, side: str) -> tuple[Outputs, ...]:
    """Where the biases of these outputs are, if there are any."""
    path, dot, leaf = weight.name.rpartition(".")
    if leaf == "weight":
        return (replace(weight, name=f"{path}{dot}bias", axis=0),)
    if leaf not in ("in_proj_weight", "q_proj_weight", "k_proj_weight"):
        return ()
    # nn.MultiheadAttention keeps one bias for its three maps, and may add a key of its own
    start = weight.start if leaf == "in_proj_weight" else weight.size * (side == "k")
    shared = replace(weight, name=f"{path}{dot}in_proj_bias", axis=0, start=start)
    own = replace(weight, name=f"{path}{dot}bias_k", axis=2, start=0)
    return (shared, own) if side == "k" else (shared,)


_warned: set[str] = set()


def _warn_once(module: str) -> None:
    if not _warned:
        _warned.add(module)
        warnings.warn(
            f"muonclip knows no attention logits of {module!r}, so its heads are not clipped: before each step call "
            "optimizer.note('max_logits', {module: largest logit of each head}), for example with "
            "guided_descent.capture.attention.AttentionLogits",
            stacklevel=2,
        )
