"""Checkpoints: bitwise round trips, and whole or absent after any failure."""

from __future__ import annotations

import json
import os
import pickle
import resource
import shutil
import tempfile
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from guided_descent.bench import checkpoint as module
from guided_descent.bench.checkpoint import CheckpointError, Checkpoints, decode, encode

TREE = {"w": torch.arange(6.0).view(2, 3), "step": 3, "betas": (0.9, 0.99), "nested": {0: {"m": torch.ones(2)}}}


def same(a: object, b: object) -> bool:
    """Equal types and bits."""
    if isinstance(a, torch.Tensor):
        return isinstance(b, torch.Tensor) and a.dtype == b.dtype and a.shape == b.shape and bits(a) == bits(b)
    if type(a) is not type(b):
        return False
    if isinstance(a, dict):
        return list(a) == list(b) and all(same(a[k], b[k]) for k in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b or (a != a and b != b)


def bits(t: torch.Tensor) -> bytes:
    return t.contiguous().flatten().view(torch.uint8).numpy().tobytes() if t.numel() else b""


dtypes = st.sampled_from(
    [torch.float32, torch.float64, torch.bfloat16, torch.float16, torch.int64, torch.uint8, torch.bool]
)
shapes = st.lists(st.integers(0, 3), max_size=3)
tensor = st.builds(lambda dtype, shape: (3 * torch.randn(shape)).to(dtype), dtypes, shapes)
number = st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=5))
key = st.one_of(st.integers(), st.text(max_size=4), st.sampled_from(["$tensor", "$tuple", "$dict", "$float", "$"]))
tree = st.recursive(
    st.one_of(number, tensor),
    lambda x: st.one_of(
        st.lists(x, max_size=3), st.lists(x, max_size=3).map(tuple), st.dictionaries(key, x, max_size=3)
    ),
    max_leaves=12,
)


@given(tree)
@settings(max_examples=150, deadline=None)
def test_any_tree_survives_the_split_and_its_json(value):
    tensors, structure = encode(value)
    assert same(decode(tensors, json.loads(json.dumps(structure, allow_nan=False))), value)


def test_round_trip_through_files_is_bitwise_also_for_views_shared_and_special_values(tmp_path):
    base = torch.randn(4, 6)
    value = {
        "view": base[1:3, ::2],
        "transposed": base.T,
        "shared": base,
        "again": base,
        "special": torch.tensor([float("nan"), float("inf"), -0.0, 1e-45]),
        "scalar": torch.tensor(3.0),
        "empty": torch.empty(0, 3),
        "bf16": torch.randn(3).bfloat16(),
        "inf": float("inf"),
    }
    store = Checkpoints(tmp_path)
    store.save(1, value)
    assert same(store.load(1), value)


def test_optimizer_state_dicts_survive(tmp_path):
    model = torch.nn.Linear(3, 2)
    for make in (torch.optim.AdamW, torch.optim.LBFGS, torch.optim.SGD, torch.optim.NAdam):
        optimizer = make(model.parameters(), lr=0.1)
        optimizer.step(lambda: model(torch.ones(3)).square().sum().backward() or torch.tensor(1.0))
        store = Checkpoints(tmp_path / make.__name__)
        store.save(1, optimizer.state_dict())
        assert same(store.load(1), optimizer.state_dict())


def test_an_object_is_refused_by_its_place(tmp_path):
    with pytest.raises(CheckpointError, match=r"a\.b\[1\] is a set; a checkpoint holds only tensors"):
        Checkpoints(tmp_path).save(1, {"a": {"b": [1, {2}]}})
    assert Checkpoints(tmp_path).steps() == []


def test_the_newest_stay(tmp_path):
    store = Checkpoints(tmp_path, keep=2)
    for step in (1, 2, 3, 10):
        store.save(step, {"step": step})
    assert store.steps() == [3, 10]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["step-00000003", "step-00000010"]
    with pytest.raises(CheckpointError, match=r"no checkpoint of step 1 .* there are: \[3, 10\]"):
        store.load(1)
    with pytest.raises(CheckpointError, match="keep is 0"):
        Checkpoints(tmp_path, keep=0)


@pytest.mark.parametrize("name", ["tensors.safetensors", "state.json", "manifest.json", "COMPLETE"])
@pytest.mark.parametrize("where", [0, 0.5, -1])
def test_one_flipped_bit_is_detected_and_the_one_before_is_used(tmp_path, name, where):
    store = Checkpoints(tmp_path)
    store.save(1, TREE)
    store.save(2, {**TREE, "step": 4})
    flip(tmp_path / "step-00000002" / name, where)
    warnings: list[str] = []
    found = store.latest(warnings.append)
    assert found is not None
    assert found[0] == 1
    assert same(found[1], TREE)
    assert len(warnings) == 1
    assert "step-00000002" in warnings[0]
    assert "damaged" in warnings[0]
    assert "\n" not in warnings[0]
    with pytest.raises(CheckpointError, match="damaged"):
        store.load(2)
    store.save(2, TREE)  # a damaged one is replaced
    assert same(store.load(2), TREE)


def flip(path: Path, where: float) -> None:
    data = bytearray(path.read_bytes())
    data[int(where * len(data)) if where >= 0 else -1] ^= 1
    path.write_bytes(data)


def test_all_damaged_is_an_error_and_none_is_none(tmp_path):
    store = Checkpoints(tmp_path)
    assert store.latest() is None
    store.save(1, TREE)
    (tmp_path / "step-00000001" / "state.json").unlink()
    with pytest.raises(CheckpointError, match="no earlier checkpoint is intact; start the run afresh"):
        store.latest(lambda line: None)


