"""K-FAC against dense damped inverses, the natural gradient where it is exact, and its invariances."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import guided_descent as gd
from guided_descent.parts.clip import KlClip
from guided_descent.parts.geometry.kfac import Kfac
from guided_descent.recipes.kfac import FOOF, KFAC
from guided_descent.routing.roles import Role
from oracles.kfac import Bed, block, damped_solve, factors, jacobian, joint_order, layer, numbers, traced

PLAIN: dict[str, Any] = {
    "lr": 1.0,
    "momentum": 0.0,
    "kl_clip": None,
    "refresh_schedule": "every",
    "damping_form": "eigenbasis",
    "refresh_method": "eigh",
}


def rand(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def close(a: Tensor, b: Tensor, tolerance: float = 1e-8) -> None:
    assert a.shape == b.shape
    assert float((a - b).abs().max()) <= tolerance * max(1.0, float(b.abs().max()))


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("approx", ["expand", "reduce"])
@pytest.mark.parametrize("positions", [1, 3])
def test_it_is_the_dense_damped_inverse(positions: int, approx: str, bias: bool) -> None:
    n, m, samples = 4, 5, 9
    a, d, g = rand(samples, positions, n, seed=1), rand(samples, positions, m, seed=2), rand(m, n + bias, seed=3)
    terms = samples * positions if approx == "expand" else samples
    bed = Bed(Kfac(), [block(m, n + bias)], numbers(approx=approx, damping=0.03))
    bed.capture(layer(a, d, terms, bias=bias))
    big_a, big_b = factors(a, d, terms, approx, bias)
    close(bed.update(g[None])[0], damped_solve(torch.kron(big_b, big_a), g, 0.03))


@pytest.mark.parametrize(("sides", "left", "right"), [("right", False, True), ("left", True, False)])
def test_one_sided(sides: str, left: bool, right: bool) -> None:
    a, d, g = rand(9, 1, 4, seed=1), rand(9, 1, 5, seed=2), rand(5, 4, seed=3)
    bed = Bed(Kfac(sides=sides), [block(5, 4)], numbers())
    bed.capture(layer(a, d if left else None, 9 * left))
    big_a, big_b = factors(a, d, 9)
    eye = torch.eye
    curvature = torch.kron(big_b if left else eye(5).double(), big_a if right else eye(4).double())
    close(bed.update(g[None])[0], damped_solve(curvature, g, 0.01))


def test_a_long_side_is_diagonal() -> None:
    a, d, g = rand(9, 2, 6, seed=1), rand(9, 2, 3, seed=2), rand(3, 7, seed=3)
    bed = Bed(Kfac(max_dim=4), [block(3, 7)], numbers())
    bed.capture(layer(a, d, 18, bias=True))
    big_a, big_b = factors(a, d, 18, bias=True)
    assert "right_basis" not in bed.state
    close(bed.update(g[None])[0], damped_solve(torch.kron(big_b, big_a.diagonal().diag()), g, 0.01))


def test_factored_damping() -> None:
    a, d, g, lam = 3 * rand(9, 1, 4, seed=1), rand(9, 1, 5, seed=2), rand(5, 4, seed=3), 0.02
    bed = Bed(Kfac(form="pi"), [block(5, 4)], numbers(damping=lam))
    bed.capture(layer(a, d, 9))
    big_a, big_b = factors(a, d, 9)
    pi = ((big_a.trace() / 4) / (big_b.trace() / 5)) ** 0.5
    left = torch.linalg.inv(big_b + lam**0.5 / pi * torch.eye(5))
    right = torch.linalg.inv(big_a + lam**0.5 * pi * torch.eye(4))
    close(bed.update(g[None])[0], left @ g @ right)


def test_running_average_of_the_factors() -> None:
    bed = Bed(Kfac(), [block(3, 4)], numbers(factor_decay=0.8))
    expected: list[Tensor] = []
    for t in range(1, 9):
        a, d = rand(6, 1, 4, seed=t), rand(6, 1, 3, seed=50 + t)
        bed.capture(layer(a, d, 6))
        bed.update(rand(1, 3, 4))
        new = factors(a, d, 6)
        rho = min(1 - 1 / t, 0.8)
        expected = [rho * old + (1 - rho) * fresh for old, fresh in zip(expected or new, new)]
        close(bed.state["right"][0], expected[0])
        close(bed.state["left"][0], expected[1])
    assert int(bed.state["captures"][0]) == 8
    stale = bed.update(rand(1, 3, 4, seed=9))  # the bases are still those of the first capture
    bed.refresh()
    g = rand(3, 4, seed=9)
    dense = damped_solve(torch.kron(expected[1], expected[0]), g, 0.01)
    close(bed.update(g[None])[0], dense)
    assert float((stale[0] - dense).abs().max()) > 1e-3


def test_tracking_comes_to_the_exact_bases() -> None:
    bed = Bed(Kfac(), [block(3, 4)], numbers(refresh_method="qr", factor_decay=0.0))
    g = rand(1, 3, 4, seed=9)
    for seed in (1, 2):
        a, d = rand(60, 1, 4, seed=seed), rand(60, 1, 3, seed=50 + seed)
        bed.capture(layer(a * torch.tensor([1.0, 2.0, 4.0, 8.0]), d * torch.tensor([1.0, 3.0, 9.0]), 60))
        bed.update(g)
    for _ in range(60):
        bed.refresh()
    exact = damped_solve(torch.kron(bed.state["left"][0], bed.state["right"][0]), g[0], 0.01)
    close(bed.update(g)[0], exact, 1e-7)


def test_empirical_gradients_of_accumulated_losses_are_scaled_back() -> None:
    a, d, g = rand(8, 1, 4, seed=1), rand(8, 1, 3, seed=2), rand(1, 3, 4, seed=3)
    whole = Bed(Kfac(), [block(3, 4)], numbers(fisher="empirical"))
    whole.capture(layer(a, d, 8))
    parts = Bed(Kfac(), [block(3, 4)], numbers(fisher="empirical"))
    for i in range(0, 8, 2):
        parts.capture(layer(a[i : i + 2], d[i : i + 2] / 4, 2))
    close(parts.update(g), whole.update(g))


def test_repeated_passes_count_inputs_and_terms_once() -> None:
    a, columns, g = rand(7, 1, 4, seed=1), [rand(7, 1, 3, seed=2), rand(7, 1, 3, seed=3)], rand(3, 4, seed=4)
    bed = Bed(Kfac(), [block(3, 4)], numbers())
    for i, d in enumerate(columns):
        bed.capture(layer(a, d, 7, fresh=i == 0))
    big_a = factors(a, columns[0], 7)[0]
    big_b = sum(factors(a, d, 7)[1] for d in columns)
    assert isinstance(big_b, Tensor)
    close(bed.update(g[None])[0], damped_solve(torch.kron(big_b, big_a), g, 0.01))


def test_embeddings_and_tied_tables() -> None:
    rows, d = torch.tensor([[0, 2], [2, 4], [1, 2], [4, -1]]), rand(4, 2, 3, seed=2)
    d[3, 1] = 0  # padding
    g = rand(5, 3, seed=3)
    counts = torch.tensor([1.0, 1, 3, 0, 2]).double() / 8
    by_gradient = factors(d, d, 8)[1]
    table = Bed(Kfac(), [block(5, 3, role=Role.EMBEDDING)], numbers())
    table.capture(layer(rows, d, 8, inputs=5))
    close(table.update(g[None])[0], damped_solve(torch.kron(counts.diag(), by_gradient), g, 0.01))
    a, e = rand(4, 2, 3, seed=5), rand(4, 2, 5, seed=6)
    tied = Bed(Kfac(), [block(5, 3, role=Role.HEAD)], numbers())
    tied.capture(layer(rows, d, 8, inputs=5))
    tied.capture(layer(a, e, 8))
    big_a, big_b = factors(a, e, 8)
    close(tied.update(g[None])[0], damped_solve(torch.kron(counts.diag() + big_b, big_a + by_gradient), g, 0.01))


def test_blocks_wait_for_their_first_capture() -> None:
    bed = Bed(Kfac(), [block(3, 4, "seen"), block(3, 4, "unseen")], numbers())
    g = rand(2, 3, 4, seed=3)
    bed.update(g)
    assert bed.x.held
    assert bed.x.ticks["uncaptured"] == [1, 1]
    bed.capture(layer(rand(6, 1, 4), rand(6, 1, 3, seed=1), 6), None)
    out = bed.update(g)
    assert not bed.x.held
    assert bed.x.ticks["uncaptured"] == [0, 1]
    assert bed.x.wd_scale == [1.0, 0.0]
    assert out[0].abs().min() > 0
    assert not out[1].any()
    bed.refresh()  # the row without statistics has nothing to refresh
    bed.capture(None, layer(rand(6, 1, 4, seed=7), rand(6, 1, 3, seed=8), 6))
    out = bed.update(g)
    assert "uncaptured" not in bed.x.ticks
    big_a, big_b = factors(rand(6, 1, 4, seed=7), rand(6, 1, 3, seed=8), 6)
    close(out[1], damped_solve(torch.kron(big_b, big_a), g[1], 0.01))


def test_affine_changes_of_inputs_and_outputs_do_not_matter_without_damping() -> None:
    a, d, s, t = rand(20, 1, 4, seed=1), rand(20, 1, 3, seed=2), rand(3, 3, seed=3), rand(5, 5, seed=4)
    t[4, :4], t[4, 4] = 0, 1  # a' = T [a, 1] keeps its 1, so the bias takes the shift
    wide = torch.cat([a, torch.ones(20, 1, 1).double()], -1)
    g = torch.einsum("nro,nri->oi", d, wide) / 20
    plain = Bed(Kfac(), [block(3, 5)], numbers(damping=0.0))
    plain.capture(layer(a, d, 20, bias=True))
    first = plain.update(g[None])[0]
    # y' = S y, [a', 1] = T [a, 1]: W = S^-1 W' T, so that d' = S^-T d and the update of W must be S^-1 (that of W') T
    moved_a, moved_d = wide @ t.T, d @ torch.linalg.inv(s)
    moved_g = torch.einsum("nro,nri->oi", moved_d, moved_a) / 20
    other = Bed(Kfac(), [block(3, 5)], numbers(damping=0.0))
    other.capture(layer(moved_a[..., :4], moved_d, 20, bias=True))
    close(torch.linalg.inv(s) @ other.update(moved_g[None])[0] @ t, first, 1e-6)


# -- the clip ----------------------------------------------------------------------------------------------------------


def test_the_clip_scales_all_layers_by_one_number() -> None:
    one, two = Bed(KlClip(), [block(3, 4)], numbers(lr=0.5)), Bed(KlClip(), [block(2, 2)], numbers(lr=0.5))
    g1, g2 = rand(1, 3, 4, seed=1), rand(1, 2, 2, seed=2)
    x1, x2 = one.batch(g1), two.batch(g2)
    x1.take().mul_(2.0)
    x2.scale(3.0)
    part = KlClip()
    total = part.sums(x1, {}, one.h)["kl"] + part.sums(x2, {}, two.h)["kl"]
    expected = 0.25 * (2 * g1.square().sum() + 3 * g2.square().sum())
    close(total, expected, 1e-12)
    for x, g, by in ((x1, g1, 2.0), (x2, g2, 3.0)):
        part.update(x, {}, one.h, {"kl": total})
        close(x.read().whole, g * by * (1e-3 / expected) ** 0.5, 1e-12)


@pytest.mark.parametrize(
    ("kl", "signed", "nu"), [(1e-5, False, 1.0), (-4e-3, False, 0.5), (-4e-3, True, 1.0), (0.0, False, 1.0)]
)
def test_the_clip_never_lengthens(kl: float, signed: bool, nu: float) -> None:
    bed = Bed(KlClip(signed=signed), [block(2, 2)], numbers())
    x = bed.batch(rand(1, 2, 2))
    bed.part.update(x, {}, bed.h, {"kl": torch.tensor(kl, dtype=torch.float64)})
    assert x.factor == pytest.approx(nu)


def test_a_coupled_decay_is_a_part_of_the_gradient() -> None:
    bed = Bed(KlClip(coupled="weight_decay"), [block(2, 3)], numbers(weight_decay=0.3))
    g, p = rand(1, 2, 3, seed=1), rand(1, 2, 3, seed=2)
    x = bed.batch(g, p)
    close(bed.part.sums(x, {}, bed.h)["kl"], (g * (g + 0.3 * p)).sum(), 1e-12)


# -- through the library -----------------------------------------------------------------------------------------------


def step_of(net: nn.Module, opt: Any, loss: Any) -> dict[str, Tensor]:
    """One step, and what it took off each parameter."""
    before = {name: p.detach().clone() for name, p in net.named_parameters()}
    opt.zero_grad()
    loss().backward()
    opt.step()
    return {name: before[name] - p.detach() for name, p in net.named_parameters()}


def test_it_is_the_natural_gradient_of_one_linear_layer() -> None:
    net = nn.Linear(4, 3).double()
    x, y = rand(10, 4, seed=1), rand(10, 3, seed=2)
    opt = gd.optimizer("kfac", net, loss="mse", fisher="exact", damping=0.02, **PLAIN)
    taken = step_of(net, opt, lambda: F.mse_loss(net(x), y))
    grad = torch.cat([net.weight.grad, net.bias.grad[:, None]], 1)
    j = jacobian(net, x, ["weight", "bias"])[:, :, joint_order(3, 4)]
    fisher = torch.einsum("nop,noq->pq", j, j) * 2 / (3 * 10)  # the Hessian of the mean squared error
    close(torch.cat([taken["weight"], taken["bias"][:, None]], 1), damped_solve(fisher, grad, 0.02))


@pytest.mark.parametrize("bias", [False, True])
def test_a_deep_net_with_a_convolution(bias: bool) -> None:
    torch.manual_seed(3)
    net = nn.Sequential(
        nn.Conv2d(2, 3, 3, 2, 1, bias=bias), nn.Tanh(), nn.Flatten(), nn.Linear(12, 5, bias=bias)
    ).double()
    x, y = rand(7, 2, 4, 4, seed=1), torch.arange(7) % 5

    def seeds(out: Tensor) -> list[Tensor]:
        p = out.softmax(1)
        return [p.sqrt()[:, c, None] * (torch.eye(5)[c] - p) for c in range(5)]

    reference = traced(net, x, seeds)
    opt = gd.optimizer("kfac", net, loss="cross_entropy", fisher="exact", damping=0.02, **PLAIN)
    taken = step_of(net, opt, lambda: F.cross_entropy(net(x), y))
    for name, (before, columns) in reference.items():
        module = net.get_submodule(name)
        if isinstance(module, nn.Conv2d):
            a = F.unfold(before, 3, padding=1, stride=2).mT
            columns = [d.flatten(2).mT for d in columns]
        else:
            a, columns = before[:, None], [d[:, None] for d in columns]
        big_a = factors(a, columns[0], 7, bias=bias)[0]
        big_b = torch.stack([factors(a, d, 7)[1] for d in columns]).sum(0)
        g = module.weight.grad.flatten(1)
        g = torch.cat([g, module.bias.grad[:, None]], 1) if bias else g
        step = taken[f"{name}.weight"].flatten(1)
        step = torch.cat([step, taken[f"{name}.bias"][:, None]], 1) if bias else step
        close(step, damped_solve(torch.kron(big_b, big_a), g, 0.02))


@pytest.mark.parametrize("approx", ["expand", "reduce"])
def test_shared_weights_where_the_approximation_is_exact(approx: str) -> None:
    net = nn.Linear(4, 3, bias=False).double()
    x = rand(6, 5, 4, seed=1)

    class Whole(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = net

        def forward(self, x: Tensor) -> Tensor:
            return self.inner(x) if approx == "expand" else self.inner(x).mean(1)

    model = Whole()
    y = rand(*model(x).shape, seed=2)
    opt = gd.optimizer("kfac", model, loss="mse", fisher="exact", approx=approx, damping=0.02, **PLAIN)
    taken = step_of(model, opt, lambda: F.mse_loss(model(x), y))
    j = jacobian(model, x, ["inner.weight"])
    fisher = torch.einsum("nop,noq->pq", j, j) * 2 / y.numel()
    close(taken["inner.weight"], damped_solve(fisher, net.weight.grad, 0.02))


@pytest.mark.parametrize("fisher", ["exact", "empirical", "forward"])
def test_accumulation_equals_the_whole_batch(fisher: str) -> None:
    x, y = rand(12, 4, seed=1), torch.arange(12) % 3
    key = "foof" if fisher == "forward" else "kfac"
    steps = []
    for pieces in (1, 3):
        torch.manual_seed(5)
        net = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)).double()
        opt = gd.optimizer(key, net, loss="cross_entropy", fisher=fisher, **PLAIN)
        before = [p.detach().clone() for p in net.parameters()]
        for part in torch.arange(12).chunk(pieces):
            (F.cross_entropy(net(x[part]), y[part]) / pieces).backward()
        opt.step()
        steps.append([b - p.detach() for b, p in zip(before, net.parameters())])
    for whole, parts in zip(*steps):
        close(parts, whole)


def test_it_trains_with_its_defaults() -> None:
    x = rand(256, 8, seed=1).float()
    y = (x[:, 0] * x[:, 1] > 0).long() + (x[:, 2] > 0).long()
    for options in (
        {},
        {"damping_form": "pi"},
        {"refresh_lag": 2},
        {"step": "quadratic_factored", "lr": 0.5, "damping": 0.05},
    ):
        torch.manual_seed(1)
        net = nn.Sequential(nn.Linear(8, 32), nn.Tanh(), nn.Linear(32, 3))
        opt = gd.optimizer("kfac", net, loss="cross_entropy", **options)
        losses = []
        for _ in range(60):
            opt.zero_grad()
            loss = F.cross_entropy(net(x), y)
            loss.backward()
            opt.step()
            losses.append(loss.item())
        assert losses[-1] < 0.35 * losses[0], (options, losses[::10])


def test_uncaptured_layers_are_left_alone_and_counted() -> None:
    net = nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 2)).double()
    opt = gd.optimizer("kfac", net, loss="cross_entropy", weight_decay=0.1, **PLAIN)
    taken = step_of(net, opt, lambda: sum(p.square().sum() for p in net.parameters()))  # no forward of the model
    assert not any(step.any() for step in taken.values())
    assert opt.audit()["0.weight"]["uncaptured"] == 1


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"fisher": "forward"}, "sides='right'"),
        ({"damping_rule": "gcv"}, "fisher='empirical'"),
        ({"damping_form": "pi", "sides": "left"}, "damping_form='eigenbasis'"),
        ({"sides": "top"}, "must be one of"),
    ],
)
def test_impossible_choices(options: dict[str, Any], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        KFAC(**options)
    assert FOOF().sides == "right"


# -- robustness --------------------------------------------------------------------------------------------------------

DATA = {
    "zero": lambda a, d: (a * 0, d * 0),
    "rank one": lambda a, d: (a[:1].expand_as(a), d[:1].expand_as(d)),
    "condition 1e12": lambda a, d: (a * torch.logspace(0, -6, a.shape[-1]), d * torch.logspace(0, -6, d.shape[-1])),
    "tiny": lambda a, d: (a * 1e-12, d * 1e-12),
    "large": lambda a, d: (a * 1e6, d * 1e6),
    "infinite": lambda a, d: (a * 1e25, d),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("form", ["eigenbasis", "pi"])
@pytest.mark.parametrize("case", DATA)
def test_degenerate_statistics(case: str, form: str, dtype: torch.dtype) -> None:
    bed = Bed(Kfac(form=form), [block(5, 4)], numbers(damping=1e-3), dtype)
    for t in range(12):
        a, d = (v.to(dtype) for v in (rand(8, 1, 4, seed=t), rand(8, 1, 5, seed=99 + t)))
        good = (a, d)
        if t > 2 or case != "infinite":
            a, d = DATA[case](a, d)
        bed.capture(layer(a, d, 8))
        g = torch.einsum("nro,nri->oi", *(v if v.isfinite().all() else w for v, w in zip((d, a), good[::-1])))
        u = bed.update(g[None].to(dtype))
        assert u.isfinite().all()
        assert float(u.double().norm()) <= 1.01 * float(g.double().norm()) / 1e-3
        if t % 3 == 2:
            bed.refresh()
        for value in bed.state.values():
            assert value.isfinite().all()
    if case == "infinite" and dtype == torch.float32:
        assert bed.x.ticks["repairs"] == [1]


def test_a_solver_that_always_fails_keeps_the_last_basis(monkeypatch: pytest.MonkeyPatch) -> None:
    bed = Bed(Kfac(), [block(5, 4)], numbers())
    bed.capture(layer(rand(8, 1, 4), rand(8, 1, 5, seed=1), 8))
    g = rand(1, 5, 4, seed=2)
    bed.update(g)
    basis = bed.state["right_basis"].clone()

    def broken(*args: Any, **kwargs: Any) -> Any:
        raise torch.linalg.LinAlgError("the algorithm failed to converge")

    monkeypatch.setattr(torch.linalg, "eigh", broken)
    bed.capture(layer(rand(8, 1, 4, seed=7), rand(8, 1, 5, seed=8), 8))
    bed.update(g)
    bed.refresh()
    assert torch.equal(bed.state["right_basis"], basis)
    assert bed.update(g).isfinite().all()
    fresh = Bed(Kfac(), [block(5, 4)], numbers())
    fresh.capture(layer(rand(8, 1, 4), rand(8, 1, 5, seed=1), 8))
    assert fresh.update(g).isfinite().all()  # the identity, with the diagonal as eigenvalues
    assert fresh.x.ticks["fallbacks"] == [2]
