"""The gradient noise scale: how many samples a batch needs before its gradient is more signal than noise.

A gradient over b samples has ``E ||g_b||^2 = ||G||^2 + S / b``, with G the gradient of the loss itself and S the trace
of the covariance of the samples' gradients. Squared norms at two sizes b < B therefore tell both, without bias:
``||G||^2 = (B ||g_B||^2 - b ||g_b||^2) / (B - b)``, ``S = (||g_b||^2 - ||g_B||^2) / (1/b - 1/B)``. The noise scale is
``S / ||G||^2``, in samples; each of the two is averaged over steps before they are divided, since one step's quotient
means little. (McCandlish et al. 2018, 1812.06162, appendix A.)
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from guided_descent.capture import Capture, LayerIO, supported, unwrap
from guided_descent.capture.tap import Scaler

Source = Literal["passes", "samples"]
Division = Literal["mean", "sum"]


@dataclass(frozen=True)
class Noise:
    """One estimate, or why there is none.

    Attributes:
        value: ``S / ||G||^2`` in samples; ``None`` where it is unavailable.
        trace: S, the trace of the covariance of one sample's gradient, averaged.
        square: ``||G||^2``, averaged; an estimate, which may be negative while the noise drowns it.
        updates: Steps that went into it.
        why: Why there is no value; empty where there is one.
    """

    value: float | None
    trace: float
    square: float
    updates: int
    why: str = ""

    def __str__(self) -> str:
        return f"unavailable: {self.why}" if self.value is None else f"{self.value:.4g} samples"


class NoiseScale:
    """Measures the gradient noise scale of a training run, globally and by layer, from the passes that it makes anyway.

    ``passes`` compares the gradient of each backward pass (of one micro-batch on one rank) with that of the whole step.
    It costs a norm of each gradient, stores none, and needs several passes in a step: gradient accumulation, several
    ranks (``DistributedDataParallel``; gradients are seen before they are reduced), or both. ``samples`` compares the
    gradient of every sample with that of the step. It works with a single pass, takes the norms exactly from inputs and
    output gradients of the layers that can be read (``capture.supported``) and speaks of those alone; ``torch.compile``
    is set aside in the steps that are measured.

    Call ``update`` once in each step, after the last backward (after ``scaler.unscale_``, where there is a scaler) and
    before anything clips or changes ``p.grad``::

        noise = NoiseScale(model)
        for batch in batches:
            for part in batch.chunk(4):
                (loss(model, part) / 4).backward()
            noise.update(batch_size=len(batch) // 4)
            opt.step(); opt.zero_grad()
        print(noise.measure(), noise.by_layer())

    Args:
        model: The model, or its ``DistributedDataParallel``. Under ``fully_shard`` leaves see no gradients: use
            ``samples``.
        source: ``passes`` or ``samples``.
        memory: Of the averages of S and ``||G||^2``, which are corrected for their start.
        every: Measure every so many steps.
        division: ``mean`` where the loss of each of k micro-batches was divided by k, ``sum`` where it was not.
        scaler: The ``GradScaler`` that scales the loss.
        process_group: Of the ranks that average their gradients; that of a ``DistributedDataParallel`` by itself.

    Raises:
        ValueError: A number is out of its range, or ``samples`` finds no layer that it can read.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        source: Source = "passes",
        memory: float = 0.95,
        every: int = 1,
        division: Division = "mean",
        scaler: Scaler | None = None,
        process_group: Any = None,
    ) -> None:
        for name, value, valid in (("source", source, get_args(Source)), ("division", division, get_args(Division))):
            if value not in valid:
                raise ValueError(f"{name}={value!r} must be one of {', '.join(map(repr, valid))}")
        if not 0 <= memory < 1:
            raise ValueError(f"memory={memory!r} must be at least 0 and below 1: the share of the past in an average")
        if every < 1:
            raise ValueError(f"every={every!r} must be at least 1: the steps from one measurement to the next")
        self.source, self.memory, self.every, self.division = source, memory, every, division
        self.scaler = scaler
        self.group = process_group
        if process_group is None and isinstance(model, nn.parallel.DistributedDataParallel):
            self.group = model.process_group
        self._steps = self._updates = 0
        self._why = "no step has been measured yet"
        self._meter: _Passes | _Samples = (_Passes if source == "passes" else _Samples)(model, scaler)
        self._squares = torch.zeros(len(self._meter.layers), dtype=torch.float64)
        self._traces = torch.zeros(len(self._meter.layers), dtype=torch.float64)
        self._meter.listen(True)

    @torch.no_grad()
    def update(self, batch_size: int | None = None) -> None:
        """Take in a step; gradients that are not finite are left out.

        Args:
            batch_size: Samples in each pass on each rank; ``samples`` counts them itself.

        Raises:
            ValueError: ``passes`` was not told a batch size.
            RuntimeError: The gradients were there before their passes were, as under ``fully_shard``.
        """
        due = self._steps % self.every == 0
        self._steps += 1
        if due:
            self._measure(batch_size)
        self._meter.listen(self._steps % self.every == 0)

    def measure(self) -> Noise:
        """The noise scale of all parameters together."""
        return self._noise(float(self._traces.sum()), float(self._squares.sum()))

    def by_layer(self) -> dict[str, Noise]:
        """That of each module with parameters of its own, by name."""
        pairs = zip(self._traces.tolist(), self._squares.tolist())
        return {name: self._noise(*pair) for name, pair in zip(self._meter.layers, pairs)}

    def remove(self) -> None:
        """Take the hooks off the model; what was measured stays."""
        self._meter.remove()

    def state_dict(self) -> dict[str, Any]:
        """The averages, by layer: tensors, numbers and names."""
        return {
            "format": 1,
            "layers": list(self._meter.layers),
            "traces": self._traces.clone(),
            "squares": self._squares.clone(),
            "steps": self._steps,
            "updates": self._updates,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take up the averages again; layers are matched by name.

        Raises:
            ValueError: The format or the layers are others.
        """
        if state.get("format") != 1:
            raise ValueError(f"format {state.get('format')!r} of a noise scale is unknown: this version reads format 1")
        if set(state["layers"]) != set(self._meter.layers):
            odd = sorted(set(state["layers"]) ^ set(self._meter.layers))
            raise ValueError(f"the noise scale was measured on other layers; {odd[0]!r} is in one of them alone")
        order = [list(state["layers"]).index(name) for name in self._meter.layers]
        self._traces.copy_(state["traces"][order])
        self._squares.copy_(state["squares"][order])
        self._steps, self._updates = int(state["steps"]), int(state["updates"])
        self._why = "" if self._updates else self._why
        self._meter.listen(self._steps % self.every == 0)

    def _measure(self, batch_size: int | None) -> None:
        if self.source == "passes" and (batch_size is None or batch_size < 1):
            raise ValueError(f"batch_size={batch_size!r}: give the number of samples in each pass on each rank, from 1")
        found, passes, samples = self._meter.take()
        ranks = 1
        if self.group is not None:
            ranks = torch.distributed.get_world_size(self.group)
            packed = torch.cat([found, torch.tensor([float(samples)], dtype=torch.float64)])
            packed = packed.to(self._meter.device)
            torch.distributed.all_reduce(packed, group=self.group)
            found, samples = packed[:-1].cpu(), int(packed[-1])
        if passes == 0:
            self._why = "no backward pass was seen in the last step"
            return
        # norms of the gradients of mean losses, whatever the loss was divided by
        once = float(passes) if self.division == "mean" else 1.0
        whole = self._meter.whole().cpu() * (once / passes) ** 2
        if self.source == "passes":
            small, b, total = found * once**2 / (passes * ranks), float(batch_size or 0), passes * ranks
            large = b * total
        else:
            # each contribution is that of a mean over the pass, which a sample has 1/n of
            small, b, total = found * once**2 / max(1, samples), 1.0, samples
            large = float(samples)
        if total < 2:
            self._why = (
                "a step was one backward pass on one rank: accumulate gradients, train on several ranks, or use "
                "source='samples'"
                if self.source == "passes"
                else "the batch held one sample"
            )
            return
        if not bool((small.isfinite() & whole.isfinite()).all()):
            return
        square = (large * whole - b * small) / (large - b)
        trace = (small - whole) / (1 / b - 1 / large)
        self._updates += 1
        self._squares.mul_(self.memory).add_(square, alpha=1 - self.memory)
        self._traces.mul_(self.memory).add_(trace, alpha=1 - self.memory)
        self._why = ""

    def _noise(self, trace: float, square: float) -> Noise:
        if self._updates == 0:
            return Noise(None, 0.0, 0.0, 0, self._why)
        bias = 1 - self.memory**self._updates
        trace, square = trace / bias, square / bias
        if square <= 0 or trace < 0:
            why = "the noise drowns the gradient in the steps averaged so far" if square <= 0 else "no noise was found"
            return Noise(None, trace, square, self._updates, why)
        return Noise(trace / square, trace, square, self._updates)


class _Passes:
    """Squared norms of what each backward pass brings to each parameter, by layer."""

    def __init__(self, model: nn.Module, scaler: Scaler | None) -> None:
        self.scaler = scaler
        self._named = [(name, p) for name, p in unwrap(model).named_parameters() if p.requires_grad]
        if not self._named:
            raise ValueError("no parameter of the model takes gradients")
        self.layers = list(dict.fromkeys(_module_of(name) for name, _ in self._named))
        self._place = [self.layers.index(_module_of(name)) for name, _ in self._named]
        self.device = self._named[0][1].device
        self._listening = False
        self._sums: list[Tensor | None] = [None] * len(self._named)
        self._counts = [0] * len(self._named)
        self._handles = [
            p.register_hook(self._hook(i))  # type: ignore[no-untyped-call]
            for i, (_, p) in enumerate(self._named)
        ]

    def listen(self, yes: bool) -> None:
        """Measure the passes of the next step, or leave them alone."""
        self._listening = yes

    def take(self) -> tuple[Tensor, int, int]:
        """The sums of squared norms by layer, the passes that they are from, and nothing of samples."""
        found = torch.zeros(len(self.layers), dtype=torch.float64)
        for place, value in zip(self._place, self._sums):
            if value is not None:
                found[place] += value.cpu()
        passes = max(self._counts)
        self._sums = [None] * len(self._named)
        self._counts = [0] * len(self._named)
        if passes == 0 and any(p.grad is not None for _, p in self._named):
            raise RuntimeError(
                "the parameters have gradients and none of their passes was seen: under fully_shard, or with gradients "
                "that were set by hand, use source='samples'"
            )
        return found, passes, 0

    def whole(self) -> Tensor:
        """The squared norms of the gradients of the step, by layer."""
        return _squares(self._named, self._place, len(self.layers))

    def remove(self) -> None:
        """Take the hooks off."""
        for handle in self._handles:
            handle.remove()

    def _hook(self, i: int) -> Callable[[Tensor], None]:
        def arrived(grad: Tensor) -> None:
            if self._listening:
                scale = 1.0 if self.scaler is None else self.scaler.get_scale()
                square = (torch.linalg.vector_norm(grad.detach(), dtype=_wide(grad)) / scale).double().square()
                kept = self._sums[i]
                self._sums[i] = square if kept is None else kept + square
                self._counts[i] += 1

        return arrived


class _Samples:
    """Squared norms of the gradient of each sample, by layer, from what the layers see."""

    def __init__(self, model: nn.Module, scaler: Scaler | None) -> None:
        root = unwrap(model)
        users: dict[int, int] = {}
        for module in root.modules():
            for p in module.parameters(recurse=False):
                users[id(p)] = users.get(id(p), 0) + 1
        read = {
            name: module
            for name, module in root.named_modules()
            if supported(module)
            and all(p.requires_grad and users[id(p)] == 1 for p in module.parameters(recurse=False))
        }
        if not read:
            raise ValueError(
                "source='samples' reads linear, convolution, embedding and norm layers that are trained whole and "
                "share no weight; the model has none"
            )
        self.layers = list(read)
        self._named = [(f"{n}.{k}", p) for n, m in read.items() for k, p in m.named_parameters(recurse=False)]
        self._place = [self.layers.index(_module_of(name)) for name, _ in self._named]
        self.device = self._named[0][1].device
        self._sums: dict[str, Tensor] = {}
        self._samples: dict[str, int] = {}
        observe = functools.partial(_fold, self._sums, self._samples)  # not a method: it would keep the capture armed
        self._capture = Capture(model, read, observe, fisher="empirical", loss=None, scaler=scaler)
        self._step = 0

    def listen(self, yes: bool) -> None:
        """Arm the capture for the next step, or leave the layers alone."""
        self._step += 1
        if yes:
            self._capture.arm(self._step)
        else:
            self._capture.disarm()

    def take(self) -> tuple[Tensor, int, int]:
        """The sums of squared norms by layer, the number of passes, and of samples."""
        zero = torch.zeros((), dtype=torch.float64)
        found = torch.stack([self._sums.get(name, zero).cpu() for name in self.layers])
        samples, passes = max(self._samples.values(), default=0), self._capture.passes
        self._sums.clear()
        self._samples.clear()
        return found, passes if samples else 0, samples

    def whole(self) -> Tensor:
        """The squared norms of the gradients of the step, by layer."""
        return _squares(self._named, self._place, len(self.layers))

    def remove(self) -> None:
        """Let go of the layers."""
        self._capture.remove()


def _fold(sums: dict[str, Tensor], samples: dict[str, int], name: str, io: LayerIO) -> None:
    """Add the squared norms of a layer's samples, and how many there are."""
    count = io.a.shape[0]
    # of the sum over terms; that of the mean over the terms of one sample has count / terms of it
    found = io.per_sample_squared_norms().double().sum() * (count / io.terms) ** 2
    sums[name] = sums[name] + found if name in sums else found
    samples[name] = samples.get(name, 0) + count


def curvature_noise_scale(
    losses: Sequence[Callable[[], Tensor]], parameters: Iterable[Tensor], batch_size: int
) -> Noise:
    """The noise scale that knows the curvature, ``tr(H Sigma) / (G^T H G)``, from some batches at the present weights.

    ``E g_b^T H g_b = G^T H G + tr(H Sigma) / b`` gives both from the quadratic forms of the gradients of single batches
    and of all together, as norms give the simple one; H is the Hessian of the mean loss of all batches. It costs, for m
    batches, m gradients and ``m (m + 1)`` products with the Hessian of one of them; nothing is written to ``p.grad``.
    At the learning rate ``lr_max / (1 + B_noise / B)`` a step of SGD is the best (McCandlish et al. 2018, 1812.06162).

    Args:
        losses: Closures, one for each batch, that return the mean loss of its samples.
        parameters: Those to differentiate by.
        batch_size: Samples in each batch.

    Returns:
        The estimate; ``trace`` is ``tr(H Sigma)`` and ``square`` is ``G^T H G``, negative where H has no positive
        curvature along G: then there is no value.

    Raises:
        ValueError: There are fewer than two batches, or no samples in them.
    """
    tensors = [p for p in parameters if p.requires_grad]
    if len(losses) < 2 or batch_size < 1:
        raise ValueError(
            f"{len(losses)} batches of batch_size={batch_size!r}: the sizes compared are those of one batch and "
            "of all together, so give two or more, of at least one sample"
        )

    def gradient(loss: Tensor, graph: bool) -> list[Tensor]:
        found = torch.autograd.grad(loss, tensors, create_graph=graph, allow_unused=True)
        return [torch.zeros_like(p) if g is None else g for p, g in zip(tensors, found)]

    def dot(a: Sequence[Tensor], b: Sequence[Tensor]) -> float:
        return sum(float(torch.sum(x.detach().double() * y.detach().double())) for x, y in zip(a, b))

    with torch.enable_grad():
        parts = [[g.detach() for g in gradient(loss(), False)] for loss in losses]
        mean = [torch.stack(each).mean(0) for each in zip(*parts)]
        vectors = [*parts, mean]
        forms = [0.0] * len(vectors)
        for loss in losses:  # H is their mean
            live = gradient(loss(), True)
            for k, v in enumerate(vectors):
                products = torch.autograd.grad(live, tensors, v, retain_graph=True, allow_unused=True)
                forms[k] += dot([torch.zeros_like(p) if h is None else h for p, h in zip(tensors, products)], v)
    m = len(losses)
    small, large = sum(forms[:-1]) / m**2, forms[-1] / m
    b, whole = float(batch_size), float(batch_size * m)
    square = (whole * large - b * small) / (whole - b)
    trace = (small - large) / (1 / b - 1 / whole)
    if square <= 0 or trace < 0:
        return Noise(
            None, trace, square, 1, "the curvature along the gradient, or along its noise, is not positive here"
        )
    return Noise(trace / square, trace, square, 1)


def _squares(named: Sequence[tuple[str, Tensor]], place: Sequence[int], count: int) -> Tensor:
    """Squared norms of ``p.grad`` by layer [count], in float64."""
    found = torch.zeros(count, dtype=torch.float64)
    for (_, p), i in zip(named, place):
        if p.grad is not None:
            found[i] += torch.linalg.vector_norm(p.grad, dtype=_wide(p.grad)).double().square().cpu()
    return found


def _wide(tensor: Tensor) -> torch.dtype:
    return torch.float64 if tensor.dtype == torch.float64 else torch.float32


def _module_of(name: str) -> str:
    return name.rpartition(".")[0]
