"""The modular norm of a model, read off its forward pass: sensitivities are passed back like gradients."""

from __future__ import annotations

import inspect
import math
import operator
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

from guided_descent.routing import Block, Role, Rule, canonical_name, route
from guided_descent.routing.tree import grow, is_embedding, is_norm, map_of
from guided_descent.scaling.modula.algebra import Atom, Bond, Module, Network, Residual, Tuple
from guided_descent.scaling.modula.algebra import Sequence as Chain

#: How much longer a module without weights makes a change, by type: the published numbers where there are such (ReLU,
#: scaled by sqrt(2) there; GELU, divided by 1.1289), else the largest slope.
SENSITIVITIES: dict[Any, float] = {
    nn.Identity: 1.0,
    nn.Flatten: 1.0,
    nn.Unflatten: 1.0,
    nn.Dropout: 1.0,
    nn.Dropout1d: 1.0,
    nn.Dropout2d: 1.0,
    nn.AvgPool1d: 1.0,
    nn.AvgPool2d: 1.0,
    nn.AdaptiveAvgPool1d: 1.0,
    nn.AdaptiveAvgPool2d: 1.0,
    nn.ReLU: 1 / math.sqrt(2),
    nn.GELU: 1.1289,
    nn.SiLU: 1.0998,
    nn.Tanh: 1.0,
    nn.Sigmoid: 0.25,
    nn.ELU: 1.0,
    nn.LeakyReLU: 1.0,
    nn.Softplus: 1.0,
}
#: The same for functions, and for methods by name; they pass on to their first argument.
FUNCTIONS: dict[Any, float] = {
    F.relu: 1 / math.sqrt(2),
    torch.relu: 1 / math.sqrt(2),
    F.gelu: 1.1289,
    F.silu: 1.0998,
    F.elu: 1.0,
    F.leaky_relu: 1.0,
    F.softplus: 1.0,
    torch.tanh: 1.0,
    F.tanh: 1.0,
    torch.sigmoid: 0.25,
    F.sigmoid: 0.25,
    torch.abs: 1.0,
    F.dropout: 1.0,
    F.layer_norm: 1.0,
    F.rms_norm: 1.0,
    F.avg_pool2d: 1.0,
    F.adaptive_avg_pool2d: 1.0,
    torch.mean: 1.0,
    torch.flatten: 1.0,
    torch.reshape: 1.0,
    torch.transpose: 1.0,
    torch.permute: 1.0,
    torch.squeeze: 1.0,
    torch.unsqueeze: 1.0,
    torch.chunk: 1.0,
    torch.split: 1.0,
    torch.unbind: 1.0,
    operator.getitem: 1.0,
    operator.neg: 1.0,
    "relu": 1 / math.sqrt(2),
    "tanh": 1.0,
    "sigmoid": 0.25,
    **dict.fromkeys(("abs", "neg", "mean", "flatten", "unflatten", "reshape", "view", "transpose", "permute"), 1.0),
    **dict.fromkeys(("swapaxes", "movedim", "squeeze", "unsqueeze", "contiguous", "clone", "expand", "t"), 1.0),
    **dict.fromkeys(("chunk", "split", "unbind", "float", "double", "half", "bfloat16", "to", "type_as"), 1.0),
}
#: Additions: every summand is passed on to as it is.
SUMS = {operator.add, operator.iadd, operator.sub, operator.isub, torch.add, torch.sub, "add", "add_", "sub", "sub_"}
#: Concatenations, of a list.
JOINS = {torch.cat, torch.concat, torch.stack}
PRODUCTS = {operator.mul, operator.imul, torch.mul, "mul", "mul_"}
QUOTIENTS = {operator.truediv, operator.itruediv, torch.div, torch.true_divide, "div", "div_"}
#: Attributes of a tensor that are tensors of the same elements; others, and these methods, are no tensors at all.
VIEWS = {"mT", "T", "mH", "H"}
NUMBERS = {"size", "dim", "numel", "stride"}


