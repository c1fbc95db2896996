"""The schedules by their names: each builds a curve from the length of the run and drives the learning rate along it.

In all of them ``total_steps`` is a number of optimizer steps T, or ``Tokens``, with which every length is in tokens.
Lengths are ints, or floats below 1 for a share of the run. What starts, stays or decays is a factor of each group's own
``lr``, its peak.
"""

from __future__ import annotations

import functools
import math
import operator
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from itertools import pairwise
from typing import TypeAlias

from torch.optim import Optimizer

from . import curves
from .curves import COOLDOWNS, Curve, check_steps, steps_of
from .schedule import Schedule
from .together import Together
from .tokens import Tokens

Length: TypeAlias = int | Tokens
Duration: TypeAlias = int | float
#: A cooldown: a name of ``curves.COOLDOWNS``, or a function that takes the number of steps and a floor.
Cooldown: TypeAlias = str | Callable[..., Curve]


def constant(optimizer: Optimizer, total_steps: Length | None = None, *, warmup: Duration = 0) -> Schedule:
    """Warm up, then hold the peak learning rate: lr_t = lr min(1, (t + 1)/Tw).

    Args:
        optimizer: its groups' ``lr`` are the peaks.
        total_steps: length of the run, for the check by ``finish()``; None (default): no end.
        warmup: steps (int) or share of the run (float below 1); 0 (default) for none.

    Raises:
        ValueError: a number of steps out of range.
    """
    total, tokens = length_of(total_steps)
    ramp = _warmup_steps(warmup, total)
    return Schedule(optimizer, _after_warmup(ramp, curves.constant(total and total - ramp)), tokens=tokens)


def cosine(optimizer: Optimizer, total_steps: Length, *, warmup: Duration = 0, floor: float = 0.0) -> Schedule:
    """Warm up, then decay on half a cosine: lr_t = lr (floor + (1 - floor)(1 + cos(pi p))/2), p = (t - Tw)/(T - Tw).

    Args:
        optimizer: its groups' ``lr`` are the peaks.
        total_steps: length T of the run; the last step uses p = (T - Tw - 1)/(T - Tw).
        warmup: steps Tw (int) or share of the run (float below 1); 0 (default) for none.
        floor: what the decay tends to, as a share of the peak; 0 by default.

    Raises:
        ValueError: a number of steps or the floor out of range.
    """
    return _decaying(optimizer, total_steps, warmup, partial(curves.cosine, floor=floor))


def linear(optimizer: Optimizer, total_steps: Length, *, warmup: Duration = 0, floor: float = 0.0) -> Schedule:
    """Warm up, then decay linearly to zero: lr_t = lr (floor + (1 - floor)(1 - p)), p = (t - Tw)/(T - Tw).

    Args:
        optimizer: its groups' ``lr`` are the peaks.
        total_steps: length T of the run; the last step uses p = (T - Tw - 1)/(T - Tw), just above zero.
        warmup: steps Tw (int) or share of the run (float below 1); 0 (default) for none.
        floor: what the decay tends to, as a share of the peak; 0 by default.

    Raises:
        ValueError: a number of steps or the floor out of range.
    """
    return _decaying(optimizer, total_steps, warmup, partial(curves.linear, floor=floor))


def polynomial(
    optimizer: Optimizer, total_steps: Length, *, power: float = 2.0, warmup: Duration = 0, floor: float = 0.0
) -> Schedule:
    """Warm up, then decay as a power: lr_t = lr (floor + (1 - floor)(1 - p)^power), p = (t - Tw)/(T - Tw).

    Args:
        optimizer: its groups' ``lr`` are the peaks.
        total_steps: length T of the run.
        power: above 0; 2 by default.
        warmup: steps Tw (int) or share of the run (float below 1); 0 (default) for none.
        floor: what the decay tends to, as a share of the peak; 0 by default.

    Raises:
        ValueError: a number out of range.
    """
    return _decaying(optimizer, total_steps, warmup, partial(curves.polynomial, power=power, floor=floor))


