"""What any recipe can carry: numbers of added wrappers as group keys, Lookahead, SAM and ASAM."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import guided_descent as gd
from guided_descent.parts import (
    ASAM,
    GPA,
    SAM,
    WRAPPERS,
    Cautious,
    Lookahead,
    Part,
    Parts,
    ScheduleFree,
    Wrapper,
)
from guided_descent.recipes.base import REGISTRY, hyper
from oracles import adam_family as family
from oracles import averaging as oracle
from oracles.training import far, stream, train

PATHS: list[dict[str, bool]] = [{}, {"foreach": False}, {"compile": True}]
IDS = ["lists", "plain", "compiled"]
STEPS = 40


class Net(nn.Module):
    """Matrices that are not square, a convolution and vectors."""

    def __init__(self, dtype: torch.dtype = torch.float64, norm: bool = False) -> None:
        super().__init__()
        made = torch.Generator().manual_seed(7)
        self.conv = nn.Conv2d(2, 3, 2)
        self.norm = nn.BatchNorm2d(3) if norm else nn.Identity()
        self.mid = nn.Linear(12, 5)
        self.head = nn.Linear(5, 3)
        with torch.no_grad():
            for p in self.parameters():
                p.copy_(torch.randn(p.shape, generator=made) * 0.5)
        self.to(dtype)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.mid(torch.tanh(self.norm(self.conv(x))).flatten(1))))


def batch(number: int, dtype: torch.dtype = torch.float64) -> Tensor:
    made = torch.Generator().manual_seed(100 + number)
    return torch.randn(12, 2, 3, 3, generator=made, dtype=torch.float64).to(dtype)


def loss_at(names: list[str], model: nn.Module) -> Callable[[int, list[Tensor]], Tensor]:
    """The loss of a batch as a function of the parameters."""

    def loss(t: int, tensors: list[Tensor]) -> Tensor:
        out = torch.func.functional_call(model, dict(zip(names, tensors)), (batch(t),))
        return (out - 1).square().mean()

    return loss


def run(opt: gd.Optimizer, model: nn.Module, steps: int = STEPS, first: int = 1, closure: bool = True) -> list[float]:
    """Train; the losses that ``step`` returns."""
    losses = []
    for number in range(first, first + steps):

        def evaluate(number: int = number) -> Tensor:
            opt.zero_grad()
            loss = (model(batch(number, next(model.parameters()).dtype)) - 1).square().mean()
            loss.backward(create_graph=opt.due("hessian"))
            return loss

        losses.append(float((opt.step(evaluate) if closure else (evaluate(), opt.step())[0]).detach()))
    return losses


def path(opt: gd.Optimizer, model: nn.Module) -> list[list[Tensor]]:
    found: list[list[Tensor]] = [[] for _ in model.parameters()]
    for number in range(1, STEPS + 1):
        run(opt, model, 1, first=number)
        for list_, p in zip(found, model.parameters()):
            list_.append(p.detach().clone())
    return found


def built(make: Any, model: nn.Module, **options: Any) -> gd.Optimizer:
    opt = make(model, **options)
    if options.get("compile"):
        opt._engine.compiled.backend = "eager"
    return opt


def weights(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters()}


# -- numbers ---------------------------------------------------------------------------------------------------------


def test_numbers_of_wrappers_are_group_keys() -> None:
    model = Net()
    opt = gd.Muon(model, add=[SAM(rho=0.1), Lookahead(k=3)])
    assert len(opt.param_groups) == 2
    for group in opt.param_groups:
        assert (group["sam_rho"], group["lookahead_k"], group["lookahead_alpha"]) == (0.1, 3, 0.5)
    assert "sam_rho=0.1, lookahead_k=3, lookahead_alpha=0.5" in repr(opt)
    assert "sam_rho=0.1" in str(gd.explain(opt))
    assert list(gd.explain(opt).to_dict()["added"]) == [
        {"wrapper": "sam", "group": 0, "numbers": {"sam_rho": 0.1}},
        {"wrapper": "lookahead", "group": 0, "numbers": {"lookahead_k": 3, "lookahead_alpha": 0.5}},
        {"wrapper": "sam", "group": 1, "numbers": {"sam_rho": 0.1}},
        {"wrapper": "lookahead", "group": 1, "numbers": {"lookahead_k": 3, "lookahead_alpha": 0.5}},
    ]
    assert gd.explain(gd.Muon(Net())).added == ()


def test_groups_and_rules_have_numbers_of_their_own() -> None:
    model = Net()
    rules = [gd.rule("*.bias", sam_rho=0.0), gd.rule("head.weight", recipe="sgd", lr=0.1, sam_rho=0.3)]
    opt = gd.AdamW(model, add=[SAM()], rules=rules)
    rho = {name: group["sam_rho"] for group in opt.param_groups for name in group["param_names"]}
    assert rho == {
        "conv.weight": 0.05,
        "conv.bias": 0.0,
        "mid.weight": 0.05,
        "mid.bias": 0.0,
        "head.weight": 0.3,
        "head.bias": 0.0,
    }
    p, q, r = (nn.Parameter(torch.ones(3)) for _ in range(3))
    opt = gd.SGD([{"params": [p], "lookahead_alpha": 0.25}, {"params": [q], "note": "mine"}], lr=1, add=[Lookahead()])
    opt.add_param_group({"params": [r], "lookahead_k": 2})
    assert [(g["lookahead_k"], g["lookahead_alpha"]) for g in opt.param_groups] == [(5, 0.25), (5, 0.5), (2, 0.5)]
    assert opt.param_groups[1]["note"] == "mine"


def test_misspelled_and_impossible_numbers_are_errors() -> None:
    p = nn.Parameter(torch.ones(3))
    with pytest.raises(TypeError, match="rh"):
        SAM(rh=0.1)  # type: ignore[call-arg]
    with pytest.raises(ValueError, match=r"rho=-1\.0 of sam must be >= 0"):
        SAM(rho=-1.0)
    with pytest.raises(TypeError, match=r"sam_roh.*did you mean 'sam_rho'"):
        gd.SGD([{"params": [p], "sam_roh": 0.1}], lr=1, add=[SAM()])
    with pytest.raises(ValueError, match=r"rho=-0\.1 of sam must be >= 0"):
        gd.SGD([{"params": [p], "sam_rho": -0.1}], lr=1, add=[SAM()])
    with pytest.raises(TypeError, match=r"rule '\*' sets 'sam_rho', which sgd does not have"):
        gd.SGD(nn.Linear(2, 2), lr=1, rules=[gd.rule("*", sam_rho=0.1)])
    with pytest.raises(TypeError, match=r"rule '\*' sets 'sam_roh'.*did you mean 'sam_rho'"):
        gd.SGD(nn.Linear(2, 2), lr=1, add=[SAM()], rules=[gd.rule("*", sam_roh=0.1)])
    with pytest.raises(ValueError, match="add holds lookahead twice"):
        gd.SGD([p], lr=1, add=[Lookahead(), Lookahead(k=50)])
    for wrong in ("sam", SAM, "SAM"):
        with pytest.raises(TypeError, match=r"neither; write guided_descent\.parts\.SAM\(\)"):
            gd.SGD([p], lr=1, add=[wrong])
    with pytest.raises(TypeError, match="add takes wrappers and parts, and 3 is neither"):
        gd.SGD([p], lr=1, add=[3])
    with pytest.raises(ValueError, match=r"'sam' is a wrapper.*add=\[guided_descent\.parts\.SAM\(\)\]"):
        gd.optimizer("sam", [p])


def test_checkpoints_hold_the_numbers_and_check_them() -> None:
    model, other = Net(), Net()
    opt, fresh = gd.SGD(model, lr=0.1, add=[Lookahead(k=3)]), gd.SGD(other, lr=0.1, add=[Lookahead()])
    opt.param_groups[0]["lookahead_alpha"] = 0.75
    run(opt, model, 7)
    saved = copy.deepcopy(opt.state_dict())
    other.load_state_dict(model.state_dict())
    fresh.load_state_dict(saved)
    assert (fresh.param_groups[0]["lookahead_k"], fresh.param_groups[0]["lookahead_alpha"]) == (3, 0.75)
    run(opt, model, 5, first=8)
    run(fresh, other, 5, first=8)
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), other.parameters()))
    saved["param_groups"][0]["lookahead_alpha"] = 1.5
    with pytest.raises(ValueError, match=r"alpha=1\.5 of lookahead must be <= 1"):
        fresh.load_state_dict(saved)
    del saved["param_groups"][0]["lookahead_alpha"]
    with pytest.warns(UserWarning, match="lacks lookahead_alpha"):
        fresh.load_state_dict(saved)
    with pytest.raises(ValueError, match="slow_weights"):
        gd.SGD(Net(), lr=0.1).load_state_dict(saved)


def test_a_scheduler_may_write_a_number_of_a_wrapper() -> None:
    """What is in the group counts in the next step."""
    start, grad = torch.randn(4, 3, dtype=torch.float64), stream((4, 3), 1)
    p = nn.Parameter(start.clone())
    opt = gd.SGD([p], lr=0.1, add=[Lookahead(k=1, alpha=1.0)])
    for t in range(1, 8):
        before = p.detach().clone()
        opt.param_groups[0]["lookahead_alpha"] = 1 / t
        train(opt, [p], [grad], 1, start=t)
        torch.testing.assert_close(p.detach(), before - 0.1 / t * grad(t, before))


def test_a_wrapper_of_the_users_own() -> None:
    """Fields, a part, and no line for groups, checkpoints or checks."""
    from dataclasses import dataclass

    @dataclass(frozen=True, kw_only=True)
    class Slower(Wrapper):
        prefix = "slower_"
        by: float = hyper(2.0, gt=0)

        def part(self) -> Part:
            return Shrink()

    @dataclass(frozen=True)
    class Shrink(Part):
        slot = "scale"

        @property
        def keys(self) -> tuple[str, ...]:
            return ("slower_by",)

        def update(self, x: Any, s: Any, h: Any, total: Any) -> None:
            x.scale(1 / h["slower_by"])

    p, q = nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(3))
    one, two = gd.SGD([p], lr=0.2, add=[Slower(by=4.0)]), gd.SGD([q], lr=0.05)
    assert far(train(one, [p], [stream((3,))], 5)[0], train(two, [q], [stream((3,))], 5)[0]) < 1e-6
    with pytest.raises(ValueError, match=r"by=0 of Slower must be > 0"):
        Slower(by=0)


def test_wrappers_are_in_the_catalogue() -> None:
    assert gd.list_optimizers(family="wrapper") == sorted(WRAPPERS)
    assert not set(WRAPPERS) & set(gd.list_optimizers())
    for key, info in WRAPPERS.items():
        described = gd.describe(key)
        assert described.family == "wrapper"
        assert described.paper == info.paper
        text = str(described)
        assert all(item["name"] in text for item in described.hyperparameters)
        assert all(item["help"] for item in described.hyperparameters)
        assert getattr(gd.parts, info.cls.__name__) is info.cls


@pytest.mark.parametrize("key", sorted(REGISTRY))
def test_every_recipe_carries_every_wrapper(key: str) -> None:
    cls = REGISTRY[key].cls
    for wrappers in ([SAM(), Cautious()], [ASAM(), Lookahead(k=2)], [ScheduleFree()], [GPA(mu_x=0.5)]):
        model = Net(torch.float32)
        own = cls().parts(gd.routing.route(nn.Linear(3, 3)).blocks[0])
        if Parts(*(wrapper.part() for wrapper in wrappers)).average and (own.average or cls().couples):
            continue  # refused: see test_one_average_at_a_time
        loss = {"loss": "mse"} if cls.reads_layers or cls.samples_labels else {}
        first = {"d0": 1e-2} if "d0" in cls.numbers() else {}  # a rate that six steps show
        opt = gd.optimizer(key, model, add=wrappers, lr=1e-3, **loss, **first)
        before = weights(model)
        losses = run(opt, model, 6)
        assert opt.skipped == 0
        assert all(torch.isfinite(p).all() for p in model.parameters())
        assert not all(torch.equal(p, before[name]) for name, p in model.named_parameters())
        assert all(loss == loss for loss in losses)
        held = weights(model)
        opt.eval()
        opt.train()
        assert all(torch.equal(p, held[name]) for name, p in model.named_parameters())


# -- Lookahead -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", PATHS, ids=IDS)
@pytest.mark.parametrize(("name", "rule"), [("sgd", oracle.plain), ("adamw", family.adam((0.9, 0.999)))])
def test_lookahead_is_its_reference(name: str, rule: family.Rule, options: dict[str, bool]) -> None:
    starts = [torch.randn(shape, dtype=torch.float64) for shape in [(4, 5), (6,), (3, 2, 2, 2)]]
    params = [nn.Parameter(p.clone()) for p in starts]
    decay = 0.2 if name == "adamw" else 0.0
    opt = gd.optimizer(name, params, lr=0.05, weight_decay=decay, add=[Lookahead(k=4, alpha=0.3)], **options)
    if options.get("compile"):
        opt._engine.compiled.backend = "eager"
    grads = [stream(tuple(p.shape), i) for i, p in enumerate(starts)]
    want = [oracle.lookahead(p, g, STEPS, 0.05, rule, 4, 0.3, decay) for p, g in zip(starts, grads)]
    for t in range(1, STEPS + 1):
        train(opt, params, grads, 1, start=t)
        found = opt.evaluation_weights(nn.ParameterList(params))
        for i, (p, paths) in enumerate(zip(params, want)):
            assert far([p.detach()], [paths["fast"][t - 1]]) < 1e-12
            assert far([found[str(i)]], [paths["slow"][t - 1]]) < 1e-12


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("options", PATHS, ids=IDS)
@pytest.mark.parametrize("make", [gd.SGD, gd.AdamW, gd.Muon])
def test_lookahead_that_goes_all_the_way_is_the_recipe(make: Any, options: dict[str, Any], dtype: torch.dtype) -> None:
    one, two = Net(dtype), Net(dtype)
    more = {**options, "lr": 0.01, "rounding": "master"}
    a, b = built(make, one, **more, fused=False), built(make, two, **more, add=[Lookahead(k=2, alpha=1.0)])
    run(a, one, 9)
    run(b, two, 9)
    assert all(torch.equal(p, q) for p, q in zip(one.parameters(), two.parameters()))


def test_slow_weights_begin_where_the_first_update_does() -> None:
    """Not where the optimizer was built, since weights may be loaded later; also where the first update is silent."""
    for make in (gd.SGD, gd.ADOPT):
        p = nn.Parameter(torch.zeros(3, dtype=torch.float64))
        opt = make([p], lr=0.5, add=[Lookahead(k=2, alpha=0.5)])
        with torch.no_grad():
            p.fill_(1.0)
        train(opt, [p], [lambda t, p: torch.ones_like(p)] * 1, 1)
        torch.testing.assert_close(opt.state[p]["slow_weights"], torch.ones(3, dtype=torch.float64))


# -- SAM and ASAM ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", PATHS, ids=IDS)
@pytest.mark.parametrize("wrapper", [SAM(rho=0.1), ASAM(rho=0.5, eta=0.05)], ids=["sam", "asam"])
@pytest.mark.parametrize(("make", "rule"), [(gd.SGD, oracle.plain), (gd.AdamW, family.adam((0.9, 0.999)))])
def test_sharpness_aware_steps_are_the_references(make: Any, rule: Any, wrapper: Any, options: dict[str, Any]) -> None:
    model = Net()
    names = [name for name, _ in model.named_parameters()]
    start = [p.detach().clone() for p in model.parameters()]
    opt = built(make, model, lr=0.05, weight_decay=0.0, add=[wrapper], **options)
    eta = getattr(wrapper, "eta", None)
    want = oracle.sharpness_aware(start, loss_at(names, Net()), STEPS, 0.05, rule, wrapper.rho, eta)
    assert max(map(far, path(opt, model), want)) < 1e-11


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("wrapper", [SAM(rho=0.0), ASAM(rho=0.0)], ids=["sam", "asam"])
@pytest.mark.parametrize("make", [gd.SGD, gd.AdamW, gd.Muon, gd.NormalizedSGD])
def test_without_a_neighbourhood_it_is_the_recipe(make: Any, wrapper: Any, dtype: torch.dtype) -> None:
    one, two = Net(dtype), Net(dtype)
    a, b = make(one, lr=0.01, fused=False), make(two, lr=0.01, add=[wrapper])
    run(a, one, 9)
    run(b, two, 9)
    assert all(torch.equal(p, q) for p, q in zip(one.parameters(), two.parameters()))


def test_the_norm_is_that_of_the_model_over_all_groups() -> None:
    model = Net()
    opt = gd.Muon(model, add=[SAM(rho=0.25)], rules=[gd.rule("*.bias", sam_rho=0.25)])
    assert len(opt.param_groups) > 2
    for group in opt.param_groups:
        group["lr"] = 0.0
    seen: list[dict[str, Tensor]] = []
    gradients: list[dict[str, Tensor]] = []

    def closure() -> Tensor:
        seen.append(weights(model))
        opt.zero_grad()
        loss = (model(batch(1)) - 1).square().mean()
        loss.backward()
        gradients.append({name: p.grad.clone() for name, p in model.named_parameters()})
        return loss

    opt.step(closure)
    norm = torch.cat([g.flatten() for g in gradients[0].values()]).norm()
    for name, there in seen[1].items():
        torch.testing.assert_close(there, seen[0][name] + 0.25 * gradients[0][name] / norm)
    assert all(torch.equal(p, seen[0][name]) for name, p in model.named_parameters())  # lr 0: back to the bit


def test_a_gradient_of_zero_has_no_direction() -> None:
    p = nn.Parameter(torch.ones(3))
    opt = gd.SGD([p], lr=0.1, add=[SAM()])

    def closure() -> None:
        p.grad = torch.zeros(3)

    opt.step(closure)
    assert torch.equal(p, torch.ones(3))


@pytest.mark.parametrize("wrapper", [SAM, ASAM])
def test_without_a_closure_the_error_says_what_to_do(wrapper: Any) -> None:
    model = Net(torch.float32)
    opt = gd.SGD(model, lr=0.1, add=[wrapper()])
    (model(batch(1, torch.float32)) - 1).square().mean().backward()
    before = weights(model)
    with pytest.raises(ValueError, match=r"Ascent needs 2 gradient evaluations a step: call step\(closure\)"):
        opt.step()
    scaler = torch.amp.GradScaler("cpu")
    scaler.scale((model(batch(1, torch.float32)) - 1).square().mean()).backward()
    with pytest.raises(ValueError, match="a GradScaler cannot do that, so train in bfloat16 or float32 without one"):
        scaler.step(opt)
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())
    assert opt.steps == 0


def test_a_second_pass_that_overflows_is_skipped_whole() -> None:
    model = Net(torch.float32)
    opt = gd.AdamW(model, lr=0.1, add=[SAM()])
    run(opt, model, 2)
    before, state = weights(model), copy.deepcopy(opt.state_dict()["state"])
    calls = []

    def closure() -> Tensor:
        calls.append(0)
        opt.zero_grad()
        loss = (model(batch(1, torch.float32)) - 1).square().mean() * (1.0 if len(calls) == 1 else float("inf"))
        loss.backward()
        return loss

    opt.step(closure)
    assert (len(calls), opt.skipped, opt.steps) == (2, 1, 2)
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())
    now = opt.state_dict()["state"]
    assert all(torch.equal(value, now[i][name]) for i, values in state.items() for name, value in values.items())


def test_a_closure_that_fails_in_the_second_pass_leaves_the_parameters() -> None:
    model = Net(torch.float32)
    opt = gd.SGD(model, lr=0.1, add=[SAM()])
    before, calls = weights(model), []

    def closure() -> Tensor:
        calls.append(0)
        if len(calls) == 2:
            raise RuntimeError("out of memory")
        loss = (model(batch(1, torch.float32)) - 1).square().mean()
        loss.backward()
        return loss

    with pytest.raises(RuntimeError, match="out of memory"):
        opt.step(closure)
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())


def test_running_statistics_count_the_first_pass_alone() -> None:
    one, two = Net(norm=True), Net(norm=True)
    run(gd.SGD(one, lr=0.0), one, 5)
    opt = gd.SGD(two, lr=0.0, add=[SAM(rho=0.5)])
    run(opt, two, 5)
    assert int(two.norm.num_batches_tracked) == 5
    for name, buffer in one.named_buffers():
        assert torch.equal(buffer, dict(two.named_buffers())[name]), name
    other, twin = copy.deepcopy((two, opt))  # a copy knows its model once it is told
    twin.watch(other)
    run(twin, other, 1)
    assert int(other.norm.num_batches_tracked) == 6
    blind = gd.SGD(list(two.parameters()), lr=0.0, add=[SAM(rho=0.5)])
    run(blind, two, 1)
    assert int(two.norm.num_batches_tracked) == 7  # from a list it knows no model


def test_one_extra_gradient_at_a_time() -> None:
    model = Net()
    with pytest.raises(ValueError, match="Ascent and ScaledAscent take gradients at points of their own"):
        gd.SGD(model, lr=1, add=[SAM(), ASAM()])
    with pytest.raises(ValueError, match="ExactCorrection and Ascent take gradients at points of their own"):
        gd.MARS(model, exact=True, add=[SAM()])


# -- MARS with exact differences ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", PATHS, ids=IDS)
@pytest.mark.parametrize(("betas", "gamma"), [((0.95, 0.99), 0.025), ((0.8, 0.95), 0.3)])
def test_exact_mars_is_its_reference(betas: tuple[float, float], gamma: float, options: dict[str, Any]) -> None:
    model = Net()
    names = [name for name, _ in model.named_parameters()]
    start = [p.detach().clone() for p in model.parameters()]
    opt = built(gd.MARS, model, lr=0.05, betas=betas, gamma=gamma, exact=True, **options)
    want = oracle.exact_mars(start, loss_at(names, Net()), STEPS, 0.05, family.adam(betas), betas[0], gamma)
    assert max(map(far, path(opt, model), want)) < 1e-11
    if "compile" in options:
        assert opt._engine.compiled._graphs  # type: ignore[attr-defined]


def test_exact_mars_without_a_share_is_adamw_on_clipped_gradients() -> None:
    one, two = Net(), Net()
    run(gd.MARS(one, lr=0.01, gamma=0.0, exact=True), one, 12)
    run(gd.MARS(two, lr=0.01, gamma=0.0), two, 12)
    assert all(far([p.detach()], [q.detach()]) < 1e-13 for p, q in zip(one.parameters(), two.parameters()))


def test_exact_mars_on_one_batch_is_the_other_form() -> None:
    """Where every batch is the same, the last gradient is that of the last parameters."""
    finals = []
    for exact in (False, True):
        model = Net()
        opt = gd.MARS(model, lr=0.01, exact=exact, gamma=0.2)
        for _ in range(12):

            def closure(opt: Any = opt, model: nn.Module = model) -> Tensor:
                opt.zero_grad()
                loss = (model(batch(1)) - 1).square().mean()
                loss.backward()
                return loss

            opt.step(closure)
        finals.append(weights(model))
    assert all(far([finals[0][name]], [finals[1][name]]) < 1e-12 for name in finals[0])


def test_exact_mars_resumes_and_takes_bfloat16() -> None:
    model, other = Net(torch.bfloat16), Net(torch.bfloat16)
    opt, fresh = gd.MARS(model, exact=True), gd.MARS(other, exact=True)
    run(opt, model, 5)
    other.load_state_dict(model.state_dict())
    fresh.load_state_dict(copy.deepcopy(opt.state_dict()))
    run(opt, model, 5, first=6)
    run(fresh, other, 5, first=6)
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), other.parameters()))
    with pytest.raises(ValueError, match=r"needs 2 gradient evaluations"):
        run(opt, model, 1, closure=False)
    with pytest.raises(ValueError, match="exact of param group 0 was True"):
        gd.MARS(Net(torch.bfloat16)).load_state_dict(opt.state_dict())
