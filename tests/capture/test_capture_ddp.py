"""Two processes: raw sums added over ranks are the plain factors of the whole batch, with and without no_sync."""

from __future__ import annotations

import contextlib

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel

from guided_descent.capture import Capture, CrossEntropy
from oracles.fisher import plain_factors
from ranks import leave

LAYERS = ["0", "3"]


class Labelled(CrossEntropy):
    """Draws the labels it is told."""

    labels: torch.Tensor

    def sample(self, out, generator):
        return out.softmax(-1) - F.one_hot(type(self).labels, out.shape[-1])


def worker(rank, world, path):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{path}", rank=rank, world_size=world)
    torch.manual_seed(0)
    plain = nn.Sequential(nn.Conv2d(2, 4, 3), nn.ReLU(inplace=True), nn.Flatten(), nn.Linear(16, 3)).double()
    x, y = torch.randn(12, 2, 4, 4, dtype=torch.float64), torch.randint(3, (12,))
    mine, labels = x.chunk(world)[rank], y.chunk(world)[rank]
    expected = plain_factors(
        plain, LAYERS, x, lambda out: F.cross_entropy(out, y, reduction="sum"), len(y), approx="expand"
    )
    F.cross_entropy(plain(x), y).backward()
    gradients = [p.grad.clone() for p in plain.parameters()]

    for fisher in ("empirical", "mc"):
        for chunks in (1, 2):  # the first of two micro-batches under no_sync
            for around in ("ddp", "module"):
                plain.zero_grad()
                ddp = DistributedDataParallel(plain)
                sums = {}

                def observe(name, io, sums=sums):
                    new = [*io.gram_inputs(), *io.gram_gradients()]
                    sums[name] = [a + b for a, b in zip(sums.get(name, [0] * 4), new, strict=True)]

                names = [f"module.{name}" for name in LAYERS] if around == "ddp" else LAYERS
                root = ddp if around == "ddp" else plain
                capture = Capture(root, names, observe, fisher=fisher, loss=Labelled(), rank=rank)
                capture.arm(1)
                for i, (part, label) in enumerate(zip(mine.chunk(chunks), labels.chunk(chunks))):
                    Labelled.labels = label
                    with ddp.no_sync() if i < chunks - 1 else contextlib.nullcontext():
                        (F.cross_entropy(ddp(part), label) / chunks).backward()
                factor = capture.passes**2 if fisher == "empirical" else 1
                assert capture.passes == chunks
                capture.disarm()
                for name, (a, n, b, t) in sums.items():
                    counts = torch.tensor([n, t], dtype=torch.float64)
                    for tensor in (a, b, counts):
                        dist.all_reduce(tensor)
                    left, right = expected[name.removeprefix("module.")]
                    torch.testing.assert_close(a / counts[0], left)
                    torch.testing.assert_close(b * factor / counts[1], right)
                assert len(sums) == 2
                for p, gradient in zip(plain.parameters(), gradients, strict=True):
                    torch.testing.assert_close(p.grad, gradient)  # reduced once, by the real backward
                del ddp

    draws = []
    capture = Capture(plain, ["3"], lambda _, io: draws.append(io.d), fisher="mc", loss="cross_entropy", rank=rank)
    capture.arm(1)
    plain(x)
    both = [torch.empty_like(draws[0]) for _ in range(world)]
    dist.all_gather(both, draws[0].contiguous())
    assert not torch.equal(*both)  # ranks draw apart
    leave()


@pytest.mark.slow
def test_sums_over_two_ranks_are_the_plain_factors(tmp_path):
    mp.start_processes(worker, (2, str(tmp_path / "store")), nprocs=2, start_method="spawn")
