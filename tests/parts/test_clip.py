"""Clipping against plain references, over groups, dtypes and recipes; and steps that a part leaves out."""

from __future__ import annotations

import copy
import functools
import logging
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import guided_descent as gd
from guided_descent import parts
from guided_descent.parts import Part, Wrapper
from guided_descent.parts.clip import unit_axes
from guided_descent.recipes import Recipe, hyper
from guided_descent.routing import route
from oracles import clipping as oracle
from oracles.training import Bag

F64 = torch.float64
SHAPES = {"w": (5, 8), "k": (4, 3, 3, 2), "b": (7,), "s": (), "v": (6, 6)}
INF = math.inf


def bag(dtype: torch.dtype = F64) -> Bag:
    made = torch.Generator().manual_seed(1)
    return Bag({n: torch.randn(s, dtype=F64, generator=made).to(dtype) for n, s in SHAPES.items()})


def gradients(t: int, dtype: torch.dtype = F64) -> dict[str, Tensor]:
    """Noise, ten times as long in every seventh step."""
    made = torch.Generator().manual_seed(100 + t)
    size = 10.0 if t % 7 == 6 else 1.0
    return {n: (size * torch.randn(s, dtype=F64, generator=made)).to(dtype) for n, s in SHAPES.items()}


def feed(opt: gd.Optimizer, model: nn.Module, grads: dict[str, Tensor]) -> None:
    for name, p in model.named_parameters():
        p.grad = grads[name].clone()
    opt.step()


CASES: list[tuple[Part | Wrapper, Callable[..., dict[str, Tensor]]]] = [
    (parts.ClipNorm(max_norm=2.0), functools.partial(oracle.norm, bound=2.0)),
    (parts.ClipNorm(max_norm=20.0), functools.partial(oracle.norm, bound=20.0)),
    (parts.ClipEach(max_norm=3.0), functools.partial(oracle.each, bound=3.0)),
    (parts.ClipValue(max_value=0.7), functools.partial(oracle.value, bound=0.7)),
    (parts.AGC(), functools.partial(oracle.agc, lam=0.01)),
    (parts.AGC(clip=1.1, floor=2.0), functools.partial(oracle.agc, lam=1.1, floor=2.0)),
    (parts.Centralize(), oracle.centralize),
    (
        parts.ZClip(z_max=1.5, beta=0.9, max_norm=INF, warmup=10),
        functools.partial(oracle.zclip, z_max=1.5, beta=0.9, most=INF, warmup=10),
    ),
    (
        parts.ZClip(z_max=2.0, beta=0.97, max_norm=12.0, warmup=5),
        functools.partial(oracle.zclip, z_max=2.0, beta=0.97, most=12.0, warmup=5),
    ),
    (
        parts.AdaGC(warmup=8, max_norm=5.0),
        functools.partial(oracle.adagc, rel=1.05, beta=0.98, most=5.0, warmup=8),
    ),
]


EVERY = [*(case[0] for case in CASES), parts.ClipUpdate(max_rms=0.3)]


@pytest.mark.parametrize(("part", "rule"), CASES, ids=lambda value: str(value)[:24])
@pytest.mark.parametrize("key", ["sgd", "adamw", "muon"])
def test_gradients_become_those_of_the_reference(part: Part | Wrapper, rule: Callable[..., Any], key: str) -> None:
    """The recipe with the part, beside the recipe alone that is given the reference's gradients."""
    model, plain = bag(), bag()
    rules = [gd.rule("w", role="matrix"), gd.rule("v", role="matrix"), gd.rule("k", role="conv")]
    more: dict[str, Any] = {"coefficients": "exact", "ns_dtype": "float64"} if key == "muon" else {}
    more |= {"momentum": 0.9} if key == "sgd" else {}
    opt = gd.optimizer(key, model, lr=0.05, rules=rules, add=[part], **more)
    alone = gd.optimizer(key, plain, lr=0.05, rules=rules, **more)
    memory: dict[str, Any] = {}
    for t in range(40):
        grads = gradients(t)
        weights = {name: p.detach().clone() for name, p in model.named_parameters()}
        feed(opt, model, grads)
        feed(alone, plain, rule(grads, weights, memory))
        for p, q in zip(model.parameters(), plain.parameters()):
            torch.testing.assert_close(p, q, rtol=1e-10, atol=1e-11)


