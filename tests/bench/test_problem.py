"""The problem protocol: the user's own task, and one clear line for each mistake."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from guided_descent.bench.problem import Problem, ProblemError, check_problem, load_problem, tensor_hash

X = torch.randn(8, 3, generator=torch.Generator().manual_seed(0))


def problem(**changes: object) -> Problem:
    fields = {
        "model": nn.Linear(3, 1),
        "loss": lambda model, batch: model(batch).square().mean(),
        "batches": lambda step: X,
    }
    return Problem(**(fields | changes))


@pytest.fixture
def module(tmp_path, monkeypatch):
    """Write a user's module into the current directory."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [p for p in sys.path if p])
    written: list[str] = []

    def write(text: str, name: str = "users_task") -> str:
        path = tmp_path / f"{name.replace('.', '/')}.py"
        path.parent.mkdir(exist_ok=True)
        path.write_text(text)
        written.append(name)
        return name

    yield write
    for name in list(sys.modules):
        if any(name == w or w.startswith(name + ".") for w in written):
            del sys.modules[name]


HEADER = "import torch\nfrom guided_descent.bench.problem import Problem\n"
GOOD = (
    HEADER
    + """
def make(seed):
    model = torch.nn.Linear(3, 1)
    return Problem(model=model, loss=lambda m, x: m(x).square().mean(), batches=lambda step: torch.ones(2, 3))

def without_seed():
    return make(0)
"""
)


def test_the_user_s_function_is_found_in_the_current_directory_and_seeded(module):
    module(GOOD)
    a, b, c = (load_problem("users_task:make", seed) for seed in (3, 3, 4))
    assert torch.equal(a.model.weight, b.model.weight)
    assert not torch.equal(a.model.weight, c.model.weight)
    assert isinstance(load_problem("users_task:without_seed", 5), Problem)


def test_a_module_in_a_package(module):
    module(GOOD, "users_package.task")
    assert isinstance(load_problem("users_package.task:make"), Problem)


