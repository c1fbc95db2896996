"""Checkpoints: bitwise round trips, and whole or absent after any failure."""

from __future__ import annotations

import errno
import json
import os
import pickle
import re
import resource
import shutil
import tempfile
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from guided_descent.bench import checkpoint as module
from guided_descent.bench.checkpoint import CheckpointError, Checkpoints
from guided_descent.bench.tree import TreeError, decode, encode, from_bytes, same_bits, to_bytes

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
    return t.resolve_conj().contiguous().flatten().view(torch.uint8).numpy().tobytes() if t.numel() else b""


dtypes = st.sampled_from(
    [torch.float32, torch.float64, torch.bfloat16, torch.float16, torch.int64, torch.uint8, torch.bool,
     torch.complex64, torch.complex128]
)  # fmt: skip
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
    assert same(from_bytes(to_bytes(value)), value)


def test_a_copy_does_not_change_with_what_was_copied():
    weights = torch.ones(3)
    tree = {"w": weights, "row": torch.eye(3)[1], "c": torch.ones(2, dtype=torch.complex128)}
    shared, copied = encode(tree)[0], encode(tree, copy=True)[0]
    for value in tree.values():
        value.zero_()
    assert shared["t0"].tolist() == [0, 0, 0]
    assert [t.count_nonzero().item() for t in copied.values()] == [3, 1, 2]


def test_equal_bits_see_signs_of_zero_and_dtypes():
    zero, nan = torch.tensor([0.0]), torch.tensor([float("nan")])
    assert same_bits(nan, nan.clone())
    assert not same_bits(zero, -zero)
    assert not same_bits(zero, zero.int())
    assert not same_bits(zero, zero.view(1, 1))


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
        "complex": torch.randn(2, 3, dtype=torch.complex128).mT,
        "conjugate": torch.randn(3, dtype=torch.complex64).conj(),
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
    with pytest.raises(TreeError, match=r"a\.b\[1\] is a set; a checkpoint holds only tensors"):
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


FILES = ("tensors.safetensors", "state.json", "manifest.json", "COMPLETE")


@given(st.sampled_from(FILES), st.floats(0, 1, exclude_max=True), st.integers(0, 7))
@settings(max_examples=60, deadline=None)
def test_one_flipped_bit_is_detected_and_named_and_the_one_before_is_used(name, where, bit):
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        store = Checkpoints(folder)
        store.save(1, TREE)
        store.save(2, {**TREE, "step": 4})
        flip(folder / "step-00000002" / name, where, bit)
        for reader in (store, Checkpoints(folder)):  # what has checked it before sees that it was written again
            warnings: list[str] = []
            found = reader.latest(warnings.append)
            assert found is not None
            assert found[0] == 1
            assert same(found[1], TREE)
            (line,) = warnings
            assert re.search(rf"step 2 \(damaged: [^)]*{re.escape(name)}[^)]*\); going on from step 1", line)
            assert "\n" not in line
            with pytest.raises(CheckpointError, match="step-00000002: damaged"):
                reader.load(2)
        store.save(2, TREE)  # a damaged one is replaced
        assert same(store.load(2), TREE)


def flip(path: Path, where: float = 0.5, bit: int = 0) -> None:
    data = bytearray(path.read_bytes())
    data[int(where * len(data))] ^= 1 << bit
    path.write_bytes(data)


def test_one_warning_names_all_that_were_passed_over(tmp_path):
    store = Checkpoints(tmp_path, keep=9)
    for step in range(1, 7):
        store.save(step, TREE)
    flip(tmp_path / "step-00000006" / "tensors.safetensors")
    (tmp_path / "step-00000005" / "COMPLETE").unlink()
    (tmp_path / "step-00000004" / "state.json").unlink()
    os.rename(tmp_path / "step-00000003", tmp_path / "step-00000007")
    (tmp_path / ".tmp-step-00000008-17").mkdir()
    (tmp_path / "step-of-mine").mkdir()  # not ours
    warnings: list[str] = []
    found = store.latest(warnings.append)
    assert found is not None
    assert found[0] == 2
    assert warnings == [
        f"passed over in {tmp_path}: step 8 (incomplete: its save was cut short), step 7 (damaged: manifest.json is of "
        "step 3), step 6 (damaged: tensors.safetensors does not match its checksum), step 5 (incomplete: its save was "
        "cut short), step 4 (damaged: state.json is missing); going on from step 2"
    ]
    store.save(9, TREE)
    assert store.steps() == [1, 2, 9]  # and all else has gone
    assert len(list(tmp_path.iterdir())) == 4


def test_all_damaged_is_an_error_and_none_is_none(tmp_path):
    store = Checkpoints(tmp_path)
    assert store.latest() is None
    store.save(1, TREE)
    (tmp_path / "step-00000001" / "state.json").unlink()
    with pytest.raises(CheckpointError, match=r"state\.json is missing.*no other is intact; start the run afresh"):
        store.latest(pytest.fail)
    (tmp_path / "step-00000001" / "COMPLETE").unlink()
    lines: list[str] = []
    assert store.latest(lines.append) is None
    assert "step 1 (incomplete" in lines[0]
    assert "the run begins anew" in lines[0]


