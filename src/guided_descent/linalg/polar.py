"""The polar factor U Vᵀ of a batch of matrices: by Newton-Schulz polynomials, or exactly."""

from __future__ import annotations

import math
from functools import lru_cache

import torch
from torch import Tensor
from torch._compile import _disable_dynamo

from guided_descent.linalg.coefficients import COEFFICIENTS, TURBO, table
from guided_descent.linalg.minimax import Triple, cheapest
from guided_descent.linalg.newton_schulz import Iteration, rescale, textbook
from guided_descent.linalg.workspace import Workspace

METHODS = ("auto", "standard", "symmetric", "gram")

# Computed schedules: singular values above this part of the Frobenius norm end this close to 1. "fast" is the least
# that is nowhere worse than the classic five steps, which reach [0.68, 1.21] above 0.003 and have a slope of 485 at 0.
COMPUTED = {"adaptive": (1e-3, 0.15), "fast": (1.85e-3, 0.18)}

NAMES = (*COMPUTED, "exact", *sorted([*COEFFICIENTS, TURBO.name]))  # what ``coefficients`` may be


@_disable_dynamo
@torch.no_grad()
def polar(
    x: Tensor,
    *,
    coefficients: str = "polar_express",
    steps: int | None = None,
    dtype: torch.dtype | None = None,
    eps: float | None = None,
    out: Tensor | None = None,
    work: Workspace | None = None,
    method: str = "auto",
) -> Tensor:
    """The polar factor U Vᵀ of X = U S Vᵀ, for each matrix of a batch; opaque to ``torch.compile``.

    A polynomial p is applied to the singular values of X / ‖X‖_F, one step aX + (bG + cG²)X with G = XXᵀ at a time;
    the result is U p(S/‖X‖_F) Vᵀ with p close to 1. It does not depend on the scale of X, and is 0 for X = 0.

    Args:
        x: Matrices [..., m, n], float16, bfloat16, float32 or float64.
        coefficients: A name of ``COEFFICIENTS``; or ``"adaptive"``: the fewest products that bring every singular value
            above ‖X‖_F / 1000 into [0.85, 1.15], given the measured ‖X‖_S8 (on the CPU; elsewhere reading it would
            stall the device, and the worst case is taken); or ``"fast"``: the same for ‖X‖_F / 540 and [0.82, 1.18],
            still closer to orthogonal than the classic coefficients; or ``"exact"``: a singular value decomposition
            in float64; or ``"turbo"``: AOL first scales the rows (of a tall matrix the columns) by 1 / √(Σ_j |G_ij|),
            which brings ‖X‖₂ close below 1, so that four steps do. They bring singular values above 0.02 into
            [0.94, 1.05] and approach U Vᵀ of the rescaled matrix, which is that of X where its rows are alike. Ranges
            are those of exact arithmetic; bfloat16 adds up to 0.03.
        steps: Number of steps; None is the table's own.
        dtype: Dtype of the iteration; None is bfloat16 where the device multiplies it natively, else float32, and
            float64 for float64 input.
        eps: None makes the norm relative (any scale works); a number is the lower bound of the norm that X is divided
            by, as in ``torch.optim.Muon``. ``"turbo"`` undoes any such factor and takes None alone.
        out: Where to write the result, of x's shape; may be ``x``.
        work: Scratch memory to use again.
        method: ``"auto"`` takes the cheaper of ``"symmetric"`` (half of each symmetric product) and ``"gram"``
            (iterates on the r × r Gram matrix); ``"standard"`` is the textbook's sequence of operations, bit for bit
            ``torch.optim.Muon``'s with coefficients ``"jordan"``, bfloat16 and eps 1e-7.

    Returns:
        ``out``, or a new tensor of x's shape and dtype. A matrix with a non-finite element gives NaN.

    Raises:
        ValueError: An unknown name, an impossible shape, dtype or number of steps.

    Source:
        Jordan et al. 2024, the Muon post; Amsel, Persson, Musco, Gower 2025, arXiv:2505.16932.

    Example:
        >>> polar(torch.tensor([[3.0, 0.0], [0.0, 4.0]]), coefficients="exact").tolist()
        [[1.0, 0.0], [0.0, 1.0]]
    """
    _check(x, dtype, eps, out, method)
    plan = None if coefficients == "exact" or coefficients in COMPUTED else table(coefficients)
    if plan is None and steps is not None:
        raise ValueError(f"steps={steps!r} has no meaning with coefficients={coefficients!r}; leave it None")
    rescaled = plan is not None and plan.rescaled
    if rescaled and eps is not None:
        raise ValueError(f"eps={eps!r} has no meaning with coefficients={coefficients!r}; leave it None")
    out = torch.empty_like(x) if out is None else out
    if x.numel() == 0:
        return out
    if coefficients == "exact":
        return out.copy_(_exact(x))
    promise = COMPUTED.get(coefficients, (0.0, 0.0))
    triples = plan.take(steps) if plan else cheapest(*promise).triples
    safety = plan.safety if plan else 1.0
    dtype = dtype or _auto_dtype(x)
    work = Workspace() if work is None else work
    if method == "standard":
        return _standard(x, triples, safety, dtype, eps, out, rescaled)
    if x.device.type == "cpu":
        _each(x, out, triples, None if plan or eps else promise, safety, dtype, eps, work, method, rescaled)
        return out
    return _batch(x, out, triples, safety, dtype, eps, work, method, rescaled)


