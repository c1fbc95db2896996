"""PSGD against plain float64 references, its fixed points, its draws, and gradients of every size and rank."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import guided_descent as gd
import guided_descent.recipes.psgd
from guided_descent.parts.geometry import psgd, psgd_kron, psgd_lowrank
from oracles.psgd import Numbers, diagonal, kron, low_rank
from oracles.training import Bag, far, stream, train

STEPS = 40
OFTEN: dict[str, Any] = {"fade": 0.1, "balance": 0.3}  # so that a short run sees every branch of the draws
RARE: dict[str, Any] = {"update_always": 8, "update_probability": 0.4}
BOTH: dict[str, Any] = {"max_skew": 100.0}


@pytest.fixture
def often(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(psgd, "FADE", OFTEN["fade"])
    for module in (psgd_kron, psgd_lowrank):
        monkeypatch.setattr(module, "BALANCE", OFTEN["balance"])


def run(key: str, start: Tensor, grad: Any, steps: int = STEPS, role: str = "matrix", **options: Any) -> Any:
    """Train one tensor named w: its path and its state."""
    model = Bag({"w": start})
    opt = gd.optimizer(key, model, rules=[gd.rule("w", role=role)], **options)
    path = train(opt, list(model.parameters()), [grad], steps)[0]
    return path, opt.state[model.w], opt


def numbers(**options: Any) -> Numbers:
    names = {item.name for item in dataclasses.fields(Numbers)}
    return Numbers(**OFTEN, **{name: value for name, value in options.items() if name in names})


# -- step by step ------------------------------------------------------------------------------------------------------

CASES: dict[str, dict[str, Any]] = {
    "defaults": {},
    "momentum": {"whiten": "momentum", "momentum": 0.8, "precond_init": 0.5},
    "no clip": {"clip_rms": None, "precond_lr": 0.5, "weight_decay": 0.0},
    "no momentum": {"momentum": 0.0},
}


@pytest.mark.usefixtures("often")
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("fit", ["pro", "triangular"])
@pytest.mark.parametrize(
    ("shape", "skew", "dense"),
    [
        ((5, 5), 1.0, (True, True)),
        ((6, 4), 100.0, (True, True)),
        ((4, 9), 1.0, (True, False)),
        ((9, 4), 1.0, (False, True)),
        ((3, 4), 0.1, (False, False)),
    ],
)
def test_kron_takes_the_references_steps(
    shape: tuple[int, int], skew: float, dense: tuple[bool, bool], fit: str, case: str
) -> None:
    start, grad = torch.randn(shape, dtype=torch.float64), stream(shape, 3)
    options = {"lr": 0.02} | RARE | CASES[case]
    path, state, opt = run("psgd_kron", start, grad, update=fit, max_skew=skew, **options)
    n = numbers(**options)
    reference, factors = kron(start, grad, STEPS, n, fit=fit, dense=dense)
    assert far(path, reference) < 1e-9
    for side, q, full in zip(("left", "right"), factors, dense):
        torch.testing.assert_close(state[side] if full else torch.diag(state[side]), q, rtol=1e-9, atol=1e-9)
    fits = sum(n.fits(t) for t in range(1, STEPS + 1))
    assert opt.audit() == {"w": {"fits": fits}}
    assert 15 < fits < STEPS
    assert any(n.fits(t) and n.balances(t) for t in range(1, STEPS + 1))


@pytest.mark.usefixtures("often")
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("shape", [(7,), (), (4, 3), (2, 3, 4)])
def test_the_diagonal_form_takes_the_references_steps(shape: tuple[int, ...], case: str) -> None:
    start, grad = torch.randn(shape, dtype=torch.float64), stream(shape, 4)
    options = {"lr": 0.02} | CASES[case]
    path, state, _ = run("psgd_diagonal", start, grad, role="other", **options)
    reference, q = diagonal(start, grad, STEPS, numbers(**options))
    torch.testing.assert_close(state["q"], q, rtol=1e-9, atol=1e-9)
    assert far(path, reference) < 1e-9


@pytest.mark.usefixtures("often")
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize(("shape", "rank"), [((4, 3), 2), ((9,), 10), ((5, 2), 1)])
def test_the_low_rank_form_takes_the_references_steps(shape: tuple[int, ...], rank: int, case: str) -> None:
    start, grad = torch.randn(shape, dtype=torch.float64), stream(shape, 5)
    options = {"lr": 0.02} | RARE | CASES[case] | ({"weight_decay": 0.0} if len(shape) == 1 else {})
    role = "matrix" if len(shape) == 2 else "vector"
    path, state, opt = run("psgd_lra", start, grad, role=role, rank=rank, **options)
    n = numbers(**options)
    reference, factors = low_rank(start, grad, STEPS, n, rank)
    assert far(path, reference) < 1e-9
    for name, value in zip("uvd", factors):
        torch.testing.assert_close(state[name], value.t(), rtol=1e-8, atol=1e-8)
    assert opt.audit() == {"w": {"fits": sum(n.fits(t) for t in range(1, STEPS + 1))}}


@pytest.mark.parametrize("fit", ["pro", "triangular"])
def test_float32_stays_close(fit: str) -> None:
    start, grad = torch.randn(6, 6), stream((6, 6), 4)
    path, _, _ = run("psgd_kron", start, grad, lr=0.01, update=fit)
    reference, _ = kron(start, grad, STEPS, Numbers(lr=0.01), fit=fit, dense=(True, True))
    assert far(path, reference) < 1e-4


def test_what_is_no_matrix_takes_the_diagonal_form() -> None:
    start, grad = torch.randn(6, dtype=torch.float64), stream((6,), 21)
    model = Bag({"w": start, "m": torch.randn(4, 4, dtype=torch.float64), "row": torch.randn(1, 5)})
    opt = gd.optimizer("psgd_kron", model, lr=0.01, weight_decay=0.0, rules=[gd.rule("m", role="matrix")])
    path = train(opt, list(model.parameters()), [grad, stream((4, 4)), stream((1, 5))], 20)[0]
    assert far(path, diagonal(start, grad, 20, Numbers(lr=0.01, weight_decay=0.0))[0]) < 1e-12
    taken = {line.parameter: line.recipe for line in gd.explain(opt).lines}
    assert taken == {"w": "psgd_diagonal", "m": "psgd_kron", "row": "psgd_diagonal"}


# -- fixed points ------------------------------------------------------------------------------------------------------

#: Independent runs in one model, whose mean is taken.
CHAINS = 16


def covariance(d: int, condition: float) -> Tensor:
    turn = torch.linalg.qr(torch.randn(d, d, dtype=torch.float64)).Q
    return turn * torch.logspace(0, torch.tensor(condition).log10().item(), d, dtype=torch.float64) @ turn.T


def root(a: Tensor, power: float) -> Tensor:
    values, vectors = torch.linalg.eigh(a)
    return vectors * values**power @ vectors.T


def settle(key: str, draw: Callable[[], Tensor], role: str, read: Any, early: int = 300, **options: Any) -> Tensor:
    """The mean of ``read(state)`` at the end of runs on independent gradients, at a falling rate of the fit."""
    model = Bag({f"w{i}": torch.zeros_like(draw()) for i in range(CHAINS)})
    rules = [gd.rule("*", role=role)]
    opt = gd.optimizer(key, model, rules=rules, lr=0.0, weight_decay=0.0, **options)
    found = []
    for precond_lr, steps in ((0.1, early), (0.01, 200)):
        for group in opt.param_groups:
            group |= {"precond_lr": precond_lr}
        for t in range(steps):
            for p in model.parameters():
                p.grad = draw()
            opt.step()
            if precond_lr == 0.01 and t % 40 == 39:
                found += [read(opt.state[p]) for p in model.parameters()]
    return torch.stack(found).mean(0)


ALWAYS: dict[str, Any] = {"update_always": 10**6}


@pytest.mark.parametrize("fit", ["pro", "triangular"])
def test_kron_whitens_a_kronecker_covariance(fit: str) -> None:
    left, right = covariance(6, 30.0), covariance(4, 30.0)
    a, b = root(left, 0.5), root(right, 0.5)

    def draw() -> Tensor:
        return a @ torch.randn(6, 4).double() @ b

    def whitened(state: dict[str, Tensor]) -> Tensor:
        p = torch.kron(state["left"].T @ state["left"], state["right"].T @ state["right"])
        return p @ torch.kron(left, right) @ p

    mean = settle("psgd_kron", draw, "matrix", whitened, update=fit, **BOTH, **ALWAYS)
    values = torch.linalg.eigvalsh((mean + mean.T) / 2)
    assert float(values.min()) > 0.8
    assert float(values.max()) < 1.25
    assert float((mean - torch.eye(24)).norm()) < 0.15 * 24**0.5


def test_the_procrustes_step_keeps_the_factors_nearly_symmetric() -> None:
    a, b = root(covariance(6, 30.0), 0.5), root(covariance(4, 30.0), 0.5)
    start = torch.randn(6, 4, dtype=torch.float64)
    _, state, _ = run("psgd_kron", start, lambda t, p: a @ torch.randn(6, 4).double() @ b, 300, **BOTH)
    for side in ("left", "right"):
        q = state[side]
        assert float((q - q.T).norm()) < 0.05 * float(q.norm())
        assert float(torch.linalg.eigvalsh((q + q.T) / 2).min()) > 0
    _, state, _ = run("psgd_kron", start, stream((6, 4)), 50, update="triangular", **BOTH)
    assert torch.equal(state["left"], state["left"].triu())


def test_the_diagonal_form_finds_the_root_mean_square() -> None:
    sizes = torch.logspace(-3, 3, 50, dtype=torch.float64)
    p = settle("psgd_diagonal", lambda: sizes * torch.randn(50), "vector", lambda state: state["q"] ** 2, early=600)
    assert float((p * sizes - 1).abs().max()) < 0.2


def test_the_low_rank_form_finds_a_diagonal_and_two_directions() -> None:
    size = 8
    d = torch.logspace(-0.3, 0.3, size, dtype=torch.float64).diag()
    w = 1.5 * torch.linalg.qr(torch.randn(size, 2, dtype=torch.float64)).Q
    wanted = d @ (torch.eye(size) + w @ w.T) @ d  # Q^T Q with Q in the family; gradients of covariance P^-2
    mix = torch.linalg.inv(wanted)

    def draw() -> Tensor:
        return mix @ torch.randn(size).double()

    def whitened(state: dict[str, Tensor]) -> Tensor:
        q = (torch.eye(size) + state["u"].T @ state["v"]) * state["d"]
        return q.T @ q @ mix @ mix.T @ q.T @ q

    def error(mean: Tensor) -> float:
        return float((mean - torch.eye(size)).norm()) / size**0.5

    assert error(settle("psgd_lra", draw, "vector", whitened, early=900, rank=2, **ALWAYS)) < 0.25
    p = settle("psgd_diagonal", draw, "vector", lambda state: state["q"] ** 2).diag()
    assert error(p @ mix @ mix.T @ p) > 0.5  # which no diagonal does


@pytest.mark.parametrize("key", ["psgd_kron", "psgd_diagonal", "psgd_lra"])
@pytest.mark.parametrize("scale", [1e-3, 1e4])
def test_the_scale_of_the_gradient_does_not_matter(key: str, scale: float) -> None:
    start = torch.randn(6, 4, dtype=torch.float64)
    grads = [torch.randn(6, 4, dtype=torch.float64) for _ in range(30)]
    ends = [run(key, start, lambda t, p, c=c: c * grads[t - 1], 30, lr=0.01)[0] for c in (1.0, scale)]
    assert far(ends[1], ends[0]) < 1e-4
    assert far(ends[0][-1:], [start]) > 0.05


# -- draws -------------------------------------------------------------------------------------------------------------


def test_a_coin_is_even_and_fixed() -> None:
    draws = torch.tensor([psgd.coin(3, t, "fit") for t in range(4000)])
    assert float((draws.mean() - 0.5).abs()) < 0.02
    assert float((draws.std() - 12**-0.5).abs()) < 0.01
    assert psgd.coin(3, 7, "fit") == psgd.coin(3, 7, "fit") != psgd.coin(4, 7, "fit")
    assert [psgd.probability(t, 0.03, 500) for t in (1, 500, 10**5)] == [1.0, 1.0, 0.03]
    assert psgd.probability(1500, 0.03, 500) == pytest.approx(0.36788, abs=1e-5)


@pytest.mark.usefixtures("often")
@pytest.mark.parametrize("key", ["psgd_kron", "psgd_lra"])
def test_a_block_draws_the_same_alone_and_in_a_batch(key: str) -> None:
    options: dict[str, Any] = {"lr": 0.02} | RARE | ({"update": "triangular"} if key == "psgd_kron" else {})
    starts = {name: torch.randn(4, 4, dtype=torch.float64) for name in "abc"}
    grads = [stream((4, 4), seed) for seed in range(3)]
    model, rules = Bag(starts), [gd.rule("*", role="matrix")]
    together = train(gd.optimizer(key, model, rules=rules, **options), list(model.parameters()), grads, 20)
    for i, name in enumerate("abc"):
        alone = Bag({name: starts[name]})
        path = train(gd.optimizer(key, alone, rules=rules, **options), list(alone.parameters()), [grads[i]], 20)[0]
        assert far(path, together[i]) < 1e-10
    other = Bag(starts)
    paths = train(gd.optimizer(key, other, rules=rules, seed=1, **options), list(other.parameters()), grads, 20)
    assert far(paths[0], together[0]) > 1e-6


@pytest.mark.usefixtures("often")
@pytest.mark.parametrize(
    ("key", "more"),
    [
        ("psgd_kron", RARE),
        ("psgd_kron", RARE | {"update": "triangular"}),
        ("psgd_diagonal", {"whiten": "momentum"}),
        ("psgd_lra", RARE),
    ],
)
def test_compiled_equals_eager(key: str, more: dict[str, Any]) -> None:
    torch._dynamo.reset()
    options: dict[str, Any] = {"lr": 0.02, "seed": 5} | more
    ends = []
    for compiled in (False, True):
        torch.manual_seed(0)
        model = Bag({"w": torch.randn(5, 4), "v": torch.randn(4), "s": torch.randn(())}).double()
        opt = gd.optimizer(key, model, rules=[gd.rule("w", role="matrix")], **options)
        if compiled:
            opt.compile(backend="eager")
        grads = [stream(tuple(p.shape), 6) for p in model.parameters()]
        paths = train(opt, list(model.parameters()), grads, 25)
        ends.append((paths, opt.audit()))
    for eager, graph in zip(ends[0][0], ends[1][0]):
        assert far(graph, eager) < 1e-12
    assert ends[0][1] == ends[1][1]


# -- numbers of every size ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("d", [1, 2, 7, 64])
def test_the_spectral_norm_is_close_and_bounded(d: int) -> None:
    a = torch.randn(20, d, 2 * d)
    a = a @ a.mT
    for b in (a, a - a.mT.roll(1, 0) if d > 1 else a, 1e30 * a, 0 * a):
        b = (b + b.mT) / 2
        estimate, exact = psgd_kron.spectral_norm(b), torch.linalg.matrix_norm(b.double(), 2)
        assert (estimate >= 0.8 * exact).all()
        assert (estimate <= 1.1001 * exact).all()
    skew = a.roll(1, 0) @ a - a @ a.roll(1, 0)
    estimate, exact = psgd_kron.spectral_norm(skew), torch.linalg.matrix_norm(skew.double(), 2)
    assert (estimate >= 0.8 * exact - 1e-3).all()
    assert (estimate <= 1.1001 * exact + 1e-3).all()


INPUTS: dict[str, Callable[[Tensor, int], Tensor]] = {
    "zero": lambda p, t: torch.zeros_like(p),
    "zero at first": lambda p, t: torch.zeros_like(p) if t < 5 else torch.randn_like(p),
    "rank one": lambda p, t: torch.outer(torch.ones(len(p)), torch.arange(1.0, p.shape[1] + 1)),
    "one entry": lambda p, t: torch.eye(*p.shape) * (torch.arange(p.shape[1]) == 0),
    "1e-12": lambda p, t: 1e-12 * torch.randn_like(p),
    "1e6": lambda p, t: 1e6 * torch.randn_like(p),
    "1e25": lambda p, t: 1e25 * torch.randn_like(p),
    "jumps": lambda p, t: 10.0 ** (20 * (t % 3) - 20) * torch.randn_like(p),
}
FORMS: dict[str, dict[str, Any]] = {
    "psgd_kron": {},
    "psgd_kron-triangular": {"update": "triangular"},
    "psgd_kron-skew": BOTH,
    "psgd_kron-bfloat16": {"precond_dtype": "bfloat16"},
    "psgd_kron-momentum": {"whiten": "momentum"},
    "psgd_diagonal": {},
    "psgd_lra": {},
}


@pytest.mark.parametrize("name", FORMS)
@pytest.mark.parametrize("case", INPUTS)
def test_degenerate_input(case: str, name: str) -> None:
    shapes = [(8, 8), (12, 5), (1, 9), (5, 1)]
    model = Bag({f"w{i}": torch.randn(shape) for i, shape in enumerate(shapes)})
    rules = [gd.rule("*", role="matrix")]
    opt = gd.optimizer(name.split("-")[0], model, lr=0.01, weight_decay=0.0, rules=rules, **FORMS[name])
    starts = [p.detach().clone() for p in model.parameters()]
    paths = train(opt, list(model.parameters()), [lambda t, p: INPUTS[case](p, t)] * len(shapes), 60)
    for p, path, start in zip(model.parameters(), paths, starts):
        steps = torch.stack([after - before for before, after in zip([start, *path], path)])
        assert steps.isfinite().all()
        assert float(steps.square().mean((-2, -1)).sqrt().max()) < 0.01 * 1.1 + 1e-5
        for value in opt.state[p].values():
            assert value.isfinite().all()
        if case not in ("zero", "1e-12"):  # far below the noise of 1e-9, P stays below 1e9
            assert float((path[-1] - start).abs().max()) > 1e-3


@pytest.mark.parametrize("fit", ["pro", "triangular"])
def test_a_long_side_is_diagonal(fit: str) -> None:
    start, grad = torch.randn(10_000, 8), stream((10_000, 8))
    path, state, _ = run("psgd_kron", start, grad, 3, role="embedding", update=fit)
    assert state["left"].shape == (10_000,)
    assert state["right"].shape == (8, 8)
    assert all(p.isfinite().all() for p in path)


def test_bfloat16_factors_whiten_almost_as_well() -> None:
    start = torch.randn(8, 8)
    grads = [torch.randn(8, 8) for _ in range(60)]
    ends = {}
    for dtype in ("float32", "bfloat16"):
        path, state, _ = run("psgd_kron", start, lambda t, p: grads[t - 1], 60, precond_dtype=dtype, lr=0.01)
        assert state["left"].dtype == getattr(torch, dtype)
        ends[dtype] = path[-1] - start
    assert float((ends["bfloat16"] - ends["float32"]).norm()) < 0.1 * float(ends["float32"].norm())


def test_scratch_does_not_grow(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(psgd, "FADE", 0.1)
    for key in ("psgd_kron", "psgd_lra"):
        model = Bag({"w": torch.randn(6, 4), "v": torch.randn(6, 4)})
        opt = gd.optimizer(key, model, rules=[gd.rule("*", role="matrix")], update_always=5, update_probability=0.5)
        grads = [stream((6, 4))] * 2
        train(opt, list(model.parameters()), grads, 3)
        held = opt.workspace_bytes
        train(opt, list(model.parameters()), grads, 30, start=4)
        assert opt.workspace_bytes == held
        assert 5 < opt.audit()["w"]["fits"] < 33


def test_errors_say_what_to_do() -> None:
    with pytest.raises(ValueError, match=r"precond_dtype='bfloat16'.*update='pro'.*use float32"):
        gd.recipes.psgd.PSGDKron(update="triangular", precond_dtype="bfloat16")
    with pytest.raises(ValueError, match=r"rank=0.*at least 1.*psgd_diagonal"):
        gd.recipes.psgd.PSGDLowRank(rank=0)
