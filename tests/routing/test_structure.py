"""Heads, fused weights, experts and adapters: what is found by how modules fit together."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from guided_descent.routing import Role, Table, route


def roles(model: nn.Module) -> dict[str, str]:
    return {block.key: block.role.value for block in route(model).blocks}


def heads(model: nn.Module) -> set[str]:
    return {block.key for block in route(model).blocks if block.role is Role.HEAD}


class Group(nn.Module):
    """A module with the attributes it is given."""

    def __init__(self, **parts: object) -> None:
        super().__init__()
        for name, part in parts.items():
            setattr(self, name, part)


def layer(dim: int = 8) -> nn.Module:
    return Group(norm=nn.LayerNorm(dim), up=nn.Linear(dim, 4 * dim), down=nn.Linear(4 * dim, dim))


def stack(dim: int = 8, depth: int = 3) -> nn.ModuleList:
    return nn.ModuleList(layer(dim) for _ in range(depth))


@pytest.mark.parametrize("head_first", [False, True])
@pytest.mark.parametrize("share_table", [False, True])
def test_tied_head_with_neutral_names_in_either_order(head_first: bool, share_table: bool) -> None:
    tok, out = nn.Embedding(30, 8), nn.Linear(8, 30, bias=False)
    if share_table:
        out.weight = tok.weight
    else:
        tok.weight = out.weight
    first, last = {"tok": tok, "mid": stack()}, {"out": out}
    table = route(Group(**(last | first if head_first else first | last)))
    name, alias = ("out.weight", "tok.weight") if head_first else ("tok.weight", "out.weight")
    assert table[name].aliases == (alias,)
    (block,) = table[name].blocks
    assert block.role is Role.EMBEDDING
    assert block.module == "tok"
    assert "tied to out (Linear)" in block.why
    assert [b.key for b in table.blocks if b.role in (Role.EMBEDDING, Role.HEAD)] == [name]


@pytest.mark.parametrize("head_first", [False, True])
def test_untied_head_with_neutral_names_in_either_order(head_first: bool) -> None:
    first, last = {"a": nn.Embedding(30, 8), "b": stack()}, {"c": nn.Linear(8, 30)}
    assert heads(Group(**(last | first if head_first else first | last))) == {"c.weight"}


def test_the_last_linear_of_a_plain_network_is_its_head() -> None:
    assert heads(nn.Sequential(nn.Linear(9, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8))) == {"4.weight"}
    assert heads(nn.Sequential(nn.Flatten(), nn.Linear(9, 3))) == {"1.weight"}
    blocks = [nn.Sequential(nn.Linear(a, b), nn.ReLU()) for a, b in ((9, 8), (8, 8), (8, 3))]
    assert heads(nn.Sequential(*blocks)) == {"2.0.weight"}


def test_a_model_without_a_head_has_none() -> None:
    assert heads(nn.Linear(8, 8)) == set()
    assert heads(stack()) == set()
    assert heads(Group(tok=nn.Embedding(30, 8), mid=stack(), norm=nn.LayerNorm(8))) == set()
    assert heads(nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), 2)) == set()
    convs = [Group(a=nn.Conv2d(8, 8, 3), n=nn.BatchNorm2d(8), b=nn.Conv2d(8, 8, 3)) for _ in range(2)]
    assert heads(Group(stem=nn.Conv2d(3, 8, 3), body=nn.Sequential(*convs))) == set()


def test_two_heads_and_lists_of_heads() -> None:
    actor = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 4))
    critic = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 2))
    assert heads(Group(actor=actor, critic=critic)) == {"actor.2.weight", "critic.2.weight"}
    books = nn.ModuleList(nn.Linear(8, 30) for _ in range(3))
    found = heads(Group(tok=nn.Embedding(31, 8), mid=stack(), books=books))
    assert found == {f"books.{position}.weight" for position in range(3)}


def test_convolutional_heads() -> None:
    net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.ReLU(), nn.Conv2d(8, 5, 1))
    assert heads(net) == {"4.weight"}
    features = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3))
    assert heads(features) == set()


def test_the_reason_names_the_rule_that_fired() -> None:
    model = Group(out=nn.Linear(8, 30), tok=nn.Embedding(30, 8), mid=stack(), last=nn.Linear(8, 4))
    table = route(model)
    assert "as many outputs as tok has rows (30)" in table["out.weight"].blocks[0].why
    assert "the last map of the model" in table["last.weight"].blocks[0].why


def test_a_position_table_does_not_make_a_square_map_a_head() -> None:
    model = Group(pos=nn.Embedding(8, 8), proj=nn.Linear(8, 8), mid=stack(), out=nn.Linear(8, 30))
    assert heads(model) == {"out.weight"}


class Attention(Group):
    pass


def around(part: nn.Module) -> nn.Module:
    return Group(tok=nn.Embedding(30, 8), part=part, mid=stack(), mix=nn.Linear(12, 8), out=nn.Linear(8, 30))


def cut(part: nn.Module, name: str) -> list[tuple[str, str, tuple[int, ...]]]:
    table: Table = route(around(part))
    return [(b.key.removeprefix(f"part.{name}"), b.role.value, b.shape) for b in table[f"part.{name}"].blocks]


def test_fused_queries_keys_values() -> None:
    part = Attention(n_head=2, qkv=nn.Linear(8, 24), proj=nn.Linear(8, 8))
    assert cut(part, "qkv.weight") == [(f".{x}", "fused", (8, 8)) for x in "qkv"]
    part = Attention(heads=2, to_qkv=nn.Linear(8, 36), to_out=nn.Sequential(nn.Linear(12, 8)))  # inner 12, model 8
    assert cut(part, "to_qkv.weight") == [(f".{x}", "fused", (12, 8)) for x in "qkv"]
    part = Attention(num_heads=2, qkv=nn.Conv2d(8, 24, 1), proj=nn.Conv2d(8, 8, 1))
    assert cut(part, "qkv.weight") == [(f".{x}", "fused", (8, 8)) for x in "qkv"]


@pytest.mark.parametrize("where", ["attribute", "config"])
def test_fused_grouped_queries(where: str) -> None:
    sizes = {"num_attention_heads": 4, "num_key_value_heads": 2}
    info = sizes if where == "attribute" else {"config": Group(**sizes)}
    part = Attention(**info, qkv=nn.Linear(8, 16), o=nn.Linear(8, 8))
    assert cut(part, "qkv.weight") == [
        (".q", "fused", (8, 8)),
        (".k", "fused", (4, 8)),
        (".v", "fused", (4, 8)),
    ]


def test_fused_keys_values_beside_queries() -> None:
    part = Attention(heads=2, to_q=nn.Linear(8, 12), to_kv=nn.Linear(8, 24), to_out=nn.Linear(12, 8))
    assert cut(part, "to_kv.weight") == [(".k", "fused", (12, 8)), (".v", "fused", (12, 8))]
    assert cut(part, "to_q.weight") == [("", "matrix", (12, 8))]


class GPTNeoXAttention(Attention):
    pass


def test_attention_that_interleaves_heads_is_cut_head_by_head() -> None:
    part = GPTNeoXAttention(num_attention_heads=2, query_key_value=nn.Linear(8, 24), dense=nn.Linear(8, 8))
    labels = [".q0", ".k0", ".v0", ".q1", ".k1", ".v1"]
    assert cut(part, "query_key_value.weight") == [(label, "fused", (4, 8)) for label in labels]


def test_widths_alone_do_not_make_a_map_fused() -> None:
    mlp = Group(up=nn.Linear(8, 24), down=nn.Linear(24, 8))
    assert cut(mlp, "up.weight") == [("", "matrix", (24, 8))]  # no heads
    mlp = Group(config=Group(num_attention_heads=2), up=nn.Linear(8, 24), down=nn.Linear(24, 8))
    assert cut(mlp, "up.weight") == [("", "matrix", (24, 8))]  # heads, but the whole width is taken in
    mlp = Group(up=nn.Linear(8, 16), mid=nn.Linear(16, 16), down=nn.Linear(16, 8))
    assert cut(mlp, "up.weight") == [("", "matrix", (16, 8))]


def test_gated_mlp() -> None:
    part = Group(gate_up=nn.Linear(8, 40), down=nn.Linear(20, 8))
    assert cut(part, "gate_up.weight") == [(".a", "fused", (20, 8)), (".b", "fused", (20, 8))]
    part = nn.Sequential(nn.Linear(8, 40), nn.GLU(), nn.Linear(20, 8))
    assert cut(part, "0.weight") == [(".a", "fused", (20, 8)), (".b", "fused", (20, 8))]
    assert cut(Group(up=nn.Linear(8, 20), down=nn.Linear(20, 8)), "up.weight") == [("", "matrix", (20, 8))]


def test_a_head_twice_as_wide_as_the_model_is_no_gated_map() -> None:
    model = Group(tok=nn.Embedding(16, 8), mid=stack(), out=nn.Linear(8, 16), value=nn.Linear(8, 8))
    assert roles(model)["out.weight"] == "head"
    model = Group(n_head=2, tok=nn.Embedding(24, 8), mid=stack(), pool=nn.Linear(8, 8), out=nn.Linear(8, 24))
    assert roles(model)["out.weight"] == "head"


def parameter(*shape: int) -> nn.Parameter:
    return nn.Parameter(torch.ones(shape))


@pytest.mark.parametrize(
    ("first", "second", "expected"),
    [
        ((4, 40, 8), (4, 8, 20), [(".a", (4, 20, 8)), (".b", (4, 20, 8))]),  # gated, stored (out, in)
        ((4, 8, 40), (4, 20, 8), [(".a", (4, 20, 8)), (".b", (4, 20, 8))]),  # gated, stored (in, out)
        ((4, 20, 8), (4, 8, 20), [("", (4, 20, 8))]),  # plain, stored (out, in)
        ((4, 8, 20), (4, 20, 8), [("", (4, 20, 8))]),  # plain, stored (in, out)
    ],
)
@pytest.mark.parametrize("nested", [False, True])
def test_stacked_experts(first: tuple[int, ...], second: tuple[int, ...], expected: list, nested: bool) -> None:
    raw = {"w1": parameter(*first), "w2": parameter(*second)}
    part = Group(pick=nn.Linear(8, 4, bias=False), inner=Group(**raw)) if nested else Group(**raw, pick=nn.Linear(8, 4))
    place = "inner." if nested else ""
    assert cut(part, f"{place}w1") == [(label, "expert", shape) for label, shape in expected]
    assert cut(part, f"{place}w2") == [("", "expert", (4, 8, 20))]
    assert roles(around(part))["part.pick.weight"] == "router"


def test_stacked_experts_by_declared_number_with_a_raw_router() -> None:
    gate, bank = Group(n_routed_experts=4, weight=parameter(4, 8)), Group(num_experts=4, w=parameter(4, 20, 8))
    part = Group(gate=gate, bank=bank)
    found = roles(around(part))
    assert (found["part.gate.weight"], found["part.bank.w"]) == ("router", "expert")
    assert "declares 4 experts" in route(around(part))["part.bank.w"].blocks[0].why


def test_three_axes_without_experts_are_not_a_stack() -> None:
    assert roles(around(Group(w=parameter(4, 20, 8), fc=nn.Linear(8, 6))))["part.w"] == "other"
    biased = Group(num_experts=4, w=parameter(4, 20, 8), b=parameter(4, 20))
    assert roles(around(biased))["part.b"] == "other"


def test_a_router_beside_a_list_of_expert_modules() -> None:
    part = Group(pick=nn.Linear(8, 3), crowd=nn.ModuleList(layer() for _ in range(3)))
    found = roles(around(part))
    assert found["part.pick.weight"] == "router"
    assert found["part.crowd.0.up.weight"] == "matrix"
    wrapped = Group(router=Group(pick=nn.Linear(8, 3)), crowd=nn.ModuleList(layer() for _ in range(3)))
    assert roles(around(wrapped))["part.router.pick.weight"] == "router"


def test_ten_classes_over_ten_layers_is_a_head_and_no_router() -> None:
    assert roles(Group(mid=stack(depth=10), out=nn.Linear(8, 10)))["out.weight"] == "head"


def test_lora_in_four_styles() -> None:
    def base(frozen: bool = True) -> nn.Linear:
        return nn.Linear(8, 12, bias=False).requires_grad_(not frozen)

    hub = Group(
        base_layer=base(),
        lora_A=nn.ModuleDict({"default": nn.Linear(8, 2, bias=False)}),
        lora_B=nn.ModuleDict({"default": nn.Linear(2, 12, bias=False)}),
    )
    found = {b.key: (b.role.value, b.shape) for b in route(around(hub)).blocks}
    assert found["part.lora_A.default.weight"] == ("adapter", (2, 8))
    assert found["part.lora_B.default.weight"] == ("adapter", (12, 2))
    assert found["part.base_layer.weight"] == ("matrix", (12, 8))

    inside = base()
    inside.down, inside.up = parameter(2, 8), parameter(12, 2)
    assert roles(around(inside))["part.down"] == roles(around(inside))["part.up"] == "adapter"

    unfrozen = Group(rank=2, base=base(frozen=False), x=nn.Linear(8, 2, bias=False), y=nn.Linear(2, 12, bias=False))
    assert roles(around(unfrozen))["part.x.weight"] == roles(around(unfrozen))["part.y.weight"] == "adapter"

    class LowRank(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = parameter(2, 8), parameter(12, 2)

        def forward(self, w: torch.Tensor) -> torch.Tensor:
            return w + self.b @ self.a

    adapted = base()
    nn.utils.parametrize.register_parametrization(adapted, "weight", LowRank())
    table = route(around(adapted))
    assert [b.role.value for b in table.blocks if ".weight.0." in b.key] == ["adapter", "adapter"]
    assert [b.shape for b in table.blocks if ".weight.0." in b.key] == [(2, 8), (12, 2)]


def test_a_bottleneck_branch_is_no_adapter() -> None:
    branch = Group(skip=nn.Linear(8, 8), down=nn.Linear(8, 2), up=nn.Linear(2, 8))
    assert roles(around(branch))["part.down.weight"] == roles(around(branch))["part.up.weight"] == "matrix"


def test_an_adapted_head_is_still_a_head() -> None:
    base = nn.Linear(8, 30).requires_grad_(False)
    out = Group(base=base, a=nn.Linear(8, 2, bias=False), b=nn.Linear(2, 30, bias=False))
    found = roles(Group(tok=nn.Embedding(30, 8), mid=stack(), out=out))
    assert (found["out.base.weight"], found["out.a.weight"], found["out.b.weight"]) == ("head", "adapter", "adapter")
