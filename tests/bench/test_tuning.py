"""Tuning: equal budgets whatever the landscape, edges, extensions, the file, and resuming."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
import small
from hypothesis import given
from hypothesis import strategies as st

from guided_descent.bench.files import BenchError
from guided_descent.bench.store import RunStore
from guided_descent.bench.tuning import (
    AUX_FACTORS,
    FACTORS,
    Space,
    Trials,
    Tuning,
    committed,
    space_of,
    stages,
    tune,
)

PLAIN = Space(1e-3, "weight_decay", 0.01, (0.0, 0.03, 0.1, 0.3))
HYBRID = Space(0.02, "aux.lr", 3e-4, tuple(3e-4 * f for f in AUX_FACTORS))


def search(spaces: dict[str, Space], landscape) -> dict[str, Trials]:
    """Run the stages on a function of (name, lr, knob) instead of trainings."""
    found = {name: Trials(space) for name, space in spaces.items()}
    for stage in stages(found):
        assert len({len(points) for points in stage.values()}) == 1
        for name, points in stage.items():
            for point in points:
                assert point not in found[name].scores, "a trial was spent on a known point"
                found[name].scores[point] = {0: landscape(name, *point), 1: landscape(name, *point)}
    return found


def bowl(lr: float, best: float) -> float:
    return 1 + math.log2(lr / best) ** 2


def test_a_bracketed_optimum_costs_twelve_trials_and_is_found():
    found = search({"adamw": PLAIN}, lambda name, lr, wd: bowl(lr, 2e-3) + abs(wd - 0.1))
    assert found["adamw"].best == (2e-3, 0.1)
    assert found["adamw"].edge == ""
    assert len(found["adamw"].scores) == 12


def test_the_auxiliary_rate_of_a_hybrid_is_found():
    found = search({"muon": HYBRID}, lambda name, lr, aux: bowl(lr, 0.04) + bowl(aux, 5e-3))
    assert found["muon"].best == (0.04, 3e-4 * 16)
    assert found["muon"].hyper == {"lr": 0.04, "aux": {"lr": 3e-4 * 16}}


def test_the_rate_is_searched_again_after_the_knob_moved():
    """The best rate at the default knob is not the best at the best knob: the last stage must find that."""
    found = search({"muon": HYBRID}, lambda name, lr, aux: bowl(lr, 0.08 if aux == 3e-4 else 0.04) + bowl(aux, 5e-3))
    assert found["muon"].best == (0.04, 3e-4 * 16)


def test_an_edge_extends_every_optimizer_alike():
    spaces = {"far": PLAIN, "near": PLAIN}
    found = search(spaces, lambda name, lr, wd: bowl(lr, 16e-3 if name == "far" else 1e-3) + abs(wd - 0.1))
    assert {len(trials.scores) for trials in found.values()} == {13}
    assert found["far"].best == (16e-3, 0.1)
    assert found["far"].edge == ""
    assert (found["near"].best, found["near"].edge) == ((1e-3, 0.1), "")


@pytest.mark.parametrize(
    ("landscape", "edge"),
    [
        (lambda name, lr, wd: 1 / lr + wd, "high end of lr"),
        (lambda name, lr, wd: lr + wd, "low end of lr"),
        (lambda name, lr, wd: bowl(lr, 2e-3) - wd, "high end of weight_decay"),
        (lambda name, lr, wd: bowl(lr, 2e-3) + wd, ""),  # no decay at all is no edge
        (lambda name, lr, wd: math.inf, "low end of lr"),
    ],
)
def test_two_extensions_are_the_most_and_the_edge_is_told(landscape, edge):
    trials = search({"adamw": PLAIN}, landscape)["adamw"]
    assert trials.edge == edge
    assert len(trials.scores) == (14 if edge else 12)


def test_the_low_end_of_an_auxiliary_rate_is_an_edge():
    trials = search({"muon": HYBRID}, lambda name, lr, aux: bowl(lr, 0.02) + aux)["muon"]
    assert trials.edge == "low end of aux.lr"
    assert trials.best[1] == pytest.approx(3e-4 / 4)


@given(st.integers(0, 10**6))
def test_budgets_stay_equal_on_any_landscape(seed):
    def rough(name: str, lr: float, knob: float) -> float:
        value = hash((seed, name, round(lr, 12), round(knob, 12))) % 1000
        return math.inf if value < 100 else float(value)

    found = search({"a": PLAIN, "b": PLAIN, "c": HYBRID}, rough)
    assert len({len(trials.scores) for trials in found.values()}) == 1
    assert 12 <= len(found["a"].scores) <= 14


def test_spaces_of_registered_optimizers():
    plain, hybrid = space_of("adamw"), space_of("muon")
    assert plain.knob == "weight_decay"
    assert plain.default not in plain.values
    assert hybrid.knob == "aux.lr"
    assert len({len(space_of(name).values) for name in ("adamw", "nadamw", "muon", "soap", "sgd")}) == 1
    assert plain.hyper((plain.lr, plain.default)) == {"lr": plain.lr}


def test_a_bound_on_the_step_moves_with_the_square_of_the_rate():
    space = space_of("kfac")
    assert space.kl_clip == 1e-3
    assert "kl_clip" not in space.hyper((space.lr, space.default))
    hyper = space.hyper((4 * space.lr, space.default))
    assert hyper["kl_clip"] == pytest.approx(16e-3)
    assert space_of("foof").kl_clip is None
    assert "kl_clip" not in space_of("foof").hyper((1.0, 0.3))


def test_a_space_may_have_its_own_length_and_fixed_numbers(tmp_path):
    both = spaces()
    both["sgd"] = replace(both["sgd"], steps=4, fixed={"momentum": 0.5})
    found = tune(small.REF, both, steps=8, out=tmp_path, workers=0, build=small.build)
    runs = RunStore(tmp_path).runs()
    lengths = {(run.config.optimizer.name, run.config.steps) for run in runs}
    assert lengths == {("adamw", 8), ("sgd", 4)}
    assert all(run.config.optimizer.hyper["momentum"] == 0.5 for run in runs if run.config.optimizer.name == "sgd")
    assert Tuning.load(tmp_path / "tuning.json").spec("sgd")[0].hyper == found.optimizers["sgd"].hyper
    assert found.optimizers["sgd"].hyper["momentum"] == 0.5


def spaces() -> dict[str, Space]:
    return {
        name: Space(small.DEFAULT_LR[name], "weight_decay", 0.01, (0.0, 0.03, 0.1, 0.3)) for name in ("adamw", "sgd")
    }


def run(out: Path, **kwargs) -> Tuning:
    return tune(small.REF, spaces(), steps=8, out=out, workers=0, build=small.build, **kwargs)


def test_tuning_trains_saves_and_resumes(tmp_path):
    first = run(tmp_path, facts={"command": "guided-descent tune small:make"})
    trials = first.optimizers["adamw"]
    assert len(trials.scores) == len(first.optimizers["sgd"].scores)
    assert all(set(scores) == {0, 1} for scores in trials.scores.values())
    assert {lr for lr, knob in trials.scores if knob == 0.01} >= {1e-2 * factor for factor in FACTORS}
    runs = RunStore(tmp_path).runs()
    assert len(runs) == 2 * 2 * len(trials.scores)
    by_label = {run.config.optimizer.label: run for run in runs if run.config.seed == 0}
    best = by_label["adamw lr=0.01"]
    assert trials.scores[(1e-2, 0.01)][0] == best.result.final

    written = {run.path: (run.path / "result.json").stat().st_mtime_ns for run in runs}
    again = run(tmp_path)
    assert again.optimizers == first.optimizers
    assert {path: (path / "result.json").stat().st_mtime_ns for path in written} == written

    loaded = Tuning.load(tmp_path / "tuning.json")
    assert loaded.optimizers == first.optimizers
    spec, budget = loaded.spec("sgd")
    assert spec.hyper == first.optimizers["sgd"].hyper
    assert (budget.trials, budget.seeds, budget.source) == (len(trials.scores), (0, 1), "tuned")
    with pytest.raises(BenchError, match=r"no tuning for 'lion'.*tuned there: adamw, sgd"):
        loaded.spec("lion")


def test_the_file_records_what_was_done(tmp_path):
    run(tmp_path, facts={"command": "guided-descent tune small:make"})
    data = json.loads((tmp_path / "tuning.json").read_text())
    assert data["command"] == "guided-descent tune small:make"
    assert data["seeds"] == [0, 1]
    assert data["steps"] == 8
    assert {"created", "machine", "versions", "rules"} <= set(data)
    entry = data["optimizers"]["adamw"]
    assert set(entry) == {"chosen", "edge", "space", "trials"}
    best = min(entry["trials"], key=lambda trial: trial["mean"])
    assert entry["chosen"]["lr"] == best["lr"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "damaged, not JSON"),
        ('{"format": 1}', "damaged or no tuning"),
        ('{"format": 1, "optimizers": {"adamw": {}}}', "damaged or no tuning"),
        ('{"format": 99}', "newer"),
    ],
)
def test_a_bad_file_is_refused(tmp_path, text, message):
    path = tmp_path / "tuning.json"
    path.write_text(text)
    with pytest.raises(BenchError, match=message):
        Tuning.load(path)


def test_nothing_to_tune_is_refused(tmp_path):
    with pytest.raises(BenchError, match="at least one optimizer"):
        tune(small.REF, {}, steps=8, out=tmp_path)
    odd = {"a": PLAIN, "b": Space(1.0, "weight_decay", 0.0, (0.1,))}
    with pytest.raises(BenchError, match="different numbers"):
        tune(small.REF, odd, steps=8, out=tmp_path)


def test_every_committed_tuning_loads_and_is_equal_and_inside_its_grid():
    files = sorted(committed("x", 1).parent.glob("*.json"))
    for path in files:
        tuning = Tuning.load(path)
        assert path == committed(tuning.problem, tuning.steps)
        assert len({len(trials.scores) for trials in tuning.optimizers.values()}) == 1
        assert "command" in tuning.facts
        assert not [name for name, trials in tuning.optimizers.items() if trials.edge]
