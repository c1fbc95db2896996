"""K-FAC by Cholesky inverses takes the steps of the factored form in the eigenbasis, whatever Cholesky refuses."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import guided_descent as gd


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(9, 5)
        self.conv = nn.Conv1d(5, 6, 2)
        self.mix = nn.Linear(6, 6, bias=False)
        self.head = nn.Linear(6, 9)

    def forward(self, tokens: Tensor) -> Tensor:
        h = torch.tanh(self.conv(self.embed(tokens).mT).mT)
        return self.head(torch.tanh(self.mix(h)))


def train(steps: int, **options: Any) -> tuple[Net, Any]:
    model = Net().double()
    options = {"loss": "cross_entropy", "lr": 0.01, "kl_clip": None, "damping_form": "pi", **options}
    opt = gd.KFAC(model, precondition_frequency=2, refresh_schedule="every", **options)
    for step in range(steps):
        tokens = torch.randint(0, 9, (4, 6), generator=torch.Generator().manual_seed(step))
        opt.zero_grad()
        F.cross_entropy(model(tokens).flatten(0, 1), tokens[:, 1:].flatten()).backward()
        opt.step()
    return model, opt


DENSE = {"rules": [gd.rule("embed.weight", recipe="adamw")]}
ONCE = {"factor_frequency": 100}  # a diagonal side follows at once, and a full one with its next refresh


@pytest.mark.parametrize(
    "options", [DENSE, ONCE, ONCE | {"max_dim": 6}, DENSE | {"refresh_lag": 1}, DENSE | {"weight_decay": 0.1}], ids=str
)
def test_it_is_the_factored_form(options: dict[str, Any]) -> None:
    one, _ = train(9, refresh_method="eigh", **options)
    two, opt = train(9, refresh_method="cholesky", **options)
    for a, b in zip(one.parameters(), two.parameters()):
        torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-10)
    assert not any("fallbacks" in counts for counts in opt.audit().values())
    assert gd.explain(opt).state_bytes == opt.state_bytes()


def test_nothing_that_has_not_drifted_is_inverted_again() -> None:
    _, often = train(9, refresh_method="cholesky")
    _, never = train(9, refresh_method="cholesky", refresh_tolerance=1e9)
    assert sum(c.get("refreshes", 0) for c in never.audit().values()) == 0
    tried = sum(c.get("refreshes", 0) for c in often.audit().values())
    assert sum(c.get("skipped_refreshes", 0) for c in never.audit().values()) == tried > 0


def test_what_cholesky_refuses_is_inverted_by_its_eigenvalues(monkeypatch: pytest.MonkeyPatch) -> None:
    plain, _ = train(6, refresh_method="cholesky")
    solve = torch.linalg.cholesky_ex

    def refuse(a: Tensor) -> Any:
        root, info = solve(a)
        return root, info + 1

    monkeypatch.setattr(torch.linalg, "cholesky_ex", refuse)
    helped, opt = train(6, refresh_method="cholesky")
    for a, b in zip(plain.parameters(), helped.parameters()):
        torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-10)
    assert all(counts["fallbacks"] > 0 for name, counts in opt.audit().items() if name != "embed.weight")


def test_without_damping_singular_factors_stay_finite() -> None:
    model, _ = train(5, refresh_method="cholesky", damping=0.0)  # the rows of softmax gradients add to zero
    assert all(p.isfinite().all() for p in model.parameters())


def test_it_needs_the_factored_damping() -> None:
    with pytest.raises(ValueError, match="use damping_form='pi'"):
        gd.recipes.KFAC(refresh_method="cholesky", damping_form="eigenbasis")
