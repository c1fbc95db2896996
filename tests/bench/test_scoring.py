"""Scores against hand-made numbers, scipy and simulation: intervals, baseline, refusals, calibration of A/A."""

from __future__ import annotations

import math
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from guided_descent.bench.scoring import (
    Budget,
    Contestant,
    judge,
    mean_sd,
    paired_difference,
    pick_baseline,
    score,
    seeds_needed,
    steps_to_target,
    t_interval,
)

TUNED = Budget("tuned", 6, (0, 1), key="lm-source/300")


def runs(rng: random.Random, n: int, level: float = 1.0, sd: float = 0.01, shared: dict[int, float] | None = None):
    """n seeds of a log-normal metric; ``shared`` adds the same seed effect to both arms, as paired runs have."""
    shared = shared or {}
    return {seed: level * math.exp(rng.gauss(0, sd) + shared.get(seed, 0.0)) for seed in range(n)}


def arm(label: str, finals: dict[int, float], budget: Budget = TUNED) -> Contestant:
    return Contestant(label, label.split(":")[0], finals, budget)


finite = st.floats(-50, 50).map(lambda x: round(x, 3))


@given(st.lists(finite, min_size=2, max_size=12).filter(lambda v: len(set(v)) > 1), st.sampled_from([0.5, 0.9, 0.95]))
def test_t_interval_is_scipys(values, level):
    mean, low, high = t_interval(values, level)
    expected = stats.ttest_1samp(values, 0.0).confidence_interval(level)
    assert low == pytest.approx(expected.low, rel=1e-9, abs=1e-9)
    assert high == pytest.approx(expected.high, rel=1e-9, abs=1e-9)
    assert mean == pytest.approx((low + high) / 2, rel=1e-9, abs=1e-9)


def test_t_interval_of_one_value_is_refused():
    with pytest.raises(ValueError, match="at least 2 values, got 1"):
        t_interval([1.0])


@given(st.lists(st.tuples(st.floats(0.1, 10), st.floats(0.1, 10)), min_size=2, max_size=8))
def test_swapping_the_arms_inverts_the_ratio(pairs):
    a = {seed: x for seed, (x, _) in enumerate(pairs)}
    b = {seed: y for seed, (_, y) in enumerate(pairs)}
    there, back = paired_difference(a, b), paired_difference(b, a)
    assert there.ratio == pytest.approx(1 / back.ratio)
    assert there.low == pytest.approx(1 / back.high)
    assert (there.outcome, back.outcome) in {
        ("better", "worse"),
        ("worse", "better"),
        ("no difference", "no difference"),
    }


def test_pairing_removes_the_noise_that_seeds_share():
    rng = random.Random(0)
    shared = {seed: rng.gauss(0, 0.2) for seed in range(5)}
    a, b = runs(rng, 5, 0.97, 0.002, shared), runs(rng, 5, 1.0, 0.002, shared)
    assert paired_difference(a, b).outcome == "better"
    unpaired = {seed: a[(seed + 1) % 5] for seed in a}
    assert paired_difference(unpaired, b).outcome == "no difference"


def test_only_common_seeds_count():
    difference = paired_difference({0: 0.9, 1: 0.91, 7: 99.0}, {0: 1.0, 1: 1.0, 8: 1e-9})
    assert difference.n == 2
    assert difference.ratio == pytest.approx(math.sqrt(0.9 * 0.91))


@pytest.mark.parametrize(
    ("a", "b", "outcome", "why"),
    [
        ({0: 1.0, 1: math.inf, 2: 1.0}, {0: 2.0, 1: 2.0, 2: 2.0}, "worse", "diverged on 1 of 3 seeds"),
        ({0: 2.0, 1: 2.0}, {0: 1.0, 1: math.nan}, "better", "the baseline diverged on 1 of 2"),
        ({0: math.inf, 1: 1.0}, {0: 1.0, 1: math.inf}, "undecided", "both diverged"),
        ({0: 0.0, 1: 1.0}, {0: 1.0, 1: 1.0}, "undecided", "reached 0"),
        ({0: 1.0}, {0: 2.0}, "undecided", "at least 2 common seeds"),
        ({0: 1.0}, {1: 2.0}, "undecided", "at least 2 common seeds"),
        ({0: 1.0, 1: 2.0}, {0: 1.0, 1: 2.0}, "no difference", ""),
    ],
)
def test_special_values(a, b, outcome, why):
    difference = paired_difference(a, b)
    assert difference.outcome == outcome
    assert why in difference.why


