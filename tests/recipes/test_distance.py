"""The methods that find their learning rate: references over several groups, peers, identities, and what is shared."""

from __future__ import annotations

import contextlib
import copy
import io
import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import guided_descent as gd
from guided_descent.averaging import PolynomialAverage, evaluating
from oracles import distance as oracle
from oracles.training import far

SHAPES = [(4, 5), (6,), (3, 2, 2, 2), (7, 3), ()]
STARTS = [torch.randn(shape, generator=torch.Generator().manual_seed(i)) for i, shape in enumerate(SHAPES)]
#: How the tensors are sorted into groups.
SPLITS = {"one": [range(5)], "three": [[0, 3], [1], [2, 4]]}
RATES: dict[str, Any] = {
    "constant": [1.0] * 5,
    "warmup": [lambda t: min(1.0, t / 10)] * 5,
    "one group at 0": [1.0, 0.0, 1.0, 1.0, 1.0],
    "from 0 and back": [lambda t: max(0.0, math.sin(0.2 * (t - 1)))] * 5,
}
REFERENCES: dict[str, Callable[..., oracle.Path]] = {
    "prodigy": oracle.prodigy,
    "dadapt_adam": oracle.dadapt_adam,
    "dadapt_sgd": oracle.dadapt_sgd,
    "dog": oracle.dog,
    "dowg": oracle.dog,
}
#: Recipe, what differs from its defaults, and the same for the reference.
CASES: list[tuple[str, dict[str, Any], dict[str, Any]]] = [
    ("prodigy", {}, {}),
    ("prodigy", {"betas": (0.8, 0.95), "d0": 1e-3, "eps": 1e-2}, {"betas": (0.8, 0.95), "d0": 1e-3, "eps": 1e-2}),
    ("prodigy", {"bias_correction": True, "beta3": 0.9}, {"corrected": True, "beta3": 0.9}),
    ("prodigy", {"safeguard_warmup": True, "d_coef": 0.5}, {"safeguard": True, "d_coef": 0.5}),
    ("prodigy", {"growth_rate": 1.1, "decay": "coupled"}, {"growth": 1.1, "coupled": True}),
    ("prodigy", {"slice_p": 3}, {"every": 3}),
    ("dadapt_adam", {}, {}),
    ("dadapt_adam", {"betas": (0.8, 0.95), "d0": 1e-3, "eps": 1e-2}, {"betas": (0.8, 0.95), "d0": 1e-3, "eps": 1e-2}),
    ("dadapt_adam", {"bias_correction": True}, {"corrected": True}),
    ("dadapt_adam", {"growth_rate": 1.1, "decay": "coupled"}, {"growth": 1.1, "coupled": True}),
    ("dadapt_sgd", {}, {}),
    ("dadapt_sgd", {"momentum": 0.0, "d0": 1e-3, "growth_rate": 1.1}, {"momentum": 0.0, "d0": 1e-3, "growth": 1.1}),
    ("dog", {}, {}),
    ("dog", {"r_eps": 1e-3, "eps": 1.0}, {"r_eps": 1e-3, "eps": 1.0}),
    ("dowg", {}, {"r_eps": 1e-4, "eps": 1e-4, "weighted": True}),
    ("dowg", {"r_eps": 1e-2, "eps": 1.0}, {"r_eps": 1e-2, "eps": 1.0, "weighted": True}),
]


def grads(t: int, ps: Sequence[Tensor]) -> list[Tensor]:
    """Noise of the step, and a pull towards 2."""
    made = torch.Generator().manual_seed(t)
    return [0.3 * torch.randn(p.shape, generator=made, dtype=torch.float64) + (p.detach() - 2) for p in ps]


def parameters() -> list[nn.Parameter]:
    return [nn.Parameter(p.double()) for p in STARTS]


def estimate(opt: Any) -> float:
    """d, or DoG's distance, as the user reads it."""
    extra = opt.param_groups[0]["extra"]
    return float(extra["d"] if "d" in extra else extra["distance"])


def run(
    opt: Any, ps: Sequence[nn.Parameter], steps: int, rates: Sequence[Any] | None = None, first: int = 1
) -> oracle.Path:
    """Train; the path and the estimates."""
    place = {id(p): i for i, p in enumerate(ps)}
    path, found = [], []
    for t in range(first, first + steps):
        for group in opt.param_groups if rates else ():
            rate = rates[place[id(group["params"][0])]]  # type: ignore[index]
            group["lr"] = rate(t) if callable(rate) else rate
        for p, g in zip(ps, grads(t, ps)):
            p.grad = g
        opt.step()
        path.append([p.detach().clone() for p in ps])
        found.append(estimate(opt))
    return path, found