def _batch(
    x: Tensor,
    out: Tensor,
    triples: tuple[Triple, ...],
    safety: float,
    dtype: torch.dtype,
    eps: float | None,
    work: Workspace,
    method: str,
    rescaled: bool = False,
) -> Tensor:
    """All matrices at once, without reading a number from the device."""
    wide = torch.promote_types(x.dtype, torch.float32)
    norm = (_norm(x) * safety).clamp_min(torch.finfo(wide).tiny if eps is None else eps).to(wide)
    y = work.take("polar.x", (math.prod(x.shape[:-2]), *x.shape[-2:]), dtype, x.device)
    y.view(x.shape).copy_(torch.div(x, norm, out=out) if out.dtype == x.dtype else x / norm)
    run = Iteration(y, work)
    if rescaled:
        run.rescale()
    return out.copy_(run.run(triples, method).view(x.shape))


def _each(
    x: Tensor,
    out: Tensor,
    triples: tuple[Triple, ...],
    promise: tuple[float, float] | None,
    safety: float,
    dtype: torch.dtype,
    eps: float | None,
    work: Workspace,
    method: str,
    rescaled: bool,
) -> None:
    """On the CPU one matrix at a time: its scratch stays in the cache, and reading a norm costs nothing."""
    if x.ndim > 2:
        for row, target in zip(x, out):
            _each(row, target, triples, promise, safety, dtype, eps, work, method, rescaled)
        return
    norm = float(_norm(x))
    if norm == 0.0 or not math.isfinite(norm):
        out.fill_(0.0 if norm == 0.0 else math.nan)
        return
    scale = 1.0 / max(norm * safety, eps or 0.0)
    y = work.take("polar.x", x.shape, dtype, x.device)
    # Scaled before the cast: bfloat16 then rounds c x as it rounds x, and the result does not depend on the scale.
    if out.dtype == x.dtype and 1e-30 < scale < 1e30:
        y.copy_(torch.mul(x, scale, out=out))
    else:
        y.copy_(x.double() * scale)
    run = Iteration(y, work)
    if promise:
        triples, run.top = _adapt(run.square(), *promise)
    elif rescaled:
        run.rescale()
    direct = out if out.dtype == dtype and out.is_contiguous() else None
    result = run.run(triples, method, direct)
    if result is not out:
        out.copy_(result)


def _adapt(square: Tensor, lower: float, tolerance: float) -> tuple[tuple[Triple, ...], float]:
    """The cheapest schedule for a matrix of Frobenius norm 1 whose (XXᵀ)² is given, and a bound of its spectral norm.

    ‖X‖_S8 = ‖(XXᵀ)²‖_F^(1/4) bounds ‖X‖₂ from above, far tighter than the Frobenius norm does, and costs nothing.
    """
    bound = float(torch.linalg.vector_norm(square, dtype=torch.promote_types(square.dtype, torch.float32))) ** 0.25
    bound = min(max(bound, 1e-2), 1.0)
    eighths = math.floor(-8.0 * math.log2(bound))  # few distinct schedules, so that each is computed once
    (a, b, c), *rest = cheapest(lower * 2.0 ** (eighths / 8.0), tolerance).triples
    return ((a / bound, b / bound**3, c / bound**5), *rest), bound


