"""QK-clip in one line: the attention of the model is watched, and the clip follows the largest logit of all ranks."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import guided_descent as gd
from ranks import leave


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q_proj, self.k_proj, self.v_proj = (nn.Linear(8, 8, bias=False) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (
            layer(x).unflatten(-1, (2, 4)).transpose(-2, -3) for layer in (self.q_proj, self.k_proj, self.v_proj)
        )
        return F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(-2, -3).flatten(-2)


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.attention = Attention()
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.attention(x))


def largest(model: Model, x: Tensor) -> Tensor:
    """The largest causal logit of each head [2]."""
    q, k = (
        layer(x).unflatten(-1, (2, 4)).transpose(-2, -3) for layer in (model.attention.q_proj, model.attention.k_proj)
    )
    logits = (q @ k.mT / 2).masked_fill(~torch.ones(5, 5, dtype=torch.bool).tril(), -torch.inf)
    return logits.amax((0, -1, -2)).detach()


def data() -> Tensor:
    return torch.randn(6, 5, 8, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def test_the_largest_logit_comes_down_to_tau_in_one_line() -> None:
    model, x = Model().double(), data()
    tau = float(largest(model, x).min()) / 2
    opt = gd.MuonClip(model, lr=0.0, tau=tau)
    model(x).square().mean().backward()
    opt.step()
    torch.testing.assert_close(largest(model, x), torch.full((2,), tau, dtype=torch.float64))
    opt.zero_grad()
    model(x).square().mean().backward()
    before = [p.detach().clone() for p in model.parameters()]
    opt.step()  # at tau: nothing more to do
    for a, b in zip(before, model.parameters()):
        torch.testing.assert_close(a, b.detach())


def _rank(rank: int, world: int, folder: str) -> None:
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=world)
    torch.set_num_threads(1)
    model, x = Model().double(), data()
    tau = float(largest(model, x).min()) / 2
    ddp = nn.parallel.DistributedDataParallel(model)
    opt = gd.MuonClip(ddp, lr=0.0, tau=tau)
    ddp(x[3 * rank : 3 * rank + 3]).square().mean().backward()
    opt.step()
    torch.testing.assert_close(largest(model, x), torch.full((2,), tau, dtype=torch.float64))
    leave()


def test_ranks_clip_by_the_largest_logit_of_all(tmp_path: Any) -> None:
    torch.multiprocessing.spawn(_rank, args=(2, str(tmp_path)), nprocs=2)