def read(
    model: nn.Module,
    *,
    rules: Sequence[Rule] = (),
    sensitivities: Mapping[Any, float] | None = None,
    tare: Mapping[str, float] | None = None,
) -> Network:
    """Masses and sensitivities of a model, from a trace of its forward pass.

    The atoms are its Linear, convolution and embedding weights, of mass 1; a fused map is a tuple of its parts. Known
    are sums, products with numbers, concatenations, views, the modules and functions without weights in the tables of
    this file, ``nn.TransformerEncoder`` and attention (``nn.MultiheadAttention`` or ``scaled_dot_product_attention``),
    which counts as 1 in each of queries, keys and values, as with logits over ``d_head``. Norms and gains count as 1.
    A plain ``x + f(x)`` has the sensitivity 2, so that a deep stack of it leaves little to its first blocks: write
    ``(1 - 1/L) x + f(x) / L``.

    Args:
        model: The model.
        rules: Overrides of routing, as for the optimizer.
        sensitivities: More modules, functions and methods without weights, by type, function or name.
        tare: Total masses by glob of atom names, such as ``{"blocks.*": 5.0}``, so that the share of a stack in the
            learning does not grow with its depth.

    Returns:
        The norm, for ``parametrization=``.

    Raises:
        ValueError: The forward pass cannot be traced, or does something for which there is no rule: declare the tree
            with ``Sequence``, ``Residual`` and ``Atom`` and give it as ``parametrization=``.

    Example:
        >>> net = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 2))
        >>> read(net).targets()
        {'0.weight': 0.5, '2.weight': 0.5}
    """
    reading = _Reading(model, rules, SENSITIVITIES | FUNCTIONS | dict(sensitivities or {}))
    found: Module = reading.run()
    for pattern, mass in (tare or {}).items():
        found = found.tare(mass, pattern)
    assert isinstance(found, Network)
    return found


class _Tracer(fx.Tracer):
    """Stops at every module that is a map, a table or a norm, whoever wrote it."""

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        known = map_of(m) is not None or is_embedding(m) or is_norm(m)
        return known or super().is_leaf_module(m, module_qualified_name)


