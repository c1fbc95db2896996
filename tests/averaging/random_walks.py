"""Weights that walk at random, and what tests of averages share."""

from __future__ import annotations

import io

import torch
from torch import nn


class Counting(torch.optim.SGD):
    """An optimizer that counts accepted steps and can be told to skip."""

    skip = False
    steps = 0

    def step(self, closure=None):
        if not self.skip:
            self.steps += 1


def net(dtype=torch.float32):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).to(dtype)


@torch.no_grad()
def walk(model, generator):
    for p in model.parameters():
        p += 0.1 * torch.randn(p.shape, generator=generator, dtype=torch.float64).to(p.dtype)


def through_file(value):
    file = io.BytesIO()
    torch.save(value, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def walked(model, averages, steps, seed=1):
    """Walk and update; return the weights of each step, in float64."""
    generator, history = torch.Generator().manual_seed(seed), []
    for _ in range(steps):
        walk(model, generator)
        for average in averages:
            average.update()
        history.append({name: p.detach().clone().double() for name, p in model.named_parameters()})
    return history


def close(average, expected, bar=1e-6):
    """The averages are what is expected by name."""
    assert average.keys() == expected.keys()
    for name, value in average.items():
        torch.testing.assert_close(value.double(), expected[name].double(), atol=bar, rtol=bar)


def weighted(history, weights):
    """The sum of the weights of all steps, times a number each."""
    return {name: sum(w * step[name] for w, step in zip(weights, history, strict=True)) for name in history[0]}
