"""The diagonal of the curvature: what the passes before a step tell of it, gathered for the parts that read it.

Two estimates exist. ``z * (H z)`` with a random probe z has the diagonal of the Hessian H as its mean; a gradient at
labels drawn from the model, squared and times their number, has that of the Gauss-Newton matrix. Both are sums over
what is given between two steps, so that micro-batches add up as gradients do, and are reduced over ranks once.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from guided_descent.capture import Loss, OutputTap, as_loss
from guided_descent.engine.buckets import Parameter
from guided_descent.engine.state import real, work_dtype
from guided_descent.parts.base import Batch, generator

if TYPE_CHECKING:
    from guided_descent.engine.engine import Engine, Work

#: What ``Part.curvature`` may be, and the pass that feeds it.
KINDS = {"rademacher": "hessian", "normal": "hessian", "labels": "labels"}
#: The passes, and what to say where one is missing.
ERRORS = {
    "hessian": "the product of the Hessian with a probe in this step: call optimizer.hessian_pass(loss) before "
    "loss.backward(), or loss.backward(create_graph=optimizer.due('hessian')), or step(Objective(loss=lambda: "
    "loss_fn(model(x), y), closure=closure)) of guided_descent.solvers",
    "labels": "gradients at labels drawn from the model in this step: build from the model with loss='cross_entropy', "
    "or another of guided_descent.capture.LOSSES (for a copied optimizer, optimizer.watch(model, loss=...)), or call "
    "optimizer.curvature_pass(out, 'cross_entropy') before the backward pass",
}


class Diagonal:
    """Gathers estimates between two steps.

    Args:
        engine: The engine.
    """

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self.tap: OutputTap | None = None
        self.loss: Loss | None = None
        self.clear()

    def __getstate__(self) -> dict[str, Any]:
        """A copy watches no model and has seen nothing."""
        return {"engine": self.engine, "tap": None, "loss": None, "sums": {}, "passes": Counter(), "labels": 0}

    def clear(self) -> None:
        """Forget what was seen."""
        self.sums: dict[str, Tensor] = {}  # by parameter, as real numbers in the work dtype
        self.passes: Counter[str] = Counter()
        self.labels = 0

    def watch(self, model: nn.Module, loss: Loss | str | None) -> None:
        """Draw labels at the end of the model's forward passes, from the loss that is named."""
        if self.tap is not None:
            self.tap.disarm()
        self.loss = as_loss(loss)
        self.tap = None if self.loss is None else OutputTap(model, self._drawn)
        self.arm()

    def arm(self) -> None:
        """Forget what was seen, and listen to the model if its next passes are wanted."""
        self.clear()
        if self.tap is not None:
            self.tap.arm() if self.due("labels") else self.tap.disarm()

    @property
    def step(self) -> int:
        """Number of the step that is next."""
        return int(self.engine.groups[0]["steps"]) + 1

    def reads(self, source: str) -> bool:
        """Whether some part reads what this source tells."""
        return any(KINDS[p.curvature] == source for b in self.engine.bind().buckets for p in b.parts.curvature)

    def due(self, *sources: str) -> bool:
        """Whether the next step wants a pass of these sources, ``hessian`` or ``labels``."""
        return bool(self.wanted(*sources))

    def wanted(self, *sources: str) -> dict[int, tuple[Parameter, str]]:
        """The parameters of which the next step wants an estimate from these sources, with its kind, by index."""
        found: dict[int, tuple[Parameter, str]] = {}
        for bucket in self.engine.bind().buckets:
            h = self.engine.groups[bucket.group]
            for part in bucket.parts.curvature:
                if KINDS[part.curvature] in sources and part.observes(h, self.step):
                    found |= {p.index: (p, part.curvature) for owners in bucket.owners for p in owners}
        return dict(sorted(found.items()))

    # -- passes ----------------------------------------------------------------------------------------------------

    def add_hessian(self, loss: Tensor) -> None:
        """Add ``z * (H z)`` of a loss with its graph, which is left as it is.

        Raises:
            TypeError: It is no tensor with one element and a graph.
            RuntimeError: The graph has no second derivative.
        """
        chosen = self.wanted("hessian")
        if not chosen:
            return
        if not isinstance(loss, Tensor) or loss.numel() != 1 or not loss.requires_grad:
            what = f"a tensor of shape {list(loss.shape)}" if isinstance(loss, Tensor) else f"a {type(loss).__name__}"
            raise TypeError(f"hessian_pass got {what}: give the loss, one element with its graph, before backward")
        tensors = [p.tensor for p, _ in chosen.values()]

        def first() -> Sequence[Tensor | None]:
            return torch.autograd.grad(loss, tensors, create_graph=True, allow_unused=True)

        self._multiply(chosen, first, retain=True)

    def _multiply(
        self, chosen: dict[int, tuple[Parameter, str]], first: Callable[[], Sequence[Tensor | None]], retain: bool
    ) -> None:
        tensors = [p.tensor for p, _ in chosen.values()]
        probes = [self.probe(p, kind) for p, kind in chosen.values()]
        try:
            with torch.enable_grad():
                pairs = [(g, z) for g, z in zip(first(), probes) if g is not None and g.requires_grad]
                heads, weights = [g for g, _ in pairs], [z for _, z in pairs]
                found: Sequence[Tensor | None] = [None] * len(tensors)
                if pairs:
                    found = torch.autograd.grad(heads, tensors, weights, retain_graph=retain, allow_unused=True)
        except RuntimeError as error:
            raise RuntimeError(
                f"the loss has no second derivative: {error}. Call hessian_pass(loss) before backward; run attention "
                "within torch.nn.attention.sdpa_kernel(SDPBackend.MATH) in the passes that optimizer.due('hessian') "
                "asks for; a compiled model must run eagerly there"
            ) from error
        for (p, _), z, hz in zip(chosen.values(), probes, found):
            self._add(p, None if hz is None else real(hz) * real(z))
        self.passes["hessian"] += 1

    def probe(self, p: Parameter, kind: str) -> Tensor:
        """The probe of a parameter: exactly +1 or -1, or normal; fixed by seed, name and step, equal on all ranks."""
        shape, device = real(p.tensor).shape, p.tensor.device
        drawn = torch.empty(shape, dtype=torch.float32, device=device)
        made = generator(self.engine.groups[0]["seed"], p.name, self.step, "probe", device)
        if kind == "normal":
            drawn.normal_(generator=made)
        else:
            drawn.bernoulli_(0.5, generator=made).mul_(2).sub_(1)
        drawn = drawn.to(real(p.tensor).dtype)
        return torch.view_as_complex(drawn) if p.tensor.is_complex() else drawn

    def add_labels(self, out: Tensor, loss: Loss) -> None:
        """Add the gradient of the sum of the loss's terms at labels drawn from the model's output."""
        chosen = self.wanted("labels")
        if not chosen or not out.requires_grad:
            return
        group, passes = self.engine.process_group, self.passes["labels"]
        rank = 0 if group is None else torch.distributed.get_rank(group)
        made = generator(self.engine.groups[0]["seed"], f"rank {rank}", self.step, f"labels {passes}", out.device)
        drawn = loss.sample(out.detach(), made)
        tensors = [p.tensor for p, _ in chosen.values()]
        with torch.autocast(out.device.type, enabled=False):  # a backward keeps the types of its forward
            found = torch.autograd.grad(out, tensors, drawn, retain_graph=True, allow_unused=True)
        for (p, _), g in zip(chosen.values(), found):
            self._add(p, None if g is None else real(g))
        self.passes["labels"] += 1
        self.labels += loss.terms(out)

    def curvature_pass(self, out: Tensor, loss: Loss | str | None) -> None:
        """The explicit form of ``add_labels``; without effect where the forward pass has drawn by itself.

        Raises:
            ValueError: No loss is known, or one is given though each forward pass draws by itself.
        """
        if self.tap is not None and loss is not None and self.due("labels"):
            raise ValueError(
                "curvature_pass: forward passes draw from the loss given at build; build without loss= to give one for "
                "each batch"
            )
        if self.tap is not None or not self.due("labels"):
            return
        chosen = as_loss(loss)
        if chosen is None:
            raise ValueError("curvature_pass: no loss is known; pass one, such as 'cross_entropy', here or at build")
        self.add_labels(out, chosen)

    def _drawn(self, out: Tensor) -> None:
        if self.loss is not None:
            self.add_labels(out, self.loss)

    def _add(self, p: Parameter, value: Tensor | None) -> None:
        if p.name not in self.sums:
            self.sums[p.name] = torch.zeros_like(real(p.tensor), dtype=work_dtype(p.tensor.dtype))
        if value is not None:
            self.sums[p.name] += value

    # -- the step --------------------------------------------------------------------------------------------------

    def complete(self, gradients: Sequence[Tensor | None], given: Any) -> None:
        """Before anything changes: what is wanted and was not given comes from the step's objective or gradients.

        An objective that can be differentiated is evaluated once more; gradients of ``backward(create_graph=True)`` are
        differentiated as they are, and cut from their graph.

        Raises:
            ValueError: There is no way to it; the message says what to call.
        """
        if not any(bucket.parts.curvature for bucket in self.engine.bind_current().buckets):
            return
        wanted = {s: {i: p for i, p in self.wanted(s).items() if gradients[i] is not None} for s in ERRORS}
        missing = [source for source in ERRORS if wanted[source] and not self.passes[source]]
        own = [gradients[i] for i in wanted["hessian"]]
        if "hessian" in missing and any(g is not None and g.requires_grad for g in own):
            self._multiply(wanted["hessian"], lambda: own, retain=False)
        elif "hessian" in missing and getattr(given, "differentiable", False):
            self._apart(lambda: self.add_hessian(given.value()))
        if "labels" in missing and getattr(given, "likelihood", None) is not None:
            self._apart(lambda: self.add_labels(given.inner(), given.likelihood.loss))
        for p in self.engine.bind_current().parameters:
            if p.tensor.grad is not None and p.tensor.grad.requires_grad:
                p.tensor.grad = p.tensor.grad.detach()  # the graph and the parameter would keep each other alive
        for source in missing:
            if not self.passes[source]:
                recipes = {self.engine.groups[p.group]["recipe"] for p, _ in wanted[source].values()}
                raise ValueError(f"{', '.join(sorted(recipes))} needs {ERRORS[source]}")

    def _apart(self, evaluate: Callable[[], None]) -> None:
        """A forward pass that nothing else listens to; attention in its plain form, which has a second derivative."""
        if self.tap is not None:
            self.tap.disarm()
        if self.engine.observer is not None:
            self.engine.observer.capture.disarm()
        with torch.enable_grad(), sdpa_kernel(SDPBackend.MATH):
            evaluate()

    def reduce(self) -> dict[int, Tensor]:
        """The estimates by parameter index, real: means over ranks of ``z * (H z)``, gradients over all labels."""
        if not self.sums:
            return {}
        group = self.engine.process_group
        if group is not None:
            self._add_ranks(group)
        size = 1 if group is None else torch.distributed.get_world_size(group)
        for p, kind in self.wanted("hessian", "labels").values():
            if p.name in self.sums:
                sign = -1 if self.engine.groups[p.group]["maximize"] else 1
                self.sums[p.name] /= sign * (self.labels if kind == "labels" else size)
        parameters = self.engine.bind_current().parameters
        return {p.index: self.sums[p.name] for p in parameters if p.name in self.sums}

    def _add_ranks(self, group: Any) -> None:
        """Sums over ranks, as one message for each dtype."""
        labels = torch.tensor(float(self.labels), dtype=torch.float64)
        labels = labels.to(next(iter(self.sums.values())).device)
        torch.distributed.all_reduce(labels, group=group)
        self.labels = int(labels)
        by_dtype: dict[torch.dtype, list[Tensor]] = {}
        for name in sorted(self.sums):
            by_dtype.setdefault(self.sums[name].dtype, []).append(self.sums[name])
        for dtype in sorted(by_dtype, key=str):
            flat = torch.cat([value.reshape(-1) for value in by_dtype[dtype]])
            torch.distributed.all_reduce(flat, group=group)
            for value, piece in zip(by_dtype[dtype], torch.split(flat, [v.numel() for v in by_dtype[dtype]])):
                value.copy_(piece.view_as(value))

    def show(self, x: Batch, w: Work) -> None:
        """Give a slice its rows; nothing where they were not wanted."""
        owners = {owner.name: owner.index for owner, _, _ in w.slice.pieces}
        if not w.bucket.parts.curvature or not self.sums or not owners.keys() <= self.sums.keys():
            return
        rows = w.slice.gradients(_at({i: self.sums[name] for name, i in owners.items()}))
        x.curvature, x.labels = rows, self.labels


def _at(values: dict[int, Tensor]) -> list[Tensor | None]:
    """A list with these values at their indices."""
    found: list[Tensor | None] = [None] * (max(values) + 1)
    for i, value in values.items():
        found[i] = value
    return found
