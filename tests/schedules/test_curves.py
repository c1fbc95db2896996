"""Curves equal their closed forms at every step, join where they should and refuse what makes no sense."""

from __future__ import annotations

import math
import pickle

import pytest
from hypothesis import given
from hypothesis import strategies as st

from guided_descent.schedules import curves

lengths = st.integers(1, 300)
floors = st.floats(0, 1)


@given(lengths)
def test_warmup_rises_from_one_share_to_the_peak(n):
    curve = curves.warmup(n)
    assert [curve(t) for t in range(n)] == pytest.approx([(t + 1) / n for t in range(n)], abs=1e-15)
    assert curve(0) > 0
    assert curve(n - 1) == 1


DECAYS = {
    curves.linear: lambda p: 1 - p,
    curves.cosine: lambda p: (1 + math.cos(math.pi * p)) / 2,
    curves.one_minus_sqrt: lambda p: 1 - math.sqrt(p),
    curves.one_minus_square: lambda p: 1 - p**2,
    curves.mirror_cosine: lambda p: 2 * (1 - p) - (1 + math.cos(math.pi * p)) / 2,
    curves.exponential: lambda p: 0.01**p,
    curves.polynomial: lambda p: (1 - p) ** 2,
    curves.rex: lambda p: (1 - p) / (1 - 0.5 * p),
}
makers = st.sampled_from(list(DECAYS))


def test_every_cooldown_is_among_them():
    assert set(curves.COOLDOWNS.values()) == set(DECAYS)


@given(lengths, floors)
def test_decays_equal_their_closed_forms(n, floor):
    for make, form in DECAYS.items():
        curve = make(n, floor=floor)
        expected = [floor + (1 - floor) * form(t / n) for t in range(n)]
        assert [curve(t) for t in range(n)] == pytest.approx(expected, abs=1e-12)
        assert curve(0) == pytest.approx(1, abs=1e-15)


@pytest.mark.parametrize("make", DECAYS)
@pytest.mark.parametrize("n", [1, 2, 10, 10_000_000])
def test_the_last_step_is_just_above_zero_and_is_held(make, n):
    curve = make(n)
    tends_to = 0.01 if make is curves.exponential else 0
    assert tends_to < curve(n - 1) <= tends_to + 2.1 / math.sqrt(n)
    assert curve(n) == curve(n + 1000) == curve(n - 1)


@given(lengths, lengths, lengths)
def test_chains_place_each_curve_at_its_own_start(a, b, c):
    chain = curves.warmup(a) >> curves.constant(b) >> curves.linear(c)
    assert chain.length == a + b + c
    parts = [curves.warmup(a), curves.constant(b), curves.linear(c)]
    assert [chain(t) for t in range(a + b + c)] == [p(t) for p in parts for t in range(p.length)]
    assert chain == curves.warmup(a) >> (curves.constant(b) >> curves.linear(c))
    assert pickle.loads(pickle.dumps(chain)) == chain


def test_an_endless_curve_may_only_come_last():
    curve = curves.warmup(3) >> curves.constant()
    assert curve.length is None
    assert curve(10**9) == 1
    with pytest.raises(ValueError, match=r"constant\(\) has no end"):
        curve >> curves.linear(3)


def test_a_curve_of_ones_own_joins():
    class InverseSqrt(curves.Curve):
        length = None

        def factor(self, step):
            return 1 / math.sqrt(step + 1)

    curve = curves.warmup(2) >> InverseSqrt()
    assert [curve(t) for t in (0, 1, 2, 5)] == [0.5, 1, 1, 0.5]
    with pytest.raises(TypeError):
        curve >> (lambda t: 1.0)


@pytest.mark.parametrize("steps", [0, -1, 2.0, True, "3"])
@pytest.mark.parametrize("make", [curves.warmup, curves.rise, curves.constant, *DECAYS])
def test_lengths_must_be_positive_integers(make, steps):
    with pytest.raises(ValueError, match="positive integer"):
        make(steps)


@pytest.mark.parametrize("floor", [-0.1, 1.5, math.nan])
def test_floors_are_shares(floor):
    with pytest.raises(ValueError, match=r"floor=.*\[0, 1\]"):
        curves.cosine(10, floor=floor)


@given(lengths, floors, st.sampled_from(["linear", "cosine"]))
def test_rises_equal_their_closed_forms(n, floor, shape):
    form = {"linear": lambda p: p, "cosine": lambda p: (1 - math.cos(math.pi * p)) / 2}[shape]
    for make, lead in ((curves.warmup, 1), (curves.rise, 0)):
        curve = make(n, floor=floor, shape=shape)
        expected = [floor + (1 - floor) * form((t + lead) / n) for t in range(n)]
        assert [curve(t) for t in range(n)] == pytest.approx(expected, abs=1e-12)
    assert curves.warmup(n, floor=floor, shape=shape)(n - 1) == pytest.approx(1, abs=1e-15)
    assert curves.rise(n, floor=floor, shape=shape)(0) == floor


