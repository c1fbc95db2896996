"""Saving under fire: kills in the middle of saves, and saves in the background."""

from __future__ import annotations

import multiprocessing
import os
import random
import signal
import threading
import time
from itertools import count
from pathlib import Path

import pytest
import tasks
import torch
from tasks import ADAMW, checkpoints, rows, train_torch

from guided_descent.bench import checkpoint as module
from guided_descent.bench.checkpoint import CheckpointError, Checkpoints
from guided_descent.bench.problem import ProblemError, tensor_hash, tensors

NOISY = "tasks:noisy"


@pytest.fixture(scope="module")
def server():
    """Processes that start in milliseconds: a small server forks them with everything imported."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["numpy.random", "torch._dynamo", "guided_descent.bench.runner"])
    return context


def tree_of(step: int) -> dict:
    """A state from which its step can be read at every place."""
    return {
        "step": step,
        "weights": [torch.full((300, 200), float(step)), torch.arange(5000) + step],
        "text": f"{step} " * 2000,
    }


def save_for_ever(folder: str, background: bool, ready: object, seconds: object) -> None:
    """Go on after the newest checkpoint: save once, say how long that took, then save without a pause."""
    torch.set_num_threads(1)
    store = Checkpoints(Path(folder), keep=2, background=background)
    found = store.latest(lambda line: None)
    began = time.perf_counter()
    for step in count(1 if found is None else found[0] + 1):
        store.save(step, tree_of(step))
        if not ready.is_set():  # type: ignore[attr-defined]
            store.wait()
            seconds.value = time.perf_counter() - began  # type: ignore[attr-defined]
            ready.set()  # type: ignore[attr-defined]


def kill_savers(server, folder: Path, kills: int, background: bool, seed: int) -> None:
    """After each kill the newest complete checkpoint is intact and whole; nothing that was there is lost."""
    moments, last, cut_short = random.Random(seed), 0, 0
    for _ in range(kills):
        ready, seconds = server.Event(), server.Value("d", 0.0)
        process = server.Process(target=save_for_ever, args=(str(folder), background, ready, seconds))
        process.start()
        assert ready.wait(60)
        time.sleep(moments.uniform(0.0, 3.0 * seconds.value))
        process.kill()
        process.join(60)
        assert process.exitcode == -signal.SIGKILL
        lines: list[str] = []
        found = Checkpoints(folder).latest(lines.append)
        assert not any("damaged" in line for line in lines)
        cut_short += len(lines)
        assert found is not None
        step, tree = found
        assert step > last
        assert tensor_hash(tensors(tree)) == tensor_hash(tensors(tree_of(step)))
        assert (tree["step"], tree["text"]) == (step, f"{step} " * 2000)
        last = step
    assert cut_short  # the kills did come in the middle of saves
    store = Checkpoints(folder, keep=2)
    store.save(last + 1, tree_of(last + 1))
    assert len(list(folder.iterdir())) == 2  # nothing partial stays


@pytest.mark.parametrize(
    ("kills", "background"), [(12, False), (8, True), pytest.param(50, False, marks=pytest.mark.slow)]
)
def test_killed_in_the_middle_of_saves(server, tmp_path, kills, background):
    kill_savers(server, tmp_path, kills, background, seed=0)


# -- in the background -----------------------------------------------------------------------------------------------


def test_what_changes_after_a_save_in_the_background_is_not_in_it(tmp_path, monkeypatch):
    go = threading.Event()
    write = module._write_folder

    def held(*arguments):
        assert go.wait(30)
        return write(*arguments)

    monkeypatch.setattr(module, "_write_folder", held)
    store = Checkpoints(tmp_path, background=True)
    weights = torch.ones(4)
    tree = {"w": weights, "list": [1]}
    store.save(1, tree)
    weights.zero_()
    tree["list"].append(2)
    assert store.steps() == []
    go.set()
    store.wait()
    assert store.steps() == [1]
    loaded = store.load(1)
    assert loaded["list"] == [1]
    assert loaded["w"].tolist() == [1, 1, 1, 1]


def test_one_save_at_a_time_and_errors_come_with_the_next_or_at_the_end(tmp_path, monkeypatch):
    store = Checkpoints(tmp_path, background=True)
    store.save(1, {"n": 1})
    store.wait()
    running, most = [], []

    def failing(*arguments):
        running.append(1)
        most.append(len(running))
        time.sleep(0.05)
        running.pop()
        raise OSError(28, os.strerror(28))

    with monkeypatch.context() as patch:
        patch.setattr(module, "_write_folder", failing)
        store.save(2, {"n": 2})
        for step in (3, 4):
            with pytest.raises(
                CheckpointError, match=rf"step {step - 1} .*No space left.*are needed.*step 1 is intact"
            ):
                store.save(step, {"n": step})
            store.save(step, {"n": step})
        with pytest.raises(CheckpointError, match="step 4"):
            store.wait()
    store.wait()  # it is told once
    assert max(most) == 1
    store.save(5, {"n": 5})
    store.wait()
    assert store.steps() == [1, 5]


def test_a_run_is_the_same_with_checkpoints_in_the_background(tmp_path):
    states = []
    for background in (False, True):
        out = tmp_path / str(background)
        train_torch(NOISY, out, checkpoint_every=3, keep=2, async_checkpoints=background)
        step, state = checkpoints(out, NOISY).latest(pytest.fail)
        assert step == tasks.STEPS
        states.append((rows(out, NOISY), tensor_hash(tensors([state["model"], state["optimizer"], state["rng"]]))))
    assert states[0] == states[1]


def test_a_failure_in_the_background_ends_the_run_and_it_goes_on_later(tmp_path, monkeypatch):
    write, calls = module._write_folder, count(1)

    def full(*arguments):
        if next(calls) == 3:
            raise OSError(28, os.strerror(28))
        return write(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(module, "_write_folder", full)
        with pytest.raises(CheckpointError, match=r"step 30 .*No space left on device.*step 20 is intact"):
            train_torch(NOISY, tmp_path / "a", checkpoint_every=10, async_checkpoints=True)
    assert checkpoints(tmp_path / "a", NOISY).steps() == [10, 20]
    with monkeypatch.context() as patch:  # the last one fails: told at the end, and there is no result
        patch.setattr(module, "_write_folder", lambda *arguments: (_ for _ in ()).throw(OSError(28, os.strerror(28))))
        with pytest.raises(CheckpointError, match=r"step 60 .*step 20 is intact"):
            train_torch(NOISY, tmp_path / "a", checkpoint_every=60, async_checkpoints=True)
    assert not list((tmp_path / "a").rglob("result.json"))
    train_torch(NOISY, tmp_path / "a", checkpoint_every=10, async_checkpoints=True)
    train_torch(NOISY, tmp_path / "b")
    assert rows(tmp_path / "a", NOISY) == rows(tmp_path / "b", NOISY)


def test_an_error_of_the_task_is_told_although_a_save_is_under_way(tmp_path, monkeypatch):
    write = module._write_folder

    def late(*arguments):
        time.sleep(0.2)
        return write(*arguments)

    monkeypatch.setattr(module, "_write_folder", late)
    with pytest.raises(ProblemError, match="ZeroDivisionError"):
        train_torch("tasks:fails_later", tmp_path, ADAMW, checkpoint_every=1, async_checkpoints=True)
    assert checkpoints(tmp_path, "tasks:fails_later").steps() == [1, 2]  # it was waited for
