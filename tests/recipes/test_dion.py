"""Dion and Dion2 against dense references, where they meet Muon, and degenerate input."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

import guided_descent as gd
from oracles import dion as oracle
from oracles.muon import muon, svd_polar
from oracles.training import Bag, far, stream, train

F64 = torch.float64
SHAPES = [(12, 5), (5, 12), (7, 7), (150, 6)]
EXACT: dict[str, Any] = {"coefficients": "exact", "ns_dtype": "float64"}


def matrices(role: str = "matrix") -> list[gd.routing.Rule]:
    return [gd.rule("*", role=role)]


def run(key: str, start: Tensor, grad: Any, steps: int, q: Tensor | None = None, **options: Any) -> Any:
    """The path, and the optimizer's state of the matrix."""
    model = Bag({"w": start})
    opt = gd.optimizer(key, model, rules=matrices(), **(EXACT if key == "dion2" else {}) | options)
    if q is not None:
        opt.state[model.w]["right"].copy_(q)
    [path] = train(opt, [model.w], [grad], steps)
    return path, opt.state[model.w], opt


def columns(n: int, k: int, seed: int = 3) -> Tensor:
    q = torch.randn(n, k, dtype=F64, generator=torch.Generator().manual_seed(seed))
    return q / q.norm(dim=0)


# -- Dion --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("fraction", [0.25, 0.6, 1.0])
@pytest.mark.parametrize("eps", [None, 1e-3])
def test_dion_takes_the_references_steps(shape: tuple[int, int], fraction: float, eps: float | None) -> None:
    start, grad = torch.randn(shape, dtype=F64), stream(shape, 1)
    q = columns(min(shape), math.ceil(fraction * min(shape)))
    numbers: dict[str, Any] = {"momentum": 0.9, "weight_decay": 0.3}
    expected, buffer, right = oracle.dion(start, grad, 40, 0.05, q, eps=eps or 0.0, **numbers)
    path, state, opt = run("dion", start, grad, 40, q, lr=0.05, rank_fraction=fraction, eps=eps, **numbers)
    assert far(path, expected) < 1e-10
    torch.testing.assert_close(state["momentum_buffer"], buffer, rtol=1e-9, atol=1e-10)
    torch.testing.assert_close(state["right"].abs(), right.abs(), rtol=1e-8, atol=1e-9)  # up to signs of columns
    assert "fallbacks" not in opt.audit()["w"]


def test_scales_of_dion() -> None:
    start, grad = torch.randn(9, 4, dtype=F64), stream((9, 4), 2)
    for scale in ("original", "match_rms_adamw", "spectral"):
        expected, _, _ = oracle.dion(start, grad, 5, 0.05, columns(4, 1), momentum=0.9, weight_decay=0.0, scale=scale)
        path, _, _ = run("dion", start, grad, 5, columns(4, 1), lr=0.05, momentum=0.9, weight_decay=0.0, scale=scale)
        assert far(path, expected) < 1e-11


def test_a_wide_matrix_is_the_transpose_of_a_tall_one() -> None:
    start, grad = torch.randn(11, 6, dtype=F64), stream((11, 6), 4)
    numbers: dict[str, Any] = {"lr": 0.05, "scale": "match_rms_adamw", "rank_fraction": 0.5}  # a scale without sides
    tall, _, _ = run("dion", start, grad, 12, **numbers)
    wide, _, _ = run("dion", start.T.contiguous(), lambda t, p: grad(t, p.T).T, 12, **numbers)
    assert far(wide, [p.T for p in tall]) < 1e-12


def test_at_full_rank_the_buffer_is_that_of_muon_and_a_steady_gradient_leads_to_its_direction() -> None:
    """P spans the columns of M, so that P Rᵀ = M; power iteration turns P and Q into the singular vectors."""
    g = torch.randn(9, 5, dtype=F64)
    numbers: dict[str, Any] = {"lr": 1.0, "rank_fraction": 1.0, "momentum": 0.9, "weight_decay": 0.0}
    path, state, _ = run("dion", torch.zeros(9, 5, dtype=F64), lambda t, p: g, 400, **numbers)
    torch.testing.assert_close(state["momentum_buffer"], g * sum(0.9**t for t in range(1, 401)))
    torch.testing.assert_close(path[-2] - path[-1], math.sqrt(9 / 5) * svd_polar(g), rtol=1e-9, atol=1e-9)
    early = path[0] - path[1]
    assert float((early - math.sqrt(9 / 5) * svd_polar(g)).norm()) > 0.1  # not Muon: QᵀQ is not I on the way


