"""Weight averaging: averages kept beside the model, and the context that evaluates with them.

Example:
    >>> import torch
    >>> from guided_descent import averaging
    >>> model = torch.nn.Linear(2, 1)
    >>> ema = averaging.EMA(model, half_life=100)
    >>> ema.update()  # after every optimizer step
    >>> with averaging.evaluating(model, ema):
    ...     output = model(torch.ones(1, 2))
    >>> sorted(averaging.export(model, ema))
    ['bias', 'weight']
"""

from guided_descent.engine.guard import is_evaluating

from . import ramps
from .ema import EMA
from .evaluating import BufferSource, EvaluationSource, evaluating, export
from .lawa import LAWA
from .polynomial import PolynomialAverage
from .posthoc import PostHocEMA, Synthesis, synthesize
from .power import PowerEMA, gamma_to_sigma, sigma_to_gamma
from .running import Average, RunningAverage
from .swa import SWA

__all__ = [
    "EMA",
    "LAWA",
    "SWA",
    "Average",
    "BufferSource",
    "EvaluationSource",
    "PolynomialAverage",
    "PostHocEMA",
    "PowerEMA",
    "RunningAverage",
    "Synthesis",
    "evaluating",
    "export",
    "gamma_to_sigma",
    "is_evaluating",
    "ramps",
    "sigma_to_gamma",
    "synthesize",
]
