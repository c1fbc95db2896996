"""The comparison on a small task with torch's own optimizers: fairness, resuming, refusals, and what it writes down."""

from __future__ import annotations

import dataclasses
import io
import json
import math

import pytest
import small
import torch
from rich.console import Console

import guided_descent
from guided_descent.bench import compare as module
from guided_descent.bench import tables
from guided_descent.bench.compare import (
    Arm,
    arms_for,
    build_document,
    compare,
    config_differences,
    load_comparison,
    main_lr,
    thin,
)
from guided_descent.bench.display import Display
from guided_descent.bench.files import BenchError
from guided_descent.bench.scoring import Budget, t_interval
from guided_descent.bench.store import OptimizerSpec, RunStore
from guided_descent.bench.timing import Timing
from guided_descent.bench.tuning import Space, Trials, Tuning

SEEDS = (100, 101, 102)


def arms(*names: str) -> list[Arm]:
    return arms_for([OptimizerSpec(name) for name in names], small.REF, 40)[0]


def run(out, chosen, *, seeds=SEEDS, workers=0, **kwargs):
    kwargs = {"timing_rounds": 1, "build": small.build, **kwargs}
    return compare(small.REF, chosen, seeds=seeds, steps=40, out=out, workers=workers, **kwargs)


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    out = tmp_path_factory.mktemp("done")
    return run(out, arms("adamw", "nadamw", "sgd"), command="guided-descent compare small:make"), out


def test_every_arm_and_seed_is_run_and_reported(done):
    comparison, out = done
    runs = RunStore(out).runs()
    assert {(run.config.optimizer.label, run.config.seed) for run in runs} == {
        (name, seed) for name in ("adamw", "nadamw", "sgd") for seed in SEEDS
    }
    for arm in comparison.document["arms"]:
        assert [run["seed"] for run in arm["runs"]] == list(SEEDS)
        for entry in arm["runs"]:
            assert entry["eval"]["step"] == [0, 10, 20, 30, 40]
            assert entry["train"]["step"] == list(range(1, 41))
            assert entry["final"] == entry["eval"]["value"][-1]
    assert not comparison.failed


def test_the_row_says_what_the_runs_say(done):
    comparison, out = done
    document = comparison.document
    finals = {
        name: [run.result.final for run in RunStore(out).runs() if run.config.optimizer.label == name]
        for name in ("adamw", "nadamw", "sgd")
    }
    assert document["baseline"] == min(("adamw", "nadamw"), key=lambda name: sum(finals[name]))
    base = finals[document["baseline"]]
    for arm in document["arms"]:
        row, label = arm["row"], arm["label"]
        assert row["final_mean"] == pytest.approx(sum(finals[label]) / 3)
        assert row["time_to_target"] is None or row["time_to_target"] == pytest.approx(
            row["steps_to_target"] * row["step_ms"] / 1000
        )
        assert 0 < row["optimizer_share"] < 1
        assert row["update_rms"] > 0
        assert arm["lr"] == pytest.approx(small.DEFAULT_LR[label])
        if label == document["baseline"]:
            assert row["difference"] is None
            continue
        mean, low, high = t_interval([math.log(a / b) for a, b in zip(finals[label], base, strict=True)])
        assert row["difference"]["percent"] == pytest.approx(100 * math.expm1(mean))
        assert row["difference"]["low"] == pytest.approx(100 * math.expm1(low))
        assert row["difference"]["high"] == pytest.approx(100 * math.expm1(high))
    state = {arm["label"]: arm["row"]["state_bytes_per_parameter"] for arm in document["arms"]}
    assert state["sgd"] == 0
    assert state["adamw"] == pytest.approx(8, abs=1)


def test_the_target_is_the_baselines_median_and_the_baseline_reaches_it(done):
    document = done[0].document
    base = next(arm for arm in document["arms"] if arm["label"] == document["baseline"])
    assert document["target"]["value"] == sorted(run["final"] for run in base["runs"])[1]
    assert base["row"]["steps_to_target"] == 40


