"""Damped Newton: the exact Hessian, shifted until it is positive definite."""

from __future__ import annotations

import torch

from guided_descent.solvers.base import Params, Solver, Start
from guided_descent.solvers.curvature import hessian
from guided_descent.solvers.objective import HOW, Objective, scalar
from guided_descent.solvers.options import number, whole

_SHRINK = 0.5


class DampedNewton(Solver):
    """``(H + mu I) d = -g``, ``mu = damping + max(0, -lambda_min(H))``; then ``theta <- theta + t d``.

    The Hessian ``H`` is dense and exact, from batched double backward passes, and solved by its eigenvectors in
    float64. The shift makes ``d`` a descent direction also where the loss is not convex. ``t`` is the first of
    ``lr, lr/2, lr/4, ...`` with ``f(theta + t d) <= f + 1e-4 t g.d``. The loss must be differentiable twice: an
    Objective, or a closure that returns the loss without calling ``backward``.

    Args:
        params: A model, or its parameters.
        lr: The first trial of ``t``.
        damping: The smallest eigenvalue of the shifted Hessian is at least this.
        trials: Trials of ``t``; if all fail, nothing moves.
        nonfinite: ``skip``, ``raise`` or ``ignore``.

    Raises:
        ValueError: A value out of range, or more parameters than a dense matrix holds.
        TypeError: The closure calls ``backward``.

    Source: Nocedal and Wright, Numerical Optimization, 2nd ed., section 3.4.

    Example:
        >>> x = torch.nn.Parameter(torch.tensor([3.0, -2.0], dtype=torch.float64))
        >>> opt = DampedNewton([x])
        >>> for _ in range(8):
        ...     _ = opt.step(lambda: (x - 1).pow(4).sum() + (x - 1).square().sum())
        >>> bool((x - 1).abs().max() < 1e-6)
        True
    """

    def __init__(
        self,
        params: Params,
        *,
        lr: float = 1.0,
        damping: float = 1e-6,
        trials: int = 20,
        nonfinite: str = "skip",
    ) -> None:
        number("damping", damping, above=0)
        super().__init__(params, lr=lr, damping=damping, trials=whole("trials", trials), nonfinite=nonfinite)

    def _start(self, objective: Objective) -> Start:
        self._count("evaluations")
        self._count("gradients")
        with torch.enable_grad():
            loss = scalar(objective.value() if objective.differentiable else objective())
        try:
            g, h = hessian(loss, self._parameters, lambda n: self._count("products", n))
        except RuntimeError as error:
            if objective.differentiable:
                raise
            raise TypeError(
                "DampedNewton differentiates the loss twice, which this closure does not allow: return the loss "
                f"without calling backward, or pass Objective(loss=...) or {HOW}"
            ) from error
        return Start(self._read(), loss.detach(), g, hessian=h)

    def _try(self, objective: Objective, x: torch.Tensor) -> float:
        return super()._try(objective if objective.differentiable else Objective(loss=objective), x)

    def _advance(self, objective: Objective, start: Start) -> bool:
        group = self.param_groups[0]
        assert start.hessian is not None
        values, vectors = torch.linalg.eigh(start.hessian)
        values = values + group["damping"] + max(0.0, -float(values[0]))
        d = -(vectors @ ((vectors.T @ start.gradient.double()) / values)).to(start.x.dtype)
        return self._backtrack(objective, start, d, shrink=_SHRINK, most=group["trials"]) > 0
