"""The catalogue: which optimizers there are, and what each one is."""

from __future__ import annotations

import dataclasses
import inspect
import math
from dataclasses import dataclass
from typing import Any

import torch

from guided_descent.parts import WRAPPERS, Parts, Slot, Wrapper
from guided_descent.parts.numbers import Info, Numbers, rule_of
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
    """What ``describe`` tells: text with ``str()``, data with ``to_dict()``.

    Attributes:
        key: The name users type.
        family: A heading for lists.
        paper: Authors, year and arXiv id.
        formula: The recipe's text.
        use: What it is good for.
        avoid: When another one is better.
        start: Values to start from, where they are not the defaults.
        needs: What it asks of the training loop.
        hyperparameters: Name, default, range and help of each.
        state: Name and shape of its state for a matrix of side 1024.
        memory: Bytes of that state over those of the matrix in float32.
        parts: Its parts and their slots.
        flops: Operations of a step on that matrix, refreshes excluded.
    """

    key: str
    family: str
    paper: str
    formula: str
    use: str
    avoid: str
    start: str
    needs: tuple[str, ...]
    hyperparameters: tuple[dict[str, Any], ...]
    state: tuple[dict[str, Any], ...]
    memory: float
    parts: tuple[str, ...]
    flops: float

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return dataclasses.asdict(self)

    def __str__(self) -> str:
        lines = [f"{self.key}  ({self.family}; {self.paper})", "", self.formula, ""]
        lines += [f"Good for: {self.use}."] if self.use else []
        lines += [f"Not for: {self.avoid}."] if self.avoid else []
        lines += [f"Needs: {'; '.join(self.needs) or 'a gradient in each step, nothing more'}."]
        lines += [f"Start with: {self.start or 'the defaults'}.", "", "Hyperparameters"]
        if self.family == "wrapper":
            lines[-1] += f" (in param groups with {self.key}_ before the name)"
        width = max(len(item["name"]) for item in self.hyperparameters)
        for item in self.hyperparameters:
            rule = f" [{item['rule']}]" if item["rule"] else ""
            lines.append(f"  {item['name']:<{width}}  {item['default']}{rule}  {item['help']}")
        kept = ", ".join(f"{item['name']} {'x'.join(map(str, item['shape'])) or 'scalar'}" for item in self.state)
        lines += [
            "",
            f"State of a {_SIDE} x {_SIDE} matrix: {kept or 'none'}; {self.memory:.2f} times its float32 bytes",
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
        use=info.use,
        avoid=info.avoid,
        start=info.start,
        needs=_needs(made, parts),
        hyperparameters=tuple(_hyperparameter(item, made) for item in dataclasses.fields(made)),
        state=tuple({"name": n, "shape": list(block.shape if s.layout == "param" else s.shape)} for n, s in slots),
        memory=sum(_bytes(slot, block) for _, slot in slots) / (4 * block.numel),
        parts=tuple(f"{type(part).__name__} ({part.where})" for part in parts),
        flops=sum(part.flops(block) for part in parts),
    )


def table() -> str:
    """All recipes as one Markdown page, by family."""
    lines = [
        "# The optimizers",
        "",
        f"Made by `guided-descent list --markdown`. Memory is the state of a {_SIDE} x {_SIDE} matrix, as a multiple",
        "of its float32 bytes; FLOPs are for each of its elements in a step, refreshes of slow matrices excluded.",
    ]
    for family in sorted({info.family for info in REGISTRY.values()}):
        head = "| optimizer | memory | FLOPs | needs | good for | not for | start with | source |"
        lines += ["", f"## {family}", "", head, "|---|---|---|---|---|---|---|---|"]
        for key in list_optimizers(family):
            d = describe(key)
            start, cost = d.start or "defaults", f"{d.memory:.2f} | {d.flops / _SIDE**2:.0f}"
            lines.append(f"| `{key}` | {cost} | {'; '.join(d.needs)} | {d.use} | {d.avoid} | {start} | {d.paper} |")
    return "\n".join(lines) + "\n"


_SIDE = 1024


def _needs(made: Numbers, parts: Parts) -> tuple[str, ...]:
    """What a recipe asks of the training loop, in words."""
    found = []
    if isinstance(made, Recipe) and made.reads_layers:
        sampled = made.values().get("fisher") in ("mc", "exact")
        found.append("the model and the name of its loss" if sampled else "the model")
    if parts.evaluations > 1:
        found.append(f"step(closure): {parts.evaluations} gradients in a step")
    kinds = {part.curvature for part in parts if part.curvature}
    if kinds == {"labels"}:
        found.append("the model and the name of its loss")
    elif kinds:
        found.append("loss.backward(create_graph=optimizer.due('hessian'))")
    if any(part.multiplies for part in parts):
        found.append("step(objective)")
    return tuple(found)


def _bytes(slot: Slot, block: Block) -> int:
    size = torch.empty((), dtype=slot.dtype or torch.float32).element_size()
    return size * (block.numel if slot.layout == "param" else math.prod(slot.shape))


def _hyperparameter(item: dataclasses.Field[Any], made: Numbers) -> dict[str, Any]:
    meta = item.metadata
    if not meta:
        value = getattr(made, item.name)
        aux = value if isinstance(value, Recipe) else made.default_aux() if isinstance(made, Recipe) else None
        assert aux is not None
        rate = aux.values()["lr"]
        shared = value is None and rate == made.values()["lr"]
        default = f"{aux.label} with the same numbers" if shared else f"{aux.label}(lr={rate})"
        return {"name": item.name, "default": default, "rule": "", "help": "recipe of the blocks that are no matrices"}
    return {"name": item.name, "default": item.default, "rule": rule_of(item), "help": meta["help"]}
