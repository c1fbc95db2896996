"""The largest attention logits against dense ones, wherever the call is made, and that looking changes nothing."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.functional import scaled_dot_product_attention
from torch.utils._python_dispatch import TorchDispatchMode

from guided_descent.capture.attention import AttentionLogits, max_logits
from oracles.muon_family import logits

F64 = torch.float64


def dense(q: Tensor, k: Tensor, mask: Tensor | None = None, causal: bool = False, scale: float | None = None) -> Tensor:
    return logits(q, k, mask, causal, scale).amax((0, 2, 3))


def random_mask(*shape: int) -> Tensor:
    return torch.rand(shape) < 0.2


# -- the maximum -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("budget", [1, 2**24])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize(("length", "keys"), [(50, 50), (37, 61), (61, 37), (1, 20)])
@pytest.mark.parametrize("shared", [6, 3, 1])
def test_heads_lengths_and_chunks(shared: int, length: int, keys: int, causal: bool, budget: int) -> None:
    q, k = torch.randn(2, 6, length, 4, dtype=F64), torch.randn(2, shared, keys, 4, dtype=F64)
    found = max_logits(q, k, is_causal=causal, budget=budget)
    torch.testing.assert_close(found, dense(q, k, causal=causal))


@pytest.mark.parametrize("budget", [1, 2**24])
@pytest.mark.parametrize(
    "shape", [(40, 40), (1, 40), (40, 1), (2, 1, 40, 40), (1, 4, 40, 40), (2, 4, 40, 40), (2, 1, 1, 40)]
)
def test_masks_of_every_shape(shape: tuple[int, ...], budget: int) -> None:
    q, k = torch.randn(2, 2, 4, 40, 6, dtype=F64)
    mask = random_mask(*shape)
    expected = dense(q, k, mask.expand(2, 4, 40, 40))
    torch.testing.assert_close(max_logits(q, k, mask, budget=budget), expected)
    for lowest in (-math.inf, torch.finfo(F64).min, -1e9, -1e4):
        added = torch.zeros(shape, dtype=F64).masked_fill(~mask, lowest)
        torch.testing.assert_close(max_logits(q, k, added, budget=budget), expected)
        # a bias between positions that do take part is no part of the logit
        torch.testing.assert_close(max_logits(q, k, added - 3.0 * torch.rand(shape), budget=budget), expected)
    assert not torch.allclose(expected, dense(q, k))


def test_scale_dtype_and_missing_axes() -> None:
    q, k = torch.randn(2, 3, 4, 30, 8, dtype=F64)
    torch.testing.assert_close(max_logits(q, k, scale=0.7), dense(q, k, scale=0.7))
    torch.testing.assert_close(max_logits(q, k, scale=-0.7), dense(q, k, scale=-0.7))
    assert max_logits(q, k).dtype == F64
    for dtype, tolerance in ((torch.float32, 1e-5), (torch.bfloat16, 2e-2), (torch.float16, 2e-3)):
        found = max_logits(q.to(dtype), k.to(dtype))
        assert found.dtype == torch.float32
        torch.testing.assert_close(found.double(), dense(q, k), rtol=tolerance, atol=0)
    torch.testing.assert_close(max_logits(q[0], k[0]), dense(q[:1], k[:1]))
    torch.testing.assert_close(max_logits(q[0, 0], k[0, 0]), dense(q[:1, :1], k[:1, :1]))
    torch.testing.assert_close(max_logits(q, k[:1]), dense(q, k[:1].expand(3, -1, -1, -1)))


def test_pairs_that_are_masked_out_everywhere_and_empty_input() -> None:
    q = torch.randn(1, 2, 5, 4)
    mask = torch.ones(1, 2, 5, 5, dtype=torch.bool)
    mask[:, 1] = False
    assert max_logits(q, q, mask)[1] == -math.inf
    assert max_logits(q[:, :, :0], q).tolist() == [-math.inf] * 2
    assert max_logits(q, q[:, :, :0]).tolist() == [-math.inf] * 2
    with pytest.raises(ValueError, match="5 query heads cannot share 2 key heads"):
        max_logits(torch.randn(1, 5, 3, 4), q)


def test_broken_numbers_show() -> None:
    q = torch.randn(1, 2, 40, 4)
    q[0, 1, 3, 0] = math.nan
    assert max_logits(q, q, budget=1).isnan().tolist() == [False, True]


class Largest(TorchDispatchMode):
    """The size of the largest tensor that is made."""

    def __init__(self) -> None:
        super().__init__()
        self.numel = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if isinstance(out, Tensor) and not any(out is a for a in args):
            self.numel = max(self.numel, out.untyped_storage().nbytes() // out.element_size())
        return out


@pytest.mark.parametrize("causal", [False, True])
def test_the_logits_are_never_held_at_once(causal: bool) -> None:
    length = 512
    q = torch.randn(1, 1, length, 2)
    mask = random_mask(length, 1)
    with Largest() as seen:
        max_logits(q, q, mask, causal, budget=32 * length)
    assert seen.numel == 32 * length < length**2 / 10
    with Largest() as seen:
        max_logits(q, q, mask, causal)
    assert seen.numel == length**2


# -- watching ----------------------------------------------------------------------------------------------------------


class Attention(nn.Module):
    """Plain attention by either name of torch's function."""

    def __init__(self, width: int = 12, heads: int = 3, call: Callable[..., Tensor] | None = None, **more: Any) -> None:
        super().__init__()
        self.heads, self.more, self.call = heads, more, call
        self.qkv = nn.Linear(width, 3 * width)

    def split(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v = (y.unflatten(-1, (self.heads, -1)).transpose(1, 2) for y in self.qkv(x).chunk(3, -1))
        return q, k, v

    def forward(self, x: Tensor) -> Tensor:
        call = self.call or F.scaled_dot_product_attention
        return call(*self.split(x), **self.more).transpose(1, 2).flatten(2)


def watch(model: nn.Module, *names: str) -> tuple[AttentionLogits, dict[str, list[Tensor]]]:
    seen: dict[str, list[Tensor]] = {}

    def sink(values: Any) -> None:
        for name, value in values.items():
            seen.setdefault(name, []).append(value)

    return AttentionLogits(model, names, sink), seen


def stack_is_empty() -> bool:
    return torch._C._len_torch_function_stack() == 0


@pytest.mark.parametrize("call", [None, scaled_dot_product_attention])
@pytest.mark.parametrize("causal", [False, True])
def test_every_call_is_seen(call: Any, causal: bool) -> None:
    model = nn.ModuleDict({"a": Attention(call=call, is_causal=causal), "b": Attention(call=call)}).double()
    watcher, seen = watch(model, "a")
    x = torch.randn(2, 9, 12, dtype=F64, requires_grad=True)
    for _ in range(2):
        model["b"](model["a"](x)).sum().backward()
    q, k, _ = model["a"].split(x)
    assert list(seen) == ["a"]
    assert len(seen["a"]) == 2
    for value in seen["a"]:
        assert not value.requires_grad
        torch.testing.assert_close(value, dense(q.detach(), k.detach(), causal=causal))
    watcher.remove()
    model["a"](x)
    assert len(seen["a"]) == 2


def test_looking_changes_nothing() -> None:
    torch.manual_seed(3)
    plain = nn.ModuleList([Attention(dropout_p=0.5), nn.MultiheadAttention(12, 3, dropout=0.5, batch_first=True)])
    results = []
    for looking in (False, True):
        watcher = watch(plain, "0", "1")[0] if looking else None
        torch.manual_seed(5)
        plain.zero_grad()
        x = plain[0](torch.randn(2, 7, 12))
        out, weights = plain[1](x, x, x)
        (out.square().sum() + weights.square().sum()).backward()
        results.append([out, weights, *(p.grad.clone() for p in plain.parameters() if p.grad is not None)])
        if watcher is not None:
            watcher.remove()
    assert all(torch.equal(a, b) for a, b in zip(*results))
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in plain.modules())
    assert not any("forward" in vars(m) for m in plain.modules())
    assert stack_is_empty()