def rex(optimizer: Optimizer, total_steps: Length, *, warmup: Duration = 0, floor: float = 0.0) -> Schedule:
    """Warm up, then decay late: lr_t = lr (floor + (1 - floor)(1 - p)/(1 - p/2)), p = (t - Tw)/(T - Tw).

    Args:
        optimizer: its groups' ``lr`` are the peaks.
        total_steps: length T of the run.
        warmup: steps Tw (int) or share of the run (float below 1); 0 (default) for none.
        floor: what the decay tends to, as a share of the peak; 0 by default.

    Raises:
        ValueError: a number of steps or the floor out of range.

    Source: Chen et al. 2021, arXiv:2107.04197.
    """
    return _decaying(optimizer, total_steps, warmup, partial(curves.rex, floor=floor))


def exponential(
    optimizer: Optimizer,
    total_steps: Length,
    *,
    end: float | None = None,
    half_life: float | None = None,
    warmup: Duration = 0,
) -> Schedule:
    """Warm up, then decay exponentially: lr_t = lr end^p, p = (t - Tw)/(T - Tw).

    Args:
        optimizer: its groups' ``lr`` are the peaks.
        total_steps: length T of the run.
        end: what the factor tends to at the end; 0.01 if neither it nor ``half_life`` is given.
        half_life: steps in which the factor halves, in place of ``end``.
        warmup: steps Tw (int) or share of the run (float below 1); 0 (default) for none.

    Raises:
        ValueError: a number out of range, or both of ``end`` and ``half_life``.
    """
    return _decaying(optimizer, total_steps, warmup, partial(curves.exponential, end=end, half_life=half_life))


def step(
    optimizer: Optimizer,
    total_steps: Length | None = None,
    *,
    every: Duration,
    ratio: float = 0.1,
    warmup: Duration = 0,
) -> Schedule:
    """Warm up, then go down by stairs: lr_t = lr ratio^((t - Tw) // every).

    Args:
        optimizer: its groups' ``lr`` are the peaks.
        total_steps: length of the run; None (default): no end.
        every: steps of a stair (int) or share of the run (float below 1).
        ratio: of one stair to the one before, in [0, 1]; 0.1 by default.
        warmup: steps Tw (int) or share of the run (float below 1); 0 (default) for none.

    Raises:
        ValueError: a number out of range.
    """
    total, tokens = length_of(total_steps)
    ramp, every = _warmup_steps(warmup, total), steps_of("every", every, total)
    curve = curves.step(ratio, every=every, steps=total and total - ramp)
    return Schedule(optimizer, _after_warmup(ramp, curve), tokens=tokens)


def restarts(
    optimizer: Optimizer,
    total_steps: Length | None = None,
    *,
    period: Duration,
    mult: int = 1,
    warmup: Duration = 0,
    floor: float = 0.0,
) -> Schedule:
    """Warm up, then fall on half a cosine and start again, cycle i having period mult^i steps (SGDR).

    Args:
        optimizer: its groups' ``lr`` are the peaks.
        total_steps: length of the run; None (default): no end.
        period: steps of the first cycle (int) or share of the run (float below 1).
        mult: how many times longer each cycle is than the one before; 1 by default.
        warmup: steps (int) or share of the run (float below 1); 0 (default) for none.
        floor: what each cycle tends to, as a share of the peak; 0 by default.

    Raises:
        ValueError: a number out of range.

    Source: Loshchilov and Hutter 2016, arXiv:1608.03983.
    """
    total, tokens = length_of(total_steps)
    ramp, first = _warmup_steps(warmup, total), steps_of("period", period, total)
    curve = curves.restarts(first, mult=mult, floor=floor, steps=total and total - ramp)
    return Schedule(optimizer, _after_warmup(ramp, curve), tokens=tokens)


