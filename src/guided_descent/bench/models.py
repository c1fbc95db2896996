"""The models of the workloads, plain and small."""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class Block(nn.Module):
    """A pre-norm transformer block: ``x + attention(norm(x))``, then ``x + mlp(norm(x))``."""

    def __init__(self, d: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1 = nn.LayerNorm(d)
        self.query = nn.Linear(d, d, bias=False)
        self.key = nn.Linear(d, d, bias=False)
        self.value = nn.Linear(d, d, bias=False)
        self.project = nn.Linear(d, d, bias=False)
        self.norm2 = nn.LayerNorm(d)
        self.expand = nn.Linear(d, 4 * d, bias=False)
        self.contract = nn.Linear(4 * d, d, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """[B, T, d] to [B, T, d]; position t sees positions up to t."""
        b, t, d = x.shape
        h = self.norm1(x)
        q, k, v = (
            f(h).view(b, t, self.heads, d // self.heads).transpose(1, 2) for f in (self.query, self.key, self.value)
        )
        a = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.project(a.transpose(1, 2).reshape(b, t, d))
        y: Tensor = x + self.contract(F.gelu(self.expand(self.norm2(x))))
        return y


class ByteGPT(nn.Module):
    """A decoder over bytes with learned positions and an untied head.

    Embeddings start normal with standard deviation 0.02, linear layers as torch makes them: at this width AdamW learns
    faster so than from 0.02 everywhere (3.17 against 3.40 bits per byte of ``lm-source`` after 300 steps).

    Example:
        >>> import torch
        >>> model = ByteGPT()
        >>> model(torch.zeros(2, 64, dtype=torch.long)).shape, sum(p.numel() for p in model.parameters())
        (torch.Size([2, 64, 256]), 388416)
    """

    def __init__(self, d: int = 96, layers: int = 3, heads: int = 4, context: int = 64) -> None:
        super().__init__()
        self.token = nn.Embedding(256, d)
        self.position = nn.Embedding(context, d)
        self.blocks = nn.ModuleList(Block(d, heads) for _ in range(layers))
        self.norm = nn.LayerNorm(d)
        self.head = nn.Linear(d, 256, bias=False)
        for table in (self.token, self.position):
            nn.init.normal_(table.weight, std=0.02)

    def forward(self, tokens: Tensor) -> Tensor:
        """Int64 [B, T] to logits [B, T, 256]."""
        x = self.token(tokens) + self.position(torch.arange(tokens.shape[1], device=tokens.device))
        for block in self.blocks:
            x = block(x)
        logits: Tensor = self.head(self.norm(x))
        return logits


def mlp(*widths: int) -> nn.Sequential:
    """Linear layers of these widths with ReLU between them.

    Example:
        >>> [m.__class__.__name__ for m in mlp(64, 256, 10)]
        ['Linear', 'ReLU', 'Linear']
    """
    layers: list[nn.Module] = []
    for i, o in pairwise(widths):
        layers += [nn.Linear(i, o), nn.ReLU()]
    return nn.Sequential(*layers[:-1])


def autoencoder(*widths: int) -> nn.Sequential:
    """Linear layers down these widths and up again: tanh between them, a linear code, a sigmoid at the end.

    Weights start Glorot-normal and biases at zero.

    Example:
        >>> [m.out_features if isinstance(m, nn.Linear) else m.__class__.__name__ for m in autoencoder(8, 4, 2)]
        [4, 'Tanh', 2, 4, 'Tanh', 8, 'Sigmoid']
    """
    layers: list[nn.Module] = []
    for i, o in pairwise((*widths, *widths[-2::-1])):
        linear = nn.Linear(i, o)
        nn.init.xavier_normal_(linear.weight)
        nn.init.zeros_(linear.bias)
        layers += [linear] if o == widths[-1] else [linear, nn.Tanh()]
    return nn.Sequential(*layers[:-1], nn.Sigmoid())


class Point(nn.Module):
    """One free vector or matrix as a model: for functions whose minimum is known."""

    def __init__(self, start: Tensor) -> None:
        super().__init__()
        self.x = nn.Parameter(start)


class Factors(nn.Module):
    """``U V^T`` with U [m, r] and V [n, r]."""

    def __init__(self, u: Tensor, v: Tensor) -> None:
        super().__init__()
        self.u = nn.Parameter(u)
        self.v = nn.Parameter(v)
