"""A least-squares task and torch's optimizers, small enough to train in milliseconds: stand-ins for the bench tests."""

from __future__ import annotations

import torch
from torch import nn

from guided_descent.bench.problem import Problem
from guided_descent.bench.store import OptimizerSpec

REF = "small:make"
OPTIMIZERS = {
    "adamw": torch.optim.AdamW,
    "nadamw": lambda p, **h: torch.optim.NAdam(p, decoupled_weight_decay=True, **h),
    "sgd": torch.optim.SGD,
}
DEFAULT_LR = {"adamw": 1e-2, "nadamw": 2e-2, "sgd": 1e-2}


def make(seed: int) -> Problem:
    """Recover a planted linear map; the weights depend on the seed, the data does not."""
    data = torch.Generator().manual_seed(7)
    x = torch.randn(64, 8, generator=data)
    y = x @ torch.randn(8, 2, generator=data) + 0.1 * torch.randn(64, 2, generator=data)
    return Problem(
        model=nn.Linear(8, 2),
        loss=lambda model, rows: (model(x[rows]) - y[rows]).square().mean(),
        batches=lambda step: torch.arange(16) + 16 * (step % 4),
        evaluate=lambda model: {"error": (model(x) - y).square().mean().item()},
        steps=40,
        metric="error",
        eval_every=10,
        data="planted",
    )


def build(model: nn.Module, spec: OptimizerSpec) -> torch.optim.Optimizer:
    """The torch optimizer of that name."""
    hyper = {"lr": DEFAULT_LR[spec.name]} | dict(spec.hyper)
    return OPTIMIZERS[spec.name](model.parameters(), **hyper)
