"""Checkpoints: bitwise resume in a new process, torch's distributed checkpoint, frozen files, names, failed loads."""

from __future__ import annotations

import copy
import io
import os
import pickle
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from drive import (
    Net,
    Plain,
    assert_close,
    assert_same,
    drive,
    evaluations,
    fill,
    has,
    identical,
    make,
    parameters,
    push,
    reads_layers,
    refuses_lists,
    snapshot,
    take,
    teach,
)
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)

import guided_descent as gd
from guided_descent.recipes import REGISTRY

GOLDEN = Path(__file__).parent.parent / "oracles" / "state" / "format-1"
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "fp32": ("float32", {}),
    "bf16": ("bfloat16", {}),
    "bf16-stochastic": ("bfloat16", {"rounding": "stochastic"}),
    "bf16-compensated": ("bfloat16", {"rounding": "compensated"}),
    "bf16-master": ("bfloat16", {"rounding": "master"}),
}
#: Steps before and after: the break is between two refreshes.
FIRST, REST = 8, 8


def through_file(value: Any) -> Any:
    """What ``torch.save`` and a safe ``torch.load`` make of it."""
    file = io.BytesIO()
    torch.save(value, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


# -- resume --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def elsewhere(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[..., Any]]:
    """Another process, started once: given the name of a saved run in its folder, it finishes that run."""
    folder = tmp_path_factory.mktemp("resume")
    here = Path(__file__).parent
    program = [sys.executable, "-W", "ignore", str(here / "continue_run.py"), str(folder), str(REST)]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    with subprocess.Popen(program, cwd=here, env=os.environ | {"OMP_NUM_THREADS": "1"}, **pipes) as process:

        def finish(name: str, saved: dict[str, Any]) -> Any:
            torch.save(saved, folder / f"{name}.saved.pt")
            process.stdin.write(f"{name}\n")
            process.stdin.flush()
            assert process.stdout.readline() == f"{name}\n"
            return torch.load(folder / f"{name}.result.pt", weights_only=True)

        yield finish
        process.stdin.close()


@pytest.mark.thin(variant=["fp32"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_a_new_process_continues_to_the_bit(key: str, variant: str, elsewhere: Callable[..., Any]) -> None:
    dtype, more = VARIANTS[variant]
    net = Net(getattr(torch, dtype))
    opt = make(key, net, **more)
    drive(opt, net, FIRST)
    saved = {"key": key, "dtype": dtype, "options": more, "model": net.state_dict(), "optimizer": opt.state_dict()}
    found = elsewhere(f"{key}--{variant}", saved)
    drive(opt, net, REST, first=FIRST)
    assert_same(snapshot(opt, net), found)


def test_loading_its_own_state_before_the_first_step(key: str) -> None:
    a, b = Net(), Net()
    one, two = make(key, a), make(key, b)
    one.load_state_dict(one.state_dict())
    drive(one, a, 10)
    drive(two, b, 10)
    assert_same(snapshot(one, a), snapshot(two, b))


@pytest.mark.parametrize("copier", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))], ids=["deepcopy", "pickle"])
def test_a_copy_with_its_model_continues_to_the_bit(key: str, copier: Any) -> None:
    net = Net()
    opt = make(key, net)
    drive(opt, net, 5)
    other, twin = copier((net, opt))
    if reads_layers(key):
        twin.watch(other, loss="cross_entropy")
    teach(twin)
    assert type(twin).__name__ == type(opt).__name__
    held = snapshot(opt, net)
    drive(twin, other, 7, first=5)
    assert_same(held, snapshot(opt, net))  # nothing is shared
    drive(opt, net, 7, first=5)
    assert_same(snapshot(opt, net), snapshot(twin, other))
    assert twin.audit() == opt.audit()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_state_keeps_its_dtypes_and_loads_safely(key: str, dtype: torch.dtype) -> None:
    net, other = Net(dtype), Net(dtype)
    opt, fresh = make(key, net, rounding="compensated"), make(key, other, rounding="compensated")
    push(opt, 4)
    saved = opt.state_dict()
    loaded = through_file(saved)
    fresh.load_state_dict(loaded)
    for p, q in zip(net.parameters(), other.parameters()):
        assert opt.state[p].keys() == fresh.state[q].keys()
        for name, value in opt.state[p].items():
            assert identical(value, fresh.state[q][name]), name
    for values in saved["state"].values():
        assert all(isinstance(v, torch.Tensor | int | float) for v in values.values())
        assert all(isinstance(name, str) and "/" not in name for name in values)
    assert set(saved) == {"state", "param_groups"}
    assert all("param_names" in group and group["format"] == 1 for group in saved["param_groups"])


