"""Layers as linear maps: per-sample gradients against vmap, and raw sums against loops, for every supported module."""

from __future__ import annotations

import copy
import re

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations

from guided_descent.capture import LayerIO, layers, per_sample_norms, supported, why_not
from guided_descent.capture.layers import arrange, has_bias, kind_of, sizes
from oracles.fisher import kfac, per_sample_gradients

CASES = {
    "linear": (nn.Linear(4, 3), (5, 4)),
    "linear without bias": (nn.Linear(4, 3, bias=False), (5, 4)),
    "linear, few positions": (nn.Linear(6, 8), (5, 2, 6)),
    "linear, many positions": (nn.Linear(3, 2), (4, 7, 3)),
    "linear, two position axes": (nn.Linear(3, 2), (4, 2, 3, 3)),
    "conv1d": (nn.Conv1d(2, 3, 3, padding=1), (4, 2, 6)),
    "conv1d, reflecting": (nn.Conv1d(2, 3, 3, padding=2, padding_mode="reflect"), (4, 2, 6)),
    "conv1d, circular": (nn.Conv1d(2, 3, 4, padding="same", padding_mode="circular"), (4, 2, 6)),
    "conv2d": (nn.Conv2d(2, 3, (3, 2), stride=(2, 1), padding=(0, 1), dilation=(1, 2)), (3, 2, 7, 6)),
    "conv2d, same": (nn.Conv2d(2, 3, (4, 3), padding="same", dilation=(1, 2)), (3, 2, 5, 6)),
    "conv2d, groups": (nn.Conv2d(4, 6, 3, stride=2, groups=2), (3, 4, 7, 6)),
    "conv2d, groups without bias": (nn.Conv2d(4, 6, 2, groups=2, bias=False), (3, 4, 3, 3)),
    "conv2d, depthwise": (nn.Conv2d(4, 8, 3, groups=4, padding=1), (3, 4, 3, 3)),
    "conv2d, wide": (nn.Conv2d(6, 8, 2, stride=2), (3, 6, 4, 2)),
    "conv3d": (nn.Conv3d(2, 3, 2, stride=(1, 2, 1), padding=1), (2, 2, 3, 4, 2)),
    "embedding": (nn.Embedding(7, 3), (5, 4)),
    "embedding, one index": (nn.Embedding(7, 3), (5,)),
    "embedding, padding": (nn.Embedding(4, 3, padding_idx=1), (5, 6)),
    "layernorm": (nn.LayerNorm(4), (5, 4)),
    "layernorm, positions": (nn.LayerNorm(4), (5, 3, 4)),
    "layernorm, two axes": (nn.LayerNorm((3, 2)), (4, 5, 3, 2)),
    "layernorm without shift": (nn.LayerNorm(4, bias=False), (5, 3, 4)),
    "rmsnorm": (nn.RMSNorm(4), (5, 3, 4)),
    "groupnorm": (nn.GroupNorm(2, 4), (5, 4, 3, 2)),
    "batchnorm1d": (nn.BatchNorm1d(4).eval(), (5, 4)),
    "batchnorm2d": (nn.BatchNorm2d(4).eval(), (5, 4, 3, 2)),
}


def build(case):
    """(module in float64 with random parameters and statistics, input)."""
    module, shape = CASES[case]
    module = copy.deepcopy(module).double()
    for tensor in module.state_dict().values():
        if tensor.is_floating_point():
            tensor.uniform_(0.5, 1.5)
    if isinstance(module, nn.Embedding):
        return module, torch.randint(module.num_embeddings, shape)
    return module, torch.randn(shape, dtype=torch.float64)


def loss(out):
    """Not linear in the output, and different at each element."""
    return (out.sin() * torch.linspace(0.5, 1.5, out[0].numel(), dtype=out.dtype).view(out.shape[1:])).sum()


def look(module, x, terms=5):
    out = module(x)
    [d] = torch.autograd.grad(loss(out), out)
    a, d = arrange(module, x, d)
    return LayerIO(kind_of(module), a, d, terms, has_bias(module), True, *sizes(module))


def dense(io, module):
    """(weight, bias) gradients [N, ...] out of the columns of ``per_sample_gradients``."""
    g = io.per_sample_gradients()
    inputs = g.shape[2] - io.bias
    weight = g[:, :, :inputs].reshape(len(g), *module.weight.shape)
    return weight, g[:, :, -1].reshape(len(g), *module.bias.shape) if io.bias else None


