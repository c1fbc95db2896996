"""The command line as processes: the user's example from end to end, signals, kills, a full disk, missing libraries."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

import guided_descent
from guided_descent.cli import run

EXAMPLES = Path(__file__).parents[2] / "examples"
SOURCE = Path(guided_descent.__file__).parents[1]
TASK = "my_task:make"

# A task whose steps take 20 ms, so that a signal finds it at work.
SLOW = """
import time, torch
from guided_descent.bench import Problem
def make(seed):
    x = torch.randn(16, 8, generator=torch.Generator().manual_seed(1))
    def loss(model, batch):
        time.sleep(0.02)
        return (model(batch) - 1).square().mean()
    def evaluate(model):
        return {"error": (model(x) - 1).square().mean().item()}
    model = torch.nn.Linear(8, 64)
    return Problem(model=model, loss=loss, batches=[x], evaluate=evaluate, metric="error", steps=60)
"""


def environment() -> dict[str, str]:
    path = os.pathsep.join(filter(None, [str(SOURCE), os.environ.get("PYTHONPATH")]))
    return {**os.environ, "PYTHONPATH": path, "PYTHONDONTWRITEBYTECODE": "1", "OMP_NUM_THREADS": "1", "COLUMNS": "160"}


def start(*arguments: object, cwd: Path = EXAMPLES, **kwargs) -> subprocess.Popen:
    command = [sys.executable, "-m", "guided_descent", *map(str, arguments)]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen(command, cwd=cwd, env=environment(), start_new_session=True, **pipes, **kwargs)


def call(*arguments: object, **kwargs) -> tuple[int, str, str]:
    process = start(*arguments, **kwargs)
    out, err = process.communicate(timeout=120)
    return process.returncode, out, err


def wait_for(path: Path, pattern: str, text: str, process: subprocess.Popen) -> None:
    """Until some file below ``path`` holds the text."""
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline and process.poll() is None:
        if any(text in found.read_text() for found in path.rglob(pattern)):
            return
        time.sleep(0.02)
    raise AssertionError(f"{text!r} never appeared in {pattern}: {process.communicate(timeout=20)}")


@pytest.fixture
def slow(tmp_path) -> Path:
    (tmp_path / "slow_task.py").write_text(SLOW)
    return tmp_path


def test_the_users_own_task_from_end_to_end(tmp_path):
    arguments = ["compare", TASK, "-o", "adamw", "-o", "muon", "--steps", 20, "--timing-rounds", 1, "--out", tmp_path]
    code, out, err = call(*arguments)
    assert code == 0, err
    assert "[6/6]" in err
    document = json.loads((tmp_path / "comparison.json").read_text())
    assert document["problem"] == TASK
    assert document["command"] == f"guided-descent {' '.join(map(str, arguments))}"
    assert document["verdict"]["sentence"] in " ".join(out.split())
    assert (tmp_path / "report.html").stat().st_size > 1e6


@pytest.mark.parametrize("number", [signal.SIGTERM, pytest.param(signal.SIGINT, marks=pytest.mark.slow)])
def test_a_signal_saves_and_the_same_command_continues(slow, monkeypatch, number):
    arguments = ["compare", "slow_task:make", "-o", "adamw", "--seeds", "1"]
    arguments += ["--timing-rounds", "0", "--no-report", "--out"]
    process = start(*arguments, slow / "runs", "--workers", 1, cwd=slow)
    wait_for(slow / "runs", "metrics.jsonl", '"step":15,', process)
    os.killpg(process.pid, number)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 128 + number, err
    assert err.splitlines()[-1].startswith("guided-descent: stopped by SIG")
    assert "Traceback" not in out + err
    assert not list((slow / "runs").rglob("result.json"))
    assert list((slow / "runs").rglob("COMPLETE"))

    monkeypatch.chdir(slow)
    monkeypatch.syspath_prepend(slow)
    finals = []
    for folder in ("runs", "straight"):
        assert run([*arguments, str(slow / folder), "--workers", "0"]) == 0
        (result,) = (slow / folder).rglob("result.json")
        finals.append(json.loads(result.read_text())["final"])
    assert finals[0] == finals[1]


def test_sigterm_in_a_training_is_143_and_it_continues(slow):
    arguments = ["train", "slow_task:make", "--out", slow / "runs"]
    process = start(*arguments, cwd=slow)
    wait_for(slow / "runs", "metrics.jsonl", '"step":10,', process)
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 143, err
    assert "run the same command to continue" in err.splitlines()[-1]


def test_workers_end_when_their_parent_is_killed(slow):
    process = start(
        "compare", "slow_task:make", "-o", "adamw", "-o", "sgd", "--out", slow / "runs", "--steps", 2000, cwd=slow
    )
    wait_for(slow / "runs", "metrics.jsonl", '"step":5,', process)
    process.kill()
    process.communicate(timeout=20)
    deadline = time.monotonic() + 20
    while time.monotonic() < deadline:
        sizes = {path: path.stat().st_size for path in slow.rglob("metrics.jsonl")}
        time.sleep(1.0)
        if sizes == {path: path.stat().st_size for path in slow.rglob("metrics.jsonl")}:
            return
    raise AssertionError("the workers still write after their parent was killed")


def test_a_full_disk_is_4_and_loses_nothing(slow):
    """A limit on file size stands in for the full disk: the checkpoint does not fit."""
    resource = pytest.importorskip("resource", reason="file size limits need a POSIX system")
    (slow / "big_task.py").write_text(
        SLOW.replace("Linear(8, 64)", "Linear(8, 9000)").replace("sleep(0.02)", "sleep(0)")
    )
    arguments = ["train", "big_task:make", "--steps", 12, "--checkpoint-every", 6, "--out", slow / "runs"]

    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, 200_000))

    code, out, err = call(*arguments, cwd=slow, preexec_fn=limit)
    assert code == 4, (out, err)
    assert err.splitlines()[-1].startswith("guided-descent: cannot save the checkpoint of step 6")
    assert "Traceback" not in err
    (metrics,) = (slow / "runs").rglob("metrics.jsonl")
    assert '"step":6,' in metrics.read_text()
    code, out, err = call(*arguments, cwd=slow)
    assert code == 0, err


@pytest.mark.parametrize("missing", ["typer", "rich", "scipy", "safetensors"])
def test_a_missing_library_prints_the_pip_line(missing):
    script = (
        f"import sys; sys.modules[{missing!r}] = None\n"
        "from guided_descent.__main__ import main\n"
        "sys.exit(main(['compare', 'my_task:make', '--steps', '2', '--out', '/nowhere']))"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, env=environment(), cwd=EXAMPLES, check=False
    )
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    assert missing in done.stderr
    assert "pip install 'guided-descent[bench]'" in done.stderr


def test_a_closed_pipe_is_no_error():
    command = f"{sys.executable} -m guided_descent list --json | head -n 1"
    done = subprocess.run(command, shell=True, capture_output=True, text=True, env=environment(), check=False)
    assert done.stdout == "{\n"
    assert "Traceback" not in done.stderr
