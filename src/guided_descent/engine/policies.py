"""What happens on gradients that are not finite, or that a part refuses: the step is skipped, raises, or goes on."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from guided_descent.linalg.workspace import Workspace

POLICIES = ("skip", "raise", "ignore")
#: Steps skipped in a row before ``skip`` gives up.
PATIENCE = 25
_SMALL = 32_768
_CHUNK = 262_144


class NonFiniteError(RuntimeError):
    """A gradient holds NaN or infinity and the policy does not let it pass."""


class RefusedError(RuntimeError):
    """A part has refused so many steps in a row that training stands still."""


def all_finite(gradients: Sequence[Tensor], work: Workspace) -> bool:
    """Whether no element is NaN or infinite.

    One pass that sums: small tensors are first gathered, so that a thousand of them cost one reduction. A sum that
    overflows although every element is finite is confirmed element by element before it counts.
    """
    gathered: dict[tuple[torch.dtype, torch.device], list[Tensor]] = {}
    sums: list[Tensor] = []
    for g in gradients:
        g = torch.view_as_real(g) if g.is_complex() else g
        if g.numel() <= _SMALL:
            gathered.setdefault((g.dtype, g.device), []).append(g.reshape(-1))
        else:
            sums.append(_sum(g))
    for small in gathered.values():
        for piece in _chunks(small):
            flat = work.take("finite", (sum(map(Tensor.numel, piece)),), piece[0].dtype, piece[0].device)
            sums.append(_sum(torch.cat(piece, out=flat)))
    by_device: dict[torch.device, list[Tensor]] = {}
    for value in sums:
        by_device.setdefault(value.device, []).append(value.double())
    if all(bool(torch.isfinite(torch.stack(values).sum())) for values in by_device.values()):
        return True
    return not culprits(gradients)


def culprits(gradients: Sequence[Tensor]) -> list[int]:
    """Indices of the tensors that hold a NaN or an infinity."""
    return [i for i, g in enumerate(gradients) if not bool(torch.isfinite(g).all())]


def _chunks(tensors: Sequence[Tensor]) -> Iterator[list[Tensor]]:
    """Runs of tensors with about ``_CHUNK`` elements, so that gathering them needs little scratch."""
    piece: list[Tensor] = []
    numel = 0
    for tensor in tensors:
        piece.append(tensor)
        numel += tensor.numel()
        if numel >= _CHUNK:
            yield piece
            piece, numel = [], 0
    if piece:
        yield piece


def _sum(g: Tensor) -> Tensor:
    return g.sum(dtype=torch.float32) if g.dtype in (torch.float16, torch.bfloat16) else g.sum()