def test_the_protocol_names_budget_machine_versions_and_date(done):
    document = done[0].document
    facts = dict(tables.protocol(document))
    assert facts["arms differ in"] == "the optimizer only"
    assert "preliminary" in facts["seeds"]
    assert facts["tuning budget"] == "documented defaults for each"
    assert "torch" in facts["versions"]
    assert document["created"][:4] in facts["date"]
    assert document["command"] == "guided-descent compare small:make"
    assert document["machine"]["cores"] >= 1


def test_the_table_has_every_number_the_protocol_asks_for(done):
    document = done[0].document
    titles = " ".join(column.title for column in tables.columns(document))
    for word in (
        "lr",
        "error",
        "vs",
        "steps to target",
        "time to target",
        "ms/step",
        "optimizer share",
        "state",
        "RMS",
    ):
        assert word in titles
    assert any("in-run" in column.meaning for column in tables.columns(document))
    assert len(list(tables.rows(document))) == 3
    order = [cells[0] for cells in tables.rows(document)]
    means = {arm["label"]: arm["row"]["final_mean"] for arm in document["arms"]}
    assert order == sorted(order, key=lambda label: means[label])
    assert tables.markdown(document).count("\n") == 4
    text = io.StringIO()
    Console(file=text, width=200).print(tables.rich_table(document))
    assert all(label in text.getvalue() for label in order)


def test_the_document_survives_the_file(done):
    comparison, out = done
    assert load_comparison(out) == comparison.document
    json.dumps(comparison.document, allow_nan=False)


def test_a_second_call_runs_nothing_again_and_agrees(done):
    comparison, out = done
    before = {path: path.stat().st_mtime_ns for path in out.rglob("result.json")}
    again = run(out, arms("adamw", "nadamw", "sgd"), timing_rounds=0)
    assert {path: path.stat().st_mtime_ns for path in out.rglob("result.json")} == before
    assert again.verdict == comparison.verdict
    run(out, arms("adamw", "nadamw", "sgd"), timing_rounds=0, seeds=(*SEEDS, 103))
    assert len(list(out.rglob("result.json"))) == len(before) + 3


def test_a_changed_setting_never_mixes_with_old_runs(tmp_path):
    run(tmp_path, arms("adamw"), seeds=(100,), timing_rounds=0)
    changed = [Arm(OptimizerSpec("adamw", {"lr": 0.5}), Budget("hand"))]
    with pytest.raises(BenchError, match=r"lr"):
        run(tmp_path, changed, seeds=(100,), timing_rounds=0)
    assert RunStore(tmp_path).runs()[0].config.optimizer.hyper == {}


def test_an_a_a_comparison_says_no_difference(tmp_path):
    comparison = run(tmp_path, arms("adamw", "adamw"), timing_rounds=0)
    labels = [arm["label"] for arm in comparison.document["arms"]]
    assert labels == ["adamw", "adamw (2)"]
    assert comparison.verdict.winner is None
    assert "no difference is shown between adamw and adamw (2)" in comparison.verdict.sentence
    one, two = ([entry["final"] for entry in arm["runs"]] for arm in comparison.document["arms"])
    assert one == two


def test_workers_give_the_same_numbers_as_this_process(done, tmp_path):
    text = io.StringIO()
    display = Display(Console(file=text, width=200))
    comparison = run(tmp_path, arms("adamw", "sgd"), workers=2, timing_rounds=0, display=display)
    here = {arm["label"]: [entry["final"] for entry in arm["runs"]] for arm in done[0].document["arms"]}
    for arm in comparison.document["arms"]:
        assert [entry["final"] for entry in arm["runs"]] == here[arm["label"]]
    assert "[6/6]" in text.getvalue()


