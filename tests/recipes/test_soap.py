"""SOAP against a plain float64 reference in the paper's order, and the special cases that are known in closed form."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import guided_descent as gd
from guided_descent.engine.refresh import phases
from guided_descent.parts.geometry.kronecker import SIDES
from oracles.elementwise import adamw
from oracles.soap import soap
from oracles.training import Bag, far, stream, train

STEPS = 45


def run(
    start: Tensor, grad: Any, steps: int = STEPS, role: str = "matrix", **options: Any
) -> tuple[list[Tensor], dict[str, Tensor], Any]:
    """Train one tensor with SOAP: its path, its state after the first call, and the optimizer."""
    model = Bag({"w": start})
    opt = gd.SOAP(model, rules=[gd.rule("w", role=role)], **{"refresh_schedule": "every"} | options)
    params = list(model.parameters())
    path = train(opt, params, [grad], 1)[0]
    first = {key: value.clone() for key, value in opt.state[params[0]].items()}
    path += train(opt, params, [grad], steps - 1, start=2)[0]
    return path, first, opt


def bases(state: dict[str, Tensor]) -> tuple[Tensor | None, Tensor | None]:
    return state.get("left_basis"), state.get("right_basis")


@pytest.mark.parametrize("method", ["qr", "eigh"])
@pytest.mark.parametrize("shape", [(5, 5), (9, 4), (4, 9), (2, 7)])
def test_it_takes_the_references_steps(shape: tuple[int, int], method: str) -> None:
    start, grad = torch.randn(shape, dtype=torch.float64), stream(shape, 3)
    numbers: dict[str, Any] = {"lr": 0.01, "betas": (0.9, 0.95), "shampoo_beta": 0.8, "weight_decay": 0.1}
    carry = "permute" if method == "qr" else "rank"
    path, first, opt = run(
        start, grad, refresh_method=method, second_moment=carry, precondition_frequency=10, **numbers
    )
    reference = soap(start, grad, STEPS, bases=bases(first), method=method, frequency=10, **numbers)
    assert far(path, reference) < 1e-10
    assert far(path[-1:], [start]) > 0.1
    assert opt.audit() == {"w": {"refreshes": 2 * 4}}


def test_it_needs_no_help_where_the_first_factors_have_full_rank() -> None:
    start, grad = torch.randn(6, 6, dtype=torch.float64), stream((6, 6), 5)
    path, _, _ = run(start, grad, lr=0.01, eps=1e-8, weight_decay=0.0)
    assert far(path, soap(start, grad, STEPS, 0.01)) < 1e-8


@pytest.mark.parametrize("shape", [(6, 6), (8, 4)])
def test_float32_stays_close(shape: tuple[int, int]) -> None:
    start, grad = torch.randn(shape), stream(shape, 4)
    path, first, _ = run(start, grad, lr=3e-3, weight_decay=0.1)
    reference = soap(start, grad, STEPS, 3e-3, weight_decay=0.1, bases=bases(first))
    assert far(path, reference) < 1e-6


@pytest.mark.parametrize("shape", [(6, 6), (7, 3)])
def test_the_first_call_sets_factors_and_bases_and_leaves_the_parameter(shape: tuple[int, int]) -> None:
    start, grad = torch.randn(shape, dtype=torch.float64), stream(shape, 6)
    path, first, _ = run(start, grad, steps=1, betas=(0.9, 0.95), weight_decay=0.1)
    g = grad(1, start)
    assert torch.equal(path[0], start)
    for side, product in (("left", g @ g.T), ("right", g.T @ g)):
        factor, q = first[side], first[f"{side}_basis"]
        torch.testing.assert_close(factor, 0.05 * product)
        torch.testing.assert_close(q.T @ q, torch.eye(len(q), dtype=q.dtype))
        turned = q.T @ factor @ q
        values = turned.diagonal()
        torch.testing.assert_close(turned, torch.diag(values), atol=1e-12, rtol=0)
        assert (values.diff() <= 1e-12).all()  # largest first
    assert not first["exp_avg"].any()
    assert not first["exp_avg_sq"].any()


@pytest.mark.parametrize(("decay", "place"), [("decoupled", "before"), ("after", "after")])
def test_decay_before_and_after_the_step(decay: str, place: str) -> None:
    start, grad = torch.randn(5, 5, dtype=torch.float64), stream((5, 5), 7)
    numbers: dict[str, Any] = {"lr": 0.1, "weight_decay": 0.5}
    path, first, _ = run(start, grad, decay=decay, **numbers)
    references = {
        name: soap(start, grad, STEPS, decay=name, bases=bases(first), **numbers) for name in ("before", "after")
    }
    assert far(path, references[place]) < 1e-9
    assert far(references["before"], references["after"]) > 1e-3  # O(lr^2 wd): the test can tell


def test_without_sides_it_is_adam_with_the_late_correction_one_call_later() -> None:
    start, grad = torch.randn(4, 6, dtype=torch.float64), stream((4, 6), 8)
    path, first, _ = run(start, grad, max_precond_dim=3, lr=0.01, eps=1e-3, weight_decay=0.1)
    reference = adamw(
        start, lambda t, p: grad(t + 1, p), STEPS - 1, 0.01, betas=(0.95, 0.95), eps=1e-3, weight_decay=0.1, late=True
    )
    assert far(path[1:], reference) < 1e-12
    assert set(first) == {"step", "exp_avg", "exp_avg_sq"}


def test_a_long_side_keeps_the_identity() -> None:
    start, grad = torch.randn(11, 4, dtype=torch.float64), stream((11, 4), 9)
    path, first, _ = run(start, grad, role="embedding", max_precond_dim=10, lr=0.01, weight_decay=0.1)
    assert "left" not in first
    assert first["right_basis"].shape == (4, 4)
    reference = soap(start, grad, STEPS, 0.01, weight_decay=0.1, sides=(False, True), bases=bases(first))
    assert far(path, reference) < 1e-10
    wide = start.T.contiguous()  # the other way round, the other side
    turned = stream((4, 11), 9)
    path, first, _ = run(wide, turned, max_precond_dim=10, lr=0.01, weight_decay=0.1)
    assert "right" not in first
    reference = soap(wide, turned, STEPS, 0.01, weight_decay=0.1, sides=(True, False), bases=bases(first))
    assert far(path, reference) < 1e-10


def test_stacked_experts_are_matrices_of_their_own() -> None:
    experts, shape = 3, (5, 5)
    start = torch.randn(experts, *shape, dtype=torch.float64)
    grads = [stream(shape, 10 + e) for e in range(experts)]
    path, _, _ = run(
        start, lambda t, p: torch.stack([grad(t, p[e]) for e, grad in enumerate(grads)]), role="expert", lr=0.01
    )
    for e in range(experts):
        alone, _, _ = run(start[e], grads[e], lr=0.01)
        assert far([p[e] for p in path], alone) < 1e-10


@pytest.mark.parametrize("period", [3, 4])
def test_staggered_refreshes_are_the_same_refreshes_at_other_steps(period: int) -> None:
    shapes = {"a": (6, 6), "b": (6, 6), "c": (6, 6), "d": (5, 3), "e": (3, 5)}
    starts = {name: torch.randn(shape, dtype=torch.float64) for name, shape in shapes.items()}
    model = Bag(starts)
    opt = gd.SOAP(model, rules=[gd.rule("*", role="matrix")], lr=0.01, weight_decay=0.1, precondition_frequency=period)
    grads = [stream(shape, seed) for seed, shape in enumerate(shapes.values())]
    params = list(model.parameters())
    paths = train(opt, params, grads, 1)
    firsts = [bases(opt.state[p]) for p in params]
    firsts = [tuple(None if q is None else q.clone() for q in pair) for pair in firsts]
    when: dict[str, list[int]] = {name: [] for name in shapes}
    for t in range(2, 31):
        seen = {name: opt.audit().get(name, {}).get("refreshes", 0) for name in shapes}
        for path, more in zip(paths, train(opt, params, grads, 1, start=t)):
            path += more
        for name in shapes:
            when[name] += [t] * (opt.audit().get(name, {}).get("refreshes", 0) - seen[name])
    costs = {f"{name}:{side}": float(d**3) for name, pair in shapes.items() for side, d in zip(SIDES, pair)}
    phase = phases(costs, period)
    dear = [phase[f"{name}:{side}"] for name in "abc" for side in SIDES]
    assert {dear.count(at) for at in range(period)} <= {6 // period, 6 // period + 1}  # they are spread
    for name, path, first, grad in zip(shapes, paths, firsts, grads):
        own = (phase[f"{name}:left"], phase[f"{name}:right"])
        assert when[name] == sorted(t for t in range(2, 31) for at in own if (t - 1 + at) % period == 0)
        reference = soap(starts[name], grad, 30, 0.01, weight_decay=0.1, frequency=period, phase=own, bases=first)
        assert far(path, reference) < 1e-9


def test_a_schedule_moves_step_and_decay() -> None:
    start, grad = torch.randn(5, 5, dtype=torch.float64), stream((5, 5), 20)
    model = Bag({"w": start})
    opt = gd.SOAP(model, rules=[gd.rule("w", role="matrix")], lr=0.05, weight_decay=0.3, refresh_schedule="every")

    def rate(t: int) -> float:
        return 0.05 / t

    def set_rate(t: int) -> None:
        opt.param_groups[0]["lr"] = rate(t)

    path = train(opt, list(model.parameters()), [grad], STEPS, set_rate)[0]
    assert far(path, soap(start, grad, STEPS, rate, weight_decay=0.3)) < 1e-8


def test_exact_bases_follow_rotations() -> None:
    # With bases solved at every step, SOAP of U G V^T is U (SOAP of G) V^T: Adam runs in coordinates of the data.
    start = torch.randn(5, 5, dtype=torch.float64)
    grads = [torch.randn(5, 5, dtype=torch.float64) for _ in range(9)]
    u, v = (torch.linalg.qr(torch.randn(5, 5, dtype=torch.float64)).Q for _ in range(2))
    options: dict[str, Any] = {"refresh_method": "eigh", "precondition_frequency": 1, "lr": 0.01, "weight_decay": 0.1}
    plain, _, _ = run(start, lambda t, p: grads[t - 1], steps=9, **options)
    turned, _, _ = run(u @ start @ v.T, lambda t, p: u @ grads[t - 1] @ v.T, steps=9, **options)
    assert far(turned, [u @ p @ v.T for p in plain]) < 1e-8


def test_what_is_no_matrix_is_adam_at_once() -> None:
    start, grad = torch.randn(6, dtype=torch.float64), stream((6,), 21)
    model = Bag({"w": start, "m": torch.randn(4, 4, dtype=torch.float64)})
    opt = gd.SOAP(model, lr=0.01, weight_decay=0.1, rules=[gd.rule("m", role="matrix")])
    path = train(opt, list(model.parameters()), [grad, stream((4, 4))], 20)[0]
    assert far(path, adamw(start, grad, 20, 0.01, betas=(0.95, 0.95))) < 1e-12  # and 1-D tensors are not decayed
