"""SWA, LAWA, the power-function average and EMAs with ramps equal their closed forms, and share what EMA has."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from random_walks import Counting, close, net, through_file, walk, walked, weighted
from torch import nn

import guided_descent as gd
from guided_descent.averaging import EMA, LAWA, SWA, PolynomialAverage, PowerEMA, evaluating, export, ramps

MAKERS = {
    "ema": lambda model, **more: EMA(model, half_life=5.0, **more),
    "share": lambda model, **more: EMA(model, half_life=5.0, ramp=ramps.share(0.1), **more),
    "fraction": lambda model, **more: EMA(model, decay=0.99, ramp=ramps.fraction(), **more),
    "power ramp": lambda model, **more: EMA(model, decay=0.99, ramp=ramps.power(), **more),
    "polynomial": lambda model, **more: PolynomialAverage(model, gamma=3, **more),
    "power": lambda model, **more: PowerEMA(model, sigma=0.1, **more),
    "swa": lambda model, **more: SWA(model, every=3, **more),
    "lawa": lambda model, **more: LAWA(model, window=3, every=2, **more),
}
NAMES = pytest.mark.parametrize("name", MAKERS)


def recursion(decays):
    """The weights of w_1 .. w_t where a copies w_1 and then a <- d a + (1 - d) w."""
    weights = [1.0]
    for d in decays[1:]:
        weights = [d * w for w in weights] + [1 - d]
    return weights


def profile(name, t):
    """The weight of every step in the average after t of them."""
    if name == "ema":
        return [w / sum(0.5 ** (s / 5) for s in range(t)) for w in (0.5 ** ((t - 1 - s) / 5) for s in range(t))]
    if name == "share":  # StyleGAN: d = 0.5^(1/min(H, f n))
        return recursion([0.5 ** (1 / min(5, max(0.1 * n, 1e-8))) for n in range(t)])
    if name == "fraction":
        return recursion([min(0.99, (1 + n) / (10 + n)) for n in range(t)])
    if name == "power ramp":
        return recursion([min(0.99, 1 - (1 + n) ** -(2 / 3)) for n in range(t)])
    if name == "polynomial":
        return recursion([1 - 4 / (s + 3) for s in range(1, t + 1)])
    if name == "power":
        g = 6.937203937601806
        return [(s ** (g + 1) - (s - 1) ** (g + 1)) / t ** (g + 1) for s in range(1, t + 1)]
    if name == "swa":
        return [1 / (t // 3) if s % 3 == 0 else 0.0 for s in range(1, t + 1)]
    last = [s for s in range(1, t + 1) if s % 2 == 0][-3:]
    return [1 / len(last) if s in last else 0.0 for s in range(1, t + 1)]


@NAMES
@pytest.mark.parametrize(("dtype", "bar"), [(torch.float32, 1e-6), (torch.float64, 1e-12)])
def test_equals_the_closed_form_at_every_step(name, dtype, bar):
    model, generator, history = net(dtype), torch.Generator().manual_seed(1), []
    average = MAKERS[name](model)
    for t in range(1, 41):
        walk(model, generator)
        average.update()
        history.append({n: p.detach().clone().double() for n, p in model.named_parameters()})
        if not average.started:
            assert average.evaluation_weights(model) == {}
            assert (name, t) in {("swa", 1), ("swa", 2), ("lawa", 1)}
            continue
        weights = profile(name, t)
        assert sum(weights) == pytest.approx(1)
        close(average.evaluation_weights(model), weighted(history, weights), bar)


@NAMES
def test_a_constant_is_its_own_average(name):
    model = net()
    average = MAKERS[name](model)
    for _ in range(10):
        average.update()
    close(average.evaluation_weights(model), dict(model.named_parameters()), 1e-6)


@NAMES
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_weights_have_a_float32_average(name, dtype):
    model = net(dtype)
    average = MAKERS[name](model)
    history = walked(model, [average], 30)
    found = average.evaluation_weights(model)
    assert {tensor.dtype for tensor in found.values()} == {torch.float32}
    close(found, weighted(history, profile(name, 30)), 1e-6)
    with evaluating(model, average):
        assert model[0].weight.dtype == dtype


@NAMES
def test_only_accepted_steps_count(name):
    model, generator = net(), torch.Generator().manual_seed(1)
    opt = Counting(model.parameters(), lr=0.1)
    average, reference = MAKERS[name](model, optimizer=opt), MAKERS[name](model)
    for i in range(40):
        opt.skip = i % 3 == 0
        if not opt.skip:
            walk(model, generator)
        opt.step()
        average.update()
        average.update()  # a second call for the same step
        if not opt.skip:
            reference.update()
    close(average.evaluation_weights(model), reference.evaluation_weights(model), 0)
    assert average.steps == 26


@NAMES
def test_the_start(name):
    model = net()
    average = MAKERS[name](model, start=7)
    history = walked(model, [average], 27)
    close(average.evaluation_weights(model), weighted(history[7:], profile(name, 20)))


@NAMES
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_resumed_average_continues_to_the_bit(name, dtype):
    model, generator = net(dtype), torch.Generator().manual_seed(1)
    average = MAKERS[name](model, buffers=True)
    resumed = None
    for i in range(24):
        if i == 11:
            resumed = MAKERS[name](model, buffers=True)
            resumed.load_state_dict(through_file(average.state_dict()))
        walk(model, generator)
        average.update()
        if resumed is not None:
            resumed.update()
    close(average.evaluation_weights(model), resumed.evaluation_weights(model), 0)
    a, b = average.state_dict(), resumed.state_dict()
    assert {k: v for k, v in a.items() if k != "weights"} == {k: v for k, v in b.items() if k != "weights"}
    assert a["format"] == 1
    for state in (a["settings"], a["progress"]):
        assert all(isinstance(value, int | float | str) for value in state.values())


@NAMES
def test_states_of_others_are_refused(name):
    model = net()
    average = MAKERS[name](model)
    walked(model, [average], 8)
    before = copy.deepcopy(average.state_dict())
    for other in MAKERS:
        if other != name:
            with pytest.raises(ValueError, match=r"not the state of|made with"):
                average.load_state_dict(MAKERS[other](net()).state_dict())
    with pytest.raises(ValueError, match="is of format 2, this version reads up to 1"):
        average.load_state_dict(before | {"format": 2})
    after = average.state_dict()
    assert all(torch.equal(after["weights"][key], value) for key, value in before["weights"].items())
    average.load_state_dict({key: value for key, value in before.items() if key != "format"})  # an early one


@NAMES
def test_running_statistics_have_the_policies_of_ema(name):
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))
    average, history = MAKERS[name](model, buffers=True), []
    for i in range(20):
        model(torch.randn(8, 3, generator=torch.Generator().manual_seed(i)))
        average.update()
        history.append({"mean": model[1].running_mean.clone().double()})
    with pytest.raises(ValueError, match="running statistics"), evaluating(model, average):
        pytest.fail("the body must not run")
    expected = weighted(history, profile(name, 20))["mean"]
    with evaluating(model, average, "average"):
        torch.testing.assert_close(model[1].running_mean.double(), expected, atol=1e-6, rtol=1e-6)
    assert export(model, average, "live")["1.running_mean"].equal(model[1].running_mean)
    with evaluating(model, average, [torch.randn(8, 3)]):
        pass
    plain = MAKERS[name](model)
    for _ in range(8):
        plain.update()
    with pytest.raises(ValueError, match="does not average buffers"), evaluating(model, plain, "average"):
        pytest.fail("the body must not run")


@NAMES
def test_tied_frozen_and_unfrozen(name):
    model = nn.ModuleList([nn.Linear(3, 3), nn.Linear(3, 3), nn.LayerNorm(3)])
    model[1].weight = model[0].weight
    model[2].weight.requires_grad_(False)
    average = MAKERS[name](model)
    for _ in range(9):
        average.update()
    assert set(average.evaluation_weights(model)) == {"0.weight", "0.bias", "1.bias", "2.bias"}
    model[2].weight.requires_grad_(True)
    for _ in range(6):
        average.update()
    assert torch.equal(average.evaluation_weights(model)["2.weight"], torch.ones(3))
    average.load_state_dict(through_file(average.state_dict()))


def test_what_is_unfrozen_joins_a_window_as_it_was():
    model = nn.LayerNorm(2)
    model.weight.requires_grad_(False)
    lawa = LAWA(model, window=4, every=1)
    for _ in range(2):
        lawa.update()
    model.weight.requires_grad_(True)
    lawa.update()
    nn.init.constant_(model.weight, 5.0)
    lawa.update()
    torch.testing.assert_close(lawa.evaluation_weights(model)["weight"], torch.full((2,), (3 * 1 + 5) / 4))


def test_a_window_holds_copies_and_gives_new_tensors():
    model = net()
    lawa = LAWA(model, window=2, every=1)
    walked(model, [lawa], 3)
    first = lawa.evaluation_weights(model)["0.weight"]
    first.fill_(7)
    assert not torch.equal(lawa.evaluation_weights(model)["0.weight"], first)
    assert len(lawa.state_dict()["weights"]) == 2 * 4


@settings(max_examples=30, deadline=None)
@given(st.lists(st.integers(1, 9), min_size=1, max_size=12), st.integers(1, 7), st.integers(0, 5))
def test_cycles_that_end_between_two_calls_are_taken_once(elapsed, every, start):
    model = nn.Linear(1, 1, bias=False).double()
    opt = Counting(model.parameters(), lr=0.1)
    swa = SWA(model, every=every, start=start, optimizer=opt)
    taken = []
    for number, steps in enumerate(elapsed):
        before = opt.steps
        opt.steps += steps
        nn.init.constant_(model.weight, number)
        swa.update()
        if any(s > start and (s - start) % every == 0 for s in range(before + 1, opt.steps + 1)):
            taken.append(number)
    assert swa.taken == len(taken)
    if taken:
        assert swa.evaluation_weights(model)["weight"].item() == pytest.approx(sum(taken) / len(taken))


@settings(max_examples=30, deadline=None)
@given(
    st.lists(st.integers(1, 5), min_size=2, max_size=10), st.sampled_from(["share", "fraction", "power", "polynomial"])
)
def test_several_steps_at_a_call_count_as_so_many(elapsed, name):
    """The weights of the moment stand for all of them: as if they had not moved in between."""
    model = nn.Linear(1, 1, bias=False).double()
    opt = Counting(model.parameters(), lr=0.1)
    at_once, one_by_one = MAKERS[name](model, optimizer=opt), MAKERS[name](model)
    for number, steps in enumerate(elapsed):
        opt.steps += steps
        nn.init.constant_(model.weight, number)
        at_once.update()
        for _ in range(steps):
            one_by_one.update()
    found, expected = (a.evaluation_weights(model)["weight"].item() for a in (at_once, one_by_one))
    assert found == pytest.approx(expected, rel=1e-9)


def test_a_half_life_that_is_a_share_of_the_run():
    model = net()
    assert EMA(model, half_life=0.05, total_steps=10_000).decay == EMA(model, half_life=500).decay
    for half_life in (3.0, 5, None):
        more = {"decay": 0.9} if half_life is None else {"half_life": half_life}
        with pytest.raises(ValueError, match=r"a share of the run; give a float below 1"):
            EMA(model, total_steps=100, **more)
    with pytest.raises(ValueError, match="total_steps=0"):
        EMA(model, half_life=0.1, total_steps=0)


def test_ramps_at_the_steps_that_their_sources_name():
    """timm: 0.999 at 31.6 thousand steps, 0.9999 at a million; with 3/4 at 10 and 215 thousand."""
    assert ramps.power()(31_600) == pytest.approx(0.999, abs=2e-6)
    assert ramps.power()(1_000_000) == pytest.approx(0.9999, abs=1e-6)
    assert ramps.power(exponent=0.75)(10_000) == pytest.approx(0.999, abs=1e-6)
    assert ramps.power(exponent=0.75)(215_443) == pytest.approx(0.9999, abs=1e-6)
    assert ramps.power(gamma=10, exponent=1, least=0.5)(5) == 0.5
    assert ramps.power(gamma=10, exponent=1, least=0.5)(30) == pytest.approx(0.75)
    assert ramps.fraction()(90) == 0.91
    assert ramps.share(0.05)(200) == 0.5**0.1
    assert [ramp(0) for ramp in (ramps.power(least=0.5), ramps.fraction(), ramps.share())] == [0, 0, 0]


def test_a_ramp_of_ones_own():
    class Late(ramps.Ramp):
        def largest(self, t):
            return 0.5

        def __repr__(self):
            return "late"

    model = net()
    ema = EMA(model, decay=0.9, ramp=Late())
    history = walked(model, [ema], 12)
    close(ema.evaluation_weights(model), weighted(history, recursion([0.0] + [0.5] * 11)))
    assert ema.state_dict()["settings"] == {"decay": 0.9, "ramp": "late"}


@pytest.mark.parametrize("name", ["schedule_free_adamw", "lookahead"])
def test_of_evaluation_weights(name):
    """An EMA beside a method that has its own average: of what that one evaluates, not of what it trains."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))
    if name == "lookahead":
        opt = gd.AdamW(model, lr=0.05, add=[gd.parts.Lookahead(k=3)])
    else:
        opt = gd.ScheduleFreeAdamW(model, lr=0.05)
    ema, live = (EMA(model, decay=0.8, optimizer=opt, source=source) for source in (opt, None))
    history = []
    for i in range(15):
        x = torch.randn(8, 3, generator=torch.Generator().manual_seed(i))
        opt.zero_grad()
        (model(x) - 1).square().mean().backward()
        opt.step()
        ema.update()
        live.update()
        history.append({n: t.clone().double() for n, t in opt.evaluation_weights(model).items()})
    total = sum(0.8**s for s in range(15))
    expected = weighted(history, [0.8 ** (14 - s) / total for s in range(15)])
    close(ema.evaluation_weights(model), expected)
    assert not torch.allclose(live.evaluation_weights(model)["0.weight"].double(), expected["0.weight"], atol=1e-4)
    before = copy.deepcopy(model.state_dict())
    with evaluating(model, ema):
        torch.testing.assert_close(model[0].weight.double(), expected["0.weight"], atol=1e-6, rtol=1e-6)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_of_evaluation_weights_in_half_precision():
    torch.manual_seed(0)
    model = nn.Linear(3, 2).bfloat16()
    opt = gd.ScheduleFreeSGD(model, lr=0.05, rounding="master")
    ema = EMA(model, decay=0.5, source=opt)
    ema.update()  # before the first step the optimizer has nothing else to show
    history = [{n: p.detach().double() for n, p in model.named_parameters()}]
    for i in range(4):
        opt.zero_grad()
        (model(torch.ones(2, 3).bfloat16()) - i).float().square().mean().backward()
        opt.step()
        ema.update()
        history.append({n: t.clone().double() for n, t in opt.evaluation_weights(model).items()})
    total = sum(0.5**s for s in range(5))
    close(ema.evaluation_weights(model), weighted(history, [0.5 ** (4 - s) / total for s in range(5)]))


