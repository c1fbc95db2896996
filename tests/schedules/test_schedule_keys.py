"""Any number of a group can be driven: momentum, one of betas, decay, what a wrapper brings; without new graphs."""

from __future__ import annotations

import copy
import io

import pytest
import torch
from small_optimizers import driven, make, numbers
from torch import nn
from torch._dynamo.utils import counters

import guided_descent as gd
from guided_descent.schedules import Schedule, Together, Tokens, curves, one_cycle

pytestmark = pytest.mark.filterwarnings("error::UserWarning", "error::RuntimeWarning")


def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 2)).double()


def train(opt, model, schedules, steps, first=0):
    for number in range(first, first + steps):
        x = torch.randn(8, 4, generator=torch.Generator().manual_seed(number), dtype=torch.float64)
        opt.zero_grad()
        (model(x) - 1).square().mean().backward()
        opt.step()
        for schedule in schedules:
            schedule.step()


def through_file(value):
    file = io.BytesIO()
    torch.save(value, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def test_a_momentum_that_warms_up():
    opt = make(momentum=0.95)
    schedule = Schedule(opt, curves.warmup(20, floor=0.85 / 0.95) >> curves.constant(), key="momentum")
    seen = driven(opt, schedule, 30, "momentum")
    expected = [0.85 + 0.1 * min(1, (t + 1) / 20) for t in range(30)]
    assert seen == pytest.approx(expected)
    assert numbers(opt) == [0.5, 0.02]


KEYS = {
    "momentum": (lambda m: gd.SGD(m, lr=0.1, momentum=0.9), "momentum", None),
    "weight_decay": (lambda m: gd.AdamW(m, weight_decay=0.3), "weight_decay", None),
    "beta1": (gd.AdamW, "betas", 0),
    "beta2": (gd.AdamW, "betas", 1),
    "muon's momentum": (gd.Muon, "momentum", None),
    "sam's radius": (lambda m: gd.SGD(m, lr=0.1, add=[gd.parts.SAM(rho=0.05)]), "sam_rho", None),
    "gamma": (lambda m: gd.MultiplicativeSGD(m, rule="h_abs", gamma=0.5), "gamma", None),
}


@pytest.mark.parametrize("name", KEYS)
def test_keys_of_our_optimizers_follow_and_resume(name):
    build, key, index = KEYS[name]
    curve = curves.linear(12, floor=0.2)

    def value(group):
        return group[key] if index is None else group[key][index]

    model = net()
    opt = build(model)
    peaks = [value(group) for group in opt.param_groups if group.get(key) is not None]
    schedule = Schedule(opt, curve, key=key, index=index)
    for number in range(9):
        groups = [group for group in opt.param_groups if group.get(key) is not None]
        assert [value(group) for group in groups] == pytest.approx([peak * curve(number) for peak in peaks])
        assert [float(peak) for peak in schedule.base_lrs] == peaks
        assert [float(lr) for lr in schedule.get_last_lr()] == [float(lr) for lr in schedule.get_lr()]

        def closure(opt=opt):
            opt.zero_grad()
            loss = (model(torch.ones(3, 4, dtype=torch.float64)) - 1).square().mean()
            loss.backward()
            return loss

        opt.step(closure)
        schedule.step()
        if number == 4:
            saved = through_file({"opt": opt.state_dict(), "schedule": schedule.state_dict()})
            opt = build(model)
            opt.load_state_dict(saved["opt"])
            schedule = Schedule(opt, curve, key=key, index=index)
            schedule.load_state_dict(saved["schedule"])
    assert schedule.state_dict()["key"] == (key if index is None else f"{key}[{index}]")


def test_both_betas_at_once_and_tensors():
    opt = torch.optim.AdamW(
        [nn.Parameter(torch.ones(2))],
        lr=torch.tensor(0.1),
        betas=(torch.tensor(0.9), torch.tensor(0.99)),
        foreach=False,
    )
    held = opt.param_groups[0]["betas"]
    first, second = (Schedule(opt, curves.linear(10), key="betas", index=i) for i in (0, 1))
    for t in range(1, 4):
        opt.param_groups[0]["params"][0].grad = torch.ones(2)
        opt.step()
        first.step()
        second.step()
        betas = opt.param_groups[0]["betas"]
        assert [float(b) for b in betas] == pytest.approx([0.9 * (1 - t / 10), 0.99 * (1 - t / 10)])
        assert all(now is before for now, before in zip(betas, held))


def test_the_scheduled_decay_is_what_the_step_uses():
    """Without a gradient the weights shrink by lr times the scheduled decay."""
    p = nn.Parameter(torch.ones(3, dtype=torch.float64))
    opt = gd.AdamW([p], lr=0.1, weight_decay=0.5)
    schedule = Schedule(opt, curves.linear(5), key="weight_decay")
    expected = 1.0
    for t in range(5):
        p.grad = torch.zeros_like(p)
        opt.step()
        schedule.step()
        expected *= 1 - 0.1 * 0.5 * (1 - t / 5)
        assert p[0].item() == pytest.approx(expected)


@pytest.mark.parametrize("early", [True, False], ids=["compiled first", "scheduled first"])
@pytest.mark.parametrize("name", ["adamw", "muon", "sgd"])
def test_scheduled_numbers_need_no_new_graph(name, early):
    torch._dynamo.reset()
    counters.clear()
    more = {"momentum": 0.9} if name == "sgd" else {}
    models = [net(), net()]
    made = [gd.optimizer(name, model, lr=0.02, weight_decay=0.1, **more) for model in models]
    if early:
        made[0].compile(backend="eager")
    all_of_them = []
    for opt in made:
        rate = one_cycle(opt, 50, rise=0.3)
        decay = Schedule(opt, curves.rise(50, floor=0.1, shape="cosine"), key="weight_decay")
        all_of_them.append(Together(*rate.schedules, decay))
    if not early:
        made[0].compile(backend="eager")
    train(made[0], models[0], [all_of_them[0]], 4)
    settled = counters["stats"]["unique_graphs"]
    assert settled
    train(made[0], models[0], [all_of_them[0]], 46, first=4)
    train(made[1], models[1], [all_of_them[1]], 50)
    assert counters["stats"]["unique_graphs"] - settled <= 1
    for a, b in zip(models[0].parameters(), models[1].parameters()):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-9)
    for together in all_of_them:
        together.finish()


