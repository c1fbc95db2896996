"""Losses as likelihoods: their value, a sampled gradient and a root of the Hessian, all at the output alone."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor
from torch.nn import functional as F


class Loss(Protocol):
    """What curvature needs of a loss that is a mean over T terms, l = 1/T sum_t l_t(out_t, target_t).

    Axis 0 of ``out`` is the sample; samples are taken to be independent of each other. Both ``sample`` and
    ``sqrt_hessian`` belong to the SUM over terms, so that no 1/T hides in what is captured.
    """

    def value(self, out: Tensor, target: Tensor) -> Tensor:
        """The loss, the mean over terms."""
        ...

    def terms(self, out: Tensor) -> int:
        """T, the number of terms in the mean."""
        ...

    def sample(self, out: Tensor, generator: torch.Generator) -> Tensor:
        """A draw s of the shape of ``out`` with E[s_t s_u^T] = H_t for t = u and 0 otherwise, H_t = d2 l_t / d out_t^2.

        For a negative log likelihood this is its gradient at targets drawn from the model.
        """
        ...

    def sqrt_hessian(self, out: Tensor) -> Iterator[Tensor]:
        """Tensors of the shape of ``out`` whose outer products, within each sample, add up to its output Hessian.

        With one term a sample these are the columns of S, S S^T = H, for all samples at once. With more terms every
        position has its columns for itself: together they would mix wherever the model mixes positions.
        """
        ...


def wide(tensor: Tensor) -> Tensor:
    """The tensor in at least float32."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def _positions(out: Tensor) -> Iterator[tuple[slice | int, ...]]:
    """Index of each position beside the sample axis and the last: ``[:]`` for [N, C], ``[:, r]`` for [N, R, C]."""
    if out.dim() < 2:
        yield ()
        return
    for place in itertools.product(*map(range, out.shape[1:-1])):
        yield (slice(None), *place)


@dataclass(frozen=True)
class CrossEntropy:
    """Softmax cross-entropy with class indices: l_t = -log p_y, H = diag p - p p^T.

    The draw is p - onehot(y) with y ~ p; the root is S = diag(sqrt p) - p sqrt(p)^T, one column a class.

    Args:
        axis: the class axis of the output: -1 (default), or 1 for torch's layout [N, C, d1, ...].

    Label smoothing leaves H as it is; class weights do not and are not supported. Ignored targets (padding) count
    neither in torch's mean nor here when the loss is ``Masked``.
    """

    axis: int = -1

    def value(self, out: Tensor, target: Tensor) -> Tensor:
        """The mean over terms of -log p(target)."""
        flat = out.movedim(self.axis, -1)
        return F.cross_entropy(flat.reshape(-1, flat.shape[-1]), target.reshape(-1))

    def terms(self, out: Tensor) -> int:
        """Elements of the output over classes."""
        return out.numel() // out.shape[self.axis]

    def sample(self, out: Tensor, generator: torch.Generator) -> Tensor:
        """Draw p - onehot(y), y ~ p."""
        s = wide(out).movedim(self.axis, -1).softmax(-1)
        y = torch.multinomial(s.reshape(-1, s.shape[-1]), 1, generator=generator).view(*s.shape[:-1], 1)
        return s.scatter_add(-1, y, s.new_full((), -1).expand(y.shape)).movedim(-1, self.axis).to(out.dtype)

    def sqrt_hessian(self, out: Tensor) -> Iterator[Tensor]:
        """sqrt(p_c) (e_c - p) for each class c."""
        flat = out.movedim(self.axis, -1)
        p = wide(flat).softmax(-1)
        for place in _positions(flat):
            for c in range(flat.shape[-1]):
                s = torch.zeros_like(flat)
                root = p[place][..., c : c + 1].sqrt()
                column = -root * p[place]
                column[..., c : c + 1] += root
                s[place] = column.to(out.dtype)
                yield s.movedim(-1, self.axis)


@dataclass(frozen=True)
class SquaredError:
    """Squared error: l_t = k sum_c (out_c - target_c)^2, the Gaussian with H = 2 k I.

    The draw is sqrt(2 k) times normal noise, the root sqrt(2 k) I. An output of one axis is a batch of scalars.

    Args:
        scale: k; None (default) is 1/C, the mean over the last axis, as ``torch.nn.functional.mse_loss`` takes it.
    """

    scale: float | None = None

    def _root(self, out: Tensor) -> float:
        return math.sqrt(2 * (1 / _width(out) if self.scale is None else self.scale))

    def value(self, out: Tensor, target: Tensor) -> Tensor:
        """The mean over terms of k sum (out - target)^2."""
        return (out - target).square().sum() * (self._root(out) ** 2 / 2 / self.terms(out))

    def terms(self, out: Tensor) -> int:
        """Elements of the output over the last axis."""
        return out.numel() // _width(out)

    def sample(self, out: Tensor, generator: torch.Generator) -> Tensor:
        """sqrt(2 k) e, e ~ N(0, I)."""
        dtype = torch.promote_types(out.dtype, torch.float32)
        noise = torch.randn(out.shape, generator=generator, dtype=dtype, device=out.device)
        return (noise * self._root(out)).to(out.dtype)

    def sqrt_hessian(self, out: Tensor) -> Iterator[Tensor]:
        """sqrt(2 k) e_c for each output c."""
        yield from _diagonal(out, torch.full_like(out, self._root(out)))


