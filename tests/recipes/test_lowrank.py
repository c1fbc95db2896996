"""GaLore, Fira and APOLLO: references, identities, refreshes, draws, and the memory that they promise."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import guided_descent as gd
from guided_descent.linalg.workspace import Workspace
from guided_descent.parts import Subspace
from guided_descent.parts.geometry import lowrank
from oracles import low_memory as reference
from oracles.adam_family import Rule, adam, walk
from oracles.training import Bag, far, stream, train

F64 = torch.float64
PATHS: list[dict[str, bool]] = [{}, {"foreach": False}, {"compile": True}]
IDS = ["lists", "plain", "compiled"]
#: Tensors, the shape of the matrix in each, and its role.
MATRICES: dict[str, tuple[tuple[int, ...], tuple[int, int], str]] = {
    "wide": ((6, 10), (6, 10), "matrix"),
    "tall": ((11, 5), (11, 5), "matrix"),
    "square": ((7, 7), (7, 7), "matrix"),
    "conv": ((5, 3, 2, 2), (5, 12), "conv"),
}
EVERY = {"refresh_schedule": "every"}


def built(name: str, tensors: dict[str, Tensor], roles: dict[str, str], **options: Any) -> tuple[Any, Bag]:
    """A recipe on bare tensors whose roles are given."""
    model = Bag(tensors)
    rules = [gd.rule(key, role=role) for key, role in roles.items()]
    opt = gd.optimizer(name, model, rules=rules, **options)
    if options.get("compile"):
        opt._engine.compiled.backend = "eager"
    return opt, model


def check(name: str, rule: Rule, steps: int = 40, lr: float = 0.05, decay: float = 0.2, **options: Any) -> None:
    """The recipe takes the rule's steps on every matrix."""
    starts = {key: torch.randn(shape, dtype=F64) for key, (shape, _, _) in MATRICES.items()}
    roles = {key: role for key, (_, _, role) in MATRICES.items()}
    opt, model = built(name, starts, roles, lr=lr, weight_decay=decay, **options)
    grads = {key: stream(shape, i, pull=0.1) for i, (key, (shape, _, _)) in enumerate(MATRICES.items())}
    found = train(opt, [model.get_parameter(key) for key in MATRICES], list(grads.values()), steps)
    for (key, (shape, view, _)), got in zip(MATRICES.items(), found):

        def grad(t: int, p: Tensor, key: str = key, shape: Any = shape, view: Any = view) -> Tensor:
            return grads[key](t, p.view(shape)).view(view)

        want = walk(starts[key].view(view), grad, steps, lr, rule, decay)
        assert far([p.view(view) for p in got], want) < 1e-10, key


@pytest.mark.parametrize("path", PATHS, ids=IDS)
@pytest.mark.parametrize(
    ("options", "numbers"),
    [
        ({}, {}),
        ({"proj_type": "left", "betas": (0.8, 0.95), "scale": 2.0}, {"left": True, "betas": (0.8, 0.95), "scale": 2.0}),
        ({"proj_type": "right", "eps": 1e-3}, {"left": False, "eps": 1e-3}),
        ({"refresh_method": "qr"}, {"method": "qr"}),
        ({"carry": "rotate"}, {"carry": "rotate"}),
        ({"carry": "reset"}, {"carry": "reset"}),
    ],
)
def test_galores_steps(options: dict[str, Any], numbers: dict[str, Any], path: dict[str, bool]) -> None:
    check("galore", reference.galore(3, 7, **numbers), rank=3, update_proj_gap=7, **EVERY, **options, **path)


@pytest.mark.parametrize("path", PATHS, ids=IDS)
@pytest.mark.parametrize(
    ("options", "numbers"),
    [
        ({}, {}),
        ({"scale": 0.5, "growth_limit": 1.2, "carry": "rotate"}, {"scale": 0.5, "fira": 1.2, "carry": "rotate"}),
    ],
)
def test_firas_steps(options: dict[str, Any], numbers: dict[str, Any], path: dict[str, bool]) -> None:
    rule = reference.galore(3, 7, **{"scale": 1.0, "fira": 1.01} | numbers)
    check("fira", rule, rank=3, update_proj_gap=7, **EVERY, **options, **path)


