"""Layers: which modules own the blocks of a recipe that reads layers, and what cannot be read.

A weight is readable when every module that owns it is of a type whose statistics the capture layer knows. The bias of
such a layer joins its weight: one block ``[W | b]`` of two pieces, as a constant input of 1 makes of it. A convolution
in groups is one block too: its weight ``[out, in / groups, *kernel]`` is the matrix of all outputs, which takes the
patches of every group as inputs and couples no gradients of different groups.
"""

from __future__ import annotations

import dataclasses
import math
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
        groups: Whether it is a convolution in groups.
    """

    names: tuple[str, ...]
    modules: tuple[nn.Module, ...] = field(repr=False)
    why: str = ""
    bias: str | None = None
    groups: bool = False


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
            any(getattr(module, "groups", 1) != 1 for module in modules),
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
    return ""


def undivided(entry: Entry, layer: Layer) -> Entry | None:
    """The weight of a convolution in groups as one matrix ``[out, in / groups * kernel]``; ``None`` for any other.

    Routing makes a stack of it, a matrix for each group, which is what a recipe wants that looks at gradients alone.
    """
    if not layer.groups or layer.why or len(entry.blocks) != 1 or len(entry.shape) < 3:
        return None
    [block] = entry.blocks
    [piece] = block.pieces
    if piece.index or piece.perm is not None:
        return None
    matrix = dataclasses.replace(block, shape=(entry.shape[0], math.prod(entry.shape[1:])))
    return dataclasses.replace(entry, blocks=(matrix,))


def why_not_read(entry: Entry, layer: Layer | None) -> str:
    """Why a recipe that reads layers cannot take a weight; empty where it can."""
    if layer is None:
        return "it is the weight of no layer"
    if layer.why:
        return layer.why
    if any(len(block.shape) != 2 for block in entry.blocks):
        return "its blocks are stacks, and a layer has one matrix"
    pieces = [piece for block in entry.blocks for piece in block.pieces]
    if any(piece.perm is not None for piece in pieces):
        return "its block is turned, and a layer's rows are its outputs"
    if layer.groups and any(piece.index for piece in pieces):
        return "a convolution in groups that a rule has split: its parts are no layers of their own"
    return ""


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
