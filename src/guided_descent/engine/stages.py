"""Stages: in which order global sums are made, so that a total is complete before any part sees it."""

from __future__ import annotations

from collections.abc import Sequence

from guided_descent.parts.base import Part


def stages(sequences: Sequence[Sequence[Part]]) -> list[tuple[Part, ...]]:
    """The parts whose totals are made together, stage by stage.

    Args:
        sequences: The parts with sums of each kind of block, in the order in which they run.

    Raises:
        ValueError: Two of them come in different orders.
    """
    left = [list(parts) for parts in dict.fromkeys(map(tuple, sequences)) if parts]
    found = []
    while left:
        reached = dict.fromkeys(parts[0] for parts in left)
        ready = tuple(part for part in reached if all(parts[0] == part for parts in left if part in parts))
        if not ready:
            raise ValueError(f"global sums in an order that differs between groups: {', '.join(map(repr, reached))}")
        found.append(ready)
        left = [rest for parts in left if (rest := parts[1:] if parts[0] in ready else parts)]
    return found
