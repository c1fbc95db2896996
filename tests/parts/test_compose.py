"""Parts combine freely: identities that hold whatever the numbers, the slots' order, and who may write what."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor

import guided_descent as gd
from guided_descent.parts import (
    L2,
    ORDER,
    AdamMoments,
    Batch,
    Decoupled,
    Descend,
    Eigenbasis,
    Ema,
    Hyper,
    Momentum,
    NadamMoments,
    Part,
    Parts,
    Polar,
    Slot,
    State,
    writable,
)
from guided_descent.recipes.base import Recipe, hyper, static
from guided_descent.routing import Block
from oracles.elementwise import adamw
from oracles.muon import svd_polar
from oracles.training import Bag, far, stream, train


def recipe_of(*parts: Part, **changes: Any) -> Recipe:
    @dataclass(frozen=True, kw_only=True)
    class Composed(Recipe):
        lr: float = hyper(0.05, ge=0)
        betas: tuple[float, float] = hyper((0.8, 0.9), ge=0, lt=1)
        eps: float = hyper(1e-3, ge=0)
        weight_decay: float = hyper(0.2, ge=0)
        momentum: float = hyper(0.9, ge=0, lt=1)
        dampening: float = hyper(0.0, ge=0)
        momentum_decay: float = hyper(4e-3, ge=0)
        shampoo_beta: float = hyper(0.9, ge=0, lt=1)
        precondition_frequency: int = hyper(2, ge=1)
        refresh_method: str = static("qr")
        product_dtype: str = static("float32")
        refresh_schedule: str = static("every")
        refresh_tolerance: float = hyper(0.0, ge=0)
        refresh_lag: int = static(0)
        second_moment: str = static("permute")
        coefficients: str = static("exact")
        ns_steps: int | None = static(None)
        ns_dtype: str = static("float64")
        ns_method: str = static("auto")

        def parts(self, block: Block) -> Parts:
            return Parts(*parts)

    return Composed(**changes)


def run(recipe: Recipe, start: Tensor, grad: Any, steps: int = 15, **options: Any) -> list[Tensor]:
    model = Bag({"w": start})
    opt = gd.build(model, recipe, rules=[gd.rule("w", role="matrix")], **options)
    return train(opt, list(model.parameters()), [grad], steps)[0]


def test_decay_in_the_direction_is_decoupled_decay() -> None:
    start, grad = torch.randn(4, 5, dtype=torch.float64), stream((4, 5), 1)
    one = run(recipe_of(AdamMoments(), L2().at("decay_direction"), Descend()), start, grad)
    two = run(recipe_of(AdamMoments(), Decoupled(), Descend()), start, grad)
    reference = adamw(start, grad, 15, 0.05, betas=(0.8, 0.9), eps=1e-3, weight_decay=0.2)
    assert far(one, reference) < 1e-13
    assert far(two, reference) < 1e-13


def test_decay_after_the_step() -> None:
    start, grad = torch.randn(3, 3, dtype=torch.float64), stream((3, 3), 2)
    got = run(recipe_of(Decoupled().at("decay_after"), Descend()), start, grad)
    p, want = start, []
    for t in range(1, 16):
        p = (p - 0.05 * grad(t, p)) * (1 - 0.05 * 0.2)
        want.append(p)
    assert far(got, want) < 1e-13


@pytest.mark.parametrize("method", ["qr", "eigh"])
@pytest.mark.parametrize("shape", [(4, 4), (6, 3), (3, 6)])
@pytest.mark.parametrize("max_dim", [10, 5])
def test_a_linear_part_does_not_notice_the_basis(shape: tuple[int, int], method: str, max_dim: int) -> None:
    # An average of rotated gradients, carried along from basis to basis, is the average of the gradients: the state
    # must be rotated out of the old basis and into the new one without loss, on every side that has one.
    start, grad = torch.randn(shape, dtype=torch.float64), stream(shape, 3)
    geometry = Eigenbasis(inner=Ema(), max_dim=max_dim)
    got = run(recipe_of(geometry, Descend(), refresh_method=method), start, grad)
    want = run(recipe_of(Ema(), Descend()), start, lambda t, p: grad(t + 1, p), 14)
    assert torch.equal(got[0], start)
    assert far(got[1:], want) < 1e-12


def test_momentum_after_the_geometry() -> None:
    start, grad = torch.randn(5, 3, dtype=torch.float64), stream((5, 3), 4)
    got = run(recipe_of(Momentum().at("momentum"), Polar(), Descend()), start, grad)
    p, b, want = start, torch.zeros_like(start), []
    for t in range(1, 16):
        b = 0.9 * b + svd_polar(grad(t, p))
        p = p - 0.05 * b
        want.append(p)
    assert far(got, want) < 1e-11


def test_a_scale_before_momentum_is_not_lost() -> None:
    # A part may leave a factor on the direction; whoever stores the direction must apply it first.
    start, grad = torch.randn(3, 4, dtype=torch.float64), stream((3, 4), 5)
    for nesterov in (False, True):
        got = run(recipe_of(Doubled(), Momentum(nesterov=nesterov), Descend()), start, grad)
        want = run(recipe_of(Momentum(nesterov=nesterov), Descend(), lr=0.1), start, grad)
        assert far(got, want) < 1e-13
        got = run(recipe_of(Doubled(), Ema(nesterov=nesterov), Descend()), start, grad)
        want = run(recipe_of(Ema(nesterov=nesterov), Descend(), lr=0.1), start, grad)
        assert far(got, want) < 1e-13
    for moments in (AdamMoments(), NadamMoments()):
        got = run(recipe_of(Doubled(), moments, Descend(), eps=2e-3), start, grad)
        want = run(recipe_of(moments, Descend(), eps=1e-3), start, grad)
        assert far(got, want) < 1e-12
    for geometry in (Polar(), Eigenbasis(inner=AdamMoments(late_correction=True))):  # neither minds the length
        got = run(recipe_of(Doubled(), geometry, Descend(), eps=1e-300), start, grad)
        want = run(recipe_of(geometry, Descend(), eps=1e-300), start, grad)
        assert far(got, want) < 1e-9
    got = run(recipe_of(AdamMoments(), Momentum().at("momentum"), Descend()), start, grad, 3)
    want = run(recipe_of(Momentum(), Descend(), lr=1.0), start, AdamStep(grad, start), 3)
    assert far(got, want) < 1e-12


class AdamStep:
    """What Adam makes of a stream of gradients, as the gradient of a plain method."""

    def __init__(self, grad: Any, start: Tensor) -> None:
        self.grad, self.m, self.v = grad, torch.zeros_like(start), torch.zeros_like(start)

    def __call__(self, t: int, p: Tensor) -> Tensor:
        g = self.grad(t, p)
        self.m, self.v = 0.8 * self.m + 0.2 * g, 0.9 * self.v + 0.1 * g**2
        return 0.05 * (self.m / (1 - 0.8**t)) / ((self.v / (1 - 0.9**t)).sqrt() + 1e-3)


@dataclass(frozen=True)
class Doubled(Part):
    slot = "clip"

    def update(self, x: Batch, s: State, h: Hyper, total: Mapping[str, Tensor]) -> None:
        x.scale(2.0)


def test_gradients_are_never_written() -> None:
    start, grad = torch.randn(4, 4, dtype=torch.float64), stream((4, 4), 6)
    for recipe in (
        recipe_of(L2(), Momentum(nesterov=True), Descend()),
        recipe_of(Doubled(), Ema(nesterov=True), Descend()),
        recipe_of(Eigenbasis(), Descend()),
        recipe_of(Polar(), Decoupled(), Descend()),
    ):
        for options in ({}, {"fused": False}, {"maximize": True}):
            model = Bag({"w": start})
            opt = gd.build(model, recipe, rules=[gd.rule("w", role="matrix")], **options)
            for t in (1, 2, 3):
                model.w.grad = grad(t, start)
                opt.step()
                assert torch.equal(model.w.grad, grad(t, start))


@dataclass(frozen=True)
class Writer(Part):
    slot = "estimate"

    def update(self, x: Batch, s: State, h: Hyper, total: Mapping[str, Tensor]) -> None:
        writable(x).mul_(0.5)


def test_parameters_are_written_in_their_slots_only() -> None:
    start, grad = torch.randn(3, 3), stream((3, 3))
    with pytest.raises(RuntimeError, match="decay_before, step, decay_after and average"):
        run(recipe_of(Writer(), Descend()), start, grad, 1)
    got = run(recipe_of(Writer().at("decay_after"), Descend(), lr=0.0), start, grad, 1)
    torch.testing.assert_close(got[0], 0.5 * start)


@dataclass(frozen=True)
class Held(Part):
    slot = "clip"

    def update(self, x: Batch, s: State, h: Hyper, total: Mapping[str, Tensor]) -> None:
        if x.step == 2:
            x.hold()


def test_a_held_step_leaves_parameters_alone() -> None:
    start, grad = torch.randn(3, 3), stream((3, 3))
    got = run(recipe_of(Held(), Decoupled(), Descend()), start, grad, 3)
    assert not torch.equal(got[0], start)
    assert torch.equal(got[1], got[0])
    assert not torch.equal(got[2], got[1])


def test_the_order_of_slots_and_of_what_shares_one() -> None:
    first, second = Doubled(), Held()
    parts = Parts(Descend(), Decoupled(), second, AdamMoments(), first)
    assert [type(part).__name__ for part in parts] == ["Held", "Doubled", "AdamMoments", "Decoupled", "Descend"]
    assert [ORDER.index(part.where) for part in parts] == sorted(ORDER.index(part.where) for part in parts)
    with pytest.raises(ValueError, match="slot 'late' does not exist"):
        Descend().at("late")
    with pytest.raises(TypeError, match="Part objects"):
        Parts(Descend)  # type: ignore[arg-type]


def test_two_parts_may_not_share_a_state() -> None:
    block = gd.routing.route(torch.nn.Linear(3, 3)).blocks[0]
    with pytest.raises(ValueError, match="'momentum_buffer'"):
        Parts(Momentum(), Ema()).slots(block)
    assert set(Parts(AdamMoments(amsgrad=True)).slots(block)) == {"exp_avg", "exp_avg_sq", "max_exp_avg_sq"}


@dataclass(frozen=True)
class Noisy(Part):
    slot = "clip"

    def slots(self, block: Block) -> dict[str, Slot]:
        return {"noise": Slot()}

    def update(self, x: Batch, s: State, h: Hyper, total: Mapping[str, Tensor]) -> None:
        generator = x.generator("noise")
        for row in s["noise"].list:
            row.normal_(generator=generator)
        x.lend(s["noise"])


def test_random_draws_depend_on_seed_name_and_step_alone() -> None:
    start, grad = torch.zeros(4, 4), stream((4, 4))
    recipe = recipe_of(Noisy(), Descend())
    one, again, other = (run(recipe, start, grad, 4, seed=seed) for seed in (1, 1, 2))
    assert far(one, again) == 0
    assert far(one, other) > 0
    steps = [one[0], *(b - a for a, b in pairwise(one))]
    assert len({float(step.sum()) for step in steps}) == 4


def test_a_part_that_lacks_a_number_is_an_error_at_build() -> None:
    @dataclass(frozen=True, kw_only=True)
    class Bare(Recipe):
        lr: float = hyper(0.1, ge=0)

        def parts(self, block: Block) -> Parts:
            return Parts(Ema(), Descend())

    model = Bag({"w": torch.zeros(3, 2)})
    with pytest.raises(ValueError, match=r"Ema reads 'momentum', which Bare does not have: add the field"):
        gd.build(model, Bare())
