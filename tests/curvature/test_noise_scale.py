"""The gradient noise scale: planted values, exact sums of one step, and what it says when there is nothing to say."""

from __future__ import annotations

import gc
import math
import weakref
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from guided_descent.curvature import (
    NoiseScale,
    batch_factor,
    curvature_noise_scale,
    fit_critical_batch,
)

SIZE = 40


class Planted(nn.Module):
    """Two layers whose gradients, under the loss ``mean(output)``, are the mean of the inputs and so of our making."""

    def __init__(self) -> None:
        super().__init__()
        self.quiet, self.loud = (nn.Linear(SIZE, 1, bias=False) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        return self.quiet(x[:, :SIZE]) + self.loud(x[:, SIZE:])


#: ``S / ||G||^2`` of each layer, and of both: ``||G||^2`` is 1 in each.
QUIET, LOUD = 10.0, 60.0
BOTH = (QUIET + LOUD) / 2


def inputs(count: int, generator: torch.Generator) -> Tensor:
    signal = torch.zeros(2 * SIZE)
    signal[0] = signal[SIZE] = 1.0
    noise = torch.randn(count, 2 * SIZE, generator=generator)
    noise[:, :SIZE] *= math.sqrt(QUIET / SIZE)
    noise[:, SIZE:] *= math.sqrt(LOUD / SIZE)
    return signal + noise


def check(noise: NoiseScale) -> None:
    assert noise.measure().value == pytest.approx(BOTH, rel=0.2)
    layers = noise.by_layer()
    assert layers["quiet"].value == pytest.approx(QUIET, rel=0.2)
    assert layers["loud"].value == pytest.approx(LOUD, rel=0.2)


def test_micro_batches_find_a_planted_value() -> None:
    model, made = Planted(), torch.Generator().manual_seed(0)
    noise = NoiseScale(model, memory=0.995)
    for _ in range(600):
        model.zero_grad()
        for _ in range(4):
            (model(inputs(4, made)).mean() / 4).backward()
        noise.update(batch_size=4)
    check(noise)


def test_samples_find_a_planted_value() -> None:
    model, made = Planted(), torch.Generator().manual_seed(1)
    noise = NoiseScale(model, source="samples", memory=0.995)
    for _ in range(600):
        model.zero_grad()
        model(inputs(16, made)).mean().backward()
        noise.update()
    check(noise)


def ranks(rank: int, file: str) -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{file}", rank=rank, world_size=2)
    try:
        for source, size, steps in (("passes", 8, 500), ("samples", 8, 300)):
            made = torch.Generator().manual_seed(10 + rank)
            model = nn.parallel.DistributedDataParallel(Planted())
            noise = NoiseScale(model, source=source, memory=0.995)
            for _ in range(steps):
                model.zero_grad()
                model(inputs(size, made)).mean().backward()
                noise.update(batch_size=size if source == "passes" else None)
            check(noise)
            values: list[Tensor] = [torch.zeros(2, dtype=torch.float64) for _ in range(2)]
            found = noise.measure()
            torch.distributed.all_gather(values, torch.tensor([found.trace, found.square], dtype=torch.float64))
            assert torch.equal(*values)
            noise.remove()
    finally:
        torch.distributed.destroy_process_group()


def test_ranks_find_a_planted_value(tmp_path: Path) -> None:
    torch.multiprocessing.spawn(ranks, args=(str(tmp_path / "store"),), nprocs=2)


# -- exactness ---------------------------------------------------------------------------------------------------------


class Readable(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, 6)
        self.norm = nn.LayerNorm(6)
        self.conv = nn.Conv1d(6, 5, 3, padding=1)
        self.head = nn.Linear(5, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.conv(self.norm(self.embed(x)).mT).mT.tanh())


def sequence_loss(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    return nn.functional.cross_entropy(model(x).flatten(0, 1), y.flatten())


def by_hand(model: nn.Module, loss: Callable[[slice], Tensor], count: int) -> tuple[float, float]:
    """S and ``||G||^2`` from the gradients of single samples."""
    params = list(model.parameters())
    grads = [torch.cat([g.flatten() for g in torch.autograd.grad(loss(slice(i, i + 1)), params)]) for i in range(count)]
    each, mean = sum(float(g.square().sum()) for g in grads) / count, torch.stack(grads).mean(0)
    whole = float(mean.square().sum())
    return (each - whole) / (1 - 1 / count), (count * whole - each) / (count - 1)


@pytest.mark.parametrize("passes", [1, 3])
@pytest.mark.parametrize("division", ["mean", "sum"])
def test_samples_are_exact(passes: int, division: str) -> None:
    torch.manual_seed(0)
    model = Readable().double()
    x, y = torch.randint(11, (6, 7)), torch.randint(4, (6, 7))
    trace, square = by_hand(model, lambda rows: sequence_loss(model, x[rows], y[rows]), 6)
    noise = NoiseScale(model, source="samples", division=division)  # type: ignore[arg-type]
    for a, b in zip(x.chunk(passes), y.chunk(passes)):
        (sequence_loss(model, a, b) / (passes if division == "mean" else 1)).backward()
    noise.update()
    assert noise.measure().trace == pytest.approx(trace, rel=1e-9)
    assert noise.measure().square == pytest.approx(square, rel=1e-9)
    assert set(noise.by_layer()) == {"embed", "norm", "conv", "head"}
    assert sum(layer.trace for layer in noise.by_layer().values()) == pytest.approx(trace)


@pytest.mark.parametrize("division", ["mean", "sum"])
def test_passes_are_exact(division: str) -> None:
    torch.manual_seed(0)
    model = Readable().double()
    x, y = torch.randint(11, (6, 7)), torch.randint(4, (6, 7))
    params = list(model.parameters())
    parts = [
        torch.autograd.grad(sequence_loss(model, a, b), params) for a, b in zip(x.chunk(3), y.chunk(3), strict=True)
    ]
    small = sum(float(g.square().sum()) for part in parts for g in part) / 3
    large = sum(float(torch.stack(each).mean(0).square().sum()) for each in zip(*parts))
    noise = NoiseScale(model, division=division)  # type: ignore[arg-type]
    for a, b in zip(x.chunk(3), y.chunk(3)):
        (sequence_loss(model, a, b) / (3 if division == "mean" else 1)).backward()
    noise.update(batch_size=2)
    assert noise.measure().trace == pytest.approx((small - large) / (1 / 2 - 1 / 6), rel=1e-9)
    assert noise.measure().square == pytest.approx((6 * large - 2 * small) / 4, rel=1e-9)


@pytest.mark.parametrize("source", ["passes", "samples"])
def test_a_scaled_loss_tells_the_same(source: str) -> None:
    found = []
    for scale in (None, 1024.0):
        torch.manual_seed(0)
        model = Readable()
        x, y = torch.randint(11, (6, 7)), torch.randint(4, (6, 7))
        scaler = torch.amp.GradScaler("cpu", init_scale=scale) if scale else None
        noise = NoiseScale(model, source=source, scaler=scaler)  # type: ignore[arg-type]
        opt = torch.optim.SGD(model.parameters(), lr=0.0)
        for a, b in zip(x.chunk(2), y.chunk(2)):
            loss = sequence_loss(model, a, b) / 2
            (scaler.scale(loss) if scaler else loss).backward()
        if scaler:
            scaler.unscale_(opt)
        noise.update(batch_size=3)
        found.append(noise.measure())
    assert found[0].trace == pytest.approx(found[1].trace, rel=1e-4)
    assert found[0].square == pytest.approx(found[1].square, rel=1e-4)


def test_unused_parameters_and_shared_ones() -> None:
    """A layer that some passes go around counts as zero there; a tied table is no layer of its own for samples."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3)).double()
    noise = NoiseScale(model)
    x = torch.randn(2, 3, dtype=torch.float64)
    (model(x).sum() / 2).backward()
    (model[1](x).sum() / 2).backward()
    noise.update(batch_size=2)
    w = model[0].weight.grad
    assert w is not None
    whole = float(w.square().sum() + model[0].bias.grad.square().sum())  # type: ignore[union-attr]
    assert noise.by_layer()["0"].trace == pytest.approx((2 * whole - whole) / (1 / 2 - 1 / 4))
    tied = nn.Sequential(nn.Embedding(5, 4), nn.Linear(4, 4), nn.Linear(4, 5, bias=False))
    tied[2].weight = tied[0].weight
    assert list(NoiseScale(tied, source="samples").by_layer()) == ["1"]


# -- what it says ------------------------------------------------------------------------------------------------------


def test_it_says_when_there_is_nothing_to_say() -> None:
    model, made = Planted(), torch.Generator().manual_seed(0)
    noise = NoiseScale(model)
    assert str(noise.measure()) == "unavailable: no step has been measured yet"
    model(inputs(8, made)).mean().backward()
    noise.update(batch_size=8)
    assert noise.measure().value is None
    assert "one backward pass on one rank: accumulate gradients" in str(noise.measure())
    assert "unavailable" in str(noise.by_layer()["loud"])
    model.zero_grad()
    noise.update(batch_size=8)
    assert "no backward pass was seen" in str(noise.measure())
    alone = NoiseScale(Planted(), source="samples")
    alone.update()
    assert "no backward pass was seen" in str(alone.measure())
    one = NoiseScale(model, source="samples")
    model(inputs(1, made)).mean().backward()
    one.update()
    assert "the batch held one sample" in str(one.measure())


def test_gradients_whose_passes_nobody_saw_are_an_error() -> None:
    model = Planted()
    noise = NoiseScale(model)
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    with pytest.raises(RuntimeError, match=r"none of their passes was seen: under fully_shard.*source='samples'"):
        noise.update(batch_size=4)


def test_what_is_not_finite_is_left_out() -> None:
    model, made = Planted(), torch.Generator().manual_seed(0)
    noise = NoiseScale(model)
    for number in range(3):
        model.zero_grad()
        for _ in range(2):
            x = inputs(4, made)
            (model(x if number != 1 else x * math.inf).mean() / 2).backward()
        noise.update(batch_size=4)
    assert noise.measure().updates == 2
    assert math.isfinite(noise.measure().trace)


@pytest.mark.parametrize("source", ["passes", "samples"])
def test_every_so_many_steps(source: str) -> None:
    model, made = Planted(), torch.Generator().manual_seed(0)
    noise = NoiseScale(model, source=source, every=3)  # type: ignore[arg-type]
    for _ in range(7):
        model.zero_grad()
        for _ in range(2):
            (model(inputs(4, made)).mean() / 2).backward()
        noise.update(batch_size=4)
    assert noise.measure().updates == 3
    noise.remove()
    model(inputs(4, made)).mean().backward()


def test_one_that_is_dropped_leaves_the_model_alone() -> None:
    """While a capture is armed, ``torch.compile`` is set aside in the whole process."""
    model = Planted()
    noise = NoiseScale(model, source="samples")
    watched = weakref.ref(noise)
    assert any(module._forward_hooks for module in model.modules())
    gc.disable()
    try:
        del noise
        assert watched() is None
        assert not any(module._forward_hooks for module in model.modules())
    finally:
        gc.enable()


def test_a_resumed_measurement_goes_on(tmp_path: Path) -> None:
    def run(noise: NoiseScale, model: nn.Module, steps: range) -> None:
        for number in steps:
            made = torch.Generator().manual_seed(number)
            model.zero_grad()
            for _ in range(2):
                (model(inputs(4, made)).mean() / 2).backward()
            noise.update(batch_size=4)

    model, begun = Planted(), Planted()
    whole, part = NoiseScale(model), NoiseScale(begun)
    run(whole, model, range(9))
    run(part, begun, range(4))
    torch.save(part.state_dict(), tmp_path / "noise.pt")
    other = Planted()
    resumed = NoiseScale(other)
    resumed.load_state_dict(torch.load(tmp_path / "noise.pt", weights_only=True))
    run(resumed, other, range(4, 9))
    assert resumed.measure() == whole.measure()
    with pytest.raises(ValueError, match="measured on other layers; '' is in one of them alone"):
        NoiseScale(nn.Linear(2, 2)).load_state_dict(part.state_dict())
    with pytest.raises(ValueError, match="format 2 of a noise scale is unknown"):
        resumed.load_state_dict(part.state_dict() | {"format": 2})


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"source": "ranks"}, "source='ranks' must be one of 'passes', 'samples'"),
        ({"division": "none"}, "division='none' must be one of 'mean', 'sum'"),
        ({"memory": 1.0}, "memory=1.0 must be at least 0 and below 1"),
        ({"every": 0}, "every=0 must be at least 1"),
    ],
)
def test_wrong_numbers(more: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        NoiseScale(Planted(), **more)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="batch_size=None: give the number of samples in each pass"):
        NoiseScale(Planted()).update()
    with pytest.raises(ValueError, match="the model has none"):
        NoiseScale(nn.Sequential(nn.PReLU()), source="samples")
    frozen = nn.Linear(2, 2).requires_grad_(False)
    with pytest.raises(ValueError, match="no parameter of the model takes gradients"):
        NoiseScale(frozen)


# -- with curvature ----------------------------------------------------------------------------------------------------


def test_the_noise_scale_with_curvature_is_unbiased() -> None:
    """``loss_i = theta^T H theta / 2 + xi_i^T theta`` has ``G = H theta`` and the covariance of xi."""
    made = torch.Generator().manual_seed(0)
    h = torch.diag(torch.tensor([4.0, 1.0, 0.25], dtype=torch.float64))
    std = torch.tensor([0.5, 2.0, 1.0], dtype=torch.float64)
    theta = nn.Parameter(torch.tensor([0.5, 1.0, -1.0], dtype=torch.float64))
    g = h @ theta.detach()
    traces, squares = [], []
    for _ in range(400):
        batches = [torch.randn(4, 3, generator=made, dtype=torch.float64) * std for _ in range(3)]
        losses = [lambda x=x: 0.5 * theta @ h @ theta + (x @ theta).mean() for x in batches]
        found = curvature_noise_scale(losses, [theta], batch_size=4)
        traces.append(found.trace)
        squares.append(found.square)
    assert sum(traces) / 400 == pytest.approx(float((h.diagonal() * std.square()).sum()), rel=0.05)
    assert sum(squares) / 400 == pytest.approx(float(g @ h @ g), rel=0.05)
    assert theta.grad is None


def test_curvature_that_is_not_positive_gives_no_value() -> None:
    theta = nn.Parameter(torch.ones(2))
    losses = [lambda k=k: -(theta.square().sum()) + k * theta[0] for k in range(2)]
    found = curvature_noise_scale(losses, [theta], batch_size=1)
    assert found.value is None
    assert "not positive" in str(found)
    with pytest.raises(ValueError, match="1 batches of batch_size=4"):
        curvature_noise_scale(losses[:1], [theta], batch_size=4)


# -- rules -------------------------------------------------------------------------------------------------------------


def test_rules_agree_where_they_should() -> None:
    for rule in ("linear", "sqrt", "noise", "surge"):
        assert batch_factor(64, 64, rule, noise_scale=100.0) == 1.0
    assert batch_factor(2, 1, "noise", 1e9) == pytest.approx(2)  # far below the noise scale
    assert batch_factor(4, 1, "surge", 1e9) == pytest.approx(2)
    assert batch_factor(1e9, 1e8, "noise", 1.0) == pytest.approx(1)
    assert batch_factor(400, 100, "surge", 100.0) == pytest.approx(0.8)  # 2 / (1/2 + 2), of 1 at the noise scale


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ((0, 64, "sqrt"), "batch=0, base=64: both must be positive"),
        ((8, 64, "cube"), "rule='cube' must be one of 'linear', 'sqrt', 'noise', 'surge'"),
        ((8, 64, "noise"), "rule='noise' needs noise_scale"),
        ((8, 64, "surge", -1.0), "and got -1.0"),
    ],
)
def test_wrong_rules(args: tuple[float, float, str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        batch_factor(*args)  # type: ignore[arg-type]


def test_the_critical_batch_size_is_found_from_noisy_runs() -> None:
    made = torch.Generator().manual_seed(0)
    batches = [8, 16, 32, 64, 128, 256, 512]
    steps = [500 * (1 + 90 / b) * float(1 + 0.02 * torch.randn((), generator=made)) for b in batches]
    found = fit_critical_batch(batches, steps)
    assert found.size == pytest.approx(90, rel=0.1)
    assert found.steps_at(found.size) == pytest.approx(2 * found.steps)
    with pytest.raises(ValueError, match="steps must fall as batches grow"):
        fit_critical_batch([8, 16], [100, 200])
    with pytest.raises(ValueError, match="for two sizes at least"):
        fit_critical_batch([8, 8], [100, 100])
    with pytest.raises(ValueError, match="all must be positive"):
        fit_critical_batch([8, 16], [100, 0])
