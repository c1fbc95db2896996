"""When slow work is redone: a pure function of names, shapes and step, so that a resumed run refreshes alike."""

from __future__ import annotations

from collections.abc import Mapping


def phases(costs: Mapping[str, float], period: int) -> dict[str, int]:
    """Spread blocks over a period so that the dearest step is as cheap as can be: longest first, least loaded step.

    Args:
        costs: FLOPs of one refresh, by block key.
        period: Steps between two refreshes of a block.

    Returns:
        The phase of each block in ``range(period)``.

    Example:
        >>> phases({"a": 8.0, "b": 3.0, "c": 4.0}, 2)
        {'a': 0, 'c': 1, 'b': 1}
    """
    load = [0.0] * max(period, 1)
    found = {}
    for key in sorted(costs, key=lambda key: (-costs[key], key)):
        phase = min(range(len(load)), key=load.__getitem__)
        load[phase] += costs[key]
        found[key] = phase
    return found


def due(step: int, phase: int, period: int) -> bool:
    """Whether a block refreshes after its update number ``step`` (from 1; the first one never does)."""
    return step > 1 and (step - 1 + phase) % period == 0
