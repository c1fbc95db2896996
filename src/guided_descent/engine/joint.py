"""State that the groups of a recipe share: the groups must then agree on what it is made with."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from guided_descent.engine.binding import Plan
from guided_descent.parts.base import Part


def check_joint(plan: Plan, groups: Sequence[Mapping[str, Any]]) -> None:
    """Before anything changes: the groups whose parts share state have one kind of part and one set of numbers.

    Raises:
        ValueError: They do not; the message names the number, its values and the groups.
    """
    first: dict[tuple[str, type[Part]], tuple[int, Part]] = {}
    for number, parts in plan.uses:
        for part in parts.joint:
            label = groups[number]["recipe"]
            index, other = first.setdefault((label, type(part)), (number, part))
            if index == number and part == other:
                continue
            here, there = part.agrees(groups[number]), other.agrees(groups[index])
            differ = [name for name in here if here[name] != there[name]]
            if differ or part != other:
                name = differ[0] if differ else "its structure"
                values = f" ({there[name]!r} and {here[name]!r})" if differ else ""
                raise ValueError(
                    f"{name} of {label} differs between the param groups {index} and {number}{values}: what "
                    "they estimate is one for all of them; give it once, to the optimizer"
                )
