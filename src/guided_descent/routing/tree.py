"""A model as a tree of modules, with what their types and attributes say about widths, heads and experts."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd
from torch.nn.utils.parametrize import ParametrizationList

from guided_descent.routing.names import WRAPPERS, canonical_name

HEADS = ("num_heads", "n_head", "n_heads", "heads", "nhead", "num_attention_heads", "num_query_heads", "n_q_heads")
KV_HEADS = ("num_key_value_heads", "n_kv_head", "n_kv_heads", "num_kv_heads", "kv_heads", "n_head_kv", "n_query_groups")
HEAD_DIM = ("head_dim", "dim_head", "d_head", "head_size", "attention_head_size", "d_kv", "key_value_proj_dim")
EXPERTS = ("num_experts", "n_experts", "num_local_experts", "n_routed_experts", "num_routed_experts", "n_expert")

_NORMS = (nn.LayerNorm, nn.GroupNorm, nn.RMSNorm, _NormBase)
_CONTAINERS = (nn.Sequential, nn.ModuleList, nn.ModuleDict)


@dataclass(eq=False)
class Node:
    """A module at one place of the model; a module that is shared has one node for each place."""

    path: str
    module: nn.Module
    parent: Node | None = None
    children: list[Node] = field(default_factory=list)

    @property
    def name(self) -> str:
        """Canonical name; empty for the root."""
        return canonical_name(self.path)

    @property
    def kind(self) -> str:
        """Name of the module's type, without what fully_shard and parametrizations put before it."""
        return type_names(self.module)[0]

    @property
    def own(self) -> dict[str, Tensor]:
        """The parameters that the module itself registers."""
        return {leaf: p for leaf, p in self.module._parameters.items() if p is not None}

    @property
    def transparent(self) -> bool:
        """Whether it only holds other modules: a plain list, dict or sequence."""
        return own_class(self.module) in _CONTAINERS and not self.own

    def walk(self) -> Iterator[Node]:
        """This node and all below it, in order of registration."""
        yield self
        for child in self.children:
            yield from child.walk()

    def ancestors(self) -> Iterator[Node]:
        """The nodes above it, nearest first."""
        node = self.parent
        while node is not None:
            yield node
            node = node.parent

    @property
    def around(self) -> Node | None:
        """The module whose forward uses it: the nearest one above that is no mere container, else the root."""
        above = list(self.ancestors())
        return next((node for node in above if not node.transparent), above[-1] if above else None)

    def members(self) -> Iterator[Node]:
        """The modules that its own forward uses: its children, seen through containers and wrappers."""
        for child in self.children:
            if child.transparent:
                yield from child.members()
            else:
                yield child


def grow(model: nn.Module) -> Node:
    """The tree of a model without its wrappers; a module that contains itself is entered once."""

    def enter(path: str, module: nn.Module, parent: Node | None, above: frozenset[int]) -> Node:
        path, module = _unwrap(path, module)
        node = Node(path, module, parent)
        above |= {id(module)}
        node.children = [
            enter(f"{path}.{leaf}" if path else leaf, child, node, above)
            for leaf, child in module._modules.items()
            if child is not None and id(child) not in above
        ]
        return node

    return enter("", model, None, frozenset())


def _unwrap(path: str, module: nn.Module) -> tuple[str, nn.Module]:
    """The module inside wrappers such as DDP or a compiled module: those with nothing but it, under its usual name."""
    while not any(p is not None for p in module._parameters.values()) and len(module._modules) == 1:
        ((leaf, inner),) = module._modules.items()
        if leaf not in WRAPPERS or inner is None:
            break
        path, module = f"{path}.{leaf}" if path else leaf, inner
    return path, module


def own_class(module: nn.Module) -> type[nn.Module]:
    """A module's class, without what ``fully_shard`` puts before it."""
    kinds = type(module).__mro__
    return kinds[2] if kinds[1].__name__ == "FSDPModule" else kinds[0]


def type_names(module: nn.Module) -> list[str]:
    """Names of a module's classes, most specific first, without the classes that torch makes on the fly."""
    names = [cls.__name__ for cls in type(module).__mro__]
    while len(names) > 1 and any(
        names[0] == prefix + name for prefix in ("FSDP", "Parametrized") for name in names[1:]
    ):
        names = [name for name in names[1:] if name != "FSDPModule"]
    return names


