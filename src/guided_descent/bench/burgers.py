"""Burgers' equation for a physics-informed network: exact reference, residuals, and their Jacobian.

``u_t + u u_x = nu u_xx`` on ``-1 <= x <= 1``, ``0 <= t <= 1``, ``nu = 0.01/pi``; ``u(0, x) = -sin(pi x)``,
``u(t, -1) = u(t, 1) = 0``: a sine that steepens into a layer of width ``nu`` at ``x = 0``.

The derivatives of the network are exact and need no graph of their own: value, x-, t- and second x-derivative pass
through the layers together, as four streams. A linear layer maps each stream (the bias joins the value alone), and
``h = tanh a`` has ``h_x = (1 - h²) a_x``, ``h_t = (1 - h²) a_t``, ``h_xx = (1 - h²) a_xx - 2 h (1 - h²) a_x²``.

Source: Raissi, Perdikaris and Karniadakis 2019 for the task; Cole 1951, Hopf 1950 and Basdevant et al. 1986 for its
solution.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor, nn

from guided_descent.bench.data import generator

NU = 0.01 / math.pi
NODES = 100  # of the quadrature: exact to 1e-14 on the grid, where 60 give 1e-9
INSIDE, INITIAL, WALL = 2000, 100, 50  # collocation points; points at t = 0; points at each of x = -1 and x = 1
NEAR, WIDTH = 0.5, 0.1  # half of the collocation points lie with this scale around the layer at x = 0
GRID = (100, 256)  # times, places


class BurgersNet(nn.Module):
    """A tanh network from ``(x, t)`` to ``u`` in float64, four hidden layers of 32.

    Example:
        >>> net = BurgersNet()
        >>> net(torch.zeros(5, 2, dtype=torch.float64)).shape, sum(p.numel() for p in net.parameters())
        (torch.Size([5]), 3297)
    """

    def __init__(self, width: int = 32, depth: int = 4) -> None:
        super().__init__()
        sizes = [2, *[width] * depth, 1]
        self.layers = nn.ModuleList(nn.Linear(i, o, dtype=torch.float64) for i, o in pairwise(sizes))
        for layer in self.layers:
            assert isinstance(layer, nn.Linear)
            nn.init.xavier_normal_(layer.weight)
            nn.init.zeros_(layer.bias)

    def forward(self, points: Tensor) -> Tensor:
        """``u`` [N] at points [N, 2] of ``(x, t)``."""
        h = points
        for layer in self.layers[:-1]:
            h = torch.tanh(layer(h))
        u: Tensor = self.layers[-1](h)
        return u[:, 0]

    def jet(self, points: Tensor, tape: list[tuple[Tensor, Tensor]] | None = None) -> tuple[Tensor, ...]:
        """``u, u_x, u_t, u_xx``, each [N], exactly.

        Args:
            points: [N, 2] of ``(x, t)``.
            tape: If given, input [4, N, i] and output [4, N, o] of every layer are appended.
        """
        h = torch.zeros(4, *points.shape, dtype=points.dtype, device=points.device)
        h[0], h[1, :, 0], h[2, :, 1] = points, 1.0, 1.0
        for index, layer in enumerate(self.layers):
            assert isinstance(layer, nn.Linear)
            a = h @ layer.weight.T
            a = torch.cat([a[:1] + layer.bias, a[1:]])
            if tape is not None:
                tape.append((h, a))
            h = a if index == len(self.layers) - 1 else _tanh(a)
        return tuple(h[:, :, 0])


def _tanh(a: Tensor) -> Tensor:
    """``tanh`` of four streams [4, N, h]."""
    value, dx, dt, dxx = a
    y = torch.tanh(value)
    slope = 1 - y * y
    return torch.stack([y, slope * dx, slope * dt, slope * (dxx - 2 * y * dx * dx)])


@dataclass(frozen=True)
class Points:
    """Where the residuals are taken.

    Attributes:
        inside: Collocation points [N, 2] of ``(x, t)``.
        edge: Points [M, 2] at ``t = 0`` and ``x = -1, 1``.
        values: What ``u`` is there [M].
        weights: The square root of each residual's weight [N + M].
    """

    inside: Tensor
    edge: Tensor
    values: Tensor
    weights: Tensor


@lru_cache(maxsize=1)
def points() -> Points:
    """2,000 collocation points and 200 on the edge, the same for every seed.

    Half of the collocation points are uniform, half are normal around the layer with standard deviation 0.1. The loss
    is the sum of three mean squares: of the equation, of ``u + sin(pi x)`` at ``t = 0``, of ``u`` on the walls.
    """
    draw = generator(0, 20)

    def uniform(n: int) -> Tensor:  # one point in each of n equal pieces, shuffled
        pieces = torch.rand(n, generator=draw, dtype=torch.float64) + torch.arange(n)
        return pieces[torch.randperm(n, generator=draw)] / n

    near = round(NEAR * INSIDE)
    around = WIDTH * math.sqrt(2) * torch.erfinv((2 * uniform(near) - 1) * math.erf(1 / WIDTH / math.sqrt(2)))
    x = torch.cat([2 * uniform(INSIDE - near) - 1, around])
    inside = torch.stack([x, torch.cat([uniform(INSIDE - near), uniform(near)])], 1)
    start = torch.stack([2 * uniform(INITIAL) - 1, torch.zeros(INITIAL, dtype=torch.float64)], 1)
    walls = torch.stack([torch.tensor([-1.0, 1.0]).double().repeat(WALL), uniform(2 * WALL)], 1)
    values = torch.cat([-torch.sin(math.pi * start[:, 0]), torch.zeros(2 * WALL, dtype=torch.float64)])
    total = INSIDE + INITIAL + 2 * WALL
    counts = torch.tensor([INSIDE, INITIAL, 2 * WALL])
    weights = (total / counts.double()).sqrt().repeat_interleave(counts)
    return Points(inside, torch.cat([start, walls]), values, weights)


def residuals(net: BurgersNet, at: Points, tapes: tuple[list[tuple[Tensor, Tensor]], ...] = ()) -> Tensor:
    """The weighted residuals [N + M]: their mean square is the loss.

    Args:
        net: The network.
        at: The points.
        tapes: Two lists for the layers' inputs and outputs, inside and on the edge, or nothing.
    """
    u, dx, dt, dxx = net.jet(at.inside, *tapes[:1])
    equation = dt + u * dx - NU * dxx
    edge = net.jet(at.edge, *tapes[1:])[0] if tapes else net(at.edge)
    return torch.cat([equation, edge - at.values]) * at.weights


def jacobian(net: BurgersNet, at: Points) -> Tensor:
    """The Jacobian [N + M, P] of ``residuals`` by the network's parameters, in their order.

    Each residual depends on its own point alone, so one backward pass of their sum gives every residual's derivative
    by every layer's outputs; the derivative by a weight is the sum over the four streams of that times the input.
    """
    with torch.enable_grad():
        tapes: tuple[list[tuple[Tensor, Tensor]], ...] = ([], [])
        total = residuals(net, at, tapes).sum()
        outputs = [a for tape in tapes for _, a in tape]
        slopes = iter(torch.autograd.grad(total, outputs))
    rows = []
    for tape in tapes:
        columns = []
        for h, _ in tape:
            d = next(slopes)
            columns.append(torch.einsum("sno,sni->noi", d, h.detach()).flatten(1))
            columns.append(d[0])
        rows.append(torch.cat(columns, 1))
    return torch.cat(rows)


def exact(x: np.ndarray, t: np.ndarray, nodes: int = NODES) -> np.ndarray:
    """The solution at arrays of places and times (broadcast), by the Cole-Hopf transform and Gauss-Hermite quadrature.

    ``u = -int sin(pi y) f(y) w dz / int f(y) w dz``, ``f(y) = exp(-cos(pi y)/(2 pi nu))``, ``w = exp(-z²)``,
    ``y = x - 2 sqrt(nu t) z``. The largest exponent is taken out of both integrals.
    """
    z, w = np.polynomial.hermite.hermgauss(nodes)
    y = np.asarray(x)[..., None] - 2 * np.sqrt(NU * np.asarray(t))[..., None] * z
    exponent = -np.cos(math.pi * y) / (2 * math.pi * NU)
    f = w * np.exp(exponent - exponent.max(-1, keepdims=True))
    u: np.ndarray = -(np.sin(math.pi * y) * f).sum(-1) / f.sum(-1)
    return u


@lru_cache(maxsize=1)
def reference() -> tuple[Tensor, Tensor]:
    """The evaluation grid [100 * 256, 2] of ``(x, t)``, ends included, and the exact ``u`` there."""
    times, places = GRID
    t, x = np.meshgrid(np.linspace(0, 1, times), np.linspace(-1, 1, places), indexing="ij")
    grid = torch.tensor(np.stack([x.ravel(), t.ravel()], 1))
    return grid, torch.tensor(exact(x, t).ravel())


@torch.no_grad()
def relative_error(net: nn.Module) -> float:
    """``|u - u_exact| / |u_exact|`` in the 2-norm over the grid."""
    grid, u = reference()
    return float((net(grid) - u).norm() / u.norm())