def wsd(
    optimizer: Optimizer,
    total_steps: Length,
    *,
    warmup: Duration = 0,
    cooldown: Duration = 0.2,
    shape: Cooldown = "one_minus_sqrt",
    floor: float = 0.0,
) -> Schedule:
    """Warm up, stay, decay: lr until t_s = T - cooldown, then lr (floor + (1 - floor) f((t - t_s)/(T - t_s))).

    To branch one stable run to several horizons, see ``branch``.

    Args:
        optimizer: its groups' ``lr`` are the peaks.
        total_steps: length T of the run.
        warmup: steps (int) or share of the run (float below 1); 0 (default) for none.
        cooldown: steps (int, at least 1) or share of the run (float below 1); 0.2 by default.
        shape: f, ``one_minus_sqrt`` by default, f(q) = 1 - sqrt(q); another name of ``curves.COOLDOWNS``, or a function
            that takes the number of steps and a floor.
        floor: what the cooldown tends to, as a share of the peak; 0 by default.

    Raises:
        ValueError: a number of steps, the floor or the shape out of range, or warmup and cooldown longer than the run.

    Source: Hägele et al. 2024, arXiv:2405.18392.
    """
    total, tokens = total_of(total_steps)
    ramp = _warmup_steps(warmup, total)
    curve = cooled(_after_warmup(ramp, curves.constant()), total, cooldown, shape, floor, ramp)
    return Schedule(optimizer, curve, tokens=tokens)


def trapezoid(
    optimizer: Optimizer,
    total_steps: Length,
    *,
    warmup: Duration = 0,
    cooldown: Duration = 0.6,
    floor: float = 0.15,
    stages: Mapping[int, float] | None = None,
) -> Schedule:
    """Stay, in stages if wanted, then decay linearly for a long time: lr_t = lr (m (1 - q) + floor q) in the cooldown.

    A stage multiplies the peak by m, for instance where the batch grows: by its ratio to a power of 0.5 to 0.6.

    Args:
        optimizer: its groups' ``lr`` are the peaks.
        total_steps: length T of the run.
        warmup: steps (int) or share of the run (float below 1); 0 (default) for none.
        cooldown: steps (int, at least 1) or share of the run (float below 1); 0.6 by default.
        floor: what the cooldown tends to, as a share of the peak without m; 0.15 by default.
        stages: multiplier m by the step (or token) at which it begins, before the cooldown; m is 1 before the first.

    Raises:
        ValueError: a number out of range, parts longer than the run, or a stage outside the stable part.

    Source: the speed runs of modded-nanogpt (Jordan et al. 2024).
    """
    total, tokens = total_of(total_steps)
    ramp = _warmup_steps(warmup, total)
    decay = _cooldown_steps(cooldown, total, ramp)
    start, stages = total - decay, dict(sorted((stages or {}).items()))
    for first, multiplier in stages.items():
        if not ramp <= first < start:
            raise ValueError(f"stages={stages}: {first} is outside the stable part, from {ramp} to below {start}")
        if not 0 < multiplier < math.inf:
            raise ValueError(f"stages={stages}: {multiplier!r} must be a multiplier above 0")
    parts = [(ramp, 1.0), *stages.items(), (start, 0.0)]
    links: list[Curve] = [curves.warmup(ramp)] if ramp else []
    links += [_times(m, curves.constant(end - first)) for (first, m), (end, _) in pairwise(parts) if end > first]
    last = parts[-2][1]
    links.append(_times(last, curves.linear(decay, floor=floor / last)))
    return Schedule(optimizer, joined(links), tokens=tokens)


