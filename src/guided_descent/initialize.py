"""Initialise: weights on the balls of the norms in which an optimizer steps."""

from __future__ import annotations

import torch

from guided_descent.build import RoutedOptimizer
from guided_descent.parts import Lmo
from guided_descent.routing import Role


@torch.no_grad()
def initialize(
    optimizer: RoutedOptimizer, *, generator: torch.Generator | None = None, zero_head: bool = False
) -> None:
    """Draw the weights of recipes with LMOs, such as scion and modula, from the spheres of their norms.

    A weight becomes ``rho lmo(G)`` of a Gaussian ``G``: hidden maps orthogonal times ``rho sqrt(d_o / d_i)``, tables
    rows of root mean square rho, a head random signs over ``d_i``, each with the optimizer's radius. Biases are set to
    0. What other recipes update stays. Constrained steps of scion never leave the balls on which weights then are.

    Args:
        optimizer: An optimizer that has not taken a step.
        generator: Where the draws come from; torch's own by default.
        zero_head: Set maps to the outputs to 0 as well.

    Raises:
        ValueError: The optimizer has taken steps, or none of its recipes has an LMO.

    Example:
        >>> import guided_descent as gd
        >>> model = torch.nn.Sequential(torch.nn.Linear(8, 32), torch.nn.ReLU(), torch.nn.Linear(32, 4))
        >>> initialize(gd.Scion(model, radius=3.0))
        >>> [round(float(s), 4) for s in torch.linalg.svdvals(model[0].weight.detach())[:2]]
        [6.0, 6.0]
    """
    if optimizer.steps:
        raise ValueError(
            f"the optimizer has taken {optimizer.steps} steps: initialize the weights before the first one"
        )
    found = False
    binder = optimizer._engine.binder
    for index, group in enumerate(optimizer.param_groups):
        exact = {**group, "coefficients": "exact", "ns_steps": None, "eps": None, "ns_method": "auto"}
        for name, tensor in zip(group["param_names"], group["params"]):
            for block in binder.blocks[name]:
                for lmo in (part for part in binder.parts(index, block) if isinstance(part, Lmo)):
                    found = True
                    [piece] = block.pieces
                    drawn = torch.zeros(block.shape, dtype=torch.float64)
                    if block.role is not Role.BIAS and not (zero_head and block.role is Role.HEAD):
                        drawn.normal_(generator=generator)
                        drawn *= lmo.ball(drawn[None], block, exact)
                        drawn *= float(group[lmo.radius]) if lmo.radius else 1.0
                    piece.of(tensor.detach()).copy_(piece.within(drawn))
    if not found:
        labels = ", ".join(dict.fromkeys(group["recipe"] for group in optimizer.param_groups))
        raise ValueError(
            f"no recipe of this optimizer ({labels}) steps in a norm: initialize is for scion and the like"
        )
