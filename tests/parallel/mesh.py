"""What the tests over ranks share: parameters of every kind, ways to shard them, gradients by name and step."""

from __future__ import annotations

import copy
import functools
import os
import traceback
from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

import guided_descent as gd
from guided_descent.parallel.boxes import layout, like, local, within
from guided_descent.parallel.boxes import whole as all_of

#: Parameters and what they are. Few sizes divide by 2 or 3, and the maps of ``qkv`` begin in the middle of a shard.
SHAPES: dict[str, tuple[int, ...]] = {
    "embed": (11, 6),
    "qkv": (17, 6),
    "up": (5, 8),
    "down": (8, 5),
    "wide": (6, 9),
    "row": (1, 8),
    "experts": (3, 4, 6),
    "conv": (4, 3, 2, 2),
    "gain": (8,),
    "bias": (5,),
    "frozen": (4, 6),
}
RULES = [
    gd.rule("embed", role="embedding"),
    gd.rule("qkv", role="fused", split=(7, 5, 5)),
    gd.rule("experts", role="expert"),
    gd.rule("conv", role="conv"),
    gd.rule("gain", role="norm"),
    gd.rule("bias", role="bias"),
    gd.rule("row", role="vector"),
    gd.rule("*", role="matrix"),
]


class Bag(nn.Module):
    """Parameters by name, the same for every call."""

    def __init__(self, dtype: torch.dtype = torch.float64, names: Sequence[str] = tuple(SHAPES)) -> None:
        super().__init__()
        made = torch.Generator().manual_seed(5)
        for name, shape in SHAPES.items():
            value = torch.randn(shape, generator=made, dtype=torch.float64) * 0.5
            if name in names:
                setattr(self, name, nn.Parameter(value.to(dtype), requires_grad=name != "frozen"))


@functools.cache
def mesh_of(device: str, shape: tuple[int, ...], mesh_dim_names: tuple[str, ...] | None = None) -> Any:
    """One mesh of each shape for all tests of a process: each makes process groups, whose threads never end."""
    return init_device_mesh(device, shape, mesh_dim_names=mesh_dim_names)


def fsdp(model: nn.Module) -> nn.Module:
    """Fully sharded over all ranks."""
    return fully_shard(model, mesh=mesh_of("cpu", (dist.get_world_size(),)))


def hsdp(model: nn.Module) -> nn.Module:
    """Sharded over pairs of ranks that are copies of each other."""
    return fully_shard(model, mesh=mesh_of("cpu", (2, dist.get_world_size() // 2), mesh_dim_names=("r", "s")))


def tp(model: nn.Module) -> nn.Module:
    """Rows or columns over pairs of ranks, and each of these fully sharded."""
    mesh = mesh_of("cpu", (dist.get_world_size() // 2, 2), mesh_dim_names=("dp", "tp"))
    for i, (name, p) in enumerate(list(model.named_parameters())):
        axis = i % p.ndim
        sharded = distribute_tensor(p.detach(), mesh["tp"], [Shard(axis)])
        setattr(model, name, nn.Parameter(sharded, requires_grad=p.requires_grad))
    return fully_shard(model, mesh=mesh["dp"])


def experts(model: nn.Module) -> nn.Module:
    """Experts on a mesh of their own, everything else on one over all ranks."""
    mesh = mesh_of("cpu", (2, dist.get_world_size() // 2), mesh_dim_names=("ep", "dp"))
    flat = mesh_of("cpu", (dist.get_world_size(),))
    for name, p in list(model.named_parameters()):
        where, places = (mesh, [Shard(0), Shard(1)]) if name == "experts" else (flat, [Shard(0)])
        setattr(model, name, nn.Parameter(distribute_tensor(p.detach(), where, places), requires_grad=p.requires_grad))
    return model


def gradient(name: str, step: int, like: Tensor) -> Tensor:
    """The whole gradient of a parameter."""
    made = torch.Generator().manual_seed(1000 * step + list(SHAPES).index(name))
    return (torch.randn(SHAPES[name], generator=made, dtype=torch.float64) * (1 + step % 3)).to(like.dtype)


def mine(p: Tensor, value: Tensor) -> Tensor:
    """The part of a whole tensor that lies here, placed as a parameter."""
    if not isinstance(p, DTensor):
        return value.clone()
    box = layout(p, "p").boxes[dist.get_rank()]
    return like(value[within(box, all_of(value.shape))].clone(), p)


def push(model: nn.Module, step: int, skip: Sequence[str] = ()) -> None:
    """Give the trainable parameters, but for some, their gradients."""
    for name, p in model.named_parameters():
        if p.requires_grad:
            p.grad = None if name in skip else mine(p, gradient(name, step, local(p)))


def full(tensor: Any) -> Any:
    """All of a tensor."""
    if not isinstance(tensor, DTensor):
        return tensor.detach().clone() if isinstance(tensor, Tensor) else tensor
    box, parts = layout(tensor, "t"), [None] * dist.get_world_size()
    dist.all_gather_object(parts, local(tensor).contiguous())
    found = torch.zeros(tensor.shape, dtype=tensor.dtype)
    for rank, each in box.boxes.items():
        found[within(each, all_of(tensor.shape))] = parts[rank]
    return found


def weights(model: nn.Module) -> dict[str, Tensor]:
    """All parameters, whole."""
    return {name: full(p) for name, p in model.named_parameters()}


def close(a: dict[str, Any], b: dict[str, Any], tolerance: float, what: str) -> None:
    """Equal to a tolerance, relative to the largest element of each tensor."""
    assert a.keys() == b.keys(), what
    for name in a:
        x, y = torch.as_tensor(a[name]).double(), torch.as_tensor(b[name]).double()
        size = max(float(y.abs().max()) if y.numel() else 0.0, 1e-30)
        error = float((x - y).abs().max()) / size if x.numel() else 0.0
        assert error <= tolerance, f"{what}: {name} differs by {error:.2e}"


def same_everywhere(model: nn.Module, what: str) -> None:
    """Copies of a part of a parameter are equal to the bit on all ranks that hold one."""
    for name, p in model.named_parameters():
        held: list[Any] = [None] * dist.get_world_size()
        key = layout(p, name).boxes[dist.get_rank()] if isinstance(p, DTensor) else ()
        dist.all_gather_object(held, (key, local(p).detach().clone()))
        first: dict[Any, Tensor] = {}
        for key, value in held:
            assert torch.equal(first.setdefault(key, value), value), f"{what}: copies of {name} differ"


def twins(shard: Callable[[nn.Module], nn.Module], dtype: torch.dtype = torch.float64) -> tuple[nn.Module, nn.Module]:
    """A whole model and a sharded one."""
    model = Bag(dtype)
    return model, shard(copy.deepcopy(model))


def run(worker: Callable[..., None], world: int, path: Any, *args: Any) -> None:
    """Run a worker on as many ranks, each on one thread, and wait for all."""
    mp.start_processes(_begin, (worker, world, str(path / "store"), args), nprocs=world, start_method="spawn")


def _begin(rank: int, worker: Callable[..., None], world: int, path: str, args: Sequence[Any]) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{path}", rank=rank, world_size=world, timeout=timedelta(seconds=120)
    )
    try:
        worker(rank, world, *args)
    except BaseException:
        traceback.print_exc()
        os._exit(1)
    dist.barrier()
    dist.destroy_process_group()
    os._exit(0)
