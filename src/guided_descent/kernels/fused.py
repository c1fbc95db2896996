"""Torch's own fused kernels, for the parts that they equal."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

import torch
from torch import Tensor

from guided_descent.parts import L2, AdamMoments, Decoupled, Descend, Momentum, Parts
from guided_descent.parts.rows import Rows

_DEVICES = ("cpu", "cuda", "mps", "xpu")


class Kernel(Protocol):
    """A whole update of many tensors in one call."""

    def can_use(self, device: torch.device, dtype: torch.dtype) -> bool:
        """Whether the kernel serves these tensors."""
        ...

    def run(self, p: Rows, g: Rows, s: Mapping[str, Any], h: Mapping[str, Any], step: Tensor, scales: Scales) -> None:
        """Update parameters and state in place. ``step`` is the number of this update, a float32 0-d tensor."""
        ...


class Scales:
    """The factors of a bucket's blocks on learning rate, decay and eps."""

    __slots__ = ("eps", "lr", "wd")

    def __init__(self, lr: float, wd: float, eps: float) -> None:
        self.lr, self.wd, self.eps = lr, wd, eps

    @property
    def plain(self) -> bool:
        """Whether the learning rate is the group's own, as kernels that decay with the same rate require."""
        return self.lr == 1.0


class FusedAdamW:
    """``torch._fused_adamw_``: moments, decay and step in one pass over memory."""

    def __init__(self, amsgrad: bool) -> None:
        self.amsgrad = amsgrad

    def can_use(self, device: torch.device, dtype: torch.dtype) -> bool:
        """Full precision on the devices that torch fuses for."""
        return device.type in _DEVICES and dtype in (torch.float32, torch.float64)

    def run(self, p: Rows, g: Rows, s: Mapping[str, Any], h: Mapping[str, Any], step: Tensor, scales: Scales) -> None:
        """One AdamW update."""
        beta1, beta2 = h["betas"]
        torch._fused_adamw_(
            p.list,
            g.list,
            s["exp_avg"].list,
            s["exp_avg_sq"].list,
            s["max_exp_avg_sq"].list if self.amsgrad else [],
            [step] * len(p.list),
            lr=h["lr"],
            beta1=float(beta1),
            beta2=float(beta2),
            weight_decay=float(h["weight_decay"]) * scales.wd,
            eps=float(h["eps"]) * scales.eps,
            amsgrad=self.amsgrad,
            maximize=bool(h.get("maximize")),
        )


class FusedSGD:
    """``torch._fused_sgd_``: L2, momentum and step in one pass; the first step must be known as such."""

    def __init__(self, momentum: bool, nesterov: bool) -> None:
        self.momentum = momentum
        self.nesterov = nesterov

    def can_use(self, device: torch.device, dtype: torch.dtype) -> bool:
        """Full precision on the devices that torch fuses for."""
        return device.type in _DEVICES and dtype in (torch.float32, torch.float64)

    def run(self, p: Rows, g: Rows, s: Mapping[str, Any], h: Mapping[str, Any], step: Tensor, scales: Scales) -> None:
        """One SGD update."""
        torch._fused_sgd_(
            p.list,
            g.list,
            s["momentum_buffer"].list if self.momentum else [],
            weight_decay=float(h["weight_decay"]) * scales.wd,
            momentum=float(h["momentum"]) if self.momentum else 0.0,
            lr=float(h["lr"]),
            dampening=float(h["dampening"]) if self.momentum else 0.0,
            nesterov=self.nesterov,
            maximize=bool(h.get("maximize")),
            is_first_step=bool(step == 1),
        )


#: The parts that a kernel equals, and the kernel. A combination with one more part no longer matches.
KERNELS: dict[Parts, Kernel] = {
    Parts(AdamMoments(), Decoupled(), Descend()): FusedAdamW(amsgrad=False),
    Parts(AdamMoments(amsgrad=True), Decoupled(), Descend()): FusedAdamW(amsgrad=True),
    Parts(L2(), Descend()): FusedSGD(momentum=False, nesterov=False),
    Parts(L2(), Momentum(), Descend()): FusedSGD(momentum=True, nesterov=False),
    Parts(L2(), Momentum(nesterov=True), Descend()): FusedSGD(momentum=True, nesterov=True),
}


def find(parts: Parts, device: torch.device, dtype: torch.dtype, scales: Scales) -> Kernel | None:
    """The kernel that equals these parts on this device, if there is one."""
    kernel = KERNELS.get(parts)
    return kernel if kernel is not None and scales.plain and kernel.can_use(device, dtype) else None