def test_fira_without_a_limit() -> None:
    check("fira", reference.galore(3, 7, scale=1.0, fira=1e9), rank=3, update_proj_gap=7, growth_limit=None, **EVERY)


def draws(d: int, k: int, seed: int = 0) -> Callable[[int], Tensor]:
    """P [k, d] by the number of its draw."""
    device = torch.device("cpu")
    return lambda number: lowrank.gaussian(d, k, seed, 1 + 7 * number, 7, F64, device, Workspace()).mT.clone()


@pytest.mark.parametrize("path", PATHS, ids=IDS)
@pytest.mark.parametrize(
    ("options", "numbers"),
    [
        ({}, {}),
        ({"granularity": "tensor", "scale": 9.0}, {"channel": False, "scale": 9.0}),
        ({"proj_type": "left", "growth_limit": None}, {"left": True, "growth": None}),
        (
            {"proj_type": "right", "growth_limit": 1.1, "betas": (0.8, 0.9)},
            {"left": False, "growth": 1.1, "betas": (0.8, 0.9)},
        ),
    ],
)
def test_apollos_steps(options: dict[str, Any], numbers: dict[str, Any], path: dict[str, bool]) -> None:
    def rule(t: int, g: Tensor, p: Tensor, memory: dict[str, Any]) -> Tensor:
        left = numbers.get("left", g.shape[0] <= g.shape[1])
        return reference.apollo(draws(g.shape[0 if left else 1], 3, seed=5), 7, **numbers)(t, g, p, memory)

    check("apollo", rule, rank=3, update_proj_gap=7, seed=5, **options, **path)


def test_apollo_mini_is_apollo_with_other_numbers() -> None:
    def rule(t: int, g: Tensor, p: Tensor, memory: dict[str, Any]) -> Tensor:
        return reference.apollo(draws(min(g.shape), 1), 7, channel=False, scale=128.0)(t, g, p, memory)

    check("apollo_mini", rule, update_proj_gap=7)


@pytest.mark.parametrize("name", ["galore", "fira", "apollo"])
def test_decay_after_the_step(name: str) -> None:
    start, grad = torch.randn(5, 8, dtype=F64), stream((5, 8), 1)
    found = []
    for decay, options in ((0.0, {}), (0.3, {"decay": "after"})):
        opt, model = built(name, {"w": start}, {"w": "matrix"}, lr=0.1, weight_decay=decay, **options)
        model.w.grad = grad(1, start)
        opt.step()
        found.append(model.w.detach())
    torch.testing.assert_close(found[1], found[0] * (1 - 0.1 * 0.3), rtol=1e-13, atol=1e-15)


def test_everything_else_goes_to_adamw() -> None:
    net = nn.Sequential(nn.Embedding(9, 6), nn.Linear(6, 8), nn.LayerNorm(8), nn.Linear(8, 6), nn.Linear(6, 9))
    for name in ("galore", "fira", "apollo", "apollo_mini"):
        opt = gd.optimizer(name, net, lr=0.02, weight_decay=0.1, betas=(0.8, 0.9), eps=1e-4)
        owners = {line.parameter: line.recipe for line in gd.explain(opt).lines}
        assert {key for key, owner in owners.items() if owner == name} == {"1.weight", "3.weight"}
        aux = next(group for group in opt.param_groups if group["recipe"] == "adamw")
        assert [aux[key] for key in ("lr", "weight_decay", "betas", "eps")] == [0.02, 0.1, (0.8, 0.9), 1e-4]


# -- identities --------------------------------------------------------------------------------------------------------


def both(a: tuple[str, dict[str, Any]], b: tuple[str, dict[str, Any]], bound: float = 1e-11) -> None:
    """Two recipes take the same 35 steps on two matrices."""
    starts = {"w": torch.randn(5, 8, dtype=F64), "v": torch.randn(8, 5, dtype=F64)}
    paths = []
    for name, options in (a, b):
        opt, model = built(name, starts, dict.fromkeys(starts, "matrix"), lr=0.05, weight_decay=0.1, **options)
        grads = [stream(tuple(p.shape), i) for i, p in enumerate(starts.values())]
        paths.append(train(opt, list(model.parameters()), grads, 35))
    assert max(map(far, *paths)) < bound


