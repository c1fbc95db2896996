"""Tokens: a run measured in tokens, for schedules whose lengths are tokens while optimizer steps are counted."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from .curves import check_steps


@dataclass(frozen=True, init=False)
class Tokens:
    """A run of ``total`` tokens, ``per_step`` of them in an optimizer step; the number may change on the way.

    In the place of a number of steps it makes a schedule's lengths tokens: those given as ints, and the shares of the
    total. The position stays a pure function of the accepted steps, so nothing has to be counted or saved; a batch
    whose size varies from step to step is given by its mean.

    Args:
        total: tokens of the run; None (default) where a curve says it, or nobody.
        per_step: tokens of one optimizer step, all ranks and accumulated micro-batches together: a number, or a mapping
            from the step at which it begins to the number, such as ``{0: 2**18, 1000: 2**19}`` for a batch that grows.

    Attributes:
        stages: The pairs of step and number, in order.

    Raises:
        ValueError: no positive integers, or a mapping that does not begin at step 0.

    Example:
        >>> tokens = Tokens(5000, per_step={0: 100, 10: 200})
        >>> tokens.at(9), tokens.at(10), tokens.before(12), tokens.steps
        (100, 200, 1400, 30)
    """

    total: int | None
    stages: tuple[tuple[int, int], ...]

    def __init__(self, total: int | None = None, *, per_step: int | Mapping[int, int]) -> None:
        stages = per_step if isinstance(per_step, Mapping) else {0: per_step}
        for first, number in stages.items():
            check_steps(f"per_step[{first}]" if isinstance(per_step, Mapping) else "per_step", number)
            if isinstance(first, bool) or not isinstance(first, int) or first < 0:
                raise ValueError(f"per_step={per_step}: {first!r} is no optimizer step; its keys are steps, 0 or more")
        if 0 not in stages:
            raise ValueError(f"per_step={per_step}: does not say how many tokens the first step has; give it a key 0")
        if total is not None:
            check_steps("total", total)
        object.__setattr__(self, "total", total)
        object.__setattr__(self, "stages", tuple(sorted(stages.items())))

    def at(self, step: int) -> int:
        """Return the tokens of optimizer step ``step``, counted from 0: what the batches of the run must have."""
        return next(number for first, number in reversed(self.stages) if first <= step)

    def before(self, step: int) -> int:
        """Return the tokens of all steps before ``step``."""
        ends = [*(first for first, _ in self.stages[1:]), step]
        return sum(number * max(0, min(end, step) - first) for (first, number), end in zip(self.stages, ends))

    def needed(self, total: int) -> int:
        """Return how many optimizer steps it takes until ``total`` tokens are seen."""
        for (first, number), (end, _) in zip(self.stages, self.stages[1:]):
            if self.before(end) >= total:
                return first - (self.before(first) - total) // number
        first, number = self.stages[-1]
        return first - (self.before(first) - total) // number

    @property
    def steps(self) -> int:
        """The optimizer steps of the run.

        Raises:
            ValueError: it has no total.
        """
        if self.total is None:
            raise ValueError("these Tokens have no total; give it, as in Tokens(10**9, per_step=2**19)")
        return self.needed(self.total)
