"""Kernels: faster routes for combinations of parts, each with ``can_use``, a plain fallback and a parity test."""

from guided_descent.kernels.fused import KERNELS, Kernel, Scales, find

__all__ = ["KERNELS", "Kernel", "Scales", "find"]
