"""Schedule: drives a number of an optimizer's groups along a curve, by the optimizer steps that were accepted."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from typing import Any, TypeAlias

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from .curves import Curve
from .tokens import Tokens

#: Version of the state dicts; those before 1 have three keys only.
FORMAT = 1
_NEEDED = {"steps", "factor", "curve"}
_KNOWN = _NEEDED | {"format", "key", "unit", "position"}

Number: TypeAlias = float | Tensor


class Schedule(LRScheduler):
    """Set ``group["lr"] = group["initial_lr"] * curve(t)`` in every group, t being the accepted optimizer steps.

    With ``key`` another number of the groups that have it is driven in the same way: ``momentum``, ``weight_decay``,
    ``gamma`` of the multiplicative methods, ``sam_rho`` of a wrapper, or one of several such as ``betas`` with
    ``index``. One schedule for each number; ``Together`` makes one of them.

    ``t`` is read from ``optimizer.steps`` at every call, so extra calls (Accelerate makes one per process), skipped
    steps (non-finite gradients, GradScaler) and resuming cannot put the schedule out of step. An optimizer without
    that attribute, such as those of ``torch.optim``, is counted by calls of ``step()``, as torch's schedulers do.

    With ``tokens`` the curve is one over tokens: t is the number that the accepted steps have seen, and the factor that
    of the whole next step, see ``Curve.__call__``.

    Every group keeps its own peak ``initial_lr`` and follows the same factor. A tensor ``lr`` is written in place. A
    group added later joins at the next ``step()``, with the ``lr`` it was added with as its peak.

    Past the end of the curve its last value is held, with one warning: a run that is a step too long is not lost.
    ``finish()`` is the strict check.

    Args:
        optimizer: the optimizer, or a wrapper that holds it as ``.optimizer``.
        curve: factor by step, such as ``curves.warmup(100) >> curves.cosine(900)``.
        key: the number to drive; the learning rate by default.
        index: which one, where the key holds several: 0 for the first of ``betas``.
        tokens: the tokens of each step; None (default): the curve counts optimizer steps.

    Raises:
        TypeError: ``optimizer`` is no torch Optimizer, ``curve`` no Curve, or the key holds no number.
        ValueError: no group has this key, or it holds several numbers and ``index`` names none of them.

    Example:
        >>> from guided_descent.schedules import curves
        >>> opt = torch.optim.SGD([torch.nn.Parameter(torch.zeros(2))], lr=1.0)
        >>> sched = Schedule(opt, curves.warmup(2) >> curves.linear(2))
        >>> for _ in range(4):
        ...     print(opt.param_groups[0]["lr"])
        ...     opt.step()
        ...     sched.step()
        0.5
        1.0
        1.0
        0.5
        >>> sched.finish()
    """

    def __init__(
        self,
        optimizer: Optimizer,
        curve: Curve,
        *,
        key: str = "lr",
        index: int | None = None,
        tokens: Tokens | None = None,
    ) -> None:
        # LRScheduler.__init__ is left out on purpose. It replaces optimizer.step to count calls, which fails on a
        # compiled step, and keeps a position of its own, which is what falls out of step.
        if not isinstance(optimizer, Optimizer):
            raise TypeError(f"optimizer is a {type(optimizer).__name__}; pass a torch.optim.Optimizer")
        if not isinstance(curve, Curve):
            raise TypeError(
                f"curve is a {type(curve).__name__}; pass a Curve such as curves.warmup(100) >> curves.cosine(900)"
            )
        _check_key(optimizer.param_groups, key, index)
        # No attribute may be called total_steps: Accelerate stops calling step() on a scheduler that has one as soon
        # as the number of calls exceeds it, and it calls once per process.
        self.optimizer = optimizer
        self.curve = curve
        self.key = key
        self.index = index
        self.tokens = tokens
        self._step_count = 0  # calls of step(); Accelerate writes to it
        self._counted = 0  # the position, where the optimizer does not know it
        self._warned = False
        self._apply()

    @property
    def steps(self) -> int:
        """Accepted optimizer steps so far: the position on the curve."""
        steps = accepted_steps(self.optimizer)
        return self._counted if steps is None else steps

    @property
    def planned(self) -> int | None:
        """Optimizer steps that the curve lasts, or None where it has no end."""
        length = self.curve.length
        return length if length is None or self.tokens is None else self.tokens.needed(length)

    def factor(self, steps: int) -> float:
        """Return the factor of the optimizer step that follows ``steps`` accepted ones."""
        if self.tokens is None:
            return self.curve(steps)
        return self.curve(self.tokens.before(steps), self.tokens.at(steps))

    def step(self, epoch: int | None = None) -> None:
        """Set the numbers for the next optimizer step; call it after ``optimizer.step()``, as often as you like.

        Raises:
            ValueError: ``epoch`` is given: the position is counted in optimizer steps and cannot be set.
        """
        if epoch is not None:
            raise ValueError(
                f"epoch={epoch}: a Schedule is positioned by optimizer steps; call step() without arguments"
            )
        self._step_count += 1
        self._counted += 1
        self._apply()

    def finish(self) -> None:
        """Check at the end of training that the run had exactly the planned number of optimizer steps.

        Raises:
            RuntimeError: it had fewer or more, or the curve has no end; the message gives the numbers and the fix.
        """
        steps, planned = self.steps, self.planned
        if planned is None:
            raise RuntimeError(f"{self.curve!r} has no end to check; give total_steps, or leave finish() out")
        if steps != planned:
            raise RuntimeError(
                f"the schedule was planned for {planned} optimizer steps, but {steps} were accepted "
                f"({self._step_count} calls of schedule.step()), so the learning rate "
                f"{'never reached its end' if steps < planned else 'was held at its last value'}. "
                + (
                    f"Set total_steps={steps}: it counts optimizer steps, that is batches / accumulation, all epochs "
                    "together, skipped steps left out"
                    if self.tokens is None
                    else f"They saw {self._position(steps)} tokens: set the total of the Tokens, or their per_step"
                )
            )

    def get_lr(self) -> list[float | Tensor]:
        """Return the learning rate (or ``key``) of each group at the current position, as new floats or tensors."""
        factor = self.factor(self.steps)
        return [_pick(group[self._peak], self.index) * factor for group in self._groups()]

    def get_last_lr(self) -> list[float | Tensor]:
        """Return copies of the learning rates last set, one per group."""
        return [_copy(lr) for lr in self._last_lr]

    def state_dict(self) -> dict[str, Any]:
        """Return the position, the factor there and the curve in words: numbers and strings only."""
        steps = self.steps
        return {
            "format": FORMAT,
            "key": self.label,
            "unit": self._unit,
            "steps": steps,
            "position": self._position(steps),
            "factor": self.factor(steps),
            "curve": repr(self.curve),
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue from a saved position; learning rates are recomputed from it.

        The curve may differ from the saved one where both agree on the factor at the saved step: this is how a
        warmup-stable-decay run is branched to several horizons (``branch`` does it).

        Raises:
            ValueError: unknown or missing keys, a curve that would make the learning rate jump, another number, unit or
                batch plan, or an optimizer that was loaded from another step.
        """
        saved = self._check_state(state_dict)
        factor, here = float(state_dict["factor"]), self.factor(saved)
        if abs(here - factor) > 1e-9 * max(here, factor):
            raise ValueError(
                f"at step {saved} the saved schedule, {state_dict['curve']}, has the factor {factor:.6g}, and this "
                f"one, {self.curve!r}, has {here:.6g}: the learning rate would jump. Build the schedule that was "
                "saved, or leave its state unloaded to jump on purpose (the position follows the optimizer)"
            )
        # 0 is allowed: the optimizer may be loaded after its schedule.
        known = accepted_steps(self.optimizer)
        if known not in (None, 0, saved):
            raise ValueError(
                f"the schedule was saved at optimizer step {saved}, but the optimizer is at {known}; "
                "load both from the same checkpoint, the optimizer first"
            )
        self._counted = saved
        self._apply()

    @property
    def base_lrs(self) -> list[float | Tensor]:  # type: ignore[override]  # kept in one place: the groups
        """Copies of the peak learning rate, one per group."""
        return [_copy(_pick(group[self._peak], self.index)) for group in self._groups()]

    def _check_state(self, state: dict[str, Any]) -> int:
        """Return the saved step of a state that this schedule can continue."""
        if not _NEEDED <= state.keys() <= _KNOWN:
            raise ValueError(f"not the state of a Schedule: it has the keys {sorted(state)}, expected {sorted(_KNOWN)}")
        if state.get("format", 0) > FORMAT:
            raise ValueError(f"the schedule was saved in format {state['format']}, this version reads up to {FORMAT}")
        saved = int(state["steps"])
        own = {"key": self.label, "unit": self._unit, "position": self._position(saved)}
        for name, value in own.items():
            if state.get(name, value) != value:
                what = {"key": "drives", "unit": "is counted in", "position": "has as its position"}[name]
                raise ValueError(
                    f"at step {saved} the saved schedule {what} {state[name]!r}, this one {value!r}; build it with the "
                    "key, the unit and the tokens of past steps that were saved"
                )
        return saved

    @property
    def _peak(self) -> str:
        return f"initial_{self.key}"

    @property
    def label(self) -> str:
        """The number that is driven: the key, with the index if it has one."""
        return self.key if self.index is None else f"{self.key}[{self.index}]"

    @property
    def _unit(self) -> str:
        return "steps" if self.tokens is None else "tokens"

    def _position(self, steps: int) -> int:
        return steps if self.tokens is None else self.tokens.before(steps)

    def _groups(self) -> list[dict[str, Any]]:
        """The parameter groups that have the key, each with its peak under ``initial_lr``, or what the key is."""
        key, peak = self.key, self._peak
        groups = list(_having(self.optimizer.param_groups, key))
        for group in groups:
            if peak not in group:
                # A tensor lr given once to the constructor is one tensor in all groups; a group added later then
                # arrives with the value of the moment, and its peak is that of the groups it shares the tensor with.
                now = group[key]
                peers = (g for g in groups if isinstance(now, Tensor) and g[key] is now and peak in g)
                group[peak] = _copy(next((g[peak] for g in peers), now))
        return groups

    def _apply(self) -> None:
        """Write the numbers of the current position into the groups."""
        steps, planned = self.steps, self.planned
        if planned is not None and steps > planned and not self._warned:
            self._warned = True
            warnings.warn(
                f"optimizer step {steps} lies beyond the schedule's {planned}; the last value is held. "
                f"Set total_steps to the number of optimizer steps of the run ({self.curve!r})",
                RuntimeWarning,
                stacklevel=3,
            )
        factor = self.factor(steps)
        groups = self._groups()
        for group in groups:
            _drive(group, self.key, self.index, group[self._peak], factor)
        self.last_epoch = steps  # read by loggers
        self._last_lr = [_copy(_pick(group[self.key], self.index)) for group in groups]


