"""What single module types, wrappers and bare lists route to."""

from __future__ import annotations

import copy
from itertools import pairwise

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, parametrize

from guided_descent.routing import Role, canonical_name, named_parameters, route
from guided_descent.routing.roles import Block


def blocks(module: nn.Module) -> dict[str, tuple[str, tuple[int, ...]]]:
    return {block.key: (block.role.value, block.shape) for block in route(module).blocks}


class Net(nn.Module):
    """Holds the modules and parameters that it is given, with layers after them that take in any width used here."""

    def __init__(self, **parts: nn.Module | nn.Parameter | int) -> None:
        super().__init__()
        for name, part in parts.items():
            setattr(self, name, part)
        widths = (1, 4, 5, 7, 8, 9, 3)
        self.tail = nn.Sequential(*(nn.Linear(a, b) for a, b in pairwise(widths)))


def only(**parts: nn.Module | nn.Parameter) -> dict[str, tuple[str, tuple[int, ...]]]:
    return {key: value for key, value in blocks(Net(**parts)).items() if not key.startswith("tail.")}


@pytest.mark.parametrize(
    ("wrapped", "plain"),
    [
        ("module.a.weight", "a.weight"),
        ("_orig_mod.a._checkpoint_wrapped_module.b", "a.b"),
        ("a.module.b.module.c", "a.b.c"),
        ("submodule.weight", "submodule.weight"),
        ("a.module_list.0", "a.module_list.0"),
        ("", ""),
    ],
)
def test_canonical_name(wrapped: str, plain: str) -> None:
    assert canonical_name(wrapped) == plain
    assert canonical_name(plain) == plain


def test_convolutions() -> None:
    found = only(
        one=nn.Conv1d(4, 6, 3),
        two=nn.Conv2d(1, 6, (3, 5), bias=False),
        three=nn.Conv3d(4, 6, 2, bias=False),
        grouped=nn.Conv2d(4, 6, 3, groups=2, bias=False),
        deep=nn.Conv2d(4, 8, 3, groups=4, bias=False),
        back=nn.ConvTranspose2d(4, 6, 3, bias=False),
        back_deep=nn.ConvTranspose1d(4, 4, 3, groups=4, bias=False),
        back_grouped=nn.ConvTranspose2d(4, 6, 3, groups=2, bias=False),
        narrow=nn.Conv2d(1, 6, 1, bias=False),
    )
    assert found == {
        "one.weight": ("conv", (6, 12)),
        "one.bias": ("bias", (6,)),
        "two.weight": ("conv", (6, 15)),
        "three.weight": ("conv", (6, 32)),
        "grouped.weight": ("conv", (2, 3, 18)),
        "deep.weight": ("depthwise", (8, 1, 3, 3)),
        "back.weight": ("conv", (6, 36)),
        "back_deep.weight": ("depthwise", (4, 1, 3)),
        "back_grouped.weight.group0": ("conv", (3, 18)),
        "back_grouped.weight.group1": ("conv", (3, 18)),
        "narrow.weight": ("vector", (6, 1, 1, 1)),
    }


@pytest.mark.parametrize(("kind", "gates"), [(nn.LSTM, "ifgo"), (nn.GRU, "rzn"), (nn.RNN, "")])
def test_recurrent_weights_are_split_by_gate(kind: type[nn.RNNBase], gates: str) -> None:
    found = only(rnn=kind(5, 6, bidirectional=True))
    for weight, width in (("weight_ih_l0", 5), ("weight_hh_l0_reverse", 6)):
        keys = [f"rnn.{weight}.{gate}" for gate in gates] or [f"rnn.{weight}"]
        assert [found[key] for key in keys] == [("recurrent", (6, width))] * len(keys)
    assert found["rnn.bias_ih_l0"] == ("bias", (6 * max(1, len(gates)),))