def test_a_saved_state_is_not_tied_to_the_live_counters(key: str) -> None:
    net = Net()
    opt = make(key, net)
    drive(opt, net, 3)
    saved = through_file(opt.state_dict())
    held = copy.deepcopy(saved)
    drive(opt, net, 3, first=3)
    opt.load_state_dict(saved)
    assert opt.steps == 3
    drive(opt, net, 2, first=3)
    for number, values in held["state"].items():
        assert all(identical(v, saved["state"][number][name]) for name, v in values.items())  # loading copies


@pytest.mark.parametrize("mode", ["train", "eval"])
def test_a_checkpoint_of_either_mode_continues_to_the_bit(key: str, mode: str) -> None:
    net, other, never = Net(), Net(), Net()
    opt, fresh, plain = make(key, net), make(key, other), make(key, never)
    drive(opt, net, 6)
    getattr(opt, mode)()
    saved = through_file({"model": net.state_dict(), "optimizer": opt.state_dict()})
    other.load_state_dict(saved["model"])
    fresh.load_state_dict(saved["optimizer"])
    for target, model in ((opt, net), (fresh, other)):
        target.train()
        drive(target, model, 6, first=6)
    drive(plain, never, 12)
    assert_same(snapshot(opt, net), snapshot(plain, never))
    assert_same(snapshot(opt, net), snapshot(fresh, other))


# -- the distributed checkpoint ------------------------------------------------------------------------------------


def test_asking_for_the_distributed_state_changes_nothing(key: str) -> None:
    asked, never = Net(), Net()
    one, two = make(key, asked), make(key, never)
    get_optimizer_state_dict(asked, one)
    drive(one, asked, 10)
    drive(two, never, 10)
    assert_same(snapshot(one, asked), snapshot(two, never))


@pytest.mark.thin(flat=[True])
@pytest.mark.parametrize("flat", [False, True], ids=["nested", "flat"])
def test_a_distributed_checkpoint_round_trip(key: str, flat: bool, tmp_path: Path) -> None:
    wanted = StateDictOptions(flatten_optimizer_state_dict=flat)
    net = Net()
    opt = make(key, net)
    drive(opt, net, 7)
    state = {"model": net.state_dict(), "optimizer": get_optimizer_state_dict(net, opt, options=wanted)}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        dcp.save(state, checkpoint_id=tmp_path)
    other = Net()
    fresh = make(key, other)
    into = {"model": other.state_dict(), "optimizer": get_optimizer_state_dict(other, fresh, options=wanted)}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        dcp.load(into, checkpoint_id=tmp_path)
    other.load_state_dict(into["model"])
    set_optimizer_state_dict(other, fresh, into["optimizer"], options=wanted)
    assert_same(snapshot(opt, net), snapshot(fresh, other))
    drive(opt, net, 6, first=7)
    drive(fresh, other, 6, first=7)
    assert_same(snapshot(opt, net), snapshot(fresh, other))


# -- names, order, misfits -----------------------------------------------------------------------------------------


