"""Geometries: the metric or norm in which the direction is steepest."""

from guided_descent.parts.geometry.kronecker import CARRIES, Eigenbasis
from guided_descent.parts.geometry.lowrank import FullRankSubspace, GrowthLimit, ProjectedScale, Subspace
from guided_descent.parts.geometry.norms import LineLmo, Lmo, RmsLmo, SignLmo, SpectralLmo
from guided_descent.parts.geometry.spectral import NS_DTYPES, Polar, Sign

__all__ = [
    "CARRIES",
    "NS_DTYPES",
    "Eigenbasis",
    "FullRankSubspace",
    "GrowthLimit",
    "LineLmo",
    "Lmo",
    "Polar",
    "ProjectedScale",
    "RmsLmo",
    "Sign",
    "SignLmo",
    "SpectralLmo",
    "Subspace",
]
