"""One stable run branches to several horizons, each with the rates of a run of its own."""

from __future__ import annotations

import math

import pytest
import torch
from small_optimizers import driven, make

from guided_descent import schedules
from guided_descent.schedules import Tokens, branch, curves

pytestmark = pytest.mark.filterwarnings("error::UserWarning", "error::RuntimeWarning")

TRUNKS = {
    "constant": lambda o: schedules.constant(o, warmup=5),
    "a wsd that was planned longer": lambda o: schedules.wsd(o, 1000, warmup=5, cooldown=100),
    "a wsd of this length": lambda o: schedules.wsd(o, 50, warmup=5, cooldown=10),
}


def trunk_of(build, steps=40):
    opt = make()
    schedule = build(opt)
    seen = driven(opt, schedule, steps)
    return seen, opt.state_dict(), schedule.state_dict()


def branched(state, *arguments, **options):
    opt = make()
    opt.load_state_dict(state[1])
    return opt, branch(opt, state[2], *arguments, **options)


@pytest.mark.parametrize("total", [50, 60, 200])
@pytest.mark.parametrize("name", TRUNKS)
def test_rates_are_those_of_a_run_of_its_own(name, total):
    state = trunk_of(TRUNKS[name])
    opt, schedule = branched(state, total, cooldown=10, shape="cosine", floor=0.1)
    tail = driven(opt, schedule, total - 40)
    schedule.finish()
    alone = make()
    own = schedules.wsd(alone, total, warmup=5, cooldown=10, shape="cosine", floor=0.1)
    assert state[0] + tail == driven(alone, own, total)
    assert schedule.curve == own.curve


def test_the_cooldown_is_a_share_of_the_whole_run():
    state = trunk_of(TRUNKS["constant"])
    _, schedule = branched(state, 100)
    assert repr(schedule.curve) == "warmup(5) >> constant(75) >> one_minus_sqrt(20)"


def test_at_the_moment_when_the_cooldown_begins():
    state = trunk_of(TRUNKS["a wsd of this length"], 40)
    opt, schedule = branched(state, 50, cooldown=10)
    assert driven(opt, schedule, 10) == [0.5 * (1 - math.sqrt(q / 10)) for q in range(10)]


@pytest.mark.parametrize("law", ["inverse_sqrt", "power"])
def test_laws_are_stable_too(law):
    options = {"warmup": 5} | ({"timescale": 20, "cooldown": 0} if law == "power" else {})
    state = trunk_of(lambda o: getattr(schedules, law)(o, **options))
    opt, schedule = branched(state, 60, cooldown=10, shape="linear")
    tail = driven(opt, schedule, 20)
    before = state[0] + tail[:10]
    endless = make()
    assert before == driven(endless, getattr(schedules, law)(endless, **options), 50)
    reached = getattr(schedules, law)(make(), **options).curve(50)
    assert tail[10:] == pytest.approx([0.5 * reached * (1 - q / 10) for q in range(10)])


def test_in_tokens_with_a_batch_that_grows():
    plan = {0: 100, 20: 300}
    state = trunk_of(lambda o: schedules.constant(o, Tokens(per_step=plan), warmup=500))
    total = Tokens(15_000, per_step=plan)
    opt, schedule = branched(state, total, cooldown=3_000, shape="linear")
    tail = driven(opt, schedule, total.steps - 40)
    for t, lr in enumerate(tail, start=40):
        n = 2_000 + (t - 20) * 300
        assert lr == pytest.approx(0.5 * min(1, (15_000 - n) / 3_000))
    schedule.finish()
    with pytest.raises(ValueError, match="is counted in 'tokens', this one 'steps'"):
        branched(state, 20_000)
    with pytest.raises(ValueError, match="has as its position 8000"):
        branched(state, Tokens(20_000, per_step=100))


def test_where_it_cannot_branch_it_says_why():
    cooling = trunk_of(TRUNKS["a wsd of this length"], 45)
    with pytest.raises(ValueError, match=r"saved at 45, where .* is not stable: .* at 40 at the latest"):
        branched(cooling, 100)
    warming = trunk_of(TRUNKS["constant"], 3)
    with pytest.raises(ValueError, match=r"saved at 3, where .* is not stable"):
        branched(warming, 100)
    state = trunk_of(TRUNKS["constant"])
    with pytest.raises(ValueError, match=r"before \(40 steps, .*cooldown \(10 steps\) do not fit into total_steps=49"):
        branched(state, 49, cooldown=10)
    with pytest.raises(ValueError, match="cooldown=0"):
        branched(state, 100, cooldown=0)
    with pytest.raises(ValueError, match="shape='round'"):
        branched(state, 100, shape="round")
    with pytest.raises(ValueError, match="cannot be read"):
        branched((*state[:2], {"last_epoch": 3}), 100)
    other = make()
    driven(other, schedules.constant(other), 7)
    with pytest.raises(ValueError, match="saved at optimizer step 40, but the optimizer is at 7"):
        branch(other, state[2], 100)


def test_of_an_optimizer_that_does_not_count():
    opt = make(cls=torch.optim.SGD)
    trunk = schedules.constant(opt, warmup=5)
    seen = driven(opt, trunk, 40)
    schedule = branch(opt, trunk.state_dict(), 50, cooldown=10, shape="linear")
    assert schedule.steps == 40
    assert (seen + driven(opt, schedule, 10))[38:] == [0.5] * 3 + [0.5 * (1 - q / 10) for q in range(1, 10)]


def test_stages_before_the_place_are_kept():
    state = trunk_of(lambda o: schedules.trapezoid(o, 100, cooldown=40, stages={20: 1.5}))
    opt, schedule = branched(state, 80, cooldown=20, shape="linear")
    assert schedule.curve == curves.parse("constant(20) >> 1.5 * constant(40) >> 1.5 * linear(20)")
    assert driven(opt, schedule, 40)[-1] == pytest.approx(0.5 * 1.5 / 20)
