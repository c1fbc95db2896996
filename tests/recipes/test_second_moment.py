"""The four ways in which a second moment follows its basis, and the default that the study chose."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import guided_descent as gd
from guided_descent.linalg.eigen import matching
from guided_descent.parts.geometry.kronecker import CARRIES

STUDY = Path(__file__).parents[2] / "benchmarks" / "results" / "second_moment.json"


def before_and_after(carry: str, method: str, shape: tuple[int, int] = (5, 4)) -> dict[str, tuple[Tensor, Tensor]]:
    """State before and after a refresh of both sides, which alone happens in that step: the gradient is zero."""
    torch.manual_seed(0)
    net = nn.ParameterDict({"w": nn.Parameter(torch.randn(shape, dtype=torch.float64))})
    opt = gd.SOAP(
        net,
        betas=(0.0, 0.9),
        shampoo_beta=0.5,
        precondition_frequency=7,
        refresh_schedule="every",
        refresh_method=method,
        second_moment=carry,
        rules=[gd.rule("w", role="matrix")],
    )
    p = net["w"]
    for _ in range(7):
        p.grad = torch.randn(shape, dtype=torch.float64)
        opt.step()
    old = {key: value.clone() for key, value in opt.state[p].items()}
    p.grad = torch.zeros(shape, dtype=torch.float64)
    opt.step()
    assert opt.audit()["w"]["refreshes"] == 2
    return {key: (old[key], opt.state[p][key]) for key in old}


@pytest.mark.parametrize("method", ["qr", "eigh"])
@pytest.mark.parametrize("carry", CARRIES)
def test_where_a_second_moment_goes(carry: str, method: str) -> None:
    state = before_and_after(carry, method)
    v, moved = state["exp_avg_sq"]
    v = 0.9 * v  # the zero gradient
    for side in ("left", "right"):
        old, new = state[f"{side}_basis"]
        order = matching(old, new)
        if carry == "permute":
            v = v[order] if side == "left" else v[:, order]
        elif carry == "rotate":
            mix = (new.T @ old).square()
            v = mix @ v if side == "left" else v @ mix.T
        elif carry == "keep":  # the columns stay with the old ones that they continue
            assert torch.equal(order, torch.arange(len(order)))
    if method == "qr" and carry == "permute":  # sorted by the old basis, before the step of iteration
        assert torch.allclose(moved.sum(), v.sum())
        assert torch.allclose(moved.flatten().sort().values, v.flatten().sort().values)
    else:
        torch.testing.assert_close(moved, v)


def test_the_default_is_the_one_that_the_study_chose() -> None:
    """Beyond chance no policy beats it more often than it is beaten, and none does on language modelling."""
    results = json.loads(STUDY.read_text())["results"]
    default = gd.recipes.SOAP().second_moment
    assert len({result["problem"] for result in results}) >= 2
    for policy in set(CARRIES) - {default}:
        outcomes = [row["outcome"] for result in results for row in result["rows"] if row["policy"] == policy]
        assert outcomes.count("worse") >= max(1, outcomes.count("better"))
    for result in results:
        assert {row["policy"] for row in result["rows"]} == set(CARRIES)
        if result["problem"] == "lm-source":
            assert not any(row["outcome"] == "better" for row in result["rows"] if row["policy"] != default)
