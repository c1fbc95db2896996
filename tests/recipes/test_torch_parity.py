"""Recipes that torch has too take torch's steps: over 50 of them, for every option that both have."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import guided_descent as gd
from oracles.training import Bag, far, stream, train

SHAPES = [(5, 3), (3, 7), (4,), (), (4, 3, 2, 2), (1, 6), (2, 3, 4)]
STEPS = 50
DTYPES = [torch.float32, torch.float64]

SGD_OPTIONS = [
    {},
    {"weight_decay": 0.1},
    {"momentum": 0.9},
    {"momentum": 0.9, "dampening": 0.5},
    {"momentum": 0.9, "dampening": 0.5, "weight_decay": 0.1, "maximize": True},
    {"momentum": 0.9, "nesterov": True},
    {"momentum": 0.9, "nesterov": True, "weight_decay": 0.1},
    {"momentum": 0.5, "maximize": True},
]
ADAMW_OPTIONS = [
    {},
    {"weight_decay": 0.0},
    {"weight_decay": 0.3, "amsgrad": True},
    {"betas": (0.8, 0.95), "eps": 1e-3, "maximize": True},
    {"betas": (0.0, 0.9), "amsgrad": True, "maximize": True, "weight_decay": 0.1},
]
NADAM_OPTIONS = [
    {},
    {"weight_decay": 0.1},
    {"momentum_decay": 0.1, "betas": (0.8, 0.95), "eps": 1e-3},
    {"maximize": True, "weight_decay": 0.1},
]
#: Recipes without a kernel: torch's class, and what both are given.
ADAPTIVE: dict[str, tuple[Any, list[dict[str, Any]]]] = {
    "adagrad": (
        torch.optim.Adagrad,
        [
            {},
            {"lr_decay": 0.1, "eps": 1e-3, "weight_decay": 0.1},
            {"initial_accumulator_value": 0.5, "maximize": True, "weight_decay": 0.1},
        ],
    ),
    "rmsprop": (
        torch.optim.RMSprop,
        [
            {},
            {"alpha": 0.9, "eps": 1e-3, "weight_decay": 0.1, "maximize": True},
            {"momentum": 0.9},
            {"centered": True},
            {"centered": True, "momentum": 0.8, "alpha": 0.7, "weight_decay": 0.1},
        ],
    ),
    "adadelta": (torch.optim.Adadelta, [{}, {"rho": 0.7, "eps": 1e-3, "weight_decay": 0.1}, {"maximize": True}]),
    "adamax": (
        torch.optim.Adamax,
        [{}, {"betas": (0.8, 0.9), "eps": 1e-2, "weight_decay": 0.1}, {"betas": (0.0, 0.5), "maximize": True}],
    ),
    "adam": (
        torch.optim.Adam,
        [
            {},
            {"weight_decay": 0.3, "amsgrad": True},
            {"betas": (0.8, 0.95), "eps": 1e-3, "maximize": True, "weight_decay": 0.1},
        ],
    ),
    "radam": (
        torch.optim.RAdam,
        [
            {},
            {"betas": (0.8, 0.95), "eps": 1e-3, "weight_decay": 0.1},
            {"betas": (0.9, 0.6), "maximize": True},  # never rectified
        ],
    ),
}
EVERY = [(name, options) for name, (_, table) in ADAPTIVE.items() for options in table]


def same_steps(
    ours: Callable[[list[Tensor]], Any],
    theirs: Callable[[list[Tensor]], Any],
    dtype: torch.dtype,
    before: Callable[[Any, int], object] | None = None,
    shapes: list[tuple[int, ...]] = SHAPES,
) -> float:
    """The largest difference over all parameters and steps."""
    starts = [torch.randn(shape, dtype=dtype) for shape in shapes]
    grads = [stream(shape, seed) for seed, shape in enumerate(shapes)]
    paths = []
    for make in (ours, theirs):
        params = [torch.nn.Parameter(p.clone()) for p in starts]
        opt = make(params)
        hook = None if before is None else functools.partial(before, opt)
        paths.append(train(opt, params, grads, STEPS, hook))
    return max(map(far, *paths))


def limit(dtype: torch.dtype) -> float:
    return 1e-6 if dtype == torch.float32 else 1e-13


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("options", SGD_OPTIONS)
@pytest.mark.parametrize("path", [{"foreach": False}, {"fused": True}], ids=["plain", "fused"])
def test_sgd_is_torchs_bit_for_bit(options: dict[str, Any], path: dict[str, bool], dtype: torch.dtype) -> None:
    ours = dict(path) if "foreach" in path else {}
    difference = same_steps(
        lambda params: gd.SGD(params, lr=0.05, **options, **ours),
        lambda params: torch.optim.SGD(params, lr=0.05, **options, **path),
        dtype,
    )
    assert difference == 0


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("options", SGD_OPTIONS)
def test_sgd_over_lists_is_torchs_bit_for_bit(options: dict[str, Any], dtype: torch.dtype) -> None:
    difference = same_steps(
        lambda params: gd.SGD(params, lr=0.05, fused=False, **options),
        lambda params: torch.optim.SGD(params, lr=0.05, foreach=True, **options),
        dtype,
    )
    assert difference == 0


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("options", ADAMW_OPTIONS)
def test_adamw_is_torchs_fused_one_bit_for_bit(options: dict[str, Any], dtype: torch.dtype) -> None:
    difference = same_steps(
        lambda params: gd.AdamW(params, lr=1e-2, **options),
        lambda params: torch.optim.AdamW(params, lr=1e-2, fused=True, **options),
        dtype,
    )
    assert difference == 0


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("path", [{"fused": False}, {"foreach": False}], ids=["lists", "plain"])
@pytest.mark.parametrize("options", ADAMW_OPTIONS)
def test_adamw_without_a_kernel_is_torchs(options: dict[str, Any], path: dict[str, bool], dtype: torch.dtype) -> None:
    difference = same_steps(
        lambda params: gd.AdamW(params, lr=1e-2, **options, **path),
        lambda params: torch.optim.AdamW(params, lr=1e-2, foreach=False, **options),
        dtype,
    )
    assert difference < limit(dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("path", [{}, {"foreach": False}], ids=["lists", "plain"])
@pytest.mark.parametrize("options", NADAM_OPTIONS)
def test_nadam_is_torchs(options: dict[str, Any], path: dict[str, bool], dtype: torch.dtype) -> None:
    difference = same_steps(
        lambda params: gd.NAdam(params, lr=1e-2, **options, **path),
        lambda params: torch.optim.NAdam(params, lr=1e-2, foreach=False, **options),
        dtype,
    )
    assert difference < 1e-6  # torch keeps the product of the momenta in float32


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("path", [{}, {"foreach": False}], ids=["lists", "plain"])
@pytest.mark.parametrize("options", NADAM_OPTIONS)
def test_nadamw_is_torchs_decoupled_nadam(options: dict[str, Any], path: dict[str, bool], dtype: torch.dtype) -> None:
    settings = {"weight_decay": 0.0} | options
    difference = same_steps(
        lambda params: gd.NAdamW(params, lr=1e-2, **settings, **path),
        lambda params: torch.optim.NAdam(params, lr=1e-2, decoupled_weight_decay=True, foreach=False, **settings),
        dtype,
    )
    assert difference < 1e-6  # torch keeps the product of the momenta in float32


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("path", [{}, {"foreach": False}], ids=["lists", "plain"])
@pytest.mark.parametrize(("name", "options"), EVERY)
def test_adaptive_recipes_are_torchs(
    name: str, options: dict[str, Any], path: dict[str, bool], dtype: torch.dtype
) -> None:
    difference = same_steps(
        lambda params: gd.optimizer(name, params, lr=1e-2, **options, **path),
        lambda params: ADAPTIVE[name][0](params, lr=1e-2, foreach=False, **options),
        dtype,
    )
    assert difference < (1e-5 if dtype == torch.float32 else 1e-13)


@pytest.mark.parametrize("nesterov", [True, False])
@pytest.mark.parametrize("scale", ["original", "match_rms_adamw"])
@pytest.mark.parametrize("shape", [(24, 8), (8, 24), (16, 16)])
def test_muon_is_torchs_bit_for_bit_by_the_textbook(shape: tuple[int, int], scale: str, nesterov: bool) -> None:
    starts = [torch.randn(shape), torch.randn(shape)]
    grads = [stream(shape, 1), stream(shape, 2)]
    options = {"lr": 0.02, "momentum": 0.9, "weight_decay": 0.1, "nesterov": nesterov, "eps": 1e-7}
    model = Bag({"a": starts[0], "b": starts[1]})
    opt = gd.Muon(
        model,
        coefficients="jordan",
        ns_dtype="bfloat16",
        ns_method="standard",  # the textbook's products; the other forms round bfloat16 differently
        scale=scale,
        rules=[gd.rule("*", role="matrix")],
        **options,
    )
    twins = [torch.nn.Parameter(p.clone()) for p in starts]
    torchs = torch.optim.Muon(twins, adjust_lr_fn=scale, **options)
    ours = train(opt, list(model.parameters()), grads, STEPS)
    theirs = train(torchs, twins, grads, STEPS)
    assert max(map(far, ours, theirs)) == 0
    assert opt.audit() == {"a": {"orthogonalizations": STEPS}, "b": {"orthogonalizations": STEPS}}


@pytest.mark.parametrize("name", ["sgd", "adamw", "nadamw"])
@pytest.mark.parametrize("path", [{}, {"fused": False}, {"foreach": False}], ids=["kernel", "lists", "plain"])
def test_a_tensor_learning_rate_that_changes(name: str, path: dict[str, bool]) -> None:
    extra: dict[str, Any] = {"weight_decay": 0.1}
    extra |= {"momentum": 0.9} if name == "sgd" else {}
    torchs = {
        "sgd": functools.partial(torch.optim.SGD, foreach=False),
        "adamw": functools.partial(torch.optim.AdamW, foreach=False),
        "nadamw": functools.partial(torch.optim.NAdam, foreach=False, decoupled_weight_decay=True),
    }[name]
    held = []

    def ours(params: list[Tensor]) -> Any:
        held.append(torch.tensor(0.01))
        return gd.optimizer(name, params, lr=held[0], **path, **extra)

    def halve(opt: Any, t: int) -> None:
        for group in opt.param_groups:
            if isinstance(group["lr"], Tensor):
                group["lr"].fill_(0.01 / (1 + t))
            else:
                group["lr"] = 0.01 / (1 + t)

    difference = same_steps(ours, lambda params: torchs(params, lr=0.01, **extra), torch.float32, halve)
    assert difference < 1e-6
    assert float(held[0]) == pytest.approx(0.01 / (1 + STEPS))


@pytest.mark.parametrize(("ours", "theirs"), [(gd.SGD, torch.optim.SGD), (gd.AdamW, torch.optim.AdamW)])
def test_groups_with_numbers_of_their_own_and_a_schedule(ours: Any, theirs: Any) -> None:
    def groups(params: list[Tensor]) -> list[dict[str, Any]]:
        return [{"params": params[:3], "lr": 0.03}, {"params": params[3:], "weight_decay": 0.2}]

    def decay(opt: Any, t: int) -> None:
        for group in opt.param_groups:
            group["lr"] *= 0.97

    difference = same_steps(
        lambda params: ours(groups(params), lr=0.01, weight_decay=0.05),
        lambda params: theirs(groups(params), lr=0.01, weight_decay=0.05, fused=True),
        torch.float32,
        decay,
    )
    assert difference == 0


def test_complex_parameters_are_pairs_of_reals_as_in_torch() -> None:
    start = torch.randn(3, 4, dtype=torch.complex64)
    grads = [lambda t, p: torch.randn(3, 4, dtype=torch.complex64, generator=torch.Generator().manual_seed(t))]
    for ours, theirs in ((gd.SGD, torch.optim.SGD), (gd.AdamW, torch.optim.AdamW)):
        paths = []
        for make in (ours, theirs):
            p = torch.nn.Parameter(start.clone())
            paths.append(train(make([p], lr=0.01), [p], grads, 20)[0])
        assert max(float((a - b).abs().max()) for a, b in zip(*paths)) < 1e-6
