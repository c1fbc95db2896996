"""A run that another process takes up is bitwise the run that never stopped; old formats and changed models."""

from __future__ import annotations

import json
import multiprocessing
import os
import shutil
import signal
from itertools import count
from pathlib import Path

import pytest
import tasks
import torch
from tasks import checkpoints, rows
from torch import nn

from guided_descent.bench import checkpoint
from guided_descent.bench.checkpoint import CheckpointError
from guided_descent.bench.problem import Problem, tensor_hash, tensors
from guided_descent.bench.runner import train
from guided_descent.bench.snapshot import check_order
from guided_descent.bench.store import OptimizerSpec, RunStore, read_run

ORACLES = Path(__file__).parents[1] / "oracles" / "runs"
SPECS = {
    "adamw": ("tasks:noisy", OptimizerSpec("adamw")),
    "soap": ("tasks:noisy", OptimizerSpec("soap", {"precondition_frequency": 3})),
    "schedule_free_adamw": ("tasks:noisy", OptimizerSpec("schedule_free_adamw")),
    "kfac": ("tasks:noisy", OptimizerSpec("kfac", {"fisher": "empirical"})),
    "sampled kfac": ("tasks:smooth", OptimizerSpec("kfac")),
    "8 bits": ("tasks:noisy", OptimizerSpec("adamw", {"state_dtype": "8bit"})),
    "bfloat16": ("tasks:half", OptimizerSpec("adamw", {"lr": 1e-2})),
    "stochastic": ("tasks:half", OptimizerSpec("adamw", {"rounding": "stochastic", "state_dtype": "8bit"})),
    "compensated": ("tasks:half", OptimizerSpec("muon", {"rounding": "compensated"})),
}


