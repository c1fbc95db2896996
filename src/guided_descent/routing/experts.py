"""Mixtures of experts and low-rank adapters, found by how their tensors fit together."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise

from torch import nn

from guided_descent.routing.tree import (
    EXPERTS,
    Map,
    Node,
    is_parametrization,
    map_of,
    number,
    own_class,
    shape_of,
    type_names,
)


def stack_reason(node: Node, shape: tuple[int, ...]) -> str | None:
    """Why axis 0 of a raw parameter counts experts: the module says so, or a neighbour picks among as many."""
    count = shape[0]
    if count < 2 or own_class(node.module).__module__.startswith("torch.nn."):
        return None
    if number(node.module, EXPERTS) == count:
        return f"{node.kind} declares {count} experts"
    for place in (node, node.around):
        for gate, m in _gates(place, count):
            if m.inp in shape[1:]:
                return f"{gate.name} ({gate.kind}) picks among {count}"
    return None


def _gates(place: Node | None, count: int) -> Iterator[tuple[Node, Map]]:
    """Linear-like maps to ``count`` outputs, each the only map in a child of the place."""
    for child in place.children if place is not None else ():
        maps = [(below, m) for below in child.walk() if (m := map_of(below.module)) is not None]
        if len(maps) == 1 and maps[0][1].out == count and not maps[0][1].conv:
            yield maps[0]


def stack_layout_axis(node: Node, shape: tuple[int, ...]) -> tuple[int, bool]:
    """Output axis of stacked experts [E, a, b], and whether gate and value share it.

    A gated pair is told by the widths alone: one tensor has twice the hidden side of the other. Otherwise the first
    tensor of the module takes in the model's width, which its router or expert attributes give; without either the
    usual (out, in) is assumed.
    """
    stacks = [s for p in node.own.values() if len(s := shape_of(p)) == 3 and s[0] == shape[0]]
    for up in stacks:
        for down in stacks:
            for out in (1, 2):  # up has its outputs on this axis, so down has its inputs on the other
                gated = down[out] == up[3 - out] and 2 * down[3 - out] == up[out]
                if up != down and gated and up[1] != up[2]:
                    return out, shape == up
    routed = _router_width(node, shape[0])
    first = stacks[0]
    if routed is not None and first[1] == routed != first[2]:
        return 2, False
    return 1, False


def _router_width(node: Node, count: int) -> int | None:
    for place in (node, node.around):
        for _, m in _gates(place, count):
            return m.inp
        for member in place.members() if place is not None else ():
            for p in member.own.values():
                if raw_router(member, shape_of(p)) and shape_of(p)[0] == count:
                    return shape_of(p)[1]
    return None


def router_reason(node: Node, m: Map) -> str | None:
    """Why a map is a router: it has one output for each of the experts beside it."""
    parent = node.around
    if parent is None or m.conv or m.out < 2:
        return None
    if parent.parent is not None and number(parent.module, EXPERTS, config=False) == m.out:
        return f"one output for each of the {m.out} experts that {parent.kind} declares"
    for branch, place in pairwise((node, *node.ancestors())):
        if sum(map_of(below.module) is not None for below in branch.walk()) > 1:
            return None  # one map of several in a network of its own
        for member in (place, *place.members()):
            shapes = [shape_of(p) for p in member.own.values()]
            if any(len(shape) == 3 and shape[0] == m.out and stack_reason(member, shape) for shape in shapes):
                return f"one output for each of {m.out} stacked experts of {member.kind}"
        if place.parent is not None and any(_is_expert_list(child, m.out) for child in place.children):
            return f"one output for each of {m.out} expert modules of {place.kind}"
    return None


def _is_expert_list(node: Node, count: int) -> bool:
    kinds = {child.kind for child in node.children}
    return (
        isinstance(node.module, nn.ModuleList | nn.ModuleDict)
        and len(node.children) == count
        and len(kinds) == 1
        and all(any(map_of(below.module) is not None for below in child.walk()) for child in node.children)
    )


def raw_router(node: Node, shape: tuple[int, ...]) -> bool:
    """Whether a raw [E, d] parameter is a router: its module declares E experts and stacks none itself."""
    stacked = any(len(shape_of(p)) == 3 for p in node.own.values())
    return len(shape) == 2 and shape[0] > 1 and number(node.module, EXPERTS) == shape[0] and not stacked


def adapters(root: Node) -> dict[tuple[Node, str], tuple[str, int]]:
    """Low-rank factors: (node, leaf) of each, with the reason and its output axis.

    Two maps beside a base map [out, in] form a pair when one goes from its input to r < min(out, in) and the other
    from r to its output. One more sign is asked for, as a bottleneck branch looks alike: the base is frozen, the module
    keeps r as an attribute, or its type is named after LoRA or adapters.
    """
    found: dict[tuple[Node, str], tuple[str, int]] = {}
    for node in root.walk():
        if map_of(node.module) is not None and not node.children and len(node.own) < 3:
            continue
        bases = list(_bases(node))
        if not bases:
            continue
        factors = list(_factors(node))
        for place, leaf, first, axis in factors:
            for place2, leaf2, second, axis2 in factors:
                for inp, out, frozen in bases:
                    rank = first[axis]
                    fits = first[1 - axis] == inp and second[axis2] == out and second[1 - axis2] == rank
                    if fits and rank < min(inp, out) and (frozen or _says_low_rank(node, rank)):
                        why = f"low-rank pair of rank {rank} beside a map [{out}, {inp}] in {node.kind}"
                        found.setdefault((place, leaf), (why, axis))
                        found.setdefault((place2, leaf2), (why, axis2))
    return found


def _bases(node: Node) -> Iterator[tuple[int, int, bool]]:
    """Input and output width, and whether it is frozen, of each map that a pair in this node may adapt."""
    holder = node.parent
    if holder is not None and is_parametrization(holder):
        for p in holder.own.values():
            if len(shape := shape_of(p)) == 2:
                yield shape[1], shape[0], not p.requires_grad
        return
    for place in (node, *(child for child in node.members() if map_of(child.module) is not None)):
        for p in place.own.values():
            if len(shape := shape_of(p)) == 2:
                declared = map_of(place.module)
                flipped = declared is not None and declared.axis == 1
                yield shape[0 if flipped else 1], shape[1 if flipped else 0], not p.requires_grad


def _factors(node: Node) -> Iterator[tuple[Node, str, tuple[int, ...], int]]:
    """Matrices of this node and of the maps in it, with their output axis; raw ones are read both ways."""
    for leaf, p in node.own.items():
        if len(shape := shape_of(p)) == 2:
            yield node, leaf, shape, 0
            yield node, leaf, shape, 1
    for member in node.members():
        m = map_of(member.module)
        if m is not None and not m.conv:
            for leaf, p in member.own.items():
                if shape_of(p) == m.shape:
                    yield member, leaf, m.shape, m.axis


def _says_low_rank(node: Node, rank: int) -> bool:
    named = any(word in name.lower() for name in type_names(node.module) for word in ("lora", "dora", "adapter"))
    r = getattr(node.module, "r", None)
    ranks = set(r.values()) if isinstance(r, dict) else {r, number(node.module, ("rank", "lora_rank", "lora_r"))}
    return named or rank in ranks
