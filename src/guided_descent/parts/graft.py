"""Grafting: the length of a step taken from another method, for a direction whose own length means little."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from guided_descent.parts.base import Batch, Hyper, Keyed, Slot, State, key
from guided_descent.parts.rows import Rows
from guided_descent.routing.roles import Block

#: Methods whose length may be grafted.
GRAFTS = ("sgd", "adagrad", "rmsprop", "adam")


@dataclass(frozen=True)
class Graft(Keyed):
    """The length of a diagonal method: ``P <- P ||D||_F / ||P||_F`` for each matrix, 0 where ``||P||_F`` is 0.

    The second moment is kept from the gradient as it comes in, from the first step; the direction ``D`` is made of the
    filtered gradient ``m``, which the method itself keeps:

    - ``sgd``: ``D = m``, without state;
    - ``adagrad``: ``D = m / (sqrt(v) + eps)``, ``v`` the sum of ``g^2``;
    - ``rmsprop``: the same with ``v <- b2 v + (1 - b2) g^2``;
    - ``adam``: the same with ``v / (1 - b2^t)``.

    State: ``exp_avg_sq``, shaped like the parameter. Source: Agarwal et al. 2020, 2002.11803; Shi et al. 2023,
    2309.06497.
    """

    kind: str = "adam"
    betas: str = key("betas")
    eps: str = key("graft_eps")

    def __post_init__(self) -> None:
        if self.kind not in GRAFTS:
            raise ValueError(f"kind={self.kind!r} must be one of {', '.join(map(repr, GRAFTS))}")

    def slots(self, block: Block) -> dict[str, Slot]:
        """The second moment, where there is one."""
        return {} if self.kind == "sgd" else {"exp_avg_sq": Slot()}

    def watch(self, g: Rows, s: State, h: Hyper) -> None:
        """Fold a gradient into the second moment."""
        if self.kind == "adagrad":
            s["exp_avg_sq"].addcmul_(g, g)
        elif self.kind != "sgd":
            beta = h[self.betas][1]
            s["exp_avg_sq"].mul_(beta).addcmul_(g, g, 1 - beta)

    def direction(self, x: Batch, m: Rows, s: State, h: Hyper) -> Rows:
        """``D``, in scratch that stays valid until the next call."""
        found = x.spare("graft")
        if self.kind == "sgd":
            return found.copy_(m)
        found.copy_(s["exp_avg_sq"]).sqrt_()
        if self.kind == "adam":
            found.div_((1 - h[self.betas][1] ** x.step) ** 0.5)
        return found.add_(h[self.eps] * x.eps_scale).rdiv_(m)

    def flops(self, block: Block) -> float:
        """About 12 per element: second moment, division, two norms."""
        return 12.0 * block.numel


def match_norms(direction: Tensor, like: Tensor) -> Tensor:
    """Give each matrix ``[..., m, n]`` the Frobenius norm of its fellow, in place; 0 where that cannot be done."""
    want, have = torch.linalg.matrix_norm(like), torch.linalg.matrix_norm(direction)
    ratio = want / have
    ratio = torch.where(ratio.isfinite(), ratio, torch.zeros_like(ratio))  # 0 / 0, and what has overflowed
    return direction.mul_(ratio[..., None, None])