def inverse_sqrt(
    optimizer: Optimizer,
    total_steps: Length | None = None,
    *,
    warmup: Duration,
    cooldown: Duration = 0,
    shape: Cooldown = "linear",
) -> Schedule:
    """Warm up, then decay as the root of the step: lr_t = lr min((t + 1)/Tw, sqrt(Tw/(t + 1))).

    Args:
        optimizer: its groups' ``lr`` are the peaks.
        total_steps: length T of the run; None (default): no end.
        warmup: steps Tw (int) or share of the run (float below 1).
        cooldown: steps (int) or share of the run (float below 1) at the end, from the value reached to zero; 0
            (default) for none.
        shape: that of the cooldown, as in ``wsd``; linear by default.

    Raises:
        ValueError: a number of steps or the shape out of range, or parts longer than the run.

    Source: Vaswani et al. 2017, arXiv:1706.03762.
    """
    return _law(optimizer, total_steps, warmup, curves.inverse_sqrt, cooldown, shape)


def noam(
    optimizer: Optimizer,
    total_steps: Length | None = None,
    *,
    width: int,
    warmup: Duration,
    cooldown: Duration = 0,
    shape: Cooldown = "linear",
) -> Schedule:
    """Noam's schedule: lr_t = lr width^-0.5 min((t + 1)^-0.5, (t + 1) Tw^-1.5), lr being the factor in front, often 1.

    Args:
        optimizer: its groups' ``lr`` are the factors in front of the formula.
        total_steps: length T of the run; None (default): no end.
        width: of the model, d_model.
        warmup: steps Tw (int) or share of the run (float below 1).
        cooldown: as for ``inverse_sqrt``; 0 (default) for none.
        shape: as for ``inverse_sqrt``; linear by default.

    Raises:
        ValueError: a number of steps or the shape out of range, or parts longer than the run.

    Source: Vaswani et al. 2017, arXiv:1706.03762.
    """
    check_steps("width", width)
    return _law(optimizer, total_steps, warmup, curves.inverse_sqrt, cooldown, shape, lambda n: (width * n) ** -0.5)


def power(
    optimizer: Optimizer,
    total_steps: Length | None = None,
    *,
    timescale: float,
    exponent: float = -0.51,
    warmup: Duration = 0,
    cooldown: Duration = 0.1,
    shape: Cooldown = "linear",
) -> Schedule:
    """Warm up, follow the peak or a power law, and cool down: lr_t = lr min(1, (n/timescale)^exponent) in between.

    n counts this step and all before it, those of the warmup too. Made for ``Tokens``: where the law takes over then
    depends neither on the length of the run nor on the batch.

    Args:
        optimizer: its groups' ``lr`` are the peaks.
        total_steps: length T of the run; None: no end, and then no cooldown.
        timescale: where the law takes over, in steps (or tokens); ``power_timescale`` gives the paper's.
        exponent: below 0; -0.51 by default.
        warmup: steps (int) or share of the run (float below 1); 0 (default) for none.
        cooldown: steps (int) or share of the run (float below 1) at the end, from the value reached to zero; 0.1 by
            default, 0 for none.
        shape: that of the cooldown, as in ``wsd``; linear by default.

    Raises:
        ValueError: a number out of range, or parts longer than the run.

    Source: Shen et al. 2024, arXiv:2408.13359.
    """

    def law(ramp: int) -> Curve:
        return curves.power(timescale, exponent=exponent, offset=ramp)

    return _law(optimizer, total_steps, warmup, law, cooldown, shape)


def power_timescale(lr: float, batch: float, *, a: float = 4.6, exponent: float = -0.51) -> float:
    """Tokens n at which batch a n^exponent has come down to the peak lr: (lr/(batch a))^(1/exponent).

    Args:
        lr: the peak learning rate.
        batch: sequences in a batch.
        a: 4.6 by default; it and the exponent are as reported, fitted with sequences of 4096 tokens, and not checked
            here.
        exponent: -0.51 by default.

    Raises:
        ValueError: a number out of range.

    Source: Shen et al. 2024, arXiv:2408.13359.

    Example:
        >>> n = power_timescale(0.02, 128)
        >>> round(128 * 4.6 * n**-0.51, 6)
        0.02
    """
    if not (lr > 0 and batch > 0 and a > 0 and exponent < 0):
        raise ValueError(
            f"lr={lr}, batch={batch}, a={a}, exponent={exponent}: the first three must be above 0, the last below"
        )
    return float((lr / (batch * a)) ** (1 / exponent))


