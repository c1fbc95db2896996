"""What all averages of a model's weights share: counting, saving, evaluating; a method adds what it takes at a tick."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from guided_descent.engine.guard import forbid_while_evaluating
from guided_descent.schedules import accepted_steps

from .evaluating import EvaluationSource
from .shadows import Shadows
from .weights import check_names, check_shapes

#: Version of the state dicts.
FORMAT = 1


class Average(ABC):
    """Shadows of a model's weights that follow its accepted steps; a subclass says what a tick takes into them.

    Shadows are kept for the parameters that require grad, in at least ``dtype`` (a float64 weight keeps float64), under
    canonical full names, tied ones once. A frozen parameter has no shadow and is evaluated as it is; one unfrozen later
    joins with the value it has then. Until the first tick the average is the live model itself.

    Args:
        model: the module to average; of sharded parameters (DTensor) each rank averages its own part.
        optimizer: with it, only its accepted steps count (``optimizer.steps``); without, every call of ``update`` does.
        source: averages what this evaluates, such as a schedule-free optimizer; None (default): the live weights.
        dtype: least precision of the shadows, float32 (default) or float64.
        start: accepted steps to let pass before averaging, 0 by default.
        buffers: whether to average floating-point buffers too, for ``evaluating(..., buffers="average")``.

    Raises:
        TypeError: ``optimizer`` does not count its accepted steps, or ``source`` evaluates nothing.
        ValueError: a negative ``start``, or a ``dtype`` in which small updates would be lost.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        optimizer: Optimizer | None = None,
        source: EvaluationSource | None = None,
        dtype: torch.dtype = torch.float32,
        start: int = 0,
        buffers: bool = False,
    ) -> None:
        if dtype not in (torch.float32, torch.float64):
            raise ValueError(f"dtype={dtype}: an average in it would stall; choose torch.float32 or torch.float64")
        if isinstance(start, bool) or not isinstance(start, int) or start < 0:
            raise ValueError(f"start={start!r}: must be a number of steps, at least 0")
        if source is not None and not isinstance(source, EvaluationSource):
            raise TypeError(
                f"source is a {type(source).__name__}, which has no evaluation_weights; pass an optimizer that keeps "
                "an average, or leave source out"
            )
        self.model = model
        self.optimizer = optimizer
        self.source = source
        self.dtype = dtype
        self.start = start
        self.buffers = buffers
        self.steps = 0  # accepted steps since the average was made
        self._seen = 0 if optimizer is None else self._optimizer_steps()

    @abstractmethod
    def _take(self, elapsed: int) -> None:
        """Take the weights into the shadows at a tick that covers the last ``elapsed`` accepted steps."""

    @abstractmethod
    def _sets(self) -> Mapping[str, Shadows]:
        """Return the sets of shadows by what their names begin with in a state dict."""

    @abstractmethod
    def _mean(self, *, buffers: bool) -> Mapping[str, Tensor]:
        """Return the averages of the parameters, or of the buffers, by canonical name."""

    @abstractmethod
    def _settings(self) -> dict[str, float | str]:
        """Return what the user chose, to be compared on loading."""

    @abstractmethod
    def _progress(self) -> dict[str, float]:
        """Return the numbers that a tick needs to continue."""

    @abstractmethod
    def _set_progress(self, progress: Mapping[str, float]) -> None:
        """Take back what ``_progress`` returned."""

    @property
    def started(self) -> bool:
        """Whether the average holds anything yet."""
        return self.steps > self.start

    def update(self) -> None:
        """Take the current weights into the average; call it after every ``optimizer.step()``.

        With ``optimizer`` given, a call after a skipped step does nothing, and one after n accepted steps counts for n.

        Raises:
            RuntimeError: inside ``evaluating``, or the optimizer has gone back to an earlier step.
        """
        self._forbid("update()")
        elapsed = self._elapsed()
        self.steps += elapsed
        if elapsed and self.steps > self.start:
            self._take(min(elapsed, self.steps - self.start))

    def evaluation_weights(self, model: nn.Module) -> Mapping[str, Tensor]:
        """Return the averages by canonical name (empty before the first tick); a running one gives its own shadows.

        Args:
            model: the module that will hold them; it may be a copy of the averaged one, so it is not looked at here.
        """
        return self._mean(buffers=False) if self.started else {}

    def evaluation_buffers(self, model: nn.Module) -> Mapping[str, Tensor]:
        """Return the averaged buffers by canonical name (empty before the first tick).

        Raises:
            ValueError: buffers are not averaged here.
        """
        if not self.buffers:
            raise ValueError(
                f"this {type(self).__name__} does not average buffers; make it with buffers=True, or choose "
                'buffers="live" or the batches to re-estimate them from'
            )
        return self._mean(buffers=True) if self.started else {}

    def state_dict(self) -> dict[str, Any]:
        """Return shadows by canonical name and plain numbers; loads with ``torch.load(weights_only=True)``.

        Raises:
            RuntimeError: inside ``evaluating``.
        """
        self._forbid("state_dict()")
        return {
            "format": FORMAT,
            "kind": type(self).__name__,
            "steps": self.steps,
            "optimizer_steps": self._seen,
            "settings": self._settings(),
            "progress": self._progress(),
            "weights": self._named(buffers=False),
            "buffers": self._named(buffers=True),
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue from a saved average, matched by name; every shadow keeps its exact dtype.

        Nothing is changed when it raises.

        Raises:
            ValueError: another kind of average, other settings, or names, shapes or dtypes that differ (named).
            RuntimeError: inside ``evaluating``.
        """
        self._adopt(state_dict, self._matched(state_dict))

    def _matched(self, state_dict: dict[str, Any]) -> list[tuple[Tensor, Tensor]]:
        """Check a saved average against this one; return its tensors beside the shadows that take them."""
        self._forbid("load_state_dict()")
        what, here = f"the saved {type(self).__name__}", self.state_dict()
        state_dict = {"format": 0} | state_dict  # before formats had numbers
        if state_dict.keys() != here.keys() or state_dict["kind"] != here["kind"]:
            raise ValueError(
                f"not the state of {type(self).__name__}: kind {state_dict.get('kind')!r}, keys {sorted(state_dict)}"
            )
        if state_dict["format"] > FORMAT:
            raise ValueError(f"{what} is of format {state_dict['format']}, this version reads up to {FORMAT}")
        if state_dict["settings"] != here["settings"]:
            raise ValueError(
                f"{what} was made with {state_dict['settings']}, this one with {here['settings']}; make it with the "
                "saved settings, or start a new average"
            )
        pairs: list[tuple[Tensor, Tensor]] = []
        for part in ("weights", "buffers"):
            saved, shadows = state_dict[part], here[part]
            check_names(f"{what} ({part})", saved, shadows)
            check_shapes(what, saved, shadows)
            for name, tensor in saved.items():
                if tensor.dtype != shadows[name].dtype:
                    raise ValueError(
                        f"{what} holds {name!r} in {tensor.dtype}, this one in {shadows[name].dtype}; make it with the "
                        "saved dtype= and the model in the precision it was saved with"
                    )
                pairs.append((shadows[name], tensor))
        return pairs

    @torch.no_grad()
    def _adopt(self, state_dict: dict[str, Any], pairs: list[tuple[Tensor, Tensor]]) -> None:
        """Take over a saved average that fits."""
        for shadow, tensor in pairs:
            shadow.copy_(tensor)
        self.steps = int(state_dict["steps"])
        self._seen = int(state_dict["optimizer_steps"])
        self._set_progress(state_dict["progress"])

    def _named(self, *, buffers: bool) -> dict[str, Tensor]:
        """All shadows, as a state dict names them."""
        return {
            f"{prefix}{name}": shadow
            for prefix, shadows in self._sets().items()
            for name, shadow in shadows.named(buffers=buffers).items()
        }

    def _values(self) -> Mapping[str, Tensor]:
        """What is to be averaged in the place of the live weights, by name."""
        return {} if self.source is None else self.source.evaluation_weights(self.model)

    def _forbid(self, call: str) -> None:
        live = (slot.tensor for shadows in self._sets().values() for slot in shadows.slots)
        forbid_while_evaluating(live, f"{type(self).__name__}.{call}", "call it after the context")

    def _optimizer_steps(self) -> int:
        assert self.optimizer is not None
        steps = accepted_steps(self.optimizer)
        if steps is None:
            raise TypeError(
                f"{type(self.optimizer).__name__} has no 'steps' that counts accepted steps; leave optimizer= out and "
                "call update() after every step that was not skipped"
            )
        return steps

    def _elapsed(self) -> int:
        """Return the accepted steps since the last call."""
        if self.optimizer is None:
            return 1
        now = self._optimizer_steps()
        if now < self._seen:
            raise RuntimeError(
                f"the optimizer is at step {now}, but the average was last updated at its step {self._seen}; "
                "load both from the same checkpoint"
            )
        elapsed, self._seen = now - self._seen, now
        return elapsed


class RunningAverage(Average):
    """An average moved by a <- a + c (w - a); a subclass gives the rate c of each tick. Arguments: see ``Average``."""

    def __init__(
        self,
        model: nn.Module,
        *,
        optimizer: Optimizer | None = None,
        source: EvaluationSource | None = None,
        dtype: torch.dtype = torch.float32,
        start: int = 0,
        buffers: bool = False,
    ) -> None:
        super().__init__(model, optimizer=optimizer, source=source, dtype=dtype, start=start, buffers=buffers)
        self._shadows = Shadows(model, dtype, buffers)

    @abstractmethod
    def _rate(self, elapsed: int) -> float:
        """Return c for a tick that covers ``elapsed`` accepted steps, and advance: first 1; 0 to take nothing."""

    def _take(self, elapsed: int) -> None:
        used = self._holds(elapsed)
        rate = self._rate(elapsed)
        if rate:
            self._shadows.lerp_(rate, used=used, values=self._values())

    def _holds(self, elapsed: int) -> bool:
        """Whether the shadows held something before this tick."""
        return self.steps - elapsed > self.start

    def _sets(self) -> Mapping[str, Shadows]:
        return {"": self._shadows}

    def _mean(self, *, buffers: bool) -> Mapping[str, Tensor]:
        return self._shadows.named(buffers=buffers)
