"""The console script: starts the command line, or says what to install where its libraries are missing."""

from __future__ import annotations

import sys
from collections.abc import Sequence

NEEDED = ("typer", "rich", "numpy", "scipy", "safetensors")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run ``guided-descent`` with these arguments (default: those of the process) and return its exit code."""
    try:
        from guided_descent.cli import run
    except ModuleNotFoundError as error:
        if error.name is None or error.name.partition(".")[0] not in NEEDED:
            raise
        print(
            f"guided-descent: the command line needs {error.name}, which is not installed; "
            "run: pip install 'guided-descent[bench]'",
            file=sys.stderr,
        )
        return 2
    return run(arguments)


if __name__ == "__main__":
    sys.exit(main())
