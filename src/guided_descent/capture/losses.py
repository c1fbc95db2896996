"""Losses of outputs, with the root of their Hessian: all that curvature needs to know of a loss, at the output alone.

A loss is a mean over T terms, ``l = 1/T sum_t l_t(out_t, target_t)``; a term is a vector of C outputs. The Hessian of
one term by its outputs is ``H = S Sᵀ``, and ``rho`` is the vector with ``S rho = d l_t / d out_t``.

=================  ===================================================  ==================================
name               one term l of outputs z with targets y               S of one term
=================  ===================================================  ==================================
``cross_entropy``  -log softmax(z)[y]                                   diag(sqrt p) - p sqrt(p)ᵀ
``mse``            mean of (z - y)²                                     sqrt(2/C) I
``half_mse``       sum of (z - y)² / 2                                  I
``sum_mse``        sum of (z - y)²                                      sqrt(2) I
``bce``            mean of -y log p - (1 - y) log(1 - p), p = sigmoid z  diag sqrt(p (1 - p) / C)
=================  ===================================================  ==================================

Scaling: ``value`` is the MEAN over the T terms. Everything else (``sample``, ``sqrt_hessian``, ``root``, ``root_t``,
``rho``) belongs to the SUM over terms: divide a root or ``rho`` by sqrt(T) for the mean, as
``guided_descent.solvers.Likelihood`` does.

With ``A = Sᵀ J`` and the Jacobian ``J`` of the outputs, the gradient is ``Aᵀ rho`` and the generalized Gauss-Newton
matrix ``Aᵀ A``, which for these losses is also the Fisher matrix of the model's own distribution.

Source: Martens 2020, "New insights and perspectives on the natural gradient method", arXiv:1412.1193.
"""

from __future__ import annotations

import itertools
import math
from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol, overload

import torch
from torch import Tensor
from torch.nn import functional as F

#: ``root``, ``root_t`` and ``rho`` take smaller probabilities for this: ``rho`` divides by their square roots.
_FLOOR = 1e-12


