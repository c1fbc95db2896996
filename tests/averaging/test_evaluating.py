"""evaluating swaps in place and restores bitwise; policies for running statistics do what they say; misuse raises."""

from __future__ import annotations

import copy
import sys

import pytest
import torch
from torch import nn

from guided_descent.averaging import EMA, BufferSource, EvaluationSource, evaluating, export, is_evaluating


class Net(nn.Module):
    """Linear, BatchNorm, dropout, a tied head, a frozen gain and a non-persistent buffer."""

    def __init__(self, norm=True):
        super().__init__()
        self.inner = nn.Linear(4, 4)
        self.norm = nn.BatchNorm1d(4) if norm else nn.LayerNorm(4)
        self.drop = nn.Dropout(0.5)
        self.head = nn.Linear(4, 4, bias=False)
        self.head.weight = self.inner.weight
        self.gain = nn.Parameter(torch.full((4,), 2.0), requires_grad=False)
        self.register_buffer("mask", torch.ones(4), persistent=False)

    def forward(self, x):
        return self.head(self.drop(self.norm(self.inner(x)))) * self.gain * self.mask


def train(model, steps=5, **options):
    """A few real steps; returns the average and the weights and buffers seen at each."""
    torch.manual_seed(3)
    opt = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.05)
    ema, history = EMA(model, decay=0.5, **options), []
    for _ in range(steps):
        model(torch.randn(8, 4) + 1).square().mean().backward()
        opt.step()
        opt.zero_grad()
        ema.update()
        history.append(copy.deepcopy(model.state_dict()))
    return ema, opt, history


def average(history, name):
    weights = [0.5 ** (len(history) - 1 - i) for i in range(len(history))]
    return sum(w * h[name].double() for w, h in zip(weights, history)) / sum(weights)


def snapshot(model):
    return {name: t.clone() for name, t in model.state_dict().items()}


def assert_bitwise(model, before):
    after = model.state_dict()
    assert after.keys() == before.keys()
    for name, value in before.items():
        assert torch.equal(after[name], value), name


@pytest.fixture(autouse=True)
def _one_thread():
    torch.set_num_threads(1)
    torch.manual_seed(0)


@pytest.mark.parametrize("buffers", ["live", "average", [torch.randn(8, 4)]], ids=["live", "average", "batches"])
@pytest.mark.parametrize("fails", [False, True])
def test_weights_are_swapped_in_and_restored_bitwise_even_on_an_exception(buffers, fails):
    model = Net()
    ema, _, history = train(model, buffers=True)
    before, identities = snapshot(model), [id(p) for p in model.parameters()]
    modes = [m.training for m in model.modules()]
    try:
        with evaluating(model, ema, buffers) as same:
            assert same is model
            expected = average(history, "inner.weight")
            torch.testing.assert_close(model.inner.weight.double(), expected, atol=1e-6, rtol=1e-6)
            assert not torch.equal(model.inner.weight, before["inner.weight"])
            assert model.head.weight is model.inner.weight
            model.train()(torch.randn(8, 4))  # disturbs the running statistics
            if fails:
                raise KeyError("body")
    except KeyError:
        assert fails
    assert_bitwise(model, before)
    assert [id(p) for p in model.parameters()] == identities
    assert [m.training for m in model.modules()] == modes
    assert not any(map(is_evaluating, model.parameters()))


def test_live_buffers_stay_and_averaged_ones_are_their_average():
    model = Net()
    ema, _, history = train(model, buffers=True)
    live = snapshot(model)
    with evaluating(model, ema, "live"):
        assert torch.equal(model.norm.running_mean, live["norm.running_mean"])
    with evaluating(model, ema, buffers="average"):
        for name in ("running_mean", "running_var"):
            expected = average(history, f"norm.{name}")
            torch.testing.assert_close(getattr(model.norm, name).double(), expected, atol=1e-6, rtol=1e-6)
        assert model.norm.num_batches_tracked == live["norm.num_batches_tracked"] == 5


