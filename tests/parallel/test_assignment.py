"""Owners: balanced by cost, the same for every order, stable, and told in full."""

from __future__ import annotations

import random
import sys
from pathlib import Path

import pytest
import torch
from torch.distributed.tensor import Replicate, Shard
from torch.distributed.tensor.placement_types import _StridedShard

import guided_descent as gd
from guided_descent.engine.stages import stages
from guided_descent.parallel.assignment import Assignment, Cost, Share, balance
from guided_descent.parallel.boxes import _spread, chunk, cut, extent, meet, numel, sizes, within
from guided_descent.parallel.exchange import Cargo, bytes_of, forecast
from guided_descent.parallel.halves import halve
from guided_descent.parallel.sharing import flops
from guided_descent.parts import Decoupled, Descend, Parts, Polar, SlowWeights, SphereStep
from guided_descent.parts.clip import NormClip
from guided_descent.parts.layerwise import Normalize
from guided_descent.routing.roles import Block, Piece, Role

sys.path.insert(0, str(Path(__file__).parent.parent.parent / "benchmarks"))


@pytest.mark.parametrize("key", ["muon", "soap", "shampoo"])
@pytest.mark.parametrize("world", [2, 3, 4, 8])
def test_the_matrices_of_a_gpt_are_balanced(key, world):
    from contestants import SETS

    for name in ("gpt-6x512", "gpt-4x768"):
        shapes = SETS[name](True)
        recipe = gd.recipes.lookup(key)()
        costs = []
        for i, shape in enumerate(shapes):
            block = Block(f"{i}", (Piece(f"{i}", shape),), shape, Role.MATRIX)
            for part in recipe.cut(block):
                each = flops(recipe.parts(part), part, recipe.values())
                costs.append(Cost(part.key, each, part.numel, tuple(range(world))))
        owners = balance(costs, {})
        shares = tuple(Share(cost.key, owners[cost.key], cost.flops, cost.size) for cost in costs)
        largest = max(cost.flops for cost in costs)
        mean = sum(cost.flops for cost in costs) / world
        count = sum(cost.flops == largest for cost in costs)  # some rank has this many of the largest, however divided
        assert Assignment(tuple(range(world)), shares, {}).imbalance <= max(1.15, -(-count // world) * largest / mean)


def test_owners_do_not_depend_on_order_and_stay():
    made = random.Random(0)
    costs = [Cost(f"b{i}", made.choice([1.0, 2.0, 5.0]), made.randrange(9), (0, 1, 2)) for i in range(20)]
    found = balance(costs, {})
    for _ in range(5):
        made.shuffle(costs)
        assert balance(costs, {}) == found
    more = [*costs, Cost("late", 3.0, 1, (0, 1, 2))]
    assert {k: v for k, v in balance(more, found).items() if k != "late"} == found
    assert balance([Cost("a", 1.0, 1, (4, 5))], {"a": 2})["a"] == 4  # an owner that is none any more
    assert balance([], {}) == {}


def test_an_assignment_prints_what_it_costs():
    text = str(Assignment((0, 1), (Share("w", 1, 2e6, 8), Share("v", 1, 1e6, 8)), {0: 64, 1: 1200}))
    assert "rank 0: owns 0 blocks, 0 MFLOP a step, 0 bytes of their state, sends 64 bytes a step" in text
    assert "rank 1: owns 2 blocks, 3 MFLOP a step, 16 bytes of their state, sends 1,200 bytes a step" in text
    assert text.endswith("largest share of the FLOPs over the mean: 2.00")
    assert Assignment((0, 1), (), {}).imbalance == 1.0


# -- boxes -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("length", [0, 1, 2, 5, 8, 9])
@pytest.mark.parametrize("count", [1, 2, 3, 4])
def test_chunks_are_those_of_torch(length, count):
    theirs = [tuple(each.tolist()) for each in torch.arange(3, 3 + length).chunk(count)] if length else [()]
    ours = [tuple(chunk(range(3, 3 + length), count, i)) for i in range(count)]
    assert [each for each in ours if each] == [each for each in theirs if each]


class Mesh:
    def __init__(self, *extents):
        self.mesh = torch.arange(int(torch.tensor(extents).prod())).view(extents)


@pytest.mark.parametrize("shape", [(8, 6), (5, 7), (1, 4), (3, 2)])
@pytest.mark.parametrize(
    "places",
    [
        (Shard(0), Replicate()),
        (Replicate(), Shard(1)),
        (Shard(0), Shard(1)),
        (Shard(0), Shard(0)),
        (_StridedShard(0, split_factor=2), Shard(0)),
        (_StridedShard(1, split_factor=2), Shard(1)),
    ],
    ids=str,
)
def test_boxes_cover_a_tensor_once_for_each_copy(shape, places):
    axes = [None if place.is_replicate() else place.dim for place in places]
    found = _spread(Mesh(2, 2), shape, axes, [hasattr(place, "split_factor") for place in places])
    for rank in found.members:
        seen = torch.zeros(shape)
        for source in found.sources(rank):
            seen[within(found.boxes[source], tuple(map(range, shape)))] += 1
        assert bool((seen == 1).all())
    counting = [rank for rank in found.members if found.counts(rank)]
    assert sum(numel(found.boxes[rank]) for rank in counting) == torch.Size(shape).numel()
    if hasattr(places[0], "split_factor"):  # the first cut is that of the later dimension
        first, second = (found.boxes[rank][places[0].dim] for rank in (0, 2))
        assert not len(second) or second.start == first.stop


def test_pieces_are_cut_where_shards_end():
    qkv = Block("k", (Piece("qkv", (5, 6), (slice(7, 12),)),), (5, 6), Role.FUSED)
    parts = [cut(qkv, [(17, 6)], [(range(a, b), range(6))]) for a, b in ((0, 9), (9, 17))]
    assert [part.pieces[0].shape for part in parts] == [(2, 6), (3, 6)]
    whole = torch.arange(17 * 6).view(17, 6)
    shards = whole[:9], whole[9:]
    joined = torch.cat([part.pieces[0].of(shard) for part, shard in zip(parts, shards)])
    assert torch.equal(joined, whole[7:12])
    assert all(part.shape == (5, 6) for part in parts)  # parts that read the shape see the whole
    away = cut(qkv, [(17, 6)], [(range(12, 17), range(6))])
    assert away.pieces[0].of(whole[12:]).numel() == 0


def test_cargo_and_its_forecast():
    found = _spread(Mesh(2, 2), (4, 6), [None, 0], [False, False])  # two copies, each on two ranks
    cargo = Cargo.of(Piece("w", (3, 6), (slice(0, 3),)), found, 1)
    assert cargo.sources == (0, 1)
    assert [sizes(cargo.boxes[rank]) for rank in range(4)] == [(2, 6), (1, 6), (2, 6), (1, 6)]
    there = forecast([cargo], [torch.float32], inward=True)
    back = forecast([cargo], [torch.bfloat16], inward=False)
    assert there == {0: 48}
    assert back == {1: 24 + 24 + 16}  # 12 bytes are rounded up to 16
    assert bytes_of((range(0),), torch.float64) == 0
    assert extent(Piece("w", (3, 6), (slice(0, 3),)), (4, 6)) == (range(3), range(6))
    assert numel(meet((range(3),), (range(5, 9),))) == 0


# -- halves ------------------------------------------------------------------------------------------------------------


def names(parts):
    return [type(part).__name__ for part in parts]


def test_parts_are_divided_at_the_first_that_writes_or_after_the_last_that_needs_the_whole():
    plain = halve(Parts(Decoupled(), Polar(), Descend(), NormClip()))
    assert names(plain.first) == ["NormClip", "Polar", "HandOut"]
    assert names(plain.second) == ["Decoupled", "Descend"]
    assert not plain.whole
    assert not plain.reads({})
    sphere = halve(Parts(Polar(), Decoupled(), Descend()).__add__((SphereStep(), SlowWeights())))
    assert names(sphere.first) == ["Radius", "Polar", "SphereStep"]
    assert names(sphere.second) == ["TakeOver", "SlowWeights"]
    assert sphere.whole
    assert sphere.reads({})


def test_stages_wait_for_every_sequence():
    a, b, c = NormClip(), Normalize(), NormClip("other")
    assert stages([[a, b], [b], [a, c]]) == [(a,), (b, c)]
    assert stages([]) == []
    with pytest.raises(ValueError, match="in an order that differs between groups"):
        stages([[a, b], [b, a]])