def test_what_a_step_does_not_use_is_kept() -> None:
    """Error feedback: the part of M outside of P stays as it is, the part inside is multiplied by mu."""
    g = torch.randn(10, 6, dtype=F64)
    model = Bag({"w": torch.zeros_like(g)})
    opt = gd.optimizer("dion", model, rules=matrices(), lr=1.0, momentum=0.7, weight_decay=0.0, rank_fraction=0.5)
    model.w.grad = g.clone()
    opt.step()
    u, s, _ = torch.linalg.svd(-model.w.detach(), full_matrices=False)
    assert int((s > 1e-9).sum()) == 3
    inside = u[:, :3] @ u[:, :3].T
    torch.testing.assert_close(opt.state[model.w]["momentum_buffer"], g - 0.3 * inside @ g)


@pytest.mark.parametrize(("shape", "fraction", "rank"), [((64, 20), 0.25, 5), ((20, 64), 0.26, 6), ((3, 2), 0.1, 1)])
def test_the_memory_of_dion(shape: tuple[int, int], fraction: float, rank: int) -> None:
    model = Bag({"w": torch.zeros(shape)})
    opt = gd.optimizer("dion", model, rules=matrices(), rank_fraction=fraction)
    m, n = max(shape), min(shape)
    assert opt.state[model.w]["right"].shape == (n, rank)
    assert opt.state_bytes() == 4 * (m * n + n * rank) + 4  # 1 + k / m numbers for each element, and the step
    assert gd.explain(opt).state_bytes == opt.state_bytes()


@pytest.mark.parametrize("factor", [1e-25, 1e-12, 1e6])
def test_the_length_of_the_gradient_does_not_matter(factor: float) -> None:
    grad = stream((8, 5), 5, pull=0.0)
    numbers: dict[str, Any] = {"rank_fraction": 0.5, "weight_decay": 0.0}
    ends = []
    for c in (1.0, factor):
        path, _, _ = run("dion", torch.zeros(8, 5), lambda t, p, c=c: c * grad(t, p), 6, **numbers)
        ends.append(path[-1])
    assert float((ends[1] - ends[0]).norm() / ends[0].norm()) < 1e-4
    path, _, _ = run("dion", torch.zeros(8, 5), lambda t, p: 1e-12 * grad(t, p), 6, eps=1e-8, **numbers)
    assert float(path[-1].norm()) < 0.01 * float(ends[0].norm())  # with the absolute eps of the authors' code it does


def test_zero_and_rank_one_gradients_and_what_follows() -> None:
    zero = torch.zeros(9, 6)
    path, state, _ = run("dion", torch.ones(9, 6), lambda t, p: zero, 5, weight_decay=0.0)
    assert torch.equal(path[-1], torch.ones(9, 6))
    assert all(bool(value.isfinite().all()) for value in state.values())
    one = torch.outer(torch.randn(9, dtype=F64), torch.randn(6, dtype=F64))
    full = stream((9, 6), 6, pull=0.0)
    numbers: dict[str, Any] = {"rank_fraction": 0.5, "weight_decay": 0.0, "lr": 1.0}
    path, state, _ = run("dion", torch.zeros(9, 6, dtype=F64), lambda t, p: one if t < 4 else full(t, p), 8, **numbers)
    spectra = [torch.linalg.svdvals(a - b) for a, b in zip(path, [torch.zeros(9, 6, dtype=F64), *path])]
    scale = math.sqrt(9 / 6)
    for s in spectra[:3]:  # nothing moves along directions that no gradient has had
        assert float(s[0]) == pytest.approx(scale, rel=1e-9)
        assert float(s[1]) < 1e-9
    for s in spectra[3:]:  # columns of Q that were 0 have been drawn anew
        assert float(s[2]) > 0.1 * scale


