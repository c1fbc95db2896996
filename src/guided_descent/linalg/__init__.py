"""Linear algebra for optimizers: polar factors, eigenbases, coefficient tables and scratch memory."""

from guided_descent.linalg.coefficients import COEFFICIENTS, Coefficients
from guided_descent.linalg.eigen import Eigen, eigenbasis, refresh_basis
from guided_descent.linalg.minimax import Schedule, cheapest, schedule
from guided_descent.linalg.polar import METHODS, NAMES, polar
from guided_descent.linalg.workspace import Workspace

__all__ = [
    "COEFFICIENTS",
    "METHODS",
    "NAMES",
    "Coefficients",
    "Eigen",
    "Schedule",
    "Workspace",
    "cheapest",
    "eigenbasis",
    "polar",
    "refresh_basis",
    "schedule",
]