def one_cycle(
    optimizer: Optimizer,
    total_steps: Length,
    *,
    rise: Duration = 0.3,
    start: float = 1 / 25,
    end: float = 1e-4,
    momentum: tuple[float, float] | None = (0.85, 0.95),
) -> Together:
    """Up and down on cosines: lr start -> lr in the rise, then -> lr start end; momentum high -> low -> high.

    With c(p) = (1 - cos(pi p))/2, p = t/Tr in the rise and q = (t - Tr)/(T - Tr) after it: lr_t = lr (start +
    (1 - start) c(p)), then lr (start end + (1 - start end)(1 - c(q))). The momentum, or the first of ``betas``, is
    high - (high - low) c(p), then low + (high - low) c(q).

    Args:
        optimizer: its groups' ``lr`` are the peaks.
        total_steps: length T of the run.
        rise: steps Tr (int, at least 1) or share of the run (float below 1); 0.3 by default.
        start: where the rise starts, as a share of the peak; 1/25 by default.
        end: what the run tends to, as a share of the start; 1e-4 by default.
        momentum: its least and largest value; the largest takes the place of what the groups have. None: left alone.

    Raises:
        ValueError: a number out of range, or no group has a momentum or betas to cycle.

    Source: Smith and Topin 2017, arXiv:1708.07120; momentum: Smith 2018, arXiv:1803.09820.
    """
    total, tokens = total_of(total_steps)
    up = steps_of("rise", rise, total)
    if not 1 <= up < total:
        raise ValueError(f"rise={rise!r} is {up} steps: must be at least one and fewer than total_steps={total}")
    down = total - up
    up_lr = curves.rise(up, floor=start, shape="cosine")
    schedules = [Schedule(optimizer, up_lr >> curves.cosine(down, floor=start * end), tokens=tokens)]
    if momentum is not None:
        low, high = momentum
        if not 0 <= low <= high < 1 or high == 0:
            raise ValueError(f"momentum={momentum}: must be the least and the largest value, in [0, 1) in this order")
        cycle = curves.cosine(up, floor=low / high) >> curves.rise(down, floor=low / high, shape="cosine")
        for key, index in _momenta(optimizer, high):
            schedules.append(Schedule(optimizer, cycle, key=key, index=index, tokens=tokens))
    return Together(*schedules)


def length_of(total_steps: Length | None) -> tuple[int | None, Tokens | None]:
    """Return the length of a run in its own unit, and its tokens where that is the unit."""
    if isinstance(total_steps, Tokens):
        return total_steps.total, total_steps
    return None if total_steps is None else check_steps("total_steps", total_steps), None


def cooled(trunk: Curve, total: int, cooldown: Duration, shape: Cooldown, floor: float, least: int) -> Curve:
    """Return a trunk that cools down to the end of a run, from the value that it has reached there.

    Args:
        trunk: what comes before, whose last link has no end.
        total: length of the run.
        cooldown: steps of the cooldown (int, at least 1) or share of the run (float below 1).
        shape: a name of ``COOLDOWNS``, or a function of the number of steps and the floor.
        floor: what the cooldown tends to, as a share of the value reached.
        least: where it may begin, at the earliest.

    Raises:
        ValueError: a number or the shape out of range, or no room for the cooldown.
    """
    if isinstance(shape, str) and shape not in COOLDOWNS:
        raise ValueError(
            f"shape={shape!r}: must be one of {', '.join(map(repr, COOLDOWNS))}, or a function of steps and floor"
        )
    decay = _cooldown_steps(cooldown, total, least)
    tail = COOLDOWNS[shape](decay, floor=floor) if isinstance(shape, str) else shape(decay, floor=floor)
    if not isinstance(tail, Curve) or tail.length != decay:
        raise ValueError(f"shape={shape!r} gives {tail!r} for {decay} steps; it must give a Curve of that length")
    return joined([*_cut(trunk, total - decay), _times(trunk(total - decay), tail)])


