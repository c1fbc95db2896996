"""Scratch memory that is allocated once and used again: a step must not allocate what it throws away."""

from __future__ import annotations

import math

import torch
from torch import Tensor


class Workspace:
    """Named scratch tensors that grow to the largest request and are reused, never freed, between steps.

    A tensor from ``take`` is valid until the next ``take`` with the same tag. Contents are undefined.

    Example:
        >>> work = Workspace()
        >>> a = work.take("gram", (4, 4), torch.float32, torch.device("cpu"))
        >>> b = work.take("gram", (2, 2), torch.float32, torch.device("cpu"))
        >>> a.data_ptr() == b.data_ptr(), work.nbytes
        (True, 64)
    """

    def __init__(self) -> None:
        self._flat: dict[tuple[str, torch.dtype, torch.device], Tensor] = {}

    def take(self, tag: str, shape: tuple[int, ...] | torch.Size, dtype: torch.dtype, device: torch.device) -> Tensor:
        """An uninitialised contiguous tensor of this shape; requests with equal tag, dtype and device share memory."""
        numel = math.prod(shape)
        flat = self._flat.get((tag, dtype, device))
        if flat is None or flat.numel() < numel:
            flat = torch.empty(numel, dtype=dtype, device=device)
            self._flat[(tag, dtype, device)] = flat
        return flat[:numel].view(shape)

    @property
    def nbytes(self) -> int:
        """Bytes held."""
        return sum(flat.numel() * flat.element_size() for flat in self._flat.values())
