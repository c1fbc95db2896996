"""Plain float64 references of PSGD for one tensor: dense factors, explicit inverses, one formula after another; frozen.

Each takes the start ``p`` and ``grad(t, p)`` with t = 1, 2, ... and returns the parameter after every step and the
factors that the last step left.
"""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass

import torch
from torch import Tensor

from oracles.elementwise import Grad

EPS = torch.finfo(torch.float64).eps


@dataclass(frozen=True)
class Numbers:
    """What the references share; ``fade`` and ``balance`` are the constants of the draws."""

    lr: float = 3e-4
    momentum: float = 0.9
    weight_decay: float = 0.1
    precond_lr: float = 0.1
    precond_init: float | None = None
    clip_rms: float | None = 1.1
    whiten: str = "gradient"
    update_probability: float = 0.03
    update_always: int = 500
    fade: float = 1e-3
    balance: float = 0.01
    seed: int = 0

    def rate(self, t: int) -> float:
        return max(self.precond_lr / (1 + t / 1e4) ** 0.5, self.precond_lr / 10)

    def fits(self, t: int) -> bool:
        late = math.exp(-self.fade * max(t - self.update_always, 0))
        return coin(self.seed, t, "fit") < max(late, self.update_probability)

    def balances(self, t: int) -> bool:
        return coin(self.seed, t, "balance") < self.balance

    def first(self, g: Tensor) -> float:
        return self.precond_init or float(((g**4).mean() + 1e-36) ** -0.125)

    def average(self, m: Tensor, g: Tensor, t: int) -> Tensor:
        b = min((t - 1) / t, self.momentum)
        return b * m + (1 - b) * g

    def step(self, p: Tensor, u: Tensor) -> Tensor:
        size = float(u.square().mean().sqrt())
        if self.clip_rms is not None and size > self.clip_rms:
            u = u * self.clip_rms / size
        if self.whiten == "momentum":
            u = u * ((1 - self.momentum) / (1 + self.momentum)) ** 0.5
        return p * (1 - self.lr * self.weight_decay) - self.lr * u


def hashed(text: str) -> int:
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=7).digest())


def coin(seed: int, t: int, salt: str) -> float:
    return hashed(f"{seed}/{t}/{salt}") / 2**56


def normals(shape: tuple[int, ...], key: str, t: int, salt: str = "psgd", seed: int = 0) -> Tensor:
    made = torch.Generator().manual_seed(hashed(f"{seed}/{key}/{t}/{salt}"))
    return torch.empty(shape).normal_(generator=made).double()


def spectral(a: Tensor) -> float:
    """1.1 times the growth in the last of three power iterations from the row of the largest sum, at most that sum."""
    sums = a.abs().sum(1)
    v = a[int(sums.argmax())]
    if not v.any():
        return 0.0
    growth = 0.0
    for _ in range(3):
        v = a @ (v / v.norm())
        growth = float(v.norm())
    return min(1.1 * growth, float(sums.max()))


def kron(
    p: Tensor, grad: Grad, steps: int, n: Numbers, *, key: str = "w", fit: str = "pro", dense: tuple[bool, bool]
) -> tuple[list[Tensor], list[Tensor]]:
    """A matrix with two factors; a diagonal one is a dense diagonal matrix here."""
    p, m, path = p.double().clone(), torch.zeros_like(p).double(), []
    q: list[Tensor] = []
    bound = [0.0, 0.0]
    for t in range(1, steps + 1):
        g = grad(t, p).double()
        m = n.average(m, g, t)
        h = m if n.whiten == "momentum" else g
        if t == 1:
            q = [n.first(h) ** 0.5 * torch.eye(d).double() for d in p.shape]
        if n.fits(t):
            if n.balances(t):
                tops = [float(x.abs().max()) for x in q]
                q = [x * (tops[0] * tops[1]) ** 0.5 / top for x, top in zip(q, tops)]
            noise = normals(tuple(p.shape), key, t)
            y = h + noise * (1e-9 + EPS * h.abs())
            terms = (pro_terms if fit == "pro" else triangular_terms)(q, y, noise)
            for i in (0, 1):
                plus, minus = terms[i]
                if not dense[i]:
                    plus, minus = torch.diag(plus.diagonal()), torch.diag(minus.diagonal())
                size = largest(plus, minus, dense[i], fit)
                bound[i] = max(0.9 * bound[i] + 0.1 * size, size)
                change = plus - minus if fit == "pro" else (plus - minus).triu()
                q[i] = q[i] - n.rate(t) / bound[i] * change @ q[i]
                if fit == "pro" and dense[i]:
                    q[i] = turned(q[i])
        left, right = (x.T @ x for x in q)
        p = n.step(p, left @ m @ right)
        path.append(p)
    return path, q


