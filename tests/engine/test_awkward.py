"""Awkward methods, written here with the parts' interface alone, each against a dense float64 reference."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor, nn

import guided_descent as gd
from guided_descent.parts import (
    L2,
    AdamMoments,
    Batch,
    Decoupled,
    Descend,
    Hyper,
    MatrixScale,
    Momentum,
    Needs,
    Part,
    Parts,
    Polar,
    Slot,
    State,
)
from guided_descent.parts.base import Unit
from guided_descent.recipes import Constraint, Recipe, hyper, static
from guided_descent.recipes.adam import AdamW
from guided_descent.routing import Block

F64 = torch.float64


def model(dtype: torch.dtype = F64) -> nn.Module:
    torch.manual_seed(1)
    net = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 3))
    return net.to(F64).to(dtype)


def gradients(net: nn.Module, step: int) -> dict[str, Tensor]:
    made = torch.Generator().manual_seed(step)
    return {n: torch.randn(p.shape, generator=made, dtype=F64) for n, p in net.named_parameters()}


def push(opt: Any, net: nn.Module, steps: int, first: int = 0) -> None:
    for step in range(first, first + steps):
        for name, g in gradients(net, step).items():
            p = net.get_parameter(name)
            p.grad = g.to(p.dtype)
        opt.step()


def weights(net: nn.Module) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in net.named_parameters()}


def close(net: nn.Module, expected: Mapping[str, Tensor], tolerance: float = 1e-11) -> None:
    for name, p in net.named_parameters():
        torch.testing.assert_close(p.detach(), expected[name], rtol=tolerance, atol=tolerance)


# -- decay inside the ratio: LAMB; momentum after the ratio: LARS ----------------------------------------------------


@dataclass(frozen=True)
class DecayInside(Part):
    """``u <- u + wd p``, after the estimate."""

    slot: ClassVar[str] = "decay_direction"
    keys: ClassVar[tuple[str, ...]] = ("weight_decay",)  # type: ignore[misc]

    def update(self, x: Batch, s: State, h: Hyper, total: Mapping[str, Tensor]) -> None:
        x.take().add_(x.p, alpha=h["weight_decay"])


@dataclass(frozen=True)
class TrustRatio(Part):
    """``u <- |p| / |u| u`` for each block; 1 where a norm is zero."""

    slot: ClassVar[str] = "scale"
    unit: ClassVar[Unit] = "block"

    def update(self, x: Batch, s: State, h: Hyper, total: Mapping[str, Tensor]) -> None:
        u = x.take()
        ratio = x.p.norms() / u.norms()
        u.mul_(x.by_row(torch.where(ratio.isfinite() & (ratio > 0), ratio, torch.ones_like(ratio))))


@dataclass(frozen=True, kw_only=True)
class Lamb(Recipe):
    lr: float = hyper(0.01, ge=0)
    betas: tuple[float, float] = hyper((0.9, 0.99), ge=0, lt=1)
    eps: float = hyper(1e-6, ge=0)
    weight_decay: float = hyper(0.1, ge=0)

    def parts(self, block: Block) -> Parts:
        return Parts(AdamMoments(), DecayInside(), TrustRatio(), Descend())


@dataclass(frozen=True, kw_only=True)
class Lars(Recipe):
    lr: float = hyper(0.05, ge=0)
    momentum: float = hyper(0.9, ge=0, lt=1)
    dampening: float = hyper(0.0, ge=0)
    weight_decay: float = hyper(0.1, ge=0)

    def parts(self, block: Block) -> Parts:
        return Parts(L2(), TrustRatio(), Momentum().at("momentum"), Descend())


def ratio(p: Tensor, u: Tensor) -> Tensor:
    value = p.norm() / u.norm()
    return value if bool(value > 0) and bool(value.isfinite()) else torch.ones((), dtype=F64)


def test_decay_inside_the_ratio() -> None:
    net = model()
    for name, p in net.named_parameters():
        if name.endswith("0.bias"):
            p.data.zero_()  # a norm of zero
    expected, m, v = weights(net), {}, {}
    push(gd.build(net, Lamb()), net, 8)
    for step in range(1, 9):
        for name, g in gradients(net, step - 1).items():
            wd = 0.1
            m[name] = 0.9 * m.get(name, 0) + 0.1 * g
            v[name] = 0.99 * v.get(name, 0) + 0.01 * g**2
            u = m[name] / (1 - 0.9**step) / ((v[name] / (1 - 0.99**step)).sqrt() + 1e-6) + wd * expected[name]
            expected[name] = expected[name] - 0.01 * ratio(expected[name], u) * u
    close(net, expected)


def test_momentum_after_the_ratio() -> None:
    net = model()
    expected, b = weights(net), {}
    push(gd.build(list(net.named_parameters()), Lars()), net, 8)
    for step in range(8):
        for name, g in gradients(net, step).items():
            u = g + 0.1 * expected[name]
            u = ratio(expected[name], u) * u
            b[name] = 0.9 * b[name] + u if step else u
            expected[name] = expected[name] - 0.05 * b[name]
    close(net, expected)


# -- global sums: a clip of the whole norm, and the distance-over-gradients step --------------------------------------


@dataclass(frozen=True)
class Clip(Part):
    """``u <- u min(1, c / |g|)`` with the norm over all parameters of all groups."""

    slot: ClassVar[str] = "clip"
    keys: ClassVar[tuple[str, ...]] = ("clip",)  # type: ignore[misc]

    def sums(self, x: Batch, s: State, h: Hyper) -> dict[str, Tensor]:
        return {"square": x.g.norms().double().square().sum()}

    def update(self, x: Batch, s: State, h: Hyper, total: Mapping[str, Tensor]) -> None:
        x.scale(float((h["clip"] / total["square"].sqrt()).clamp(max=1.0)))


@dataclass(frozen=True)
class Distance(Part):
    """``u <- max_t |p - p_0| / sqrt(sum_t |g_t|^2) u``: both scalars are the group's, over all of its parameters."""

    slot: ClassVar[str] = "scale"

    def slots(self, block: Block) -> dict[str, Slot]:
        return {
            "start": Slot(),
            "reach": Slot("group", (), F64, fill=1e-3),
            "squares": Slot("group", (), F64),
        }

    def sums(self, x: Batch, s: State, h: Hyper) -> dict[str, Tensor]:
        if x.first:
            s["start"].copy_(x.p)
        way = x.spare("way").copy_(x.p).add_(s["start"], alpha=-1.0)
        return {"way": way.norms().double().square().sum(), "squares": x.g.norms().double().square().sum()}

    def combine(self, total: Mapping[str, Tensor], shared: State, h: Hyper) -> None:
        torch.maximum(shared["reach"], total["way"].sqrt(), out=shared["reach"])
        shared["squares"].add_(total["squares"])

    def update(self, x: Batch, s: State, h: Hyper, total: Mapping[str, Tensor]) -> None:
        x.scale(s["reach"] / s["squares"].sqrt())


