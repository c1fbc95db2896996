"""SIGTERM and SIGINT as a request that training answers at its next safe point."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType, TracebackType
from typing import Any, Self


class Interrupted(BaseException):
    """Raised inside ``SignalFlag.interruptible``; a BaseException, so that no ``except Exception`` swallows it."""


class SignalFlag:
    """While entered, SIGTERM and the first SIGINT only set ``received``; a second SIGINT acts as usual.

    Outside the main thread Python allows no handlers: there the flag is never set.

    Example:
        >>> import os
        >>> with SignalFlag() as flag:
        ...     os.kill(os.getpid(), signal.SIGTERM)
        ...     flag.received == signal.SIGTERM
        True
    """

    SIGNALS = (signal.SIGTERM, signal.SIGINT)

    def __init__(self) -> None:
        self.received: int | None = None
        self._previous: dict[int, Any] = {}
        self._raise = False

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():
            self._previous = {number: signal.signal(number, self._handle) for number in self.SIGNALS}
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self._restore()

    def _restore(self) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        self._previous = {}

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT and self.received == signal.SIGINT:  # an impatient user; a repeated SIGTERM is none
            self._restore()
            signal.raise_signal(number)
            return
        self.received = number
        if self._raise:
            self._raise = False
            raise Interrupted

    @contextmanager
    def interruptible(self) -> Iterator[None]:
        """Raise ``Interrupted`` at once inside this block: for long work, such as an evaluation, that can be redone."""
        if self.received is not None:
            raise Interrupted
        self._raise = True
        try:
            yield
        finally:
            self._raise = False
