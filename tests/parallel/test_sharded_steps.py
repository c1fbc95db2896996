"""Every recipe on sharded parameters takes the steps of one process, on every kind of mesh."""

from __future__ import annotations

import warnings

import mesh
import pytest
import torch
import torch.distributed as dist
from drive import evaluations, exact, options, parts_of, reads_layers, recipe_of, representatives
from mesh import RULES, close, push, run, same_everywhere, twins, weights

import guided_descent as gd

KEYS = [key for key in gd.list_optimizers() if not reads_layers(key) and not parts_of(key).curvature]
#: What the structure of a recipe does not tell apart: factors, refreshes, whole parameters on their way, held steps.
MORE = {"muon", "soap", "shampoo", "lamb", "hyperball", "madam", "prodigy", "adopt", "schedule_free_adamw", "psgd_kron"}


def pair(key, shard, dtype=torch.float64, **more):
    """An optimizer of a whole model and one of the same model sharded."""
    chosen = options(key, **exact(key), **more)
    if recipe_of(key).parametrization:
        chosen["parametrization"] = "flat"
    one, many = twins(shard, dtype)
    return [(model, gd.optimizer(key, model, rules=RULES, **chosen)) for model in (one, many)]


def step(model, opt, number, skip=()):
    def closure():
        push(model, number, skip)

    if evaluations(opt) > 1:
        opt.step(closure)
    else:
        closure()
        opt.step()


def worker(rank, world, shard, keys):
    warnings.simplefilter("ignore")
    failed = {}
    for key in keys:
        (one, alone), (many, together) = pair(key, getattr(mesh, shard))
        try:
            for number in range(6):
                skip = ("down",) if number == 0 else ()  # a parameter that begins late
                step(one, alone, number, skip)
                step(many, together, number, skip)
            close(weights(many), weights(one), 1e-10, key)
            same_everywhere(many, key)
        except AssertionError as error:
            failed[key] = str(error)
    told = [None] * world
    dist.all_gather_object(told, failed)
    assert not any(told), told


def test_two_ranks(tmp_path):
    keys = sorted((representatives() | MORE) & set(KEYS))
    assert len(keys) > 15
    run(worker, 2, tmp_path, "fsdp", keys)


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize(
    ("shard", "world"), [("fsdp", 2), ("fsdp", 3), ("hsdp", 4), ("tp", 4), ("experts", 4)], ids=lambda x: str(x)
)
def test_every_recipe_on_every_mesh(tmp_path, shard, world):
    run(worker, world, tmp_path, shard, KEYS)