@dataclass(frozen=True, kw_only=True)
class Clipped(Recipe):
    lr: float = hyper(0.05, ge=0)
    clip: float = hyper(0.5, gt=0)
    momentum: float = hyper(0.9, ge=0, lt=1)
    dampening: float = hyper(0.0, ge=0)
    weight_decay: float = hyper(0.0, ge=0)

    def parts(self, block: Block) -> Parts:
        return Parts(Clip(), Momentum(), Descend())


@dataclass(frozen=True, kw_only=True)
class Dog(Recipe):
    lr: float = hyper(1.0, ge=0)
    weight_decay: float = hyper(0.0, ge=0)

    def parts(self, block: Block) -> Parts:
        return Parts(Distance(), Descend())


@pytest.mark.parametrize("groups", [1, 2])
def test_a_global_clip_sees_every_group(groups: int) -> None:
    net = model()
    rules = [gd.rule("*.bias", lr=0.01)] if groups == 2 else []
    opt = gd.build(net, Clipped(), rules=rules)
    assert len(opt.param_groups) == groups
    expected, b = weights(net), {}
    push(opt, net, 6)
    for step in range(6):
        found = gradients(net, step)
        norm = torch.stack([g.norm() for g in found.values()]).norm()
        for name, g in found.items():
            u = g * min(1.0, 0.5 / float(norm))
            b[name] = 0.9 * b[name] + u if step else u
            expected[name] = expected[name] - (0.01 if groups == 2 and "bias" in name else 0.05) * b[name]
    close(net, expected)


def test_a_wrapper_clips_any_recipe() -> None:
    """A part with a global sum, added to Muon with its auxiliary recipe."""

    @dataclass(frozen=True)
    class Unit1(Clip):
        @property
        def keys(self) -> tuple[str, ...]:
            return ()

        def update(self, x: Batch, s: State, h: Hyper, total: Mapping[str, Tensor]) -> None:
            x.scale(float(1 / total["square"].sqrt()))

    net, other = model(), model()
    opt = gd.build(net, gd.recipes.Muon(ns_dtype="float64"), add=[Unit1()])
    plain = gd.build(other, gd.recipes.Muon(ns_dtype="float64"))
    for step in range(5):
        found = gradients(net, step)
        norm = torch.stack([g.norm() for g in found.values()]).norm()
        for name, g in found.items():
            net.get_parameter(name).grad = g
            other.get_parameter(name).grad = g / norm
        opt.step()
        plain.step()
    close(net, weights(other))