@pytest.mark.parametrize(
    ("make", "error", "match"),
    [
        (lambda m: SWA(m, every=0), ValueError, "every=0"),
        (lambda m: SWA(m, every=2.5), ValueError, r"every=2\.5"),
        (lambda m: LAWA(m, window=0, every=1), ValueError, "window=0: must be a positive integer"),
        (lambda m: LAWA(m, window=3, every=0), ValueError, "every=0"),
        (lambda m: PowerEMA(m), ValueError, "exactly one of them, such as sigma"),
        (lambda m: PowerEMA(m, sigma=0.1, gamma=3), ValueError, "exactly one of them"),
        (lambda m: PowerEMA(m, sigma=0.3), ValueError, r"sigma=0\.3: must lie in \(0, 0\.2887\]"),
        (lambda m: PowerEMA(m, sigma=0), ValueError, "sigma=0"),
        (lambda m: PowerEMA(m, gamma=-1), ValueError, "gamma=-1"),
        (lambda m: EMA(m, decay=0.9, ramp=0.05), TypeError, "ramp is a float"),
        (lambda m: EMA(m, decay=0.9, source=m), TypeError, "source is a Sequential, which has no evaluation_weights"),
        (lambda m: SWA(m, every=1, dtype=torch.bfloat16), ValueError, "would stall"),
        (lambda m: LAWA(m, window=1, every=1, start=-1), ValueError, "start=-1"),
        (lambda m: ramps.fraction(0.5), ValueError, r"offset=0\.5"),
        (lambda m: ramps.power(gamma=0), ValueError, "gamma=0"),
        (lambda m: ramps.power(exponent=math.nan), ValueError, "exponent=nan"),
        (lambda m: ramps.power(least=1), ValueError, "least=1"),
        (lambda m: ramps.share(0), ValueError, "share=0"),
    ],
)
def test_impossible_settings_say_why(make, error, match):
    with pytest.raises(error, match=match):
        make(net())
