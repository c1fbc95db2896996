"""Solvers: second-order methods over all parameters at once, for losses that can be evaluated several times a step."""

from guided_descent.solvers.base import Solver
from guided_descent.solvers.gauss_newton import GaussNewton, LevenbergMarquardt, NaturalGradient
from guided_descent.solvers.hessian_free import HessianFree
from guided_descent.solvers.likelihoods import Likelihood
from guided_descent.solvers.newton import DampedNewton
from guided_descent.solvers.objective import Objective
from guided_descent.solvers.quasi_newton import BFGS, LBFGS

#: The solvers by the name that the command line and the tables use.
SOLVERS: dict[str, type[Solver]] = {
    "bfgs": BFGS,
    "damped_newton": DampedNewton,
    "gauss_newton": GaussNewton,
    "hessian_free": HessianFree,
    "lbfgs": LBFGS,
    "levenberg_marquardt": LevenbergMarquardt,
    "natural_gradient": NaturalGradient,
}

__all__ = [
    "BFGS",
    "LBFGS",
    "SOLVERS",
    "DampedNewton",
    "GaussNewton",
    "HessianFree",
    "LevenbergMarquardt",
    "Likelihood",
    "NaturalGradient",
    "Objective",
    "Solver",
]
