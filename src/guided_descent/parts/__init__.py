"""Parts: the ideas of optimizers as tensor functions over a batch and declared state, to be combined freely."""

from guided_descent.parts.adaptive import MaximumMoments, RectifiedMoments, RootRatio, SquareAverage, SquareSum
from guided_descent.parts.base import ORDER, Batch, Found, Hyper, Needs, Part, Parts, Policy, Slot, State, Task
from guided_descent.parts.decay import ALL_DECAYS, DECAYS, L2, CautiousDecay, Decoupled
from guided_descent.parts.estimate import AdamMoments, Ema, LionMomentum, Momentum, NadamMoments, Velocity
from guided_descent.parts.geometry import CARRIES, NS_DTYPES, Eigenbasis, Polar, Sign
from guided_descent.parts.rows import Rows
from guided_descent.parts.scale import SCALES, InverseTime, MatrixScale
from guided_descent.parts.slow import Slow
from guided_descent.parts.step import Descend, Displace, writable

__all__ = [
    "ALL_DECAYS",
    "CARRIES",
    "DECAYS",
    "L2",
    "NS_DTYPES",
    "ORDER",
    "SCALES",
    "AdamMoments",
    "Batch",
    "CautiousDecay",
    "Decoupled",
    "Descend",
    "Displace",
    "Eigenbasis",
    "Ema",
    "Found",
    "Hyper",
    "InverseTime",
    "LionMomentum",
    "MatrixScale",
    "MaximumMoments",
    "Momentum",
    "NadamMoments",
    "Needs",
    "Part",
    "Parts",
    "Polar",
    "Policy",
    "RectifiedMoments",
    "RootRatio",
    "Rows",
    "Sign",
    "Slot",
    "Slow",
    "SquareAverage",
    "SquareSum",
    "State",
    "Task",
    "Velocity",
    "writable",
]
