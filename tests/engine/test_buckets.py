"""Buckets and slices: each element once, within the memory they are given."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import guided_descent as gd
from guided_descent.engine import buckets
from guided_descent.engine.buckets import capacity
from guided_descent.parts import Descend, Momentum, Parts, Polar
from guided_descent.routing.roles import Block, Piece, Role

SHAPE = st.sampled_from([(), (1,), (3,), (7, 5), (5, 7), (16, 16), (0, 4), (30,), (2, 3, 4)])


def block(shape: tuple[int, ...]) -> Block:
    return Block("w", (Piece("w", shape),), shape, Role.MATRIX)


@settings(max_examples=40, deadline=None)
@given(
    shapes=st.lists(SHAPE, min_size=1, max_size=12), chunk=st.integers(1, 400), key=st.sampled_from(["sgd", "nadamw"])
)
def test_slices_cover_every_element_once(shapes: list[tuple[int, ...]], chunk: int, key: str) -> None:
    old, buckets.CHUNK = buckets.CHUNK, chunk
    try:
        params = [nn.Parameter(torch.zeros(shape)) for shape in shapes]
        opt = gd.optimizer(key, params, foreach=None, fused=False)
        for bucket in opt._engine.bind().buckets:
            for piece in bucket.slices:
                for row in piece.p.list:
                    row.add_(1)
                assert sum(row.numel() for row in piece.p.list) <= max(3 * chunk, max(p.numel() for p in params))
        assert all(bool((p == 1).all()) for p in params)
    finally:
        buckets.CHUNK = old


@settings(max_examples=20, deadline=None)
@given(shapes=st.lists(SHAPE, min_size=1, max_size=6), chunk=st.integers(1, 100))
def test_chunks_do_not_change_the_numbers(shapes: list[tuple[int, ...]], chunk: int) -> None:
    results = []
    old = buckets.CHUNK
    for size in (old, chunk):
        buckets.CHUNK = size
        try:
            params = [nn.Parameter(torch.full(shape, 0.5)) for shape in shapes]
            opt = gd.AdamW(params, fused=False)
            for step in range(3):
                for p in params:
                    p.grad = torch.randn(p.shape, generator=torch.Generator().manual_seed(step))
                opt.step()
            results.append([p.detach() for p in params])
        finally:
            buckets.CHUNK = old
    assert all(torch.equal(a, b) for a, b in zip(*results))


@settings(max_examples=60, deadline=None)
@given(m=st.integers(1, 300), n=st.integers(1, 300), limit=st.integers(1, 2**24))
def test_capacity_keeps_the_limit(m: int, n: int, limit: int) -> None:
    parts = Parts(Polar(), Descend())
    count = capacity([block((m, n))], parts, limit, torch.float32)
    each = 4 * m * n + Polar().scratch(block((m, n)))
    assert count >= 1
    assert count == 1 or count * each <= limit
    assert (count + 1) * each > limit


@pytest.mark.parametrize("megabytes", [0.01, 0.2, 1.0])
def test_stacks_are_cut_to_the_limit(megabytes: float) -> None:
    net = nn.Sequential(*[nn.Linear(48, 48, bias=False) for _ in range(20)], nn.Linear(48, 2))
    opt = gd.Muon(net, workspace_mb=megabytes, ns_dtype="float32")
    [bucket] = [b for b in opt._engine.bind().buckets if b.stacked]
    sizes = [len(piece.blocks) for piece in bucket.slices]
    assert sum(sizes) == 20
    assert max(sizes) == min(bucket.capacity, 20)
    assert [i for piece in bucket.slices for i in piece.chosen] == list(range(20))


def test_what_shares_a_bucket() -> None:
    net = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 6), nn.Linear(6, 2))
    opt = gd.Muon(net)
    stacked = [b for b in opt._engine.bind().buckets if b.stacked]
    assert sorted((b.blocks[0].shape, len(b.blocks)) for b in stacked) == [((4, 4), 2), ((6, 4), 1)]
    flat = [b for b in opt._engine.bind().buckets if not b.stacked]
    assert all(b.parts.unit == "element" for b in flat)
    assert Parts(Momentum(), Descend()).unit == "element"


def test_the_plan_is_kept_while_nothing_changes() -> None:
    net = nn.Linear(3, 3)
    opt = gd.AdamW(net)
    plan = opt._engine.bind()
    assert opt._engine.bind() is plan
    opt.param_groups[0]["lr"] = 0.5
    assert opt._engine.bind() is plan
    net.double()
    assert opt._engine.bind() is not plan
