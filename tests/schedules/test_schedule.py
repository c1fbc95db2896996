"""Schedule follows accepted steps and nothing else: extra calls, skips, resumes, wrappers, tensors, late groups."""

from __future__ import annotations

import copy
import io
import math
import warnings

import pytest
import torch
from small_optimizers import Counting, make, parameter
from torch.optim.lr_scheduler import LRScheduler

from guided_descent.schedules import Schedule, accepted_steps, constant, cosine, linear, wsd

# torch's warnings about the order of calls must not appear
pytestmark = pytest.mark.filterwarnings("error::UserWarning", "error::RuntimeWarning")


class Wrapper(torch.optim.Optimizer):
    """Holds an optimizer as Accelerate does: the inner attributes are not forwarded."""

    def __init__(self, optimizer):
        self.optimizer = optimizer

    @property
    def param_groups(self):
        return self.optimizer.param_groups

    def step(self, closure=None):
        self.optimizer.step(closure)


def lrs(opt):
    return [float(group["lr"]) for group in opt.param_groups]


FORMS = {
    "constant": (lambda o: constant(o, 50, warmup=5), lambda t: min(1, (t + 1) / 5)),
    "cosine": (
        lambda o: cosine(o, 50, warmup=0.1, floor=0.1),
        lambda t: (t + 1) / 5 if t < 5 else 0.1 + 0.9 * (1 + math.cos(math.pi * (t - 5) / 45)) / 2,
    ),
    "linear": (lambda o: linear(o, 50, warmup=5), lambda t: (t + 1) / 5 if t < 5 else 1 - (t - 5) / 45),
    "wsd": (
        lambda o: wsd(o, 50, warmup=5, cooldown=0.2),
        lambda t: (t + 1) / 5 if t < 5 else 1.0 if t < 40 else 1 - math.sqrt((t - 40) / 10),
    ),
}


@pytest.mark.parametrize("cls", [Counting, torch.optim.SGD])
@pytest.mark.parametrize("tensor", [False, True])
@pytest.mark.parametrize("name", FORMS)
def test_closed_form_at_each_of_50_steps(name, tensor, cls):
    build, form = FORMS[name]
    opt = make(cls=cls, tensor=tensor)
    held = [group["lr"] for group in opt.param_groups]
    schedule = build(opt)
    assert isinstance(schedule, LRScheduler)
    for t in range(50):
        assert lrs(opt) == pytest.approx([0.5 * form(t), 0.02 * form(t)], abs=1e-7)
        assert [float(lr) for lr in schedule.get_last_lr()] == lrs(opt)
        opt.step()
        schedule.step()
    schedule.finish()
    if tensor:
        assert all(group["lr"] is lr for group, lr in zip(opt.param_groups, held))


def test_the_ratio_of_two_groups_is_constant_over_100_steps_and_a_resume():
    def build():
        opt = make()
        return opt, cosine(opt, 100, warmup=10)

    opt, schedule = build()
    for t in range(100):
        assert lrs(opt)[0] / lrs(opt)[1] == pytest.approx(25, abs=1e-7)
        opt.step()
        schedule.step()
        if t == 40:
            saved = io.BytesIO()
            torch.save({"opt": opt.state_dict(), "schedule": schedule.state_dict()}, saved)
            saved.seek(0)
            state, before = torch.load(saved, weights_only=True), lrs(opt)
            opt, schedule = build()
            opt.load_state_dict(state["opt"])
            schedule.load_state_dict(state["schedule"])
            assert lrs(opt) == before
    schedule.finish()


@pytest.mark.parametrize("cls", [Counting, torch.optim.SGD])
@pytest.mark.parametrize("tensor", [False, True])
def test_resume_equals_never_stopping(tensor, cls):
    straight, opt = make(cls=cls, tensor=tensor), make(cls=cls, tensor=tensor)
    a, b = wsd(straight, 30, warmup=3), wsd(opt, 30, warmup=3)
    for t in range(30):
        assert lrs(opt) == lrs(straight)
        for o, s in ((straight, a), (opt, b)):
            o.step()
            s.step()
        if t % 7 == 0:
            state = copy.deepcopy(opt.state_dict()), copy.deepcopy(b.state_dict())
            opt = make(cls=cls, tensor=tensor)
            if t % 2:  # either order
                b = wsd(opt, 30, warmup=3)
                opt.load_state_dict(state[0])
            else:
                opt.load_state_dict(state[0])
                b = wsd(opt, 30, warmup=3)
            b.load_state_dict(state[1])


