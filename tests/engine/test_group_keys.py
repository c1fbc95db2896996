"""Engine keys of groups: what a checkpoint or a user changes after the build takes effect, or raises."""

import copy

import pytest
import torch

import guided_descent as gd


def drive(opt, p, steps, first=0):
    for step in range(first, first + steps):
        p.grad = torch.randn(p.shape, generator=torch.Generator().manual_seed(step)).to(p.dtype)
        opt.step()


def weights(**options):
    torch.manual_seed(0)
    p = torch.nn.Parameter(torch.randn(5, 7).bfloat16())
    return p, gd.AdamW([p], lr=1e-3, **options)


def test_a_loaded_seed_is_the_one_that_rounds():
    p, opt = weights(rounding="stochastic", seed=7)
    drive(opt, p, 5)
    q, other = weights(rounding="stochastic", seed=8)
    q.data.copy_(p)
    other.load_state_dict(copy.deepcopy(opt.state_dict()))
    drive(opt, p, 5, first=5)
    drive(other, q, 5, first=5)
    assert torch.equal(p, q)


@pytest.mark.parametrize("mode", ["compensated", "master"])
def test_a_rounding_chosen_later_begins_where_the_parameter_is(mode):
    p, opt = weights(rounding="stochastic")
    drive(opt, p, 3)
    q, other = weights(rounding=mode)
    q.data.copy_(p)
    state = opt.state_dict()
    state["param_groups"][0]["rounding"] = mode
    other.load_state_dict(copy.deepcopy(state))
    opt.param_groups[0]["rounding"] = mode
    drive(opt, p, 20, first=3)
    drive(other, q, 20, first=3)
    assert torch.equal(p, q)
    name = {"compensated": "comp", "master": "master"}[mode]
    assert name in opt.state[p]
    opt.param_groups[0]["rounding"] = "nearest"
    drive(opt, p, 1, first=23)
    assert name not in opt.state[p]


def test_fused_switched_off_later_leaves_the_kernel():
    p, opt = torch.nn.Parameter(torch.randn(5, 7)), None
    opt = gd.AdamW([p], lr=1e-3)
    drive(opt, p, 1)
    assert opt._engine.bind().buckets[0].kernel is not None
    opt.param_groups[0]["fused"] = False
    drive(opt, p, 1, first=1)
    assert opt._engine.bind().buckets[0].kernel is None


def test_groups_that_disagree_about_non_finite_gradients_raise():
    p, q = torch.nn.Parameter(torch.ones(2)), torch.nn.Parameter(torch.ones(2))
    with pytest.raises(ValueError, match=r"nonfinite='ignore' of one group and 'skip' of another"):
        gd.AdamW([{"params": [p]}, {"params": [q], "nonfinite": "ignore"}])


def test_constraints_cost_nothing_where_there_are_none(monkeypatch):
    p, opt = weights(rounding="stochastic")
    seen = []
    monkeypatch.setattr(gd.recipes.Recipe, "constraints", lambda self, blocks: seen.append(blocks) or ())
    drive(opt, p, 2)
    assert seen == []