MHA: dict[str, dict[str, Any]] = {
    "plain": {},
    "no bias": {"bias": False},
    "batch second": {"batch_first": False},
    "key and value widths": {"kdim": 12, "vdim": 12},
    "extra key": {"add_bias_kv": True},
    "zero key": {"add_zero_attn": True},
}


def by_hand(mha: nn.MultiheadAttention, x: Tensor) -> tuple[Tensor, Tensor]:
    """Queries and keys [B, H, L, E] of torch's attention, batch first."""
    if mha.in_proj_weight is not None:
        wq, wk = mha.in_proj_weight.chunk(3)[:2]
    else:
        wq, wk = mha.q_proj_weight, mha.k_proj_weight
    bq, bk = (None, None) if mha.in_proj_bias is None else mha.in_proj_bias.chunk(3)[:2]
    q, k = F.linear(x, wq, bq), F.linear(x, wk, bk)
    if mha.bias_k is not None:
        k = torch.cat([k, mha.bias_k.expand(len(x), 1, -1)], 1)
    if mha.add_zero_attn:
        k = torch.cat([k, torch.zeros_like(k[:, :1])], 1)
    q, k = (y.unflatten(-1, (mha.num_heads, -1)).transpose(1, 2).detach() for y in (q, k))
    return q, k


