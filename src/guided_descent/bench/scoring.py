"""Scores: what a set of finished runs shows, how sure that is, and when no winner may be named.

Everything here works on plain numbers: a final metric per seed (lower is better, a diverged run is ``inf``). Arms are
compared on *paired* seeds: both arms start from the same weights and see the same batches, so the difference of their
logarithms removes most of the seed's own noise.
"""

from __future__ import annotations

import bisect
import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from scipy import stats

from guided_descent.bench.store import Goal

LEVEL = 0.95
MIN_SEEDS = 3  # fewer can name no winner
SURE_SEEDS = 5  # fewer are marked preliminary
BASELINES = ("adamw", "nadamw")

Outcome = Literal["better", "worse", "no difference", "undecided"]


@dataclass(frozen=True)
class Difference:
    """One arm against the baseline: ``ratio = exp(mean(log arm - log baseline))`` over seeds, with its interval.

    A ratio of 0.9 reads "10 % lower". ``low`` and ``high`` bound the ratio at the stated level; all three are ``inf``
    or ``nan`` where a diverged run or a metric of zero leaves no finite answer, and ``why`` then says which.
    """

    ratio: float
    low: float
    high: float
    n: int
    outcome: Outcome
    why: str = ""

    def of(self, goal: Goal) -> tuple[float, float, float]:
        """The difference of the metric itself and its interval, in percent of the baseline."""
        if goal == "min":
            return 100 * (self.ratio - 1), 100 * (self.low - 1), 100 * (self.high - 1)
        ratio, low, high = (math.inf if x == 0 else 1 / x for x in (self.ratio, self.high, self.low))
        return 100 * (ratio - 1), 100 * (low - 1), 100 * (high - 1)


def score(final: float | None, goal: Goal) -> float:
    """A final metric as a score where lower is better: itself, or its inverse for ``max``; ``inf`` for a diverged run.

    The inverse keeps what is judged, the paired difference of logarithms, and only turns its sign.

    Example:
        >>> score(2.5, "min"), score(0.5, "max"), score(None, "min")
        (2.5, 2.0, inf)
    """
    if final is None or not math.isfinite(final):
        return math.inf
    if goal == "min":
        return final
    return 1 / final if final > 0 else math.inf


def t_interval(values: Sequence[float], level: float = LEVEL) -> tuple[float, float, float]:
    """Mean and Student t interval of independent values: ``mean ± t(n-1) * sd / sqrt(n)``.

    Args:
        values: At least two finite numbers.
        level: Coverage, 0.95 by default.

    Returns:
        ``(mean, low, high)``.

    Example:
        >>> [round(x, 3) for x in t_interval([1.0, 2.0, 3.0])]
        [2.0, -0.484, 4.484]
    """
    n = len(values)
    if n < 2:
        raise ValueError(f"an interval needs at least 2 values, got {n}: run more seeds")
    mean = statistics.fmean(values)
    half = float(stats.t.ppf(0.5 + level / 2, n - 1)) * statistics.stdev(values) / math.sqrt(n)
    return mean, mean - half, mean + half


def paired_difference(arm: Mapping[int, float], base: Mapping[int, float], level: float = LEVEL) -> Difference:
    """Compare two arms on the seeds that both have.

    Args:
        arm: Final metric by seed, lower is better, ``inf`` for a diverged run.
        base: The same for the baseline.
        level: Coverage of the interval.

    Returns:
        "better" or "worse" where the interval of the mean log difference excludes zero, "no difference" where it holds
        zero, "undecided" where no interval exists (fewer than two common seeds, both diverged, metric not positive).

    Example:
        >>> paired_difference({0: 0.90, 1: 0.91, 2: 0.89}, {0: 1.0, 1: 1.01, 2: 0.99}).outcome
        'better'
        >>> paired_difference({0: 1.0, 1: 1.2}, {0: 1.1, 1: 1.1}).outcome
        'no difference'
    """
    seeds = sorted(set(arm) & set(base))
    n, nan = len(seeds), math.nan
    lost, base_lost = (sum(not math.isfinite(run[s]) for s in seeds) for run in (arm, base))
    if lost and base_lost:
        return Difference(nan, nan, nan, n, "undecided", "both diverged on some seeds")
    if lost:
        return Difference(math.inf, nan, math.inf, n, "worse", f"diverged on {lost} of {n} seeds")
    if base_lost:
        return Difference(0.0, 0.0, nan, n, "better", f"the baseline diverged on {base_lost} of {n} seeds")
    if any(run[s] <= 0 for run in (arm, base) for s in seeds):
        return Difference(nan, nan, nan, n, "undecided", "the metric reached 0, where a ratio has no meaning")
    logs = [math.log(arm[s]) - math.log(base[s]) for s in seeds]
    if n < 2:
        ratio = math.exp(logs[0]) if logs else nan
        return Difference(ratio, nan, nan, n, "undecided", "an interval needs at least 2 common seeds")
    mean, low, high = t_interval(logs, level)
    outcome: Outcome = "better" if high < 0 else "worse" if low > 0 else "no difference"
    return Difference(math.exp(mean), math.exp(low), math.exp(high), n, outcome)


