"""Inverse-free natural gradient against its dense recursion, and its fixed points."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import guided_descent as gd
from guided_descent.parts.geometry.singd import STRUCTURES, InverseFree, Structure
from guided_descent.recipes.singd import SINGD
from oracles.kfac import Bed, block, factors, layer, numbers

WIDTH = 2


def rand(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def project(kind: str, s: Tensor) -> Tensor:
    """The minimiser of ``<M, S> - tr((M + M^T)^2) / 8`` over a structure, by least squares on a basis; dense.

    At the identity, ``K K^T`` moves by ``-b (M + M^T)``: the metric is the Gaussian one, and the step is S itself where
    M may be any matrix.
    """
    d = len(s)
    basis = []
    for i in range(d):
        for j in range(d):
            unit = torch.zeros(d, d).double()
            unit[i, j] = 1
            inside = {
                "dense": True,
                "diag": i == j,
                "tril": i >= j,
                "toeplitz": False,
                "block_diag": i // WIDTH == j // WIDTH,
                "hierarchical": i < WIDTH or (i == j) or (i >= d - WIDTH and j >= WIDTH),
            }[kind]
            if inside:
                basis.append(unit)
    if kind == "toeplitz":
        basis = [torch.diag(torch.ones(d - k).double(), -k) for k in range(d)]
    units = torch.stack(basis)
    sums = units + units.mT
    metric = torch.einsum("pij,qij->pq", sums, sums) / 4
    slope = torch.einsum("pij,ij->p", units, s)
    # the metric cannot see antisymmetric parts: least squares takes the smallest solution, which has none
    return torch.einsum("p,pij->ij", torch.linalg.lstsq(metric, slope[:, None], driver="gelsd").solution[:, 0], units)


@pytest.mark.parametrize("d", [1, 2, 3, 5, 7])
@pytest.mark.parametrize("kind", STRUCTURES)
def test_projection_and_closure(kind: str, d: int) -> None:
    structure = Structure(kind, d, WIDTH)
    s = rand(d, d, seed=1)
    s = s + s.T
    free = structure.project(s)
    assert free.shape == (structure.size,)
    torch.testing.assert_close(structure.unpack(free), project(kind, s))
    k, m = rand(structure.size, seed=2), rand(structure.size, seed=3)
    torch.testing.assert_close(structure.pack(structure.unpack(k)), k)
    product = structure.unpack(k) @ structure.unpack(m)
    torch.testing.assert_close(structure.unpack(structure.pack(product)), product)  # closed under products
    torch.testing.assert_close(structure.unpack(structure.identity(k)), torch.eye(d).double())
    rows = rand(9, d, seed=4)
    torch.testing.assert_close(structure.gram(rows), structure.project(rows.T @ rows))
    torch.testing.assert_close(structure.after(rows, k), rows @ structure.unpack(k))
    torch.testing.assert_close(structure.after(rows, k, transposed=True), rows @ structure.unpack(k).T)
    rate = torch.tensor(0.3).double()
    dense = structure.unpack(k) @ (torch.eye(d) - 0.3 * structure.unpack(m))
    torch.testing.assert_close(structure.unpack(structure.moved(k, m, rate)), dense)
    assert float(structure.largest(k)) == pytest.approx(float(structure.unpack(k).abs().sum(1).max()))


def recursion(kind: str, steps: list[tuple[Tensor, Tensor]], lam: float, rate: float, mu: float, adaptive: bool) -> Any:
    """The dense recursion with projected motions: K, C after each step, for A [n, n] and B [m, m] of each step."""
    n, m = len(steps[0][0]), len(steps[0][1])
    k, c = torch.eye(n).double(), torch.eye(m).double()
    mk, mc = torch.zeros(n, n).double(), torch.zeros(m, m).double()
    for a, b in steps:
        hk, hc = k.T @ a @ k, c.T @ b @ c
        tc, rc = (hc.trace() / m, lam * (c.T @ c).trace() / m) if adaptive else (1.0, lam)
        tk, rk = (hk.trace() / n, lam * (k.T @ k).trace() / n) if adaptive else (1.0, lam)
        mk = mu * mk + 0.5 * project(kind, tc * hk + rc * k.T @ k - torch.eye(n).double())
        mc = mu * mc + 0.5 * project(kind, tk * hc + rk * c.T @ c - torch.eye(m).double())
        k = k @ (torch.eye(n) - rate / max(1.0, float(mk.abs().sum(1).max())) * mk)
        c = c @ (torch.eye(m) - rate / max(1.0, float(mc.abs().sum(1).max())) * mc)
    return k, c


@pytest.mark.parametrize("adaptive", [True, False])
@pytest.mark.parametrize("kind", STRUCTURES)
def test_it_takes_the_dense_recursions_steps(kind: str, adaptive: bool) -> None:
    h = numbers(fisher="empirical", damping=0.05)
    bed = Bed(InverseFree(structure=kind, width=WIDTH, adaptive=adaptive), [block(4, 6)], h)
    steps = []
    for t in range(6):
        a, d = 1.5 * rand(8, 2, 5, seed=t), rand(8, 2, 4, seed=50 + t)
        steps.append(factors(a, d, 16, bias=True))
        for half in (slice(0, 4), slice(4, 8)):
            bed.capture(layer(a[half], d[half] / 2, 8, bias=True))
        g = rand(1, 4, 6, seed=99 + t)
        out = bed.update(g)[0]
        k, c = recursion(kind, steps, 0.05, 0.1, 0.5, adaptive)
        torch.testing.assert_close(out, c @ c.T @ g[0] @ k @ k.T)


@pytest.mark.parametrize("kind", ["dense", "tril"])
def test_without_the_traces_it_ends_at_the_damped_inverses(kind: str) -> None:
    h = numbers(damping=0.1, factor_lr=0.3)
    bed = Bed(InverseFree(structure=kind, adaptive=False), [block(3, 4)], h)
    a, d = rand(20, 1, 4, seed=1), rand(20, 1, 3, seed=2)
    for _ in range(400):
        bed.capture(layer(a, d, 20))
        bed.update(rand(1, 3, 4))
    for (side, length), factor in zip((("right", 4), ("left", 3)), factors(a, d, 20)):
        root = bed.part.of(length).unpack(bed.state[f"{side}_root"][0])
        torch.testing.assert_close(root @ root.T, torch.linalg.inv(factor + 0.1 * torch.eye(length).double()))


def test_with_the_traces_it_ends_at_the_inverse_of_the_damped_product() -> None:
    lam = 1e-4
    bed = Bed(InverseFree(), [block(3, 4)], numbers(damping=lam, factor_lr=0.3))
    a, d = rand(60, 1, 4, seed=1), rand(60, 1, 3, seed=2)
    for _ in range(800):
        bed.capture(layer(a, d, 60))
        bed.update(rand(1, 3, 4))
    k, c = (bed.part.of(n).unpack(bed.state[f"{side}_root"][0]) for side, n in (("right", 4), ("left", 3)))
    big_a, big_b = factors(a, d, 60)
    dense = torch.linalg.inv(torch.kron(big_b, big_a) + lam * torch.eye(12).double())
    found = torch.kron(c @ c.T, k @ k.T)
    assert float(torch.linalg.norm(found - dense) / torch.linalg.norm(dense)) < 1e-3


def test_a_diagonal_is_the_diagonals_inverse() -> None:
    bed = Bed(InverseFree(structure="diag", adaptive=False), [block(3, 4)], numbers(damping=0.1, factor_lr=0.3))
    a, d = rand(20, 1, 4, seed=1), rand(20, 1, 3, seed=2)
    for _ in range(400):
        bed.capture(layer(a, d, 20))
        bed.update(rand(1, 3, 4))
    torch.testing.assert_close(bed.state["right_root"][0].square(), 1 / (factors(a, d, 20)[0].diagonal() + 0.1))
    assert bed.state["right_root"].shape == (1, 4)


def test_waiting_and_broken_statistics() -> None:
    bed = Bed(InverseFree(), [block(3, 4, "a"), block(3, 4, "b")], numbers())
    g = rand(2, 3, 4)
    bed.update(g)
    assert bed.x.held
    bed.capture(layer(rand(8, 1, 4), rand(8, 1, 3), 8), None)
    out = bed.update(g)
    assert bed.x.ticks["uncaptured"] == [0, 1]
    assert out[0].any()
    assert not out[1].any()
    root = bed.state["right_root"].clone()
    bed.capture(layer(rand(8, 1, 4) * float("inf"), rand(8, 1, 3), 8), None)
    bed.update(g)
    assert bed.x.ticks["repairs"] == [1, 0]
    assert torch.equal(bed.state["right_root"], root)


@pytest.mark.parametrize("kind", STRUCTURES)
@pytest.mark.parametrize("scale", [0.0, 1e-12, 1e6])
def test_degenerate_statistics(scale: float, kind: str) -> None:
    bed = Bed(InverseFree(structure=kind, width=WIDTH), [block(5, 4)], numbers(), torch.float32)
    for t in range(40):
        bed.capture(layer(scale * rand(8, 1, 4, seed=t).float(), rand(8, 1, 5, seed=99 + t).float(), 8))
        assert bed.update(rand(1, 5, 4).float()).isfinite().all()
        assert all(value.isfinite().all() for value in bed.state.values())


@pytest.mark.parametrize("kind", STRUCTURES)
def test_it_trains_through_the_library(kind: str) -> None:
    x = rand(256, 8, seed=1).float()
    y = (x[:, 0] * x[:, 1] > 0).long()
    torch.manual_seed(1)
    net = nn.Sequential(nn.Linear(8, 32), nn.Tanh(), nn.Linear(32, 32), nn.Tanh(), nn.Linear(32, 2))
    opt = gd.optimizer("singd", net, structure=kind, structure_width=4, loss="cross_entropy")
    losses = []
    for _ in range(120):
        opt.zero_grad()
        loss = F.cross_entropy(net(x), y)
        loss.backward()
        opt.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]


def test_an_unknown_structure() -> None:
    with pytest.raises(ValueError, match="must be one of"):
        SINGD(structure="band")
    with pytest.raises(ValueError, match="structure_width=0 of singd must be >= 1"):
        SINGD(structure_width=0)


def deep() -> nn.Module:
    """Four hidden layers of unlike sizes, two of them of one."""
    torch.manual_seed(1)
    widths = [8, 12, 12, 12, 20]
    hidden = [f for n, m in itertools.pairwise(widths) for f in (nn.Linear(n, m), nn.Tanh())]
    return nn.Sequential(*hidden, nn.Linear(20, 2)).double()


def steps(net: nn.Module, opt: Any, numbers: range) -> None:
    for t in numbers:
        x = rand(32, 8, seed=t)
        net.zero_grad()
        F.cross_entropy(net(x), (x[:, 0] > 0).long()).backward()
        opt.step()


@pytest.mark.parametrize("structure", ["dense", "diag"])
def test_layers_take_turns(structure: str) -> None:
    """After the first step each layer is captured once in three steps, and no step captures more than half."""

    def make(**options: Any) -> tuple[nn.Module, Any]:
        net = deep()
        return net, gd.optimizer("singd", net, structure=structure, loss="cross_entropy", lr=1e-3, **options)

    net, opt = make(factor_frequency=3, factor_schedule="staggered")
    names = [f"{2 * i}.weight" for i in range(4)]
    before, at = dict.fromkeys(names, 0), []
    for t in range(10):
        steps(net, opt, range(t, t + 1))
        now = {name: opt.audit()[name]["captures"] for name in names}
        at.append({name for name in names if now[name] > before[name]})
        before = now
    assert at[0] == set(names)
    for t in range(1, 8):
        assert sorted(name for some in at[t : t + 3] for name in some) == names
        assert len(at[t]) <= 2

    # a resumed run goes on in the same turns, to the bit
    first, a = make(factor_frequency=3, factor_schedule="staggered")
    steps(first, a, range(5))
    second, b = make(factor_frequency=3, factor_schedule="staggered")
    second.load_state_dict(first.state_dict())
    b.load_state_dict(a.state_dict())
    steps(first, a, range(5, 10))
    steps(second, b, range(5, 10))
    for p, q, r in zip(first.parameters(), second.parameters(), net.parameters()):
        assert torch.equal(p, q)
        assert torch.equal(p, r)

    # with every step a turn of all, the schedules are one
    one, a = make()
    two, b = make(factor_schedule="staggered")
    steps(one, a, range(6))
    steps(two, b, range(6))
    assert all(torch.equal(p, q) for p, q in zip(one.parameters(), two.parameters()))


def test_a_block_moves_by_its_own_captures_alone() -> None:
    """Two blocks in one stack that are seen at different times move as two that are alone."""
    joint = Bed(InverseFree(), [block(3, 4, "a"), block(3, 4, "b")], numbers())
    alone = [Bed(InverseFree(), [block(3, 4, name)], numbers()) for name in "ab"]
    for t in range(9):
        ios = [layer(rand(8, 1, 4, seed=10 * t + i), rand(8, 1, 3, seed=500 + 10 * t + i), 8) for i in range(2)]
        turn = [t == 0 or t % 3 == i for i in range(2)]
        g = rand(2, 3, 4, seed=t)
        if any(turn):
            joint.capture(*[io if yes else None for io, yes in zip(ios, turn)])
        both = joint.update(g)
        for i in range(2):
            if turn[i]:
                alone[i].capture(ios[i])
            torch.testing.assert_close(alone[i].update(g[i : i + 1])[0], both[i])