def close(a: oracle.Path, b: oracle.Path, bound: float = 1e-9) -> None:
    """Equal paths and estimates; a 0 of ours is an estimate that has not begun."""
    for i in range(len(SHAPES)):
        assert far([step[i] for step in a[0]], [step[i] for step in b[0]]) < bound
    assert [x for x in a[1] if x] == pytest.approx([y for x, y in zip(a[1], b[1]) if x], rel=bound)


# -- references ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rates", RATES)
@pytest.mark.parametrize("split", SPLITS)
@pytest.mark.parametrize(("name", "options", "same"), CASES)
def test_the_references_steps(name: str, options: dict[str, Any], same: dict[str, Any], split: str, rates: str) -> None:
    if split == "one" and "group" in rates:
        return
    decays = [0.1, 0.0, 0.2, 0.1, 0.2] if split == "three" else [0.1] * 5
    ps = parameters()
    groups = [{"params": [ps[i] for i in chosen], "weight_decay": decays[chosen[0]]} for chosen in SPLITS[split]]
    found = run(gd.optimizer(name, groups, **options), ps, 60, RATES[rates])
    want = REFERENCES[name]([p.double() for p in STARTS], grads, 60, RATES[rates], decays=decays, **same)
    close(found, want)
    assert want[1][-1] > 2 * min(x for x in want[1] if x)  # it has grown


@pytest.mark.parametrize("path", [{}, {"foreach": False}, {"compile": True}], ids=["lists", "plain", "compiled"])
@pytest.mark.parametrize("decay", [0.0, 0.1])
def test_ldog_is_dog_for_each_tensor(path: dict[str, bool], decay: float) -> None:
    ps = parameters()
    opt = gd.LDoG(ps, r_eps=1e-3, weight_decay=decay, **path)
    if path.get("compile"):
        opt._engine.compiled.backend = "eager"
    found: list[list[Tensor]] = []
    for t in range(1, 41):
        for p, g in zip(ps, grads(t, ps)):
            p.grad = g
        opt.step()
        found.append([p.detach().clone() for p in ps])
    for i, start in enumerate(STARTS):

        def own(t: int, one: Sequence[Tensor], i: int = i) -> list[Tensor]:
            others = [p.double() for p in STARTS]
            others[i] = one[0]
            return [grads(t, others)[i]]

        want, distance = oracle.dog([start.double()], own, 40, [1.0], r_eps=1e-3, decays=[decay])
        assert far([step[i] for step in found], [step[0] for step in want]) < 1e-11
        assert float(opt.state[ps[i]]["distance"]) == pytest.approx(distance[-1], rel=1e-9)


@pytest.mark.parametrize("decay", ["independent", "corrected", "cautious"])
@pytest.mark.parametrize("name", ["prodigy", "dadapt_adam"])
def test_the_decay_follows_the_rate_that_was_found(name: str, decay: str) -> None:
    """Two runs from one point, one with decay: they differ by the decay alone."""
    ps, qs = parameters(), parameters()
    plain = gd.optimizer(name, ps, d0=0.1)
    opt = gd.optimizer(name, qs, d0=0.1, weight_decay=0.3, decay=decay)
    for group in (plain.param_groups[0], opt.param_groups[0]):
        group["lr"] = 0.5  # half of its peak
    before, d = [p.detach().clone() for p in ps], 0.1
    run(plain, ps, 1)
    run(opt, qs, 1)
    share = {"independent": 0.5 * 0.3, "corrected": 0.5 * 0.5 * d * 0.3, "cautious": 0.5 * d * 0.3}[decay]
    for old, p, q in zip(before, ps, qs):
        mask = ((old - p.detach()) * old > 0).double() if decay == "cautious" else 1.0
        torch.testing.assert_close(q.detach(), p.detach() - share * mask * old, rtol=1e-12, atol=1e-13)


