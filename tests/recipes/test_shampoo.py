"""Shampoo, its eigenvalue-corrected form and ASGO against plain float64 references and closed forms."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import guided_descent as gd
from guided_descent.parts.geometry.shampoo import GramRoot, KroneckerRoots
from guided_descent.parts.graft import GRAFTS, Graft, match_norms
from guided_descent.recipes import ASGO, ECShampoo, Shampoo
from guided_descent.routing import Block, Piece, Role
from guided_descent.routing.blocking import subdivide
from oracles.muon import svd_polar
from oracles.shampoo import asgo, ec_shampoo, shampoo
from oracles.soap import soap
from oracles.training import Bag, far, stream, train

STEPS = 25


def run(
    recipe: type, start: Tensor, grad: Any, steps: int = STEPS, role: str = "matrix", **options: Any
) -> tuple[list[Tensor], dict[str, Tensor], Any]:
    """Train one tensor: its path, its state after the first call, and the optimizer."""
    model = Bag({"w": start})
    opt = gd.build(model, recipe(**{"refresh_schedule": "every"} | options), rules=[gd.rule("w", role=role)])
    params = list(model.parameters())
    path = train(opt, params, [grad], 1)[0]
    first = {key: value.clone() for key, value in opt.state[params[0]].items()}
    return path + train(opt, params, [grad], steps - 1, start=2)[0], first, opt


def oracle(options: dict[str, Any]) -> dict[str, Any]:
    """The same options, under the reference's names."""
    return {"frequency" if key == "precondition_frequency" else key: value for key, value in options.items()}


# -- roots and grafts ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("exponent", ["quarter", "half"])
@pytest.mark.parametrize("graft", ["none", *GRAFTS])
@pytest.mark.parametrize("shape", [(5, 5), (7, 4), (3, 6)])
def test_every_graft_and_exponent(shape: tuple[int, int], graft: str, exponent: str) -> None:
    start, grad = torch.randn(shape, dtype=torch.float64), stream(shape, 1)
    options: dict[str, Any] = {
        "lr": 0.02,
        "betas": (0.8, 0.9),
        "graft": graft,
        "exponent": exponent,
        "weight_decay": 0.1,
        "precondition_frequency": 4,
        "start_preconditioning_step": 6,
    }
    path, _, opt = run(Shampoo, start, grad, **options)
    assert far(path, shampoo(start, grad, STEPS, **oracle(options))) < 1e-8
    assert far(path[-1:], [start]) > 0.05
    assert opt.audit() == {"w": {"refreshes": 2 * 6}}
    if graft != "none":  # the reference tells the start
        other = oracle(options | {"start_preconditioning_step": 1})
        assert far(path, shampoo(start, grad, STEPS, **other)) > 1e-4


@pytest.mark.parametrize(
    "more",
    [
        {"statistics": "sum"},
        {"statistics": "sum", "graft": "none"},
        {"shampoo_beta": 0.5, "graft": "none"},
        {"decay": "l2"},
        {"decay": "direction"},
        {"momentum": 0.7},
        {"momentum": 0.7, "dampening": 0.3, "decay": "direction"},
        {"momentum": 0.7, "nesterov": True},
        {"graft_eps": 0.3},
        {"eps": 0.1, "graft": "none"},
        {"precondition_frequency": 1},
    ],
    ids=str,
)
def test_every_option(more: dict[str, Any]) -> None:
    start, grad = torch.randn(6, 4, dtype=torch.float64), stream((6, 4), 2)
    options: dict[str, Any] = {"lr": 0.02, "weight_decay": 0.2, "start_preconditioning_step": 1} | more
    path, _, _ = run(Shampoo, start, grad, **options)
    assert far(path, shampoo(start, grad, STEPS, **oracle(options))) < 1e-8


