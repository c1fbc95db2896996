"""Symmetric products in strips equal the whole product."""

from __future__ import annotations

import math

import pytest
import torch

from guided_descent.linalg.gram import STRIP, add_gram


@pytest.mark.parametrize("lead", [(), (2,), (2, 3)])
@pytest.mark.parametrize("d", [0, 1, 7, STRIP, 2 * STRIP, 3 * STRIP + 5])
@pytest.mark.parametrize("turned", [False, True])
def test_it_is_the_product(lead: tuple[int, ...], d: int, turned: bool) -> None:
    n = 9
    a = torch.randn(*lead, n, d, dtype=torch.float64).mT if turned else torch.randn(*lead, d, n, dtype=torch.float64)
    start = torch.randn(*lead, d, d, dtype=torch.float64)
    start = start + start.mT
    expected = 0.9 * start + 0.3 * (a @ a.mT)
    found = start.clone()
    assert add_gram(found, a, beta=0.9, alpha=0.3) is found
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)
    torch.testing.assert_close(found, found.mT, rtol=0, atol=1e-12)


@pytest.mark.parametrize("d", [3, 2 * STRIP])
def test_what_was_there_is_ignored_with_weight_zero(d: int) -> None:
    a = torch.randn(d, 4)
    found = add_gram(torch.full((d, d), math.nan), a, beta=0.0)
    torch.testing.assert_close(found, a @ a.mT)


def test_no_columns_add_nothing() -> None:
    found = add_gram(torch.ones(2 * STRIP, 2 * STRIP), torch.zeros(2 * STRIP, 0), beta=0.5)
    assert torch.equal(found, torch.full_like(found, 0.5))
