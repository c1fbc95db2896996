"""Objective: what a solver may ask of a training task; a plain closure is one where gradients are enough."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from guided_descent.solvers.likelihoods import Likelihood

HOW = (
    "Objective(residuals=lambda: model(x) - y) for a sum of squares, or "
    "Objective(outputs=lambda: model(x), likelihood=Likelihood('cross_entropy', y))"
)


@dataclass(frozen=True, kw_only=True)
class Objective:
    """The loss as a function of the parameters' present values, in as much detail as the method needs.

    Give one of ``loss``, ``residuals``, and ``outputs`` with ``likelihood``; or a ``closure`` alone. All are called
    without arguments, several times a step, and must give the same value at the same parameters: fixed batch, dropout
    and batch statistics switched off. None of them calls ``backward`` except ``closure``.

    Attributes:
        loss: The loss, a differentiable tensor with one element.
        residuals: A tensor ``r`` of any shape; the loss is ``scale * sum r²``.
        scale: Of ``residuals``; None: one over their number, so that the loss is the mean square.
        outputs: The model's outputs ``[..., C]``; the loss is ``likelihood.value(outputs)``.
        likelihood: The loss of the outputs, with its targets.
        jacobian: The Jacobian of ``residuals`` or ``outputs``, flattened row by row, by the trainable parameters in
            their order: ``[n, P]``. None: it is computed by batched backward passes, n of them in all, which a task
            with independent samples can do faster.
        closure: Clears gradients, computes the loss, calls ``backward`` and returns the loss. With one, an ordinary
            optimizer may call the objective.

    Raises:
        TypeError: Too little or too much is given.
        ValueError: ``scale`` is not positive.
    """

    loss: Callable[[], Tensor] | None = None
    residuals: Callable[[], Tensor] | None = None
    scale: float | None = None
    outputs: Callable[[], Tensor] | None = None
    likelihood: Likelihood | None = None
    jacobian: Callable[[], Tensor] | None = None
    closure: Callable[[], Tensor] | None = None

    def __post_init__(self) -> None:
        given = [name for name in ("loss", "residuals", "outputs") if getattr(self, name) is not None]
        if len(given) > 1:
            raise TypeError(f"an Objective takes one of loss, residuals and outputs, not {' and '.join(given)}")
        if not given and self.closure is None:
            raise TypeError(f"an empty Objective: give a loss, or {HOW}")
        if (self.outputs is None) != (self.likelihood is None):
            raise TypeError(f"outputs and likelihood belong together: {HOW}")
        if self.scale is not None and (self.residuals is None or not self.scale > 0):
            raise ValueError(f"scale={self.scale!r} must be positive, and belongs to residuals")
        if self.jacobian is not None and not self.curved:
            raise TypeError("jacobian belongs to residuals or outputs; give them, too")

    def __call__(self) -> Tensor:
        """Run the closure.

        Raises:
            TypeError: There is none.
        """
        if self.closure is None:
            raise TypeError("this Objective has no closure; give closure=... to use it with an ordinary optimizer")
        return self.closure()

    @property
    def curved(self) -> bool:
        """Whether there are residuals or outputs, from which a Gauss-Newton matrix is made."""
        return self.residuals is not None or self.outputs is not None

    @property
    def differentiable(self) -> bool:
        """Whether ``value`` may be called."""
        return self.loss is not None or self.curved

    def value(self) -> Tensor:
        """The loss with its graph."""
        if self.loss is not None:
            return self.loss()
        return self.value_of(self.inner())

    def inner(self) -> Tensor:
        """The residuals or the outputs with their graph."""
        function = self.residuals if self.residuals is not None else self.outputs
        assert function is not None
        return function()

    def value_of(self, z: Tensor) -> Tensor:
        """The loss of given residuals or outputs."""
        if self.likelihood is not None:
            return self.likelihood.value(z)
        return z.square().sum() * self.square_scale(z)

    def square_scale(self, r: Tensor) -> float:
        """``scale``, or one over the number of residuals."""
        return self.scale if self.scale is not None else 1 / r.numel()

    def products(self, parameters: Sequence[Tensor], vectors: Sequence[Sequence[Tensor]]) -> Tensor:
        """``v_i^T G v_j`` for displacements of the parameters [k, k], in float64.

        G is the Gauss-Newton matrix of the loss at the parameters' present values. One forward and one backward pass,
        and two backward passes for each vector.

        Args:
            parameters: The trainable parameters.
            vectors: k of them, each with one tensor for each parameter.

        Raises:
            TypeError: There are neither residuals nor outputs, or they do not come from the parameters.
        """
        from guided_descent.solvers.curvature import Linearization

        if not self.curved:
            raise TypeError(f"products with the Gauss-Newton matrix need residuals or outputs: {HOW}")
        made = Linearization(self, parameters, lambda products: None)
        rows = torch.stack([made.forward(flatten(vector, parameters)) for vector in vectors]).double()
        return rows @ rows.mT

    def gradient(self, parameters: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """The loss, detached, and its flat gradient ``[P]``; a parameter without influence has zeros.

        A closure may call ``backward`` or leave it out: if no parameter has a gradient afterwards, its loss is
        differentiated here.

        Raises:
            TypeError: What is returned is no scalar, or has no gradient.
        """
        with torch.enable_grad():
            if self.differentiable:
                loss = scalar(self.value())
            else:
                for p in parameters:
                    p.grad = None
                loss = scalar(self())
                if any(p.grad is not None for p in parameters):
                    return loss.detach(), flatten([p.grad for p in parameters], parameters)
            if not loss.requires_grad:
                raise TypeError(
                    "the loss has no gradient: compute it from the parameters, without detach; a closure calls "
                    "backward or returns the loss with its graph"
                )
            gradients = torch.autograd.grad(loss, parameters, allow_unused=True)
        return loss.detach(), flatten(gradients, parameters)


def as_objective(given: object) -> Objective:
    """An Objective, made from a closure if need be.

    Raises:
        TypeError: Neither.
    """
    if isinstance(given, Objective):
        return given
    if not callable(given):
        what = "nothing" if given is None else f"a {type(given).__name__}"
        raise TypeError(
            f"step() got {what}; a solver evaluates the loss itself: pass a closure, or an Objective such as {HOW}"
        )
    return Objective(closure=given)


def scalar(loss: object) -> Tensor:
    """The loss as a 0-d tensor.

    Raises:
        TypeError: It is no tensor with one element.
    """
    if not isinstance(loss, Tensor) or loss.numel() != 1:
        what = f"a tensor of shape {list(loss.shape)}" if isinstance(loss, Tensor) else f"a {type(loss).__name__}"
        raise TypeError(f"the objective returned {what}; it must return the loss, a tensor with one element")
    return loss.reshape(())


def flatten(tensors: Sequence[Tensor | None], like: Sequence[Tensor]) -> Tensor:
    """One vector from a tensor for each parameter; None counts as zeros."""
    pieces = []
    for tensor, p in zip(tensors, like):
        if tensor is None:
            pieces.append(p.new_zeros(p.numel()))
        else:
            pieces.append((tensor.to_dense() if tensor.is_sparse else tensor).detach().reshape(-1))
    return torch.cat(pieces)