@pytest.mark.parametrize("case", CASES)
def test_per_sample_gradients_and_norms(case, monkeypatch):
    module, x = build(case)
    io = look(module, x)
    expected = per_sample_gradients(module, x, loss)
    weight, bias = dense(io, module)
    torch.testing.assert_close(weight, expected["weight"], rtol=1e-12, atol=1e-12)
    norms = expected["weight"].flatten(1).square().sum(1)
    if "bias" in expected:
        torch.testing.assert_close(bias, expected["bias"], rtol=1e-12, atol=1e-12)
        norms = norms + expected["bias"].flatten(1).square().sum(1)
    torch.testing.assert_close(io.per_sample_squared_norms(), norms, rtol=1e-12, atol=1e-12)
    monkeypatch.setattr(layers, "_CHUNK", 1)  # one sample at a time
    torch.testing.assert_close(io.per_sample_squared_norms(), norms, rtol=1e-12, atol=1e-12)
    assert supported(module) == io.kind
    assert io.a.shape[:2] == io.d.shape[:2]


@pytest.mark.parametrize("case", ["linear", "linear, few positions", "conv2d, wide", "conv2d, groups", "layernorm"])
def test_few_positions_make_no_gradients(case, monkeypatch):
    io = look(*build(case))
    expected = io.per_sample_gradients().square().sum((1, 2))
    monkeypatch.delattr(LayerIO, "_outer")
    if case == "conv2d, groups":  # six positions of maps 18 to 3
        with pytest.raises(AttributeError, match="_outer"):
            io.per_sample_squared_norms()
    else:
        torch.testing.assert_close(io.per_sample_squared_norms(), expected)


def test_norms_of_several_layers_add_up():
    net = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).double()
    x = torch.randn(5, 3, dtype=torch.float64)
    seen = []
    hooks = [net[i].register_forward_hook(lambda m, args, out: seen.append((m, args[0], out))) for i in (0, 2)]
    grads = torch.autograd.grad(loss(net(x)), [out for _, _, out in seen])
    for hook in hooks:
        hook.remove()
    ios = [
        LayerIO(kind_of(m), *arrange(m, a.detach(), d), 5, True, True, *sizes(m))
        for (m, a, _), d in zip(seen, grads, strict=True)
    ]
    expected = sum(g.flatten(1).square().sum(1) for g in per_sample_gradients(net, x, loss).values())
    torch.testing.assert_close(per_sample_norms(ios), expected)


def onehot(io):
    """[N, R, rows] of an embedding's lookups, 0 for padding."""
    return nn.functional.one_hot(io.a.clamp(min=0), io.inputs).double() * (io.a >= 0).unsqueeze(2)


