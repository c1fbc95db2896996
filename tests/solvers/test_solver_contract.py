"""What every solver promises: state dicts and resumption, policies, counters, errors that say what is missing."""

from __future__ import annotations

import copy
import io
import math

import pytest
import torch
from torch import nn

from guided_descent.engine import NonFiniteError
from guided_descent.solvers import (
    BFGS,
    LBFGS,
    SOLVERS,
    DampedNewton,
    GaussNewton,
    HessianFree,
    LevenbergMarquardt,
    Likelihood,
    NaturalGradient,
    Objective,
)

X = torch.randn(10, 3, generator=torch.Generator().manual_seed(1))
Y = X.sin().sum(1, keepdim=True)
CURVED = {"gauss_newton", "levenberg_marquardt", "natural_gradient", "hessian_free"}
OPTIONS = {
    "lbfgs": {"max_iter": 3, "history_size": 4},
    "bfgs": {"max_iter": 3},
    "natural_gradient": {"lr": 0.5},
    "hessian_free": {"probes": 2},
}


def model(dtype: torch.dtype = torch.float32) -> nn.Module:
    torch.manual_seed(3)
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1)).to(dtype)


def make(name: str, net: nn.Module, **options):
    return SOLVERS[name](net, **{**OPTIONS.get(name, {}), **options})


def objective_of(net: nn.Module) -> Objective:
    dtype = next(net.parameters()).dtype
    return Objective(residuals=lambda: net(X.to(dtype)) - Y.to(dtype))


def weights(net: nn.Module) -> torch.Tensor:
    return torch.cat([p.detach().reshape(-1) for p in net.parameters()])


def through_a_file(state):
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


