"""The modular norm: the published algebra by hand, trees read off models, what may be declared, and the steps."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

import guided_descent as gd
from guided_descent import modula
from guided_descent.scaling.modula import Atom, Bond, Residual, Scale, Sequence, Sum, Tuple
from oracles import adam_family as family
from oracles import norm_balls as balls
from oracles.norm_balls import after, atom, beside, bond
from oracles.training import Bag, far, stream, train

F64 = torch.float64
EXACT: dict[str, Any] = {"coefficients": "exact", "ns_dtype": "float64"}
HALF = 1 / math.sqrt(2)


def same(found: modula.Module, want: balls.Module, **approx: float) -> None:
    """A tree has the masses, the sensitivity and the targets of the recursion."""
    assert found.mass == pytest.approx(want["mass"])
    assert found.sensitivity == pytest.approx(want["sens"])
    for target in (1.0, 0.3):
        assert found.targets(target) == pytest.approx(want["targets"](target))


# -- three nets by hand ----------------------------------------------------------------------------------------------


def mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 2))


def test_an_mlp() -> None:
    tree = Sequence(Atom("0"), Bond(HALF), Atom("2"), Bond(HALF), Atom("4"))
    assert (tree.mass, tree.sensitivity) == (3.0, pytest.approx(0.5))
    assert tree.targets() == pytest.approx({"0": 2 / 3, "2": math.sqrt(2) / 3, "4": 1 / 3})
    relu = bond(HALF)
    same(tree, after(atom("4"), after(after(relu, atom("2")), after(relu, atom("0")))))
    read = modula.read(mlp())
    assert read.targets() == pytest.approx({f"{name}.weight": t for name, t in tree.targets().items()})
    assert (read.mass, read.sensitivity) == (3.0, pytest.approx(0.5))


class Block(nn.Module):
    """(1 - 1/L) x + f(x) / L."""

    def __init__(self, depth: int) -> None:
        super().__init__()
        self.depth = depth
        self.norm = nn.LayerNorm(6)
        self.up, self.down = nn.Linear(6, 12), nn.Linear(12, 6)

    def forward(self, x: Tensor) -> Tensor:
        y = self.down(F.gelu(self.up(self.norm(x))) / 1.1289)
        return (1 - 1 / self.depth) * x + y / self.depth


class Stack(nn.Module):
    """A map, residual blocks, a map."""

    def __init__(self, depth: int) -> None:
        super().__init__()
        self.first = nn.Linear(4, 6)
        self.blocks = nn.Sequential(*(Block(depth) for _ in range(depth)))
        self.last = nn.Linear(6, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.blocks(self.first(x)))


def test_a_residual_stack() -> None:
    def block(i: int) -> Sum:
        return Residual(Bond(), f"blocks.{i}.up", Scale(1 / 1.1289), Bond(1.1289), f"blocks.{i}.down", depth=2)

    tree = Sequence("first", block(0), block(1), "last").tare(2.0, "blocks.*")
    # mass 1 + 2 + 1, each of four block weights 1/2; a branch is halved, and nothing after a block lengthens
    small = (0.5 / 4) / 0.5
    want = {"first": 0.25, "last": 0.25, **{f"blocks.{i}.{leaf}": small for i in (0, 1) for leaf in ("up", "down")}}
    assert tree.targets() == pytest.approx(want)
    assert (tree.mass, tree.sensitivity) == (4.0, pytest.approx(1.0))
    half = bond(0.5)
    rows = []
    for i in (0, 1):
        branch = after(half, after(atom(f"blocks.{i}.down", 0.5), after(bond(1.0), atom(f"blocks.{i}.up", 0.5))))
        rows.append(after(bond(1.0), beside(half, branch)))
    same(tree, after(atom("last"), after(after(rows[1], rows[0]), atom("first"))))
    read = modula.read(Stack(2), tare={"blocks.*": 2.0})
    assert read.targets() == pytest.approx({f"{name}.weight": t for name, t in tree.targets().items()})


class Attention(nn.Module):
    """Queries, keys and values of separate maps, what is attended to divided by 3; a mask that needs no rule."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v, self.out = (nn.Linear(8, 8, bias=False) for _ in range(4))

    def forward(self, x: Tensor, bias: Tensor) -> Tensor:
        b, t, d = x.shape
        q, k, v = (f(x).view(b, t, 2, d // 2).transpose(1, 2) for f in (self.q, self.k, self.v))
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=bias.softmax(-1).cumsum(-1), scale=1 / 4)
        return self.out(y.transpose(1, 2).reshape(b, t, d) * (1 / 3))


def test_an_attention_block() -> None:
    tree = Sequence(Tuple("q", "k", "v"), Bond(), Scale(1 / 3), "out")
    assert (tree.mass, tree.sensitivity) == (4.0, pytest.approx(1.0))
    assert tree.targets() == pytest.approx({"q": 0.75, "k": 0.75, "v": 0.75, "out": 0.25})
    same(tree, after(atom("out"), after(bond(1 / 3), after(bond(1.0), beside(atom("q"), atom("k"), atom("v"))))))
    read = modula.read(Attention())
    assert read.targets() == pytest.approx({f"{name}.weight": t for name, t in tree.targets().items()})
    assert read.sensitivity == pytest.approx(1.0)


class Gpt(nn.Module):
    """The published GPT: halves of two tables, blocks with factors 1 - 1/2L and 1/2L, a head."""

    def __init__(self, depth: int, vocabulary: int = 11, context: int = 5, width: int = 8) -> None:
        super().__init__()
        self.depth = depth
        self.token, self.place = nn.Embedding(vocabulary, width), nn.Embedding(context, width)
        self.register_buffer("places", torch.arange(context))
        self.attention = nn.ModuleList(nn.MultiheadAttention(width, 2, bias=False) for _ in range(depth))
        self.up = nn.ModuleList(nn.Linear(width, 4 * width) for _ in range(depth))
        self.down = nn.ModuleList(nn.Linear(4 * width, width) for _ in range(depth))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, vocabulary)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.token(tokens) * 0.5 + 0.5 * self.place(self.places)
        share = 1 / (2 * self.depth)
        for attention, up, down in zip(self.attention, self.up, self.down):
            y = self.norm(x)
            x = (1 - share) * x + share * (attention(y, y, y)[0] / 3)
            x = torch.add((1 - share) * x, share * down(F.gelu(up(self.norm(x))).div(1.1289)))
        return self.head(self.norm(x))