def test_batches_give_the_statistics_of_the_averaged_weights():
    model = Net()
    ema, _, _ = train(model)
    batches = [torch.randn(8, 4) + 1 for _ in range(3)]
    kinds = [batches, [(b, "target") for b in batches], [{"x": b} for b in batches], iter(batches)]
    for given in kinds:
        with evaluating(model, ema, given), torch.no_grad():
            hidden = [model.inner(b) for b in batches]
            torch.testing.assert_close(model.norm.running_mean, torch.stack([h.mean(0) for h in hidden]).mean(0))
            torch.testing.assert_close(model.norm.running_var, torch.stack([h.var(0) for h in hidden]).mean(0))
            assert model.norm.momentum == 0.1


def test_dropout_is_off_while_statistics_are_measured():
    model = nn.Sequential(nn.Dropout(0.5), nn.BatchNorm1d(4))
    batch = torch.randn(8, 4)
    with evaluating(model, EMA(model, decay=0.5), [batch]):
        torch.testing.assert_close(model[1].running_mean, batch.mean(0))
        assert model[0].training


def test_batches_serve_tracking_instance_norm_too():
    model = nn.Sequential(nn.Conv1d(2, 3, 1), nn.InstanceNorm1d(3, track_running_stats=True))
    ema = EMA(model, decay=0.5)
    ema.update()
    batches = [torch.randn(4, 2, 6) for _ in range(3)]
    with evaluating(model, ema, batches), torch.no_grad():
        expected = torch.stack([model[0](b).mean(dim=(0, 2)) for b in batches]).mean(0)
        torch.testing.assert_close(model[1].running_mean, expected)


def test_a_failing_batch_restores_everything():
    model = Net()
    ema, _, _ = train(model)
    before = snapshot(model)
    for bad, error in [([torch.randn(8, 4), torch.randn(8, 3)], RuntimeError), ([], ValueError), ([3], TypeError)]:
        with pytest.raises(error), evaluating(model, ema, bad):
            pytest.fail("the body must not run")
        assert_bitwise(model, before)
        assert model.norm.momentum == 0.1
        assert model.training
        assert model.norm.training


def test_a_policy_must_be_chosen_where_there_are_running_statistics():
    model = Net()
    ema, _, _ = train(model)
    cases = [
        (None, 'running statistics \\(norm\\).*"live".*"average".*batches'),
        ("mean", "buffers='mean' is unknown; choose"),
        ("average", "does not average buffers; make it with buffers=True"),
        (3, "buffers is a int; choose"),
    ]
    for buffers, match in cases:
        with pytest.raises(ValueError, match=match), evaluating(model, ema, buffers):
            pytest.fail("the body must not run")
    plain = Net(norm=False)
    ema, _, _ = train(plain)
    with evaluating(plain, ema):
        pass
    with pytest.raises(ValueError, match="no running statistics"), evaluating(plain, ema, [torch.ones(1, 4)]):
        pytest.fail("the body must not run")


def test_calls_that_would_mistake_the_weights_raise_and_work_again_afterwards():
    model = Net(norm=False)
    ema, opt, _ = train(model)
    before = snapshot(model)
    other = torch.optim.SGD([nn.Parameter(torch.ones(1))], lr=0.1)
    model(torch.ones(1, 4)).sum().backward()

    def nest():
        with evaluating(nn.DataParallel(model), ema):
            pytest.fail("the body must not run")

    calls = [
        (r"^SGD\.step\(\) inside evaluating", opt.step),
        (r"^EMA\.update\(\) inside evaluating", ema.update),
        (r"^EMA\.state_dict\(\) inside evaluating", ema.state_dict),
        (r"^EMA\.load_state_dict\(\) inside", lambda: ema.load_state_dict({})),
        (r"^state_dict\(\) inside evaluating.*averaging\.export", model.state_dict),
        (r"^state_dict\(\) inside evaluating", nn.DataParallel(model).state_dict),
        (r"^load_state_dict\(\) inside", lambda: model.load_state_dict(before)),
        (r"^evaluating\(...\) inside evaluating", nest),
    ]
    with evaluating(model, ema):
        assert all(map(is_evaluating, model.parameters()))
        for match, call in calls:
            with pytest.raises(RuntimeError, match=match):
                call()
        other.step()  # an optimizer of other parameters is free to go on
        with torch.no_grad():
            assert (model.inner.weight.grad != 0).any()
    assert_bitwise(model, before)
    opt.step()
    ema.update()
    model.load_state_dict(before)
    nested = Net(norm=False)
    with evaluating(model, ema), evaluating(nested, ema):  # a copy is another model
        pass


