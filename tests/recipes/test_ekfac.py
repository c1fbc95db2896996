"""EKFAC: exact second moments in K-FAC's eigenbases, never further from the Fisher block than K-FAC."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import guided_descent as gd
from guided_descent.parts.geometry.ekfac import Ekfac
from guided_descent.parts.geometry.kfac import Kfac
from guided_descent.recipes.kfac import EKFAC
from guided_descent.routing.roles import Role
from oracles.kfac import Bed, block, damped_solve, fisher_block, layer, numbers


def rand(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def data(positions: int, seed: int = 1, samples: int = 12) -> tuple[Tensor, Tensor]:
    """Inputs and gradients that depend on each other, so that the Fisher is no Kronecker product."""
    a = rand(samples, positions, 4, seed=seed)
    return a, rand(samples, positions, 3, seed=seed + 50) * (0.2 + a.square().mean(-1, keepdim=True))


def curvature(bed: Bed, values: Tensor) -> Tensor:
    """``(Q_B (x) Q_A) diag(values) (Q_B (x) Q_A)^T``."""
    q = torch.kron(bed.state["left_basis"][0], bed.state["right_basis"][0])
    return q @ values.flatten().diag() @ q.T


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("positions", [1, 3])
def test_scales_are_the_second_moments_and_beat_kfac(positions: int, bias: bool) -> None:
    a, d = data(positions)
    n, terms = 4 + bias, 12 * positions
    bed = Bed(Ekfac(), [block(3, n)], numbers(damping=0.02))
    g = rand(1, 3, n, seed=9)
    bed.capture(layer(a, d, terms, bias=bias))
    first = bed.update(g)
    kfac = Bed(Kfac(), [block(3, n)], numbers(damping=0.02))
    kfac.capture(layer(a, d, terms, bias=bias))
    torch.testing.assert_close(first, kfac.update(g))  # no basis yet in which to see more
    bed.capture(layer(a, d, terms, bias=bias))
    out = bed.update(g)[0]
    wide = torch.cat([a, torch.ones(12, positions, 1).double()], -1) if bias else a
    fisher = fisher_block(wide, d, terms)
    q = torch.kron(bed.state["left_basis"][0], bed.state["right_basis"][0])
    exact = (q.T @ fisher @ q).diagonal()
    torch.testing.assert_close(bed.state["scales"][0].flatten(), exact / 2 + first_scales(kfac) / 2)  # t = 2: 1/2
    for _ in range(60):
        bed.h["factor_decay"] = 0.3
        bed.capture(layer(a, d, terms, bias=bias))
        out = bed.update(g)[0]
    torch.testing.assert_close(bed.state["scales"][0].flatten(), exact)
    torch.testing.assert_close(out, damped_solve(curvature(bed, exact), g[0], 0.02))
    by_kfac = torch.linalg.norm(fisher - curvature(kfac, first_scales(kfac)))
    assert torch.linalg.norm(fisher - curvature(bed, exact)) < by_kfac * (1 - 1e-3)


def first_scales(kfac: Bed) -> Tensor:
    return torch.outer(kfac.state["left_values"][0], kfac.state["right_values"][0]).flatten()


def test_any_mixture_is_nearer_than_kfac() -> None:
    for seed in range(1, 6):
        a, d = data(1, seed)
        bed = Bed(Ekfac(), [block(3, 4)], numbers())
        fisher = fisher_block(a, d, 12)
        distances = []
        for _ in range(6):
            bed.capture(layer(a, d, 12))
            bed.update(rand(1, 3, 4))
            distances.append(float(torch.linalg.norm(fisher - curvature(bed, bed.state["scales"][0]))))
        assert distances == sorted(distances, reverse=True)


def test_embeddings_sum_the_positions_of_a_sample_first() -> None:
    rows, d = torch.tensor([[0, 0], [2, 4], [1, 2], [4, -1]]), rand(4, 2, 3, seed=2)
    d[3, 1] = 0
    bed = Bed(Ekfac(), [block(5, 3, role=Role.EMBEDDING)], numbers())
    for _ in range(300):
        bed.capture(layer(rows, d, 8, inputs=5))
        bed.update(rand(1, 5, 3))
    hot = torch.nn.functional.one_hot(rows.clamp(min=0), 5).double()
    fisher = fisher_block(d, hot, 8)
    q = torch.kron(torch.eye(5).double(), bed.state["right_basis"][0])
    torch.testing.assert_close(bed.state["scales"][0].flatten(), (q.T @ fisher @ q).diagonal(), rtol=1e-3, atol=1e-5)


def test_a_tied_table_adds_both_uses() -> None:
    rows, d = torch.tensor([[0, 0], [2, 4], [1, 2]]), rand(3, 2, 3, seed=2)
    a, e = rand(3, 2, 3, seed=3), rand(3, 2, 5, seed=4)
    bed = Bed(Ekfac(), [block(5, 3, role=Role.HEAD)], numbers())
    for _ in range(300):
        bed.capture(layer(rows, d, 6, inputs=5))
        bed.capture(layer(a, e, 6))
        bed.update(rand(1, 5, 3))
    hot = torch.nn.functional.one_hot(rows, 5).double()
    fisher = fisher_block(d, hot, 6) + fisher_block(a, e, 6)
    q = torch.kron(bed.state["left_basis"][0], bed.state["right_basis"][0])
    torch.testing.assert_close(bed.state["scales"][0].flatten(), (q.T @ fisher @ q).diagonal(), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("carry", ["rotate", "permute", "keep", "rank"])
def test_scales_follow_a_change_of_basis(carry: str) -> None:
    bed = Bed(Ekfac(), [block(3, 4)], numbers(second_moment=carry, factor_decay=0.5))
    for seed in range(1, 4):
        a, d = data(1, seed)
        bed.capture(layer(a, d, 12))
        bed.update(rand(1, 3, 4))
    old = {name: value.clone() for name, value in bed.state.items()}
    bed.refresh()
    new, scales = bed.state, old["scales"][0]
    left, right = (new[f"{s}_basis"][0].T @ old[f"{s}_basis"][0] for s in ("left", "right"))
    if carry == "rotate":
        expected = left.square() @ scales @ right.square().T
        assert float(expected.sum()) == pytest.approx(float(scales.sum()))
    elif carry == "permute":
        expected = scales[left.square().argmax(1)][:, right.square().argmax(1)]
    else:
        expected = scales
    torch.testing.assert_close(new["scales"][0], expected)
    if carry == "keep":  # columns stay at the places of those that they follow
        assert torch.equal(left.square().argmax(1), torch.arange(3))
        assert torch.equal(right.square().argmax(1), torch.arange(4))


def test_accumulated_empirical_gradients() -> None:
    a, d = data(1)
    g = rand(1, 3, 4, seed=3)
    whole, parts = (Bed(Ekfac(), [block(3, 4)], numbers(fisher="empirical")) for _ in range(2))
    for _ in range(2):
        whole.capture(layer(a, d, 12))
        for i in range(0, 12, 3):
            parts.capture(layer(a[i : i + 3], d[i : i + 3] / 4, 3))
        x, y = whole.update(g), parts.update(g)
    torch.testing.assert_close(x, y)


def test_a_convolution_through_the_library() -> None:
    torch.manual_seed(3)
    net = nn.Sequential(nn.Conv2d(2, 3, 3, padding=1), nn.Flatten(), nn.Linear(48, 2)).double()
    x, y = rand(6, 2, 4, 4, seed=1), torch.arange(6) % 2
    options: dict[str, Any] = {"lr": 0.0, "fisher": "empirical", "precondition_frequency": 1000, "factor_frequency": 1}
    opt = gd.optimizer("ekfac", net, loss="cross_entropy", **options)
    for _ in range(300):
        opt.zero_grad()
        F.cross_entropy(net(x), y).backward()
        opt.step()
    params = dict(net.named_parameters())

    def loss(chosen: dict[str, Tensor], sample: Tensor, target: Tensor) -> Tensor:
        return F.cross_entropy(torch.func.functional_call(net, chosen, (sample[None],)), target[None])

    each = torch.func.vmap(torch.func.grad(loss), (None, 0, 0))({n: p.detach() for n, p in params.items()}, x, y)
    g = torch.cat([each["0.weight"].flatten(2), each["0.bias"][..., None]], 2)
    state = opt.state[params["0.weight"]]
    exact = (state["left_basis"].T @ g @ state["right_basis"]).square().mean(0)
    torch.testing.assert_close(state["scales"], exact, rtol=1e-3, atol=1e-4 * float(exact.max()))


def test_it_trains_and_survives_degenerate_statistics() -> None:
    x = rand(256, 8, seed=1).float()
    y = (x[:, 0] * x[:, 1] > 0).long()
    torch.manual_seed(1)
    net = nn.Sequential(nn.Linear(8, 32), nn.Tanh(), nn.Linear(32, 2))
    opt = gd.optimizer("ekfac", net, loss="cross_entropy")
    for _ in range(60):
        opt.zero_grad()
        loss = F.cross_entropy(net(x), y)
        loss.backward()
        opt.step()
    assert float(loss.detach()) < 0.1
    for scale in (0.0, 1e-12, 1e6, 1e25):
        bed = Bed(Ekfac(), [block(3, 4)], numbers(), torch.float32)
        for seed in range(1, 8):
            a, d = (value.float() for value in data(1, seed))
            bed.capture(layer(a * scale if seed > 1 else a, d, 12))
            assert bed.update(rand(1, 3, 4).float()).isfinite().all()
            bed.refresh()
            assert all(value.isfinite().all() for value in bed.state.values())
    with pytest.raises(ValueError, match="s needs gradients"):
        EKFAC(fisher="forward", sides="right")
