"""Mean-field theory of wide networks at initialisation: lengths of signals, the edge of chaos, gains computed from it.

With weights of mean ``mu / N`` and standard deviation ``sigma / sqrt(N)`` (N the fan-in) and biases of deviation ``b``,
pre-activations of a wide layer are Gaussian, ``h = J0 m + sqrt(q) z``, where ``m = E phi(h)`` and
``q = sigma^2 E phi(h)^2 + b^2`` of the layer before; J0 is the mean of the weights times N and J their deviation times
sqrt(N). Gradients, and differences between two inputs, grow from layer to layer by ``chi = sigma^2 E phi'(h)^2``: below
1 the network is ordered, above 1 chaotic. (Poole et al. 2016, 1606.05340; Schoenholz et al. 2017, 1611.01232; with
J0: Zhang et al. 2021, 2107.09437.)
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor, nn
from torch.nn import functional as F

#: Activations by the names that functions here take.
ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "identity": lambda x: x,
    "tanh": torch.tanh,
    "relu": F.relu,
    "leaky_relu": F.leaky_relu,
    "gelu": F.gelu,
    "silu": F.silu,
    "elu": F.elu,
    "selu": F.selu,
    "softplus": F.softplus,
    "sigmoid": torch.sigmoid,
    "erf": torch.erf,
}
_MODULES: dict[type[nn.Module], str] = {
    nn.Identity: "identity",
    nn.Tanh: "tanh",
    nn.ReLU: "relu",
    nn.LeakyReLU: "leaky_relu",
    nn.GELU: "gelu",
    nn.SiLU: "silu",
    nn.ELU: "elu",
    nn.SELU: "selu",
    nn.Softplus: "softplus",
    nn.Sigmoid: "sigmoid",
}
#: Points and reach of the quadrature, in standard deviations: 0, where many activations have a kink, is between two.
_POINTS, _REACH = 2000, 10.0
#: Where a length counts as vanished or endless.
_SMALL, _LARGE = 1e-12, 1e6


@dataclass(frozen=True)
class Phase:
    """Where an initialisation stands.

    Attributes:
        chi: Growth of gradients, and of differences between inputs, in each layer.
        length: The variance q of pre-activations far into the network.
        mean: The mean activation there.
    """

    chi: float
    length: float
    mean: float

    @property
    def name(self) -> str:
        """``ordered``, ``chaotic`` or ``edge`` (chi within 1e-3 of 1)."""
        return "edge" if abs(self.chi - 1) < 1e-3 else "ordered" if self.chi < 1 else "chaotic"


class MeanField:
    """The maps of one activation.

    Args:
        activation: A name of ``ACTIVATIONS``, an activation module, or an elementwise function.

    Raises:
        ValueError: The name or the module is unknown.

    Example:
        >>> field = MeanField("tanh")
        >>> round(field.critical_gain(), 4), field.phase(1.5).name, field.phase(0.5).name
        (1.0, 'chaotic', 'ordered')
        >>> round(MeanField("relu").critical_gain(), 4)
        1.4142
    """

    def __init__(self, activation: str | nn.Module | Callable[[Tensor], Tensor]) -> None:
        if isinstance(activation, nn.Module):
            named = _MODULES.get(type(activation))
            activation = activation if named is None or named == "leaky_relu" else named
        if isinstance(activation, str):
            if activation not in ACTIVATIONS:
                raise ValueError(f"activation={activation!r}: choose one of {', '.join(ACTIVATIONS)}, or a function")
            activation = ACTIVATIONS[activation]
        self.phi = activation

    # -- one layer -------------------------------------------------------------------------------------------------

    def moments(self, mean: float, variance: float) -> tuple[float, float]:
        """``E phi(h)`` and ``E phi(h)^2`` of a Gaussian pre-activation h."""
        z, weight = self._grid
        with torch.no_grad():
            y = self.phi(mean + math.sqrt(variance) * z)
        return float(weight @ y), float(weight @ y.square())

    def slope(self, mean: float, variance: float) -> float:
        """``E phi'(h)^2``."""
        z, weight = self._grid
        with torch.enable_grad():
            h = (mean + math.sqrt(variance) * z).requires_grad_()
            [found] = torch.autograd.grad(self.phi(h).sum(), h)
        return float(weight @ found.square())

    def phase(self, gain: float, bias: float = 0.0, mean: float = 0.0) -> Phase:
        """What becomes of signals in a deep network.

        Args:
            gain: Standard deviation of the weights times the root of the fan-in, J.
            bias: Standard deviation of the biases.
            mean: Mean of the weights times the fan-in, J0.

        Returns:
            The phase at the fixed point that a signal of unit variance goes to; a length that grows without bound is
            stopped at 1e6, one that vanishes at 1e-12.

        Raises:
            ValueError: A deviation is negative.
        """
        if gain < 0 or bias < 0:
            raise ValueError(f"gain={gain!r}, bias={bias!r}: standard deviations are not negative")

        def center(q: float) -> float:
            return _settle(lambda m: self.moments(mean * m, q)[0], 0.5) if mean else 0.0

        q = _settle(lambda q: gain**2 * self.moments(mean * center(q), q)[1] + bias**2, 1.0)
        m = center(q)
        return Phase(gain**2 * self.slope(mean * m, q), q, m)

    # -- whole networks --------------------------------------------------------------------------------------------

    def critical_gain(self, bias: float = 0.0, mean: float = 0.0) -> float:
        """The gain at the edge of chaos, where chi passes 1: weights of standard deviation ``gain / sqrt(fan_in)``.

        Found by bisection between 0 and 16. Where the length of signals has no stable fixed point, as with GELU and
        SiLU, chi jumps there: signals vanish below that gain and grow without bound above it.

        Raises:
            ValueError: There is none: chi stays below or above 1.
        """
        low, high = 0.0, 16.0
        if self.phase(high, bias, mean).chi < 1:
            raise ValueError(f"chi stays below 1 up to a gain of 16 (bias={bias!r}, mean={mean!r}): no edge of chaos")
        while high - low > 1e-5:
            middle = (low + high) / 2
            if self.phase(middle, bias, mean).chi < 1:
                low = middle
            else:
                high = middle
        return (low + high) / 2

    def keeping_gain(self) -> float:
        """The gain that keeps unit variance from layer to layer: ``1 / sqrt(E phi(z)^2)``, z a standard Gaussian."""
        return 1 / math.sqrt(self.moments(0.0, 1.0)[1])

    @cached_property
    def _grid(self) -> tuple[Tensor, Tensor]:
        z = torch.linspace(-_REACH, _REACH, _POINTS, dtype=torch.float64)
        weight = torch.exp(-z.square() / 2)
        return z, weight / weight.sum()


def _settle(map_: Callable[[float], float], start: float) -> float:
    """The first fixed point of a map from a start on, in the direction in which it moves; by bisection."""
    up = map_(start) > start
    near, far = start, start
    while True:
        far = near * 1.5 if up else near / 1.5
        if not _SMALL < far < _LARGE:
            return _LARGE if up else _SMALL
        if (map_(far) > far) != up:
            break
        near = far
    for _ in range(50):
        middle = (near + far) / 2
        if (map_(middle) > middle) == up:
            near = middle
        else:
            far = middle
    return (near + far) / 2
