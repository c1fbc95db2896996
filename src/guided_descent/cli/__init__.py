"""The command line: thin commands over the library, one clear line for every mistake, exact exit codes."""

from __future__ import annotations

import os
import signal
import sys
import traceback
from collections.abc import Sequence

import typer

from guided_descent.bench.pool import Stopped
from guided_descent.bench.ranks import PeerLost, launched
from guided_descent.cli import look, plan, work
from guided_descent.cli.common import app, command_line
from guided_descent.cli.errors import OK, explain_error, say, stand_back, terminate_as_exception

__all__ = ["app", "look", "plan", "run", "work"]


def run(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return the exit code; errors become one line on stderr.

    Set ``GUIDED_DESCENT_TRACEBACK=1`` to see the traceback as well.
    """
    command_line[:] = sys.argv[1:] if arguments is None else arguments
    try:
        with terminate_as_exception():
            code = app(args=command_line or ["--help"], standalone_mode=False)
        if code == 130:  # typer's own answer to Ctrl-C
            raise KeyboardInterrupt
        return code if isinstance(code, int) else OK
    except Stopped as stop:
        if (launched() or (0, 1))[0]:  # rank 0 says it
            return 128 + stop.signal
        return say(
            f"stopped by {signal.Signals(stop.signal).name}; run the same command to continue", 128 + stop.signal
        )
    except (KeyboardInterrupt, typer.Abort):
        return say("stopped by SIGINT; run the same command to continue", 130)
    except BrokenPipeError:  # the reader of our output left, as `| head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return OK
    except PeerLost as error:
        if error.signal is not None:  # the launcher ends all, and the rank that failed has said why
            return 128 + error.signal
        stand_back(error)
        return say(*explain_error(error))
    except Exception as error:
        stand_back(error)
        if os.environ.get("GUIDED_DESCENT_TRACEBACK"):
            traceback.print_exc()
        return say(*explain_error(error))
