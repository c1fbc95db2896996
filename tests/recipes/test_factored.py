"""Adafactor, CAME, SM3 and Adam-mini: references, parity with torch, identities, and the memory that they promise."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import guided_descent as gd
from guided_descent.parts import CellMoments, NormalizeEach, cells
from guided_descent.routing import route
from oracles import low_memory as reference
from oracles.adam_family import Rule, walk
from oracles.low_memory import Pair
from oracles.training import Bag, far, stream, train

F64 = torch.float64
PATHS: list[dict[str, bool]] = [{}, {"foreach": False}, {"compile": True}]
IDS = ["lists", "plain", "compiled"]
#: Shapes with the axes that are factored at a least side of 3.
LARGEST: dict[tuple[int, ...], Pair] = {
    (5, 8): (0, 1),
    (8, 5): (0, 1),
    (6,): None,
    (4, 3, 2, 2): (0, 1),
    (4, 2, 5): (0, 2),
    (2, 9): None,
    (): None,
}
#: The same for the last two axes and a least side of 1, which is torch's choice.
LAST: dict[tuple[int, ...], Pair] = {s: (len(s) - 2, len(s) - 1) if len(s) > 1 else None for s in LARGEST}
TORCH: dict[str, Any] = {"min_dim_size_to_factor": 1, "factored_axes": "last"}


def paths_of(name: str, starts: list[Tensor], steps: int, **options: Any) -> list[list[Tensor]]:
    """What the recipe makes of the streams of these tensors."""
    params = [nn.Parameter(p.clone()) for p in starts]
    opt = gd.optimizer(name, params, **options)
    if options.get("compile"):
        opt._engine.compiled.backend = "eager"
    return train(opt, params, [stream(tuple(p.shape), i) for i, p in enumerate(starts)], steps)


def check(name: str, rules: dict[tuple[int, ...], Rule], options: dict[str, Any], decay: float = 0.0) -> None:
    """The recipe takes the steps of each shape's rule."""
    starts = [torch.randn(shape, dtype=F64) for shape in rules]
    found = paths_of(name, starts, 40, lr=0.05, weight_decay=decay, **options)
    for i, (start, got, rule) in enumerate(zip(starts, found, rules.values())):
        want = walk(start, stream(tuple(start.shape), i), 40, 0.05, rule, decay)
        assert far(got, want) < 1e-12, tuple(start.shape)


ADAFACTOR: list[tuple[dict[str, Any], dict[str, Any]]] = [
    ({}, {}),
    ({"beta2_decay": -0.5, "eps": (1e-2, 0.5), "d": 0.3}, {"decay": -0.5, "eps": (1e-2, 0.5), "d": 0.3}),
    ({"d": None, "beta1": 0.8}, {"d": None, "beta1": 0.8}),
    (
        {"relative_step": False, "scale_parameter": False, "beta2_cap": 0.7},
        {"relative": False, "parameter": False, "cap": 0.7},
    ),
    ({"relative_step": False, "d": None}, {"relative": False, "d": None}),
    ({"scale_parameter": False, "d": None, "beta1": 0.9}, {"parameter": False, "d": None, "beta1": 0.9}),
]


@pytest.mark.parametrize("path", PATHS, ids=IDS)
@pytest.mark.parametrize(("options", "numbers"), ADAFACTOR)
def test_adafactors_steps(options: dict[str, Any], numbers: dict[str, Any], path: dict[str, bool]) -> None:
    lr = 0.05
    tables = [(LARGEST, {"min_dim_size_to_factor": 3}), (LAST, TORCH)]
    for table, more in tables[: 1 if path.get("compile") else 2]:
        rules = {shape: reference.adafactor(axes, lr, **numbers) for shape, axes in table.items()}
        check("adafactor", rules, {**options, **more, **path}, decay=0.2)


@pytest.mark.parametrize("lr", [0.05, 2.0])
def test_the_relative_step_falls_from_the_rate_or_from_one(lr: float) -> None:
    start, grad = torch.randn(5, 8, dtype=F64), stream((5, 8), 1)
    p = nn.Parameter(start.clone())
    got = train(gd.Adafactor([p], lr=lr, min_dim_size_to_factor=1), [p], [grad], 40)[0]
    assert far(got, walk(start, grad, 40, lr, reference.adafactor((0, 1), lr))) < 1e-12


