"""Output losses with the root of their Hessian: what Gauss-Newton and the Fisher matrix need to know of a loss.

For a loss ``L(z)`` of the outputs ``z``, ``H = d²L/dz² = S Sᵀ`` block by block, and ``rho`` is the vector with
``S rho = dL/dz``. With ``A = Sᵀ J`` and the Jacobian ``J = dz/dtheta``, the gradient is ``Aᵀ rho`` and the generalized
Gauss-Newton matrix ``Aᵀ A``, which for these losses is also the Fisher matrix of the model's own distribution.

=================  ======================================================  ===============================
name               loss of outputs z with targets y, N rows of C numbers   S of one row (without 1/sqrt N)
=================  ======================================================  ===============================
``mse``            mean over all N C elements of (z - y)²                  sqrt(2/C) I
``sum_mse``        mean over rows of sum (z - y)²                          sqrt(2) I
``half_mse``       mean over rows of sum (z - y)² / 2                      I
``cross_entropy``  mean over rows of -log softmax(z)[y]                    diag(sqrt p) - p sqrt(p)ᵀ
``bce``            mean over all N C elements of -log p(y), p = sigmoid z  diag sqrt(p (1 - p) / C)
=================  ======================================================  ===============================

Source: Martens 2020, "New insights and perspectives on the natural gradient method", arXiv:1412.1193.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable

from torch import Tensor
from torch.nn import functional as F

#: Probabilities below this count as this in the Hessian's root: rho divides by their square roots.
_FLOOR = 1e-12


class Likelihood(ABC):
    """A convex loss of outputs ``[..., C]``, the mean over the rows; targets are fixed at construction.

    Args:
        targets: What the outputs are compared with.
    """

    def __init__(self, targets: Tensor) -> None:
        self.targets = targets

    @abstractmethod
    def loss(self, z: Tensor) -> Tensor:
        """The loss, differentiable in ``z``."""

    @abstractmethod
    def root(self, z: Tensor, w: Tensor) -> Tensor:
        """``S w`` for ``w`` shaped like ``z``, or with more dimensions before."""

    @abstractmethod
    def root_t(self, z: Tensor, w: Tensor) -> Tensor:
        """``Sᵀ w`` for ``w`` shaped like ``z``, or with more dimensions before."""

    @abstractmethod
    def rho(self, z: Tensor) -> Tensor:
        """The vector with ``S rho = dL/dz``, shaped like ``z``."""

    def _like(self, z: Tensor) -> Tensor:
        """The targets in the outputs' shape and dtype.

        Raises:
            ValueError: They have other shapes.
        """
        if self.targets.shape != z.shape:
            raise ValueError(
                f"targets of shape {list(self.targets.shape)} do not fit outputs of shape {list(z.shape)}: "
                "make the shapes equal"
            )
        return self.targets.to(z.dtype)


class SquaredError(Likelihood):
    """``mean over rows of factor * sum (z - y)²``.

    Args:
        targets: Shaped like the outputs.
        reduction: ``mse`` (factor 1/C: torch's ``mse_loss``), ``sum_mse`` (1) or ``half_mse`` (1/2).
    """

    def __init__(self, targets: Tensor, reduction: str = "mse") -> None:
        super().__init__(targets)
        if reduction not in ("mse", "sum_mse", "half_mse"):
            raise ValueError(f"reduction={reduction!r} must be 'mse', 'sum_mse' or 'half_mse'")
        self.reduction = reduction

    def loss(self, z: Tensor) -> Tensor:
        """``factor * sum (z - y)² / N``."""
        return (z - self._like(z)).square().sum() * (self._scale(z) ** 2 / 2)

    def root(self, z: Tensor, w: Tensor) -> Tensor:
        """``S w`` with ``S = sqrt(2 factor / N) I``."""
        return w * self._scale(z)

    def root_t(self, z: Tensor, w: Tensor) -> Tensor:
        """``Sᵀ w``, which is ``S w``."""
        return w * self._scale(z)

    def rho(self, z: Tensor) -> Tensor:
        """``sqrt(2 factor / N) (z - y)``."""
        return (z - self._like(z)) * self._scale(z)

    def _scale(self, z: Tensor) -> float:
        width = z.shape[-1] if z.dim() else 1
        factor = {"mse": 1 / width, "sum_mse": 1.0, "half_mse": 0.5}[self.reduction]
        return math.sqrt(2 * factor * width / z.numel())


class CrossEntropy(Likelihood):
    """``mean over rows of -log softmax(z)[y]``; torch's ``cross_entropy`` with its defaults.

    Args:
        targets: int64 classes ``[...]`` for outputs ``[..., C]``.
    """

    def loss(self, z: Tensor) -> Tensor:
        """The mean negative log-probability of the targets.

        Raises:
            ValueError: Targets are no classes, or masked ones (below 0), which the mean would leave out.
        """
        if self.targets.is_floating_point() or bool((self.targets < 0).any()):
            raise ValueError("targets of CrossEntropy must be classes 0, 1, ...; leave masked rows out of the outputs")
        return F.cross_entropy(z.flatten(0, -2), self.targets.flatten())

    def root(self, z: Tensor, w: Tensor) -> Tensor:
        """``(sqrt(p) w - p (sqrt(p) . w)) / sqrt N`` row by row."""
        p, scale = self._probabilities(z)
        q = p.sqrt() * w
        return (q - p * q.sum(-1, keepdim=True)) * scale

    def root_t(self, z: Tensor, w: Tensor) -> Tensor:
        """``sqrt(p) (w - p . w) / sqrt N`` row by row."""
        p, scale = self._probabilities(z)
        return p.sqrt() * (w - (p * w).sum(-1, keepdim=True)) * scale

    def rho(self, z: Tensor) -> Tensor:
        """``(p - y) / sqrt(p) / sqrt N`` with one-hot ``y``."""
        p, scale = self._probabilities(z)
        return (p - F.one_hot(self.targets, z.shape[-1]).to(p.dtype)) / p.sqrt() * scale

    def _probabilities(self, z: Tensor) -> tuple[Tensor, float]:
        return z.softmax(-1).clamp(min=_FLOOR), math.sqrt(z.shape[-1] / z.numel())


class BinaryCrossEntropy(Likelihood):
    """The mean over all elements of ``-y log p - (1 - y) log(1 - p)``, ``p = sigmoid(z)``.

    Args:
        targets: Shaped like the outputs, 0 to 1.
    """

    def loss(self, z: Tensor) -> Tensor:
        """Torch's ``binary_cross_entropy_with_logits`` with its defaults."""
        return F.binary_cross_entropy_with_logits(z, self._like(z))

    def root(self, z: Tensor, w: Tensor) -> Tensor:
        """``sqrt(p (1 - p) / numel) w``."""
        return w * self._slope(z) / math.sqrt(z.numel())

    def root_t(self, z: Tensor, w: Tensor) -> Tensor:
        """``Sᵀ w``, which is ``S w``."""
        return self.root(z, w)

    def rho(self, z: Tensor) -> Tensor:
        """``(p - y) / sqrt(p (1 - p)) / sqrt numel``."""
        return (z.sigmoid() - self._like(z)) / self._slope(z) / math.sqrt(z.numel())

    def _slope(self, z: Tensor) -> Tensor:
        return (z.sigmoid() * (-z).sigmoid()).clamp(min=_FLOOR).sqrt()


LIKELIHOODS: dict[str, Callable[[Tensor], Likelihood]] = {
    "cross_entropy": CrossEntropy,
    "mse": lambda targets: SquaredError(targets, "mse"),
    "sum_mse": lambda targets: SquaredError(targets, "sum_mse"),
    "half_mse": lambda targets: SquaredError(targets, "half_mse"),
    "bce": BinaryCrossEntropy,
}


def likelihood(name: str, targets: Tensor) -> Likelihood:
    """A likelihood by name.

    Raises:
        ValueError: Unknown name; the message lists the valid ones.

    Example:
        >>> import torch
        >>> likelihood("mse", torch.zeros(2, 3)).loss(torch.ones(2, 3)).item()
        1.0
    """
    if name not in LIKELIHOODS:
        raise ValueError(f"likelihood={name!r} must be one of {', '.join(map(repr, LIKELIHOODS))}")
    return LIKELIHOODS[name](targets)
