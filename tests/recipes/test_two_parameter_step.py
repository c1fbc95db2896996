"""The paper's step size and momentum: exact products with the Gauss-Newton matrix of the batch."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import guided_descent as gd
from guided_descent.parts.damping import QuadraticStep, two_steps
from guided_descent.recipes import KFAC
from guided_descent.solvers import Likelihood, Objective
from ranks import leave

OPTIONS: dict[str, Any] = {"step": "quadratic", "lr": 1.0, "damping": 0.05, "kl_clip": None, "fisher": "exact"}


def net(dtype: torch.dtype = torch.float64) -> nn.Sequential:
    torch.manual_seed(4)
    return nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 4, bias=False), nn.Tanh(), nn.Linear(4, 3)).to(dtype)


def batch(dtype: torch.dtype = torch.float64, n: int = 24) -> tuple[Tensor, Tensor]:
    made = torch.Generator().manual_seed(1)
    x = torch.randn(n, 5, generator=made, dtype=torch.float64).to(dtype)
    return x, x[:, :3].abs().argmax(1)


def objective(opt: torch.optim.Optimizer, model: nn.Module, x: Tensor, y: Tensor) -> Objective:
    def closure() -> Tensor:
        opt.zero_grad()
        loss = F.cross_entropy(model(x), y)
        loss.backward()
        return loss

    return Objective(outputs=lambda: model(x), likelihood=Likelihood("cross_entropy", y), closure=closure)


def gauss_newton(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    """The dense Gauss-Newton matrix, by the Jacobian of the outputs and the Hessian of the loss."""
    names = [name for name, _ in model.named_parameters()]
    start = torch.cat([p.detach().reshape(-1) for p in model.parameters()])

    def outputs(flat: Tensor) -> Tensor:
        sizes = [p.numel() for p in model.parameters()]
        pieces = [piece.view_as(p) for piece, p in zip(torch.split(flat, sizes), model.parameters(), strict=True)]
        return torch.func.functional_call(model, dict(zip(names, pieces, strict=True)), (x,))

    jacobian = torch.autograd.functional.jacobian(outputs, start).reshape(-1, len(start))
    at = model(x).detach()
    hessian = torch.autograd.functional.hessian(lambda z: F.cross_entropy(z, y), at).reshape(at.numel(), at.numel())
    return jacobian.T @ hessian @ jacobian


def test_products_are_those_of_the_dense_matrix() -> None:
    model, (x, y) = net(), batch()
    given = objective(torch.optim.SGD(model.parameters()), model, x, y)
    vectors = [[torch.randn_like(p) for p in model.parameters()] for _ in range(3)]
    flat = torch.stack([torch.cat([v.reshape(-1) for v in vector]) for vector in vectors])
    found = given.products(list(model.parameters()), vectors)
    torch.testing.assert_close(found, flat @ gauss_newton(model, x, y) @ flat.T, rtol=1e-10, atol=1e-12)
    with pytest.raises(TypeError, match="need residuals or outputs"):
        Objective(loss=lambda: F.cross_entropy(model(x), y)).products(list(model.parameters()), vectors)


@pytest.mark.parametrize("options", [{}, {"damping_form": "eigenbasis", "refresh_method": "eigh"}])
def test_the_step_minimises_the_exact_model(options: dict[str, Any]) -> None:
    """Over all of alpha and mu, with every layer coupled: the gradient of the model along d and v is zero."""
    model, (x, y) = net(), batch()
    opt = gd.build(model, KFAC(**OPTIONS, **options), loss="cross_entropy")
    previous: Tensor | None = None
    for _ in range(5):
        before = torch.cat([p.detach().reshape(-1).clone() for p in model.parameters()])
        exact = gauss_newton(model, x, y) + 0.05 * torch.eye(len(before), dtype=torch.float64)
        g = torch.cat(
            [v.reshape(-1) for v in torch.autograd.grad(F.cross_entropy(model(x), y), list(model.parameters()))]
        )
        opt.step(objective(opt, model, x, y))
        delta = torch.cat([p.detach().reshape(-1) for p in model.parameters()]) - before
        slope = exact @ delta + g
        assert abs(float(slope @ delta)) < 1e-9 * float(delta @ exact @ delta)
        if previous is not None:
            assert abs(float(slope @ previous)) < 1e-9 * float(previous.norm() * (exact @ delta).norm())
        assert float(g @ delta) < 0
        previous = delta


def test_the_factored_model_differs_and_needs_no_objective() -> None:
    x, y = batch()
    ends = []
    for step in ("quadratic", "quadratic_factored"):
        model = net()
        opt = gd.build(model, KFAC(**OPTIONS | {"step": step}), loss="cross_entropy")
        for _ in range(3):
            if step == "quadratic":
                opt.step(objective(opt, model, x, y))
            else:
                opt.zero_grad()
                F.cross_entropy(model(x), y).backward()
                opt.step()
        ends.append(torch.cat([p.detach().reshape(-1) for p in model.parameters()]))
    assert float((ends[0] - ends[1]).norm() / ends[0].norm()) > 1e-4


def test_it_trains_with_the_damping_of_levenberg_and_marquardt() -> None:
    model, (x, y) = net(torch.float32), batch(torch.float32, 200)
    options = OPTIONS | {"damping_rule": "lm", "damping": 0.1, "fisher": "mc"}
    opt = gd.build(model, KFAC(**options), loss="cross_entropy")
    given = objective(opt, model, x, y)
    losses = [opt.step(given).item() for _ in range(60)]
    assert losses[-1] < 0.5 * losses[0]
    assert float(opt.param_groups[0]["extra"]["damping_factor"]) != 1.0
    assert float(opt.param_groups[0]["extra"]["predicted_change"]) < 0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_dtypes(dtype: torch.dtype) -> None:
    model, (x, y) = net(dtype), batch(dtype)
    opt = gd.build(model, KFAC(**OPTIONS), loss="cross_entropy")
    losses = [opt.step(objective(opt, model, x, y)).item() for _ in range(6)]
    assert losses[-1] < losses[0]


def test_a_plain_closure_is_refused_before_anything_changes() -> None:
    model, (x, y) = net(), batch()
    opt = gd.build(model, KFAC(**OPTIONS), loss="cross_entropy")
    before = [p.detach().clone() for p in model.parameters()]
    whole = objective(opt, model, x, y)
    for closure in (None, whole.closure, Objective(closure=whole.closure)):
        if closure is None:
            F.cross_entropy(model(x), y).backward()
        with pytest.raises(ValueError, match=r"QuadraticStep multiplies.*call step\(Objective.*or choose the factored"):
            opt.step(closure)
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
    opt.step(objective(opt, model, x, y))
    assert not torch.equal(before[0], next(model.parameters()))


def test_dependent_directions_drop_the_momentum() -> None:
    sums = {
        name: torch.tensor(value) for name, value in (("uu", 0.1), ("uv", 0.2), ("vv", 0.4), ("gu", 3.0), ("gv", 6.0))
    }
    exact = torch.tensor([[1.9, 3.8], [3.8, 7.6]], dtype=torch.float64)
    assert two_steps(sums | {"products": exact}) == pytest.approx((1.5, 0.0), rel=1e-6)
    assert not QuadraticStep().multiplies


def _rank(rank: int, world: int, folder: str) -> None:
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=world)
    torch.set_num_threads(1)
    x, y = batch()
    alone = net()
    opt = gd.build(alone, KFAC(**OPTIONS), loss="cross_entropy")
    for _ in range(3):
        opt.step(objective(opt, alone, x, y))
    model = net()
    ddp = nn.parallel.DistributedDataParallel(model)
    shared = gd.build(ddp, KFAC(**OPTIONS), loss="cross_entropy")
    mine = slice(12 * rank, 12 * rank + 12)

    def closure() -> Tensor:
        shared.zero_grad()
        loss = F.cross_entropy(ddp(x[mine]), y[mine])
        loss.backward()
        return loss

    given = Objective(outputs=lambda: model(x[mine]), likelihood=Likelihood("cross_entropy", y[mine]), closure=closure)
    for _ in range(3):
        shared.step(given)
    for a, b in zip(alone.parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-9)
    leave()


def test_ranks_take_the_step_of_the_whole_batch(tmp_path: Any) -> None:
    torch.multiprocessing.spawn(_rank, args=(2, str(tmp_path)), nprocs=2)
