"""The command line in this process: what each command prints, and the line and code for every mistake."""

from __future__ import annotations

import errno
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import guided_descent
from guided_descent.cli import run
from guided_descent.schedules import curves, sketch

EXAMPLES = Path(__file__).parents[2] / "examples"
TASK = "my_task:make"
TINY = ["--steps", "6", "--eval-every", "3"]


@pytest.fixture(autouse=True)
def in_examples(monkeypatch):
    """Every command runs where a user would: in the folder of the task."""
    monkeypatch.chdir(EXAMPLES)
    monkeypatch.setattr(sys, "path", [str(EXAMPLES), *sys.path])
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    monkeypatch.setenv("COLUMNS", "200")


@pytest.fixture
def cli(capsys):
    """Run a command; returns its code, stdout and stderr."""

    def call(*arguments: object) -> tuple[int, str, str]:
        code = run([str(argument) for argument in arguments])
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return call


def refused(result: tuple[int, str, str], code: int, *words: str) -> None:
    """The command failed with this code, printed one line on stderr with these words, and nothing else."""
    got, out, err = result
    lines = err.splitlines()
    assert got == code, err
    assert out == ""
    assert len(lines) == 1, err
    assert lines[0].startswith("guided-descent: ")
    assert "Traceback" not in err
    for word in words:
        assert word in lines[0]


def test_list(cli):
    code, out, err = cli("list")
    assert (code, err) == (0, "")
    for name in guided_descent.list_optimizers():
        assert name in out
    code, out, _ = cli("list", "--json")
    assert [entry["key"] for entry in json.loads(out)["optimizers"]] == guided_descent.list_optimizers()
    code, out, _ = cli("list", "--family", "spectral", "--json")
    assert [entry["key"] for entry in json.loads(out)["optimizers"]] == guided_descent.list_optimizers("spectral")


def test_describe(cli):
    code, out, _ = cli("describe", "muon")
    assert code == 0
    assert "momentum" in out
    code, out, _ = cli("describe", "muon", "--json")
    assert json.loads(out)["key"] == "muon"


def test_explain(cli):
    code, out, _ = cli("explain", "muon:lr=0.05", "--problem", TASK)
    assert code == 0
    assert "0.weight" in out
    assert "0.05" in out
    code, out, _ = cli("explain", "muon", "--problem", TASK, "--json")
    recipes = {line["parameter"]: line["recipe"] for line in json.loads(out)["lines"]}
    assert recipes["2.weight"] == "muon"
    assert recipes["2.bias"] == "adamw"


def test_schedule(cli, tmp_path):
    code, out, err = cli("schedule")
    assert (code, err) == (0, "")
    for name in [*curves.FUNCTIONS, "wsd", "trapezoid", "noam", "one_cycle"]:
        assert f"{name}(" in out
    code, out, _ = cli("schedule", "--json")
    assert len(json.loads(out)["curves"]) == len(curves.FUNCTIONS) + 4

    chain = curves.warmup(20) >> curves.constant(780) >> curves.one_minus_sqrt(200)
    code, out, _ = cli("schedule", "wsd(1000, warmup=0.02)", "0.5 * linear(100)", "--lr", 0.003)
    assert code == 0
    assert out.startswith(f"{chain!r}\n{sketch(chain, peak=0.003)}\n")
    assert sketch(0.5 * curves.linear(100), peak=0.003) in out
    code, out, _ = cli("schedule", "one_cycle(300)", "--json", "--lr", 2)
    (row,) = json.loads(out)["schedules"]
    assert row["curve"].startswith("rise(90, shape='cosine', floor=0.04) >> cosine(210, floor=")
    assert row["points"][0] == [0, 0.08]
    assert [at for at, _ in row["points"]] == sorted({round(i * 299 / 128) for i in range(129)})
    assert all(lr == 2 * curves.parse(row["curve"])(at) for at, lr in row["points"])


def test_schedule_in_tokens_and_as_a_picture(cli, tmp_path):
    path = tmp_path / "schedule.png"
    code, out, err = cli("schedule", "linear(1_000_000)", "--tokens-per-step", 4096, "--png", path)
    assert (code, err) == (0, "")
    assert "245 optimizer steps" in out
    assert out.splitlines()[-1] == str(path)
    assert path.read_bytes().startswith(b"\x89PNG")
    refused(cli("schedule", "linear(9)", "--png", tmp_path / "no" / "x.png"), 4, "No such file")


