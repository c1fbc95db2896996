"""Layers: which modules own the blocks of a recipe that reads layers, and what cannot be read.

A weight is readable when every module that owns it is of a type whose statistics the capture layer knows. The bias of
such a layer joins its weight: one block ``[W | b]`` of two pieces, as a constant input of 1 makes of it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field

from torch import nn

from guided_descent.capture import supported, why_not
from guided_descent.routing import Block, Entry, canonical_name
from guided_descent.routing.roles import Piece

READABLE = ("linear", "embedding")


@dataclass(frozen=True)
class Layer:
    """The modules that own a weight.

    Attributes:
        names: Their full names; several where the weight is tied.
        modules: The modules.
        why: Why it cannot be read; empty where it can.
        bias: Canonical name of the bias that joins the weight, if any.
    """

    names: tuple[str, ...]
    modules: tuple[nn.Module, ...] = field(repr=False)
    why: str = ""
    bias: str | None = None


def find_layers(model: nn.Module) -> dict[str, Layer]:
    """The layer of each parameter that some module calls ``weight``, by the parameter's canonical name."""
    names = {id(p): canonical_name(name) for name, p in model.named_parameters()}
    owners: dict[str, list[tuple[str, nn.Module]]] = {}
    for name, module in model.named_modules():
        weight = module._parameters.get("weight")
        if weight is not None:
            owners.setdefault(names[id(weight)], []).append((canonical_name(name), module))
    found = {}
    for weight_name, members in owners.items():
        modules = tuple(module for _, module in members)
        bias = modules[0]._parameters.get("bias")
        weight = modules[0]._parameters["weight"]
        together = weight is not None and bias is not None and bias.requires_grad == weight.requires_grad
        found[weight_name] = Layer(
            tuple(name for name, _ in members),
            modules,
            next(filter(None, map(_unreadable, modules)), ""),
            names[id(bias)] if together and len(modules) == 1 else None,
        )
    return found


def _unreadable(module: nn.Module) -> str:
    """Why a module's statistics cannot be had; empty where they can."""
    why = why_not(module)
    if why:
        return why
    kind = type(module).__name__
    if supported(module) not in READABLE:
        return f"a {kind} has a gain for each channel and no matrix"
    return f"a {kind} in groups" if getattr(module, "groups", 1) != 1 else ""


def joined(entry: Entry, bias: str) -> tuple[Block, ...] | None:
    """The blocks of a weight with the bias as their last column; ``None`` where a block is no set of whole rows."""
    blocks = []
    for block in entry.blocks:
        [piece] = block.pieces
        if piece.perm is not None or len(block.shape) != 2 or len(piece.index) > 1:
            return None
        rows = block.shape[0]
        own = Piece(bias, (rows,), piece.index, wd_scale=0.0)
        blocks.append(dataclasses.replace(block, pieces=(piece, own), shape=(rows, block.shape[1] + 1)))
    return tuple(blocks)


def not_read(blocks: tuple[Block, ...], why: str) -> tuple[Block, ...]:
    """Blocks that say why they are not preconditioned."""
    return tuple(dataclasses.replace(block, why=f"{block.why}; not preconditioned: {why}") for block in blocks)


def watched(blocks: Mapping[str, tuple[Block, ...]], layers: Mapping[str, Layer]) -> dict[str, list[Block]]:
    """The blocks that each layer feeds, by the layer's name."""
    found: dict[str, list[Block]] = {}
    for weight, own in blocks.items():
        for name in layers[weight].names:
            found[name] = list(own)
    return found
