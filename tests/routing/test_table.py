"""The table: look-up, printing, JSON, and flattened shards."""

from __future__ import annotations

import json

import pytest
import torch
from torch import nn

from guided_descent.routing import Role, check_not_flattened, route, rule


def test_look_up_by_any_name() -> None:
    net = nn.ModuleDict({"tok": nn.Embedding(9, 4), "out": nn.Linear(4, 9)})
    net["out"].weight = net["tok"].weight
    table = route(net)
    assert table["tok.weight"] is table["out.weight"] is table["module._orig_mod.tok.weight"]
    assert "out.weight" in table
    assert "out" not in table
    assert len(table) == 2
    with pytest.raises(KeyError, match=r"no parameter is named 'out.wieght'; the nearest names are: out\.weight"):
        table["out.wieght"]


def test_rows_are_plain_and_complete() -> None:
    table = route(nn.Sequential(nn.MultiheadAttention(4, 2), nn.Linear(4, 3)), [rule("1.*", lr=0.1)])
    rows = json.loads(json.dumps(table.rows()))
    assert [row["parameter"] for row in rows] == [block.key for block in table.blocks]
    assert rows[0] == {
        "parameter": "0.in_proj_weight.q",
        "aliases": [],
        "role": "fused",
        "shape": [12, 4],
        "view": [4, 4],
        "module": "0",
        "type": "MultiheadAttention",
        "trainable": True,
        "rule": None,
        "why": "MultiheadAttention: q, k, v in one",
    }
    assert rows[-1]["rule"] == "1.*"


def test_text_is_aligned() -> None:
    text = str(route([("w", torch.ones(3, 1)), ("s", torch.ones(()))]))
    assert text.splitlines() == [
        "parameter  role    view    owner  why",
        "w          vector  3x1     -      shape only: one side above 1; frozen",
        "s          scalar  scalar  -      shape only: one element; frozen",
    ]


def shard(model: nn.Module) -> nn.Module:
    """Every parameter as the flat local shard that FSDP1 and ZeRO leave."""
    for module in model.modules():
        for leaf, p in list(module._parameters.items()):
            if p is not None:
                setattr(module, leaf, nn.Parameter(p.detach().flatten()[: p.numel() // 2 + 1]))
    return model


@pytest.mark.parametrize(
    "module",
    [
        nn.Linear(4, 6),
        nn.Conv2d(4, 6, 3),
        nn.ConvTranspose1d(4, 6, 3),
        nn.Embedding(9, 4),
        nn.LSTM(4, 6),
        nn.MultiheadAttention(4, 2),
    ],
    ids=lambda module: type(module).__name__,
)
def test_flattened_shards_raise_and_name_the_way_out(module: nn.Module) -> None:
    model = nn.Sequential(module, nn.LayerNorm(4))
    check_not_flattened(route(model))
    table = route(shard(model))
    flat = [entry for entry in table if entry.flattened]
    assert flat
    assert all(block.role is Role.OTHER and block.why.startswith("flattened") for e in flat for block in e.blocks)
    with pytest.raises(
        ValueError, match=r"parameter '0\..*flattened 1-D shard.*fully_shard.*use_orig_params=True.*elementwise"
    ):
        check_not_flattened(table)
    check_not_flattened(entry for entry in table if not entry.flattened)


def test_vectors_of_a_sharded_model_are_not_called_flattened() -> None:
    table = route(shard(nn.Sequential(nn.Linear(4, 6), nn.LayerNorm(6))))
    assert {entry.name: entry.flattened for entry in table} == {
        "0.weight": True,
        "0.bias": False,
        "1.weight": False,
        "1.bias": False,
    }


def test_an_empty_flat_shard_is_still_flattened() -> None:
    layer = nn.Linear(4, 6)
    layer.weight = nn.Parameter(torch.empty(0))
    assert route(nn.Sequential(layer))["0.weight"].flattened


class FlatParameter(nn.Parameter):
    """Stands for the parameter into which FSDP1 puts all those of a module."""


def test_one_flat_parameter_for_a_whole_module() -> None:
    net = nn.Sequential(nn.ReLU())
    net.register_parameter("_flat_param", FlatParameter(torch.ones(20)))
    with pytest.raises(ValueError, match="'_flat_param' of Sequential"):
        check_not_flattened(route(net))


def test_a_rule_cannot_make_a_matrix_of_a_shard() -> None:
    with pytest.raises(ValueError, match="flattened"):
        route(shard(nn.Sequential(nn.Linear(4, 6), nn.Linear(6, 2))), [rule("0.weight", role="matrix")])
