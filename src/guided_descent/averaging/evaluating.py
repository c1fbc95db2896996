"""evaluating: the model with its evaluation weights for the time of a context; export: those weights to keep."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any, Literal, Protocol, TypeAlias, runtime_checkable

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_pre_hook

from guided_descent.engine.guard import forbid_while_evaluating, marked
from guided_descent.routing.names import canonical_name

from .normalization import reestimate, tracking_norms
from .weights import Slot, check_names, check_shapes, local, local_like, slots_of


@runtime_checkable
class EvaluationSource(Protocol):
    """Whatever knows better weights to evaluate than the live ones: averages, and optimizers that keep a sequence."""

    def evaluation_weights(self, model: nn.Module) -> Mapping[str, Tensor]:
        """Return evaluation weights by canonical full name; parameters left out are evaluated as they are.

        Args:
            model: the module that will hold them, for sources that know parameters and not names.
        """
        ...


@runtime_checkable
class BufferSource(Protocol):
    """A source that also offers averaged buffers."""

    def evaluation_buffers(self, model: nn.Module) -> Mapping[str, Tensor]:
        """Return averaged floating-point buffers by canonical full name; buffers left out stay as they are."""
        ...


Source: TypeAlias = EvaluationSource | Mapping[str, Tensor]
Buffers: TypeAlias = Literal["live", "average"] | Iterable[Any]

_POLICIES = (
    'buffers="live" (the running statistics as they are), buffers="average" (averaged beside the weights; '
    "needs EMA(..., buffers=True)), or buffers=batches (an iterable of batches to re-estimate them from)"
)


@contextmanager
def evaluating(model: nn.Module, source: Source, buffers: Buffers | None = None) -> Iterator[nn.Module]:
    """Hold the evaluation weights of ``source`` in ``model``, in place; afterwards it is bitwise what it was.

    Parameters keep their identity, dtype and device. Live weights and buffers are restored even if the body raises.
    The mode (``train()``/``eval()``) is yours to set. Inside, nesting, ``optimizer.step()`` on these parameters, the
    average's own ``update()``, and ``state_dict()`` of the model, the average or a source that is an optimizer raise:
    each would take the evaluation weights for the live ones. To save evaluation weights use :func:`export`.

    Args:
        model: the module to evaluate: the averaged one, a wrapper around it, or a copy.
        source: an :class:`EvaluationSource` such as an ``EMA``, or a mapping from canonical names to tensors.
        buffers: what running statistics (BatchNorm) go with the averaged weights. ``"live"``: those of the live model.
            ``"average"``: averaged floating-point buffers of the source, all others live. An iterable of batches:
            measured afresh on them by a cumulative average. None (default): only for models without such statistics.

    Yields:
        The model.

    Raises:
        ValueError: the model has running statistics and no policy is given; the policy is unknown or impossible here;
            names or shapes do not fit.
        TypeError: ``source`` is neither a source nor a mapping.
        RuntimeError: the model is evaluated already.

    Example:
        >>> from guided_descent.averaging import EMA, evaluating
        >>> model = nn.Linear(2, 1)
        >>> ema = EMA(model, half_life=100)
        >>> ema.update()
        >>> with evaluating(model, ema):
        ...     loss = model(torch.ones(3, 2)).square().mean()
    """
    slots = slots_of(model)
    parameters = [slot.tensor for slot in slots if not slot.is_buffer]
    forbid_while_evaluating(parameters, "evaluating(...)", "leave the outer context first")
    norms = tracking_norms(model)
    _check_policy(buffers, norms)
    values = dict(_weights(source, model))
    _check_fit("weights", values, [slot for slot in slots if not slot.is_buffer])
    if buffers == "average":
        averaged = _averaged_buffers(source, model)
        _check_fit("buffers", averaged, [slot for slot in slots if slot.is_buffer])
        values |= averaged

    live = [slot.tensor for slot in slots if slot.is_buffer or slot.name in values]
    saved = [local(t).detach().clone() for t in live]
    with ExitStack() as stack:
        stack.enter_context(marked(parameters))
        _forbid_calls(stack, model, source, parameters)
        stack.callback(_write, live, saved)  # last in, first out: restored before anything is allowed again
        targets = [slot for slot in slots if slot.name in values]
        _write([slot.tensor for slot in targets], [local_like(values[slot.name], slot.tensor) for slot in targets])
        if buffers is not None and not isinstance(buffers, str):
            reestimate(model, norms.values(), buffers)
        yield model


def export(model: nn.Module, source: Source, buffers: Buffers | None = None) -> dict[str, Tensor]:
    """Return the model's state dict as it is under :func:`evaluating`, by canonical names, as copies.

    It holds everything ``load_state_dict`` of the unwrapped model asks for: evaluation weights in the model's dtypes
    (tied ones under each of their names, sharing one copy), frozen weights, and buffers under the given policy.

    Args:
        model: the module to take names, dtypes and all else from.
        source: where evaluation weights come from, as in :func:`evaluating`.
        buffers: policy for running statistics, as in :func:`evaluating`.

    Raises:
        ValueError, TypeError, RuntimeError: as :func:`evaluating`.
    """
    with evaluating(model, source, buffers):
        slots = slots_of(model, aliases=True)
        copies = {id(slot.tensor): slot.tensor.detach().clone() for slot in slots}
        return {slot.name: copies[id(slot.tensor)] for slot in slots}


def _check_policy(buffers: Buffers | None, norms: Mapping[str, nn.Module]) -> None:
    if buffers is None:
        if norms:
            raise ValueError(
                f"the model has running statistics ({', '.join(list(norms)[:3])}{', ...' if len(norms) > 3 else ''}) "
                f"that belong to the live weights; choose {_POLICIES}"
            )
    elif isinstance(buffers, str):
        if buffers not in ("live", "average"):
            raise ValueError(f"buffers={buffers!r} is unknown; choose {_POLICIES}")
    elif not isinstance(buffers, Iterable):
        raise ValueError(f"buffers is a {type(buffers).__name__}; choose {_POLICIES}")
    elif not norms:
        raise ValueError('buffers: the model has no running statistics to re-estimate from batches; use "live"')


def _weights(source: Source, model: nn.Module) -> Mapping[str, Tensor]:
    if isinstance(source, Mapping):
        return source
    if isinstance(source, EvaluationSource):
        return source.evaluation_weights(model)
    raise TypeError(
        f"source is a {type(source).__name__}; pass an average such as EMA, an optimizer that keeps evaluation "
        "weights, or a mapping from parameter names to tensors"
    )


def _averaged_buffers(source: Source, model: nn.Module) -> Mapping[str, Tensor]:
    if isinstance(source, BufferSource):
        return source.evaluation_buffers(model)
    raise ValueError(
        f'buffers="average", but a {type(source).__name__} keeps no buffers; choose "live", batches, or '
        "EMA(..., buffers=True) as the source"
    )


def _check_fit(what: str, values: Mapping[str, Tensor], slots: list[Slot]) -> None:
    held = {slot.name: slot.tensor for slot in slots}
    check_names(f"evaluation {what}", values, held, complete=False)
    check_shapes(f"evaluation {what}", values, held)


def _write(tensors: list[Tensor], values: list[Tensor]) -> None:
    """Copy values into tensors in place."""
    for tensor, value in zip(tensors, values, strict=True):
        # .data leaves the version counter alone: a graph recorded before the context stays valid, for the values return
        local(tensor).data.copy_(value)
    torch.clear_autocast_cache()  # else an enclosing autocast region goes on using casts of the weights before


def _forbid_calls(stack: ExitStack, model: nn.Module, source: Source, parameters: list[Tensor]) -> None:
    """Make the calls that would mistake evaluation weights for live ones raise until the stack is closed."""

    def step(optimizer: Optimizer, *_: Any) -> None:
        forbid_while_evaluating(
            (p for group in optimizer.param_groups for p in group["params"]),
            f"{type(optimizer).__name__}.step()",
            "train after the context",
        )

    def save(*_: Any) -> None:
        forbid_while_evaluating(parameters, "state_dict()", "save after the context, or use averaging.export")

    def load(*_: Any) -> None:
        forbid_while_evaluating(parameters, "load_state_dict()", "the live weights return at its end; load after it")

    handles: list[Any] = [register_optimizer_step_pre_hook(step)]
    for name, module in model.named_modules():
        if not canonical_name(name):  # the model and, if it is wrapped, what it wraps
            handles += [module.register_state_dict_pre_hook(save), module.register_load_state_dict_pre_hook(load)]
    if isinstance(source, Optimizer):
        handles += [source.register_state_dict_pre_hook(save), source.register_load_state_dict_pre_hook(load)]
    for handle in handles:
        stack.callback(handle.remove)
