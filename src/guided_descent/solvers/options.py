"""Checks of the solvers' keywords: a wrong value is an error that says the value, the rule and the name."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from torch import Tensor


def number(
    name: str, value: Any, *, above: float | None = None, least: float | None = None, below: float = math.inf
) -> float | Tensor:
    """The value itself, if it is a number within the bounds.

    Args:
        name: Of the keyword.
        value: A float, an int or a tensor with one element.
        above: It must be larger than this.
        least: It must not be smaller than this.
        below: It must be smaller than this.

    Raises:
        TypeError: No number.
        ValueError: Out of bounds.
    """
    if isinstance(value, bool) or not isinstance(value, int | float | Tensor):
        raise TypeError(f"{name}={value!r} must be a number")
    if isinstance(value, Tensor) and value.numel() != 1:
        raise ValueError(f"{name} must be a tensor with one element, not of shape {list(value.shape)}")
    low = above if above is not None else least
    fits = value < below and (above is None or value > above) and (least is None or value >= least)
    if not fits:
        sign = ">" if above is not None else ">="
        rules = [f"{sign} {low:g}"] if low is not None else []
        rules += [f"< {below:g}"]
        raise ValueError(f"{name}={value!r} must be {' and '.join(rules)}")
    return value


def whole(name: str, value: Any, least: int = 1) -> int:
    """The value itself, if it is a whole number of at least ``least``.

    Raises:
        ValueError: It is not.
    """
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise ValueError(f"{name}={value!r} must be a whole number of at least {least}")
    return value


def choice(name: str, value: Any, valid: Sequence[str]) -> str:
    """The value itself, if it is one of the valid ones.

    Raises:
        ValueError: It is not.
    """
    if value not in valid:
        raise ValueError(f"{name}={value!r} must be one of {', '.join(map(repr, valid))}")
    return str(value)
