"""The problem protocol: a training task as one importable function that returns model, loss and batches.

The user's own task and the built-in workloads go through the same door, ``load_problem``::

    # mypkg/task.py, used as: guided-descent compare mypkg.task:make
    def make(seed: int) -> Problem:
        return Problem(model=..., loss=lambda model, batch: ..., batches=lambda step: ...)
"""

from __future__ import annotations

import hashlib
import importlib
import inspect
import os
import random
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Sized
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn

from guided_descent.bench.files import BenchError
from guided_descent.capture.losses import LOSSES
from guided_descent.solvers.likelihoods import Likelihood
from guided_descent.solvers.objective import Objective

_AGREE = 1e-3  # relative: how closely loss, residuals and likelihood must agree on the first batch
Batch = Any  # a tensor, or tuples, lists and dicts of tensors: whatever the loss understands


class ProblemError(BenchError):
    """A problem cannot be loaded or used; the message is one line with the fix."""


@dataclass(kw_only=True)
class Problem:
    """A training task.

    Attributes:
        model: The model, initialised from the seed.
        loss: ``loss(model, batch)``: the mean training loss of one batch, a tensor with one element.
        batches: ``batches(step)`` for step 0, 1, ...: it must depend on the step (and the seed) alone, so that a
            resumed run and every optimizer see the same data. Or a list, or anything else with a length, that is
            read once and cycled.
        evaluate: ``evaluate(model)``: named numbers, called without gradients and with the model in eval mode.
            None: the mean training loss since the last evaluation, named ``loss``, is all there is to compare.
        steps: Default number of optimizer steps.
        metric: The name of the number that is compared.
        goal: ``min`` or ``max``: which way is better.
        unit: Unit of the metric, for tables.
        target: Value of the metric to reach, or None.
        eval_every: Steps between evaluations; None: a twelfth of the run.
        clip: Global gradient norm at which gradients are clipped, the same for every optimizer; None: no clipping.
        data: Hash of the data; "" means: the hash of the first batch.
        outputs: ``outputs(model, batch)``: the model's outputs ``[..., C]``; with ``targets`` and ``likelihood`` they
            say what kind of loss ``loss`` is, which methods with curvature need to know.
        targets: ``targets(batch)``: what the outputs are compared with.
        likelihood: The loss of outputs and targets: ``cross_entropy`` (mean over rows), ``mse`` (mean over elements),
            ``sum_mse`` and ``half_mse`` (mean over rows of the sum, of half the sum) or ``bce`` (mean over elements;
            outputs are logits).
        residuals: ``residuals(model, batch)``: instead of outputs, a tensor whose mean square is the loss.
        jacobian: ``jacobian(model, batch)``: the Jacobian ``[n, P]`` of the flat residuals by the trainable parameters,
            where the task has a faster way than n backward passes.

    Raises:
        ProblemError: A field has the wrong type or an impossible value.
    """

    model: nn.Module
    loss: Callable[[nn.Module, Batch], Tensor]
    batches: Callable[[int], Batch] | Iterable[Batch]
    evaluate: Callable[[nn.Module], Mapping[str, float]] | None = None
    steps: int = 300
    metric: str = "loss"
    goal: Literal["min", "max"] = "min"
    unit: str = ""
    target: float | None = None
    eval_every: int | None = None
    clip: float | None = None
    data: str = ""
    outputs: Callable[[nn.Module, Batch], Tensor] | None = None
    targets: Callable[[Batch], Tensor] | None = None
    likelihood: str | None = None
    residuals: Callable[[nn.Module, Batch], Tensor] | None = None
    jacobian: Callable[[nn.Module, Batch], Tensor] | None = None
    _listed: Sequence[Batch] | None = field(default=None, init=False, repr=False)

    def __post_init__(self) -> None:
        if not isinstance(self.model, nn.Module):
            raise ProblemError(f"Problem.model is a {type(self.model).__name__}; give a torch.nn.Module")
        if not callable(self.loss):
            raise ProblemError(f"Problem.loss is a {type(self.loss).__name__}; give a function loss(model, batch)")
        if self.evaluate is not None and not callable(self.evaluate):
            raise ProblemError(
                "Problem.evaluate must be a function evaluate(model) that returns {name: number}, or None"
            )
        if self.evaluate is None and self.metric != "loss":
            raise ProblemError(f"Problem.metric is {self.metric!r} but there is no evaluate function to compute it")
        if self.goal not in ("min", "max"):
            raise ProblemError(f"Problem.goal is {self.goal!r}; it must be 'min' or 'max'")
        for name in ("steps", "eval_every"):
            value = getattr(self, name)
            if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
                raise ProblemError(f"Problem.{name} is {value!r}; it must be a whole number, 1 or more")
        if self.clip is not None and not self.clip > 0:
            raise ProblemError(f"Problem.clip is {self.clip!r}; it must be more than 0, or None for no clipping")
        parts = [name for name in ("outputs", "targets", "likelihood") if getattr(self, name) is not None]
        if len(parts) not in (0, 3):
            raise ProblemError(f"Problem has {' and '.join(parts)} alone; outputs, targets and likelihood go together")
        if self.likelihood is not None and self.likelihood not in LOSSES:
            raise ProblemError(f"Problem.likelihood is {self.likelihood!r}; it must be one of {', '.join(LOSSES)}")
        if parts and self.residuals is not None:
            raise ProblemError("Problem has outputs and residuals; give the one from which the loss is computed")
        if self.jacobian is not None and self.residuals is None:
            raise ProblemError("Problem.jacobian belongs to residuals; give them, too")
        if not callable(self.batches):
            self._listed = _as_list(self.batches)

    def batch(self, step: int) -> Batch:
        """The batch of a step, 0 for the first."""
        if self._listed is not None:
            return self._listed[step % len(self._listed)]
        assert callable(self.batches)
        return self.batches(step)

    def objective(self, batch: Batch, closure: Callable[[], Tensor] | None = None) -> Objective:
        """The loss of a batch in as much detail as the problem gives, for methods that look into it.

        Args:
            batch: The batch.
            closure: For ordinary optimizers: clears gradients, computes the loss, calls ``backward``, returns the loss.
        """
        model = self.model
        if self.residuals is not None:
            residuals, jacobian = self.residuals, self.jacobian
            return Objective(
                residuals=lambda: residuals(model, batch),
                jacobian=None if jacobian is None else lambda: jacobian(model, batch),
                closure=closure,
            )
        if self.outputs is not None and self.targets is not None and self.likelihood is not None:
            outputs = self.outputs
            kind = Likelihood(self.likelihood, self.targets(batch))
            return Objective(outputs=lambda: outputs(model, batch), likelihood=kind, closure=closure)
        return Objective(loss=lambda: self.loss(model, batch), closure=closure)

    def trainable(self) -> list[nn.Parameter]:
        """The parameters that require a gradient, each once."""
        return [p for p in self.model.parameters() if p.requires_grad]