@pytest.mark.parametrize("weights", [True, False])
@pytest.mark.parametrize("kind", MHA)
def test_torchs_own_attention_in_all_its_forms(kind: str, weights: bool) -> None:
    options = {"batch_first": True} | MHA[kind]
    model = nn.ModuleDict({"attn": nn.MultiheadAttention(12, 3, **options)}).double()
    for p in model.parameters():
        nn.init.normal_(p)
    watcher, seen = watch(model, "attn")
    x = torch.randn(4, 9, 12, dtype=F64)
    given = x if options["batch_first"] else x.transpose(0, 1)
    q, k = by_hand(model["attn"], x)
    causal = torch.ones(9, 9, dtype=torch.bool).triu(1)  # here true is masked out
    padding = torch.zeros(4, 9, dtype=torch.bool)
    padding[1:, 6:] = True
    cases: list[tuple[dict[str, Any], Tensor]] = [
        ({}, torch.ones(4, 1, 9, 9, dtype=torch.bool)),
        ({"attn_mask": causal}, ~causal.expand(4, 1, 9, 9)),
        ({"attn_mask": causal, "is_causal": True}, ~causal.expand(4, 1, 9, 9)),
        ({"attn_mask": causal.double() * -1e9}, ~causal.expand(4, 1, 9, 9)),
        ({"key_padding_mask": padding}, ~padding[:, None, None].expand(4, 1, 9, 9)),
        (
            {"key_padding_mask": padding, "attn_mask": causal},
            ~(padding[:, None, None] | causal).expand(4, 1, 9, 9),
        ),
        ({"attn_mask": causal.expand(12, 9, 9)}, ~causal.expand(4, 1, 9, 9)),
    ]
    for number, (more, keep) in enumerate(cases):
        model["attn"](given, given, given, need_weights=weights, **more)
        keep = F.pad(keep, (0, k.shape[2] - 9), value=True)  # the keys that are added are never masked out
        torch.testing.assert_close(seen["attn"][number], dense(q, k, keep))
    assert len(seen["attn"]) == len(cases)
    watcher.remove()
    assert stack_is_empty()


def test_inside_torchs_layers() -> None:
    layer = nn.TransformerEncoderLayer(12, 3, 24, batch_first=True, dropout=0.3).double()
    model = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
    watcher, seen = watch(model, "layers.0.self_attn", "layers.1.self_attn")
    x = torch.randn(2, 6, 12, dtype=F64)
    model(x)
    assert list(seen) == ["layers.0.self_attn", "layers.1.self_attn"]
    torch.testing.assert_close(seen["layers.0.self_attn"][0], dense(*by_hand(model.layers[0].self_attn, x)))
    watcher.remove()


