"""Learning-rate schedules: curves (step -> factor) and the Schedule that drives an optimizer along one.

Example:
    >>> import torch
    >>> from guided_descent import schedules
    >>> opt = torch.optim.SGD([torch.nn.Parameter(torch.zeros(2))], lr=0.1)
    >>> schedules.wsd(opt, total_steps=10_000, warmup=0.02, cooldown=0.2).curve
    warmup(200) >> constant(7800) >> one_minus_sqrt(2000)
"""

from . import curves
from .branching import branch
from .curves import Curve
from .named import (
    constant,
    cosine,
    exponential,
    inverse_sqrt,
    linear,
    noam,
    one_cycle,
    polynomial,
    power,
    power_timescale,
    restarts,
    rex,
    step,
    trapezoid,
    wsd,
)
from .schedule import Schedule, accepted_steps
from .sketch import sketch
from .together import Together
from .tokens import Tokens

__all__ = [
    "Curve",
    "Schedule",
    "Together",
    "Tokens",
    "accepted_steps",
    "branch",
    "constant",
    "cosine",
    "curves",
    "exponential",
    "inverse_sqrt",
    "linear",
    "noam",
    "one_cycle",
    "polynomial",
    "power",
    "power_timescale",
    "restarts",
    "rex",
    "sketch",
    "step",
    "trapezoid",
    "wsd",
]