def test_what_the_reader_cannot_use_is_passed_over(tmp_path):
    store = Checkpoints(tmp_path)
    store.save(1, {"rows": 10})
    store.save(2, {"rows": 20})
    lines: list[str] = []
    assert store.latest(lines.append, lambda tree: "too many rows" if tree["rows"] > 10 else None) == (1, {"rows": 10})
    assert "step 2 (too many rows); going on from step 1" in lines[0]


def test_a_newer_format_is_named(tmp_path, monkeypatch):
    store = Checkpoints(tmp_path)
    store.save(1, TREE)
    with monkeypatch.context() as patch:
        patch.setattr(module, "FORMAT", 99)
        store.save(2, TREE)
    for reader in (lambda: Checkpoints(tmp_path).latest(), lambda: Checkpoints(tmp_path).load(2)):
        with pytest.raises(CheckpointError, match=r"step-00000002: format 99 is newer than \d; upgrade"):
            reader()


def test_only_intact_ones_count_and_the_last_of_them_is_never_removed(tmp_path):
    store = Checkpoints(tmp_path, keep=2)
    for step in (1, 2, 3):
        store.save(step, TREE)
    flip(tmp_path / "step-00000003" / "state.json")
    store.save(4, TREE)
    assert store.steps() == [2, 4]  # 3 is damaged and does not count as one of the two
    flip(tmp_path / "step-00000002" / "COMPLETE")
    flip(tmp_path / "step-00000004" / "COMPLETE")
    store._prune(())
    assert store.steps() == [2, 4]  # nothing is intact, so nothing goes
    store.save(5, TREE)
    assert store.steps() == [5]


def test_protected_ones_stay_beside_the_newest(tmp_path):
    store = Checkpoints(tmp_path, keep=2)
    for step in range(1, 8):
        store.save(step, TREE, protected={1, 2, 6} if step < 5 else {2, 6})
    assert store.steps() == [2, 6, 7]
    store.save(8, TREE)
    assert store.steps() == [7, 8]


def test_a_write_that_goes_wrong_in_silence_is_noticed_before_older_ones_go(tmp_path, monkeypatch):
    """A disk or a memory that flips a bit on the way, before the checksum is taken."""
    store = Checkpoints(tmp_path, keep=1)
    store.save(1, TREE)

    def flipping(tensors, path):
        save_file(tensors, path)
        flip(path, 0.99)

    monkeypatch.setattr(module, "save_file", flipping)
    with pytest.raises(CheckpointError, match=r"tensors\.safetensors was read back other than .*step 1 is intact"):
        store.save(2, TREE)
    assert same(Checkpoints(tmp_path).latest(pytest.fail)[1], TREE)


def test_the_files_have_the_rights_of_the_user_s_other_files(tmp_path):
    Checkpoints(tmp_path).save(1, TREE)
    (tmp_path / "other").write_text("")
    rights = {path.name: path.stat().st_mode for path in tmp_path.rglob("*") if path.is_file()}
    assert set(rights) == {*FILES, "other"}
    assert len(set(rights.values())) == 1


class Power(BaseException):
    """A stop that runs no clean-up, as a kill or a power cut."""


@pytest.mark.parametrize(
    "error", [OSError(28, "No space left on device"), PermissionError(13, "Permission denied"), Power()]
)
def test_a_failure_at_any_moment_of_a_save_leaves_the_old_or_the_new(tmp_path, monkeypatch, error):
    """Every call that touches the disk fails in turn, once before and once after it did its work."""
    calls = [(os, "fsync"), (os, "rename"), (os, "replace"), (os, "chmod"), (module, "save_file"), (module, "_write"),
             (module, "sync_folder")]  # fmt: skip
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
                    assert ("are needed" in line) == (error.errno == errno.ENOSPC)
                    assert "\n" not in line
            lines: list[str] = []
            found = Checkpoints(folder).latest(lines.append)
            assert found is not None
            assert same(found[1], old if found[0] == 1 else new)
            if not isinstance(error, Power):
                assert lines == []
            assert all("step 2 (incomplete: its save was cut short); going on from step" in line for line in lines)
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
        needed = r"cannot save the checkpoint of step 2 .*\(1\d\.\d kB are needed, .*\).*step 1 is intact; free space"
        with pytest.raises(CheckpointError, match=needed):
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
        with pytest.raises(CheckpointError, match="no checkpoint of guided-descent"):
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
    names = ("checkpoint", "data", "files", "problem", "ranks", "runner", "session", "snapshot", "store", "tree")
    for name in (*names, "shares", "summary", "workloads"):
        source = Path(module.__file__).with_name(f"{name}.py")
        text = source.read_text()
        words = ("torch.load", "import pickle", "torch.save", "allow_pickle", "gather_object", "broadcast_object")
        assert not any(word in text for word in words), source


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
