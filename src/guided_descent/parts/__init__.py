"""Parts: the ideas of optimizers as tensor functions over a batch and declared state, to be combined freely."""

from guided_descent.parts.adaptive import (
    AngleMoments,
    BeliefMoments,
    MaximumMoments,
    QuotientMomentum,
    RectifiedMoments,
    RootRatio,
    SquareAverage,
    SquareSum,
    YogiMoments,
)
from guided_descent.parts.base import ORDER, Batch, Found, Hyper, Needs, Part, Parts, Policy, Slot, State, Task
from guided_descent.parts.clip import AGC, Centralize, ClipEach, ClipNorm, ClipUpdate, ClipValue
from guided_descent.parts.decay import ALL_DECAYS, DECAYS, L2, CautiousDecay, Decoupled
from guided_descent.parts.estimate import AdamMoments, Ema, LionMomentum, Moments, Momentum, NadamMoments, Velocity
from guided_descent.parts.geometry import CARRIES, NS_DTYPES, Eigenbasis, Polar, Sign
from guided_descent.parts.layerwise import LarsRatio, Normalize, NormalizeEach, NormMoments, TrustRatio
from guided_descent.parts.mask import Cautious, GradientSigns
from guided_descent.parts.memory import AdanMoments, AdoptMoments, CorrectedGradient, ProximalDecay, TwoMomenta
from guided_descent.parts.rows import Rows
from guided_descent.parts.scale import SCALES, InverseTime, MatrixScale
from guided_descent.parts.slow import Slow
from guided_descent.parts.spikes import AdaGC, SkipSpikes, ZClip
from guided_descent.parts.step import Descend, Displace, writable

__all__ = [
    "AGC",
    "ALL_DECAYS",
    "CARRIES",
    "DECAYS",
    "L2",
    "NS_DTYPES",
    "ORDER",
    "SCALES",
    "AdaGC",
    "AdamMoments",
    "AdanMoments",
    "AdoptMoments",
    "AngleMoments",
    "Batch",
    "BeliefMoments",
    "Cautious",
    "CautiousDecay",
    "Centralize",
    "ClipEach",
    "ClipNorm",
    "ClipUpdate",
    "ClipValue",
    "CorrectedGradient",
    "Decoupled",
    "Descend",
    "Displace",
    "Eigenbasis",
    "Ema",
    "Found",
    "GradientSigns",
    "Hyper",
    "InverseTime",
    "LarsRatio",
    "LionMomentum",
    "MatrixScale",
    "MaximumMoments",
    "Moments",
    "Momentum",
    "NadamMoments",
    "Needs",
    "NormMoments",
    "Normalize",
    "NormalizeEach",
    "Part",
    "Parts",
    "Polar",
    "Policy",
    "ProximalDecay",
    "QuotientMomentum",
    "RectifiedMoments",
    "RootRatio",
    "Rows",
    "Sign",
    "SkipSpikes",
    "Slot",
    "Slow",
    "SquareAverage",
    "SquareSum",
    "State",
    "Task",
    "TrustRatio",
    "TwoMomenta",
    "Velocity",
    "YogiMoments",
    "ZClip",
    "writable",
]
