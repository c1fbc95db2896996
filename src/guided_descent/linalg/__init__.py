"""Linear algebra for optimizers: polar factors, eigenbases, inverse roots, norm bounds, coefficients, scratch."""

from guided_descent.linalg.coefficients import COEFFICIENTS, Coefficients
from guided_descent.linalg.eigen import (
    Alignment,
    Diagonal,
    Eigen,
    Tracked,
    align,
    diagonalise,
    eigenbasis,
    matching,
    off_diagonal,
    refresh_basis,
    track_basis,
)
from guided_descent.linalg.minimax import Schedule, cheapest, schedule
from guided_descent.linalg.norms import power_iteration, spectral_norm_bound
from guided_descent.linalg.orthonormal import orthonormal
from guided_descent.linalg.polar import METHODS, NAMES, polar
from guided_descent.linalg.roots import Root, inverse_root
from guided_descent.linalg.workspace import Workspace

__all__ = [
    "COEFFICIENTS",
    "METHODS",
    "NAMES",
    "Alignment",
    "Coefficients",
    "Diagonal",
    "Eigen",
    "Root",
    "Schedule",
    "Tracked",
    "Workspace",
    "align",
    "cheapest",
    "diagonalise",
    "eigenbasis",
    "inverse_root",
    "matching",
    "off_diagonal",
    "orthonormal",
    "polar",
    "power_iteration",
    "refresh_basis",
    "schedule",
    "spectral_norm_bound",
    "track_basis",
]