def test_global_norm_clipping_is_torchs() -> None:
    model, other = bag(), bag()
    opt = gd.AdamW(model, lr=0.1, weight_decay=0.0, add=[parts.ClipNorm(max_norm=3.0)])
    theirs = torch.optim.AdamW(other.parameters(), lr=0.1, weight_decay=0.0)
    for t in range(35):
        feed(opt, model, gradients(t))
        for name, p in other.named_parameters():
            p.grad = gradients(t)[name].clone()
        nn.utils.clip_grad_norm_(other.parameters(), 3.0)
        theirs.step()
    for p, q in zip(model.parameters(), other.parameters()):
        torch.testing.assert_close(p, q, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("mu", [0.0, 0.9])
@pytest.mark.parametrize(
    ("part", "field"),
    [
        (parts.ClipNorm, "max_norm"),
        (parts.ClipEach, "max_norm"),
        (parts.ClipValue, "max_value"),
        (parts.ClipUpdate, "max_rms"),
        (parts.AGC, "clip"),
    ],
)
@pytest.mark.parametrize("bound", [INF, 1e30])
def test_without_a_bound_it_is_the_identity_to_the_bit(
    mu: float, part: type[Wrapper], field: str, bound: float
) -> None:
    model, plain = bag(torch.float32), bag(torch.float32)
    opt = gd.SGD(model, lr=0.1, momentum=mu, fused=False, add=[part(**{field: bound})])
    alone = gd.SGD(plain, lr=0.1, momentum=mu, fused=False)
    for t in range(9):
        feed(opt, model, gradients(t, torch.float32))
        feed(alone, plain, gradients(t, torch.float32))
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), plain.parameters()))
    assert not any("clipped" in name for counts in opt.audit().values() for name in counts)


# -- groups and layouts ------------------------------------------------------------------------------------------------


def test_a_global_norm_counts_every_tensor_of_every_group_once() -> None:
    """Groups by the user, by the recipe (Muon and AdamW) and by rules; a fused map of three blocks; large tensors."""
    torch.manual_seed(0)

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attention = nn.MultiheadAttention(8, 2)
            self.wide = nn.Linear(1500, 800)
            self.norm = nn.LayerNorm(8)
            self.embed = nn.Embedding(11, 8)

    net = Net()
    rules = [gd.rule("norm.*", lr=0.5), gd.rule("embed.*", recipe=gd.recipes.SGD(lr=1.0))]
    for workspace in (64.0, 0.01):
        opt = gd.build(net, gd.recipes.Muon(), rules=rules, add=[parts.ClipNorm(max_norm=1.0)], workspace_mb=workspace)
        assert len(opt.param_groups) >= 4
        before = net.embed.weight.detach().clone()
        for p in net.parameters():
            p.grad = torch.randn_like(p)
        n = math.sqrt(sum(float(p.grad.double().square().sum()) for p in net.parameters()))
        opt.step()
        torch.testing.assert_close(before - net.embed.weight, net.embed.weight.grad / (n + 1e-6), rtol=1e-5, atol=1e-6)
    pair = [nn.Parameter(torch.zeros(3)), nn.Parameter(torch.zeros(4))]
    opt = gd.SGD([{"params": pair[:1], "lr": 1.0}, {"params": pair[1:], "lr": 2.0}], add=[parts.ClipNorm(max_norm=1.0)])
    for p in pair:
        p.grad = torch.full_like(p, 2.0)
    opt.step()
    n = math.sqrt(7 * 4)
    torch.testing.assert_close(pair[0].detach(), torch.full((3,), -2 / n))
    torch.testing.assert_close(pair[1].detach(), torch.full((4,), -4 / n))