def test_a_multiplier_of_a_block_weighs_its_part_of_the_estimate() -> None:
    """``dadaptation`` calls it ``layer_scale``: r is in the momentum, the product and the norm, and not in s."""
    from guided_descent.parts import DAdaptMoments, Displace
    from guided_descent.recipes import DAdaptAdam

    class Scaled(DAdaptAdam):
        def cut(self, block: Any) -> tuple[Any, ...]:
            import dataclasses

            return (dataclasses.replace(block, lr_scale=0.25 if len(block.shape) > 1 else 1.0),)

    ps = parameters()
    opt = gd.build(ps, Scaled(d0=1e-2))
    assert {DAdaptMoments, Displace} < {type(part) for part in opt._engine.bind().buckets[0].parts}
    b1, b2, c, d, num = 0.9, 0.999, 0.999**0.5, 1e-2, 0.0
    want = [p.detach().clone() for p in ps]
    m, v, s = ([torch.zeros_like(p) for p in want] for _ in range(3))
    for t in range(1, 31):
        added = norm = 0.0
        for i, g in enumerate(grads(t, want)):
            r = 0.25 if want[i].ndim > 1 else 1.0
            added += r * d * float((g * s[i] / (v[i].sqrt() + 1e-8)).sum())
            m[i], v[i] = b1 * m[i] + r * d * (1 - b1) * g, b2 * v[i] + (1 - b2) * g**2
            s[i] = c * s[i] + d * (1 - c) * g
            norm += r * float(s[i].abs().sum())
        num = c * num + (1 - c) * added
        d = max(d, num / ((1 - c) * norm))
        want = [p - a / (b.sqrt() + 1e-8) for p, a, b in zip(want, m, v)]
    path, found = run(opt, ps, 30)
    assert found[-1] == pytest.approx(d, rel=1e-10)
    assert far(path[-1], want) < 1e-11


# -- peers -----------------------------------------------------------------------------------------------------------

PRODIGY: list[tuple[dict[str, Any], dict[str, Any]]] = [
    ({}, {}),
    ({"bias_correction": True}, {"use_bias_correction": True}),
    ({"safeguard_warmup": True, "weight_decay": 0.1}, {"safeguard_warmup": True, "weight_decay": 0.1}),
    ({"weight_decay": 0.1, "decay": "coupled"}, {"weight_decay": 0.1, "decouple": False}),
    ({"growth_rate": 1.02, "d_coef": 2.0, "beta3": 0.9}, {"growth_rate": 1.02, "d_coef": 2.0, "beta3": 0.9}),
    ({"slice_p": 3}, {"slice_p": 3}),
]
DADAPT: list[tuple[dict[str, Any], dict[str, Any]]] = [
    ({}, {}),
    ({"bias_correction": True}, {"use_bias_correction": True}),
    ({"weight_decay": 0.1}, {"weight_decay": 0.1, "decouple": True}),
    ({"weight_decay": 0.1, "decay": "coupled"}, {"weight_decay": 0.1}),
    ({"growth_rate": 1.02}, {"growth_rate": 1.02}),
]


def peer(make: Callable[[list[Any]], Any], ours: Callable[[list[Any]], Any], rates: Sequence[Any] | None) -> None:
    """Ours and the peer's take the same steps and find the same rate, with two groups."""
    ps, qs = parameters(), parameters()
    with contextlib.redirect_stdout(io.StringIO()):  # it prints its options
        theirs = make([{"params": qs[:2]}, {"params": qs[2:]}])
    opt = ours([{"params": ps[:2]}, {"params": ps[2:]}])
    for t in range(1, 61):
        for group in (*opt.param_groups, *theirs.param_groups) if rates else ():
            group["lr"] = rates[0](t)  # type: ignore[index]
        for params in (ps, qs):
            for p, g in zip(params, grads(t, params)):
                p.grad = g
        opt.step()
        theirs.step()
        assert far([p.detach() for p in ps], [q.detach() for q in qs]) < 1e-8
        assert estimate(opt) == pytest.approx(theirs.param_groups[0]["d"], rel=1e-8)


@pytest.mark.parametrize("warmup", [False, True])
@pytest.mark.parametrize(("ours", "theirs"), PRODIGY)
def test_prodigy_equals_the_package(ours: dict[str, Any], theirs: dict[str, Any], warmup: bool) -> None:
    package = pytest.importorskip("prodigyopt")
    rates = RATES["warmup"] if warmup else None
    peer(lambda groups: package.Prodigy(groups, **theirs), lambda groups: gd.Prodigy(groups, **ours), rates)


