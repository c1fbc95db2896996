"""Checkpoints without pickle that survive a kill at any moment, a full disk and a flipped byte.

A checkpoint is a folder ``step-<8 digits>`` with four files:

* ``tensors.safetensors``: every tensor, named ``t0``, ``t1``, ...
* ``state.json``: the tree of numbers, strings, lists and dicts around them; see ``encode``
* ``manifest.json``: format, step, and size and SHA-256 of the two files above
* ``COMPLETE``: the SHA-256 of the manifest, written last

It is written to a temporary folder, synced, renamed, and only then marked. A folder without a ``COMPLETE`` that matches
is never selected, so a reader sees whole checkpoints or none.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from torch import Tensor

from guided_descent.bench.files import FORMAT, BenchError, sync_folder

TENSORS, TREE, MANIFEST, MARKER = "tensors.safetensors", "state.json", "manifest.json", "COMPLETE"
PICKLES = (".pt", ".pth", ".pkl", ".pickle", ".bin", ".ckpt")


class CheckpointError(BenchError):
    """A checkpoint cannot be written or read; the message is one line with the fix."""


class Checkpoints:
    """The checkpoints of one run in ``folder``; the newest ``keep`` stay.

    Example:
        >>> import tempfile, torch
        >>> store = Checkpoints(Path(tempfile.mkdtemp()), keep=2)
        >>> store.save(3, {"weight": torch.ones(2), "lr": 0.1})
        >>> store.latest()
        (3, {'weight': tensor([1., 1.]), 'lr': 0.1})
    """

    def __init__(self, folder: Path, keep: int = 2) -> None:
        if keep < 1:
            raise CheckpointError(f"keep is {keep}; at least 1 checkpoint must stay")
        self.folder = folder
        self.keep = keep

    def steps(self) -> list[int]:
        """The steps of all checkpoints with a completion marker, oldest first."""
        return sorted(int(p.name[5:]) for p in self.folder.glob("step-????????") if (p / MARKER).is_file())

    def save(self, step: int, tree: Any) -> None:
        """Write the checkpoint of a step: temporary folder, fsync, manifest, rename, completion marker.

        A valid checkpoint of the same step is kept as it is, since equal steps of one run hold equal states.

        Raises:
            CheckpointError: No space, no permission, or a value that is no tensor, number, string, list or dict.
                Earlier checkpoints are untouched and no part of the new one can be selected.
        """
        target = self._path(step)
        if target.exists() and self._fault(target) is None:
            return
        temporary = self.folder / f".tmp-{target.name}-{os.getpid()}"
        tensors, structure = encode(tree)
        try:
            temporary.mkdir(parents=True)
            save_file(tensors, temporary / TENSORS)
            _write(temporary / TREE, json.dumps(structure, allow_nan=False).encode())
            files = {name: {"bytes": (temporary / name).stat().st_size, "sha256": _sha256(temporary / name)}
                     for name in (TENSORS, TREE)}  # fmt: skip
            manifest = json.dumps({"format": FORMAT, "step": step, "files": files}, indent=1).encode()
            _write(temporary / MANIFEST, manifest)
            _sync(temporary / TENSORS)
            sync_folder(temporary)
            if target.exists():  # unmarked or damaged: not selectable, so nothing is lost
                shutil.rmtree(target)
            os.rename(temporary, target)
            sync_folder(self.folder)
            _write(target / f".{MARKER}", hashlib.sha256(manifest).hexdigest().encode())
            os.replace(target / f".{MARKER}", target / MARKER)  # whole or not at all
            sync_folder(target)
        except Exception as error:  # safetensors reports a full disk with an exception of its own
            shutil.rmtree(temporary, ignore_errors=True)
            if target.exists() and self._fault(target) is not None:
                shutil.rmtree(target, ignore_errors=True)
            if isinstance(error, CheckpointError):
                raise
            reason = (error.strerror if isinstance(error, OSError) else None) or str(error)
            kept = self.steps()
            safe = f"the checkpoint of step {kept[-1]} is intact" if kept else "there is no earlier checkpoint"
            raise CheckpointError(
                f"cannot save the checkpoint of step {step} in {self.folder}: {reason}; {safe}; free space or make the "
                "folder writable, then run the same command again to continue"
            ) from error
        self._prune()

    def latest(self, warn: Callable[[str], None] = warnings.warn) -> tuple[int, Any] | None:
        """Step and tree of the newest checkpoint that passes its checksums; None where there is no checkpoint.

        A damaged one is passed over with a warning.

        Raises:
            CheckpointError: There are checkpoints, but none is intact; or one is of a newer format.
        """
        faults = []
        for step in reversed(self.steps()):
            path = self._path(step)
            fault = self._fault(path)
            if fault is None:
                try:
                    return step, _load(path)
                except CheckpointError as error:
                    fault = str(error)
            faults.append(fault)
            warn(f"{fault}; looking for an earlier one")
        if faults:
            raise CheckpointError(f"{faults[0]}, and no earlier checkpoint is intact; start the run afresh")
        return None

    def load(self, step: int) -> Any:
        """The tree of one step.

        Raises:
            CheckpointError: It does not exist or is damaged.
        """
        path = self._path(step)
        if step not in self.steps():
            raise CheckpointError(f"no checkpoint of step {step} in {self.folder}; there are: {self.steps() or 'none'}")
        fault = self._fault(path)
        if fault is not None:
            raise CheckpointError(f"{fault}; choose another of {self.steps()}")
        return _load(path)

    def clear(self) -> None:
        """Remove all checkpoints."""
        shutil.rmtree(self.folder, ignore_errors=True)

    def _path(self, step: int) -> Path:
        return self.folder / f"step-{step:08d}"

    def _fault(self, path: Path) -> str | None:
        """Why a checkpoint must not be used, or None."""
        try:
            for item in path.iterdir():
                if item.suffix in PICKLES:
                    return f"the checkpoint {path} holds {item.name}, a pickle file, and pickles are never loaded"
            manifest = (path / MANIFEST).read_bytes()
            if (path / MARKER).read_bytes().decode("ascii", "replace") != hashlib.sha256(manifest).hexdigest():
                return f"the checkpoint {path} is damaged: {MANIFEST} does not match its checksum"
            data = json.loads(manifest)
            if data["format"] > FORMAT:
                raise CheckpointError(f"{path}: format {data['format']} is newer than {FORMAT}; upgrade guided-descent")
            for name in (TENSORS, TREE):
                expected = data["files"][name]
                if (path / name).stat().st_size != expected["bytes"] or _sha256(path / name) != expected["sha256"]:
                    return f"the checkpoint {path} is damaged: {name} does not match its checksum"
        except OSError as error:
            return f"the checkpoint {path} is unreadable: {error.strerror or error}"
        except (ValueError, KeyError, TypeError):
            return f"the checkpoint {path} is damaged: {MANIFEST} is not a manifest"
        return None

    def _prune(self) -> None:
        """Remove all but the newest ``keep`` checkpoints, and what a killed or failed save left behind."""
        kept = {self._path(step) for step in self.steps()[-self.keep :]}
        for path in [*self.folder.glob("step-????????"), *self.folder.glob(".tmp-step-*")]:
            if path not in kept:
                (path / MARKER).unlink(missing_ok=True)  # first, so that a half removed folder is not selectable
                shutil.rmtree(path, ignore_errors=True)


def encode(tree: Any) -> tuple[dict[str, Tensor], Any]:
    """Split a tree into named tensors and a structure of JSON types.

    Tuples, dicts with other than plain string keys, tensors and numbers that are not finite become one-key objects
    ``{"$tuple": [...]}``, ``{"$dict": [[key, value], ...]}``, ``{"$tensor": name}``, ``{"$float": "nan"}``.

    Example:
        >>> encode({"betas": (0.9, 0.99), 0: None})[1]
        {'$dict': [['betas', {'$tuple': [0.9, 0.99]}], [0, None]]}

    Raises:
        CheckpointError: A value of another type, named by its place in the tree.
    """
    tensors: dict[str, Tensor] = {}
    seen: set[int] = set()

    def walk(value: Any, place: str) -> Any:
        if isinstance(value, Tensor):
            stored = value.detach().cpu().contiguous()
            if stored.untyped_storage().data_ptr() in seen or stored.untyped_storage().nbytes() != stored.nbytes:
                stored = stored.clone()  # safetensors refuses shared and partial storage
            seen.add(stored.untyped_storage().data_ptr())
            name = f"t{len(tensors)}"
            tensors[name] = stored
            return {"$tensor": name}
        if isinstance(value, bool | int | str) or value is None:
            return value
        if isinstance(value, float):
            return float(value) if math.isfinite(value) else {"$float": repr(float(value))}
        if isinstance(value, dict):
            if all(isinstance(key, str) and not key.startswith("$") for key in value):
                return {key: walk(item, f"{place}.{key}") for key, item in value.items()}
            return {"$dict": [[walk(k, f"{place} key"), walk(v, f"{place}[{k!r}]")] for k, v in value.items()]}
        if isinstance(value, list | tuple):
            items = [walk(item, f"{place}[{i}]") for i, item in enumerate(value)]
            return items if isinstance(value, list) else {"$tuple": items}
        raise CheckpointError(
            f"{place.lstrip('.')} is a {type(value).__name__}; a checkpoint holds only tensors, numbers, strings, "
            "lists, tuples and dicts"
        )

    return tensors, walk(tree, "")


def decode(tensors: dict[str, Tensor], structure: Any) -> Any:
    """The tree that ``encode`` split."""
    if isinstance(structure, list):
        return [decode(tensors, item) for item in structure]
    if not isinstance(structure, dict):
        return structure
    if "$tensor" in structure:
        return tensors[structure["$tensor"]]
    if "$float" in structure:
        return float(structure["$float"])
    if "$tuple" in structure:
        return tuple(decode(tensors, item) for item in structure["$tuple"])
    if "$dict" in structure:
        return {decode(tensors, key): decode(tensors, value) for key, value in structure["$dict"]}
    return {key: decode(tensors, value) for key, value in structure.items()}


def _load(path: Path) -> Any:
    try:
        return decode(load_file(path / TENSORS), json.loads((path / TREE).read_bytes()))
    except Exception as error:  # right checksums, wrong content: not written by us
        raise CheckpointError(f"the checkpoint {path} is no checkpoint of guided-descent ({error})") from error


def _write(path: Path, data: bytes) -> None:
    with open(path, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def _sync(path: Path) -> None:
    with open(path, "rb") as file:
        os.fsync(file.fileno())


def _sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
