"""Scaling: parametrizations, which write the multipliers of learning rates into the blocks of a model."""

from __future__ import annotations

from collections.abc import Collection, Sequence

from torch import nn

from guided_descent.routing import Rule
from guided_descent.scaling import meanfield, modula
from guided_descent.scaling.base import Parametrization

__all__ = ["NAMES", "Parametrization", "meanfield", "modula", "resolve"]

#: What ``parametrization=`` may be as a name.
NAMES = ("modula", "flat")


def resolve(
    given: Parametrization | str, model: nn.Module | None, rules: Sequence[Rule], needed: Collection[str]
) -> Parametrization:
    """A parametrization by its name: ``modula`` reads the model, ``flat`` takes the needed weights side by side.

    Without a model there is no forward pass to read, so that ``modula`` is flat too.

    Raises:
        ValueError: The name is unknown, or the model cannot be read.
    """
    if not isinstance(given, str):
        return given
    if given not in NAMES:
        raise ValueError(f"parametrization={given!r} must be one of {', '.join(map(repr, NAMES))}, or an object")
    return modula.flat(needed) if given == "flat" or model is None else modula.read(model, rules=rules)