def test_extra_calls_change_nothing():
    opt = make()
    schedule = linear(opt, 20)
    for t in range(20):
        assert lrs(opt)[0] == 0.5 * (1 - t / 20)
        opt.step()
        for _ in range(8):
            schedule.step()
    schedule.finish()


def test_accelerate_style_stepping_reaches_the_end():
    """Its scheduler wrapper calls once per process, and not at all once _step_count exceeds a total_steps attribute."""
    opt = Wrapper(make())
    schedule = linear(opt, 20)
    for t in range(20):
        assert lrs(opt)[0] == 0.5 * (1 - t / 20)
        schedule._step_count += 3  # accumulation steps
        opt.step()
        for _ in range(4):
            if not hasattr(schedule, "total_steps") or schedule._step_count <= schedule.total_steps:
                schedule.step()
    schedule.finish()


def test_skipped_steps_do_not_advance():
    opt = make()
    schedule = linear(opt, 10)
    for i in range(20):
        opt.skip = i % 2 == 1
        opt.step()
        schedule.step()
        assert lrs(opt)[0] == 0.5 * (1 - min((i // 2 + 1), 9) / 10)
    schedule.finish()


def test_grad_scaler_skips_do_not_advance():
    opt = make()
    schedule = linear(opt, 10)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0)
    p = opt.param_groups[0]["params"][0]
    for value in (1.0, float("inf"), 1.0):
        opt.zero_grad()
        scaler.scale(p.sum() * value).backward()
        scaler.step(opt)
        scaler.update()
        schedule.step()
    assert opt.steps == 2
    assert lrs(opt)[0] == 0.5 * 0.8


def test_created_after_steps_it_starts_where_the_optimizer_is():
    opt = make()
    for _ in range(6):
        opt.step()
    linear(opt, 10)
    assert lrs(opt) == pytest.approx([0.5 * 0.4, 0.02 * 0.4])


def test_compiled_before_or_after():
    """The step is not replaced, so a compiled one can be installed before the schedule as well as after it."""
    for before in (True, False):
        opt = make()
        schedule = None if before else linear(opt, 10)
        compiled = opt.step = torch.compile(opt.step, backend="eager")
        schedule = schedule or linear(opt, 10)
        assert opt.step is compiled
        opt.step()
        schedule.step()
        assert lrs(opt)[0] == 0.45


@pytest.mark.parametrize("tensor", [False, True])
def test_a_group_added_later_joins_with_its_own_peak(tensor):
    lr = torch.tensor(0.5) if tensor else 0.5
    opt = Counting([parameter()], lr=lr)
    schedule = linear(opt, 10)
    for _ in range(5):
        opt.step()
        schedule.step()
    opt.add_param_group({"params": [parameter()]})  # a tensor default is the very tensor of the first group, now 0.25
    opt.add_param_group({"params": [parameter()], "lr": torch.tensor(8.0) if tensor else 8.0})
    schedule.step()
    assert lrs(opt) == [0.25, 0.25, 4.0]
    assert [float(b) for b in schedule.base_lrs] == [0.5, 0.5, 8.0]
    assert len(schedule.get_last_lr()) == 3


def test_one_tensor_shared_by_all_groups_is_scaled_once():
    opt = Counting([{"params": [parameter()]}, {"params": [parameter()]}], lr=torch.tensor(1.0, dtype=torch.float64))
    schedule = linear(opt, 4)
    opt.step()
    schedule.step()
    assert lrs(opt) == [0.75, 0.75]


def test_returned_learning_rates_are_copies():
    opt = make(tensor=True)
    schedule = constant(opt)
    for values in (schedule.get_last_lr(), schedule.get_lr(), schedule.base_lrs):
        for value in values:
            value.fill_(77)
    schedule.step()
    assert lrs(opt) == pytest.approx([0.5, 0.02])


def test_finish_gives_the_numbers_and_the_fix():
    opt = make()
    schedule = cosine(opt, 10)
    for _ in range(4):
        opt.step()
        schedule.step()
        schedule.step()
    with pytest.raises(RuntimeError, match=r"planned for 10 optimizer steps, but 4 .*8 calls.*Set total_steps=4"):
        schedule.finish()
    with pytest.raises(RuntimeError, match="no end"):
        constant(make()).finish()


def test_beyond_the_end_the_last_value_is_held_with_one_warning():
    opt = make()
    schedule = linear(opt, 4)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(7):
            opt.step()
            schedule.step()
    assert lrs(opt)[0] == 0.5 / 4
    assert [w.category for w in caught] == [RuntimeWarning]
    assert "step 5 lies beyond the schedule's 4" in str(caught[0].message)
    assert caught[0].filename == __file__
    with pytest.raises(RuntimeError, match="held at its last value"):
        schedule.finish()


def run(build, steps, state=None):
    opt = make()
    schedule = build(opt)
    if state is not None:
        opt.load_state_dict(state[0])
        schedule.load_state_dict(state[1])
    seen = []
    while opt.steps < steps:
        seen.append(lrs(opt)[0])
        opt.step()
        schedule.step()
    return seen, (opt.state_dict(), schedule.state_dict())


def test_one_stable_run_branches_to_several_horizons():
    seen, trunk = run(lambda o: wsd(o, 1000, warmup=5, cooldown=100), 40)
    for total in (50, 60, 80):
        tail, _ = run(lambda o, total=total: wsd(o, total, warmup=5, cooldown=10), total, trunk)
        alone, _ = run(lambda o, total=total: wsd(o, total, warmup=5, cooldown=10), total)
        assert seen + tail == alone


def test_a_state_that_would_make_the_rate_jump_is_refused():
    _, state = run(lambda o: cosine(o, 100), 40)
    with pytest.raises(ValueError, match=r"at step 40 .*cosine\(100\).*cosine\(200\).*would jump"):
        run(lambda o: cosine(o, 200), 60, state)


def test_states_that_do_not_belong_are_refused():
    opt = make()
    schedule = linear(opt, 10)
    with pytest.raises(ValueError, match="last_epoch"):
        schedule.load_state_dict({"last_epoch": 3})
    opt.step()
    with pytest.raises(ValueError, match="saved at optimizer step 3, but the optimizer is at 1"):
        schedule.load_state_dict({"steps": 3, "factor": 0.7, "curve": "linear(10)"})


@pytest.mark.parametrize(
    ("build", "match"),
    [
        (lambda o: linear(o, 0), "total_steps=0"),
        (lambda o: cosine(o, -5), "total_steps=-5"),
        (lambda o: wsd(o, 10.5), "total_steps=10.5"),
        (lambda o: constant(o, 0), "total_steps=0"),
        (lambda o: linear(o, 10, warmup=10), "warmup=10 .*fewer than total_steps=10"),
        (lambda o: linear(o, 10, warmup=2.5), "below 1"),
        (lambda o: constant(o, warmup=0.1), "needs total_steps"),
        (lambda o: wsd(o, 10, warmup=5, cooldown=6), "do not fit into total_steps=10"),
        (lambda o: wsd(o, 10, cooldown=0), "at least one step"),
        (lambda o: cosine(o, 10, floor=2), "floor=2"),
        (lambda o: linear(o, 10).step(3), "epoch=3"),
    ],
)
def test_impossible_settings_say_why(build, match):
    with pytest.raises(ValueError, match=match):
        build(make())


def test_wrong_types_are_refused():
    with pytest.raises(TypeError, match=r"pass a torch\.optim\.Optimizer"):
        linear(object(), 10)
    with pytest.raises(TypeError, match="pass a Curve"):
        Schedule(make(), lambda t: 1.0)
    with pytest.raises(TypeError, match="unexpected keyword"):
        linear(make(), 10, warmpu=3)


def test_wsd_without_a_stable_part_goes_straight_down():
    assert repr(wsd(make(), 10, warmup=4, cooldown=6).curve) == "warmup(4) >> one_minus_sqrt(6)"


def test_accepted_steps_are_found_through_wrappers():
    opt = make()
    opt.step()
    assert accepted_steps(Wrapper(Wrapper(opt))) == 1
    assert accepted_steps(make(cls=torch.optim.SGD)) is None
    loop = Wrapper(None)
    loop.optimizer = loop
    assert accepted_steps(loop) is None
    odd = make(cls=torch.optim.SGD)
    odd.steps = "many"
    with pytest.raises(TypeError, match="steps is 'many'"):
        accepted_steps(odd)


def test_a_deep_copy_is_independent():
    opt = make()
    schedule = linear(opt, 10)
    twin = copy.deepcopy(schedule)
    twin.optimizer.step()
    twin.step()
    assert lrs(twin.optimizer)[0] == 0.45
    assert lrs(opt)[0] == 0.5