def test_a_parameter_without_a_gradient_is_not_counted() -> None:
    pair = [nn.Parameter(torch.zeros(3)), nn.Parameter(torch.zeros(4))]
    opt = gd.SGD(pair, lr=1.0, add=[parts.ClipNorm(max_norm=1.0)])
    pair[0].grad = torch.full((3,), 2.0)
    opt.step()
    torch.testing.assert_close(pair[0].detach(), torch.full((3,), -2 / math.sqrt(12)))
    assert opt.audit() == {"param.0": {"norm_seen": 1, "norm_clipped": 1}}


@pytest.mark.parametrize(
    "part", [case[0] for case in CASES] + [parts.ClipUpdate(max_rms=0.3)], ids=lambda v: str(v)[:24]
)
@pytest.mark.parametrize("rounding", ["master", "stochastic"])
def test_half_precision_weights(part: Part | Wrapper, rounding: str) -> None:
    """The arithmetic is that of float32 on the same gradients."""
    model, wide = bag(torch.bfloat16), bag(torch.bfloat16).float()
    opt = gd.SGD(model, lr=0.01, momentum=0.9, rounding=rounding, add=[part])
    full = gd.SGD(wide, lr=0.01, momentum=0.9, add=[part])
    for t in range(20):
        grads = gradients(t, torch.bfloat16)
        feed(opt, model, grads)
        feed(full, wide, {name: g.float() for name, g in grads.items()})
    for p, q in zip(model.parameters(), wide.parameters()):
        assert p.dtype == torch.bfloat16
        held = opt.state[p].get("master", p).double()
        assert float((held - q.double()).norm()) < (0.02 if rounding == "stochastic" else 0.005) * float(q.norm())
    assert opt.audit().keys() == full.audit().keys()


@pytest.mark.parametrize(
    "part", [case[0] for case in CASES] + [parts.ClipUpdate(max_rms=0.3)], ids=lambda v: str(v)[:24]
)
def test_awkward_tensors_and_compiled_graphs(part: Part | Wrapper) -> None:
    shapes = [(), (1,), (0,), (0, 4), (4, 0), (1, 6), (6, 1), (2, 3, 4), (3, 0, 2), (300, 300)]
    made = torch.Generator().manual_seed(0)
    start = [torch.randn(s, dtype=F64, generator=made) for s in shapes]
    start.append(torch.randn(3, 5, dtype=torch.complex128, generator=made))
    finals = []
    for compile in (False, True):
        params = [nn.Parameter(p.clone()) for p in start]
        opt = gd.AdamW(params, lr=0.01, add=[part])
        if compile:
            opt.compile(backend="eager")
        for t in range(5):
            made.manual_seed(t)
            for p in params:
                p.grad = torch.randn(p.shape, dtype=p.dtype, generator=made)
            opt.step()
        assert all(bool(torch.isfinite(torch.view_as_real(p) if p.is_complex() else p).all()) for p in params)
        finals.append(([p.detach() for p in params], opt.audit()))
    torch.testing.assert_close(finals[0][0], finals[1][0], rtol=1e-11, atol=1e-12)
    assert finals[0][1] == finals[1][1]


def test_rows_are_outputs_whatever_the_layout() -> None:
    def axes(module: nn.Module, name: str, number: int = 0) -> tuple[int, ...] | None:
        table = route(module)
        block = table[name].blocks[number]
        return unit_axes(block, block.pieces[0])

    assert axes(nn.Sequential(nn.Linear(4, 5), nn.Linear(5, 3)), "0.weight") == (1,)
    assert axes(nn.Sequential(nn.Linear(4, 5), nn.Linear(5, 3)), "0.bias") is None
    assert axes(nn.Sequential(nn.Conv2d(4, 6, 3), nn.Linear(5, 3)), "0.weight") == (1, 2, 3)
    assert axes(nn.Sequential(nn.Conv2d(6, 6, 3, groups=6), nn.Linear(5, 3)), "0.weight") == (1, 2, 3)
    assert axes(nn.Sequential(nn.Conv2d(4, 6, 3, groups=2), nn.Linear(5, 3)), "0.weight") == (1, 2, 3)
    assert axes(nn.Sequential(nn.ConvTranspose2d(4, 6, 3), nn.Linear(5, 3)), "0.weight") == (0, 2, 3)
    assert axes(nn.Embedding(9, 4), "weight") == (1,)
    assert axes(nn.MultiheadAttention(8, 2), "in_proj_weight", 1) == (1,)
    model = Bag({"experts": torch.zeros(3, 4, 5), "turned": torch.zeros(4, 5), "row": torch.zeros(1, 6)})
    rules = [gd.rule("experts", role="expert"), gd.rule("turned", role="matrix", transposed=True)]
    table = route(model, rules)
    assert unit_axes(table["experts"].blocks[0], table["experts"].blocks[0].pieces[0]) == (2,)
    assert unit_axes(table["turned"].blocks[0], table["turned"].blocks[0].pieces[0]) == (0,)
    assert unit_axes(table["row"].blocks[0], table["row"].blocks[0].pieces[0]) is None


