"""Layers as linear maps of samples and positions: what a layer saw, and the sums that curvature takes from it."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd

from guided_descent.capture.losses import wide

Kind = Literal["linear", "embedding", "scale"]
Approx = Literal["expand", "reduce"]

_LINEAR = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)
_SCALE = (nn.LayerNorm, nn.RMSNorm, nn.GroupNorm, nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
#: Elements of the largest stack of per-sample gradients that is made at once for their norms.
_CHUNK = 1 << 24


@dataclass(frozen=True)
class LayerIO:
    """Inputs and output gradients of one layer in one (micro-)batch.

    A layer is ``groups`` independent maps y = W a (+ b), applied to N samples at R positions each. A linear layer has
    one group, a convolution the groups of its module with patches as inputs, and a norm layer y = gain * x + shift one
    group of width 1 for each channel. Calls of one layer in one pass are joined along R.

    Attributes:
        kind: ``linear`` (convolutions too), ``embedding`` or ``scale``.
        a: inputs [N, R, groups * d_in]; for ``scale`` the normalised input [N, R, C]; for ``embedding`` the int64 rows
            [N, R], -1 where the padding row was looked up.
        d: [N, R, groups * d_out], the gradient with respect to the output of the SUM over loss terms, or a draw or
            column of that shape; ``None`` when only inputs are captured.
        terms: loss terms T of this micro-batch; 0 when only inputs are captured.
        bias: whether the layer adds a bias that is trained: inputs then count as [a, 1].
        fresh: false when ``a`` repeats an earlier ``LayerIO`` of the same pass, which gave it other gradients.
        groups: maps side by side.
        inputs: d_in, or the rows of the table.
        users: layers that share the weight, whose terms are counted once for each.
    """

    kind: Kind
    a: Tensor
    d: Tensor | None
    terms: int
    bias: bool
    fresh: bool
    groups: int
    inputs: int
    users: int = 1

    def gram_inputs(self, approx: Approx = "expand") -> tuple[Tensor, int]:
        """The raw sum of a a^T and the count that makes it a mean, A = sum / count.

        ``expand`` takes every position as a datum, count N R; ``reduce`` takes a_n = mean_r a (a bias's 1 stays 1),
        count N. (Eschenhagen et al. 2023, 2311.00636.)

        Returns:
            [d_in, d_in] with the bias's column last, [groups, ., .] for more groups than one; for an embedding the
            diagonal [rows]. In at least float32.
        """
        n, r = self.a.shape[:2]
        count = n * r if _expands(approx) else n
        if self.kind == "embedding":
            return self._counts(approx), count
        a = wide(self.a)
        a = self._stack(a if _expands(approx) else a.mean(1, keepdim=True))
        gram = a.mT @ a
        if self.bias:
            total = a.sum(1)
            last = torch.cat([total, total.new_full((self.groups, 1), count)], 1)
            gram = torch.cat([torch.cat([gram, total.unsqueeze(1)], 1), last.unsqueeze(2)], 2)
        return self._unstack(gram), count

    def gram_gradients(self, approx: Approx = "expand") -> tuple[Tensor, int]:
        """The raw sum of d d^T and the count that makes it a mean, B = sum / T.

        ``expand`` sums over samples and positions, ``reduce`` takes d_n = sum_r d first.

        Returns:
            [d_out, d_out], [groups, ., .] for more groups than one, in at least float32, and T.
        """
        d = self._gradients()
        d = self._stack(d if _expands(approx) else d.sum(1, keepdim=True))
        return self._unstack(d.mT @ d), self.terms

    def per_sample_gradients(self) -> Tensor:
        """G_n = sum_r d a^T for every sample, of the sum over loss terms.

        Returns:
            [N, out, in] in the layout of the flattened weight, where a bias is one more column; a norm layer has
            [N, C, 1] or, with its shift, [N, C, 2]; an embedding [N, rows, width]. In at least float32.
        """
        return self._outer(0, len(self.a))

    def per_sample_squared_norms(self) -> Tensor:
        """||G_n||_F^2 [N], in at least float32.

        By sum_{r,s} (a_r . a_s)(d_r . d_s) when that is cheaper than G_n itself, that is for few positions.
        """
        n, r = self.a.shape[:2]
        d = self._gradients()
        if self.kind == "embedding":
            keys = torch.arange(n, device=d.device).unsqueeze(1) * self.inputs + self.a.clamp(min=0)
            found, place = torch.unique(keys, return_inverse=True)
            rows = d.new_zeros(len(found), d.shape[2]).index_add_(0, place.flatten(), d.flatten(0, 1))
            return d.new_zeros(n).index_add_(0, found // self.inputs, rows.square().sum(1))
        ins, outs = self.inputs, d.shape[2] // self.groups
        if r * (ins + outs) <= ins * outs or r == 1:
            a, d = (x.view(n, r, self.groups, -1).transpose(1, 2) for x in (wide(self.a), d))
            return ((a @ a.mT + self.bias) * (d @ d.mT)).sum((1, 2, 3))
        step = max(1, _CHUNK // (d.shape[2] * (ins + self.bias)))
        norms = [self._outer(i, i + step).square().sum((1, 2)) for i in range(0, n, step)]
        return torch.cat(norms) if norms else d.new_zeros(0)

    def _outer(self, start: int, stop: int) -> Tensor:
        a, d = self.a[start:stop], self._gradients()[start:stop]
        n, r = a.shape[:2]
        if self.kind == "embedding":
            keys = torch.arange(n, device=d.device).unsqueeze(1) * self.inputs + a.clamp(min=0)
            rows = d.new_zeros(n * self.inputs, d.shape[2]).index_add_(0, keys.flatten(), d.flatten(0, 1))
            return rows.view(n, self.inputs, d.shape[2])
        x, y = (t.view(n, r, self.groups, -1) for t in (wide(a), d))
        g = torch.einsum("nrgo,nrgi->ngoi", y, x).reshape(n, d.shape[2], self.inputs)
        return torch.cat([g, d.sum(1).unsqueeze(2)], 2) if self.bias else g

    def _counts(self, approx: Approx) -> Tensor:
        """The diagonal of the sum of a a^T for one-hot inputs: how often each row was looked up."""
        n, r = self.a.shape
        dtype = torch.float32 if self.d is None else self._gradients().dtype
        known = self.a >= 0
        if _expands(approx):
            return torch.bincount(self.a[known], minlength=self.inputs).to(dtype)
        keys = (torch.arange(n, device=self.a.device).unsqueeze(1) * self.inputs + self.a)[known]
        found, times = torch.unique(keys, return_counts=True)
        squares: Tensor = (times.to(dtype) / r).square()
        return squares.new_zeros(self.inputs).index_add_(0, found % self.inputs, squares)

    def _gradients(self) -> Tensor:
        if self.d is None:
            raise ValueError("this LayerIO has inputs only: capture with a fisher other than 'forward' for gradients")
        return wide(self.d)

    def _stack(self, x: Tensor) -> Tensor:
        """[N, R, groups * k] as [groups, N R, k]."""
        return x.flatten(0, 1).view(-1, self.groups, x.shape[2] // self.groups).transpose(0, 1)

    def _unstack(self, gram: Tensor) -> Tensor:
        return gram if self.groups > 1 else gram.squeeze(0)


def per_sample_norms(layers: Iterable[LayerIO]) -> Tensor:
    """Squared norms [N] of the per-sample gradients of several layers taken together, from one pass over N samples."""
    return torch.stack([io.per_sample_squared_norms() for io in layers]).sum(0)


def _expands(approx: str) -> bool:
    if approx not in ("expand", "reduce"):
        raise ValueError(
            f"approx={approx!r}: choose 'expand' (every position is a datum) or 'reduce' (every sample is)"
        )
    return approx == "expand"


def supported(module: nn.Module) -> Kind | None:
    """How a module can be captured: ``linear``, ``embedding``, ``scale``, or ``None`` when it cannot.

    Types are matched exactly, as a subclass may compute something else: ``Linear``, ``Conv1d`` to ``Conv3d`` with any
    stride, padding, dilation and groups, ``Embedding``, and with a gain ``LayerNorm``, ``RMSNorm``, ``GroupNorm`` and
    ``BatchNorm1d`` to ``BatchNorm3d`` (where samples of a batch in training mode depend on each other). Parameters may
    be sharded by ``fully_shard``, which makes them whole for a forward pass; layers that are divided among ranks, as in
    tensor parallel, show each rank a part of what they see.
    """
    return None if why_not(module) else kind_of(module)


def kind_of(module: nn.Module) -> Kind:
    """The kind of a module of a supported type."""
    kind = own_class(module)
    return "linear" if kind in _LINEAR else "embedding" if kind is nn.Embedding else "scale"


def own_class(module: nn.Module) -> type[nn.Module]:
    """A module's class, without what ``fully_shard`` puts before it."""
    kinds = type(module).__mro__
    return kinds[2] if kinds[1].__name__ == "FSDPModule" else kinds[0]


def why_not(module: nn.Module) -> str:
    """The reason for which a module cannot be captured; empty when it can."""
    kind = own_class(module).__name__
    if nn.utils.parametrize.is_parametrized(module):
        return f"{kind}: its weight is parametrized, so that the layer's gradient is not the parameter's"
    if any(p is not None and nn.parameter.is_lazy(p) for p in module._parameters.values()):
        return f"{kind}: it is lazy; run one batch through the model first"
    if own_class(module) not in (*_LINEAR, nn.Embedding, *_SCALE):
        return (
            f"{kind} is not one of the exact types Linear, Conv1d/2d/3d, Embedding, LayerNorm, RMSNorm, GroupNorm, "
            "BatchNorm1d/2d/3d"
        )
    if "forward" in module.__dict__:
        return f"{kind}: its forward was replaced on the instance, so that it may compute something else"
    weight = module._parameters.get("weight")
    if weight is None:
        what = (
            "has no gain (affine=False)"
            if own_class(module) in _SCALE
            else "computes its weight (weight_norm, pruning, FSDP)"
        )
        return f"{kind}: it {what}, so that there is no parameter to precondition"
    for tensor in (weight, module._parameters.get("bias")):
        if tensor is not None and type(tensor) is not nn.Parameter and not hasattr(tensor, "full_tensor"):
            return f"{kind}: its parameter is a {type(tensor).__name__} (a tensor subclass), not a plain one"
    if weight.shape != _shape(module):
        return (
            f"{kind}: its weight {list(weight.shape)} is not the declared {list(_shape(module))} (flattened or sharded)"
        )
    if isinstance(module, nn.Embedding):
        for option in ("max_norm", "sparse", "scale_grad_by_freq"):
            if getattr(module, option):
                return f"{kind}: {option} makes its gradient another one than a table's"
    return ""


def _shape(module: nn.Module) -> torch.Size:
    """The shape of the weight that a module of a supported type declares."""
    match module:
        case nn.Linear():
            return torch.Size((module.out_features, module.in_features))
        case _ConvNd():
            return torch.Size((module.out_channels, module.in_channels // module.groups, *module.kernel_size))
        case nn.Embedding():
            return torch.Size((module.num_embeddings, module.embedding_dim))
        case nn.LayerNorm() | nn.RMSNorm():
            return torch.Size(module.normalized_shape)
        case nn.GroupNorm():
            return torch.Size((module.num_channels,))
    assert isinstance(module, _BatchNorm)
    return torch.Size((module.num_features,))


def has_bias(module: nn.Module) -> bool:
    """Whether the layer adds a bias or shift that is trained."""
    bias = module._parameters.get("bias")
    return bias is not None and bias.requires_grad


def sizes(module: nn.Module) -> tuple[int, int]:
    """(groups, inputs) of a supported module, as in ``LayerIO``."""
    shape = _shape(module)
    if isinstance(module, nn.Embedding):
        return 1, shape[0]
    if kind_of(module) == "scale":
        return shape.numel(), 1
    return (module.groups if isinstance(module, _ConvNd) else 1), shape[1:].numel()


def arrange(module: nn.Module, x: Tensor, y: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """A layer's input and its output's gradient as [N, R, .], see ``LayerIO``; an unbatched sample is a batch of 1."""
    if isinstance(module, nn.Linear):
        return _rows(x, 1), None if y is None else _rows(y, 1)
    if isinstance(module, _ConvNd):
        if x.dim() < module.weight.dim():
            x, y = x.unsqueeze(0), None if y is None else y.unsqueeze(0)
        return _patches(module, x), None if y is None else _rows(y.movedim(1, -1), 1)
    if isinstance(module, nn.Embedding):
        return _lookups(module, x, y)
    return _normalised(module, x, y)


def _rows(x: Tensor, last: int) -> Tensor:
    """[N, *positions, *features] as [N, R, features], where the features have ``last`` axes."""
    lead = x.shape[: x.dim() - last]
    return x.reshape(lead[0] if lead else 1, lead[1:].numel(), x.shape[x.dim() - last :].numel())


def _patches(module: _ConvNd, x: Tensor) -> Tensor:
    """The patches under each output position, [N, R, c_in * kernel], in the order of the flattened weight."""
    mode = "constant" if module.padding_mode == "zeros" else module.padding_mode
    x = F.pad(x, module._reversed_padding_repeated_twice, mode=mode)
    rank = len(module.kernel_size)
    for axis, (k, s, e) in enumerate(zip(module.kernel_size, module.stride, module.dilation, strict=True), start=2):
        x = x.unfold(axis, e * (k - 1) + 1, s)[..., ::e]
    n, c = x.shape[:2]
    spread = x.permute(0, *range(2, 2 + rank), 1, *range(2 + rank, 2 + 2 * rank))
    return spread.reshape(n, x.shape[2 : 2 + rank].numel(), c * x.shape[2 + rank :].numel())


def _lookups(module: nn.Embedding, x: Tensor, y: Tensor | None) -> tuple[Tensor, Tensor | None]:
    rows, d = _rows(x.long(), 0).squeeze(2), None if y is None else _rows(y, 1)
    if module.padding_idx is not None:  # that row gets no gradient
        padding = rows == module.padding_idx
        rows = rows.masked_fill(padding, -1)
        d = None if d is None else d.masked_fill(padding.unsqueeze(2), 0)
    return rows, d


def _normalised(module: nn.Module, x: Tensor, y: Tensor | None) -> tuple[Tensor, Tensor | None]:
    x = wide(x)
    match module:
        case nn.LayerNorm():
            x = F.layer_norm(x, module.normalized_shape, None, None, module.eps)
        case nn.RMSNorm():
            x = F.rms_norm(x, module.normalized_shape, None, module.eps)
        case nn.GroupNorm():
            x = F.group_norm(x, module.num_groups, None, None, module.eps)
        case _BatchNorm():
            live = module.training or module.running_mean is None
            mean, var = (None, None) if live else (module.running_mean, module.running_var)
            x = F.batch_norm(x, mean, var, None, None, live, 0.0, module.eps)
    if isinstance(module, nn.LayerNorm | nn.RMSNorm):
        axes = len(module.normalized_shape)
        return _rows(x, axes), None if y is None else _rows(y, axes)
    return _rows(x.movedim(1, -1), 1), None if y is None else _rows(y.movedim(1, -1), 1)
