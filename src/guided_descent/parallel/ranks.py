"""Ranks: who trains together, and what they must agree on in a step."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor
from torch import distributed as dist

#: Dtypes of gradients, by the number under which ranks tell each other of one; 0 is no gradient.
DTYPES = (None, torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.complex64, torch.complex128)


class Ranks:
    """A set of ranks and their process group.

    Args:
        members: Their global ranks, in order.
        group: The process group; ``None`` where there is one rank, which then sends nothing.
        device: Where messages lie.
    """

    def __init__(self, members: Sequence[int], group: Any, device: torch.device) -> None:
        self.members = tuple(members)
        self.group = group
        self.device = device
        self.here = dist.get_rank()
        self.place = self.members.index(self.here)

    def __len__(self) -> int:
        return len(self.members)

    def largest(self, numbers: Sequence[int]) -> list[int]:
        """The largest of all ranks, elementwise."""
        if len(self) == 1:
            return list(numbers)
        message = torch.tensor(numbers, dtype=torch.int32, device=self.device)
        dist.all_reduce(message, op=dist.ReduceOp.MAX, group=self.group)
        found: list[int] = message.tolist()
        return found

    def added(self, table: Tensor) -> Tensor:
        """The sum over all ranks, each element of which is one rank's own."""
        if len(self) > 1:
            message = table.to(self.device)
            dist.all_reduce(message, group=self.group)
            table = message.cpu()
        return table

    def tell(self, what: Any) -> list[Any]:
        """What every rank has to tell, in the order of the ranks."""
        if len(self) == 1:
            return [what]
        found: list[Any] = [None] * len(self)
        dist.all_gather_object(found, what, group=self.group)
        return found

    def agree(
        self, gradients: Sequence[Tensor | None], likes: Sequence[Tensor], finite: bool
    ) -> tuple[list[Tensor | None], bool]:
        """The gradients of this rank as all ranks will use them, and whether those of all ranks are finite.

        One message. A parameter that has a gradient somewhere has one everywhere: where there is none it counts as 0,
        which is what its part of the loss contributes.

        Args:
            gradients: The part of each gradient that lies here.
            likes: The part of each parameter that lies here.
            finite: Whether the gradients here are.
        """
        numbers = [0 if g is None else DTYPES.index(g.dtype) for g in gradients]
        *kinds, broken = self.largest([*numbers, int(not finite)])
        found = [
            torch.zeros_like(like, dtype=DTYPES[kind]) if g is None and kind else g
            for g, like, kind in zip(gradients, likes, kinds)
        ]
        return found, not broken


#: What a rank adds to global sums, by number of the part: the groups concerned, and the part's totals.
Sums: TypeAlias = Mapping[int, tuple[set[int], Mapping[str, Tensor]]]


def join(ranks: Ranks | None, mine: Sums) -> Sums:
    """What all ranks add, totals being added in the order of the ranks, so that they are equal everywhere to the bit.

    A rank's own where there are no others.
    """
    if ranks is None or len(ranks) == 1:
        return mine
    found: dict[int, tuple[set[int], dict[str, Tensor]]] = {}
    told = {k: (groups, {n: v.cpu() for n, v in total.items()}) for k, (groups, total) in mine.items()}
    for theirs in ranks.tell(told):
        for number, (groups, total) in theirs.items():
            into = found.setdefault(number, (set(), {}))
            into[0].update(groups)
            for name, value in total.items():
                into[1][name] = into[1][name] + value if name in into[1] else value
    return {k: (groups, {n: v.to(ranks.device) for n, v in total.items()}) for k, (groups, total) in found.items()}
