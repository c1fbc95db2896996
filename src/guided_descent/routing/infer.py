"""From a model, or a bare list of parameters, to its routing table."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

from torch import Tensor, nn

from guided_descent.routing import kinds
from guided_descent.routing.kinds import Facts, Guess, raw
from guided_descent.routing.layouts import matrix_blocks, plain_block
from guided_descent.routing.names import canonical_name
from guided_descent.routing.overrides import override
from guided_descent.routing.roles import Block, Role
from guided_descent.routing.rules import Rule, check_used, first_match
from guided_descent.routing.table import Entry, Table
from guided_descent.routing.tree import Node, grow, shape_of

Source = nn.Module | Iterable[Tensor] | Iterable[tuple[str, Tensor]]


@dataclass
class _Parameter:
    """A distinct parameter and all the places where it is registered."""

    tensor: Tensor
    names: list[str]
    sites: list[tuple[Node, str]]


def route(source: Source, rules: Sequence[Rule] = ()) -> Table:
    """Say of every parameter what it is: its role, its blocks and their matrix view, its owner and the reason.

    With a model the roles follow from module types, from tied weights and from how modules are placed and fit together;
    never from the name of a leaf or from a shape alone. With a bare list there is nothing but shapes: a 2-D tensor
    with both sides above 1 counts as a matrix, and each reason starts with 'shape only'.

    Args:
        source: A model, or tensors, or (name, tensor) pairs. Bare tensors are called ``param.0``, ``param.1``, ...
        rules: Overrides, made by `rule`. The first that matches a name of a parameter wins.

    Returns:
        The table, in the order of ``named_parameters()``: one entry for each distinct parameter, frozen ones too.

    Raises:
        TypeError: The source is none of these.
        ValueError: A name occurs twice, a rule matches nothing, or a rule does not fit the shape of what it matches.

    >>> from torch import nn
    >>> table = route(nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3)))
    >>> [(entry.name, entry.blocks[0].role.value) for entry in table]
    [('0.weight', 'matrix'), ('0.bias', 'bias'), ('2.weight', 'head'), ('2.bias', 'bias')]
    """
    if isinstance(source, nn.Module):
        root = grow(source)
        facts: Facts | None = kinds.survey(root)
        found = _of_model(root)
    else:
        facts, found = None, _of_list(source)
    check_used(rules, [name for parameter in found for name in parameter.names])
    return Table(tuple(_entry(parameter, facts, rules) for parameter in found))


def named_parameters(source: Source) -> dict[str, Tensor]:
    """Canonical name -> distinct parameter, in the order and under the names of the table that `route` gives."""
    found = _of_model(grow(source)) if isinstance(source, nn.Module) else _of_list(source)
    return {parameter.names[0]: parameter.tensor for parameter in found}


def _of_model(root: Node) -> list[_Parameter]:
    found: dict[int, _Parameter] = {}
    owners: dict[str, int] = {}
    for node in root.walk():
        for leaf, tensor in node.own.items():
            full = f"{node.path}.{leaf}" if node.path else leaf
            name = canonical_name(full)
            if owners.setdefault(name, id(tensor)) != id(tensor):
                name = full  # two parameters differ only in a component that wrappers use: keep it
                owners[name] = id(tensor)
            parameter = found.setdefault(id(tensor), _Parameter(tensor, [], []))
            if name not in parameter.names:
                parameter.names.append(name)
            parameter.sites.append((node, leaf))
    return list(found.values())


def _of_list(source: Iterable[Tensor] | Iterable[tuple[str, Tensor]]) -> list[_Parameter]:
    valid = "pass a model, tensors, or (name, tensor) pairs such as model.named_parameters()"
    if isinstance(source, Tensor | str | dict) or not isinstance(source, Iterable):
        raise TypeError(f"cannot route a {type(source).__name__}; {valid}")
    found: dict[int, _Parameter] = {}
    seen: set[str] = set()
    for position, item in enumerate(source):
        pair = item if isinstance(item, tuple) and len(item) == 2 else (f"param.{position}", item)
        name, tensor = pair
        if not isinstance(name, str) or not isinstance(tensor, Tensor):
            raise TypeError(f"item {position} is a {type(item).__name__}, not a parameter; {valid}")
        name = canonical_name(name)
        if name in seen:
            raise ValueError(f"the name {name!r} occurs twice; each parameter needs a name of its own")
        seen.add(name)
        found.setdefault(id(tensor), _Parameter(tensor, [], [])).names.append(name)
    return list(found.values())


def _entry(parameter: _Parameter, facts: Facts | None, rules: Sequence[Rule]) -> Entry:
    tensor, names = parameter.tensor, parameter.names
    name, shape = names[0], shape_of(tensor)
    if facts is None:
        module, owner = "", ""
        guess = _by_shape(tensor, shape)
    else:
        node, guess = _agree([(node, kinds.guess(facts, node, leaf, tensor)) for node, leaf in parameter.sites])
        node = kinds.owner_of(node)
        module, owner = node.name, node.kind
    matched = first_match(rules, names)
    if matched is not None and matched.changes_layout:
        guess = override(matched, name, tensor, shape, guess)
    if not tensor.requires_grad:
        guess = replace(guess, why=f"{guess.why}; frozen")
    blocks = _blocks(name, shape, guess, module)
    if tensor.is_complex():
        blocks = tuple(replace(block, complex=True) for block in blocks)
    lazy = nn.parameter.is_lazy(tensor)
    return Entry(name, tuple(names[1:]), shape, tensor.requires_grad, matched, blocks, guess.flattened, lazy, owner)


def _blocks(name: str, shape: tuple[int, ...], guess: Guess, module: str) -> tuple[Block, ...]:
    if guess.role.is_matrix and guess.layout is not None:
        return matrix_blocks(name, shape, guess.role, guess.layout, module, guess.why)
    return (plain_block(name, shape, guess.role, module, guess.why),)


def _agree(guesses: list[tuple[Node, Guess]]) -> tuple[Node, Guess]:
    """One guess for a parameter that several modules share: a table first, then whatever is no matrix."""
    order = sorted(guesses, key=lambda pair: (pair[1].role is not Role.EMBEDDING, pair[1].role.is_matrix))
    node, guess = order[0]
    others = list(dict.fromkeys(f"{n.name} ({n.kind})" for n, _ in guesses if n.name != node.name))
    if others:
        guess = replace(guess, why=f"{guess.why}; tied to {', '.join(others)}")
    return node, guess


def _by_shape(tensor: Tensor, shape: tuple[int, ...]) -> Guess:
    guess = kinds.unusable(tensor, shape)
    if guess is None and len(shape) == 2 and min(shape) > 1:
        guess = Guess(Role.MATRIX, "two sides above 1; pass the model to tell embeddings and heads", kinds.ROWS)
    guess = guess or raw(shape) or Guess(Role.OTHER, f"{len(shape)} axes of unknown meaning")
    return replace(guess, why=f"shape only: {guess.why}")
