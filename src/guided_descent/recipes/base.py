"""Recipes: which parts, which defaults, which paper. A recipe holds numbers only until the optimizer is built.

A recipe is a frozen dataclass. Its ``hyper`` fields become the numbers of a param group, where schedulers and users
change them; its ``static`` fields choose structure and are fixed once the optimizer exists.
"""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, TypeVar

from torch import Tensor

from guided_descent.parts.base import Parts
from guided_descent.parts.decay import ALL_DECAYS, DECAYS
from guided_descent.parts.numbers import Info as Info
from guided_descent.parts.numbers import Numbers, listed, registering
from guided_descent.parts.numbers import hyper as hyper
from guided_descent.parts.numbers import static as static
from guided_descent.parts.wrapper import WRAPPERS
from guided_descent.routing.roles import Block

R = TypeVar("R", bound="Recipe")


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


#: The recipes, by key.
REGISTRY: dict[str, Info[Recipe]] = {}


def recipe(
    key: str, *, paper: str, family: str, use: str = "", avoid: str = "", start: str = ""
) -> Callable[[type[R]], type[R]]:
    """Register a recipe class under its key; see ``Info``."""
    return registering(REGISTRY, key, paper, family, use, avoid, start)


def lookup(name: str) -> type[Recipe]:
    """The recipe class of a key.

    Raises:
        ValueError: No recipe has this key; the message names the nearest and all valid ones.

    Example:
        >>> lookup("adamw").__name__
        'AdamW'
    """
    if name in WRAPPERS:
        made = f"guided_descent.parts.{WRAPPERS[name].cls.__name__}()"
        raise ValueError(f"{name!r} is a wrapper, for any optimizer: give it to one with add=[{made}]")
    if name not in REGISTRY:
        near = difflib.get_close_matches(name.lower(), REGISTRY, n=1, cutoff=0.4)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise ValueError(f"optimizer {name!r} does not exist{hint} (valid: {', '.join(sorted(REGISTRY))})")
    return REGISTRY[name].cls


@dataclass(frozen=True, kw_only=True)
class Recipe(Numbers):
    """A point in the space of optimizers. Subclasses declare fields, ``parts`` and, for hybrids, ``route``.

    Class attributes: ``key`` (set by the registry), ``revision`` (bumped when the mathematics changes, compared on
    load), ``matrix`` (whether blocks that are no matrices need another recipe), ``reads_layers`` (whether it needs the
    inputs and output gradients of layers, so that a model is needed and a layer that cannot be read goes to ``aux``),
    ``samples_labels`` (whether it needs gradients at labels drawn from the model, and so the loss), ``joins_bias``
    (whether weight and bias of a layer are one block ``[W | b]``) and ``parametrization`` (the name of the one that it
    is made for, see ``scaling``).
    """

    revision: ClassVar[int] = 1
    matrix: ClassVar[bool] = False
    reads_layers: ClassVar[bool] = False
    samples_labels: ClassVar[bool] = False
    joins_bias: ClassVar[bool] = False
    parametrization: ClassVar[str] = ""

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

    def replace(self: R, **changes: Any) -> R:
        """A copy with changes.

        Raises:
            TypeError: A name is unknown; the message lists the valid ones.
            ValueError: A value is out of its range.
        """
        fields = dataclasses.fields(self)
        valid = [item.name for item in fields]
        for name in changes:
            if name not in valid:
                near = difflib.get_close_matches(name, valid, n=1)
                hint = f"; did you mean {near[0]!r}?" if near else ""
                raise TypeError(f"{self.label} has no hyperparameter {name!r}{hint} (valid: {listed(fields)})")
        return dataclasses.replace(self, **changes)


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
        multiplies: Whether all it does is to multiply elements by numbers in which no element has a part, so that it
            can be applied to parts of tensors.
    """

    names: tuple[str, ...]
    apply: Callable[[Sequence[Any], Mapping[str, Any], Mapping[str, Tensor]], None]
    note: str = ""
    module: str = ""
    optional: tuple[str, ...] = ()
    multiplies: bool = False