def together(model, opt=None):
    opt = opt or gd.Muon(model, lr=0.02)
    return opt, one_cycle(opt, 30, rise=0.4)


def test_together_resumes_as_one():
    model, other = net(), net()
    (opt, schedule), (twin, straight) = together(model), together(other)
    assert {s.label for s in schedule.schedules} == {"lr", "momentum", "betas[0]"}
    train(twin, other, [straight], 30)
    train(opt, model, [schedule], 13)
    saved = through_file({"opt": opt.state_dict(), "schedule": schedule.state_dict()})
    opt, schedule = together(model)
    opt.load_state_dict(saved["opt"])
    schedule.load_state_dict(saved["schedule"])
    assert schedule.last_epoch == 13
    assert schedule.get_lr() == schedule.get_last_lr() == [group["lr"] for group in opt.param_groups]
    train(opt, model, [schedule], 17, first=13)
    for a, b in zip(model.parameters(), other.parameters()):
        assert torch.equal(a, b)
    for group, expected in zip(opt.param_groups, twin.param_groups):
        assert {k: v for k, v in group.items() if k != "params"} == {k: v for k, v in expected.items() if k != "params"}
    schedule.finish()


def test_together_refuses_what_does_not_belong():
    opt, other = make(momentum=0.9), make(momentum=0.9)
    rate, momentum = Schedule(opt, curves.linear(5)), Schedule(opt, curves.linear(5), key="momentum")
    with pytest.raises(ValueError, match="one schedule for each number"):
        Together(rate, rate)
    with pytest.raises(ValueError, match="one schedule for each number"):
        Together(rate, Schedule(other, curves.linear(5), key="momentum"))
    with pytest.raises(ValueError, match="not 0 for"):
        Together()
    with pytest.raises(TypeError, match="not a Segment"):
        Together(curves.linear(3))
    both = Together(rate, momentum)
    for state in (rate.state_dict(), {"schedules": [rate.state_dict()]}):
        with pytest.raises(ValueError, match="not the state of 2 schedules together"):
            both.load_state_dict(state)
    state = both.state_dict()
    state["schedules"].reverse()
    with pytest.raises(ValueError, match=r"saved schedule drives 'momentum', this one 'lr'"):
        both.load_state_dict(state)
    with pytest.raises(ValueError, match="epoch=3"):
        both.step(3)


