"""The runner: real kills, real signals, and resumption that is bitwise equal to a run that never stopped."""

from __future__ import annotations

import json
import multiprocessing
import os
import random
import resource
import shutil
import signal
import tempfile
import time
from itertools import pairwise
from pathlib import Path

import pytest
import tasks
import torch
from tasks import ADAMW, STEPS, checkpoints, child, rows, train_torch

import guided_descent
from guided_descent.bench import session
from guided_descent.bench.checkpoint import Checkpoints
from guided_descent.bench.files import BenchError
from guided_descent.bench.problem import tensor_hash, tensors
from guided_descent.bench.runner import build_schedule, train
from guided_descent.bench.session import Tick
from guided_descent.bench.store import OptimizerSpec, RunStore, ScheduleSpec, read_metrics, read_run
from guided_descent.recipes import lookup

NOISY = "tasks:noisy"
EVERY_STEP = {"checkpoint_every": 1}


@pytest.fixture(scope="module")
def server():
    """Processes that start in milliseconds: a small server forks them with everything imported."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["numpy.random", "torch._dynamo", "guided_descent.bench.runner"])
    return context


@pytest.fixture(scope="module")
def reference(tmp_path_factory):
    """The uninterrupted run."""
    out = tmp_path_factory.mktemp("reference")
    assert train_torch(NOISY, out, checkpoint_every=0).status == "complete"
    whole = tmp_path_factory.mktemp("saved")
    train_torch(NOISY, whole, **EVERY_STEP)
    assert rows(out, NOISY) == rows(whole, NOISY)  # saving changes nothing
    return whole


def final_state(out: Path, ref: str = NOISY, spec: OptimizerSpec = ADAMW) -> str:
    """Hash of weights, buffers, optimizer state and generator at the end."""
    step, state = checkpoints(out, ref, spec).latest(pytest.fail)
    assert step == STEPS
    assert state["step"] == STEPS
    return tensor_hash(tensors([state["model"], state["optimizer"], state["rng"][0]["torch"]]))


def assert_same_run(out: Path, reference: Path, ref: str = NOISY) -> None:
    assert rows(out, ref) == rows(reference, NOISY)
    assert final_state(out, ref) == final_state(reference)
    ours, theirs = (read_run(RunStore(o).path(r, "AdamW", 0)).result for o, r in ((out, ref), (reference, NOISY)))
    for name in ("status", "steps", "final", "best", "best_step", "values", "train_loss", "update_rms", "state_bytes"):
        assert getattr(ours, name) == getattr(theirs, name)


def start(server, ref: str, out: Path, errors=None, **options):
    """A child that trains, once it has finished a step."""
    started = server.Event()
    process = server.Process(target=child, args=(ref, str(out), started, options, errors))
    process.start()
    deadline = time.monotonic() + 60
    while not started.wait(0.01) and process.is_alive():
        assert time.monotonic() < deadline
    return process


def kill_until_finished(server, out: Path, moments: random.Random, most: int) -> int:
    """Start, kill at a random moment, start again; what stands on disk after each kill must be whole."""
    kills, last = 0, -1
    while True:
        process = start(server, NOISY, out, **EVERY_STEP)
        if kills < most:
            time.sleep(moments.uniform(0, 0.12))
            process.kill()
        process.join(60)
        if process.exitcode == 0:
            return kills
        assert process.exitcode == -signal.SIGKILL
        kills += 1
        lines: list[str] = []
        found = checkpoints(out, NOISY).latest(lines.append)  # the newest is never a damaged one
        assert not any("damaged" in line for line in lines)
        if found is not None:
            assert found[0] >= last
            last = found[0]
        (run,) = RunStore(out).runs()
        if run.status != "partial":  # the kill came between the result and the end of the process
            assert run.status == "complete"
            assert found is not None
        run.metrics()  # readable, whatever the last line is


def test_killed_at_random_moments_it_ends_as_if_never_stopped(server, reference, tmp_path):
    kills = kill_until_finished(server, tmp_path, random.Random(0), most=5)
    assert kills >= 1
    assert_same_run(tmp_path, reference)


@pytest.mark.slow
def test_fifty_kills(server, reference, tmp_path):
    moments, kills = random.Random(1), 0
    for attempt in range(50):
        kills += kill_until_finished(server, tmp_path / str(attempt), moments, most=10)
        assert_same_run(tmp_path / str(attempt), reference)
        if kills >= 50:
            return
    pytest.fail(f"only {kills} kills hit a run")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_during_a_step_saves_and_exits_with_its_number(server, reference, tmp_path, number):
    process = start(server, NOISY, tmp_path, checkpoint_every=0)
    os.kill(process.pid, number)
    process.join(60)
    assert process.exitcode in (128 + number, 0)
    if process.exitcode:  # 0: the signal came after the last step
        assert len(checkpoints(tmp_path, NOISY).steps()) == 1
        assert not (RunStore(tmp_path).path(NOISY, "AdamW", 0) / "result.json").exists()
    train_torch(NOISY, tmp_path)
    assert rows(tmp_path, NOISY) == rows(reference, NOISY)


def test_a_signal_inside_a_step_or_a_microbatch_is_answered_after_the_step(reference, tmp_path):
    """Sent by the loss itself, between its two micro-batches of step 20: no race, no child."""
    out, inner = tmp_path / "a", tasks.noisy

    def sender(seed: int):
        problem = inner(seed)
        loss = problem.loss

        def signalling(model, batch):
            calls.append(1)
            if len(calls) == 21 + 1:  # one call is the check before the run
                os.kill(os.getpid(), signal.SIGTERM)
            return loss(model, batch)

        problem.loss = signalling
        return problem

    calls: list[int] = []
    tasks.sender = sender
    try:
        result = train_torch("tasks:sender", out, checkpoint_every=0)
        assert (result.status, result.steps, result.signal, result.exit_code) == ("interrupted", 21, 15, 143)
        assert checkpoints(out, "tasks:sender").steps() == [21]
        calls = [0] * 100
        train_torch("tasks:sender", out)
        assert_same_run(out, reference, "tasks:sender")
    finally:
        del tasks.sender


def test_evaluations_do_not_touch_the_training(tmp_path):
    """They draw from every generator and switch the mode of dropout and batch norm."""
    for every in (1, STEPS):
        train_torch(NOISY, tmp_path / str(every), eval_every=every)
    assert rows(tmp_path / "1", NOISY)[0] == rows(tmp_path / str(STEPS), NOISY)[0]


def test_losses_since_the_last_evaluation_survive_a_kill(tmp_path):
    train_torch("tasks:plain", tmp_path, checkpoint_every=1, keep=10)
    before = rows(tmp_path, "tasks:plain")
    for step in range(1, 10):
        go_back(tmp_path, "tasks:plain", ADAMW, step)
        train_torch("tasks:plain", tmp_path, checkpoint_every=1, keep=10)
        assert rows(tmp_path, "tasks:plain") == before


def test_a_signal_during_a_long_evaluation_is_answered_at_once(server, reference, tmp_path, monkeypatch):
    monkeypatch.setenv("WAIT_FOLDER", str(tmp_path))
    process = server.Process(target=waiting_child, args=(str(tmp_path), "tasks:waiting"))
    process.start()
    wait_for(tmp_path / "waiting", process)
    began = time.monotonic()
    os.kill(process.pid, signal.SIGTERM)
    process.join(30)
    assert time.monotonic() - began < 20  # the evaluation would have waited a minute
    assert process.exitcode == 143
    assert checkpoints(tmp_path, "tasks:waiting").steps() == [10, 14]
    (tmp_path / "go").touch()
    train_torch("tasks:waiting", tmp_path)
    assert_same_run(tmp_path, reference, "tasks:waiting")


def test_weights_that_an_interrupted_evaluation_changed_are_not_saved(server, tmp_path):
    process = server.Process(target=waiting_child, args=(str(tmp_path), "tasks:meddling"))
    process.start()
    wait_for(tmp_path / "waiting", process)
    os.kill(process.pid, signal.SIGTERM)
    process.join(30)
    assert process.exitcode == 143
    assert checkpoints(tmp_path, "tasks:meddling").steps() == [10]  # the one before the evaluation


def waiting_child(out: str, ref: str) -> None:
    os.environ["WAIT_FOLDER"] = out
    child(ref, out, multiprocessing.Event(), {"checkpoint_every": 10})


def wait_for(path: Path, process) -> None:
    deadline = time.monotonic() + 60
    while not path.exists():
        assert process.is_alive()
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_a_finished_run_is_not_run_again(reference):
    before = (RunStore(reference).path(NOISY, "AdamW", 0) / "metrics.jsonl").read_bytes()
    result = train_torch(NOISY, reference, progress=lambda tick: pytest.fail("it ran"))
    assert result.status == "complete"
    assert (RunStore(reference).path(NOISY, "AdamW", 0) / "metrics.jsonl").read_bytes() == before


def test_another_run_in_the_same_folder_is_refused_and_fresh_replaces_it(tmp_path):
    train_torch("tasks:plain", tmp_path)
    with pytest.raises(BenchError, match=r"holds another run: steps 10 instead of 12; choose another folder or label"):
        train_torch("tasks:plain", tmp_path, steps=12)
    with pytest.raises(BenchError, match=r"'lr': 0\.5"):
        train_torch("tasks:plain", tmp_path, OptimizerSpec("AdamW", {"lr": 0.5}))
    assert train_torch("tasks:plain", tmp_path, steps=12, resume=False).steps == 12


def go_back(out: Path, ref: str, spec: OptimizerSpec, step: int) -> None:
    """Make a finished run one that was killed after the checkpoint of a step."""
    folder = RunStore(out).path(ref, spec.label, 0)
    (folder / "result.json").unlink()
    for later in [s for s in checkpoints(out, ref, spec).steps() if s > step]:
        shutil.rmtree(folder / "checkpoints" / f"step-{later:08d}")


def test_gradients_that_stay_infinite_end_the_run_as_diverged(tmp_path):
    """The loss is finite, its gradient is not: our optimizers skip, and give up after a while."""
    lines: list[str] = []
    result = train("tasks:steep", OptimizerSpec("adamw"), out=tmp_path, warn=lines.append)
    assert result.status == "diverged"
    assert 20 <= result.skipped <= 30
    assert "gave up with NonFiniteError" in lines[-1]


@pytest.mark.parametrize(
    ("spec", "word"), [(OptimizerSpec("adamx"), "adamw"), (OptimizerSpec("adamw", {"lrr": 1}), "lrr")]
)
def test_misspelt_optimizers_and_hyperparameters_are_one_line(tmp_path, spec, word):
    with pytest.raises(BenchError, match=word) as caught:
        train("tasks:plain", spec, out=tmp_path)
    assert "\n" not in str(caught.value)


def test_sampled_labels_of_a_task_without_a_named_loss_are_refused_before_the_run(tmp_path):
    with pytest.raises(BenchError, match=r"names no loss.*or use kfac:fisher=empirical"):
        train(NOISY, OptimizerSpec("kfac"), out=tmp_path, steps=4)
    with pytest.raises(BenchError, match=r"'sophia_g' samples labels.*names no loss.*likelihood$"):
        train(NOISY, OptimizerSpec("sophia_g"), out=tmp_path, steps=4)
    assert train(NOISY, OptimizerSpec("kfac", {"fisher": "empirical"}), out=tmp_path, steps=4).status == "complete"


@pytest.mark.parametrize("name", guided_descent.list_optimizers())
def test_our_optimizers_and_schedule_resume_bitwise(tmp_path, name):
    hyper = {"loss": "mse"} if lookup(name).reads_layers or lookup(name).samples_labels else {}
    spec, options = OptimizerSpec(name, hyper), {"steps": 20, "checkpoint_every": 5, "keep": 4}
    whole = train(NOISY, spec, out=tmp_path, **options)
    before, saved = rows(tmp_path, NOISY, spec), checkpoints(tmp_path, NOISY, spec).load(20)
    go_back(tmp_path, NOISY, spec, 10)
    lines: list[str] = []
    again = train(NOISY, spec, out=tmp_path, warn=lines.append, **options)
    assert lines == []
    assert rows(tmp_path, NOISY, spec) == before
    assert again.final == whole.final
    continued = checkpoints(tmp_path, NOISY, spec).load(20)
    for part in ("model", "optimizer", "rng"):
        assert tensor_hash(tensors(continued[part])) == tensor_hash(tensors(saved[part]))


def test_the_readme_s_example_trains(tmp_path):
    result = train("example_task:make", OptimizerSpec("adamw", {"lr": 1e-2}), out=tmp_path)
    errors = read_run(RunStore(tmp_path).path("example_task:make", "adamw", 0)).metrics().curve("error")[2]
    assert result.status == "complete"
    assert errors[-1] < 0.1 * errors[0]


def test_two_processes_cannot_train_in_one_folder(server, tmp_path):
    process = server.Process(target=waiting_child, args=(str(tmp_path), "tasks:waiting"))
    process.start()
    try:
        wait_for(tmp_path / "waiting", process)
        with pytest.raises(BenchError, match="another process is training in"):
            train_torch("tasks:waiting", tmp_path)
    finally:
        process.kill()
        process.join()


def test_divergence_ends_the_run_cleanly(tmp_path):
    result = train_torch("tasks:explodes", tmp_path)
    assert (result.status, result.steps, result.final, result.exit_code) == ("diverged", 6, None, 0)
    run = read_run(RunStore(tmp_path).path("tasks:explodes", "AdamW", 0))
    assert run.status == "diverged"
    assert run.metrics().train[-1]["loss"] is None
    assert [r["step"] for r in run.metrics().train] == [1, 2, 3, 4, 5, 6]


def test_an_optimizer_that_breaks_down_counts_as_diverged(tmp_path):
    class Broken(torch.optim.SGD):
        def step(self, closure):
            super().step(closure)
            raise torch.linalg.LinAlgError("eigh did not converge")

    lines: list[str] = []
    result = train_torch(
        "tasks:plain", tmp_path, build_optimizer=lambda m, s: Broken(m.parameters(), momentum=0.9), warn=lines.append
    )
    assert (result.status, result.steps) == ("diverged", 1)
    assert lines == ["step 1: the optimizer gave up with LinAlgError: eigh did not converge"]


def test_losses_that_are_read_late_change_nothing(reference, tmp_path, monkeypatch):
    """As on a GPU: 16 at a time, or when an evaluation, a checkpoint or the end needs them."""
    monkeypatch.setattr(session, "CPU_FLUSH", 16)
    train_torch(NOISY, tmp_path, checkpoint_every=5, keep=20)
    assert_same_run(tmp_path, reference)
    go_back(tmp_path, NOISY, ADAMW, 20)
    train_torch(NOISY, tmp_path)
    assert_same_run(tmp_path, reference)
    assert train_torch("tasks:explodes", tmp_path).status == "diverged"


def test_a_loss_that_breaks_down_numerically_is_a_divergence(tmp_path):
    lines: list[str] = []
    result = train_torch("tasks:singular", tmp_path, warn=lines.append)
    assert (result.status, result.steps) == ("diverged", 4)
    assert "LinAlgError" in lines[0]


def test_a_loss_that_fails_in_the_middle_is_one_line_and_rows_stay(tmp_path):
    with pytest.raises(BenchError, match=r"^tasks:fails_later: the loss failed at step 2 with ZeroDivisionError: "):
        train_torch("tasks:fails_later", tmp_path)
    assert [r["step"] for r in rows(tmp_path, "tasks:fails_later")[0]] == [1, 2]


def test_rows_without_an_evaluation_hold_the_mean_loss(tmp_path):
    result = train_torch("tasks:plain", tmp_path)
    train_rows, eval_rows = rows(tmp_path, "tasks:plain")
    means = [sum(r["loss"] for r in train_rows[i : i + 5]) / 5 for i in (0, 5)]
    assert [e["step"] for e in eval_rows] == [5, 10]
    assert [e["values"]["loss"] for e in eval_rows] == pytest.approx(means, rel=1e-12)
    assert result.final == eval_rows[-1]["values"]["loss"]


def test_the_loop_does_what_a_plain_loop_does(tmp_path):
    """Losses, rates, gradient norms and update sizes against ten lines of torch."""
    train_torch("tasks:plain", tmp_path)
    torch.manual_seed(0)
    problem = tasks.plain()
    torch.manual_seed(0)
    model = torch.nn.Linear(3, 1)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    schedule = tasks.one_cycle(optimizer, None, 10)
    for row in rows(tmp_path, "tasks:plain")[0]:
        before = torch.nn.utils.parameters_to_vector(model.parameters()).clone()
        loss = problem.loss(model, problem.batch(row["step"] - 1))
        assert (row["loss"], row["lr"]) == (loss.item(), optimizer.param_groups[0]["lr"])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        moved = torch.nn.utils.parameters_to_vector(model.parameters()) - before
        if row["step"] == 1:
            gradient = torch.cat([p.grad.flatten() for p in model.parameters()])
            assert row["grad_norm"] == pytest.approx(gradient.norm().item(), rel=1e-6)
            assert row["update_rms"] == pytest.approx(moved.square().mean().sqrt().item(), rel=1e-5)
        else:
            assert "update_rms" not in row


def test_closures_that_run_more_than_once_and_steps_that_are_skipped(tmp_path):
    result = train_torch(
        "tasks:plain",
        tmp_path,
        build_optimizer=lambda model, spec: torch.optim.LBFGS(model.parameters()),
        build_schedule=lambda optimizer, spec, steps: torch.optim.lr_scheduler.ConstantLR(optimizer, 1.0),
    )
    assert result.status == "complete"
    losses = [r["loss"] for r in rows(tmp_path, "tasks:plain")[0]]
    assert losses[-1] < losses[0] / 10

    class Skips(torch.optim.SGD):
        skipped = 7

    spec = OptimizerSpec("skips")
    other = train_torch("tasks:plain", tmp_path, spec, build_optimizer=lambda m, s: Skips(m.parameters(), momentum=0.9))
    assert other.skipped == 7


def test_evaluation_uses_the_optimizer_s_averaged_weights_and_gives_them_back(tmp_path):
    modes: list[str] = []

    class Averaging(torch.optim.AdamW):
        def train(self):
            modes.append("train")

        def eval(self):
            modes.append("eval")

    train_torch(NOISY, tmp_path, steps=7, build_optimizer=lambda m, s: Averaging(m.parameters()))
    assert modes == ["eval", "train"] * 2


def test_times_add_up_and_the_optimizer_s_part_is_its_own(tmp_path):
    class Slow(torch.optim.SGD):
        def step(self, closure):
            loss = super().step(closure)
            time.sleep(0.01)
            return loss

    result = train_torch(
        NOISY, tmp_path, steps=5, build_optimizer=lambda m, s: Slow(m.parameters(), lr=0.01, momentum=0.9)
    )
    metrics = read_metrics(RunStore(tmp_path).path(NOISY, "AdamW", 0) / "metrics.jsonl")
    assert all(0.01 <= r["optimizer_wall"] <= r["wall"] for r in metrics.train)
    assert all(0 <= r["optimizer_cpu"] <= r["cpu"] for r in metrics.train)
    assert metrics.train[-1]["seconds"] == pytest.approx(sum(r["wall"] for r in metrics.train), abs=1e-5)
    assert result.wall_seconds == pytest.approx(metrics.train[-1]["seconds"], abs=1e-5)


def test_progress_tells_loss_value_and_time_left(tmp_path):
    ticks: list[Tick] = []
    train_torch(NOISY, tmp_path, progress=ticks.append)
    last = ticks[-1]
    assert (last.workload, last.label, last.seed, last.step, last.steps) == (NOISY, "AdamW", 0, STEPS, STEPS)
    assert last.loss is not None
    assert last.value is not None
    assert last.seconds_left == 0


def test_config_records_equal_data_and_start_for_every_optimizer(tmp_path):
    for spec in (ADAMW, OptimizerSpec("SGD", {"lr": 0.1, "momentum": 0.9})):
        for seed in (0, 1):
            train_torch(NOISY, tmp_path, spec, seed=seed, steps=2)
    configs = [run.config for run in RunStore(tmp_path).runs()]
    assert [(c.optimizer.label, c.seed) for c in configs] == [("AdamW", 0), ("AdamW", 1), ("SGD", 0), ("SGD", 1)]
    a, b, c, d = configs
    assert (a.data, a.init) == (c.data, c.init)
    assert (b.data, b.init) == (d.data, d.init)
    assert a.init != b.init
    assert a.data != b.data
    assert a.threads == 1
    text = (RunStore(tmp_path).path(NOISY, "SGD", 0) / "config.json").read_text()
    assert os.getcwd() not in text
    assert os.uname().nodename not in json.loads(text)["machine"].values()


@pytest.mark.parametrize(("name", "number"), [("steps", 0), ("checkpoint_every", -1), ("eval_every", 0), ("keep", 0)])
def test_impossible_numbers_are_named(tmp_path, name, number):
    with pytest.raises(BenchError, match=f"{name} is {number}; it must be "):
        train_torch(NOISY, tmp_path, **{name: number})
    assert list(tmp_path.iterdir()) == []


def test_bad_optimizers_and_schedules_are_one_line(tmp_path):
    with pytest.raises(BenchError, match="optimizer 'AdamW': Invalid learning rate: -1"):
        train_torch(NOISY, tmp_path / "a", OptimizerSpec("AdamW", {"lr": -1.0}))
    with pytest.raises(BenchError, match="unknown schedule 'sawtooth'"):
        train_torch(NOISY, tmp_path / "b", schedule=ScheduleSpec("sawtooth", {}), build_schedule=build_schedule)


def test_the_default_schedule_is_five_percent_warmup_then_linear_to_zero(tmp_path):
    train(NOISY, ADAMW, out=tmp_path, build_optimizer=tasks.torch_optimizer)
    rates = [r["lr"] for r in rows(tmp_path, NOISY)[0]]
    assert rates[2] == max(rates) == pytest.approx(0.01)  # 3 of 60 steps
    falls = [a - b for a, b in pairwise(rates[3:])]
    assert falls == pytest.approx([falls[0]] * len(falls))
    assert 0 < rates[-1] < 2 * falls[0]


@pytest.mark.parametrize("limit", [0, 2_000, 9_000])
def test_a_full_disk_is_one_line_and_what_was_saved_continues(reference, tmp_path, limit):
    """The kernel stops files from growing: config, metrics or checkpoint, whichever comes first."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
    try:
        with pytest.raises(BenchError, match=r"^cannot (write|save) .*(free space|writable)") as caught:
            train_torch(NOISY, tmp_path, checkpoint_every=5)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert "\n" not in str(caught.value)
    train_torch(NOISY, tmp_path, checkpoint_every=5)
    assert_same_run(tmp_path, reference)


