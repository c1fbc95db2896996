"""Curves: pure functions from a step to a factor, joined by ``>>``; plain maths that knows nothing of optimizers.

Example:
    >>> curve = warmup(2) >> constant(2) >> cosine(4, floor=0.1)
    >>> [round(curve(t), 3) for t in range(8)]
    [0.5, 1.0, 1.0, 1.0, 1.0, 0.868, 0.55, 0.232]
    >>> parse(repr(curve)) == curve
    True
"""

from .base import Chain, Curve, Scaled, Segment, check_steps, links_of, steps_of
from .endless import PowerLaw, Powers, Restarts, inverse_sqrt, power, powers, restarts, step
from .shapes import (
    COOLDOWNS,
    constant,
    cosine,
    exponential,
    linear,
    mirror_cosine,
    one_minus_sqrt,
    one_minus_square,
    polynomial,
    rex,
    rise,
    warmup,
)
from .text import FUNCTIONS, parse

__all__ = [
    "COOLDOWNS",
    "FUNCTIONS",
    "Chain",
    "Curve",
    "PowerLaw",
    "Powers",
    "Restarts",
    "Scaled",
    "Segment",
    "check_steps",
    "constant",
    "cosine",
    "exponential",
    "inverse_sqrt",
    "linear",
    "links_of",
    "mirror_cosine",
    "one_minus_sqrt",
    "one_minus_square",
    "parse",
    "polynomial",
    "power",
    "powers",
    "restarts",
    "rex",
    "rise",
    "step",
    "steps_of",
    "warmup",
]
