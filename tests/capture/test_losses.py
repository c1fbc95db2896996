"""Losses as likelihoods: values against torch, roots and draws against dense Hessians."""

from __future__ import annotations

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


def test_names():
    assert as_loss("mse") is LOSSES["mse"]
    assert as_loss(None) is None
    with pytest.raises(ValueError, match="'mae' is unknown; choose one of cross_entropy, mse"):
        as_loss("mae")