@pytest.mark.parametrize(("ours", "theirs"), DADAPT)
def test_dadapt_adam_equals_the_package(ours: dict[str, Any], theirs: dict[str, Any]) -> None:
    package = pytest.importorskip("dadaptation")
    peer(lambda groups: package.DAdaptAdam(groups, **theirs), lambda groups: gd.DAdaptAdam(groups, **ours), None)


@pytest.mark.parametrize("options", [{"momentum": 0.0}, {"momentum": 0.9}, {"momentum": 0.9, "growth_rate": 1.02}])
def test_dadapt_sgd_equals_the_package(options: dict[str, Any]) -> None:
    package = pytest.importorskip("dadaptation")
    peer(lambda groups: package.DAdaptSGD(groups, **options), lambda groups: gd.DAdaptSGD(groups, **options), None)


# -- identities ------------------------------------------------------------------------------------------------------

ALL = ("prodigy", "dadapt_adam", "dadapt_sgd", "dog", "dowg")


@pytest.mark.parametrize("name", ALL)
def test_a_split_into_groups_changes_nothing(name: str) -> None:
    found = []
    for split in SPLITS.values():
        ps = parameters()
        opt = gd.optimizer(name, [{"params": [ps[i] for i in chosen]} for chosen in split])
        found.append(run(opt, ps, 60))
        assert len({id(group["extra"][key]) for group in opt.param_groups for key in group["extra"]}) == len(
            opt.param_groups[0]["extra"]
        )  # one tensor for all groups
    close(found[0], found[1], 1e-11)


@pytest.mark.parametrize("name", ALL)
def test_the_estimate_grows_and_never_falls(name: str) -> None:
    ps = parameters()
    _, found = run(gd.optimizer(name, ps), ps, 200)
    assert all(b >= a for a, b in itertools.pairwise(found))
    assert found[-1] > 100 * found[0]


@pytest.mark.parametrize("distance", [0.1, 3.0, 50.0])
@pytest.mark.parametrize(
    ("name", "norm", "low", "high"),
    [
        ("prodigy", math.inf, 0.3, 1.0),
        ("dadapt_adam", math.inf, 1.0, 3.0),
        ("dadapt_sgd", 2, 1.0, 3.3),
        ("dog", 2, 0.999, 1.001),
        ("dowg", 2, 1.0, 1.5),
    ],
)
def test_on_a_quadratic_the_estimate_is_near_the_distance(
    name: str, norm: float, low: float, high: float, distance: float
) -> None:
    p, goal = nn.Parameter(torch.zeros(10, dtype=torch.float64)), torch.full((10,), distance, dtype=torch.float64)
    opt = gd.optimizer(name, [p])
    for _ in range(1500):
        p.grad = p.detach() - goal
        opt.step()
    assert low <= estimate(opt) / float(torch.linalg.vector_norm(goal, norm)) <= high
    assert float((p.detach() - goal).norm()) < 1e-4 * distance


def test_an_estimate_that_stays_makes_prodigy_adam() -> None:
    ps, qs = parameters(), parameters()
    d0 = 0.02
    run(gd.Prodigy(ps, d0=d0, d_coef=1e-12, bias_correction=True, eps=1e-8, lr=1.0), ps, 40)
    run_plain(gd.AdamW(qs, lr=d0, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.0), qs, 40)
    for p, q in zip(ps, qs):  # eps is added to a root that is corrected there and not here
        torch.testing.assert_close(p.detach(), q.detach(), rtol=1e-6, atol=1e-6)


def run_plain(opt: Any, ps: Sequence[nn.Parameter], steps: int) -> None:
    for t in range(1, steps + 1):
        for p, g in zip(ps, grads(t, ps)):
            p.grad = g
        opt.step()


# -- what changes nothing, and what is shared ------------------------------------------------------------------------


@pytest.mark.parametrize("name", ALL)
def test_gradients_and_rates_of_zero_change_nothing(name: str) -> None:
    ps = parameters()
    opt = gd.optimizer(name, ps, weight_decay=0.1 if name in ("prodigy", "dadapt_adam") else 0.0)
    for p in ps:
        p.grad = torch.zeros_like(p)
    opt.step()
    assert all(torch.equal(p, start.double()) for p, start in zip(ps, STARTS))
    opt.param_groups[0]["lr"] = 0.0
    for p, g in zip(ps, grads(1, ps)):
        p.grad = g
    opt.step()
    assert all(torch.equal(p, start.double()) for p, start in zip(ps, STARTS))
    opt.param_groups[0]["lr"] = 1.0
    opt.step()
    assert not any(torch.equal(p, start.double()) for p, start in zip(ps, STARTS))