@pytest.mark.parametrize("method", ["newton", "cans"])
def test_roots_by_products_alone(method: str) -> None:
    start, grad = torch.randn(5, 5, dtype=torch.float64), stream((5, 5), 3)
    options: dict[str, Any] = {"lr": 0.02, "weight_decay": 0.1, "eps": 1e-4, "graft": "none"}
    path, _, opt = run(Shampoo, start, grad, root_method=method, **options)
    assert far(path, shampoo(start, grad, STEPS, **oracle(options))) < 1e-5  # their lambda is an estimate
    assert "fallbacks" not in opt.audit()["w"]


@pytest.mark.parametrize(("shape", "sides"), [((12, 4), (False, True)), ((4, 12), (True, False))])
def test_a_table_has_one_side_and_the_exponent_of_one(shape: tuple[int, int], sides: tuple[bool, bool]) -> None:
    start, grad = torch.randn(shape, dtype=torch.float64), stream(shape, 4)
    options: dict[str, Any] = {"lr": 0.02, "start_preconditioning_step": 1, "graft": "none"}
    path, first, opt = run(Shampoo, start, grad, role="embedding", max_precond_dim=10, block_size=10, **options)
    assert ("left" in first, "right" in first) == sides
    assert far(path, shampoo(start, grad, STEPS, sides=sides, weight_decay=0.01, **oracle(options))) < 1e-8
    assert [group["recipe"] for group in opt.param_groups] == ["shampoo"]


def test_a_table_without_a_short_side_goes_to_the_auxiliary_recipe() -> None:
    model = Bag({"w": torch.randn(12, 11), "v": torch.randn(3, 3), "b": torch.randn(3)})
    rules = [gd.rule("w", role="embedding"), gd.rule("v", role="matrix")]
    opt = gd.build(model, Shampoo(max_precond_dim=10, block_size=10), rules=rules)
    assert {g["param_names"][0]: g["recipe"] for g in opt.param_groups} == {"w": "adamw", "v": "shampoo"}
    opt = gd.build(model, Shampoo(max_precond_dim=10, block_size=10), rules=[gd.rule("[wv]", role="matrix")])
    assert [group["recipe"] for group in opt.param_groups] == [
        "shampoo",
        "adamw",
    ]  # it is cut
    assert [block.shape for block in opt._engine.binder.blocks["w"]] == [(6, 6), (6, 5)] * 2


@pytest.mark.parametrize("shape", [(6, 6), (9, 4), (4, 9)])
def test_without_memory_the_first_step_is_the_polar_factor(shape: tuple[int, int]) -> None:
    g = torch.randn(shape, dtype=torch.float64)
    start = torch.zeros(shape, dtype=torch.float64)
    numbers: dict[str, Any] = {"lr": 1.0, "betas": (0.0, 0.0), "weight_decay": 0.0, "steps": 1}
    for scale in (1e-6, 1.0, 1e6):
        path, _, _ = run(Shampoo, start, lambda t, p, c=scale: c * g, eps=1e-12, graft="none", **numbers)
        assert far(path, [-svd_polar(g)]) < 1e-8
        path, _, _ = run(ASGO, start, lambda t, p, c=scale: c * g, eps=1e-12, **numbers)
        assert far(path, [-svd_polar(g)]) < 1e-8