@pytest.mark.parametrize("path", PATHS, ids=IDS)
@pytest.mark.parametrize(
    ("options", "numbers"),
    [
        ({}, {}),
        ({"betas": (0.8, 0.9, 0.95), "clip_threshold": 0.5}, {"betas": (0.8, 0.9, 0.95), "d": 0.5}),
        ({"eps": (1e-2, 0.5), "clip_threshold": None}, {"eps": (1e-2, 0.5), "d": None}),
    ],
)
def test_cames_steps(options: dict[str, Any], numbers: dict[str, Any], path: dict[str, bool]) -> None:
    tables = [(LARGEST, {"min_dim_size_to_factor": 3}), (LAST, TORCH)]
    for table, more in tables[: 1 if path.get("compile") else 2]:
        rules = {shape: reference.came(axes, **numbers) for shape, axes in table.items()}
        check("came", rules, {**options, **more, **path}, decay=0.2)


@pytest.mark.parametrize("path", PATHS, ids=IDS)
@pytest.mark.parametrize("options", [{}, {"momentum": 0.9, "eps": 0.1}])
def test_sm3s_steps(options: dict[str, Any], path: dict[str, bool]) -> None:
    rules = {shape: reference.sm3(**options) for shape in LARGEST if shape}  # a number alone is Adagrad's, below
    check("sm3", rules, {**options, **path}, decay=0.2)


@pytest.mark.parametrize("path", PATHS, ids=IDS)
def test_adam_minis_steps(path: dict[str, bool]) -> None:
    betas, eps = (0.8, 0.95), 1e-3
    shapes = [(4, 6), (6, 4), (6,), (2, 3, 4)]  # of a list: two rows of matrices, the rest element by element
    rules = {}
    for shape in shapes:
        cell = torch.arange(torch.Size(shape).numel()).view(shape)
        cell = cell // shape[1] if len(shape) == 2 else cell
        rules[shape] = reference.adam_mini(cell, betas, eps)
    check("adam_mini", rules, {"betas": betas, "eps": eps, **path}, decay=0.2)


# -- torch and the authors ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, F64])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"weight_decay": 0.1, "d": 1.5, "beta2_decay": -0.6},
        {"lr": 0.02, "maximize": True},
        {"eps": (1e-30, 0.5)},
    ],
)
@pytest.mark.parametrize("path", [{}, {"foreach": False}], ids=["lists", "plain"])
def test_adafactor_is_torchs(options: dict[str, Any], dtype: torch.dtype, path: dict[str, bool]) -> None:
    shapes = [(5, 3), (3, 7), (4,), (), (4, 3, 2, 2), (1, 6), (2, 3, 4)]
    starts = [torch.randn(shape, dtype=dtype) for shape in shapes]
    grads = [stream(shape, i) for i, shape in enumerate(shapes)]
    paths = []
    for make in (
        lambda params: gd.Adafactor(params, **options, **TORCH, **path),
        lambda params: torch.optim.Adafactor(params, **options),
    ):
        params = [nn.Parameter(p.clone()) for p in starts]
        paths.append(train(make(params), params, grads, 50))
    assert max(map(far, *paths)) < (1e-5 if dtype == torch.float32 else 1e-13)


def test_came_is_its_authors() -> None:
    came = pytest.importorskip("came_pytorch", reason="pip install came-pytorch (the extra peers)").CAME
    shapes = [(5, 3), (3, 7), (4,), (4, 3, 2, 2), (1, 6)]
    starts = [torch.randn(shape, dtype=F64) for shape in shapes]
    grads = [stream(shape, i) for i, shape in enumerate(shapes)]
    paths = []
    for make in (
        lambda params: gd.CAME(params, lr=1e-3, weight_decay=0.1, factored_axes="last"),
        lambda params: came(params, lr=1e-3, weight_decay=0.1),
    ):
        params = [nn.Parameter(p.clone()) for p in starts]
        paths.append(train(make(params), params, grads, 50))
    assert max(map(far, *paths)) < 1e-12


