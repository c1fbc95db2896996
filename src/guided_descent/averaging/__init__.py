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

from .ema import EMA
from .evaluating import BufferSource, EvaluationSource, evaluating, export
from .polynomial import PolynomialAverage
from .running import RunningAverage

__all__ = [
    "EMA",
    "BufferSource",
    "EvaluationSource",
    "PolynomialAverage",
    "RunningAverage",
    "evaluating",
    "export",
    "is_evaluating",
]
