"""Inverse roots against exactly constructed matrices, their symmetries, and input that has no root."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from guided_descent.linalg import inverse_root, minimax, roots
from guided_descent.linalg.eigen import FAILED
from guided_descent.linalg.roots import LEFT_TO_EIGH, METHODS, best_root_step, root_schedule, taylor_step

F64 = torch.float64
ITERATIONS = ("newton", "cans")


def rotation(d: int, seed: int = 0) -> Tensor:
    return torch.linalg.qr(torch.randn(d, d, dtype=F64, generator=torch.Generator().manual_seed(seed))).Q


def built(values: Tensor, seed: int = 0) -> Tensor:
    """Q diag(values) Qᵀ in float64."""
    q = rotation(len(values), seed)
    return (q * values.to(F64)) @ q.mT


def graded(d: int, condition: float) -> Tensor:
    return torch.logspace(0, -math.log10(condition), d, dtype=F64)


def difference(a: Tensor, b: Tensor) -> float:
    return float(torch.linalg.matrix_norm(a.to(F64) - b.to(F64)).max() / torch.linalg.matrix_norm(b.to(F64)).max())


# ---- against the definition ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("p", [1, 2, 3, 4, 5, 8])
@pytest.mark.parametrize("condition", [1.0, 10.0, 1e4])
def test_root_of_a_constructed_matrix(method, p, condition):
    values = graded(12, condition)
    found = inverse_root(built(values), p, method=method)
    assert difference(found.root, built(values ** (-1 / p))) < 1e-10
    assert torch.equal(found.root, found.root.mT)
    assert int(found.fallbacks) == 0
    assert float(found.error) < 1e-12


@pytest.mark.parametrize("p", [0.5, 1.5, 2.5, 7])
def test_eigenvalues_take_any_root(p):
    values = graded(9, 100.0)
    assert difference(inverse_root(built(values), p).root, built(values ** (-1 / p))) < 1e-12


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("p", [2, 4])
@pytest.mark.parametrize(("condition", "bound"), [(1e1, 1e-5), (1e3, 1e-4), (1e5, 2e-2)])
def test_float32(method, p, condition, bound):
    values = graded(64, condition)
    found = inverse_root(built(values).float(), p, method=method)
    assert found.root.dtype == torch.float32
    assert difference(found.root, built(values ** (-1 / p))) < bound
    assert int(found.fallbacks) == 0


@pytest.mark.parametrize("p", [2, 4])
def test_ill_conditioned_in_float64(p):
    values = graded(32, 1e10)
    expected = built(values ** (-1 / p))
    for method in METHODS:
        found = inverse_root(built(values), p, method=method)
        assert difference(found.root, expected) < 1e-5, method
        assert int(found.fallbacks) == 0


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_solved_in_float32(method, dtype):
    a = built(torch.linspace(1, 2, 6, dtype=F64)).to(dtype)
    found = inverse_root(a, 2, method=method)
    assert found.root.dtype == found.error.dtype == torch.float32
    assert difference(found.root @ found.root @ a.float(), torch.eye(6)) < 1e-5


def test_asymmetry_is_averaged_out():
    a = built(torch.linspace(1, 2, 6))
    skew = torch.triu(torch.full((6, 6), 1e-3, dtype=F64), 1)
    skew = skew - skew.mT
    for method in METHODS:
        assert difference(inverse_root(a + skew, 2, method=method).root, inverse_root(a, 2, method=method).root) < 1e-12


# ---- symmetries ----------------------------------------------------------------------------------------------------


@settings(max_examples=30, deadline=None)
@given(
    st.sampled_from(METHODS),
    st.sampled_from([1, 2, 3, 4]),
    st.integers(1, 8),
    st.floats(-20, 20),
    st.integers(0, 10**6),
)
def test_scaling_and_rotation(method, p, d, exponent, seed):
    a = built(torch.rand(d, dtype=F64, generator=torch.Generator().manual_seed(seed)) + 0.05, seed)
    root = inverse_root(a, p, method=method).root
    c = 10.0**exponent
    assert difference(inverse_root(c * a, p, method=method).root, c ** (-1 / p) * root) < 1e-10
    u = rotation(d, seed + 1)
    assert difference(inverse_root(u @ a @ u.mT, p, method=method).root, u @ root @ u.mT) < 1e-10


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("scale", [1e-30, 1e-10, 1e10, 1e30])
def test_tiny_and_huge_matrices_in_float32(method, scale):
    values = graded(8, 100.0)
    found = inverse_root((built(values) * scale).float(), 2, method=method, eps=1e-12)
    assert difference(found.root, built((values * scale) ** -0.5)) < 1e-4
    assert int(found.fallbacks) == 0


@pytest.mark.parametrize("method", METHODS)
@settings(max_examples=10, deadline=None)
@given(st.integers(1, 7), st.integers(1, 3), st.integers(1, 3), st.integers(0, 10**6))
def test_a_batch_is_its_matrices(method, d, b, e, seed):
    x = torch.randn(b, e, d, d + 3, dtype=F64, generator=torch.Generator().manual_seed(seed))
    a = x @ x.mT
    found = inverse_root(a, 4, method=method, eps=1e-3)
    assert (found.root.shape, found.error.shape, found.fallbacks.shape) == ((b, e, d, d), (b, e), (b, e))
    for i in range(b):
        for j in range(e):
            alone = inverse_root(a[i, j], 4, method=method, eps=1e-3)
            assert difference(found.root[i, j], alone.root) < 1e-12
            assert found.fallbacks[i, j] == alone.fallbacks


# ---- eps and rank --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", METHODS)
def test_absolute_eps(method):
    values = torch.tensor([4.0, 2.0, 1.0, 0.0, 0.0], dtype=F64)
    found = inverse_root(built(values), 2, eps=0.01, relative=False, method=method)
    assert difference(found.root, built((values + 0.01) ** -0.5)) < 1e-10
    zero = inverse_root(torch.zeros(3, 3, dtype=F64), 2, eps=0.04, relative=False, method=method)
    assert difference(zero.root, 5.0 * torch.eye(3, dtype=F64)) < 1e-12
    assert not zero.failed
    tiny = inverse_root(1e-30 * built(values).float(), 2, eps=1e10, relative=False, method=method)
    assert difference(tiny.root, 1e-5 * torch.eye(5)) < 1e-6


def test_relative_eps_is_a_part_of_the_largest_eigenvalue():
    values = torch.tensor([4.0, 2.0, 1.0, 0.0, 0.0], dtype=F64)
    expected = built((values + 0.04) ** -0.5)
    assert difference(inverse_root(built(values), 2, eps=0.01).root, expected) < 1e-12
    for method in ITERATIONS:  # 2 is far enough from 4 for power iteration to converge
        assert difference(inverse_root(built(values), 2, eps=0.01, method=method).root, expected) < 1e-10
    hard = graded(200, 1.5)  # no gap at the top
    expected = inverse_root(built(hard), 2, eps=0.1).root
    for method in ITERATIONS:
        assert difference(inverse_root(built(hard), 2, eps=0.1, method=method).root, expected) < 0.02


def test_negative_eigenvalues_are_shifted_to_eps():
    values = torch.tensor([2.0, 1.0, 0.5, -0.1], dtype=F64)
    expected = built((values + 0.1 + 0.02) ** -0.25)
    for method in METHODS:
        found = inverse_root(built(values), 4, eps=0.02, relative=False, method=method)
        assert difference(found.root, expected) < 1e-12
        assert int(found.fallbacks) == (0 if method == "eigh" else LEFT_TO_EIGH)


@pytest.mark.parametrize("method", METHODS)
def test_without_eps_noise_is_raised_to_the_resolution(method):
    values = torch.tensor([1.0, 0.5, 0.0, 0.0], dtype=F64)
    found = inverse_root(built(values), 2, method=method)
    ceiling = torch.finfo(F64).eps ** -0.5
    top = float(torch.linalg.matrix_norm(found.root, 2))
    assert math.isfinite(top)
    assert top <= (1 if method == "eigh" else 10) * 1.001 * ceiling
    q = rotation(4)
    assert difference((q.mT @ found.root @ q)[:2, :2], torch.diag(values[:2] ** -0.5)) < 1e-6


def test_rank_cutoff_is_the_root_of_the_pseudo_inverse():
    values = torch.tensor([4.0, 2.0, 1.0, 0.0, 0.0, -1e-17], dtype=F64)
    a = built(values)
    one = inverse_root(a, 1, rank_cutoff=True).root
    assert difference(one, torch.linalg.pinv(a, hermitian=True)) < 1e-12
    half = inverse_root(a, 2, rank_cutoff=True)
    assert difference(half.root @ half.root, one) < 1e-12
    assert int(half.fallbacks) == 0
    zero = inverse_root(torch.zeros(3, 3), 2, rank_cutoff=True)
    assert not zero.root.any()
    assert not zero.failed


# ---- what has no root ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("bad", [math.nan, math.inf, 0.0, -1.0])
def test_a_matrix_without_a_root_is_reported_and_stays_alone(method, bad):
    a = torch.stack([built(torch.linspace(1, 2, 5), seed) for seed in range(3)])
    expected = inverse_root(a, 2, method=method)
    a[1] = torch.full((5, 5), bad, dtype=F64) if bad in (0.0, math.inf) else bad * torch.eye(5, dtype=F64)
    found = inverse_root(a, 2, method=method, eps=0.0)
    assert found.failed.tolist() == [False, True, False]
    assert found.fallbacks.tolist() == [0, FAILED, 0]
    assert torch.equal(found.root[1], torch.eye(5, dtype=F64))
    assert found.error[1] == math.inf
    for row in (0, 2):
        assert difference(found.root[row], expected.root[row]) < 1e-13


@pytest.mark.parametrize("method", METHODS)
def test_smallest_and_empty_batches(method):
    for p in (1, 2, 3, 4):
        one = inverse_root(torch.tensor([[[16.0]], [[1.0]]], dtype=F64), p, method=method)
        assert torch.allclose(one.root.flatten(), torch.tensor([16.0, 1.0], dtype=F64) ** (-1 / p), rtol=1e-12)
    for shape in ((0, 3, 3), (2, 0, 4, 4), (5, 0, 0)):
        none = inverse_root(torch.zeros(shape), 2, method=method)
        assert none.root.shape == shape
        assert none.error.shape == none.fallbacks.shape == shape[:-2]
        assert not none.failed.any()


def _refuse(monkeypatch, refuses) -> None:
    eigh = torch.linalg.eigh

    def patched(a):
        if refuses(a):
            raise torch.linalg.LinAlgError("failed to converge")
        return eigh(a)

    monkeypatch.setattr(torch.linalg, "eigh", patched)


def test_the_ladder_of_eigenbasis(monkeypatch):
    a = torch.stack([built(torch.linspace(1, 2, 5), seed) for seed in range(3)]).float()
    expected = inverse_root(a, 4)
    _refuse(monkeypatch, lambda m: m.dtype == torch.float32)
    wide = inverse_root(a, 4)
    assert wide.fallbacks.tolist() == [2, 2, 2]
    assert difference(wide.root, expected.root) < 1e-6
    for method in ITERATIONS:  # these do not need it
        assert inverse_root(a, 4, method=method).fallbacks.tolist() == [0, 0, 0]
    a[1] = torch.diag(torch.tensor([2.0, 1.0, 0.5, 0.1, -0.1]))
    for method in ITERATIONS:
        found = inverse_root(a, 4, method=method, eps=0.02)
        assert found.fallbacks.tolist() == [0, LEFT_TO_EIGH + 2, 0]
    monkeypatch.undo()
    _refuse(monkeypatch, lambda m: True)
    for method in METHODS:
        found = inverse_root(a, 4, method=method, eps=0.02)
        assert found.failed.tolist() == ([True] * 3 if method == "eigh" else [False, True, False])
        assert torch.equal(found.root[1], torch.eye(5))


def test_too_few_steps_are_left_to_eigh():
    a = built(graded(8, 1e6))
    for method in ITERATIONS:
        found = inverse_root(a, 2, method=method, max_steps=3)
        assert int(found.fallbacks) == LEFT_TO_EIGH
        assert torch.equal(found.root, inverse_root(a, 2).root)


# ---- the iterations ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("p", [2, 3, 4])
def test_newton_is_the_published_iteration(p):
    a = built(graded(6, 50.0))
    eye = torch.eye(6, dtype=F64)
    z = (p + 1) / (2 * a.norm())
    x, m = z ** (1 / p) * eye, z * a
    while float((m - eye).abs().max()) >= 1e-6:
        t = (1 + 1 / p) * eye - m / p
        x, m = x @ t, torch.linalg.matrix_power(t, p) @ m
    found = inverse_root(a, p, method="newton", tol=1e-6)
    assert difference(found.root, x) < 1e-13
    assert abs(float(found.error) - float((m - eye).abs().max())) < 1e-13


def test_newton_gives_up_when_it_grows(monkeypatch):
    """An eigenvalue of -1e-4 takes M away from I by (1 + 1e-4/2)^2 at first and by more than 1.2 in the end."""
    a = built(torch.tensor([1.0, 0.5, -1e-4]))
    eye = torch.eye(3, dtype=F64)
    m, steps = 1.5 / a.norm() * a, 0
    before = now = float((m - eye).abs().max())
    while now <= 1.2 * before:
        t = 1.5 * eye - m / 2
        m, before = t @ t @ m, now
        now, steps = float((m - eye).abs().max()), steps + 1
    sizes = _record(monkeypatch)
    assert int(inverse_root(a, 2, method="newton").fallbacks) == LEFT_TO_EIGH
    assert len(sizes) == steps


def _record(monkeypatch) -> list[int]:
    """How many matrices each step of an iteration multiplies."""
    inner, sizes = roots._times_power, []

    def spy(t, p, m):
        sizes.append(len(m))
        return inner(t, p, m)

    monkeypatch.setattr(roots, "_times_power", spy)
    return sizes


def test_a_finished_matrix_is_frozen(monkeypatch):
    conditions = (2.0, 1e3, 1e6)
    a = torch.stack([built(graded(8, c)) for c in conditions])
    sizes = _record(monkeypatch)
    alone, steps = [], []
    for row in a:
        sizes.clear()
        alone.append(inverse_root(row, 2, method="newton"))
        steps.append(len(sizes))
    assert steps == sorted(set(steps))  # each takes longer than the one before
    sizes.clear()
    found = inverse_root(a, 2, method="newton")
    assert sizes == [sum(s > k for s in steps) for k in range(max(steps))]
    for i, single in enumerate(alone):
        assert torch.allclose(found.root[i], single.root, rtol=1e-12, atol=1e-12)
        assert abs(float(found.error[i] - single.error)) < 1e-14


def test_minimax_steps_need_fewer_products(monkeypatch):
    sizes = _record(monkeypatch)
    counts = {}
    for dtype, condition in ((torch.float32, 1e5), (F64, 1e10)):
        for method in ITERATIONS:
            sizes.clear()
            inverse_root(built(graded(32, condition)).to(dtype), 4, method=method)
            counts[dtype, method] = len(sizes) * (5 if method == "cans" else 4)  # M² more a step
        assert counts[dtype, "cans"] < 0.7 * counts[dtype, "newton"]


@pytest.mark.parametrize("method", ITERATIONS)
def test_products_are_never_reduced_in_precision(method, monkeypatch):
    inner, seen = roots._times_power, set()

    def spy(t, p, m):
        seen.add((torch.backends.cuda.matmul.fp32_precision, torch.backends.mkldnn.matmul.fp32_precision))
        return inner(t, p, m)

    monkeypatch.setattr(roots, "_times_power", spy)
    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("medium")
        inverse_root(built(graded(8, 10.0)).float(), 2, method=method, eps=1e-6)
        assert seen == {("ieee", "ieee")}
        assert torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_float32_matmul_precision(before)


# ---- minimax steps -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("lo", "hi"), [(0.1, 1.0), (0.02, 1.02), (0.7, 1.3), (0.99, 1.01)])
def test_for_square_roots_they_are_those_of_the_polar_factor(lo, hi):
    triple, error = best_root_step(lo, hi, 2)
    expected, e = minimax.best_step(lo, hi)
    assert error == pytest.approx(e, abs=1e-12)
    assert triple == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("p", [1, 2, 3, 4, 6])
@pytest.mark.parametrize("lo", [0.2, 0.5, 0.9])
def test_they_equioscillate(p, lo):
    (a, b, c), error = best_root_step(lo, 1.0, p)
    x = torch.linspace(lo, 1.0, 20001, dtype=F64)
    off = x * (a + b * x**p + c * x ** (2 * p)) - 1
    assert float(off.abs().max()) == pytest.approx(error, rel=1e-6)
    reached = off[off.abs() > error * (1 - 1e-5)].sign()
    assert int((reached.diff() != 0).sum()) == 3  # four alternations: Chebyshev's proof that no other is better


@pytest.mark.parametrize("p", [1, 2, 4])
@pytest.mark.parametrize("lower", [1e-2, 1e-7, 1e-14])
def test_a_schedule_brings_its_whole_range_to_one(p, lower):
    m = torch.logspace(math.log10(lower), 0, 4001, dtype=F64)
    for a, b, c in root_schedule(lower, p):
        m = m * (a + b * m + c * m * m) ** p
        assert float(m.min()) > 0.0
    assert float((m ** (1 / p) - 1).abs().max()) < 2e-3


@pytest.mark.parametrize("p", [1, 2, 3, 4])
def test_taylor_step_is_of_third_order(p):
    a, b, c = taylor_step(p)
    off = [abs((1 + d) ** (1 / p) * (a + b * (1 + d) + c * (1 + d) ** 2) - 1) for d in (1e-2, 1e-3)]
    assert 900 < off[0] / off[1] < 1100


# ---- errors --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"p": 0}, "must be a positive number"),
        ({"p": True}, "must be a positive number"),
        ({"p": 2.5, "method": "newton"}, "must be a whole number"),
        ({"eps": -1.0}, "at least 0"),
        ({"eps": math.nan}, "at least 0"),
        ({"method": "svd"}, "choose one of eigh, newton, cans"),
        ({"rank_cutoff": True, "eps": 1e-6}, "needs method='eigh' and eps=0"),
        ({"rank_cutoff": True, "method": "cans"}, "needs method='eigh' and eps=0"),
        ({"tol": 0.0}, r"must lie in \(0, 1\)"),
        ({"max_steps": 0}, "at least 1"),
    ],
)
def test_errors_say_the_rule(arguments, message):
    with pytest.raises(ValueError, match=message):
        inverse_root(torch.eye(3), **{"p": 2, **arguments})


def test_shape_errors():
    with pytest.raises(ValueError, match="must be real and square"):
        inverse_root(torch.ones(2, 3), 2)
