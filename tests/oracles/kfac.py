"""Dense float64 references of the K-FAC family, and a bed on which its parts are driven by hand."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from guided_descent.capture import LayerIO
from guided_descent.linalg.workspace import Workspace
from guided_descent.parts.base import Batch, Part
from guided_descent.parts.rows import Rows
from guided_descent.routing.roles import Block, Piece, Role


def numbers(**more: Any) -> dict[str, Any]:
    """Group numbers that every part of the family finds."""
    return {
        "lr": 1.0,
        "damping": 1e-2,
        "factor_decay": 0.95,
        "factor_frequency": 1,
        "approx": "expand",
        "fisher": "exact",
        "refresh_method": "eigh",
        "product_dtype": "float32",
        "precondition_frequency": 10,
        "refresh_schedule": "every",
        "refresh_tolerance": 0.0,
        "refresh_lag": 0,
        "second_moment": "rotate",
        "kl_clip": 1e-3,
        "weight_decay": 0.0,
        "factor_lr": 0.1,
        "factor_momentum": 0.5,
        "gamma": 0.99,
        "damping_interval": 5,
        "damping_omega": 0.95,
    } | more


def block(m: int, n: int, key: str = "w", role: Role = Role.MATRIX) -> Block:
    """A matrix block of one piece."""
    return Block(key, (Piece(key, (m, n)),), (m, n), role)


def layer(a: Tensor, d: Tensor | None, terms: int, **more: Any) -> LayerIO:
    """What a linear layer saw: a [N, R, n], d [N, R, m]; an embedding's rows are int64 [N, R]."""
    kind = "linear" if a.is_floating_point() else "embedding"
    plain: dict[str, Any] = {"bias": False, "fresh": True, "groups": 1, "inputs": a.shape[-1]}
    return LayerIO(kind=kind, a=a, d=d, terms=terms, **plain | more)


class Bed:
    """Equal blocks, their stacked state and one part, driven as the engine does."""

    def __init__(self, part: Part, blocks: Sequence[Block], h: dict[str, Any], dtype: torch.dtype = torch.float64):
        self.part, self.blocks, self.h, self.dtype = part, tuple(blocks), h, dtype
        self.state: dict[str, Any] = {}
        for name, slot in part.slots(blocks[0]).items():
            shape = {
                "factor": (len(blocks), *slot.shape),
                "group": slot.shape,
                "param": (len(blocks), *blocks[0].shape),
            }
            made = torch.full(shape[slot.layout], slot.fill, dtype=slot.dtype or dtype)
            self.state[name] = Rows(list(made.unbind()), made) if slot.layout == "param" else made
        self.seen: list[dict[str, Tensor]] = [{} for _ in blocks]
        self.step, self.passes, self.work = 0, 0, Workspace()

    def capture(self, *layers: LayerIO | None) -> None:
        """One backward pass: what each block's layer saw."""
        self.passes += 1
        for row, io in enumerate(layers):
            if io is not None:
                own = {
                    name: value[row] for name, value in self.state.items() if isinstance(value, Tensor) and value.ndim
                }
                self.part.observe(self.seen[row], io, own, self.blocks[row], self.h)

    def batch(self, g: Tensor, p: Tensor | None = None) -> Batch:
        """The view of the next update."""
        shapes = {name: value for row in self.seen for name, value in row.items()}
        seen = {
            name: torch.stack([row.get(name, torch.zeros_like(like)) for row in self.seen])
            for name, like in shapes.items()
        }
        if seen:
            seen["count"] = torch.full((len(self.blocks),), float(self.passes), dtype=torch.float64)
            seen["count"] *= torch.tensor([bool(row) for row in self.seen])
        self.seen, self.passes = [{} for _ in self.blocks], 0
        self.step += 1
        p = torch.zeros_like(g) if p is None else p

        def scratch(tag: str) -> Rows:
            made = self.work.take(tag, g.shape, self.dtype, g.device)
            return Rows(list(made.unbind()), made)

        return Batch(
            g=Rows(list(g.unbind()), g),
            p=lambda: Rows(list(p.unbind()), p),
            blocks=self.blocks,
            scratch=scratch,
            step=float(self.step),
            first=self.step == 1,
            work=self.work,
            seen=seen or None,
        )

    def update(self, g: Tensor) -> Tensor:
        """The direction that the part makes of gradients [B, m, n]; the batch is kept as ``x``."""
        self.x = x = self.batch(g)
        self.part.update(x, self.state, self.h, {})
        return x.read().whole.clone()

    def refresh(self) -> None:
        """All tasks at once."""
        for task in self.part.tasks(self.blocks[0]):
            found = self.part.solve(self.part.inputs(task, self.state, self.h), self.h)
            self.part.land(self.x, self.state, self.h, task, found)