def test_a_diverged_run_counts_as_infinite_and_fails_the_comparison(tmp_path):
    chosen = [*arms("adamw"), Arm(OptimizerSpec("sgd", {"lr": 1e30}, "wild"), Budget())]
    comparison = run(tmp_path, chosen)
    wild = comparison.document["arms"][1]
    assert comparison.failed
    assert {entry["status"] for entry in wild["runs"]} == {"diverged"}
    assert wild["row"]["final_mean"] is None
    assert wild["row"]["steps_to_target"] is None
    assert wild["row"]["difference"]["outcome"] == "worse"
    cells = next(cells for cells in tables.rows(comparison.document) if cells[0] == "wild")
    assert "∞ (diverged)" in cells
    assert "diverged on 3 of 3 seeds" in cells
    assert comparison.verdict.winner == "adamw"


def test_two_seeds_name_no_winner(tmp_path):
    comparison = run(tmp_path, arms("adamw", "sgd"), seeds=(100, 101), timing_rounds=0)
    assert comparison.verdict.winner is None
    assert "2 common seeds, at least 3 are needed" in comparison.verdict.sentence
    assert tables.columns(comparison.document)


def test_no_timing_pass_is_said(tmp_path):
    comparison = run(tmp_path, arms("adamw", "sgd"), timing_rounds=0)
    assert all("not timed" in cells for cells in tables.rows(comparison.document))


@pytest.mark.parametrize(("chosen", "seeds"), [([], SEEDS), (["adamw"], ()), (["adamw"], (100, 100))])
def test_impossible_requests_are_refused(tmp_path, chosen, seeds):
    with pytest.raises(BenchError):
        run(tmp_path, arms(*chosen), seeds=seeds)


def test_every_difference_besides_the_optimizer_is_found_and_blocks_the_verdict(done):
    _, out = done
    runs: dict = {}
    for entry in RunStore(out).runs():
        if entry.config.seed in SEEDS:
            runs.setdefault(entry.config.optimizer.label, []).append(entry)
    assert config_differences(runs) == ([], [])
    sgd = [
        dataclasses.replace(
            entry, config=dataclasses.replace(entry.config, clip=1.0, versions={**entry.config.versions, "torch": "0"})
        )
        for entry in runs["sgd"]
    ]
    found, mild = config_differences({**runs, "sgd": sgd})
    assert found == ["clip: None for adamw, 1.0 for sgd"]
    assert len(mild) == 1
    assert mild[0].startswith("versions: ")
    document, verdict = build_document(arms("adamw", "nadamw", "sgd"), {**runs, "sgd": sgd}, [None] * 3)
    assert verdict.winner is None
    assert "differ in more than the optimizer (clip: None for adamw, 1.0 for sgd)" in verdict.sentence
    assert document["differences"] == [*found, *mild]


def test_another_seeds_weights_are_no_difference(done):
    """Initial weights are compared within a seed only."""
    _, out = done
    runs = {
        label: [
            entry for entry in RunStore(out).runs() if entry.config.optimizer.label == label and entry.config.seed < 103
        ]
        for label in ("adamw", "sgd")
    }
    assert len({entry.config.init for entry in runs["adamw"]}) == 3
    assert config_differences(runs)[0] == []


def tuned(tmp_path, names, steps=40, extra=()) -> Tuning:
    optimizers = {}
    for name in names:
        trials = Trials(Space(small.DEFAULT_LR[name], "weight_decay", 0.0, (0.1,)))
        for lr in (0.01, 0.02, 0.04, *(extra if name == names[0] else ())):
            trials.scores[lr, 0.0] = {0: abs(lr - 0.02), 1: abs(lr - 0.02)}
        optimizers[name] = trials
    tuning = Tuning(small.REF, steps, "error", "min", "planted", (0, 1), optimizers)
    tuning.save(tmp_path / "small-make-40.json")
    return tuning


