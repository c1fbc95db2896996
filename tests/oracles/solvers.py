"""Dense float64 references for the solvers, from the formulas and nothing else."""

from __future__ import annotations

import torch
from torch import Tensor


def jacobian(function, theta: Tensor) -> Tensor:
    """``d function(theta) / d theta`` for a function of one flat vector, [n, P]."""
    return torch.autograd.functional.jacobian(lambda t: function(t).reshape(-1), theta)


def ggn(function, loss, theta: Tensor) -> Tensor:
    """``Jᵀ H J``: J of the outputs, H the Hessian of the loss by the outputs, both by autograd."""
    z = function(theta).detach()
    j = jacobian(function, theta)
    h = torch.autograd.functional.hessian(lambda flat: loss(flat.view_as(z)), z.reshape(-1))
    return j.T @ h @ j


def softmax_fisher(logits, theta: Tensor) -> Tensor:
    """``mean_x sum_y p(y|x) s sᵀ`` with ``s = grad log p(y|x)``: every label enumerated."""
    n, classes = logits(theta).shape
    p = logits(theta).softmax(-1).detach()
    total = torch.zeros(len(theta), len(theta), dtype=theta.dtype)
    for i in range(n):
        for y in range(classes):
            t = theta.clone().requires_grad_()
            (s,) = torch.autograd.grad(logits(t).log_softmax(-1)[i, y], t)
            total += p[i, y] * torch.outer(s, s) / n
    return total


def levenberg_marquardt(residual, theta: Tensor, lam: float, steps: int, diagonal: bool) -> list[tuple[Tensor, float]]:
    """Mean-square loss; one trial a step; rho > 1e-4 accepts, > 3/4 divides lam by 3, < 1/4 doubles it."""
    path = []
    for _ in range(steps):
        r, j = residual(theta), jacobian(residual, theta)
        n = len(r)
        g, big = 2 / n * j.T @ r, 2 / n * j.T @ j
        metric = torch.diag(big.diagonal()) if diagonal else torch.eye(len(theta), dtype=theta.dtype)
        d = -torch.linalg.solve(big + lam * metric, g)
        actual = r.square().mean() - residual(theta + d).square().mean()
        rho = (actual / -(g @ d + d @ big @ d / 2)).item()
        lam = lam * 2 if rho < 0.25 else lam / 3 if rho > 0.75 else lam
        theta = theta + d if rho > 1e-4 else theta
        path.append((theta, lam))
    return path


def bfgs_inverse(pairs: list[tuple[Tensor, Tensor]], start: float) -> Tensor:
    """The product form ``H <- V H Vᵀ + s sᵀ / s.y``, ``V = I - s yᵀ / s.y``, from ``start * I``, over the pairs."""
    n = len(pairs[0][0])
    eye = torch.eye(n, dtype=pairs[0][0].dtype)
    h = start * eye
    for s, y in pairs:
        v = eye - torch.outer(s, y) / (s @ y)
        h = v @ h @ v.T + torch.outer(s, s) / (s @ y)
    return h


def flat_function(model: torch.nn.Module, function):
    """``function(model)`` as a function of the flat vector of the model's trainable parameters."""
    named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]

    def of(theta: Tensor) -> Tensor:
        pieces = torch.split(theta, [p.numel() for _, p in named])
        values = {name: piece.view_as(p) for (name, p), piece in zip(named, pieces)}
        return torch.func.functional_call(_Call(model, function), {f"model.{k}": v for k, v in values.items()}, ())

    theta = torch.cat([p.detach().reshape(-1) for _, p in named])
    return of, theta


class _Call(torch.nn.Module):
    def __init__(self, model: torch.nn.Module, function) -> None:
        super().__init__()
        self.model, self.function = model, function

    def forward(self) -> Tensor:
        return self.function(self.model)