@pytest.mark.parametrize("name", SOLVERS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_resumed_run_is_bitwise_the_same(name, dtype):
    net = model(dtype)
    opt = make(name, net)
    for _ in range(4):
        opt.step(objective_of(net))
    saved = through_a_file({"net": net.state_dict(), "opt": opt.state_dict()})
    after = [opt.step(objective_of(net)).item() for _ in range(4)]
    again = model(dtype)
    for p in again.parameters():
        p.data.add_(1)
    resumed = make(name, again)
    again.load_state_dict(saved["net"])
    resumed.load_state_dict(saved["opt"])
    assert [resumed.step(objective_of(again)).item() for _ in range(4)] == after
    assert torch.equal(weights(net), weights(again))
    assert (opt.steps, opt.evaluations, opt.products) == (resumed.steps, resumed.evaluations, resumed.products)
    for key, value in opt.state_dict()["state"].get(0, {}).items():
        other = resumed.state_dict()["state"][0][key]
        assert torch.equal(value, other) if isinstance(value, torch.Tensor) else value == other


@pytest.mark.parametrize("name", SOLVERS)
def test_a_fresh_state_dict_is_a_complete_template(name):
    net = model()
    opt = make(name, net)
    before = copy.deepcopy(opt.state_dict())
    opt.step(objective_of(net))
    after = opt.state_dict()
    assert before["state"].keys() == after["state"].keys()
    for index in before["state"]:
        assert before["state"][index].keys() == after["state"][index].keys()
        for key, value in before["state"][index].items():
            if isinstance(value, torch.Tensor):
                assert value.shape == after["state"][index][key].shape
    assert before["param_groups"][0].keys() == after["param_groups"][0].keys()
    assert after["param_groups"][0]["param_names"] == ["0.weight", "0.bias", "2.weight", "2.bias"]


@pytest.mark.parametrize("name", SOLVERS)
def test_a_copy_goes_its_own_way(name):
    net = model()
    opt = make(name, net)
    opt.step(objective_of(net))
    net2, opt2 = copy.deepcopy((net, opt))
    before = weights(net).clone()
    opt2.step(objective_of(net2))
    assert torch.equal(weights(net), before)
    opt.step(objective_of(net))
    assert torch.equal(weights(net), weights(net2))


@pytest.mark.parametrize("name", SOLVERS)
def test_skip_changes_nothing_and_gives_up_after_25(name):
    net = model()
    opt = make(name, net)
    opt.step(objective_of(net))
    before, state = weights(net).clone(), copy.deepcopy(opt.state_dict())
    broken = Objective(residuals=lambda: net(X) * math.nan)
    for _ in range(24):
        opt.step(broken)
    assert torch.equal(weights(net), before)
    now = opt.state_dict()
    for key, value in state["state"].get(0, {}).items():
        assert torch.equal(value, now["state"][0][key]) if isinstance(value, torch.Tensor) else True
    same = {"steps", "rejected"} | ({"damping"} & state["param_groups"][0].keys())
    assert all(state["param_groups"][0][key] == now["param_groups"][0][key] for key in same)
    assert (opt.skipped, opt.steps) == (24, 1)
    with pytest.raises(NonFiniteError, match="the loss is nan: 25 steps in a row"):
        opt.step(broken)
    opt.step(objective_of(net))
    assert opt.param_groups[0]["skipped_in_row"] == 0
    assert not torch.equal(weights(net), before)


def test_other_policies():
    p = nn.Parameter(torch.zeros(2))
    infinite_gradient = lambda: p.sqrt().sum()  # noqa: E731
    with pytest.raises(NonFiniteError, match=r"the gradient holds NaN or infinity at step 1"):
        LBFGS([p], nonfinite="raise").step(infinite_gradient)
    opt = LBFGS([p])
    opt.step(infinite_gradient)
    assert (opt.skipped, p.tolist()) == (1, [0.0, 0.0])
    net = model()
    ignoring = LBFGS(net, nonfinite="ignore")
    ignoring.step(Objective(residuals=lambda: net(X) * math.nan))
    assert (ignoring.skipped, ignoring.steps) == (0, 1)


@pytest.mark.parametrize("name", ["lbfgs", "bfgs"])
def test_a_closure_may_call_backward_or_not(name):
    runs = []
    for kind in ("torch", "plain", "loss", "residuals"):
        net = model(torch.float64)
        opt = make(name, net)

        def loss(net=net):
            return (net(X.double()) - Y.double()).square().mean()

        def closure(net=net, opt=opt, loss=loss):
            opt.zero_grad()
            value = loss()
            value.backward()
            return value

        given = {"torch": closure, "plain": loss, "loss": Objective(loss=loss), "residuals": objective_of(net)}[kind]
        returned = [opt.step(given) for _ in range(3)]
        assert not any(value.requires_grad for value in returned)
        runs.append(weights(net))
    for other in runs[1:]:
        torch.testing.assert_close(other, runs[0], rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("name", sorted(CURVED))
def test_what_is_missing_is_said(name):
    net = model()
    opt = make(name, net)
    with pytest.raises(TypeError, match=r"needs the residuals or the outputs .* pass Objective\(residuals="):
        opt.step(lambda: net(X).square().mean())
    with pytest.raises(TypeError, match="needs the residuals"):
        opt.step(Objective(loss=lambda: net(X).square().mean()))
    with pytest.raises(TypeError, match="computed from the parameters, without detach"):
        opt.step(Objective(residuals=lambda: net(X).detach()))


@pytest.mark.parametrize("name", SOLVERS)
def test_a_step_without_an_objective_is_refused(name):
    opt = make(name, model())
    with pytest.raises(TypeError, match="got nothing; a solver evaluates the loss itself"):
        opt.step()
    with pytest.raises(TypeError, match="got a float"):
        opt.step(1.0)


def test_damped_newton_needs_a_loss_with_its_graph():
    net = model()

    def closure():
        loss = net(X).square().mean()
        loss.backward()
        return loss

    with pytest.raises(TypeError, match="return the loss without calling backward"):
        DampedNewton(net).step(closure)
    first = DampedNewton(net)
    first.step(lambda: (net(X) - Y).square().mean())
    assert first.rejected == 0


def test_objectives_say_what_is_wrong():
    kind = Likelihood("mse", Y)
    with pytest.raises(TypeError, match="one of loss, residuals and outputs, not loss and residuals"):
        Objective(loss=lambda: Y, residuals=lambda: Y)
    with pytest.raises(TypeError, match="an empty Objective"):
        Objective()
    for wrong in ({"outputs": lambda: Y}, {"loss": lambda: Y, "likelihood": kind}):
        with pytest.raises(TypeError, match="outputs and likelihood belong together"):
            Objective(**wrong)
    with pytest.raises(ValueError, match=r"scale=-1.0 must be positive"):
        Objective(residuals=lambda: Y, scale=-1.0)
    with pytest.raises(TypeError, match="jacobian belongs to"):
        Objective(loss=lambda: Y, jacobian=lambda: Y)
    with pytest.raises(TypeError, match="no closure"):
        Objective(loss=lambda: Y)()
    net = model()
    for value, message in ((lambda: net(X), r"shape \[10, 1\]"), (lambda: 1.0, "a float")):
        with pytest.raises(TypeError, match=message):
            LBFGS(net).step(value)
    with pytest.raises(TypeError, match="the loss has no gradient"):
        LBFGS(net).step(lambda: torch.ones(()))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda n: LBFGS(n, lr=0.0), "lr=0.0 must be > 0"),
        (lambda n: LBFGS(n, lr="1"), "lr='1' must be a number"),
        (lambda n: LBFGS(n, history_size=0), "history_size=0 must be a whole number of at least 1"),
        (lambda n: BFGS(n, max_iter=True), "max_iter=True must be a whole number"),
        (lambda n: BFGS(n, pair_eps=1.0), "pair_eps=1.0 must be >= 0 and < 1"),
        (lambda n: GaussNewton(n, space="both"), "space='both' must be one of 'auto', 'parameters', 'samples'"),
        (lambda n: GaussNewton(n, damping=-1), "damping=-1 must be >= 0"),
        (lambda n: LevenbergMarquardt(n, up=1.0), "up=1.0 must be > 1"),
        (lambda n: LevenbergMarquardt(n, metric="full"), "metric='full' must be one of"),
        (lambda n: HessianFree(n, warm=1.0), "warm=1.0 must be >= 0 and < 1"),
        (lambda n: HessianFree(n, nonfinite="maybe"), "nonfinite='maybe' must be one of 'skip', 'raise', 'ignore'"),
        (lambda n: LBFGS([]), "no parameters to train"),
        (lambda n: LBFGS([{"params": [n[0].weight]}, {"params": [n[2].weight]}]), "one group"),
        (lambda n: LBFGS([{"params": [n[0].weight], "lr": 1.0}]), "one group"),
        (lambda n: LBFGS([*n.parameters(), nn.Parameter(torch.zeros(1).double())]), "float32 on cpu, float64 on cpu"),
        (lambda n: LBFGS([nn.Parameter(torch.zeros(1, dtype=torch.complex64))]), "one real dtype"),
    ],
)
def test_wrong_options_are_refused(make, message):
    with pytest.raises((ValueError, TypeError), match=message.replace("(", r"\(")):
        make(model())