class Shuffled(Net):
    """The same model with its modules registered the other way round, the head still last."""

    def __init__(self) -> None:
        super().__init__()
        for name in [*reversed(list(self._modules)), "head"]:
            self._modules[name] = self._modules.pop(name)


def test_state_follows_the_names_when_the_order_changes(key: str) -> None:
    net, other = Net(), Shuffled()
    opt, fresh = make(key, net), make(key, other)
    drive(opt, net, 5)
    other.load_state_dict(net.state_dict())
    fresh.load_state_dict(through_file(opt.state_dict()))
    assert [name for name, _ in other.named_parameters()] != [name for name, _ in net.named_parameters()]
    assert {g["recipe"]: g["lr"] for g in fresh.param_groups} == {g["recipe"]: g["lr"] for g in opt.param_groups}
    for name, p in net.named_parameters():
        q = other.get_parameter(name)
        assert all(identical(value, fresh.state[q][slot]) for slot, value in opt.state[p].items()), name


@pytest.mark.filterwarnings("ignore:.*without their model")
def test_groups_are_matched_by_their_names_too(key: str) -> None:
    if refuses_lists(key):
        return
    net, other = Net(), Net()
    rules = [gd.rule("*.bias", lr=0.125)]
    opt = make(key, list(net.named_parameters()), rules=rules)
    fresh = make(key, list(other.named_parameters())[::-1], rules=rules)
    order = [set(group["param_names"]) for group in opt.param_groups]
    assert [set(group["param_names"]) for group in fresh.param_groups] != order
    for index, group in enumerate(opt.param_groups):
        group["lr"] = 0.01 * (index + 1)
    push(opt, 3)
    fresh.load_state_dict(through_file(opt.state_dict()))
    assert_same(
        {name: value for name, value in snapshot(opt).items() if name.count("/") == 1 and name[0] not in "0123"},
        {name: value for name, value in snapshot(fresh).items() if name.count("/") == 1 and name[0] not in "0123"},
    )
    for group in fresh.param_groups:
        assert group["lr"] == 0.01 * (order.index(set(group["param_names"])) + 1)
    saved = opt.state_dict()
    for group in saved["param_groups"]:
        group["param_names"] = group["param_names"][1:] + group["param_names"][:1]
    first, last = saved["param_groups"][0], saved["param_groups"][-1]
    first["param_names"][0], last["param_names"][0] = last["param_names"][0], first["param_names"][0]
    with pytest.raises(ValueError, match="another param group"):
        fresh.load_state_dict(saved)


def test_wrapped_names_are_the_same_names(key: str) -> None:
    net, inner = Net(), Net()
    wrapped = nn.Sequential()
    wrapped.add_module("module", inner)
    opt, fresh = make(key, net), make(key, wrapped)
    drive(opt, net, 4)
    inner.load_state_dict(net.state_dict())
    fresh.load_state_dict(through_file(opt.state_dict()))
    drive(opt, net, 3, first=4)
    drive(fresh, wrapped, 3, first=4)
    assert_same(snapshot(opt), snapshot(fresh))


def test_without_names_the_order_counts_and_is_warned_about(key: str) -> None:
    net, other = Net(), Net()
    opt, fresh = make(key, net), make(key, other)
    drive(opt, net, 3)
    saved = opt.state_dict()
    for group in saved["param_groups"]:
        del group["param_names"]
    with pytest.warns(UserWarning, match="matched by position"):
        fresh.load_state_dict(saved)
    for p, q in zip(net.parameters(), other.parameters()):
        assert all(identical(value, fresh.state[q][slot]) for slot, value in opt.state[p].items())


