"""State dicts of sharded models: complete, neutral, and good for any number of ranks."""

from __future__ import annotations

import warnings

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from mesh import RULES, Bag, close, fsdp, full, mine, push, run, same_everywhere, weights
from torch.distributed.checkpoint.state_dict import (
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.tensor import DTensor

import guided_descent as gd

KEYS = ["adamw", "muon", "soap", "shampoo", "lamb", "schedule_free_adamw", "prodigy"]
OPTIONS = {
    "muon": {"ns_dtype": "float64"},
    "soap": {"precondition_frequency": 2},
    "shampoo": {"precondition_frequency": 2, "start_preconditioning_step": 2, "refresh_lag": 1},
    "prodigy": {"d0": 0.01},
}


def built(key, shard):
    model = Bag()
    model = shard(model) if shard is not None else model
    return model, gd.optimizer(key, model, rules=RULES, **OPTIONS.get(key, {}))


def train(model, opt, steps):
    for step in steps:
        push(model, step)
        opt.step()
        opt.zero_grad()


def saved(model, opt):
    return {"model": get_model_state_dict(model), "optim": get_optimizer_state_dict(model, opt)}


def save(rank, world, folder):
    warnings.simplefilter("ignore")
    for key in KEYS:
        model, opt = built(key, fsdp)
        other, never = built(key, fsdp)
        get_optimizer_state_dict(model, opt)  # of a fresh optimizer, which it must leave fresh
        train(model, opt, range(3))
        state = saved(model, opt)
        p = model.up
        for name, value in state["optim"]["state"]["up"].items():
            assert not isinstance(value, DTensor) or value.device_mesh == p.device_mesh
            assert isinstance(value, DTensor) or value.numel() <= 4, name
            if value.shape == p.shape:
                assert value.placements == p.placements
        dcp.save(state, checkpoint_id=folder / key)
        train(model, opt, range(3, 6))
        train(other, never, range(6))
        close(weights(model), weights(other), 0.0, f"{key} saved on its way")
        same_everywhere(model, key)
        found = weights(model)
        if rank == 0:
            torch.save(found, folder / f"{key}.pt")
    dist.barrier()


def load(rank, world, folder, sharded):
    warnings.simplefilter("ignore")
    for key in KEYS:
        model, opt = built(key, fsdp if sharded else None)
        state = saved(model, opt)
        dtypes = {name: value.dtype for name, value in state["optim"]["state"]["up"].items()}
        dcp.load(state, checkpoint_id=folder / key)
        set_model_state_dict(model, state["model"])
        set_optimizer_state_dict(model, opt, state["optim"])
        again = saved(model, opt)["optim"]["state"]
        for name, value in again["up"].items():
            assert value.dtype == dtypes[name]
            assert torch.equal(full(value), full(state["optim"]["state"]["up"][name])), f"{key} {name}"
        assert opt.steps == 3
        train(model, opt, range(3, 6))
        close(weights(model), torch.load(folder / f"{key}.pt"), 1e-9, f"{key} on {world} ranks")


def plain(rank, world):
    """A state dict of one process, as it is, into an optimizer of sharded parameters; and the other way round."""
    for key in KEYS:
        whole, alone = built(key, None)
        train(whole, alone, range(3))
        model, opt = built(key, fsdp)
        with torch.no_grad():
            for name, p in model.named_parameters():
                p.copy_(mine(p, whole.get_parameter(name).detach()))
        opt.load_state_dict(alone.state_dict())
        train(model, opt, range(3, 6))
        train(whole, alone, range(3, 6))
        close(weights(model), weights(whole), 1e-9, key)
        state = opt.state_dict()
        for values in state["state"].values():
            values.update({name: full(value) for name, value in values.items()})
        later, fresh = built(key, None)
        later.load_state_dict(weights(model))
        fresh.load_state_dict(state)
        train(model, opt, range(6, 8))
        train(later, fresh, range(6, 8))
        close(weights(model), weights(later), 1e-9, f"{key} back on one")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    found = tmp_path_factory.mktemp("saved")
    run(save, 2, tmp_path_factory.mktemp("two"), found)
    return found


@pytest.mark.parametrize(
    ("world", "sharded"),
    [
        (1, False),
        (1, True),
        pytest.param(3, True, marks=pytest.mark.slow),
        pytest.param(4, True, marks=pytest.mark.slow),
    ],
)
def test_what_two_ranks_save_loads_on_others(folder, tmp_path, world, sharded):
    run(load, world, tmp_path, folder, sharded)


def test_plain_state_dicts_load(tmp_path):
    run(plain, 2, tmp_path)
