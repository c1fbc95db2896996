"""Likelihood roots, products, dense matrices and damped solves against autograd and dense algebra."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from guided_descent.capture import LOSSES, CrossEntropy, Masked
from guided_descent.solvers import Likelihood, Objective
from guided_descent.solvers.curvature import DampedSystem, Linearization, hessian, solve_psd
from oracles.solvers import flat_function, ggn, jacobian, softmax_fisher

TORCH = {
    "cross_entropy": lambda z, y: F.cross_entropy(z.flatten(0, -2), y.flatten()),
    "mse": F.mse_loss,
    "sum_mse": lambda z, y: (z - y).square().sum(-1).mean(),
    "half_mse": lambda z, y: (z - y).square().sum(-1).mean() / 2,
    "bce": F.binary_cross_entropy_with_logits,
}


def net() -> nn.Module:
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 3)).double()


def data(name: str, n: int = 5):
    x = torch.randn(n, 3, dtype=torch.float64)
    if name == "cross_entropy":
        return x, torch.randint(3, (n,))
    y = torch.rand(n, 3, dtype=torch.float64)
    return x, (y > 0.5).double() if name == "bce" else y


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("shape", [(4, 3), (2, 3, 3)])
def test_the_root_is_a_root_of_the_hessian(name, shape):
    """Against autograd's Hessian of torch's loss; also S rho = gradient, and S' is the transpose."""
    z = torch.randn(shape, dtype=torch.float64)
    y = torch.randint(3, shape[:-1]) if name == "cross_entropy" else torch.rand(shape, dtype=torch.float64)
    kind, reference = Likelihood(name, y), lambda flat: TORCH[name](flat.view(shape), y)
    flat = z.reshape(-1)
    assert kind.value(z).item() == pytest.approx(reference(flat).item(), rel=1e-13)
    h = torch.autograd.functional.hessian(reference, flat)
    eye = torch.eye(len(flat), dtype=z.dtype).view(-1, *shape)
    s = kind.root(z, eye).reshape(len(flat), -1).T  # columns S e_i
    s_t = kind.root_t(z, eye).reshape(len(flat), -1).T
    torch.testing.assert_close(s @ s.T, h, rtol=1e-11, atol=1e-13)
    torch.testing.assert_close(s_t, s.T, rtol=1e-13, atol=1e-15)
    g = torch.autograd.functional.jacobian(reference, flat)
    torch.testing.assert_close(s @ kind.rho(z).reshape(-1), g, rtol=1e-11, atol=1e-13)


def test_a_masked_likelihood_is_that_of_the_rows_that_count():
    z, y = torch.randn(6, 3, dtype=torch.float64), torch.tensor([0, 2, -100, 1, -100, 1])
    keep = y >= 0
    masked, rows = Likelihood(Masked(CrossEntropy(), keep), y), Likelihood("cross_entropy", y[keep])
    assert masked.value(z).item() == pytest.approx(rows.value(z[keep]).item(), rel=1e-14)
    w = torch.randn(6, 3, dtype=torch.float64)
    for whole, part in (
        (masked.root(z, w), rows.root(z[keep], w[keep])),
        (masked.root_t(z, w), rows.root_t(z[keep], w[keep])),
        (masked.rho(z), rows.rho(z[keep])),
    ):
        torch.testing.assert_close(whole[keep], part)
        assert not whole[~keep].any()


def test_extreme_probabilities_stay_finite():
    z = torch.tensor([[800.0, 0.0, -800.0]], dtype=torch.float64)
    for kind in (Likelihood("cross_entropy", torch.tensor([2])), Likelihood("bce", torch.zeros(1, 3).double())):
        assert bool(torch.isfinite(kind.rho(z)).all())
        assert bool(torch.isfinite(kind.root(z, torch.ones_like(z))).all())