class _Reading:
    """One walk over the graph of a model, from its output back."""

    def __init__(self, model: nn.Module, rules: Sequence[Rule], slopes: Mapping[Any, float]) -> None:
        top = grow(model)
        self.root, self.path, self.slopes = top.module, top.path, slopes
        table = route(model, rules)
        self.blocks = {name: entry.blocks for entry in table for name in (entry.name, *entry.aliases)}
        self.masses: dict[str, float] = {}
        self.after: dict[str, float] = {}

    def run(self) -> Network:
        whole = self.tree(self.root, "")
        if whole is not None:
            return Network(whole.masses(), whole.after(), whole.sensitivity)
        graph = self.trace()
        alive = self.alive(graph)
        coming: dict[fx.Node, float] = {}
        for node in reversed(graph.nodes):
            s = 1.0 if node.op == "output" else coming.get(node, 0.0)
            if s:
                for source, slope in self.pass_back(node, s, node in alive):
                    coming[source] = coming.get(source, 0.0) + s * slope
        inputs = math.fsum(coming.get(node, 0.0) for node in graph.nodes if node.op == "placeholder")
        order = [block.key for own in self.blocks.values() for block in own if block.key in self.masses]
        return Network({name: self.masses[name] for name in order}, {name: self.after[name] for name in order}, inputs)

    def trace(self) -> fx.Graph:
        signature = inspect.signature(self.root.forward).parameters.values()
        optional = {p.name: p.default for p in signature if p.default is not p.empty}
        try:
            return _Tracer().trace(self.root, concrete_args=optional)
        except Exception as error:  # whatever the model's own code raises on a symbol
            raise ValueError(
                f"the forward pass of {type(self.root).__name__} cannot be traced ({error}): {_DECLARE}"
            ) from error

    def alive(self, graph: fx.Graph) -> set[fx.Node]:
        """The nodes that depend on an atom: what makes masks, say, needs no rule."""
        found: set[fx.Node] = set()
        for node in graph.nodes:
            own = (node.op == "get_attr" and self.atoms(node.target)) or (
                node.op == "call_module" and any(self.atoms(name) for name in self.parameters(node.target))
            )
            if own or any(source in found for source in node.all_input_nodes):
                found.add(node)
        return found

    # -- what a node passes back -----------------------------------------------------------------------------------

    def pass_back(self, node: fx.Node, s: float, alive: bool) -> Iterable[tuple[fx.Node, float]]:
        """The nodes that this one reads, each with its slope; atoms are noted on the way."""
        what, args = node.target, (*node.args, *node.kwargs.values())
        if node.op == "call_module":
            return self.module(node, s)
        if node.op == "get_attr":
            self.note(Tuple(*(self.atom(block) for block in self.atoms(what))), s)
        if node.op in ("placeholder", "get_attr") or what in NUMBERS:
            return []
        if node.op == "output" or what in JOINS or (what in SUMS and not node.kwargs):
            return [(source, 1.0) for source in _nodes(args)]
        if what in PRODUCTS or what in QUOTIENTS:
            factors = self.factors(node)
            if factors:
                return factors
        if what is F.linear:
            return [(source, 1.0) for source in _nodes(args[:2])]
        if what is F.scaled_dot_product_attention:
            return [(source, 1.0) for source in _nodes(_attended(node))]
        if what is getattr:
            return [(source, 1.0) for source in _nodes(args[:1]) if args[1] in VIEWS]
        if what in self.slopes:
            return [(source, self.slopes[what]) for source in _nodes(args[:1])]
        if alive:
            raise ValueError(f"there is no rule for {node.format_node()} of {type(self.root).__name__}: {_DECLARE}")
        return []

    def factors(self, node: fx.Node) -> Iterable[tuple[fx.Node, float]]:
        """What a product with a number, or with a tensor that the model holds, passes back; nothing for others."""
        sides = list(node.args)
        if len(sides) != 2 or node.kwargs:
            return []
        if isinstance(sides[1], fx.Node) and sides[1].op != "get_attr" and node.target in PRODUCTS:
            sides.reverse()
        activation, factor = sides
        size = self.size(factor)
        if size is None or not isinstance(activation, fx.Node):
            return []
        return [(activation, 1 / size if node.target in QUOTIENTS else size)]

    def size(self, factor: Any) -> float | None:
        """The size of a number, or the largest of a constant's elements; 1 for a gain, which moves in training."""
        if isinstance(factor, int | float):
            return abs(float(factor)) or None
        if isinstance(factor, fx.Node) and factor.op == "get_attr":
            held = operator.attrgetter(str(factor.target))(self.root)
            if isinstance(held, nn.Parameter):
                return 1.0
            if isinstance(held, Tensor) and held.numel() and not held.is_meta:
                return float(held.detach().abs().max()) or None
        return None

    def module(self, node: fx.Node, s: float) -> Iterable[tuple[fx.Node, float]]:
        name = str(node.target)
        module = self.root.get_submodule(name)
        if isinstance(module, nn.MultiheadAttention):
            maps, out = self.attention(module, name)
            self.note(Chain(Tuple(*maps), out), s)
            return [(source, 1.0) for source in _nodes(_attended(node))]
        tree = self.known(module, name)
        self.note(tree, s)
        inputs = (*node.args, *node.kwargs.values())
        return [(source, tree.sensitivity) for source in _nodes(inputs[:1])]

    def note(self, tree: Module, s: float) -> None:
        """Take up the atoms of a module after whose output there is the sensitivity ``s``."""
        self.masses |= tree.masses()
        for name, after in tree.after().items():
            self.after[name] = self.after.get(name, 0.0) + s * after

    # -- modules as trees ------------------------------------------------------------------------------------------

    def known(self, module: nn.Module, name: str) -> Module:
        """A module that is not traced into, as a tree; an error where there is no rule."""
        tree = self.tree(module, name)
        if tree is None:
            raise ValueError(f"there is no rule for {name!r} ({type(module).__name__}): {_DECLARE}")
        return tree

    def tree(self, module: nn.Module, name: str) -> Module | None:
        """The same, or ``None`` where there is no rule."""
        inside = f"{name}." if name else ""
        if type(module) in self.slopes:
            return Bond(self.slopes[type(module)])
        if is_norm(module):
            return Bond()
        if map_of(module) is not None or is_embedding(module):
            found = [block for leaf in module._parameters for block in self.atoms(f"{inside}{leaf}")]
            # the parts of a fused map share what comes after it
            return Chain(Tuple(*map(self.atom, found)), Bond(1 / len(found))) if found else Bond()
        if isinstance(module, nn.MultiheadAttention):
            maps, out = self.attention(module, name)
            return Chain(Tuple(*maps), out)
        if isinstance(module, nn.TransformerEncoderLayer):
            slope = self.slopes.get(module.activation, self.slopes.get(type(module.activation)))
            if slope is None:
                return None
            parts = ("self_attn", "linear1", "linear2")
            attention, up, down = (self.known(getattr(module, leaf), f"{inside}{leaf}") for leaf in parts)
            return Chain(Residual(attention), Residual(up, Bond(slope), down))
        if isinstance(module, nn.TransformerEncoder):
            return Chain(*(self.known(layer, f"{inside}layers.{i}") for i, layer in enumerate(module.layers)))
        return None

    def attention(self, module: nn.MultiheadAttention, name: str) -> tuple[list[Module], Module]:
        """The maps of queries, keys and values, and that of the output."""
        inside = f"{name}." if name else ""
        leaves = ("in_proj_weight", "q_proj_weight", "k_proj_weight", "v_proj_weight")
        maps = [self.atom(block) for leaf in leaves for block in self.atoms(f"{inside}{leaf}")]
        return maps, self.known(module.out_proj, f"{inside}out_proj")

    def parameters(self, name: Any) -> Iterable[str]:
        """Names of the parameters of a module, from the root of the trace."""
        return (f"{name}.{inner}" for inner, _ in self.root.get_submodule(str(name)).named_parameters())

    def atoms(self, name: Any) -> list[Block]:
        """The blocks of a parameter that are weights with a norm."""
        full = canonical_name(f"{self.path}.{name}" if self.path else str(name))
        return [block for block in self.blocks.get(full, ()) if is_atom(block)]

    @staticmethod
    def atom(block: Block) -> Module:
        """A block as an atom of mass 1."""
        return Atom(block.key)


def _nodes(args: Any) -> list[fx.Node]:
    """The nodes in nested arguments, each as often as it stands there."""
    found: list[fx.Node] = []

    def note(node: fx.Node) -> fx.Node:
        found.append(node)
        return node

    fx.node.map_arg(args, note)
    return found


def _attended(node: fx.Node) -> tuple[Any, ...]:
    """Queries, keys and values of a call of attention."""
    return (*node.args[:3], *(node.kwargs[key] for key in ("query", "key", "value") if key in node.kwargs))


def is_atom(block: Block) -> bool:
    """Whether a block is a weight with a norm of its own: a map, a convolution or a table."""
    return block.is_matrix or block.role in (Role.HEAD, Role.EMBEDDING)


_DECLARE = (
    "declare the tree with guided_descent.modula (Sequence, Residual, Tuple, Atom, Bond) and give it as "
    "parametrization=, or give modula.read(model, sensitivities={...}) the slope of what is missing"
)