def accepted_steps(optimizer: Optimizer) -> int | None:
    """Return ``optimizer.steps``, also through wrappers that hold the optimizer as ``.optimizer``; None without it.

    Raises:
        TypeError: ``steps`` is there but is no integer.
    """
    seen: set[int] = set()
    inner: Any = optimizer
    while inner is not None and id(inner) not in seen:
        seen.add(id(inner))
        steps = getattr(inner, "steps", None)
        if steps is not None:
            if isinstance(steps, bool) or not isinstance(steps, int):
                raise TypeError(
                    f"{type(inner).__name__}.steps is {steps!r}; it must be the int count of accepted steps"
                )
            return steps
        inner = getattr(inner, "optimizer", None)
    return None


def _having(groups: list[dict[str, Any]], key: str) -> Iterator[dict[str, Any]]:
    """The groups in which the key holds something."""
    return (group for group in groups if group.get(key) is not None)


def _check_key(groups: list[dict[str, Any]], key: str, index: int | None) -> None:
    """Check that the key, with the index, is a number wherever a group has it."""
    found = list(_having(groups, key))
    if not found:
        valid = dict.fromkeys(name for group in groups for name in group)
        raise ValueError(f"key={key!r} is in no param group; they have {', '.join(valid)}")
    for group in found:
        value = group[key]
        if isinstance(value, tuple | list):
            count = len(value)
            if index is None or isinstance(index, bool) or not isinstance(index, int) or not 0 <= index < count:
                which = " or ".join(f"index={i}" for i in range(count))
                raise ValueError(f"key={key!r} holds {count} numbers, {value}, and index={index!r}: give {which}")
            value = value[index]
        elif index is not None:
            raise ValueError(f"index={index!r}: key={key!r} holds one number, {value!r}; leave index out")
        if isinstance(value, bool) or not isinstance(value, float | int | Tensor):
            raise TypeError(f"key={key!r} holds {value!r}, which is no number, so no schedule can drive it")


def _pick(value: Any, index: int | None) -> Number:
    number: Number = value if index is None else value[index]
    return number


def _copy(value: Any) -> Any:
    if isinstance(value, tuple | list):
        return tuple(map(_copy, value))
    return value.detach().clone() if isinstance(value, Tensor) else value


def _drive(group: dict[str, Any], key: str, index: int | None, peak: Any, factor: float) -> None:
    """Set ``group[key] = peak * factor``, or one of the numbers under the key."""
    if index is None:
        group[key] = _scaled(group[key], peak, factor)
    else:
        numbers = list(group[key])
        numbers[index] = _scaled(numbers[index], peak[index], factor)
        group[key] = tuple(numbers)


@torch.no_grad()
def _scaled(value: Number, peak: Number, factor: float) -> Number:
    """Return ``peak * factor``; a tensor keeps its identity and is never read by the host."""
    if not isinstance(value, Tensor):
        return float(peak) * factor
    if isinstance(peak, Tensor):
        return value.copy_(peak).mul_(factor)
    return value.fill_(peak * factor)
