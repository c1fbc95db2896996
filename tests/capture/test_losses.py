"""Losses as likelihoods: values against torch, roots and draws against dense Hessians."""

from __future__ import annotations

import math

import pytest
import torch
from torch.nn import functional as F

from guided_descent.capture import LOSSES, BinaryCrossEntropy, CrossEntropy, Masked, SquaredError, as_loss
from oracles.fisher import output_hessians

SHAPES = [(3, 4), (2, 3, 4), (2, 2, 2, 3)]


def blocks(loss, out, name):
    """(from the columns, dense) Hessians [N, R C, R C] of the sum over terms of each sample."""
    n = out.shape[0]
    columns = torch.stack(list(loss.sqrt_hessian(out))).reshape(-1, n, out[0].numel())
    root = torch.einsum("kni,knj->nij", columns, columns)
    dense = output_hessians(out, name).reshape(n, -1, out.shape[-1], out.shape[-1])
    return root, torch.stack([torch.block_diag(*sample) for sample in dense])


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("name", LOSSES)
def test_columns_make_the_dense_hessian(name, shape):
    out = 2 * torch.randn(*shape, dtype=torch.float64)
    root, dense = blocks(LOSSES[name], out, name)
    torch.testing.assert_close(root, dense, rtol=0, atol=1e-14)
    assert LOSSES[name].terms(out) == out[..., 0].numel()


@pytest.mark.parametrize("name", LOSSES)
def test_draws_have_the_hessian_for_covariance_and_mean_zero(name):
    """40,000 draws at two output vectors; within 5 standard errors, element by element."""
    out = torch.tensor([[1.0, -0.5, 0.2], [0.0, 2.0, -1.0]], dtype=torch.float64)
    many = out.repeat(40_000, 1)
    s = LOSSES[name].sample(many, torch.Generator().manual_seed(3)).reshape(-1, 2, 3)
    products = torch.einsum("kni,knj->knij", s, s)
    error = products.std(0) / 200
    dense = output_hessians(out, name)
    assert ((products.mean(0) - dense).abs() <= 5 * error + 1e-12).all()
    assert (s.mean(0).abs() <= 5 * s.std(0) / 200).all()
    across = torch.einsum("ki,kj->kij", s[:, 0], s[:, 1])  # terms are independent
    assert (across.mean(0).abs() <= 5 * across.std(0) / 200).all()


def test_values_are_those_of_torch():
    out = torch.randn(5, 3, 4, dtype=torch.float64)
    target, classes = torch.rand_like(out), torch.randint(4, (5, 3))
    assert LOSSES["cross_entropy"].value(out, classes).isclose(F.cross_entropy(out.movedim(-1, 1), classes))
    assert LOSSES["mse"].value(out, target).isclose(F.mse_loss(out, target))
    assert LOSSES["sum_mse"].value(out, target).isclose(F.mse_loss(out, target, reduction="sum") / 15)
    assert LOSSES["half_mse"].value(out, target).isclose(F.mse_loss(out, target, reduction="sum") / 30)
    assert LOSSES["bce"].value(out, target).isclose(F.binary_cross_entropy_with_logits(out, target))


@pytest.mark.parametrize("name", LOSSES)
def test_the_hessian_is_that_of_the_value(name):
    loss, out = LOSSES[name], torch.randn(2, 3, dtype=torch.float64)
    target = torch.randint(3, (2,)) if name == "cross_entropy" else torch.rand_like(out)
    dense = torch.func.hessian(lambda o: loss.value(o, target) * loss.terms(o))(out)
    root, _ = blocks(loss, out, name)
    for i in range(2):
        torch.testing.assert_close(root[i], dense[i, :, i], rtol=0, atol=1e-14)


def test_classes_may_lie_on_axis_1():
    out = torch.randn(2, 4, 3, 2, dtype=torch.float64)  # [N, C, H, W]
    first, last = CrossEntropy(axis=1), CrossEntropy()
    moved = out.movedim(1, -1)
    for a, b in zip(first.sqrt_hessian(out), last.sqrt_hessian(moved), strict=True):
        assert torch.equal(a.movedim(1, -1), b)
    draw = first.sample(out, torch.Generator().manual_seed(0))
    assert torch.equal(draw.movedim(1, -1), last.sample(moved, torch.Generator().manual_seed(0)))
    assert first.terms(out) == last.terms(moved) == 12
    target = torch.randint(4, (2, 3, 2))
    assert first.value(out, target).isclose(F.cross_entropy(out, target))


@pytest.mark.parametrize("loss", [SquaredError(), BinaryCrossEntropy()])
def test_one_axis_is_a_batch_of_scalars(loss):
    out = torch.randn(6, dtype=torch.float64)
    assert loss.terms(out) == 6
    [column], [same] = loss.sqrt_hessian(out), loss.sqrt_hessian(out.unsqueeze(1))
    assert torch.equal(column, same.squeeze(1))
    target = torch.rand(6, dtype=torch.float64)
    assert loss.value(out, target).isclose(loss.value(out.unsqueeze(1), target.unsqueeze(1)))