def spoiled(saved: dict[str, Any], how: str) -> dict[str, Any]:
    """A state dict with one thing wrong in it."""
    last = max(number for number, values in saved["state"].items() if len(values) > 1 or "step" in values)
    values, group = saved["state"][last], saved["param_groups"][-1]
    if how == "shape":
        name = next((n for n, v in values.items() if n != "step" and v.ndim), None)
        if name is None:
            values["intruder"] = torch.zeros(3)
        else:
            values[name] = torch.zeros(5, 5, 5)
    elif how == "unknown":
        values["intruder"] = torch.zeros(3)
    elif how == "name":
        group["param_names"] = [f"{name}x" for name in group["param_names"]]
    elif how == "recipe":
        group["recipe"] = "another"
    elif how == "groups":
        saved["param_groups"].append(dict(group, params=[]))
    elif how == "range":
        group["lr"] = -1.0
    elif how == "rounding":
        group["rounding"] = "master"
    elif how == "top":
        del saved["param_groups"]
    elif how == "lost":
        del saved["state"][last]
    return saved


@pytest.mark.parametrize("how", ["shape", "unknown", "name", "recipe", "groups", "range", "rounding", "top", "lost"])
def test_a_failed_load_leaves_everything_as_it_was(key: str, how: str) -> None:
    net, other = Net(), Net()
    opt, source = make(key, net), make(key, other)
    drive(source, other, 2)
    drive(opt, net, 3)
    before, groups = snapshot(opt, net), copy.deepcopy([{**g, "params": None} for g in opt.param_groups])
    with pytest.raises(ValueError):
        opt.load_state_dict(spoiled(through_file(source.state_dict()), how))
    assert_same(before, snapshot(opt, net))
    assert groups == [{**g, "params": None} for g in opt.param_groups]
    drive(opt, net, 1, first=3)


def test_a_lost_slot_is_an_error(key: str) -> None:
    net, other = Net(), Net()
    opt, source = make(key, net), make(key, other)
    push(source, 3)
    saved = through_file(source.state_dict())
    found = 0
    for values in saved["state"].values():
        for name in [n for n in values if n != "step"]:
            del values[name]
            found += 1
    if not found:
        assert all(set(values) == {"step"} for values in saved["state"].values())
        opt.load_state_dict(saved)
        assert opt.steps == 3
        return
    with pytest.raises(ValueError, match="lacks"):
        opt.load_state_dict(saved)


def test_missing_group_keys_are_refilled_with_one_warning(key: str) -> None:
    net, other = Net(), Net()
    opt, fresh = make(key, net), make(key, other)
    drive(opt, net, 2)
    saved = opt.state_dict()
    numbers = [name for name, item in REGISTRY[key].cls.numbers().items() if item.metadata["kind"] == "hyper"]
    lost = numbers[-1]
    index = next(i for i, g in enumerate(saved["param_groups"]) if g["recipe"] == key)
    kept = fresh.param_groups[index][lost]
    del saved["param_groups"][index][lost]
    with pytest.warns(UserWarning, match=f"lacks {lost}") as caught:
        fresh.load_state_dict(saved)
    assert len(caught) == 1
    assert fresh.param_groups[index][lost] == kept


def test_a_revision_of_the_mathematics_is_warned_about(key: str) -> None:
    net, other = Net(), Net()
    opt, fresh = make(key, net), make(key, other)
    saved = opt.state_dict()
    for group in saved["param_groups"]:
        group["revision"] = 0
    with pytest.warns(UserWarning, match="mathematics has changed"):
        fresh.load_state_dict(saved)


def test_other_structure_is_an_error(key: str) -> None:
    changed = False
    for name, item in REGISTRY[key].cls.numbers().items():
        if item.metadata["kind"] != "static":
            continue
        net, other = Net(), Net()
        opt, fresh = make(key, net), make(key, other)
        saved = opt.state_dict()
        group = next(g for g in saved["param_groups"] if g["recipe"] == key)
        group[name] = "another"
        with pytest.raises(ValueError, match=f"{name} of param group"):
            fresh.load_state_dict(saved)
        changed = True
    assert changed or not any(item.metadata["kind"] == "static" for item in REGISTRY[key].cls.numbers().values())