@pytest.mark.parametrize("name", ALL)
def test_a_group_that_joins_late_takes_the_estimate_of_the_others(name: str) -> None:
    ps = parameters()
    opt = gd.optimizer(name, ps[:3])
    run(opt, ps[:3], 30)
    before = estimate(opt)
    opt.add_param_group({"params": ps[3:]})
    extra = [group["extra"] for group in opt.param_groups]
    assert all(extra[0][key] is extra[1][key] for key in extra[0])
    run(opt, ps, 30, first=31)
    assert estimate(opt) >= before > 1e-3
    fresh = gd.optimizer(name, [{"params": (qs := parameters())[:3]}, {"params": qs[3:]}])
    fresh.load_state_dict(copy.deepcopy(opt.state_dict()))
    extra = [group["extra"] for group in fresh.param_groups]
    assert all(extra[0][key] is extra[1][key] for key in extra[0])
    assert estimate(fresh) == estimate(opt)
    for p, q in zip(ps, qs):
        q.data.copy_(p.detach())
    close(run(opt, ps, 20, first=61), run(fresh, qs, 20, first=61), 1e-300)
    twin_ps, twin = copy.deepcopy((ps, opt))
    close(run(opt, ps, 5, first=81), run(twin, twin_ps, 5, first=81), 1e-300)


@pytest.mark.parametrize(
    ("name", "number", "value"),
    [
        ("prodigy", "d0", 1e-5),
        ("prodigy", "d_coef", 2.0),
        ("prodigy", "growth_rate", 1.5),
        ("prodigy", "beta3", 0.5),
        ("dadapt_adam", "betas", (0.9, 0.99)),
        ("dadapt_sgd", "growth_rate", 1.5),
        ("dog", "r_eps", 1e-3),
        ("dowg", "eps", 1e-3),
    ],
)
def test_groups_agree_on_what_the_estimate_is_made_with(name: str, number: str, value: Any) -> None:
    ps = parameters()
    opt = gd.optimizer(name, [{"params": ps[:2]}, {"params": ps[2:], number: value}])
    for p in ps:
        p.grad = torch.ones_like(p)
    with pytest.raises(
        ValueError, match=rf"{number}.* of {name} differs between the param groups 0 and 1 .*give it once"
    ):
        opt.step()
    assert all(torch.equal(p, start.double()) for p, start in zip(ps, STARTS))
    assert opt.steps == 0


def test_groups_agree_on_the_structure_of_the_estimate() -> None:
    ps = parameters()
    opt = gd.Prodigy([{"params": ps[:2]}, {"params": ps[2:], "safeguard_warmup": True}])
    for p in ps:
        p.grad = torch.ones_like(p)
    with pytest.raises(ValueError, match="its structure of prodigy differs"):
        opt.step()


def test_groups_may_differ_in_what_the_estimate_does_not_need() -> None:
    ps = parameters()
    opt = gd.Prodigy([{"params": ps[:2], "lr": 0.5}, {"params": ps[2:], "betas": (0.5, 0.999), "eps": 1e-6}])
    _, found = run(opt, ps, 20)
    assert found[-1] > found[0]


def test_two_methods_side_by_side_have_an_estimate_each() -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2)).double()
    opt = gd.Prodigy(model, rules=[gd.rule("*.bias", recipe="dadapt_adam")])
    ps = list(model.parameters())
    run(opt, ps, 30)
    found = {group["recipe"]: float(group["extra"]["d"]) for group in opt.param_groups}
    assert found["prodigy"] != found["dadapt_adam"]
    assert min(found.values()) > 1e-6


@pytest.mark.parametrize("value", [0, -1, True])
def test_slices_are_counted_from_one(value: int) -> None:
    with pytest.raises(ValueError, match=r"slice_p=.* must be >= 1"):
        gd.Prodigy(parameters(), slice_p=value)