def test_masked_terms_count_nowhere():
    out = torch.randn(4, 3, 5, dtype=torch.float64)
    target = torch.randint(5, (4, 3))
    target[1:, 2] = -100
    mask = target != -100
    loss = Masked(CrossEntropy(), mask)
    assert loss.terms(out) == 9
    assert loss.value(out, target).isclose(F.cross_entropy(out.flatten(0, 1), target.flatten(), ignore_index=-100))
    draw, whole = (a.sample(out, torch.Generator().manual_seed(1)) for a in (loss, CrossEntropy()))
    assert torch.equal(draw, torch.where(mask.unsqueeze(2), whole, 0.0))
    root, dense = blocks(loss, out, "cross_entropy")
    keep = mask.repeat_interleave(5, 1).double()
    torch.testing.assert_close(root, dense * keep.unsqueeze(1) * keep.unsqueeze(2), rtol=0, atol=1e-14)
    none = Masked(CrossEntropy(), torch.tensor([[True, True, False]] * 4))
    assert len(list(none.sqrt_hessian(out))) == 10  # the last position has no columns
    with pytest.raises(ValueError, match=r"must be torch.bool \[4, 3\]"):
        Masked(CrossEntropy(), mask[:, :2]).terms(out)
    along = Masked(CrossEntropy(axis=1), mask)
    assert torch.equal(along.sample(out.movedim(-1, 1), torch.Generator().manual_seed(1)), draw.movedim(-1, 1))
    assert along.value(out.movedim(-1, 1), target).isclose(loss.value(out, target))
    scalars = Masked(SquaredError(), torch.tensor([True, False]))
    assert scalars.sample(torch.ones(2), torch.Generator()).count_nonzero() == scalars.terms(torch.ones(2)) == 1


@pytest.mark.parametrize("name", LOSSES)
def test_draws_are_reproducible_keep_the_dtype_and_leave_the_users_generator(name):
    out = torch.randn(6, 3).bfloat16()
    before = torch.get_rng_state()
    one, two = (LOSSES[name].sample(out, torch.Generator().manual_seed(4)) for _ in range(2))
    other = LOSSES[name].sample(out, torch.Generator().manual_seed(5))
    assert torch.equal(one, two)
    assert not torch.equal(one, other)
    assert one.dtype == next(LOSSES[name].sqrt_hessian(out)).dtype == torch.bfloat16
    assert torch.equal(before, torch.get_rng_state())


def spoil(out, bad, place=(3, 1)):
    """A copy with one number that is not finite."""
    spoiled = out.clone()
    spoiled[place] = bad
    return spoiled


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("name", LOSSES)
def test_rows_that_are_not_finite_have_nan_draws_and_change_no_other(name, dtype, bad):
    loss, out = LOSSES[name], torch.randn(300, 5).to(dtype)  # beyond a vector's length
    good, spoiled = (loss.sample(o, torch.Generator().manual_seed(2)) for o in (out, spoil(out, bad)))
    others = torch.arange(300) != 3
    assert torch.equal(spoiled[others], good[others])
    columns = torch.stack(list(loss.sqrt_hessian(spoil(out, bad))))
    assert torch.equal(columns[:, others], torch.stack(list(loss.sqrt_hessian(out)))[:, others])
    if name == "cross_entropy" and bad == -math.inf:  # a class that cannot be: p = 0
        assert spoiled[3].isfinite().all()
        assert spoiled[3, 1] == 0
        assert not columns[:, 3, 1].any()
    else:
        assert spoiled[3].isnan().all()
        assert columns[:, 3].isnan().any(0).any()
    assert spoiled.dtype == dtype


@pytest.mark.parametrize("loss", [SquaredError(), BinaryCrossEntropy()])
def test_a_scalar_that_is_not_finite_is_a_row_of_its_own(loss):
    out = torch.randn(6)
    good, spoiled = (loss.sample(o, torch.Generator().manual_seed(2)) for o in (out, spoil(out, math.nan, 3)))
    assert spoiled.isnan().nonzero().tolist() == [[3]]
    assert torch.equal(spoiled[:3], good[:3])


def test_positions_and_classes_on_axis_1_have_rows_of_their_own():
    out = torch.randn(2, 4, 3)  # [N, C, R]
    loss = CrossEntropy(axis=1)
    good, spoiled = (loss.sample(o, torch.Generator().manual_seed(2)) for o in (out, spoil(out, math.nan, (1, 2, 0))))
    wrong = torch.zeros(2, 4, 3, dtype=torch.bool)
    wrong[1, :, 0] = True
    assert torch.equal(spoiled.isnan(), wrong)
    assert torch.equal(spoiled[~wrong], good[~wrong])
    mask = torch.ones(2, 3, dtype=torch.bool)
    mask[1, 0] = False
    masked = Masked(loss, mask)  # a term that does not count is 0, whatever its outputs
    draw = masked.sample(spoil(out, math.nan, (1, 2, 0)), torch.Generator().manual_seed(2))
    assert torch.equal(draw, good.masked_fill(wrong, 0))
    columns = list(masked.sqrt_hessian(spoil(out, math.nan, (1, 2, 0))))
    assert all(torch.equal(a, b) for a, b in zip(columns, masked.sqrt_hessian(out), strict=True))


