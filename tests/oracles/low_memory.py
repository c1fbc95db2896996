"""Plain float64 references of the methods with little memory, from their formulas; frozen.

The rules are those of ``adam_family.walk``; nothing here is factored or projected in place: moments of rank one are
made as whole tensors, cells are a number for each element, covers are looked at element by element.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from oracles.adam_family import Rule, adam, ema

Pair = tuple[int, int] | None


def rank_one(memory: dict[str, Any], name: str, squares: Tensor, axes: tuple[int, int], gain: float) -> Tensor:
    """Averages of row and column means, and R_i C_j / mean(R) as a whole tensor."""
    moved = squares.movedim(axes, (-2, -1))
    for side, axis in (("R", -1), ("C", -2)):
        mean, old = moved.mean(axis), memory.get(name + side, torch.zeros(()))
        memory[name + side] = (1 - gain) * old + gain * mean
    r, c = memory[name + "R"], memory[name + "C"]
    v = r[..., :, None] * c[..., None, :] / r.mean(-1)[..., None, None]
    return v.movedim((-2, -1), axes)


def quotient(memory: dict[str, Any], g: Tensor, axes: Pair, gain: float, eps: float) -> Tensor:
    """g / sqrt(v), v of rank one or whole."""
    squares = g**2 + eps
    if axes is not None:
        return g / rank_one(memory, "v", squares, axes, gain).sqrt()
    memory["v"] = (1 - gain) * memory.get("v", 0.0) + gain * squares
    return g / memory["v"].sqrt()


def rms(x: Tensor) -> float:
    """Root mean square."""
    return float((x**2).mean().sqrt())


def adafactor(
    axes: Pair,
    lr: float,
    *,
    decay: float = -0.8,
    cap: float = 1.0,
    eps: tuple[float, float] = (1e-30, 1e-3),
    d: float | None = 1.0,
    beta1: float = 0.0,
    relative: bool = True,
    parameter: bool = True,
) -> Rule:
    """u over its own size, times the size of p, at min(lr, 1 / sqrt(t)); ``lr`` is that of the walk."""

    def rule(t: int, g: Tensor, p: Tensor, memory: dict[str, Any]) -> Tensor:
        beta2 = min(1 - t**decay, cap)
        u = quotient(memory, g, axes, 1 - beta2, eps[0])
        if d is not None:
            u = u / max(1.0, rms(u) / d)
        if parameter:
            u = u * max(eps[1], rms(p))
        if relative:
            u = u * min(lr, 1 / math.sqrt(t)) / lr
        return ema(memory, "m", beta1, u) if beta1 else u

    return rule


def came(
    axes: Pair,
    betas: tuple[float, float, float] = (0.9, 0.999, 0.9999),
    eps: tuple[float, float] = (1e-30, 1e-16),
    d: float | None = 1.0,
) -> Rule:
    """m / sqrt(S), S of rank one; m alone where nothing is factored."""

    def rule(t: int, g: Tensor, p: Tensor, memory: dict[str, Any]) -> Tensor:
        u = quotient(memory, g, axes, 1 - betas[1], eps[0])
        if d is not None:
            u = u / max(1.0, rms(u) / d)
        m = ema(memory, "m", betas[0], u)
        if axes is None:
            return m
        return m / rank_one(memory, "s", (u - m) ** 2 + eps[1], axes, 1 - betas[2]).sqrt()

    return rule


def sm3(eps: float = 1e-10, momentum: float = 0.0) -> Rule:
    """The least of an element's covers plus its square; the covers become the largest of what they cover."""

    def rule(t: int, g: Tensor, p: Tensor, memory: dict[str, Any]) -> Tensor:
        old = memory.get("covers", [[0.0] * side for side in g.shape])
        new = [[0.0] * side for side in g.shape]
        u = torch.empty_like(g)
        for place in itertools.product(*map(range, g.shape)):
            v = min(old[axis][i] for axis, i in enumerate(place)) + float(g[place]) ** 2
            u[place] = float(g[place]) / (math.sqrt(v) + eps)
            for axis, i in enumerate(place):
                new[axis][i] = max(new[axis][i], v)
        memory["covers"] = new
        return ema(memory, "m", momentum, u) if momentum else u

    return rule


