"""Dense float64 references of convolutions in groups: each group as a convolution of its own."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from oracles.kfac import factors


def group_maps(conv: nn.Conv2d, x: Tensor, d: Tensor) -> list[tuple[Tensor, Tensor]]:
    """Patches [N, R, n] and output gradients [N, R, m / groups] of each group, cut out by channels."""
    found = []
    for xg, dg in zip(x.chunk(conv.groups, 1), d.chunk(conv.groups, 1), strict=True):
        assert isinstance(conv.padding, tuple)
        patches = F.unfold(xg, conv.kernel_size, conv.dilation, conv.padding, conv.stride).mT
        found.append((patches, dg.flatten(2).mT))
    return found


def grouped_factors(
    conv: nn.Conv2d, x: Tensor, columns: Sequence[Tensor], terms: int, approx: str
) -> tuple[Tensor, Tensor]:
    """A, the mean over groups, and B, one block for each group and a sum over the columns."""
    rights: list[Tensor] = []
    lefts: list[Tensor] = []
    for g in range(conv.groups):
        pairs = [factors(*group_maps(conv, x, d)[g], terms, approx, conv.bias is not None) for d in columns]
        rights.append(pairs[0][0])
        lefts.append(torch.stack([b for _, b in pairs]).sum(0))
    return torch.stack(rights).mean(0), torch.block_diag(*lefts)


def joint_matrix(weight: Tensor, bias: Tensor | None) -> Tensor:
    """``[W | b]`` of a convolution, with the weight as (out, rest)."""
    flat = weight.detach().flatten(1)
    return flat if bias is None else torch.cat([flat, bias.detach()[:, None]], 1)


def sample_gradients(net: nn.Module, conv: nn.Conv2d, x: Tensor, columns: Sequence[Tensor]) -> list[Tensor]:
    """``[W | b]`` gradients of every sample for every column of output gradients, by one pass for each."""
    wanted = [p for p in (conv.weight, conv.bias) if p is not None]
    found = []
    for i in range(len(x)):
        out = net(x[i : i + 1])
        for column in columns:
            grads = torch.autograd.grad(out, wanted, column[i : i + 1], retain_graph=True)
            found.append(joint_matrix(grads[0], grads[1] if len(grads) == 2 else None))
    return found


def free_roots(
    right: Tensor, left: Tensor, steps: int, project: Callable[[Tensor], Tensor], lam: float, rate: float, mu: float
) -> tuple[Tensor, Tensor]:
    """K and C of the inverse-free recursion for factors that stay as they are."""
    n, m = len(right), len(left)
    eye_n, eye_m = torch.eye(n).to(right), torch.eye(m).to(left)
    k, c, mk, mc = eye_n, eye_m, 0 * eye_n, 0 * eye_m
    for _ in range(steps):
        hk, hc = k.T @ right @ k, c.T @ left @ c
        mk = mu * mk + project(hc.trace() / m * hk + lam * (c.T @ c).trace() / m * k.T @ k - eye_n) / 2
        mc = mu * mc + project(hk.trace() / n * hc + lam * (k.T @ k).trace() / n * c.T @ c - eye_m) / 2
        k = k @ (eye_n - rate / max(1.0, float(mk.abs().sum(1).max())) * mk)
        c = c @ (eye_m - rate / max(1.0, float(mc.abs().sum(1).max())) * mc)
    return k, c
