"""The tap on a model: it pairs each layer's input with the gradient of its output, on the steps that ask for it."""

from __future__ import annotations

import hashlib
import sys
import warnings
import weakref
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import Any, Literal, Protocol, get_args

import torch
from torch import Tensor, nn
from torch.autograd import Variable
from torch.autograd.graph import GradientEdge, get_gradient_edge
from torch.utils.hooks import RemovableHandle

from guided_descent.capture.layers import LayerIO, arrange, has_bias, kind_of, sizes, why_not
from guided_descent.capture.losses import Loss, as_loss, wide

Fisher = Literal["mc", "exact", "empirical", "forward"]
Observer = Callable[[str, LayerIO], None]


class Scaler(Protocol):
    """The part of ``torch.amp.GradScaler`` that is needed."""

    def get_scale(self) -> float:
        """The factor on the loss."""
        ...


class _Call:
    """One call of a layer: its input, where its output is in the graph, and the gradient once it has come."""

    def __init__(self, x: Tensor, edge: GradientEdge | None) -> None:
        self.x: Tensor | None = x.detach()
        self.version = x._version
        self.edge = edge
        self.d: Tensor | None = None

    def read(self, name: str) -> Tensor:
        """The input, as long as it is what the layer read."""
        if self.x is None or self.x._version != self.version:
            raise RuntimeError(
                f"{name}: its input was changed in place after the layer had read it, so that it cannot be captured; "
                "make that operation out of place"
            )
        return self.x


class _Pass:
    """The calls of one forward of the model, by layer, made in the ``era`` between two calls of ``arm``."""

    def __init__(self, era: int) -> None:
        self.era = era
        self.calls: dict[str, list[_Call]] = {}
        self.terms = 0
        self.closed = False
        self.done = False
        self.task = -1


class _Eager:
    """Holds compiled code off (``force_eager``) while any capture is armed, and then restores what was before."""

    def __init__(self) -> None:
        self.count = 0
        self.stance: Any = None

    def enter(self) -> None:
        """One more capture is armed."""
        if self.count == 0:
            self.stance = torch.compiler.set_stance("force_eager")
        self.count += 1

    def leave(self) -> None:
        """One capture fewer is armed."""
        self.count -= 1
        frames = sys.modules.get("torch._dynamo.eval_frame")
        # a stance that somebody has set since is theirs
        if self.count == 0 and frames is not None and frames._stance is self.stance.stance:
            self.stance.__exit__(None, None, None)


_EAGER = _Eager()