@pytest.mark.parametrize(
    ("key", "index", "error", "match"),
    [
        ("gamma", None, ValueError, r"key='gamma' is in no param group; they have params, note, lr, betas"),
        ("betas", None, ValueError, r"holds 2 numbers, \(0\.9, 0\.999\), and index=None: give index=0 or index=1"),
        ("betas", 2, ValueError, "index=2: give index=0 or index=1"),
        ("betas", -1, ValueError, "index=-1: give index=0 or index=1"),
        ("betas", True, ValueError, "index=True: give index=0 or index=1"),
        ("lr", 0, ValueError, r"index=0: key='lr' holds one number, 0\.1; leave index out"),
        ("amsgrad", None, TypeError, "key='amsgrad' holds False, which is no number"),
        ("note", None, TypeError, "key='note' holds 'encoder', which is no number"),
    ],
)
def test_keys_that_cannot_be_driven_say_why(key, index, error, match):
    opt = torch.optim.AdamW([{"params": [nn.Parameter(torch.ones(2))], "note": "encoder"}], lr=0.1)
    before = copy.deepcopy(opt.state_dict())
    with pytest.raises(error, match=match):
        Schedule(opt, curves.linear(3), key=key, index=index)
    assert opt.state_dict() == before


def test_states_say_what_they_are_and_the_wrong_one_is_refused():
    opt = make(momentum=0.9)
    rate, momentum = Schedule(opt, curves.linear(10)), Schedule(opt, curves.linear(10), key="momentum")
    tokens = Schedule(opt, curves.linear(1000), tokens=Tokens(per_step=100))
    opt.step()
    assert rate.state_dict() == {
        "format": 1,
        "key": "lr",
        "unit": "steps",
        "steps": 1,
        "position": 1,
        "factor": 0.9,
        "curve": "linear(10)",
    }
    assert tokens.state_dict() | {"unit": "steps", "position": 1, "curve": "linear(10)"} == rate.state_dict()
    for schedule, state, match in [
        (rate, momentum.state_dict(), "drives 'momentum', this one 'lr'"),
        (rate, tokens.state_dict(), "is counted in 'tokens', this one 'steps'"),
        (tokens, tokens.state_dict() | {"position": 200}, "has as its position 200, this one 100"),
        (rate, rate.state_dict() | {"format": 2}, "saved in format 2, this version reads up to 1"),
        (rate, rate.state_dict() | {"more": 2}, "'more'"),
    ]:
        with pytest.raises(ValueError, match=match):
            schedule.load_state_dict(state)
    rate.load_state_dict({"steps": 1, "factor": 0.9, "curve": "linear(10)"})  # as it was before formats had numbers


def test_a_group_without_the_number_is_left_out():
    opt = torch.optim.SGD([nn.Parameter(torch.ones(2))], lr=0.1, momentum=0.9)
    opt.add_param_group({"params": [nn.Parameter(torch.ones(2))], "momentum": None})
    schedule = Schedule(opt, curves.linear(4), key="momentum")
    assert schedule.base_lrs == [0.9]
    assert opt.param_groups[1]["momentum"] is None
