"""Plain float64 references of clipping: what becomes of the gradients of one step, with a memory between steps; frozen.

Each takes the gradients and weights of a step by name, and a memory that it may write, and returns new gradients.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

Grads = dict[str, Tensor]


def global_norm(grads: Grads) -> float:
    """Over all elements of all tensors."""
    return math.sqrt(sum(float(v) ** 2 for g in grads.values() for v in g.double().flatten()))


def norm(grads: Grads, weights: Grads, memory: dict[str, Any], bound: float) -> Grads:
    """g min(1, c / (n + 1e-6))."""
    c = min(1.0, bound / (global_norm(grads) + 1e-6))
    return {name: g * c for name, g in grads.items()}


def each(grads: Grads, weights: Grads, memory: dict[str, Any], bound: float) -> Grads:
    """The same with the norm of each tensor."""
    return {name: g * min(1.0, bound / (float(g.norm()) + 1e-6)) for name, g in grads.items()}


def value(grads: Grads, weights: Grads, memory: dict[str, Any], bound: float) -> Grads:
    """Elements into [-c, c]."""
    return {name: g.clip(-bound, bound) for name, g in grads.items()}


def agc(grads: Grads, weights: Grads, memory: dict[str, Any], lam: float, floor: float = 1e-3) -> Grads:
    """Rows, or whole vectors: where |g| > lam max(|w|, floor), g lam max(|w|, floor) / max(|g|, 1e-6)."""

    def cut(g: Tensor, w: Tensor) -> Tensor:
        bound = lam * max(float(w.norm()), floor)
        return g * bound / max(float(g.norm()), 1e-6) if float(g.norm()) > bound else g

    found = {}
    for name, g in grads.items():
        w = weights[name].double()
        found[name] = cut(g, w) if g.ndim < 2 else torch.stack([cut(a, b) for a, b in zip(g, w)])
    return found


def centralize(grads: Grads, weights: Grads, memory: dict[str, Any]) -> Grads:
    """Rows minus their mean; vectors stay."""
    return {n: g if g.ndim < 2 else torch.stack([row - row.mean() for row in g]) for n, g in grads.items()}


def zclip(
    grads: Grads, weights: Grads, memory: dict[str, Any], z_max: float, beta: float, most: float, warmup: int
) -> Grads:
    """A list of norms at first; then mean and variance that move."""
    n = global_norm(grads)
    if len(memory.setdefault("norms", [])) < warmup:
        memory["norms"].append(n)
        norms = memory["norms"]
        memory["mean"] = sum(norms) / len(norms)
        memory["var"] = sum((x - memory["mean"]) ** 2 for x in norms) / len(norms)
        bound = most
    else:
        mean, std = memory["mean"], math.sqrt(memory["var"])
        z = (n - mean) / (std + 1e-6)
        bound = min(mean + z_max**2 * std / z, most) if z > z_max else most
        used = min(n, bound)
        memory["mean"] = beta * mean + (1 - beta) * used
        memory["var"] = beta * memory["var"] + (1 - beta) * (used - memory["mean"]) ** 2
    c = min(1.0, bound / (n + 1e-6))
    return {name: g * c for name, g in grads.items()}


def adagc(
    grads: Grads, weights: Grads, memory: dict[str, Any], rel: float, beta: float, most: float, warmup: int
) -> Grads:
    """Global clipping and running minima at first; then bounds of each tensor's own."""
    memory["t"] = memory.get("t", 0) + 1
    c = min(1.0, most / (global_norm(grads) + 1e-6))
    found = {}
    for name, g in grads.items():
        if memory["t"] <= warmup:
            found[name] = g * c
            memory[name] = min(memory.get(name, math.inf), float(found[name].norm()))
        else:
            found[name] = g * min(1.0, rel * memory[name] / float(g.norm()))
            memory[name] = beta * memory[name] + (1 - beta) * float(found[name].norm())
    return found
