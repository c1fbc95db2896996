"""Learning-rate schedules: curves (step -> factor) and the Schedule that drives an optimizer along one.

Example:
    >>> import torch
    >>> from guided_descent import schedules
    >>> opt = torch.optim.SGD([torch.nn.Parameter(torch.zeros(2))], lr=0.1)
    >>> schedules.wsd(opt, total_steps=10_000, warmup=0.02, cooldown=0.2).curve
    warmup(200) >> constant(7800) >> one_minus_sqrt(2000)
"""

from . import curves
from .curves import Curve
from .schedule import Schedule, accepted_steps, constant, cosine, linear, wsd

__all__ = ["Curve", "Schedule", "accepted_steps", "constant", "cosine", "curves", "linear", "wsd"]
