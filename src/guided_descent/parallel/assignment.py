"""The assignment: which rank owns which block, from names, shapes and costs alone: every rank finds the same."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Cost:
    """What a block costs its owner.

    Attributes:
        key: The block.
        flops: Of its share of a step, refreshes at their share.
        size: Bytes of its state.
        among: The ranks that may own it.
    """

    key: str
    flops: float
    size: int
    among: tuple[int, ...]


def balance(costs: Iterable[Cost], kept: Mapping[str, int]) -> dict[str, int]:
    """Owners by block: dearest first, each to the rank that has least to do, ties by bytes and then by rank.

    Args:
        costs: The blocks.
        kept: Owners that stay, since the state lies there.

    Example:
        >>> balance([Cost("a", 3, 1, (0, 1)), Cost("b", 2, 1, (0, 1)), Cost("c", 2, 1, (0, 1))], {})
        {'a': 0, 'b': 1, 'c': 1}
    """
    load: dict[int, list[float]] = {}
    found: dict[str, int] = {}

    def give(cost: Cost, rank: int) -> None:
        found[cost.key] = rank
        load[rank][0] += cost.flops
        load[rank][1] += cost.size

    costs = list(costs)
    for cost in costs:
        load |= {rank: load.get(rank, [0.0, 0.0]) for rank in cost.among}
        if kept.get(cost.key) in cost.among:
            give(cost, kept[cost.key])
    free = [cost for cost in costs if cost.key not in found]
    for cost in sorted(free, key=lambda cost: (-len(cost.among), cost.among, -cost.flops, -cost.size, cost.key)):
        give(cost, min(cost.among, key=lambda rank: (*load[rank], rank)))
    return found


@dataclass(frozen=True)
class Share:
    """One block of an assignment, and its owner."""

    block: str
    owner: int
    flops: float
    state_bytes: int


@dataclass(frozen=True)
class Assignment:
    """Who owns which block, and what that costs: text with ``str()``.

    Attributes:
        ranks: All ranks that train together.
        shares: The blocks that are whole at their owners.
        bytes_sent: Bytes that each rank sends to others in a step in which every parameter has a gradient: gradients
            and, where they are read, parameters to the owners, and directions back. Messages of a few numbers, by which
            ranks agree, are left out.
    """

    ranks: tuple[int, ...]
    shares: tuple[Share, ...]
    bytes_sent: Mapping[int, int]

    @property
    def flops(self) -> dict[int, float]:
        """FLOPs of a step by rank, of what is owned."""
        found = dict.fromkeys(self.ranks, 0.0)
        for share in self.shares:
            found[share.owner] += share.flops
        return found

    @property
    def imbalance(self) -> float:
        """The largest FLOPs of a rank over their mean; 1 where nothing is owned."""
        flops = self.flops.values()
        return max(flops) * len(flops) / sum(flops) if sum(flops) else 1.0

    def __str__(self) -> str:
        lines = []
        for rank in self.ranks:
            own = [share for share in self.shares if share.owner == rank]
            lines.append(
                f"rank {rank}: owns {len(own)} blocks, {self.flops[rank] / 1e6:.4g} MFLOP a step, "
                f"{sum(share.state_bytes for share in own):,} bytes of their state, sends "
                f"{self.bytes_sent.get(rank, 0):,} bytes a step"
            )
        return "\n".join([*lines, f"largest share of the FLOPs over the mean: {self.imbalance:.2f}"])