def test_train(cli, tmp_path):
    code, out, err = cli("train", TASK, "-o", "muon:lr=0.05,momentum=0.9", "--out", tmp_path, *TINY)
    assert code == 0, err
    assert "test_loss" in out
    assert "after 6 steps" in out
    code, out, _ = cli("train", TASK, "-o", "muon:lr=0.05,momentum=0.9", "--out", tmp_path, "--json", *TINY)
    document = json.loads(out)
    assert document["config"]["optimizer"]["hyper"] == {"lr": 0.05, "momentum": 0.9}
    assert document["result"]["status"] == "complete"
    assert Path(document["folder"]).is_dir()


def test_train_keeps_what_it_is_told_to(cli, tmp_path):
    options = ["--checkpoint-every", 1, "--keep", 3, "--keep-best", 1, "--async-checkpoints", "--micro-batches", 2]
    code, out, err = cli("train", TASK, "--out", tmp_path, "--json", *options, *TINY)
    assert code == 0, err
    document = json.loads(out)
    assert document["config"]["micro_batches"] == 2
    steps = {int(path.name[5:]) for path in tmp_path.rglob("step-*")}
    assert steps == {4, 5, 6, document["result"]["best_step"]}


def test_a_diverged_training_fails_with_1(cli, tmp_path):
    code, out, _ = cli("train", TASK, "-o", "sgd:lr=1e30", "--out", tmp_path, "--steps", 30)
    assert code == 1
    assert "diverged" in out


def test_compare_train_and_report(cli, tmp_path):
    arguments = ["compare", TASK, "-o", "adamw", "-o", "sgd", "--workers", 0, "--timing-rounds", 1, "--out", tmp_path]
    code, out, err = cli(*arguments, *TINY)
    assert code == 0, err
    assert "adamw" in out
    assert "tuning budget:" in out
    assert str(tmp_path / "report.html") in out
    page = (tmp_path / "report.html").read_text()
    assert {path.name for path in tmp_path.glob("*.png")} == {"curves-step.png", "curves-time.png", "finals.png"}

    code, out, _ = cli(*arguments, "--json", "--no-report", *TINY)
    document = json.loads(out)
    assert document["seeds"] == [100, 101, 102]
    assert document["command"].startswith("guided-descent compare my_task:make")

    (tmp_path / "report.html").unlink()
    code, out, _ = cli("report", tmp_path, "--json")
    assert code == 0
    assert str(tmp_path / "report.html") in json.loads(out)["files"]
    assert len((tmp_path / "report.html").read_text()) == pytest.approx(len(page), rel=0.01)


def test_compare_says_when_no_winner_may_be_named(cli, tmp_path):
    code, out, _ = cli(
        "compare", TASK, "-o", "adamw:lr=0.01", "-o", "sgd", "--seeds", 2, "--workers", 0, "--timing-rounds", 0,
        "--no-report", "--out", tmp_path, *TINY
    )  # fmt: skip
    assert code == 0
    assert "No winner is named: 2 common seeds, at least 3 are needed; hyperparameters of adamw lr=0.01 were set" in (
        " ".join(out.split())
    )


def test_tune_then_compare_with_it(cli, tmp_path):
    tuned = tmp_path / "tuned"
    code, out, err = cli("tune", TASK, "-o", "adamw", "-o", "sgd", "--steps", 3, "--workers", 0, "--out", tuned)
    assert code == 0, err
    assert f"--tuning {tuned / 'tuning.json'}" in out
    code, out, err = cli(
        "compare", TASK, "-o", "adamw", "-o", "sgd", "--steps", 3, "--tuning", tuned / "tuning.json", "--workers", 0,
        "--timing-rounds", 0, "--no-report", "--json", "--out", tmp_path / "runs"
    )  # fmt: skip
    arms = json.loads(out)["arms"]
    assert {arm["budget"]["source"] for arm in arms} == {"tuned"}
    assert len({arm["budget"]["trials"] for arm in arms}) == 1


def test_help_teaches(cli):
    code, out, _ = cli()
    assert code == 0
    assert "Exit codes" in out
    for command in ("list", "describe", "explain", "schedule", "train", "compare", "tune", "report"):
        assert command in out
        code, text, _ = cli(command, "--help")
        assert code == 0
        assert "Examples" in text
        assert f"guided-descent {command}" in text
        assert "--json" in text


