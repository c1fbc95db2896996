"""The check of gradients: right on every element, whatever the sums do, in little scratch."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from guided_descent.engine.policies import all_finite, culprits
from guided_descent.linalg.workspace import Workspace

DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.complex64]


@settings(max_examples=60, deadline=None)
@given(
    sizes=st.lists(st.integers(0, 50), min_size=1, max_size=8),
    dtypes=st.lists(st.sampled_from(DTYPES), min_size=8, max_size=8),
    bad=st.none() | st.tuples(st.integers(0, 7), st.integers(0, 49), st.sampled_from([math.nan, math.inf, -math.inf])),
)
def test_it_sees_exactly_the_bad_ones(
    sizes: list[int], dtypes: list[torch.dtype], bad: tuple[int, int, float] | None
) -> None:
    tensors = [torch.ones(size, dtype=dtype) for size, dtype in zip(sizes, dtypes)]
    wanted: list[int] = []
    if bad is not None and bad[0] < len(tensors) and tensors[bad[0]].numel():
        tensors[bad[0]][bad[1] % tensors[bad[0]].numel()] = bad[2]
        wanted = [bad[0]]
    assert all_finite(tensors, Workspace()) == (not wanted)
    assert culprits(tensors) == wanted


@pytest.mark.parametrize("numel", [10, 100_000])
@pytest.mark.parametrize("bad", [None, math.nan, math.inf])
def test_overflowing_sums_are_confirmed(numel: int, bad: float | None) -> None:
    tensors = [torch.full((numel,), 3e38), torch.full((numel,), -3e38), torch.full((5,), 6e4, dtype=torch.float16)]
    if bad is not None:
        tensors[1][7] = bad
    assert all_finite(tensors, Workspace()) == (bad is None)


@pytest.mark.parametrize("view", [lambda g: g.t(), lambda g: g[:, ::2], lambda g: g[:1].expand(8, 6)])
def test_layouts(view: object) -> None:
    g = torch.ones(8, 6)
    assert all_finite([view(g)], Workspace())  # type: ignore[operator]
    g[0, 0] = math.nan
    assert not all_finite([view(g)], Workspace())  # type: ignore[operator]


def test_opposite_infinities_do_not_cancel() -> None:
    g: list[Tensor] = [torch.tensor([math.inf, -math.inf]), torch.tensor([1.0])]
    assert not all_finite(g, Workspace())
    assert culprits(g) == [0]


def test_many_small_tensors_need_little_scratch() -> None:
    work = Workspace()
    assert all_finite([torch.ones(20_000) for _ in range(100)], work)
    assert work.nbytes <= 4 * (262_144 + 20_000)
