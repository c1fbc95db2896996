"""Two processes on DistributedDataParallel: the run of one, its checkpoints, its signals and its errors."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from itertools import count
from pathlib import Path

import pytest
import tasks
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from tasks import checkpoints, rows

import guided_descent
from guided_descent.bench.files import BenchError
from guided_descent.bench.problem import ProblemError, tensor_hash, tensors
from guided_descent.bench.ranks import MODES, PeerLost, Ranks, peer_lost
from guided_descent.bench.runner import train
from guided_descent.bench.shares import check_parts, divide
from guided_descent.bench.store import OptimizerSpec, RunResult, RunStore, read_run
from ranks import leave

SMOOTH, NOISY = "tasks:smooth", "tasks:noisy"
ADAMW, KFAC = OptimizerSpec("adamw"), OptimizerSpec("kfac", {"fisher": "empirical"})
#: Optimizer, micro-batches, and the steps after which another order of sums may show: the first basis of soap is
#: arbitrary where a batch has fewer rows than a matrix, and L-BFGS divides by differences between batches.
CASES = [
    *((spec, parts, 16) for spec in (ADAMW, KFAC, OptimizerSpec("muon")) for parts in (1, 3)),
    (OptimizerSpec("schedule_free_adamw"), 1, 16),
    (OptimizerSpec("prodigy", {"d0": 1e-3}), 1, 16),
    (OptimizerSpec("adahessian", {"lr": 0.01}), 1, 16),
    (OptimizerSpec("soap", {"precondition_frequency": 2}), 3, 2),
    (OptimizerSpec("torch_lbfgs"), 1, 2),
]


# -- dividing a batch ------------------------------------------------------------------------------------------------


def test_a_batch_is_divided_by_rows_and_what_has_none_goes_to_all():
    x = torch.arange(12).view(6, 2)
    batch = {"x": x, "more": (x.float(), [torch.tensor(3.0), "name"]), "n": 7}
    parts = divide(batch, 3)
    assert [part["x"].tolist() for part in parts] == [x[:2].tolist(), x[2:4].tolist(), x[4:].tolist()]
    assert all(part["n"] == 7 and part["more"][1] == [torch.tensor(3.0), "name"] for part in parts)
    assert torch.equal(torch.cat([part["more"][0] for part in parts]), x.float())
    assert isinstance(parts[0]["more"], tuple)
    assert divide(5, 1) == [5]


@pytest.mark.parametrize(
    ("batch", "line"),
    [
        (torch.zeros(10, 2), "a batch of 10 rows cannot be divided into 4 equal parts, only into 2, 5, 10"),
        ((torch.zeros(8), torch.zeros(4)), r"\(float32 \[8\], float32 \[4\]\) .*give all its tensors the same number"),
        (None, "it has no tensor with rows"),
        (torch.tensor(1.0), "it has no tensor with rows"),
    ],
)
def test_what_cannot_be_divided_is_said(batch, line):
    with pytest.raises(ProblemError, match=line):
        divide(batch, 4)


def test_a_loss_that_is_no_mean_is_warned_of_and_the_check_leaves_no_trace():
    lines: list[str] = []
    problem = tasks.noisy(0)
    state, before = torch.get_rng_state(), tensor_hash(tensors(problem.model.state_dict()))
    check_parts(problem, 2, lines.append)
    assert lines == []  # though the loss draws numbers
    assert torch.equal(state, torch.get_rng_state())
    assert tensor_hash(tensors(problem.model.state_dict())) == before
    check_parts(tasks.summed(0), 3, lines.append)
    assert "the mean over its 3 parts" in lines[0]
    assert "another training" in lines[0]


# -- two ranks -------------------------------------------------------------------------------------------------------


def test_two_ranks(tmp_path):
    """All that needs them, in one start: see ``worker``."""
    mp.start_processes(worker, (2, tmp_path), nprocs=2, start_method="spawn")
    for spec, parts, sure in CASES:
        train(SMOOTH, spec, out=tmp_path / f"alone-{parts}")
        alone, shared = (rows(tmp_path / f"{name}-{parts}", SMOOTH, spec)[0] for name in ("alone", "shared"))
        assert len(shared) == 16
        for key in ("loss", "lr", "grad_norm", "update_rms"):
            mine, theirs = ([row[key] for row in table[:sure] if key in row] for table in (shared, alone))
            assert mine == pytest.approx(theirs, rel=1e-9), (spec, key)
    config = read_run(RunStore(tmp_path / "shared-1").path(SMOOTH, "adamw", 0)).config
    assert (config.parallel, config.ranks) == ("ddp", 2)
    # what two ranks have begun, one process finishes, and the other way round
    lines: list[str] = []
    train(SMOOTH, ADAMW, out=tmp_path / "two-then-one", checkpoint_every=4, warn=lines.append)
    assert lines[0].startswith("2 ranks wrote the checkpoint of step 8 and the run goes on with 1: ")
    for name in ("two-then-one", "one-then-two"):
        alone, mixed = final(tmp_path / "alone-1", SMOOTH, ADAMW), final(tmp_path / name, SMOOTH, ADAMW)
        for key, value in alone.items():
            torch.testing.assert_close(mixed[key], value, rtol=1e-9, atol=1e-11)


def final(out: Path, ref: str, spec: OptimizerSpec) -> dict:
    step, state = checkpoints(out, ref, spec).latest(pytest.fail)
    assert step == state["step"]
    return state["model"]


def worker(rank: int, world: int, folder: Path) -> None:
    os.environ["RANK"] = str(rank)
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=world)
    both = {"parallel": "ddp"}
    for spec, parts, _ in CASES:
        result = train(SMOOTH, spec, out=folder / f"shared-{parts}", micro_batches=parts, **both)
        assert result.status == "complete"
    same_everywhere(result)
    it_continues(rank, folder, both)
    signals(rank, folder, both)
    errors(rank, folder, both)
    leave()


def same_everywhere(result: RunResult) -> None:
    theirs: list = [None, None]
    dist.all_gather_object(theirs, result)
    assert theirs[0] == theirs[1]


def go_back(rank: int, out: Path, ref: str, spec: OptimizerSpec, step: int) -> None:
    """Make a finished run one that was killed after a step."""
    dist.barrier()
    if rank == 0:
        folder = RunStore(out).path(ref, spec.label, 0)
        (folder / "result.json").unlink()
        for later in [s for s in checkpoints(out, ref, spec).steps() if s > step]:
            shutil.rmtree(folder / "checkpoints" / f"step-{later:08d}")
    dist.barrier()


def it_continues(rank: int, folder: Path, both: dict) -> None:
    """Bitwise on as many ranks, with draws of their own for dropout; and between one and two."""
    spec, options = ADAMW, {"steps": 20, "checkpoint_every": 5, "keep": 9, "eval_every": 4, **both}
    train(NOISY, spec, out=folder / "noisy", **options)
    if rank == 0:
        before, saved = rows(folder / "noisy", NOISY, spec), checkpoints(folder / "noisy", NOISY, spec).load(20)
        assert len(saved["rng"]) == 2
        assert not torch.equal(saved["rng"][0]["torch"], saved["rng"][1]["torch"])
    go_back(rank, folder / "noisy", NOISY, spec, 10)
    train(NOISY, spec, out=folder / "noisy", **options)
    if rank == 0:
        assert rows(folder / "noisy", NOISY, spec) == before
        again = checkpoints(folder / "noisy", NOISY, spec).load(20)
        for part in ("model", "optimizer", "rng"):
            assert tensor_hash(tensors(again[part])) == tensor_hash(tensors(saved[part]))
    train(SMOOTH, spec, out=folder / "two-then-one", checkpoint_every=4, keep=9, **both)
    go_back(rank, folder / "two-then-one", SMOOTH, spec, 8)
    out = folder / "one-then-two"
    if rank == 0:
        train(SMOOTH, spec, out=out, checkpoint_every=4, keep=9)
    go_back(rank, out, SMOOTH, spec, 8)
    lines: list[str] = []
    train(SMOOTH, spec, out=out, checkpoint_every=4, keep=9, warn=lines.append, **both)
    assert [line[:6] for line in lines] == (["1 rank"] if rank == 0 else [])


def signals(rank: int, folder: Path, both: dict) -> None:
    """A signal that one rank alone receives stops both at the same place; the run goes on to the bit."""
    spec, options = KFAC, {"checkpoint_every": 16, "micro_batches": 2, **both}
    train(SMOOTH, spec, out=folder / "unstopped", **options)
    places = {"micro-batch": ("loss", 1, 14), "evaluation": ("evaluate", 0, 2), "waiting": ("loss", 1, 2 * 4 + 4)}
    for name, (what, receiver, at) in places.items():
        calls, make = count(1), tasks.smooth

        def made(seed: int, what=what, receiver=receiver, at=at, calls=calls, make=make):
            problem = make(seed)
            inner = getattr(problem, what)

            def signalling(*arguments):
                if next(calls) == at and rank == receiver:
                    os.kill(os.getpid(), signal.SIGTERM)
                return inner(*arguments)

            setattr(problem, what, signalling)
            return problem

        tasks.smooth = made
        result = train(SMOOTH, spec, out=folder / name, **options)
        tasks.smooth = make
        assert (result.status, result.signal, result.exit_code) == ("interrupted", 15, 143), name
        assert 0 < result.steps < 16
        same_everywhere(result)
        assert train(SMOOTH, spec, out=folder / name, **options).status == "complete"
        if rank == 0:
            assert rows(folder / name, SMOOTH, spec) == rows(folder / "unstopped", SMOOTH, spec)


def errors(rank: int, folder: Path, both: dict) -> None:
    """Mistakes that every rank notices in the same place."""
    out = folder / "errors"
    train("tasks:plain", ADAMW, out=out, **both)
    for ref, name, line in (
        ("tasks:astray", "adamw", "their parameters after step 1; the loss must call the model that it is given"),
        ("tasks:apart", "adamw", "the task's data or its first weights"),
        (SMOOTH, "damped_newton", "damped_newton evaluates whole batches: leave out micro_batches"),
        ("smoke-quadratic", "adamw", "it has no tensor with rows"),
    ):
        with pytest.raises(BenchError, match=line):
            train(ref, OptimizerSpec(name), out=out, **both)
        dist.barrier()
    train("tasks:summed", ADAMW, out=out, **both)  # an unused parameter is none of a rank's business
    if rank == 0:
        step, state = checkpoints(out, "tasks:summed", ADAMW).latest(pytest.fail)
        assert step == 16
        assert state["model"]["unused"].tolist() == [0, 0]


# -- one process -----------------------------------------------------------------------------------------------------


def test_modes_and_launchers_that_are_not_there_are_said(tmp_path):
    with pytest.raises(BenchError, match="parallel is 'fsdp'; it must be one of ddp, or be left out"):
        train(SMOOTH, OptimizerSpec("adamw"), out=tmp_path, parallel="fsdp")
    with pytest.raises(BenchError, match=r"parallel='ddp' needs ranks: .* torchrun --nproc-per-node 2 -m "):
        train(SMOOTH, OptimizerSpec("adamw"), out=tmp_path, parallel="ddp")
    assert list(tmp_path.iterdir()) == []
    assert set(MODES) == {"ddp"}


def test_a_process_alone_agrees_with_itself():
    alone = Ranks()
    assert (alone.lead, alone.size, alone.agree(None), alone.agree(15)) == (True, 1, None, 15)
    assert alone.told({"a": 1}) == {"a": 1}
    assert alone.gather(3) == [3]
    alone.check_same("x", "nothing")


def test_a_lost_peer_is_told_from_other_errors():
    lost = RuntimeError("[/pytorch/third_party/gloo/transport/tcp/pair.cc:534] Connection closed by peer [127.0.0.1]")
    wrapped = ProblemError("backward failed")
    wrapped.__cause__ = lost
    assert peer_lost(lost)
    assert peer_lost(wrapped)
    assert not peer_lost(RuntimeError("shapes do not match"))
    assert not peer_lost(ValueError("gloomy"))
    assert PeerLost("x").signal is None


# -- torchrun --------------------------------------------------------------------------------------------------------

TASK = """
import os, time, torch
from guided_descent.bench import Problem
def make(seed):
    x = torch.randn(12, 4, generator=torch.Generator().manual_seed(1))
    def loss(model, rows):
        time.sleep(0.02)
        return (model(x[rows]) - 1).square().mean()
    def evaluate(model):
        return {"error": (model(x) - 1).square().mean().item()}
    model = torch.nn.Linear(4, 3)
    batches = [torch.arange(12)]
    return Problem(model=model, loss=loss, batches=batches, evaluate=evaluate, metric="error", steps=40)
