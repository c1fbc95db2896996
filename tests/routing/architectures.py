"""Ten small models in the style of well-known architectures; each runs, and each has a frozen routing table."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from architectures_vision import ConvNeXt, ResNet, ViT
from torch import Tensor, nn

VOCAB, CONTEXT, DIM, HEADS, LAYERS = 50, 16, 32, 4, 2


def attend(q: Tensor, k: Tensor, v: Tensor, heads: int, bias: Tensor | None = None, causal: bool = False) -> Tensor:
    """Multi-head attention of [B, T, width] tensors; keys with fewer heads are repeated."""
    q, k, v = (x.unflatten(-1, (-1, q.shape[-1] // heads)).transpose(1, 2) for x in (q, k, v))
    k, v = (x.repeat_interleave(heads // x.shape[1], dim=1) for x in (k, v))
    return F.scaled_dot_product_attention(q, k, v, attn_mask=bias, is_causal=causal).transpose(1, 2).flatten(-2)


class Conv1D(nn.Module):
    """The linear layer of GPT-2, stored (in, out)."""

    def __init__(self, nf: int, nx: int) -> None:
        super().__init__()
        self.nf = nf
        self.weight = nn.Parameter(torch.randn(nx, nf) * 0.02)
        self.bias = nn.Parameter(torch.zeros(nf))

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weight + self.bias


class GPT2Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.num_heads, self.split_size = HEADS, DIM
        self.c_attn, self.c_proj = Conv1D(3 * DIM, DIM), Conv1D(DIM, DIM)

    def forward(self, x: Tensor) -> Tensor:
        return self.c_proj(attend(*self.c_attn(x).split(self.split_size, dim=-1), self.num_heads, causal=True))


class GPT2MLP(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.c_fc, self.c_proj = Conv1D(4 * DIM, DIM), Conv1D(DIM, 4 * DIM)

    def forward(self, x: Tensor) -> Tensor:
        return self.c_proj(F.gelu(self.c_fc(x)))


class GPT2Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.ln_1, self.attn = nn.LayerNorm(DIM), GPT2Attention()
        self.ln_2, self.mlp = nn.LayerNorm(DIM), GPT2MLP()

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.ln_1(x))
        return x + self.mlp(self.ln_2(x))


class GPT2(nn.Module):
    """Learned positions, Conv1D layers, a head tied to the token table."""

    def __init__(self) -> None:
        super().__init__()
        self.wte, self.wpe = nn.Embedding(VOCAB, DIM), nn.Embedding(CONTEXT, DIM)
        self.h = nn.ModuleList(GPT2Block() for _ in range(LAYERS))
        self.ln_f, self.lm_head = nn.LayerNorm(DIM), nn.Linear(DIM, VOCAB, bias=False)
        self.lm_head.weight = self.wte.weight

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.wte(tokens) + self.wpe(torch.arange(tokens.shape[1]))
        for block in self.h:
            x = block(x)
        return self.lm_head(self.ln_f(x))


class RMSNorm(nn.Module):
    def __init__(self, dim: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, x.shape[-1:], self.weight)


class GroupedAttention(nn.Module):
    def __init__(self, kv_heads: int = 2) -> None:
        super().__init__()
        self.num_heads, self.num_key_value_heads = HEADS, kv_heads
        self.q_proj, self.o_proj = nn.Linear(DIM, DIM, bias=False), nn.Linear(DIM, DIM, bias=False)
        self.k_proj, self.v_proj = (nn.Linear(DIM, DIM // HEADS * kv_heads, bias=False) for _ in "kv")

    def forward(self, x: Tensor) -> Tensor:
        return self.o_proj(attend(self.q_proj(x), self.k_proj(x), self.v_proj(x), self.num_heads, causal=True))


class GatedMLP(nn.Module):
    def __init__(self, hidden: int = 80) -> None:
        super().__init__()
        self.gate_proj, self.up_proj = (nn.Linear(DIM, hidden, bias=False) for _ in "gu")
        self.down_proj = nn.Linear(hidden, DIM, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Experts(nn.Module):
    """Stacked experts: gate and value [E, 2 hidden, dim], then [E, dim, hidden]."""

    def __init__(self, count: int = 4, hidden: int = 40) -> None:
        super().__init__()
        self.num_experts = count
        self.gate_up_proj = nn.Parameter(torch.randn(count, 2 * hidden, DIM) * 0.1)
        self.down_proj = nn.Parameter(torch.randn(count, DIM, hidden) * 0.1)

    def forward(self, x: Tensor, weights: Tensor) -> Tensor:
        gate, up = torch.einsum("btd,ehd->bteh", x, self.gate_up_proj).chunk(2, dim=-1)
        return torch.einsum("bteh,edh,bte->btd", F.silu(gate) * up, self.down_proj, weights)


class SparseMoE(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gate, self.experts = nn.Linear(DIM, 4, bias=False), Experts()

    def forward(self, x: Tensor) -> Tensor:
        weights, chosen = self.gate(x).softmax(-1).topk(2)
        return self.experts(x, torch.zeros_like(x[..., :4]).scatter(-1, chosen, weights))


class DecoderLayer(nn.Module):
    def __init__(self, mlp: Callable[[], nn.Module]) -> None:
        super().__init__()
        self.input_layernorm, self.post_attention_layernorm = RMSNorm(DIM), RMSNorm(DIM)
        self.self_attn, self.mlp = GroupedAttention(), mlp()

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.self_attn(self.input_layernorm(x))
        return x + self.mlp(self.post_attention_layernorm(x))


class Decoder(nn.Module):
    """Llama (gated MLP) or Mixtral (experts): grouped queries, RMS norms, an untied head."""

    def __init__(self, mlp: Callable[[], nn.Module]) -> None:
        super().__init__()
        self.embed_tokens, self.norm = nn.Embedding(VOCAB, DIM), RMSNorm(DIM)
        self.layers = nn.ModuleList(DecoderLayer(mlp) for _ in range(LAYERS))
        self.lm_head = nn.Linear(DIM, VOCAB, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed_tokens(tokens)
        for layer in self.layers:
            x = layer(x)
        return self.lm_head(self.norm(x))


class BertLayer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.num_attention_heads = HEADS
        self.query, self.key, self.value, self.dense = (nn.Linear(DIM, DIM) for _ in "qkvo")
        self.intermediate, self.output = nn.Linear(DIM, 4 * DIM), nn.Linear(4 * DIM, DIM)
        self.norm1, self.norm2 = nn.LayerNorm(DIM), nn.LayerNorm(DIM)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm1(x + self.dense(attend(self.query(x), self.key(x), self.value(x), HEADS)))
        return self.norm2(x + self.output(F.gelu(self.intermediate(x))))


class Bert(nn.Module):
    """Post-norm encoder with a pooler and a masked-language head whose decoder is tied."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.positions, self.segments = (nn.Embedding(n, DIM) for n in (VOCAB, CONTEXT, 2))
        self.norm = nn.LayerNorm(DIM)
        self.layer = nn.ModuleList(BertLayer() for _ in range(LAYERS))
        self.pooler, self.transform, self.transform_norm = nn.Linear(DIM, DIM), nn.Linear(DIM, DIM), nn.LayerNorm(DIM)
        self.decoder, self.next_sentence = nn.Linear(DIM, VOCAB), nn.Linear(DIM, 2)
        self.decoder.weight = self.words.weight

    def forward(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        places = torch.arange(tokens.shape[1])
        x = self.norm(self.words(tokens) + self.positions(places) + self.segments(places % 2))
        for layer in self.layer:
            x = layer(x)
        words = self.decoder(self.transform_norm(F.gelu(self.transform(x))))
        return words, self.next_sentence(self.pooler(x[:, 0]).tanh())


class T5Attention(nn.Module):
    def __init__(self, biased: bool) -> None:
        super().__init__()
        self.n_heads, self.key_value_proj_dim = HEADS, 6
        inner = HEADS * 6
        self.q, self.k, self.v = (nn.Linear(DIM, inner, bias=False) for _ in "qkv")
        self.o = nn.Linear(inner, DIM, bias=False)
        if biased:
            self.relative_attention_bias = nn.Embedding(8, HEADS)

    def forward(self, x: Tensor, memory: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        if hasattr(self, "relative_attention_bias"):
            places = torch.arange(x.shape[1])
            bias = self.relative_attention_bias((places[:, None] - places).abs().clamp(max=7)).movedim(-1, 0)
        return self.o(attend(self.q(x), self.k(memory), self.v(memory), HEADS, bias)), bias


class T5Block(nn.Module):
    def __init__(self, biased: bool, cross: bool) -> None:
        super().__init__()
        self.attn, self.norm1 = T5Attention(biased), RMSNorm(DIM)
        if cross:
            self.cross, self.norm2 = T5Attention(False), RMSNorm(DIM)
        self.wi_0, self.wi_1 = (nn.Linear(DIM, 48, bias=False) for _ in "ab")
        self.wo, self.norm3 = nn.Linear(48, DIM, bias=False), RMSNorm(DIM)

    def forward(self, x: Tensor, bias: Tensor | None, memory: Tensor | None) -> tuple[Tensor, Tensor | None]:
        y = self.norm1(x)
        y, bias = self.attn(y, y, bias)
        x = x + y
        if memory is not None:
            x = x + self.cross(self.norm2(x), memory, None)[0]
        y = self.norm3(x)
        return x + self.wo(F.gelu(self.wi_0(y)) * self.wi_1(y)), bias


class T5Stack(nn.Module):
    def __init__(self, shared: nn.Embedding, cross: bool) -> None:
        super().__init__()
        self.embed_tokens = shared
        self.block = nn.ModuleList(T5Block(biased=n == 0, cross=cross) for n in range(LAYERS))
        self.final_norm = RMSNorm(DIM)

    def forward(self, tokens: Tensor, memory: Tensor | None = None) -> Tensor:
        x, bias = self.embed_tokens(tokens), None
        for block in self.block:
            x, bias = block(x, bias, memory)
        return self.final_norm(x)


class T5(nn.Module):
    """Encoder and decoder that share a table, relative positions as an embedding, an untied head (version 1.1)."""

    def __init__(self) -> None:
        super().__init__()
        self.shared = nn.Embedding(VOCAB, DIM)
        self.encoder, self.decoder = T5Stack(self.shared, cross=False), T5Stack(self.shared, cross=True)
        self.lm_head = nn.Linear(DIM, VOCAB, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.lm_head(self.decoder(tokens, self.encoder(tokens)))


class LSTM(nn.Module):
    """A recurrent language model with an untied head whose inputs are wider than the table's vectors."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder, self.rnn, self.decoder = nn.Embedding(VOCAB, 12), nn.LSTM(12, 20, 2), nn.Linear(20, VOCAB)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.decoder(self.rnn(self.encoder(tokens))[0])


class MambaMixer(nn.Module):
    def __init__(self, inner: int = 48, state: int = 4, rank: int = 3) -> None:
        super().__init__()
        self.rank, self.state = rank, state
        self.in_proj = nn.Linear(DIM, 2 * inner, bias=False)
        self.conv1d = nn.Conv1d(inner, inner, 4, groups=inner, padding=3)
        self.x_proj, self.dt_proj = nn.Linear(inner, rank + 2 * state, bias=False), nn.Linear(rank, inner)
        self.A_log = nn.Parameter(torch.arange(1.0, state + 1).log().repeat(inner, 1))
        self.D = nn.Parameter(torch.ones(inner))
        self.out_proj = nn.Linear(inner, DIM, bias=False)

    def forward(self, u: Tensor) -> Tensor:
        x, z = self.in_proj(u).chunk(2, dim=-1)
        x = F.silu(self.conv1d(x.mT)[..., : u.shape[1]].mT)
        dt, b, c = self.x_proj(x).split([self.rank, self.state, self.state], dim=-1)
        dt = F.softplus(self.dt_proj(dt))[..., None]
        h, ys = 0.0, []
        for t in range(u.shape[1]):
            h = h * torch.exp(-dt[:, t] * self.A_log.exp()) + dt[:, t] * b[:, t, None] * x[:, t, :, None]
            ys.append((h * c[:, t, None]).sum(-1))
        return self.out_proj((torch.stack(ys, 1) + self.D * x) * F.silu(z))


class MambaBlock(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.mixer = RMSNorm(DIM), MambaMixer()

    def forward(self, x: Tensor) -> Tensor:
        return x + self.mixer(self.norm(x)) / math.sqrt(LAYERS)


class Mamba(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.layers = nn.Embedding(VOCAB, DIM), nn.Sequential(*(MambaBlock() for _ in range(LAYERS)))
        self.norm_f, self.lm_head = RMSNorm(DIM), nn.Linear(DIM, VOCAB, bias=False)
        self.lm_head.weight = self.embedding.weight

    def forward(self, tokens: Tensor) -> Tensor:
        return self.lm_head(self.norm_f(self.layers(self.embedding(tokens))))


ARCHITECTURES: dict[str, Callable[[], nn.Module]] = {
    "gpt2": GPT2,
    "llama": lambda: Decoder(GatedMLP),
    "bert": Bert,
    "vit": ViT,
    "t5": T5,
    "mixtral": lambda: Decoder(SparseMoE),
    "resnet": ResNet,
    "convnext": ConvNeXt,
    "lstm": LSTM,
    "mamba": Mamba,
}


def example(name: str) -> Tensor:
    """An input for the architecture: images or tokens."""
    generator = torch.Generator().manual_seed(0)
    if name in ("vit", "resnet", "convnext"):
        return torch.randn(2, 3, 16, 16, generator=generator)
    return torch.randint(0, VOCAB, (2, 8), generator=generator)
