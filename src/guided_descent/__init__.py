"""guided-descent: train neural networks with the best optimization known."""

from guided_descent import averaging, parts, recipes, routing, schedules
from guided_descent.averaging import evaluating
from guided_descent.build import RoutedOptimizer, build, class_of, optimizer
from guided_descent.catalogue import describe, list_optimizers
from guided_descent.engine.optimizer import Optimizer
from guided_descent.engine.policies import NonFiniteError
from guided_descent.explain import explain
from guided_descent.routing import rule

__version__ = "0.1.0"

SGD = class_of(recipes.SGD)
AdamW = class_of(recipes.AdamW)
NAdamW = class_of(recipes.NAdamW)
Muon = class_of(recipes.Muon)
SOAP = class_of(recipes.SOAP)

__all__ = [
    "SGD",
    "SOAP",
    "AdamW",
    "Muon",
    "NAdamW",
    "NonFiniteError",
    "Optimizer",
    "RoutedOptimizer",
    "averaging",
    "build",
    "describe",
    "evaluating",
    "explain",
    "list_optimizers",
    "optimizer",
    "parts",
    "recipes",
    "routing",
    "rule",
    "schedules",
]
