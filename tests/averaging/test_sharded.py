"""On two ranks the averages of a fully sharded model equal those of the whole one, and are swapped in bitwise."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from guided_descent.averaging import EMA, LAWA, SWA, PostHocEMA, PowerEMA, evaluating, export, ramps
from ranks import leave

MAKERS = {
    "ema": lambda model: EMA(model, decay=0.7),
    "ramp": lambda model: EMA(model, half_life=3, ramp=ramps.share(0.2)),
    "power": lambda model: PowerEMA(model, sigma=0.15),
    "swa": lambda model: SWA(model, every=2),
    "lawa": lambda model: LAWA(model, window=2, every=2),
}


def full(tensor):
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def move(models, averages, steps=6):
    for step in range(steps):
        for model in models:
            with torch.no_grad():
                for p in model.parameters():
                    p.mul_(1 + 0.1 * step)
        for average in averages:
            average.update()


def start(rank, world, path):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{path}", rank=rank, world_size=world)
    torch.manual_seed(0)
    whole = nn.Sequential(nn.Linear(8, 5), nn.Tanh(), nn.Linear(5, 1))  # 5 rows and 1 row do not split evenly
    return whole, copy.deepcopy(whole), init_device_mesh("cpu", (world,))


def worker(rank, world, path, early):
    whole, sharded, mesh = start(rank, world, path)
    made = {name: make(sharded) for name, make in MAKERS.items()} if early else {}
    fully_shard(sharded, mesh=mesh)
    made = made or {name: make(sharded) for name, make in MAKERS.items()}
    references = {name: make(whole) for name, make in MAKERS.items()}
    move((sharded, whole), (*made.values(), *references.values()))
    live = {name: p.full_tensor() for name, p in sharded.named_parameters()}
    for name, average in made.items():
        expected = references[name].evaluation_weights(whole)
        assert all(isinstance(t, DTensor) for t in average.state_dict()["weights"].values())
        resumed = MAKERS[name](sharded)
        resumed.load_state_dict(average.state_dict())
        for source in (average, resumed):
            exported = export(sharded, source)
            with evaluating(sharded, source):
                inside = {name: p.full_tensor() for name, p in sharded.named_parameters()}
            for key, value in expected.items():
                assert torch.equal(inside[key], value)
                assert torch.equal(full(exported[key]), value)
        with evaluating(sharded, expected):  # whole tensors: each rank takes its part
            assert all(torch.equal(p.full_tensor(), expected[key]) for key, p in sharded.named_parameters())
    for name, p in sharded.named_parameters():
        assert torch.equal(p.full_tensor(), live[name])
    leave()


def snapshots(rank, world, path, folder):
    whole, sharded, mesh = start(rank, world, path)
    fully_shard(sharded, mesh=mesh)
    files, memory = PostHocEMA(sharded, folder, every=2), PostHocEMA(sharded, every=2)
    reference = PostHocEMA(whole, every=2)
    move((sharded, whole), (files, memory, reference), steps=8)
    dist.barrier()  # the files are there
    assert len(list(Path(folder).iterdir())) == len(files.snapshots) == 8
    expected = reference.synthesize(sigma=0.08).weights
    for tracked in (files, memory):
        made = tracked.synthesize(sigma=0.08)
        assert all(isinstance(t, DTensor) == (tracked is memory) for t in made.weights.values())
        with evaluating(sharded, made):
            for name, p in sharded.named_parameters():
                torch.testing.assert_close(p.full_tensor(), expected[name], rtol=1e-6, atol=1e-7)
    dist.barrier()
    leave()


@pytest.mark.slow
@pytest.mark.parametrize("early", [False, True], ids=["made after sharding", "made before sharding"])
def test_two_ranks_equal_one(tmp_path, early):
    mp.start_processes(worker, (2, str(tmp_path / "store"), early), nprocs=2, start_method="spawn")


@pytest.mark.slow
def test_snapshots_of_two_ranks_are_whole(tmp_path):
    arguments = (2, str(tmp_path / "store"), str(tmp_path / "snapshots"))
    mp.start_processes(snapshots, arguments, nprocs=2, start_method="spawn")
