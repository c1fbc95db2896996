"""Overrides: first match wins, every mismatch is an error, and a declared split cuts the right rows."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from guided_descent.routing import Role, Rule, route, rule


class Group(nn.Module):
    def __init__(self, **parts: object) -> None:
        super().__init__()
        for name, part in parts.items():
            setattr(self, name, part)


def model() -> nn.Module:
    return Group(
        tok=nn.Embedding(30, 8),
        a=Group(qkv=nn.Linear(8, 24), proj=nn.Linear(8, 8)),
        raw=nn.Parameter(torch.ones(6, 8)),
        bank=nn.Parameter(torch.ones(3, 6, 8)),
        empty=nn.Parameter(torch.ones(0, 8)),
        out=nn.Linear(8, 30),
    )


def view(*rules: Rule, name: str = "a.qkv.weight") -> list[tuple[str, str, tuple[int, ...]]]:
    return [(b.key, b.role.value, b.shape) for b in route(model(), rules)[name].blocks]


def test_first_match_wins_and_recipe_and_options_are_carried() -> None:
    table = route(model(), [rule("a.*", recipe="adamw", lr=1e-4), rule("*", recipe="lion")])
    first = table["a.qkv.weight"].rule
    assert first is not None
    assert (first.recipe, first.options) == ("adamw", {"lr": 1e-4})
    assert table["a.qkv.weight"].blocks[0].role is Role.MATRIX  # the role is still inferred
    second = table["tok.weight"].rule
    assert second is not None
    assert second.recipe == "lion"
    assert [entry.rule for entry in route(model())] == [None] * len(table)


def test_each_parameter_ends_in_exactly_one_entry() -> None:
    net = model()
    table = route(net, [rule("*.weight", recipe=1), rule("*", recipe=2)])
    assert [entry.name for entry in table] == [name for name, _ in net.named_parameters()]


def test_an_unmatched_pattern_raises_and_suggests_near_names() -> None:
    with pytest.raises(
        ValueError, match=r"'a\.qvk\.weight' matches no parameter; the nearest names are: a\.qkv\.weight"
    ):
        route(model(), [rule("a.qvk.weight", role="other")])
    with pytest.raises(ValueError, match="there are no parameters"):
        route(nn.ReLU(), [rule("*")])
    with pytest.raises(TypeError, match=r"made by guided_descent\.rule"):
        route(model(), ["a.*"])  # type: ignore[list-item]


def test_patterns_are_case_sensitive_and_match_any_name_of_a_tied_parameter() -> None:
    net = model()
    net.out.weight = net.tok.weight
    assert route(net, [rule("out.weight", role="head")])["tok.weight"].blocks[0].role is Role.HEAD
    with pytest.raises(ValueError, match="matches no parameter"):
        route(net, [rule("OUT.weight", role="head")])


def test_roles() -> None:
    assert view(rule("raw", role="matrix"), name="raw") == [("raw", "matrix", (6, 8))]
    assert view(rule("raw", role=Role.MATRIX, transposed=True), name="raw") == [("raw", "matrix", (8, 6))]
    assert view(rule("bank", role="expert"), name="bank") == [("bank", "expert", (3, 6, 8))]
    assert view(rule("bank", role="expert", transposed=True), name="bank") == [("bank", "expert", (3, 8, 6))]
    assert view(rule("bank", role="conv"), name="bank") == [("bank", "conv", (3, 48))]
    assert view(rule("tok.weight", role="matrix"), name="tok.weight") == [("tok.weight", "matrix", (30, 8))]
    assert view(rule("a.qkv.weight", role="other")) == [("a.qkv.weight", "other", (24, 8))]


def test_splits_and_heads() -> None:
    key = "a.qkv.weight"
    assert view(rule(key, split=3)) == [(f"{key}.{i}", "fused", (8, 8)) for i in range(3)]
    grouped = [(f"{key}.0", "fused", (16, 8)), (f"{key}.1", "fused", (4, 8)), (f"{key}.2", "fused", (4, 8))]
    assert view(rule(key, split=(16, 4, 4))) == grouped
    assert view(rule(key, split=(16, 4, 4), heads=8)) == [
        (f"{key}.0", "fused", (8, 2, 8)),
        (f"{key}.1", "fused", (2, 2, 8)),
        (f"{key}.2", "fused", (2, 2, 8)),
    ]
    assert view(rule(key, heads=4)) == [(key, "matrix", (4, 6, 8))]
    assert view(rule(key, split=1)) == [(key, "matrix", (24, 8))]
    assert view(rule("bank", role="expert", split=(2, 4)), name="bank") == [
        ("bank.0", "expert", (3, 2, 8)),
        ("bank.1", "expert", (3, 4, 8)),
    ]
    assert view(rule("bank", role="expert", heads=2), name="bank") == [("bank", "expert", (6, 3, 8))]


def test_an_inferred_split_can_be_undone_or_refined() -> None:
    net = Group(attn=nn.MultiheadAttention(8, 2), out=nn.Linear(8, 30))

    def cut(**options: object) -> list[tuple[str, tuple[int, ...]]]:
        r = rule("attn.in_proj_weight", **options)  # type: ignore[arg-type]
        return [
            (b.key.removeprefix("attn.in_proj_weight"), b.shape) for b in route(net, [r])["attn.in_proj_weight"].blocks
        ]

    assert cut(split=1) == cut(role="matrix") == [("", (24, 8))]
    assert cut(heads=2) == [(f".{part}", (2, 4, 8)) for part in "qkv"]
    assert cut(split=(8, 8, 8)) == cut(role="fused") == [(f".{part}", (8, 8)) for part in "qkv"]


def test_a_split_of_what_passed_for_a_head_makes_it_fused() -> None:
    net = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 24))
    (first, *_) = route(net, [rule("1.weight", split=3)])["1.weight"].blocks
    assert (first.role, first.shape) == (Role.FUSED, (8, 8))
    assert route(net)["1.weight"].blocks[0].role is Role.HEAD


def test_splits_from_a_bare_list() -> None:
    table = route([nn.Parameter(torch.ones(12, 5))], [rule("param.0", split=(6, 3, 3))])
    assert [(b.role.value, b.shape) for b in table.blocks] == [("fused", (6, 5)), ("fused", (3, 5)), ("fused", (3, 5))]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"pattern": "a.proj.bias", "role": "matrix"}, "needs 2 axes"),
        ({"pattern": "bank", "role": "matrix"}, "role='expert' batches over axis 0, role='conv' flattens"),
        ({"pattern": "raw", "role": "expert"}, r"needs 3 axes \[E, out, in\]"),
        ({"pattern": "raw", "role": "conv"}, "needs 3 axes or more"),
        ({"pattern": "empty", "role": "matrix"}, "empty: it has no elements"),
        ({"pattern": "raw", "split": 2}, "split=2 needs a matrix, but the role is 'other'"),
        ({"pattern": "a.qkv.bias", "split": 3}, "narrow the pattern"),
        ({"pattern": "a.qkv.bias", "transposed": False}, "transposed=False needs a matrix"),
        ({"pattern": "a.qkv.weight", "split": 5}, "split=5 does not divide its 24 outputs"),
        ({"pattern": "a.qkv.weight", "split": (8, 8)}, r"split=\(8, 8\) adds up to 16, but it has 24 outputs"),
        ({"pattern": "a.qkv.weight", "heads": 5}, "heads=5 does not divide"),
        ({"pattern": "a.qkv.weight", "split": (16, 5, 3), "heads": 4}, "does not divide the rows"),
    ],
)
def test_a_rule_that_does_not_fit_raises(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        route(model(), [rule(**options)])


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"pattern": ""}, ValueError, "matches nothing"),
        ({"pattern": 3}, TypeError, "must be a string"),
        ({"role": "matrx"}, ValueError, "'matrx' is not a role; choose one of: matrix, fused"),
        ({"split": 0}, ValueError, "split=0 must be at least 1"),
        ({"split": ()}, ValueError, "is empty"),
        ({"split": (4, -1)}, ValueError, "split=-1 must be at least 1"),
        ({"split": (4.0, 2)}, TypeError, "whole numbers"),
        ({"split": True}, TypeError, "whole numbers"),
        ({"heads": 0}, ValueError, "heads=0 must be at least 1"),
        ({"heads": 2.0}, TypeError, "whole numbers"),
        ({"transposed": 1}, TypeError, "must be True"),
    ],
)
def test_malformed_rules_are_refused(options: dict, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        rule(**({"pattern": "*"} | options))