class Capture:
    """Captures ``LayerIO`` of chosen layers while it is armed, and costs nothing while it is not.

    Hooks are on the model only while armed. A pass is one forward of the model with gradients enabled; every such
    forward counts as a micro-batch, so evaluate under ``torch.no_grad()``. Calls of one layer in one pass are joined
    along R and observed once. ``fisher`` says where output gradients come from (1/T and loss scales undone, so that
    ``LayerIO.d`` belongs to the sum over the T loss terms):

    - ``mc``: one draw of ``loss.sample`` sent back from the output at the end of the forward, before the real backward.
      It writes no ``p.grad``, reduces nothing across ranks and draws from a generator of its own.
    - ``exact``: all columns of ``loss.sqrt_hessian`` in the same way, one backward pass each.
    - ``empirical``: the real backward, times T and over the scale of ``scaler``. With k micro-batches of loss / k the
      consumer multiplies gradients by k, which is ``passes``. The first backward through a forward counts.
    - ``forward``: none; inputs alone, at the end of the forward.

    In-place operations after a layer (whose output is copied while armed if it is a view), gradient accumulation,
    autocast, DistributedDataParallel (with ``no_sync``) and non-reentrant checkpointing work; a recomputation is not
    captured again (but runs once more for each backward pass here, and with it what it does to BatchNorm's running
    statistics). While armed, ``torch.compile`` is set aside (``force_eager``), since compiled code does not run hooks
    dependably. Not seen are layers under reentrant checkpointing, in ``DataParallel`` and those called outside a
    forward of the model, other than by the explicit ``curvature_pass``; an observer that was not called for a layer
    tells.

    Axis 0 of inputs is taken for the sample. ``empirical`` counts ignored targets (padding) as terms: use ``mc`` with
    ``Masked`` where they matter.

    Args:
        model: the root module; DistributedDataParallel and compiled wrappers are looked through.
        layers: modules by name, or names of submodules; see ``supported``.
        observer: called with a layer's name and its ``LayerIO``, one layer after the other.
        fisher: see above.
        loss: a name in ``LOSSES``, an object like them, or ``None``. With one, ``mc`` and ``exact`` take their pass by
            themselves whenever the model's output is a tensor, has ``logits`` or is a sequence that begins with a
            tensor; without, call ``curvature_pass``.
        seed: of the draws, together with the step, the micro-batch and the rank.
        rank: of this process, so that ranks draw apart.
        scaler: the GradScaler on the loss; only ``empirical`` sees a scaled loss and reads it.

    Raises:
        ValueError: a layer cannot be captured, is not in the model or is there twice; ``fisher`` or ``loss`` is
            unknown; the model is a ``DataParallel``.

    Example:
        >>> net = nn.Sequential(nn.Linear(3, 2), nn.Tanh(), nn.Linear(2, 4))
        >>> def show(name, io):
        ...     print(name, list(io.a.shape), list(io.d.shape), io.terms)
        >>> capture = Capture(net, ["0", "2"], show, fisher="mc", loss="cross_entropy")
        >>> capture.arm(step=0)
        >>> out = net(torch.ones(5, 3))
        0 [5, 1, 3] [5, 1, 2] 5
        2 [5, 1, 2] [5, 1, 4] 5
        >>> capture.disarm()
    """

    def __init__(
        self,
        model: nn.Module,
        layers: Mapping[str, nn.Module] | Sequence[str],
        observer: Observer,
        *,
        fisher: str,
        loss: Loss | str | None,
        seed: int = 0,
        rank: int = 0,
        scaler: Scaler | None = None,
    ) -> None:
        self.armed = False
        self._handles: list[RemovableHandle] = []
        if fisher not in get_args(Fisher):
            raise ValueError(f"fisher={fisher!r}: choose one of {', '.join(get_args(Fisher))}")
        self.fisher = fisher
        self.loss = as_loss(loss)
        self.observer = observer
        self.seed, self.rank, self.scaler = seed, rank, scaler
        self.root = unwrap(model)
        if not isinstance(layers, Mapping):
            known = dict(model.named_modules()) | dict(self.root.named_modules())
            if unknown := [name for name in layers if name not in known]:
                raise ValueError(f"layers: the model has no submodule {unknown[0]!r}; see model.named_modules()")
            layers = {name: known[name] for name in layers}
        self.layers = _checked(self.root, layers)
        self.passes = 0
        self.step = 0
        self._era = 0
        self._pass: _Pass | None = None
        self._task = -1
        self._warned = False

    def arm(self, step: int, only: Collection[str] | None = None) -> None:
        """Capture from now on, until ``disarm``; ``passes`` starts again at 0.

        Args:
            step: number of the step, of which the draws are a function.
            only: names of the layers to capture this time; all of them if left out.

        Raises:
            ValueError: a layer has become one that cannot be captured.
            RuntimeError: the capture was removed.
        """
        self.disarm()
        if not self.layers:
            raise RuntimeError("arm: this capture was removed; make another one")
        layers = {name: module for name, module in self.layers.items() if only is None or name in only}
        for name, module in layers.items():
            _check(name, module)  # it may have been sharded or parametrized since
        self.armed, self.step, self.passes = True, step, 0
        self._era += 1
        me = weakref.ref(self)
        for name, module in layers.items():
            # before other hooks, which may replace the output
            hook = _Hook(me, "_called", name)
            self._handles.append(module.register_forward_hook(hook, prepend=True, with_kwargs=True))
        self._handles.append(self.root.register_forward_pre_hook(_Hook(me, "_begin")))
        self._handles.append(self.root.register_forward_hook(_Hook(me, "_close")))
        _EAGER.enter()

    def disarm(self) -> None:
        """Stop capturing and let compiled code run again; what has not been observed by now is dropped."""
        if not self.armed:
            return
        self.armed = False
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self._pass = None
        _EAGER.leave()

    def __del__(self) -> None:
        self.disarm()

    def remove(self) -> None:
        """Disarm, and let go of the layers and the observer."""
        self.disarm()
        self.layers = {}
        self.observer = _nothing

    def curvature_pass(self, out: Tensor, loss: Loss | str | None = None) -> None:
        """The sampled or exact backward passes of the last forward, from its output; before the real backward.

        Without effect while not armed, with ``empirical`` and ``forward``, and on a forward that has had its pass.

        Args:
            out: the model's output, as the loss takes it.
            loss: of this batch, in place of the constructor's; ``Masked(loss, mask)`` leaves padding out.

        Raises:
            ValueError: no loss is known, or one is given for a forward whose pass was already taken automatically.
        """
        if not self.armed or self.fisher not in ("mc", "exact") or self._pass is None:
            return
        if self._pass.done:
            if loss is not None and self.loss is not None:
                raise ValueError(
                    "curvature_pass: this forward has had its pass with the loss given at build; build with loss=None "
                    "to give one for each batch"
                )
            return
        chosen = as_loss(loss) or self.loss
        if chosen is None:
            raise ValueError("curvature_pass: no loss is known; pass one, such as 'cross_entropy', here or at build")
        if out.requires_grad:
            self._backward(self._pass, out, chosen)

    def _backward(self, now: _Pass, out: Tensor, loss: Loss) -> None:
        now.done = True
        calls = [call for calls in now.calls.values() for call in calls]
        edges = [call.edge for call in calls if call.edge is not None]
        now.terms = loss.terms(out)
        fresh = True
        with torch.autocast(out.device.type, enabled=False):  # a backward keeps the types of its forward
            for s in self._seeds(out.detach(), loss) if edges else ():
                grads = torch.autograd.grad(out, edges, s, retain_graph=True, allow_unused=True)
                for call, grad in zip(calls, grads, strict=True):
                    call.d = grad
                del grads
                for name in now.calls:
                    self._observe(name, now, fresh)
                fresh = False
        now.calls.clear()
        self.passes += 1

    def _seeds(self, out: Tensor, loss: Loss) -> Iterable[Tensor]:
        """What is sent back from the output."""
        if self.fisher == "exact":
            return loss.sqrt_hessian(out)
        text = f"{self.seed}/{self.step}/{self.passes}/{self.rank}"
        number = int.from_bytes(hashlib.blake2b(text.encode(), digest_size=7).digest())
        return [loss.sample(out, torch.Generator(device=out.device).manual_seed(number))]

    def _observe(self, name: str, now: _Pass, fresh: bool = True) -> None:
        """Join the calls of a layer that have a gradient, and hand them to the observer."""
        module, forward = self.layers[name], self.fisher == "forward"
        calls = [call for call in now.calls[name] if forward or call.d is not None]
        if not calls:
            return
        with torch.no_grad(), torch.autocast(calls[0].read(name).device.type, enabled=False):
            pairs = [arrange(module, call.read(name), call.d) for call in calls]
            batch = {a.shape[0] for a, _ in pairs}
            if len(batch) > 1:
                raise RuntimeError(
                    f"{name}: called with batches of {sorted(batch)} in one forward; calls are joined by sample, so "
                    "they must agree. Leave this layer out"
                )
            a = _join([a for a, _ in pairs])
            d = None if forward else _join([d for _, d in pairs if d is not None])
            groups, inputs = sizes(module)
            io = LayerIO(kind_of(module), a, d, now.terms, has_bias(module), fresh, groups, inputs)
            del pairs
            for call in calls:
                call.d = None
            self.observer(name, io)

    def _begin(self, module: nn.Module, args: Any) -> None:
        if _recording():
            self._pass = _Pass(self._era)

    def _close(self, module: nn.Module, args: Any, output: Any) -> None:
        now = self._pass
        if now is None or now.closed or not _recording():
            return
        now.closed = True
        if self.fisher == "forward":
            for name in now.calls:
                self._observe(name, now)
            now.calls.clear()
            self.passes += 1
            return
        if self.fisher != "empirical" and self.loss is None:
            return
        out = _output(output)
        if self.fisher == "empirical":
            shape = out.shape[:-1] if out.dim() > 1 else out.shape
            now.terms = shape.numel() if self.loss is None else self.loss.terms(out)
        elif self.loss is not None and out.requires_grad and not now.done:
            self._backward(now, out, self.loss)

    def _called(self, name: str, module: nn.Module, args: Any, kwargs: Any, output: Tensor) -> Tensor | None:
        """Note a call. Returns the output to go on with, where it has to be another tensor."""
        if not _recording():
            return None
        if self._pass is None or self._pass.closed:
            if self.fisher in ("empirical", "forward"):
                return None  # outside a forward of the model
            self._pass = _Pass(self._era)
        x = args[0] if args else next(iter(kwargs.values()))
        if self.fisher != "forward" and not output.requires_grad:
            return None
        view = self.fisher != "forward" and output._is_view()
        if view:  # an operation in place on a view would go round its place in the graph
            output = output.clone()
        now = self._pass
        call = _Call(x, get_gradient_edge(output) if self.fisher in ("mc", "exact") else None)
        now.calls.setdefault(name, []).append(call)
        if self.fisher == "empirical":
            me = weakref.ref(self)

            def arrived(grad: Tensor) -> None:
                capture = me()
                if capture is not None:
                    capture._arrived(name, now, call, grad)

            output.register_hook(arrived)  # type: ignore[no-untyped-call]
        return output if view else None

    def _arrived(self, name: str, now: _Pass, call: _Call, grad: Tensor) -> None:
        """A gradient of the real backward."""
        if not self.armed or now.era != self._era:
            return
        task = torch._C._current_graph_task_id()
        if now.task == -1:
            now.task = task
            Variable._execution_engine.queue_callback(lambda: self._finish(now))
            if self._task != task:  # two forwards may share one backward
                self._task = task
                self.passes += 1
        if now.task != task:
            if not self._warned:
                self._warned = True
                warnings.warn(
                    f"{name}: a second backward ran through one forward; fisher='empirical' counts the first alone. "
                    "Add the losses before backward, or use fisher='mc'",
                    stacklevel=2,
                )
            return
        scale = 1.0 if self.scaler is None else self.scaler.get_scale()
        call.d = wide(grad.detach()) * (now.terms / scale)
        if all(other.d is not None for other in now.calls[name]):
            self._release(name, now)

    def _finish(self, now: _Pass) -> None:
        """At the end of a backward: layers of which some calls have no gradient, since the loss does not use them."""
        for name in list(now.calls):
            self._release(name, now)

    def _release(self, name: str, now: _Pass) -> None:
        """Observe a layer, and let go of its inputs: the graph may outlive them."""
        self._observe(name, now)
        for call in now.calls.pop(name):
            call.x = None