@pytest.mark.parametrize(
    ("text", "ref", "line"),
    [
        (GOOD, "lm-sauce", "unknown workload 'lm-sauce'; use one of lm-source, mlp-digits, "),
        (GOOD, "users_task", "or your own task as package.module:function"),
        (GOOD, "smoke", "'smoke' is a family of workloads; name one of them: smoke-quadratic, "),
        (GOOD, "no_such:make", "no module 'no_such'; it must be importable from the current directory"),
        (GOOD, "users_task.deeper:make", "no module 'users_task.deeper'"),
        (GOOD, "users_task:mak", "users_task has no function 'mak'; it has: make, without_seed"),
        (
            "import no_such",
            "users_task:make",
            "users_task needs the module 'no_such', which is not installed",
        ),
        ("1 / 0", "users_task:make", "importing users_task failed with ZeroDivisionError: division by zero"),
        ("def make(seed) return 1", "users_task:make", "importing users_task failed with SyntaxError"),
        ("def make(seed): return 1", "users_task:make", "users_task:make returned a int; it must return a "),
        (
            "def make(seed): return {}['a']",
            "users_task:make",
            "users_task:make: the function failed with KeyError: 'a'",
        ),
        (
            HEADER + "def make(seed): return Problem(model=torch.nn.Linear(3, 1), loss=0, batches=[])",
            "users_task:make",
            "users_task:make: Problem.loss is a int; give a function loss(model, batch)",
        ),
        (
            HEADER + "def make(): return Problem(model=torch.nn.Linear(3, 1), loss=lambda m, x: m(x).mean(), "
            "batches=[torch.ones(2, 4)])",
            "users_task:make",
            "users_task:make: the loss fails on the first batch (float32 [2, 4]) with RuntimeError: mat1 and mat2",
        ),
    ],
)
def test_each_mistake_of_a_reference_is_one_line(module, text, ref, line):
    module(text)
    with pytest.raises(ProblemError, match=re.escape(line)) as caught:
        load_problem(ref)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        ({"model": 3}, "Problem.model is a int; give a torch.nn.Module"),
        ({"batches": 3}, "Problem.batches is a int; give a function step -> batch, or a list"),
        ({"batches": []}, "Problem.batches is empty"),
        ({"batches": (x for x in [X])}, "Problem.batches is a generator without a length, which cannot be replayed"),
        ({"evaluate": 3}, "Problem.evaluate must be a function"),
        ({"metric": "accuracy"}, "Problem.metric is 'accuracy' but there is no evaluate function"),
        ({"goal": "lowest"}, "Problem.goal is 'lowest'; it must be 'min' or 'max'"),
        ({"steps": 0}, "Problem.steps is 0; it must be a whole number, 1 or more"),
        ({"steps": 1.5}, "Problem.steps is 1.5"),
        ({"eval_every": 0}, "Problem.eval_every is 0"),
        ({"clip": 0.0}, "Problem.clip is 0.0; it must be more than 0"),
        ({"clip": float("nan")}, "Problem.clip is nan; it must be more than 0"),
    ],
)
def test_impossible_fields_are_named(changes, line):
    with pytest.raises(ProblemError, match=re.escape(line)):
        problem(**changes)


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        ({"batches": lambda step: {}[step]}, "batches(0) failed with KeyError: 0"),
        ({"batches": [torch.empty(0, 3)]}, "the first batch is empty (float32 [0, 3]); there is no data to train on"),
        (
            {"loss": lambda m, x: m(x)},
            "the loss returns a tensor of shape [8, 1]; it must be a tensor with one element",
        ),
        ({"loss": lambda m, x: 1.0}, "the loss returns a float"),
        ({"loss": lambda m, x: m(x).mean().detach()}, "the loss has no gradient"),
        ({"loss": lambda m, x: m(x).mean() / 0.0}, "before any step; check data and model"),
        ({"model": nn.Flatten()}, "the model has no parameter that requires a gradient"),
    ],
)
def test_the_dry_forward_finds_what_cannot_train(changes, line):
    with pytest.raises(ProblemError, match=re.escape(line)):
        check_problem(problem(**changes))


def test_the_dry_forward_leaves_no_trace():
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Dropout())
    task = problem(model=model)
    before = tensor_hash(model.state_dict().values())
    check_problem(task)
    assert tensor_hash(model.state_dict().values()) == before
    assert model.training
    assert all(p.grad is None for p in model.parameters())


def test_lists_and_loaders_are_cycled():
    listed = problem(batches=[X, 2 * X])
    assert [float(listed.batch(i)[0, 0] / X[0, 0]) for i in range(5)] == [1, 2, 1, 2, 1]
    loader = problem(batches=torch.utils.data.DataLoader(X, batch_size=4))
    assert torch.equal(loader.batch(3), X[4:])


def test_loading_seeds_every_global_generator(module):
    module(GOOD)
    draws = []
    for _ in range(2):
        load_problem("users_task:make", 1)
        draws.append((float(torch.rand(())), float(np.random.rand())))
    assert draws[0] == draws[1]


def test_a_hash_changes_with_bits_dtype_and_shape():
    base = torch.zeros(4)
    others = [torch.zeros(4).double(), torch.zeros(2, 2), -torch.zeros(4), torch.zeros(5)]
    assert len({tensor_hash([t]) for t in [base, *others]}) == 5
    assert tensor_hash([base]) == tensor_hash([torch.zeros(4)])
    assert tensor_hash([torch.zeros(3, dtype=torch.bfloat16), torch.empty(0)]) != tensor_hash([])


def test_the_module_needs_no_package_but_torch():
    """A user's task may import Problem where the rest of the bench is not installed."""
    text = Path(sys.modules[Problem.__module__].__file__).read_text()
    imported = set(re.findall(r"^(?:from|import) (\w+)", text, flags=re.M))
    assert imported - set(sys.stdlib_module_names) == {"torch", "guided_descent"}
