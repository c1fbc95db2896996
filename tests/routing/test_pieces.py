"""Pieces: blocks cover each parameter exactly once, and block and piece layouts are inverse views of each other."""

from __future__ import annotations

import pytest
import torch
from architectures import ARCHITECTURES
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

from guided_descent.routing import Block, Table, named_parameters, route, rule


def gather(block: Block, tensor: Tensor) -> Tensor:
    """The contiguous block, as an engine makes it from a parameter-shaped tensor."""
    (piece,) = block.pieces
    part = piece.of(tensor)
    assert part.shape == piece.shape
    return (part if piece.perm is None else part.permute(piece.perm)).reshape(block.shape).contiguous()


def check_round_trip(table: Table, tensors: dict[str, Tensor]) -> None:
    """Blocks of a numbered tensor hold each number once; writing them back through ``within`` restores the tensor."""
    for entry in table:
        numbers = torch.arange(tensors[entry.name].numel()).reshape(entry.shape)
        if tensors[entry.name].dim() == 4:
            numbers = numbers.contiguous(memory_format=torch.channels_last)
        back = torch.full_like(numbers, -1)
        for block in entry.blocks:
            (piece,) = block.pieces
            assert piece.name == entry.name
            assert piece.of(numbers).untyped_storage().data_ptr() == numbers.untyped_storage().data_ptr()  # a view
            whole = gather(block, numbers).clone()
            seen = piece.within(whole)
            assert seen.shape == piece.shape
            assert torch.equal(seen, piece.of(numbers))
            assert (piece.of(back) == -1).all()  # no element belongs to two blocks
            piece.of(back).copy_(seen)
            if whole.numel():
                seen.zero_()
                assert not whole.any()  # also a view: writes go through
        assert torch.equal(back, numbers)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_round_trip_over_architectures(name: str) -> None:
    model = ARCHITECTURES[name]()
    check_round_trip(route(model), named_parameters(model))


side = st.integers(1, 5)


@st.composite
def modules(draw: st.DrawFn) -> nn.Module:
    a, b, k, groups = draw(side), draw(side), draw(st.integers(1, 3)), draw(st.integers(1, 3))
    conv = draw(st.sampled_from([nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d]))
    recurrent = draw(st.sampled_from([nn.LSTM, nn.GRU, nn.RNN]))
    return draw(
        st.sampled_from(
            [
                lambda: conv(a * groups, b * groups, k, groups=groups),
                lambda: recurrent(a, b, bidirectional=True),
                lambda: nn.MultiheadAttention(2 * a, 2),
                lambda: nn.Linear(a, b),
                lambda: nn.Embedding(a, b),
                lambda: nn.Bilinear(a, b, k),
            ]
        )
    )()


@settings(max_examples=80, deadline=None)
@given(part=modules())
def test_round_trip_over_module_types(part: nn.Module) -> None:
    model = nn.ModuleList([part, nn.Linear(3, 2)])
    check_round_trip(route(model), named_parameters(model))


@settings(max_examples=80, deadline=None)
@given(
    experts=st.integers(1, 3),
    inp=side,
    parts=st.lists(side, min_size=1, max_size=3),
    head=st.integers(1, 3),
    transposed=st.booleans(),
)
def test_round_trip_over_declared_splits(experts: int, inp: int, parts: list[int], head: int, transposed: bool) -> None:
    sizes = [head * size for size in parts]
    for stacked in (False, True):
        shape = (inp, sum(sizes)) if transposed else (sum(sizes), inp)
        tensor = torch.zeros((experts, *shape) if stacked else shape)
        r = rule("w", role="expert" if stacked else "fused", split=sizes, heads=parts[0], transposed=transposed)
        table = route([("w", tensor)], [r])
        assert len(table.blocks) == len(sizes)
        check_round_trip(table, {"w": tensor})


def matrices(model: nn.Module, name: str) -> list[Tensor]:
    return [gather(block, model.get_parameter(name).detach()) for block in route(model)[name].blocks]


def test_blocks_are_the_linear_maps_that_the_modules_apply() -> None:
    """The matrix view, used as y = W x, gives the module's own output: orientation, order and grouping are right."""
    torch.manual_seed(0)
    x = torch.randn(2, 4, 5, 5, dtype=torch.float64)
    tail = nn.Linear(3, 2)

    conv = nn.Conv2d(4, 6, 3, groups=2, bias=False, dtype=torch.float64).to(memory_format=torch.channels_last)
    (w,) = matrices(nn.ModuleList([conv, tail]), "0.weight")
    columns = F.unfold(x, 3).unflatten(1, (2, 18))  # [B, groups, in / groups * kernel, places]
    torch.testing.assert_close((w @ columns).flatten(1, 2), conv(x).flatten(2))

    back = nn.ConvTranspose2d(4, 6, 3, groups=2, bias=False, dtype=torch.float64)
    parts = matrices(nn.ModuleList([back, tail]), "0.weight")
    reference = [
        F.conv_transpose2d(piece, w.unflatten(1, (2, 3, 3)).transpose(0, 1)) for piece, w in zip(x.chunk(2, 1), parts)
    ]
    torch.testing.assert_close(torch.cat(reference, 1), back(x))

    lstm = nn.LSTM(4, 3, bias=False, dtype=torch.float64)
    model = nn.ModuleList([lstm, tail])
    step = x[:, :, 0, 0]
    i, f, g, o = (step @ w.mT for w in matrices(model, "0.weight_ih_l0"))
    cell = i.sigmoid() * g.tanh()
    assert [b.key[-1] for b in route(model)["0.weight_ih_l0"].blocks] == list("ifgo")
    torch.testing.assert_close(lstm(step[None])[0][0], o.sigmoid() * cell.tanh())
    assert f.shape == cell.shape


def test_the_gpt2_blocks_are_queries_keys_and_values() -> None:
    model = ARCHITECTURES["gpt2"]()
    x = torch.randn(3, 32)
    c_attn = model.h[0].attn.c_attn
    parts = [x @ w.mT for w in matrices(model, "h.0.attn.c_attn.weight")]
    torch.testing.assert_close(torch.cat(parts, -1) + c_attn.bias, c_attn(x))


def test_stacked_experts_are_the_maps_that_the_module_applies() -> None:
    model = ARCHITECTURES["mixtral"]()
    moe = model.layers[0].mlp
    x, every = torch.randn(1, 1, 32), torch.ones(1, 1, 4)
    gate, up = matrices(model, "layers.0.mlp.experts.gate_up_proj")
    (down,) = matrices(model, "layers.0.mlp.experts.down_proj")
    v = x.reshape(32, 1)
    expected = (down @ (F.silu(gate @ v) * (up @ v))).sum(0)
    torch.testing.assert_close(moe.experts(x, every).reshape(32, 1), expected)
