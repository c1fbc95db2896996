"""On two ranks the average of a fully sharded model equals the average of the whole one, and is swapped in bitwise."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from guided_descent.averaging import EMA, evaluating, export
from ranks import leave


def worker(rank, world, path, early):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{path}", rank=rank, world_size=world)
    torch.manual_seed(0)
    whole = nn.Sequential(nn.Linear(8, 5), nn.Tanh(), nn.Linear(5, 1))  # 5 rows and 1 row do not split evenly
    sharded = copy.deepcopy(whole)
    ema = EMA(sharded, decay=0.7) if early else None
    fully_shard(sharded, mesh=init_device_mesh("cpu", (world,)))
    ema, reference = ema or EMA(sharded, decay=0.7), EMA(whole, decay=0.7)
    for step in range(6):
        for model, average in ((sharded, ema), (whole, reference)):
            with torch.no_grad():
                for p in model.parameters():
                    p.mul_(1 + 0.1 * step)
            average.update()

    def full(tensor):
        return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor

    expected = reference.evaluation_weights(whole)
    assert all(isinstance(t, DTensor) for t in ema.state_dict()["weights"].values())
    live = {name: p.full_tensor() for name, p in sharded.named_parameters()}
    resumed = EMA(sharded, decay=0.7)
    resumed.load_state_dict(ema.state_dict())
    for source in (ema, resumed):
        exported = export(sharded, source)
        with evaluating(sharded, source):
            inside = {name: p.full_tensor() for name, p in sharded.named_parameters()}
        for name, value in expected.items():
            assert torch.equal(inside[name], value)
            assert torch.equal(full(exported[name]), value)
    for name, p in sharded.named_parameters():
        assert torch.equal(p.full_tensor(), live[name])
    leave()


@pytest.mark.slow
@pytest.mark.parametrize("early", [False, True], ids=["made after sharding", "made before sharding"])
def test_two_ranks_equal_one(tmp_path, early):
    mp.start_processes(worker, (2, str(tmp_path / "store"), early), nprocs=2, start_method="spawn")
