"""Fair comparisons: workloads, the user's own problems, runs that survive a crash, and the store they leave behind."""

from guided_descent.bench.files import BenchError
from guided_descent.bench.problem import Batch, Problem, ProblemError, load_problem
from guided_descent.bench.runner import train
from guided_descent.bench.session import Tick
from guided_descent.bench.store import OptimizerSpec, Run, RunConfig, RunResult, RunStore, ScheduleSpec

__all__ = [
    "Batch",
    "BenchError",
    "OptimizerSpec",
    "Problem",
    "ProblemError",
    "Run",
    "RunConfig",
    "RunResult",
    "RunStore",
    "ScheduleSpec",
    "Tick",
    "load_problem",
    "train",
]
