"""The quadratic model of a loss: its Gauss-Newton matrix as products or dense, its Hessian, and damped solves."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from guided_descent.solvers.objective import Objective, flatten, scalar

#: Largest dense matrix, in bytes of float64.
DENSE_BYTES = 2**30
_CHUNK_NUMBERS = 2**23  # of a batch of backward passes: rows x parameters
SPACES = ("auto", "parameters", "samples")


class Linearization:
    """``loss(theta + d) ~ loss + g.d + |A d|²/2`` at the present parameters: ``A = Sᵀ J``, ``g = Aᵀ rho``.

    ``J`` is the Jacobian of residuals or outputs and ``S`` the root of the loss's Hessian by them (``Likelihood``);
    ``loss = scale sum r²`` has ``S = sqrt(2 scale) I`` and ``rho = sqrt(2 scale) r``. The graph belongs to the values
    the parameters have now: products must be done before they change.

    ``A v`` is computed without forward mode: ``Jᵀ u`` is linear in ``u``, and its derivative by ``u`` along ``v`` is
    ``J v``. Attention runs in its plain form, since fused kernels have no second derivative.

    Args:
        objective: With residuals or outputs.
        parameters: All trainable parameters, in order.
        count: Called with the number of products made.
    """

    def __init__(self, objective: Objective, parameters: Sequence[Tensor], count: Callable[[int], None]) -> None:
        self.objective, self.parameters, self.count = objective, list(parameters), count
        self.sizes = [p.numel() for p in parameters]
        with torch.enable_grad(), sdpa_kernel(SDPBackend.MATH):
            self.z = objective.inner()
            if not isinstance(self.z, Tensor) or not self.z.requires_grad:
                raise TypeError("residuals and outputs must be a tensor computed from the parameters, without detach")
            self.value = scalar(objective.value_of(self.z))
        self.at = self.z.detach()
        self._back: tuple[Tensor, list[Tensor | None]] | None = None

    @property
    def loss(self) -> Tensor:
        """The loss, detached."""
        return self.value.detach()

    def gradient(self) -> Tensor:
        """The flat gradient ``[P]`` of the loss."""
        found = torch.autograd.grad(self.value, self.parameters, retain_graph=True, allow_unused=True)
        return flatten(found, self.parameters)

    def rho(self) -> Tensor:
        """``rho``, flat: ``Aᵀ rho`` is the gradient."""
        if self.objective.likelihood is not None:
            return self.objective.likelihood.rho(self.at).reshape(-1)
        return self._scaled(self.at).reshape(-1)

    def forward(self, v: Tensor) -> Tensor:
        """``A v``, flat, for flat ``v`` ``[P]``."""
        self.count(1)
        if self._back is None:
            with torch.enable_grad():
                u = torch.zeros_like(self.at, requires_grad=True)
                found = torch.autograd.grad(self.z, self.parameters, u, create_graph=True, allow_unused=True)
            self._back = u, list(found)
        u, back = self._back
        pieces = [piece.view_as(p).to(p.dtype) for piece, p in zip(torch.split(v, self.sizes), self.parameters)]
        pairs = [(b, piece) for b, piece in zip(back, pieces) if b is not None and b.requires_grad]
        (jv,) = torch.autograd.grad([b for b, _ in pairs], u, [piece for _, piece in pairs], retain_graph=True)
        return self._root_t(jv).reshape(-1)

    def adjoint(self, w: Tensor) -> Tensor:
        """``Aᵀ w``, flat ``[P]``, for flat ``w``."""
        self.count(1)
        found = torch.autograd.grad(
            self.z, self.parameters, self._root(w.view_as(self.at)), retain_graph=True, allow_unused=True
        )
        return flatten(found, self.parameters)

    def dense(self) -> Tensor:
        """``A`` as a float64 matrix ``[n, P]``.

        Raises:
            ValueError: It would be larger than 1 GiB, or the objective's own Jacobian has another shape.
        """
        n, width = self.at.numel(), sum(self.sizes)
        check_dense("the Jacobian", n, width)
        if self.objective.jacobian is not None:
            with torch.enable_grad():
                j = self.objective.jacobian().detach()
            if j.shape != (n, width):
                raise ValueError(f"jacobian() returned {list(j.shape)}; it must be [{n}, {width}]: one row a residual")
            return self._root_t(j.T.reshape(width, *self.at.shape)).reshape(width, n).T.double()
        self.count(n)
        a = torch.empty(n, width, dtype=torch.float64, device=self.at.device)
        chunk = max(1, _CHUNK_NUMBERS // max(n, width))
        for start in range(0, n, chunk):
            rows = range(start, min(start + chunk, n))
            basis = torch.zeros(len(rows), n, dtype=self.at.dtype, device=self.at.device)
            basis[range(len(rows)), rows] = 1
            seeds = self._root(basis.view(len(rows), *self.at.shape))
            a[start : start + len(rows)] = batched(self.z, self.parameters, seeds)
        return a

    def _root(self, w: Tensor) -> Tensor:
        likelihood = self.objective.likelihood
        return self._scaled(w) if likelihood is None else likelihood.root(self.at, w)

    def _root_t(self, w: Tensor) -> Tensor:
        likelihood = self.objective.likelihood
        return self._scaled(w) if likelihood is None else likelihood.root_t(self.at, w)

    def _scaled(self, w: Tensor) -> Tensor:
        return w * math.sqrt(2 * self.objective.square_scale(self.at))


def hessian(loss: Tensor, parameters: Sequence[Tensor], count: Callable[[int], None]) -> tuple[Tensor, Tensor]:
    """Flat gradient ``[P]`` and Hessian ``[P, P]`` (float64, symmetrized) of a loss with its graph.

    Raises:
        ValueError: It would be larger than 1 GiB.
        RuntimeError: The graph is gone, or has no second derivative.
    """
    width = sum(p.numel() for p in parameters)
    check_dense("the Hessian", width, width)
    with torch.enable_grad():
        first = torch.autograd.grad(loss, parameters, create_graph=True, allow_unused=True)
        flat = torch.cat([(torch.zeros_like(p) if g is None else g).reshape(-1) for g, p in zip(first, parameters)])
    g = flat.detach()
    h = torch.zeros(width, width, dtype=torch.float64, device=g.device)
    if not flat.requires_grad:  # the loss is linear
        return g, h
    count(width)
    chunk = max(1, _CHUNK_NUMBERS // width)
    for start in range(0, width, chunk):
        rows = range(start, min(start + chunk, width))
        seeds = torch.zeros(len(rows), width, dtype=g.dtype, device=g.device)
        seeds[range(len(rows)), rows] = 1
        h[start : start + len(rows)] = batched(flat, parameters, seeds)
    return g, (h + h.T) / 2


def batched(z: Tensor, parameters: Sequence[Tensor], seeds: Tensor) -> Tensor:
    """``Jᵀ w`` for every ``w`` of ``seeds`` ``[k, *z.shape]`` by batched backward passes: ``[k, P]``."""
    found = torch.autograd.grad(z, parameters, seeds, retain_graph=True, allow_unused=True, is_grads_batched=True)
    k = len(seeds)
    return torch.cat(
        [p.new_zeros(k, p.numel()) if g is None else g.reshape(k, -1) for g, p in zip(found, parameters)], 1
    )


def check_dense(what: str, rows: int, columns: int) -> None:
    """Refuse matrices that would not fit.

    Raises:
        ValueError: Larger than 1 GiB in float64.
    """
    if 8 * rows * columns > DENSE_BYTES:
        raise ValueError(
            f"{what} would be {rows} x {columns}, {8 * rows * columns / 2**30:.1f} GiB: this method is for small "
            "problems; use HessianFree or LBFGS, or a smaller batch"
        )


class DampedSystem:
    """``(Aᵀ A + lam D) d = -Aᵀ rho``, solved in float64 for one ``lam`` after another.

    In parameter space by a Cholesky factor of the ``P x P`` matrix; in sample space by one of the ``n x n`` matrix:
    ``d = -D⁻¹ Aᵀ (A D⁻¹ Aᵀ + lam I)⁻¹ rho``. A matrix that is not positive definite in floating point is solved by its
    pseudo-inverse.

    Args:
        a: ``[n, P]`` float64.
        rho: ``[n]``.
        metric: The diagonal ``D`` ``[P]``, positive; None for the identity.
        space: ``auto`` takes the smaller matrix; ``parameters``; ``samples``.
    """

    def __init__(self, a: Tensor, rho: Tensor, metric: Tensor | None = None, space: str = "auto") -> None:
        n, width = a.shape
        self.samples = space == "samples" or (space == "auto" and n < width)
        check_dense("the damped matrix", *((n, n) if self.samples else (width, width)))
        rho = rho.double()
        self.metric = a.new_ones(width) if metric is None else metric.double()
        if self.samples:
            self.lift = a if metric is None else a / self.metric
            self.matrix, self.right, self.added = self.lift @ a.T, rho, a.new_ones(n)
        else:
            self.matrix, self.right, self.added = a.T @ a, a.T @ rho, self.metric

    def solve(self, lam: float) -> Tensor:
        """``d``, float64 ``[P]``."""
        damped = self.matrix.clone()
        damped.diagonal().add_(self.added, alpha=lam)
        solution = solve_psd(damped, self.right)
        return -(self.lift.T @ solution) if self.samples else -solution


def solve_psd(matrix: Tensor, right: Tensor) -> Tensor:
    """``matrix⁻¹ right`` for a positive semidefinite matrix; its pseudo-inverse where Cholesky breaks down.

    Eigenvalues below ``n eps`` times the largest count as zero.
    """
    factor, info = torch.linalg.cholesky_ex(matrix)
    if not bool(info):
        return torch.cholesky_solve(right[:, None], factor)[:, 0]
    values, vectors = torch.linalg.eigh(matrix)
    cut = len(values) * torch.finfo(values.dtype).eps * values[-1].abs()
    inverse = torch.where(values > cut, 1 / values, 0.0)
    solution: Tensor = vectors @ (inverse * (vectors.T @ right))
    return solution