def test_recurrent_cells_and_projections() -> None:
    assert only(cell=nn.LSTMCell(5, 6))["cell.weight_hh.o"] == ("recurrent", (6, 6))
    assert only(cell=nn.GRUCell(5, 6))["cell.weight_ih.n"] == ("recurrent", (6, 5))
    assert only(cell=nn.RNNCell(5, 6))["cell.weight_ih"] == ("recurrent", (6, 5))
    assert only(rnn=nn.LSTM(5, 6, proj_size=4))["rnn.weight_hr_l0"] == ("recurrent", (4, 6))


def test_multihead_attention_with_fused_and_separate_weights() -> None:
    found = only(attn=nn.MultiheadAttention(8, 2, add_bias_kv=True))
    assert [found[f"attn.in_proj_weight.{part}"] for part in "qkv"] == [("fused", (8, 8))] * 3
    assert found["attn.out_proj.weight"] == ("matrix", (8, 8))
    assert found["attn.bias_k"][0] == found["attn.in_proj_bias"][0] == "bias"
    found = only(attn=nn.MultiheadAttention(8, 2, kdim=6, vdim=4))
    assert [found[f"attn.{part}_proj_weight"] for part in "qkv"] == [
        ("matrix", (8, 8)),
        ("matrix", (8, 6)),
        ("matrix", (8, 4)),
    ]


