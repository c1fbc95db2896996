"""A complete task of one's own, used as: guided-descent compare example_task:make."""

import torch
from torch import nn
from torch.nn.functional import mse_loss

from guided_descent.bench import Problem

x = torch.linspace(-3, 3, 512)[:, None]
y = torch.sin(2 * x) + 0.1 * x**2


def make(seed):
    def batches(step):  # depends on seed and step alone, so that every optimizer sees the same data
        rows = torch.randint(512, (64,), generator=torch.Generator().manual_seed(100_000 * seed + step))
        return x[rows], y[rows]

    return Problem(
        model=nn.Sequential(nn.Linear(1, 64), nn.Tanh(), nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 1)),
        loss=lambda model, batch: mse_loss(model(batch[0]), batch[1]),
        batches=batches,
        evaluate=lambda model: {"error": mse_loss(model(x), y).item()},
        metric="error",
        steps=200,
    )
