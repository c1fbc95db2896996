"""The engine: the only code that mutates parameters."""

from guided_descent.engine.optimizer import Optimizer
from guided_descent.engine.policies import NonFiniteError

__all__ = ["NonFiniteError", "Optimizer"]
