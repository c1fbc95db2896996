"""The ballot before a step: parts that may refuse it are asked while nothing has changed yet, and remember it after."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from guided_descent.engine.policies import PATIENCE, RefusedError
from guided_descent.parallel.ranks import Ranks, join
from guided_descent.parts.base import Part, Parts

log = logging.getLogger("guided_descent")


class Ballot:
    """What the parts that gauge the raw gradients have found, and what they say to it.

    Args:
        groups: The param groups.
        uses: Groups and parts of all blocks; the groups that have a part are asked, and remember alike.
    """

    def __init__(self, groups: Sequence[Mapping[str, Any]], uses: Sequence[tuple[int, Parts]]) -> None:
        self.groups = groups
        self._totals: dict[Part, dict[str, Tensor]] = {}
        self._places: dict[Part, list[int]] = {}
        for group, parts in uses:
            for part in (part for part in parts if part.gauges):
                if group not in self._places.setdefault(part, []):
                    self._places[part].append(group)

    def __bool__(self) -> bool:
        return bool(self._places)

    def add(self, part: Part, values: Mapping[str, Tensor], counts: bool = True) -> None:
        """Add what a part has found in some rows, unless another rank does."""
        total = self._totals.setdefault(part, {})
        for name, value in values.items() if counts else ():
            total[name] = total[name] + value if name in total else value

    def join(self, ranks: Ranks | None) -> None:
        """Add what the parts of all ranks have found."""
        order = list(self._places)
        mine = {order.index(part): (set(self._places[part]), total) for part, total in self._totals.items()}
        self._totals = {order[number]: dict(total) for number, (_, total) in join(ranks, mine).items()}

    def refusal(self) -> RuntimeError | None:
        """The error that stands for a refused step, raised where many follow each other; ``None`` if all accept."""
        for part, total in self._totals.items():
            for group in (self.groups[i] for i in self._places[part]):
                why = part.refuses(total, group["extra"], group)
                if why:
                    log.warning("step %d is left out: %s", group["steps"] + 1, why)
                    return RefusedError(
                        f"{PATIENCE} steps in a row were left out, now by {type(part).__name__}: {why}. Training "
                        "stands still; look at the loss and the data, or let the part allow more"
                    )
        return None

    def remember(self) -> None:
        """Let the parts take an accepted step into their state."""
        for part, total in self._totals.items():
            for group in (self.groups[i] for i in self._places[part]):
                part.combine(total, group["extra"], group)
