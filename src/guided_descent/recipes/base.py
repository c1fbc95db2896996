"""Recipes: which parts, which defaults, which paper. A recipe holds numbers only until the optimizer is built.

A recipe is a frozen dataclass. Its ``hyper`` fields become the numbers of a param group, where schedulers and users
change them; its ``static`` fields choose structure and are fixed once the optimizer exists.
"""

from __future__ import annotations

import dataclasses
import difflib
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, TypeVar

from torch import Tensor

from guided_descent.parts.base import Parts
from guided_descent.parts.decay import ALL_DECAYS, DECAYS
from guided_descent.routing.roles import Block

R = TypeVar("R", bound="Recipe")


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
    le: float | None = None,
    was: Any = None,
    help: str = "",
) -> Any:
    """A choice of structure, recorded in the param group; changing it later raises.

    Args:
        default: Value if none is given.
        of: The valid values; any value of the default's type if left out.
        gt: Lower bound of a number, excluded.
        le: Upper bound of a number, included.
        was: What state dicts mean that were saved before there was a choice, if not ``default``.
        help: One line for ``describe``.
    """
    choices = None if of is None else tuple(of)
    bounds = {name: bound for name, bound in (("gt", gt), ("le", le)) if bound is not None}
    meta = {"kind": "static", "of": choices, "bounds": bounds, "was": was, "help": help}
    return field(default=default, metadata=meta)


def schedule() -> Any:
    """The field ``refresh_schedule`` of a recipe with slow work."""
    return static("staggered", of=("staggered", "every"), help="spread the refreshes by cost, or all on one step")


def tolerance() -> Any:
    """The field ``refresh_tolerance`` of a recipe with slow work."""
    return hyper(0.0, ge=0, help="drift up to which a refresh is skipped; 0 skips none")


def decay_kind(default: str = "decoupled", *more: str, coupled: bool = False, help: str = "") -> Any:
    """The field ``decay`` of a recipe: one of ``DECAYS``, or of more kinds, for which ``help`` speaks."""
    kinds = "independent: lr/lr_peak wd; corrected: lr/lr_peak lr wd; cautious: where the step shrinks the weight"
    return static(default, of=(*(ALL_DECAYS if coupled else DECAYS), *more), help=f"{help}; {kinds}" if help else kinds)


def product_dtype() -> Any:
    """The field ``product_dtype`` of a recipe that multiplies gradients by slow matrices."""
    return static(
        "float32",
        of=("float32", "bfloat16"),
        help="of the products with the slow matrices; bfloat16 rounds both factors, float64 stays",
    )


def lag() -> Any:
    """The field ``refresh_lag`` of a recipe with slow work."""
    return static(0, help="0, or the steps after which refreshes started on a background thread are used")


@dataclass(frozen=True)
class Info:
    """What the registry knows of a recipe.

    Attributes:
        key: The name users type.
        cls: The recipe class.
        paper: Authors, year and arXiv id.
        family: A heading for lists.
        summary: One line.
    """

    key: str
    cls: type[Recipe]
    paper: str
    family: str
    summary: str


REGISTRY: dict[str, Info] = {}


def recipe(key: str, *, paper: str, family: str) -> Callable[[type[R]], type[R]]:
    """Register a recipe class under its key."""

    def register(cls: type[R]) -> type[R]:
        if key in REGISTRY:
            raise ValueError(f"recipe {key!r} is registered twice, by {REGISTRY[key].cls.__name__} and {cls.__name__}")
        cls.key = key
        REGISTRY[key] = Info(key, cls, paper, family, (cls.__doc__ or "").strip().split("\n")[0])
        return cls

    return register