# -- identities --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["adafactor", "came"])
def test_squares_of_rank_one_lose_nothing_by_factoring(name: str) -> None:
    """Where all squares are one outer product times numbers of the step, the whole moment is of rank one as well."""
    a, b = torch.rand(5, dtype=F64) + 0.1, torch.rand(3, 7, dtype=F64) + 0.1
    start = torch.randn(3, 5, 7, dtype=F64)  # the first axis is the shortest and a batch
    outer = a[None, :, None] * b[:, None, :]

    def grad(t: int, p: Tensor) -> Tensor:
        signs = torch.randn(start.shape, dtype=F64, generator=torch.Generator().manual_seed(t)).sign()
        return outer * signs * (1 + t % 3)

    found = []
    for least in (4, 100):
        p = nn.Parameter(start.clone())
        opt = gd.optimizer(name, [p], min_dim_size_to_factor=least)
        path = train(opt, [p], [grad], 40)[0]
        found.append((path, opt.state[p]))
    if name == "adafactor":
        assert far(found[0][0], found[1][0]) < 1e-12
    row, column = found[0][1]["row_var"], found[0][1]["col_var"]
    torch.testing.assert_close(row * column / row.mean(1, keepdim=True), found[1][1]["variance"], rtol=1e-12, atol=0)


def test_sm3_on_a_vector_is_adagrad() -> None:
    starts = [torch.randn(shape, dtype=F64) for shape in [(9,), (1, 7), (7, 1), ()]]
    found = paths_of("sm3", starts, 40, lr=0.05)
    assert max(map(far, found, paths_of("adagrad", starts, 40, lr=0.05))) == 0


def test_the_bounds_of_sm3_are_adagrads_sums_or_above() -> None:
    p = nn.Parameter(torch.randn(6, 4, dtype=F64))
    opt, total, last = gd.SM3([p]), torch.zeros(6, 4, dtype=F64), torch.zeros(6, 4, dtype=F64)
    for t in range(1, 30):
        p.grad = stream((6, 4), 1)(t, p)
        total += p.grad**2
        opt.step()
        bound = torch.minimum(opt.state[p]["cover_0"], opt.state[p]["cover_1"])
        assert bool((bound >= total * (1 - 1e-14)).all())
        assert bool((bound >= last).all())
        last = bound


def test_sm3_is_adagrad_where_all_elements_are_alike() -> None:
    start = torch.full((4, 5), 2.0, dtype=F64)
    found = []
    for name in ("sm3", "adagrad"):
        p = nn.Parameter(start.clone())
        found.append(train(gd.optimizer(name, [p], lr=0.1), [p], [lambda t, p: torch.full_like(p, 1.0 / t)], 40)[0])
    assert far(*found) < 1e-14


def test_adam_mini_with_cells_of_one_element_is_adamw() -> None:
    model = Bag({"table": torch.randn(9, 1, dtype=F64), "vector": torch.randn(5, dtype=F64)})
    twin = Bag({name: p.detach() for name, p in model.named_parameters()})
    rules = [gd.rule("table", role="embedding")]
    one, two = gd.AdamMini(model, lr=0.05, rules=rules), gd.AdamW(twin, lr=0.05, rules=rules)
    assert any(isinstance(part, CellMoments) for b in one._engine.bind().buckets for part in b.parts)
    grads = [stream(tuple(p.shape), i) for i, p in enumerate(model.parameters())]
    found = train(one, list(model.parameters()), grads, 40)
    assert max(map(far, found, train(two, list(twin.parameters()), grads, 40))) < 1e-13