class ScaleNorm(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.g = nn.Parameter(torch.ones(()))


class Denormalizer(nn.Module):
    """A norm by its name, but it holds a matrix."""

    def __init__(self) -> None:
        super().__init__()
        self.mix = nn.Parameter(torch.ones(7, 7))


def test_norms_by_type_and_by_structure() -> None:
    norms = (nn.LayerNorm(7), nn.RMSNorm(7), nn.GroupNorm(1, 7), nn.BatchNorm1d(7), nn.InstanceNorm2d(7, affine=True))
    for norm in (*norms, nn.SyncBatchNorm(7), ScaleNorm()):
        assert {role for role, _ in only(norm=norm).values()} == {"norm"}, norm
    assert only(norm=Denormalizer()) == {"norm.mix": ("other", (7, 7))}


@pytest.mark.parametrize(
    ("shape", "role"),
    [
        ((), "scalar"),
        ((1,), "scalar"),
        ((1, 1), "scalar"),
        ((9,), "vector"),
        ((1, 9), "vector"),
        ((9, 1), "vector"),
        ((1, 1, 9), "vector"),
        ((9, 8), "other"),  # such as A_log of Mamba or a table of positions
        ((1, 9, 7), "embedding"),  # broadcast over the batch, as wide as a layer of the model
        ((1, 9, 6), "other"),
        ((9, 8, 6), "other"),
        ((9, 1, 4), "other"),
        ((0, 9), "other"),
        ((0,), "other"),
    ],
)
def test_raw_parameters_are_never_matrices(shape: tuple[int, ...], role: str) -> None:
    assert only(weight=nn.Parameter(torch.ones(shape))) == {"weight": (role, shape)}


def test_reasons_of_raw_parameters_say_what_to_do() -> None:
    table = route(Net(A=nn.Parameter(torch.ones(4, 6)), B=nn.Parameter(torch.ones(2, 4, 6))))
    assert "rule(..., role='matrix')" in table["A"].blocks[0].why
    assert "role='expert'" in table["B"].blocks[0].why


def test_degenerate_and_unusual_tensors_of_known_modules() -> None:
    assert only(fc=nn.Linear(9, 1, bias=False))["fc.weight"] == ("vector", (1, 9))
    assert only(fc=nn.Linear(1, 7, bias=False))["fc.weight"] == ("vector", (7, 1))
    assert only(fc=nn.Linear(7, 8, dtype=torch.complex64))["fc.weight"] == ("other", (8, 7))
    table = route(Net(fc=nn.Linear(7, 8, dtype=torch.complex64), code=nn.Parameter(torch.ones(3, 3).byte(), False)))
    assert table["fc.weight"].blocks[0].why.startswith("complex")
    assert table["fc.weight"].blocks[0].stored == (8, 7, 2)
    assert table["fc.bias"].blocks[0].stored == (8, 2)
    assert table["code"].blocks[0].why.startswith("uint8")
    with pytest.warns(UserWarning, match="zero-element"):
        empty = nn.Linear(0, 8, bias=False)
    assert only(fc=empty)["fc.weight"] == ("other", (8, 0))


def test_frozen_parameters_are_listed_with_their_role() -> None:
    net = Net(fc=nn.Linear(7, 8))
    net.fc.weight.requires_grad_(False)
    entry = route(net)["fc.weight"]
    assert (entry.trainable, entry.blocks[0].role) == (False, Role.MATRIX)
    assert entry.blocks[0].why.endswith("; frozen")


def test_lazy_parameters_are_marked_and_route_after_the_first_batch() -> None:
    net = nn.Sequential(nn.LazyLinear(8), nn.ReLU(), nn.LazyConv1d(4, 1), nn.Flatten(), nn.Linear(4, 2))
    assert [entry.lazy for entry in route(net)] == [True, True, True, True, False, False]
    net = nn.Sequential(nn.LazyLinear(8), nn.ReLU(), nn.Linear(8, 2))
    net(torch.ones(1, 3))
    assert route(net)["0.weight"].blocks[0].shape == (8, 3)


def test_parametrized_modules_route_as_the_tensor_they_make() -> None:
    found = only(
        ortho=parametrizations.orthogonal(nn.Linear(7, 7, bias=False)),
        spectral=parametrizations.spectral_norm(nn.Conv1d(7, 4, 3, bias=False)),
        normed=parametrizations.weight_norm(nn.Linear(7, 4, bias=False)),
    )
    assert found == {
        "ortho.parametrizations.weight.original": ("matrix", (7, 7)),
        "spectral.parametrizations.weight.original": ("conv", (4, 21)),
        "normed.parametrizations.weight.original0": ("vector", (4, 1)),
        "normed.parametrizations.weight.original1": ("matrix", (4, 7)),
    }
    lstm = parametrizations.weight_norm(nn.LSTM(5, 6), "weight_hh_l0")
    assert only(rnn=lstm)["rnn.parametrizations.weight_hh_l0.original1.f"] == ("recurrent", (6, 6))


class Outer(nn.Module):
    """A parametrization whose original has another shape than the tensor it makes."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x[:, :1] @ x[:, 1:].mT

    def right_inverse(self, x: torch.Tensor) -> torch.Tensor:
        return x[:, :2].clone()


def test_an_original_of_another_shape_is_not_taken_for_the_weight() -> None:
    layer = nn.Linear(7, 7, bias=False)
    parametrize.register_parametrization(layer, "weight", Outer(), unsafe=True)
    assert only(fc=layer) == {"fc.parametrizations.weight.original": ("other", (7, 2))}


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_older_weight_norm_hooks() -> None:
    found = only(fc=nn.utils.weight_norm(nn.Linear(7, 4, bias=False)))
    assert found == {"fc.weight_g": ("vector", (4, 1)), "fc.weight_v": ("matrix", (4, 7))}


class MyLinear(nn.Module):
    def __init__(self, inp: int, out: int, swapped: bool = False) -> None:
        super().__init__()
        self.in_features, self.out_features = inp, out
        self.w = nn.Parameter(torch.ones((inp, out) if swapped else (out, inp)))
        self.b = nn.Parameter(torch.ones(out))


def test_modules_that_declare_their_features_are_linear() -> None:
    for swapped in (False, True):
        assert only(fc=MyLinear(7, 9, swapped)) == {"fc.w": ("matrix", (9, 7)), "fc.b": ("bias", (9,))}


def test_bilinear_weights_are_not_guessed() -> None:
    assert only(fc=nn.Bilinear(7, 4, 5, bias=False)) == {"fc.weight": ("other", (5, 7, 4))}


def test_shared_modules_are_listed_once_with_their_names() -> None:
    layer = nn.Linear(7, 7)
    table = route(Net(a=layer, b=layer))
    assert table["a.weight"].aliases == ("b.weight",)
    assert table["b.weight"] is table["a.weight"]
    assert table["a.weight"].blocks[0].role is Role.MATRIX
    assert len(table.parameters) == len(list(Net(a=layer, b=layer).parameters()))


def test_order_is_that_of_named_parameters() -> None:
    net = Net(b=nn.Linear(7, 7), a=nn.LSTM(5, 6), raw=nn.Parameter(torch.ones(3, 4)))
    names = [name for name, _ in net.named_parameters()]
    table = route(net)
    assert [entry.name for entry in table] == names == list(named_parameters(net))
    assert list(dict.fromkeys(block.names[0] for block in table.blocks)) == names
    assert all(tensor is net.get_parameter(name) for name, tensor in named_parameters(net).items())


def test_a_module_that_contains_itself_is_entered_once() -> None:
    net = Net(fc=nn.Linear(7, 7))
    net.fc._modules["back"] = net
    assert [entry.name for entry in route(net)] == [name for name, _ in net.named_parameters()]


def test_names_that_differ_only_in_a_wrapper_component_stay_apart() -> None:
    net = Net(weight=nn.Parameter(torch.ones(2)), module=nn.LayerNorm(7))
    assert [entry.name for entry in route(net)][:3] == ["weight", "module.weight", "bias"]


def test_routing_survives_deepcopy_and_does_not_touch_the_model() -> None:
    net = Net(fc=nn.Linear(7, 7))
    before = {name: value.clone() for name, value in net.state_dict().items()}
    assert route(copy.deepcopy(net)) == route(net)
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())


def test_bare_tensors_are_routed_by_shape_only() -> None:
    shapes = [(3, 4), (1, 4), (4, 1), (5,), (), (2, 3, 4), (0, 3)]
    tensors = [nn.Parameter(torch.ones(shape)) for shape in shapes] + [nn.Parameter(torch.ones(2, 2) * 1j)]
    table = route(iter(tensors))
    roles = ["matrix", "vector", "vector", "vector", "scalar", "other", "other", "other"]
    assert [block.role.value for block in table.blocks] == roles
    assert [entry.name for entry in table] == [f"param.{position}" for position in range(len(tensors))]
    assert all(block.why.startswith("shape only") for block in table.blocks)


def test_names_without_a_module_do_not_change_the_role() -> None:
    pairs = [("module.lm_head.weight", nn.Parameter(torch.ones(3, 4))), ("embed", nn.Parameter(torch.ones(9, 4)))]
    table = route(pairs)
    assert [(block.key, block.role) for block in table.blocks] == [
        ("lm_head.weight", Role.MATRIX),
        ("embed", Role.MATRIX),
    ]
    shared = pairs[0][1]
    assert route([("a", shared), ("b", shared)])["b"].aliases == ("b",)


@pytest.mark.parametrize("source", [torch.ones(2), {"a": torch.ones(2)}, 3, "abc", [1], [("a", 1)], [nn.Linear(2, 2)]])
def test_other_sources_are_refused(source: object) -> None:
    with pytest.raises(TypeError, match="pass a model, tensors, or"):
        route(source)  # type: ignore[arg-type]


def test_a_name_that_occurs_twice_is_refused() -> None:
    with pytest.raises(ValueError, match="'a' occurs twice"):
        route([("a", torch.ones(2)), ("module.a", torch.ones(2))])


def test_matrix_views_of_a_block() -> None:
    block = Block("w", (), (4, 3, 2), Role.EXPERT)
    assert (block.batch, block.numel, block.is_matrix) == (4, 24, True)