class Keeper(torch.optim.SGD):
    """An optimizer that keeps evaluation weights by parameter, as schedule-free methods do."""

    def evaluation_weights(self, model):
        names = {id(p): name for name, p in model.named_parameters()}
        return {names[id(p)]: torch.full_like(p, 7) for group in self.param_groups for p in group["params"]}


def test_an_optimizer_can_be_the_source():
    model = nn.Linear(2, 2)
    opt = Keeper(model.parameters(), lr=0.1)
    assert isinstance(opt, EvaluationSource)
    assert not isinstance(opt, BufferSource)
    with evaluating(model, opt):
        assert (model.weight == 7).all()
        with pytest.raises(RuntimeError, match=r"state_dict\(\) inside"):
            opt.state_dict()
    opt.state_dict()
    bn = nn.BatchNorm1d(2)
    keeper = Keeper(bn.parameters(), lr=0.1)
    with pytest.raises(ValueError, match="Keeper keeps no buffers"), evaluating(bn, keeper, "average"):
        pytest.fail("the body must not run")


def test_a_mapping_can_be_the_source_and_must_fit():
    model = nn.Linear(2, 2)
    with evaluating(model, {"weight": torch.zeros(2, 2, dtype=torch.float64)}):
        assert (model.weight == 0).all()
        assert model.weight.dtype == torch.float32
    for bad, error, match in [
        ({"wieght": torch.zeros(2, 2)}, ValueError, "unknown: wieght"),
        ({"weight": torch.zeros(1, 2)}, ValueError, r"as \[1, 2\], the model as \[2, 2\]"),
        (None, TypeError, "source is a NoneType"),
    ]:
        with pytest.raises(error, match=match), evaluating(model, bad):
            pytest.fail("the body must not run")


def test_a_graph_recorded_before_stays_valid():
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 1))
    loss = model(torch.ones(1, 2)).sum()
    with evaluating(model, {"1.weight": torch.zeros(1, 2)}), torch.no_grad():
        model(torch.ones(1, 2))
    loss.backward()
    torch.testing.assert_close(model[0].bias.grad, model[1].weight.detach()[0])


def test_casts_cached_by_autocast_are_dropped():
    model, x = nn.Linear(4, 4, bias=False), torch.ones(1, 4)
    with torch.autocast("cpu", torch.bfloat16):
        live = model(x)
        with evaluating(model, {"weight": torch.zeros(4, 4)}):
            assert (model(x) == 0).all()
        assert torch.equal(model(x), live)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_export_loads_into_a_plain_model_and_is_what_was_evaluated(dtype):
    model = Net()
    ema, _, _ = train(model, buffers=True)
    model.to(dtype)
    before = snapshot(model)
    exported = export(torch.compile(nn.DataParallel(model), backend="eager"), ema, "average")
    assert_bitwise(model, before)
    fresh = Net().to(dtype)
    fresh.load_state_dict(exported, strict=True)
    assert exported["head.weight"] is exported["inner.weight"]
    x = torch.randn(5, 4, dtype=dtype)
    with evaluating(model, ema, "average"):
        assert torch.equal(fresh.eval()(x), model.eval()(x))
    exported["inner.bias"].fill_(9)
    assert_bitwise(model, before)
    assert all(t.dtype == before[name].dtype for name, t in exported.items())


def test_memory_does_not_grow():
    model = Net()
    ema, _, _ = train(model, buffers=True)
    hooks = sys.modules[torch.optim.Optimizer.__module__]._global_optimizer_pre_hooks

    def held():
        return len(hooks), len(model._state_dict_pre_hooks), len(model._load_state_dict_pre_hooks)

    before = held()
    for policy in ("live", "average", [torch.randn(8, 4)]):
        with evaluating(model, ema, policy):
            assert held() > before
    assert held() == before