def seeds_needed(arm: Mapping[int, float], base: Mapping[int, float], level: float = LEVEL) -> int | None:
    """Seeds at which the interval would be no wider than half of the difference seen now; None where none is finite.

    Example:
        >>> seeds_needed({0: 1.00, 1: 1.02, 2: 1.01}, {0: 1.1, 1: 1.1, 2: 1.1})
        4
    """
    if len(seeds := sorted(set(arm) & set(base))) < 2:
        return None
    try:
        logs = [math.log(arm[s]) - math.log(base[s]) for s in seeds]
    except ValueError:
        return None
    if not all(map(math.isfinite, logs)) or not (mean := statistics.fmean(logs)):
        return None
    spread = statistics.stdev(logs) / abs(mean)

    def enough(n: int) -> bool:
        return 4 * float(stats.t.ppf(0.5 + level / 2, n - 1)) * spread <= math.sqrt(n)

    choices = range(2, 100_000)
    place = bisect.bisect_left(choices, True, key=enough)
    return choices[place] if place < len(choices) else None


def steps_to_target(steps: Sequence[int], metric: Sequence[float], target: float) -> float:
    """The first evaluated step whose metric is at or below the target; ``inf`` if there is none.

    This is the *in-run* reading: the learning rate has not finished its decay there, so it is never a headline.

    Example:
        >>> steps_to_target([100, 200, 300], [3.0, 2.5, 2.4], 2.5)
        200.0
    """
    return next((float(s) for s, m in zip(steps, metric, strict=True) if m <= target), math.inf)


def mean_sd(values: Iterable[float]) -> tuple[float, float]:
    """Mean and sample standard deviation; ``(inf, nan)`` with a diverged run among them, sd ``nan`` for one value."""
    numbers = list(values)
    if not numbers:
        return math.nan, math.nan
    if not all(map(math.isfinite, numbers)):
        return math.inf, math.nan
    return statistics.fmean(numbers), statistics.stdev(numbers) if len(numbers) > 1 else math.nan


@dataclass(frozen=True)
class Budget:
    """How an arm's hyperparameters were found: the part of the protocol that must be equal for all arms.

    Attributes:
        source: "tuned", "defaults" (documented defaults, nothing tuned) or "hand" (typed in, history unknown).
        trials: Hyperparameter settings tried, 0 unless tuned.
        seeds: Seeds each trial was run with.
        edge: Where the best setting sits at an end of its grid, such as "high end of lr"; "" inside the grid.
        key: What else must match, for example the workload and the run length the tuning was made at.
    """

    source: Literal["tuned", "defaults", "hand"] = "defaults"
    trials: int = 0
    seeds: tuple[int, ...] = ()
    edge: str = ""
    key: str = ""

    def __str__(self) -> str:
        if self.source == "tuned":
            return f"{self.trials} trials x {len(self.seeds)} seeds"
        return "documented defaults" if self.source == "defaults" else "set by hand"


@dataclass(frozen=True)
class Contestant:
    """One arm as the judge sees it: its label, its optimizer, its final metric by seed and its tuning budget."""

    label: str
    optimizer: str
    finals: Mapping[int, float]
    budget: Budget = field(default_factory=Budget)

    @property
    def mean(self) -> float:
        """Mean final metric, ``inf`` with a diverged run, ``nan`` without runs."""
        return mean_sd(self.finals.values())[0]


def pick_baseline(arms: Sequence[Contestant]) -> Contestant | None:
    """The better of the AdamW and NAdamW arms by mean final metric; None if neither takes part."""
    candidates = [arm for arm in arms if arm.optimizer in BASELINES and not math.isnan(arm.mean)]
    return min(candidates, key=lambda arm: arm.mean, default=None)


@dataclass(frozen=True)
class Verdict:
    """The one sentence a comparison ends with, and what it rests on."""

    sentence: str
    winner: str | None
    baseline: str | None
    reasons: tuple[str, ...] = ()
    preliminary: bool = False
    level: float = LEVEL

    def to_dict(self) -> dict[str, Any]:
        """As plain JSON types."""
        return asdict(self) | {"reasons": list(self.reasons)}


