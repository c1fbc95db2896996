"""Scratch memory: shared by tag, grown to the largest request, never mixed between dtypes."""

from __future__ import annotations

import torch

from guided_descent.linalg import Workspace

CPU = torch.device("cpu")


def test_one_tag_is_one_memory():
    work = Workspace()
    big = work.take("a", (4, 6), torch.float32, CPU)
    small = work.take("a", (2, 3), torch.float32, CPU)
    assert small.data_ptr() == big.data_ptr()
    assert small.shape == (2, 3)
    assert small.is_contiguous()
    assert work.nbytes == 96
    assert work.take("b", (2, 3), torch.float32, CPU).data_ptr() != big.data_ptr()
    assert work.take("a", (2, 3), torch.float64, CPU).data_ptr() != big.data_ptr()
    assert work.nbytes == 96 + 24 + 48


def test_it_grows_and_keeps():
    work = Workspace()
    work.take("a", (2,), torch.float32, CPU)
    grown = work.take("a", torch.Size((5, 5)), torch.float32, CPU)
    assert work.take("a", (25,), torch.float32, CPU).data_ptr() == grown.data_ptr()
    assert work.nbytes == 100
    assert work.take("a", (), torch.float32, CPU).shape == ()
    assert work.take("a", (0, 3), torch.float32, CPU).shape == (0, 3)
