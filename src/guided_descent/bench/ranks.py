"""The processes that share a run: what the training loop asks of them, for one process and for DistributedDataParallel.

Rank 0 leads: it alone touches files, prints and evaluates, and tells the others what it read. A further way to share a
run is a subclass of ``Ranks`` in ``MODES``.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from guided_descent.bench import environment
from guided_descent.bench.files import BenchError
from guided_descent.bench.problem import Batch, Problem, ProblemError, seed_all, short
from guided_descent.bench.shares import divide
from guided_descent.bench.tree import from_bytes, to_bytes

PATIENCE = timedelta(hours=24)  # of a collective: others wait while rank 0 evaluates and saves
LOST = re.compile("gloo|connection (closed|reset)|broken pipe", re.IGNORECASE)


class PeerLost(BenchError):
    """Another rank has ended; its own message says why. ``signal`` is what this one received before, or None."""

    signal: int | None = None


class Ranks:
    """One process, which is alone."""

    rank = 0
    size = 1

    @property
    def lead(self) -> bool:
        """Whether this is the process that touches files, prints and evaluates."""
        return self.rank == 0

    def wrap(self, problem: Problem) -> nn.Module:
        """What the loss is called with, and the optimizer built from, in the place of the model."""
        return problem.model

    def share(self, batch: Batch) -> Batch:
        """This process's part of a batch."""
        return batch

    def adding(self, module: nn.Module, *, last: bool) -> AbstractContextManager[None]:
        """Around forward and backward pass of a micro-batch: gradients are joined in the last."""
        return nullcontext()

    def mean(self, value: Tensor) -> Tensor:
        """The mean of a scalar over the processes."""
        return value

    def agree(self, signal: int | None) -> int | None:
        """The signal that any of them has received; the same answer everywhere."""
        return signal

    def told(self, tree: Any) -> Any:
        """What the lead says; the others give None."""
        return tree

    def gather(self, tree: Any) -> list[Any]:
        """What each says, by rank."""
        return [tree]

    def seed(self, seed: int, step: int) -> None:
        """Give the global generators of every rank but the first numbers of their own."""
        if not self.lead:
            key = hashlib.sha256(f"{seed},{self.rank},{step}".encode()).digest()
            seed_all(int.from_bytes(key[:4], "big"))

    def check_same(self, value: str, what: str) -> None:
        """Compare a text over the ranks.

        Raises:
            BenchError: It differs.
        """
        theirs = self.gather(value)
        other = next((rank for rank, text in enumerate(theirs) if text != theirs[0]), None)
        if other is not None:
            raise BenchError(f"ranks 0 and {other} differ: {what}")


