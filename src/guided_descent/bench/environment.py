"""What a result depends on besides the optimizer: versions, machine, commit, and the random generators."""

from __future__ import annotations

import os
import platform
import random
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

import torch


def versions() -> dict[str, str]:
    """Versions of Python and of the packages that numbers depend on."""
    found = {"python": platform.python_version(), "torch": torch.__version__}
    for name in ("numpy", "guided-descent"):
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = "not installed"
    return found


def machine() -> dict[str, Any]:
    """Processor, number of cores and operating system; nothing that names the machine."""
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return {"processor": _processor(), "cores": os.cpu_count(), "system": platform.system(), "gpu": device}


def _processor() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def git_commit() -> str | None:
    """The commit of the working directory, ``-dirty`` appended where tracked files are changed; None outside git."""
    try:
        commit = _git("rev-parse", "HEAD")
        return commit + ("-dirty" if _git("status", "--porcelain", "--untracked-files=no") else "")
    except (OSError, subprocess.SubprocessError):
        return None


def _git(*arguments: str) -> str:
    done = subprocess.run(["git", *arguments], capture_output=True, text=True, check=True, timeout=10)
    return done.stdout.strip()


def rng_state() -> dict[str, Any]:
    """The state of the global generators of Python, torch and (where it is in use) numpy, as plain data."""
    state: dict[str, Any] = {"python": random.getstate(), "torch": torch.get_rng_state()}
    if torch.cuda.is_available() and torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        state["cuda"] = torch.cuda.get_rng_state_all()
    if "numpy" in sys.modules:
        numpy = sys.modules["numpy"].random.get_state(legacy=False)
        numpy["state"]["key"] = numpy["state"]["key"].tolist()
        state["numpy"] = numpy
    return state


def set_rng_state(state: dict[str, Any]) -> None:
    """Restore what ``rng_state`` returned.

    Example:
        >>> state = rng_state()
        >>> draw = random.random(), float(torch.rand(()))
        >>> set_rng_state(state)
        >>> draw == (random.random(), float(torch.rand(())))
        True
    """
    random.setstate(state["python"])
    torch.set_rng_state(state["torch"])
    if "cuda" in state:
        torch.cuda.set_rng_state_all(state["cuda"])
    if "numpy" in state:
        import numpy

        key = numpy.array(state["numpy"]["state"]["key"], dtype=numpy.uint32)
        numpy.random.set_state({**state["numpy"], "state": {**state["numpy"]["state"], "key": key}})