def test_tensor_rates_keep_their_identity_through_a_load(key: str) -> None:
    net, other = Net(), Net()
    rate = torch.tensor(0.02)
    opt, fresh = make(key, net, lr=0.5), make(key, other, lr=rate)
    held = next(g["lr"] for g in fresh.param_groups if isinstance(g["lr"], torch.Tensor))
    fresh.load_state_dict(opt.state_dict())
    assert any(g["lr"] is held for g in fresh.param_groups)
    assert float(held) == 0.5


def test_hooks_of_state_dicts_fire_once(key: str) -> None:
    opt = make(key, Plain())
    fired: list[str] = []
    opt.register_state_dict_pre_hook(lambda *_: fired.append("save pre"))
    opt.register_state_dict_post_hook(lambda *_: fired.append("save post"))
    opt.register_load_state_dict_pre_hook(lambda *_: fired.append("load pre"))
    opt.register_load_state_dict_post_hook(lambda *_: fired.append("load post"))
    opt.load_state_dict(opt.state_dict())
    assert fired == ["save pre", "save post", "load pre", "load post"]


def test_frozen_here_and_trained_there(key: str) -> None:
    net, other = Net(), Net()
    other.wide.requires_grad_(False)
    opt, fresh = make(key, net), make(key, other)
    drive(opt, net, 3)
    fresh.load_state_dict(through_file(opt.state_dict()))
    other.load_state_dict(net.state_dict())
    other.wide.requires_grad_(True)
    drive(opt, net, 3, first=3)
    drive(fresh, other, 3, first=3)
    assert_same(snapshot(opt), snapshot(fresh))


# -- frozen files --------------------------------------------------------------------------------------------------


def test_a_file_of_format_1_loads_and_continues(key: str) -> None:
    path = GOLDEN / f"{key}.pt"
    assert path.exists(), f"write it once, when the recipe is new: python tests/oracles/state/freeze.py {key}"
    for file in (path, *sorted(GOLDEN.glob(f"{key}+*.pt"))):
        load_and_continue(key, file)


def load_and_continue(key: str, path: Path) -> None:
    """The steps after a frozen file are those that followed when it was written."""
    saved = torch.load(path, weights_only=True)
    net = Net()
    net.load_state_dict(saved["model"])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", message=".*lacks .*: the values of this optimizer are kept")  # newer keys
        then = {name: f.metadata["was"] for name, f in REGISTRY[key].cls.numbers().items() if f.metadata.get("was")}
        options = then | saved["options"]  # a choice that is newer than the file
        opt = gd.optimizer(key, net, **options, **({"loss": "cross_entropy"} if reads_layers(key) else {}))
        teach(opt).load_state_dict(saved["optimizer"])
    assert opt.steps == saved["steps"]
    for gradients in saved["gradients"]:

        def closure(gradients: Any = gradients) -> None:
            for name, p in net.named_parameters():
                p.grad = gradients[name].clone()

        take(opt, closure, evaluations(opt))
    assert_close(parameters(net), saved["expected"], 2e-5)


# -- state dicts of torch ------------------------------------------------------------------------------------------

