"""Gauss-Newton with a line search, Levenberg-Marquardt, and natural gradient: damped solves with a dense Jacobian."""

from __future__ import annotations

import math
from typing import Any, ClassVar

from torch import Tensor

from guided_descent.solvers.base import CURVED, Params, Solver, Start, dot
from guided_descent.solvers.curvature import SPACES, DampedSystem
from guided_descent.solvers.objective import Objective
from guided_descent.solvers.options import choice, number, whole

_SHRINK = 0.5
_METRICS = ("identity", "diagonal")
_TINY = 1e-12  # smallest entry of the diagonal metric, relative to the largest


class DenseGaussNewton(Solver):
    """What the three share: ``A`` in full, and ``(Aᵀ A + lam D) d = -g`` in the smaller of two spaces.

    ``A = Sᵀ J`` with the Jacobian ``J`` of residuals or outputs and the root ``S`` of the loss's Hessian by them, so
    that ``g = Aᵀ rho`` and ``G = Aᵀ A`` is the generalized Gauss-Newton matrix of the loss itself: ``lam`` scales with
    the loss. ``J`` may have at most 2^27 entries.
    """

    needs: ClassVar[str] = CURVED

    def __init__(self, params: Params, **options: Any) -> None:
        number("damping", options["damping"], least=0)
        choice("space", options["space"], SPACES)
        super().__init__(params, **options)

    def _start(self, objective: Objective) -> Start:
        return self._linearize(objective)

    def _system(self, start: Start) -> tuple[Tensor, DampedSystem]:
        """``A`` (float64 ``[n, P]``) and the system to solve."""
        assert start.model is not None
        a, metric = self._dense(start.model), None
        if self.param_groups[0].get("metric") == "diagonal":
            metric = a.square().sum(0)
            metric = metric.clamp(min=max(_TINY * float(metric.max()), 1e-300))
        return a, DampedSystem(a, start.model.rho(), metric, self.param_groups[0]["space"])


class GaussNewton(DenseGaussNewton):
    """``(G + lam I) d = -g``, then ``theta <- theta + t d``.

    ``G = Jᵀ H J`` with the Hessian ``H`` of the loss by residuals or outputs; with fewer residuals than parameters the
    same ``d = -Aᵀ (A Aᵀ + lam I)⁻¹ rho`` is solved in sample space. ``t`` is the first of ``lr, lr/2, lr/4, ...`` with
    ``f(theta + t d) <= f + 1e-4 t g.d``. Needs an Objective with residuals, or with outputs and a likelihood.

    Args:
        params: A model, or its parameters.
        lr: The first trial of ``t``.
        damping: ``lam``, in units of ``G``; 0 takes the pseudo-inverse where ``G`` is singular.
        space: Where to solve: ``auto`` takes the smaller matrix; ``parameters``; ``samples``.
        trials: Trials of ``t``; if all fail, nothing moves.
        nonfinite: ``skip``, ``raise`` or ``ignore``.

    Raises:
        ValueError: A value out of range, or a Jacobian that is too large.
        TypeError: The objective is a loss alone.

    Source: Schraudolph 2002 for ``G``; Müller and Zeinhofer 2023, arXiv:2302.13163, for line search and least squares
    in physics-informed learning.

    Example:
        >>> import torch
        >>> x = torch.nn.Parameter(torch.tensor([-1.2, 1.0], dtype=torch.float64))
        >>> opt = GaussNewton([x])
        >>> r = lambda: torch.stack([10 * (x[1] - x[0] ** 2), 1 - x[0]])
        >>> for _ in range(15):
        ...     _ = opt.step(Objective(residuals=r, scale=1.0))
        >>> bool((x - 1).abs().max() < 1e-6)
        True
    """

    def __init__(
        self,
        params: Params,
        *,
        lr: float = 1.0,
        damping: float = 1e-8,
        space: str = "auto",
        trials: int = 20,
        nonfinite: str = "skip",
    ) -> None:
        super().__init__(
            params, lr=lr, damping=damping, space=space, trials=whole("trials", trials), nonfinite=nonfinite
        )

    def _advance(self, objective: Objective, start: Start) -> bool:
        group = self.param_groups[0]
        _, system = self._system(start)
        d = system.solve(float(group["damping"])).to(start.x.dtype)
        return self._backtrack(objective, start, d, shrink=_SHRINK, most=group["trials"]) > 0


