"""Two processes: the diagonals of the curvature over ranks are those of the whole batch, with and without no_sync."""

from __future__ import annotations

import contextlib

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel

import guided_descent as gd
from guided_descent.capture import CrossEntropy
from ranks import leave


class Likeliest(CrossEntropy):
    """Cross-entropy of which the draw is the class with the largest probability."""

    def sample(self, out, generator):
        return out.softmax(-1) - F.one_hot(out.argmax(-1), out.shape[-1])


def build():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(2, 4, 3), nn.Tanh(), nn.Flatten(), nn.Linear(16, 3)).double()


def train(model, opt, step, chunks, ranks):
    """One step on this rank's part of a batch, in micro-batches."""
    made = torch.Generator().manual_seed(step)
    x = torch.randn(12, 2, 4, 4, dtype=torch.float64, generator=made)
    y = torch.randint(3, (12,), generator=made)
    rank, world = ranks
    opt.zero_grad()
    pieces = list(zip(x.chunk(world)[rank].chunk(chunks), y.chunk(world)[rank].chunk(chunks)))
    for i, (part, label) in enumerate(pieces):
        later = isinstance(model, DistributedDataParallel) and i < chunks - 1
        with model.no_sync() if later else contextlib.nullcontext():
            loss = F.cross_entropy(model(part), label) / chunks
            if opt.due("hessian"):
                opt.hessian_pass(loss)
            loss.backward()
    opt.step()


def worker(rank, world, path):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{path}", rank=rank, world_size=world)
    cases = [
        ("adahessian", {}),
        ("sophia_h", {"hessian_frequency": 2, "gamma": 10.0, "lr": 0.01}),
        ("sophia_g", {"hessian_frequency": 2, "gamma": 10.0, "lr": 0.01, "loss": Likeliest()}),
        ("prodigy", {"d0": 1e-3}),
        ("dog", {"r_eps": 1e-3}),
    ]
    for name, options in cases:
        for chunks in (1, 2):
            plain, wrapped = build(), DistributedDataParallel(build())
            alone, shared = gd.optimizer(name, plain, **options), gd.optimizer(name, wrapped, **options)
            for step in range(5):
                train(plain, alone, step, chunks, (0, 1))
                train(wrapped, shared, step, chunks, (rank, world))
            for p, q in zip(plain.parameters(), wrapped.parameters()):
                torch.testing.assert_close(p, q, rtol=1e-9, atol=1e-11)
            if name == "sophia_g":
                assert float(shared.param_groups[0]["extra"]["labels"]) == 12
    ddp = DistributedDataParallel(build())
    opt = gd.SophiaG(ddp, loss="cross_entropy")
    ddp(torch.ones(64, 2, 4, 4, dtype=torch.float64))
    mine = opt._engine.diagonal.sums["3.bias"]
    theirs = [torch.empty_like(mine) for _ in range(world)]
    dist.all_gather(theirs, mine)
    assert not torch.equal(*theirs)  # ranks draw apart
    leave()


@pytest.mark.slow
def test_two_ranks_make_the_steps_of_one(tmp_path):
    mp.start_processes(worker, (2, str(tmp_path / "store")), nprocs=2, start_method="spawn")