def _as_list(batches: object) -> Sequence[Batch]:
    if not isinstance(batches, Iterable):
        raise ProblemError(f"Problem.batches is a {type(batches).__name__}; give a function step -> batch, or a list")
    if not isinstance(batches, Sized):
        raise ProblemError(
            f"Problem.batches is a {type(batches).__name__} without a length, which cannot be replayed when a run "
            "resumes; give a function step -> batch, or a list of batches"
        )
    listed = batches if isinstance(batches, list | tuple) else list(batches)
    if not listed:
        raise ProblemError("Problem.batches is empty; give at least one batch")
    return listed


def seed_all(seed: int) -> None:
    """Seed Python's, numpy's (where it is in use) and torch's global generators."""
    random.seed(seed)
    torch.manual_seed(seed)
    if "numpy" in sys.modules:
        sys.modules["numpy"].random.seed(seed % 2**32)


def load_problem(ref: str, seed: int = 0) -> Problem:
    """Load a built-in workload by name, or the user's own task ``package.module:function``; both are checked alike.

    The current directory is searched first. The global generators are seeded before the function is called, and the
    loss of the first batch is computed once, without a step.

    Args:
        ref: ``lm-source``, ``mlp-digits``, ``pinn-burgers``, a ``smoke-...`` name, or ``package.module:function``.
        seed: Passed to the function if it takes an argument.

    Raises:
        ProblemError: Unknown name, failed import, wrong return type, no data, or a loss that fails on the first batch.
    """
    make = find_function(ref)
    seed_all(seed)
    try:
        problem = make(seed) if _takes_seed(make) else make()
    except BenchError as error:
        raise ProblemError(f"{ref}: {error}") from error
    except Exception as error:
        raise ProblemError(f"{ref}: the function failed with {short(error)}") from error
    if not isinstance(problem, Problem):
        raise ProblemError(f"{ref} returned a {type(problem).__name__}; it must return a guided_descent.bench.Problem")
    try:
        check_problem(problem)
    except ProblemError as error:
        raise ProblemError(f"{ref}: {error}") from error
    seed_all(seed)  # the check may have drawn random numbers
    return problem


def find_function(ref: str) -> Callable[..., Any]:
    """The function that makes a problem.

    Raises:
        ProblemError: Unknown name, failed import, no such function.
    """
    from guided_descent.bench.workloads import FAMILIES, WORKLOADS

    if ref in WORKLOADS:
        return WORKLOADS[ref]
    if ref in FAMILIES:
        raise ProblemError(f"{ref!r} is a family of workloads; name one of them: {', '.join(FAMILIES[ref])}")
    module_name, colon, function_name = ref.partition(":")
    if not (module_name and colon and function_name):
        known = ", ".join(WORKLOADS)
        raise ProblemError(f"unknown workload {ref!r}; use one of {known}, or your own task as package.module:function")
    here = os.getcwd()
    if here not in sys.path and "" not in sys.path:
        sys.path.insert(0, here)
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        if error.name is not None and (module_name == error.name or module_name.startswith(error.name + ".")):
            raise ProblemError(
                f"no module {error.name!r}; it must be importable from the current directory or be installed"
            ) from error
        raise ProblemError(f"{module_name} needs the module {error.name!r}, which is not installed") from error
    except Exception as error:
        raise ProblemError(f"importing {module_name} failed with {short(error)}") from error
    function = getattr(module, function_name, None)
    if not callable(function):
        own = [n for n, v in vars(module).items() if inspect.isfunction(v) and v.__module__ == module.__name__]
        raise ProblemError(f"{module_name} has no function {function_name!r}; it has: {', '.join(own) or 'none'}")
    return function  # type: ignore[no-any-return]


