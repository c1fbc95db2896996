"""guided-descent: train neural networks with the best optimization known."""

from guided_descent import averaging, capture, curvature, parts, recipes, routing, schedules, solvers
from guided_descent.averaging import evaluating
from guided_descent.build import RoutedOptimizer, build, class_of, optimizer
from guided_descent.catalogue import describe, list_optimizers
from guided_descent.engine.optimizer import Optimizer
from guided_descent.engine.policies import NonFiniteError, RefusedError
from guided_descent.explain import explain
from guided_descent.initialize import initialize
from guided_descent.routing import rule
from guided_descent.scaling import modula

__version__ = "0.1.0"

AdamW = class_of(recipes.AdamW)
NAdamW = class_of(recipes.NAdamW)
EKFAC = class_of(recipes.EKFAC)
FOOF = class_of(recipes.FOOF)
KFAC = class_of(recipes.KFAC)
Muon = class_of(recipes.Muon)
PSGDDiagonal = class_of(recipes.PSGDDiagonal)
PSGDKron = class_of(recipes.PSGDKron)
PSGDLowRank = class_of(recipes.PSGDLowRank)
SGD = class_of(recipes.SGD)
ASGO = class_of(recipes.ASGO)
KLSOAP = class_of(recipes.KLSOAP)
ECShampoo = class_of(recipes.ECShampoo)
KLShampoo = class_of(recipes.KLShampoo)
Shampoo = class_of(recipes.Shampoo)
SINGD = class_of(recipes.SINGD)
SOAP = class_of(recipes.SOAP)
Dion = class_of(recipes.Dion)
Dion2 = class_of(recipes.Dion2)
AdaMuon = class_of(recipes.AdaMuon)
Moonlight = class_of(recipes.Moonlight)
MuonClip = class_of(recipes.MuonClip)
NorMuon = class_of(recipes.NorMuon)
SpectralDescent = class_of(recipes.SpectralDescent)
SPlus = class_of(recipes.SPlus)
TONGA = class_of(recipes.TONGA)
Adagrad = class_of(recipes.Adagrad)
RMSprop = class_of(recipes.RMSprop)
Adadelta = class_of(recipes.Adadelta)
Adamax = class_of(recipes.Adamax)
RAdam = class_of(recipes.RAdam)
SignSGD = class_of(recipes.SignSGD)
Signum = class_of(recipes.Signum)
Lion = class_of(recipes.Lion)
Adam = class_of(recipes.Adam)
AMSGrad = class_of(recipes.AMSGrad)
NAdam = class_of(recipes.NAdam)
AdaBelief = class_of(recipes.AdaBelief)
Yogi = class_of(recipes.Yogi)
LaProp = class_of(recipes.LaProp)
AdamAtan2 = class_of(recipes.AdamAtan2)
Grams = class_of(recipes.Grams)
CLARS = class_of(recipes.CLARS)
LARS = class_of(recipes.LARS)
LAMB = class_of(recipes.LAMB)
NovoGrad = class_of(recipes.NovoGrad)
NormalizedSGD = class_of(recipes.NormalizedSGD)
ADOPT = class_of(recipes.ADOPT)
AdEMAMix = class_of(recipes.AdEMAMix)
Adan = class_of(recipes.Adan)
MARS = class_of(recipes.MARS)
Adafactor = class_of(recipes.Adafactor)
CAME = class_of(recipes.CAME)
SM3 = class_of(recipes.SM3)
AdamMini = class_of(recipes.AdamMini)
GaLore = class_of(recipes.GaLore)
Fira = class_of(recipes.Fira)
APOLLO = class_of(recipes.APOLLO)
APOLLOMini = class_of(recipes.APOLLOMini)
Modula = class_of(recipes.Modula)
Scion = class_of(recipes.Scion)
Hyperball = class_of(recipes.Hyperball)
Madam = class_of(recipes.Madam)
MultiplicativeAdam = class_of(recipes.MultiplicativeAdam)
MultiplicativeSGD = class_of(recipes.MultiplicativeSGD)
Prodigy = class_of(recipes.Prodigy)
DAdaptAdam = class_of(recipes.DAdaptAdam)
DAdaptSGD = class_of(recipes.DAdaptSGD)
DoG = class_of(recipes.DoG)
LDoG = class_of(recipes.LDoG)
DoWG = class_of(recipes.DoWG)
AdaHessian = class_of(recipes.AdaHessian)
SophiaH = class_of(recipes.SophiaH)
SophiaG = class_of(recipes.SophiaG)
ScheduleFreeSGD = class_of(recipes.ScheduleFreeSGD)
ScheduleFreeAdamW = class_of(recipes.ScheduleFreeAdamW)
ScheduleFreeRAdam = class_of(recipes.ScheduleFreeRAdam)
GPAAdamW = class_of(recipes.GPAAdamW)

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
    "KLShampoo",
    "LDoG",
    "LaProp",
    "Lion",
    "Madam",
    "Modula",
    "Moonlight",
    "MultiplicativeAdam",
    "MultiplicativeSGD",
    "Muon",
    "MuonClip",
    "NAdam",
    "NAdamW",
    "NonFiniteError",
    "NorMuon",
    "NormalizedSGD",
    "NovoGrad",
    "Optimizer",
    "PSGDDiagonal",
    "PSGDKron",
    "PSGDLowRank",
    "Prodigy",
    "RAdam",
    "RMSprop",
    "RefusedError",
    "RoutedOptimizer",
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
    "averaging",
    "build",
    "capture",
    "curvature",
    "describe",
    "evaluating",
    "explain",
    "initialize",
    "list_optimizers",
    "modula",
    "optimizer",
    "parts",
    "recipes",
    "routing",
    "rule",
    "schedules",
    "solvers",
]
