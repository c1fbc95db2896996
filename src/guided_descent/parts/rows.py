"""Rows: a list of same-role tensors that parts treat as one, so that a formula is written once for every layout.

Elementwise work runs on many tensors at once through ``torch._foreach_*``; matrix work on their common ``stack``. In
compiled mode scalars are 0-d tensors and the list is unrolled, so that Inductor fuses it and a new learning rate needs
no new graph.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeAlias

import torch
from torch import Tensor

Number: TypeAlias = float | Tensor
Scalar: TypeAlias = float | Tensor | Sequence[Number]  # one for all rows, or one for each row


class Rows:
    """Tensors that share a role in a batch: gradients, a state slot, the direction.

    Every method works in place, row by row, and returns ``self``. A scalar argument is a number for all rows or a
    sequence with one number for each row.

    Attributes:
        list: One tensor for each piece, in the piece's own layout.
        stack: The same memory as one tensor ``[B, *shape]``, where the batch is stacked; else ``None``.
    """

    __slots__ = ("list", "loop", "stack")

    def __init__(self, rows: list[Tensor], stack: Tensor | None = None, loop: bool = False) -> None:
        self.list = rows
        self.stack = stack
        self.loop = loop or len(rows) == 1

    def __len__(self) -> int:
        return len(self.list)

    @property
    def whole(self) -> Tensor:
        """The stack, where the batch must be stacked."""
        if self.stack is None:
            raise TypeError("these rows are not stacked: a part that needs the stack declares unit = 'matrix'")
        return self.stack

    def copy_(self, other: Rows) -> Rows:
        """``a <- b``, converting the dtype."""
        if self.loop:
            for a, b in zip(self.list, other.list):
                a.copy_(b)
        else:
            torch._foreach_copy_(self.list, other.list)
        return self

    def zero_(self) -> Rows:
        """``a <- 0``."""
        torch._foreach_zero_(self.list)
        return self

    def mul_(self, other: Rows | Scalar) -> Rows:
        """``a <- a b``."""
        return self._binary(other, Tensor.mul_, torch._foreach_mul_)

    def div_(self, other: Rows | Scalar) -> Rows:
        """``a <- a / b``."""
        return self._binary(other, Tensor.div_, torch._foreach_div_)

    def rdiv_(self, other: Rows) -> Rows:
        """``a <- b / a``."""
        for a, b in zip(self.list, other.list):
            torch.div(b, a, out=a)
        return self

    def maximum_(self, other: Rows) -> Rows:
        """``a <- max(a, b)``, elementwise."""
        if self.loop:
            for a, b in zip(self.list, other.list):
                a.copy_(torch.maximum(a, b))
        else:
            torch._foreach_maximum_(self.list, other.list)
        return self

    def add_(self, other: Rows | Scalar, alpha: Scalar = 1.0) -> Rows:
        """``a <- a + alpha b``."""
        if not isinstance(other, Rows):
            return self._binary(other, Tensor.add_, torch._foreach_add_)
        if isinstance(alpha, float | int):
            if self.loop:
                for a, b in zip(self.list, other.list):
                    a.add_(b, alpha=alpha)
            else:
                torch._foreach_add_(self.list, other.list, alpha=alpha)
        else:
            for a, b, c in zip(self.list, other.list, self._each(alpha)):
                if isinstance(c, Tensor):
                    a.add_(b * c)
                else:
                    a.add_(b, alpha=c)
        return self

    def lerp_(self, other: Rows, weight: Scalar) -> Rows:
        """``a <- a + weight (b - a)``."""
        if self.loop or not isinstance(weight, float):
            for a, b, w in zip(self.list, other.list, self._each(weight)):
                a.lerp_(b, w if not isinstance(w, Tensor) else w.to(a.dtype))
        else:
            torch._foreach_lerp_(self.list, other.list, weight)
        return self

    def addcmul_(self, b: Rows, c: Rows, value: Scalar = 1.0) -> Rows:
        """``a <- a + value b c``."""
        return self._ternary(b, c, value, torch.mul, Tensor.addcmul_, torch._foreach_addcmul_)

    def addcdiv_(self, b: Rows, c: Rows, value: Scalar = 1.0) -> Rows:
        """``a <- a + value b / c``."""
        return self._ternary(b, c, value, torch.div, Tensor.addcdiv_, torch._foreach_addcdiv_)

    def sqrt_(self) -> Rows:
        """``a <- sqrt(a)``."""
        return self._unary(Tensor.sqrt_, torch._foreach_sqrt_)

    def root_of_(self, other: Rows) -> Rows:
        """``a <- sqrt(b)``."""
        if self.loop:
            for a, b in zip(self.list, other.list):
                torch.sqrt(b, out=a)
            return self
        return self.copy_(other).sqrt_()

    def mix_(self, b: Rows, c: Rows, weight: Scalar) -> Rows:
        """``a <- b + weight (c - b)``."""
        if self.loop and isinstance(weight, float):
            for x, y, z in zip(self.list, b.list, c.list):
                torch.lerp(y, z, weight, out=x)
            return self
        return self.copy_(b).lerp_(c, weight)

    def abs_(self) -> Rows:
        """``a <- |a|``."""
        return self._unary(Tensor.abs_, torch._foreach_abs_)

    def neg_(self) -> Rows:
        """``a <- -a``."""
        return self._unary(Tensor.neg_, torch._foreach_neg_)

    def sign_(self) -> Rows:
        """``a <- sign(a)``, with sign(0) = 0."""
        return self._unary(Tensor.sign_, torch._foreach_sign_)

    def tanh_(self) -> Rows:
        """``a <- tanh(a)``."""
        return self._unary(Tensor.tanh_, torch._foreach_tanh_)

    def expm1_(self) -> Rows:
        """``a <- exp(a) - 1``, exact where a is small."""
        return self._unary(Tensor.expm1_, torch._foreach_expm1_)

    def positive_(self) -> Rows:
        """``a <- [a > 0]``, 1 or 0."""
        return self.apply_(lambda row: row.gt_(0))

    def clamp_(self, low: Number | None = None, high: Number | None = None) -> Rows:
        """``a <- min(max(a, low), high)``, elementwise."""
        lows, highs = self._bounds(low), self._bounds(high)
        for row, least, most in zip(self.list, lows, highs):
            row.clamp_(least, most)  # type: ignore[arg-type]
        return self

    def _bounds(self, bound: Number | None) -> Sequence[Number | None]:
        return [None] * len(self.list) if bound is None else self._each(bound)

    def apply_(self, function: Callable[..., object], *others: Rows) -> Rows:
        """Call ``function(a, b, ...)`` on each row; it must write into ``a``."""
        for row in zip(self.list, *(other.list for other in others)):
            function(*row)
        return self

    def norms(self) -> Tensor:
        """Euclidean norm of each row ``[rows]``, in at least float32."""
        dtype = torch.float64 if self.list[0].dtype == torch.float64 else torch.float32
        return torch.stack([torch.linalg.vector_norm(row, dtype=dtype) for row in self.list])

    def _each(self, scalar: Scalar) -> Sequence[Number]:
        if isinstance(scalar, float | int):
            return [scalar] * len(self.list)
        if isinstance(scalar, Tensor):
            apart = _apart(scalar, self.list[0].dtype)
            return [apart] * len(self.list) if scalar.ndim == 0 else list(apart.unbind())
        return scalar

    def _unary(self, one: Callable[[Tensor], Tensor], many: Callable[[list[Tensor]], object]) -> Rows:
        if self.loop:
            for a in self.list:
                one(a)
        else:
            many(self.list)
        return self

    def _binary(
        self, other: Rows | Scalar, one: Callable[[Tensor, Number], Tensor], many: Callable[..., object]
    ) -> Rows:
        if self.loop or isinstance(other, Tensor) or (isinstance(other, list) and isinstance(other[0], Tensor)):
            values = other.list if isinstance(other, Rows) else self._each(other)
            for a, b in zip(self.list, values):
                one(a, b)
        else:
            many(self.list, other.list if isinstance(other, Rows) else other)
        return self

    def _ternary(
        self,
        b: Rows,
        c: Rows,
        value: Scalar,
        inner: Callable[[Tensor, Tensor], Tensor],
        one: Callable[..., Tensor],
        many: Callable[..., object],
    ) -> Rows:
        if self.loop or isinstance(value, Tensor):
            for x, y, z, v in zip(self.list, b.list, c.list, self._each(value)):
                if isinstance(v, Tensor):
                    x.add_(inner(y, z) * v)
                else:
                    one(x, y, z, value=v)
        elif isinstance(value, float | int):
            many(self.list, b.list, c.list, value)
        else:
            many(self.list, b.list, c.list, list(value))
        return self


def _apart(scalars: Tensor, dtype: torch.dtype) -> Tensor:
    """Scalars for the rows; inside a graph for a CPU, behind an operation that is not fused with loops.

    The compiler would move what leads to a scalar, powers and roots, into the loop over elements and compute it anew
    for each few of them, which takes more than twice the time of the update. The median of one number is that number.
    """
    if torch.compiler.is_compiling() and scalars.device.type == "cpu":
        return torch.median(scalars.to(dtype).unsqueeze(-1), -1).values
    return scalars
