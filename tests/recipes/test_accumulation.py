"""Every registered recipe: micro-batches that are accumulated make the step of the whole batch."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import guided_descent as gd
from guided_descent.capture import CrossEntropy

VOCABULARY, WIDTH = 24, 12
#: A factor without full rank leaves its null space to rounding: methods that step along it by its sign or by Adam
#: get factors of the sides that have full rank.
FULL_RANK: dict[str, Any] = {"max_precond_dim": WIDTH, "precondition_frequency": 2}


class Likeliest(CrossEntropy):
    """Cross-entropy of which the draw is the class with the largest probability."""

    def sample(self, out: Tensor, generator: torch.Generator) -> Tensor:
        return out.softmax(-1) - F.one_hot(out.argmax(-1), out.shape[-1])


def options(name: str) -> dict[str, Any]:
    """What makes the comparison exact: no rounding of a null space, no draw that differs by micro-batch, no rest."""
    if gd.recipes.lookup(name).reads_layers:
        fisher = "forward" if name == "foof" else "empirical"
        return {"loss": "cross_entropy", "fisher": fisher}
    if gd.recipes.lookup(name).samples_labels:
        return {"loss": Likeliest()}
    first = {"d0", "r_eps"} & gd.recipes.lookup(name)().values().keys()
    if first:  # of methods that find their learning rate: else four steps show nothing
        return dict.fromkeys(first, 1e-3)
    if "silent_sgd_phase" in gd.recipes.lookup(name).numbers():
        return {"silent_sgd_phase": False}
    return FULL_RANK if name in ("soap", "ec_shampoo", "kl_soap", "splus") else {}


class Net(nn.Module):
    """A bit of everything: embedding, convolution, norm, hidden maps, head."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(VOCABULARY, WIDTH)
        self.conv = nn.Conv1d(WIDTH, WIDTH, 3, padding=1)
        self.norm = nn.LayerNorm(WIDTH)
        self.up = nn.Linear(WIDTH, 20)
        self.down = nn.Linear(20, WIDTH)
        self.head = nn.Linear(WIDTH, VOCABULARY)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.table(tokens)
        x = self.conv(x.mT).mT
        return self.head(x + self.down(F.gelu(self.up(self.norm(x)))))


def loss(net: Net, tokens: Tensor) -> Tensor:
    return F.cross_entropy(net(tokens[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten())


@pytest.mark.parametrize("parts", [4, 8])
@pytest.mark.parametrize("name", gd.list_optimizers())
def test_micro_batches_make_the_step_of_their_batch(name: str, parts: int) -> None:
    nets = []
    for pieces in (1, parts):
        torch.manual_seed(0)
        net = Net().double()
        opt = gd.optimizer(name, net, **options(name))
        start = [p.detach().clone() for p in net.parameters()]
        for step in range(4):
            tokens = torch.randint(0, VOCABULARY, (16, 10), generator=torch.Generator().manual_seed(step))
            opt.zero_grad()
            for piece in tokens.chunk(pieces):
                value = loss(net, piece) / pieces
                if opt.due("hessian"):
                    opt.hessian_pass(value)
                value.backward()
            opt.step()
        assert max(float((p.detach() - s).abs().max()) for p, s in zip(net.parameters(), start)) > 1e-5
        nets.append(net)
    for whole, pieced in zip(nets[0].parameters(), nets[1].parameters()):
        torch.testing.assert_close(pieced, whole, atol=1e-6, rtol=0)
