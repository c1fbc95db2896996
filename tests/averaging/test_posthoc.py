"""Averages made after training equal those that were tracked; profiles have the widths of the paper."""

from __future__ import annotations

import math
import warnings

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from random_walks import Counting, close, net, through_file, walk, walked
from torch import nn

from guided_descent.averaging import (
    PostHocEMA,
    PowerEMA,
    evaluating,
    export,
    gamma_to_sigma,
    sigma_to_gamma,
    synthesize,
)
from guided_descent.averaging.posthoc import coefficients

pytestmark = pytest.mark.filterwarnings("error::RuntimeWarning")


@pytest.mark.parametrize(("sigma", "gamma"), [(0.05, 16.972), (0.10, 6.937), (0.15, 3.558), (0.20, 1.826)])
def test_published_exponents(sigma, gamma):
    assert sigma_to_gamma(sigma) == pytest.approx(gamma, abs=5e-4)


@given(st.floats(1e-5, 0.2886))
def test_width_and_exponent_are_inverse(sigma):
    gamma = sigma_to_gamma(sigma)
    assert gamma_to_sigma(gamma) == pytest.approx(sigma, rel=1e-12)
    cubic = gamma**3 + 7 * gamma**2 + (16 - sigma**-2) * gamma + 12 - sigma**-2
    assert abs(cubic) <= 1e-9 * (gamma + 1) ** 3
    assert sigma_to_gamma(1 / math.sqrt(12)) == pytest.approx(0, abs=1e-9)


@pytest.mark.parametrize("gamma", [0.0, 1.0, 6.937])
def test_sigma_is_the_relative_width_of_the_average(gamma):
    """Weights that are the step, and its square: the average holds the moments of the profile."""
    model, steps = nn.Linear(2, 1, bias=False).double(), 4000
    average = PowerEMA(model, gamma=gamma)
    for t in range(1, steps + 1):
        with torch.no_grad():
            model.weight.copy_(torch.tensor([[t / steps, (t / steps) ** 2]]))
        average.update()
    mean, square = average.evaluation_weights(model)["weight"].flatten().tolist()
    assert mean == pytest.approx((gamma + 1) / (gamma + 2), abs=1e-3)
    assert math.sqrt(square - mean**2) == pytest.approx(average.sigma, rel=1e-3)


