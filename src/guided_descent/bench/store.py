"""The run store: what a run leaves on disk, and how it is read again. The formats of this file are a promise.

Layout::

    <out>/<workload>/<optimizer label>/seed-<n>/
        config.json      what was run: written once, before the first step
        metrics.jsonl    what happened: one JSON object per line, appended
        result.json      how it ended: written once, at the end; absent while a run is unfinished or interrupted
        checkpoints/     see ``checkpoint.py``
        .lock            held by the process that trains here; it says nothing when nobody holds it

Folder names are ``slug(workload)`` and ``slug(label)``; the exact names stand in ``config.json``. All files are UTF-8
JSON without NaN or Infinity: a number that is not finite is ``null``. Each carries ``"format": 1``; a reader ignores
keys it does not know and refuses a format newer than its own. JSON files are replaced atomically.

``config.json``: the fields of ``RunConfig``: ``workload, optimizer {name, hyper, label}, schedule {name, options},
seed, steps, eval_every, clip, metric, goal, unit, target, data, init, parameters, dtype, device, threads, versions,
git, machine, created, micro_batches, parallel, ranks`` (the last three are missing in files of earlier versions).

``metrics.jsonl``: first the line ``{"format": 1, "kind": "header"}``, then two kinds of rows. ``step`` counts finished
steps: a train row has step 1, 2, ...; the evaluation before the first step has step 0.

* ``{"kind": "train", "step", "loss", "lr", "seconds", "wall", "cpu", "optimizer_wall", "optimizer_cpu"}``, and on some
  rows ``"grad_norm"`` (before clipping) and ``"update_rms"`` (root mean square of the change of all parameters).
  ``loss`` is the training loss before the step; ``lr`` the learning rate of the first group; ``wall`` and ``cpu`` the
  seconds of this step (batch, forward, backward, optimizer; process CPU time), ``optimizer_*`` the optimizer's part
  of it; ``seconds`` the wall seconds of all steps so far: no evaluation, checkpoint or probe, and nothing that a
  killed run lost.
* ``{"kind": "eval", "step", "seconds", "eval_wall", "values": {name: number}}``.

``result.json``: the fields of ``RunResult``.

A reader must expect a last line that is cut short (the machine stopped while it was written) and drops it.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import IO, Any, Literal, TypeVar

from guided_descent.bench.files import FORMAT, BenchError, os_line, read_json, to_json, write_json

CONFIG, METRICS, RESULT = "config.json", "metrics.jsonl", "result.json"

Goal = Literal["min", "max"]
Status = Literal["complete", "diverged", "interrupted"]
Row = dict[str, Any]
T = TypeVar("T")
TIMES = frozenset({"seconds", "wall", "cpu", "optimizer_wall", "optimizer_cpu", "eval_wall"})


@dataclass(frozen=True)
class OptimizerSpec:
    """An optimizer by name with its hyperparameters; ``label`` (default: the name) names it in tables and folders."""

    name: str
    hyper: Mapping[str, Any] = field(default_factory=dict)
    label: str = ""

    def __post_init__(self) -> None:
        if not self.label:
            object.__setattr__(self, "label", self.name)


@dataclass(frozen=True)
class ScheduleSpec:
    """A learning-rate schedule: the name of a function of ``guided_descent.schedules`` and its keyword options."""

    name: str = "linear"
    options: Mapping[str, Any] = field(default_factory=lambda: {"warmup": 0.05})


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """What was run (``config.json``).

    Attributes:
        workload: A built-in name or ``package.module:function``.
        optimizer: Name, hyperparameters and label.
        schedule: The learning-rate schedule.
        seed: Seed of initialisation and data order.
        steps: Planned optimizer steps.
        eval_every: Steps between evaluations; there is one before the first step and one after the last.
        clip: Global gradient norm at which gradients are clipped, or None.
        metric: The key of the evaluation that is compared; ``goal`` says which way is better, ``unit`` its unit.
        target: The metric's value to reach, or None.
        data: Hash of the data.
        init: Hash of the initial weights: equal for every optimizer of one workload and seed.
        parameters: Number of trainable parameters.
        dtype: Of the first trainable parameter, such as ``float32``.
        device: Device type, such as ``cpu``.
        threads: CPU threads torch used.
        versions: Python, torch, numpy and this package.
        git: Commit of the working directory, with ``-dirty`` where it had changes; None outside a repository.
        machine: Processor, core count, system.
        created: UTC time of the start, ISO 8601.
        micro_batches: Parts of a rank's batch whose gradients are added before a step.
        parallel: How ranks share the run, or None.
        ranks: Processes that began it; another number may continue it.
    """

    workload: str
    optimizer: OptimizerSpec
    schedule: ScheduleSpec
    seed: int
    steps: int
    eval_every: int
    clip: float | None
    metric: str
    goal: Goal
    unit: str
    target: float | None
    data: str
    init: str
    parameters: int
    dtype: str
    device: str
    threads: int
    versions: Mapping[str, str]
    git: str | None
    machine: Mapping[str, Any]
    created: str
    micro_batches: int = 1
    parallel: str | None = None
    ranks: int = 1

    def difference(self, other: RunConfig) -> str:
        """What makes the other a different run, as text; empty where a checkpoint of one continues the other."""
        same = ("workload", "optimizer", "schedule", "seed", "steps", "eval_every", "clip", "data", "init", "threads",
                "micro_batches")  # fmt: skip
        mine, theirs = to_json(asdict(self)), to_json(asdict(other))
        return ", ".join(f"{key} {theirs[key]!r} instead of {mine[key]!r}" for key in same if mine[key] != theirs[key])


@dataclass(frozen=True, kw_only=True)
class RunResult:
    """How a run ended (``result.json``; one with status ``interrupted`` is returned by ``train`` but never written).

    Attributes:
        status: ``complete``: all steps ran. ``diverged``: the loss or the metric stopped being finite; ``final`` is
            None. ``interrupted``: SIGTERM or SIGINT; the same call continues it.
        steps: Steps finished.
        skipped: Steps that the optimizer refused because of non-finite gradients.
        final: The metric after the last step.
        best: The best metric of all evaluations and ``best_step`` its step.
        values: All values of the last evaluation.
        train_loss: Mean training loss of the last 5 % of the steps.
        wall_seconds: Wall seconds of all steps, without evaluations, checkpoints and probes; the figures below
            likewise.
        cpu_seconds: Process CPU seconds of all steps.
        optimizer_cpu_seconds: The optimizer's part of ``cpu_seconds``.
        eval_seconds: Wall seconds of all evaluations.
        first_step_ms: Wall milliseconds of the first step, which pays for allocation and compilation.
        step_ms: Mean CPU milliseconds per step after the first 10 (after the first, in runs of fewer than 20).
        step_ms_median: Median of the same.
        step_wall_ms: Mean wall milliseconds of the same.
        optimizer_ms: The optimizer's mean CPU milliseconds of the same.
        optimizer_share: ``optimizer_ms / step_ms``.
        state_bytes: Bytes of the optimizer's state tensors.
        update_rms: Median over the probed steps of the root mean square update of a parameter.
        signal: The signal that interrupted the run, or None.
    """

    status: Status
    steps: int
    skipped: int
    final: float | None
    best: float | None
    best_step: int | None
    values: Mapping[str, float | None]
    train_loss: float | None
    wall_seconds: float
    cpu_seconds: float
    optimizer_cpu_seconds: float
    eval_seconds: float
    first_step_ms: float | None
    step_ms: float | None
    step_ms_median: float | None
    step_wall_ms: float | None
    optimizer_ms: float | None
    optimizer_share: float | None
    state_bytes: int
    update_rms: float | None
    signal: int | None = None

    @property
    def exit_code(self) -> int:
        """0, or 128 + the signal's number after an interruption: 143 for SIGTERM, 130 for SIGINT."""
        return 0 if self.signal is None else 128 + self.signal


