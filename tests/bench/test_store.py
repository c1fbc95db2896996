"""The run store: frozen formats, atomic files, and reading whatever a crash left."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import shutil
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tasks import ADAMW, train_torch

from guided_descent.bench.files import BenchError, read_json, to_json, write_json
from guided_descent.bench.store import (
    MetricsWriter,
    OptimizerSpec,
    RunConfig,
    RunResult,
    RunStore,
    ScheduleSpec,
    metrics_fault,
    read_metrics,
    read_run,
    slug,
)

GOLDEN = Path(__file__).parent / "golden" / "run"
FOLDER = Path("tasks-plain", "AdamW", "seed-0")


@pytest.fixture
def out(tmp_path):
    """A copy of a run that format 1 wrote."""
    shutil.copytree(GOLDEN, tmp_path / "runs")
    return tmp_path / "runs"


def test_a_run_that_format_1_wrote_reads_for_ever(out):
    store = RunStore(out)
    (run,) = store.runs()
    assert store.warnings == []
    assert run.path == store.path("tasks:plain", "AdamW", 0)
    assert run.status == "complete"
    assert run.config.optimizer == OptimizerSpec("AdamW", {"lr": 0.01})
    assert run.config.schedule == ScheduleSpec("linear", {"warmup": 0.05})
    assert (run.config.steps, run.config.eval_every, run.config.metric, run.config.goal) == (10, 5, "loss", "min")
    metrics = run.metrics()
    steps, seconds, losses = metrics.curve("loss")
    assert steps == [*range(1, 11), 5, 10]
    assert len(seconds) == len(losses) == 12
    assert run.result.final == metrics.evals[-1]["values"]["loss"] == losses[-1]
    assert run.result.state_bytes == 40  # two moments and a step for 3 + 1 parameters in two tensors


def test_the_keys_of_the_files_are_the_documented_ones(out):
    config, result = read_json(out / FOLDER / "config.json"), read_json(out / FOLDER / "result.json")
    added = ["micro_batches", "parallel", "ranks"]  # since, with a value that means what there was before
    assert [*config, *added] == ["format", *(f.name for f in dataclasses.fields(RunConfig))]
    assert [getattr(read_run(out / FOLDER).config, name) for name in added] == [1, None, 1]
    assert list(result) == ["format", *(f.name for f in dataclasses.fields(RunResult))]
    lines = [json.loads(line) for line in (out / FOLDER / "metrics.jsonl").read_text().splitlines()]
    assert lines[0] == {"format": 1, "kind": "header"}
    train = ["kind", "step", "loss", "lr", "seconds", "wall", "cpu", "optimizer_wall", "optimizer_cpu"]
    assert list(lines[1]) == [*train, "grad_norm", "update_rms"]
    assert list(lines[2]) == train
    assert list(lines[-1]) == ["kind", "step", "seconds", "eval_wall", "values"]


def test_today_s_runs_have_the_golden_keys(out, tmp_path):
    train_torch("tasks:plain", tmp_path / "new", ADAMW)
    for name, added in (("config.json", ["micro_batches", "parallel", "ranks"]), ("result.json", [])):
        assert list(read_json(tmp_path / "new" / FOLDER / name)) == [*read_json(out / FOLDER / name), *added]
    pairs = zip(*((folder / FOLDER / "metrics.jsonl").open() for folder in (tmp_path / "new", out)), strict=True)
    assert all(list(json.loads(a)) == list(json.loads(b)) for a, b in pairs)


def test_any_cut_of_the_metrics_reads_as_a_prefix(out):
    path = out / FOLDER / "metrics.jsonl"
    whole, data = read_metrics(path), path.read_bytes()
    rows = whole.train + whole.evals
    for length in range(0, len(data), 7):
        path.write_bytes(data[:length])
        cut = read_metrics(path)
        assert all(row in rows for row in cut.train + cut.evals)
        assert cut.train == whole.train[: len(cut.train)]


def test_partial_runs_are_partial(out):
    (out / FOLDER / "result.json").unlink()
    assert [run.status for run in RunStore(out).runs()] == ["partial"]
    (out / FOLDER / "metrics.jsonl").unlink()
    (run,) = RunStore(out).runs()
    assert run.metrics().train == []


@pytest.mark.parametrize(
    ("name", "text", "line"),
    [
        ("config.json", "{", "config.json: damaged, not JSON"),
        ("config.json", "[]", "config.json: not a file of guided-descent"),
        ("config.json", '{"format": 1}', "config.json: not a RunConfig"),
        ("config.json", '{"format": 2}', "config.json: format 2 is newer than 1; upgrade"),
        ("result.json", '{"format": 1, "status": "complete"}', "result.json: not a RunResult"),
        ("result.json", "", "result.json: damaged, not JSON"),
    ],
)
def test_damaged_files_are_named_and_other_runs_are_still_read(out, name, text, line):
    shutil.copytree(out / FOLDER, out / FOLDER.with_name("seed-1"))
    (out / FOLDER / name).write_text(text)
    store = RunStore(out)
    assert [run.path.name for run in store.runs()] == ["seed-1"]
    assert len(store.warnings) == 1
    assert line in store.warnings[0]
    assert "\n" not in store.warnings[0]


def test_unknown_keys_of_a_later_version_are_ignored(out):
    path = out / FOLDER / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "later": 1}))
    assert len(RunStore(out).runs()) == 1


def test_a_damaged_row_in_the_middle_is_an_error(out):
    path = out / FOLDER / "metrics.jsonl"
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join([*lines[:3], "garbage\n", *lines[3:]]))
    with pytest.raises(BenchError, match="line 4 is damaged"):
        read_metrics(path)


def test_the_writer_cuts_what_came_after_the_checkpoint(tmp_path):
    path = tmp_path / "metrics.jsonl"
    writer = MetricsWriter(path, 0)
    writer.write({"kind": "train", "step": 1, "loss": math.nan, "seconds": 0.123456789})
    length, checksum = writer.sync()
    assert checksum == hashlib.sha256(path.read_bytes()).hexdigest()
    writer.write({"kind": "train", "step": 2, "loss": 1.0})
    writer.close()
    writer = MetricsWriter(path, length)
    writer.write({"kind": "train", "step": 2, "loss": 2.0})
    writer.close()
    rows = read_metrics(path).train
    assert rows == [
        {"kind": "train", "step": 1, "loss": None, "seconds": 0.1234568},
        {"kind": "train", "step": 2, "loss": 2.0},
    ]
    with pytest.raises(BenchError, match="lost rows that its checkpoint counts on"):
        MetricsWriter(path, 10_000)
    length = path.stat().st_size
    right = hashlib.sha256(path.read_bytes()).hexdigest()
    assert metrics_fault(path, length, right) is None
    assert metrics_fault(path, length, None) is None
    assert "do not match their checksum" in metrics_fault(path, length - 1, right)
    assert "lost rows" in metrics_fault(path, length + 1, right)
    assert "lost rows" in metrics_fault(tmp_path / "nothing", 1, None)


def test_a_failed_write_keeps_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "a.json"
    write_json(path, {"format": 1, "value": "old"})
    for name in ("fsync", "replace"):
        with monkeypatch.context() as patch:
            patch.setattr(f"os.{name}", lambda *a: (_ for _ in ()).throw(OSError(28, "No space left on device")))
            with pytest.raises(BenchError, match=r"^cannot write .*a\.json: No space left on device; free space"):
                write_json(path, {"format": 1, "value": "new"})
        assert read_json(path)["value"] == "old"
        assert [p.name for p in tmp_path.iterdir()] == ["a.json"]


@given(st.recursive(st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
                    lambda x: st.lists(x) | st.dictionaries(st.text(), x), max_leaves=10))  # fmt: skip
def test_everything_becomes_strict_json(value):
    json.dumps(to_json(value), allow_nan=False)


@given(st.text(min_size=1))
def test_a_slug_is_one_safe_folder_name(name):
    text = slug(name)
    assert Path("x", text).parts == ("x", text)
    assert text not in (".", "..")


def test_runs_are_sorted_and_a_label_separates_equal_optimizers(tmp_path):
    for spec in (OptimizerSpec("AdamW", {"lr": 0.1}, label="AdamW lr=0.1"), ADAMW):
        for seed in (1, 0):
            train_torch("tasks:plain", tmp_path, spec, seed=seed)
    runs = RunStore(tmp_path).runs()
    assert [(r.config.optimizer.label, r.config.seed) for r in runs] == [
        ("AdamW", 0), ("AdamW", 1), ("AdamW lr=0.1", 0), ("AdamW lr=0.1", 1)
    ]  # fmt: skip
    assert read_run(tmp_path / "tasks-plain" / "AdamW-lr=0.1" / "seed-0").config.optimizer.hyper == {"lr": 0.1}