@pytest.mark.parametrize("approx", ["expand", "reduce"])
@pytest.mark.parametrize("case", CASES)
def test_sums_against_loops(case, approx):
    module, x = build(case)
    io = look(module, x)
    (left, count), (right, terms) = io.gram_inputs(approx), io.gram_gradients(approx)
    n, r = io.a.shape[:2]
    assert (count, terms) == (n * r if approx == "expand" else n, 5)
    a = onehot(io) if io.kind == "embedding" else io.a
    for g in range(io.groups):
        mine = [t.view(n, r, io.groups, -1)[:, :, g] for t in (a, io.d)]
        expected_left, expected_right = kfac(*mine, 5, io.bias, approx)
        got_left = left if io.groups == 1 else left[g]
        got_right = right if io.groups == 1 else right[g]
        if io.kind == "embedding":
            expected_left = expected_left.diagonal()
        torch.testing.assert_close(got_left / count, expected_left, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(got_right / terms, expected_right, rtol=1e-12, atol=1e-12)


def test_inputs_without_a_batch_are_one_sample():
    for module, x in (
        (nn.Linear(3, 2), torch.randn(3)),
        (nn.Conv2d(2, 3, 2), torch.randn(2, 3, 3)),
        (nn.Embedding(4, 2), torch.tensor(3)),
        (nn.LayerNorm((2, 3)), torch.randn(2, 3)),
    ):
        out = module(x)
        [d] = torch.autograd.grad(out.sin().sum(), out)
        io = LayerIO(kind_of(module), *arrange(module, x, d), 1, has_bias(module), True, *sizes(module))
        out = module(x.unsqueeze(0))
        [d] = torch.autograd.grad(out.sin().sum(), out)
        a, d = arrange(module, x.unsqueeze(0), d)
        torch.testing.assert_close(io.a, a)
        torch.testing.assert_close(io.d, d)
        assert len(a) == 1


@pytest.mark.parametrize("make", [nn.BatchNorm2d, lambda c: nn.BatchNorm2d(c, track_running_stats=False)])
def test_batchnorm_in_training_normalises_by_the_batch_and_keeps_its_statistics(make):
    module, x = make(3).double(), torch.randn(4, 3, 2, 2, dtype=torch.float64)
    out = module(x)
    before = {name: value.clone() for name, value in module.state_dict().items()}
    a, _ = arrange(module, x, None)
    torch.testing.assert_close(a, out.detach().movedim(1, -1).reshape(4, 4, 3))  # its gain is 1, its shift 0
    for name, value in module.state_dict().items():
        assert torch.equal(value, before[name])


@pytest.mark.parametrize("eps", [None, 1e-3])
def test_low_precision_is_normalised_as_the_module_does(eps):
    x = 0.01 * torch.randn(6, 8).bfloat16()
    module = nn.RMSNorm(8, eps=eps).bfloat16()
    a, _ = arrange(module, x, None)
    assert a.dtype == torch.float32
    torch.testing.assert_close(a.squeeze(1), module(x).float(), rtol=8e-3, atol=1e-3)


def test_sums_are_float32_at_least():
    a, d = torch.randn(300, 1, 4).bfloat16(), torch.randn(300, 1, 3).bfloat16()
    io = LayerIO("linear", a, d, 300, True, True, 1, 4)
    double = LayerIO("linear", a.double(), d.double(), 300, True, True, 1, 4)
    for got, expected in (
        (io.gram_inputs()[0], double.gram_inputs()[0]),
        (io.gram_gradients()[0], double.gram_gradients()[0]),
        (io.per_sample_squared_norms(), double.per_sample_squared_norms()),
        (io.per_sample_gradients(), double.per_sample_gradients()),
    ):
        assert (got.dtype, expected.dtype) == (torch.float32, torch.float64)
        torch.testing.assert_close(got.double(), expected, rtol=1e-5, atol=1e-4)
    assert io.gram_inputs()[0][4, 4] == 300


def test_a_frozen_bias_is_no_column():
    module = nn.Linear(3, 2)
    module.bias.requires_grad_(False)
    assert not has_bias(module)


def test_inputs_alone_have_no_gradient_sums():
    io = LayerIO("linear", torch.randn(3, 1, 4), None, 0, True, True, 1, 4)
    assert io.gram_inputs()[0].shape == (5, 5)
    for method in (io.gram_gradients, io.per_sample_gradients, io.per_sample_squared_norms):
        with pytest.raises(ValueError, match="inputs only"):
            method()
    with pytest.raises(ValueError, match="approx='mean'"):
        io.gram_inputs("mean")


class Scaled(nn.Linear):
    def forward(self, x):
        return 2 * super().forward(x)


def replaced():
    module = nn.Linear(2, 2)
    module.forward = lambda x: x
    return module


def sharded():
    module = nn.Linear(2, 2)
    module.weight = nn.Parameter(torch.zeros(2))
    return module


def subclassed():
    class Weight(torch.Tensor):
        pass

    module = nn.Linear(2, 2)
    module._parameters["weight"] = torch.zeros(2, 2).as_subclass(Weight).requires_grad_()
    return module


def weight_norm_by_hook():
    module = nn.Linear(2, 2)
    weight = module.weight
    del module.weight
    module.weight_g, module.weight = nn.Parameter(weight.detach()), weight.detach()
    return module


REFUSED = {
    "subclass": (lambda: Scaled(2, 2), "not one of the exact types"),
    "transposed": (lambda: nn.ConvTranspose2d(2, 2, 2), "not one of the exact types"),
    "attention's own projection": (lambda: nn.MultiheadAttention(4, 2).out_proj, "NonDynamicallyQuantizable"),
    "attention": (lambda: nn.MultiheadAttention(4, 2), "not one of the exact types"),
    "lazy": (lambda: nn.LazyLinear(2), "lazy"),
    "parametrized": (lambda: parametrizations.weight_norm(nn.Linear(2, 2)), "parametrized"),
    "weight by a hook": (weight_norm_by_hook, "computes its weight"),
    "script": (lambda: torch.jit.script(nn.Linear(2, 2)), "not one of the exact types"),
    "replaced forward": (replaced, "replaced"),
    "a shard": (sharded, r"\[2\] is not the declared \[2, 2\]"),
    "a tensor subclass": (subclassed, "is a Weight"),
    "norm without gain": (lambda: nn.LayerNorm(3, elementwise_affine=False), "affine=False"),
    "max_norm": (lambda: nn.Embedding(3, 2, max_norm=1.0), "max_norm"),
    "sparse": (lambda: nn.Embedding(3, 2, sparse=True), "sparse"),
    "scaled by frequency": (lambda: nn.Embedding(3, 2, scale_grad_by_freq=True), "scale_grad_by_freq"),
    "activation": (nn.ReLU, "not one of the exact types"),
}


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")
@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_captured_says_why(case):
    make, why = REFUSED[case]
    module = make()
    assert supported(module) is None
    assert re.search(why, why_not(module))