def test_shampoo_squared_has_the_scale_of_the_full_matrix() -> None:
    # For g of covariance A (x) B the trace-normalised factors give (A (x) B)^(-1/2) itself, not a multiple of it.
    made = torch.Generator().manual_seed(5)
    a, b = (torch.randn(d, d, generator=made, dtype=torch.float64) for d in (4, 3))
    a, b = a @ a.T + torch.eye(4), b @ b.T + torch.eye(3)
    left, right = a * b.trace(), b * a.trace()  # E[G G^T] and E[G^T G]
    part = KroneckerRoots(root=2, trace=True)
    h = {"eps": 0.0}
    eye = [torch.eye(d, dtype=torch.float64)[None] for d in (4, 3)]
    x, y = (part.solve((f[None], last), h)["root"][0] for f, last in zip((left, right), eye))
    values, q = torch.linalg.eigh(torch.kron(a, b))
    torch.testing.assert_close(torch.kron(x, y), (q / values.sqrt()) @ q.T, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("graft", GRAFTS)
def test_the_norm_is_the_grafts(graft: str) -> None:
    # the step of a block is as long as the graft's, though it points elsewhere
    start, g = torch.zeros(5, 7, dtype=torch.float64), stream((5, 7), 6, pull=0.0)
    options: dict[str, Any] = {"lr": 1.0, "weight_decay": 0.0, "precondition_frequency": 3, "graft": graft}
    now, _, _ = run(Shampoo, start, g, start_preconditioning_step=1, **options)
    alone, _, _ = run(Shampoo, start, g, start_preconditioning_step=1000, **options)
    steps = [[b - a for a, b in zip([start, *path], path)] for path in (now, alone)]
    for one, other in zip(*steps):
        assert abs(float(one.norm() / other.norm()) - 1) < 1e-10
        assert float((one * other).sum() / one.norm() / other.norm()) < 0.999


def test_norms_are_matched_matrix_by_matrix_and_never_divided_by_zero() -> None:
    u, like = torch.randn(3, 2, 4, 5), torch.randn(3, 2, 4, 5)
    u[0, 0], like[1, 1], like[2, 0] = 0, 0, torch.inf
    got = match_norms(u.clone(), like)
    assert got.isfinite().all()
    assert not got[0, 0].any()
    assert not got[1, 1].any()
    assert not got[2, 0].any()
    torch.testing.assert_close(torch.linalg.matrix_norm(got[2, 1]), torch.linalg.matrix_norm(like[2, 1]))
    with pytest.raises(ValueError, match="'lion' must be one of"):
        Graft("lion")


def test_a_linear_scale_of_the_gradient_does_not_matter() -> None:
    start, grad = torch.zeros(5, 4, dtype=torch.float64), stream((5, 4), 7, pull=0.0)
    for recipe, options in (
        (Shampoo, {"graft_eps": 0.0, "start_preconditioning_step": 4}),
        (Shampoo, {"graft": "none"}),
        (Shampoo, {"graft": "none", "exponent": "half", "statistics": "sum"}),
        (ASGO, {}),
        (ECShampoo, {"eps": 0.0}),
    ):
        more: dict[str, Any] = {"precondition_frequency": 3, "weight_decay": 0.0, **options}
        plain, _, _ = run(recipe, start, grad, **more)
        large, _, _ = run(recipe, start, lambda t, p: 2.0**20 * grad(t, p), **more)
        assert far(plain, large) < 1e-9
        assert float(plain[-1].abs().max()) > 1e-3


@pytest.mark.parametrize("options", [{"graft": "none"}, {"graft": "sgd"}, {"graft": "none", "exponent": "half"}])
def test_shampoo_follows_rotations(options: dict[str, Any]) -> None:
    start = torch.randn(5, 4, dtype=torch.float64)
    grads = [torch.randn(5, 4, dtype=torch.float64) for _ in range(12)]
    u, v = (torch.linalg.qr(torch.randn(d, d, dtype=torch.float64)).Q for d in (5, 4))
    more: dict[str, Any] = {"start_preconditioning_step": 1, "precondition_frequency": 3, "lr": 0.1, **options}
    plain, _, _ = run(Shampoo, start, lambda t, p: grads[t - 1], steps=12, **more)
    turned, _, _ = run(Shampoo, u @ start @ v.T, lambda t, p: u @ grads[t - 1] @ v.T, steps=12, **more)
    assert far(turned, [u @ p @ v.T for p in plain]) < 1e-8


def test_a_transposed_matrix_takes_the_transposed_steps() -> None:
    start, grads = torch.randn(6, 3, dtype=torch.float64), torch.randn(12, 6, 3, dtype=torch.float64)
    for recipe, options in ((Shampoo, {"start_preconditioning_step": 3}), (ASGO, {})):
        more: dict[str, Any] = {"precondition_frequency": 4, "lr": 0.1, **options}
        plain, _, _ = run(recipe, start, lambda t, p: grads[t - 1], steps=12, **more)
        turned, _, _ = run(recipe, start.T.contiguous(), lambda t, p: grads[t - 1].T.contiguous(), steps=12, **more)
        assert far(turned, [p.T for p in plain]) < 1e-10


# -- blocks ---------------------------------------------------------------------------------------------------------


def test_blocks_are_separate_parameters() -> None:
    start = torch.randn(7, 9, dtype=torch.float64)
    grads = torch.randn(15, 7, 9, dtype=torch.float64)
    more: dict[str, Any] = {"precondition_frequency": 4, "start_preconditioning_step": 3, "lr": 0.1}
    path, first, opt = run(Shampoo, start, lambda t, p: grads[t - 1], steps=15, block_size=4, **more)
    rows, columns = [slice(0, 4), slice(4, 7)], [slice(0, 3), slice(3, 6), slice(6, 9)]
    for i, r in enumerate(rows):
        for j, c in enumerate(columns):
            alone, _, _ = run(Shampoo, start[r, c], lambda t, p, r=r, c=c: grads[t - 1, r, c].clone(), 15, **more)
            assert far([p[r, c] for p in path], alone) < 1e-12
            assert first[f"r{i}c{j}.left"].shape == (r.stop - r.start,) * 2
    assert opt.audit() == {"w": {"refreshes": 3 * 12}}


def test_blocks_of_one_matrix_are_refreshed_on_different_steps() -> None:
    model = Bag({"w": torch.randn(16, 16)})
    opt = gd.build(model, Shampoo(block_size=8, precondition_frequency=4), rules=[gd.rule("w", role="matrix")])
    counts = [0]
    for t in range(1, 6):
        train(opt, list(model.parameters()), [stream((16, 16), 8)], 1, start=t)
        counts.append(opt.audit().get("w", {}).get("refreshes", 0))
    assert counts == [0, 0, 2, 4, 6, 8]  # 8 tasks in a period of 4 steps


class Convolutions(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(10, 6, 3, bias=False)
        self.turned = nn.ConvTranspose2d(6, 8, 2, bias=False)
        self.grouped = nn.Conv2d(8, 12, 2, groups=2, bias=False)
        self.attention = nn.MultiheadAttention(8, 2, bias=False)


def test_blocks_of_every_layout_cover_each_element_once() -> None:
    net = Convolutions().double()
    whole = gd.build(net, Shampoo(block_size=1000))
    opt = gd.build(net, Shampoo(block_size=20))
    blocks = opt._engine.binder.blocks
    assert {name: len(parts) for name, parts in blocks.items()} == {
        "conv.weight": 5,
        "turned.weight": 2,
        "grouped.weight": 1,
        "attention.in_proj_weight": 3,
        "attention.out_proj.weight": 1,
    }
    for name, p in net.named_parameters():
        seen = torch.zeros_like(p)
        for part in blocks[name]:
            [piece] = part.pieces
            view = piece.of(seen)
            assert tuple(view.shape) == piece.shape
            view += 1
            assert max(part.shape[-2:]) <= 20
            mapped = piece.within(torch.arange(part.numel).view(part.shape))
            assert tuple(mapped.shape) == piece.shape
        assert torch.equal(seen, torch.ones_like(p))
    assert gd.explain(opt).state_bytes == opt.state_bytes() < whole.state_bytes()
    for _ in range(3):
        for p in net.parameters():
            p.grad = torch.randn_like(p)
        opt.step()
    assert all(p.isfinite().all() for p in net.parameters())


def test_a_cut_follows_the_axes_of_a_piece() -> None:
    stacked = Block("e", (Piece("e", (3, 4, 6), perm=(0, 2, 1)),), (3, 6, 4), Role.EXPERT)
    parts = subdivide(stacked, 4)
    assert [part.shape for part in parts] == [(3, 3, 4), (3, 3, 4)]
    assert [part.pieces[0].index for part in parts] == [
        (slice(None), slice(None), slice(0, 3)),
        (slice(None), slice(None), slice(3, 6)),
    ]
    fused = Block("q", (Piece("w", (4, 5), index=(slice(4, 8),)),), (4, 5), Role.FUSED)
    assert [part.pieces[0].index[0] for part in subdivide(fused, 2)][::3] == [slice(4, 6), slice(6, 8)]
    grouped = Block("g", (Piece("g", (6, 9)),), (2, 3, 9), Role.CONV)  # rows of two matrices share an axis
    assert [part.shape for part in subdivide(grouped, 2)] == [(2, 3, 2)] * 4 + [(2, 3, 1)]
    one = Block("o", (Piece("o", (2, 3, 3)),), (2, 9), Role.CONV)
    assert [part.shape for part in subdivide(one, 2)] == [(2, 3)] * 3  # kernels of one axis are not divided
    assert subdivide(one, 9) == (one,)
    with pytest.raises(ValueError, match="limit=0"):
        subdivide(one, 0)


def test_stacked_experts_are_matrices_of_their_own() -> None:
    start, grads = torch.randn(3, 5, 4, dtype=torch.float64), torch.randn(12, 3, 5, 4, dtype=torch.float64)
    more: dict[str, Any] = {"precondition_frequency": 4, "lr": 0.1}
    for recipe, options in ((Shampoo, {"start_preconditioning_step": 3}), (ASGO, {})):
        path, _, _ = run(recipe, start, lambda t, p: grads[t - 1], steps=12, role="expert", **more, **options)
        for e in range(3):
            alone, _, _ = run(recipe, start[e], lambda t, p, e=e: grads[t - 1, e], steps=12, **more, **options)
            assert far([p[e] for p in path], alone) < 1e-10


# -- one side, and corrected eigenvalues ----------------------------------------------------------------------------


@pytest.mark.parametrize("statistics", ["ema", "sum"])
@pytest.mark.parametrize("shape", [(5, 5), (7, 4), (3, 6)])
def test_asgo_takes_the_references_steps(shape: tuple[int, int], statistics: str) -> None:
    start, grad = torch.randn(shape, dtype=torch.float64), stream(shape, 9)
    options: dict[str, Any] = {"lr": 0.02, "weight_decay": 0.1, "precondition_frequency": 4, "statistics": statistics}
    path, first, _ = run(ASGO, start, grad, **options)
    assert far(path, asgo(start, grad, STEPS, **oracle(options))) < 1e-8
    assert {"left", "right"} & set(first) == {"right" if shape[0] > shape[1] else "left"}


@pytest.mark.parametrize("second_moment", ["keep", "permute", "rank"])
@pytest.mark.parametrize("shape", [(5, 5), (7, 4), (3, 6)])
def test_corrected_eigenvalues(shape: tuple[int, int], second_moment: str) -> None:
    start, grad = torch.randn(shape, dtype=torch.float64), stream(shape, 10)
    options: dict[str, Any] = {"lr": 0.02, "weight_decay": 0.1, "second_moment": second_moment, "shampoo_beta": 0.8}
    options |= {"betas": (0.9, 0.95), "precondition_frequency": 4}
    path, first, opt = run(ECShampoo, start, grad, **options)
    bases = (first["left_basis"], first["right_basis"])
    assert far(path, ec_shampoo(start, grad, STEPS, bases=bases, **oracle(options))) < 1e-8
    assert opt.audit() == {"w": {"refreshes": 12}}


def test_corrected_eigenvalues_are_soap_up_to_where_the_momentum_lives() -> None:
    # SOAP rotates its momentum along, and an average of gradients does not notice; only the place of eps differs
    start, grad = torch.randn(5, 5, dtype=torch.float64), stream((5, 5), 11)
    options: dict[str, Any] = {"lr": 0.02, "betas": (0.9, 0.95), "eps": 0.0, "second_moment": "permute"}
    path, _, _ = run(ECShampoo, start, grad, **options)
    assert far(path, soap(start, grad, STEPS, 0.02, betas=(0.9, 0.95), eps=0.0, weight_decay=0.01)) < 1e-8


@pytest.mark.parametrize(("recipe", "method"), [(ECShampoo, "refresh_method"), (gd.recipes.SOAP, "refresh_method")])
@pytest.mark.parametrize("shape", [(6, 6), (8, 3), (3, 8)])
def test_the_shorter_side_alone(recipe: type, method: str, shape: tuple[int, int]) -> None:
    start, grad = torch.randn(shape, dtype=torch.float64), stream(shape, 12)
    path, first, _ = run(recipe, start, grad, one_sided=True, lr=0.01, betas=(0.9, 0.95), weight_decay=0.1)
    sides = (shape[0] <= shape[1], shape[0] > shape[1])
    assert ("left" in first, "right" in first) == sides
    bases = (first.get("left_basis"), first.get("right_basis"))
    numbers: dict[str, Any] = {"lr": 0.01, "betas": (0.9, 0.95), "weight_decay": 0.1, "sides": sides, "bases": bases}
    reference = (soap if recipe is gd.recipes.SOAP else ec_shampoo)(start, grad, STEPS, **numbers)
    assert far(path, reference) < 1e-8


# -- drift ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "part", [KroneckerRoots(), KroneckerRoots(root=2), KroneckerRoots(root=2, trace=True), GramRoot()], ids=str
)
def test_drift_is_zero_for_the_right_root_and_measures_a_wrong_one(part: KroneckerRoots) -> None:
    h = {"eps": 1e-3}
    a = torch.randn(4, 3, 6, 8, dtype=torch.float64)
    a = a @ a.mT
    root = part.solve((a, torch.zeros_like(a)), h)["root"]
    assert float(part.drift((a, root), h).max()) < 1e-2 * h["eps"]  # the largest eigenvalue is an estimate
    grown = part.drift((a * 1.5, root), h)
    torch.testing.assert_close(grown, torch.full_like(grown, 0.5 if not part.trace else 1.5**0.5 - 1), rtol=0.1, atol=0)
    assert not part.drift((torch.zeros_like(a), root), h).any()
    assert part.drift((a * torch.nan, root), h).isnan().all()


@pytest.mark.parametrize("recipe", [Shampoo, ASGO, ECShampoo])
def test_a_tolerance_skips_what_has_not_moved(recipe: type) -> None:
    start = torch.randn(4, 4, dtype=torch.float64)
    g = torch.randn(4, 4, dtype=torch.float64)
    more: dict[str, Any] = {"precondition_frequency": 2, "refresh_tolerance": 0.05}
    _, _, opt = run(recipe, start, lambda t, p: g.clone(), steps=21, **more)
    steady = opt.audit()["w"]
    _, _, opt = run(recipe, start, stream((4, 4), 13), steps=21, betas=(0.9, 0.5), **more)
    moving = opt.audit()["w"]
    assert "refreshes" not in steady
    assert steady["skipped_refreshes"] == (10 if recipe is ASGO else 20)
    assert moving["refreshes"] > 5


# -- trouble --------------------------------------------------------------------------------------------------------


def rank_one(shape: tuple[int, int]) -> Tensor:
    return torch.outer(torch.randn(shape[0]), torch.randn(shape[1]))


def graded(shape: tuple[int, int]) -> Tensor:
    """Condition 1e12."""
    m, n = shape
    values = torch.logspace(0, -12, min(m, n), dtype=torch.float64)
    u, v = (torch.linalg.qr(torch.randn(d, min(m, n)).double()).Q for d in (m, n))
    return ((u * values) @ v.T).float()


TROUBLE: dict[str, Any] = {
    "zero": lambda t, p: torch.zeros_like(p),
    "zero at first": lambda t, p: torch.zeros_like(p) if t < 5 else torch.randn_like(p),
    "rank one": lambda t, p: rank_one(tuple(p.shape)),
    "the same rank one": lambda t, p: torch.ones_like(p),
    "condition": lambda t, p: graded(tuple(p.shape)),
    "tiny": lambda t, p: 1e-25 * torch.randn_like(p),
    "huge": lambda t, p: 1e20 * torch.randn_like(p),
    "one huge": lambda t, p: (1e20 if t == 4 else 1.0) * torch.randn_like(p),
}
RECIPES: dict[str, Any] = {
    "shampoo": Shampoo(precondition_frequency=3, start_preconditioning_step=2),
    "half": Shampoo(precondition_frequency=3, start_preconditioning_step=2, exponent="half", statistics="sum"),
    "newton": Shampoo(precondition_frequency=3, start_preconditioning_step=2, root_method="newton"),
    "cans": Shampoo(precondition_frequency=3, graft="none", root_method="cans"),
    "ec": ECShampoo(precondition_frequency=3),
    "asgo": ASGO(precondition_frequency=3),
}


@pytest.mark.parametrize("name", RECIPES)
@pytest.mark.parametrize("case", TROUBLE)
def test_trouble_stays_finite(case: str, name: str) -> None:
    shapes = {"a": (8, 8), "b": (20, 5), "c": (1, 7)}
    model = Bag({key: torch.randn(shape) for key, shape in shapes.items()})
    matrix = [gd.rule("a", role="matrix"), gd.rule("b", role="matrix"), gd.rule("c", role="embedding")]
    opt = gd.build(model, RECIPES[name].replace(lr=0.01), rules=matrix)
    params = list(model.parameters())
    starts = [p.detach().clone() for p in params]
    train(opt, params, [TROUBLE[case]] * 3, 20)
    for p, start in zip(params, starts):
        assert p.isfinite().all()
        bounded = name in ("shampoo", "half", "newton", "ec")
        assert not bounded or float((p.detach() - start).abs().max()) < 0.01 * 20 * 30
        for key, value in opt.state[p].items():
            assert value.isfinite().all() or "huge" in case, key
    if case == "zero":
        assert all("fallbacks" not in counts for counts in opt.audit().values())
    if case == "one huge":  # what overflowed has been put right, and training goes on
        assert all(value.isfinite().all() for p in params for value in opt.state[p].values())
        assert all(counts["repairs"] for counts in opt.audit().values())
        before = [p.detach().clone() for p in params]
        train(opt, params, [TROUBLE[case]] * 3, 10, start=21)
        if name in ("asgo", "cans"):
            assert all(float((p.detach() - old).abs().max()) > 1e-4 for p, old in zip(params, before))


def test_a_solver_that_always_fails_leaves_the_grafts_direction(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(a: Tensor, *args: Any, **kwargs: Any) -> Any:
        raise torch.linalg.LinAlgError("the algorithm failed to converge")

    monkeypatch.setattr(torch.linalg, "eigh", broken)
    start, grad = torch.randn(5, 5, dtype=torch.float64), stream((5, 5), 14)
    options: dict[str, Any] = {"graft": "sgd", "lr": 0.1, "precondition_frequency": 5}
    path, _, opt = run(Shampoo, start, grad, start_preconditioning_step=1, **options)
    monkeypatch.undo()
    sgd, _, _ = run(Shampoo, start, grad, start_preconditioning_step=1000, **options)
    assert far(path, sgd) < 1e-10
    assert opt.audit() == {"w": {"refreshes": 8, "fallbacks": 10}}


def test_options_that_contradict_each_other() -> None:
    with pytest.raises(ValueError, match="nesterov=True"):
        Shampoo(nesterov=True)
    with pytest.raises(ValueError, match="block_size=0"):
        Shampoo(block_size=0)
    with pytest.raises(ValueError, match="at most max_precond_dim=2048"):
        Shampoo(block_size=4096)


def test_float32_stays_close() -> None:
    start, grad = torch.randn(8, 6), stream((8, 6), 15)
    options: dict[str, Any] = {"lr": 0.01, "precondition_frequency": 4, "start_preconditioning_step": 3, "eps": 1e-4}
    path, _, _ = run(Shampoo, start, grad, **options)
    assert far(path, shampoo(start, grad, STEPS, weight_decay=0.01, **oracle(options))) < 1e-4
