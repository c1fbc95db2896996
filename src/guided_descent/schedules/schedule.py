"""Schedule: drives the learning rates of an optimizer along a curve, by the optimizer steps that were accepted."""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from . import curves
from .curves import Curve, check_steps, steps_of

_STATE_KEYS = {"steps", "factor", "curve"}


class Schedule(LRScheduler):
    """Set ``group["lr"] = group["initial_lr"] * curve(t)`` in every group, t being the accepted optimizer steps.

    With ``key`` another number of the groups that have it is driven in the same way, such as ``gamma`` of the
    multiplicative methods, or ``momentum``; one schedule for each key.

    ``t`` is read from ``optimizer.steps`` at every call, so extra calls (Accelerate makes one per process), skipped
    steps (non-finite gradients, GradScaler) and resuming cannot put the schedule out of step. An optimizer without
    that attribute, such as those of ``torch.optim``, is counted by calls of ``step()``, as torch's schedulers do.

    Every group keeps its own peak ``initial_lr`` and follows the same factor. A tensor ``lr`` is written in place. A
    group added later joins at the next ``step()``, with the ``lr`` it was added with as its peak.

    Past the end of the curve its last value is held, with one warning: a run that is a step too long is not lost.
    ``finish()`` is the strict check.

    Args:
        optimizer: the optimizer, or a wrapper that holds it as ``.optimizer``.
        curve: factor by step, such as ``curves.warmup(100) >> curves.cosine(900)``.
        key: the number to drive; the learning rate by default.

    Raises:
        TypeError: ``optimizer`` is no torch Optimizer, or ``curve`` no Curve.
        ValueError: no group has this key.

    Example:
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

    def __init__(self, optimizer: Optimizer, curve: Curve, *, key: str = "lr") -> None:
        # LRScheduler.__init__ is left out on purpose. It replaces optimizer.step to count calls, which fails on a
        # compiled step, and keeps a position of its own, which is what falls out of step.
        if not isinstance(optimizer, Optimizer):
            raise TypeError(f"optimizer is a {type(optimizer).__name__}; pass a torch.optim.Optimizer")
        if not isinstance(curve, Curve):
            raise TypeError(
                f"curve is a {type(curve).__name__}; pass a Curve such as curves.warmup(100) >> curves.cosine(900)"
            )
        if not any(key in group for group in optimizer.param_groups):
            valid = dict.fromkeys(name for group in optimizer.param_groups for name in group)
            raise ValueError(f"key={key!r} is in no param group; they have {', '.join(valid)}")
        # No attribute may be called total_steps: Accelerate stops calling step() on a scheduler that has one as soon
        # as the number of calls exceeds it, and it calls once per process.
        self.optimizer = optimizer
        self.curve = curve
        self.key = key
        self._step_count = 0  # calls of step(); Accelerate writes to it
        self._counted = 0  # the position, where the optimizer does not know it
        self._warned = False
        self._apply()

    @property
    def steps(self) -> int:
        """Accepted optimizer steps so far: the position on the curve."""
        steps = accepted_steps(self.optimizer)
        return self._counted if steps is None else steps

    def step(self, epoch: int | None = None) -> None:
        """Set the learning rates for the next optimizer step; call it after ``optimizer.step()``, as often as you like.

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
        steps, total = self.steps, self.curve.length
        if total is None:
            raise RuntimeError(f"{self.curve!r} has no end to check; give total_steps, or leave finish() out")
        if steps != total:
            raise RuntimeError(
                f"the schedule was planned for {total} optimizer steps, but {steps} were accepted "
                f"({self._step_count} calls of schedule.step()), so the learning rate "
                f"{'never reached its end' if steps < total else 'was held at its last value'}. "
                f"Set total_steps={steps}: it counts optimizer steps, that is batches / accumulation, "
                "all epochs together, skipped steps left out"
            )

    def get_lr(self) -> list[float | Tensor]:
        """Return the learning rate (or ``key``) of each group at the current position, as new floats or tensors."""
        factor = self.curve(self.steps)
        return [group[self._peak] * factor for group in self._groups()]

    def get_last_lr(self) -> list[float | Tensor]:
        """Return copies of the learning rates last set, one per group."""
        return [_copy(lr) for lr in self._last_lr]

    def state_dict(self) -> dict[str, Any]:
        """Return the position, the factor there and the curve in words: numbers and strings only."""
        steps = self.steps
        return {"steps": steps, "factor": self.curve(steps), "curve": repr(self.curve)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue from a saved position; learning rates are recomputed from it.

        The curve may differ from the saved one where both agree on the factor at the saved step: this is how a
        warmup-stable-decay run is branched to several horizons.

        Raises:
            ValueError: unknown or missing keys, a curve that would make the learning rate jump, or an optimizer that
                was loaded from another step.
        """
        if state_dict.keys() != _STATE_KEYS:
            raise ValueError(
                f"not the state of a Schedule: it has the keys {sorted(state_dict)}, expected {sorted(_STATE_KEYS)}"
            )
        saved, factor = int(state_dict["steps"]), float(state_dict["factor"])
        here = self.curve(saved)
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
        return [_copy(group[self._peak]) for group in self._groups()]

    @property
    def _peak(self) -> str:
        return f"initial_{self.key}"

    def _groups(self) -> list[dict[str, Any]]:
        """The parameter groups that have the key, each with its peak under ``initial_lr``, or what the key is."""
        key, peak = self.key, self._peak
        groups = [group for group in self.optimizer.param_groups if key in group]
        for group in groups:
            if peak not in group:
                # A tensor lr given once to the constructor is one tensor in all groups; a group added later then
                # arrives with the value of the moment, and its peak is that of the groups it shares the tensor with.
                now = group[key]
                peers = (g for g in groups if isinstance(now, Tensor) and g[key] is now and peak in g)
                group[peak] = _copy(next((g[peak] for g in peers), now))
        return groups

    def _apply(self) -> None:
        """Write the learning rates of the current position into the groups."""
        steps, total = self.steps, self.curve.length
        if total is not None and steps > total and not self._warned:
            self._warned = True
            warnings.warn(
                f"optimizer step {steps} lies beyond the schedule's {total}; the last learning rate is held. "
                f"Set total_steps to the number of optimizer steps of the run ({self.curve!r})",
                RuntimeWarning,
                stacklevel=3,
            )
        factor = self.curve(steps)
        groups = self._groups()
        for group in groups:
            _set_scaled(group, self.key, group[self._peak], factor)
        self.last_epoch = steps  # read by loggers
        self._last_lr = [_copy(group[self.key]) for group in groups]


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


def constant(optimizer: Optimizer, total_steps: int | None = None, *, warmup: int | float = 0) -> Schedule:
    """Warm up, then hold the peak learning rate: lr_t = lr min(1, (t + 1)/Tw).

    Args:
        optimizer: its groups' ``lr`` are the peaks.
        total_steps: optimizer steps of the run, for the check by ``finish()``; None (default): no end.
        warmup: steps (int) or share of ``total_steps`` (float below 1); 0 (default) for none.

    Raises:
        ValueError: a number of steps out of range.
    """
    ramp = _warmup_steps(warmup, total_steps)
    return Schedule(
        optimizer, _after_warmup(ramp, curves.constant(None if total_steps is None else total_steps - ramp))
    )


def cosine(optimizer: Optimizer, total_steps: int, *, warmup: int | float = 0, floor: float = 0.0) -> Schedule:
    """Warm up, then decay on half a cosine: lr_t = lr (floor + (1 - floor)(1 + cos(pi p))/2), p = (t - Tw)/(T - Tw).

    Args:
        optimizer: its groups' ``lr`` are the peaks.
        total_steps: optimizer steps T of the run; the last one uses p = (T - Tw - 1)/(T - Tw).
        warmup: steps Tw (int) or share of ``total_steps`` (float below 1); 0 (default) for none.
        floor: what the decay tends to, as a share of the peak; 0 by default.

    Raises:
        ValueError: a number of steps or the floor out of range.
    """
    ramp = _warmup_steps(warmup, check_steps("total_steps", total_steps))
    return Schedule(optimizer, _after_warmup(ramp, curves.cosine(total_steps - ramp, floor=floor)))


def linear(optimizer: Optimizer, total_steps: int, *, warmup: int | float = 0, floor: float = 0.0) -> Schedule:
    """Warm up, then decay linearly to zero: lr_t = lr (floor + (1 - floor)(1 - p)), p = (t - Tw)/(T - Tw).

    Args:
        optimizer: its groups' ``lr`` are the peaks.
        total_steps: optimizer steps T of the run; the last one uses p = (T - Tw - 1)/(T - Tw), just above zero.
        warmup: steps Tw (int) or share of ``total_steps`` (float below 1); 0 (default) for none.
        floor: what the decay tends to, as a share of the peak; 0 by default.

    Raises:
        ValueError: a number of steps or the floor out of range.
    """
    ramp = _warmup_steps(warmup, check_steps("total_steps", total_steps))
    return Schedule(optimizer, _after_warmup(ramp, curves.linear(total_steps - ramp, floor=floor)))


def wsd(
    optimizer: Optimizer,
    total_steps: int,
    *,
    warmup: int | float = 0,
    cooldown: int | float = 0.2,
    floor: float = 0.0,
) -> Schedule:
    """Warm up, stay, decay: lr until t_s = T - cooldown, then lr (floor + (1 - floor)(1 - sqrt((t - t_s)/(T - t_s)))).

    Other cooldowns are joined by hand: ``Schedule(opt, warmup(a) >> constant(b) >> linear(c))`` from ``curves``. To
    branch one stable run to several horizons, load a checkpoint of its stable part under a ``wsd`` with another T.

    Args:
        optimizer: its groups' ``lr`` are the peaks.
        total_steps: optimizer steps T of the run.
        warmup: steps (int) or share of ``total_steps`` (float below 1); 0 (default) for none.
        cooldown: steps (int, at least 1) or share of ``total_steps`` (float below 1); 0.2 by default.
        floor: what the cooldown tends to, as a share of the peak; 0 by default.

    Raises:
        ValueError: a number of steps or the floor out of range, or warmup and cooldown longer than the run.

    Source: Hägele et al. 2024, arXiv:2405.18392.
    """
    ramp = _warmup_steps(warmup, check_steps("total_steps", total_steps))
    decay = steps_of("cooldown", cooldown, total_steps)
    if decay < 1:
        raise ValueError(f"cooldown={cooldown!r}: must be at least one step; without a cooldown use constant()")
    stable = total_steps - ramp - decay
    if stable < 0:
        raise ValueError(
            f"warmup ({ramp} steps) and cooldown ({decay} steps) do not fit into total_steps={total_steps}; "
            "shorten one of them or lengthen the run"
        )
    tail = curves.one_minus_sqrt(decay, floor=floor)
    return Schedule(optimizer, _after_warmup(ramp, curves.constant(stable) >> tail if stable else tail))


def _warmup_steps(warmup: int | float, total: int | None) -> int:
    if total is not None:
        check_steps("total_steps", total)
    steps = steps_of("warmup", warmup, total)
    if total is not None and steps >= total:
        raise ValueError(f"warmup={warmup!r} is {steps} steps: must be fewer than total_steps={total}")
    return steps


def _after_warmup(steps: int, curve: Curve) -> Curve:
    return curves.warmup(steps) >> curve if steps else curve


def _copy(lr: float | Tensor) -> float | Tensor:
    return lr.detach().clone() if isinstance(lr, Tensor) else lr


@torch.no_grad()
def _set_scaled(group: dict[str, Any], key: str, peak: float | Tensor, factor: float) -> None:
    """Set ``group[key] = peak * factor``; a tensor keeps its identity and is never read by the host."""
    value = group[key]
    if not isinstance(value, Tensor):
        group[key] = float(peak) * factor
    elif isinstance(peak, Tensor):
        value.copy_(peak).mul_(factor)
    else:
        value.fill_(peak * factor)
