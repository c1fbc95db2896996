"""Schedule-Free and primal averaging: references, the peer package, the mean that the average is, what is refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import guided_descent as gd
from guided_descent.parts import DECAYS, GPA, Cautious, Descend, Lookahead, Parts, ScheduleFree, SecondMoment
from oracles import adam_family as family
from oracles import averaging as oracle
from oracles.training import far, stream, train

PATHS: list[dict[str, bool]] = [{}, {"foreach": False}, {"compile": True}]
IDS = ["lists", "plain", "compiled"]
SHAPES = [(4, 5), (6,), (3, 2, 2, 2)]
STEPS = 40
BETAS = (0.8, 0.95)
Case = tuple[str, dict[str, Any], dict[str, Any]]
#: Recipe, what differs from its defaults, and the same for the reference.
FREE: list[Case] = [
    ("schedule_free_sgd", {}, {}),
    (
        "schedule_free_sgd",
        {"momentum": 0.7, "weight_decay": 0.2, "warmup_steps": 7},
        {"beta": 0.7, "weight_decay": 0.2, "factor": lambda t: min(t / 7, 1)},
    ),
    ("schedule_free_sgd", {"momentum": 1.0, "r": 1.5}, {"beta": 1.0, "r": 1.5}),
    ("schedule_free_adamw", {}, {"rule": oracle.normalised()}),
    (
        "schedule_free_adamw",
        {"betas": BETAS, "weight_decay": 0.2, "warmup_steps": 7, "r": 0.5, "weight_lr_power": 1.0},
        {
            "beta": 0.8,
            "rule": oracle.normalised(0.95),
            "weight_decay": 0.2,
            "factor": lambda t: min(t / 7, 1),
            "r": 0.5,
            "power": 1.0,
        },
    ),
    (
        "schedule_free_radam",
        {"betas": BETAS, "weight_decay": 0.2},
        {
            "beta": 0.8,
            "rule": oracle.normalised(0.95),
            "weight_decay": 0.2,
            "factor": lambda t: oracle.rectified(0.95, t),
        },
    ),
    ("schedule_free_radam", {}, {"rule": oracle.normalised(), "factor": lambda t: oracle.rectified(0.999, t)}),
]


def built(name: str, params: list[nn.Parameter], **options: Any) -> gd.Optimizer:
    opt = gd.optimizer(name, params, **options)
    if options.get("compile"):
        opt._engine.compiled.backend = "eager"  # type: ignore[attr-defined]
    return opt


def averages(opt: gd.Optimizer, params: list[nn.Parameter]) -> list[Tensor]:
    """What is evaluated, without a swap."""
    model = nn.ParameterList(params)
    found = opt.evaluation_weights(model)
    return [found[str(i)] for i in range(len(params))]


def check(name: str, options: dict[str, Any], follow: Any, schedule: Any = None) -> None:
    """The points of the gradients, the sequence and the average are those of the reference after every step."""
    starts = [torch.randn(shape, dtype=torch.float64) for shape in SHAPES]
    params = [nn.Parameter(p.clone()) for p in starts]
    opt = built(name, params, **{"lr": 0.05, **options})
    grads = [stream(tuple(p.shape), i) for i, p in enumerate(starts)]
    want = [follow(start, grad) for start, grad in zip(starts, grads)]
    for t in range(1, STEPS + 1):
        if schedule is not None:
            for group in opt.param_groups:
                schedule(t, group)
        train(opt, params, grads, 1, start=t)
        for p, x, paths in zip(params, averages(opt, params), want):
            assert far([p.detach()], [paths["y"][t - 1]]) < 1e-12
            assert far([opt.state[p]["z"]], [paths["z"][t - 1]]) < 1e-12
            assert far([x], [paths["x"][t - 1]]) < 1e-12


@pytest.mark.parametrize("path", PATHS, ids=IDS)
@pytest.mark.parametrize(("name", "options", "reference"), FREE)
def test_schedule_free_is_its_reference(
    name: str, options: dict[str, Any], reference: dict[str, Any], path: dict[str, bool]
) -> None:
    check(name, {**options, **path}, lambda p, g: oracle.schedule_free(p, g, STEPS, 0.05, **reference))


@pytest.mark.parametrize("path", PATHS, ids=IDS)
def test_learning_rate_and_weight_of_the_average_may_change(path: dict[str, bool]) -> None:
    def schedule(t: int, group: dict[str, Any]) -> None:
        group["lr"], group["betas"] = 0.05 / t**0.5, (0.5 + 0.4 / t, 0.95)

    check(
        "schedule_free_adamw",
        {"betas": BETAS, **path},
        lambda p, g: oracle.schedule_free(
            p, g, STEPS, lambda t: 0.05 / t**0.5, oracle.normalised(0.95), beta=lambda t: 0.5 + 0.4 / t
        ),
        schedule,
    )


@pytest.mark.parametrize("path", PATHS, ids=IDS)
@pytest.mark.parametrize("at", ["z", "y"])
def test_gpa_is_its_reference(at: str, path: dict[str, bool]) -> None:
    options = {"betas": BETAS, "weight_decay": 0.2, "mu_x": 0.9, "mu_y": 0.6, "decay_at": at, **path}
    check(
        "gpa_adamw",
        options,
        lambda p, g: oracle.gpa(p, g, STEPS, 0.05, family.adam(BETAS), 0.9, 0.6, weight_decay=0.2, decay_at=at),
    )


@pytest.mark.parametrize("scale", [1.0, 0.0])
def test_decay_at_z_knows_the_kinds_of_decay(scale: float) -> None:
    """Independent and corrected decay of z follow the schedule as they do elsewhere; parameters not decayed are not."""
    start = torch.randn(4, 5, dtype=torch.float64)
    for decay, share in (("independent", lambda t: 0.2 / t), ("corrected", lambda t: 0.05 / t * 0.2 / t)):
        p = nn.Parameter(start.clone())
        opt = gd.build([("w", p)], gd.recipes.GPAAdamW(lr=0.05, weight_decay=0.2 * scale, decay=decay))
        z = start.clone()
        for t in range(1, 9):
            opt.param_groups[0]["lr"] = 0.05 / t
            train(opt, [p], [lambda t, p: torch.zeros_like(p)], 1, start=t)
            z = z * (1 - scale * share(t))
            torch.testing.assert_close(opt.state[p]["z"], z, atol=1e-13, rtol=1e-13)


def test_at_a_constant_rate_the_average_is_the_plain_mean() -> None:
    start, grad, zs = torch.randn(4, 5, dtype=torch.float64), stream((4, 5), 3), []
    p = nn.Parameter(start.clone())
    opt = gd.ScheduleFreeAdamW([p], lr=0.1)
    for t in range(1, 61):
        train(opt, [p], [grad], 1, start=t)
        zs.append(opt.state[p]["z"].clone())
        [x] = averages(opt, [p])
        torch.testing.assert_close(x, torch.stack(zs).mean(0), atol=1e-12, rtol=0)


def test_a_rate_of_zero_at_first_divides_nothing_by_nothing() -> None:
    for name in ("schedule_free_sgd", "schedule_free_adamw"):
        start = torch.randn(3, 4, dtype=torch.float64)
        p = nn.Parameter(start.clone())
        opt = gd.optimizer(name, [p], lr=0.0, weight_decay=0.3)
        train(opt, [p], [stream((3, 4))], 3)
        assert torch.equal(p, start)
        assert torch.equal(averages(opt, [p])[0], start)
        opt.param_groups[0]["lr"] = 0.1
        train(opt, [p], [stream((3, 4))], 1, start=4)
        torch.testing.assert_close(averages(opt, [p])[0], opt.state[p]["z"])  # the first that counts


def test_the_silent_steps_of_radam_move_nothing_and_gather_squares() -> None:
    start = torch.randn(3, 4)
    p = nn.Parameter(start.clone())
    opt = gd.ScheduleFreeRAdam([p], lr=0.1)
    train(opt, [p], [stream((3, 4))], 4)
    assert torch.equal(p, start)
    assert float(opt.state[p]["weight_sum"]) == 0
    assert (opt.state[p]["exp_avg_sq"] > 0).all()
    train(opt, [p], [stream((3, 4))], 1, start=5)
    assert not torch.equal(p, start)


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize(
    ("name", "peer", "options"),
    [
        ("schedule_free_sgd", "SGDScheduleFree", {"momentum": 0.8, "weight_decay": 0.2, "warmup_steps": 7}),
        (
            "schedule_free_adamw",
            "AdamWScheduleFree",
            {"betas": BETAS, "weight_decay": 0.2, "warmup_steps": 7, "r": 0.5},
        ),
        ("schedule_free_radam", "RAdamScheduleFree", {"betas": BETAS, "weight_decay": 0.2}),
        ("schedule_free_radam", "RAdamScheduleFree", {"betas": BETAS, "silent_sgd_phase": False}),
    ],
)
def test_the_package_of_the_authors(name: str, peer: str, options: dict[str, Any], compiled: bool) -> None:
    package = pytest.importorskip("schedulefree")
    starts = [torch.randn(shape, dtype=torch.float64) for shape in SHAPES]
    ours, theirs = ([nn.Parameter(p.clone()) for p in starts] for _ in range(2))
    a = built(name, ours, lr=0.05, compile=compiled, **options)
    b = getattr(package, peer)(theirs, lr=0.05, **options)
    grads = [stream(tuple(p.shape), i) for i, p in enumerate(starts)]
    b.train()
    one, two = train(a, ours, grads, STEPS), train(b, theirs, grads, STEPS)
    assert max(map(far, one, two)) < 1e-13
    a.eval()
    b.eval()
    assert max(far([p.detach()], [q.detach()]) for p, q in zip(ours, theirs)) < 1e-13


# -- an average that any recipe can carry ----------------------------------------------------------------------------


def test_the_recipes_are_their_base_with_one_more_part() -> None:
    block = gd.routing.route(nn.Linear(3, 4)).blocks[0]
    base = Parts(SecondMoment(), DECAYS["decoupled"], Descend())
    for name in ("schedule_free_adamw", "schedule_free_radam"):
        parts = list(gd.recipes.lookup(name)().parts(block))
        assert [type(part) for part in parts[:-1]] == [type(part) for part in base]
        assert parts[-1].where == "average"
    assert list(gd.recipes.ScheduleFreeSGD().parts(block))[:-1] == [DECAYS["decoupled"], Descend()]
    for at, kept in (("y", slice(None)), ("z", slice(0, None, 2))):
        adamw = list(gd.recipes.AdamW().parts(block))[kept]
        assert list(gd.recipes.GPAAdamW(decay_at=at).parts(block))[:-1] == adamw


@pytest.mark.parametrize(
    ("base", "rule"), [("sgd", oracle.plain), ("adamw", family.adam((0.9, 0.999))), ("lamb", family.lamb())]
)
def test_averages_added_to_other_recipes(base: str, rule: family.Rule) -> None:
    options: dict[str, Any] = {"adapt": "all"} if base == "lamb" else {"weight_decay": 0.0}
    free = ScheduleFree(beta=0.8, warmup_steps=5, r=0.5)
    check(
        base,
        {**options, "add": [free]},
        lambda p, g: oracle.schedule_free(p, g, STEPS, 0.05, rule, 0.8, factor=lambda t: min(t / 5, 1), r=0.5),
    )
    check(
        base,
        {**options, "add": [GPA(mu_x=0.9, mu_y=0.6)]},
        lambda p, g: oracle.gpa(p, g, STEPS, 0.05, rule, 0.9, 0.6),
    )


def test_no_weight_of_the_average_is_refused() -> None:
    p = nn.Parameter(torch.ones(3))
    for make, shown in (
        (lambda: gd.ScheduleFreeSGD([p], momentum=0.0), r"momentum=0\.0 of schedule_free_sgd: momentum, "),
        (
            lambda: gd.ScheduleFreeAdamW([p], betas=(0.0, 0.9)),
            r"betas=\(0\.0, 0\.9\) of schedule_free_adamw: betas\[0\], ",
        ),
        (lambda: gd.GPAAdamW([p], mu_y=0.0), r"mu_y=0\.0 of gpa_adamw: mu_y, "),
    ):
        with pytest.raises(ValueError, match=shown + ".*must be > 0, .*dividing by it; to do without"):
            make()
    for wrapper in (lambda: ScheduleFree(beta=0.0), lambda: GPA(mu_y=0.0)):
        with pytest.raises(ValueError, match="must be > 0"):
            wrapper()
    q = nn.Parameter(torch.ones(3))
    opt = gd.ScheduleFreeAdamW([{"params": [q]}, {"params": [p]}])
    opt.param_groups[1]["betas"] = (0.0, 0.9)
    p.grad = q.grad = torch.ones(3)
    with pytest.raises(ValueError, match=r"betas=\(0\.0, 0\.9\) makes the weight of the average 0, and it must be > 0"):
        opt.step()
    assert torch.equal(q, torch.ones(3))  # known before anything has moved
    assert not opt.state[q]["exp_avg_sq"].any()
    with pytest.raises(ValueError, match="set decay_at='y'"):
        gd.GPAAdamW([p], decay="cautious")
    gd.GPAAdamW([p], decay="cautious", decay_at="y")


def test_one_average_at_a_time() -> None:
    p = nn.Parameter(torch.ones(3))
    with pytest.raises(ValueError, match="UniformAverage and SlowWeights keep averages to evaluate"):
        gd.ScheduleFreeSGD([p], add=[Lookahead()])
    model = nn.TransformerEncoderLayer(8, 2, 8)
    with pytest.raises(ValueError, match="muonclip edits parameters after the step, of which UniformAverage"):
        gd.MuonClip(model, add=[ScheduleFree()])


def test_a_mask_and_an_average_together() -> None:
    """What is added runs in the order of the slots: the mask sees the direction, the average the step."""
    p, q = (nn.Parameter(torch.ones(4, 3, dtype=torch.float64)) for _ in range(2))
    one = gd.SGD([p], lr=0.1, momentum=0.9, add=[ScheduleFree(), Cautious()])
    two = gd.SGD([q], lr=0.1, momentum=0.9, add=[Cautious(), ScheduleFree()])
    assert far(train(one, [p], [stream((4, 3))], 10)[0], train(two, [q], [stream((4, 3))], 10)[0]) == 0


def test_bfloat16_weights_have_a_float32_sequence_and_average() -> None:
    start = torch.randn(6, 5).bfloat16()
    grad = stream((6, 5), 2, pull=0.0)
    p, q = nn.Parameter(start.clone()), nn.Parameter(start.double())
    half = gd.ScheduleFreeAdamW([p], lr=1e-3, rounding="master")
    wide = gd.ScheduleFreeAdamW([q], lr=1e-3)
    train(half, [p], [lambda t, p: grad(t, p.double()).bfloat16()], 200)
    train(wide, [q], [lambda t, p: grad(t, p).bfloat16().double()], 200)
    assert half.state[p]["z"].dtype == torch.float32
    [x], [y] = averages(half, [p]), averages(wide, [q])
    assert x.dtype == torch.float32
    torch.testing.assert_close(x.double(), y, atol=1e-5, rtol=0)
    assert half.state_bytes() == 30 * (4 + 4 + 4) + 4 + 8 * 7  # v, z, master; step; beta, mix, weight_sum, lr_max


def test_each_parameter_weighs_its_own_steps() -> None:
    """Two that share a group, and at times their number of updates, with other learning rates behind them."""
    starts = [torch.randn(4, 3, dtype=torch.float64) for _ in range(2)]
    params = [nn.Parameter(p.clone()) for p in starts]
    grads = [stream((4, 3), i) for i in range(2)]
    opt = gd.ScheduleFreeSGD(params, warmup_steps=3)
    active: list[list[int]] = [[], []]
    for t in range(1, 31):
        opt.param_groups[0]["lr"] = 0.1 + 0.01 * t
        for i, p in enumerate(params):
            p.grad = None
            if t > 20 or t % 2 == i:
                active[i].append(t)
                p.grad = grads[i](len(active[i]), p)
        opt.step()
    sums = [float(opt.state[p]["weight_sum"]) for p in params]
    assert int(opt.state[params[0]]["step"]) == int(opt.state[params[1]]["step"])
    assert sums[0] != sums[1]
    for p, start, grad, steps, x in zip(params, starts, grads, active, averages(opt, params)):
        want = oracle.schedule_free(
            start, grad, len(steps), lambda t, s=steps: 0.1 + 0.01 * s[t - 1], factor=lambda t: min(t / 3, 1)
        )
        assert far([p.detach()], [want["y"][-1]]) < 1e-12
        assert far([x], [want["x"][-1]]) < 1e-12


def test_weight_and_bias_of_one_block_have_one_average() -> None:
    """K-FAC joins them; the numbers of the block hold for both of its tensors, also where blocks differ."""
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4), nn.Linear(4, 4)).double()
    opt = gd.KFAC(model, loss="mse", lr=0.1, factor_frequency=1, add=[ScheduleFree(beta=0.8)])
    zs: dict[str, list[Tensor]] = {name: [] for name, _ in model.named_parameters()}
    for t in range(1, 21):
        model[2].requires_grad_(t > 5)  # so that its block weighs fewer steps than those of the same shape
        opt.zero_grad()
        (model(torch.randn(16, 4, dtype=torch.float64)) - 1).square().mean().backward()
        opt.step()
        for name, p in model.named_parameters():
            if p.grad is not None:
                zs[name].append(opt.state[p]["z"].clone())
    assert [len(zs[name]) for name in ("0.weight", "2.weight", "2.bias", "3.bias")] == [20, 15, 15, 20]
    for name, x in opt.evaluation_weights(model).items():
        torch.testing.assert_close(x, torch.stack(zs[name]).mean(0), atol=1e-12, rtol=1e-12)


def test_a_tensor_that_is_cut_has_one_average() -> None:
    """Large ones run in slices; the numbers of a step are advanced once."""
    start = torch.randn(700, 800, dtype=torch.float64)
    p = nn.Parameter(start.clone())
    opt = gd.ScheduleFreeAdamW([p], lr=0.05, betas=BETAS, warmup_steps=3)
    assert len(opt._engine.bind().buckets[0].slices) > 1
    train(opt, [p], [stream((700, 800))], 5)
    want = oracle.schedule_free(
        start, stream((700, 800)), 5, 0.05, oracle.normalised(0.95), 0.8, factor=lambda t: min(t / 3, 1)
    )
    assert far([p.detach()], [want["y"][-1]]) < 1e-12
    assert far(averages(opt, [p]), [want["x"][-1]]) < 1e-12
