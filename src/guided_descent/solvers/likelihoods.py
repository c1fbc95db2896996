"""A loss of ``guided_descent.capture.LOSSES`` with its targets, in the scaling of the solvers: the mean over terms."""

from __future__ import annotations

import math

from torch import Tensor

from guided_descent.capture.losses import Loss, as_loss


class Likelihood:
    """The mean over the T terms of a loss, ``L(z) = 1/T sum_t l_t(z_t, y_t)``, as a function of the outputs alone.

    ``d²L/dz² = S Sᵀ`` and ``S rho = dL/dz``; both ``S`` and ``rho`` are those of the loss, which belong to the sum over
    terms, over sqrt(T).

    Args:
        loss: A name in ``guided_descent.capture.LOSSES``, or a ``Loss``, such as ``Masked(CrossEntropy(), mask)``.
        targets: What the outputs are compared with: classes ``[...]`` for cross-entropy of outputs ``[..., C]``, else
            shaped like the outputs.

    Raises:
        ValueError: Unknown name; the message lists the valid ones.

    Example:
        >>> import torch
        >>> Likelihood("mse", torch.zeros(2, 3)).value(torch.ones(2, 3)).item()
        1.0
    """

    def __init__(self, loss: Loss | str, targets: Tensor) -> None:
        self.loss = as_loss(loss)
        self.targets = targets

    def value(self, z: Tensor) -> Tensor:
        """``L(z)``, differentiable in ``z``."""
        return self.loss.value(z, self.targets)

    def root(self, z: Tensor, w: Tensor) -> Tensor:
        """``S w`` for ``w`` shaped like ``z``, or with more dimensions before."""
        return self.loss.root(z, w) / math.sqrt(self.loss.terms(z))

    def root_t(self, z: Tensor, w: Tensor) -> Tensor:
        """``Sᵀ w`` for ``w`` shaped like ``z``, or with more dimensions before."""
        return self.loss.root_t(z, w) / math.sqrt(self.loss.terms(z))

    def rho(self, z: Tensor) -> Tensor:
        """The vector with ``S rho = dL/dz``, shaped like ``z``."""
        return self.loss.rho(z, self.targets) / math.sqrt(self.loss.terms(z))
