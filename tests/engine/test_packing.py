"""State in few bits: the codes, their mean over time, and every promise of the engine with them."""

from __future__ import annotations

import copy
import io
import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import guided_descent as gd
from guided_descent import parts
from guided_descent.engine import packing
from guided_descent.engine.packing import GROUP, halve, pack, unpack
from guided_descent.parts.base import Parts
from guided_descent.recipes import REGISTRY
from guided_descent.routing.roles import Block, Piece, Role


def through(x: Tensor, signed: bool, step: int = 1) -> Tensor:
    """A tensor after packing and unpacking."""
    codes, scales = torch.empty(x.shape, dtype=torch.uint8), torch.empty(-(-x.numel() // GROUP))
    pack(x, codes, scales, signed, step)
    found = torch.full_like(x, math.nan)
    unpack(found, codes, scales, signed)
    return found


# -- codes -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("signed", [True, False])
def test_codes_rise_and_are_what_they_stand_for(signed: bool) -> None:
    table = packing._table(signed, torch.device("cpu"))
    half = table[:128] if signed else table
    assert half[0] == 0
    assert half[-1] == 1
    assert bool((half.diff() > 0).all())
    ratios = half[2:] / half[1:-1]
    assert 1.06 < float(ratios.min()) < float(ratios.max()) < 1.13
    assert float(half[1]) == pytest.approx(2.0**-16 * 1.25 if signed else 2.0**-32 * 1.25)
    if signed:
        assert torch.equal(table[129:], -table[1:128])
    for step in (1, 2, 50_000):
        assert torch.equal(through(table, signed, step), table)
        assert torch.equal(through(-3e-5 * table, signed, step), -3e-5 * table) or not signed


@pytest.mark.parametrize("shape", [(1,), (255,), (256,), (257,), (3, 1000), (4, 5, 6, 7)])
@pytest.mark.parametrize("signed", [True, False])
@pytest.mark.parametrize("size", [1e-20, 1.0, 1e20])
def test_numbers_come_back_within_one_code(shape: tuple[int, ...], signed: bool, size: float) -> None:
    x = torch.randn(shape) * size
    x = x if signed else x.abs()
    found = through(x, signed, 7)
    top = torch.cat([part.abs().max().expand(part.numel()) for part in x.flatten().split(GROUP)]).view(shape)
    large = x.abs() > 1e-3 * top
    assert float(((found - x).abs() / x.abs())[large].max()) < 0.126
    assert torch.equal(found.sign()[large], x.sign()[large])
    assert torch.equal(found[x.abs() == top], x[x.abs() == top])  # the largest of a block is exact


def test_a_square_never_becomes_zero_and_zero_stays() -> None:
    x = torch.logspace(0, -37, 200)
    found = through(x, signed=False)
    assert bool((found > 0).all())
    assert bool((found >= 0.8 * x).all())
    x[::3] = 0.0
    assert torch.equal(through(x, signed=False) == 0, x == 0)
    assert bool((through(torch.zeros(300), signed=True) == 0).all())
    small = torch.tensor([1.0, 1e-7, -1e-7, 1.5e-5, -1.5e-5])
    assert through(small, signed=True).tolist() == pytest.approx([1.0, 0.0, 0.0, 1.25 * 2**-16, -1.25 * 2**-16])


def test_other_layouts_and_dtypes() -> None:
    x = torch.randn(6, 5, 4, 7)
    plain = through(x, signed=True)
    codes = torch.empty(x.shape, dtype=torch.uint8).to(memory_format=torch.channels_last)
    scales = torch.empty(-(-x.numel() // GROUP))
    pack(x, codes, scales, True, 1)
    found = torch.empty_like(x)
    unpack(found, codes, scales, True)
    assert torch.equal(found, plain)
    torch.testing.assert_close(through(x.double(), signed=True), plain.double(), rtol=1e-6, atol=0.0)


def test_what_is_not_finite_is_not_hidden() -> None:
    x = torch.ones(3 * GROUP)
    x[GROUP + 3] = math.nan
    found = through(x, signed=False)
    assert bool(found[:GROUP].isfinite().all() & found[2 * GROUP :].isfinite().all())
    assert bool(found[GROUP + 3].isnan())


@pytest.mark.parametrize("signed", [True, False])
def test_the_mean_over_steps_is_the_number(signed: bool) -> None:
    x = torch.rand(GROUP) ** 3 + 1e-3
    mean = sum(through(x, signed, step).double() for step in range(1, 513)) / 512
    assert float(((mean - x) / x).abs().max()) < 2e-3
    once = through(x, signed)
    assert float(((once - x) / x).abs().max()) > 0.03


@pytest.mark.parametrize(("signed", "beta"), [(False, 0.999), (True, 0.9), (True, 0.9999)])
def test_averages_reach_what_they_average(signed: bool, beta: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """From twice as far away; with rounding to nearest one stays where a step is less than half a code."""

    def error() -> Tensor:
        made = torch.Generator().manual_seed(0)
        target = torch.rand(GROUP, generator=made) + 0.2
        average = 2 * target.roll(1)
        average[0] = target[0] = 3.0  # so that one scale serves all of the time
        exact = average.double()
        for step in range(1, int(5 / (1 - beta)) + 1):
            average = through(average.lerp_(target, 1 - beta), signed, step)
            exact.lerp_(target.double(), 1 - beta)
        return (average - exact) / exact

    found = error()
    assert float(found.abs().max()) < 0.2
    assert float(found.mean().abs()) < 0.04
    monkeypatch.setattr(
        packing, "_dither", lambda step, device, bits: torch.full((GROUP,), 1 << (bits - 1), dtype=torch.int32)
    )
    assert float(error().abs().max()) > 0.4


# -- bfloat16 ----------------------------------------------------------------------------------------------------------


def halved(x: Tensor, step: int = 1) -> Tensor:
    codes = torch.empty(x.shape, dtype=torch.bfloat16)
    halve(x, codes, step)
    return codes


def test_bfloat16_takes_one_of_the_two_neighbours() -> None:
    x = torch.randn(1000) * torch.logspace(-30, 30, 1000)
    low = (x.view(torch.int32) & -(1 << 16)).view(torch.float32)
    high = ((x.view(torch.int32) & -(1 << 16)) + (1 << 16)).view(torch.float32)
    ups = torch.zeros(1000)
    for step in range(1, 65):
        found = halved(x, step).float()
        assert bool(((found == low) | (found == high)).all())
        ups += found == high
    share = (x - low) / (high - low)
    assert float((ups / 64 - share).abs().max()) < 0.05
    exact = torch.tensor([0.0, -0.0, 1.0, -1.5, math.inf, -math.inf, 3.3895e38, 2.0**-126]).bfloat16().float()
    assert torch.equal(halved(exact, 5).float(), exact)
    patterns = torch.tensor([0x7FFFFFFF, -1, 0x7FC00000, 0x7FFFFFFE], dtype=torch.int32).view(torch.float32)
    assert bool(halved(patterns, 3).isnan().all())


def test_bfloat16_in_other_layouts_and_dtypes() -> None:
    x = torch.randn(6, 5, 4, 7)
    codes = torch.empty(x.shape, dtype=torch.bfloat16).to(memory_format=torch.channels_last)
    halve(x, codes, 1)
    assert torch.equal(codes, halved(x))
    assert torch.equal(halved(x.double()), halved(x))


def test_an_average_in_bfloat16_reaches_what_it_averages() -> None:
    """With rounding to nearest a second moment at beta2 = 0.999 stops where a step is less than half a spacing."""
    target = torch.rand(GROUP, generator=torch.Generator().manual_seed(0)) + 0.2
    average, nearest = (2 * target).bfloat16(), (2 * target).bfloat16()
    for step in range(1, 8001):
        average = halved(average.float().lerp_(target, 1e-3), step)
        nearest = nearest.float().lerp_(target, 1e-3).bfloat16()
    assert float(((average.float() - target) / target).abs().max()) < 0.03
    assert float(((nearest.float() - target) / target).abs().min()) > 0.5


# -- by slot -----------------------------------------------------------------------------------------------------------

BY_SLOT = {"exp_avg": torch.bfloat16, "exp_avg_sq": "8bit"}


def test_slots_may_differ() -> None:
    opt = gd.AdamW(net(), state_dtype=BY_SLOT)
    push(opt, 2)
    big = opt.state[opt.param_groups[0]["params"][0]]
    assert big["exp_avg"].dtype == torch.bfloat16
    assert big["exp_avg_sq"].dtype == torch.uint8
    assert "exp_avg_scale" not in big
    assert opt.param_groups[0]["state_dtype"] == "exp_avg=bfloat16,exp_avg_sq=8bit"
    assert gd.explain(opt).state_bytes == opt.state_bytes()
    again = gd.AdamW(net(), state_dtype="exp_avg=bfloat16,exp_avg_sq=8bit")
    again.load_state_dict(opt.state_dict())
    one = gd.AdamW(net(), state_dtype={"exp_avg_sq": "bfloat16"})
    held = one.state[one.param_groups[0]["params"][0]]
    assert (held["exp_avg"].dtype, held["exp_avg_sq"].dtype) == (torch.float32, torch.bfloat16)


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("4bit", r"state_dtype='4bit' must be one of None, '8bit', 'bfloat16', or say so by slot"),
        (torch.float16, "state_dtype='float16' must be one of"),
        ({}, "state_dtype='' must be one of"),
        ({"exp_avg": "half"}, "state_dtype='exp_avg=half' must be one of"),
        ({"exp_agv": "8bit"}, "names the slot 'exp_agv'; slots that can be packed here: exp_avg, exp_avg_sq"),
        (8, "state_dtype=8 must be one of"),
    ],
)
def test_what_is_none_of_these_is_an_error(value: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        gd.AdamW(net(), state_dtype=value)


# -- the engine --------------------------------------------------------------------------------------------------------

#: Ways to hold state.
FORMS: list[Any] = ["8bit", "bfloat16", BY_SLOT]
forms = pytest.mark.parametrize("form", FORMS, ids=["8bit", "bfloat16", "by slot"])


def net(dtype: torch.dtype = torch.float32) -> nn.Module:
    torch.manual_seed(0)
    layers = [nn.Linear(40, 128), nn.Tanh(), nn.Linear(128, 100), nn.Tanh(), nn.Linear(100, 8)]
    return nn.Sequential(*layers).to(dtype)


def push(opt: gd.Optimizer, steps: int, first: int = 0) -> None:
    params = [p for group in opt.param_groups for p in group["params"]]
    for number in range(first, first + steps):
        made = torch.Generator().manual_seed(number)
        for p in params:
            p.grad = (torch.randn(p.shape, generator=made, dtype=torch.float64) * (1 + p.detach().double())).to(p.dtype)
        opt.step()


def snapshot(opt: gd.Optimizer) -> dict[str, Tensor]:
    found = {}
    for group in opt.param_groups:
        for name, p in zip(group["param_names"], group["params"]):
            found[name] = p.detach().clone()
            found |= {f"{name}/{key}": value.clone() for key, value in opt.state[p].items()}
    return found


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def test_adam_holds_a_little_over_two_bytes_for_each_parameter() -> None:
    model = nn.Sequential(*[nn.Linear(256, 256, bias=False) for _ in range(4)])
    opt = gd.AdamW(model, state_dtype="8bit")
    push(opt, 3)
    count = sum(p.numel() for p in model.parameters())
    assert opt.state_bytes() == gd.explain(opt).state_bytes == count * (2 + 2 * 4 / GROUP) + 4 * 4
    assert opt.state_bytes() <= 2.2 * count
    saved = opt.state_dict()["state"].values()
    tensors = [value for values in saved for value in values.values() if isinstance(value, Tensor)]
    assert sum(t.numel() * t.element_size() for t in tensors) == opt.state_bytes()
    assert opt.workspace_bytes < 8 * 2**20


def test_small_and_complex_tensors_and_matrix_methods_keep_theirs() -> None:
    wave = nn.Parameter(torch.randn(64, 80, dtype=torch.complex64))
    opt = gd.AdamW([("small", nn.Parameter(torch.zeros(63, 65))), ("wave", wave)], state_dtype="8bit")
    assert all("exp_avg_scale" not in state for state in opt.state.values())
    opt = gd.RMSprop(net(), centered=True, state_dtype="8bit")  # divides by the root of a difference of averages
    assert all(value.dtype != torch.uint8 for state in opt.state.values() for value in state.values())
    opt = gd.Muon(net(), state_dtype="8bit")
    push(opt, 2)
    dtypes = {p.ndim: {value.dtype for value in state.values()} for p, state in opt.state.items()}
    assert torch.uint8 not in dtypes[2]
    model = nn.Sequential(nn.Embedding(50, 100), nn.Linear(100, 100), nn.Linear(100, 50))
    opt = gd.Muon(model, state_dtype="8bit")
    assert opt.state[model[0].weight]["exp_avg"].dtype == torch.uint8
    assert opt.state[model[1].weight]["momentum_buffer"].dtype == torch.float32


def elementwise() -> list[str]:
    found = []
    for key in gd.list_optimizers():
        made = REGISTRY[key].cls(**({"momentum": 0.9} if "momentum" in REGISTRY[key].cls.numbers() else {}))
        block = Block("w", (Piece("w", (64, 80)),), (64, 80), Role.MATRIX)
        own: Parts = made.parts(block)
        if packing.choose(own, own.slots(block), "8bit", torch.empty(64, 80)):
            found.append(key)
    return found


def test_most_recipes_that_hold_averages_can() -> None:
    assert {"adam", "adamw", "sgd", "lion", "adan", "ademamix", "lamb", "adopt", "rmsprop"} <= set(elementwise())


@pytest.mark.parametrize("form", ["8bit", "bfloat16"])
@pytest.mark.parametrize("key", elementwise())
def test_steps_stay_close_to_those_with_full_state(key: str, form: str) -> None:
    more: dict[str, Any] = {"momentum": 0.9} if "momentum" in REGISTRY[key].cls.numbers() else {}
    more |= {"lr": 1e-3}
    models = [net(), net()]
    start = [p.detach().clone() for p in models[0].parameters()]
    packed = gd.optimizer(key, models[0], state_dtype=form, **more)
    full = gd.optimizer(key, models[1], **more)
    push(packed, 40)
    push(full, 40)
    held = torch.uint8 if form == "8bit" else torch.bfloat16
    assert any(value.dtype == held for state in packed.state.values() for value in state.values())
    for p, q, old in zip(*(m.parameters() for m in models), start):
        assert bool(p.isfinite().all())
        moved = float((q - old).detach().norm())
        assert float((p - q).detach().norm()) < 0.25 * moved
        # and along the way, where errors of single elements have a mean of 0
        assert float(((p - old) * (q - old)).sum()) / moved**2 == pytest.approx(1, abs=0.08)
    assert packed.state_bytes() < (0.6 if form == "8bit" else 0.8) * full.state_bytes()
    assert gd.explain(packed).state_bytes == packed.state_bytes()


def test_it_trains_as_well() -> None:
    torch.manual_seed(1)
    data, labels = torch.randn(256, 40), torch.randint(0, 8, (256,))
    losses = {}
    for state in (None, "8bit", "bfloat16"):
        model = net()
        opt = gd.AdamW(model, lr=3e-3, state_dtype=state)
        for _ in range(60):
            opt.zero_grad()
            loss = nn.functional.cross_entropy(model(data), labels)
            loss.backward()
            opt.step()
        losses[state] = loss.item()
    for state in ("8bit", "bfloat16"):
        assert losses[state] < 0.1
        assert abs(losses[state] - losses[None]) < 0.3 * losses[None] + 0.01


@pytest.mark.parametrize(
    ("key", "form"), [(k, f) for k in ("adamw", "lion", "lamb") for f in FORMS[: 3 if k != "lion" else 2]]
)
def test_a_resumed_run_repeats_the_uninterrupted_one(key: str, form: Any) -> None:
    whole, part = net(), net()
    opt, begun = (gd.optimizer(key, m, state_dtype=form) for m in (whole, part))
    push(opt, 9)
    push(begun, 4)
    file = io.BytesIO()
    torch.save({"model": part.state_dict(), "optimizer": begun.state_dict()}, file)
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    other = net()
    other.load_state_dict(saved["model"])
    resumed = gd.optimizer(key, other, state_dtype=form)
    resumed.load_state_dict(saved["optimizer"])
    push(resumed, 5, first=4)
    assert same(snapshot(opt), snapshot(resumed))
    twin = copy.deepcopy(begun)
    push(begun, 2, first=4)
    push(twin, 2, first=4)
    assert same(snapshot(begun), snapshot(twin))


@forms
def test_state_follows_the_names(form: Any) -> None:
    model, turned = net(), net()
    opt = gd.AdamW(list(model.named_parameters()), state_dtype=form)
    push(opt, 3)
    turned.load_state_dict(model.state_dict())
    other = gd.AdamW(list(turned.named_parameters())[::-1], state_dtype=form)
    other.load_state_dict(opt.state_dict())
    a, b = snapshot(opt), snapshot(other)
    assert same(a, {name: b[name] for name in a})


def test_forms_are_not_mixed() -> None:
    model = net()
    packed, full = gd.AdamW(model, state_dtype="8bit"), gd.AdamW(model)
    push(packed, 2)
    push(full, 2)
    before = snapshot(packed)
    with pytest.raises(ValueError, match=r"state_dtype of param group 0 was None when .* and is '8bit'"):
        packed.load_state_dict(full.state_dict())
    with pytest.raises(ValueError, match=r"state_dtype of param group 0 was '8bit' when .* and is None"):
        full.load_state_dict(packed.state_dict())
    other = net()
    torchs = torch.optim.AdamW(other.parameters())
    other(torch.randn(2, 40)).sum().backward()
    torchs.step()
    with pytest.raises(ValueError, match="lacks 'exp_avg_scale'"):
        gd.AdamW(list(other.parameters()), state_dtype="8bit").load_state_dict(torchs.state_dict())
    old = packed.state_dict()
    packed.load_state_dict(old)
    assert same(before, snapshot(packed))
    packed.param_groups[0]["state_dtype"] = None
    with pytest.raises(ValueError, match="state_dtype was '8bit' when the optimizer was built and is now None"):
        push(packed, 1)


def test_cuts_of_a_large_tensor_equal_the_whole() -> None:
    big = 2 * 262_144 + 70_000  # three cuts and a tail that is no whole block
    g = torch.randn(big)
    p = nn.Parameter(torch.zeros(big))
    opt = gd.AdamW([p], state_dtype="8bit")
    assert len(opt._engine.bind().buckets[0].slices) == 3
    for number in range(2):
        p.grad = g
        opt.step()
        for name, beta, value, signed in (("exp_avg", 0.9, g, True), ("exp_avg_sq", 0.999, g * g, False)):
            kept = opt.state[p]
            if number == 0:
                codes, scales = torch.empty(big, dtype=torch.uint8), torch.empty(-(-big // GROUP))
                pack((1 - beta) * value, codes, scales, signed, 1)
                torch.testing.assert_close(kept[f"{name}_scale"], scales)
                assert float((kept[name] != codes).float().mean()) < 1e-3


@forms
def test_cuts_of_a_large_tensor_equal_tensors_of_their_own(form: Any) -> None:
    big = 2 * 262_144 + 70_000
    g = torch.randn(big)
    p = nn.Parameter(torch.zeros(big))
    opt = gd.AdamW([("p", p)], state_dtype=form)
    chunks = [nn.Parameter(torch.zeros(262_144)), nn.Parameter(torch.zeros(big - 262_144))]
    apart = gd.AdamW(chunks, state_dtype=form)
    for _ in range(2):
        p.grad, chunks[0].grad, chunks[1].grad = g.clone(), g[:262_144].clone(), g[262_144:].clone()
        opt.step()
        apart.step()
    assert torch.equal(torch.cat([c.detach() for c in chunks]), p.detach())


def test_fused_maps_layouts_and_late_parameters() -> None:
    """Several blocks of one parameter, weights in channels-last, a parameter that starts late and the plain loop."""

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attention = nn.MultiheadAttention(64, 4, kdim=None)
            self.conv = nn.Conv2d(16, 40, 3).to(memory_format=torch.channels_last)
            self.twins = nn.ModuleList([nn.Linear(64, 80), nn.Linear(64, 80), nn.Linear(64, 80)])

    finals = []
    for more in ({}, {"foreach": False}, {"state_dtype": None}, {"state_dtype": "bfloat16"}):
        torch.manual_seed(0)
        model = Net()
        opt = gd.AdamW(model, **{"state_dtype": "8bit"} | more)
        for number in range(8):
            made = torch.Generator().manual_seed(number)
            for name, p in model.named_parameters():
                g = torch.randn(p.shape, generator=made)
                p.grad = None if name == "twins.1.weight" and number % 3 else g
            opt.step()
        finals.append([p.detach().clone() for p in model.parameters()])
        if not more:
            state = opt.state[model.attention.in_proj_weight]
            assert state["exp_avg"].dtype == torch.uint8
            assert {key for key in state if key.endswith("exp_avg_scale")} == {f"{x}.exp_avg_scale" for x in "qkv"}
            assert opt.state[model.conv.weight]["exp_avg"].is_contiguous(memory_format=torch.channels_last)
    for a, b, c, d in zip(*finals):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)
        assert float((a - c).norm()) < 0.02 * float(c.norm()) + 1e-3
        assert float((d - c).norm()) < 0.005 * float(c.norm()) + 1e-3


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
@forms
def test_other_weights(dtype: torch.dtype, form: Any) -> None:
    model, wide = net(dtype), net(dtype).double()
    opt = gd.AdamW(model, lr=0.01, state_dtype=form, rounding="master")
    full = gd.AdamW(wide, lr=0.01)
    for number in range(20):
        for i, (p, q) in enumerate(zip(model.parameters(), wide.parameters())):
            p.grad = torch.randn(p.shape, generator=torch.Generator().manual_seed(100 * number + i)).to(dtype)
            q.grad = p.grad.double()
        opt.step()
        full.step()
    for p, q in zip(model.parameters(), wide.parameters()):
        assert float((p.double() - q).norm()) < 0.03 * float(q.norm())


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
@forms
def test_compiled_graphs_see_the_same(backend: str, form: Any) -> None:
    torch._dynamo.reset()
    models = [net(torch.float64), net(torch.float64)]
    opt, eager = (gd.AdamW(m, state_dtype=form) for m in models)
    opt.compile(backend=backend)
    push(opt, 6)
    push(eager, 6)
    for p, q in zip(*(m.parameters() for m in models)):
        torch.testing.assert_close(p, q, rtol=1e-6, atol=1e-7)


def test_parts_with_global_sums_and_skipped_steps() -> None:
    models = [net(), net()]
    opt = gd.AdamW(models[0], state_dtype="8bit", add=[parts.ClipNorm(max_norm=1e6), parts.SkipSpikes(warmup=3)])
    plain = gd.AdamW(models[1], state_dtype="8bit", fused=False)  # no kernel for the small ones either
    for number in range(8):
        push(opt, 1, first=number)
        push(plain, 1, first=number)
        if number >= 3:
            before = snapshot(opt)
            for p in models[0].parameters():
                assert p.grad is not None
                p.grad.mul_(1e3)
            opt.step()
            assert same(before, snapshot(opt))
    assert (opt.steps, opt.skipped) == (8, 5)
    assert same(snapshot(opt), snapshot(plain))