def test_columns_that_are_not_finite_are_drawn_anew() -> None:
    model = Bag({"w": torch.randn(8, 6)})
    opt = gd.optimizer("dion", model, rules=matrices(), rank_fraction=0.5)
    grad = stream((8, 6), 7)
    train(opt, [model.w], [grad], 2)
    held = opt.state[model.w]["right"].clone()
    opt.state[model.w]["right"][2, 1] = math.nan
    opt.state[model.w]["right"][:, 2] = math.inf
    [path] = train(opt, [model.w], [grad], 2, start=3)
    assert all(bool(p.isfinite().all()) for p in path)
    assert bool(held.isfinite().all() & opt.state[model.w]["right"].isfinite().all())
    norms = opt.state[model.w]["right"].norm(dim=0)
    torch.testing.assert_close(norms, torch.ones(3))


def test_draws_depend_on_seed_and_shape_and_not_on_names_or_batches() -> None:
    """So that a stack of maps equals the maps apart, and a resumed run the uninterrupted one."""
    g = torch.randn(8, 6, generator=torch.Generator().manual_seed(1))

    def first(names: list[str], seed: int) -> list[Tensor]:
        model = Bag({name: torch.zeros(8, 6) for name in names})
        opt = gd.optimizer("dion", model, rules=matrices(), seed=seed, weight_decay=0.0)
        for p in model.parameters():
            p.grad = g.clone()
        opt.step()
        return [p.detach() for p in model.parameters()]

    [alone] = first(["a"], 0)
    assert all(torch.equal(alone, p) for p in first(["b", "a", "c"], 0))
    assert not torch.equal(alone, first(["a"], 1)[0])


def test_fallbacks_are_counted() -> None:
    numbers: dict[str, Any] = {"rank_fraction": 0.5}
    path, _, opt = run("dion", torch.zeros(200, 8), stream((200, 8), 8), 3, **numbers)
    assert opt.audit()["w"] == {"orthogonalizations": 3}
    flat = torch.outer(torch.randn(200), torch.randn(8))
    path, _, opt = run("dion", torch.zeros(200, 8), lambda t, p: flat, 3, **numbers)
    assert opt.audit()["w"] == {"orthogonalizations": 3, "fallbacks": 3}
    assert all(bool(p.isfinite().all()) for p in path)


@pytest.mark.parametrize("key", ["dion", "dion2"])
def test_not_a_number_is_not_hidden(key: str) -> None:
    g = torch.randn(4, 5)
    g[1, 2] = math.nan
    more = {"coefficients": "adaptive"} if key == "dion2" else {}
    path, _, _ = run(key, torch.zeros(4, 5), lambda t, p: g, 1, nonfinite="ignore", **more)
    assert bool(path[0].isnan().any())


@pytest.mark.parametrize(("key", "name"), [("dion", "rank_fraction"), ("dion2", "fraction")])
@pytest.mark.parametrize("value", [0.0, -0.5, 1.5, math.nan])
def test_shares_have_a_range(key: str, name: str, value: float) -> None:
    with pytest.raises(ValueError, match=f"{name}={value!r} of {key} must"):
        gd.optimizer(key, Bag({"w": torch.zeros(4, 4)}), **{name: value})


# -- Dion2 -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("fraction", [0.25, 0.6, 1.0])
def test_dion2_takes_the_references_steps(shape: tuple[int, int], fraction: float) -> None:
    start, grad = torch.randn(shape, dtype=F64), stream(shape, 11)
    numbers: dict[str, Any] = {"fraction": fraction, "momentum": 0.9, "weight_decay": 0.3}
    expected, buffer = oracle.dion2(start, grad, 40, 0.05, **numbers)
    path, state, _ = run("dion2", start, grad, 40, lr=0.05, **numbers)
    assert far(path, expected) < 1e-10
    torch.testing.assert_close(state["momentum_buffer"], buffer, rtol=1e-10, atol=1e-11)