def judge(
    arms: Sequence[Contestant],
    metric: str = "loss",
    goal: Goal = "min",
    differences: Sequence[str] = (),
    level: float = LEVEL,
) -> Verdict:
    """Name a winner, or say in one sentence why none may be named.

    A winner has the lowest mean and an interval of its paired log difference that excludes "equal" against *every*
    other arm. The intervals in this sentence are Bonferroni-adjusted for the number of arms it is compared with, so
    that among equal arms at most ``1 - level`` of comparisons name a winner; a table's own intervals are not adjusted.

    Refused: fewer than 3 common seeds, unequal tuning budgets, a best setting at an end of its grid, hand-set
    hyperparameters, no AdamW or NAdamW among the arms, arms that differ in more than their optimizer.

    Args:
        arms: The arms, with scores where lower is better (see ``score``).
        metric: The metric's name, for the sentence.
        goal: Which way the metric itself is better, for the sentence.
        differences: In what the arms differ besides the optimizer.
        level: Coverage over all comparisons of the sentence.
    """
    baseline = pick_baseline(arms)
    name = baseline.label if baseline else None
    common = set.intersection(*(set(arm.finals) for arm in arms)) if arms else set()
    n = len(common)
    reasons = refusals(arms, baseline, n)
    if differences:
        reasons.append(f"the arms differ in more than the optimizer ({'; '.join(differences)})")
    if reasons:
        text = "No winner is named: " + "; ".join(reasons) + "."
        return Verdict(text, None, name, tuple(reasons), n < SURE_SEEDS, level)
    assert baseline is not None
    adjusted = 1 - (1 - level) / (len(arms) - 1)
    finals = {arm.label: {seed: arm.finals[seed] for seed in common} for arm in arms}
    best = min(arms, key=lambda arm: mean_sd(finals[arm.label].values())[0])
    others = {
        arm.label: paired_difference(finals[best.label], finals[arm.label], adjusted) for arm in arms if arm is not best
    }
    level_with = [label for label, difference in others.items() if difference.outcome != "better"]
    where = "at documented defaults, with nothing tuned, " if baseline.budget.source == "defaults" else ""
    tail = f" ({n} seeds{', preliminary' if n < SURE_SEEDS else ''}; {100 * level:g} % over all comparisons)."
    winner = None
    if not level_with:
        winner, rival = (
            best.label,
            baseline.label if best is not baseline else min(others, key=lambda k: -others[k].ratio),
        )
        extreme = "lowest" if goal == "min" else "highest"
        text = f"{where}{winner} has the {extreme} {metric}: {_phrase(others[rival], rival, goal)}{tail}"
    elif len(level_with) == len(others):
        text = f"{where}no difference is shown between {_listing([best.label, *level_with])}{tail}"
    else:
        behind = [label for label in others if label not in level_with]
        text = (
            f"{where}no single winner: no difference is shown between {_listing([best.label, *level_with])}, "
            f"while {best.label} has a {'lower' if goal == 'min' else 'higher'} {metric} than {_listing(behind)}{tail}"
        )
    if level_with and best is not baseline and baseline.label in level_with:
        need = seeds_needed(finals[best.label], finals[baseline.label], level)
        if need and need > n:
            text += f" To measure a difference of the size seen, run about {need} seeds."
    return Verdict(text[0].upper() + text[1:] if where else text, winner, name, (), n < SURE_SEEDS, level)


def refusals(arms: Sequence[Contestant], baseline: Contestant | None, n: int) -> list[str]:
    """Why no winner may be named; empty if one may."""
    reasons = []
    if len(arms) < 2:
        reasons.append("a comparison needs at least two optimizers")
    if baseline is None:
        reasons.append("the baseline is missing, so add adamw or nadamw")
    if n < MIN_SEEDS:
        reasons.append(f"{n} common seed{'' if n == 1 else 's'}, at least {MIN_SEEDS} are needed")
    by_hand = [arm.label for arm in arms if arm.budget.source == "hand"]
    budgets = {(arm.budget.source, arm.budget.trials, arm.budget.seeds, arm.budget.key) for arm in arms}
    if by_hand:
        reasons.append(f"hyperparameters of {_listing(by_hand)} were set by hand, so equal tuning cannot be shown")
    elif len(budgets) > 1:
        each = ", ".join(f"{arm.label}: {arm.budget}" for arm in arms)
        reasons.append(f"tuning was unequal ({each})")
    if edges := [f"{arm.label} ({arm.budget.edge})" for arm in arms if arm.budget.edge]:
        reasons.append(f"the best setting is at an edge of its grid for {_listing(edges)}, so widen that grid")
    return reasons


def _phrase(difference: Difference, rival: str, goal: Goal) -> str:
    if difference.ratio == 0:
        return f"{rival} {difference.why.removeprefix('the baseline ')}"
    best, *ends = (abs(x) for x in difference.of(goal))
    side = "below" if goal == "min" else "above"
    return f"{best:.1f} % {side} {rival}, interval {min(ends):.1f} to {max(ends):.1f} %"


def _listing(names: Sequence[str]) -> str:
    return " and ".join([", ".join(names[:-1]), names[-1]]) if len(names) > 1 else "".join(names)
