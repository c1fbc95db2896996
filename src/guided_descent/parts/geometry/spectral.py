"""Spectral geometry: the direction of unit spectral norm, the polar factor of the momentum, and what varies it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from guided_descent.linalg.polar import polar
from guided_descent.linalg.workspace import Workspace
from guided_descent.parts.base import Batch, Hyper, Part, Slot, State, Unit, key
from guided_descent.routing.roles import Block

#: Dtypes in which the orthogonalisation may run; ``auto`` is bfloat16 where the device multiplies it natively.
NS_DTYPES: dict[str, torch.dtype | None] = {
    "auto": None,
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float64": torch.float64,
}


@dataclass(frozen=True)
class Polar(Part):
    """Orthogonalise the direction: ``u <- U V^T`` of ``u = U S V^T``, for each matrix ``[m, n]`` of the stack.

    Counted as ``orthogonalizations``. Source: Jordan et al. 2024; coefficients in ``guided_descent.linalg``.
    """

    slot: ClassVar[str] = "geometry"
    unit: ClassVar[Unit] = "matrix"
    coefficients: str = key("coefficients")
    steps: str = key("ns_steps")
    dtype: str = key("ns_dtype")
    method: str = key("ns_method")
    eps: str = key("eps")

    def slots(self, block: Block) -> dict[str, Slot]:
        """None: the polar factor remembers nothing."""
        return {}

    def update(self, x: Batch, s: State, h: Hyper, total: Mapping[str, Tensor]) -> None:
        """Replace each matrix of the direction by its polar factor; the length of the input does not matter."""
        self.factor(x, x.take().whole, h)

    def factor(self, x: Batch, u: Tensor, h: Hyper) -> None:
        """Write the polar factor of each matrix over it, and count."""
        self.orthogonalize(u, h, x.work)
        x.tick("orthogonalizations")

    def orthogonalize(self, u: Tensor, h: Hyper, work: Workspace | None = None) -> None:
        """Replace each matrix ``[..., m, n]`` by its polar factor, in place."""
        polar(
            u,
            coefficients=h[self.coefficients],
            steps=h[self.steps],
            dtype=NS_DTYPES[h[self.dtype]],
            eps=h[self.eps],
            method=h[self.method],
            out=u,
            work=work,
        )

    def flops(self, block: Block) -> float:
        """At most five standard quintic steps: ``20 r^2 c + 10 r^3`` with r the smaller side."""
        short, long = sorted(block.shape[-2:])
        return block.batch * (20.0 * short**2 * long + 10.0 * short**3)

    def scratch(self, block: Block) -> int:
        """None: one matrix at a time is orthogonalised, and the bound may be exceeded by one matrix."""
        return 0


@dataclass(frozen=True)
class DualPolar(Polar):
    """Steepest descent in the spectral norm: ``u <- ||u||_* U V^T`` of ``u = U S V^T``.

    The nuclear norm ``||u||_* = sum(S)`` is measured as ``<u, U V^T>``, with the polar factor as it was computed, so
    that the direction's length is what it gains. Source: Carlson et al. 2015.
    """

    def update(self, x: Batch, s: State, h: Hyper, total: Mapping[str, Tensor]) -> None:
        """Replace each matrix of the direction by its polar factor times its nuclear norm."""
        direction = x.take()
        kept = x.spare("dual").copy_(direction).whole
        super().update(x, s, h, total)
        u = direction.whole
        u.mul_(kept.mul_(u).sum((-2, -1), keepdim=True))

    def flops(self, block: Block) -> float:
        """Those of the polar factor, and 3 per element."""
        return super().flops(block) + 3.0 * block.numel

    def scratch(self, block: Block) -> int:
        """A copy of the direction."""
        return 4 * block.numel


@dataclass(frozen=True)
class Sign(Part):
    """The signs of the direction's elements: ``u <- sign(u)``, with 0 for 0 and NaN for NaN, which torch makes 0."""

    slot: ClassVar[str] = "geometry"

    def update(self, x: Batch, s: State, h: Hyper, total: Mapping[str, Tensor]) -> None:
        """Take the signs."""
        u = x.read()
        x.fresh().apply_(sign_, u)

    def flops(self, block: Block) -> float:
        """Two per element."""
        return 2.0 * block.numel