def _takes_seed(function: Callable[..., Any]) -> bool:
    kinds = (
        inspect.Parameter.POSITIONAL_ONLY,
        inspect.Parameter.POSITIONAL_OR_KEYWORD,
        inspect.Parameter.VAR_POSITIONAL,
    )
    try:
        parameters = inspect.signature(function).parameters.values()
    except ValueError:  # some callables of C have no signature
        return True
    return any(p.kind in kinds for p in parameters)


def check_problem(problem: Problem) -> None:
    """Compute the loss of the first batch in eval mode, so that mistakes show before a run starts.

    Raises:
        ProblemError: No data, nothing to train, or a loss that fails, is no scalar, has no gradient or is not finite.
    """
    try:
        batch = problem.batch(0)
    except Exception as error:
        raise ProblemError(f"batches(0) failed with {short(error)}") from error
    shapes = describe(batch)
    if any(t.numel() == 0 for t in tensors(batch)):
        raise ProblemError(f"the first batch is empty ({shapes}); there is no data to train on")
    was_training = problem.model.training
    problem.model.eval()  # leaves the running statistics of normalisation layers alone
    try:
        loss = problem.loss(problem.model, batch)
    except Exception as error:
        raise ProblemError(f"the loss fails on the first batch ({shapes}) with {short(error)}") from error
    finally:
        problem.model.train(was_training)
    curved = _curved_value(problem, batch)
    if not problem.trainable():
        raise ProblemError("the model has no parameter that requires a gradient; there is nothing to train")
    if not isinstance(loss, Tensor) or loss.numel() != 1:
        got = f"a tensor of shape {list(loss.shape)}" if isinstance(loss, Tensor) else f"a {type(loss).__name__}"
        raise ProblemError(f"the loss returns {got}; it must be a tensor with one element: the mean over the batch")
    if not loss.requires_grad:
        raise ProblemError("the loss has no gradient; compute it with torch operations from the model, without detach")
    if not bool(torch.isfinite(loss)):
        raise ProblemError(f"the loss of the first batch is {loss.item()} before any step; check data and model")
    if curved is not None and not abs(curved - loss.item()) <= _AGREE * max(abs(curved), abs(loss.item())):
        what = "the mean square of the residuals" if problem.residuals else f"{problem.likelihood} of the outputs"
        raise ProblemError(
            f"{what} is {curved:.6g} on the first batch and the loss {loss.item():.6g}; both must be the same loss"
        )


def _curved_value(problem: Problem, batch: Batch) -> float | None:
    """The loss as residuals or outputs give it, in eval mode; None without them."""
    if problem.residuals is None and problem.outputs is None:
        return None
    was_training = problem.model.training
    problem.model.eval()
    try:
        return float(problem.objective(batch).value().detach())
    except Exception as error:
        name = "residuals" if problem.residuals is not None else "outputs"
        raise ProblemError(f"{name} and likelihood fail on the first batch with {short(error)}") from error
    finally:
        problem.model.train(was_training)


def tensors(batch: Batch) -> Iterator[Tensor]:
    """All tensors of a batch, depth first."""
    if isinstance(batch, Tensor):
        yield batch
    elif isinstance(batch, Mapping):
        for item in batch.values():
            yield from tensors(item)
    elif isinstance(batch, list | tuple):
        for item in batch:
            yield from tensors(item)


def describe(batch: Batch) -> str:
    """The shapes of a batch for an error message.

    Example:
        >>> describe((torch.zeros(2, 3), torch.zeros(2, dtype=torch.long)))
        'float32 [2, 3], int64 [2]'
    """
    shown = [f"{str(t.dtype).removeprefix('torch.')} {list(t.shape)}" for t in tensors(batch)]
    return ", ".join(shown) or f"a {type(batch).__name__} without tensors"


def tensor_hash(items: Iterable[Tensor]) -> str:
    """SHA-256 over dtype, shape and bytes of tensors: equal exactly where they are bitwise equal."""
    digest = hashlib.sha256()
    for t in items:
        digest.update(f"{t.dtype} {list(t.shape)};".encode())
        flat = t.detach().cpu().contiguous().reshape(-1)
        digest.update(flat.view(torch.uint8).numpy().tobytes() if flat.numel() else b"")
    return digest.hexdigest()


def short(error: BaseException) -> str:
    """The error's type and the first line of its text."""
    name, lines = type(error).__name__.lstrip("_"), str(error).strip().splitlines()
    return f"{name}: {lines[0]}" if lines else name
