"""Small optimizers for the tests of schedules."""

from __future__ import annotations

import torch
from torch import nn


class Counting(torch.optim.SGD):
    """An optimizer that counts accepted steps, as this package's do, and can be told to skip one."""

    skip = False

    @property
    def steps(self):
        return self.param_groups[0].setdefault("steps", 0)

    @torch.no_grad()
    def step(self, closure=None):
        if self.skip:
            return
        steps = self.steps
        super().step(closure)
        self.param_groups[0]["steps"] = steps + 1


def parameter():
    p = nn.Parameter(torch.ones(3, dtype=torch.float64))
    p.grad = torch.zeros_like(p)
    return p


def make(lrs=(0.5, 0.02), cls=Counting, tensor=False, **more):
    groups = [{"params": [parameter()], "lr": torch.tensor(lr) if tensor else lr} for lr in lrs]
    return cls(groups, lr=1.0, **more)


def numbers(opt, key="lr"):
    return [float(group[key]) for group in opt.param_groups]


def driven(opt, schedule, steps, key="lr"):
    """What the first group's number is at each of the steps, which are made."""
    seen = []
    for _ in range(steps):
        seen.append(numbers(opt, key)[0])
        opt.step()
        schedule.step()
    return seen