def dense_root(loss, out):
    """(S, S^T) of the whole output as matrices, from products with every unit tensor at once."""
    eye = torch.eye(out.numel(), dtype=out.dtype).view(-1, *out.shape)
    return loss.root(out, eye).reshape(len(eye), -1).T, loss.root_t(out, eye).reshape(len(eye), -1).T


VARIANTS = {
    **{name: (loss, (3, 2, 4)) for name, loss in LOSSES.items()},
    "axis 1": (CrossEntropy(axis=1), (3, 4, 2)),
    "masked": (Masked(CrossEntropy(), torch.tensor([[True, False], [True, True], [False, False]])), (3, 2, 4)),
    "masked, axis 1": (Masked(CrossEntropy(axis=1), torch.tensor([[True, False]] * 3)), (3, 4, 2)),
    "masked bce": (Masked(BinaryCrossEntropy(), torch.tensor([[True, False]] * 3)), (3, 2, 4)),
    "scalars": (SquaredError(1.0), (5,)),
    "masked scalars": (Masked(BinaryCrossEntropy(), torch.tensor([True, False, True])), (3,)),
}


@pytest.mark.parametrize("name", VARIANTS)
def test_products_with_the_root_are_those_of_the_sum_over_terms(name):
    """S S^T is autograd's Hessian of T times the value, S rho its gradient, S^T the transpose; the columns are S's."""
    loss, shape = VARIANTS[name]
    out = torch.randn(*shape, dtype=torch.float64)
    base = loss.loss if isinstance(loss, Masked) else loss
    if isinstance(base, CrossEntropy):
        target = torch.randint(4, out.select(base.axis, 0).shape)
        target[0] = 2
    else:
        target = torch.rand_like(out)
    if isinstance(loss, Masked):  # nothing of a target that does not count is read
        target[~loss.mask] = -100 if isinstance(base, CrossEntropy) else math.nan
        if isinstance(base, CrossEntropy):
            with pytest.raises(ValueError, match="mask them with Masked"):
                base.value(out, target)

    def total(flat):
        return loss.value(flat.view(shape), target) * loss.terms(out)

    flat = out.reshape(-1).requires_grad_()
    s, s_t = dense_root(loss, out.detach())
    hessian = torch.autograd.functional.hessian(total, flat)
    torch.testing.assert_close(s @ s.T, hessian, rtol=1e-11, atol=1e-13)
    torch.testing.assert_close(s_t, s.T, rtol=1e-13, atol=1e-15)
    [gradient] = torch.autograd.grad(total(flat), flat)
    rho = loss.rho(out.detach(), target)
    assert rho.shape == out.shape
    torch.testing.assert_close(s @ rho.reshape(-1), gradient, rtol=1e-11, atol=1e-13)
    columns = torch.stack(list(loss.sqrt_hessian(out.detach())))
    own = torch.eye(len(out), dtype=out.dtype).view(len(out), len(out), *[1] * (out.dim() - 1))
    columns = (columns.unsqueeze(1) * own).flatten(0, 1).flatten(1)  # a column has every sample in it: one by one
    torch.testing.assert_close(columns.T @ columns, hessian, rtol=1e-11, atol=1e-13)


@pytest.mark.parametrize("name", LOSSES)
def test_products_keep_the_dtype_and_are_finite_where_probabilities_vanish(name):
    for dtype in (torch.float16, torch.bfloat16, torch.float32):
        out = torch.tensor([[300.0, 0.0, -300.0]], dtype=dtype)
        target = torch.tensor([2]) if name == "cross_entropy" else torch.tensor([[0.0, 1.0, 1.0]])
        for product in (
            LOSSES[name].root(out, torch.ones_like(out)),
            LOSSES[name].root_t(out, torch.ones_like(out)),
            LOSSES[name].rho(out, target),
        ):
            assert product.dtype == dtype
            assert product.isfinite().all() or dtype == torch.float16  # rho of a vanished class is 1e6
            assert not product.isnan().any()
    wide = LOSSES[name].root(out, torch.ones(2, 1, 3, dtype=torch.float64))
    assert (wide.dtype, wide.shape) == (torch.float64, (2, 1, 3))


def test_targets_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match=r"must be classes 0, 1, .*masked rows.*Masked"):
        CrossEntropy().value(torch.zeros(2, 3), torch.tensor([0, -100]))
    with pytest.raises(ValueError, match="must be classes"):
        CrossEntropy().value(torch.zeros(2, 3), torch.zeros(2, 3))
    for loss in (SquaredError(), BinaryCrossEntropy()):
        for call in (loss.value, loss.rho):
            with pytest.raises(ValueError, match=r"\[2, 1\] do not fit outputs of shape \[2\]"):
                call(torch.zeros(2), torch.zeros(2, 1))


def test_names():
    assert as_loss("mse") is LOSSES["mse"]
    assert as_loss(None) is None
    with pytest.raises(ValueError, match="'mae' is unknown; choose one of cross_entropy, mse"):
        as_loss("mae")
