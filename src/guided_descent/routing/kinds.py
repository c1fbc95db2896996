"""What one parameter is, from the type of its module and from facts about the whole model."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from guided_descent.routing.experts import adapters, raw_router, router_reason, stack_layout_axis, stack_reason
from guided_descent.routing.fused import Fused, fused_parts
from guided_descent.routing.heads import find_heads
from guided_descent.routing.layouts import Layout, equal_parts
from guided_descent.routing.roles import Role
from guided_descent.routing.tree import (
    Map,
    Node,
    is_embedding,
    is_norm,
    is_parametrization,
    map_of,
    shape_of,
    takes_in,
)

ROWS = Layout()
_GATES = {"LSTM": "ifgo", "LSTMCell": "ifgo", "GRU": "rzn", "GRUCell": "rzn"}


@dataclass(frozen=True)
class Guess:
    """A role with its reason; the layout says how to read the tensor as matrices, were it to be one."""

    role: Role
    why: str
    layout: Layout | None = None
    flattened: bool = False


@dataclass(frozen=True)
class Facts:
    """What is known of a whole model before its parameters are looked at one by one."""

    heads: dict[Node, str] = field(default_factory=dict)
    routers: dict[Node, str] = field(default_factory=dict)
    fused: dict[Node, Fused] = field(default_factory=dict)
    adapters: dict[tuple[Node, str], tuple[str, int]] = field(default_factory=dict)
    widths: frozenset[int] = frozenset()


def survey(root: Node) -> Facts:
    """Find the low-rank factors, routers, heads and fused maps of a model.

    At the top of a model a head with strong evidence comes before a fused map; below it a fused map comes first.
    """
    pairs = adapters(root)
    factors = {node for node, _ in pairs if map_of(node.module) is not None and not node.children}
    maps = [(node, m) for node in root.walk() if node not in factors and (m := map_of(node.module)) is not None]
    routers = {node: why for node, m in maps if (why := router_reason(node, m)) is not None}
    fused = {node: parts for node, m in maps if node not in routers and (parts := fused_parts(node, m)) is not None}
    heads = {}
    for node, (why, strong) in find_heads(root, factors | set(routers)).items():
        if node not in fused or (strong and node.around is root):
            heads[node] = why
            fused.pop(node, None)
    widths = {width for node in root.walk() if (width := takes_in(node.module)) is not None}
    return Facts(heads, routers, fused, pairs, frozenset(widths))


def unusable(tensor: Tensor, shape: tuple[int, ...]) -> Guess | None:
    """A tensor that no matrix method can take, whatever its module: lazy, empty, complex or of whole numbers."""
    if nn.parameter.is_lazy(tensor):
        return Guess(Role.OTHER, "lazy: its shape is not known; run one batch through the model before building")
    if 0 in shape:
        return Guess(Role.OTHER, "empty: it has no elements")
    if tensor.is_complex():
        return Guess(Role.OTHER, "complex: updated elementwise")
    if not tensor.is_floating_point():
        return Guess(Role.OTHER, f"{str(tensor.dtype).removeprefix('torch.')}: holds no real numbers")
    return None


def raw(shape: tuple[int, ...]) -> Guess | None:
    """A tensor that is a vector or a scalar by its shape; ``None`` when it is more."""
    if all(side == 1 for side in shape):
        return Guess(Role.SCALAR, "one element")
    if sum(side > 1 for side in shape) == 1:
        return Guess(Role.VECTOR, "a vector" if len(shape) == 1 else "one side above 1")
    return None


def guess(facts: Facts, node: Node, leaf: str, tensor: Tensor) -> Guess:
    """What a parameter is at one place where it is registered."""
    shape = shape_of(tensor)
    if "FlatParameter" in (cls.__name__ for cls in type(tensor).__mro__) or hasattr(tensor, "_fqns"):
        return Guess(Role.OTHER, f"flattened: {node.kind} keeps several parameters in one", flattened=True)
    if nn.parameter.is_lazy(tensor):
        return unusable(tensor, shape) or Guess(Role.OTHER, "lazy")
    typed = _parametrized(facts, node, shape) if is_parametrization(node) else _typed(facts, node, leaf, shape)
    if typed is not None and typed.flattened:
        return typed
    return unusable(tensor, shape) or typed or _raw(facts, node, leaf, shape)


def owner_of(node: Node) -> Node:
    """The module that uses a parameter: for torch's holders of parametrized tensors, the module around them."""
    above = node.parent.parent if node.parent is not None else None
    return above if above is not None and is_parametrization(node) else node


def _parametrized(facts: Facts, node: Node, shape: tuple[int, ...]) -> Guess | None:
    """The original of a parametrized tensor stands for the tensor when it has the shape that the module declares."""
    owner = owner_of(node)
    attribute = node.path.rpartition(".")[2]
    typed = _typed(facts, owner, attribute, shape)
    m = map_of(owner.module)
    if typed is None or typed.flattened or (m is not None and len(shape) > 1 and shape != m.shape):
        return None
    return replace(typed, why=f"{typed.why}, parametrized")


