"""The heads of a model: maps to its outputs, found by their place and by the widths around them, never by name."""

from __future__ import annotations

from collections.abc import Collection

from torch import nn

from guided_descent.routing.tree import Map, Node, is_embedding, is_norm, map_of, own_class, shape_of, takes_in


def find_heads(root: Node, skip: Collection[Node]) -> dict[Node, tuple[str, bool]]:
    """The maps to the outputs, each with the reason and whether the evidence is strong.

    A map is a Linear-like module or a convolution that is not depthwise. A *stack* is a list or sequence with several
    composite modules of one type (transformer blocks, residual stages). A width is *taken in* when another module of
    the model, apart from the first map, has it as its input width. The rules, in order:

    1. Tied: a map that shares its weight with an embedding (reported as an embedding, not here).
    2. Last: the last map registered in the model; only embeddings and norms may follow it. It counts when it is a
       Linear outside every stack and no head is tied, or else when no module takes its width in. So the last Linear of
       a plain MLP is a head, and the last projection of a headless transformer or ResNet is not.
    3. Vocabulary: a Linear outside every stack with as many outputs as an embedding has rows, and other inputs.
    4. Branch end (weak): a Linear outside every stack whose width no module takes in, nor a convolution a part of it,
       at the end of a branch (a child of the root, or an item of a ModuleList): further heads of the model.

    A model that is itself one map has no head.

    Args:
        root: The model.
        skip: Maps known to be something else: routers, low-rank factors.
    """
    maps = [(node, m) for node in root.walk() if node not in skip and (m := map_of(node.module)) is not None]
    if not maps or maps[0][0] is root:
        return {}
    tables = {id(p) for node in root.walk() if is_embedding(node.module) for p in node.own.values()}
    tied = {node for node, _ in maps if tables & {id(p) for p in node.own.values()}}
    rows = {node.module.num_embeddings: node.name for node in root.walk() if isinstance(node.module, nn.Embedding)}
    in_stack = {node for node, _ in maps if _in_stack(node)}
    first = maps[0][0]

    def taken(node: Node, width: int) -> bool:
        return any(
            takes_in(other.module) == width
            for other in root.walk()
            if other is not node and other is not first and other.around is not node
        )

    channels = {m.inp for node, m in maps if m.conv and m.inp > 1 and node is not first}
    heads: dict[Node, tuple[str, bool]] = {}
    last = _last_holder(root, skip)
    for node, m in maps:
        if node in tied or m.depthwise:
            continue
        outside = not m.conv and node not in in_stack
        if node is last and outside and not tied:
            heads[node] = ("the last map of the model", True)
        elif node is last and not taken(node, m.out):
            heads[node] = (f"the last map of the model; no module takes in its width {m.out}", True)
        elif outside and m.out in rows and m.inp != m.out:
            heads[node] = (f"as many outputs as {rows[m.out]} has rows ({m.out})", True)
        elif (
            outside
            and _ends_branch(root, node, maps)
            and not taken(node, m.out)
            and all(m.out % width for width in channels)  # else it may be reshaped into an image
        ):
            heads[node] = (f"ends its branch; no module takes in its width {m.out}", False)
    return heads


def _in_stack(node: Node) -> bool:
    """Whether it lies inside one of several composite modules of the same type and place."""
    for inner in (node, *node.ancestors()):
        outer = inner.parent
        if outer is None or not isinstance(outer.module, nn.Sequential | nn.ModuleList | nn.ModuleDict):
            continue
        if inner is not node and sum(_outline(inner) == _outline(other) for other in outer.children) > 1:
            return True
    return False


def _outline(node: Node) -> object:
    """What makes two items of a list alike: their type, and for plain sequences the types of what they hold."""
    if own_class(node.module) is nn.Sequential:
        return tuple(below.kind for below in node.walk())
    return own_class(node.module)


def _last_holder(root: Node, skip: Collection[Node]) -> Node | None:
    """The last module that holds a tensor of two axes or more, other than an embedding or a norm."""
    holders = [
        node
        for node in root.walk()
        if node not in skip
        and not is_embedding(node.module)
        and not is_norm(node.module)
        and (map_of(node.module) is not None or any(len(shape_of(p)) > 1 for p in node.own.values()))
    ]
    return holders[-1] if holders else None


def _ends_branch(root: Node, node: Node, maps: list[tuple[Node, Map]]) -> bool:
    if node.parent is not None and isinstance(node.parent.module, nn.ModuleList | nn.ModuleDict):
        return True
    top = node
    while top.parent is not None and top.parent is not root:
        top = top.parent
    inside = set(top.walk())
    return [other for other, _ in maps if other in inside][-1] is node
