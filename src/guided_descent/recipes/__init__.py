"""Recipes: one short file for each family of optimizers."""

from guided_descent.recipes.adam import AdaBelief, Adam, AdamAtan2, AdamW, AMSGrad, Grams, LaProp, NAdam, NAdamW, Yogi
from guided_descent.recipes.adaptive import Adadelta, Adagrad, Adamax, RAdam, RMSprop
from guided_descent.recipes.averaging import GPAAdamW, ScheduleFreeAdamW, ScheduleFreeRAdam, ScheduleFreeSGD
from guided_descent.recipes.base import REGISTRY, Constraint, Info, Recipe, hyper, lookup, recipe, static
from guided_descent.recipes.diagonal import AdaHessian, SophiaG, SophiaH
from guided_descent.recipes.dion import Dion, Dion2
from guided_descent.recipes.distance import DAdaptAdam, DAdaptSGD, DoG, DoWG, LDoG, Prodigy
from guided_descent.recipes.factored import CAME, SM3, Adafactor, AdamMini
from guided_descent.recipes.kfac import EKFAC, FOOF, KFAC
from guided_descent.recipes.layerwise import CLARS, LAMB, LARS, NormalizedSGD, NovoGrad
from guided_descent.recipes.lowrank import APOLLO, APOLLOMini, Fira, GaLore
from guided_descent.recipes.memory import ADOPT, MARS, Adan, AdEMAMix
from guided_descent.recipes.multiplicative import Madam, Multiplicative, MultiplicativeAdam, MultiplicativeSGD
from guided_descent.recipes.muon import Muon
from guided_descent.recipes.norms import Hyperball, Modula, Scion
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
    "APOLLO",
    "ASGO",
    "CAME",
    "CLARS",
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
    "SM3",
    "SOAP",
    "TONGA",
    "AMSGrad",
    "APOLLOMini",
    "AdEMAMix",
    "AdaBelief",
    "AdaHessian",
    "AdaMuon",
    "Adadelta",
    "Adafactor",
    "Adagrad",
    "Adam",
    "AdamAtan2",
    "AdamMini",
    "AdamW",
    "Adamax",
    "Adan",
    "Constraint",
    "DAdaptAdam",
    "DAdaptSGD",
    "Dion",
    "Dion2",
    "DoG",
    "DoWG",
    "ECShampoo",
    "Fira",
    "GPAAdamW",
    "GaLore",
    "Grams",
    "Hyperball",
    "Info",
    "KLShampoo",
    "LDoG",
    "LaProp",
    "Lion",
    "Madam",
    "Modula",
    "Moonlight",
    "Multiplicative",
    "MultiplicativeAdam",
    "MultiplicativeSGD",
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
    "Prodigy",
    "RAdam",
    "RMSprop",
    "Recipe",
    "SPlus",
    "ScheduleFreeAdamW",
    "ScheduleFreeRAdam",
    "ScheduleFreeSGD",
    "Scion",
    "Shampoo",
    "SignSGD",
    "Signum",
    "SophiaG",
    "SophiaH",
    "SpectralDescent",
    "Yogi",
    "hyper",
    "lookup",
    "recipe",
    "static",
]