@pytest.mark.parametrize("depth", [1, 3])
def test_a_transformer_is_read_as_published(depth: int) -> None:
    names = [n for i in range(depth) for n in (f"attention.{i}.*", f"up.{i}.*", f"down.{i}.*")]
    found: modula.Module = modula.read(Gpt(depth), tare={"[tp][ol]*": 1.0})
    blocks = sum(m for name, m in found.masses().items() if name.split(".")[0] in ("attention", "up", "down"))
    assert blocks == 6 * depth
    for pattern in names:  # the blocks to a mass of 5 in all
        inside = {n: m for n, m in found.masses().items() if n.startswith(pattern[:-1])}
        found = found.tare(5 * sum(inside.values()) / (6 * depth), pattern)
    size = 5 / (6 * depth)
    share = bond(1 / (2 * depth))
    rest = bond(1 - 1 / (2 * depth))
    tree = beside(after(bond(0.5), atom("token.weight", 0.5)), after(bond(0.5), atom("place.weight", 0.5)))
    for i in range(depth):
        maps = beside(*(atom(f"attention.{i}.in_proj_weight.{x}", size) for x in "qkv"))
        attention = after(bond(1 / 3), after(atom(f"attention.{i}.out_proj.weight", size), maps))
        feed = after(atom(f"down.{i}.weight", size), after(bond(1.0), atom(f"up.{i}.weight", size)))
        for branch in (attention, feed):
            tree = after(beside(rest, after(share, branch)), tree)
    tree = after(atom("head.weight"), tree)
    assert found.mass == pytest.approx(7.0)
    assert found.targets() == pytest.approx(tree["targets"](1.0))


# -- the algebra -----------------------------------------------------------------------------------------------------

numbers = st.floats(0.1, 5.0)


def pairs(depth: int) -> Any:
    """Trees of ours and of the recursion, made together."""
    leaf = st.one_of(
        st.tuples(st.uuids().map(str), st.just(0.0) | numbers, numbers).map(lambda a: (Atom(*a), atom(*a))),
        numbers.map(lambda s: (Bond(s), bond(s))),
    )
    if depth == 0:
        return leaf
    few = st.lists(pairs(depth - 1), min_size=1, max_size=3)

    def chain(parts: list[Any]) -> Any:
        made = parts[0][1]
        for _, next_one in parts[1:]:
            made = after(next_one, made)
        return Sequence(*(a for a, _ in parts)), made

    return st.one_of(leaf, few.map(chain), few.map(lambda p: (Tuple(*(a for a, _ in p)), beside(*(b for _, b in p)))))