def test_a_scalar_of_the_group_steps_by_distance() -> None:
    net = model()
    opt = gd.build(net, Dog())
    start, expected = weights(net), weights(net)
    reach, squares = 1e-3, 0.0
    for step in range(12):
        if step == 5:  # group scalars are part of the checkpoint
            saved = copy.deepcopy(opt.state_dict())
            opt = gd.build(net, Dog())
            opt.load_state_dict(saved)
        push(opt, net, 1, first=step)
        found = gradients(net, step)
        way = torch.cat([(expected[n] - start[n]).flatten() for n in found]).norm()
        reach = max(reach, float(way))
        squares += float(torch.cat([g.flatten() for g in found.values()]).square().sum())
        for name, g in found.items():
            expected[name] = expected[name] - reach / squares**0.5 * g
    close(net, expected)
    assert float(opt.param_groups[0]["extra"]["reach"]) == pytest.approx(reach, rel=1e-12)
    assert gd.explain(opt).parameters == sum(p.numel() for p in net.parameters())


# -- two evaluations: SAM ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Ascent(Part):
    """The gradient is taken at ``p + rho g / |g|``, with the norm over everything."""

    slot: ClassVar[str] = "clip"
    needs: ClassVar[Needs] = Needs(evaluations=2)
    keys: ClassVar[tuple[str, ...]] = ("rho",)  # type: ignore[misc]

    def sums(self, x: Batch, s: State, h: Hyper) -> dict[str, Tensor]:
        return {"square": x.g.norms().double().square().sum()}

    def probe(self, x: Batch, s: State, h: Hyper, total: Mapping[str, Tensor]) -> None:
        x.scale(h["rho"] / float(total["square"].sqrt()))

    def update(self, x: Batch, s: State, h: Hyper, total: Mapping[str, Tensor]) -> None:
        """Nothing: the gradient is the one of the probe."""


@dataclass(frozen=True, kw_only=True)
class Sam(Recipe):
    lr: float = hyper(0.05, ge=0)
    rho: float = hyper(0.1, ge=0)
    momentum: float = hyper(0.9, ge=0, lt=1)
    dampening: float = hyper(0.0, ge=0)
    weight_decay: float = hyper(0.0, ge=0)

    def parts(self, block: Block) -> Parts:
        return Parts(Ascent(), Momentum(), Descend())


@pytest.mark.parametrize("dtype", [F64, torch.float32, torch.bfloat16])
def test_two_evaluations(dtype: torch.dtype) -> None:
    net = model(dtype)
    opt = gd.build(net, Sam(), rules=[gd.rule("*.bias", rho=0.1, lr=0.05)])
    data = torch.randn(16, 4, dtype=dtype)
    expected, b = weights(net), {}
    seen: list[dict[str, Tensor]] = []

    def closure() -> Tensor:
        seen.append(weights(net))
        opt.zero_grad()
        loss = net(data).square().mean()
        loss.backward()
        return loss

    def grads_at(values: Mapping[str, Tensor]) -> dict[str, Tensor]:
        other = model(dtype)
        other.load_state_dict(values)
        other(data).square().mean().backward()
        return {n: p.grad for n, p in other.named_parameters()}

    for step in range(4):
        before = weights(net)
        loss = opt.step(closure)
        assert len(seen) == 2 * (step + 1)
        assert all(torch.equal(seen[-2][n], before[n]) for n in before)
        first = grads_at(before)
        norm = torch.cat([g.double().flatten() for g in first.values()]).norm()
        other = {n: (p.double() + 0.1 * first[n].double() / norm) for n, p in before.items()}
        tolerance = {F64: 1e-12, torch.float32: 1e-6, torch.bfloat16: 1e-2}[dtype]
        for n in other:
            torch.testing.assert_close(seen[-1][n].double(), other[n], rtol=tolerance, atol=tolerance)
        assert float(loss) == float(nn_loss(before, data, dtype))
        if dtype == F64:
            second = grads_at(seen[-1])
            for n, g in second.items():
                b[n] = 0.9 * b[n] + g if step else g
                expected[n] = expected[n] - 0.05 * b[n]
    if dtype == F64:
        close(net, expected)
    with pytest.raises(ValueError, match="Ascent needs 2 gradient evaluations"):
        opt.step()


