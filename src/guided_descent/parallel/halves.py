"""Two halves of an update: what needs whole blocks, and what any part of a tensor can do for itself.

Where blocks are whole at their owners alone, the owner runs the first half and hands its direction out; the second
half writes the parameters where they lie. Where a writing part needs the whole block, the first half goes up to it and
hands out what the parameters have become.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from guided_descent.parts.base import WRITERS, Batch, Hyper, Part, Parts, State
from guided_descent.parts.step import writable


@dataclass(frozen=True)
class HandOut(Part):
    """The end of the first half: the direction, with its factor, is what the owner hands out."""

    slot: ClassVar[str] = "step"

    def update(self, x: Batch, s: State, h: Hyper, total: Mapping[str, Tensor]) -> None:
        """Write it into the buffer that takes the place of the parameter."""
        writable(x).copy_(x.u).mul_(x.factor)


@dataclass(frozen=True)
class TakeOver(Part):
    """The beginning of the second half where whole parameters come from the owner: they are what has come."""

    slot: ClassVar[str] = "decay_before"

    def update(self, x: Batch, s: State, h: Hyper, total: Mapping[str, Tensor]) -> None:
        """Write them."""
        writable(x).copy_(x.u)


@dataclass(frozen=True)
class Halves:
    """The parts of a block, divided.

    Attributes:
        first: Run by the owner on the whole block.
        second: Run by every rank on what lies there.
        whole: Whether the owner hands out parameters, and not directions.
    """

    first: Parts
    second: Parts
    whole: bool

    def reads(self, h: Hyper) -> bool:
        """Whether the owner needs the parameter, at these numbers."""
        return self.whole or any(part.reads_parameter and not part.idle(h) for part in self.first)


def halve(parts: Parts) -> Halves:
    """Divide the parts of a block whose update needs all of it.

    Example:
        >>> from guided_descent.parts import Decoupled, Descend, Polar
        >>> halves = halve(Parts(Polar(), Decoupled(), Descend()))
        >>> [type(part).__name__ for part in halves.first], [type(part).__name__ for part in halves.second]
        (['Polar', 'HandOut'], ['Decoupled', 'Descend'])
    """
    every = list(parts)
    writers = [i for i, part in enumerate(every) if part.where in WRITERS]
    bound = [i for i in writers if every[i].unit != "element"]
    if not bound:
        border = writers[0] if writers else len(every)
        return Halves(Parts(*every[:border], HandOut()), Parts(*every[border:]), False)
    border = bound[-1] + 1
    return Halves(Parts(*every[:border]), Parts(TakeOver(), *every[border:]), True)
