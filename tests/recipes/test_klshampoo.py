"""KL-Shampoo and KL-SOAP against a plain float64 reference, and the fixed point that gives them their name."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import guided_descent as gd
from guided_descent.linalg.workspace import Workspace
from guided_descent.parts import Batch, Rows
from guided_descent.parts.geometry.klshampoo import KLRoots, inverse_roots, whiten
from guided_descent.recipes import KLSOAP, KLShampoo
from guided_descent.routing import Block, Piece, Role
from oracles.shampoo import kl
from oracles.training import Bag, far, stream, train

STEPS = 45


def run(
    recipe: type, start: Tensor, grad: Any, steps: int = STEPS, role: str = "matrix", **options: Any
) -> tuple[list[Tensor], dict[str, Tensor], Any]:
    """Train one tensor: its path, its state after the first call, and the optimizer."""
    model = Bag({"w": start})
    opt = gd.build(model, recipe(**{"refresh_schedule": "every"} | options), rules=[gd.rule("w", role=role)])
    params = list(model.parameters())
    path = train(opt, params, [grad], 1)[0]
    first = {key: value.clone() for key, value in opt.state[params[0]].items()}
    return path + train(opt, params, [grad], steps - 1, start=2)[0], first, opt


def bases(state: dict[str, Tensor]) -> tuple[Tensor | None, Tensor | None]:
    return state.get("left_basis"), state.get("right_basis")


@pytest.mark.parametrize("recipe", [KLShampoo, KLSOAP])
@pytest.mark.parametrize("shape", [(5, 5), (9, 4), (4, 9), (2, 7)])
def test_it_takes_the_references_steps(shape: tuple[int, int], recipe: type) -> None:
    start, grad = torch.randn(shape, dtype=torch.float64), stream(shape, 3)
    numbers: dict[str, Any] = {"lr": 0.02, "betas": (0.9, 0.95), "shampoo_beta": 0.8, "weight_decay": 0.1, "eps": 1e-3}
    path, first, opt = run(recipe, start, grad, precondition_frequency=4, **numbers)
    reference = kl(start, grad, STEPS, frequency=4, soap=recipe is KLSOAP, bases=bases(first), **numbers)
    assert far(path, reference) < 1e-8
    assert far(path[-1:], [start]) > 0.1
    assert opt.audit() == {"w": {"refreshes": 22}}


def test_the_papers_numbers_and_order() -> None:
    start, grad = torch.randn(6, 6, dtype=torch.float64), stream((6, 6), 4)
    path, _, opt = run(KLShampoo, start, grad, decay="after")
    assert far(path, kl(start, grad, STEPS, 1e-4, weight_decay=0.01, decay="after")) < 1e-10
    group = opt.param_groups[0]
    assert (group["lr"], group["betas"], group["precondition_frequency"]) == (1e-4, (0.9, 0.98), 10)
    numbers: dict[str, Any] = {"lr": 0.3, "weight_decay": 0.3}
    after, _, _ = run(KLShampoo, start, grad, decay="after", **numbers)
    assert far(after, kl(start, grad, STEPS, decay="after", **numbers)) < 1e-8
    assert far(after, kl(start, grad, STEPS, **numbers)) > 1e-3  # the test can tell


@pytest.mark.parametrize("scale", [1e-4, 1e4])
def test_eigenvalues_are_bounded_below(scale: float) -> None:
    start, grad = torch.randn(12, 4, dtype=torch.float64), stream((12, 4), 5, pull=0.0)
    numbers: dict[str, Any] = {"lr": 0.02, "betas": (0.5, 0.5), "weight_decay": 0.0}
    path, first, opt = run(KLShampoo, start, lambda t, p: scale * grad(t, p), **numbers)
    reference = kl(start, lambda t, p: scale * grad(t, p), STEPS, bases=bases(first), **numbers)
    assert far(path, reference) < 1e-8
    [state] = opt.state.values()
    floors = [float(state[f"{side}_values"].min()) for side in ("left", "right")]
    assert (floors == [12**-2, 10**-2]) == (scale < 1)


def test_the_first_call_sets_factors_and_makes_no_update() -> None:
    start, grad = torch.randn(6, 3, dtype=torch.float64), stream((6, 3), 6)
    for recipe in (KLShampoo, KLSOAP):
        path, first, _ = run(recipe, start, grad, steps=1, betas=(0.9, 0.9))
        g = grad(1, start)
        assert torch.equal(path[0], start)
        torch.testing.assert_close(first["left"], 0.1 * g @ g.T / 3)
        torch.testing.assert_close(first["right"], 0.1 * g.T @ g / 6)
        assert bool((first["left_values"] == 0.1).all() and (first["right_values"] == 0.1).all())
        assert not first["exp_avg"].any()


def test_gaussian_gradients_give_back_their_factors() -> None:
    # The minimiser of the divergence from N(0, S_L (x) S_R) is S_L (x) S_R; the scale of the pair is free.
    made = torch.Generator().manual_seed(7)
    m, n, count = 6, 4, 3000
    a, b = (torch.randn(d, d, generator=made, dtype=torch.float64) for d in (m, n))
    left, right = a @ a.T / m + 0.3 * torch.eye(m), b @ b.T / n + 0.3 * torch.eye(n)
    root_l, root_r = torch.linalg.cholesky(left), torch.linalg.cholesky(right)
    start = torch.zeros(m, n, dtype=torch.float64)

    def grad(t: int, p: Tensor) -> Tensor:
        return root_l @ torch.randn(m, n, generator=made, dtype=torch.float64) @ root_r.T

    _, _, opt = run(KLShampoo, start, grad, steps=count, lr=0.0, betas=(0.0, 0.998), precondition_frequency=10)
    [state] = opt.state.values()
    found = torch.kron(state["left"], state["right"])
    wanted = torch.kron(left, right)
    assert float((found - wanted).norm() / wanted.norm()) < 0.1  # a memory of 500 gradients
    shapes = [f / f.trace() * len(f) for f in (state["left"], left, state["right"], right)]
    assert float((shapes[0] - shapes[1]).abs().max()) < 0.15
    assert float((shapes[2] - shapes[3]).abs().max()) < 0.15
    for side in ("left", "right"):  # the eigenvalues are those of the factor in its basis
        q = state[f"{side}_basis"]
        torch.testing.assert_close((q.T @ state[side] @ q).diagonal(), state[f"{side}_values"], rtol=0.05, atol=0.0)
    # so the direction is whitened: E[g g^T]^(-1/2) = S_L^(-1/2) (x) S_R^(-1/2)
    roots = [(state[f"{s}_basis"] / state[f"{s}_values"].sqrt()) @ state[f"{s}_basis"].T for s in ("left", "right")]
    white = torch.stack([(roots[0] @ grad(0, start) @ roots[1]).flatten() for _ in range(4000)])
    covariance = white.T @ white / len(white)
    assert float((covariance - torch.eye(m * n)).norm() / (m * n) ** 0.5) < 0.3


def test_shampoos_own_factors_do_not_whiten_them() -> None:
    # what KL-Shampoo adds: E[G G^T] is S_L only up to tr(S_R), and one-sided averages weigh the large directions most
    m, n = 4, 3
    x = Batch(
        g=Rows([torch.zeros(1, m, n)]),
        p=lambda: Rows([]),
        blocks=(Block("w", (Piece("w", (m, n)),), (m, n), Role.MATRIX),),
        scratch=lambda tag: Rows([]),
        step=2.0,
        first=False,
        work=Workspace(),
    )
    right = torch.tensor([[100.0, 1.0, 0.01]], dtype=torch.float64)
    eye = [torch.eye(d, dtype=torch.float64)[None].clone() for d in (m, n)]
    s = {
        "left": torch.zeros(1, m, m, dtype=torch.float64),
        "right": torch.zeros(1, n, n, dtype=torch.float64),
        "left_basis": eye[0],
        "right_basis": eye[1],
        "left_values": torch.ones(1, m, dtype=torch.float64),
        "right_values": right.clone(),
    }
    g = torch.randn(1, m, n, dtype=torch.float64)
    roots = {"left": torch.ones(1, m, dtype=torch.float64), "right": right.rsqrt()}
    whiten(x, g, s, roots, 0.0)
    torch.testing.assert_close(s["left"], (g / right[:, None]) @ g.mT / n)
    torch.testing.assert_close(s["right"], g.mT @ g / m)
    torch.testing.assert_close(s["left_values"], (g.square() / right[:, None]).mean(-1).clamp(min=1e-2))
    torch.testing.assert_close(s["right_values"], g.square().mean(-2).clamp(min=1e-2))
    bounded = inverse_roots({"left": s["left"], "left_values": torch.tensor([[0.0, torch.nan, torch.inf, 4.0]])})
    assert bounded["left"].tolist() == [[10.0, 0.0, 0.0, 0.5]]


@pytest.mark.parametrize("recipe", [KLShampoo, KLSOAP])
def test_stacked_experts_are_matrices_of_their_own(recipe: type) -> None:
    start, grads = torch.randn(3, 5, 5, dtype=torch.float64), torch.randn(20, 3, 5, 5, dtype=torch.float64)
    more: dict[str, Any] = {"precondition_frequency": 3, "lr": 0.05}
    path, _, _ = run(recipe, start, lambda t, p: grads[t - 1], steps=20, role="expert", **more)
    for e in range(3):
        alone, _, _ = run(recipe, start[e], lambda t, p, e=e: grads[t - 1, e], steps=20, **more)
        assert far([p[e] for p in path], alone) < 1e-9


@pytest.mark.parametrize("recipe", [KLShampoo, KLSOAP])
@pytest.mark.parametrize("shape", [(11, 4), (4, 11), (11, 12)])
def test_a_long_side_keeps_the_identity(shape: tuple[int, int], recipe: type) -> None:
    # with the other side's statistic left out, a factor is S_L = E[G G^T] / n
    start, grad = torch.randn(shape, dtype=torch.float64), stream(shape, 8)
    numbers: dict[str, Any] = {"lr": 0.05, "betas": (0.0, 0.9), "weight_decay": 0.0, "eps": 0.0}
    path, first, opt = run(recipe, start, grad, 20, "embedding", max_precond_dim=10, **numbers)
    kept = {"left": shape[0], "right": shape[1]}
    kept = {side: d for side, d in kept.items() if d <= 10}
    assert {key for key in first if key in ("left", "right")} == set(kept)
    [state] = opt.state.values()
    p, factor, gs = start, 0.0, []
    for t, after in enumerate(path, 1):
        g = grad(t, p)
        gs.append(g)
        p = after
    for side, d in kept.items():
        for g in gs:
            x = g if side == "left" else g.T
            factor = 0.9 * factor + 0.1 * x @ x.T / x.shape[1]
        torch.testing.assert_close(state[side], factor)
        assert d == len(state[side])
    if not kept and recipe is KLShampoo:  # nothing is left of the method but the momentum
        assert far([path[0]], [start]) == 0
        assert far([path[1]], [start - 0.05 * grad(2, start)]) < 1e-12


def test_the_pair_of_factors_follows_rotations() -> None:
    start = torch.randn(5, 4, dtype=torch.float64)
    grads = [torch.randn(5, 4, dtype=torch.float64) for _ in range(3)]
    u, v = (torch.linalg.qr(torch.randn(d, d, dtype=torch.float64)).Q for d in (5, 4))
    h = {"betas": (0.9, 0.9), "shampoo_beta": None, "eps": 1e-8, "refresh_method": "eigh", "product_dtype": "float32"}
    part, ends = KLRoots(), []
    for turn in (lambda g: g, lambda g: u @ g @ v.T):
        block = Block("w", (Piece("w", (5, 4)),), (5, 4), Role.MATRIX)
        s: dict[str, Any] = {}
        for name, slot in part.slots(block).items():
            if slot.layout == "factor":
                s[name] = torch.full((1, *slot.shape), slot.fill, dtype=torch.float64)
            else:
                s[name] = rows(torch.zeros(5, 4, dtype=torch.float64))
        for t in range(8):
            x = batch(turn(grads[t % 3]), block, t + 1)
            part.update(x, s, h, {})
        ends.append((x.u.list[0] * x.factor, s["left"][0], s["right"][0]))
    torch.testing.assert_close(ends[1][1], u @ ends[0][1] @ u.T)
    torch.testing.assert_close(ends[1][2], v @ ends[0][2] @ v.T)
    torch.testing.assert_close(ends[1][0], u @ ends[0][0] @ v.T)
    assert not torch.equal(start, ends[0][0])


def rows(matrix: Tensor) -> Rows:
    stack = matrix[None].clone()
    return Rows(list(stack), stack)


def batch(g: Tensor, block: Block, step: int) -> Batch:
    scratch = {tag: rows(torch.zeros_like(g)) for tag in ("direction", "graft", "denominator")}
    return Batch(
        g=rows(g),
        p=lambda: rows(torch.zeros_like(g)),
        blocks=(block,),
        scratch=scratch.__getitem__,
        step=float(step),
        first=step == 1,
        work=Workspace(),
    )


TROUBLE: dict[str, Any] = {
    "zero": lambda t, p: torch.zeros_like(p),
    "zero at first": lambda t, p: torch.zeros_like(p) if t < 5 else torch.randn_like(p),
    "rank one": lambda t, p: torch.outer(torch.randn(p.shape[0]), torch.randn(p.shape[1])),
    "the same rank one": lambda t, p: torch.ones_like(p),
    "tiny": lambda t, p: 1e-25 * torch.randn_like(p),
    "huge": lambda t, p: 1e20 * torch.randn_like(p),
    "huge at first": lambda t, p: (1e20 if t == 1 else 1.0) * torch.randn_like(p),
    "one huge": lambda t, p: (1e20 if t == 4 else 1.0) * torch.randn_like(p),
}


@pytest.mark.parametrize("recipe", [KLShampoo, KLSOAP])
@pytest.mark.parametrize("case", TROUBLE)
def test_trouble_stays_finite(case: str, recipe: type) -> None:
    shapes = {"a": (8, 8), "b": (20, 5), "c": (1, 7)}
    model = Bag({key: torch.randn(shape) for key, shape in shapes.items()})
    matrix = [gd.rule("a", role="matrix"), gd.rule("b", role="matrix"), gd.rule("c", role="embedding")]
    opt = gd.build(model, recipe(lr=0.01, precondition_frequency=3), rules=matrix)
    params = list(model.parameters())
    train(opt, params, [TROUBLE[case]] * 3, 20)
    for p in params:
        assert p.isfinite().all()
        if case != "huge":
            assert all(value.isfinite().all() for value in opt.state[p].values())
    if case == "zero":
        assert not opt.audit() or all("fallbacks" not in counts for counts in opt.audit().values())
    if case == "one huge":
        assert all(counts["repairs"] for counts in opt.audit().values())
        before = [p.detach().clone() for p in params]
        train(opt, params, [TROUBLE[case]] * 3, 10, start=21)
        if recipe is KLShampoo:
            assert all(float((p.detach() - old).abs().max()) > 1e-4 for p, old in zip(params, before))
