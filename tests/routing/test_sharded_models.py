"""Models under FSDP2, activation checkpointing and torch.compile route like the plain model."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
import torch.distributed as dist
from architectures import ARCHITECTURES
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from guided_descent.routing import route


@pytest.fixture
def mesh() -> Iterator[DeviceMesh]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        yield init_device_mesh("cpu", (1,))
    finally:
        dist.destroy_process_group()


def test_fully_sharded_models_keep_their_table(mesh: DeviceMesh) -> None:
    for make in ARCHITECTURES.values():
        model = make()
        for child in model.children():
            if isinstance(child, torch.nn.ModuleList):
                for block in child:
                    fully_shard(block, mesh=mesh)
        fully_shard(model, mesh=mesh)
        assert all(isinstance(p, DTensor) for p in model.parameters())
        assert route(model) == route(make())


def test_wrappers_inside_a_model_change_nothing() -> None:
    model = ARCHITECTURES["gpt2"]()
    for position, block in enumerate(model.h):
        block.mlp.c_fc = torch.compile(block.mlp.c_fc)
        model.h[position] = checkpoint_wrapper(block)
    assert route(model) == route(ARCHITECTURES["gpt2"]())
