"""The timing pass: what one training step costs with each optimizer, measured side by side in one process.

Runs that train side by side disturb each other's clocks, so their own seconds are no fair measure. Here the optimizers
take turns in blocks of steps (A B C, A B C, ...): a slow moment of the machine hits all of them. The clock is the CPU
time of this process on one torch thread; a block spans whole refresh periods of the optimizers that refresh slowly;
the first steps, which allocate and compile, are apart; evaluation is not in it.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from guided_descent.bench.problem import Problem
from guided_descent.build import RoutedOptimizer
from guided_descent.solvers import Solver

BLOCK = 10  # the refresh period of SOAP and Shampoo by default
CALM = 0.1  # the part of the learning rate used here: without a warmup the full one might diverge

Build = Callable[[nn.Module], Optimizer]


@dataclass(frozen=True)
class Timing:
    """Cost of one step in CPU milliseconds on one thread.

    Attributes:
        step_ms: Median over the blocks of the mean step: batch, forward, backward, clipping, optimizer.
        optimizer_ms: The optimizer's part: ``step`` and ``zero_grad``.
        first_ms: The very first step.
        spread: Largest minus smallest block mean of ``step_ms``, relative to the median.
        steps: Steps that were measured.
    """

    step_ms: float
    optimizer_ms: float
    first_ms: float
    spread: float
    steps: int

    @property
    def share(self) -> float:
        """The optimizer's share of the step, 0 to 1."""
        return self.optimizer_ms / self.step_ms if self.step_ms else 0.0


class _Lane:
    """One optimizer on its own copy of the problem."""

    def __init__(self, problem: Problem, build: Build, clock: Callable[[], float]) -> None:
        self.problem, self.clock, self.step = problem, clock, 0
        self.optimizer = build(problem.model)
        for group in self.optimizer.param_groups:
            group["lr"] = group["lr"] * CALM
        self.blocks: list[tuple[float, float]] = []
        problem.model.train()

    def run(self, steps: int) -> tuple[float, float]:
        """Mean milliseconds of a step and of its optimizer part over ``steps`` steps."""
        clock, problem, optimizer, inside = self.clock, self.problem, self.optimizer, 0.0
        began = clock()
        for _ in range(steps):
            if isinstance(optimizer, Solver | torch.optim.LBFGS):  # evaluates the loss itself: all of it is its part
                inside += self._solve()
                continue
            loss = problem.loss(problem.model, problem.batch(self.step))
            if isinstance(optimizer, RoutedOptimizer) and optimizer.due("hessian"):
                entered = clock()
                optimizer.hessian_pass(loss)
                inside += clock() - entered
            loss.backward()  # type: ignore[no-untyped-call]
            if problem.clip is not None:
                nn.utils.clip_grad_norm_(problem.model.parameters(), problem.clip)
            entered = clock()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            inside += clock() - entered
            self.step += 1
        return 1e3 * (clock() - began) / steps, 1e3 * inside / steps

    def _solve(self) -> float:
        """One step of a solver; its seconds."""
        problem, batch, entered = self.problem, self.problem.batch(self.step), self.clock()

        def closure() -> Tensor:
            self.optimizer.zero_grad(set_to_none=True)
            loss = problem.loss(problem.model, batch)
            loss.backward()  # type: ignore[no-untyped-call]
            return loss

        self.optimizer.step(problem.objective(batch, closure))  # type: ignore[arg-type]  # torch's return a float
        self.step += 1
        return self.clock() - entered


def time_steps(
    problem: Callable[[], Problem],
    builds: Sequence[Build],
    *,
    rounds: int = 3,
    block: int = BLOCK,
    clock: Callable[[], float] = time.process_time,
) -> list[Timing]:
    """Measure the step cost of several optimizers, alternating between them.

    Args:
        problem: Makes a fresh copy of the training task; called once per optimizer.
        builds: One function per optimizer, from a model to the optimizer.
        rounds: Blocks per optimizer, 1 or more.
        block: Steps per block, 1 or more.
        clock: Seconds; the process CPU time by default.

    Returns:
        One ``Timing`` per entry of ``builds``.

    Raises:
        ValueError: ``rounds`` or ``block`` is below 1.
    """
    if rounds < 1 or block < 1:
        raise ValueError(f"rounds and block must be 1 or more, got {rounds} and {block}")
    with _one_thread():
        lanes = [_Lane(problem(), build, clock) for build in builds]
        firsts = [lane.run(1)[0] for lane in lanes]
        for lane in lanes:
            lane.run(1)
        for _ in range(rounds):
            for lane in lanes:
                lane.blocks.append(lane.run(block))
    return [_summary(lane, first, rounds * block) for lane, first in zip(lanes, firsts, strict=True)]


def _summary(lane: _Lane, first: float, steps: int) -> Timing:
    whole = [step for step, _ in lane.blocks]
    middle = statistics.median(whole)
    inside = statistics.median(inside for _, inside in lane.blocks)
    return Timing(middle, inside, first, (max(whole) - min(whole)) / middle if middle else 0.0, steps)


@contextmanager
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
