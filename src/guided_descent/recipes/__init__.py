"""Recipes: one short file for each family of optimizers."""

from guided_descent.recipes.adam import AdamW, NAdamW
from guided_descent.recipes.adaptive import Adadelta, Adagrad, Adamax, RAdam, RMSprop
from guided_descent.recipes.base import REGISTRY, Constraint, Info, Recipe, hyper, lookup, recipe, static
from guided_descent.recipes.kfac import EKFAC, FOOF, KFAC
from guided_descent.recipes.muon import Muon
from guided_descent.recipes.psgd import PSGDDiagonal, PSGDKron, PSGDLowRank
from guided_descent.recipes.sgd import SGD
from guided_descent.recipes.shampoo import ASGO, KLSOAP, ECShampoo, KLShampoo, Shampoo
from guided_descent.recipes.sign import Lion, SignSGD, Signum
from guided_descent.recipes.singd import SINGD
from guided_descent.recipes.soap import SOAP
from guided_descent.recipes.spectral import AdaMuon, Moonlight, MuonClip, NorMuon, SpectralDescent
from guided_descent.recipes.splus import SPlus
from guided_descent.recipes.tonga import TONGA

__all__ = [
    "ASGO",
    "EKFAC",
    "FOOF",
    "KFAC",
    "KLSOAP",
    "REGISTRY",
    "SGD",
    "SINGD",
    "SOAP",
    "TONGA",
    "AdaMuon",
    "Adadelta",
    "Adagrad",
    "AdamW",
    "Adamax",
    "Constraint",
    "ECShampoo",
    "Info",
    "KLShampoo",
    "Lion",
    "Moonlight",
    "Muon",
    "MuonClip",
    "NAdamW",
    "NorMuon",
    "PSGDDiagonal",
    "PSGDKron",
    "PSGDLowRank",
    "RAdam",
    "RMSprop",
    "Recipe",
    "SPlus",
    "Shampoo",
    "SignSGD",
    "Signum",
    "SpectralDescent",
    "hyper",
    "lookup",
    "recipe",
    "static",
]
