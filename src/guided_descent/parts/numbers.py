"""Numbers that live in param groups: how recipes and wrappers declare them, with default, range and help."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, Generic, TypeVar

from torch import Tensor

N = TypeVar("N", bound="Numbers")


def hyper(
    default: Any,
    *,
    gt: float | None = None,
    ge: float | None = None,
    lt: float | None = None,
    le: float | None = None,
    optional: bool = False,
    structural: bool = False,
    help: str = "",
) -> Any:
    """A number that lives in the param group: default and range. Tuples are checked element by element.

    Args:
        default: Value if none is given.
        gt: Lower bound, excluded.
        ge: Lower bound, included.
        lt: Upper bound, excluded.
        le: Upper bound, included.
        optional: Whether ``None`` is a value.
        structural: Whether zero means that a part is absent, so that it may not become nonzero later, or the reverse.
        help: One line for ``describe``.
    """
    bounds = {"gt": gt, "ge": ge, "lt": lt, "le": le}
    meta = {
        "kind": "hyper",
        "bounds": {k: v for k, v in bounds.items() if v is not None},
        "optional": optional,
        "structural": structural,
        "help": help,
    }
    return field(default=default, metadata=meta)


def static(
    default: Any,
    *,
    of: Iterable[Any] | None = None,
    gt: float | None = None,
    ge: float | None = None,
    le: float | None = None,
    was: Any = None,
    help: str = "",
) -> Any:
    """A choice of structure, recorded in the param group; changing it later raises.

    Args:
        default: Value if none is given.
        of: The valid values; any value of the default's type if left out.
        gt: Lower bound of a number, excluded.
        ge: Lower bound of a number, included.
        le: Upper bound of a number, included.
        was: What state dicts mean that were saved before there was a choice, if not ``default``.
        help: One line for ``describe``.
    """
    choices = None if of is None else tuple(of)
    bounds = {name: bound for name, bound in (("gt", gt), ("ge", ge), ("le", le)) if bound is not None}
    meta = {"kind": "static", "of": choices, "bounds": bounds, "was": was, "help": help}
    return field(default=default, metadata=meta)


@dataclass(frozen=True, kw_only=True)
class Numbers:
    """What declares keys of a param group: a recipe, or a wrapper, whose keys have a prefix.

    Class attributes: ``key``, its name in the catalogue, and ``prefix``, what its group keys begin with.
    """

    key: ClassVar[str] = ""
    prefix: ClassVar[str] = ""

    @property
    def label(self) -> str:
        """Its key, or its class name where it is not registered."""
        return self.key or type(self).__name__

    @classmethod
    def numbers(cls) -> dict[str, dataclasses.Field[Any]]:
        """The ``hyper`` and ``static`` fields, by group key."""
        return {cls.prefix + item.name: item for item in dataclasses.fields(cls) if item.metadata}

    def values(self) -> dict[str, Any]:
        """The group keys and their values."""
        return {name: getattr(self, item.name) for name, item in self.numbers().items()}

    @classmethod
    def check(cls, values: Mapping[str, Any]) -> None:
        """Compare values, by group key, with the declared ranges and choices.

        Raises:
            ValueError: A value breaks its rule; the message says both.
            TypeError: A value has the wrong type.
        """
        for name, item in cls.numbers().items():
            if name not in values:
                continue
            value, meta = values[name], item.metadata
            label = f"{item.name}={value!r} of {cls.key or cls.__name__}"
            if meta["kind"] == "static":
                _check_choice(label, value, meta["of"], item.default)
                if meta["bounds"]:
                    _check_range(label, value, meta["bounds"], item.default)
            elif value is None:
                if not meta["optional"]:
                    raise ValueError(f"{label} must be a number")
            else:
                _check_range(label, value, meta["bounds"], item.default)


@dataclass(frozen=True)
class Info(Generic[N]):
    """What a registry knows of a recipe or a wrapper.

    Attributes:
        key: The name users type.
        cls: Its class.
        paper: Authors, year and arXiv id.
        family: A heading for lists.
        summary: One line.
        use: What it is good for.
        avoid: When another one is better.
        start: Values to start from, where they are not the defaults; empty where they are.
    """

    key: str
    cls: type[N]
    paper: str
    family: str
    summary: str
    use: str = ""
    avoid: str = ""
    start: str = ""


def registering(
    registry: dict[str, Info[Any]], key: str, paper: str, family: str, use: str, avoid: str, start: str = ""
) -> Callable[[type[N]], type[N]]:
    """A decorator that enters a class into a registry under its key; see ``Info``."""

    def register(cls: type[N]) -> type[N]:
        if key in registry:
            raise ValueError(f"{key!r} is registered twice, by {registry[key].cls.__name__} and {cls.__name__}")
        cls.key = key
        summary = (cls.__doc__ or "").strip().split("\n")[0]
        registry[key] = Info(key, cls, paper, family, summary, use, avoid, start)
        return cls

    return register


def rule_of(item: dataclasses.Field[Any]) -> str:
    """The valid values of a declared key in a few characters; empty where any will do."""
    signs = {"gt": ">", "ge": ">=", "lt": "<", "le": "<="}
    meta = item.metadata
    if meta.get("of"):
        return " | ".join(map(str, meta["of"]))
    return ", ".join(f"{signs[name]} {bound:g}" for name, bound in meta.get("bounds", {}).items())


def listed(fields: Iterable[dataclasses.Field[Any]]) -> str:
    """Declared keys with their valid values, for a message."""
    return ", ".join(f"{item.name} [{rule}]" if (rule := rule_of(item)) else item.name for item in fields)


def _check_choice(label: str, value: Any, of: tuple[Any, ...] | None, default: Any) -> None:
    if of is not None and value not in of:
        raise ValueError(f"{label} must be one of {', '.join(map(repr, of))}")
    whole = isinstance(default, float) and isinstance(value, int) and not isinstance(value, bool)  # 1 for 1.0
    if of is None and default is not None and value is not None and not (whole or isinstance(value, type(default))):
        raise TypeError(f"{label} must be of type {type(default).__name__}")


def _check_range(label: str, value: Any, bounds: Mapping[str, float], default: Any) -> None:
    if isinstance(default, tuple):
        if not isinstance(value, tuple | list) or len(value) != len(default):
            raise ValueError(f"{label} must be {len(default)} numbers")
        for element in value:
            _check_range(label, element, bounds, default[0])
        return
    if isinstance(value, Tensor):
        if value.numel() != 1:
            raise ValueError(
                f"{label} must be a number or a tensor with one element, not of shape {tuple(value.shape)}"
            )
        value = value.item()
    if isinstance(value, bool) or not isinstance(value, float | int):
        raise TypeError(f"{label} must be a number, got {type(value).__name__}")
    if math.isnan(value):
        raise ValueError(f"{label} must not be nan")
    rules = {
        "gt": (value > bounds.get("gt", 0), ">"),
        "ge": (value >= bounds.get("ge", 0), ">="),
        "lt": (value < bounds.get("lt", 0), "<"),
        "le": (value <= bounds.get("le", 0), "<="),
    }
    for name, bound in bounds.items():
        holds, sign = rules[name]
        if not holds:
            raise ValueError(f"{label} must be {sign} {bound}")