def lookup(name: str) -> type[Recipe]:
    """The recipe class of a key.

    Raises:
        ValueError: No recipe has this key; the message names the nearest and all valid ones.

    Example:
        >>> lookup("adamw").__name__
        'AdamW'
    """
    if name not in REGISTRY:
        near = difflib.get_close_matches(name.lower(), REGISTRY, n=1, cutoff=0.4)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise ValueError(f"optimizer {name!r} does not exist{hint} (valid: {', '.join(sorted(REGISTRY))})")
    return REGISTRY[name].cls


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """A point in the space of optimizers. Subclasses declare fields, ``parts`` and, for hybrids, ``route``.

    Class attributes: ``key`` (set by the registry), ``revision`` (bumped when the mathematics changes, compared on
    load), ``matrix`` (whether blocks that are no matrices need another recipe), ``reads_layers`` (whether it needs the
    inputs and output gradients of layers, so that a model is needed and a layer that cannot be read goes to ``aux``)
    and ``joins_bias`` (whether weight and bias of a layer are one block ``[W | b]``).
    """

    key: ClassVar[str] = ""
    revision: ClassVar[int] = 1
    matrix: ClassVar[bool] = False
    reads_layers: ClassVar[bool] = False
    joins_bias: ClassVar[bool] = False

    def __post_init__(self) -> None:
        self.check(self.values())
        for item in dataclasses.fields(self):
            if not item.metadata:
                value = getattr(self, item.name)
                if isinstance(value, Mapping):  # aux={"lr": 1e-3}: the default auxiliary recipe with changes
                    made = item.default_factory() if callable(item.default_factory) else None
                    base = made if isinstance(made, Recipe) else self.default_aux()
                    object.__setattr__(self, item.name, base.replace(**value))
                elif isinstance(value, str):
                    object.__setattr__(self, item.name, lookup(value)())
                elif not isinstance(value, Recipe | None):
                    raise TypeError(
                        f"{item.name}={value!r} of {self.label} must be a recipe, the name of one, or a mapping of its "
                        "hyperparameters"
                    )

    def default_aux(self) -> Recipe:
        """The auxiliary recipe where the field holds none."""
        raise TypeError(f"{self.label} has no auxiliary recipe")

    def spare(self) -> Recipe:
        """The auxiliary recipe."""
        return getattr(self, "aux", None) or self.default_aux()

    @property
    def label(self) -> str:
        """Its key, or its class name where it is not registered."""
        return self.key or type(self).__name__

    def route(self, block: Block) -> Recipe:
        """The recipe that takes this block: itself, or an auxiliary one."""
        return self

    def cut(self, block: Block) -> tuple[Block, ...]:
        """The blocks that it updates in the place of this one; see ``routing.blocking.subdivide``."""
        return (block,)

    def parts(self, block: Block) -> Parts:
        """The parts that update this block."""
        raise TypeError(f"{type(self).__name__} does not define parts")

    def constraints(self, blocks: Sequence[Block]) -> Sequence[Constraint]:
        """Edits that couple parameters, applied after the step."""
        return ()

    @property
    def couples(self) -> bool:
        """Whether it has constraints."""
        return type(self).constraints is not Recipe.constraints

    @classmethod
    def numbers(cls) -> dict[str, dataclasses.Field[Any]]:
        """The ``hyper`` and ``static`` fields, by name."""
        return {item.name: item for item in dataclasses.fields(cls) if item.metadata}

    def values(self) -> dict[str, Any]:
        """The group keys and their values."""
        return {name: getattr(self, name) for name in self.numbers()}

    def replace(self: R, **changes: Any) -> R:
        """A copy with changes.

        Raises:
            TypeError: A name is unknown; the message lists the valid ones.
            ValueError: A value is out of its range.
        """
        valid = [item.name for item in dataclasses.fields(self)]
        for name in changes:
            if name not in valid:
                near = difflib.get_close_matches(name, valid, n=1)
                hint = f"; did you mean {near[0]!r}?" if near else ""
                raise TypeError(f"{self.label} has no hyperparameter {name!r}{hint} (valid: {', '.join(valid)})")
        return dataclasses.replace(self, **changes)

    @classmethod
    def check(cls, values: Mapping[str, Any]) -> None:
        """Compare values with the declared ranges and choices.

        Raises:
            ValueError: A value breaks its rule; the message says both.
            TypeError: A value has the wrong type.
        """
        for name, item in cls.numbers().items():
            if name not in values:
                continue
            value, meta = values[name], item.metadata
            label = f"{name}={value!r} of {cls.key or cls.__name__}"
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
class Constraint:
    """An edit of named parameters after the step, for rules that couple them.

    Attributes:
        names: Canonical parameter names.
        apply: Called with the parameters of ``names`` and of ``optional`` in that order, the numbers of the first one's
            group, and the notes of its kind since the last step, by module name; see ``Optimizer.note``.
        note: The kind of notes that it reads.
        module: The module whose note it reads.
        optional: Parameters that it takes where they exist, ``None`` where not.
    """

    names: tuple[str, ...]
    apply: Callable[[Sequence[Any], Mapping[str, Any], Mapping[str, Tensor]], None]
    note: str = ""
    module: str = ""
    optional: tuple[str, ...] = ()


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