def _standard(
    x: Tensor,
    triples: tuple[Triple, ...],
    safety: float,
    dtype: torch.dtype,
    eps: float | None,
    out: Tensor,
    rescaled: bool,
) -> Tensor:
    """The textbook's operations; with an absolute eps also torch's norm, taken after the cast."""
    if x.ndim > 2 and x.device.type == "cpu":
        for row, target in zip(x, out):
            _standard(row, triples, safety, dtype, eps, target, rescaled)
        return out
    if eps is None:
        norm = (_norm(x) * safety).clamp_min(torch.finfo(torch.float32).tiny)
        y = (x.to(norm.dtype) / norm).to(dtype)
    else:
        y = x.to(dtype)
        y = y / torch.linalg.vector_norm(y, dim=(-2, -1), keepdim=True).mul_(safety).clamp_(min=eps)
    flat = y if y.ndim == 2 else y.flatten(0, -3)
    flat = rescale(flat) if rescaled else flat
    return out.copy_(textbook(flat, triples).reshape(x.shape))


def _norm(x: Tensor) -> Tensor:
    """Frobenius norm of each matrix [..., 1, 1], in float32 at least and without overflow or underflow."""
    wide = torch.float32 if x.device.type == "mps" else torch.float64
    if x.device.type == "cpu":
        narrow = torch.promote_types(x.dtype, torch.float32)
        norm: Tensor = torch.linalg.vector_norm(x, dim=(-2, -1), keepdim=True, dtype=narrow)
        if bool(((norm > 1e-15) & (norm < 1e15)).all()):
            return norm
    norm = torch.linalg.vector_norm(x, dim=(-2, -1), keepdim=True, dtype=wide)
    return norm


def _exact(x: Tensor) -> Tensor:
    """U Vᵀ over the non-zero singular values: a partial isometry where X is rank-deficient, 0 for X = 0."""
    wide = x.to(torch.float64)
    try:
        u, s, vh = torch.linalg.svd(wide, full_matrices=False)
    except torch.linalg.LinAlgError:  # type: ignore[attr-defined]  # the transpose takes another path
        vt, s, uh = torch.linalg.svd(wide.mT, full_matrices=False)
        u, vh = uh.mT, vt.mT
    floor = s.amax(-1, keepdim=True) * max(x.shape[-2:]) * torch.finfo(wide.dtype).eps
    factor: Tensor = (u * (s > floor).unsqueeze(-2)) @ vh
    return factor


def _auto_dtype(x: Tensor) -> torch.dtype:
    if x.dtype == torch.float64:
        return torch.float64
    return torch.bfloat16 if _fast_bfloat16(x.device.type) else torch.float32


@lru_cache(maxsize=8)
def _fast_bfloat16(device: str) -> bool:
    """Whether this kind of device multiplies bfloat16 natively."""
    if device == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    if device == "cpu":
        probe = getattr(torch.cpu, "_is_avx512_bf16_supported", None)
        return bool(probe and probe())
    return device == "xpu"


def _check(x: Tensor, dtype: torch.dtype | None, eps: float | None, out: Tensor | None, method: str) -> None:
    floats = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
    if x.ndim < 2 or x.dtype not in floats:
        raise ValueError(f"x has shape {tuple(x.shape)} and dtype {x.dtype}; it must be real matrices [..., m, n]")
    if dtype is not None and dtype not in floats:
        raise ValueError(f"dtype={dtype} is no dtype to iterate in; choose one of None, {', '.join(map(str, floats))}")
    if eps is not None and not eps > 0.0:
        raise ValueError(f"eps={eps!r} must be positive; None makes the norm relative")
    if out is not None and (out.shape != x.shape or out.device != x.device):
        raise ValueError(
            f"out has shape {tuple(out.shape)} on {out.device}; it must match x: {tuple(x.shape)} on {x.device}"
        )
    if method not in METHODS:
        raise ValueError(f"method={method!r} is unknown; choose one of {', '.join(METHODS)}")