def test_masked_classes_and_wrong_shapes_are_refused():
    with pytest.raises(ValueError, match="masked rows"):
        Likelihood("cross_entropy", torch.tensor([0, -100])).value(torch.zeros(2, 3))
    with pytest.raises(ValueError, match=r"\[2, 1\] do not fit outputs of shape \[2\]"):
        Likelihood("mse", torch.zeros(2, 1)).value(torch.zeros(2))
    with pytest.raises(ValueError, match="'huber' is unknown; choose one of cross_entropy"):
        Likelihood("huber", torch.zeros(2))


@pytest.mark.parametrize("name", [*LOSSES, "residuals"])
def test_products_and_dense_matrix_are_those_of_the_definition(name):
    """A v, A' w, dense A, gradient and A'A against J'HJ from autograd, with a parameter that has no influence."""
    model = net()
    model.idle = nn.Parameter(torch.ones(2, dtype=torch.float64))
    x, y = data(name)
    if name == "residuals":
        objective, loss = Objective(residuals=lambda: model(x) - y), lambda z: (z - y).square().mean()
    else:
        kind = Likelihood(name, y)
        objective, loss = Objective(outputs=lambda: model(x), likelihood=kind), lambda z: TORCH[name](z, y)
    function, theta = flat_function(model, lambda m: m(x))
    reference = ggn(function, loss, theta)
    (g,) = torch.autograd.grad(loss(function(t := theta.clone().requires_grad_())), t)
    made: list[int] = []
    model_of = Linearization(objective, list(model.parameters()), made.append)
    torch.testing.assert_close(model_of.gradient(), g, rtol=1e-11, atol=1e-14)
    a = model_of.dense()
    torch.testing.assert_close(a.T @ a, reference, rtol=1e-10, atol=1e-13)
    torch.testing.assert_close(a.T @ model_of.rho(), g, rtol=1e-10, atol=1e-13)
    v, w = torch.randn(a.shape[1], dtype=a.dtype), torch.randn(a.shape[0], dtype=a.dtype)
    made.clear()
    torch.testing.assert_close(model_of.forward(v), a @ v, rtol=1e-11, atol=1e-13)
    torch.testing.assert_close(model_of.adjoint(w), a.T @ w, rtol=1e-11, atol=1e-13)
    torch.testing.assert_close(model_of.forward(2 * v), a @ (2 * v), rtol=1e-11, atol=1e-13)  # the graph is kept
    assert sum(made) == 3


def test_the_dense_matrix_is_made_in_pieces(monkeypatch):
    model, (x, y) = net(), data("mse", 7)
    whole = Linearization(Objective(residuals=lambda: model(x) - y), list(model.parameters()), lambda n: None).dense()
    monkeypatch.setattr("guided_descent.solvers.curvature._CHUNK_NUMBERS", 100)
    parts = Linearization(Objective(residuals=lambda: model(x) - y), list(model.parameters()), lambda n: None).dense()
    torch.testing.assert_close(parts, whole, rtol=1e-13, atol=1e-15)


def test_a_jacobian_of_the_user_is_taken_and_checked():
    model, (x, y) = net(), data("cross_entropy")
    function, theta = flat_function(model, lambda m: m(x))
    j = jacobian(function, theta)
    kind = Likelihood("cross_entropy", y)
    parameters = list(model.parameters())
    plain = Linearization(Objective(outputs=lambda: model(x), likelihood=kind), parameters, lambda n: None).dense()
    given = Objective(outputs=lambda: model(x), likelihood=kind, jacobian=lambda: j)
    torch.testing.assert_close(Linearization(given, parameters, lambda n: None).dense(), plain, rtol=1e-11, atol=1e-14)
    wrong = Objective(outputs=lambda: model(x), likelihood=kind, jacobian=lambda: j.T)
    with pytest.raises(ValueError, match="must be \\[15, 31\\]"):
        Linearization(wrong, parameters, lambda n: None).dense()