def adam_mini(cell: Tensor, betas: tuple[float, float] = (0.9, 0.999), eps: float = 1e-8) -> Rule:
    """Adam with the mean square of each cell; ``cell`` holds the number of every element's cell."""

    def rule(t: int, g: Tensor, p: Tensor, memory: dict[str, Any]) -> Tensor:
        mean = torch.empty_like(g)
        for number in cell.unique():
            mean[cell == number] = (g[cell == number] ** 2).mean()
        m, v = ema(memory, "m", betas[0], g), ema(memory, "v", betas[1], mean)
        return (m / (1 - betas[0] ** t)) / ((v / (1 - betas[1] ** t)).sqrt() + eps)

    return rule


# -- projections -------------------------------------------------------------------------------------------------------


def subspace(g: Tensor, k: int, old: Tensor | None, method: str) -> Tensor:
    """k columns: the left singular vectors of g, or one orthogonal iteration; with the signs nearer to the old ones."""
    if method == "qr" and old is not None:
        new = torch.linalg.qr(g @ g.T @ old).Q
    else:
        new = torch.linalg.svd(g, full_matrices=False).U[:, :k]
    if old is None:
        return new
    return torch.stack([a if float(a @ b) >= 0 else -a for a, b in zip(new.T, old.T)], 1)


def galore(
    k: int,
    gap: int,
    *,
    left: bool | None = None,
    scale: float = 0.25,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    method: str = "eigh",
    carry: str = "keep",
    fira: float | None = None,
) -> Rule:
    """Adam in the subspace of the last gradient with t = 1, gap + 1, ...; ``fira``, a growth, adds the residual."""
    inner = adam(betas, eps)

    def rule(t: int, g: Tensor, p: Tensor, memory: dict[str, Any]) -> Tensor:
        turned = not (g.shape[0] <= g.shape[1] if left is None else left)
        g = g.T if turned else g
        moments = memory.setdefault("inner", {})
        if (t - 1) % gap == 0:
            old = memory.get("P")
            memory["P"] = subspace(g, k, old, method)
            if old is not None and carry != "keep":
                turn = memory["P"].T @ old * (carry == "rotate")
                moments["m"], moments["v"] = turn @ moments["m"], turn**2 @ moments["v"]
        basis = memory["P"]
        low = basis.T @ g
        top = inner(t, low, low, moments)
        u = scale * basis @ top
        if fira is not None:
            rest = (g - basis @ low) * (top.norm(dim=0) / low.norm(dim=0))
            last = memory.get("last")
            if last is not None and rest.norm() > fira * last:
                rest = rest * (fira * last / rest.norm())
            memory["last"] = float(rest.norm())
            u = u + rest
        return u.T if turned else u

    return rule


def apollo(
    draw: Callable[[int], Tensor],
    gap: int,
    *,
    left: bool | None = None,
    channel: bool = True,
    scale: float = 1.0,
    growth: float | None = 1.01,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
) -> Rule:
    """The gradient at the lengths of Adam on P g; ``draw(number)`` gives P [k, d]."""
    inner = adam(betas, eps)

    def rule(t: int, g: Tensor, p: Tensor, memory: dict[str, Any]) -> Tensor:
        turned = not (g.shape[0] <= g.shape[1] if left is None else left)
        g = g.T if turned else g
        low = draw((t - 1) // gap) @ g
        top = inner(t, low, low, memory.setdefault("inner", {}))
        ratio = top.norm(dim=0) / low.norm(dim=0) if channel else top.norm() / low.norm()
        u = math.sqrt(scale) * ratio * g
        last = memory.get("last")
        if growth is not None and last is not None and u.norm() > growth * last:
            u = u * (growth * last / u.norm())
        memory["last"] = float(u.norm())
        return u.T if turned else u

    return rule
