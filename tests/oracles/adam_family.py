"""Plain float64 references of the methods around Adam and of the layer-wise ones, from their formulas; frozen.

The arguments are those of ``elementwise``; the decay is ``p (1 - lr wd)`` before the step where nothing else is said.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from oracles.elementwise import Grad, Rate, at

Rule = Callable[[int, Tensor, Tensor, dict[str, Any]], Tensor]


def walk(p: Tensor, grad: Grad, steps: int, lr: Rate, rule: Rule, weight_decay: float = 0.0) -> list[Tensor]:
    """``p <- p (1 - lr wd) - lr u`` with the direction that a rule makes."""
    p, path, memory = p.double().clone(), [], {}
    for t in range(1, steps + 1):
        u = rule(t, grad(t, p).double(), p, memory)
        p = p * (1 - at(lr, t) * weight_decay) - at(lr, t) * u
        path.append(p)
    return path


def ema(memory: dict[str, Any], name: str, beta: float, x: Tensor) -> Tensor:
    """Advance an average."""
    memory[name] = beta * memory.get(name, 0.0) + (1 - beta) * x
    return memory[name]


def adam(betas: tuple[float, float] = (0.9, 0.999), eps: float = 1e-8) -> Rule:
    """The quotient of corrected moments."""

    def rule(t: int, g: Tensor, p: Tensor, memory: dict[str, Any]) -> Tensor:
        m, v = ema(memory, "m", betas[0], g), ema(memory, "v", betas[1], g**2)
        return (m / (1 - betas[0] ** t)) / ((v / (1 - betas[1] ** t)).sqrt() + eps)

    return rule


def adabelief(betas: tuple[float, float] = (0.9, 0.999), eps: float = 1e-16) -> Rule:
    """Squared distances from the new average; eps joins the average in every step."""

    def rule(t: int, g: Tensor, p: Tensor, memory: dict[str, Any]) -> Tensor:
        m = ema(memory, "m", betas[0], g)
        v = memory["v"] = betas[1] * memory.get("v", 0.0) + (1 - betas[1]) * (g - m) ** 2 + eps
        return (m / (1 - betas[0] ** t)) / ((v / (1 - betas[1] ** t)).sqrt() + eps)

    return rule


def yogi(betas: tuple[float, float] = (0.9, 0.999), eps: float = 1e-3, start: float = 1e-6) -> Rule:
    """The second moment begins at ``start`` and moves by the sign of its distance from the square."""

    def rule(t: int, g: Tensor, p: Tensor, memory: dict[str, Any]) -> Tensor:
        m = ema(memory, "m", betas[0], g)
        v = memory.get("v", torch.full_like(g, start))
        v = memory["v"] = v - (1 - betas[1]) * torch.sign(v - g**2) * g**2
        return (m / (1 - betas[0] ** t)) / ((v / (1 - betas[1] ** t)).sqrt() + eps)

    return rule


def laprop(betas: tuple[float, float] = (0.9, 0.999), eps: float = 1e-15) -> Rule:
    """An average of quotients."""

    def rule(t: int, g: Tensor, p: Tensor, memory: dict[str, Any]) -> Tensor:
        v = ema(memory, "v", betas[1], g**2)
        return ema(memory, "m", betas[0], g / ((v / (1 - betas[1] ** t)).sqrt() + eps)) / (1 - betas[0] ** t)

    return rule


def adam_atan2(betas: tuple[float, float] = (0.9, 0.999), a: float = 4 / math.pi, b: float = 1.0) -> Rule:
    """An angle."""

    def rule(t: int, g: Tensor, p: Tensor, memory: dict[str, Any]) -> Tensor:
        m, v = ema(memory, "m", betas[0], g), ema(memory, "v", betas[1], g**2)
        return a * torch.atan2(m / (1 - betas[0] ** t), b * (v / (1 - betas[1] ** t)).sqrt())

    return rule


def grams(betas: tuple[float, float] = (0.9, 0.999), eps: float = 1e-8) -> Rule:
    """Adam's sizes, the gradient's signs."""
    inner = adam(betas, eps)
    return lambda t, g, p, memory: inner(t, g, p, memory).abs() * torch.sign(g)


def cautious(inner: Rule, floor: float = 1e-3) -> Rule:
    """What agrees with the gradient, over the share of it."""

    def rule(t: int, g: Tensor, p: Tensor, memory: dict[str, Any]) -> Tensor:
        u = inner(t, g, p, memory)
        mask = (u * g > 0).double()
        return u * mask / max(float(mask.mean()), floor)

    return rule


def lars(
    eta: float = 1e-3, momentum: float = 0.9, weight_decay: float = 0.0, eps: float = 0.0, clip: float | None = None
) -> Rule:
    """Coupled decay; the first buffer is the first scaled gradient; ``clip`` is the learning rate, or none."""

    def rule(t: int, g: Tensor, p: Tensor, memory: dict[str, Any]) -> Tensor:
        weight, length = float(p.norm()), float(g.norm())
        ratio = eta * weight / (length + weight_decay * weight + eps) if weight and length else None
        if clip is not None and ratio is not None:
            ratio = min(ratio / clip, 1.0)
        memory["b"] = momentum * memory.get("b", 0.0) + (1.0 if ratio is None else ratio) * (g + weight_decay * p)
        return memory["b"]

    return rule


def lamb(
    betas: tuple[float, float] = (0.9, 0.999), eps: float = 1e-6, weight_decay: float = 0.01, clip: bool = False
) -> Rule:
    """The decay is in the direction, before the ratio."""
    inner = adam(betas, eps)

    def rule(t: int, g: Tensor, p: Tensor, memory: dict[str, Any]) -> Tensor:
        u = inner(t, g, p, memory) + weight_decay * p
        weight, length = float(p.norm()), float(u.norm())
        ratio = weight / length if weight and length else 1.0
        return (min(ratio, 1.0) if clip else ratio) * u

    return rule


def novograd(betas: tuple[float, float] = (0.95, 0.98), eps: float = 1e-8, weight_decay: float = 0.0) -> Rule:
    """One second moment for the tensor, the first being the first square; sums of normalised gradients and decays."""

    def rule(t: int, g: Tensor, p: Tensor, memory: dict[str, Any]) -> Tensor:
        square = float((g**2).sum())
        memory["v"] = square if t == 1 else betas[1] * memory["v"] + (1 - betas[1]) * square
        memory["m"] = betas[0] * memory.get("m", 0.0) + g / (math.sqrt(memory["v"]) + eps) + weight_decay * p
        return memory["m"]

    return rule


def adopt(betas: tuple[float, float] = (0.9, 0.9999), eps: float = 1e-6, exponent: float = 0.25) -> Rule:
    """The old second moment divides; nothing moves at first. Without decay: the first step has none either."""

    def rule(t: int, g: Tensor, p: Tensor, memory: dict[str, Any]) -> Tensor:
        if t == 1:
            memory["v"] = g**2
            return torch.zeros_like(g)
        n = (g / memory["v"].sqrt().clamp(min=eps)).clamp(-((t - 1) ** exponent), (t - 1) ** exponent)
        memory["v"] = betas[1] * memory["v"] + (1 - betas[1]) * g**2
        return ema(memory, "m", betas[0], n)

    return rule


def ademamix(
    betas: tuple[float, float, float] = (0.9, 0.999, 0.9999), eps: float = 1e-8, alpha: float = 8.0, warmup: int = 0
) -> Rule:
    """The slow momentum is not corrected; its weight and memory rise over the warmup."""

    def half(b: float) -> float:
        return math.log(0.5) / math.log(b + 1e-8) - 1

    def rule(t: int, g: Tensor, p: Tensor, memory: dict[str, Any]) -> Tensor:
        share = min(t / warmup, 1.0) if warmup else 1.0
        slow = betas[2]
        if share < 1:
            slow = 0.5 ** (1 / ((1 - share) * half(betas[0]) + share * half(betas[2]) + 1))
        m1, m2 = ema(memory, "m1", betas[0], g), ema(memory, "m2", slow, g)
        v = ema(memory, "v", betas[1], g**2)
        return (m1 / (1 - betas[0] ** t) + alpha * share * m2) / ((v / (1 - betas[1] ** t)).sqrt() + eps)

    return rule


def adan(betas: tuple[float, float, float] = (0.98, 0.92, 0.99), eps: float = 1e-8) -> Rule:
    """Moments of the gradient, of its change (0 at first) and of both."""

    def rule(t: int, g: Tensor, p: Tensor, memory: dict[str, Any]) -> Tensor:
        d = g - memory.get("g", g)
        memory["g"] = g
        m, q = ema(memory, "m", betas[0], g), ema(memory, "q", betas[1], d)
        n = ema(memory, "n", betas[2], (g + betas[1] * d) ** 2)
        top = m / (1 - betas[0] ** t) + betas[1] * q / (1 - betas[1] ** t)
        return top / ((n / (1 - betas[2] ** t)).sqrt() + eps)

    return rule


def mars(betas: tuple[float, float] = (0.95, 0.99), eps: float = 1e-8, gamma: float = 0.025) -> Rule:
    """Adam with the corrected gradient, clipped to norm 1."""
    inner = adam(betas, eps)

    def rule(t: int, g: Tensor, p: Tensor, memory: dict[str, Any]) -> Tensor:
        c = g + gamma * betas[0] / (1 - betas[0]) * (g - memory.get("g", g))
        memory["g"] = g
        return inner(t, c / max(float(c.norm()), 1.0), p, memory)

    return rule
