"""What a batch size asks of the learning rate, and the batch size beyond which more samples no longer save steps."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

BatchRule = Literal["linear", "sqrt", "noise", "surge"]


def batch_factor(batch: float, base: float, rule: BatchRule, noise_scale: float | None = None) -> float:
    """What the learning rate that was right at batch size ``base`` is to be multiplied by at ``batch``.

    - ``linear``: ``batch / base``, for SGD below the noise scale (Goyal et al. 2017, 1706.02677);
    - ``sqrt``: its root, for Adam and its like (Malladi et al. 2022, 2205.10287, who also move the betas and eps);
    - ``noise``: ``f(batch) / f(base)`` with ``f(B) = 1 / (1 + B_noise / B)``: linear below the noise scale, constant
      above it, for SGD (McCandlish et al. 2018, 1812.06162);
    - ``surge``: ``f(B) = 2 / (sqrt(B_noise / B) + sqrt(B / B_noise))``: the root below the noise scale, falling above
      it, for Adam (Li et al. 2024, 2405.14578).

    Args:
        batch: The new batch size, in samples.
        base: The one at which the learning rate was found.
        rule: See above.
        noise_scale: ``B_noise`` in samples, which ``noise`` and ``surge`` need.

    Raises:
        ValueError: A size is not positive, the rule is unknown, or it lacks a noise scale.

    Example:
        >>> batch_factor(256, 64, "linear"), batch_factor(256, 64, "sqrt")
        (4.0, 2.0)
        >>> round(batch_factor(10_000, 64, "noise", noise_scale=64.0), 2)
        1.99
    """
    if not (batch > 0 and base > 0):
        raise ValueError(f"batch={batch!r}, base={base!r}: both must be positive numbers of samples")
    if rule not in get_args(BatchRule):
        raise ValueError(f"rule={rule!r} must be one of {', '.join(map(repr, get_args(BatchRule)))}")
    if rule in ("linear", "sqrt"):
        return batch / base if rule == "linear" else math.sqrt(batch / base)
    if noise_scale is None or not noise_scale > 0:
        raise ValueError(
            f"rule={rule!r} needs noise_scale, a positive number of samples, and got {noise_scale!r}: measure it with "
            "NoiseScale, or use 'linear' or 'sqrt'"
        )
    b, reference = batch / noise_scale, base / noise_scale
    if rule == "noise":
        return (b / (1 + b)) / (reference / (1 + reference))
    return (math.sqrt(reference) + 1 / math.sqrt(reference)) / (math.sqrt(b) + 1 / math.sqrt(b))


@dataclass(frozen=True)
class CriticalBatch:
    """The trade between steps and samples: ``(S / S_min - 1)(E / E_min - 1) = 1``.

    Attributes:
        steps: ``S_min``, the steps that no batch size goes below.
        samples: ``E_min``, the samples that no batch size gets by with fewer of.
    """

    steps: float
    samples: float

    @property
    def size(self) -> float:
        """``B_crit = E_min / S_min``: here a run takes twice the fewest steps and twice the fewest samples."""
        return self.samples / self.steps

    def steps_at(self, batch: float) -> float:
        """Steps to the target at a batch size, ``S_min (1 + B_crit / B)``."""
        return self.steps * (1 + self.size / batch)


def fit_critical_batch(batches: Sequence[float], steps: Sequence[float]) -> CriticalBatch:
    """The critical batch size from the steps that runs of several batch sizes took to one target, each well tuned.

    ``S(B) = S_min + E_min / B`` is linear in ``1 / B``; the fit minimises the relative errors of S. (McCandlish et al.
    2018, 1812.06162, section 2.3.)

    Args:
        batches: Batch sizes, in samples; two at least that differ.
        steps: Steps to the target at each.

    Raises:
        ValueError: The lengths differ, a number is not positive, fewer than two sizes differ, or the steps do not fall
            as batches grow, so that no such curve goes through them.

    Example:
        >>> found = fit_critical_batch([16, 64, 256, 1024], [7000, 2500, 1375, 1093.75])
        >>> round(found.size), round(found.steps)
        (96, 1000)
    """
    if len(batches) != len(steps) or len(set(batches)) < 2:
        raise ValueError(f"{len(batches)} batches and {len(steps)} steps: give one of each, for two sizes at least")
    if not all(value > 0 and math.isfinite(value) for value in (*batches, *steps)):
        raise ValueError(f"batches={list(batches)}, steps={list(steps)}: all must be positive numbers")
    # least squares on (S_min + E_min / B) / S = 1
    rows = [(1 / s, 1 / (b * s)) for b, s in zip(batches, steps)]
    aa, ab, bb = (sum(r[i] * r[j] for r in rows) for i, j in ((0, 0), (0, 1), (1, 1)))
    a1, b1 = sum(r[0] for r in rows), sum(r[1] for r in rows)
    det = aa * bb - ab * ab
    found = CriticalBatch((a1 * bb - b1 * ab) / det, (b1 * aa - a1 * ab) / det)
    if found.steps <= 0 or found.samples <= 0:
        raise ValueError(
            f"the fit gives S_min = {found.steps:.4g} and E_min = {found.samples:.4g}: steps must fall as batches "
            "grow, by less than in proportion; look at the runs, or take batch sizes further apart"
        )
    return found