def test_a_diverged_run_is_infinite_in_the_mean():
    assert mean_sd([1.0, math.nan])[0] == math.inf
    assert mean_sd([1.0, 3.0]) == (2.0, pytest.approx(math.sqrt(2)))
    assert math.isnan(mean_sd([])[0])
    assert math.isnan(mean_sd([1.0])[1])


def test_steps_to_target_takes_the_first_evaluation_at_or_below():
    assert steps_to_target([10, 20, 30, 40], [3.0, 2.0, 2.5, 1.0], 2.0) == 20
    assert steps_to_target([10, 20], [3.0, 2.0], 1.9) == math.inf
    assert steps_to_target([10, 20], [3.0, math.nan], 1.9) == math.inf


def test_baseline_is_the_better_of_adamw_and_nadamw():
    arms = [arm("adamw", {0: 1.0, 1: 1.2}), arm("nadamw", {0: 1.0, 1: 1.1}), arm("muon", {0: 0.1, 1: 0.1})]
    assert pick_baseline(arms).label == "nadamw"
    assert pick_baseline([arms[2]]) is None
    diverged = [arm("adamw", {0: math.inf, 1: 1.0}), arm("nadamw", {0: 5.0, 1: 5.0})]
    assert pick_baseline(diverged).label == "nadamw"


@pytest.mark.parametrize("n", [3, 5, 10])
def test_equal_arms_are_called_equal_at_the_nominal_rate(n):
    rng, trials = random.Random(n), 2000
    named = sum(
        judge([arm("adamw", runs(rng, n)), arm("nadamw", runs(rng, n))]).winner is not None for _ in range(trials)
    )
    # 5 % with a binomial standard error of 0.5 points: calibrated means neither above nor far below.
    assert 0.035 * trials < named < 0.065 * trials


def test_of_100_a_a_comparisons_at_least_95_show_no_difference():
    rng = random.Random(1)
    verdicts = [judge([arm("adamw", runs(rng, 5)), arm("adamw:again", runs(rng, 5))]) for _ in range(100)]
    quiet = [verdict for verdict in verdicts if verdict.winner is None]
    assert len(quiet) >= 95
    assert all("no difference is shown between" in verdict.sentence for verdict in quiet)


def test_four_equal_arms_name_a_winner_in_at_most_5_percent():
    rng = random.Random(2)
    names = ("adamw", "nadamw", "muon", "soap")
    named = sum(judge([arm(name, runs(rng, 3)) for name in names]).winner is not None for _ in range(1000))
    assert named <= 60


def test_identical_runs_show_no_difference():
    finals = {0: 1.0, 1: 1.1, 2: 0.9}
    verdict = judge([arm("adamw", finals), arm("adamw:again", finals)])
    assert verdict.winner is None
    assert verdict.sentence.startswith("no difference is shown between")


def test_a_clear_winner_is_named_with_its_interval():
    rng = random.Random(3)
    arms = [arm(name, runs(rng, 10, level)) for name, level in (("adamw", 1.05), ("nadamw", 1.0), ("muon", 0.8))]
    verdict = judge(arms, "validation bits per byte")
    assert verdict.winner == "muon"
    assert verdict.baseline == "nadamw"
    assert not verdict.preliminary
    assert "muon has the lowest validation bits per byte" in verdict.sentence
    assert "below nadamw, interval" in verdict.sentence


def test_a_winning_baseline_is_compared_with_its_closest_rival():
    rng = random.Random(3)
    arms = [arm("adamw", runs(rng, 5, 0.7)), arm("muon", runs(rng, 5, 1.0)), arm("soap", runs(rng, 5, 0.9))]
    verdict = judge(arms)
    assert verdict.winner == "adamw"
    assert "below soap" in verdict.sentence


def test_two_good_arms_share_the_lead():
    rng = random.Random(4)
    arms = [arm("adamw", runs(rng, 5)), arm("muon", runs(rng, 5, 0.8)), arm("soap", runs(rng, 5, 0.8))]
    verdict = judge(arms)
    assert verdict.winner is None
    assert "no single winner" in verdict.sentence
    assert "has a lower loss than adamw" in verdict.sentence


def test_a_diverged_arm_loses_and_is_named():
    verdict = judge([arm("adamw", {0: 1.0, 1: 1.0, 2: 1.1}), arm("muon", {0: 0.5, 1: math.inf, 2: 0.5})])
    assert verdict.winner == "adamw"
    assert "muon diverged on 1 of 3 seeds" in verdict.sentence


