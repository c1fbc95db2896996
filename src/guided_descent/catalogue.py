"""The catalogue: which optimizers there are, and what each one is."""

from __future__ import annotations

import dataclasses
import inspect
from dataclasses import dataclass
from typing import Any

from guided_descent.parts import WRAPPERS, Parts, Wrapper
from guided_descent.parts.numbers import Info, Numbers
from guided_descent.recipes.base import REGISTRY, Recipe, lookup
from guided_descent.routing.roles import Block, Piece, Role


def list_optimizers(family: str | None = None) -> list[str]:
    """The keys of all recipes, sorted; those of wrappers, which recipes carry, with ``family="wrapper"``.

    Args:
        family: Only those of this family.

    Raises:
        ValueError: No recipe has this family; the message lists the families.

    Example:
        >>> list_optimizers(family="sign")
        ['lion', 'signsgd', 'signum']
    """
    known: dict[str, Info[Any]] = {**REGISTRY, **(WRAPPERS if family is not None else {})}
    families = sorted({info.family for info in known.values()})
    if family is not None and family not in families:
        raise ValueError(f"family {family!r} does not exist (valid: {', '.join(families)})")
    return sorted(key for key, info in known.items() if family in (None, info.family))


@dataclass(frozen=True)
class Description:
    """What ``describe`` tells: text with ``str()``, data with ``to_dict()``."""

    key: str
    family: str
    paper: str
    formula: str
    hyperparameters: tuple[dict[str, Any], ...]
    state: tuple[dict[str, Any], ...]
    parts: tuple[str, ...]
    flops: float

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return dataclasses.asdict(self)

    def __str__(self) -> str:
        lines = [f"{self.key}  ({self.family}; {self.paper})", "", self.formula, "", "Hyperparameters"]
        if self.family == "wrapper":
            lines[-1] += f" (in param groups with {self.key}_ before the name)"
        width = max(len(item["name"]) for item in self.hyperparameters)
        for item in self.hyperparameters:
            rule = f" [{item['rule']}]" if item["rule"] else ""
            lines.append(f"  {item['name']:<{width}}  {item['default']}{rule}  {item['help']}")
        kept = ", ".join(f"{item['name']} {'x'.join(map(str, item['shape'])) or 'scalar'}" for item in self.state)
        lines += [
            "",
            f"State of a {_SIDE} x {_SIDE} matrix: {kept or 'none'}",
            f"FLOPs of its step: {self.flops:.3g}",
            f"Parts, in order: {' > '.join(self.parts)}",
        ]
        return "\n".join(lines)


def describe(name: str) -> Description:
    """Formula, hyperparameters with defaults and ranges, state, cost and source of a recipe or a wrapper.

    Args:
        name: A key of ``list_optimizers()``.

    Raises:
        ValueError: The name is unknown; the message names the nearest and all valid ones.

    Example:
        >>> describe("muon").family
        'spectral'
    """
    info: Info[Any] = WRAPPERS[name] if name in WRAPPERS else REGISTRY[lookup(name).key]
    block = Block("weight", (Piece("weight", (_SIDE, _SIDE)),), (_SIDE, _SIDE), Role.MATRIX)
    made = info.cls()
    parts = Parts(made.part()) if isinstance(made, Wrapper) else made.parts(block)
    slots = parts.slots(block).items()
    return Description(
        key=name,
        family=info.family,
        paper=info.paper,
        formula=inspect.cleandoc(info.cls.__doc__ or ""),
        hyperparameters=tuple(_hyperparameter(item, made) for item in dataclasses.fields(made)),
        state=tuple({"name": n, "shape": list(block.shape if s.layout == "param" else s.shape)} for n, s in slots),
        parts=tuple(f"{type(part).__name__} ({part.where})" for part in parts),
        flops=sum(part.flops(block) for part in parts),
    )


_SIDE = 1024


def _hyperparameter(item: dataclasses.Field[Any], made: Numbers) -> dict[str, Any]:
    signs = {"gt": ">", "ge": ">=", "lt": "<", "le": "<="}
    meta = item.metadata
    if not meta:
        value = getattr(made, item.name)
        aux = value if isinstance(value, Recipe) else made.default_aux() if isinstance(made, Recipe) else None
        assert aux is not None
        rate = aux.values()["lr"]
        shared = value is None and rate == made.values()["lr"]
        default = f"{aux.label} with the same numbers" if shared else f"{aux.label}(lr={rate})"
        return {"name": item.name, "default": default, "rule": "", "help": "recipe of the blocks that are no matrices"}
    if meta["kind"] == "static" and meta["of"]:
        rule = " | ".join(map(str, meta["of"]))
    else:
        rule = ", ".join(f"{signs[name]} {bound:g}" for name, bound in meta["bounds"].items())
    return {"name": item.name, "default": item.default, "rule": rule, "help": meta["help"]}