TARGETS = (0.03, 0.04, 0.06, 0.075, 0.12, 0.15, 0.2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_is_made_is_what_would_have_been_tracked(dtype):
    """A thousand steps and a hundred snapshots; of the weights' norm, to 1e-4."""
    torch.manual_seed(0)
    model, generator = nn.Linear(8, 6).to(dtype), torch.Generator().manual_seed(1)
    tracked = PostHocEMA(model, every=10)
    direct = {sigma: PowerEMA(model, sigma=sigma, dtype=torch.float64) for sigma in (*TARGETS, 0.05, 0.1)}
    earlier = {}
    for t in range(1, 1001):
        walk(model, generator)
        for average in (tracked, *direct.values()):
            average.update()
        if t == 640:
            earlier = {sigma: average.snapshot()["weights"] for sigma, average in direct.items()}
    for sigma, average in direct.items():
        for at, expected in ((None, average.evaluation_weights(model)), (640, earlier[sigma])):
            made = tracked.synthesize(sigma=sigma, at=at)
            assert sum(made.coefficients) == pytest.approx(1, abs=1e-12)
            for name, tensor in made.weights.items():
                assert tensor.dtype == torch.float32
                assert (tensor.double() - expected[name]).norm() < 1e-4 * expected[name].norm(), (sigma, at, name)
    sigma = 0.05  # one that was tracked comes out as itself
    made = tracked.synthesize(sigma=sigma)
    assert made.error < 1e-6
    close(made.weights, direct[sigma].evaluation_weights(model), 1e-5)


def dense(profile, n=200_000):
    ticks, gamma = profile
    s = (torch.arange(n, dtype=torch.float64) + 0.5) / n * 500
    return torch.where(s < ticks, (gamma + 1) / ticks * (s / ticks) ** gamma, 0.0)


def test_coefficients_are_least_squares_of_the_profiles():
    """Against profiles on a grid, solved densely."""
    profiles = [(t, g) for t in (100, 220, 350, 500) for g in (16.972, 6.937)]
    target = (430, 4.2)
    found, error = coefficients(profiles, target)
    rows = torch.stack([dense(p) for p in profiles], 1)
    want = dense(target)
    solved = torch.linalg.lstsq(rows, want[:, None]).solution.flatten()
    solved = solved / solved.sum()
    assert found == pytest.approx(solved.tolist(), rel=1e-3, abs=1e-4)
    assert error == pytest.approx(float((rows @ solved - want).norm() / want.norm()), rel=1e-3)


def test_the_same_snapshot_twice_is_no_obstacle():
    found, _ = coefficients([(100, 6.0), (100, 6.0), (50, 6.0)], (100, 6.0))
    assert found == pytest.approx([0.5, 0.5, 0.0], abs=1e-9)


def test_too_few_snapshots_are_noticed():
    model = net()
    tracked = PostHocEMA(model, every=50)
    walked(model, [tracked], 100)
    with pytest.warns(RuntimeWarning, match=r"sigma=0\.01 at 100 steps is met to .* by 4 snapshots: take them more"):
        assert tracked.synthesize(sigma=0.01).error > 0.05


def test_files_give_what_memory_gives_and_survive_a_resume(tmp_path):
    model, other = net(), net()
    memory, folder = PostHocEMA(model, every=7), PostHocEMA(other, tmp_path / "snaps", every=7)
    walked(model, [memory], 60)
    generator = torch.Generator().manual_seed(1)
    saved = {}
    for t in range(1, 61):
        walk(other, generator)
        folder.update()
        if t == 30:
            saved = through_file(
                {"average": folder.state_dict(), "model": other.state_dict(), "rng": generator.get_state()}
            )
    assert [path.name for path in folder.snapshots][:2] == [
        "steps-00000007-sigma-0.05.pt",
        "steps-00000007-sigma-0.1.pt",
    ]
    assert sorted(p.name for p in (tmp_path / "snaps").iterdir()) == sorted(p.name for p in folder.snapshots)
    assert len(folder.snapshots) == len(memory.snapshots) == 2 * 8
    expected = memory.synthesize(sigma=0.12)
    close(folder.synthesize(sigma=0.12).weights, expected.weights, 0)

    again = net()
    again.load_state_dict(saved["model"])
    resumed = PostHocEMA(again, tmp_path / "snaps", every=7)
    resumed.load_state_dict(saved["average"])
    assert len(resumed.snapshots) == 2 * 4  # later files do not count
    generator.set_state(saved["rng"])
    for _ in range(30):
        walk(again, generator)
        resumed.update()
    close(resumed.synthesize(sigma=0.12).weights, expected.weights, 0)
    close(synthesize(sorted(map(str, folder.snapshots)), sigma=0.12).weights, expected.weights, 1e-6)


def test_a_made_average_is_a_source(tmp_path):
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))
    tracked = PostHocEMA(model, tmp_path, every=5, buffers=True)
    reference = PowerEMA(model, sigma=0.1, buffers=True)
    for i in range(40):
        model(torch.randn(8, 3, generator=torch.Generator().manual_seed(i)))
        tracked.update()
        reference.update()
    made = tracked.synthesize(gamma=reference.gamma)
    live = model[1].running_mean.clone()
    with evaluating(model, reference, "average"):
        expected = model[1].running_mean.clone()
    with evaluating(model, made, "average"):
        torch.testing.assert_close(model[1].running_mean, expected)
    assert torch.equal(model[1].running_mean, live)
    assert set(export(model, made, "live")) == set(model.state_dict())
    plain = PostHocEMA(model, every=5)
    for _ in range(10):
        plain.update()
    with (
        pytest.raises(ValueError, match="these snapshots hold no buffers"),
        evaluating(model, plain.synthesize(sigma=0.1), "average"),
    ):
        pytest.fail("the body must not run")