def test_a_newer_format_is_named(tmp_path, monkeypatch):
    store = Checkpoints(tmp_path)
    monkeypatch.setattr(module, "FORMAT", 2)
    store.save(1, TREE)
    monkeypatch.undo()
    with pytest.raises(CheckpointError, match="format 2 is newer than 1; upgrade"):
        store.latest()


class Power(BaseException):
    """A stop that runs no clean-up, as a kill or a power cut."""


@pytest.mark.parametrize(
    "error", [OSError(28, "No space left on device"), PermissionError(13, "Permission denied"), Power()]
)
def test_a_failure_at_any_moment_of_a_save_leaves_the_old_or_the_new(tmp_path, monkeypatch, error):
    """Every call that touches the disk fails in turn, once before and once after it did its work."""
    calls = [(os, "fsync"), (os, "rename"), (module, "save_file"), (module, "_write"), (module, "sync_folder")]
    count = 0

    def failing(original, at, after):
        def call(*args, **kwargs):
            nonlocal count
            count += 1
            if count == at and not after:
                raise error
            result = original(*args, **kwargs)
            if count == at and after:
                raise error
            return result

        return call

    old, new = {**TREE, "step": 1}, {**TREE, "step": 2}
    outcomes = set()
    for after in (False, True):
        for at in range(1, 100):
            folder = tmp_path / f"{at}-{after}"
            store = Checkpoints(folder, keep=1)
            store.save(1, old)
            count = 0
            with monkeypatch.context() as patch:
                for owner, name in calls:
                    patch.setattr(owner, name, failing(getattr(owner, name), at, after))
                try:
                    store.save(2, new)
                    failed = False
                except Power:
                    failed = True
                except CheckpointError as caught:
                    failed = True
                    line = str(caught)
                    assert error.strerror in line
                    assert "the checkpoint of step 1 is intact" in line or "step 2 is intact" in line
                    assert "\n" not in line
            found = Checkpoints(folder).latest(pytest.fail)
            assert found is not None
            assert same(found[1], old if found[0] == 1 else new)
            outcomes.add((failed, found[0]))
            fresh = Checkpoints(folder, keep=1)
            fresh.save(3, TREE)
            assert [p.name for p in folder.iterdir()] == ["step-00000003"]  # nothing partial stays
            if not failed:
                break
    assert (True, 1) in outcomes
    assert (False, 2) in outcomes


@pytest.mark.parametrize("limit", [0, 100, 700, 4000])
def test_a_real_write_error_of_the_system(tmp_path, limit):
    """The kernel refuses to let files grow past a limit, as it does on a full disk."""
    store = Checkpoints(tmp_path)
    store.save(1, TREE)
    big = {"w": torch.randn(3000), "list": list(range(500))}
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
    try:
        with pytest.raises(
            CheckpointError, match=r"cannot save the checkpoint of step 2 .*step 1 is intact; free space"
        ):
            store.save(2, big)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert [p.name for p in tmp_path.iterdir()] == ["step-00000001"]
    store.save(2, big)
    assert same(store.load(2), big)


class Evil:
    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self):
        return (os.mkdir, (str(self.target),))


def test_a_planted_pickle_is_refused_and_never_runs(tmp_path):
    store = Checkpoints(tmp_path / "c")
    store.save(1, TREE)
    evil = pickle.dumps(Evil(tmp_path / "ran"))
    path = tmp_path / "c" / "step-00000001"
    (path / "extra.pt").write_bytes(evil)
    with pytest.raises(CheckpointError, match=r"extra\.pt, a pickle file, and pickles are never loaded"):
        store.load(1)
    (path / "extra.pt").unlink()
    for name in ("tensors.safetensors", "state.json"):  # in place of a file, with checksums made to fit
        kept = (path / name).read_bytes()
        (path / name).write_bytes(evil)
        sign(path)
        with pytest.raises(CheckpointError, match="is no checkpoint of guided-descent"):
            store.load(1)
        (path / name).write_bytes(kept)
    sign(path)
    assert same(store.load(1), TREE)
    assert not (tmp_path / "ran").exists()
    pickle.loads(evil)  # the payload itself works
    assert (tmp_path / "ran").exists()


def sign(path: Path) -> None:
    import hashlib

    manifest = json.loads((path / "manifest.json").read_bytes())
    for name in manifest["files"]:
        data = (path / name).read_bytes()
        manifest["files"][name] = {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    text = json.dumps(manifest).encode()
    (path / "manifest.json").write_bytes(text)
    (path / "COMPLETE").write_text(hashlib.sha256(text).hexdigest())


def test_run_folders_are_read_without_pickle():
    """What reads and writes run folders cannot load one: torch.load, pickle and numpy's allow_pickle do not occur."""
    for name in ("checkpoint", "data", "files", "problem", "runner", "session", "store", "workloads"):
        source = Path(module.__file__).with_name(f"{name}.py")
        text = source.read_text()
        assert not any(word in text for word in ("torch.load", "import pickle", "torch.save", "allow_pickle")), source


def test_golden_checkpoint_of_format_1():
    """Bytes written by format 1 must load for ever."""
    folder = Path(tempfile.mkdtemp())
    try:
        shutil.copytree(Path(__file__).parent / "golden" / "checkpoints", folder / "c")
        step, value = Checkpoints(folder / "c").latest(pytest.fail)
        assert step == 3
        assert same(value, TREE)
    finally:
        shutil.rmtree(folder)