class _Hook:
    """A hook that calls a method of a capture or tap; a copy of it, made with a copy of the model, does nothing."""

    def __init__(self, capture: weakref.ref[Any], method: str, *first: str) -> None:
        self.capture, self.method, self.first = capture, method, first

    def __call__(self, *args: Any) -> Any:
        capture = self.capture()
        return None if capture is None else getattr(capture, self.method)(*self.first, *args)

    def __reduce__(self) -> tuple[Callable[[], Callable[..., None]], tuple[()]]:
        return _idle, ()


def _nothing(*args: Any) -> None:
    """A hook without effect."""


def _idle() -> Callable[..., None]:
    return _nothing


def _recording() -> bool:
    """Whether a forward is one that counts: not evaluation, recomputation in a backward, a transform or a trace."""
    return (
        torch.is_grad_enabled()
        and torch._C._current_graph_task_id() == -1
        and torch._C._functorch.peek_interpreter_stack() is None
        and not torch.compiler.is_compiling()
    )


def _output(output: Any) -> Tensor:
    """The output that the loss takes: the tensor, its ``logits``, or the first tensor of a sequence."""
    if isinstance(output, Tensor):
        return output
    found = output.get("logits") if isinstance(output, Mapping) else getattr(output, "logits", None)
    if isinstance(found, Tensor):
        return found
    if isinstance(output, tuple | list):
        for item in output:
            if isinstance(item, Tensor):
                return item
    raise TypeError(
        f"the model's output is a {type(output).__name__} without a tensor to take as its prediction (a tensor, "
        ".logits, the first tensor of a tuple); build with loss=None and call curvature_pass(out, loss)"
    )