class LevenbergMarquardt(DenseGaussNewton):
    """``(G + lam D) d = -g``, taken if the loss falls enough; ``lam`` follows how well the model predicted it.

    ``rho = (f(theta) - f(theta + d)) / -(g.d + |A d|²/2)``, the actual by the predicted reduction, without damping in
    the prediction. ``rho > accept`` takes the step; ``rho > 3/4`` divides ``lam`` by ``down``, ``rho < 1/4`` multiplies
    it by ``up``. A step that is refused multiplies ``lam`` by ``up``, leaves the parameters bitwise as they were and is
    tried again with the same Jacobian, ``trials`` times in all. Needs an Objective with residuals, or with outputs and
    a likelihood.

    Args:
        params: A model, or its parameters.
        lr: Factor of the step ``d``.
        damping: ``lam`` at the beginning, in units of ``G``; the present one is ``param_groups[0]["damping"]``.
        metric: ``D``: ``identity``, or ``diagonal`` for that of ``G`` (Marquardt's).
        space: Where to solve: ``auto`` takes the smaller matrix; ``parameters``; ``samples``.
        up: Growth of ``lam``.
        down: Its reduction.
        accept: Smallest ``rho`` of a step that is taken.
        trials: Trials of ``lam`` in one step.
        least: Smallest ``lam``.
        most: Largest ``lam``.
        nonfinite: ``skip``, ``raise`` or ``ignore``.

    Raises:
        ValueError: A value out of range, or a Jacobian that is too large.
        TypeError: The objective is a loss alone.

    Source: Levenberg 1944; Marquardt 1963; Nocedal and Wright, Numerical Optimization, 2nd ed., section 10.3.

    Example:
        >>> import torch
        >>> x = torch.nn.Parameter(torch.tensor([-1.2, 1.0], dtype=torch.float64))
        >>> opt = LevenbergMarquardt([x])
        >>> r = lambda: torch.stack([10 * (x[1] - x[0] ** 2), 1 - x[0]])
        >>> for _ in range(30):
        ...     _ = opt.step(Objective(residuals=r, scale=1.0))
        >>> bool((x - 1).abs().max() < 1e-6)
        True
    """

    def __init__(
        self,
        params: Params,
        *,
        lr: float = 1.0,
        damping: float = 1e-3,
        metric: str = "identity",
        space: str = "auto",
        up: float = 2.0,
        down: float = 3.0,
        accept: float = 1e-4,
        trials: int = 10,
        least: float = 1e-15,
        most: float = 1e10,
        nonfinite: str = "skip",
    ) -> None:
        number("damping", damping, above=0)
        choice("metric", metric, _METRICS)
        number("up", up, above=1)
        number("down", down, above=1)
        number("accept", accept, least=0, below=1)
        number("least", least, above=0)
        number("most", most, least=least)
        super().__init__(
            params,
            lr=lr,
            damping=damping,
            metric=metric,
            space=space,
            up=up,
            down=down,
            accept=accept,
            trials=whole("trials", trials),
            least=least,
            most=most,
            nonfinite=nonfinite,
        )

    def _advance(self, objective: Objective, start: Start) -> bool:
        group = self.param_groups[0]
        lr = float(group["lr"])
        a, system = self._system(start)
        for _ in range(group["trials"]):
            d = lr * system.solve(group["damping"])
            predicted = -float(dot(start.gradient, d) + (a @ d).square().sum() / 2)
            f = self._try(objective, start.x + d.to(start.x.dtype))
            quality = (start.f - f) / predicted if predicted > 0 else -1.0
            if quality < 0.25:
                group["damping"] = min(group["damping"] * group["up"], group["most"])
            elif quality > 0.75:
                group["damping"] = max(group["damping"] / group["down"], group["least"])
            if quality > group["accept"]:
                return True
        return False


class NaturalGradient(DenseGaussNewton):
    """``theta <- theta - lr (F + lam I)⁻¹ g`` with the exact Fisher matrix ``F = E_x E_{y ~ p(.|x)} [s sᵀ]``.

    The expectation over the model's own ``y`` is exact ("type 2"): ``s`` runs over the columns of ``Jᵀ S``, with the
    root ``S`` of the loss's Hessian by the outputs, no label is drawn and the true ones do not enter. For square loss,
    softmax and binary cross-entropy ``F`` equals the Gauss-Newton matrix; what differs from ``GaussNewton`` is the
    fixed step, so that the loss may rise. With ``kl`` the step is ``t <= lr`` with ``t² dᵀ F d / 2 <= kl``: to second
    order, the model's distribution moves by at most that divergence. Residuals count as a square loss.

    Args:
        params: A model, or its parameters.
        lr: The step.
        damping: ``lam``, in units of ``F``.
        kl: Bound of the divergence of one step, in nats per sample; None: no bound.
        space: Where to solve: ``auto`` takes the smaller matrix; ``parameters``; ``samples``.
        nonfinite: ``skip``, ``raise`` or ``ignore``.

    Raises:
        ValueError: A value out of range, or a Jacobian that is too large.
        TypeError: The objective is a loss alone.

    Source: Amari 1998; Martens 2020, arXiv:1412.1193.

    Example:
        >>> import torch
        >>> from guided_descent.solvers import Likelihood
        >>> net, x, y = torch.nn.Linear(2, 2), torch.eye(2), torch.tensor([0, 1])
        >>> opt = NaturalGradient(net, lr=0.5)
        >>> for _ in range(10):
        ...     loss = opt.step(Objective(outputs=lambda: net(x), likelihood=Likelihood("cross_entropy", y)))
        >>> bool(loss < 0.1)
        True
    """

    def __init__(
        self,
        params: Params,
        *,
        lr: float = 1.0,
        damping: float = 1e-3,
        kl: float | None = None,
        space: str = "auto",
        nonfinite: str = "skip",
    ) -> None:
        if kl is not None:
            number("kl", kl, above=0)
        super().__init__(params, lr=lr, damping=damping, kl=kl, space=space, nonfinite=nonfinite)

    def _advance(self, objective: Objective, start: Start) -> bool:
        group = self.param_groups[0]
        a, system = self._system(start)
        d, t = system.solve(float(group["damping"])), float(group["lr"])
        if group["kl"] is not None:
            length = float((a @ d).square().sum())
            t = min(t, math.sqrt(2 * group["kl"] / length)) if length > 0 else t
        self._write(start.x.add(d.to(start.x.dtype), alpha=t))
        return True