@pytest.mark.parametrize("name", ["galore", "fira"])
def test_in_a_full_basis_that_is_the_identity_it_is_adamw(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def identity(self: Subspace, g: Tensor, k: int) -> tuple[Tensor, Tensor]:
        d = g.shape[-2 if self.left(g.shape) else -1]
        lead = g.shape[:-2]
        return torch.eye(d, dtype=g.dtype).expand(*lead, d, d), torch.zeros(lead, dtype=torch.int8)

    monkeypatch.setattr(Subspace, "leading", identity)
    for carry in ("keep", "rotate"):
        both((name, {"scale": 1.0, "update_proj_gap": 5, "carry": carry}), ("adamw", {}))


def test_in_a_full_basis_it_is_adam_rotated() -> None:
    """With one basis for all steps: P Adam(P^T g), whose lengths are those of Adam in that basis."""
    start, grad = torch.randn(5, 8, dtype=F64), stream((5, 8), 1)
    opt, model = built("galore", {"w": start}, {"w": "matrix"}, lr=0.05, scale=1.0, update_proj_gap=10**6)
    basis = torch.linalg.svd(grad(1, start)).U
    got = train(opt, [model.w], [grad], 35)[0]
    inner = adam()
    want = walk(start, grad, 35, 0.05, lambda t, g, p, memory: basis @ inner(t, basis.T @ g, p, memory))
    assert far(got, want) < 1e-11


def test_fira_at_full_rank_is_galore() -> None:
    options = {"scale": 0.25, "update_proj_gap": 5, "rank": 5, "eps": 1e-3}
    both(("fira", options), ("galore", options))


@pytest.mark.parametrize("granularity", ["channel", "tensor"])
def test_apollo_with_an_orthogonal_projection_has_adams_lengths(
    granularity: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """P = I: the direction is the gradient's, the length of each channel, or of the matrix, is that of Adam's."""
    monkeypatch.setattr(lowrank, "gaussian", lambda d, k, *_: torch.eye(d, dtype=F64))
    start, grad = torch.randn(5, 8, dtype=F64), stream((5, 8), 1)
    options = {"granularity": granularity, "growth_limit": None, "scale": 4.0}
    opt, model = built("apollo", {"w": start}, {"w": "matrix"}, lr=1.0, **options)
    inner, memory = adam(), {}
    for t in range(1, 20):
        before = model.w.detach().clone()
        model.w.grad = grad(t, before)
        opt.step()
        u, top = before - model.w.detach(), inner(t, model.w.grad, before, memory)
        dims = {"dim": 0} if granularity == "channel" else {}
        torch.testing.assert_close(u.norm(**dims), 2 * top.norm(**dims), rtol=1e-10, atol=0)
        torch.testing.assert_close(u / u.norm(**dims), model.w.grad / model.w.grad.norm(**dims), rtol=1e-9, atol=1e-12)


def test_the_ratios_of_a_random_projection_are_adams_on_average() -> None:
    """||P x||^2 is ||x||^2 in expectation, so that a wide projection tells nearly the lengths of the whole gradient."""
    p = lowrank.gaussian(400, 300, 3, 1, 200, F64, torch.device("cpu"), Workspace())
    x = torch.randn(400, 50, dtype=F64)
    ratio = (p.mT @ x).norm(dim=0) / x.norm(dim=0)
    assert float(ratio.mean()) == pytest.approx(1, abs=0.02)
    assert float(ratio.std()) < 2 / 300**0.5


@pytest.mark.parametrize("name", ["apollo", "apollo_mini", "fira"])
def test_growth_is_bounded(name: str) -> None:
    start = torch.zeros(6, 9, dtype=F64)
    opt, model = built(name, {"w": start}, {"w": "matrix"}, lr=1.0, rank=2)
    opt.param_groups[0]["betas"] = (0.0, 0.999)  # after growing gradients Adam's own lengths jump
    lengths = []
    for t in range(1, 60):
        before = model.w.detach().clone()
        model.w.grad = torch.randn(6, 9, dtype=F64) * (100.0 if t % 10 == 5 else 1.0)
        model.w.grad *= 0.0 if t == 20 else 1.0
        opt.step()
        u = before - model.w.detach()
        lengths.append(float(opt.state[model.w]["last_norm"]))
        if name != "fira" and t != 20:
            assert float(u.norm()) == pytest.approx(lengths[-1], rel=1e-10)
    growth = [b / a for a, b in pairwise(lengths)]
    assert max(growth) <= 1.01 * (1 + 1e-12)
    assert sum(g > 1.0099 for g in growth) > 5  # it was at work
    assert growth[18] == 1  # a gradient of zeros is not remembered


# -- refreshes ---------------------------------------------------------------------------------------------------------


def small_net() -> nn.Sequential:
    torch.manual_seed(3)
    return nn.Sequential(nn.Linear(5, 7), nn.Linear(7, 7), nn.Linear(7, 7, bias=False), nn.Linear(7, 4))


def feed(opt: torch.optim.Optimizer, net: nn.Module, first: int, steps: int) -> None:
    for step in range(first, first + steps):
        made = torch.Generator().manual_seed(step)
        for p in net.parameters():
            p.grad = torch.randn(p.shape, generator=made)
        opt.step()


MODES: dict[str, dict[str, Any]] = {
    "staggered": {},
    "every, rotated": {**EVERY, "carry": "rotate"},
    "drift, tracked": {"refresh_tolerance": 0.8, "refresh_method": "qr"},
    "background": {"refresh_lag": 2, "carry": "rotate"},
}


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("stop", range(1, 8))
def test_a_resumed_run_equals_the_uninterrupted_one_bit_for_bit(mode: str, stop: int, tmp_path: Path) -> None:
    options = {"update_proj_gap": 4, "rank": 3, **MODES[mode]}
    net, other = small_net(), small_net()
    opt, resumed = gd.Fira(net, **options), gd.Fira(other, **options)
    feed(opt, net, 0, stop)
    torch.save((net.state_dict(), opt.state_dict()), tmp_path / "saved")
    weights, state = torch.load(tmp_path / "saved", weights_only=True)
    other.load_state_dict(weights)
    resumed.load_state_dict(state)
    for run, its in ((opt, net), (resumed, other)):
        feed(run, its, stop, 12)
    assert all(torch.equal(a, b) for a, b in zip(net.parameters(), other.parameters()))
    left, right = opt.state_dict()["state"], resumed.state_dict()["state"]
    assert all(torch.equal(left[i][key], right[i][key]) for i in left for key in left[i])


def test_a_projection_is_drawn_anew_after_a_gap_and_on_resume_alike() -> None:
    args = (6, 2, 0)
    made = [lowrank.gaussian(*args, step, 5, F64, torch.device("cpu"), Workspace()).clone() for step in range(1, 12)]
    same = [torch.equal(a, b) for a, b in pairwise(made)]
    assert same == [True] * 4 + [False] + [True] * 4 + [False]
    single = lowrank.gaussian(*args, 1.0, 5, torch.float32, torch.device("cpu"), Workspace())
    assert torch.equal(single.double(), made[0])
    assert not torch.equal(lowrank.gaussian(6, 2, 1, 1, 5, F64, torch.device("cpu"), Workspace()), made[0])


@pytest.mark.parametrize("schedule", ["staggered", "every"])
def test_refreshes_are_spread(schedule: str) -> None:
    net = nn.Sequential(*[nn.Linear(4, 4) for _ in range(5)], nn.Linear(4, 3))
    opt = gd.GaLore(net, update_proj_gap=4, refresh_schedule=schedule)
    counts = []
    for step in range(13):
        feed(opt, net, step, 1)
        counts.append(sum(opt.audit().get(f"{i}.weight", {}).get("refreshes", 0) for i in range(5)))
    assert counts[0] == 0
    assert counts[-1] == 15
    assert max(b - a for a, b in pairwise(counts)) == (5 if schedule == "every" else 2)


def test_a_subspace_that_holds_the_gradient_is_kept_within_the_tolerance() -> None:
    start = torch.zeros(6, 9, dtype=F64)
    opt, model = built(
        "galore", {"w": start}, {"w": "matrix"}, rank=2, update_proj_gap=2, refresh_tolerance=0.1, **EVERY
    )
    columns, other = torch.randn(6, 2, dtype=F64), torch.randn(6, 2, dtype=F64)
    kept = None
    for t in range(1, 9):
        model.w.grad = (columns if t < 7 else other) @ torch.randn(2, 9, dtype=F64)
        opt.step()
        kept = opt.state[model.w]["basis"].clone() if t == 6 else kept
    counts = opt.audit()["w"]
    assert (counts["skipped_refreshes"], counts["refreshes"]) == (2, 1)
    assert not torch.equal(opt.state[model.w]["basis"], kept)
    basis = opt.state[model.w]["basis"]
    torch.testing.assert_close(basis @ basis.T @ other, other, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("method", ["eigh", "qr"])
def test_a_gradient_of_zeros_keeps_the_subspace(method: str) -> None:
    opt, model = built(
        "galore", {"w": torch.zeros(6, 9)}, {"w": "matrix"}, rank=2, update_proj_gap=2, refresh_method=method, **EVERY
    )
    for t in range(1, 6):
        model.w.grad = torch.randn(6, 9) * (t != 3)
        before = opt.state[model.w]["basis"].clone()
        opt.step()
        if t == 3:
            assert torch.equal(opt.state[model.w]["basis"], before)
    assert not opt.audit()["w"].get("fallbacks", 0)
    assert not torch.equal(opt.state[model.w]["basis"], before)


def test_the_refresh_sees_the_gradient_of_its_step_and_not_its_sign() -> None:
    g = [torch.randn(6, 9, dtype=F64) for _ in range(3)]
    for more in ({}, {"maximize": True}):
        opt, model = built(
            "galore", {"w": torch.zeros(6, 9, dtype=F64)}, {"w": "matrix"}, rank=2, update_proj_gap=2, **EVERY, **more
        )
        for number, wanted in enumerate((0, 0, 2)):
            model.w.grad = g[number].clone()
            opt.step()
            basis, u = opt.state[model.w]["basis"], torch.linalg.svd(g[wanted]).U[:, :2]
            torch.testing.assert_close(basis @ basis.T, u @ u.T, rtol=1e-10, atol=1e-12)
            assert torch.equal(model.w.grad, g[number])


# -- memory ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "numbers"),
    [
        ("galore", lambda m, n, k: m * k + 2 * k * n),
        ("fira", lambda m, n, k: m * k + 2 * k * n + 1),
        ("apollo", lambda m, n, k: 2 * k * n + 1),
        ("apollo_mini", lambda m, n, k: 2 * n + 1),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, F64])
def test_the_state_is_as_small_as_promised(name: str, numbers: Any, dtype: torch.dtype) -> None:
    m, n, k = 20, 30, 4
    tensors = {"wide": torch.randn(m, n, dtype=dtype), "tall": torch.randn(n, m, dtype=dtype)}
    options = {} if name == "apollo_mini" else {"rank": k}
    opt, model = built(name, tensors, dict.fromkeys(tensors, "matrix"), rounding="stochastic", **options)
    want = 2 * ((8 if dtype == F64 else 4) * numbers(m, n, k) + 4)  # and a counter of steps for each
    assert opt.state_bytes() == gd.explain(opt).state_bytes == want
    for p in model.parameters():
        p.grad = torch.randn_like(p)
    opt.step()
    assert opt.state_bytes() == want


def test_a_refresh_copies_the_gradients_of_one_slice() -> None:
    """Never those of the model: what was saved in state would be spent on scratch."""
    net = nn.Sequential(*[nn.Linear(32, 32, bias=False) for _ in range(64)], nn.Linear(32, 3))
    opt = gd.GaLore(net, rank=2, update_proj_gap=2, workspace_mb=0.05, **EVERY)
    feed(opt, net, 0, 2)
    held = opt.workspace_bytes
    feed(opt, net, 2, 3)
    assert opt.audit()["0.weight"]["refreshes"] == 2
    assert opt.workspace_bytes == held


@pytest.mark.parametrize("name", ["galore", "fira", "apollo", "apollo_mini"])
def test_a_rank_below_one_is_an_error(name: str) -> None:
    with pytest.raises(ValueError, match=f"rank=0 of {name} must be at least 1"):
        gd.optimizer(name, nn.Linear(3, 3), rank=0)


def test_work_in_the_background_must_land_before_it_is_due_again() -> None:
    with pytest.raises(ValueError, match="refresh_lag=3 must be below the update_proj_gap of 3"):
        gd.GaLore(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2)), update_proj_gap=3, refresh_lag=3)