def test_frozen_parameters_stay_out_and_groups_cannot_be_added():
    net = model()
    net[0].weight.requires_grad_(False)
    opt = LevenbergMarquardt(net)
    frozen = net[0].weight.clone()
    opt.step(objective_of(net))
    assert torch.equal(net[0].weight, frozen)
    assert len(opt.param_groups[0]["params"]) == 3
    with pytest.raises(ValueError, match="has one group with all parameters"):
        opt.add_param_group({"params": [net[0].weight]})


def test_a_group_of_plain_parameters_and_hooks_and_schedulers_work():
    net = model()
    opt = LBFGS(list(net.parameters()), lr=0.5)
    seen = []
    opt.register_step_pre_hook(lambda *a: seen.append("before"))
    opt.register_step_post_hook(lambda *a: seen.append("after"))
    scheduler = torch.optim.lr_scheduler.StepLR(opt, 1, 0.1)
    opt.step(lambda: (net(X) - Y).square().mean())
    scheduler.step()
    assert seen == ["before", "after"]
    assert opt.param_groups[0]["lr"] == pytest.approx(0.05)
    assert repr(opt).startswith("LBFGS(21 numbers; lr=0.05")


def test_the_learning_rate_may_be_a_tensor():
    a, b = model(), model()
    GaussNewton(a, lr=torch.tensor(0.5)).step(objective_of(a))
    GaussNewton(b, lr=0.5).step(objective_of(b))
    assert torch.equal(weights(a), weights(b))


def test_a_scaled_sum_of_squares_is_the_loss():
    p = nn.Parameter(torch.tensor([3.0, 4.0]))
    for scale, loss in ((None, 12.5), (1.0, 25.0), (0.5, 12.5)):
        opt = NaturalGradient([p], lr=1e-12)
        assert opt.step(Objective(residuals=lambda: p, scale=scale)).item() == pytest.approx(loss)
        torch.testing.assert_close(p.grad, 2 * (0.5 if scale is None else scale) * p.detach())
