"""Fused kernels equal the parts that they stand for, and step aside where they cannot serve."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from torch import Tensor

import guided_descent as gd
from guided_descent.kernels import KERNELS, Scales, find
from guided_descent.parts import L2, AdamMoments, Decoupled, Descend, Momentum, Part, Parts
from guided_descent.recipes.base import Recipe, hyper
from guided_descent.routing import Block
from oracles.training import Bag, far, stream, train

SHAPES = [(5, 3), (4,), (), (4, 3, 2, 2), (300, 1000)]  # the last one is cut into chunks without a kernel
ALL = list(KERNELS)


def label(parts: Parts) -> str:
    """A short name of a combination."""
    flags = ("amsgrad", "nesterov")
    names = [type(part).__name__ + "".join(f"-{f}" for f in flags if getattr(part, f, False)) for part in parts]
    return "+".join(names)


def recipe_of(parts: Parts) -> Recipe:
    """A recipe made of just these parts."""
    damped = 0.0 if Momentum(nesterov=True) in parts else 0.3

    @dataclass(frozen=True, kw_only=True)
    class Composed(Recipe):
        lr: float = hyper(0.05, ge=0)
        betas: tuple[float, float] = hyper((0.8, 0.9), ge=0, lt=1)
        eps: float = hyper(1e-3, ge=0)
        weight_decay: float = hyper(0.2, ge=0)
        momentum: float = hyper(0.9, ge=0, lt=1)
        dampening: float = hyper(damped, ge=0)

        def parts(self, block: Block) -> Parts:
            return parts

    return Composed()


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The kernels run so far."""
    seen: list[str] = []

    def counted(run: Callable[..., None]) -> Callable[..., None]:
        def wrapped(self: Any, *args: Any, **kwargs: Any) -> None:
            seen.append(type(self).__name__)
            run(self, *args, **kwargs)

        return wrapped

    for kernel in {type(kernel) for kernel in KERNELS.values()}:
        monkeypatch.setattr(kernel, "run", counted(kernel.run))
    return seen


def paths(parts: Parts, dtype: torch.dtype, steps: int = 15, **options: Any) -> list[list[Tensor]]:
    torch.manual_seed(1)
    params = [torch.nn.Parameter(torch.randn(shape, dtype=dtype)) for shape in SHAPES]
    opt = gd.build(params, recipe_of(parts), **options)
    return train(opt, params, [stream(shape, i) for i, shape in enumerate(SHAPES)], steps)


@pytest.mark.parametrize("maximize", [False, True])
@pytest.mark.parametrize(("dtype", "limit"), [(torch.float32, 1e-6), (torch.float64, 1e-13)])
@pytest.mark.parametrize("parts", ALL, ids=label)
def test_a_kernel_equals_its_parts(
    parts: Parts, dtype: torch.dtype, limit: float, maximize: bool, calls: list[str]
) -> None:
    fast = paths(parts, dtype, maximize=maximize)
    assert len(calls) == 15  # one call for all tensors of a step
    for option in ({"fused": False}, {"foreach": False}):
        slow = paths(parts, dtype, maximize=maximize, **option)
        assert max(map(far, fast, slow)) < limit
    assert len(calls) == 15


@pytest.mark.parametrize("parts", ALL, ids=label)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_takes_the_parts(parts: Parts, dtype: torch.dtype, calls: list[str]) -> None:
    start = torch.randn(6, 5).to(dtype)
    p = torch.nn.Parameter(start.clone())
    opt = gd.build([p], recipe_of(parts), rounding="master")
    got = train(opt, [p], [stream((6, 5), 1, pull=0.0)], 10)[0]
    assert not calls
    wide = torch.nn.Parameter(start.float())
    grad = stream((6, 5), 1, pull=0.0)
    reference = train(gd.build([wide], recipe_of(parts)), [wide], [lambda t, p: grad(t, p.to(dtype)).float()], 10)[0]
    assert p.dtype == dtype
    assert far(got, [r.to(dtype) for r in reference]) <= torch.finfo(dtype).eps  # at most one rounding apart


@pytest.mark.parametrize("parts", ALL, ids=label)
def test_gradients_that_lie_differently_take_the_parts(parts: Parts, calls: list[str]) -> None:
    start, grad = torch.randn(6, 4, dtype=torch.float64), stream((6, 4), 2)
    ends = []
    for layout in (lambda g: g, lambda g: g.T.contiguous().T):
        p = torch.nn.Parameter(start.clone())
        opt = gd.build([p], recipe_of(parts))
        train(opt, [p], [lambda t, p, layout=layout: layout(grad(t, p))], 8)
        ends.append(p.detach())
    assert len(calls) == 8  # the first run only
    assert far([ends[1]], [ends[0]]) < 1e-13