SEEN: list[list[Tensor]] = []


@dataclass(frozen=True)
class Look(Part):
    """Keeps the rows of the direction that come to it."""

    slot = "clip"

    def update(self, x: parts.Batch, s: Any, h: Any, total: Any) -> None:
        SEEN.append([row.clone() for row in x.read().list])


def test_weight_and_bias_of_one_block_are_measured_together_and_cut_apart() -> None:
    def clipped(part: Part | Wrapper) -> tuple[list[Tensor], dict[str, dict[str, int]], list[Tensor]]:
        torch.manual_seed(2)
        net = nn.Sequential(nn.Linear(4, 5), nn.Linear(5, 5), nn.Linear(5, 3)).double()
        opt = gd.build(net, gd.recipes.KFAC(), add=[part, Look()], loss="mse")
        net(torch.randn(9, 4, dtype=F64)).square().mean().backward()
        SEEN.clear()
        opt.step()
        first = next(rows for rows in SEEN if len(rows) == 2 and rows[0].shape == (5, 4))
        return first, opt.audit(), [net[0].weight.grad, net[0].bias.grad]

    [w, b], audit, [gw, gb] = clipped(parts.ClipEach(max_norm=0.01))
    factor = 0.01 / (math.hypot(float(gw.norm()), float(gb.norm())) + 1e-6)
    torch.testing.assert_close([w, b], [gw * factor, gb * factor])
    assert (audit["0.weight"]["each_clipped"], audit["0.bias"]["each_clipped"]) == (1, 1)
    [w, b], audit, [gw, gb] = clipped(parts.AGC(clip=1e-6))
    for found, g in ((w, gw), (b, gb)):
        axes = 1 if g.ndim == 2 else 0
        torch.testing.assert_close(found / found.norm(dim=axes, keepdim=True), g / g.norm(dim=axes, keepdim=True))
    assert audit["0.weight"]["agc_seen"] == 6  # five rows and the bias


def test_agc_leaves_the_head_alone_unless_told() -> None:
    for head in (False, True):
        net = nn.Sequential(nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 3))
        before = [p.detach().clone() for p in net.parameters()]
        opt = gd.SGD(net, lr=1.0, add=[parts.AGC(head=head)])
        for p in net.parameters():
            p.grad = torch.full_like(p, 3.0)
        opt.step()
        moved = [float((a - b).abs().max()) for a, b in zip(before, net.parameters())]
        assert moved[0] < 0.1
        assert (abs(moved[2] - 3.0) < 1e-5) != head
        audit = opt.audit()
        assert audit["0.weight"] == {"agc_seen": 5, "agc_clipped": 5}
        assert audit.get("2.weight", {}) == ({"agc_seen": 3, "agc_clipped": 3} if head else {})


def test_the_clipped_share_can_be_read() -> None:
    g = torch.tensor([[3.0, 4.0], [0.3, 0.4], [0.0, 0.0]])
    counts = {}
    for part in (
        parts.ClipNorm(max_norm=1.0),
        parts.ClipEach(max_norm=1.0),
        parts.ClipValue(max_value=0.35),
        parts.ClipUpdate(max_rms=1.0),
        parts.AGC(clip=0.5),
    ):
        model = Bag({"w": torch.ones(3, 2)})
        opt = gd.SGD(model, lr=0.0, add=[part])
        for scale in (1.0, 0.01):
            model.w.grad = g * scale
            opt.step()
        counts[type(part).__name__] = opt.audit()["w"]
    assert counts == {
        "ClipNorm": {"norm_seen": 2, "norm_clipped": 1},
        "ClipEach": {"each_seen": 2, "each_clipped": 1},
        "ClipValue": {"value_seen": 12, "value_clipped": 3},
        "ClipUpdate": {"update_seen": 2, "update_clipped": 1},
        "AGC": {"agc_seen": 6, "agc_clipped": 1},
    }


