"""The step itself. It and the decay are the only parts that write parameters, through ``x.w``."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from guided_descent.parts.base import Batch, Hyper, Part, State, key
from guided_descent.parts.rows import Number, Rows
from guided_descent.routing.roles import Block


def writable(x: Batch) -> Rows:
    """The parameters that a part in a writing slot may change; an error anywhere else."""
    if x.w is None:
        raise RuntimeError("parameters can be written only in the slots decay_before, step, decay_after and average")
    return x.w


@dataclass(frozen=True)
class Descend(Part):
    """The additive step: ``p <- p - lr u``."""

    slot: ClassVar[str] = "step"
    lr: str = key("lr")

    def update(self, x: Batch, s: State, h: Hyper, total: Mapping[str, Tensor]) -> None:
        """Subtract the direction, scaled."""
        x.add_to(writable(x), -(h[self.lr] * x.lr_scale * x.factor))

    def flops(self, block: Block) -> float:
        """Two per element."""
        return 2.0 * block.numel


@dataclass(frozen=True)
class StepRule(Part):
    """A step in the place of ``Descend``: added to a recipe, it applies the recipe's direction in another way.

    A rule takes ``x.factor``, the scalar that is still to be applied to the direction, as a part of the learning rate,
    and may overwrite the direction: nothing comes after it but decay.
    """

    slot: ClassVar[str] = "step"
    replaces: ClassVar[frozenset[str]] = frozenset({"step"})
    lr: str = key("lr")

    def among(self, parts: tuple[Part, ...]) -> tuple[Part, ...]:
        """All parts but those in the slots that it replaces.

        Raises:
            ValueError: The recipe's step is no ``Descend``: its direction holds the learning rate already.
        """
        for part in parts:
            if part.where == "step" and not isinstance(part, Descend | StepRule):
                raise ValueError(
                    f"{type(self).__name__} takes the place of a step p - lr u, and this recipe steps with "
                    f"{type(part).__name__}, whose direction holds the learning rate: choose another form of the recipe"
                )
        return tuple(part for part in parts if part.where not in self.replaces)

    def rate(self, x: Batch, h: Hyper) -> Number:
        """The learning rate of the direction."""
        rate: Number = h[self.lr] * x.lr_scale * x.factor
        return rate


@dataclass(frozen=True)
class Displace(Part):
    """The step of a direction that holds its learning rate: ``p <- p - u``."""

    slot: ClassVar[str] = "step"

    def update(self, x: Batch, s: State, h: Hyper, total: Mapping[str, Tensor]) -> None:
        """Subtract the direction."""
        writable(x).add_(x.u, alpha=-x.factor)

    def flops(self, block: Block) -> float:
        """Two per element."""
        return 2.0 * block.numel
