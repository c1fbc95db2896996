"""EMA equals its closed form, counts accepted steps only, keeps its precision and survives saving, moving, tying."""

from __future__ import annotations

import copy
import io
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from random_walks import Counting, net, walk
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from guided_descent.averaging import EMA, evaluating
from guided_descent.averaging import shadows as shadows_module


def closed_form(history, decay):
    """sum_s d^(t-s) w_s / sum_s d^(t-s), directly in float64."""
    weights = [decay ** (len(history) - 1 - s) for s in range(len(history))]
    return sum(a * w.double() for a, w in zip(weights, history)) / sum(weights)


@pytest.mark.parametrize(("dtype", "bar"), [(torch.float32, 1e-6), (torch.float64, 1e-12)])
@pytest.mark.parametrize("decay", [0.0, 0.9, 0.9999])
def test_equals_the_closed_form_at_every_step(dtype, bar, decay):
    model, generator = net(dtype), torch.Generator().manual_seed(1)
    ema, history = EMA(model, decay=decay), []
    for _ in range(60):
        walk(model, generator)
        ema.update()
        history.append({name: p.detach().clone() for name, p in model.named_parameters()})
        for name, average in ema.evaluation_weights(model).items():
            assert average.dtype == dtype
            expected = closed_form([h[name] for h in history], decay)
            torch.testing.assert_close(average.double(), expected, atol=bar, rtol=bar)