@given(lengths, st.floats(0.1, 5), st.floats(1e-6, 1), st.floats(0.5, 1000))
def test_numbers_of_shapes(n, power, end, half_life):
    times = range(n)
    assert [curves.polynomial(n, power=power)(t) for t in times] == pytest.approx([(1 - t / n) ** power for t in times])
    assert [curves.exponential(n, end=end)(t) for t in times] == pytest.approx([end ** (t / n) for t in times])
    halves = [0.5 ** (t / half_life) for t in times]
    assert [curves.exponential(n, half_life=half_life)(t) for t in times] == pytest.approx(halves, rel=1e-9)


@given(st.integers(1, 100), st.integers(0, 3000))
def test_inverse_sqrt_after_its_warmup_is_vaswanis(n, t):
    curve = curves.warmup(n) >> curves.inverse_sqrt(n)
    assert curve(t) == pytest.approx(min((t + 1) / n, math.sqrt(n / (t + 1))), abs=1e-15)
    width = 512
    noam = (width * n) ** -0.5 * curve
    assert noam(t) == pytest.approx(width**-0.5 * min((t + 1) ** -0.5, (t + 1) * n**-1.5), rel=1e-12)


@given(st.floats(1, 500), st.floats(-2, -0.1), st.integers(0, 100), st.integers(0, 3000))
def test_power_law(timescale, exponent, offset, t):
    curve = curves.power(timescale, exponent=exponent, offset=offset)
    assert curve(t) == pytest.approx(min(1, ((t + 1 + offset) / timescale) ** exponent))