@pytest.mark.parametrize("path", PATHS, ids=IDS)
@pytest.mark.parametrize("name", ["adafactor", "came", "sm3", "adam_mini"])
def test_a_part_before_them_may_own_the_direction(name: str, path: dict[str, bool]) -> None:
    starts = [torch.randn(shape, dtype=F64) for shape in [(4, 6), (5,)]]
    more = {"min_dim_size_to_factor": 1} if name in ("adafactor", "came") else {}
    grads = [stream(tuple(p.shape), i, pull=0.0) for i, p in enumerate(starts)]
    unit = [lambda t, p, g=g: g(t, p) / g(t, p).norm() for g in grads]
    paths = []
    for given, options in ((unit, {}), (grads, {"add": [NormalizeEach().at("clip")]})):
        params = [nn.Parameter(p.clone()) for p in starts]
        opt = gd.optimizer(name, params, **more, **options, **path)
        if path.get("compile"):
            opt._engine.compiled.backend = "eager"
        paths.append(train(opt, params, given, 10))
    assert max(map(far, *paths)) < 1e-13


# -- what shares a second moment ---------------------------------------------------------------------------------------


def test_stacks_of_experts_are_factored_matrix_by_matrix() -> None:
    tensors = {"experts": torch.randn(9, 4, 5, dtype=F64)}
    model = Bag(tensors)
    experts = [gd.rule("experts", role="expert")]
    for rules, rows, columns in ((experts, (9, 4, 1), (9, 1, 5)), ([], (9, 4, 1), (1, 4, 5))):
        opt = gd.Adafactor(model, min_dim_size_to_factor=2, rules=rules)
        state = opt.state[model.experts]
        assert (tuple(state["row_var"].shape), tuple(state["col_var"].shape)) == (rows, columns)


def test_large_complex_tensors_are_factored_as_pairs_of_reals() -> None:
    value = torch.randn(6, 5, dtype=torch.complex128)
    for name, options in (("adafactor", {"min_dim_size_to_factor": 3}), ("came", {}), ("sm3", {})):
        p, q = nn.Parameter(value.clone()), nn.Parameter(torch.view_as_real(value).clone())
        one, two = gd.optimizer(name, [p], **options), gd.optimizer(name, [q], **options)
        for t in range(1, 10):
            q.grad = stream((6, 5, 2), 1)(t, q)
            p.grad = torch.view_as_complex(q.grad)
            one.step()
            two.step()
        assert torch.equal(torch.view_as_real(p.detach()), q.detach())
        assert one.state_bytes() == two.state_bytes()


def cell_numbers(model: nn.Module, rules: list[Any] | None = None) -> dict[str, tuple[int, ...] | None]:
    """Shape of the second moments of each block, as they broadcast over it."""
    found = {}
    for block in route(model, rules or []).blocks:
        divided = cells(block)
        found[block.key] = None if divided is None else divided.shape(block.stored)
    return found


class Attention(nn.Module):
    """A block with one fused map of queries, keys and values."""

    def __init__(self) -> None:
        super().__init__()
        self.num_heads = 2
        self.qkv = nn.Linear(8, 24)
        self.proj = nn.Linear(8, 8)