@settings(max_examples=30, deadline=None)
@given(st.lists(st.floats(-10, 10), min_size=1, max_size=30), st.floats(0.5, 500))
def test_half_life(values, half_life):
    model = nn.Linear(1, 1, bias=False).double()
    ema = EMA(model, half_life=half_life)
    for value in values:
        nn.init.constant_(model.weight, value)
        ema.update()
    expected = closed_form([torch.tensor(v, dtype=torch.float64) for v in values], 0.5 ** (1 / half_life))
    assert ema.evaluation_weights(model)["weight"].item() == pytest.approx(expected.item(), abs=1e-9)
    assert ema.decay**half_life == pytest.approx(0.5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_weights_have_a_float32_shadow_that_moves(dtype):
    """Weights jump from 0 to 1; the average must have gone 1 - d^t (corrected) of the way, within 1 %."""
    model = nn.Linear(8, 8, bias=False).to(dtype)
    ema = EMA(model, decay=0.999)
    nn.init.zeros_(model.weight)
    for _ in range(100):
        ema.update()
    nn.init.ones_(model.weight)
    for _ in range(200):
        ema.update()
    expected = (1 - 0.999**200) / (1 - 0.999**300)
    average = ema.evaluation_weights(model)["weight"]
    assert average.dtype == torch.float32
    assert (average / expected - 1).abs().max() < 1e-4
    with evaluating(model, ema):
        assert (model.weight.double() / expected - 1).abs().max() < 0.01
        assert model.weight.dtype == dtype


def test_a_scratch_smaller_than_the_model_gives_the_same(monkeypatch):
    monkeypatch.setattr(shadows_module, "_SCRATCH", 13)
    model, generator, history = net(torch.bfloat16), torch.Generator().manual_seed(1), []
    ema = EMA(model, decay=0.9)
    for _ in range(10):
        walk(model, generator)
        ema.update()
        history.append([p.detach().clone() for p in model.parameters()])
    for i, average in enumerate(ema.evaluation_weights(model).values()):
        torch.testing.assert_close(average.double(), closed_form([h[i] for h in history], 0.9), atol=1e-6, rtol=1e-6)


def test_precisions_side_by_side():
    model = nn.ParameterDict(
        {
            "a_half": torch.ones(3, dtype=torch.bfloat16),
            "a_single": torch.ones(3),
            "a_double": torch.ones(3, dtype=torch.float64),
            "a_complex": torch.ones(3, dtype=torch.complex64) * 1j,
            "none": torch.ones(0, 4),
            "scalar": torch.ones(()),
            "strided": torch.ones(2, 3, 4, 4).contiguous(memory_format=torch.channels_last),
        }
    )
    ema = EMA(model, decay=0.5)
    ema.update()
    with torch.no_grad():
        for p in model.values():
            p.mul_(4)
    ema.update()
    for name, average in ema.evaluation_weights(model).items():
        expected = model[name].detach() / 4 * 3
        torch.testing.assert_close(average, expected.to(torch.promote_types(expected.dtype, torch.float32)))
    assert EMA(net(), decay=0.5, dtype=torch.float64).state_dict()["weights"]["0.weight"].dtype == torch.float64


def test_only_accepted_steps_count():
    model, generator = net(), torch.Generator().manual_seed(1)
    opt = Counting(model.parameters(), lr=0.1)
    ema, reference = EMA(model, decay=0.9, optimizer=opt), EMA(model, decay=0.9)
    for i in range(30):
        opt.skip = i % 3 == 0
        if not opt.skip:
            walk(model, generator)
        opt.step()
        ema.update()
        ema.update()  # a second call for the same step
        if not opt.skip:
            reference.update()
    for a, b in zip(ema.evaluation_weights(model).values(), reference.evaluation_weights(model).values()):
        assert torch.equal(a, b)
    assert ema.steps == 20


def test_an_update_every_four_steps_keeps_the_half_life_in_steps():
    model = nn.Linear(1, 1, bias=False).double()
    opt = Counting(model.parameters(), lr=0.1)
    ema = EMA(model, half_life=4, optimizer=opt)
    for value in (0.0, 3.0):
        nn.init.constant_(model.weight, value)
        for _ in range(4):
            opt.step()
        ema.update()
    assert ema.evaluation_weights(model)["weight"].item() == pytest.approx(2.0)  # weights 1/2 and 1


def test_an_optimizer_that_went_back_is_noticed():
    model = net()
    opt = Counting(model.parameters(), lr=0.1)
    ema = EMA(model, decay=0.9, optimizer=opt)
    opt.step()
    ema.update()
    opt.steps = 0
    with pytest.raises(RuntimeError, match="at step 0, but the average was last updated at its step 1"):
        ema.update()


def test_start_and_the_time_before_it():
    model, generator = net(), torch.Generator().manual_seed(1)
    ema = EMA(model, decay=0.9, start=5)
    live = [p.detach().clone() for p in model.parameters()]
    with evaluating(model, ema):
        assert all(torch.equal(p, w) for p, w in zip(model.parameters(), live))
    history = []
    for _ in range(12):
        walk(model, generator)
        ema.update()
        history.append(model[0].weight.detach().clone())
    average = ema.evaluation_weights(model)["0.weight"]
    torch.testing.assert_close(average.double(), closed_form(history[5:], 0.9), atol=1e-6, rtol=1e-6)


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.table = nn.Embedding(5, 3)
        self.head = nn.Linear(3, 5, bias=False)
        self.head.weight = self.table.weight
        self.norm = nn.LayerNorm(3)
        self.norm.weight.requires_grad_(False)


def test_tied_weights_once_and_frozen_ones_never():
    ema = EMA(Tied(), decay=0.9)
    assert sorted(ema.state_dict()["weights"]) == ["norm.bias", "table.weight"]


def test_an_unfrozen_parameter_joins_with_its_value():
    model = Tied()
    ema = EMA(model, decay=0.5)
    for _ in range(3):
        ema.update()
    model.norm.weight.requires_grad_(True)
    ema.update()
    assert torch.equal(ema.evaluation_weights(model)["norm.weight"], torch.ones(3))
    nn.init.constant_(model.norm.weight, 2.0)
    ema.update()
    expected = 1 + (1 - 0.5) / (1 - 0.5**5)  # the average of 1, 1, 1, 1, 2
    torch.testing.assert_close(ema.evaluation_weights(model)["norm.weight"], torch.full((3,), expected))


def test_names_do_not_depend_on_wrappers():
    model = net()
    wrapped = torch.compile(nn.DataParallel(model), backend="eager")
    a, b = EMA(wrapped, decay=0.9), EMA(model, decay=0.9)
    a.update()
    b.load_state_dict(a.state_dict())
    assert list(a.state_dict()["weights"]) == ["0.weight", "0.bias", "2.weight", "2.bias"]
    with evaluating(wrapped, b), pytest.raises(RuntimeError):
        model.state_dict()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_state_round_trip_continues_bitwise(dtype):
    model, generator = net(dtype), torch.Generator().manual_seed(1)
    ema = EMA(model, half_life=7)
    for i in range(20):
        if i == 9:
            saved = io.BytesIO()
            torch.save(ema.state_dict(), saved)
            saved.seek(0)
            resumed = EMA(model, half_life=7)
            resumed.load_state_dict(torch.load(saved, weights_only=True))
        walk(model, generator)
        ema.update()
        if i >= 9:
            resumed.update()
    a, b = ema.state_dict(), resumed.state_dict()
    assert {k: v for k, v in a.items() if k != "weights"} == {k: v for k, v in b.items() if k != "weights"}
    for name in a["weights"]:
        assert a["weights"][name].dtype == b["weights"][name].dtype == torch.promote_types(dtype, torch.float32)
        assert torch.equal(a["weights"][name], b["weights"][name])


def test_a_state_of_another_model_is_refused_by_name_and_changes_nothing():
    ema = EMA(net(), decay=0.9)
    ema.update()
    before = copy.deepcopy(ema.state_dict())

    def refused(change, match):
        state = copy.deepcopy(before)
        change(state)
        with pytest.raises(ValueError, match=match):
            ema.load_state_dict(state)
        after = ema.state_dict()
        assert all(torch.equal(after["weights"][k], v) for k, v in before["weights"].items())
        assert after["progress"] == before["progress"]

    refused(lambda s: s["weights"].pop("2.bias"), r"missing: 2\.bias")
    refused(lambda s: s["weights"].update(extra=torch.zeros(1)), "unknown: extra")
    refused(lambda s: s["weights"].update({"2.bias": torch.ones(7)}), r"'2\.bias' as \[7\], the model as \[2\]")
    refused(lambda s: s["weights"].update({"2.bias": torch.ones(2).double()}), r"'2\.bias' in torch\.float64")
    refused(lambda s: s["settings"].update(decay=0.5), "made with {'decay': 0.5}")
    refused(lambda s: s.update(kind="SWA"), "kind 'SWA'")
    refused(lambda s: s.pop("steps"), "not the state")


def test_the_model_may_be_moved_cast_or_have_its_storage_swapped():
    model = net()
    ema = EMA(model, decay=0.5)
    ema.update()
    model.double()
    with torch.no_grad():
        for p in model.parameters():
            p.data = p.data * 4
    ema.update()
    average = ema.evaluation_weights(model)["0.weight"]
    assert average.dtype == torch.float32
    torch.testing.assert_close(average.double(), model[0].weight.detach() / 4 * 3, atol=1e-6, rtol=1e-6)


def test_made_on_meta_it_follows_the_model():
    with torch.device("meta"):
        model = nn.Linear(2, 2)
    ema = EMA(model, decay=0.5)
    model.to_empty(device="cpu")
    nn.init.ones_(model.weight)
    ema.update()
    assert torch.equal(ema.evaluation_weights(model)["weight"], torch.ones(2, 2))


def test_a_replaced_module_or_shape_is_noticed():
    model = net()
    ema = EMA(model, decay=0.5)
    ema.update()
    model[0].weight.data = torch.zeros(9, 3)
    with pytest.raises(RuntimeError, match=r"'0\.weight' now has the shape \[9, 3\]"):
        ema.update()
    model[0] = nn.Linear(3, 4)
    with pytest.raises(RuntimeError, match=r"'0\.weight' is no longer where it was"):
        ema.state_dict()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_update_allocates_nothing(dtype):
    """Every operation it runs writes in place, so memory cannot grow."""

    class Record(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            ran.append(func.overloadpacket.__name__)
            return func(*args, **(kwargs or {}))

    model, ran = net(dtype), []
    ema = EMA(model, decay=0.9)
    ema.update()
    with Record():
        ema.update()
    assert ran
    assert all(name.endswith("_") for name in ran), ran


@pytest.mark.parametrize(
    ("options", "error", "match"),
    [
        ({}, ValueError, "exactly one"),
        ({"half_life": 3, "decay": 0.9}, ValueError, "exactly one"),
        ({"half_life": 0}, ValueError, "half_life=0"),
        ({"half_life": math.inf}, ValueError, "half_life=inf"),
        ({"decay": 1.0}, ValueError, r"decay=1\.0.*\[0, 1\)"),
        ({"decay": 0.9, "start": -1}, ValueError, "start=-1"),
        ({"decay": 0.9, "dtype": torch.bfloat16}, ValueError, "would stall"),
        ({"decay": 0.9, "warmup": 3}, TypeError, "warmup"),
    ],
)
def test_impossible_settings_say_why(options, error, match):
    with pytest.raises(error, match=match):
        EMA(net(), **options)


def test_an_optimizer_that_does_not_count_is_refused():
    model = net()
    with pytest.raises(TypeError, match="SGD has no 'steps'"):
        EMA(model, decay=0.9, optimizer=torch.optim.SGD(model.parameters(), lr=0.1))
