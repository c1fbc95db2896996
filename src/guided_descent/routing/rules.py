"""Overrides by name: a rule gives the parameters that match a pattern a role, a split, a recipe or options."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase

from guided_descent.routing.names import near
from guided_descent.routing.roles import Role


@dataclass(frozen=True)
class Rule:
    """What the user says about the parameters whose canonical name matches ``pattern``; made by `rule`.

    Attributes:
        pattern: Glob on the canonical full name (``*`` also crosses dots).
        role: The role to give; ``None`` keeps the inferred one.
        split: Sizes of the parts along the output axis, or a number of equal parts; ``None`` keeps the inferred ones.
        heads: Number of (query) heads into which each part is divided further.
        transposed: Whether storage is (in, out); ``None`` keeps what was inferred.
        recipe: Opaque here; the optimizer of these parameters.
        options: Opaque here; hyperparameters of these parameters.
    """

    pattern: str
    role: Role | None = None
    split: tuple[int, ...] | int | None = None
    heads: int | None = None
    transposed: bool | None = None
    recipe: object | None = None
    options: Mapping[str, object] = field(default_factory=dict)

    def matches(self, names: Iterable[str]) -> bool:
        """Whether any of a parameter's names fits the pattern."""
        return any(fnmatchcase(name, self.pattern) for name in names)

    @property
    def changes_layout(self) -> bool:
        """Whether it says anything about how the tensor is read."""
        return not (self.role is None and self.split is None and self.heads is None and self.transposed is None)


def rule(
    pattern: str,
    *,
    role: str | Role | None = None,
    split: Sequence[int] | int | None = None,
    heads: int | None = None,
    transposed: bool | None = None,
    recipe: object | None = None,
    **options: object,
) -> Rule:
    """Say how the parameters whose name matches a pattern are read and trained; the first matching rule wins.

    Args:
        pattern: Glob on the canonical full name, as `canonical_name` gives it: ``"blocks.*.attn.qkv.weight"``.
            A tied parameter may be named by any of its names.
        role: A `Role` or its value, such as ``"matrix"`` for a raw parameter that is a linear map.
        split: Fused maps along the output axis: their sizes, ``(512, 128, 128)`` for grouped queries, or a number of
            equal parts. ``1`` undoes a split that was inferred.
        heads: Number of heads, each then a matrix of its own. With ``split`` it counts the heads of the first part,
            and the others get heads of the same size.
        transposed: ``True`` where the tensor is stored (in, out), ``False`` where it is (out, in).
        recipe: The optimizer for these parameters; used by the builder.
        **options: Hyperparameters for these parameters, such as ``lr=1e-4``; checked by the builder.

    Returns:
        The rule, to be passed in ``rules=``.

    Raises:
        ValueError: An empty pattern, an unknown role, or a size below 1.
        TypeError: A value of the wrong type.

    >>> rule("*.qkv.weight", split=(512, 128, 128), heads=8).split
    (512, 128, 128)
    """
    if not isinstance(pattern, str):
        raise TypeError(f"pattern={pattern!r} must be a string, a glob on parameter names such as '*.router.weight'")
    if not pattern:
        raise ValueError("pattern='' matches nothing; pass a glob on parameter names such as '*.router.weight'")
    if transposed is not None and not isinstance(transposed, bool):
        raise TypeError(f"transposed={transposed!r} must be True (stored in, out), False (stored out, in) or None")
    if heads is not None:
        _check_count("heads", heads)
    sizes: tuple[int, ...] | int | None
    if split is None or isinstance(split, int):
        sizes = split
        if split is not None:
            _check_count("split", split)
    else:
        sizes = tuple(split)
        if not sizes:
            raise ValueError(
                "split=() is empty; give the size of each part along the output axis, or a number of parts"
            )
        for size in sizes:
            _check_count("split", size)
    return Rule(pattern, _role(role), sizes, heads, transposed, recipe, dict(options))


def _role(role: str | Role | None) -> Role | None:
    if role is None:
        return None
    try:
        return Role(role)
    except ValueError:
        valid = ", ".join(r.value for r in Role)
        raise ValueError(f"role={role!r} is not a role; choose one of: {valid}") from None


def _check_count(what: str, value: object) -> None:
    if not isinstance(value, int) or isinstance(value, bool):
        raise TypeError(f"{what}={value!r} must be made of whole numbers")
    if value < 1:
        raise ValueError(f"{what}={value} must be at least 1")


def first_match(rules: Sequence[Rule], names: Sequence[str]) -> Rule | None:
    """The first rule that matches any of a parameter's names."""
    return next((r for r in rules if r.matches(names)), None)


def check_used(rules: Sequence[Rule], names: Sequence[str]) -> None:
    """Raise when a rule matches no parameter at all: a misspelt pattern must not pass for a setting.

    Raises:
        ValueError: Names the pattern and the parameter names most like it.
    """
    for r in rules:
        if not isinstance(r, Rule):
            raise TypeError(f"rules hold {r!r}; each must be made by guided_descent.rule(pattern, ...)")
        if not r.matches(names):
            hint = near(r.pattern.replace("*", ""), names) or "none: there are no parameters"
            raise ValueError(f"rule pattern {r.pattern!r} matches no parameter; the nearest names are: {hint}")
