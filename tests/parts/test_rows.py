"""Rows: one formula for lists, loops and compiled scalars, checked against float64 arithmetic."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from guided_descent.parts import Rows

SHAPES = [(3, 2), (5,), (), (2, 3, 1)]
COUNT = len(SHAPES)


def numbers(seed: int, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.rand(shape, generator=generator, dtype=torch.float64).add(0.5).to(dtype) for shape in SHAPES]


#: name -> (call on rows a, b, c with a scalar s; the same on tensors)
METHODS: dict[str, tuple[Callable[..., Any], Callable[..., Tensor]]] = {
    "copy_": (lambda a, b, c, s: a.copy_(b), lambda a, b, c, s: b),
    "zero_": (lambda a, b, c, s: a.zero_(), lambda a, b, c, s: 0 * a),
    "mul_ rows": (lambda a, b, c, s: a.mul_(b), lambda a, b, c, s: a * b),
    "mul_ number": (lambda a, b, c, s: a.mul_(s), lambda a, b, c, s: a * s),
    "div_ rows": (lambda a, b, c, s: a.div_(b), lambda a, b, c, s: a / b),
    "div_ number": (lambda a, b, c, s: a.div_(s), lambda a, b, c, s: a / s),
    "rdiv_": (lambda a, b, c, s: a.rdiv_(b), lambda a, b, c, s: b / a),
    "maximum_": (lambda a, b, c, s: a.maximum_(b), lambda a, b, c, s: torch.maximum(a, b)),
    "add_ rows": (lambda a, b, c, s: a.add_(b), lambda a, b, c, s: a + b),
    "add_ number": (lambda a, b, c, s: a.add_(s), lambda a, b, c, s: a + s),
    "add_ alpha": (lambda a, b, c, s: a.add_(b, alpha=s), lambda a, b, c, s: a + s * b),
    "lerp_": (lambda a, b, c, s: a.lerp_(b, s), lambda a, b, c, s: a + s * (b - a)),
    "addcmul_": (lambda a, b, c, s: a.addcmul_(b, c, s), lambda a, b, c, s: a + s * b * c),
    "addcdiv_": (lambda a, b, c, s: a.addcdiv_(b, c, s), lambda a, b, c, s: a + s * b / c),
    "sqrt_": (lambda a, b, c, s: a.sqrt_(), lambda a, b, c, s: a.sqrt()),
    "neg_": (lambda a, b, c, s: a.neg_(), lambda a, b, c, s: -a),
    "abs_": (lambda a, b, c, s: a.neg_().abs_(), lambda a, b, c, s: a),
    "sign_": (lambda a, b, c, s: a.add_(b, alpha=-1.0).sign_(), lambda a, b, c, s: (a - b).sign()),
    "apply_": (lambda a, b, c, s: a.apply_(Tensor.mul_, b), lambda a, b, c, s: a * b),
}
SCALARS: dict[str, Any] = {
    "one": 0.3,
    "each": [0.1, 0.2, 0.3, 0.4],
    "tensor": torch.tensor(0.3, dtype=torch.float64),
    "tensors": torch.tensor([0.1, 0.2, 0.3, 0.4], dtype=torch.float64),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("scalar", SCALARS)
@pytest.mark.parametrize("loop", [False, True])
@pytest.mark.parametrize("name", METHODS)
def test_every_method_row_by_row(name: str, loop: bool, scalar: str, dtype: torch.dtype) -> None:
    call, formula = METHODS[name]
    s = SCALARS[scalar]
    a, b, c = (numbers(seed, dtype) for seed in range(3))
    each = [float(s)] * COUNT if scalar in ("one", "tensor") else [float(v) for v in s]
    expected = [formula(x.double(), y.double(), z.double(), v) for x, y, z, v in zip(a, b, c, each)]
    memory = [row.data_ptr() for row in a]
    rows = Rows(a, loop=loop)
    assert call(rows, Rows(b, loop=loop), Rows(c, loop=loop), s) is rows
    assert [row.data_ptr() for row in rows.list] == memory  # in place
    for got, want in zip(rows.list, expected):
        torch.testing.assert_close(got.double(), want, rtol=1e-6 if dtype == torch.float32 else 1e-14, atol=1e-7)
    assert all(map(torch.equal, b, numbers(1, dtype)))


def test_copying_converts() -> None:
    rows = Rows([torch.zeros(3), torch.zeros(2)])
    rows.copy_(Rows([torch.ones(3, dtype=torch.bfloat16), torch.full((2,), 2.0, dtype=torch.bfloat16)]))
    assert [row.tolist() for row in rows.list] == [[1, 1, 1], [2, 2]]
    assert rows.list[0].dtype == torch.float32


def test_norms_are_by_row_and_wide() -> None:
    rows = Rows([torch.full((4,), 300.0, dtype=torch.float16), torch.tensor([3.0, 4.0], dtype=torch.float16)])
    assert rows.norms().tolist() == [600.0, 5.0]  # the squares overflow float16
    assert rows.norms().dtype == torch.float32


def test_the_stack_is_there_or_an_error_says_why() -> None:
    stack = torch.zeros(2, 3)
    rows = Rows(list(stack), stack)
    rows.add_(1.0)
    assert rows.whole.sum() == 6
    with pytest.raises(TypeError, match="unit = 'matrix'"):
        _ = Rows([torch.zeros(3)]).whole
