"""Which parameters hold evaluation weights right now, so that nothing trains, saves or averages them by mistake."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

from torch import Tensor

_active: set[int] = set()  # ids; the context that entered them keeps the tensors alive


def is_evaluating(tensor: Tensor) -> bool:
    """Return whether a parameter holds evaluation weights, that is, lies inside ``evaluating(...)``."""
    return id(tensor) in _active


def forbid_while_evaluating(tensors: Iterable[Tensor], what: str, fix: str) -> None:
    """Check that none of the tensors holds evaluation weights.

    Raises:
        RuntimeError: one does; the message says ``what`` was attempted and the ``fix``.
    """
    if _active and any(id(t) in _active for t in tensors):
        raise RuntimeError(f"{what} inside evaluating(...), where the model holds evaluation weights; {fix}")


@contextmanager
def marked(tensors: Iterable[Tensor]) -> Iterator[None]:
    """Mark parameters as holding evaluation weights for the time of the context."""
    ids = {id(t) for t in tensors}
    _active.update(ids)
    try:
        yield
    finally:
        _active.difference_update(ids)
