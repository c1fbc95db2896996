"""Dividing a batch: among the ranks of a run, and among the micro-batches of a step."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor

from guided_descent.bench import environment
from guided_descent.bench.problem import Batch, Problem, ProblemError, describe, seed_all, short, tensors

AGREE = 1e-3  # relative: how closely the mean loss of the parts must be that of the whole


def divide(batch: Batch, parts: int) -> list[Batch]:
    """A batch in equal parts: rows of its tensors, in order; whatever is no tensor with rows goes to every part.

    Args:
        batch: Tensors, or lists, tuples and dicts of them; all have the same number of rows, their first axis.
        parts: How many.

    Example:
        >>> import torch
        >>> [part.tolist() for part in divide(torch.arange(6), 3)]
        [[0, 1], [2, 3], [4, 5]]

    Raises:
        ProblemError: No tensor has rows, their numbers differ, or the number of parts does not divide them.
    """
    if parts == 1:
        return [batch]
    rows = sorted({t.shape[0] for t in tensors(batch) if t.ndim})
    if not rows:
        raise ProblemError(
            f"a batch ({describe(batch)}) cannot be divided into {parts} equal parts: it has no tensor with rows"
        )
    if len(rows) > 1:
        raise ProblemError(
            f"a batch ({describe(batch)}) cannot be divided into {parts} equal parts: give all its tensors the same "
            "number of rows, their first axis"
        )
    if rows[0] % parts:
        fit = ", ".join(str(n) for n in range(2, rows[0] + 1) if rows[0] % n == 0)
        raise ProblemError(
            f"a batch of {rows[0]} rows cannot be divided into {parts} equal parts, only into {fit or 1}"
        )
    size = rows[0] // parts
    return [_rows(batch, slice(i * size, (i + 1) * size)) for i in range(parts)]


def _rows(batch: Batch, chosen: slice) -> Any:
    if isinstance(batch, Tensor):
        return batch[chosen] if batch.ndim else batch
    if isinstance(batch, Mapping):
        return type(batch)({key: _rows(item, chosen) for key, item in batch.items()})  # type: ignore[call-arg]
    if isinstance(batch, list | tuple):
        items = [_rows(item, chosen) for item in batch]
        return type(batch)(*items) if hasattr(batch, "_fields") else type(batch)(items)
    return batch


def check_parts(problem: Problem, parts: int, warn: Callable[[str], None]) -> None:
    """Compare the loss of the first batch with the mean over its parts, in eval mode, and warn where they differ.

    Raises:
        ProblemError: The batch cannot be divided, or the loss fails on a part.
    """
    if parts == 1:
        return
    batch = problem.batch(0)
    divided = divide(batch, parts)
    rng, was_training = environment.rng_state(), problem.model.training

    def loss(of: Batch) -> float:
        seed_all(0)  # where the loss draws a number, the same one
        return float(problem.loss(problem.model, of).detach())

    problem.model.eval()
    try:
        whole, mean = loss(batch), sum(map(loss, divided)) / parts
    except Exception as error:
        raise ProblemError(
            f"the loss fails on a part of the first batch ({describe(divided[0])}) with {short(error)}"
        ) from error
    finally:
        problem.model.train(was_training)
        environment.set_rng_state(rng)
    if not abs(whole - mean) <= AGREE * max(abs(whole), abs(mean)):
        warn(
            f"the loss of the first batch is {whole:.6g} and the mean over its {parts} parts {mean:.6g}: it is no mean "
            "over rows, so training in parts is another training"
        )