def sign_(row: Tensor, of: Tensor | None = None) -> None:
    """The signs of a tensor, or of another one, written into it."""
    tiny = torch.finfo(row.dtype).tiny  # a power of two
    torch.clamp(row if of is None else of, -tiny, tiny, out=row).mul_(1 / tiny)


@dataclass(frozen=True)
class NeuronRms(Part):
    """Equalise the rows of the direction, whose squares are averaged over time, and keep its norm.

    ``v <- beta v + (1 - beta) mean_j(u_ij^2)``; ``u_i <- u_i / (sqrt(v_i) + eps)``; then each matrix gets back the
    Frobenius norm that it had. With ``longer`` a wide matrix averages its columns instead. Corrections of the average's
    bias would cancel. State: ``neuron_avg_sq``, ``[m, 1]`` (or ``[1, n]``). Source: Li et al. 2025, 2510.05491.
    """

    slot: ClassVar[str] = "geometry"
    unit: ClassVar[Unit] = "matrix"
    beta: str = key("beta2")
    eps: str = key("moment_eps")
    longer: bool = False

    def _over(self, shape: tuple[int, ...]) -> int:
        """The axis over which squares are averaged."""
        return -2 if self.longer and shape[-2] < shape[-1] else -1

    def slots(self, block: Block) -> dict[str, Slot]:
        """The average of each row, or each column."""
        shape = list(block.shape)
        shape[self._over(block.shape)] = 1
        return {"neuron_avg_sq": Slot("factor", tuple(shape))}

    def update(self, x: Batch, s: State, h: Hyper, total: Mapping[str, Tensor]) -> None:
        """Advance the averages and divide; the norm before and after follows from the rows' own."""
        u, average, beta = x.take().whole, s["neuron_avg_sq"], h[self.beta]
        axis = self._over(x.shape)
        squares = torch.linalg.vector_norm(u, dim=axis, keepdim=True).square_().div_(u.shape[axis])
        average.mul_(beta).add_(squares * (1 - beta))
        divisor = average.sqrt().add_(h[self.eps])
        after = (squares / divisor.square()).sum((-2, -1), keepdim=True)
        restore = torch.where(after > 0, (squares.sum((-2, -1), keepdim=True) / after).sqrt_(), 0.0)
        u.mul_(restore / divisor)

    def flops(self, block: Block) -> float:
        """About 3 per element."""
        return 3.0 * block.numel


@dataclass(frozen=True)
class ElementRms(Part):
    """Divide each element by the root of its averaged square.

    ``v <- beta v + (1 - beta) u^2``, then ``u <- u / (sqrt(v) + eps)``. For directions whose length is set afterwards:
    the average's bias is not corrected. State: ``exp_avg_sq``, shaped like the parameter. Source: Si, Zhang and Shen
    2025, 2507.11005.
    """

    slot: ClassVar[str] = "geometry"
    beta: str = key("momentum")
    eps: str = key("moment_eps")

    def slots(self, block: Block) -> dict[str, Slot]:
        """The averaged square."""
        return {"exp_avg_sq": Slot(basis="square")}

    def update(self, x: Batch, s: State, h: Hyper, total: Mapping[str, Tensor]) -> None:
        """Advance the average and divide."""
        beta, average, u = h[self.beta], s["exp_avg_sq"], x.take()
        average.mul_(beta).addcmul_(u, u, 1 - beta)
        u.div_(x.spare("divisor").copy_(average).sqrt_().add_(h[self.eps]))

    def flops(self, block: Block) -> float:
        """About 6 per element."""
        return 6.0 * block.numel

    def scratch(self, block: Block) -> int:
        """The divisor."""
        return 4 * block.numel
