"""The study of branches in small: a branch has the weights of its own full run, and the saving is that of the plan."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "branching.py"


@pytest.fixture(scope="module")
def branching():
    spec = importlib.util.spec_from_file_location("branching", SCRIPT)
    module = sys.modules["branching"] = importlib.util.module_from_spec(spec)  # dataclasses look themselves up there
    spec.loader.exec_module(module)
    return module


def test_in_small(branching, tmp_path):
    out = tmp_path / "results" / "branching.json"
    small = ["--problem", "mlp-digits", "--horizons", "30", "20", "45", "--seeds", "0", "1", "--warmup", "5"]
    branching.main([*small, "--out", str(out)])
    document = json.loads(out.read_text())
    assert document["command"].startswith("python benchmarks/branching.py --problem mlp-digits")
    assert document["steps"] == {"branched": 36 + 6 + 4 + 9, "full": 95, "saving": pytest.approx(1 - 55 / 95)}
    assert [row["horizon"] for row in document["rows"]] == [30, 20, 45]
    assert [row["cooldown_from"] for row in document["rows"]] == [24, 16, 36]
    for row in document["rows"]:
        assert row["same_weights"]
        assert row["finals"]["branch"] == row["finals"]["wsd"] != row["finals"]["cosine"]
        assert set(row["finals"]["wsd"]) == {"0", "1"}
        assert row["to_wsd_percent"][0] == pytest.approx(0, abs=1e-9)
        assert row["noise_percent"] > 0
    losses = {row["horizon"]: sum(row["finals"]["wsd"].values()) for row in document["rows"]}
    assert losses[45] < losses[30] < losses[20]


def test_a_cooldown_within_the_warmup_is_refused(branching):
    with pytest.raises(SystemExit, match="would begin within the warmup of 30 steps"):
        branching.Plan(horizons=(20, 300))


def test_the_saving_of_the_study(branching):
    assert branching.Plan().steps() == {"branched": 960 + 60 + 120 + 240, "full": 2100, "saving": 1 - 1380 / 2100}
