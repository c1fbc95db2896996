"""The inner product of the quadratic models keeps what float32 products would lose."""

from __future__ import annotations

import pytest
import torch

from guided_descent.parts.damping import CHUNK, inner


@pytest.mark.parametrize("size", [0, 1, CHUNK - 1, CHUNK, CHUNK + 1, 2 * CHUNK + 3])
def test_products_are_taken_in_float64(size: int) -> None:
    made = torch.Generator().manual_seed(size)
    a, b = torch.randn(size, generator=made), torch.randn(size, generator=made)
    exact = (a.double() * b.double()).sum()
    got = inner([a, torch.ones(2, 3)], [b, torch.full((2, 3), 2.0)]) - 12
    assert got.dtype == torch.float64
    torch.testing.assert_close(got, exact, rtol=1e-12, atol=1e-11)


def test_cancellation_below_the_rounding_of_float32() -> None:
    x = torch.tensor([1 + 2.0**-12])
    got = inner([torch.cat([x, x])], [torch.cat([x, -(1 + 2.0**-11) * torch.ones(1)])])
    exact = x.double() ** 2 - x.double() * (1 + 2.0**-11)
    assert float(exact) != 0
    torch.testing.assert_close(got, exact.sum(), rtol=1e-12, atol=0)


def test_layouts_agree_by_element_and_not_by_memory() -> None:
    a = torch.randn(2, 3, 4, 5, generator=torch.Generator().manual_seed(0))
    b = torch.randn(2, 3, 4, 5, generator=torch.Generator().manual_seed(1))
    got = inner([a.to(memory_format=torch.channels_last)], [b])
    torch.testing.assert_close(got, (a.double() * b.double()).sum(), rtol=1e-12, atol=0)