def nn_loss(values: Mapping[str, Tensor], data: Tensor, dtype: torch.dtype) -> Tensor:
    other = model(dtype)
    other.load_state_dict(values)
    return other(data).square().mean().detach()


def test_the_parameters_come_back_to_the_bit() -> None:
    net = model(torch.float32)
    opt = gd.build(net, Sam(lr=0.0))
    before = weights(net)

    def closure() -> Tensor:
        opt.zero_grad()
        loss = net(torch.ones(3, 4)).square().mean()
        loss.backward()
        return loss

    for _ in range(3):
        opt.step(closure)
    assert all(torch.equal(p, before[n]) for n, p in net.named_parameters())


def test_a_bad_second_gradient_is_skipped_and_undone() -> None:
    net = model(torch.float32)
    opt = gd.build(net, Sam())
    before, calls = weights(net), [0]

    def closure() -> Tensor:
        calls[0] += 1
        opt.zero_grad()
        loss = net(torch.ones(3, 4)).square().mean()
        loss.backward()
        if calls[0] % 2 == 0:
            net[0].weight.grad[0, 0] = torch.nan
        return loss

    opt.step(closure)
    assert (opt.steps, opt.skipped) == (0, 1)
    assert all(torch.equal(p, before[n]) for n, p in net.named_parameters())


def test_a_closure_that_fails_at_the_probe_leaves_the_parameters() -> None:
    net = model(torch.float32)
    opt = gd.build(net, Sam())
    before, calls = weights(net), [0]

    def closure() -> Tensor:
        calls[0] += 1
        if calls[0] == 2:
            raise RuntimeError("out of data")
        opt.zero_grad()
        loss = net(torch.ones(3, 4)).square().mean()
        loss.backward()
        return loss

    with pytest.raises(RuntimeError, match="out of data"):
        opt.step(closure)
    assert all(torch.equal(p, before[n]) for n, p in net.named_parameters())


# -- a coupled constraint ----------------------------------------------------------------------------------------------


def balance(pair: Sequence[Tensor], h: Mapping[str, Any], notes: Mapping[str, Tensor]) -> None:
    """Scale two weights so that their norms are equal and their product stays."""
    a, b = pair
    factor = (b.norm() / a.norm()).sqrt()
    a.mul_(factor)
    b.div_(factor)


@dataclass(frozen=True, kw_only=True)
class Balanced(Recipe):
    lr: float = hyper(0.05, ge=0)

    def parts(self, block: Block) -> Parts:
        return Parts(Descend())

    def constraints(self, blocks: Sequence[Block]) -> Sequence[Constraint]:
        return [Constraint(("0.weight", "2.weight"), balance)]


def test_a_constraint_couples_two_parameters() -> None:
    net = model()
    opt = gd.build(net, Balanced())
    expected = weights(net)
    push(opt, net, 5)
    for step in range(5):
        for name, g in gradients(net, step).items():
            expected[name] = expected[name] - 0.05 * g
        balance([expected["0.weight"], expected["2.weight"]], {}, {})
    close(net, expected)
    assert float(net[0].weight.norm()) == pytest.approx(float(net[2].weight.norm()), rel=1e-12)


def test_a_constraint_on_an_unknown_name_is_an_error() -> None:
    net = nn.Sequential(nn.Linear(2, 2))
    opt = gd.build(net, Balanced())
    net[0].weight.grad = torch.ones(2, 2)
    with pytest.raises(ValueError, match=r"Balanced names '2\.weight'"):
        opt.step()


# -- a composition of the user's, of parts that exist -----------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class SpectralAdam(Recipe):
    """The polar factor of Adam's direction."""

    matrix = True
    lr: float = hyper(0.02, ge=0)
    betas: tuple[float, float] = hyper((0.9, 0.99), ge=0, lt=1)
    weight_decay: float = hyper(0.1, ge=0)
    eps: float = hyper(1e-8, ge=0)
    scale: str = static("match_rms_adamw")
    coefficients: str = static("exact")
    ns_steps: int | None = static(None)
    ns_dtype: str = static("float32")
    ns_method: str = static("auto")
    aux: Recipe = field(default_factory=lambda: AdamW(lr=1e-3))

    def route(self, block: Block) -> Recipe:
        return self if block.is_matrix else self.aux

    def parts(self, block: Block) -> Parts:
        return Parts(AdamMoments(), Polar(), MatrixScale(), Decoupled(), Descend())


def test_a_composition_costs_at_most_25_lines() -> None:
    lines = [line for line in inspect.getsource(SpectralAdam).splitlines() if line.strip()]
    assert len(lines) <= 25