def test_a_gradient_that_is_expanded(calls: list[str]) -> None:
    ends = []
    for dense in (True, False):
        p = torch.nn.Parameter(torch.ones(3, 4, dtype=torch.float64))
        opt = gd.AdamW([p], lr=0.1)
        for value in (1.0, -0.5, 2.0):
            g = torch.tensor(value, dtype=torch.float64).expand(3, 4)
            p.grad = g.clone() if dense else g
            opt.step()
        ends.append(p.detach())
    assert len(calls) == 3
    assert far([ends[1]], [ends[0]]) < 1e-13


@pytest.mark.parametrize("parts", ALL, ids=label)
def test_channels_last_parameters_take_the_parts(parts: Parts, calls: list[str]) -> None:
    start, grad = torch.randn(4, 3, 2, 2, dtype=torch.float64), stream((4, 3, 2, 2), 3)
    dense, last = torch.contiguous_format, torch.channels_last
    ends = []
    for layout, of_gradient in ((dense, dense), (last, last), (last, dense), (dense, last)):
        p = torch.nn.Parameter(start.clone().contiguous(memory_format=layout))
        opt = gd.build([p], recipe_of(parts))
        train(opt, [p], [lambda t, p, layout=of_gradient: grad(t, p).contiguous(memory_format=layout)], 8)
        assert p.is_contiguous(memory_format=layout)
        ends.append(p.detach())
    assert len(calls) == 8  # the first run only
    assert all(far([end], ends[:1]) < 1e-13 for end in ends[1:])


def test_complex_parameters_take_the_parts(calls: list[str]) -> None:
    p = torch.nn.Parameter(torch.randn(3, dtype=torch.complex64))
    opt = gd.AdamW([p])
    p.grad = torch.randn(3, dtype=torch.complex64)
    opt.step()
    assert not calls


@pytest.mark.parametrize("parts", ALL, ids=label)
def test_a_gradient_that_comes_late_meets_a_first_step(parts: Parts) -> None:
    start, grad = torch.randn(3, 2, dtype=torch.float64), stream((3, 2), 4)
    late = [torch.nn.Parameter(start.clone()) for _ in range(2)]
    opt = gd.build(late, recipe_of(parts))
    train(opt, late[:1], [grad], 4)
    got = train(opt, late[1:], [grad], 6)[0]
    fresh = torch.nn.Parameter(start.clone())
    assert far(got, train(gd.build([fresh], recipe_of(parts)), [fresh], [grad], 6)[0]) == 0


class Nothing(Part):
    """A part that does nothing, yet makes the combination another one."""

    def update(self, x: Any, s: Any, h: Any, total: Any) -> None:
        pass


def test_one_more_part_is_another_method() -> None:
    cpu, plain = torch.device("cpu"), Scales(1.0, 2.0, 3.0)
    parts = Parts(AdamMoments(), Decoupled(), Descend())
    assert find(parts, cpu, torch.float32, plain) is KERNELS[parts]
    assert find(Parts(*parts, Nothing()), cpu, torch.float32, plain) is None
    assert find(Parts(AdamMoments(late_correction=True), Decoupled(), Descend()), cpu, torch.float32, plain) is None
    assert find(Parts(AdamMoments(), Decoupled(independent=True), Descend()), cpu, torch.float32, plain) is None
    assert find(Parts(AdamMoments(), L2(), Descend()), cpu, torch.float32, plain) is None
    assert find(parts, cpu, torch.float32, Scales(0.5, 1.0, 1.0)) is None  # its decay would be scaled as well
    assert find(parts, torch.device("meta"), torch.float32, plain) is None
    assert find(parts, cpu, torch.bfloat16, plain) is None


@pytest.mark.parametrize("parts", ALL, ids=label)
@pytest.mark.parametrize("scales", [{"wd_scale": 3.0, "eps_scale": 10.0}, {"wd_scale": 0.0}], ids=str)
def test_multipliers_of_decay_and_eps_reach_the_kernel(
    parts: Parts, scales: dict[str, float], calls: list[str]
) -> None:
    start, grad = torch.randn(3, 4, dtype=torch.float64), stream((3, 4), 5)
    got = []
    for option in ({}, {"fused": False}):
        model = Bag({"w": start})
        opt = gd.build(model, recipe_of(parts), rules=[gd.rule("w", role="matrix")], **option)
        blocks = opt._engine.binder.blocks
        blocks["w"] = tuple(replace(block, **scales) for block in blocks["w"])
        opt._engine.forget()
        got.append(train(opt, list(model.parameters()), [grad], 6)[0])
    assert len(calls) == 6
    assert far(*got) < 1e-13
