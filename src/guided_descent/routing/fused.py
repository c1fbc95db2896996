"""Fused maps: several linear maps stored in one weight, found by what the modules around it take in and give out."""

from __future__ import annotations

from torch import nn

from guided_descent.routing.layouts import equal_parts
from guided_descent.routing.tree import (
    HEAD_DIM,
    HEADS,
    KV_HEADS,
    Map,
    Node,
    map_of,
    number,
    own_class,
    takes_in,
    type_names,
)

Parts = tuple[tuple[str, int], ...]
Fused = tuple[Parts, str]

# Attention types of the Hugging Face hub that store q, k, v head by head: [heads, 3, head_dim].
_PER_HEAD = frozenset({"GPTNeoXAttention", "BloomAttention"})


def fused_parts(node: Node, m: Map) -> Fused | None:
    """The parts along the output axis of a fused map and the reason, or ``None`` for a single map."""
    parent = node.around
    if parent is None or m.groups != 1:
        return None
    others = [other for other in parent.members() if other is not node]
    if any(takes_in(other.module) == m.out for other in others):
        return None  # the whole width goes into one module, so it is one map
    maps = [found for other in others if (found := map_of(other.module)) is not None and found.groups == 1]
    return _attention(parent, m, maps) or _gated(node, parent, m, maps)


def _attention(parent: Node, m: Map, maps: list[Map]) -> Fused | None:
    """Queries, keys and values in one weight: the widths must agree with the heads that the module declares."""
    heads = number(parent.module, HEADS)
    if heads is None:
        return None
    kind = parent.kind
    taken = {other.inp for other in maps}
    returned = {other.inp for other in maps if other.out == m.inp}  # by the output projection
    kv = number(parent.module, KV_HEADS)
    if kv is not None and kv != heads:
        declared = number(parent.module, HEAD_DIM)
        dims = {declared} if declared else {width // heads for width in taken | {m.inp} if width % heads == 0}
        for dim in sorted(dims, reverse=True):
            q, k = heads * dim, kv * dim
            if q + 2 * k == m.out:
                return (("q", q), ("k", k), ("v", k)), f"q, k, v in one: {kind} has {heads} query and {kv} key heads"
            if 2 * k == m.out and any(other.out == q for other in maps):
                return (("k", k), ("v", k)), f"k, v in one: {kind} has {kv} key heads"
        return None
    third, half = m.out // 3, m.out // 2
    thirds = m.out % 3 == 0 and third % heads == 0
    queries = any(other.out == half for other in maps)
    # A config says less than an attribute of the module itself: an MLP of the same model may hold it too.
    own = number(parent.module, HEADS, config=False) is not None and third == m.inp
    if not (thirds and third in returned) and m.out % 2 == 0 and half % heads == 0 and queries and half in taken:
        return equal_parts("kv", m.out), f"k, v in one: 2 x {half} rows in {kind} of {heads} heads"
    if thirds and (third in returned or own):
        if _PER_HEAD.intersection(type_names(parent.module)):
            labels = [f"{label}{head}" for head in range(heads) for label in "qkv"]
            return equal_parts(labels, m.out), f"q, k, v in one, head by head, as {kind} stores them"
        return equal_parts("qkv", m.out), f"q, k, v in one: 3 x {third} rows in {kind} of {heads} heads"
    return None


def _gated(node: Node, parent: Node, m: Map, maps: list[Map]) -> Fused | None:
    """Gate and value (or two streams) in one weight: a neighbour takes half of the width back to where it came from."""
    half = m.out // 2
    if m.out % 2 or m.conv or (parent.parent is None and half == m.inp):
        return None
    if not any(other.inp == half and other.out == m.inp for other in maps):
        return None
    if node.parent is not None and own_class(node.parent.module) is nn.Sequential:
        line = node.parent.children
        after = [found for other in line[line.index(node) + 1 :] if (found := map_of(other.module)) is not None]
        if after and after[0].inp != half:
            return None
    return (("a", half), ("b", half)), f"two maps in one: {parent.kind} takes on half of {m.out}"