def test_a_folder_without_write_permission_is_one_line(server):
    out = Path(tempfile.mkdtemp(dir="/tmp"))  # not tmp_path: only root may enter that
    os.chmod(out, 0o555)
    errors = server.SimpleQueue()
    process = start(server, NOISY, out / "runs", errors)
    process.join(60)
    os.rmdir(out)
    assert process.exitcode == 2
    error = errors.get()
    assert error.startswith("BenchError: cannot create the folder ")
    assert "Permission denied" in error
    assert "choose a writable folder" in error


def test_a_damaged_checkpoint_falls_back_and_all_damaged_says_so(reference, tmp_path):
    train_torch(NOISY, tmp_path, checkpoint_every=20)
    folder = RunStore(tmp_path).path(NOISY, "AdamW", 0)
    assert Checkpoints(folder / "checkpoints").steps() == [40, 60]
    (folder / "result.json").unlink()
    flip(folder / "checkpoints" / "step-00000060" / "tensors.safetensors")
    lines: list[str] = []
    train_torch(NOISY, tmp_path, warn=lines.append)
    assert len(lines) == 1
    assert "step 60 (damaged: tensors.safetensors does not match its checksum); going on from step 40" in lines[0]
    assert_same_run(tmp_path, reference)
    (folder / "result.json").unlink()
    for step in Checkpoints(folder / "checkpoints").steps():
        flip(folder / "checkpoints" / f"step-{step:08d}" / "state.json")
    with pytest.raises(BenchError, match="no other is intact; start the run afresh"):
        train_torch(NOISY, tmp_path, warn=lines.append)


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
