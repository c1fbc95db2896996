"""Trees of tensors and plain values as named tensors and JSON: what checkpoints and messages between ranks are made of.

Nothing here can run what it reads: JSON and safetensors hold data alone.
"""

from __future__ import annotations

import json
import math
from typing import Any

import torch
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors
from torch import Tensor

from guided_descent.bench.files import BenchError

SPLIT = (torch.complex128, torch.complex32)  # what safetensors does not know is stored as pairs of real numbers


class TreeError(BenchError):
    """A tree holds a value of another type; the message names it by its place."""


def encode(tree: Any, *, copy: bool = False) -> tuple[dict[str, Tensor], Any]:
    """Split a tree into named tensors on the CPU and a structure of JSON types.

    Tuples, dicts with other than plain string keys, tensors and numbers that are not finite become one-key objects
    ``{"$tuple": [...]}``, ``{"$dict": [[key, value], ...]}``, ``{"$tensor": name}``, ``{"$float": "nan"}``;
    ``{"$complex": name}`` is a tensor of pairs.

    Args:
        tree: Tensors, numbers, strings, None, and lists, tuples and dicts of these.
        copy: Whether the tensors must not share memory with those of the tree, which may go on to change.

    Example:
        >>> encode({"betas": (0.9, 0.99), 0: None})[1]
        {'$dict': [['betas', {'$tuple': [0.9, 0.99]}], [0, None]]}

    Raises:
        TreeError: A value of another type, named by its place in the tree.
    """
    tensors: dict[str, Tensor] = {}
    seen: set[int] = set()

    def store(value: Tensor) -> dict[str, str]:
        kind = "$complex" if value.dtype in SPLIT else "$tensor"
        plain = value.detach().resolve_conj().resolve_neg()
        stored = (torch.view_as_real(plain) if kind == "$complex" else plain).cpu().contiguous()
        place = stored.untyped_storage().data_ptr()
        shared = place == value.untyped_storage().data_ptr()
        if place in seen or stored.untyped_storage().nbytes() != stored.nbytes or (copy and shared):
            stored = stored.clone()  # safetensors refuses shared and partial storage
        seen.add(stored.untyped_storage().data_ptr())
        name = f"t{len(tensors)}"
        tensors[name] = stored
        return {kind: name}

    def walk(value: Any, place: str) -> Any:
        if isinstance(value, Tensor):
            return store(value)
        if isinstance(value, bool | int | str) or value is None:
            return value
        if isinstance(value, float):
            return float(value) if math.isfinite(value) else {"$float": repr(float(value))}
        if isinstance(value, dict):
            if all(isinstance(key, str) and not key.startswith("$") for key in value):
                return {key: walk(item, f"{place}.{key}") for key, item in value.items()}
            return {"$dict": [[walk(k, f"{place} key"), walk(v, f"{place}[{k!r}]")] for k, v in value.items()]}
        if isinstance(value, list | tuple):
            items = [walk(item, f"{place}[{i}]") for i, item in enumerate(value)]
            return items if isinstance(value, list) else {"$tuple": items}
        raise TreeError(
            f"{place.lstrip('.')} is a {type(value).__name__}; a checkpoint holds only tensors, numbers, strings, "
            "lists, tuples and dicts"
        )

    return tensors, walk(tree, "")


def decode(tensors: dict[str, Tensor], structure: Any) -> Any:
    """The tree that ``encode`` split."""
    if isinstance(structure, list):
        return [decode(tensors, item) for item in structure]
    if not isinstance(structure, dict):
        return structure
    if "$tensor" in structure:
        return tensors[structure["$tensor"]]
    if "$complex" in structure:
        return torch.view_as_complex(tensors[structure["$complex"]])
    if "$float" in structure:
        return float(structure["$float"])
    if "$tuple" in structure:
        return tuple(decode(tensors, item) for item in structure["$tuple"])
    if "$dict" in structure:
        return {decode(tensors, key): decode(tensors, value) for key, value in structure["$dict"]}
    return {key: decode(tensors, value) for key, value in structure.items()}


def same_bits(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors are bitwise equal, NaN and signed zeros included."""
    if a.dtype != b.dtype or a.shape != b.shape:
        return False
    return torch.equal(*(t.contiguous().reshape(-1).view(torch.uint8) for t in (a, b)))


def to_bytes(tree: Any) -> bytes:
    """A tree as one message; the first 8 bytes say how long the JSON before the tensors is.

    Example:
        >>> from_bytes(to_bytes({"loss": float("inf"), "w": torch.ones(2)}))
        {'loss': inf, 'w': tensor([1., 1.])}
    """
    tensors, structure = encode(tree)
    text = json.dumps(structure, allow_nan=False).encode()
    return len(text).to_bytes(8, "little") + text + save_tensors(tensors)


def from_bytes(data: bytes) -> Any:
    """The tree of a message."""
    start = 8 + int.from_bytes(data[:8], "little")
    return decode(load_tensors(data[start:]), json.loads(data[8:start]))