def test_a_module_around_another_sees_its_calls_too() -> None:
    model = nn.Sequential(nn.Sequential(Attention()), Attention())
    watcher, seen = watch(model, "0", "0.0", "")
    x = torch.randn(2, 5, 12)
    model(x)
    torch.testing.assert_close(seen["0"][0], seen["0.0"][0])
    second = dense(*(y.detach() for y in model[1].split(model[0](x))[:2]))
    torch.testing.assert_close(seen[""][0], torch.maximum(seen["0"][0], second))
    watcher.remove()


def test_evaluation_is_not_looked_at() -> None:
    model = nn.ModuleDict({"a": Attention(), "b": nn.MultiheadAttention(12, 3, batch_first=True)})
    watcher, seen = watch(model, "a", "b")
    x = torch.randn(2, 5, 12)
    model.eval()
    with torch.no_grad():
        model["b"](*[model["a"](x)] * 3)
    assert not seen
    model.train()
    with torch.no_grad():  # the first pass of activation checkpointing
        model["b"](*[model["a"](x)] * 3)
    assert list(seen) == ["a", "b"]
    watcher.remove()


def test_activation_checkpointing_reports_the_same_twice() -> None:
    model = nn.ModuleDict({"a": Attention()})
    watcher, seen = watch(model, "a")
    x = torch.randn(2, 5, 12, requires_grad=True)
    torch.utils.checkpoint.checkpoint(model["a"], x, use_reentrant=False).sum().backward()
    first, second = seen["a"]
    assert torch.equal(first, second)
    watcher.remove()


def test_errors_leave_no_mode_behind() -> None:
    class Broken(Attention):
        def forward(self, x: Tensor) -> Tensor:
            super().forward(x)
            raise RuntimeError("no more")

    model = nn.ModuleDict({"bad": Broken(), "good": Attention()})
    watcher, seen = watch(model, "bad", "good")
    x = torch.randn(2, 5, 12)
    with pytest.raises(RuntimeError, match="no more"):
        model["bad"](x)
    assert stack_is_empty()
    model["good"].register_forward_pre_hook(lambda m, a: None)
    stopped = model["good"].register_forward_pre_hook(lambda m, a: 1 / 0, prepend=True)
    with pytest.raises(ZeroDivisionError):  # before the watcher's turn
        model["good"](x)
    stopped.remove()
    assert "good" not in seen
    model["good"](x)
    assert len(seen["good"]) == 1
    watcher.remove()
    assert stack_is_empty()


def test_removal_in_the_middle_of_a_forward() -> None:
    class Quits(Attention):
        def forward(self, x: Tensor) -> Tensor:
            watcher.remove()
            return super().forward(x)

    model = nn.ModuleDict({"a": Quits()})
    watcher, seen = watch(model, "a")
    model["a"](torch.randn(2, 5, 12))
    assert not seen
    assert stack_is_empty()
    watcher.remove()


def test_two_numbers_of_heads_in_one_module_are_an_error() -> None:
    class Mixed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.two = Attention(heads=3), Attention(heads=4)

        def forward(self, x: Tensor) -> Tensor:
            return self.two(self.one(x))

    model = Mixed()
    watcher, _ = watch(model, "")
    with pytest.raises(ValueError, match="with 3 and with 4 heads"):
        model(torch.randn(2, 5, 12))
    assert stack_is_empty()
    watcher.remove()


def test_what_cannot_be_seen_is_said_once() -> None:
    model = nn.ModuleDict({"a": Attention(call=lambda q, k, v: (q @ k.mT).softmax(-1) @ v)})
    watcher, seen = watch(model, "a")
    with pytest.warns(UserWarning, match="'a' made no attention call that can be seen"):
        model["a"](torch.randn(2, 5, 12))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model["a"](torch.randn(2, 5, 12))
    assert not seen
    watcher.remove()


def test_unknown_modules_are_named() -> None:
    model = nn.ModuleDict({"attention": Attention()})
    with pytest.raises(ValueError, match=r"no module 'atention'; the nearest names are 'attention'"):
        watch(model, "atention")
    assert not model["attention"]._forward_hooks
