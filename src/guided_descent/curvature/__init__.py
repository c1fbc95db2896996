"""What the loss looks like around the weights, measured while training: so far the noise of its gradient."""

from guided_descent.curvature.batch import BatchRule, CriticalBatch, batch_factor, fit_critical_batch
from guided_descent.curvature.noise import Noise, NoiseScale, curvature_noise_scale

__all__ = [
    "BatchRule",
    "CriticalBatch",
    "Noise",
    "NoiseScale",
    "batch_factor",
    "curvature_noise_scale",
    "fit_critical_batch",
]
