"""Data: real, offline, hashed, and drawn as a function of seed and step alone."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from guided_descent.bench.data import EpochOrder, digits, generator, source_corpus, source_files
from guided_descent.bench.problem import ProblemError


def test_the_corpus_is_the_installed_source_without_tests():
    files = source_files()
    assert len(files) > 500
    assert not any("tests" in f.parts for f in files)
    assert {f.suffix for f in files} == {".py"}
    corpus = source_corpus()
    assert len(corpus.train) + len(corpus.valid) == sum(f.stat().st_size for f in files)
    assert len(corpus.train) > 10_000_000
    assert 0.02 < len(corpus.valid) / len(corpus.train) < 0.1


def test_validation_files_are_not_in_training():
    files, corpus = source_files(), source_corpus()
    train = corpus.train.numpy().tobytes()
    for held in [f for f in files[19::20] if f.stat().st_size > 2000][:5]:
        text = held.read_bytes()
        assert text in corpus.valid.numpy().tobytes()
        assert text not in train


def test_the_corpus_hash_belongs_to_the_pinned_sympy():
    """A target holds only for the data it was measured on: another sympy must show."""
    import sympy

    known = {"1.14.0": "2708d2a4eb5ba4ca84e57cf175d40a273366e70d16150609b68e3944abda221c"}
    assert known[sympy.__version__] == source_corpus().hash


def test_a_package_that_is_missing_is_named():
    with pytest.raises(ProblemError, match="needs the package 'no_such_package'; pip install no_such_package"):
        source_files("no_such_package")


def test_digits_are_split_once_and_for_all():
    split = digits()
    assert (split.x.shape, split.x_test.shape) == ((1438, 64), (359, 64))
    assert float(split.x.min()) == 0
    assert float(split.x.max()) == 1
    everything = torch.cat([split.x, split.x_test])
    assert len(everything.unique(dim=0)) == len(everything)  # nothing in both parts
    assert split.hash == "479f25de" + split.hash[8:]
    counts = split.y.bincount(minlength=10)
    assert counts.min() > 120


@given(st.integers(1, 60), st.integers(1, 10), st.integers(0, 5))
def test_an_epoch_repeats_nothing_and_order_depends_on_seed_and_step_only(items, batch, seed):
    if batch > items:
        with pytest.raises(ProblemError, match=f"a batch of {batch} cannot be drawn from {items} items"):
            EpochOrder(items, batch, seed)
        return
    order = EpochOrder(items, batch, seed)
    epochs = [torch.cat([order(e * order.steps_per_epoch + i) for i in range(order.steps_per_epoch)]) for e in (0, 1)]
    for drawn in epochs:
        assert len(drawn.unique()) == len(drawn) == order.steps_per_epoch * batch
        assert drawn.min() >= 0
        assert drawn.max() < items
    again = EpochOrder(items, batch, seed)
    for step in (2 * order.steps_per_epoch - 1, 0, order.steps_per_epoch):  # any order of asking
        assert torch.equal(again(step), order(step))


def test_seeds_and_epochs_differ():
    a, b = EpochOrder(1000, 100, 0), EpochOrder(1000, 100, 1)
    assert not torch.equal(a(0), b(0))
    assert not torch.equal(a(0), a(10))


def test_generators_of_near_seeds_are_unrelated():
    draws = torch.stack([torch.randn(2000, generator=generator(s, salt)) for s in range(4) for salt in range(3)])
    correlation = torch.corrcoef(draws) - torch.eye(12)
    assert correlation.abs().max() < 5 / math.sqrt(2000)


def test_mnist1d_is_the_published_set_and_leaves_generators_alone():
    from guided_descent.bench.data import one_dimensional_digits

    torch.manual_seed(3)
    expected = torch.rand(2)
    torch.manual_seed(3)
    split = one_dimensional_digits()
    assert torch.equal(torch.rand(2), expected)
    assert split.x.shape == (4000, 40)
    assert split.x_test.shape == (1000, 40)
    assert sorted(split.y.bincount().tolist() + split.y_test.bincount().tolist())[0] > 80  # all ten classes in both
    assert split.hash == one_dimensional_digits.__wrapped__().hash  # generated alike each time
