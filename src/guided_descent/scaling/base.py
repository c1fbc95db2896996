"""What a parametrization is: numbers from a model for the blocks that an optimizer updates."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Protocol

from guided_descent.routing import Block

Blocks = Mapping[str, tuple[Block, ...]]  # by canonical name of the parameter


class Parametrization(Protocol):
    """Anything that writes ``lr_scale``, ``wd_scale`` and ``eps_scale`` of blocks, for ``parametrization=``."""

    def apply(self, blocks: Blocks, needed: Collection[str]) -> dict[str, tuple[Block, ...]]:
        """The blocks of all parameters with their multipliers.

        Args:
            blocks: The blocks of each parameter.
            needed: Parameters whose recipe is made for such a parametrization, so that none may be left out.

        Raises:
            ValueError: A parameter is missing, or one is named that does not exist.
        """
        ...