# -- dense references --------------------------------------------------------------------------------------------------


def factors(a: Tensor, d: Tensor, terms: int, approx: str = "expand", bias: bool = False) -> tuple[Tensor, Tensor]:
    """A and B of a shared linear layer by their definitions, sample by sample."""
    if bias:
        a = torch.cat([a, torch.ones(*a.shape[:-1], 1, dtype=a.dtype)], -1)
    n, r = a.shape[:2]
    big_a, big_b = torch.zeros(a.shape[-1], a.shape[-1]).double(), torch.zeros(d.shape[-1], d.shape[-1]).double()
    for i in range(n):
        if approx == "reduce":
            big_a += torch.outer(a[i].mean(0), a[i].mean(0)) / n
            big_b += torch.outer(d[i].sum(0), d[i].sum(0)) / terms
        else:
            for j in range(r):
                big_a += torch.outer(a[i, j], a[i, j]) / (n * r)
                big_b += torch.outer(d[i, j], d[i, j]) / terms
    return big_a, big_b


def damped_solve(curvature: Tensor, g: Tensor, lam: float) -> Tensor:
    """``(C + lam I)^-1 vec(G)``, row-major, as a matrix."""
    return torch.linalg.solve(curvature + lam * torch.eye(len(curvature)).double(), g.reshape(-1)).view(g.shape)


def fisher_block(a: Tensor, d: Tensor, terms: int) -> Tensor:
    """``sum_n vec(g_n) vec(g_n)^T / T`` with ``g_n = sum_r d_r a_r^T``, row-major."""
    g = torch.einsum("nro,nri->noi", d, a).flatten(1)
    return g.T @ g / terms


def jacobian(net: nn.Module, x: Tensor, names: Sequence[str]) -> Tensor:
    """Jacobian of every output of every sample with respect to some parameters, side by side [N, outputs, P]."""
    params = {name: p.detach() for name, p in net.named_parameters()}

    def one(chosen: dict[str, Tensor], sample: Tensor) -> Tensor:
        return torch.func.functional_call(net, params | chosen, (sample[None],)).flatten()

    found = torch.func.vmap(torch.func.jacrev(one), (None, 0))({name: params[name] for name in names}, x)
    return torch.cat([found[name].flatten(2) for name in names], 2)


def joint_order(m: int, n: int) -> Tensor:
    """Where the elements of ``[W | b]``, row-major, are in ``(vec W, b)``."""
    weight, bias = torch.arange(m * n).view(m, n), m * n + torch.arange(m)
    return torch.cat([weight, bias[:, None]], 1).flatten()


def traced(
    net: nn.Sequential, x: Tensor, seeds: Callable[[Tensor], Sequence[Tensor]]
) -> dict[str, tuple[Tensor, list[Tensor]]]:
    """Input and output gradients of every linear or convolution layer of a sequence, for each seed of the output."""
    kept: dict[str, tuple[Tensor, Tensor]] = {}
    value = x
    for name, module in net.named_children():
        before, value = value, module(value)
        if isinstance(module, nn.Linear | nn.Conv2d):
            kept[name] = (before.detach(), value)
    found = {name: (before, list[Tensor]()) for name, (before, _) in kept.items()}
    for seed in seeds(value.detach()):
        grads = torch.autograd.grad(value, [out for _, out in kept.values()], seed, retain_graph=True)
        for name, grad in zip(kept, grads):
            found[name][1].append(grad)
    return found