class Loss(Protocol):
    """What curvature needs of a loss that is a mean over T terms, l = 1/T sum_t l_t(out_t, target_t).

    Axis 0 of ``out`` is the sample; samples are taken to be independent of each other. ``value`` is the mean over
    terms; all else belongs to their SUM, so that no 1/T hides in what is captured. ``Capture`` needs ``terms``,
    ``sample`` and ``sqrt_hessian``, the solvers ``value``, ``terms``, ``root``, ``root_t`` and ``rho``.
    """

    def value(self, out: Tensor, target: Tensor) -> Tensor:
        """The loss, the mean over terms, differentiable in ``out``."""
        ...

    def terms(self, out: Tensor) -> int:
        """T, the number of terms in the mean."""
        ...

    def sample(self, out: Tensor, generator: torch.Generator) -> Tensor:
        """A draw s of the shape of ``out`` with E[s_t s_u^T] = H_t for t = u and 0 otherwise, H_t = d2 l_t / d out_t^2.

        For a negative log likelihood this is its gradient at targets drawn from the model. A term whose outputs are not
        finite has no distribution: its draw is NaN, and those of the others are what they would be without it.
        """
        ...

    def sqrt_hessian(self, out: Tensor) -> Iterator[Tensor]:
        """Tensors of the shape of ``out`` whose outer products, within each sample, add up to its output Hessian.

        With one term a sample these are the columns of S, S S^T = H, for all samples at once. With more terms every
        position has its columns for itself: together they would mix wherever the model mixes positions. NaN at a term
        whose outputs are not finite.
        """
        ...

    def root(self, out: Tensor, w: Tensor) -> Tensor:
        """S w, term by term, for ``w`` shaped like ``out``, or with more dimensions before."""
        ...

    def root_t(self, out: Tensor, w: Tensor) -> Tensor:
        """S^T w, term by term, for ``w`` shaped like ``out``, or with more dimensions before."""
        ...

    def rho(self, out: Tensor, target: Tensor) -> Tensor:
        """The tensor shaped like ``out`` with S_t rho_t = d l_t / d out_t for each term."""
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

    The draw is p - onehot(y) with y ~ p; the root is S = diag(sqrt p) - p sqrt(p)^T, one column a class. Outputs of
    -inf are classes that cannot be, with p = 0; NaN and +inf are not finite.

    Args:
        axis: the class axis of the output: -1 (default), or 1 for torch's layout [N, C, d1, ...].

    Label smoothing leaves H as it is; class weights do not and are not supported. Ignored targets (padding) count
    neither in torch's mean nor here when the loss is ``Masked``.
    """

    axis: int = -1

    def value(self, out: Tensor, target: Tensor) -> Tensor:
        """The mean over terms of -log p(target).

        Raises:
            ValueError: Targets are no classes, or ignored ones (below 0), which torch's mean would leave out.
        """
        if target.is_floating_point() or bool((target < 0).any()):
            raise ValueError(
                "targets of CrossEntropy must be classes 0, 1, ...; leave masked rows out of the outputs, or mask them "
                "with Masked(CrossEntropy(), target >= 0)"
            )
        flat = out.movedim(self.axis, -1)
        return F.cross_entropy(flat.reshape(-1, flat.shape[-1]), target.reshape(-1))

    def terms(self, out: Tensor) -> int:
        """Elements of the output over classes."""
        return out.numel() // out.shape[self.axis]

    def sample(self, out: Tensor, generator: torch.Generator) -> Tensor:
        """Draw p - onehot(y), y ~ p."""
        s = self._probabilities(out)
        undefined = s[..., :1].isnan()  # all of a term's p are NaN, or none: they share their sum
        weights = s.nan_to_num_(nan=1.0).reshape(-1, s.shape[-1])  # what multinomial can draw from
        y = torch.multinomial(weights, 1, generator=generator).view(*s.shape[:-1], 1)
        s = s.scatter_add(-1, y, s.new_full((), -1).expand(y.shape)).masked_fill_(undefined, math.nan)
        return s.movedim(-1, self.axis).to(out.dtype)

    def sqrt_hessian(self, out: Tensor) -> Iterator[Tensor]:
        """sqrt(p_c) (e_c - p) for each class c."""
        p = self._probabilities(out)
        for place in _positions(p):
            for c in range(p.shape[-1]):
                unit = p.new_zeros(p.shape[-1])
                unit[c] = 1
                s = torch.zeros_like(p, dtype=out.dtype)
                s[place] = _softmax_root(p[place], unit).to(out.dtype)
                yield s.movedim(-1, self.axis)

    def root(self, out: Tensor, w: Tensor) -> Tensor:
        """sqrt(p) w - p (sqrt(p) . w)."""
        p, axis = self._probabilities(out).clamp(min=_FLOOR), self._from_end(out)
        return _cast(_softmax_root(p, w.movedim(axis, -1)).movedim(-1, axis), out, w)

    def root_t(self, out: Tensor, w: Tensor) -> Tensor:
        """sqrt(p) (w - p . w)."""
        p, axis = self._probabilities(out).clamp(min=_FLOOR), self._from_end(out)
        w = w.movedim(axis, -1)
        return _cast((p.sqrt() * (w - (p * w).sum(-1, keepdim=True))).movedim(-1, axis), out, w)

    def rho(self, out: Tensor, target: Tensor) -> Tensor:
        """(p - onehot(target)) / sqrt(p)."""
        p = self._probabilities(out).clamp(min=_FLOOR)
        return ((p - F.one_hot(target, p.shape[-1]).to(p.dtype)) / p.sqrt()).movedim(-1, self.axis).to(out.dtype)

    def _probabilities(self, out: Tensor) -> Tensor:
        """The probabilities p, classes on the last axis, in at least float32."""
        return wide(out).movedim(self.axis, -1).softmax(-1)

    def _from_end(self, out: Tensor) -> int:
        """The class axis, counted from the end."""
        return self.axis if self.axis < 0 else self.axis - out.dim()


class _Elementwise(ABC):
    """A loss of each element for itself: a term is a vector along the last axis, and S is diagonal.

    An output of one axis is a batch of scalars.
    """

    @abstractmethod
    def _diagonal(self, out: Tensor, floor: float = 0.0) -> Tensor | float:
        """The diagonal of S, in at least float32; ``floor`` is that of p (1 - p)."""

    def terms(self, out: Tensor) -> int:
        """Elements of the output over the last axis."""
        return out.numel() // _width(out)

    def sqrt_hessian(self, out: Tensor) -> Iterator[Tensor]:
        """S_cc e_c for each output c, one position at a time."""
        root = (torch.ones_like(out) * self._diagonal(out)).masked_fill(_undefined(out), math.nan).to(out.dtype)
        if out.dim() < 2:
            yield root
            return
        for place in _positions(out):
            for c in range(out.shape[-1]):
                s = torch.zeros_like(out)
                s[place][..., c] = root[place][..., c]
                yield s

    def root(self, out: Tensor, w: Tensor) -> Tensor:
        """S w, element by element."""
        return _cast(w * self._diagonal(out, _FLOOR), out, w)

    def root_t(self, out: Tensor, w: Tensor) -> Tensor:
        """S^T w, which is S w."""
        return self.root(out, w)


@dataclass(frozen=True)
class SquaredError(_Elementwise):
    """Squared error: l_t = k sum_c (out_c - target_c)^2, the Gaussian with H = 2 k I.

    The draw is sqrt(2 k) times normal noise, the root sqrt(2 k) I. An output of one axis is a batch of scalars.

    Args:
        scale: k; None (default) is 1/C, the mean over the last axis, as ``torch.nn.functional.mse_loss`` takes it.
    """

    scale: float | None = None

    def _k(self, out: Tensor) -> float:
        return 1 / _width(out) if self.scale is None else self.scale

    def _diagonal(self, out: Tensor, floor: float = 0.0) -> float:
        return math.sqrt(2 * self._k(out))

    def value(self, out: Tensor, target: Tensor) -> Tensor:
        """The mean over terms of k sum (out - target)^2.

        Raises:
            ValueError: The shapes differ.
        """
        return (out - _fitting(target, out)).square().sum() * (self._k(out) / self.terms(out))

    def sample(self, out: Tensor, generator: torch.Generator) -> Tensor:
        """sqrt(2 k) e, e ~ N(0, I)."""
        dtype = torch.promote_types(out.dtype, torch.float32)
        noise = torch.randn(out.shape, generator=generator, dtype=dtype, device=out.device)
        return (noise * self._diagonal(out)).masked_fill_(_undefined(out), math.nan).to(out.dtype)

    def rho(self, out: Tensor, target: Tensor) -> Tensor:
        """sqrt(2 k) (out - target)."""
        return (out - _fitting(target, out)) * self._diagonal(out)


@dataclass(frozen=True)
class BinaryCrossEntropy(_Elementwise):
    """Binary cross-entropy with logits, the mean over the last axis: H = diag(p (1 - p)) / C, p = sigmoid(out).

    The draw is (p - y) / sqrt(C) with y ~ Bernoulli(p), so that its covariance is H; the root is diagonal. An output of
    one axis is a batch of scalars.
    """

    def _diagonal(self, out: Tensor, floor: float = 0.0) -> Tensor:
        return _slope(out, floor) / math.sqrt(_width(out))

    def value(self, out: Tensor, target: Tensor) -> Tensor:
        """The mean over all elements.

        Raises:
            ValueError: The shapes differ.
        """
        return F.binary_cross_entropy_with_logits(out, _fitting(target, out))

    def sample(self, out: Tensor, generator: torch.Generator) -> Tensor:
        """(p - y) / sqrt(C), y ~ Bernoulli(p)."""
        p = wide(out).sigmoid()
        y = torch.bernoulli(p.nan_to_num(nan=0.5), generator=generator)
        return ((p - y) / math.sqrt(_width(out))).masked_fill_(_undefined(out), math.nan).to(out.dtype)

    def rho(self, out: Tensor, target: Tensor) -> Tensor:
        """(p - target) / sqrt(C p (1 - p))."""
        gradient = wide(out).sigmoid() - _fitting(target, out)
        return (gradient / _slope(out, _FLOOR) / math.sqrt(_width(out))).to(out.dtype)


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
        return self.loss.sample(out, generator).masked_fill(~self._keep(out), 0)

    def sqrt_hessian(self, out: Tensor) -> Iterator[Tensor]:
        """The columns, 0 at the other terms; columns that are 0 throughout are left out."""
        leave = ~self._keep(out)
        for column in self.loss.sqrt_hessian(out):
            kept = column.masked_fill(leave, 0)
            if bool(kept.any()):
                yield kept

    def root(self, out: Tensor, w: Tensor) -> Tensor:
        """S w, 0 at the other terms."""
        return self.loss.root(out, w).masked_fill(~self._keep(out), 0)

    def root_t(self, out: Tensor, w: Tensor) -> Tensor:
        """S^T w, 0 at the other terms."""
        return self.loss.root_t(out, w).masked_fill(~self._keep(out), 0)

    def rho(self, out: Tensor, target: Tensor) -> Tensor:
        """That of the loss, 0 at the other terms, whose targets may be anything."""
        keep = self._keep(out)
        counts = self.mask if target.shape == self.mask.shape else keep
        return self.loss.rho(out, target.masked_fill(~counts, 0)).masked_fill(~keep, 0)

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


def _softmax_root(p: Tensor, w: Tensor) -> Tensor:
    """(diag(sqrt p) - p sqrt(p)^T) w along the last axis."""
    q = p.sqrt() * w
    return q - p * q.sum(-1, keepdim=True)


def _slope(out: Tensor, floor: float) -> Tensor:
    """sqrt(p (1 - p)), p = sigmoid(out), without the cancellation of 1 - p."""
    out = wide(out)
    return (out.sigmoid() * (-out).sigmoid()).clamp(min=floor).sqrt()


def _cast(product: Tensor, out: Tensor, w: Tensor) -> Tensor:
    """A product in the dtype that ``out`` and ``w`` promote to, whatever it was computed in."""
    return product.to(torch.promote_types(out.dtype, w.dtype))


def _width(out: Tensor) -> int:
    """C, the outputs of one term of an elementwise loss; 1 for a batch of scalars ``[N]``."""
    return out.shape[-1] if out.dim() > 1 else 1


def _undefined(out: Tensor) -> Tensor:
    """Where a term of an elementwise loss has an output that is not finite; broadcasts to ``out``."""
    bad = ~out.isfinite()
    return bad.any(-1, keepdim=True) if out.dim() > 1 else bad


def _fitting(target: Tensor, out: Tensor) -> Tensor:
    """Targets of the outputs' shape, in their dtype.

    Raises:
        ValueError: They have another shape.
    """
    if target.shape != out.shape:
        raise ValueError(
            f"targets of shape {list(target.shape)} do not fit outputs of shape {list(out.shape)}: "
            "make the shapes equal"
        )
    return target.to(out.dtype)


#: Losses by the names that a recipe, a solver's likelihood, a benchmark's problem or a user gives.
LOSSES: dict[str, Loss] = {
    "cross_entropy": CrossEntropy(),
    "mse": SquaredError(),
    "half_mse": SquaredError(0.5),
    "sum_mse": SquaredError(1.0),
    "bce": BinaryCrossEntropy(),
}


@overload
def as_loss(loss: Loss | str) -> Loss: ...
@overload
def as_loss(loss: Loss | str | None) -> Loss | None: ...
def as_loss(loss: Loss | str | None) -> Loss | None:
    """A loss by its name, or itself.

    Raises:
        ValueError: Unknown name; the message lists the valid ones.
    """
    if not isinstance(loss, str):
        return loss
    if loss not in LOSSES:
        raise ValueError(f"loss={loss!r} is unknown; choose one of {', '.join(LOSSES)}, or give an object like them")
    return LOSSES[loss]
