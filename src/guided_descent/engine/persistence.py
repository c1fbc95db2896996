"""State dicts: packed in torch's layout, loaded by name into the tensors that are there.

Loading first works out every copy it will make and raises on the first misfit, then makes them all: a failed load
leaves the optimizer as it was.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from guided_descent.engine import evaluation
from guided_descent.engine.binding import Plan, stored_slots
from guided_descent.engine.rounding import rounding_slots
from guided_descent.engine.state import work_dtype
from guided_descent.parallel.boxes import assign, is_dtensor
from guided_descent.parallel.owners import Job
from guided_descent.parallel.saving import Placed, Store, prove_equal
from guided_descent.parts.base import Slot
from guided_descent.routing.names import canonical_name

if TYPE_CHECKING:
    from guided_descent.engine.engine import Engine

#: Group keys that describe the optimizer as built; a checkpoint does not overwrite them.
_BUILT = frozenset({"params", "param_names", "recipe", "revision", "format", "extra", "foreach", "fused"})


@dataclass(frozen=True)
class Saved:
    """One parameter of a checkpoint."""

    name: str | None
    group: int
    state: Mapping[str, Any]


def pack(engine: Engine) -> dict[str, Any]:
    """Groups and state with parameters replaced by their numbers, rows of stacks as tensors of their own.

    Where ranks share the work it is collective, and what lies at owners leaves in parts.
    """
    numbers: dict[int, int] = {}
    packed_groups = []
    for group in engine.groups:
        for p in group["params"]:
            numbers[id(p)] = len(numbers)
        packed = {key: value for key, value in group.items() if key != "params"}
        packed["param_names"] = list(group["param_names"])
        packed["extra"] = {k: v.clone() if isinstance(v, Tensor) else v for k, v in group["extra"].items()}
        packed["params"] = [numbers[id(p)] for p in group["params"]]
        packed_groups.append(packed)
    packed_state = {
        numbers[id(p)]: {key: _own(value) for key, value in values.items()}
        for p, values in _gathered(engine).items()
        if id(p) in numbers and values
    }
    return {"state": dict(sorted(packed_state.items())), "param_groups": packed_groups}


def _gathered(engine: Engine) -> Mapping[Tensor, Mapping[str, Any]]:
    """The state, with that of owners in the place of what only they have."""
    plan = engine.bind()
    if plan.owners is None:
        return engine.state
    plan.owners.check()
    store = _store(engine, plan)
    placed = store.leave(engine.state)
    found = dict(engine.state)
    for p in plan.parameters:
        if p.tensor in found:
            loose = {k: v for k, v in found[p.tensor].items() if k not in store.raw.get(p.index, ())}
            found[p.tensor] = loose | placed.get(p.index, {})
    named = {
        f"state {key!r} of {p.name!r}": value for p in plan.parameters for key, value in found.get(p.tensor, {}).items()
    }
    named |= {
        f"{key!r} of param group {i}": v for i, group in enumerate(engine.groups) for key, v in group["extra"].items()
    }
    prove_equal(plan.owners.ranks, named)
    return found


def _store(engine: Engine, plan: Plan) -> Store:
    """What lies at the owners of a plan."""
    assert plan.owners is not None

    def stored(job: Job) -> Mapping[str, Slot]:
        like = torch.empty((), dtype=work_dtype(job.entry.owners[0].part.dtype))
        return stored_slots(job.halves.first, job.block, engine.groups[job.entry.group], like)[0]

    return Store(plan.owners, stored)


def _own(value: Any) -> Any:
    if is_dtensor(value):
        return value
    whole = isinstance(value, Tensor) and value.untyped_storage().nbytes() == value.numel() * value.element_size()
    return value if whole or not isinstance(value, Tensor) else value.clone()


def load(engine: Engine, state_dict: Mapping[str, Any]) -> None:
    """Copy a packed state dict into an engine's groups and state."""
    for key in ("state", "param_groups"):
        if key not in state_dict:
            raise ValueError(f"the state dict has no {key!r}; it holds {', '.join(map(repr, state_dict)) or 'nothing'}")
    saved_groups: Sequence[Mapping[str, Any]] = state_dict["param_groups"]
    if len(saved_groups) != len(engine.groups):
        raise ValueError(
            f"the state dict has {len(saved_groups)} param groups and this optimizer {len(engine.groups)}: build it "
            "with the model, rules and recipe of the checkpoint"
        )
    plan = engine.bind()
    if plan.owners is not None:
        plan.owners.check()
    saved = _read(state_dict["state"], saved_groups)
    pairs = _match([(p.name, p.group) for p in plan.parameters], saved)
    order = {p.group: entry.group for p, entry in zip(plan.parameters, pairs)}
    saved_groups = [saved_groups[order.get(index, index)] for index in range(len(saved_groups))]
    updates = [_group_update(engine, index, from_) for index, from_ in enumerate(saved_groups)]
    mode = next((group["mode"] for group in saved_groups if "mode" in group), "train")
    copies: list[tuple[Tensor, Tensor]] = []
    steps: dict[int, int] = {}
    for p, entry in zip(plan.parameters, pairs):
        if not entry.state:
            if p.tensor in engine.state and int(engine.state[p.tensor].get("step", 0)):
                raise ValueError(
                    f"the state dict has no state for {p.name!r}, which has been trained: it is incomplete"
                )
            continue
        if p.tensor not in engine.state:  # frozen here, trained there: it gets state to load into
            engine.state[p.tensor] = {}
            engine.forget()
    plan = engine.bind()
    store = None if plan.owners is None else _store(engine, plan)
    placed: Placed = {} if store is None else store.empty()
    live = evaluation.loaded(engine, plan, mode, {p.index: entry.state for p, entry in zip(plan.parameters, pairs)})
    for p, entry in zip(plan.parameters, pairs):
        if not entry.state:
            continue
        raw = () if store is None else store.raw.get(p.index, ())
        own = {k: v for k, v in engine.state[p.tensor].items() if k not in raw} | placed.get(p.index, {})
        steps[p.index] = int(entry.state.get("step", 0))
        optional = set(rounding_slots(engine.groups[p.group]["rounding"], p.tensor.dtype))
        for key, value in own.items():
            if key in ("step", evaluation.LIVE):
                continue
            if key not in entry.state:
                if key in optional or not steps[p.index]:
                    continue
                raise ValueError(
                    f"the state of {p.name!r} in the state dict lacks {key!r}; it has {', '.join(entry.state)}"
                )
            given = entry.state[key] if is_dtensor(entry.state[key]) else torch.as_tensor(entry.state[key])
            if given.shape != value.shape:
                raise ValueError(
                    f"state {key!r} of {p.name!r} has shape {tuple(given.shape)} in the state dict and "
                    f"{tuple(value.shape)} here: it belongs to another model or another structure of the recipe"
                )
            copies.append((value, given))
        known = {"comp", "master", *own, *([evaluation.LIVE] if p.index in live else [])}
        unknown = [key for key in entry.state if key not in known]
        if unknown:
            raise ValueError(
                f"the state of {p.name!r} in the state dict holds {unknown[0]!r}, which "
                f"{engine.recipes[p.group].label} does not keep (it keeps {', '.join(own)})"
            )
    for own_tensor, given in copies:
        assign(own_tensor, given)
    if store is not None:
        store.enter(engine.state, placed)
    evaluation.keep(engine, plan, live)
    for index, count in steps.items():
        plan.counts[index] = count
        plan.steps[index] = count
    for group, update in zip(engine.groups, updates):
        shared = update.pop("extra", {})
        _overwrite(group, update)
        _overwrite(group["extra"], shared)
    engine.reload()