def test_few_seeds_are_preliminary():
    rng = random.Random(5)
    arms = [arm("adamw", runs(rng, 4)), arm("muon", runs(rng, 4, 0.5))]
    assert judge(arms).preliminary
    assert "preliminary" in judge(arms).sentence


CLEAR = {0: 0.5, 1: 0.51, 2: 0.5}
EQUAL = {0: 1.0, 1: 1.01, 2: 1.0}


@pytest.mark.parametrize(
    ("arms", "reason"),
    [
        ([arm("adamw", {0: 1.0, 1: 1.0}), arm("muon", {0: 0.5, 1: 0.5})], "2 common seeds, at least 3 are needed"),
        ([arm("adamw", EQUAL), arm("muon", {7: 1.0, 8: 1.0, 9: 1.0})], "0 common seeds"),
        ([arm("adamw", EQUAL), arm("muon", CLEAR, Budget("tuned", 12, (0, 1), key="lm-source/300"))], "unequal"),
        ([arm("adamw", EQUAL), arm("muon", CLEAR, Budget("tuned", 6, (0, 1, 2), key="lm-source/300"))], "unequal"),
        ([arm("adamw", EQUAL), arm("muon", CLEAR, Budget("tuned", 6, (0, 1), key="lm-source/600"))], "unequal"),
        ([arm("adamw", EQUAL, Budget()), arm("muon", CLEAR)], "unequal"),
        ([arm("adamw", EQUAL), arm("muon", CLEAR, Budget("hand"))], "set by hand"),
        (
            [arm("adamw", EQUAL, Budget("tuned", 6, (0, 1), "high end of lr", "lm-source/300")), arm("muon", CLEAR)],
            "(high end",
        ),
        ([arm("soap", EQUAL), arm("muon", CLEAR)], "add adamw or nadamw"),
        ([arm("adamw", EQUAL)], "at least two optimizers"),
    ],
)
def test_a_winner_is_refused_in_one_sentence(arms, reason):
    verdict = judge(arms)
    assert verdict.winner is None
    assert reason in verdict.sentence
    assert verdict.sentence.startswith("No winner is named: ")
    assert verdict.sentence.count(". ") == 0


def test_untuned_defaults_are_equal_but_said():
    verdict = judge([arm("adamw", EQUAL, Budget()), arm("muon", CLEAR, Budget())])
    assert verdict.winner == "muon"
    assert verdict.sentence.startswith("At documented defaults, with nothing tuned, muon")


@given(st.floats(0.001, 0.2), st.floats(0.005, 0.3), st.integers(3, 8), st.integers(0, 10**6))
def test_seeds_needed_is_the_smallest_that_halves_the_interval(sd, effect, n, seed):
    rng = random.Random(seed)
    a, b = runs(rng, n, 1 - effect, sd), runs(rng, n, 1.0, sd)
    need = seeds_needed(a, b)
    logs = [math.log(a[s] / b[s]) for s in a]
    mean, spread = abs(sum(logs) / n), stats.tstd(logs)
    if need is None:
        assert spread / mean > 30
        return

    def width(k: int) -> float:
        return 2 * stats.t.ppf(0.975, k - 1) * spread / math.sqrt(k)

    assert width(need) <= mean / 2 * (1 + 1e-9)
    assert need == 2 or width(need - 1) > mean / 2 * (1 - 1e-9)


def test_a_metric_to_maximise_is_judged_the_same_and_worded_its_way():
    accuracy = {"adamw": {0: 0.90, 1: 0.91, 2: 0.92}, "muon": {0: 0.95, 1: 0.96, 2: 0.97}}
    arms = [arm(name, {seed: score(x, "max") for seed, x in runs.items()}) for name, runs in accuracy.items()]
    verdict = judge(arms, "accuracy", "max")
    assert verdict.winner == "muon"
    assert "muon has the highest accuracy: 5.5 % above adamw, interval" in verdict.sentence
    difference = paired_difference(arms[1].finals, arms[0].finals)
    mean, low, high = difference.of("max")
    assert low < mean < high
    assert 1 + mean / 100 == pytest.approx((0.95 * 0.96 * 0.97 / (0.90 * 0.91 * 0.92)) ** (1 / 3))


def test_scores():
    assert score(math.nan, "min") == score(None, "max") == score(0.0, "max") == math.inf


def test_arms_that_differ_in_more_than_the_optimizer_are_refused():
    verdict = judge([arm("adamw", EQUAL), arm("muon", CLEAR)], differences=["clip: 1.0 for adamw, None for muon"])
    assert verdict.winner is None
    assert "differ in more than the optimizer (clip: 1.0" in verdict.sentence
