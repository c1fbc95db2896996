"""Explain: who gets what and why, before a step is taken: recipe, matrix view, rates, state bytes, FLOPs."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch

from guided_descent.build import RoutedOptimizer
from guided_descent.engine.binding import stored_slots
from guided_descent.engine.state import work_dtype
from guided_descent.parallel import Assignment
from guided_descent.parallel.sharing import flops
from guided_descent.parts.base import Slot
from guided_descent.routing.roles import Block


@dataclass(frozen=True)
class Line:
    """One block of one parameter.

    Attributes:
        parameter: Key of the block.
        aliases: Other names of the parameter, and the parameters that are columns of its block.
        role: Its role.
        recipe: The recipe that updates it; ``frozen`` while it takes no gradient.
        group: Index of its param group.
        view: Shape in which it is updated.
        lr: Learning rate times the block's multiplier.
        weight_decay: Decay times the block's multiplier.
        state_bytes: Bytes of its optimizer state.
        flops: Floating point operations of one step, refreshes included at their share.
        why: How the role was found.
        owner: The rank that updates the whole block, where ranks share it; ``None``: each what lies there.
    """

    parameter: str
    aliases: tuple[str, ...]
    role: str
    recipe: str
    group: int
    view: tuple[int, ...]
    lr: float
    weight_decay: float
    state_bytes: int
    flops: float
    why: str
    owner: int | None = None


@dataclass(frozen=True)
class Added:
    """A wrapper that a group carries, with its numbers by group key."""

    wrapper: str
    group: int
    numbers: dict[str, Any]


@dataclass(frozen=True)
class Explanation:
    """The routing and the bill of an optimizer: text with ``str()``, data with ``to_dict()``."""

    lines: tuple[Line, ...]
    parameters: int
    state_bytes: int
    flops: float
    added: tuple[Added, ...] = ()
    assignment: Assignment | None = None

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return asdict(self)

    def __str__(self) -> str:
        head = ("parameter", "role", "recipe", "view", "lr", "decay", "state", "MFLOP", "why")
        rows = [head]
        for line in self.lines:
            name = line.parameter + "".join(f" = {alias}" for alias in line.aliases)
            why = line.why if line.owner is None else f"{line.why}; whole at rank {line.owner}".removeprefix("; ")
            rates = (f"{line.lr:g}", f"{line.weight_decay:g}")
            view = "x".join(map(str, line.view)) or "scalar"
            cost = (_bytes(line.state_bytes), f"{line.flops / 1e6:.3g}")
            rows.append((name, line.role, line.recipe, view, *rates, *cost, why))
        widths = [max(len(row[i]) for row in rows) for i in range(len(head) - 1)]
        text = ["  ".join([*(cell.ljust(width) for cell, width in zip(row, widths)), row[-1]]).rstrip() for row in rows]
        per = self.state_bytes / max(self.parameters, 1)
        text.append(
            f"{self.parameters:,} parameters; state {_bytes(self.state_bytes)} ({per:.2f} bytes each); "
            f"{self.flops / 1e6:.4g} MFLOP a step"
        )
        for each in self.added:
            numbers = ", ".join(f"{name}={value}" for name, value in each.numbers.items())
            text.append(f"added to group {each.group}: {each.wrapper} ({numbers})")
        if self.assignment is not None:
            text.append(str(self.assignment))
        return "\n".join(text)


def explain(optimizer: RoutedOptimizer) -> Explanation:
    """Which recipe updates which parameter, in which view, at which rates, at what cost, and why.

    State bytes follow from the declared slots and equal what is allocated, but for what evaluation mode holds; where
    ranks share the parameters, on all of them together, copies once.

    Args:
        optimizer: An optimizer of this library.

    Raises:
        TypeError: The optimizer is another library's, or wrapped.

    Example:
        >>> import torch, guided_descent as gd
        >>> opt = gd.Muon(torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2)))
        >>> [(line.parameter, line.recipe) for line in explain(opt).lines]
        [('0.weight', 'muon'), ('0.bias', 'adamw'), ('2.weight', 'adamw'), ('2.bias', 'adamw')]
    """
    if not isinstance(optimizer, RoutedOptimizer):
        raise TypeError(
            f"explain takes an optimizer of this library, not a {type(optimizer).__name__}; unwrap it first"
        )
    lines: list[Line] = []
    shared: dict[tuple[int, str], int] = {}
    total = 0
    assignment = optimizer.assignment
    owner = {} if assignment is None else {share.block: share.owner for share in assignment.shares}
    counted: set[str] = set()  # blocks, and parameters whose step counter has been counted
    for index, group in enumerate(optimizer.param_groups):
        for name, tensor in zip(group["param_names"], group["params"]):
            entry = optimizer.table[name]
            total += tensor.numel()
            held = tensor.requires_grad or tensor in optimizer.state
            for number, block in enumerate(optimizer._engine.binder.blocks[name]):
                if block.key in counted:  # a bias that is a column of its weight's block
                    continue
                counted.add(block.key)
                joined = tuple(other for other in block.names if other != name)
                parts = optimizer._engine.binder.parts(index, block)
                counters = {f"step of {other}" for other in block.names} - counted
                counted |= counters
                size = _state_bytes(optimizer, index, block, tensor) + 4 * len(counters) if held else 0
                if held:
                    shared |= _shared_bytes(index, parts.slots(block), tensor)
                lines.append(
                    Line(
                        parameter=block.key,
                        aliases=(entry.aliases if number == 0 else ()) + joined,
                        role=block.role.value,
                        recipe=group["recipe"] if held else "frozen",
                        group=index,
                        view=block.shape,
                        lr=float(group["lr"]) * block.lr_scale,
                        weight_decay=float(group.get("weight_decay", 0.0)) * block.wd_scale,
                        state_bytes=size,
                        flops=flops(parts, block, group) if held else 0.0,
                        why=block.why,
                        owner=owner.get(block.key),
                    )
                )
    size = sum(line.state_bytes for line in lines) + sum(shared.values())
    added = tuple(
        Added(wrapper.label, index, {name: optimizer.param_groups[index][name] for name in wrapper.numbers()})
        for index, wrappers in enumerate(optimizer._engine.binder.carried)
        for wrapper in wrappers
    )
    return Explanation(tuple(lines), total, size, sum(line.flops for line in lines), added, assignment)


def _state_bytes(optimizer: RoutedOptimizer, group: int, block: Block, tensor: torch.Tensor) -> int:
    work = work_dtype(tensor.dtype)
    parts = optimizer._engine.binder.parts(group, block)
    slots, _ = stored_slots(parts, block, optimizer.param_groups[group], tensor)
    size = 0
    for slot in slots.values():
        each = torch.empty((), dtype=slot.dtype or work).element_size()
        if slot.layout == "param":
            size += each * (2 if tensor.is_complex() else 1) * block.numel
        elif slot.layout == "factor":
            size += each * math.prod(slot.shape)
    return size


def _shared_bytes(group: int, slots: Mapping[str, Slot], tensor: torch.Tensor) -> dict[tuple[int, str], int]:
    """Bytes of the state that a whole group shares, by group and name."""
    work = work_dtype(tensor.dtype)
    return {
        (group, name): torch.empty((), dtype=slot.dtype or work).element_size() * math.prod(slot.shape)
        for name, slot in slots.items()
        if slot.layout == "group"
    }


def _bytes(size: int) -> str:
    value = float(size)
    for unit in ("B", "KiB", "MiB"):
        if value < 1024:
            return f"{value:.4g} {unit}"
        value /= 1024
    return f"{value:.4g} GiB"
