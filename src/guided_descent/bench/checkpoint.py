"""Checkpoints without pickle that survive a kill at any moment, a full disk and a flipped byte.

A checkpoint is a folder ``step-<8 digits>`` with four files:

* ``tensors.safetensors``: every tensor, named ``t0``, ``t1``, ...
* ``state.json``: the tree of numbers, strings, lists and dicts around them; see ``tree.py``
* ``manifest.json``: format, step, and size and SHA-256 of the two files above
* ``COMPLETE``: the SHA-256 of the manifest, written last

It is written to a temporary folder, read back, synced, renamed, and only then marked. A folder without a ``COMPLETE``
that matches is never selected, so a reader sees whole checkpoints or none. An older one is removed only after a newer
one has passed its checksums.

``FORMAT`` counts what is in the files; every older one is read for ever, a newer one is an error. Format 1 had no pairs
of real numbers for complex tensors. What a run puts into the tree is described in ``session.py``.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import shutil
import warnings
from collections.abc import Callable, Collection, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from torch import Tensor

from guided_descent.bench.files import BenchError, size_text, sync_folder
from guided_descent.bench.tree import decode, encode, same_bits

FORMAT = 2
TENSORS, TREE, MANIFEST, MARKER = "tensors.safetensors", "state.json", "manifest.json", "COMPLETE"
PICKLES = (".pt", ".pth", ".pkl", ".pickle", ".bin", ".ckpt")
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


class CheckpointError(BenchError):
    """A checkpoint cannot be written or read; the message is one line with the fix."""


class Damaged(CheckpointError):
    """A checkpoint is not what was written; the message is the reason alone."""


class Checkpoints:
    """The checkpoints of one run in ``folder``.

    Args:
        folder: Where they are; made by the first save.
        keep: How many of the newest intact ones stay.
        background: Save on a thread, from a copy of the state in host memory. One save runs at a time; its error is
            raised by the next ``save`` or by ``wait``.

    Example:
        >>> import tempfile, torch
        >>> store = Checkpoints(Path(tempfile.mkdtemp()), keep=2)
        >>> store.save(3, {"weight": torch.ones(2), "lr": 0.1})
        >>> store.latest()
        (3, {'weight': tensor([1., 1.]), 'lr': 0.1})
    """

    def __init__(self, folder: Path, keep: int = 2, *, background: bool = False) -> None:
        if keep < 1:
            raise CheckpointError(f"keep is {keep}; at least 1 checkpoint must stay")
        self.folder = folder
        self.keep = keep
        self._thread = ThreadPoolExecutor(1, "checkpoint") if background else None
        self._pending: Future[None] | None = None
        self._intact: dict[Path, list[tuple[int, int, int]]] = {}  # what passed its checksums, and its files then

    def steps(self) -> list[int]:
        """The steps of all checkpoints with a completion marker, oldest first."""
        return sorted(step for step, p in self._candidates() if p == self._path(step) and (p / MARKER).is_file())

    def save(self, step: int, tree: Any, protected: Collection[int] = ()) -> None:
        """Write the checkpoint of a step: temporary folder, read back, fsync, manifest, rename, completion marker.

        An intact checkpoint of the same step is kept as it is, since equal steps of one run hold equal states.

        Args:
            step: Its step.
            tree: Tensors, numbers, strings, lists, tuples and dicts.
            protected: Steps that stay beside the newest, however old.

        Raises:
            CheckpointError: No space, no permission, or, from a save in the background, what the one before met.
                Earlier checkpoints are untouched and no part of the new one can be selected.
            TreeError: A value of another type.
        """
        self.wait()
        tensors, structure = encode(tree, copy=self._thread is not None)
        text = json.dumps(structure, allow_nan=False).encode()
        if self._thread is None:
            self._save(step, tensors, text, frozenset(protected))
        else:
            self._pending = self._thread.submit(self._save, step, tensors, text, frozenset(protected))

    def wait(self) -> None:
        """Until the save in the background has ended.

        Raises:
            CheckpointError: It failed.
        """
        pending, self._pending = self._pending, None
        if pending is not None:
            pending.result()

    def latest(
        self, warn: Callable[[str], None] = warnings.warn, accept: Callable[[Any], str | None] = lambda tree: None
    ) -> tuple[int, Any] | None:
        """Step and tree of the newest checkpoint that is complete and intact; None where there is no complete one.

        One warning names those that were passed over, and why.

        Args:
            warn: Called with one line.
            accept: Says why a tree cannot be used, or None.

        Raises:
            CheckpointError: There are complete checkpoints, but none can be used; or one is of a newer format.
        """
        faults, complete = [], False
        for step, path in self._candidates():
            if not (path / MARKER).is_file():
                faults.append(f"step {step} (incomplete: its save was cut short)")
                continue
            complete = True
            try:
                self._check(path)
                tree = _load(path)
                fault = accept(tree)
            except (Damaged, OSError) as error:
                fault = _reason(error)
            if fault is None:
                if faults:
                    warn(f"{self._passed_over(faults)}; going on from step {step}")
                return step, tree
            faults.append(f"step {step} ({fault})")
        if complete:
            raise CheckpointError(f"{self._passed_over(faults)}, and no other is intact; start the run afresh")
        if faults:
            warn(f"{self._passed_over(faults)}; there is no complete one, so the run begins anew")
        return None

    def load(self, step: int) -> Any:
        """The tree of one step.

        Raises:
            CheckpointError: It does not exist or is damaged.
        """
        path = self._path(step)
        if step not in self.steps():
            raise CheckpointError(f"no checkpoint of step {step} in {self.folder}; there are: {self.steps() or 'none'}")
        try:
            self._check(path)
            return _load(path)
        except (Damaged, OSError) as error:
            raise CheckpointError(f"{path}: {_reason(error)}; choose another of {self.steps()}") from error

    def clear(self) -> None:
        """Remove all checkpoints."""
        self.wait()
        shutil.rmtree(self.folder, ignore_errors=True)

    # -- writing ---------------------------------------------------------------------------------------------------

    def _save(self, step: int, tensors: dict[str, Tensor], text: bytes, protected: Collection[int]) -> None:
        target = self._path(step)
        temporary = self.folder / f".tmp-{target.name}-{os.getpid()}"
        if not self._usable(target):
            try:
                manifest = _write_folder(temporary, step, tensors, text)
                if target.exists():  # unmarked or damaged: not selectable, so nothing is lost
                    shutil.rmtree(target)
                os.rename(temporary, target)
                sync_folder(self.folder)
                _write(target / f".{MARKER}", hashlib.sha256(manifest).hexdigest().encode())
                os.replace(target / f".{MARKER}", target / MARKER)  # whole or not at all
                sync_folder(target)
                self._intact[target] = _times(target)  # it was read back
            except Exception as error:  # safetensors reports a full disk with an exception of its own
                shutil.rmtree(temporary, ignore_errors=True)
                if target.exists() and not self._usable(target):
                    shutil.rmtree(target, ignore_errors=True)
                raise self._failed(step, error, len(text) + sum(t.nbytes for t in tensors.values())) from error
        self._prune(protected)

    def _failed(self, step: int, error: Exception, needed: int) -> CheckpointError:
        """What the user reads when a save fails."""
        number, reason = _os_error(error)
        if number in FULL:
            free = shutil.disk_usage(self.folder if self.folder.exists() else self.folder.parent).free
            reason += f" ({size_text(needed)} are needed, {size_text(free)} are free)"
        kept = [step for step in self.steps() if self._usable(self._path(step))]
        safe = f"the checkpoint of step {kept[-1]} is intact" if kept else "there is no earlier checkpoint"
        return CheckpointError(
            f"cannot save the checkpoint of step {step} in {self.folder}: {reason}; {safe}; free space or make the "
            "folder writable, then run the same command again to continue"
        )

    def _prune(self, protected: Collection[int]) -> None:
        """Remove what need not stay: all but the newest intact ones and the protected, and what failed saves left."""
        stay: set[Path] = set()
        newest = 0
        for step in reversed(self.steps()):
            path = self._path(step)
            try:
                self._check(path)
            except Damaged:
                continue
            except OSError:  # it may be readable again
                stay.add(path)
                continue
            if newest < self.keep or step in protected:
                stay.add(path)
                newest += 1
        if not newest:  # never the last
            return
        for _, path in self._candidates():
            if path not in stay:
                (path / MARKER).unlink(missing_ok=True)  # first, so that a half removed folder is not selectable
                shutil.rmtree(path, ignore_errors=True)

    # -- reading ---------------------------------------------------------------------------------------------------

    def _path(self, step: int) -> Path:
        return self.folder / f"step-{step:08d}"

    def _candidates(self) -> Iterator[tuple[int, Path]]:
        """All that is or was to be a checkpoint, by step, the newest first; what is unfinished comes before."""
        names = ((re.fullmatch(r"(\.tmp-)?step-(\d{8})(?(1)-\d+)", p.name), p) for p in self.folder.glob("*step-*"))
        found = [(int(match[2]), p) for match, p in names if match]
        return iter(sorted(found, key=lambda item: (-item[0], item[1].name)))

    def _passed_over(self, faults: list[str]) -> str:
        return f"passed over in {self.folder}: {', '.join(faults)}"

    def _usable(self, path: Path) -> bool:
        try:
            self._check(path)
        except (Damaged, OSError):
            return False
        return True

    def _check(self, path: Path) -> None:
        """Compare every file with its checksum; once, as long as the files do not change.

        Raises:
            Damaged: It must not be used.
            OSError: It cannot be read.
            CheckpointError: Its format is newer.
        """
        try:
            times = _times(path)
            for item in path.iterdir():
                if item.suffix in PICKLES:
                    raise Damaged(f"it holds {item.name}, a pickle file, and pickles are never loaded")
            if self._intact.get(path) == times:
                return
            manifest = (path / MANIFEST).read_bytes()
            if (path / MARKER).read_bytes() != hashlib.sha256(manifest).hexdigest().encode():
                raise Damaged(f"damaged: {MANIFEST} does not match its checksum in {MARKER}")
            data = json.loads(manifest)
            if data["format"] > FORMAT:
                raise CheckpointError(f"{path}: format {data['format']} is newer than {FORMAT}; upgrade guided-descent")
            if path.name.startswith("step-") and data["step"] != int(path.name[5:]):
                raise Damaged(f"damaged: {MANIFEST} is of step {data['step']}")
            for name in (TENSORS, TREE):
                expected = data["files"][name]
                if (path / name).stat().st_size != expected["bytes"] or _sha256(path / name) != expected["sha256"]:
                    raise Damaged(f"damaged: {name} does not match its checksum")
        except FileNotFoundError as error:
            raise Damaged(f"damaged: {Path(error.filename or path).name} is missing") from error
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise Damaged(f"damaged: {MANIFEST} is not a manifest") from error
        self._intact[path] = times


def _write_folder(path: Path, step: int, tensors: dict[str, Tensor], text: bytes) -> bytes:
    """Write all but the marker; the manifest.

    Raises:
        OSError: As the system says.
        CheckpointError: What was read back is not what was written.
    """
    shutil.rmtree(path, ignore_errors=True)  # of an earlier process with this number
    path.mkdir(parents=True)
    _write(path / TREE, text)
    save_file(tensors, path / TENSORS)
    os.chmod(path / TENSORS, (path / TREE).stat().st_mode)  # as this user's files are; safetensors makes it private
    _sync(path / TENSORS)
    files = {
        TENSORS: {"bytes": (path / TENSORS).stat().st_size, "sha256": _sha256(path / TENSORS)},
        TREE: {"bytes": len(text), "sha256": hashlib.sha256(text).hexdigest()},
    }
    stored = load_file(path / TENSORS)  # after the checksum was taken, which is of what is in the file
    if not all(same_bits(stored[name], tensor) for name, tensor in tensors.items()):
        raise CheckpointError(f"{TENSORS} was read back other than it was written: the disk or the memory is faulty")
    manifest = json.dumps({"format": FORMAT, "step": step, "files": files}, indent=1).encode()
    _write(path / MANIFEST, manifest)
    sync_folder(path)
    return manifest


def _load(path: Path) -> Any:
    try:
        return decode(load_file(path / TENSORS), json.loads((path / TREE).read_bytes()))
    except Exception as error:  # right checksums, wrong content: not written by us
        raise Damaged(f"no checkpoint of guided-descent ({' '.join(str(error).split())})") from error


def _os_error(error: Exception) -> tuple[int | None, str]:
    """The system's number and text of an error, which safetensors hides in its own."""
    if isinstance(error, OSError):
        return error.errno, error.strerror or str(error)
    found = re.search(r"\(os error (\d+)\)", str(error))
    return (int(found[1]), os.strerror(int(found[1]))) if found else (None, str(error))


def _reason(error: Exception) -> str:
    return f"unreadable: {error.strerror or error}" if isinstance(error, OSError) else str(error)


def _times(path: Path) -> list[tuple[int, int, int]]:
    """What changes when a file of a checkpoint is written again."""
    stats = [(path / name).stat() for name in (TENSORS, TREE, MANIFEST, MARKER)]
    return [(stat.st_size, stat.st_mtime_ns, stat.st_ino) for stat in stats]


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