class Roles(nn.Module):
    """Every role whose cells differ."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, 8)
        self.attention = Attention()
        self.conv = nn.Conv2d(8, 6, 3, groups=2)
        self.turned = nn.ConvTranspose1d(6, 4, 3)
        self.depthwise = nn.Conv1d(4, 4, 3, groups=4)
        self.norm = nn.LayerNorm(4)
        self.head = nn.Linear(4, 11)


def test_cells_follow_from_roles() -> None:
    found = cell_numbers(Roles())
    assert found["embed.weight"] == (11, 1, 1)
    assert found["attention.qkv.weight.q"] == found["attention.qkv.weight.v"] == (8, 1, 1)
    assert found["attention.proj.weight"] == (8, 1, 1)
    assert found["conv.weight"] == (6, 1, 1, 1, 1)
    assert found["turned.weight"] == (1, 4, 1, 1)
    assert found["depthwise.weight"] == (4, 1, 1, 1)
    assert found["head.weight"] == (11, 1, 1)
    assert found["norm.weight"] is found["attention.qkv.bias"] is None


def test_heads_of_queries_and_keys_are_cells() -> None:
    found = cell_numbers(Roles(), [gd.rule("*.qkv.weight", heads=2), gd.rule("*.proj.weight", heads=4)])
    assert found["attention.qkv.weight.q"] == found["attention.qkv.weight.k"] == (2, 1, 1)
    assert found["attention.qkv.weight.v"] == (8, 1, 1)
    assert found["attention.proj.weight"] == (4, 1, 1)


def test_queries_stored_head_by_head_have_one_cell() -> None:
    class GPTNeoXAttention(Attention):
        pass

    found = cell_numbers(nn.Sequential(GPTNeoXAttention(), nn.Linear(8, 8), nn.Linear(8, 3)))
    assert found["0.qkv.weight.q1"] == found["0.qkv.weight.k0"] == (1, 1, 1)
    assert found["0.qkv.weight.v1"] == (4, 1, 1)


def test_adam_mini_divides_a_model_as_its_cells_say() -> None:
    model = Roles().double()
    rules = [gd.rule("*.qkv.weight", heads=2)]
    opt = gd.AdamMini(model, lr=0.05, weight_decay=0.0, rules=rules)
    weight, conv = model.attention.qkv.weight, model.turned.weight
    heads = torch.cat([torch.arange(4).repeat_interleave(4), 4 + torch.arange(8)])
    numbers = {weight: heads[:, None].expand(24, 8), conv: torch.arange(4)[None, :, None].expand(6, 4, 3)}
    params = list(numbers)
    starts, grads = [p.detach().clone() for p in params], [stream(tuple(p.shape), i) for i, p in enumerate(params)]
    found = train(opt, params, grads, 35)
    for start, grad, cell, got in zip(starts, grads, numbers.values(), found):
        assert far(got, walk(start, grad, 35, 0.05, reference.adam_mini(cell))) < 1e-12


# -- memory ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "options", "numbers"),
    [
        ("adafactor", {}, lambda m, n: m + n),
        ("adafactor", {"beta1": 0.9}, lambda m, n: m * n + m + n),
        ("came", {}, lambda m, n: m * n + 2 * (m + n)),
        ("sm3", {}, lambda m, n: m + n),
        ("sm3", {"momentum": 0.9}, lambda m, n: m * n + m + n),
        ("adam_mini", {}, lambda m, n: m * n + m),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, F64])
def test_the_state_is_as_small_as_promised(
    name: str, options: dict[str, Any], numbers: Any, dtype: torch.dtype
) -> None:
    m, n = 160, 130
    model = nn.Sequential(nn.Linear(n, m, bias=False), nn.ReLU(), nn.Linear(m, n, bias=False)).to(dtype)
    opt = gd.optimizer(name, model, rounding="stochastic", **options)
    size = 8 if dtype == F64 else 4
    want = size * (numbers(m, n) + numbers(n, m)) + 2 * 4  # and a counter of steps for each
    assert opt.state_bytes() == gd.explain(opt).state_bytes == want
    for p in model.parameters():
        p.grad = torch.randn_like(p)
    opt.step()
    assert opt.state_bytes() == want


def test_small_sides_are_not_factored() -> None:
    opt = gd.Adafactor([nn.Parameter(torch.ones(shape)) for shape in [(127, 200), (128, 200), (3, 128, 5, 128)]])
    assert [sorted(s) for s in opt.state.values()] == [["step", "variance"], *[["col_var", "row_var", "step"]] * 2]


@pytest.mark.parametrize("name", ["adafactor", "came"])
def test_a_least_side_of_zero_is_an_error(name: str) -> None:
    with pytest.raises(ValueError, match=f"min_dim_size_to_factor=0 of {name} must be at least 1"):
        gd.optimizer(name, [nn.Parameter(torch.zeros(3))], min_dim_size_to_factor=0)


def test_a_row_without_gradients_starts_like_any_other() -> None:
    """An unused token has a moment of 1e-30 of its own: its first gradient makes a bounded step."""
    p = nn.Parameter(torch.ones(6, 4))
    opt = gd.Adafactor([p], min_dim_size_to_factor=1)
    for t in range(1, 20):
        p.grad = torch.randn(6, 4)
        if t < 19:
            p.grad[2] = 0.0
        before = p.detach().clone()
        opt.step()
        assert float((p.detach() - before).abs().max()) < 0.2
        assert torch.equal(before[2], torch.ones(4)) or t == 20
    assert not torch.equal(p.detach()[2], torch.ones(4))