class Ddp(Ranks):
    """The ranks of a process group, which hold the same parameters and see a part of each batch."""

    def __init__(self, group: dist.ProcessGroup) -> None:
        self.group = group
        self.rank, self.size = dist.get_rank(group), dist.get_world_size(group)

    def wrap(self, problem: Problem) -> nn.Module:
        """The model within DistributedDataParallel; buffers are those of rank 0.

        Raises:
            ProblemError: The model is not on the CPU, or its loss fails.
        """
        devices = sorted({p.device.type for p in problem.model.parameters()})
        if devices != ["cpu"]:
            raise ProblemError(f"parallel='ddp' runs on the CPU and the model is on {', '.join(devices)}")
        return DistributedDataParallel(
            problem.model, process_group=self.group, find_unused_parameters=self._unused(problem)
        )

    def _unused(self, problem: Problem) -> bool:
        """Whether the loss of the first batch leaves out a parameter."""
        rng, was_training = environment.rng_state(), problem.model.training
        problem.model.eval()
        try:
            problem.loss(problem.model, self.share(problem.batch(0))).backward()  # type: ignore[no-untyped-call]
            return any(p.grad is None for p in problem.trainable())
        except Exception as error:
            raise ProblemError(f"the loss of rank {self.rank}'s part fails with {short(error)}") from error
        finally:
            problem.model.zero_grad(set_to_none=True)
            problem.model.train(was_training)
            environment.set_rng_state(rng)

    def share(self, batch: Batch) -> Batch:
        """Its rows, in the order of the ranks.

        Raises:
            ProblemError: The rows cannot be divided among the ranks.
        """
        return divide(batch, self.size)[self.rank]

    def adding(self, module: nn.Module, *, last: bool) -> AbstractContextManager[None]:
        """Gradients travel in the last micro-batch alone."""
        assert isinstance(module, DistributedDataParallel)
        return nullcontext() if last else module.no_sync()

    def mean(self, value: Tensor) -> Tensor:
        """One message."""
        total = value.detach().double().reshape(1)
        dist.all_reduce(total, group=self.group)
        return (total / self.size).to(value.dtype).reshape(())

    def agree(self, signal: int | None) -> int | None:
        """The largest number, so that SIGTERM (15) counts more than SIGINT (2)."""
        largest = torch.tensor([signal or 0])
        dist.all_reduce(largest, dist.ReduceOp.MAX, group=self.group)
        return int(largest) or None

    def told(self, tree: Any) -> Any:
        """A message of bytes, without pickle, of which the length comes before."""
        data = to_bytes(tree) if self.lead else b""
        length = torch.tensor([len(data)])
        dist.broadcast(length, 0, group=self.group)
        message = _tensor(data) if self.lead else torch.empty(int(length), dtype=torch.uint8)
        dist.broadcast(message, 0, group=self.group)
        return tree if self.lead else from_bytes(message.numpy().tobytes())

    def gather(self, tree: Any) -> list[Any]:
        """Messages of bytes, each padded to the longest."""
        data = to_bytes(tree)
        lengths = [torch.zeros(1, dtype=torch.int64) for _ in range(self.size)]
        dist.all_gather(lengths, torch.tensor([len(data)]), group=self.group)
        longest = max(map(int, lengths))
        theirs = [torch.empty(longest, dtype=torch.uint8) for _ in range(self.size)]
        dist.all_gather(theirs, _tensor(data.ljust(longest, b"\0")), group=self.group)
        return [from_bytes(message[: int(n)].numpy().tobytes()) for n, message in zip(lengths, theirs, strict=True)]


MODES: dict[str, Callable[[dist.ProcessGroup], Ranks]] = {"ddp": Ddp}


def _tensor(data: bytes) -> Tensor:
    return torch.frombuffer(bytearray(data), dtype=torch.uint8)


def launched() -> tuple[int, int] | None:
    """Rank and number of the processes that torchrun, or another launcher with its environment, has started."""
    wanted = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    return (int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])) if all(os.environ.get(n) for n in wanted) else None


@contextmanager
def enter(parallel: str | None) -> Iterator[Ranks]:
    """The ranks of a run; torch's process group is made and ended here unless there is one.

    Raises:
        BenchError: The mode is unknown, no launcher has started the ranks, or they do not find each other.
        PeerLost: Another rank ended inside.
    """
    if parallel is None:
        yield Ranks()
        return
    if parallel not in MODES:
        raise BenchError(f"parallel is {parallel!r}; it must be one of {', '.join(MODES)}, or be left out")
    ours = not dist.is_initialized()
    if ours:
        if launched() is None:
            raise BenchError(
                f"parallel={parallel!r} needs ranks: start the same command with torchrun --nproc-per-node 2 -m "
                f"guided_descent train ... --parallel {parallel}"
            )
        try:
            dist.init_process_group("gloo")
        except (RuntimeError, ValueError) as error:
            raise BenchError(
                f"the ranks of this run cannot meet ({short(error)}); check how they were started"
            ) from error
    try:
        group = dist.new_group(timeout=PATIENCE, backend="gloo")
        yield MODES[parallel](group)
        dist.barrier(group)  # nobody leaves while others wait for an answer
        dist.destroy_process_group(group)
    except Exception as error:
        if peer_lost(error):
            raise PeerLost(f"the connection to another rank was lost ({short(error)}); look for its message") from error
        raise
    finally:
        if ours:
            dist.destroy_process_group()


def peer_lost(error: BaseException) -> bool:
    """Whether an error, or what caused it, is that of a collective whose peer has gone."""
    link: BaseException | None = error
    while link is not None:
        if isinstance(link, RuntimeError) and LOST.search(str(link)):
            return True
        link = link.__cause__ or link.__context__
    return False