@pytest.fixture(scope="module")
def server():
    """Processes that start in milliseconds: a small server forks them with everything imported."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["numpy.random", "torch._dynamo", "guided_descent.bench.runner"])
    return context


def other_process(ref: str, spec: OptimizerSpec, out: str, stop: str | None, options: dict) -> None:
    """Train; a loss at the middle of the run, or an evaluation, sends SIGTERM to its own process."""
    torch.set_num_threads(1)
    calls = count(1)
    make = getattr(tasks, ref.partition(":")[2])

    def made(seed: int) -> Problem:
        problem: Problem = make(seed)
        name = "evaluate" if stop == "evaluation" else "loss"
        inner = getattr(problem, name)
        at = {None: 0, "step": 8, "evaluation": 3, "micro-batch": 15}[stop]  # some are of checks before the run

        def signalling(*arguments: object) -> object:
            if next(calls) == at:
                os.kill(os.getpid(), signal.SIGTERM)
            return inner(*arguments)

        setattr(problem, name, signalling)
        return problem

    setattr(tasks, ref.partition(":")[2], made)
    result = train(ref, spec, out=out, **options)
    os._exit(result.exit_code)


def run_elsewhere(server, *arguments) -> int:
    process = server.Process(target=other_process, args=arguments)
    process.start()
    process.join(120)
    return process.exitcode


def state_hash(out: Path, ref: str, spec: OptimizerSpec, step: int) -> str:
    state = checkpoints(out, ref, spec).load(step)
    return tensor_hash(tensors([state["model"], state["optimizer"], state["scheduler"], state["rng"]]))


@pytest.mark.parametrize("stop", ["step", "evaluation"])
@pytest.mark.parametrize("name", SPECS)
def test_stopped_by_sigterm_and_taken_up_in_another_process(server, tmp_path, name, stop):
    ref, spec = SPECS[name]
    options = {"steps": 16, "checkpoint_every": 16, "eval_every": 4}
    assert run_elsewhere(server, ref, spec, str(tmp_path / "a"), stop, options) == 143
    (step,) = checkpoints(tmp_path / "a", ref, spec).steps()
    assert 0 < step < 16
    assert run_elsewhere(server, ref, spec, str(tmp_path / "a"), None, options) == 0
    assert train(ref, spec, out=tmp_path / "b", **options).status == "complete"
    assert rows(tmp_path / "a", ref, spec) == rows(tmp_path / "b", ref, spec)
    assert state_hash(tmp_path / "a", ref, spec, 16) == state_hash(tmp_path / "b", ref, spec, 16)


@pytest.mark.parametrize("name", ["adamw", "sampled kfac"])
def test_a_signal_between_micro_batches_is_answered_after_the_step(server, tmp_path, name):
    ref, spec = SPECS[name]
    options = {"steps": 16, "checkpoint_every": 0, "eval_every": 16, "micro_batches": 2}
    assert run_elsewhere(server, ref, spec, str(tmp_path / "a"), "micro-batch", options) == 143
    (step,) = checkpoints(tmp_path / "a", ref, spec).steps()
    assert [row["step"] for row in rows(tmp_path / "a", ref, spec)[0]] == list(range(1, step + 1))
    options["checkpoint_every"] = 16
    assert run_elsewhere(server, ref, spec, str(tmp_path / "a"), None, options) == 0
    assert train(ref, spec, out=tmp_path / "b", **options).status == "complete"
    assert rows(tmp_path / "a", ref, spec) == rows(tmp_path / "b", ref, spec)
    assert state_hash(tmp_path / "a", ref, spec, 16) == state_hash(tmp_path / "b", ref, spec, 16)


@pytest.mark.parametrize("spec", [OptimizerSpec("adamw"), OptimizerSpec("kfac", {"fisher": "empirical"})])
def test_micro_batches_make_the_steps_of_the_batch(tmp_path, spec):
    train("tasks:smooth", spec, out=tmp_path / "whole")
    train("tasks:smooth", spec, out=tmp_path / "parts", micro_batches=4)
    for whole, parts in zip(*(rows(tmp_path / name, "tasks:smooth", spec)[0] for name in ("whole", "parts"))):
        assert parts["loss"] == pytest.approx(whole["loss"], rel=1e-10)


# -- formats ---------------------------------------------------------------------------------------------------------


def test_every_format_is_frozen():
    assert {path.name for path in ORACLES.glob("format-*")} == {f"format-{n + 1}" for n in range(checkpoint.FORMAT)}


@pytest.mark.parametrize("folder", sorted(ORACLES.glob("format-*")), ids=lambda path: path.name)
def test_a_run_of_every_format_goes_on(tmp_path, folder):
    """To rounding: the bits of arithmetic may differ between machines, those that were saved may not."""
    shutil.copytree(folder / "run", tmp_path / "runs")
    spec = OptimizerSpec("adamw", {"lr": 0.05})
    expected = json.loads((folder / "expected.json").read_text())
    saved = checkpoints(tmp_path / "runs", "tasks:frozen", spec).load(6)
    assert {name: value.tolist() for name, value in saved["model"].items()} == expected["saved"]
    lines: list[str] = []
    result = train("tasks:frozen", spec, out=tmp_path / "runs", warn=lines.append)
    assert (result.status, result.steps, lines) == ("complete", 12, [])
    losses = [row["loss"] for row in rows(tmp_path / "runs", "tasks:frozen", spec)[0]]
    assert losses == pytest.approx(expected["losses"], rel=1e-5)
    end = checkpoints(tmp_path / "runs", "tasks:frozen", spec).load(12)["model"]
    for name, value in expected["final"].items():
        torch.testing.assert_close(end[name], torch.tensor(value), rtol=1e-5, atol=1e-6)


# -- what a checkpoint counts on -------------------------------------------------------------------------------------


def test_damaged_rows_of_the_metrics_fall_back_to_a_checkpoint_before_them(tmp_path):
    options = {"checkpoint_every": 20, "keep": 9}
    spec = OptimizerSpec("adamw")
    train("tasks:noisy", spec, out=tmp_path, **options)
    before = rows(tmp_path, "tasks:noisy", spec)
    folder = RunStore(tmp_path).path("tasks:noisy", "adamw", 0)
    (folder / "result.json").unlink()
    text = (folder / "metrics.jsonl").read_text()
    place = text.index('"step":30') + len('"step":30,"loss":0.')
    (folder / "metrics.jsonl").write_text(text[:place] + ("7" if text[place] == "3" else "3") + text[place + 1 :])
    lines: list[str] = []
    train("tasks:noisy", spec, out=tmp_path, warn=lines.append, **options)
    (line,) = lines
    assert "step 60 (damaged: the rows of metrics.jsonl that it counts on do not match their checksum)" in line
    assert "step 40 (damaged" in line
    assert line.endswith("going on from step 20")
    assert rows(tmp_path, "tasks:noisy", spec) == before
    (folder / "result.json").unlink()
    (folder / "metrics.jsonl").unlink()
    with pytest.raises(CheckpointError, match=r"step 60 \(metrics\.jsonl lost rows .*start the run afresh"):
        train("tasks:noisy", spec, out=tmp_path, **options)


class Net(nn.Module):
    """Two layers of one shape, in either order."""

    def __init__(self, names: str) -> None:
        super().__init__()
        for name in names:
            setattr(self, name, nn.Linear(3, 3))
        with torch.no_grad():
            for parameter in self.parameters():
                parameter.fill_(0.1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.b(self.a(x).tanh())


def ordered(names: str) -> Problem:
    x = torch.linspace(-1, 1, 12).view(4, 3)
    return Problem(
        model=Net(names), loss=lambda m, b: (m(x) - x).square().mean(), batches=lambda step: x, steps=8, eval_every=8
    )


@pytest.mark.parametrize("own", [True, False])
def test_parameters_in_another_order_follow_their_names_or_are_refused(tmp_path, monkeypatch, own):
    """The first weights are equal, so that the config sees no difference; the trained ones and the state are not."""
    spec = OptimizerSpec("adamw" if own else "AdamW", {"lr": 0.1})
    options = {} if own else {"build_optimizer": tasks.torch_optimizer}
    finals = []
    for name, second in (("same", "ab"), ("other", "ba")):
        monkeypatch.setattr(tasks, "ordered", lambda seed: ordered("ab"), raising=False)
        train("tasks:ordered", spec, out=tmp_path / name, checkpoint_every=4, **options)
        folder = RunStore(tmp_path / name).path("tasks:ordered", spec.label, 0)
        (folder / "result.json").unlink()
        shutil.rmtree(folder / "checkpoints" / "step-00000008")
        monkeypatch.setattr(tasks, "ordered", lambda seed, second=second: ordered(second), raising=False)
        if name == "other" and not own:
            with pytest.raises(CheckpointError, match=r"has b\.weight in the place of a\.weight, and AdamW matches"):
                train("tasks:ordered", spec, out=tmp_path / name, checkpoint_every=4, **options)
            return
        train("tasks:ordered", spec, out=tmp_path / name, checkpoint_every=4, **options)
        finals.append(checkpoints(tmp_path / name, "tasks:ordered", spec).load(8)["model"])
    for key, value in finals[0].items():
        assert torch.equal(value, finals[1][key])
    assert not torch.equal(finals[0]["a.weight"], finals[0]["b.weight"])


def test_a_model_with_other_tensors_is_refused():
    model = nn.Linear(2, 2)
    with pytest.raises(CheckpointError, match=r"it has bias in the place of scale; restore the model"):
        check_order(model, torch.optim.SGD(model.parameters()), ["weight", "scale"])


# -- what stays ------------------------------------------------------------------------------------------------------


def up_and_down(seed: int) -> Problem:
    """The metric is best at step 10, then at step 4; the untrained state has the very best."""
    model = nn.Linear(1, 1, bias=False)
    model.register_buffer("steps", torch.zeros(()))
    values = {2: 5.0, 4: 2.0, 6: 3.0, 8: 4.0, 10: 1.0, 12: 6.0, 14: 7.0, 16: 8.0}

    def loss(model: nn.Module, batch: int) -> torch.Tensor:
        model.steps += model.training
        return model(torch.ones(1)).square().sum()

    return Problem(
        model=model,
        loss=loss,
        batches=lambda step: step,
        evaluate=lambda model: {"error": values.get(int(model.steps), 0.0)},
        steps=16,
        metric="error",
        eval_every=2,
    )


@pytest.mark.parametrize(("keep_best", "expected"), [(0, [12, 16]), (1, [10, 12, 16]), (2, [4, 10, 12, 16])])
@pytest.mark.parametrize("background", [False, True])
def test_the_best_stay_beside_the_newest(tmp_path, monkeypatch, keep_best, expected, background):
    monkeypatch.setattr(tasks, "up_and_down", up_and_down, raising=False)
    spec = OptimizerSpec("sgd")
    train(
        "tasks:up_and_down", spec, out=tmp_path, checkpoint_every=4, keep_best=keep_best, async_checkpoints=background
    )
    assert checkpoints(tmp_path, "tasks:up_and_down", spec).steps() == expected
    result = read_run(RunStore(tmp_path).path("tasks:up_and_down", "sgd", 0)).result
    assert (result.best, result.best_step) == (0.0, 0)  # the untrained state is an evaluation, too, and is not kept


@pytest.mark.parametrize("step", [8, 12])
def test_the_best_are_known_to_a_run_that_is_taken_up(tmp_path, monkeypatch, step):
    monkeypatch.setattr(tasks, "up_and_down", up_and_down, raising=False)
    spec, options = OptimizerSpec("sgd"), {"checkpoint_every": 4, "keep": 1, "keep_best": 2}
    train("tasks:up_and_down", spec, out=tmp_path, **{**options, "keep": 9})
    folder = RunStore(tmp_path).path("tasks:up_and_down", "sgd", 0)
    (folder / "result.json").unlink()
    for later in [s for s in checkpoints(tmp_path, "tasks:up_and_down", spec).steps() if s > step]:
        shutil.rmtree(folder / "checkpoints" / f"step-{later:08d}")
    train("tasks:up_and_down", spec, out=tmp_path, **options)
    assert checkpoints(tmp_path, "tasks:up_and_down", spec).steps() == [4, 10, 16]


def test_the_best_stays_without_periodic_ones(tmp_path):
    spec = OptimizerSpec("adamw")
    train("tasks:smooth", spec, out=tmp_path, checkpoint_every=0, keep_best=1, keep=1)
    result = read_run(RunStore(tmp_path).path("tasks:smooth", "adamw", 0)).result
    assert result.best_step in checkpoints(tmp_path, "tasks:smooth", spec).steps()
