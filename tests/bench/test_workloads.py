"""The built-in workloads are what benchmarks say they are."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from guided_descent.bench.data import images, source_corpus
from guided_descent.bench.models import ByteGPT
from guided_descent.bench.problem import load_problem
from guided_descent.bench.workloads import FAMILIES, WORKLOADS, expand


@pytest.mark.parametrize("name", WORKLOADS)
def test_every_workload_goes_through_the_user_s_door(name):
    a, b, other = load_problem(name, 1), load_problem(name, 1), load_problem(name, 2)
    for p, q in zip(a.model.parameters(), b.model.parameters(), strict=True):
        assert torch.equal(p, q)
    assert any(not torch.equal(p, q) for p, q in zip(a.model.parameters(), other.model.parameters(), strict=True))
    assert len(a.data) == 64
    assert a.data == b.data == other.data  # the seed shuffles, it does not change the data
    a.model.eval()
    with torch.no_grad():
        assert math.isfinite(a.evaluate(a.model)[a.metric])


@pytest.mark.parametrize("name", ["lm-source", "mlp-digits", "mnist1d", "ae-mnist", "pinn-burgers"])
def test_the_objective_of_a_workload_is_its_loss(name):
    """In value and gradient; the smoke family has the loss alone."""
    task = load_problem(name, 0)
    batch = task.batch(0)
    objective = task.objective(batch)
    assert objective.curved
    loss = task.loss(task.model, batch)
    assert objective.value().item() == pytest.approx(loss.item(), rel=1e-5)
    expected = torch.autograd.grad(loss, task.trainable())
    found = torch.autograd.grad(objective.value(), task.trainable())
    for a, b in zip(found, expected, strict=True):
        assert (a - b).norm() <= 1e-4 * b.norm() + 1e-9
    assert not load_problem("smoke-quadratic", 0).objective(None).curved


def test_families_expand_to_workloads():
    assert set(expand("smoke")) <= set(WORKLOADS)
    assert len(expand("smoke")) >= 4
    assert expand("mlp-digits") == ("mlp-digits",)
    assert not set(FAMILIES) & set(WORKLOADS)


def test_lm_source_is_the_written_workload():
    task = load_problem("lm-source", 0)
    model = task.model
    assert (task.steps, task.metric, task.goal) == (600, "bits_per_byte", "min")
    assert sum(p.numel() for p in model.parameters()) == 388_416
    assert len(model.blocks) == 3
    assert model.blocks[0].heads == 4
    assert model.blocks[0].expand.weight.shape == (384, 96)
    assert model.head.weight is not model.token.weight
    assert task.batch(0).shape == (32, 65)
    with torch.no_grad():  # uniform guessing is 8 bits
        assert task.evaluate(model)["bits_per_byte"] == pytest.approx(8, abs=0.4)


def test_lm_source_repeats_nothing_within_its_run():
    """Less than one epoch, no window twice, and every byte is from the training files."""
    task = load_problem("lm-source", 0)
    text = source_corpus().train
    starts = {bytes(w.numpy()) for w in text.unfold(0, 65, 64)}
    drawn = torch.cat([task.batch(step) for step in range(task.steps)])
    assert len(drawn) * 64 < 0.1 * len(text)
    assert all(bytes(w.numpy()) in starts for w in drawn[::50])
    assert torch.equal(task.batch(7), load_problem("lm-source", 0).batch(7))
    assert not torch.equal(task.batch(7), load_problem("lm-source", 1).batch(7))


def test_the_gpt_sees_no_future_and_every_parameter_learns():
    torch.manual_seed(0)
    model = ByteGPT()
    tokens = torch.randint(256, (2, 64))
    changed = tokens.clone()
    changed[:, 40:] = (changed[:, 40:] + 1) % 256
    difference = (model(tokens) - model(changed)).abs().amax((0, 2))
    assert difference[:40].max() == 0
    assert difference[40:].min() > 0
    model(tokens).square().mean().backward()
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in model.parameters())


def test_bits_per_byte_is_the_mean_code_length():
    """Against a loop over the windows in float64."""
    task = load_problem("lm-source", 0)
    model = task.model.eval()
    valid = source_corpus().valid.unfold(0, 65, 64)
    chosen = valid[torch.linspace(0, len(valid) - 1, 512).long()].long()
    with torch.no_grad():
        logp = torch.cat([model(part[:, :-1]).double().log_softmax(-1) for part in chosen.split(64)])
        bits = -logp.gather(-1, chosen[:, 1:, None]).mean() / math.log(2)
        assert task.evaluate(model)["bits_per_byte"] == pytest.approx(bits.item(), rel=1e-5)


def test_mlp_digits_is_the_written_workload():
    task = load_problem("mlp-digits", 0)
    assert [tuple(m.weight.shape) for m in task.model if isinstance(m, nn.Linear)] == [(256, 64), (256, 256), (10, 256)]
    assert task.steps == 600
    x, y = task.batch(0)
    assert (x.shape, y.shape) == ((128, 64), (128,))
    with torch.no_grad():
        values = task.evaluate(task.model)
    assert set(values) == {"test_loss", "accuracy"}
    assert values["test_loss"] == pytest.approx(math.log(10), abs=0.1)


def test_mlp_digits_can_be_learned():
    task = load_problem("mlp-digits", 0)
    optimizer = torch.optim.AdamW(task.model.parameters(), lr=3e-3)
    for step in range(150):
        optimizer.zero_grad()
        task.loss(task.model, task.batch(step)).backward()
        optimizer.step()
    with torch.no_grad():
        assert task.evaluate(task.model)["accuracy"] > 0.95


def test_ae_mnist_is_the_written_workload():
    task = load_problem("ae-mnist", 0)
    linear = [m for m in task.model if isinstance(m, nn.Linear)]
    assert [m.out_features for m in linear] == [1000, 500, 250, 30, 250, 500, 1000, 784]
    kinds = [type(m).__name__ for m in task.model if not isinstance(m, nn.Linear)]
    assert kinds == ["Tanh"] * 6 + ["Sigmoid"]
    assert not isinstance(task.model[7], nn.Tanh)  # the code is linear
    assert sum(p.numel() for p in task.model.parameters()) == 2_837_314
    assert (task.steps, task.metric, task.likelihood) == (600, "train_error", "sum_mse")
    assert task.batch(0).shape == (256, 784)
    x = task.batch(0)
    with torch.no_grad():
        z = task.model(x)
        assert task.loss(task.model, x).item() == pytest.approx(((z - x) ** 2).sum().item() / 256, rel=1e-5)
        values = task.evaluate(task.model)
    assert set(values) == {"train_error", "test_error"}
    assert 100 < values["train_error"] < 300  # grey pictures


def test_the_images_are_5000_digits_in_two_parts():
    split = images()
    assert (split.x.shape, split.x_test.shape) == ((4500, 784), (500, 784))
    assert (split.x.min().item(), split.x.max().item()) == (0.0, 1.0)
    assert torch.bincount(torch.cat([split.y, split.y_test])).tolist() == [500] * 10
    assert split.y_test.bincount().min() > 30
    assert len({bytes(row.numpy()) for row in torch.cat([split.x, split.x_test])}) > 4900  # no picture in both parts


def test_ae_mnist_learns():
    """Ten steps of AdamW take it below the error of the mean picture, about 52."""
    task = load_problem("ae-mnist", 0)
    optimizer = torch.optim.AdamW(task.model.parameters(), lr=1e-3)
    losses = []
    for step in range(10):
        optimizer.zero_grad()
        loss = task.loss(task.model, task.batch(step))
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]
