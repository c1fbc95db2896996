"""The tap on a model's output: it is handed over at the end of each forward pass that counts, while armed."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from guided_descent.capture.tap import _EAGER, _Hook, _output, _recording, unwrap


class OutputTap:
    """Calls back with the output of a model, with its graph, and costs nothing while it is not armed.

    What counts as a forward, what is taken for the output and what becomes of ``torch.compile`` while it is armed is as
    in ``Capture``.

    Args:
        model: the root module; DistributedDataParallel and compiled wrappers are looked through.
        callback: called with the output.

    Example:
        >>> import torch
        >>> net = nn.Linear(2, 3)
        >>> tap = OutputTap(net, lambda out: print(list(out.shape)))
        >>> tap.arm()
        >>> _ = net(torch.ones(5, 2))
        [5, 3]
        >>> tap.disarm()
        >>> _ = net(torch.ones(5, 2))
    """

    def __init__(self, model: nn.Module, callback: Callable[[Tensor], None]) -> None:
        self.root = unwrap(model)
        self.callback = callback
        self._handle: RemovableHandle | None = None

    def arm(self) -> None:
        """Listen from now on, until ``disarm``."""
        if self._handle is None:
            self._handle = self.root.register_forward_hook(_Hook(weakref.ref(self), "_close"))
            _EAGER.enter()

    def disarm(self) -> None:
        """Stop listening."""
        if self._handle is not None:
            self._handle.remove()
            self._handle = None
            _EAGER.leave()

    def __del__(self) -> None:
        self.disarm()

    def _close(self, module: nn.Module, args: Any, output: Any) -> None:
        if _recording() and (out := _output(output)).requires_grad:
            self.callback(out)
