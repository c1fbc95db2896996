"""Every named schedule agrees with its closed form at each step, in optimizer steps and in tokens."""

from __future__ import annotations

import math
from itertools import accumulate

import pytest
import torch
from small_optimizers import driven, make

from guided_descent import schedules
from guided_descent.schedules import Tokens, curves

pytestmark = pytest.mark.filterwarnings("error::UserWarning", "error::RuntimeWarning")

T, W = 60, 10


def after(t, form, warmup=W, total=T):
    """The warmup, then ``form`` of the share p of what follows."""
    return (t + 1) / warmup if t < warmup else form((t - warmup) / (total - warmup))


def cool(t, form, start=45, total=T, warmup=W):
    return min(1, (t + 1) / warmup) if t < start else form((t - start) / (total - start))


def wave(p):
    return (1 - math.cos(math.pi * p)) / 2


def in_the_last(t, trunk, steps, form):
    start = T - steps
    return trunk(t) if t < start else trunk(start) * form((t - start) / steps)


def root(t):
    return min((t + 1) / W, math.sqrt(W / (t + 1)))


def law(t):
    return (t + 1) / W if t < W else min(1, ((t + 1) / 20) ** -0.51)


#: name: (what builds it, the factor at step t)
FORMS = {
    "constant": (lambda o, n: schedules.constant(o, n(T), warmup=n(W)), lambda t: min(1, (t + 1) / W)),
    "cosine": (
        lambda o, n: schedules.cosine(o, n(T), warmup=n(W), floor=0.1),
        lambda t: after(t, lambda p: 0.1 + 0.9 * (1 + math.cos(math.pi * p)) / 2),
    ),
    "linear": (lambda o, n: schedules.linear(o, n(T), warmup=n(W)), lambda t: after(t, lambda p: 1 - p)),
    "polynomial": (
        lambda o, n: schedules.polynomial(o, n(T), power=1.5, warmup=n(W), floor=0.2),
        lambda t: after(t, lambda p: 0.2 + 0.8 * (1 - p) ** 1.5),
    ),
    "rex": (lambda o, n: schedules.rex(o, n(T), warmup=n(W)), lambda t: after(t, lambda p: (1 - p) / (1 - p / 2))),
    "exponential": (
        lambda o, n: schedules.exponential(o, n(T), end=0.05, warmup=n(W)),
        lambda t: after(t, lambda p: 0.05**p),
    ),
    "half life": (
        lambda o, n: schedules.exponential(o, n(T), half_life=n(5)),
        lambda t: 0.5 ** (t / 5),
    ),
    "step": (
        lambda o, n: schedules.step(o, n(T), every=n(15), ratio=0.3, warmup=n(W)),
        lambda t: (t + 1) / W if t < W else 0.3 ** ((t - W) // 15),
    ),
    "restarts": (
        lambda o, n: schedules.restarts(o, n(T), period=n(5), mult=3, warmup=n(W), floor=0.1),
        lambda t: (t + 1) / W if t < W else 0.1 + 0.9 * (1 - wave(cycle(t - W, 5, 3))),
    ),
    "wsd": (
        lambda o, n: schedules.wsd(o, n(T), warmup=n(W), cooldown=0.25),
        lambda t: cool(t, lambda q: 1 - math.sqrt(q)),
    ),
    "trapezoid": (lambda o, n: schedules.trapezoid(o, n(T)), lambda t: cool(t, lambda q: 1 - q + 0.15 * q, 24, T, 1)),
    "inverse_sqrt": (
        lambda o, n: schedules.inverse_sqrt(o, n(T), warmup=n(W), cooldown=n(12)),
        lambda t: in_the_last(t, root, 12, lambda q: 1 - q),
    ),
    "inverse_sqrt to the end": (lambda o, n: schedules.inverse_sqrt(o, n(T), warmup=n(W)), root),
    "power": (
        lambda o, n: schedules.power(o, n(T), timescale=n(20), warmup=n(W), cooldown=n(6), shape="cosine"),
        lambda t: in_the_last(t, law, 6, lambda q: 1 - wave(q)),
    ),
    "one_cycle": (
        lambda o, n: schedules.one_cycle(o, n(T), rise=n(20), momentum=None),
        lambda t: 0.04 + 0.96 * wave(t / 20) if t < 20 else 4e-6 + (1 - 4e-6) * (1 - wave((t - 20) / 40)),
    ),
}


def cycle(t, period, mult):
    while t >= period:
        t, period = t - period, period * mult
    return t / period


def test_every_one_is_here():
    built = {name.split()[0] for name in FORMS} | {"half", "noam"}
    named = {n for n in schedules.__all__ if n[0].islower()} - {"accepted_steps", "branch", "curves", "sketch"}
    assert built - {"half"} == named - {"power_timescale"}


@pytest.mark.parametrize("tensor", [False, True])
@pytest.mark.parametrize("name", FORMS)
def test_closed_form_at_each_step(name, tensor):
    build, form = FORMS[name]
    opt = make(tensor=tensor)
    schedule = build(opt, lambda steps: steps)
    seen = driven(opt, schedule, T)
    assert seen == pytest.approx([0.5 * form(t) for t in range(T)], abs=1e-7)
    schedule.finish()


@pytest.mark.parametrize("name", FORMS)
def test_in_tokens_the_same_as_in_steps(name):
    """With a batch that does not change, lengths times its tokens give every step the rate that steps give."""
    build, form = FORMS[name]
    opt = make()

    def tokens(steps):
        return Tokens(steps * 512, per_step=512) if steps == T else steps * 512

    schedule = build(opt, tokens)
    seen = driven(opt, schedule, T)
    # a law is read after the tokens of a step, a cooldown begins from what it was before its first
    bar = 2e-2 if name in ("power", "inverse_sqrt") else 1e-12
    assert seen == pytest.approx([0.5 * form(t) for t in range(T)], rel=bar)
    schedule.finish()


PLAN = {0: 100, 7: 300, 19: 450}


@pytest.mark.parametrize("name", ["cosine", "linear", "rex", "polynomial", "exponential"])
def test_tokens_of_a_growing_batch(name):
    """p is a share of the tokens, whatever the steps in which they come."""
    opt = make()
    total, warmup = 20_000, 1_000
    schedule = getattr(schedules, name)(opt, Tokens(total, per_step=PLAN), warmup=warmup)
    shapes = {
        "cosine": lambda p: (1 + math.cos(math.pi * p)) / 2,
        "linear": lambda p: 1 - p,
        "rex": lambda p: (1 - p) / (1 - p / 2),
        "polynomial": lambda p: (1 - p) ** 2,
        "exponential": lambda p: 0.01**p,
    }
    sizes = [max((first, n) for first, n in PLAN.items() if first <= t)[1] for t in range(100)]
    seen = [0, *accumulate(sizes)]
    steps = next(t for t in range(100) if seen[t] >= total)
    for t in range(steps):
        n = seen[t]
        factor = min(1, (n + sizes[t]) / warmup) if n < warmup else shapes[name]((n - warmup) / (total - warmup))
        assert opt.param_groups[0]["lr"] == pytest.approx(0.5 * factor, rel=1e-12)
        opt.step()
        schedule.step()
    assert schedule.planned == steps
    schedule.finish()
    opt.step()
    with pytest.warns(RuntimeWarning, match=f"step {steps + 1} lies beyond the schedule's {steps}"):
        schedule.step()
    with pytest.raises(RuntimeError, match=f"They saw {seen[steps + 1]} tokens"):
        schedule.finish()


@pytest.mark.parametrize("shape", [*curves.COOLDOWNS, curves.linear], ids=[*curves.COOLDOWNS, "a curve"])
def test_every_shape_of_a_cooldown(shape):
    forms = {
        "one_minus_sqrt": lambda q: 1 - math.sqrt(q),
        "linear": lambda q: 1 - q,
        "cosine": lambda q: 1 - wave(q),
        "mirror_cosine": lambda q: 2 * (1 - q) - (1 - wave(q)),
        "one_minus_square": lambda q: 1 - q**2,
        "exponential": lambda q: 0.01**q,
        "polynomial": lambda q: (1 - q) ** 2,
        "rex": lambda q: (1 - q) / (1 - q / 2),
    }
    form = forms[shape if isinstance(shape, str) else shape.__name__]
    opt = make()
    seen = driven(opt, schedules.wsd(opt, T, warmup=W, cooldown=15, shape=shape, floor=0.1), T)
    assert seen == pytest.approx([0.5 * cool(t, lambda q: 0.1 + 0.9 * form(q)) for t in range(T)], abs=1e-12)


def test_noam():
    opt = make((2.0,))
    schedule = schedules.noam(opt, width=512, warmup=25)
    seen = driven(opt, schedule, 200)
    expected = [2 * 512**-0.5 * min((t + 1) ** -0.5, (t + 1) * 25**-1.5) for t in range(200)]
    assert seen == pytest.approx(expected, rel=1e-12)
    ending = schedules.noam(make((2.0,)), 100, width=512, warmup=25, cooldown=10)
    assert repr(ending.curve).endswith("* linear(10)")
    assert ending.curve(90) == pytest.approx(512**-0.5 * 91**-0.5)


def test_the_rates_of_torchs_one_cycle():
    """Its last step, which lies at the end of the curve, is one more than ours, which stays just above it."""
    steps, up = 50, 15
    opt, other = make((0.3,), momentum=0.9), make((0.3,), cls=torch.optim.SGD, momentum=0.9)
    ours = schedules.one_cycle(opt, steps, rise=up)
    theirs = torch.optim.lr_scheduler.OneCycleLR(
        other,
        max_lr=0.3,
        total_steps=steps + 1,
        pct_start=(up + 1) / (steps + 1),
        base_momentum=0.85,
        max_momentum=0.95,
    )
    for _ in range(steps):
        for key in ("lr", "momentum"):
            assert opt.param_groups[0][key] == pytest.approx(other.param_groups[0][key], rel=1e-9)
        for o, s in ((opt, ours), (other, theirs)):
            o.step()
            s.step()
    ours.finish()


@pytest.mark.parametrize("tensor", [False, True])
def test_the_first_of_betas_is_cycled(tensor):
    groups = make(cls=torch.optim.SGD).param_groups
    opt = torch.optim.AdamW([{"params": group["params"]} for group in groups], lr=0.1, betas=(0.9, 0.99))
    schedule = schedules.one_cycle(opt, 40, rise=0.5, momentum=(0.8, 0.92))
    seen = []
    for _ in range(40):
        seen.append(opt.param_groups[1]["betas"])
        opt.step()
        schedule.step()
    assert [second for _, second in seen] == [0.99] * 40
    expected = [0.92 - 0.12 * wave(t / 20) if t < 20 else 0.8 + 0.12 * wave((t - 20) / 20) for t in range(40)]
    assert [first for first, _ in seen] == pytest.approx(expected)


def test_stages_of_a_trapezoid():
    opt = make((1.0,))
    schedule = schedules.trapezoid(opt, 100, warmup=10, cooldown=0.4, floor=0.2, stages={20: 1.5, 45: 1.8})
    assert repr(schedule.curve) == (
        f"warmup(10) >> constant(10) >> 1.5 * constant(25) >> 1.8 * constant(15) >> 1.8 * linear(40, floor={0.2 / 1.8})"
    )
    seen = driven(opt, schedule, 100)
    for t in range(60):
        assert seen[t] == pytest.approx((t + 1) / 10 if t < 10 else 1 if t < 20 else 1.5 if t < 45 else 1.8)
    for t in range(60, 100):
        q = (t - 60) / 40
        assert seen[t] == pytest.approx(1.8 * (1 - q) + 0.2 * q)
    whole = schedules.trapezoid(make((1.0,)), 100, cooldown=40, floor=0, stages={0: 2.0})
    assert repr(whole.curve) == "2.0 * constant(60) >> 2.0 * linear(40)"


def test_the_timescale_of_the_power_law():
    for lr, batch, a, b in [(0.02, 128, 4.6, -0.51), (0.3, 2.5, 0.7, -0.25)]:
        n = schedules.power_timescale(lr, batch, a=a, exponent=b)
        assert batch * a * n**b == pytest.approx(lr)
    n = schedules.power_timescale(0.02, 128)
    for seen in (1e7, 1e8, 1e9, 1e10):
        factor = curves.power(n)(int(seen) - 1)
        assert 0.02 * factor == pytest.approx(min(0.02, 128 * 4.6 * seen**-0.51))


@pytest.mark.parametrize(
    ("build", "match"),
    [
        (lambda o: schedules.linear(o, Tokens(per_step=5)), "the run needs a length"),
        (lambda o: schedules.wsd(o, 10, shape="sqrt"), "shape='sqrt': must be one of 'one_minus_sqrt'"),
        (lambda o: schedules.wsd(o, 10, shape=lambda n, floor: curves.linear(n + 1)), "a Curve of that length"),
        (lambda o: schedules.wsd(o, 10, shape=lambda n, floor: 1.0), "a Curve of that length"),
        (lambda o: schedules.inverse_sqrt(o, 10, warmup=0), "warmup=0"),
        (lambda o: schedules.inverse_sqrt(o, warmup=5, cooldown=3), "cooldown=3: a cooldown needs total_steps"),
        (lambda o: schedules.inverse_sqrt(o, 10, warmup=5, cooldown=6), "do not fit into total_steps=10"),
        (lambda o: schedules.noam(o, width=0, warmup=3), "width=0"),
        (lambda o: schedules.power(o, 10, timescale=-1), "timescale=-1"),
        (lambda o: schedules.one_cycle(o, 10, rise=10), "rise=10 is 10 steps"),
        (lambda o: schedules.one_cycle(o, 10, momentum=(0.9, 0.8)), r"momentum=\(0\.9, 0\.8\)"),
        (lambda o: schedules.one_cycle(o, 10), "no group has a momentum or a first beta above 0"),
        (lambda o: schedules.one_cycle(o, 10, start=2), "floor=2"),
        (lambda o: schedules.trapezoid(o, 10, stages={5: 2.0}), "5 is outside the stable part, from 0 to below 4"),
        (lambda o: schedules.trapezoid(o, 10, stages={1: 0.0}), r"0\.0 must be a multiplier above 0"),
        (lambda o: schedules.step(o, 10, every=0), "every=0"),
        (lambda o: schedules.step(o, every=0.1), "needs total_steps"),
        (lambda o: schedules.restarts(o, 10, period=0), "period=0"),
        (lambda o: schedules.exponential(o, 10, end=0.1, half_life=3), "at most one"),
        (lambda o: schedules.power_timescale(0.1, -1), "batch=-1"),
    ],
)
def test_impossible_settings_say_why(build, match):
    with pytest.raises(ValueError, match=match):
        build(make())


def test_a_momentum_of_zero_stays_where_it_is():
    p, q = (torch.nn.Parameter(torch.ones(2)) for _ in range(2))
    opt = torch.optim.AdamW([{"params": [p], "betas": (0.0, 0.9)}, {"params": [q]}], lr=0.1)
    schedule = schedules.one_cycle(opt, 20)
    assert opt.param_groups[1]["betas"] == (0.95, 0.999)
    with pytest.raises(ValueError, match="no group has a momentum or a first beta above 0"):
        schedules.one_cycle(torch.optim.AdamW([p], betas=(0.0, 0.9)), 20)
    opt.step()
    schedule.step()
    assert opt.param_groups[0]["betas"] == (0.0, 0.9)
