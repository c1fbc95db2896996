"""What layers see: their inputs and output gradients, for curvature methods and diagnostics."""

from guided_descent.capture.layers import LayerIO, per_sample_norms, supported, why_not
from guided_descent.capture.losses import (
    LOSSES,
    BinaryCrossEntropy,
    CrossEntropy,
    Loss,
    Masked,
    SquaredError,
    as_loss,
)
from guided_descent.capture.output import OutputTap
from guided_descent.capture.tap import Capture, unwrap

__all__ = [
    "LOSSES",
    "BinaryCrossEntropy",
    "Capture",
    "CrossEntropy",
    "LayerIO",
    "Loss",
    "Masked",
    "OutputTap",
    "SquaredError",
    "as_loss",
    "per_sample_norms",
    "supported",
    "unwrap",
    "why_not",
]