def test_hyperparameters_come_from_a_tuning_with_their_budget(tmp_path):
    chosen, notes = arms_for(
        [OptimizerSpec("adamw"), OptimizerSpec("sgd")], small.REF, 40, tuned(tmp_path, ["adamw", "sgd"])
    )
    assert [arm.spec.hyper for arm in chosen] == [{"lr": 0.02}, {"lr": 0.02}]
    assert {arm.budget.source for arm in chosen} == {"tuned"}
    assert notes == []
    with pytest.raises(BenchError, match="no tuning for 'nadamw'"):
        arms_for([OptimizerSpec("nadamw")], small.REF, 40, tuned(tmp_path, ["adamw"]))


def test_unequal_trials_name_no_winner(tmp_path):
    chosen, _ = arms_for(
        [OptimizerSpec("adamw"), OptimizerSpec("sgd")], small.REF, 40, tuned(tmp_path, ["adamw", "sgd"], extra=(0.03,))
    )
    comparison = run(tmp_path / "runs", chosen, timing_rounds=0)
    assert dict(tables.protocol(comparison.document))["hyperparameters"] == "adamw: lr=0.02; sgd: lr=0.02"
    assert comparison.verdict.winner is None
    assert "tuning was unequal (adamw: 4 trials x 2 seeds, sgd: 3 trials x 2 seeds)" in comparison.verdict.sentence


def test_hand_set_hyperparameters_are_marked(tmp_path):
    chosen, _ = arms_for([OptimizerSpec("adamw", {"lr": 0.02}), OptimizerSpec("sgd")], small.REF, 40)
    assert [arm.budget.source for arm in chosen] == ["hand", "defaults"]


def test_a_committed_tuning_is_used_only_if_it_covers_all(tmp_path, monkeypatch):
    tuned(tmp_path, ["adamw", "sgd"])
    monkeypatch.setattr(
        module, "committed", lambda problem, steps: tmp_path / f"{problem.replace(':', '-')}-{steps}.json"
    )
    specs = [OptimizerSpec("adamw"), OptimizerSpec("sgd")]
    assert {arm.budget.source for arm in arms_for(specs, small.REF, 40)[0]} == {"tuned"}
    assert {arm.budget.source for arm in arms_for(specs, small.REF, 40, search=False)[0]} == {"defaults"}
    assert {arm.budget.source for arm in arms_for(specs, small.REF, 80)[0]} == {"defaults"}
    chosen, notes = arms_for([*specs, OptimizerSpec("nadamw")], small.REF, 40)
    assert {arm.budget.source for arm in chosen} == {"defaults"}
    assert "lacks nadamw: all run at their documented defaults" in notes[0]


def test_a_tuning_for_another_length_is_noted(tmp_path):
    tuning = tuned(tmp_path, ["adamw"], steps=80)
    assert "80 steps" in arms_for([OptimizerSpec("adamw")], small.REF, 40, tuning)[1][0]


def test_curves_are_thinned_not_smoothed():
    points = [(i, i * i) for i in range(1000)]
    thinned = thin(points, 100)
    assert len(thinned) == 100
    assert thinned[0] == points[0]
    assert thinned[-1] == points[-1]
    assert set(thinned) <= set(points)
    assert thin(points, 2000) == points


def test_a_folder_without_a_comparison_says_how_to_make_one(tmp_path):
    with pytest.raises(BenchError, match="guided-descent compare --out"):
        load_comparison(tmp_path)
    (tmp_path / "comparison.json").write_text('{"format": 1}')
    with pytest.raises(BenchError, match="damaged, 'arms' is missing"):
        load_comparison(tmp_path)


def test_timing_of_every_arm_reaches_its_row(done):
    comparison, _ = done
    rows = [arm["row"] for arm in comparison.document["arms"]]
    assert all(row["step_ms"] > row["optimizer_ms"] > 0 for row in rows)
    assert isinstance(Timing(1.0, 0.5, 2.0, 0.1, 10).share, float)


def test_the_learning_rate_shown_is_the_methods_own():
    model = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.ReLU(), torch.nn.Linear(4, 2))
    assert main_lr(guided_descent.optimizer("muon", model, lr=0.05), "muon") == 0.05
    assert main_lr(torch.optim.SGD(model.parameters(), lr=0.1), "sgd") == 0.1