@dataclass(frozen=True)
class Metrics:
    """The rows of ``metrics.jsonl`` in order of steps."""

    train: list[Row]
    evals: list[Row]

    def curve(self, name: str) -> tuple[list[int], list[float], list[float]]:
        """Steps, training seconds and finite values of a train column (``loss``) or of an evaluation value."""
        rows = [(r, r.get(name)) for r in self.train] + [(r, r["values"].get(name)) for r in self.evals]
        known = [(r["step"], r["seconds"], value) for r, value in rows if value is not None]
        return [k[0] for k in known], [k[1] for k in known], [k[2] for k in known]


@dataclass(frozen=True)
class Run:
    """One run folder: complete, diverged, or partial (``result`` is None: still running, killed or interrupted)."""

    path: Path
    config: RunConfig
    result: RunResult | None

    @property
    def status(self) -> Literal["complete", "diverged", "partial"]:
        """``complete``, ``diverged`` or ``partial``."""
        if self.result is None or self.result.status == "interrupted":
            return "partial"
        return self.result.status

    def metrics(self) -> Metrics:
        """Read the metrics written so far; empty where there are none yet."""
        path = self.path / METRICS
        return read_metrics(path) if path.exists() else Metrics([], [])


class RunStore:
    """The runs below one folder.

    Example:
        >>> RunStore("no/such/folder").runs()
        []
    """

    def __init__(self, out: str | os.PathLike[str]) -> None:
        self.out = Path(out)
        self.warnings: list[str] = []  # one line per folder that ``runs`` could not read

    def path(self, workload: str, label: str, seed: int) -> Path:
        """The folder of one run."""
        return self.out / slug(workload) / slug(label) / f"seed-{seed}"

    def runs(self) -> list[Run]:
        """All readable runs, sorted by workload, label and seed; unreadable ones are named in ``warnings``."""
        self.warnings = []
        found = []
        for config in self.out.glob(f"*/*/seed-*/{CONFIG}"):
            try:
                found.append(read_run(config.parent))
            except BenchError as error:
                self.warnings.append(str(error))
        return sorted(found, key=lambda r: (r.config.workload, r.config.optimizer.label, r.config.seed))


