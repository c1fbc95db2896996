"""From any error to one line on stderr and an exact exit code."""

from __future__ import annotations

import errno
import json
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from guided_descent.bench.checkpoint import CheckpointError
from guided_descent.bench.files import BenchError
from guided_descent.bench.pool import Stopped
from guided_descent.bench.ranks import PeerLost, launched

OK, FAILED, USAGE, CORRUPT, UNWRITABLE = 0, 1, 2, 3, 4

EXIT_CODES = """
Exit codes: 0 done; 1 a run diverged or failed; 2 wrong usage or input; 3 a damaged file; 4 a file could not be written
(permission, full disk); 130 Ctrl-C; 143 SIGTERM. After 130 and 143 the same command continues where it stopped.
torchrun itself ends with 1 whatever the code of its processes.
"""
STAND_BACK, LOST = 5.0, 15.0  # seconds


class CommandError(Exception):
    """A mistake of the user: one line and an exit code."""

    def __init__(self, line: str, code: int = USAGE) -> None:
        super().__init__(line)
        self.code = code


def say(line: str, code: int) -> int:
    """Print the line on stderr, with the rank where there are several, and return the code."""
    rank, size = launched() or (0, 1)
    who = "guided-descent: " + (f"rank {rank}: " if size > 1 else "")
    print(who + " ".join(line.split()), file=sys.stderr, flush=True)
    return code


def stand_back(error: BaseException) -> None:
    """Among several ranks, let the one speak that failed first: the launcher ends the others while they wait here.

    A mistake that all ranks find is told by rank 0, and one that a single rank finds by that rank.
    """
    rank, size = launched() or (0, 1)
    if size > 1 and (rank or isinstance(error, PeerLost)):
        time.sleep(LOST if isinstance(error, PeerLost) else STAND_BACK)


def explain_error(error: BaseException) -> tuple[str, int]:
    """The line and the exit code for an error; what we did not foresee says so and how to see more."""
    if isinstance(error, CommandError):
        return str(error), error.code
    if hasattr(error, "format_message"):  # typer's own: a wrong option or argument
        text = str(error.format_message()).rstrip(".")
        return (f"{text} See --help" if text.endswith("?") else f"{text}; see --help"), USAGE
    chain, seen = [error], error
    while (seen := seen.__cause__ or seen.__context__) is not None:  # type: ignore[assignment]
        chain.append(seen)
    disk = next((e for e in chain if isinstance(e, OSError) and e.errno is not None), None)
    if isinstance(error, BenchError):
        if disk is not None and disk.errno not in (errno.ENOENT, errno.ENOTDIR, errno.EISDIR):
            return str(error), UNWRITABLE
        if str(error).startswith("cannot save"):  # the tensor writer's own error carries no errno
            return str(error), UNWRITABLE
        damaged = isinstance(error, CheckpointError) or any(isinstance(e, json.JSONDecodeError) for e in chain)
        return str(error), CORRUPT if damaged or "damaged" in str(error) else USAGE
    if isinstance(error, OSError) and disk is not None:
        place = f" {disk.filename}" if disk.filename else ""
        return f"cannot read or write{place}: {disk.strerror}; check the path, permissions and free space", UNWRITABLE
    if isinstance(error, ModuleNotFoundError):
        return f"{error.name} is not installed; run: pip install 'guided-descent[bench]'", USAGE
    if isinstance(error, ValueError | TypeError | KeyError | LookupError):
        text = str(error.args[0]) if isinstance(error, KeyError) and error.args else str(error)
        return text or type(error).__name__, USAGE
    return (
        f"{type(error).__name__}: {error}; this is a fault of guided-descent, please report it with the output of "
        "GUIDED_DESCENT_TRACEBACK=1",
        FAILED,
    )


@contextmanager
def terminate_as_exception() -> Iterator[None]:
    """SIGTERM ends the command like Ctrl-C does, with 143; training installs its own handler inside."""

    def stop(number: int, frame: Any) -> None:
        raise Stopped(number)

    try:
        before = signal.signal(signal.SIGTERM, stop)
    except ValueError:  # not the main thread
        yield
        return
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
