"""Recipes: one short file for each family of optimizers."""

from guided_descent.recipes.adam import AdaBelief, Adam, AdamAtan2, AdamW, AMSGrad, Grams, LaProp, NAdam, NAdamW, Yogi
from guided_descent.recipes.adaptive import Adadelta, Adagrad, Adamax, RAdam, RMSprop
from guided_descent.recipes.averaging import GPAAdamW, ScheduleFreeAdamW, ScheduleFreeRAdam, ScheduleFreeSGD
from guided_descent.recipes.base import REGISTRY, Constraint, Info, Recipe, hyper, lookup, recipe, static
from guided_descent.recipes.dion import Dion, Dion2
from guided_descent.recipes.kfac import EKFAC, FOOF, KFAC
from guided_descent.recipes.layerwise import LAMB, LARS, NormalizedSGD, NovoGrad
from guided_descent.recipes.memory import ADOPT, MARS, Adan, AdEMAMix
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
    "ADOPT",
    "ASGO",
    "EKFAC",
    "FOOF",
    "KFAC",
    "KLSOAP",
    "LAMB",
    "LARS",
    "MARS",
    "REGISTRY",
    "SGD",
    "SINGD",
    "SOAP",
    "TONGA",
    "AMSGrad",
    "AdEMAMix",
    "AdaBelief",
    "AdaMuon",
    "Adadelta",
    "Adagrad",
    "Adam",
    "AdamAtan2",
    "AdamW",
    "Adamax",
    "Adan",
    "Constraint",
    "Dion",
    "Dion2",
    "ECShampoo",
    "GPAAdamW",
    "Grams",
    "Info",
    "KLShampoo",
    "LaProp",
    "Lion",
    "Moonlight",
    "Muon",
    "MuonClip",
    "NAdam",
    "NAdamW",
    "NorMuon",
    "NormalizedSGD",
    "NovoGrad",
    "PSGDDiagonal",
    "PSGDKron",
    "PSGDLowRank",
    "RAdam",
    "RMSprop",
    "Recipe",
    "SPlus",
    "ScheduleFreeAdamW",
    "ScheduleFreeRAdam",
    "ScheduleFreeSGD",
    "Shampoo",
    "SignSGD",
    "Signum",
    "SpectralDescent",
    "Yogi",
    "hyper",
    "lookup",
    "recipe",
    "static",
]