@dataclass(frozen=True)
class BinaryCrossEntropy:
    """Binary cross-entropy with logits, the mean over the last axis: H = diag(p (1 - p)) / C, p = sigmoid(out).

    The draw is (p - y) / sqrt(C) with y ~ Bernoulli(p), so that its covariance is H; the root is diagonal. An output of
    one axis is a batch of scalars.
    """

    def value(self, out: Tensor, target: Tensor) -> Tensor:
        """The mean over all elements."""
        return F.binary_cross_entropy_with_logits(out, target)

    def terms(self, out: Tensor) -> int:
        """Elements of the output over the last axis."""
        return out.numel() // _width(out)

    def sample(self, out: Tensor, generator: torch.Generator) -> Tensor:
        """(p - y) / sqrt(C), y ~ Bernoulli(p)."""
        p = wide(out).sigmoid()
        return ((p - torch.bernoulli(p, generator=generator)) / math.sqrt(_width(out))).to(out.dtype)

    def sqrt_hessian(self, out: Tensor) -> Iterator[Tensor]:
        """sqrt(p_c (1 - p_c) / C) e_c for each output c."""
        p = wide(out).sigmoid()
        yield from _diagonal(out, (p * (1 - p) / _width(out)).sqrt())


@dataclass(frozen=True)
class Masked:
    """A loss of which only some terms count, such as the tokens that are not padding.

    The mask changes with every batch, so this one is given to ``Capture.curvature_pass``.

    Args:
        loss: the loss of all terms.
        mask: bool, true where a term counts: the shape of the output without its class axis.
    """

    loss: Loss
    mask: Tensor

    def value(self, out: Tensor, target: Tensor) -> Tensor:
        """The mean over the terms that count."""
        self._keep(out)
        axis = self._axis
        return self.loss.value(out.movedim(axis, -1)[self.mask].movedim(-1, axis), target[self.mask])

    def terms(self, out: Tensor) -> int:
        """The number of terms that count."""
        self._keep(out)
        return int(self.mask.sum())

    def sample(self, out: Tensor, generator: torch.Generator) -> Tensor:
        """The draw, 0 at the other terms."""
        return self.loss.sample(out, generator) * self._keep(out)

    def sqrt_hessian(self, out: Tensor) -> Iterator[Tensor]:
        """The columns, 0 at the other terms; columns that are 0 throughout are left out."""
        keep = self._keep(out)
        for column in self.loss.sqrt_hessian(out):
            if bool((column * keep).any()):
                yield column * keep

    @property
    def _axis(self) -> int:
        axis: int = getattr(self.loss, "axis", -1)
        return axis

    def _keep(self, out: Tensor) -> Tensor:
        """The mask with an axis for the classes; a batch of scalars has none."""
        shape = out.shape if out.dim() < 2 else out.select(self._axis, 0).shape
        if self.mask.dtype != torch.bool or self.mask.shape != shape:
            raise ValueError(
                f"mask of {self.mask.dtype} {list(self.mask.shape)} for an output {list(out.shape)}: it must be "
                f"torch.bool {list(shape)}, true where a term counts, such as target != -100"
            )
        return self.mask if out.dim() < 2 else self.mask.unsqueeze(self._axis)


def _width(out: Tensor) -> int:
    """C, the outputs of one term of an elementwise loss; 1 for a batch of scalars ``[N]``."""
    return out.shape[-1] if out.dim() > 1 else 1


def _diagonal(out: Tensor, root: Tensor) -> Iterator[Tensor]:
    """The columns of a diagonal root of the shape of ``out``, one position at a time."""
    if out.dim() < 2:
        yield root.to(out.dtype)
        return
    for place in _positions(out):
        for c in range(out.shape[-1]):
            s = torch.zeros_like(out)
            s[place][..., c] = root[place][..., c].to(out.dtype)
            yield s


#: Losses by the names that a recipe or a user gives.
LOSSES: dict[str, Loss] = {
    "cross_entropy": CrossEntropy(),
    "mse": SquaredError(),
    "half_mse": SquaredError(0.5),
    "sum_mse": SquaredError(1.0),
    "bce": BinaryCrossEntropy(),
}


def as_loss(loss: Loss | str | None) -> Loss | None:
    """A loss by its name, or itself."""
    if not isinstance(loss, str):
        return loss
    if loss not in LOSSES:
        raise ValueError(f"loss={loss!r} is unknown; choose one of {', '.join(LOSSES)}, or give an object like them")
    return LOSSES[loss]
