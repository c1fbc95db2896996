"""The built-in workloads: functions that return a ``Problem``, as a user's own task does."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from guided_descent.bench import burgers
from guided_descent.bench.data import EpochOrder, Split, digits, images, one_dimensional_digits, source_corpus
from guided_descent.bench.models import ByteGPT, autoencoder, mlp
from guided_descent.bench.problem import Batch, Problem, tensor_hash
from guided_descent.bench.smoke import factorisation, logistic, quadratic, rosenbrock

CONTEXT, BATCH = 64, 32
VALID_WINDOWS = 512


def lm_source(seed: int) -> Problem:
    """Byte-level language modelling of Python source text; 0.39M parameters, 32 x 64 bytes a step, 600 steps at 1x.

    A window of 65 bytes is drawn at most once per epoch; one epoch is about 7,000 steps. Validation bits per byte are
    computed on 512 windows spread evenly over held-out files.
    """
    corpus = source_corpus()
    train, valid = _windows(corpus.train), _windows(corpus.valid)
    chosen = valid[torch.linspace(0, len(valid) - 1, VALID_WINDOWS).long()]
    order = EpochOrder(len(train), BATCH, seed)

    def outputs(model: nn.Module, batch: Batch) -> Tensor:
        logits: Tensor = model(batch[:, :-1].long())
        return logits.flatten(0, 1)

    def targets(batch: Batch) -> Tensor:
        labels: Tensor = batch[:, 1:].long().flatten()
        return labels

    def loss(model: nn.Module, batch: Batch) -> Tensor:
        return F.cross_entropy(outputs(model, batch), targets(batch))

    def evaluate(model: nn.Module) -> dict[str, float]:
        parts = torch.split(chosen, BATCH)
        nats = sum(loss(model, part).item() for part in parts) / len(parts)
        return {"bits_per_byte": nats / math.log(2)}

    return Problem(
        model=ByteGPT(context=CONTEXT),
        loss=loss,
        batches=lambda step: train[order(step)],
        evaluate=evaluate,
        steps=600,
        metric="bits_per_byte",
        unit="bits/byte",
        eval_every=50,
        data=corpus.hash,
        outputs=outputs,
        targets=targets,
        likelihood="cross_entropy",
    )


def _windows(text: Tensor) -> Tensor:
    """uint8 [N, 65]: windows that share no target byte (each starts with the last byte of the one before)."""
    return text.unfold(0, CONTEXT + 1, CONTEXT)


def mlp_digits(seed: int) -> Problem:
    """A 64-256-256-10 ReLU network on 8 x 8 digits: steps of about a millisecond, for grids with many seeds."""
    return classification(digits(), mlp(64, 256, 256, 10), batch=128, steps=600, seed=seed)


def mnist1d(seed: int) -> Problem:
    """A 40-100-100-10 ReLU network on MNIST-1D: 4,000 signals that a linear map does not separate."""
    return classification(one_dimensional_digits(), mlp(40, 100, 100, 10), batch=100, steps=600, seed=seed)


def classification(split: Split, model: nn.Module, *, batch: int, steps: int, seed: int) -> Problem:
    """Cross-entropy training on a fixed split; test log-loss in nats is compared, test accuracy is reported."""
    order = EpochOrder(len(split.x), batch, seed)

    def loss(model: nn.Module, batch: Batch) -> Tensor:
        x, y = batch
        return F.cross_entropy(model(x), y)

    def batches(step: int) -> Batch:
        rows = order(step)
        return split.x[rows], split.y[rows]

    def evaluate(model: nn.Module) -> dict[str, float]:
        logits = model(split.x_test)
        hits = (logits.argmax(-1) == split.y_test).float()
        return {"test_loss": F.cross_entropy(logits, split.y_test).item(), "accuracy": hits.mean().item()}

    return Problem(
        model=model,
        loss=loss,
        batches=batches,
        evaluate=evaluate,
        steps=steps,
        metric="test_loss",
        unit="nats",
        data=split.hash,
        outputs=lambda model, batch: model(batch[0]),
        targets=lambda batch: batch[1],
        likelihood="cross_entropy",
    )


def ae_mnist(seed: int) -> Problem:
    """The deep autoencoder 784-1000-500-250-30 and back on MNIST digits; 2.84M parameters, 256 images a step.

    The loss is the squared error summed over the pixels, the mean over images; 4,500 images train, 500 test. Compared
    is the same error on 1,000 of the training images, fixed: how far the method gets, not how well it generalises.

    Source: Hinton and Salakhutdinov 2006; Martens 2010.
    """
    split = images()
    order = EpochOrder(len(split.x), 256, seed)

    def error(model: nn.Module, x: Tensor) -> Tensor:
        mean: Tensor = (model(x) - x).square().sum(-1).mean()
        return mean

    return Problem(
        model=autoencoder(784, 1000, 500, 250, 30),
        loss=error,
        batches=lambda step: split.x[order(step)],
        evaluate=lambda model: {
            "train_error": error(model, split.x[:1000]).item(),
            "test_error": error(model, split.x_test).item(),
        },
        steps=600,
        metric="train_error",
        unit="per image",
        eval_every=50,
        data=split.hash,
        outputs=lambda model, batch: model(batch),
        targets=lambda batch: batch,
        likelihood="sum_mse",
    )


def pinn_burgers(seed: int) -> Problem:
    """A physics-informed network for Burgers' equation (``burgers.py``): float64, full batch, 1,000 steps at 1x.

    Compared is the relative 2-norm error of ``u`` against the exact solution on a grid of 100 x 256. The seed draws the
    weights; the points are fixed.
    """
    at = burgers.points()

    def net(model: nn.Module) -> burgers.BurgersNet:
        assert isinstance(model, burgers.BurgersNet)
        return model

    def residuals(model: nn.Module, batch: Batch) -> Tensor:
        return burgers.residuals(net(model), at)

    grid, solution = burgers.reference()
    return Problem(
        model=burgers.BurgersNet(),
        loss=lambda model, batch: residuals(model, batch).square().mean(),
        batches=lambda step: None,
        evaluate=lambda model: {"error": burgers.relative_error(model)},
        steps=1000,
        metric="error",
        unit="of |u|",
        target=5e-3,
        data=tensor_hash([at.inside, at.edge, at.values, at.weights, grid, solution]),
        residuals=residuals,
        jacobian=lambda model, batch: burgers.jacobian(net(model), at),
    )


WORKLOADS: dict[str, Callable[[int], Problem]] = {
    "lm-source": lm_source,
    "mlp-digits": mlp_digits,
    "mnist1d": mnist1d,
    "ae-mnist": ae_mnist,
    "pinn-burgers": pinn_burgers,
    "smoke-quadratic": quadratic,
    "smoke-factorisation": factorisation,
    "smoke-rosenbrock": rosenbrock,
    "smoke-logistic": logistic,
}

FAMILIES: dict[str, tuple[str, ...]] = {
    "smoke": (*(name for name in WORKLOADS if name.startswith("smoke-")), "mnist1d")
}


def expand(ref: str) -> tuple[str, ...]:
    """The workloads behind a name: the members of a family, or the name itself.

    Example:
        >>> expand("smoke")[0], expand("lm-source"), expand("mypkg.task:make")
        ('smoke-quadratic', ('lm-source',), ('mypkg.task:make',))
    """
    return FAMILIES.get(ref, (ref,))