def test_attention_has_products():
    """Fused attention has no second derivative; the linearization must not run it."""
    q = nn.Parameter(torch.randn(1, 2, 4, 8))
    objective = Objective(residuals=lambda: F.scaled_dot_product_attention(q, q, q, is_causal=True))
    model = Linearization(objective, [q], lambda n: None)
    v = torch.randn(q.numel())
    torch.testing.assert_close(model.forward(v).double(), model.dense() @ v.double(), rtol=1e-4, atol=1e-5)


def test_the_gauss_newton_matrix_of_softmax_is_the_fisher_matrix():
    """Against the expectation over every label the model could draw; the true labels do not enter."""
    model, (x, y) = net(), data("cross_entropy")
    function, theta = flat_function(model, lambda m: m(x))
    objective = Objective(outputs=lambda: model(x), likelihood=Likelihood("cross_entropy", y))
    a = Linearization(objective, list(model.parameters()), lambda n: None).dense()
    torch.testing.assert_close(a.T @ a, softmax_fisher(function, theta), rtol=1e-10, atol=1e-13)


def test_hessian_against_autograd():
    model, (x, y) = net(), data("cross_entropy")
    function, theta = flat_function(model, lambda m: m(x))
    made: list[int] = []
    g, h = hessian(F.cross_entropy(model(x), y), list(model.parameters()), made.append)
    reference = torch.autograd.functional.hessian(lambda t: F.cross_entropy(function(t), y), theta)
    torch.testing.assert_close(h, reference, rtol=1e-10, atol=1e-13)
    assert torch.equal(h, h.T)
    assert made == [len(theta)]
    p = nn.Parameter(torch.ones(3))
    g, h = hessian((2 * p).sum(), [p], made.append)  # linear: nothing to differentiate twice
    assert (g.tolist(), h.abs().max().item()) == ([2.0, 2.0, 2.0], 0.0)


@pytest.mark.parametrize("shape", [(4, 9), (9, 4), (5, 5)])
@pytest.mark.parametrize("diagonal", [False, True])
def test_both_spaces_solve_the_same_system(shape, diagonal):
    a, rho = torch.randn(shape, dtype=torch.float64), torch.randn(shape[0], dtype=torch.float64)
    metric = torch.rand(shape[1], dtype=torch.float64) + 0.1 if diagonal else None
    dense = a.T @ a + 0.3 * torch.diag(metric if diagonal else torch.ones(shape[1], dtype=torch.float64))
    reference = -torch.linalg.solve(dense, a.T @ rho)
    for space in ("parameters", "samples", "auto"):
        system = DampedSystem(a, rho, metric, space)
        torch.testing.assert_close(system.solve(0.3), reference, rtol=1e-10, atol=1e-12)
    assert DampedSystem(a, rho).samples == (shape[0] < shape[1])


def test_a_singular_matrix_is_solved_by_its_pseudo_inverse():
    b = torch.randn(6, 2, dtype=torch.float64)
    matrix, right = b @ b.T, b @ torch.randn(2, dtype=torch.float64)
    matrix -= 1e-17 * torch.eye(6)  # below zero in floating point, so that Cholesky fails
    torch.testing.assert_close(solve_psd(matrix, right), torch.linalg.pinv(b @ b.T) @ right, rtol=1e-6, atol=1e-8)
    a = torch.randn(3, 8, dtype=torch.float64)
    a[2] = a[0]
    least = DampedSystem(a, torch.tensor([1.0, 2.0, 1.0]).double()).solve(0.0)
    torch.testing.assert_close(least, -torch.linalg.pinv(a) @ torch.tensor([1.0, 2.0, 1.0]).double())


def test_too_large_a_matrix_is_refused_before_it_is_made():
    model = nn.Linear(2000, 100)
    x = torch.randn(8, 2000)
    objective = Objective(residuals=lambda: model(x))
    with pytest.raises(ValueError, match=r"800 x 200100, 1\.2 GiB.*use HessianFree or LBFGS"):
        Linearization(objective, list(model.parameters()), lambda n: None).dense()