def joined(links: Sequence[Curve]) -> Curve:
    """Return curves one after the other."""
    return functools.reduce(operator.rshift, links)


def total_of(total_steps: Length) -> tuple[int, Tokens | None]:
    """Return the length of a run, which must have one, and its tokens where they are the unit.

    Raises:
        ValueError: it has none.
    """
    total, tokens = length_of(total_steps)
    if total is None:
        raise ValueError(f"total_steps={total_steps!r}: the run needs a length, as in Tokens(10**9, per_step=2**19)")
    return total, tokens


def _warmup_steps(warmup: Duration, total: int | None) -> int:
    steps = steps_of("warmup", warmup, total)
    if total is not None and steps >= total:
        raise ValueError(f"warmup={warmup!r} is {steps} steps: must be fewer than total_steps={total}")
    return steps


def _cooldown_steps(cooldown: Duration, total: int, least: int) -> int:
    decay = steps_of("cooldown", cooldown, total)
    if decay < 1:
        raise ValueError(f"cooldown={cooldown!r}: must be at least one step; without a cooldown use constant()")
    if total - decay < least:
        raise ValueError(
            f"what comes before ({least} steps, the warmup included) and cooldown ({decay} steps) do not fit into "
            f"total_steps={total}; shorten one of them or lengthen the run"
        )
    return decay


def _after_warmup(steps: int, curve: Curve) -> Curve:
    return curves.warmup(steps) >> curve if steps else curve


def _cut(trunk: Curve, length: int) -> list[Curve]:
    """The links of a trunk, the endless one cut so that they last ``length``; none where there is nothing left."""
    *head, last = curves.links_of(trunk)
    rest = length - sum(link.length or 0 for link in head)
    return [*head, *([last.lasting(rest)] if rest else [])]


def _times(by: float, curve: Curve) -> Curve:
    return curve if by == 1 else by * curve


def _decaying(optimizer: Optimizer, total_steps: Length, warmup: Duration, decay: Callable[[int], Curve]) -> Schedule:
    """A warmup and then a decay over all the rest."""
    total, tokens = total_of(total_steps)
    ramp = _warmup_steps(warmup, total)
    return Schedule(optimizer, _after_warmup(ramp, decay(total - ramp)), tokens=tokens)


def _law(
    optimizer: Optimizer,
    total_steps: Length | None,
    warmup: Duration,
    law: Callable[[int], Curve],
    cooldown: Duration,
    shape: Cooldown,
    scale: Callable[[int], float] = lambda ramp: 1.0,
) -> Schedule:
    """A warmup, a law without end that knows the length of the warmup, and a cooldown if wanted."""
    total, tokens = length_of(total_steps)
    ramp = _warmup_steps(warmup, total)
    curve = _after_warmup(ramp, law(ramp))
    curve = _times(scale(ramp), curve)
    if total is not None and cooldown:
        curve = cooled(curve, total, cooldown, shape, 0.0, ramp)
    elif total is not None:
        curve = joined(_cut(curve, total))
    elif cooldown:
        raise ValueError(f"cooldown={cooldown!r}: a cooldown needs total_steps; without one pass cooldown=0")
    return Schedule(optimizer, curve, tokens=tokens)


def _momenta(optimizer: Optimizer, high: float) -> list[tuple[str, int | None]]:
    """Make ``high`` the peak of every momentum that is not 0; return the keys, with the index of the first beta."""
    found: dict[tuple[str, int | None], None] = {}
    for group in optimizer.param_groups:
        if group.get("momentum"):
            group["initial_momentum"] = high
            found["momentum", None] = None
        if group.get("betas") and group["betas"][0]:
            group["initial_betas"] = (high, *group["betas"][1:])
            found["betas", 0] = None
    if not found:
        raise ValueError("no group has a momentum or a first beta above 0 to cycle; pass momentum=None to leave them")
    return list(found)