def slug(name: str) -> str:
    """A folder name for any label: all but letters, digits and ``.=+_,-`` becomes ``-``.

    Example:
        >>> slug("mypkg.task:make"), slug("muon lr=0.02"), slug("..")
        ('mypkg.task-make', 'muon-lr=0.02', '-')
    """
    text = re.sub(r"[^A-Za-z0-9.=+_,-]+", "-", name)
    return text if text.strip(".") else "-"


def read_run(path: Path) -> Run:
    """Read one run folder.

    Raises:
        BenchError: A file is unreadable, incomplete or of a newer format.
    """
    data = read_json(path / CONFIG)
    for key, kind in (("optimizer", OptimizerSpec), ("schedule", ScheduleSpec)):
        if isinstance(data.get(key), dict):
            data[key] = _build(kind, data[key], path / CONFIG)
    config = _build(RunConfig, data, path / CONFIG)
    result = path / RESULT
    return Run(path, config, _build(RunResult, read_json(result), result) if result.exists() else None)


def write_record(path: Path, record: RunConfig | RunResult) -> None:
    """Write a config or a result atomically."""
    write_json(path, {"format": FORMAT, **asdict(record)})


def _build(kind: type[T], data: Mapping[str, Any], path: Path) -> T:
    names = {f.name for f in fields(kind)}  # type: ignore[arg-type]
    try:
        return kind(**{key: value for key, value in data.items() if key in names})
    except TypeError as error:
        raise BenchError(f"{path}: not a {kind.__name__} ({error}); move the folder away") from None


def read_metrics(path: Path) -> Metrics:
    """Read ``metrics.jsonl``, also of a run that is still being written.

    Raises:
        BenchError: Unreadable or of a newer format.
    """
    train: list[Row] = []
    evals: list[Row] = []
    for row in _rows(path):
        if row.get("kind") == "train":
            train.append(row)
        elif row.get("kind") == "eval":
            evals.append(row)
    return Metrics(train, evals)


def _rows(path: Path) -> Iterator[Row]:
    try:
        text = path.read_text(encoding="utf-8", errors="replace")
    except OSError as error:
        raise BenchError(os_line("cannot read", path, error)) from error
    lines = text.split("\n")[:-1]  # what follows the last newline is a line cut short
    for number, line in enumerate(lines, start=1):
        try:
            row = json.loads(line)
        except ValueError:
            raise BenchError(f"{path}: line {number} is damaged; move the run's folder away and run again") from None
        if row.get("format", 0) > FORMAT:
            raise BenchError(f"{path}: format {row['format']} is newer than {FORMAT}; upgrade guided-descent")
        yield row


def metrics_fault(path: Path, length: int, checksum: str | None) -> str | None:
    """Why the first ``length`` bytes of the metrics are not those that a checkpoint counts on, or None.

    Args:
        path: The file.
        length: Its length when the checkpoint was made.
        checksum: SHA-256 of these bytes; None: of checkpoints that had none.
    """
    try:
        with open(path, "rb") as file:
            data = file.read(length)
    except FileNotFoundError:
        data = b""
    if len(data) < length:
        return f"{path.name} lost rows that it counts on"
    if checksum is not None and hashlib.sha256(data).hexdigest() != checksum:
        return f"damaged: the rows of {path.name} that it counts on do not match their checksum"
    return None


class MetricsWriter:
    """Appends rows to ``metrics.jsonl``; ``length`` bytes of an earlier file are kept, the rest is cut off."""

    def __init__(self, path: Path, length: int) -> None:
        self._path = path
        self._digest = hashlib.sha256()
        try:
            self._file: IO[bytes] = open(path, "r+b" if path.exists() else "w+b")  # noqa: SIM115 (closed by close)
            if os.path.getsize(path) < length:
                raise BenchError(f"{path} lost rows that its checkpoint counts on; start the run afresh")
            self._digest.update(self._file.read(length))
            self._file.truncate(length)
            self._file.seek(length)
        except OSError as error:
            raise BenchError(os_line("cannot write", path, error)) from error
        if length == 0:
            self.write({"format": FORMAT, "kind": "header"})

    def write(self, row: Row) -> None:
        """Append one row and hand it to the operating system, so that a reader sees it."""
        row = {key: round(item, 7) if key in TIMES else item for key, item in row.items()}
        line = json.dumps(to_json(row), separators=(",", ":")).encode() + b"\n"
        try:
            self._file.write(line)
            self._file.flush()
        except OSError as error:
            raise BenchError(os_line("cannot write", self._path, error)) from error
        self._digest.update(line)

    def sync(self) -> tuple[int, str]:
        """Make the rows durable; the file's length in bytes and the SHA-256 of what was written."""
        try:
            os.fsync(self._file.fileno())
        except OSError as error:
            raise BenchError(os_line("cannot write", self._path, error)) from error
        return self._file.tell(), self._digest.hexdigest()

    def close(self) -> None:
        """Close the file; a failure to write buffered rows was already reported by ``write``."""
        try:
            self._file.close()
        except OSError:  # the same full disk as before
            self._file = open(os.devnull, "wb")  # noqa: SIM115