def _overwrite(target: dict[str, Any], values: Mapping[str, Any]) -> None:
    """Set values; a tensor that is there keeps its identity, since schedulers and graphs hold it."""
    for key, value in values.items():
        if isinstance(target.get(key), Tensor):
            target[key].copy_(torch.as_tensor(value))
        else:
            target[key] = value


def _read(state: Mapping[Any, Any], groups: Sequence[Mapping[str, Any]]) -> list[Saved]:
    saved = []
    for index, group in enumerate(groups):
        names = group.get("param_names") or [None] * len(group["params"])
        for name, number in zip(names, group["params"]):
            values = dict(state.get(number, state.get(str(number), {})))
            values = {key: value for key, value in values.items() if value is not None}
            if (
                values and "step" not in values
            ):  # torch.optim.SGD and Muon count nothing: used, but how often is unknown
                values["step"] = 1
            saved.append(Saved(canonical_name(name) if name is not None else None, index, values))
    return saved


def _match(own: Sequence[tuple[str, int]], saved: Sequence[Saved]) -> list[Saved]:
    """The saved entry of each parameter: by name, else by position in its group with one warning."""
    by_name = {entry.name: entry for entry in saved if entry.name is not None}
    generic = all(name.startswith("param.") for name, _ in own)
    if len(by_name) == len(saved) and not generic:
        missing = [name for name, _ in own if name not in by_name]
        extra = sorted(set(by_name) - {name for name, _ in own})
        if missing or extra:
            raise ValueError(
                f"the state dict is of other parameters: it lacks {missing[:3]} and holds {extra[:3]} beside; load it "
                "into an optimizer of the same model"
            )
        theirs_of: dict[int, int] = {}  # their group of each of ours: the order of groups may differ, the sets may not
        for name, group in own:
            if theirs_of.setdefault(group, by_name[name].group) != by_name[name].group:
                raise ValueError(
                    f"parameter {name!r} is in another param group in the state dict: build with the same rules"
                )
        if len(set(theirs_of.values())) != len(theirs_of):
            raise ValueError(
                "the state dict keeps in one param group what is in several here: build with the same rules"
            )
        return [by_name[name] for name, _ in own]
    counts = [sum(group == g for _, group in own) for g in range(1 + max((g for _, g in own), default=0))]
    theirs = [sum(entry.group == g for entry in saved) for g in range(len(counts))]
    if counts != theirs:
        raise ValueError(f"the groups of the state dict hold {theirs} parameters and those of this optimizer {counts}")
    if not generic:
        warnings.warn(
            "the state dict names no parameters: its state is matched by position; if the order of the parameters has "
            "changed since, it is wrong",
            UserWarning,
            stacklevel=4,
        )
    return list(saved)