def test_updates_are_clipped_by_their_rms() -> None:
    model = Bag({"w": torch.zeros(5, 8, dtype=F64), "b": torch.zeros(7, dtype=F64)})
    opt = gd.SGD(model, lr=0.5, add=[parts.ClipUpdate(max_rms=0.2)])
    grads = {"w": torch.randn(5, 8, dtype=F64), "b": 0.01 * torch.randn(7, dtype=F64)}
    feed(opt, model, grads)
    rms = grads["w"].square().mean().sqrt()
    torch.testing.assert_close(model.w.detach(), -0.5 * grads["w"] / max(1.0, float(rms) / 0.2))
    torch.testing.assert_close(model.b.detach(), -0.5 * grads["b"])


# -- numbers -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Clipped(Recipe):
    """SGD with a bound that lives in the group."""

    lr: float = hyper(1.0, ge=0, help="learning rate")
    bound: float = hyper(1.0, gt=0, help="largest norm")

    def parts(self, block: gd.routing.Block) -> parts.Parts:
        return parts.Parts(parts.NormClip("bound"), parts.Descend())


def test_a_bound_may_live_in_the_group_and_change() -> None:
    model = Bag({"w": torch.zeros(4, dtype=F64)})
    opt = gd.build(model, Clipped())
    for bound in (1.0, 0.25, INF):
        opt.param_groups[0]["bound"] = bound
        before = model.w.detach().clone()
        feed(opt, model, {"w": torch.full((4,), 2.0, dtype=F64)})
        assert float((before - model.w).norm()) == pytest.approx(min(bound, 4.0), rel=1e-5)
    model = Bag({"w": torch.zeros(4, dtype=F64), "v": torch.zeros(4, dtype=F64)})
    opt = gd.SGD(model, lr=1.0, rules=[gd.rule("v", clip_norm_max_norm=0.5)], add=[parts.ClipNorm(max_norm=1.0)])
    assert [group["clip_norm_max_norm"] for group in opt.param_groups] == [1.0, 0.5]
    feed(opt, model, {name: torch.full((4,), 2.0, dtype=F64) for name in ("w", "v")})
    n = math.sqrt(32)  # one norm, and a bound for each group
    torch.testing.assert_close([float(model.w.norm()), float(model.v.norm())], [4 / n, 2 / n])
    with pytest.raises(ValueError, match="BlockClip reads 'nowhere', which sgd does not have"):
        gd.SGD(model, add=[parts.BlockClip("nowhere")])


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: parts.ClipNorm(max_norm=0.0), r"max_norm=0\.0 of clip_norm must be > 0"),
        (lambda: parts.ClipValue(max_value=-1.0), r"max_value=-1\.0 of clip_value must be > 0"),
        (lambda: parts.AGC(clip=math.nan), "clip=nan of agc must not be nan"),
        (lambda: parts.ZClip(beta=1.0), r"beta=1\.0 of zclip must be < 1"),
        (lambda: parts.AdaGC(warmup=0), "warmup=0 of adagc must be >= 1"),
        (lambda: parts.SkipSpikes(factor=0.0), r"factor=0\.0 of skip_spikes must be > 0"),
    ],
)
def test_wrong_numbers_are_errors(make: Callable[[], Wrapper], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


def test_an_idle_tensor_does_not_end_in_adagc() -> None:
    """A gradient of norm 0 would make gamma 0, and nothing would pass from then on."""
    model = Bag({"w": torch.zeros(4, dtype=F64)})
    opt = gd.SGD(model, lr=1.0, add=[parts.AdaGC(warmup=3)])
    for t in range(8):
        feed(opt, model, {"w": torch.full((4,), 0.0 if t in (0, 1, 5) else 1.0, dtype=F64)})
    assert float(opt.state[model.w]["adagc"]) > 0.9
    assert float(model.w.norm()) > 4


@pytest.mark.parametrize("part", [parts.ZClip(warmup=3), parts.AdaGC(warmup=3), parts.SkipSpikes(warmup=3)])
def test_what_they_remember_is_saved(part: Part | Wrapper) -> None:
    model, other = bag(), bag()
    opt = gd.AdamW(model, add=[part])
    for t in range(5):
        feed(opt, model, gradients(t))
    resumed = gd.AdamW(other, add=[part])
    other.load_state_dict(model.state_dict())
    resumed.load_state_dict(copy.deepcopy(opt.state_dict()))
    for t in range(5, 16):
        feed(opt, model, gradients(t))
        feed(resumed, other, gradients(t))
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), other.parameters()))
    assert opt.skipped == resumed.skipped
    assert gd.explain(opt).state_bytes == opt.state_bytes()


