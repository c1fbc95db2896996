"""How tests train: fixed streams of gradients, fed to any optimizer, and models made of bare tensors."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn


class Bag(nn.Module):
    """A model that is a list of tensors under given names; rules say what they are."""

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        super().__init__()
        for name, tensor in tensors.items():
            self.register_parameter(name, nn.Parameter(tensor.clone()))


def stream(shape: Sequence[int], seed: int = 0, pull: float = 0.3) -> Callable[[int, Tensor], Tensor]:
    """A gradient that depends on step and parameter: noise of that step and a pull towards zero.

    The noise is drawn in float64, so that every dtype sees the same numbers.
    """

    def grad(t: int, p: Tensor) -> Tensor:
        generator = torch.Generator().manual_seed(1000 * seed + t)
        noise = torch.randn(tuple(shape), generator=generator, dtype=torch.float64)
        return noise.to(p.dtype) + pull * p.detach()

    return grad


def train(
    opt: Any,
    params: Sequence[Tensor],
    grads: Sequence[Callable[[int, Tensor], Tensor]],
    steps: int,
    before: Callable[[int], object] | None = None,
    start: int = 1,
) -> list[list[Tensor]]:
    """Feed gradients for some steps; the path of every parameter."""
    paths: list[list[Tensor]] = [[] for _ in params]
    for t in range(start, start + steps):
        for p, grad in zip(params, grads):
            p.grad = grad(t, p)
        if before is not None:
            before(t)
        opt.step()
        for path, p in zip(paths, params):
            path.append(p.detach().clone())
    return paths


def far(path: Sequence[Tensor], reference: Sequence[Tensor]) -> float:
    """The largest difference of two paths, relative where the reference exceeds 1."""
    assert len(path) == len(reference)
    return max(
        float(((a.double() - b.double()) / b.double().abs().clamp(min=1)).abs().max()) for a, b in zip(path, reference)
    )