def _group_update(engine: Engine, index: int, saved: Mapping[str, Any]) -> dict[str, Any]:
    """What a saved group sets in ours, after checking that they are of one kind."""
    group, recipe = engine.groups[index], engine.recipes[index]
    theirs = saved.get("recipe", recipe.label)
    if theirs != recipe.label:
        raise ValueError(
            f"param group {index} was saved by {theirs!r} and is now {recipe.label!r}: build the same recipe"
        )
    revision = saved.get("revision", recipe.revision)
    if revision != recipe.revision:
        warnings.warn(
            f"{recipe.label} was at revision {revision} when the state was saved and is now at {recipe.revision}: its "
            "mathematics has changed, so the run will not continue exactly; see the changelog",
            UserWarning,
            stacklevel=4,
        )
    numbers = {name: item for _, name, item in engine.binder.declared(index)}
    missing = sorted(key for key in (*numbers, "nonfinite", "rounding", "peak_lr", "mode") if key not in saved)
    if missing and "recipe" in saved:
        warnings.warn(
            f"param group {index} of the state dict lacks {', '.join(missing)}: the values of this optimizer are kept",
            UserWarning,
            stacklevel=4,
        )
    for key, item in numbers.items():
        was = item.metadata.get("was") if "recipe" in saved else None  # a choice that is newer than the file
        then = saved.get(key, group[key] if was is None else was)
        if item.metadata["kind"] == "static" and then != group[key]:
            raise ValueError(
                f"{key} of param group {index} was {then!r} when the state was saved and is {group[key]!r} here: "
                "it chooses structure; build with the saved value"
            )
    decoupled = saved.get("decoupled_weight_decay")  # torch's name for what is called decay here
    known = decoupled is not None and "decay" in group and "recipe" not in saved
    if known and saved.get("weight_decay") and bool(decoupled) != (group["decay"] != "coupled"):
        raise ValueError(
            f"decoupled_weight_decay of param group {index} was {decoupled} when the state was saved and decay is "
            f"{group['decay']!r} here: build with decay={('decoupled' if decoupled else 'coupled')!r}, or a recipe "
            "that has it"
        )
    if saved.get("rounding", group["rounding"]) != group["rounding"]:
        raise ValueError(
            f"rounding of param group {index} was {saved['rounding']!r} when the state was saved and is "
            f"{group['rounding']!r} here; build with the saved value"
        )
    packed = saved.get("state_dtype", None if "recipe" in saved else group["state_dtype"])
    if packed != group["state_dtype"]:
        raise ValueError(
            f"state_dtype of param group {index} was {packed!r} when the state was saved and is "
            f"{group['state_dtype']!r} here; build with the saved value"
        )
    update = {key: value for key, value in saved.items() if key not in _BUILT}
    for source in engine.binder.sources(index):
        source.check(update)
    for key, value in update.items():
        if isinstance(group.get(key), tuple) and isinstance(value, list):
            update[key] = tuple(value)
        elif isinstance(value, Tensor):
            update[key] = value.clone()
    update["extra"] = dict(saved.get("extra", {}))
    return update