def test_clipping_needs_no_scratch_for_all_directions() -> None:
    net = nn.Sequential(*[nn.Linear(256, 256, bias=False) for _ in range(12)])
    held = []
    for add in ([], [parts.ClipNorm(max_norm=1.0)]):
        opt = gd.AdamW(net, add=add, fused=False)
        for p in net.parameters():
            p.grad = torch.randn_like(p)
        opt.step()
        held.append(opt.workspace_bytes)
    assert held[1] <= held[0]


# -- steps that are left out -------------------------------------------------------------------------------------------


def everything(opt: gd.Optimizer, model: nn.Module) -> dict[str, Any]:
    found: dict[str, Any] = {name: p.detach().clone() for name, p in model.named_parameters()}
    for index, group in enumerate(opt.param_groups):
        found |= {f"{index}/{k}": v.clone() for k, v in group["extra"].items()} | {f"{index}/steps": group["steps"]}
        for name, p in zip(group["param_names"], group["params"]):
            found |= {f"{name}/{key}": value.clone() for key, value in opt.state[p].items()}
    return found


def same(a: dict[str, Any], b: dict[str, Any]) -> bool:
    return a.keys() == b.keys() and all(
        torch.equal(a[k], b[k]) if isinstance(a[k], Tensor) else a[k] == b[k] for k in a
    )


@pytest.mark.parametrize("key", ["sgd", "adamw", "muon", "nadamw", "soap", "normalized_sgd"])
def test_a_spike_leaves_everything_as_it_was(key: str, caplog: pytest.LogCaptureFixture) -> None:
    model, clean = bag(torch.float32), bag(torch.float32)
    rules = [gd.rule("w", role="matrix"), gd.rule("v", role="matrix")]
    more: dict[str, Any] = {"momentum": 0.9} if key == "sgd" else {}
    part = parts.SkipSpikes(factor=3.0, beta=0.9, warmup=4)
    opt, other = (gd.optimizer(key, m, rules=rules, add=[part], **more) for m in (model, clean))
    calm = [{n: g / (10 if t % 7 == 6 else 1) for n, g in gradients(t, torch.float32).items()} for t in range(16)]
    for t, grads in enumerate(calm):
        if t in (6, 9):
            before, audit = everything(opt, model), copy.deepcopy(opt.audit())
            with caplog.at_level(logging.WARNING):
                feed(opt, model, {n: 10 * g for n, g in grads.items()})
            assert same(before, everything(opt, model))
            assert opt.audit() == audit
            assert "is left out: its gradient has norm" in caplog.text
        feed(opt, model, grads)
        feed(other, clean, grads)
    assert (opt.steps, opt.skipped) == (16, 2)
    assert same(everything(opt, model), everything(other, clean))


