"""Small files that survive a crash, and the one error of the bench."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

FORMAT = 1


class BenchError(Exception):
    """An error for the user: one line that says the value, the rule and the fix. The command line prints it alone."""


def to_json(value: Any) -> Any:
    """The value with JSON types only: tuples become lists, numbers that are not finite None, the unknown its text."""
    if isinstance(value, Mapping):
        return {str(key): to_json(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [to_json(item) for item in value]
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else None
    return value if value is None or isinstance(value, bool | int | str) else str(value)


def write_json(path: Path, data: Mapping[str, Any]) -> None:
    """Replace a JSON file atomically: readers see the old text or the new, also after a power cut.

    Raises:
        BenchError: No space, no permission.
    """
    temporary = path.with_name(f".{path.name}.tmp-{os.getpid()}")
    try:
        with open(temporary, "w", encoding="utf-8") as file:
            file.write(json.dumps(to_json(data), indent=1) + "\n")
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
        sync_folder(path.parent)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise BenchError(os_line("cannot write", path, error)) from error


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object with a ``format`` number.

    Raises:
        BenchError: Missing, unreadable, damaged, or of a newer format.
    """
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise BenchError(os_line("cannot read", path, error)) from error
    except ValueError as error:
        raise BenchError(f"{path}: damaged, not JSON ({error}); move it away and run again") from None
    if not isinstance(data, dict) or not isinstance(data.get("format"), int):
        raise BenchError(f"{path}: not a file of guided-descent, 'format' is missing")
    if data["format"] > FORMAT:
        raise BenchError(f"{path}: format {data['format']} is newer than {FORMAT}; upgrade guided-descent to read it")
    return data


def size_text(count: int) -> str:
    """Bytes as a person says them.

    Example:
        >>> size_text(980), size_text(12_345), size_text(3_400_000_000)
        ('980 bytes', '12.3 kB', '3.4 GB')
    """
    amount, units = float(count), iter(("bytes", "kB", "MB", "GB", "TB"))
    unit = next(units)
    while amount >= 999.95 and unit != "TB":
        amount, unit = amount / 1000, next(units)
    return f"{amount:.1f} {unit}" if unit != "bytes" else f"{count} bytes"


def sync_folder(path: Path) -> None:
    """Make renames inside a folder durable."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def make_folder(path: Path) -> None:
    """Create a folder with its parents.

    Raises:
        BenchError: No permission, no space, or a file is in the way.
    """
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise BenchError(os_line("cannot create the folder", path, error)) from error


def os_line(what: str, path: Path, error: OSError) -> str:
    """One line for the user about a failed file operation."""
    return f"{what} {path}: {error.strerror or error}; free space or choose a writable folder, then run again"
