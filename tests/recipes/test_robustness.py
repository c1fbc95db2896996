"""Matrix methods on degenerate input: 20 steps stay finite and bounded, and what was worked around is counted."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import guided_descent as gd
from oracles.elementwise import adamw
from oracles.training import Bag, far, stream, train

SHAPES = [(8, 8), (12, 5), (5, 12)]
METHODS: dict[str, dict[str, Any]] = {
    "muon": {},
    "muon-bf16": {"ns_dtype": "bfloat16"},
    "muon-express": {"coefficients": "polar_express"},
    "muon-jordan": {"coefficients": "jordan"},
    "muon-exact": {"coefficients": "exact"},
    "soap": {"precondition_frequency": 3},
    "soap-eigh": {"precondition_frequency": 3, "refresh_method": "eigh"},
}


def graded(shape: tuple[int, int], low: float) -> Tensor:
    """A matrix whose singular values fall from 1 to ``low``."""
    m, n = shape
    r = min(shape)
    values = torch.logspace(0, torch.tensor(low).log10().item(), r, dtype=torch.float64)
    u, v = torch.linalg.qr(torch.randn(m, r).double()).Q, torch.linalg.qr(torch.randn(n, r).double()).Q
    return (u * values) @ v.T


def rank_one(shape: tuple[int, int]) -> Tensor:
    return torch.outer(torch.randn(shape[0]), torch.randn(shape[1]))


INPUTS: dict[str, Callable[[tuple[int, int]], tuple[Tensor, Callable[[int, Tensor], Tensor]]]] = {
    "zero gradients": lambda shape: (torch.randn(shape), lambda t, p: torch.zeros_like(p)),
    "zero gradients at first": lambda shape: (
        torch.randn(shape),
        lambda t, p: torch.zeros_like(p) if t < 5 else torch.randn_like(p),
    ),
    "zero weights": lambda shape: (torch.zeros(shape), stream(shape)),
    "one rank-one gradient": lambda shape: (torch.randn(shape), fixed(rank_one(shape))),
    "rank-one gradients": lambda shape: (torch.randn(shape), lambda t, p: rank_one(shape)),
    "condition 1e12": lambda shape: (torch.randn(shape), fixed(graded(shape, 1e-12).float())),
    "equal singular values": lambda shape: (torch.randn(shape), fixed(graded(shape, 1.0).float())),
    "one entry": lambda shape: (torch.randn(shape), fixed(torch.eye(*shape) * (torch.arange(shape[1]) == 1))),
    "tiny": lambda shape: (torch.randn(shape), lambda t, p: 1e-25 * torch.randn_like(p)),
    "large": lambda shape: (torch.randn(shape), lambda t, p: 1e15 * torch.randn_like(p)),
}


def fixed(g: Tensor) -> Callable[[int, Tensor], Tensor]:
    return lambda t, p: g.clone()


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("case", INPUTS)
def test_degenerate_input(case: str, name: str) -> None:
    starts, grads = zip(*(INPUTS[case](shape) for shape in SHAPES))
    model = Bag({f"w{i}": start for i, start in enumerate(starts)})
    opt = gd.optimizer(name.split("-")[0], model, lr=0.01, rules=[gd.rule("*", role="matrix")], **METHODS[name])
    paths = train(opt, list(model.parameters()), grads, 20)
    for p, path, start in zip(model.parameters(), paths, starts):
        steps = torch.stack([after - before for before, after in zip([start, *path], path)])
        assert steps.isfinite().all()
        if name.startswith("muon"):
            longest = max(float(torch.linalg.matrix_norm(step, 2)) for step in steps)
            assert longest < 0.01 * 1.25 * max(1.0, start.shape[0] / start.shape[1]) ** 0.5 + 1e-3
        else:  # the second moment may be stale after a refresh, yet steps stay within a few learning rates
            assert float(steps.abs().max()) < 0.01 * 30
        for value in opt.state[p].values():
            assert value.isfinite().all()
    if case == "zero gradients":
        decayed = [start * (1 - 0.01 * 0.01) ** (20 if name.startswith("muon") else 19) for start in starts]
        assert far([path[-1] for path in paths], decayed) < 1e-6
    elif case != "tiny" or name.startswith("muon"):  # 1e-25 is far below Adam's eps
        assert all(float((path[-1] - start).abs().max()) > 0.02 for path, start in zip(paths, starts))


def soap(start: Tensor, **options: Any) -> tuple[Bag, Any]:
    model = Bag({"w": start})
    rules = [gd.rule("w", role="matrix")]
    return model, gd.SOAP(
        model, lr=0.01, rules=rules, refresh_schedule="every", precondition_frequency=4, **{"eps": 1e-4} | options
    )


def broken(a: Tensor, *args: Any, **kwargs: Any) -> Any:
    raise torch.linalg.LinAlgError("the algorithm failed to converge")


@pytest.mark.parametrize("method", ["qr", "eigh"])
def test_a_solver_that_always_fails(method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.linalg, "eigh", broken)
    start, grad = torch.randn(6, 6, dtype=torch.float64), stream((6, 6), 1)
    model, opt = soap(start, refresh_method=method, weight_decay=0.1)
    path = train(opt, list(model.parameters()), [grad], 20)[0]
    assert all(p.isfinite().all() for p in path)
    refreshes = 4  # at steps 5, 9, 13, 17, of both sides
    solved = 1 if method == "qr" else 1 + refreshes
    assert opt.audit() == {"w": {"fallbacks": 2 * solved, "refreshes": 2 * refreshes}}
    if method == "eigh":  # the last good basis is the identity, in which SOAP is Adam
        numbers: dict[str, Any] = {"betas": (0.95, 0.95), "eps": 1e-4, "weight_decay": 0.1, "late": True}
        assert far(path[1:], adamw(start, lambda t, p: grad(t + 1, p), 19, 0.01, **numbers)) < 1e-12


def test_a_solver_that_fails_in_float32_only(monkeypatch: pytest.MonkeyPatch) -> None:
    start, grad = torch.randn(6, 6), stream((6, 6), 2)
    ends = []
    solve = torch.linalg.eigh

    def picky(a: Tensor, *args: Any, **kwargs: Any) -> Any:
        return solve(a, *args, **kwargs) if a.dtype == torch.float64 else broken(a)

    for fails in (False, True):
        if fails:
            monkeypatch.setattr(torch.linalg, "eigh", picky)
        model, opt = soap(start, refresh_method="eigh")
        train(opt, list(model.parameters()), [grad], 20)
        ends.append(model.w.detach())
        assert opt.audit()["w"].get("fallbacks", 0) == (10 if fails else 0)
    assert far([ends[1]], [ends[0]]) < 1e-4


def test_one_broken_matrix_does_not_harm_its_neighbours(monkeypatch: pytest.MonkeyPatch) -> None:
    shape = (6, 6)
    starts = {name: torch.randn(shape, dtype=torch.float64) for name in "abc"}
    grads = [stream(shape, 1), lambda t, p: 1e200 * stream(shape, 2)(t, p), stream(shape, 3)]
    model = Bag(starts)
    rules = [gd.rule("*", role="matrix")]
    opt = gd.SOAP(model, lr=0.01, rules=rules, refresh_method="eigh", refresh_schedule="every")
    paths = train(opt, list(model.parameters()), grads, 15)  # the factors of b overflow: it falls back alone
    counts = {name: (c.get("fallbacks", 0), c.get("repairs", 0)) for name, c in opt.audit().items()}
    assert counts == {"a": (0, 0), "b": (4, 2), "c": (0, 0)}
    for i, name in ((0, "a"), (2, "c")):
        alone = Bag({"w": starts[name]})
        other = gd.SOAP(
            alone, lr=0.01, rules=[gd.rule("w", role="matrix")], refresh_method="eigh", refresh_schedule="every"
        )
        assert far(paths[i], train(other, list(alone.parameters()), [grads[i]], 15)[0]) < 1e-9
    assert all(p.isfinite().all() for p in paths[1])


def test_muon_without_its_solver(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails_once(*args: Any, calls: list[int] = [], **kwargs: Any) -> Any:  # noqa: B006
        calls.append(1)
        return broken(args[0]) if len(calls) % 2 else solve(*args, **kwargs)

    solve = torch.linalg.svd
    ends = []
    start, grad = torch.randn(6, 4, dtype=torch.float64), stream((6, 4), 3)
    for patched in (False, True):
        if patched:
            monkeypatch.setattr(torch.linalg, "svd", fails_once)
        model = Bag({"w": start})
        opt = gd.Muon(model, lr=0.1, coefficients="exact", rules=[gd.rule("w", role="matrix")])
        ends.append(train(opt, list(model.parameters()), [grad], 5)[0])
    assert far(*ends) < 1e-12
