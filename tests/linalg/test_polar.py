"""The polar factor against the singular value decomposition, published vectors, torch.optim.Muon and its symmetries."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.optim._muon import _zeropower_via_newtonschulz

from guided_descent.linalg import COEFFICIENTS, METHODS, NAMES, Workspace, polar
from guided_descent.linalg.coefficients import table
from guided_descent.linalg.newton_schulz import Iteration, segments, textbook
from guided_descent.linalg.polar import _batch

JORDAN = (3.4445, -4.7750, 2.0315)
F64 = torch.float64


@pytest.fixture(autouse=True)
def _one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def gauss(*shape: int, seed: int = 0, dtype: torch.dtype = F64) -> Tensor:
    return torch.randn(*shape, dtype=F64, generator=torch.Generator().manual_seed(seed)).to(dtype)


def with_spectrum(values: Tensor, m: int, n: int, seed: int = 0) -> Tensor:
    """A matrix m × n whose singular values are ``values``, in float64."""
    u, _, vh = torch.linalg.svd(gauss(m, n, seed=seed), full_matrices=False)
    return (u * values.to(F64)) @ vh


def orthogonality(u: Tensor) -> float:
    """‖UUᵀ - I‖_F / √r on the short side."""
    s = torch.linalg.svdvals(u.to(F64))
    return float((s.square() - 1).square().mean().sqrt())


def relative(a: Tensor, b: Tensor) -> float:
    return float(torch.linalg.vector_norm(a.to(F64) - b.to(F64)) / torch.linalg.vector_norm(b.to(F64)))


# ---- published vectors ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "steps", "values"),
    [
        ("jordan", 5, (0.470544, 0.698917, 0.712120, 0.765439, 0.696436)),
        ("polar_express", 5, (0.858873, 1.027110, 1.059161, 0.910611, 0.859129)),
    ],
)
@pytest.mark.parametrize("method", ["standard", "symmetric", "gram"])
def test_scalar_maps(name, steps, values, method):
    x = torch.tensor([0.001, 0.01, 0.1, 0.5, 1.0], dtype=F64)
    diagonal = torch.diag(x)
    run = Iteration(diagonal.clone(), Workspace())
    triples = COEFFICIENTS[name].take(steps)
    got = textbook(diagonal, triples) if method == "standard" else run.run(triples, method)
    assert got.diagonal().tolist() == pytest.approx(values, abs=2e-6)


def test_gram_equals_standard_to_rounding():
    x = gauss(32, 128)
    x = x / torch.linalg.vector_norm(x)
    triples = COEFFICIENTS["polar_express"].take()
    expected = textbook(x, triples)
    got = Iteration(x.clone(), Workspace()).run(triples, "gram")
    assert float((got - expected).abs().max()) < 1e-13


@pytest.mark.parametrize("name", sorted(COEFFICIENTS))
@pytest.mark.parametrize("shape", [(24, 24), (24, 60), (60, 24), (1, 7), (7, 1)])
def test_every_form_is_the_same_function(name, shape):
    x = gauss(*shape)
    expected = polar(x, coefficients=name, method="standard")
    for method in METHODS:
        assert relative(polar(x, coefficients=name, method=method), expected) < 1e-9


def test_strips_and_mirrors_change_nothing():
    x = gauss(400, 500)
    assert relative(polar(x, method="symmetric"), polar(x, method="standard")) < 1e-9
    assert relative(polar(x, method="gram"), polar(x, method="standard")) < 1e-9
    assert relative(polar(x.mT, method="symmetric"), polar(x.mT, method="standard")) < 1e-9


def test_first_step_with_known_square():
    """Looking at G² before the run, as the adaptive schedule does, leaves the result as it is."""
    x = gauss(20, 50)
    x = x / torch.linalg.vector_norm(x)
    for triples in (COEFFICIENTS["you"].take(), ((1.5, -0.5, 0.0),) * 4):
        for method in ("symmetric", "gram"):
            run = Iteration(x.clone(), Workspace())
            run.square()
            assert relative(run.run(triples, method), textbook(x, triples)) < 1e-10


# ---- torch.optim.Muon ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(64, 64), (48, 160), (160, 48), (1, 9)])
@pytest.mark.parametrize("scale", [1.0, 1e-9])
def test_bitwise_torch(shape, scale):
    x = gauss(*shape, dtype=torch.float32) * scale
    expected = _zeropower_via_newtonschulz(x, JORDAN, 5, 1e-7)
    got = polar(x.bfloat16(), coefficients="jordan", dtype=torch.bfloat16, eps=1e-7, method="standard")
    assert torch.equal(got, expected)
    stacked = polar(x[None].bfloat16(), coefficients="jordan", dtype=torch.bfloat16, eps=1e-7, method="standard")
    assert torch.equal(stacked[0], expected)
    widened = polar(x, coefficients="jordan", dtype=torch.bfloat16, eps=1e-7, method="standard")
    assert torch.equal(widened, expected.float())


def momentum_like(m: int, n: int, power: float, seed: int = 0) -> Tensor:
    """The ill-conditioned spectra of real momentum: a few large singular values and a long tail."""
    return with_spectrum(torch.arange(1, min(m, n) + 1, dtype=F64) ** -power, m, n, seed).float()


@pytest.mark.parametrize("shape", [(192, 192), (96, 384), (384, 96)])
@pytest.mark.parametrize("power", [0.0, 0.5, 1.0, 1.5, 2.0])
@pytest.mark.parametrize("coefficients", ["adaptive", "fast", "polar_express"])
@pytest.mark.parametrize("method", ["auto", "symmetric", "gram"])
def test_no_worse_than_torch(shape, power, coefficients, method):
    x = momentum_like(*shape, power) if power else gauss(*shape, dtype=torch.float32)
    theirs = _zeropower_via_newtonschulz(x, JORDAN, 5, 1e-7)
    ours = polar(x, coefficients=coefficients, dtype=torch.bfloat16, method=method)
    assert orthogonality(ours) <= orthogonality(theirs)
    top = float(torch.linalg.matrix_norm(ours.to(F64), 2))
    assert top <= 1.2
    exact = polar(x, coefficients="exact")
    assert relative(ours, exact) <= relative(theirs.float(), exact)


# ---- ranges --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("coefficients", "floor", "low", "high"),
    [
        ("jordan", 3e-3, 0.68, 1.21),
        ("polar_express", 1e-3, 0.85, 1.15),
        ("adaptive", 1e-3, 0.85, 1.15),
        ("fast", 2e-3, 0.82, 1.18),
    ],
)
@pytest.mark.parametrize("method", ["auto", "symmetric", "gram"])
@pytest.mark.parametrize("decades", [0.5, 1.5, 3.0, 5.0])
def test_singular_values_end_in_the_promised_range(coefficients, floor, low, high, method, decades):
    s = torch.logspace(0, -decades, 96, dtype=F64)
    x = with_spectrum(s, 96, 200)
    u, _, vh = torch.linalg.svd(x, full_matrices=False)
    got = polar(x.float(), coefficients=coefficients, dtype=torch.float32, method=method).to(F64)
    mapped = (u.mT @ got @ vh.mT).diagonal()[s / torch.linalg.vector_norm(s) >= floor]
    assert low <= float(mapped.min())
    assert float(mapped.max()) <= high


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, F64])
@pytest.mark.parametrize("shape", [(40, 40), (40, 90), (90, 40)])
def test_flat_spectra_take_fewer_steps_and_stay_accurate(dtype, shape):
    s = torch.linspace(0.2, 1.0, 40, dtype=F64)
    got = polar(with_spectrum(s, *shape).to(dtype), coefficients="adaptive")
    values = torch.linalg.svdvals(got.to(F64))
    assert float((values - 1).abs().max()) < 0.17


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 1e-4), (F64, 1e-10)])
@pytest.mark.parametrize("shape", [(12, 12), (12, 30), (30, 12)])
@pytest.mark.parametrize("kappa", [1.0, 1e4, 1e12])
def test_exact(dtype, bound, shape, kappa):
    s = torch.logspace(0, -math.log10(kappa), 12, dtype=F64)
    x = with_spectrum(s, *shape).to(dtype)
    u = polar(x, coefficients="exact")
    assert u.dtype == dtype
    short = u if shape[0] <= shape[1] else u.mT
    gram = short.to(F64) @ short.mT.to(F64)
    assert float((gram - torch.eye(12, dtype=F64)).abs().max()) < bound
    h = u.mT.to(F64) @ x.to(F64)  # X = U H with H symmetric and positive semidefinite
    assert float((h - h.mT).abs().max()) < 1e-6 if dtype == torch.float32 else 1e-13
    assert float(torch.linalg.eigvalsh((h + h.mT) / 2).min()) > -1e-6


def test_exact_with_repeated_values_is_the_factor_itself():
    q = torch.linalg.qr(gauss(9, 9)).Q
    assert relative(polar(3.0 * q, coefficients="exact"), q) < 1e-14


def test_exact_survives_a_solver_that_gives_up_once(monkeypatch):
    x, svd, calls = gauss(6, 10), torch.linalg.svd, []

    def flaky(a, **kw):
        calls.append(a.shape)
        if len(calls) == 1:
            raise torch.linalg.LinAlgError("did not converge")
        return svd(a, **kw)

    expected = polar(x, coefficients="exact")
    monkeypatch.setattr(torch.linalg, "svd", flaky)
    assert relative(polar(x, coefficients="exact"), expected) < 1e-13
    assert calls == [(6, 10), (10, 6)]


# ---- degenerate input ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("coefficients", NAMES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, F64])
@pytest.mark.parametrize("method", METHODS)
def test_zero_gives_zero(coefficients, dtype, method):
    assert not polar(torch.zeros(2, 5, 9, dtype=dtype), coefficients=coefficients, method=method).any()
    assert polar(torch.zeros(0, 4), coefficients=coefficients, method=method).shape == (0, 4)


@pytest.mark.parametrize("coefficients", NAMES)
@pytest.mark.parametrize("shape", [(16, 16), (16, 48), (48, 16)])
@pytest.mark.parametrize("method", METHODS)
def test_rank_one_keeps_its_sign(coefficients, shape, method):
    m, n = shape
    u, v = gauss(m, seed=1), gauss(n, seed=2)
    u, v = u / u.norm(), v / v.norm()
    got = polar(torch.outer(u, v), coefficients=coefficients, method=method)
    along = float(u @ got @ v)
    assert 0.6 < along < 1.25
    half = polar(torch.outer(u, v).float(), coefficients=coefficients, dtype=torch.bfloat16, method=method)
    assert bool(half.isfinite().all())
    assert 0.6 < float(u.float() @ half @ v.float()) < 1.25


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_broken_matrix_stays_alone(bad):
    x = gauss(3, 8, 12, dtype=torch.float32)
    expected = polar(x, coefficients="adaptive")
    x[1, 0, 0] = bad
    got = polar(x, coefficients="adaptive")
    assert bool(got[1].isnan().any())
    assert torch.equal(got[0], expected[0])
    assert torch.equal(got[2], expected[2])


@pytest.mark.parametrize("coefficients", ["adaptive", "fast", "polar_express", "jordan", "exact"])
@pytest.mark.parametrize("c", [1e-30, 1e-12, 1e-6, 1e6, 1e30])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_the_scale_does_not_matter(coefficients, c, dtype):
    x = gauss(24, 60, dtype=torch.float32)
    a = polar(x, coefficients=coefficients, dtype=dtype)
    assert relative(polar(x * c, coefficients=coefficients, dtype=dtype), a) < 0.01


def test_an_absolute_eps_shrinks_tiny_input():
    x = gauss(8, 8, dtype=torch.float32)
    assert float(polar(x * 1e-12, eps=1e-7).norm()) < 1e-1 < float(polar(x * 1e-12).norm())


# ---- symmetries ----------------------------------------------------------------------------------------------------

shapes = st.tuples(st.integers(1, 12), st.integers(1, 12))
names = st.sampled_from(["adaptive", "fast", "polar_express", "jordan", "exact"])


@settings(max_examples=40, deadline=None)
@given(shapes, names, st.integers(0, 10**6))
def test_transpose(shape, name, seed):
    x = gauss(*shape, seed=seed)
    assert relative(polar(x.mT, coefficients=name), polar(x, coefficients=name).mT) < 1e-7


@settings(max_examples=40, deadline=None)
@given(shapes, names, st.integers(0, 10**6))
def test_rotation(shape, name, seed):
    x = gauss(*shape, seed=seed)
    left = torch.linalg.qr(gauss(shape[0], shape[0], seed=seed + 1)).Q
    right = torch.linalg.qr(gauss(shape[1], shape[1], seed=seed + 2)).Q
    expected = left @ polar(x, coefficients=name) @ right
    assert relative(polar(left @ x @ right, coefficients=name), expected) < 1e-6


@pytest.mark.parametrize("coefficients", ["adaptive", "polar_express", "exact"])
@pytest.mark.parametrize("lead", [(3,), (2, 3), (1, 1)])
@pytest.mark.parametrize("shape", [(10, 24), (24, 10)])
@pytest.mark.parametrize("method", METHODS)
def test_a_batch_is_its_matrices(coefficients, lead, shape, method):
    x = gauss(*lead, *shape, dtype=torch.float32)
    got = polar(x, coefficients=coefficients, dtype=torch.float32, method=method)
    for i, (a, b) in enumerate(zip(x.flatten(0, -3), got.flatten(0, -3))):
        alone = polar(a, coefficients=coefficients, dtype=torch.float32, method=method)
        assert relative(b, alone) < 1e-5, i


@pytest.mark.parametrize("shape", [(3, 10, 24), (2, 3, 24, 10), (12, 12)])
@pytest.mark.parametrize("method", ["auto", "symmetric", "gram"])
@pytest.mark.parametrize("dtype", [torch.float32, F64])
def test_the_batched_path_of_accelerators(shape, method, dtype):
    """The path that reads no number from the device, driven on the CPU, against the one that does."""
    plan, x = table("polar_express"), gauss(*shape).to(dtype) * 1e-20
    x.flatten(0, -2)[: shape[-2]] *= 1e15
    if len(shape) > 2:
        x.flatten(0, -3)[1] = 0.0
    work = Workspace()
    out = torch.empty_like(x)
    got = _batch(x, out, plan.take(), plan.safety, dtype, None, work, method)
    assert got is out
    assert relative(got, polar(x, dtype=dtype)) < 1e-4
    held = work.nbytes
    assert torch.equal(_batch(x.clone(), x, plan.take(), plan.safety, dtype, None, work, method), out)
    assert work.nbytes == held


@pytest.mark.parametrize("coefficients", ["adaptive", "polar_express", "exact"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, F64])
def test_out_and_strides(coefficients, dtype):
    x = gauss(4, 9, 20).to(dtype)
    expected = polar(x, coefficients=coefficients)
    assert expected.dtype == dtype
    strided = x.mT.contiguous().mT  # the same values, another layout
    assert relative(polar(strided, coefficients=coefficients), expected) < 1e-2 if dtype == torch.bfloat16 else 1e-6
    out = torch.full((4, 20, 9), 7.0, dtype=dtype).mT
    assert polar(x, coefficients=coefficients, out=out) is out
    assert torch.equal(out, expected)
    kept = x.clone()
    assert torch.equal(polar(x, coefficients=coefficients), expected)
    assert torch.equal(x, kept)
    assert polar(x, coefficients=coefficients, out=x) is x
    assert torch.equal(x, expected)


def test_scratch_is_allocated_once():
    x, work = gauss(6, 30, 50, dtype=torch.float32), Workspace()
    out = polar(x, work=work)
    held = work.nbytes
    again = polar(x, work=work)
    assert work.nbytes == held
    assert torch.equal(out, again)
    assert held < 10 * 30 * 50 * 4  # one matrix at a time, whatever the batch


def test_gradients_do_not_flow():
    x = gauss(4, 4).requires_grad_()
    assert not polar(x).requires_grad


# ---- segments and messages -----------------------------------------------------------------------------------------


def test_segments_partition_the_schedule():
    for name, plan in COEFFICIENTS.items():
        for dtype in (torch.float16, torch.bfloat16, torch.float32, F64):
            parts = segments(plan.take(), dtype)
            assert tuple(t for part in parts for t in part) == plan.take(), name
    assert len(segments(COEFFICIENTS["polar_express"].take(), torch.bfloat16)) == 4
    assert len(segments(COEFFICIENTS["polar_express"].take(), torch.float32)) == 1


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"coefficients": "polar-express"}, "choose one of: adaptive, exact, fast, cans"),
        ({"method": "fast"}, "choose one of auto, standard, symmetric, gram"),
        ({"steps": 0}, "at least 1"),
        ({"steps": True}, "at least 1"),
        ({"coefficients": "exact", "steps": 3}, "leave it None"),
        ({"eps": 0.0}, "must be positive"),
        ({"dtype": torch.int8}, "no dtype to iterate in"),
        ({"out": torch.zeros(3, 3)}, "must match x"),
    ],
)
def test_errors_say_the_fix(kwargs, message):
    with pytest.raises(ValueError, match=message):
        polar(torch.ones(2, 3), **kwargs)


@pytest.mark.parametrize(
    "x", [torch.ones(3), torch.ones(2, 2, dtype=torch.int64), torch.ones(2, 2, dtype=torch.cfloat)]
)
def test_only_real_matrices(x):
    with pytest.raises(ValueError, match="must be real matrices"):
        polar(x)