def failing(seed):
    problem, calls = make(seed), []
    inner = problem.loss
    def loss(model, rows):
        calls.append(1)
        if os.environ["RANK"] == "1" and len(calls) > 8:
            raise ValueError("no such file on this one")
        return inner(model, rows)
    problem.loss = loss
    return problem
"""


@pytest.fixture
def torchrun(tmp_path):
    (tmp_path / "ranked.py").write_text(TASK)
    source = Path(guided_descent.__file__).parents[1]
    environment = {**os.environ, "PYTHONPATH": str(source), "OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1"}

    started: list[subprocess.Popen] = []

    def start(*arguments: object) -> subprocess.Popen:
        command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone"]
        command += ["-m", "guided_descent", "train", *map(str, arguments), "--out", str(tmp_path / "runs")]
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        started.append(subprocess.Popen(command, cwd=tmp_path, env=environment, **pipes))
        return started[-1]

    yield start
    for process in started:
        if process.poll() is None:  # a test has failed: torchrun takes its ranks with it
            process.terminate()
            process.communicate(timeout=60)


def test_the_command_under_torchrun_speaks_with_one_voice(torchrun):
    process = torchrun("ranked:make", "--parallel", "ddp", "--json")
    out, err = process.communicate(timeout=200)
    assert process.returncode == 0, err
    document = json.loads(out)  # one document, so one rank has printed
    assert document["config"]["ranks"] == 2
    assert document["result"]["status"] == "complete"
    assert err.count("[1/1] adamw on ranked:make, seed 0: error") == 1


def test_an_error_of_one_rank_is_told_with_its_number_and_ends_all(torchrun):
    began = time.monotonic()
    process = torchrun("ranked:failing", "--parallel", "ddp")
    _, err = process.communicate(timeout=200)
    assert time.monotonic() - began < 190
    assert process.returncode == 1
    ours = [line for line in err.splitlines() if line.startswith("guided-descent: ")]
    assert len(ours) == 1, err
    assert ours[0].startswith("guided-descent: rank 1: ranked:failing: the loss failed at step ")
    assert "no such file on this one" in ours[0]


@pytest.mark.slow
def test_processes_that_do_not_share_are_refused_by_one_of_them(torchrun):
    _, err = torchrun("ranked:make").communicate(timeout=200)
    ours = [line for line in err.splitlines() if line.startswith("guided-descent: ")]
    assert len(ours) == 1, err
    assert "rank 0: " in ours[0]
    assert "each would train the whole run: add ddp" in ours[0]


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_to_torchrun_saves_and_the_same_command_continues(torchrun, tmp_path, number):
    process = torchrun("ranked:make", "--parallel", "ddp")
    deadline = time.monotonic() + 100
    while not any('"step":10,' in path.read_text() for path in tmp_path.rglob("metrics.jsonl")):
        assert time.monotonic() < deadline
        assert process.poll() is None
        time.sleep(0.02)
    process.send_signal(number)
    _, err = process.communicate(timeout=100)
    assert process.returncode == 1  # torchrun's own
    name = signal.Signals(number).name
    assert f"guided-descent: rank 0: stopped by {name}; run the same command to continue" in err
    assert err.count("guided-descent: ") == 1
    step = max(int(marker.parent.name[5:]) for marker in tmp_path.rglob("COMPLETE"))
    process = torchrun("ranked:make", "--parallel", "ddp")
    _, err = process.communicate(timeout=200)
    assert process.returncode == 0, err
    steps = [row["step"] for row in RunStore(tmp_path / "runs").runs()[0].metrics().train]
    assert steps == list(range(1, 41))
    assert 10 <= step < 40
