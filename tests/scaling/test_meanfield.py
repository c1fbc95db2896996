"""Mean-field theory: closed forms, published points, and networks that do what it says."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from guided_descent.scaling.meanfield import ACTIVATIONS, MeanField


@pytest.mark.parametrize(
    ("name", "gain"), [("identity", 1.0), ("tanh", 1.0), ("relu", math.sqrt(2)), ("erf", math.sqrt(math.pi) / 2)]
)
def test_critical_gains_in_closed_form(name: str, gain: float) -> None:
    assert MeanField(name).critical_gain() == pytest.approx(gain, rel=1e-4)


def test_gains_that_keep_the_variance() -> None:
    assert MeanField("relu").keeping_gain() == pytest.approx(math.sqrt(2))
    assert MeanField("selu").keeping_gain() == pytest.approx(1, rel=1e-4)  # what its constants were chosen for
    assert MeanField(nn.LeakyReLU(0.2)).keeping_gain() == pytest.approx(math.sqrt(2 / 1.04))
    assert nn.init.calculate_gain("tanh") == pytest.approx(MeanField("tanh").keeping_gain(), rel=0.05)  # 5/3 in torch


def test_erf_has_the_length_of_the_arcsine_kernel() -> None:
    """``E erf(sqrt(q) z)^2 = (2 / pi) asin(2 q / (1 + 2 q))`` (Williams 1997)."""
    for q in (0.1, 1.0, 7.0):
        assert MeanField("erf").moments(0.0, q)[1] == pytest.approx(2 / math.pi * math.asin(2 * q / (1 + 2 * q)))


@pytest.mark.parametrize(("gain", "bias", "name"), [(0.9, 0.3, "ordered"), (1.0, 0.0, "edge"), (2.5, 0.3, "chaotic")])
def test_phases_of_tanh(gain: float, bias: float, name: str) -> None:
    assert MeanField("tanh").phase(gain, bias).name == name


def test_a_mean_of_the_weights_moves_the_edge() -> None:
    """Up to J0 = 1 the mean activation is 0 and the edge at J = 1; beyond, saturation needs a larger J."""
    field = MeanField("tanh")
    assert field.critical_gain(mean=0.5) == pytest.approx(1, rel=1e-3)
    edges = [field.critical_gain(mean=mean) for mean in (1.5, 2.0)]
    assert 1.1 < edges[0] < edges[1]
    phase = field.phase(edges[1], mean=2.0)
    assert phase.chi == pytest.approx(1, abs=1e-3)
    assert phase.mean > 0.3


@pytest.mark.parametrize("name", ["tanh", "relu", "gelu"])
def test_a_wide_network_follows(name: str) -> None:
    """Lengths of signals, and of gradients, through 12 layers of width 1,000."""
    torch.manual_seed(0)
    field, width, gain, bias = MeanField(name), 1000, 1.5, 0.2
    layers = [nn.Linear(width, width) for _ in range(12)]
    for layer in layers:
        nn.init.normal_(layer.weight, std=gain / math.sqrt(width))
        nn.init.normal_(layer.bias, std=bias)
    h = torch.randn(4, width)
    pre, q = [], []
    for layer in layers:
        wanted = gain**2 * field.moments(0.0, float(h.detach().square().mean()))[1] + bias**2
        h = layer(ACTIVATIONS[name](h))
        h.retain_grad()
        pre.append(h)
        q.append(float(h.detach().square().mean()))
        assert q[-1] == pytest.approx(wanted, rel=0.1)
    (h * torch.randn_like(h)).sum().backward()
    grads = [float(each.grad.square().mean()) for each in pre]  # type: ignore[union-attr]
    growth = (grads[5] / grads[11]) ** (1 / 6)
    mean_chi = math.prod(gain**2 * field.slope(0.0, v) for v in q[5:11]) ** (1 / 6)
    assert growth == pytest.approx(mean_chi, rel=0.1)


def test_wrong_input() -> None:
    with pytest.raises(ValueError, match="activation='swish': choose one of identity, tanh"):
        MeanField("swish")
    with pytest.raises(ValueError, match="standard deviations are not negative"):
        MeanField("tanh").phase(-1.0)
    with pytest.raises(ValueError, match="no edge of chaos"):
        MeanField(lambda x: 0.01 * x).critical_gain()
