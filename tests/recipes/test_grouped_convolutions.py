"""Convolutions in groups under the recipes that read layers: one matrix, inputs of all groups, gradients of each."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import guided_descent as gd
from guided_descent.capture import LOSSES
from guided_descent.parts.geometry.ekfac import Ekfac
from guided_descent.parts.geometry.kfac import Kfac
from guided_descent.parts.geometry.kfac_inverse import KfacInverse
from guided_descent.parts.geometry.singd import InverseFree
from oracles.grouped import free_roots, grouped_factors, joint_matrix, sample_gradients
from oracles.kfac import Bed, block, damped_solve, jacobian, joint_order, layer, numbers, traced

#: Name of a convolution of ``net`` and the rule that gives it to a matrix recipe, where routing does not.
CONVS = {
    "two groups": ("0", []),
    "depthwise": ("2", [gd.rule("2.weight", role="conv")]),
}
PLAIN: dict[str, Any] = {"lr": 1.0, "momentum": 0.0}


def rand(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def net(bias: bool = True) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(4, 6, 3, stride=2, padding=1, groups=2, bias=bias),
        nn.Tanh(),
        nn.Conv2d(6, 12, 2, groups=6, bias=bias),
        nn.Flatten(),
        nn.Linear(48, 3),
    ).double()


def data() -> tuple[Tensor, Tensor]:
    return rand(12, 4, 6, 6, seed=1), torch.arange(12) % 3


def close(a: Tensor, b: Tensor, tolerance: float = 1e-7) -> None:
    assert a.shape == b.shape
    assert float((a - b).abs().max()) <= tolerance * float(b.abs().max())


def seeds(out: Tensor) -> list[Tensor]:
    return list(LOSSES["cross_entropy"].sqrt_hessian(out))


def taken(recipe: Any, case: str, bias: bool, rests: int = 0) -> tuple[nn.Sequential, Tensor, Tensor]:
    """A convolution after some steps of rate 0: the model as it was, the gradient ``[W | b]`` and minus the step."""
    name, rules = CONVS[case]
    model, (x, y) = net(bias), data()
    conv = model[int(name)]
    opt = gd.build(model, recipe, loss=None if recipe.fisher == "forward" else "cross_entropy", rules=rules)
    lines = {line.parameter: line for line in gd.explain(opt).lines}
    assert lines[f"{name}.weight"].recipe == recipe.key
    assert lines[f"{name}.weight"].view == (conv.out_channels, conv.weight[0].numel() + bias)
    for i in range(rests + 1):
        for group in opt.param_groups:
            group["lr"] = float(i == rests)
        opt.zero_grad()
        F.cross_entropy(model(x), y).backward()
        before = joint_matrix(conv.weight, conv.bias).clone()
        opt.step()
    g = joint_matrix(conv.weight.grad, None if conv.bias is None else conv.bias.grad)
    return net(bias), g, before - joint_matrix(conv.weight, conv.bias)


def dense(model: nn.Sequential, case: str, approx: str) -> tuple[Tensor, Tensor]:
    """A and B of a convolution under all labels."""
    name, _ = CONVS[case]
    x, _ = data()
    before, columns = traced(model, x, seeds)[name]
    return grouped_factors(model[int(name)], before, columns, len(x), approx)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("approx", ["expand", "reduce"])
@pytest.mark.parametrize("case", CONVS)
def test_kfac_is_the_dense_damped_inverse(case: str, approx: str, bias: bool) -> None:
    common = {"fisher": "exact", "approx": approx, "kl_clip": None, "damping": 0.02, **PLAIN}
    exact = gd.recipes.KFAC(refresh_method="eigh", damping_form="eigenbasis", **common)
    model, g, step = taken(exact, case, bias)
    a, b = dense(model, case, approx)
    close(step, damped_solve(torch.kron(b, a), g, 0.02))
    for method in ("cholesky", "eigh"):  # factored, by inverses and by eigenvalues
        _, g, step = taken(gd.recipes.KFAC(refresh_method=method, **common), case, bias)
        pi = ((a.trace() / len(a)) / (b.trace() / len(b))) ** 0.5
        left = b + 0.02**0.5 / pi * torch.eye(len(b))
        right = a + 0.02**0.5 * pi * torch.eye(len(a))
        close(step, torch.linalg.solve(left, g) @ torch.linalg.inv(right))


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("approx", ["expand", "reduce"])
@pytest.mark.parametrize("case", CONVS)
def test_foof_has_the_inputs_of_all_groups(case: str, approx: str, bias: bool) -> None:
    model, g, step = taken(gd.recipes.FOOF(approx=approx, damping=0.05, **PLAIN), case, bias)
    a, _ = dense(model, case, approx)
    close(step, g @ torch.linalg.inv(a + 0.05 * torch.eye(len(a))))


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("approx", ["expand", "reduce"])
@pytest.mark.parametrize("case", CONVS)
def test_ekfac_has_the_squares_of_whole_sample_gradients(case: str, approx: str, bias: bool) -> None:
    recipe = gd.recipes.EKFAC(
        fisher="exact", approx=approx, kl_clip=None, damping=0.02, factor_decay=0.0, factor_frequency=1, **PLAIN
    )
    model, g, step = taken(recipe, case, bias, rests=1)
    a, b = dense(model, case, approx)
    x, _ = data()
    columns = seeds(model(x).detach())
    right, left = torch.linalg.eigh(a).eigenvectors, torch.linalg.eigh(b).eigenvectors
    name, _ = CONVS[case]
    found = sample_gradients(model, model[int(name)], x, columns)
    scales = torch.stack([(left.T @ one @ right).square() for one in found]).sum(0) / len(x)
    close(step, left @ ((left.T @ g @ right) / (scales + 0.02)) @ right.T)


@pytest.mark.parametrize("structure", ["dense", "diag"])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("approx", ["expand", "reduce"])
@pytest.mark.parametrize("case", CONVS)
def test_singd_takes_the_dense_recursions_step(case: str, approx: str, bias: bool, structure: str) -> None:
    recipe = gd.recipes.SINGD(fisher="exact", approx=approx, damping=0.05, structure=structure, **PLAIN)
    model, g, step = taken(recipe, case, bias, rests=2)
    a, b = dense(model, case, approx)
    k, c = free_roots(a, b, 3, (lambda s: s.diag().diag()) if structure == "diag" else (lambda s: s), 0.05, 0.1, 0.5)
    close(step, c @ c.T @ g @ k @ k.T)


@pytest.mark.parametrize("groups", [2, 4])
@pytest.mark.parametrize("approx", ["expand", "reduce"])
@pytest.mark.parametrize(
    ("part", "h"),
    [
        (Kfac(), {}),
        (Kfac(max_dim=3), {}),
        (Kfac(rule="gcv"), {"fisher": "empirical"}),
        (Kfac(sides="right"), {}),
        (Kfac(sides="left"), {}),
        (KfacInverse(), {}),
        (Ekfac(), {"factor_decay": 0.0}),
        (Ekfac(max_dim=3), {"factor_decay": 0.0}),
        (InverseFree(), {}),
        (InverseFree(structure="tril"), {}),
        (InverseFree(structure="diag"), {}),
    ],
)
def test_groups_are_samples_that_reach_their_own_outputs_alone(part: Any, h: Any, approx: str, groups: int) -> None:
    """The same part on the plain layer whose samples are the pairs of sample and group gives the same direction."""
    n, samples, positions, inputs, m = 5, 6, 3, 4, 4
    a, d = rand(samples, positions, groups * inputs, seed=1), rand(samples, positions, m, seed=2)
    apart = a.view(samples, positions, groups, inputs).transpose(1, 2).flatten(0, 1)
    mask = torch.block_diag(*[torch.ones(1, m // groups).double()] * groups)
    spread = (d[:, None] * mask[:, None]).flatten(0, 1)
    ways = [
        layer(a, d, samples, bias=True, groups=groups, inputs=inputs),
        layer(apart, spread, samples, bias=True),
    ]
    found = []
    for io in ways:
        bed = Bed(part, [block(m, n)], numbers(approx=approx, **h))
        for t in range(2):
            bed.capture(io)
            out = bed.update(rand(1, m, n, seed=3 + t))
        found.append(out)
    close(found[0], found[1])


def test_it_is_the_natural_gradient_where_groups_see_the_same() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(6, 4, 1, groups=2), nn.Flatten()).double()
    half = rand(9, 3, 1, 1, seed=1)
    x, y = torch.cat([half, half], 1), rand(9, 4, seed=2)
    opt = gd.build(
        model,
        gd.recipes.KFAC(refresh_method="eigh", damping_form="eigenbasis", fisher="exact", kl_clip=None, **PLAIN),
        loss="half_mse",
        rules=[gd.rule("0.weight", role="conv")],
    )
    (F.mse_loss(model(x), y, reduction="sum") / 2 / len(x)).backward()
    g = joint_matrix(model[0].weight.grad, model[0].bias.grad)
    jac = jacobian(model, x, ["0.weight", "0.bias"]).flatten(0, 1)[:, joint_order(4, 3)]
    before = joint_matrix(model[0].weight, model[0].bias).clone()
    opt.step()
    close(before - joint_matrix(model[0].weight, model[0].bias), damped_solve(jac.T @ jac / len(x), g, 0.03))


@pytest.mark.parametrize("key", ["kfac", "ekfac", "foof", "singd"])
def test_the_loss_goes_down(key: str) -> None:
    model, (x, y) = net(), data()
    made = {"kfac": {"lr": 0.03}, "ekfac": {"lr": 0.03}, "foof": {"lr": 0.05}, "singd": {"lr": 0.05}}[key]
    recipe = gd.recipes.lookup(key)(**made)
    opt = gd.build(model, recipe, loss=None if key == "foof" else "cross_entropy", rules=CONVS["depthwise"][1])
    lines = {line.parameter: line.recipe for line in gd.explain(opt).lines}
    assert lines["0.weight"] == lines["2.weight"] == key
    losses = []
    for _ in range(15):
        opt.zero_grad()
        loss = F.cross_entropy(model(x), y)
        loss.backward()
        opt.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.8 * losses[0]


def test_a_rule_gives_a_depthwise_convolution_to_a_reader_by_its_name() -> None:
    model = net()
    opt = gd.AdamW(model, rules=[gd.rule("2.weight", recipe=gd.recipes.KFAC())], loss="cross_entropy")
    lines = {line.parameter: line for line in gd.explain(opt).lines}
    assert (lines["2.weight"].recipe, lines["2.weight"].view) == ("kfac", (12, 5))
    assert lines["0.weight"].recipe == "adamw"


def test_other_recipes_keep_a_matrix_for_each_group() -> None:
    model = net()
    opt = gd.KFAC(model, loss="cross_entropy", rules=[gd.rule("0.weight", recipe="muon")])
    lines = {line.parameter: line for line in gd.explain(opt).lines}
    assert (lines["0.weight"].recipe, lines["0.weight"].view) == ("muon", (2, 3, 18))
    assert (lines["2.weight"].recipe, lines["2.weight"].role) == ("adamw", "depthwise")


@pytest.mark.parametrize(
    ("rule", "why"),
    [
        (gd.rule("0.weight", split=2, recipe="kfac"), "are stacks"),
        (gd.rule("2.weight", role="conv", split=2), "that a rule has split"),
        (gd.rule("4.weight", role="matrix", transposed=True), "is turned"),
    ],
)
def test_what_is_no_matrix_of_a_layer_is_not_read(rule: Any, why: str) -> None:
    opt = gd.KFAC(net(), loss="cross_entropy", rules=[rule])
    lines = [line for line in gd.explain(opt).lines if line.parameter.startswith(rule.pattern)]
    assert lines
    assert all(line.recipe == "adamw" and why in line.why for line in lines)


@pytest.mark.parametrize("span", ["neuron", "layer"])
def test_tonga_reads_gradients_alone_and_needs_no_groups(span: str) -> None:
    grouped, plain = nn.Conv2d(4, 6, 3, groups=2, bias=False), nn.Linear(18, 6, bias=False)
    with torch.no_grad():
        plain.weight.copy_(grouped.weight.flatten(1))
    ways = [
        (module, gd.build(module, gd.recipes.TONGA(span=span), rules=[gd.rule("weight", role=role)]))
        for module, role in ((grouped, "conv"), (plain, "matrix"))
    ]
    for t in range(4):
        g = rand(6, 18, seed=t).float()
        for module, opt in ways:
            module.weight.grad = g.view(module.weight.shape).clone()
            opt.step()
    torch.testing.assert_close(grouped.weight.flatten(1), plain.weight, rtol=1e-6, atol=1e-7)
