"""Hessian-free optimization: Gauss-Newton steps by conjugate gradients, without a matrix."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from guided_descent.solvers.base import CURVED, Params, Solver, Start, dot
from guided_descent.solvers.curvature import Linearization
from guided_descent.solvers.objective import Objective
from guided_descent.solvers.options import number, whole

_POWER = 0.75  # of the preconditioner
_GROWTH = 1.3  # iterates are kept at 1.3^j
_PROGRESS = 5e-4  # relative progress per iteration below which the iteration stops
_WINDOW, _WINDOW_SHARE = 10, 0.1  # over how many iterations progress is measured: at least 10, a tenth of all
_SHRINK, _TRIALS = 0.8, 60  # of the line search
_BOOST, _DROP = 3 / 2, 2 / 3  # of the damping


@dataclass
class Iterate:
    """An iterate of conjugate gradients: ``d`` and ``phi(d) = dᵀ B d / 2 - b.d``."""

    d: Tensor
    phi: float


def conjugate_gradients(
    product: Callable[[Tensor], Tensor], b: Tensor, d: Tensor, precondition: Tensor, most: int
) -> list[Iterate]:
    """Minimise ``phi(d) = dᵀ B d / 2 - b.d`` by preconditioned conjugate gradients.

    Stops at iteration ``i > k`` if ``phi_i < 0`` and ``(phi_i - phi_{i-k}) / phi_i < 5e-4 k``, ``k = max(10, i/10)``;
    at a direction of no or negative curvature; when the residual is zero; or after ``most`` iterations.

    Args:
        product: ``B v`` for a symmetric ``B``.
        b: The right side.
        d: Where to start.
        precondition: The diagonal ``M``, positive.
        most: Iterations at most.

    Returns:
        The iterates of index 1.3^j and the last, in order; the start if there is no other.

    Source: Martens 2010.
    """
    r = b - product(d) if bool(d.any()) else b.clone()
    z = r / precondition
    p, rz = z.clone(), float(dot(r, z))
    now = Iterate(d, -0.5 * float(dot(d, r + b)))
    phis, kept, due = [now.phi], [], 1.0
    for i in range(1, most + 1):
        bp = product(p)
        curvature = float(dot(p, bp))
        if not (curvature > 0 and rz > 0):
            break
        alpha = rz / curvature
        r.sub_(bp, alpha=alpha)
        d = torch.add(now.d, p, alpha=alpha)
        now = Iterate(d, -0.5 * float(dot(d, r + b)))
        phis.append(now.phi)
        if i >= due:
            kept.append(now)
            while due <= i:
                due *= _GROWTH
        k = max(_WINDOW, math.ceil(_WINDOW_SHARE * i))
        if i > k and now.phi < 0 and (now.phi - phis[i - k]) / now.phi < k * _PROGRESS:
            break
        z = r / precondition
        before, rz = rz, float(dot(r, z))
        p.mul_(rz / before).add_(z)
    return kept if kept and kept[-1] is now else [*kept, now]


class HessianFree(Solver):
    """Truncated Gauss-Newton: conjugate gradients on ``(G + lam I) d = -g``, products ``G v`` only.

    ``G = Aᵀ A`` as in ``GaussNewton``, for any number of parameters: a product is two backward passes. One step:

    1. Conjugate gradients from ``0.95`` times the last ``d``, preconditioned by ``(diag + lam)^0.75``, at most
       ``iterations``; they stop when the relative progress over the last ``k = max(10, i/10)`` is below ``5e-4 k``.
       ``diag`` is an unbiased estimate of the diagonal of ``G``: the mean over ``probes`` of ``(Aᵀ v)²``, random signs
       ``v``. (Martens takes the sum of squared gradients of the samples, which needs each sample's gradient.)
    2. Of the iterates with index 1.3^j the last is taken, or the one before while that has the lower true loss.
    3. ``rho`` = actual reduction / ``-(g.d + dᵀ G d / 2)``, without damping in the prediction; ``rho < 1/4`` multiplies
       ``lam`` by 3/2, ``rho > 3/4`` by 2/3.
    4. ``t`` is the first of ``lr 0.8^j`` with ``f(theta + t d) <= f + 1e-4 t g.d``. If none is, nothing moves, ``lam``
       grows, and the next step starts from ``d = 0``.

    Gradient, products and trial losses use one batch; it should be large. Needs an Objective with residuals, or with
    outputs and a likelihood.

    Args:
        params: A model, or its parameters.
        lr: The first trial of ``t``.
        damping: ``lam`` at the beginning, in units of ``G``; the present one is ``param_groups[0]["damping"]``.
        iterations: Of conjugate gradients in one step, at most.
        warm: Part of the last ``d`` where the next search starts.
        probes: Random sign vectors for the preconditioner; 0: none, ``M = I``.
        least: Smallest ``lam``.
        most: Largest ``lam``.
        seed: Seed of the probes.
        nonfinite: ``skip``, ``raise`` or ``ignore``.

    Raises:
        ValueError: A value out of range.
        TypeError: The objective is a loss alone.

    Source: Martens 2010; Martens and Sutskever 2012. Preconditioner: Chapelle and Erhan 2011.

    Example:
        >>> x = torch.nn.Parameter(torch.tensor([-1.2, 1.0], dtype=torch.float64))
        >>> opt = HessianFree([x])
        >>> r = lambda: torch.stack([10 * (x[1] - x[0] ** 2), 1 - x[0]])
        >>> for _ in range(60):
        ...     _ = opt.step(Objective(residuals=r, scale=1.0))
        >>> bool((x - 1).abs().max() < 1e-3)
        True
    """

    needs: ClassVar[str] = CURVED

    def __init__(
        self,
        params: Params,
        *,
        lr: float = 1.0,
        damping: float = 1e-1,
        iterations: int = 250,
        warm: float = 0.95,
        probes: int = 1,
        least: float = 1e-12,
        most: float = 1e10,
        seed: int = 0,
        nonfinite: str = "skip",
    ) -> None:
        number("damping", damping, above=0)
        number("warm", warm, least=0, below=1)
        number("least", least, above=0)
        number("most", most, least=least)
        super().__init__(
            params,
            lr=lr,
            damping=damping,
            iterations=whole("iterations", iterations),
            warm=warm,
            probes=whole("probes", probes, 0),
            least=least,
            most=most,
            seed=whole("seed", seed, 0),
            nonfinite=nonfinite,
        )

    def _slots(self) -> dict[str, Any]:
        return {"direction": self._zeros()}

    def _start(self, objective: Objective) -> Start:
        return self._linearize(objective)

    def _advance(self, objective: Objective, start: Start) -> bool:
        group, state, model = self.param_groups[0], self._memory(), start.model
        assert model is not None
        lam = float(group["damping"])

        def product(v: Tensor) -> Tensor:
            return model.adjoint(model.forward(v)).add_(v, alpha=lam)

        iterates = conjugate_gradients(
            product,
            -start.gradient,
            group["warm"] * state["direction"],
            self._preconditioner(model, lam),
            group["iterations"],
        )
        best = iterates.pop()
        state["direction"].copy_(best.d)
        f = self._try(objective, start.x + best.d)
        while iterates:
            before = iterates.pop()
            f_before = self._try(objective, start.x + before.d)
            if f_before >= f:
                break
            best, f = before, f_before
        predicted = -(best.phi - lam / 2 * float(dot(best.d, best.d)))
        quality = (start.f - f) / predicted if predicted > 0 else -1.0
        if quality < 0.25:
            group["damping"] = min(lam * _BOOST, group["most"])
        elif quality > 0.75:
            group["damping"] = max(lam * _DROP, group["least"])
        if self._backtrack(objective, start, best.d, shrink=_SHRINK, most=_TRIALS, known=f) > 0:
            return True
        state["direction"].zero_()
        return False

    def _preconditioner(self, model: Linearization, lam: float) -> Tensor:
        """``(diag G + lam)^0.75``, with the diagonal estimated by random signs."""
        group = self.param_groups[0]
        total = self._zeros()
        if not group["probes"]:
            return torch.ones_like(total)
        generator = torch.Generator().manual_seed(group["seed"] * 1_000_003 + group["steps"])
        for _ in range(group["probes"]):
            signs = 2 * torch.randint(2, (model.at.numel(),), generator=generator) - 1
            total.add_(model.adjoint(signs.to(total)).square_())
        total.div_(group["probes"]).add_(lam).pow_(_POWER)
        return total