TORCH: dict[str, tuple[Any, dict[str, Any], str, dict[str, Any]]] = {
    "adamw": (torch.optim.AdamW, {"lr": 0.01, "weight_decay": 0.1}, "adamw", {}),
    "amsgrad": (torch.optim.AdamW, {"lr": 0.01, "amsgrad": True}, "adamw", {"amsgrad": True}),
    "sgd": (torch.optim.SGD, {"lr": 0.01, "momentum": 0.9}, "sgd", {"momentum": 0.9}),
    "nesterov": (
        torch.optim.SGD,
        {"lr": 0.01, "momentum": 0.9, "nesterov": True, "weight_decay": 0.1},
        "sgd",
        {"momentum": 0.9, "nesterov": True},
    ),
    "nadam": (
        torch.optim.NAdam,
        {"lr": 0.01, "decoupled_weight_decay": True, "weight_decay": 0.1},
        "nadamw",
        {},
    ),
    "adagrad": (torch.optim.Adagrad, {"lr": 0.01, "lr_decay": 0.1}, "adagrad", {}),
    "rmsprop": (
        torch.optim.RMSprop,
        {"lr": 0.01, "momentum": 0.9, "centered": True},
        "rmsprop",
        {"momentum": 0.9, "centered": True},
    ),
    "adadelta": (torch.optim.Adadelta, {"lr": 0.01, "weight_decay": 0.1}, "adadelta", {}),
    "adamax": (torch.optim.Adamax, {"lr": 0.01}, "adamax", {}),
    "radam": (torch.optim.RAdam, {"lr": 0.01, "weight_decay": 0.1}, "radam", {}),
    "adafactor": (
        torch.optim.Adafactor,
        {"lr": 0.01, "weight_decay": 0.1, "eps": (1e-30, 1e-3)},
        "adafactor",
        {"min_dim_size_to_factor": 1, "factored_axes": "last"},
    ),
}


@pytest.mark.parametrize(
    ("cls", "numbers", "name", "fits"),
    [
        (torch.optim.RAdam, {"decoupled_weight_decay": True}, "radam", False),
        (torch.optim.RAdam, {"decoupled_weight_decay": False}, "radam", True),
        (torch.optim.NAdam, {"decoupled_weight_decay": False}, "nadamw", False),
        (torch.optim.Adam, {}, "adamw", False),
    ],
)
@pytest.mark.parametrize("decay", [0.0, 0.1])
def test_another_kind_of_decay_is_refused(
    cls: Any, numbers: dict[str, Any], name: str, fits: bool, decay: float
) -> None:
    net, other = Plain(), Plain()
    theirs = cls(net.parameters(), lr=0.01, weight_decay=decay, **numbers)
    fill(net.parameters(), 0)
    theirs.step()
    ours = gd.optimizer(name, other.parameters(), lr=0.01, weight_decay=decay)
    if fits or not decay:
        ours.load_state_dict(theirs.state_dict())
        return
    with pytest.raises(ValueError, match=r"decoupled_weight_decay of param group 0 was .*: build with decay='"):
        ours.load_state_dict(theirs.state_dict())


@pytest.mark.parametrize("name", TORCH)
@pytest.mark.parametrize("named", [False, True], ids=["bare", "named"])
def test_a_state_dict_of_torch_continues_here(name: str, named: bool) -> None:
    cls, numbers, key, structure = TORCH[name]
    net, other = Plain(torch.float64), Plain(torch.float64)
    theirs = cls(list(net.named_parameters()) if named else net.parameters(), **numbers)
    for number in range(6):
        fill(net.parameters(), number)
        theirs.step()
    other.load_state_dict(net.state_dict())
    ours = gd.optimizer(key, list(other.named_parameters()) if named else list(other.parameters()), **structure)
    ours.load_state_dict(through_file(theirs.state_dict()))
    group = ours.param_groups[0]
    assert group["lr"] == 0.01
    assert group["weight_decay"] == theirs.param_groups[0]["weight_decay"]
    for number in range(6, 20):
        fill(net.parameters(), number)
        fill(other.parameters(), number)
        theirs.step()
        ours.step()
    # torch keeps NAdam's product of momenta in float32
    assert_close(parameters(net), parameters(other), 1e-6 if name == "nadam" else 1e-12)


def test_momentum_that_the_recipe_was_built_without_is_an_error() -> None:
    net = Plain()
    theirs = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9)
    fill(net.parameters(), 0)
    theirs.step()
    with pytest.raises(ValueError, match="momentum"):
        gd.SGD(net.parameters(), lr=0.1).load_state_dict(theirs.state_dict())
    assert has("sgd", "momentum")