def test_the_rule_is_the_average_of_accepted_norms() -> None:
    model = Bag({"a": torch.zeros(2, dtype=F64), "b": torch.zeros(2, dtype=F64)})
    rules = [gd.rule("b", lr=0.1)]  # two groups, one norm
    opt = gd.SGD(model, rules=rules, add=[parts.SkipSpikes(factor=2.0, beta=0.5, warmup=2)])
    norms = [1.0, 1.4, 2.4, 2.7, 4.1, 3.0, 9.0, 4.0]
    mean, count, skipped = 0.0, 0, []
    for n in norms:
        feed(opt, model, {"a": torch.tensor([n, 0.0], dtype=F64) * 0.6, "b": torch.tensor([0.0, n], dtype=F64) * 0.8})
        refused = count >= 2 and n > 2.0 * mean / (1 - 0.5**count)
        skipped.append(refused)
        if not refused:
            mean, count = 0.5 * mean + 0.5 * n, count + 1
        assert opt.skipped == sum(skipped)
        for group in opt.param_groups:
            torch.testing.assert_close(group["extra"]["spikes"], torch.tensor([count, mean], dtype=F64))
    assert any(skipped)
    assert not all(skipped[2:])


def test_refused_and_non_finite_steps_share_their_patience() -> None:
    model = Bag({"w": torch.zeros(3)})
    opt = gd.SGD(model, add=[parts.SkipSpikes(warmup=1)])
    feed(opt, model, {"w": torch.ones(3)})
    for t in range(24):
        feed(opt, model, {"w": torch.full((3,), 100.0 if t % 2 else math.nan)})
    assert opt.skipped == 24
    with pytest.raises(gd.RefusedError, match="25 steps in a row were left out, now by SpikeRefusal: its gradient"):
        feed(opt, model, {"w": torch.full((3,), 100.0)})
    feed(opt, model, {"w": torch.ones(3)})
    feed(opt, model, {"w": torch.full((3,), 100.0)})
    assert (opt.steps, opt.skipped) == (2, 26)


def test_what_is_let_through_is_not_learned() -> None:
    for part in (parts.SkipSpikes(warmup=2), parts.ZClip(warmup=2)):
        model = Bag({"w": torch.zeros(3)})
        opt = gd.SGD(model, nonfinite="ignore", add=[part])
        for t in range(6):
            feed(opt, model, {"w": torch.full((3,), math.nan if t == 3 else 1.0)})
        assert all(bool(value.isfinite().all()) for value in opt.param_groups[0]["extra"].values())
        assert opt.steps == 6


def test_a_second_evaluation_that_is_not_finite_is_a_skipped_step_too() -> None:
    """SAM looks again before anything is remembered, and the norm that is judged is that of the first gradient."""
    model = Bag({"w": torch.ones(3, dtype=F64)})
    opt = gd.SGD(model, add=[parts.SAM(rho=0.5), parts.SkipSpikes(warmup=1), parts.ClipNorm(max_norm=0.1)])
    calls: list[int] = []

    def closure(second: float) -> Any:
        def evaluate() -> None:
            calls.append(1)
            model.w.grad = torch.full((3,), second if len(calls) % 2 == 0 else 1.0, dtype=F64)

        return evaluate

    opt.step(closure(7.0))
    before = everything(opt, model)
    opt.step(closure(math.nan))
    assert same(before, everything(opt, model))
    assert (opt.steps, opt.skipped, len(calls)) == (1, 1, 4)
    assert opt.param_groups[0]["extra"]["spikes"].tolist() == pytest.approx([1.0, 0.02 * math.sqrt(3)])


@dataclass(frozen=True)
class Never(Part):
    """Refuses every step; a second part must not have learned from it."""

    slot = "clip"

    def gauge(self, x: parts.Batch, h: parts.Hyper) -> dict[str, Tensor]:
        return {"zero": x.g.norms().sum() * 0}

    def refuses(self, total: Any, shared: Any, h: Any) -> str:
        return "it never accepts"

    def update(self, x: parts.Batch, s: Any, h: Any, total: Any) -> None:
        raise AssertionError("no step was to be made")


def test_one_refusal_is_enough_and_nobody_remembers() -> None:
    for order in (0, 1):
        model = Bag({"w": torch.zeros(3)})
        add = [parts.SkipSpikes(warmup=1), Never()]
        opt = gd.SGD(model, add=add[::-1] if order else add)
        feed(opt, model, {"w": torch.ones(3)})
        assert opt.param_groups[0]["extra"]["spikes"].tolist() == [0.0, 0.0]
        assert (opt.steps, opt.skipped) == (0, 1)