def test_complex_and_double_weights():
    model = nn.ParameterDict({"z": torch.ones(3, dtype=torch.complex64) * 1j, "d": torch.ones(2, dtype=torch.float64)})
    tracked, reference = PostHocEMA(model, every=2), PowerEMA(model, sigma=0.1)
    for _ in range(20):
        with torch.no_grad():
            for p in model.values():
                p.mul_(1.1)
        tracked.update()
        reference.update()
    made = tracked.synthesize(sigma=0.1).weights
    assert made["z"].dtype == torch.complex64
    close({"d": made["d"]}, {"d": reference.evaluation_weights(model)["d"]}, 1e-6)
    torch.testing.assert_close(made["z"], reference.evaluation_weights(model)["z"])


def test_skipped_steps_and_late_calls():
    model = net()
    opt = Counting(model.parameters(), lr=0.1)
    tracked = PostHocEMA(model, every=10, optimizer=opt)
    for steps in (4, 0, 5, 3, 20):  # the tenth step lies in the fourth call, the 20th and 30th in the fifth
        opt.steps += steps
        tracked.update()
    assert [s["ticks"] for s in tracked.snapshots] == [12, 12, 32, 32]


def test_what_does_not_fit_says_why(tmp_path):
    model = net()
    tracked = PostHocEMA(model, every=5)
    with pytest.raises(ValueError, match="there are no snapshots"):
        tracked.synthesize(sigma=0.1)
    with pytest.raises(RuntimeError, match="nothing to take a snapshot of"):
        PowerEMA(model, sigma=0.1).snapshot()
    walked(model, [tracked], 20)
    with pytest.raises(ValueError, match="at=21 lies after the last snapshot, which is over 20 steps"):
        tracked.synthesize(sigma=0.1, at=21)
    with pytest.raises(ValueError, match="at=0"):
        tracked.synthesize(sigma=0.1, at=0)
    with pytest.raises(ValueError, match="exactly one"):
        tracked.synthesize()
    other = PowerEMA(nn.Linear(2, 2), sigma=0.1)
    other.update()
    with warnings.catch_warnings(), pytest.raises(ValueError, match="unknown: bias, weight"):
        warnings.simplefilter("ignore")
        synthesize([*tracked.snapshots, other.snapshot()], sigma=0.1)
    with pytest.raises(ValueError, match="is no snapshot"):
        synthesize([tracked.state_dict()], sigma=0.1)
    with pytest.raises(ValueError, match="snapshot is of format 9"):
        synthesize([tracked.snapshots[0] | {"format": 9}], sigma=0.1)
    for sigmas in ((), (0.1, 0.1), (0.1, 0.100001)):
        with pytest.raises(ValueError, match="sigmas="):
            PostHocEMA(model, every=5, sigmas=sigmas)
    with pytest.raises(ValueError, match="every=0"):
        PostHocEMA(model, every=0)

    state = tracked.state_dict()
    files = PostHocEMA(model, tmp_path, every=5)
    for target, held, match in [
        (files, state, r"the saved snapshots are in memory, and folder="),
        (tracked, state | {"snapshots": ["steps-1.pt"]}, "the saved snapshots are files, and folder=None"),
        (files, state | {"snapshots": ["steps-1.pt"]}, r"steps-1\.pt is gone"),
        (tracked, state | {"every": 6}, "a snapshot every 6 steps, this one 2 and 5"),
        (tracked, state | {"kind": "EMA"}, "kind 'EMA'"),
        (tracked, state | {"format": 2}, "is of format 2"),
        (others := PostHocEMA(model, every=5, sigmas=(0.05, 0.2)), state, "made with {'gamma': 6.93"),
    ]:
        with pytest.raises(ValueError, match=match):
            target.load_state_dict(held)
    assert all(average.steps == 0 for average in (*files.averages, *others.averages))