def unwrap(model: nn.Module) -> nn.Module:
    """The module within DistributedDataParallel and ``torch.compile``'s wrappers."""
    if isinstance(model, nn.DataParallel):
        raise ValueError("the model is a DataParallel, whose replicas cannot be captured; use DistributedDataParallel")
    if isinstance(model, nn.parallel.DistributedDataParallel):
        return unwrap(model.module)
    compiled = model._modules.get("_orig_mod")
    return model if compiled is None else unwrap(compiled)


def _join(tensors: list[Tensor]) -> Tensor:
    return tensors[0] if len(tensors) == 1 else torch.cat(tensors, 1)


def _check(name: str, module: nn.Module) -> None:
    reason = why_not(module)
    if reason:
        raise ValueError(f"{name}: cannot be captured. {reason}. Leave it out")


def _checked(root: nn.Module, layers: Mapping[str, nn.Module]) -> dict[str, nn.Module]:
    if not layers:
        raise ValueError("layers is empty: name at least one Linear, Conv, Embedding or norm layer")
    inside = {id(module) for module in root.modules()}
    names: dict[int, str] = {}
    for name, module in layers.items():
        _check(name, module)
        if id(module) not in inside:
            raise ValueError(
                f"{name}: this {type(module).__name__} is not a submodule of the model; give the model's own"
            )
        if id(module) in names:
            raise ValueError(f"{name} and {names[id(module)]} are one module; name it once, its calls are joined")
        names[id(module)] = name
    return dict(layers)
