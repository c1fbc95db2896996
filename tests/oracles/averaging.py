"""Plain float64 references of the methods that average their parameters, with every sequence kept by itself; frozen."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from oracles.adam_family import Rule, ema
from oracles.elementwise import Grad, Rate, at

Paths = dict[str, list[Tensor]]


def plain(t: int, g: Tensor, p: Tensor, memory: dict[str, Any]) -> Tensor:
    """The gradient."""
    return g


def normalised(beta2: float = 0.999, eps: float = 1e-8) -> Rule:
    """The gradient over the root of its corrected second moment."""

    def rule(t: int, g: Tensor, p: Tensor, memory: dict[str, Any]) -> Tensor:
        v = ema(memory, "v", beta2, g**2)
        return g / ((v / (1 - beta2**t)).sqrt() + eps)

    return rule


def rectified(beta2: float, t: int) -> float:
    """RAdam's factor; 0 while it has none."""
    limit = 2 / (1 - beta2) - 1
    rho = limit - 2 * t * beta2**t / (1 - beta2**t)
    if rho <= 4:
        return 0.0
    return float((((rho - 4) * (rho - 2) * limit) / ((limit - 4) * (limit - 2) * rho)) ** 0.5)


def schedule_free(
    p: Tensor,
    grad: Grad,
    steps: int,
    lr: Rate,
    rule: Rule = plain,
    beta: Rate = 0.9,
    weight_decay: float = 0.0,
    factor: Callable[[int], float] = lambda t: 1.0,
    r: float = 0.0,
    power: float = 2.0,
) -> Paths:
    """``z`` takes the steps of y, x is their weighted mean, and y lies between; ``factor`` is the warmup."""
    x, y, z = p.double(), p.double(), p.double()
    memory: dict[str, Any] = {}
    total = largest = 0.0
    paths: Paths = {"x": [], "y": [], "z": []}
    for t in range(1, steps + 1):
        rate = at(lr, t) * factor(t)
        u = rule(t, grad(t, y).double(), y, memory)
        z = z - rate * (u + weight_decay * y)
        largest = max(largest, rate)
        weight = t**r * largest**power
        total += weight
        c = weight / total if total > 0 else 0.0
        x = (1 - c) * x + c * z
        y = (1 - at(beta, t)) * z + at(beta, t) * x
        for name, value in (("x", x), ("y", y), ("z", z)):
            paths[name].append(value)
    return paths


def gpa(
    p: Tensor,
    grad: Grad,
    steps: int,
    lr: Rate,
    rule: Rule,
    mu_x: float,
    mu_y: float,
    weight_decay: float = 0.0,
    decay_at: str = "z",
) -> Paths:
    """An exponential mean of z, and y between both."""
    x, y, z = p.double(), p.double(), p.double()
    memory: dict[str, Any] = {}
    paths: Paths = {"x": [], "y": [], "z": []}
    for t in range(1, steps + 1):
        u = rule(t, grad(t, y).double(), y, memory)
        z = z - at(lr, t) * (u + weight_decay * (z if decay_at == "z" else y))
        x = mu_x * x + (1 - mu_x) * z
        y = mu_y * x + (1 - mu_y) * z
        for name, value in (("x", x), ("y", y), ("z", z)):
            paths[name].append(value)
    return paths


def lookahead(
    p: Tensor, grad: Grad, steps: int, lr: Rate, rule: Rule, k: int, alpha: float, weight_decay: float = 0.0
) -> Paths:
    """Fast weights of any rule, which return to the slow ones every k steps."""
    fast, slow = p.double(), p.double()
    memory: dict[str, Any] = {}
    paths: Paths = {"fast": [], "slow": []}
    for t in range(1, steps + 1):
        u = rule(t, grad(t, fast).double(), fast, memory)
        fast = fast * (1 - at(lr, t) * weight_decay) - at(lr, t) * u
        if t % k == 0:
            slow = slow + alpha * (fast - slow)
            fast = slow
        paths["fast"].append(fast)
        paths["slow"].append(slow)
    return paths


Loss = Callable[[int, list[Tensor]], Tensor]


def gradients(loss: Loss, t: int, tensors: list[Tensor]) -> list[Tensor]:
    """The gradient of the loss of batch t."""
    leaves = [p.detach().clone().requires_grad_() for p in tensors]
    return list(torch.autograd.grad(loss(t, leaves), leaves))


def sharpness_aware(
    start: list[Tensor], loss: Loss, steps: int, lr: float, rule: Rule, rho: float, eta: float | None = None
) -> list[list[Tensor]]:
    """Any rule with the gradient of the worst point nearby; with eta the neighbourhood follows the weights (ASAM)."""
    p = [tensor.double() for tensor in start]
    memories: list[dict[str, Any]] = [{} for _ in p]
    paths: list[list[Tensor]] = [[] for _ in p]
    for t in range(1, steps + 1):
        g = gradients(loss, t, p)
        scales = [torch.ones_like(w) if eta is None else w.abs() + eta for w in p]
        norm = torch.cat([(s * d).flatten() for s, d in zip(scales, g)]).norm() + 1e-12
        there = [w + rho * s**2 * d / norm for w, s, d in zip(p, scales, g)]
        g = gradients(loss, t, there)
        p = [w - lr * rule(t, d, w, m) for w, d, m in zip(p, g, memories)]
        for path, w in zip(paths, p):
            path.append(w)
    return paths


def exact_mars(
    start: list[Tensor], loss: Loss, steps: int, lr: float, inner: Rule, beta1: float, gamma: float
) -> list[list[Tensor]]:
    """MARS with the gradients of this batch at these and at the last parameters; vectors take the gradient itself."""
    p = [tensor.double() for tensor in start]
    last = list(p)
    memories: list[dict[str, Any]] = [{} for _ in p]
    paths: list[list[Tensor]] = [[] for _ in p]
    for t in range(1, steps + 1):
        now, then = gradients(loss, t, p), gradients(loss, t, last)
        new = []
        for w, g, before, memory in zip(p, now, then, memories):
            c = g + gamma * beta1 / (1 - beta1) * (g - before)
            c = c / max(float(c.norm()), 1.0)
            new.append(w - lr * inner(t, c if w.ndim > 1 else g, w, memory))
        last, p = p, new
        for path, w in zip(paths, p):
            path.append(w)
    return paths