@settings(max_examples=60, deadline=None)
@given(pair=pairs(3))
def test_trees_have_the_numbers_of_the_recursion(pair: Any) -> None:
    ours, theirs = pair
    assert ours.mass == pytest.approx(theirs["mass"])
    assert ours.sensitivity == pytest.approx(theirs["sens"])
    want = theirs["targets"](0.7)
    if theirs["mass"]:
        found = ours.targets(0.7)
        assert {name: found[name] for name in want} == pytest.approx(want)
        assert not any(t for name, t in found.items() if name not in want)  # without mass


def test_tare_sets_the_share_of_a_compound() -> None:
    tree = Sequence("in", Sequence("a", Sequence("b", "c")).tare(5.0), "out")
    assert tree.masses() == pytest.approx({"in": 1, "a": 5 / 3, "b": 5 / 3, "c": 5 / 3, "out": 1})
    assert tree.tare(7.0).mass == pytest.approx(7.0)
    assert tree.tare(0.0, "a").targets()["a"] == 0.0
    with pytest.raises(ValueError, match=r"no atom with a mass matches 'x\*'; there are in, a, b, c, out"):
        tree.tare(1.0, "x*")
    assert Sequence("a", Bond()) == Sequence(Atom("a"), Bond(1.0)) != Tuple("a", Bond())
    assert (
        repr(Residual("a", depth=1))
        == "Sum(Sequence(Atom(name='a', mass=1.0, sensitivity=1.0), Bond(sensitivity=1.0)))"
    )


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Atom("a", mass=-1.0), r"mass=-1\.0 must be"),
        (lambda: Bond(0.0), r"sensitivity=0\.0 must be a finite number above 0"),
        (lambda: Scale(0), "above 0"),
        (lambda: Residual("a", depth=0), "depth=0 must be at least 1"),
        (lambda: Atom("a").tare(math.inf), "mass=inf"),
    ],
)
def test_wrong_numbers(make: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


def test_wrong_members() -> None:
    with pytest.raises(TypeError, match="Sequence takes modules or names of weights, got 3"):
        Sequence(3)  # type: ignore[arg-type]


# -- reading ---------------------------------------------------------------------------------------------------------


class Gated(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(4, 6), nn.Linear(4, 6), nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.c(F.silu(self.a(x)) * self.b(x))


class Branching(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.a(x) if x.sum() > 0 else x


@pytest.mark.parametrize(
    ("model", "what"),
    [
        (Gated(), r"there is no rule for .*mul.* of Gated"),
        (Branching(), "the forward pass of Branching cannot be traced"),
        (nn.Sequential(nn.Linear(3, 3), nn.Softmax(-1)), r"there is no rule for '1' \(Softmax\)"),
        (nn.Sequential(nn.LSTM(3, 3)), r"there is no rule for '0' \(LSTM\)"),
    ],
)
def test_what_is_not_known_is_to_be_declared(model: nn.Module, what: str) -> None:
    for make in (modula.read, gd.Modula):
        with pytest.raises(ValueError, match=rf"{what}.*declare the tree with guided_descent\.modula"):
            make(model)


def test_a_model_that_cannot_run_is_to_be_declared() -> None:
    model = Bag({"w": torch.ones(3, 3)})
    with pytest.raises(ValueError, match="the forward pass of Bag cannot be traced"):
        gd.Modula(model, rules=[gd.rule("w", role="matrix")])


def test_a_declared_tree_takes_the_place_of_the_walk() -> None:
    model = Gated()
    tree = Sequence(Tuple("a", Atom("b.weight", mass=2.0)), Bond(0.5), "c")
    opt = gd.Modula(model, lr=0.2, parametrization=tree)
    rates = {line.parameter: line.lr for line in gd.explain(opt).lines if line.recipe == "modula"}
    assert rates == pytest.approx({"a.weight": 0.2 / 2, "b.weight": 0.2, "c.weight": 0.05})
    assert all(line.lr == 3e-4 for line in gd.explain(opt).lines if line.recipe == "adamw")
    with pytest.raises(
        ValueError, match=r"does not name 'c\.weight', which is to be dualized.*modula\.Atom\('c\.weight'\)"
    ):
        gd.Modula(model, parametrization=Sequence("a", "b"))
    with pytest.raises(ValueError, match=r"names 'd', which is no weight here; the nearest are"):
        gd.Modula(model, parametrization=Sequence("a", "b", "c", "d"))


def test_more_sensitivities() -> None:
    net = nn.Sequential(nn.Linear(3, 9), nn.MaxPool1d(3), nn.Linear(3, 5))
    with pytest.raises(ValueError, match="MaxPool1d"):
        modula.read(net)
    assert modula.read(net, sensitivities={nn.MaxPool1d: 2.0}).targets() == {"0.weight": 0.25, "2.weight": 0.5}


class Shared(nn.Module):
    """A table that is the head as well, a fused map, a gain, a raw table of places, constants."""

    def __init__(self) -> None:
        super().__init__()
        self.token = nn.Embedding(11, 8)
        self.place = nn.Parameter(torch.randn(1, 5, 8))
        self.qkv = nn.Linear(8, 24, bias=False)
        self.num_heads = 2
        self.out = nn.Linear(8, 8, bias=False)
        self.gain = nn.Parameter(torch.full((8,), 3.0))
        self.register_buffer("share", torch.tensor(0.5))
        self.head = nn.Linear(8, 11, bias=False)
        self.head.weight = self.token.weight

    def forward(self, tokens: Tensor, scale: float | None = None) -> Tensor:
        x = self.token(tokens) + self.place
        q, k, v = self.qkv(x).chunk(3, dim=-1)
        y = self.out(F.scaled_dot_product_attention(q, k, v))
        x = self.share * x + self.share * y * self.gain
        return self.head(x if scale is None else x * scale)


def test_shared_and_fused_weights_gains_and_constants() -> None:
    model = Shared()
    found = modula.read(model)
    # after the tables: 1/2 of the skip and 3/2 of the branch, then the head, which is one of them
    assert found.after() == pytest.approx(
        {
            "token.weight": 2.0 + 1.0,
            "place": 2.0,
            **{f"qkv.weight.{x}": 0.5 for x in "qkv"},
            "out.weight": 0.5,
        }
    )
    with torch.no_grad():
        model.gain.fill_(100.0)
    assert modula.read(model).after() == found.after()  # a resumed run has the rates of its start
    wrapped = nn.Sequential()
    wrapped.add_module("module", model)
    assert modula.read(wrapped).targets() == found.targets()
    lines = {line.parameter: line.lr for line in gd.explain(gd.Modula(model, lr=1.0)).lines if line.recipe == "modula"}
    assert lines == pytest.approx(found.targets())


class Twice(nn.Module):
    """One weight on several ways, and what stands twice in a sum."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(3, 3), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        y = self.a(x) + self.a(torch.tanh(x))
        y = y + y
        return self.b(torch.cat([y, -y], -1).mT.mT)


def test_every_way_counts() -> None:
    found = modula.read(Twice())
    assert found.after() == pytest.approx({"a.weight": 8.0, "b.weight": 1.0})
    assert found.sensitivity == pytest.approx(8.0)


def test_a_layer_of_torch_is_a_tree() -> None:
    for first in (True, False):
        layer = nn.TransformerEncoderLayer(8, 2, 16, norm_first=first, activation="gelu")
        attention = Sequence(Tuple(*(f"self_attn.in_proj_weight.{x}" for x in "qkv")), "self_attn.out_proj.weight")
        tree = Sequence(Residual(attention), Residual("linear1.weight", Bond(1.1289), "linear2.weight"))
        found = modula.read(layer)
        assert found.targets() == pytest.approx(tree.targets())
        assert found.sensitivity == pytest.approx(4 * (1 + 1.1289))
        pair = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        assert modula.read(pair).sensitivity == pytest.approx(found.sensitivity**2)


# -- the optimizer ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", [{}, {"foreach": False}, {"compile": True}], ids=["lists", "plain", "compiled"])
@pytest.mark.parametrize("direction", ["momentum", "adam"])
def test_modula_takes_the_references_steps(direction: str, path: dict[str, bool]) -> None:
    shapes = {"hidden": (7, 4), "kernel": (5, 3, 2, 2), "table": (9, 4), "last": (3, 8)}
    roles = {"hidden": "matrix", "kernel": "conv", "table": "embedding", "last": "head"}
    lmos = {"hidden": balls.spectral, "kernel": balls.conv_each, "table": balls.table, "last": balls.spectral}
    starts = {name: torch.randn(shape, dtype=F64) for name, shape in shapes.items()}
    model = Bag(starts)
    tree = Sequence(Sum("table", "kernel"), Bond(0.5), Atom("hidden", mass=2.0), "last")
    rules = [gd.rule(name, role=role) for name, role in roles.items()]
    more: dict[str, Any] = {"direction": direction, "momentum": 0.8, "betas": (0.8, 0.95), **EXACT, **path}
    opt = gd.Modula(model, lr=0.1, rules=rules, parametrization=tree, weight_decay=0.3, **more)
    if path.get("compile"):
        opt._engine.compiled.backend = "eager"
    grads = {name: stream(shape, i) for i, (name, shape) in enumerate(shapes.items())}
    found = dict(zip(shapes, train(opt, list(model.parameters()), list(grads.values()), 36)))
    targets = {"table": 0.2 / 0.5, "kernel": 0.2 / 0.5, "hidden": 0.4, "last": 0.2}
    assert tree.targets() == pytest.approx(targets)
    for name, start in starts.items():
        adam, memory, p, want = family.adam((0.8, 0.95)), {}, start, []
        for t in range(1, 37):
            g = grads[name](t, p)
            d = adam(t, g, p, memory) if direction == "adam" else family.ema(memory, "m", 0.8, g)
            p = p * (1 - 0.1 * 0.3) - 0.1 * targets[name] * lmos[name](d)
            want.append(p)
        assert far(found[name], want) < 1e-10, name
    if direction == "momentum":
        plain = balls.modula(starts["last"], grads["last"], 36, 0.1, lmo=balls.spectral, target=0.2, momentum=0.8)
        bare = gd.Modula(Bag(starts), lr=0.1, rules=rules, parametrization=tree, **more)
        params = [p for group in bare.param_groups for p in group["params"]]
        assert far(train(bare, params, list(grads.values()), 36)[-1], plain) < 1e-10


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 10_000), depth=st.integers(1, 4), width=st.integers(2, 12))
def test_a_step_changes_the_output_by_no_more_than_the_rate(seed: int, depth: int, width: int) -> None:
    """What targets are for: to first order, in root mean square, for inputs and weights of norm at most 1."""
    torch.manual_seed(seed)
    body = [layer for _ in range(depth) for layer in (nn.Linear(width, width, bias=False), nn.Tanh())]
    net = nn.Sequential(nn.Linear(3, width, bias=False), nn.Tanh(), *body, nn.Linear(width, 2, bias=False)).double()
    opt = gd.Modula(net, lr=1e-5, momentum=0.0, **EXACT)
    gd.initialize(opt)
    for layer in net:
        if isinstance(layer, nn.Linear):
            assert balls.BALLS["spectral"][1](layer.weight.detach()) == pytest.approx(1.0)
    x = torch.randn(20, 3, dtype=F64)
    x /= x.square().mean(1, keepdim=True).sqrt()
    before = net(x)
    before.square().sum().backward()
    opt.step()
    change = (net(x) - before).detach().square().mean(1).sqrt()
    assert 0 < float(change.max()) <= 1e-5 * (1 + 1e-3)


def test_names_and_objects_for_any_recipe() -> None:
    model = mlp()
    tree = modula.read(model)

    class Halves:
        """Half of every rate."""

        def apply(self, blocks: Any, needed: Any) -> Any:
            assert list(needed) == []
            from dataclasses import replace

            return {name: tuple(replace(b, lr_scale=0.5) for b in own) for name, own in blocks.items()}

    muon = gd.Muon(model, lr=0.1, scale="spectral", parametrization=tree)
    assert {line.parameter: line.lr for line in gd.explain(muon).lines if line.recipe == "muon"} == pytest.approx(
        {name: 0.1 * t for name, t in tree.targets().items() if name != "4.weight"}
    )
    halves = gd.build(model, gd.recipes.SGD(lr=0.1), parametrization=Halves())
    assert {line.lr for line in gd.explain(halves).lines} == {0.05}
    flat = gd.Modula(model, lr=0.3, parametrization="flat")
    assert [line.lr for line in gd.explain(flat).lines if line.recipe == "modula"] == pytest.approx([0.1] * 3)
    with pytest.raises(ValueError, match="parametrization='mup' must be one of 'modula', 'flat', or an object"):
        gd.Modula(model, parametrization="mup")
    with pytest.warns(UserWarning, match="without their model"):
        listed = gd.Modula([p for p in model.parameters() if p.ndim == 2], lr=0.3)
    assert [line.lr for line in gd.explain(listed).lines] == pytest.approx([0.1] * 3)


def test_initial_weights_have_norm_one() -> None:
    model = Gpt(2)
    gd.initialize(gd.Modula(model))
    for piece in model.attention[0].in_proj_weight.detach().chunk(3):
        torch.testing.assert_close(torch.linalg.svdvals(piece), torch.ones(8))
    torch.testing.assert_close(torch.linalg.svdvals(model.up[0].weight.detach()), torch.full((8,), 2.0))
    torch.testing.assert_close(model.token.weight.detach().square().mean(1), torch.ones(11))