@given(st.floats(0, 1), st.integers(1, 20), st.integers(0, 200))
def test_stairs(ratio, every, t):
    assert curves.step(ratio, every=every)(t) == ratio ** (t // every)
    assert curves.step(ratio)(t) == ratio**t


@given(st.integers(1, 30), st.integers(1, 3), floors)
def test_restarts(period, mult, floor):
    curve = curves.restarts(period, mult=mult, floor=floor)
    expected = []
    for i in range(6):
        cycle = period * mult**i
        expected += [floor + (1 - floor) * (1 + math.cos(math.pi * s / cycle)) / 2 for s in range(cycle)]
    assert [curve(t) for t in range(len(expected))] == pytest.approx(expected, abs=1e-12)


ENDLESS = [
    curves.constant(),
    curves.inverse_sqrt(7),
    curves.power(5.5, offset=3),
    curves.powers(0.9, every=3, patience=2),
    curves.powers(0.9, rising=True),
    curves.step(0.5, every=4),
    curves.restarts(3, mult=2, floor=0.1),
]


@pytest.mark.parametrize("curve", ENDLESS, ids=repr)
def test_what_is_endless_may_be_cut_anywhere(curve):
    assert curve.length is None
    for scaled in (curve, 0.5 * curve):
        cut = scaled.lasting(20)
        assert cut.length == 20
        assert [cut(t) for t in range(20)] == [scaled(t) for t in range(20)]
        assert cut(25) == scaled(19)
        assert cut.lasting(None) == scaled
        assert curves.parse(repr(cut)) == cut
    with pytest.raises(ValueError, match="positive integer"):
        curve.lasting(0)


@pytest.mark.parametrize("make", [curves.warmup, *DECAYS])
def test_what_is_stretched_may_not(make):
    with pytest.raises(ValueError, match=r"\(9.*\) is stretched over its length"):
        make(9).lasting(10)


@given(makers, st.floats(0, 3), st.floats(0, 3))
def test_scaling(make, a, b):
    curve, n = curves.warmup(3) >> make(5), 8
    scaled = a * curve
    assert scaled.length == n
    assert [scaled(t) for t in range(n)] == [a * curve(t) for t in range(n)]
    assert [(b * scaled)(t) for t in range(n)] == pytest.approx([b * a * curve(t) for t in range(n)])
    assert curves.parse(repr(scaled)) == scaled == curve * a
    with pytest.raises(TypeError):
        curve * curve
    with pytest.raises(ValueError, match=r"-1\.0 \* warmup"):
        -1 * curve


@given(st.integers(1, 50), st.integers(1, 20), makers, st.integers(1, 40))
def test_a_step_over_many_units_scales_with_them(steps, decay, make, width):
    """With b tokens in each step, curves of b times the length give every step the factor that steps give."""
    in_steps = curves.warmup(steps) >> curves.constant(2) >> make(decay) >> curves.rise(3)
    b = width
    in_tokens = curves.warmup(steps * b) >> curves.constant(2 * b) >> make(decay * b) >> curves.rise(3 * b)
    for t in range(steps + decay + 5):
        assert in_tokens(t * b, b) == pytest.approx(in_steps(t), abs=1e-12)
    law, laws = curves.inverse_sqrt(steps), curves.inverse_sqrt(steps * b)
    assert [laws(t * b, b) for t in range(50)] == pytest.approx([law(t) for t in range(50)], abs=1e-12)


def test_a_step_that_ends_after_its_curve_has_the_curves_last_value():
    curve = curves.warmup(10) >> curves.constant(5) >> curves.linear(10)
    assert [curve(t, 4) for t in (0, 4, 8, 12, 16, 20, 24)] == pytest.approx([0.4, 0.8, 1, 1, 0.9, 0.5, 0.1])


def some_curves():
    segment = st.one_of(
        st.builds(lambda make, n, floor: make(n, floor=floor), makers, lengths, floors),
        st.builds(curves.warmup, lengths, floor=floors, shape=st.sampled_from(["linear", "cosine"])),
        st.builds(curves.constant, lengths),
        st.builds(curves.exponential, lengths, end=st.floats(1e-9, 1)),
        st.sampled_from(ENDLESS).map(lambda curve: curve.lasting(7)),
    )
    scaled = st.builds(lambda by, curve: by * curve, st.floats(0, 9), segment)
    return st.lists(st.one_of(segment, scaled), min_size=1, max_size=5).map(lambda links: chain(links))


def chain(links):
    whole = links[0]
    for link in links[1:]:
        whole = whole >> link
    return whole


@given(some_curves())
def test_what_repr_writes_parse_reads(curve):
    again = curves.parse(repr(curve))
    assert again == curve
    assert hash(again) == hash(curve)
    assert [again(t) for t in range(0, 50, 7)] == [curve(t) for t in range(0, 50, 7)]
    assert pickle.loads(pickle.dumps(curve)) == curve


@pytest.mark.parametrize(
    ("text", "match"),
    [
        ("warmpu(3)", "no curve 'warmpu'; did you mean 'warmup'"),
        ("warmup(3) > linear(2)", "cannot be read"),
        ("warmup(3) >>", "cannot be read"),
        ("warmup(3) >> 2", ">> joins two curves"),
        ("2 * 3", r"\* takes a number and a curve"),
        ("True + linear(3)", "cannot be read"),
        ("linear(3) / 2", "/ takes two numbers"),
        ("linear(3, floor=1/0)", "division by zero"),
        ("linear(3, flor=1)", "unexpected keyword"),
        ("linear()", "missing"),
        ("linear(0)", "positive integer"),
        ("linear(3, **{})", "cannot be read"),
        ("linear(*[3])", "cannot be read"),
        ("3", "is 3 and no curve"),
        ("__import__('os').system('true')", "cannot be read"),
        ("exec('1')", "no curve 'exec'"),
        ("linear(3).length", "cannot be read"),
        ("(" * 5000, "cannot be read"),
        ("", "cannot be read"),
    ],
)
def test_what_cannot_be_read_says_why(text, match):
    with pytest.raises(ValueError, match=match):
        curves.parse(text)


@pytest.mark.parametrize(
    ("make", "match"),
    [
        (lambda: curves.warmup(3, shape="sine"), r"shape='sine': must be one of 'linear', 'cosine'"),
        (lambda: curves.polynomial(3, power=0), "power=0"),
        (lambda: curves.polynomial(3, power=math.nan), "power=nan"),
        (lambda: curves.exponential(3, end=0), r"end=0\.0: must lie in \(0, 1\]"),
        (lambda: curves.exponential(3, end=0.1, half_life=2), "at most one of them"),
        (lambda: curves.exponential(3, half_life=0), "half_life=0"),
        (lambda: curves.power(0), "timescale=0"),
        (lambda: curves.power(3, exponent=0.5), r"exponent=0\.5: must be below 0"),
        (lambda: curves.power(3, offset=-1), "offset=-1"),
        (lambda: curves.inverse_sqrt(0), "warmup=0"),
        (lambda: curves.step(2.0), r"ratio=2\.0"),
        (lambda: curves.step(0.5, every=0), "every=0"),
        (lambda: curves.restarts(0), "period=0"),
        (lambda: curves.restarts(3, mult=0.5), r"mult=0\.5"),
        (lambda: curves.restarts(3, floor=2), "floor=2"),
        (lambda: curves.restarts(3, steps=0), "steps=0"),
    ],
)
def test_impossible_curves_say_why(make, match):
    with pytest.raises(ValueError, match=match):
        make()


def test_negative_steps_are_refused():
    with pytest.raises(ValueError, match="step=-1"):
        curves.linear(3)(-1)


def test_durations():
    assert [curves.steps_of("warmup", v, 1000) for v in (0, 0.0, 7, 0.02, 0.5, 1e-9)] == [0, 0, 7, 20, 500, 1]
    assert curves.steps_of("warmup", 7, None) == 7
    for bad, match in [(1.5, "must lie below 1"), (-1, "number of steps"), (True, "number"), (math.nan, "number")]:
        with pytest.raises(ValueError, match=match):
            curves.steps_of("warmup", bad, 1000)
    with pytest.raises(ValueError, match="needs total_steps"):
        curves.steps_of("warmup", 0.1, None)