@pytest.mark.parametrize("shape", SHAPES)
def test_with_every_slice_dion2_is_muon_without_nesterov(shape: tuple[int, int]) -> None:
    """M_t = mu M_(t-1) + G_t before it is decayed, which is 1 / (1 - mu) times Muon's average: one polar factor."""
    start, grad = torch.randn(shape, dtype=F64), stream(shape, 12)
    numbers: dict[str, Any] = {"momentum": 0.9, "weight_decay": 0.2}
    reference = muon(start, grad, 40, 0.05, nesterov=False, scale="spectral", **numbers)
    path, state, _ = run("dion2", start, grad, 40, lr=0.05, fraction=1.0, **numbers)
    assert far(path, reference) < 1e-10
    ours = {"nesterov": False, "scale": "spectral", **EXACT}
    model = Bag({"w": start})
    opt = gd.optimizer("muon", model, rules=matrices(), lr=0.05, **numbers, **ours)
    [other] = train(opt, [model.w], [grad], 40)
    assert far(path, other) < 1e-10
    torch.testing.assert_close(state["momentum_buffer"], 0.9 / 0.1 * opt.state[model.w]["momentum_buffer"])


def test_the_largest_sums_of_magnitudes_are_chosen() -> None:
    g = torch.tensor([[3.0, 0, 0, 0], [1.1, 1.1, 1.1, 0], [0, 2.0, 0, 0], [0.5, 0, 0, 0.5]], dtype=F64)
    path, state, _ = run("dion2", torch.zeros(4, 4, dtype=F64), lambda t, p: g, 1, fraction=0.25, weight_decay=0.0)
    moved = path[0].abs().sum(1) > 0
    assert moved.tolist() == [False, True, False, False]  # 3.3 is the largest sum, though 3 is the largest norm
    torch.testing.assert_close(state["momentum_buffer"], g * torch.tensor([1, 0.95, 1, 1], dtype=F64)[:, None])
    path, _, _ = run("dion2", torch.zeros(4, 3, dtype=F64), lambda t, p: g[:, :3], 1, fraction=0.3, weight_decay=0.0)
    assert (path[0].abs().sum(0) > 0).tolist() == [True, False, False]  # columns of a tall matrix: 4.6, 3.1, 1.1


def test_slices_take_turns() -> None:
    grad = stream((8, 12), 13, pull=0.0)
    path, _, _ = run("dion2", torch.zeros(8, 12, dtype=F64), grad, 16, lr=0.1, weight_decay=0.0, momentum=0.5)
    moves = torch.stack([(a - b).abs().sum(1) > 0 for a, b in zip(path, [torch.zeros(8, 12, dtype=F64), *path])])
    assert moves.sum(1).tolist() == [2] * 16
    assert bool((moves.sum(0) >= 2).all())


def test_the_memory_of_dion2() -> None:
    model = Bag({"w": torch.zeros(64, 20)})
    opt = gd.optimizer("dion2", model, rules=matrices())
    assert opt.state_bytes() == 4 * 64 * 20 + 4


@pytest.mark.parametrize("key", ["dion", "dion2"])
def test_an_idle_expert_stays_and_the_others_do_not_notice(key: str) -> None:
    whole = torch.randn(3, 4, 6, dtype=F64)
    grads = [torch.randn(3, 4, 6, dtype=F64) for _ in range(6)]
    for g in grads:
        g[1] = 0.0
    model = Bag({"w": whole})
    options: dict[str, Any] = {"lr": 0.05, "weight_decay": 0.1, **(EXACT if key == "dion2" else {})}
    opt = gd.optimizer(key, model, rules=matrices("expert"), **options)
    [path] = train(opt, [model.w], [lambda t, p: grads[t - 1]], 6)
    torch.testing.assert_close(path[-1][1], whole[1] * (1 - 0.05 * 0.1) ** 6)
    for i in (0, 2):
        alone, _, _ = run(key, whole[i], lambda t, p, i=i: grads[t - 1][i], 6, **options)
        assert far([step[i] for step in path], alone) < 1e-10


@pytest.mark.parametrize("key", ["dion", "dion2"])
def test_vectors_go_to_adamw_at_a_rate_of_its_own(key: str) -> None:
    [group] = gd.optimizer(key, torch.nn.LayerNorm(4)).param_groups
    assert (group["recipe"], group["lr"], group["betas"]) == ("adamw", 3e-4, (0.9, 0.95))
    [group] = gd.optimizer(key, torch.nn.LayerNorm(4), lr=2e-3, scale="match_rms_adamw").param_groups
    assert group["lr"] == 2e-3