def number(module: nn.Module, names: tuple[str, ...], *, config: bool = True) -> int | None:
    """The first whole number that a module, or else its ``config``, keeps under one of the names."""
    for holder in (module, getattr(module, "config", None) if config else None):
        for name in names:
            value = holder.get(name) if isinstance(holder, dict) else getattr(holder, name, None)
            if isinstance(value, int) and not isinstance(value, bool) and value > 0:
                return value
    return None


def shape_of(tensor: Any) -> tuple[int, ...]:
    """Global shape; a lazy parameter has none yet and counts as empty."""
    return (0,) if nn.parameter.is_lazy(tensor) else tuple(int(side) for side in tensor.shape)


@dataclass(frozen=True)
class Map:
    """The linear map of a Linear-like or convolution module: input width, output width, weight shape, output axis."""

    inp: int
    out: int
    shape: tuple[int, ...]
    axis: int = 0
    groups: int = 1
    conv: bool = False

    @property
    def depthwise(self) -> bool:
        """Whether each channel is convolved alone."""
        return self.conv and self.groups == self.inp > 1


def map_of(module: nn.Module) -> Map | None:
    """The linear map that a module applies, from its type and its declared widths; ``None`` when it is no such module.

    Linear-like are nn.Linear, the Conv1D of GPT-2 (stored in, out), and any module that declares ``in_features`` and
    ``out_features`` and holds a weight of these two sides, in either order.
    """
    if isinstance(module, _ConvNd):
        cin, cout, groups = module.in_channels, module.out_channels, module.groups
        swapped = isinstance(module, _ConvTransposeNd)
        sides = (cin, cout // groups) if swapped else (cout, cin // groups)
        return Map(cin, cout, (*sides, *module.kernel_size), int(swapped), groups, conv=True)
    if isinstance(module, nn.Linear):
        return Map(module.in_features, module.out_features, (module.out_features, module.in_features))
    matrices = [shape_of(p) for p in module._parameters.values() if p is not None and len(shape_of(p)) == 2]
    if "Conv1D" in type_names(module) and hasattr(module, "nf") and len(matrices) == 1:
        inp, out = matrices[0]
        return Map(inp, out, (inp, out), axis=1)
    wide, tall = getattr(module, "in_features", None), getattr(module, "out_features", None)
    if isinstance(wide, int) and isinstance(tall, int):
        if (tall, wide) in matrices:
            return Map(wide, tall, (tall, wide))
        if (wide, tall) in matrices:
            return Map(wide, tall, (wide, tall), axis=1)
    return None


def is_embedding(module: nn.Module) -> bool:
    """Whether it looks vectors up in a table."""
    return isinstance(module, nn.Embedding | nn.EmbeddingBag)


def is_norm(module: nn.Module) -> bool:
    """Whether it normalises: torch's own types, or a leaf with 'norm' in its type's name and vectors only."""
    if isinstance(module, _NORMS):
        return True
    own = [shape_of(p) for p in module._parameters.values() if p is not None]
    named = any("norm" in name.lower() for name in type_names(module))
    return named and bool(own) and all(len(shape) <= 1 for shape in own) and not any(True for _ in module.children())


def takes_in(module: nn.Module) -> int | None:
    """Width of a module's input, where its type tells."""
    found = map_of(module)
    if found is not None:
        return found.inp
    if isinstance(module, nn.RNNBase | nn.RNNCellBase):
        return int(module.input_size)
    if isinstance(module, nn.MultiheadAttention):
        return int(module.embed_dim)
    if isinstance(module, nn.GroupNorm):
        return int(module.num_channels)
    if isinstance(module, _NormBase):
        return int(module.num_features)
    if is_norm(module):
        shapes = [shape_of(p) for p in module._parameters.values() if p is not None]
        return next((shape[-1] for shape in shapes if shape), None)
    return None


def is_parametrization(node: Node) -> bool:
    """Whether it is torch's holder of a parametrized tensor."""
    return isinstance(node.module, ParametrizationList)
