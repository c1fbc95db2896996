"""branch: one stable run, continued from its checkpoint to as many horizons as wanted."""

from __future__ import annotations

from typing import Any

from torch.optim import Optimizer

from . import curves
from .curves import Chain, Curve
from .named import Cooldown, Duration, Length, cooled, total_of
from .schedule import Schedule


def branch(
    optimizer: Optimizer,
    state: dict[str, Any],
    total_steps: Length,
    *,
    cooldown: Duration = 0.2,
    shape: Cooldown = "one_minus_sqrt",
    floor: float = 0.0,
) -> Schedule:
    """Continue a stable run to a horizon of its own: on as it was until T - cooldown, then down.

    A checkpoint from the stable part of one long run serves many horizons, so that each costs its own last steps only.
    Load it into model and optimizer, then make the branch; the rate continues without a jump. What is stable is a
    constant, or another curve whose shape does not depend on its length, such as ``inverse_sqrt`` or ``power``.

    Args:
        optimizer: holds the checkpoint's state; its groups' ``lr`` are the peaks.
        state: the state dict of the checkpoint's schedule.
        total_steps: length T of the run with this branch, its first steps included; ``Tokens`` for a run in tokens.
        cooldown: steps (int, at least 1) or share of T (float below 1); 0.2 by default.
        shape: as in ``wsd``; ``one_minus_sqrt`` by default.
        floor: what the cooldown tends to, as a share of the value it starts from; 0 by default.

    Raises:
        ValueError: the checkpoint lies after the stable part, or after the cooldown would have to begin; the state
            belongs to another optimizer, unit or key; or its curve has a shape of the user's own, which no text tells.

    Source: Hägele et al. 2024, arXiv:2405.18392.

    Example:
        >>> import torch
        >>> from guided_descent import schedules
        >>> opt = torch.optim.SGD([torch.nn.Parameter(torch.zeros(2))], lr=1.0)
        >>> trunk = schedules.constant(opt, warmup=10)
        >>> for _ in range(60):
        ...     opt.step()
        ...     trunk.step()
        >>> branch(opt, trunk.state_dict(), 100).curve
        warmup(10) >> constant(70) >> one_minus_sqrt(20)
    """
    total, tokens = total_of(total_steps)
    position = int(state.get("position", state.get("steps", 0)))
    trunk = stable_part(curves.parse(str(state.get("curve", ""))), position)
    schedule = Schedule(optimizer, cooled(trunk, total, cooldown, shape, floor, position), tokens=tokens)
    schedule.load_state_dict(state)
    return schedule


def stable_part(curve: Curve, position: int) -> Curve:
    """Return a curve up to the stable link at ``position``, which is made endless.

    Raises:
        ValueError: what lies there is stretched over a length.
    """
    links, start = curves.links_of(curve), 0
    for i, link in enumerate(links):
        end = start + (link.length or 0)
        if link.length is None or position <= end:
            try:
                head = (*links[:i], link.lasting(None))
            except ValueError:
                if position < end:
                    break
            else:
                return Chain(head) if i else head[0]
        start = end
    raise ValueError(
        f"the run was saved at {position}, where {curve!r} is not stable: branch from a checkpoint of its constant part"
        + (f", at {start} at the latest" if start else "")
    )
