"""The methods around Adam and the layer-wise ones: references, identities, first steps."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import guided_descent as gd
from guided_descent.parts import Cautious
from guided_descent.parts.memory import slow_memory
from oracles import adam_family as family
from oracles.training import Bag, far, stream, train

PATHS: list[dict[str, bool]] = [{}, {"foreach": False}, {"compile": True}]
IDS = ["lists", "plain", "compiled"]
SHAPES = [(4, 5), (6,), (3, 2, 2)]
#: Recipe, what differs from its defaults, the reference's rule, and the decay that the reference takes beside it.
CASES: list[tuple[str, dict[str, Any], family.Rule, float]] = [
    ("adabelief", {"betas": (0.8, 0.95), "weight_decay": 0.2}, family.adabelief((0.8, 0.95)), 0.2),
    ("adabelief", {"eps": 1e-3}, family.adabelief(eps=1e-3), 0.0),
    ("yogi", {"betas": (0.8, 0.95), "weight_decay": 0.2}, family.yogi((0.8, 0.95)), 0.2),
    ("yogi", {"initial_accumulator": 0.5}, family.yogi(start=0.5), 0.0),
    ("laprop", {"betas": (0.8, 0.95), "weight_decay": 0.2}, family.laprop((0.8, 0.95)), 0.2),
    ("adam_atan2", {"betas": (0.8, 0.95), "weight_decay": 0.2}, family.adam_atan2((0.8, 0.95)), 0.2),
    ("adam_atan2", {"atan2_a": 1.0, "atan2_b": 2.0}, family.adam_atan2(a=1.0, b=2.0), 0.0),
    ("grams", {"betas": (0.8, 0.95), "weight_decay": 0.2}, family.grams((0.8, 0.95)), 0.2),
    ("lars", {"adapt": "all"}, family.lars(), 0.0),
    (
        "lars",
        {"adapt": "all", "momentum": 0.8, "weight_decay": 0.2, "trust_coefficient": 0.1, "eps": 1e-2},
        family.lars(0.1, 0.8, 0.2, 1e-2),
        0.0,
    ),
    ("lars", {"adapt": "all", "clip": True, "trust_coefficient": 0.1}, family.lars(0.1, clip=0.05), 0.0),
    ("lamb", {"adapt": "all"}, family.lamb(), 0.0),
    ("lamb", {"adapt": "all", "weight_decay": 0.2, "trust_clip": True}, family.lamb(weight_decay=0.2, clip=True), 0.0),
    ("novograd", {}, family.novograd(), 0.0),
    ("novograd", {"betas": (0.8, 0.5), "weight_decay": 0.2}, family.novograd((0.8, 0.5), weight_decay=0.2), 0.0),
    ("adopt", {}, family.adopt(), 0.0),
    ("adopt", {"betas": (0.8, 0.95), "eps": 0.5, "clip_exponent": 0.1}, family.adopt((0.8, 0.95), 0.5, 0.1), 0.0),
    ("ademamix", {"weight_decay": 0.2}, family.ademamix(), 0.2),
    (
        "ademamix",
        {"betas": (0.8, 0.95, 0.99), "alpha": 5.0, "alpha_warmup": 25},
        family.ademamix((0.8, 0.95, 0.99), alpha=5.0, warmup=25),
        0.0,
    ),
    ("adan", {"weight_decay": 0.2, "decay": "decoupled"}, family.adan(), 0.2),
    ("adan", {"betas": (0.9, 0.8, 0.7)}, family.adan((0.9, 0.8, 0.7)), 0.0),
    ("mars", {"weight_decay": 0.2}, family.mars(), 0.2),
    ("mars", {"betas": (0.8, 0.95), "gamma": 0.2}, family.mars((0.8, 0.95), gamma=0.2), 0.0),
]


def paths_of(name: str, starts: list[Tensor], steps: int, **options: Any) -> list[list[Tensor]]:
    """What the recipe makes of the streams of these tensors."""
    params = [nn.Parameter(p.clone()) for p in starts]
    opt = gd.optimizer(name, params, **options)
    if options.get("compile"):
        opt._engine.compiled.backend = "eager"
    return train(opt, params, [stream(tuple(p.shape), i) for i, p in enumerate(starts)], steps)


@pytest.mark.parametrize("path", PATHS, ids=IDS)
@pytest.mark.parametrize(("name", "options", "rule", "decay"), CASES)
def test_the_references_steps(
    name: str, options: dict[str, Any], rule: family.Rule, decay: float, path: dict[str, bool]
) -> None:
    shapes = SHAPES if name != "mars" else [(4, 5), (3, 2, 2)]  # vectors have no correction there
    starts = [torch.randn(shape, dtype=torch.float64) for shape in shapes]
    found = paths_of(name, starts, 40, lr=0.05, **options, **path)
    for i, (start, got) in enumerate(zip(starts, found)):
        want = family.walk(start, stream(tuple(start.shape), i), 40, 0.05, rule, decay)
        assert far(got, want) < 1e-11


@pytest.mark.parametrize("path", PATHS, ids=IDS)
@pytest.mark.parametrize("name", ["adamw", "lion", "nadamw", "adopt"])
def test_cautious_on_any_recipe(name: str, path: dict[str, bool]) -> None:
    start, grad = torch.randn(4, 5, dtype=torch.float64), stream((4, 5), 1)
    p, q = nn.Parameter(start.clone()), nn.Parameter(start.clone())
    plain = gd.optimizer(name, [p], lr=0.03, weight_decay=0.0)
    opt = gd.optimizer(name, [q], lr=0.03, weight_decay=0.4, add=[Cautious()], **path)
    if path.get("compile"):
        opt._engine.compiled.backend = "eager"
    for t in range(1, 31):
        before = q.detach().clone()
        p.data.copy_(before)
        p.grad = q.grad = grad(t, before)
        plain.step()
        opt.step()
        u = before - p.detach()
        mask = (u * p.grad > 0).double()
        decayed = before if name == "adopt" and t == 1 else before * (1 - 0.03 * 0.4)
        torch.testing.assert_close(q.detach(), decayed - u * mask / mask.mean().clamp(min=1e-3), atol=1e-13, rtol=1e-10)


def test_a_mask_that_leaves_nothing_makes_no_step() -> None:
    p = nn.Parameter(torch.ones(4))
    opt = gd.SGD([p], lr=0.1, momentum=0.9, add=[Cautious()])
    for value in (1.0, -0.1):
        p.grad = torch.full((4,), value)
        opt.step()
    assert p.detach().tolist() == pytest.approx([0.9] * 4)


def test_the_proximal_decay_of_adan() -> None:
    start = [torch.randn(4, 5, dtype=torch.float64)]
    grad = stream((4, 5), 0)
    p = nn.Parameter(start[0].clone())
    path = train(gd.Adan([p], lr=0.05, weight_decay=0.4), [p], [grad], 40)[0]
    memory: dict[str, Any] = {}
    want, rule = start[0].clone(), family.adan()
    for t, got in enumerate(path, 1):
        want = (want - 0.05 * rule(t, grad(t, want), want, memory)) / (1 + 0.05 * 0.4)
        torch.testing.assert_close(got, want, atol=1e-11, rtol=0)


@pytest.mark.parametrize("scope", ["model", "tensor"])
def test_normalised_steps_have_the_length_of_the_learning_rate(scope: str) -> None:
    starts = [torch.randn(4, 5, dtype=torch.float64), torch.randn(3, dtype=torch.float64)]
    params = [nn.Parameter(p.clone()) for p in starts]
    groups = [{"params": [p]} for p in params]
    opt = gd.NormalizedSGD(groups, lr=0.25, momentum=0.8, scope=scope)
    averages = [torch.zeros_like(p) for p in starts]
    for t in range(1, 36):
        before = [p.detach().clone() for p in params]
        for i, p in enumerate(params):
            p.grad = stream(tuple(p.shape), i)(t, p)
            averages[i] = 0.8 * averages[i] + 0.2 * p.grad
        opt.step()
        whole = torch.cat([m.flatten() for m in averages]).norm()
        for old, p, m in zip(before, params, averages):
            torch.testing.assert_close(old - p.detach(), 0.25 * m / (whole if scope == "model" else m.norm()))
    opt.zero_grad(set_to_none=False)
    fresh = gd.NormalizedSGD(params, lr=0.25, scope=scope)
    before = [p.detach().clone() for p in params]
    fresh.step()
    assert all(torch.equal(a, b) for a, b in zip(before, params))


# -- identities ------------------------------------------------------------------------------------------------------


def same(a: tuple[str, dict[str, Any]], b: tuple[str, dict[str, Any]], bound: float = 1e-12) -> None:
    """Two recipes take the same 40 steps."""
    starts = [torch.randn(shape, dtype=torch.float64) for shape in SHAPES]
    first = paths_of(a[0], starts, 40, lr=0.05, **a[1])
    second = paths_of(b[0], starts, 40, lr=0.05, **b[1])
    assert max(map(far, first, second)) <= bound


def test_ademamix_without_the_slow_momentum_is_adamw() -> None:
    same(
        ("ademamix", {"alpha": 0.0, "weight_decay": 0.1}),
        ("adamw", {"betas": (0.9, 0.999), "weight_decay": 0.1}),
    )


def test_laprop_without_momentum_is_adam_without_it() -> None:
    same(("laprop", {"betas": (0.0, 0.95), "eps": 1e-8}), ("adam", {"betas": (0.0, 0.95)}))


def test_laprop_without_momentum_is_rmsprop_once_its_bias_is_gone() -> None:
    g = torch.tensor([0.3, -2.0], dtype=torch.float64)
    found = []
    for name, options in (("laprop", {"betas": (0.0, 0.5), "eps": 1e-8}), ("rmsprop", {"alpha": 0.5})):
        p = nn.Parameter(torch.zeros_like(g))
        path = train(gd.optimizer(name, [p], lr=0.1, **options), [p], [lambda t, p: g], 60)[0]
        found.append(path[-1] - path[-2])
    torch.testing.assert_close(found[0], found[1], atol=1e-12, rtol=0)


def test_lamb_without_norms_is_adamw() -> None:
    same(("lamb", {"trust_ratio": False, "weight_decay": 0.1}), ("adamw", {"eps": 1e-6, "weight_decay": 0.1}))


def test_lars_at_a_ratio_of_one_is_sgd() -> None:
    same(
        ("lars", {"clip": True, "trust_coefficient": 1e9, "adapt": "all", "weight_decay": 0.1}),
        ("sgd", {"momentum": 0.9, "weight_decay": 0.1}),
    )


def test_mars_without_correction_of_small_gradients_is_adamw() -> None:
    def small(name: str) -> list[Tensor]:
        p = nn.Parameter(torch.ones(3, 4, dtype=torch.float64))
        opt = gd.optimizer(name, [p], lr=0.01, **({"gamma": 0.0} if name == "mars" else {"betas": (0.95, 0.99)}))
        opt.param_groups[0]["weight_decay"] = 0.1
        return train(opt, [p], [lambda t, p: 1e-2 * stream((3, 4), 1)(t, p)], 40)[0]

    assert far(small("mars"), small("adamw")) < 1e-13


def test_adan_on_a_constant_gradient_is_adam_with_its_memories() -> None:
    g = torch.tensor([0.3, -2.0], dtype=torch.float64)
    found = []
    for name, betas in (("adan", (0.98, 0.92, 0.99)), ("adam", (0.98, 0.99))):
        p = nn.Parameter(torch.zeros_like(g))
        found.append(train(gd.optimizer(name, [p], lr=0.1, betas=betas), [p], [lambda t, p: g], 40)[0])
    assert far(*found) < 1e-13


def test_amsgrad_is_adam_with_the_option() -> None:
    same(("amsgrad", {"weight_decay": 0.1}), ("adam", {"amsgrad": True, "weight_decay": 0.1}), 0.0)
    with pytest.raises(TypeError, match="amsgrad has no option 'amsgrad'"):
        gd.AMSGrad([nn.Parameter(torch.ones(2))], amsgrad=False)


def test_adam_atan2_does_not_see_the_scale_of_the_gradient() -> None:
    found, grad = [], stream((3, 4), 1, pull=0.0)
    for scale in (1e-12, 1.0, 1e12):
        p = nn.Parameter(torch.ones(3, 4, dtype=torch.float64))
        found.append(train(gd.AdamAtan2([p], lr=0.1), [p], [lambda t, p, s=scale: s * grad(t, p)], 40)[0])
    assert far(found[0], found[1]) < 1e-12
    assert far(found[2], found[1]) < 1e-12


# -- first steps and published numbers -------------------------------------------------------------------------------


def first_step(name: str, g: Tensor, start: Tensor, **options: Any) -> Tensor:
    p = nn.Parameter(start.clone())
    opt = gd.optimizer(name, [p], lr=0.1, **options)
    p.grad = g.clone()
    opt.step()
    return start - p.detach()


def test_first_steps() -> None:
    g, start = torch.randn(3, 4, dtype=torch.float64), torch.randn(3, 4, dtype=torch.float64)
    sign = 0.1 * g.sign()
    for name in ("adam", "nadam", "laprop", "adan", "grams"):
        extra = {"momentum_decay": 0.0} if name == "nadam" else {}
        torch.testing.assert_close(first_step(name, g, start, eps=0.0, **extra).sign(), g.sign())
    for name in ("adam", "laprop", "adan", "grams", "adam_atan2"):
        options = {} if name == "adam_atan2" else {"eps": 0.0}
        torch.testing.assert_close(first_step(name, g, start, **options), sign)
    assert not first_step("adopt", g, start, weight_decay=0.5).any()
    length = first_step("lamb", g, start).norm()
    torch.testing.assert_close(length, 0.1 * start.norm())
    torch.testing.assert_close(first_step("novograd", g, start).norm().item(), 0.1)


def test_the_slow_memory_of_ademamix_over_its_warmup() -> None:
    found = [slow_memory(t, 0.9, 0.9999, 10_000) for t in (1, 100, 1000, 5000)]
    assert found == pytest.approx([0.9090766, 0.9909010, 0.9990090, 0.9998002], abs=5e-8)
    assert slow_memory(10_000, 0.9, 0.9999, 10_000) == 0.9999
    assert slow_memory(1, 0.9, 0.9999, 0) == 0.9999


def test_tensors_without_a_rate_of_their_own() -> None:
    """Biases take plain SGD in LARS and plain Adam in LAMB; a weight of 0 has the ratio 1."""
    model = Bag({"w": torch.zeros(3, 4), "b": torch.ones(3)})
    for name, step in (("lars", 1.0), ("lamb", 0.1)):
        opt = gd.optimizer(name, [*model.named_parameters()], lr=0.1, weight_decay=0.0)
        before = parameters(model)
        for p in model.parameters():
            p.grad = torch.full_like(p, 10.0)
        opt.step()
        for key, p in model.named_parameters():
            torch.testing.assert_close(before[key] - p.detach(), torch.full_like(p, step))
            p.data.copy_(before[key])


def parameters(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def test_what_is_remembered_of_a_gradient_is_a_copy() -> None:
    """With buffers that are used again the difference would be 0 in silence."""
    for name in ("mars", "adan"):
        p = nn.Parameter(torch.ones(3, 4, dtype=torch.float64))
        opt = gd.optimizer(name, [p], lr=0.1)
        p.grad = torch.ones_like(p)
        for value in (1.0, 3.0):
            p.grad.fill_(value)
            opt.step()
        q = nn.Parameter(torch.ones(3, 4, dtype=torch.float64))
        other = gd.optimizer(name, [q], lr=0.1)
        for value in (1.0, 3.0):
            q.grad = torch.full_like(q, value)
            other.step()
        assert torch.equal(p, q)
        assert float(opt.state[p]["previous_grad"].mean()) == pytest.approx(3.0)


@pytest.mark.parametrize("value", [-1.0, float("inf"), float("nan")])
def test_yogi_begins_at_a_finite_number_not_below_zero(value: float) -> None:
    with pytest.raises(ValueError, match="initial_accumulator"):
        gd.Yogi([nn.Parameter(torch.zeros(3))], initial_accumulator=value)


def test_lars_with_nesterov_needs_momentum() -> None:
    with pytest.raises(ValueError, match="nesterov=True of lars needs momentum > 0"):
        gd.LARS([nn.Parameter(torch.zeros(3, 3))], momentum=0.0, nesterov=True)
