"""TONGA against the dense inverse of its covariance, and its truncation against a dense eigendecomposition."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import guided_descent as gd
from guided_descent.parts.geometry.tonga import LowRankNatural
from guided_descent.recipes.tonga import TONGA
from oracles.kfac import Bed, block, numbers

GAMMA, LAM = 0.9, 0.05


def rand(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def reference(grads: list[Tensor], rank: int, every: int, ahead: int = 0) -> list[Tensor]:
    """``(C + lam I)^-1 g`` with a dense C, cut to its leading eigenvectors after every ``every`` updates.

    ``ahead``: the first time so many updates earlier.
    """
    found, c = [], torch.zeros(len(grads[0]), len(grads[0])).double()
    for t, g in enumerate(grads, 1):
        c = GAMMA * c + torch.outer(g, g)
        found.append(torch.linalg.solve(c + LAM * torch.eye(len(g)).double(), g))
        if (t + ahead) % every == 0:
            values, vectors = torch.linalg.eigh(c)
            kept = vectors[:, -rank:] * values[-rank:].clamp(min=0).sqrt()
            c = kept @ kept.T
    return found


@pytest.mark.parametrize(("rank", "every"), [(12, 3), (3, 4), (2, 1)])
@pytest.mark.parametrize("span", ["layer", "neuron"])
@pytest.mark.parametrize("staggered", [False, True])
def test_it_is_the_dense_inverse(staggered: bool, span: str, rank: int, every: int) -> None:
    part = LowRankNatural(span=span, rank=rank, every=every, staggered=staggered)
    bed = Bed(part, [block(3, 4, f"w{i}") for i in range(2)], numbers(gamma=GAMMA, damping=LAM))
    grads = [rand(2, 3, 4, seed=t) for t in range(14)]
    found = [bed.update(g) for g in grads]
    for b in range(2):
        rows = [slice(i, i + 1) for i in range(3)] if span == "neuron" else [slice(None)]
        for j, row in enumerate(rows):
            ahead = j if staggered else 0
            dense = reference([g[b, row].flatten() for g in grads], rank, every, ahead)
            for u, v in zip(found, dense):
                torch.testing.assert_close(u[b, row].flatten(), v, rtol=1e-8, atol=1e-9)


def test_turns_spread_the_decompositions() -> None:
    """Of 40 covariances every update cuts four, each of them once in ten updates."""
    bed = Bed(LowRankNatural(rank=2, staggered=True), [block(40, 3)], numbers())
    free = []
    for t in range(30):
        bed.update(rand(1, 40, 3, seed=t))
        free.append((bed.state["columns"][0, :, 2:].abs().sum((1, 2)) == 0).nonzero().flatten().tolist())
    assert all(len(cut) == 4 for cut in free)
    assert all(sorted(j for cut in free[t : t + 10] for j in cut) == list(range(40)) for t in range(20))


def test_first_step_and_scale() -> None:
    g = rand(1, 3, 4)
    for scale in (1e-12, 1.0, 1e6):
        bed = Bed(LowRankNatural(span="layer"), [block(3, 4)], numbers(damping=0.1))
        torch.testing.assert_close(bed.update(scale * g), scale * g / (0.1 + (scale * g).square().sum()))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("case", ["zero", "rank one", "condition", "tiny", "large"])
def test_degenerate_gradients(case: str, dtype: torch.dtype) -> None:
    one = torch.outer(rand(5, seed=1), rand(4, seed=2))
    make: dict[str, Any] = {
        "zero": lambda t: one * 0,
        "rank one": lambda t: one,
        "condition": lambda t: rand(5, 4, seed=t) * torch.logspace(0, -12, 4),
        "tiny": lambda t: rand(5, 4, seed=t) * 1e-25,
        "large": lambda t: rand(5, 4, seed=t) * 1e15,
    }
    bed = Bed(LowRankNatural(rank=2, every=3), [block(5, 4)], numbers(damping=1e-4), dtype)
    for t in range(20):
        g = make[case](t)[None].to(dtype)
        u = bed.update(g)
        assert u.isfinite().all()
        assert float(u.double().norm()) <= 1.001 * float(g.double().norm()) / 1e-4
        assert bed.state["columns"].isfinite().all()


def test_a_solver_that_fails_keeps_the_newest_columns(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*args: Any, **kwargs: Any) -> Any:
        raise torch.linalg.LinAlgError("the algorithm failed to converge")

    monkeypatch.setattr(torch.linalg, "eigh", broken)
    bed = Bed(LowRankNatural(span="layer", rank=1, every=2), [block(2, 2)], numbers(gamma=1.0))
    bed.update(rand(1, 2, 2, seed=1))
    bed.update(rand(1, 2, 2, seed=2))
    torch.testing.assert_close(bed.state["columns"][0, 0, 0], rand(2, 2, seed=2).flatten())
    assert not bed.state["columns"][0, 0, 1:].any()


def test_it_trains_through_the_library() -> None:
    x = rand(256, 8, seed=1).float()
    y = (x[:, 0] * x[:, 1] > 0).long()
    torch.manual_seed(1)
    net = nn.Sequential(nn.Linear(8, 32), nn.Tanh(), nn.Linear(32, 32), nn.Tanh(), nn.Linear(32, 2))
    opt = gd.optimizer("tonga", net, truncate_schedule="every")
    for _ in range(100):
        opt.zero_grad()
        loss = F.cross_entropy(net(x), y)
        loss.backward()
        opt.step()
    assert float(loss.detach()) < 0.2
    assert opt.audit()["2.weight"] == {"truncations": 10}
    with pytest.raises(ValueError, match="rank=0 of tonga must be >= 1"):
        TONGA(rank=0)


def test_state_saved_before_there_were_turns_asks_for_the_old_schedule() -> None:
    net = nn.Linear(4, 3)
    old = gd.optimizer("tonga", net, truncate_schedule="every").state_dict()
    for group in old["param_groups"]:
        group.pop("truncate_schedule", None)
    with pytest.raises(ValueError, match=r"truncate_schedule of param group 0 was 'every' .* is 'staggered' here"):
        gd.optimizer("tonga", net).load_state_dict(old)
    with pytest.warns(UserWarning, match="lacks truncate_schedule"):
        gd.optimizer("tonga", net, truncate_schedule="every").load_state_dict(old)
