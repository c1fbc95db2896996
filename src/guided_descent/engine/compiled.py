"""Compiled mode: the parts of a slice as one graph, with every number that may change as a tensor.

Learning rate, decay, betas and step enter as 0-d tensors, so that a schedule needs no new graph. The first two updates
of a slice, where state begins, and its refreshes stay eager: they happen rarely and call solvers. Elementwise slices of
one form share a graph, whatever the names of their parameters.
"""

from __future__ import annotations

import functools
import types
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from guided_descent.engine.buckets import Slice
from guided_descent.linalg.workspace import Workspace
from guided_descent.parts.base import WRITERS, Batch, Part
from guided_descent.parts.rows import Rows


class _Inside(Workspace):
    """Inside a graph the compiler plans memory itself; what a graph leaves out uses the engine's scratch."""

    def __init__(self, outside: Workspace) -> None:
        super().__init__()
        self.outside = outside

    def take(self, tag: str, shape: tuple[int, ...] | torch.Size, dtype: torch.dtype, device: torch.device) -> Tensor:
        if torch.compiler.is_compiling():
            return torch.empty(shape, dtype=dtype, device=device)
        return self.outside.take(tag, shape, dtype, device)


class Compiled:
    """Compiles the parts for each form of slices once and runs them.

    Args:
        work: The engine's scratch, for what a graph leaves out.
        backend: Backend of ``torch.compile``.
    """

    def __init__(self, work: Workspace, backend: str | Callable[..., Any] = "inductor") -> None:
        self.work = work
        self.backend = backend
        self._graphs: dict[Any, Callable[..., dict[str, Any]]] = {}  # by the form of the slice
        self._tensors: dict[tuple[str, int, torch.device], Tensor] = {}

    def run(
        self, piece: Slice, parts: tuple[Part, ...], x: Batch, w: Rows, h: Mapping[str, Any], step: int
    ) -> dict[str, Any]:
        """Run the parts on a slice; returns the events that they counted."""
        form = piece.form
        if form not in self._graphs:
            self._graphs[form] = self._compile(piece)
        device = piece.bucket.device
        numbers = {key: self._tensor(key, h[key], device) for key in self._keys(parts) if key in h}
        numbers["step"] = self._number("step", 0, step, device)
        state = {name: _rows(value) if isinstance(value, Rows) else value for name, value in piece.state.items()}
        probed = None if x.probed is None else _rows(x.probed)
        with torch.compiler.set_stance("default"):  # a model that is being read runs eagerly, the update need not
            return self._graphs[form](parts, _rows(x.g), probed, _rows(w), state, numbers)

    def _compile(self, piece: Slice) -> Callable[..., dict[str, Any]]:
        outside = self.work
        before = piece.bucket.parts.before

        def run(
            parts: tuple[Part, ...],
            g: list[Tensor],
            probed: list[Tensor] | None,
            w: list[Tensor],
            state: dict[str, Any],
            h: dict[str, Any],
        ) -> dict[str, Any]:
            rows = {name: Rows(value, loop=True) if isinstance(value, list) else value for name, value in state.items()}
            written = Rows(w, loop=True)
            work = _Inside(outside)
            x = Batch(
                g=Rows(g, loop=True),
                p=lambda: written,
                blocks=piece.blocks,
                scratch=lambda tag: piece.fresh(work, tag),
                step=h["step"],
                first=False,
                work=work,
                probed=None if probed is None else Rows(probed, loop=True),
            )
            for part in parts:
                if part.where in WRITERS and x.w is None:
                    x.w = written
                    x.before = piece.fresh(work, "before").copy_(written) if before else None
                part.update(x, rows, h, {})
            return x.ticks

        # Dynamo counts recompilations by code object: each form gets one of its own.
        code = run.__code__.replace(co_name=f"run_{len(self._graphs)}")
        own = types.FunctionType(code, run.__globals__, code.co_name, run.__defaults__, run.__closure__)
        compiled: Callable[..., dict[str, Any]] = torch.compile(own, backend=self.backend, dynamic=False)
        return compiled

    def _tensor(self, key: str, value: Any, device: torch.device) -> Any:
        if isinstance(value, tuple | list) and all(isinstance(v, float | int | Tensor) for v in value):
            return tuple(self._number(key, i, v, device) for i, v in enumerate(value))
        if isinstance(value, float | Tensor):
            return self._number(key, 0, value, device)
        return value

    def _number(self, key: str, i: int, value: float | Tensor, device: torch.device) -> Tensor:
        place = (key, i, device)
        if place not in self._tensors:
            dtype = torch.float64 if device.type == "cpu" else torch.float32
            self._tensors[place] = torch.zeros((), dtype=dtype, device=device)
        number = self._tensors[place]
        return number.copy_(value.reshape(())) if isinstance(value, Tensor) else number.fill_(value)

    @staticmethod
    @functools.cache
    def _keys(parts: tuple[Part, ...]) -> frozenset[str]:
        return frozenset(key for part in parts for key in part.keys) | {"peak_lr", "initial_lr"}


def _rows(rows: Rows) -> list[Tensor]:
    """The tensors; scalars as one element: graphs of torch 2.13 lose what is written to 0-d float64 inputs."""
    return [row if row.ndim else row.view(1) for row in rows.list]