def pro_terms(q: list[Tensor], y: Tensor, noise: Tensor) -> list[tuple[Tensor, Tensor]]:
    w = q[0].T @ q[0] @ y @ q[1].T @ q[1]
    rows, columns = y.shape
    return [(w @ w.T, columns * torch.eye(rows).double()), (w.T @ w, rows * torch.eye(columns).double())]


def triangular_terms(q: list[Tensor], y: Tensor, noise: Tensor) -> list[tuple[Tensor, Tensor]]:
    a = q[0] @ y @ q[1].T
    b = torch.linalg.inv(q[0]).T @ noise @ torch.linalg.inv(q[1])
    return [(a @ a.T, b @ b.T), (a.T @ a, b.T @ b)]


def largest(plus: Tensor, minus: Tensor, dense: bool, fit: str) -> float:
    if fit == "pro":
        return (spectral(plus) if dense else float(plus.max())) + float(minus.max())
    return spectral(plus + minus) if dense else float((plus + minus).max())


def turned(q: Tensor) -> Tensor:
    r = q.T - q
    size = spectral(r)
    if size == 0:
        return q
    r = r / size
    slope, curve = float(torch.trace(r @ q)), float(torch.trace(r @ r @ q))
    a = min(-slope / curve, 0.125) if curve < 0 else 0.125
    return q + a * (r @ q + a / 2 * r @ r @ q)


def diagonal(p: Tensor, grad: Grad, steps: int, n: Numbers) -> tuple[list[Tensor], Tensor]:
    """A tensor with one number for each element; the noise by its variance."""
    p, m, path = p.double().clone(), torch.zeros_like(p).double(), []
    q, bound = torch.ones_like(m), 0.0
    for t in range(1, steps + 1):
        g = grad(t, p).double()
        m = n.average(m, g, t)
        h = m if n.whiten == "momentum" else g
        if t == 1:
            q = n.first(h) * q
        whitened = q**4 * (h**2 + 1e-18)
        size = float(whitened.max()) + 1
        bound = max(0.9 * bound + 0.1 * size, size)
        q = q - n.rate(t) / bound * (whitened - 1) * q
        p = n.step(p, q**2 * m)
        path.append(p)
    return path, q


def low_rank(
    p: Tensor, grad: Grad, steps: int, n: Numbers, rank: int, key: str = "w"
) -> tuple[list[Tensor], tuple[Tensor, Tensor, Tensor]]:
    """A tensor as one vector with Q = (I + U Vᵀ) diag(d); U and V as [numel, rank]."""
    shape, size = p.shape, p.numel()
    p, m, path = p.double().reshape(-1).clone(), torch.zeros(size).double(), []
    rank = min(rank, size)
    u, v = (normals((rank, size), key, 1, f"psgd/{name}").T for name in "uv")
    u, v = (x * 0.1**0.5 / x.norm() for x in (u, v))
    d, bounds, one = torch.ones(size).double(), [0.0, 0.0, 0.0], torch.eye(size).double()

    def follow(i: int, now: float) -> float:
        bounds[i] = max(0.9 * bounds[i] + 0.1 * now, now)
        return bounds[i]

    for t in range(1, steps + 1):
        g = grad(t, p.view(shape)).double().reshape(-1)
        m = n.average(m, g, t)
        target = m if n.whiten == "momentum" else g
        if t == 1:
            d = n.first(target) * d
        if n.fits(t):
            if n.balances(t):
                share = (u.norm() / v.norm()).sqrt()
                u, v = u / share, v * share
            z = normals((size,), key, t)
            h = target + z * (1e-9 + EPS * target.abs())
            q = (one + u @ v.T) @ torch.diag(d)
            a, b = q @ h, torch.linalg.solve(q.T, z)
            up, down = h * (q.T @ q @ h), z * torch.linalg.solve(q.T @ q, z)
            d = d - n.rate(t) / follow(0, float(up.abs().max() + down.abs().max())) * (up - down) * d
            outer = torch.outer(a, a) - torch.outer(b, b)
            if coin(n.seed, t, "side") < 0.5:
                now = a.norm() * (v @ (v.T @ a)).norm() + b.norm() * (v @ (v.T @ b)).norm()
                u = u - n.rate(t) / follow(1, float(now)) * outer @ v @ (torch.eye(rank).double() + v.T @ u)
            else:
                now = a.norm() * (u @ (u.T @ a)).norm() + b.norm() * (u @ (u.T @ b)).norm()
                v = v - n.rate(t) / follow(2, float(now)) * (one + v @ u.T) @ outer @ u
        q = (one + u @ v.T) @ torch.diag(d)
        p = n.step(p, q.T @ q @ m)
        path.append(p.view(shape))
    return path, (u, v, d)