def test_a_composition_equals_its_formula() -> None:
    net = model()
    opt = gd.build(net, SpectralAdam())
    lines = {line.parameter: line for line in gd.explain(opt).lines}
    assert lines["0.weight"].recipe == lines["2.weight"].recipe == "SpectralAdam"
    assert lines["4.weight"].recipe == lines["0.bias"].recipe == "adamw"
    assert gd.explain(opt).state_bytes == opt.state_bytes()
    expected, m, v = weights(net), {}, {}
    push(opt, net, 6)
    for step in range(1, 7):
        for name in ("0.weight", "2.weight"):
            g = gradients(net, step - 1)[name]
            m[name] = 0.9 * m.get(name, 0) + 0.1 * g
            v[name] = 0.99 * v.get(name, 0) + 0.01 * g**2
            u = m[name] / (1 - 0.9**step) / ((v[name] / (1 - 0.99**step)).sqrt() + 1e-8)
            a, _, b = torch.linalg.svd(u, full_matrices=False)
            length = 0.2 * max(u.shape) ** 0.5
            expected[name] = expected[name] * (1 - 0.02 * 0.1) - 0.02 * length * a @ b
    for name in ("0.weight", "2.weight"):
        torch.testing.assert_close(net.get_parameter(name).detach(), expected[name], rtol=1e-9, atol=1e-10)
    assert opt.audit()["2.weight"]["orthogonalizations"] == 6


AWKWARD = [SpectralAdam(), Lamb(), Lars(), Clipped(), Dog(), Balanced()]


@pytest.mark.parametrize("recipe", AWKWARD, ids=lambda recipe: recipe.label)
def test_resume_is_bitwise(recipe: Recipe) -> None:
    net, other = model(torch.float32), model(torch.float32)
    opt, fresh = gd.build(net, recipe), gd.build(other, recipe)
    push(opt, net, 4)
    other.load_state_dict(net.state_dict())
    fresh.load_state_dict(copy.deepcopy(opt.state_dict()))
    push(opt, net, 4, first=4)
    push(fresh, other, 4, first=4)
    assert all(torch.equal(p, net.get_parameter(n)) for n, p in other.named_parameters())


@pytest.mark.parametrize("recipe", AWKWARD, ids=lambda recipe: recipe.label)
@pytest.mark.parametrize("rounding", ["master", "compensated", "stochastic"])
def test_half_precision_follows_the_full_one(recipe: Recipe, rounding: str) -> None:
    net, other = model(torch.bfloat16), model(torch.float32)
    other.load_state_dict(net.state_dict())
    opt, full = gd.build(net, recipe, rounding=rounding), gd.build(other, recipe)
    for step in range(12):
        for name, g in gradients(net, step).items():
            net.get_parameter(name).grad = g.to(torch.bfloat16)
            other.get_parameter(name).grad = g.to(torch.bfloat16).float()
        opt.step()
        full.step()
    # one rounding of the result, or the random walk of twelve; a constraint writes the rounded parameters themselves
    bound = 2.0**-6 if rounding == "stochastic" or isinstance(recipe, Balanced) else 2.0**-8
    for name, p in net.named_parameters():
        wanted = other.get_parameter(name).detach()
        assert float((p.detach().float() - wanted).norm()) <= bound * float(wanted.norm()), name


@dataclass(frozen=True)
class Late(Clip):
    """A part that asks for its sum when parameters are already being written."""

    slot: ClassVar[str] = "decay_after"


def test_global_sums_come_before_the_writes() -> None:
    net = model()
    with pytest.raises(ValueError, match="'decay_after'"):
        push(gd.build(net, Clipped(), add=[Late()]), net, 1)


@pytest.mark.parametrize("recipe", [SpectralAdam(), Lamb(), Lars(), Balanced()], ids=lambda recipe: recipe.label)
def test_compiled_equals_eager(recipe: Recipe) -> None:
    net, other = model(), model()
    opt, eager = gd.build(net, recipe), gd.build(other, recipe)
    opt.compile(backend="eager")
    push(opt, net, 5)
    push(eager, other, 5)
    close(net, weights(other), 1e-9)
    torch._dynamo.reset()


def test_recipes_with_global_sums_compile_too() -> None:
    net, other = model(), model()
    opt, eager = gd.build(net, Clipped()), gd.build(other, Clipped())
    opt.compile(backend="eager")
    push(opt, net, 5)
    push(eager, other, 5)
    close(net, weights(other), 1e-12)


@pytest.mark.parametrize("recipe", AWKWARD, ids=lambda recipe: recipe.label)
def test_the_forecast_holds(recipe: Recipe) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        opt = gd.build(model(dtype), recipe)
        assert gd.explain(opt).state_bytes == opt.state_bytes()