def test_version(cli):
    assert cli("--version")[0] == 0


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["train", TASK, "-o", "muno"], ["'muno'", "did you mean 'muon'?"]),
        (["compare", TASK, "-o", "Adam-W"], ["did you mean 'adamw'?"]),
        (["describe", "qqqqqq"], ["unknown optimizer", "guided-descent list"]),
        (["train", TASK, "-o", "adamw:learning_rte=1"], ["learning_rte", "weight_decay"]),
        (["train", TASK, "-o", "adamw:lr=-1"], ["lr=-1", ">= 0"]),
        (["train", TASK, "-o", "adamw:lr=abc"], ["lr"]),
        (["train", TASK, "-o", "adamw:lr"], ["key=value"]),
        (["train", TASK, "-o", ""], ["names no optimizer"]),
        (["train", "my_task:mak"], ["no function 'mak'", "make"]),
        (["train", "no_such_module:make"], ["no module 'no_such_module'"]),
        (["train", "nope"], ["unknown workload 'nope'", "lm-source"]),
        (["train", TASK, "--steps", "0"], ["--steps", "0 is too small", "1 or more"]),
        (["train", TASK, "--keep", "0"], ["--keep", "0 is too small", "1 or more"]),
        (["train", TASK, "--micro-batches", "7"], ["cannot be divided into 7 equal parts, only into 2, 4"]),
        (["train", TASK, "--parallel", "fsdp"], ["--parallel", "'fsdp' is unknown, it must be ddp"]),
        (["train", TASK, "--parallel", "ddp"], ["needs ranks", "torchrun --nproc-per-node 2 -m guided_descent train"]),
        (["compare", TASK, "--seeds", "-3"], ["-3 is too small"]),
        (["compare", TASK, "--workers", "two"], ["--workers", "valid integer"]),
        (["trian"], ["'trian'", "'train'"]),
        (["train", "--stesp", "3"], ["--stesp", "--steps"]),
        (["list", "--family", "nope"], ["'nope'", "spectral"]),
        (["compare", TASK, "--tuning", "missing.json"], ["missing.json", "No such file"]),
        (["tune", TASK, "-o", "adamw:lr=1"], ["without hyperparameters"]),
        (["schedule", "warmpu(3)"], ["there is no curve 'warmpu'", "did you mean 'warmup'?"]),
        (["schedule", "linear(3) >>"], ["cannot be read"]),
        (["schedule", "linear(0)"], ["steps=0", "positive integer"]),
        (["schedule", "wsd(10, warmup=9, cooldown=5)"], ["do not fit into total_steps=10"]),
        (["schedule", "inverse_sqrt(5)"], ["has no end", "--steps"]),
        (["schedule", "linear(5)", "--tokens-per-step", "0"], ["0 is too small"]),
        (["schedule", "--steps", "5"], ["nothing to draw"]),
        (["report", "no/such/folder"], ["no comparison.json", "guided-descent compare --out"]),
    ],
)
def test_wrong_usage_is_2(cli, tmp_path, arguments, words):
    out = ["--out", tmp_path] if arguments[0] in ("train", "compare", "tune") else []
    refused(cli(*arguments, *out), 2, *words)
    assert list(tmp_path.iterdir()) == []


BAD_TASKS = {
    "empty": ("Problem(model=net, loss=loss, batches=[])", "batches is empty"),
    "nothing": ("Problem(model=net, loss=loss, batches=[(torch.zeros(0, 3), torch.zeros(0, 1))])", "empty"),
    "shape": ("Problem(model=net, loss=loss, batches=[(torch.ones(4, 5), torch.ones(4, 1))])", "[4, 5]"),
    "scalar": ("Problem(model=net, loss=lambda m, b: m(b[0]), batches=[(torch.ones(4, 3), 1)])", "one element"),
    "type": ("3", "returned a int"),
    "crash": ("1 / 0", "ZeroDivisionError"),
}


