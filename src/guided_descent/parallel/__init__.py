"""Parallel: how the ranks of a run share its blocks, and where the parts of a tensor lie. Parts never see a rank."""

from guided_descent.parallel.assignment import Assignment, Share

__all__ = ["Assignment", "Share"]
