"""Averages of Gram matrices: a symmetric product at little more than half of the arithmetic."""

from __future__ import annotations

import math
from itertools import pairwise

from torch import Tensor

#: Rows of a strip on the CPU; shorter sides than two of them take one product.
STRIP = 128


def add_gram(out: Tensor, a: Tensor, *, beta: float = 1.0, alpha: float = 1.0) -> Tensor:
    """``out <- beta out + alpha A Aᵀ``, in place, for a symmetric ``out``.

    On the CPU only the strips up to the diagonal are multiplied, ``(1 + 1/k) / 2`` of the arithmetic with k strips, and
    mirrored. Elsewhere a launch costs more than it saves, and it is one product.

    Args:
        out: [..., d, d], contiguous.
        a: [..., d, n].
        beta: Weight of what is there; 0 ignores it, NaN included.
        alpha: Weight of the product.

    Returns:
        ``out``.

    Example:
        >>> import torch
        >>> add_gram(torch.zeros(2, 2), torch.tensor([[1.0, 2.0], [0.0, 3.0]]))
        tensor([[5., 6.],
                [6., 9.]])
    """
    d = out.shape[-1]
    batch = math.prod(out.shape[:-2])
    full, rows = out.view(batch, d, d), a.reshape(batch, *a.shape[-2:])
    strips = d // STRIP if out.device.type == "cpu" else 1
    if strips < 2:
        full.baddbmm_(rows, rows.mT, beta=beta, alpha=alpha)
        return out
    cuts = [d * i // strips for i in range(strips + 1)]
    for start, end in pairwise(cuts):
        full[:, start:end, :end].baddbmm_(rows[:, start:end], rows[:, :end].mT, beta=beta, alpha=alpha)
    for start, end in pairwise(cuts[1:]):
        full[:, :start, start:end].copy_(full[:, start:end, :start].mT)
    return out
