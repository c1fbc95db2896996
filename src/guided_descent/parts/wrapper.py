"""Wrappers: ideas that any recipe can carry, given to ``build`` as ``add=[...]``, with numbers of their own."""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

from guided_descent.parts.base import Part
from guided_descent.parts.numbers import Info, Numbers, registering

W = TypeVar("W", bound="Wrapper")


@dataclass(frozen=True, kw_only=True)
class Wrapper(Numbers):
    """A part for every recipe, and the numbers that it reads.

    ``gd.AdamW(model, add=[gd.parts.SAM(rho=0.1)])``. Its fields, made by ``hyper`` and ``static`` like those of a
    recipe, become keys of every param group, after the wrapper's own key: ``sam_rho``. There they are checked, saved,
    scheduled, and set for one group or in a rule. The object itself holds only what they begin with.

    Subclasses declare the fields and ``part``, and register with ``@wrapper``.
    """

    def __post_init__(self) -> None:
        self.check(self.values())

    def part(self) -> Part:
        """The part that reads these keys."""
        raise TypeError(f"{type(self).__name__} does not define part")

    def begin_with(self: W, values: Mapping[str, Any]) -> W:
        """A copy that begins with other values, by group key."""
        fields = {item.name: values[name] for name, item in self.numbers().items() if name in values}
        return dataclasses.replace(self, **fields) if fields else self


#: The wrappers, by key.
WRAPPERS: dict[str, Info[Wrapper]] = {}


def wrapper(key: str, *, paper: str, use: str = "", avoid: str = "") -> Callable[[type[W]], type[W]]:
    """Register a wrapper under its key, which its group keys begin with; see ``Info``."""

    def register(cls: type[W]) -> type[W]:
        cls.prefix = f"{key}_"
        return registering(WRAPPERS, key, paper, "wrapper", use, avoid)(cls)

    return register


def keys_of(wrappers: Iterable[Wrapper]) -> list[str]:
    """The group keys of wrappers."""
    return [name for each in wrappers for name in each.numbers()]


def sort_out(add: Iterable[Any]) -> tuple[tuple[Part, ...], tuple[Wrapper, ...]]:
    """What was given as ``add``: all its parts, and the wrappers among them.

    Raises:
        TypeError: Something is neither a part nor a wrapper.
        ValueError: A wrapper is there twice, so that its numbers would be too.
    """
    parts: list[Part] = []
    wrappers: dict[str, Wrapper] = {}
    for each in add:
        if isinstance(each, Wrapper):
            if each.label in wrappers:
                raise ValueError(f"add holds {each.label} twice, whose numbers would share their keys: give it once")
            wrappers[each.label] = each
            parts.append(each.part())
        elif isinstance(each, Part):
            parts.append(each)
        else:
            name = each if isinstance(each, str) else getattr(each, "__name__", type(each).__name__)
            known = {info.cls.__name__: info.cls.__name__ for info in WRAPPERS.values()} | {
                key: info.cls.__name__ for key, info in WRAPPERS.items()
            }
            near = difflib.get_close_matches(str(name), known, n=1)
            hint = f"; write guided_descent.parts.{known[near[0]]}()" if near else ""
            raise TypeError(f"add takes wrappers and parts, and {each!r} is neither{hint}")
    return tuple(parts), tuple(wrappers.values())
