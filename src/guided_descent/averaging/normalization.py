"""Running statistics of normalisation layers: which modules have them, and how they are measured afresh."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm, _NormBase


def tracking_norms(model: nn.Module) -> dict[str, _NormBase]:
    """Return the modules that evaluate with running statistics (BatchNorm, tracking InstanceNorm), by name."""
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, _NormBase) and module.running_mean is not None
    }


@torch.no_grad()
def reestimate(model: nn.Module, norms: Iterable[_NormBase], batches: Iterable[Any]) -> None:
    """Replace running statistics by their average over ``batches``, each batch weighted equally.

    Normalisation layers run in training mode and all others in evaluation mode, so dropout, which is off when the
    statistics are used, does not disturb them. Modes and momenta are restored; the new statistics stay.

    Args:
        model: called with each batch: ``model(x)`` for a tensor x, ``model(batch[0])`` for a tuple or list (inputs
            first), ``model(**batch)`` for a mapping.
        norms: the layers to measure.
        batches: at least one batch.

    Raises:
        ValueError: there are no batches.
        TypeError: a batch is neither a tensor, a tuple or list, nor a mapping.
    """
    norms = list(norms)
    modes = [(module, module.training) for module in model.modules()]
    momenta = [norm.momentum for norm in norms]
    count = 0
    try:
        model.eval()
        for norm in norms:
            norm.reset_running_stats()
            norm.train()
        for count, batch in enumerate(batches, start=1):
            for norm in norms:
                # momentum None is BatchNorm's own cumulative average, right even when a layer is called twice in a
                # forward pass; InstanceNorm reads None as 0
                norm.momentum = None if isinstance(norm, _BatchNorm) else 1 / count
            _forward(model, batch)
    finally:
        for norm, momentum in zip(norms, momenta, strict=True):
            norm.momentum = momentum
        for module, training in modes:
            module.training = training
    if not count:
        raise ValueError("buffers: no batches to estimate the statistics from; an iterator may be used up, pass a list")


def _forward(model: nn.Module, batch: Any) -> None:
    if isinstance(batch, Tensor):
        model(batch)
    elif isinstance(batch, Mapping):
        model(**batch)
    elif isinstance(batch, Sequence) and batch and not isinstance(batch, str):
        model(batch[0])
    else:
        raise TypeError(
            f"buffers: a batch is a {type(batch).__name__}; give tensors, tuples or lists with the inputs first, or "
            "mappings of the model's arguments"
        )