def _typed(facts: Facts, node: Node, leaf: str, shape: tuple[int, ...]) -> Guess | None:
    """The guess for a module of a known type; ``None`` for other modules, and for tensors foreign to the type."""
    module, kind = node.module, node.kind
    if (node, leaf) in facts.adapters:
        why, axis = facts.adapters[node, leaf]
        return Guess(Role.ADAPTER, why, Layout(out=axis))
    if is_embedding(module):
        flat = _flat(kind, "[rows, width]", shape)
        return flat or (Guess(Role.EMBEDDING, f"{kind}: a table that is looked up", ROWS) if len(shape) == 2 else None)
    if is_norm(module):
        return Guess(Role.NORM, f"{kind}: gain or shift") if len(shape) <= 1 else None
    if isinstance(module, nn.RNNBase | nn.RNNCellBase):
        return _recurrent(kind, leaf, shape)
    if isinstance(module, nn.MultiheadAttention):
        return _attention(kind, leaf, shape)
    m = map_of(module)
    return _mapped(facts, node, leaf, shape, m) if m is not None else None


def _flat(kind: str, wanted: str, shape: tuple[int, ...]) -> Guess | None:
    if len(shape) != 1:
        return None
    return Guess(Role.OTHER, f"flattened: the weight of {kind} is {wanted}, this is a 1-D shard", flattened=True)


def _mapped(facts: Facts, node: Node, leaf: str, shape: tuple[int, ...], m: Map) -> Guess | None:
    kind = node.kind
    if len(shape) == 1:
        if leaf == "weight" and isinstance(node.module, nn.Linear | _ConvNd):
            return _flat(kind, str(list(m.shape)), shape)
        return Guess(Role.BIAS, f"bias of {kind}") if leaf == "bias" or shape == (m.out,) else None
    # torch's older weight_norm and spectral_norm rename the weight but keep its shape
    if len(shape) != len(m.shape) or not (leaf == "weight" or shape == m.shape):
        return None
    if m.conv:
        # a transposed convolution is stored (in, out / groups, kernel): its groups are slices of the inputs
        layout = Layout(out=1, slices=m.groups) if m.axis else Layout(groups=m.groups)
        if m.depthwise:
            return Guess(Role.DEPTHWISE, f"{kind} with {m.groups} groups on {m.inp} channels")
        role, why = Role.CONV, f"{kind}: (out, in * kernel)" + (f" in {m.groups} groups" if m.groups > 1 else "")
    else:
        layout = Layout(out=m.axis)
        role, why = Role.MATRIX, f"{kind}: a hidden map" + (", stored (in, out)" if m.axis else "")
    if node in facts.heads:
        return Guess(Role.HEAD, f"{kind}: {facts.heads[node]}", layout)
    if node in facts.routers:
        return Guess(Role.ROUTER, f"{kind}: {facts.routers[node]}", layout)
    if node in facts.fused:
        parts, reason = facts.fused[node]
        if sum(size for _, size in parts) == shape[layout.out]:
            return Guess(Role.FUSED, f"{kind}: {reason}", replace(layout, parts=parts))
    return Guess(role, why, layout)


def _recurrent(kind: str, leaf: str, shape: tuple[int, ...]) -> Guess | None:
    if leaf.startswith("weight"):
        flat = _flat(kind, "[gates * hidden, width]", shape)
        if flat is not None or len(shape) != 2:
            return flat
        gates = "" if leaf.startswith("weight_hr") else _GATES.get(kind, "")
        if not gates:
            why = f"{kind}: projection of the state" if leaf.startswith("weight_hr") else f"{kind}: no gates"
            return Guess(Role.RECURRENT, why, ROWS)
        return Guess(Role.RECURRENT, f"{kind}: one map per gate", Layout(parts=equal_parts(gates, shape[0])))
    return Guess(Role.BIAS, f"bias of {kind}") if len(shape) == 1 else None


def _attention(kind: str, leaf: str, shape: tuple[int, ...]) -> Guess | None:
    if leaf.endswith("proj_weight"):
        flat = _flat(kind, "[out, in]", shape)
        if flat is not None or len(shape) != 2:
            return flat
        if leaf == "in_proj_weight":
            return Guess(Role.FUSED, f"{kind}: q, k, v in one", Layout(parts=equal_parts("qkv", shape[0])))
        return Guess(Role.MATRIX, f"{kind}: a projection", ROWS)
    return Guess(Role.BIAS, f"bias of {kind}")


def _raw(facts: Facts, node: Node, leaf: str, shape: tuple[int, ...]) -> Guess:
    """A parameter of a module whose type says nothing of it."""
    kind = node.kind
    small = raw(shape)
    if small is not None:
        return replace(small, why=f"{small.why}, held by {kind}")
    if len(shape) == 3 and not is_parametrization(node):
        reason = stack_reason(node, shape)
        if reason is not None:
            out, gated = stack_layout_axis(node, shape)
            parts = equal_parts("ab", shape[out]) if gated else ()
            why = f"stacked experts: {reason}" + (", gate and value in one" if gated else "")
            return Guess(Role.EXPERT, why, Layout(out=out, stacked=True, parts=parts))
    if raw_router(node, shape):
        return Guess(Role.ROUTER, f"one row for each of the {shape[0]} experts that {kind} declares", ROWS)
    if len(shape) == 3 and shape[0] == 1 and shape[2] in facts.widths:
        return Guess(Role.EMBEDDING, f"raw parameter of {kind}, one for the whole batch: a table of {shape[1]} vectors")
    hint = "role='matrix'" if len(shape) == 2 else "role='expert' or role='conv'"
    return Guess(Role.OTHER, f"raw parameter of {kind}: if it is a linear map, declare it with rule(..., {hint})")