def test_slices_take_less_memory_and_complex_numbers() -> None:
    p = nn.Parameter(torch.randn(100, 10))
    sizes = [gd.Prodigy([nn.Parameter(p.detach().clone())], slice_p=k).state_bytes() for k in (1, 10)]
    assert sizes[0] - sizes[1] == 4 * 2 * 900
    q = nn.Parameter(torch.randn(7, 3, dtype=torch.complex64))
    opt = gd.Prodigy([q], slice_p=2, d0=1e-2)
    for _ in range(10):
        q.grad = q.detach() - 1
        opt.step()
    assert opt.state[q]["p0"].shape == (11,)
    assert estimate(opt) > 1e-2
    assert bool(torch.isfinite(torch.view_as_real(q)).all())


@pytest.mark.parametrize("rounding", ["master", "compensated"])
@pytest.mark.parametrize("name", ["prodigy", "dadapt_sgd", "dog"])
def test_the_estimate_grows_from_steps_that_bfloat16_cannot_show(name: str, rounding: str) -> None:
    """Steps of 1e-6 are nothing beside a weight of 1 in bfloat16: the way is measured with what its rounding keeps."""
    found = []
    for dtype in (torch.float32, torch.bfloat16):
        p = nn.Parameter(torch.ones(64, dtype=dtype))
        opt = gd.optimizer(name, [p], rounding=rounding)
        for t in range(60):
            noise = torch.randn(64, generator=torch.Generator().manual_seed(t))
            p.grad = (p.detach().float() - 3 + 0.1 * noise).to(dtype)
            opt.step()
        found.append(estimate(opt))
    assert found[1] == pytest.approx(found[0], rel=0.1)


def test_a_loss_without_a_minimum_ends_at_a_bound() -> None:
    for name in ("prodigy", "dadapt_adam", "dadapt_sgd"):
        p = nn.Parameter(torch.zeros(3))
        opt = gd.optimizer(name, [p])
        for _ in range(400):
            p.grad = torch.ones(3)
            opt.step()
        assert 1.0 < estimate(opt) <= 1e15
        assert bool(torch.isfinite(p).all())


# -- the average of DoG ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("gamma", [0.0, 1.0, 8.0])
def test_the_polynomial_average_has_its_closed_form(gamma: float) -> None:
    model = nn.Linear(1, 1, bias=False).double()
    average, seen = PolynomialAverage(model, gamma=gamma), []
    for t in range(1, 41):
        seen.append(float(torch.randn(1, generator=torch.Generator().manual_seed(t))))
        nn.init.constant_(model.weight, seen[-1])
        average.update()
        weights = [
            (gamma + 1) / (s + gamma) * math.prod((r - 1) / (r + gamma) for r in range(s + 1, t + 1))
            for s in range(1, t + 1)
        ]
        assert sum(weights) == pytest.approx(1)
        want = sum(w * x for w, x in zip(weights, seen))
        assert float(average.evaluation_weights(model)["weight"]) == pytest.approx(want, rel=1e-9)
    if gamma == 0:
        assert want == pytest.approx(sum(seen) / len(seen))


def test_the_polynomial_average_serves_dog_and_resumes() -> None:
    model = nn.Linear(4, 1, bias=False)
    opt = gd.DoG(model, r_eps=1e-3)
    average, far_off = PolynomialAverage(model, optimizer=opt), []
    for t in range(300):
        made = torch.Generator().manual_seed(t)
        x = torch.randn(4, 4, generator=made)
        opt.zero_grad()
        (model(x) - x.sum(1, keepdim=True) - torch.randn(4, 1, generator=made)).square().mean().backward()
        opt.step()
        average.update()
        far_off.append(float((model.weight.detach() - 1).norm()))
    with evaluating(model, average):
        assert float((model.weight.detach() - 1).norm()) < 0.7 * sum(far_off[-50:]) / 50
    resumed = PolynomialAverage(model, optimizer=opt)
    resumed.load_state_dict(average.state_dict())
    nn.init.zeros_(model.weight)
    opt.param_groups[0]["steps"] += 3  # three steps at once
    average.update()
    resumed.update()
    for name, value in average.evaluation_weights(model).items():
        assert torch.equal(value, resumed.evaluation_weights(model)[name])


def test_gamma_is_no_negative_number() -> None:
    for gamma in (-1.0, math.inf, math.nan):
        with pytest.raises(ValueError, match="gamma="):
            PolynomialAverage(nn.Linear(1, 1), gamma=gamma)