@pytest.mark.parametrize("name", BAD_TASKS)
def test_a_bad_task_is_one_line(cli, tmp_path, monkeypatch, name):
    expression, word = BAD_TASKS[name]
    (tmp_path / f"bad_{name}.py").write_text(
        "import torch\nfrom guided_descent.bench import Problem\nnet = torch.nn.Linear(3, 1)\n"
        f"def loss(m, b): return (m(b[0]) - b[1]).square().mean()\ndef make(): return {expression}\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    refused(cli("train", f"bad_{name}:make", "--out", tmp_path / "runs"), 2, word)


def test_damaged_files_are_3(cli, tmp_path):
    train = ["train", TASK, "--out", tmp_path, *TINY]
    assert cli(*train)[0] == 0
    (config,) = tmp_path.rglob("config.json")
    whole = config.read_text()
    config.write_text(whole[:100])
    refused(cli(*train), 3, "config.json", "damaged")
    config.write_text(whole)
    (tmp_path / "comparison.json").write_text("not json")
    refused(cli("report", tmp_path), 3, "comparison.json", "damaged")
    refused(cli("compare", TASK, "--tuning", tmp_path / "comparison.json"), 3, "damaged")


def test_a_damaged_checkpoint_is_named_and_fresh_starts_again(cli, tmp_path):
    train = ["train", TASK, "--out", tmp_path, "--checkpoint-every", 2, *TINY]
    assert cli(*train)[0] == 0
    (result,) = tmp_path.rglob("result.json")
    result.unlink()  # as if it had been killed at the end
    tensors = sorted(tmp_path.rglob("tensors.safetensors"))
    assert len(tensors) > 1
    flip(tensors[-1])
    code, _, err = cli(*train)  # an earlier checkpoint is intact: a warning, and the run goes on
    assert code == 0
    assert "step 6 (damaged: tensors.safetensors does not match its checksum); going on from step 4" in err
    result.unlink()
    for path in tmp_path.rglob("tensors.safetensors"):
        flip(path)
    code, _, err = cli(*train)
    assert code == 3
    assert err.splitlines()[-1].startswith("guided-descent: ")
    assert "Traceback" not in err
    assert cli(*train, "--fresh")[0] == 0


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize("number", [errno.EACCES, errno.ENOSPC, errno.EROFS])
def test_unwritable_is_4_and_loses_nothing(cli, tmp_path, monkeypatch, number):
    train = ["train", TASK, "--out", tmp_path, *TINY]
    assert cli(*train)[0] == 0
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}

    def refuse(*args, **kwargs):
        raise OSError(number, os.strerror(number), "somewhere")

    with monkeypatch.context() as patch:
        patch.setattr(Path, "mkdir", refuse)
        refused(cli("train", TASK, "--out", tmp_path / "deeper", *TINY), 4, os.strerror(number))
    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", refuse)
        code, _, err = cli("train", TASK, "--seed", 1, "--out", tmp_path, *TINY)
        assert code == 4
        assert os.strerror(number) in err
        assert "Traceback" not in err
    assert {path: path.read_bytes() for path in before} == before
    assert cli("train", TASK, "--seed", 1, "--out", tmp_path, *TINY)[0] == 0  # space is back: it goes on


def test_a_file_in_the_way_is_named(cli, tmp_path):
    (tmp_path / "file").write_text("")
    refused(cli("train", TASK, "--out", tmp_path / "file" / "runs", *TINY), 2, "file")
    refused(cli("train", TASK, "--out", tmp_path / "file", *TINY), 2, "file")


def test_another_run_in_the_folder_is_never_overwritten(cli, tmp_path):
    assert cli("train", TASK, "--out", tmp_path, *TINY)[0] == 0
    before = {path: path.read_bytes() for path in tmp_path.rglob("*.json*")}
    code, _, err = cli("train", TASK, "--out", tmp_path, "--steps", 7)
    assert code == 2
    assert "steps" in err
    assert {path: path.read_bytes() for path in before} == before


def test_our_own_faults_say_so(cli, monkeypatch):
    def break_it(family=None):
        raise RuntimeError("boom")

    monkeypatch.setattr(guided_descent, "list_optimizers", break_it)
    refused(cli("list"), 1, "RuntimeError: boom", "report it")


def test_ctrl_c_is_130(cli, monkeypatch):
    def interrupt(family=None):
        raise KeyboardInterrupt

    monkeypatch.setattr(guided_descent, "list_optimizers", interrupt)
    refused(cli("list"), 130, "SIGINT", "same command")


def test_the_example_is_short_and_stands_in_the_readme():
    lines = (EXAMPLES / "my_task.py").read_text().splitlines()
    assert len([line for line in lines if line.strip()]) <= 25


def test_the_console_script_is_declared():
    assert shutil.which(sys.executable)
    code = subprocess.run(
        [sys.executable, "-m", "guided_descent", "--version"], capture_output=True, text=True, check=False
    )
    assert code.returncode == 0
    assert code.stdout.startswith("guided-descent ")
