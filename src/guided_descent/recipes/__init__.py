"""Recipes: one short file for each family of optimizers."""

from guided_descent.recipes.adam import AdamW, NAdamW
from guided_descent.recipes.base import REGISTRY, Constraint, Info, Recipe, hyper, lookup, recipe, static
from guided_descent.recipes.muon import Muon
from guided_descent.recipes.sgd import SGD
from guided_descent.recipes.soap import SOAP

__all__ = [
    "REGISTRY",
    "SGD",
    "SOAP",
    "AdamW",
    "Constraint",
    "Info",
    "Muon",
    "NAdamW",
    "Recipe",
    "hyper",
    "lookup",
    "recipe",
    "static",
]
