"""Together: several schedules as one, for frameworks that take one scheduler."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.optim.lr_scheduler import LRScheduler

from .schedule import FORMAT, Schedule


class Together(LRScheduler):
    """Several schedules of one optimizer that step, save and load as one; the first one's numbers are shown.

    Args:
        schedules: one for each number that is driven; the learning rate's first.

    Raises:
        TypeError: something else than schedules.
        ValueError: none, of different optimizers, or two for one number.

    Example:
        >>> import torch
        >>> from guided_descent.schedules import Schedule, curves
        >>> opt = torch.optim.SGD([torch.nn.Parameter(torch.zeros(2))], lr=1.0, momentum=0.9)
        >>> decay = Schedule(opt, curves.linear(4))
        >>> warm = Schedule(opt, curves.warmup(2, floor=0.5), key="momentum")
        >>> sched = Together(decay, warm)
        >>> opt.step()
        >>> sched.step()
        >>> opt.param_groups[0]["lr"], opt.param_groups[0]["momentum"]
        (0.75, 0.9)
    """

    def __init__(self, *schedules: Schedule) -> None:  # LRScheduler.__init__ is left out, as in Schedule
        for schedule in schedules:
            if not isinstance(schedule, Schedule):
                raise TypeError(f"Together takes schedules, not a {type(schedule).__name__}")
        labels = [schedule.label for schedule in schedules]
        if len({id(schedule.optimizer) for schedule in schedules}) != 1 or len(set(labels)) < len(labels):
            raise ValueError(
                f"Together takes one schedule for each number of one optimizer, not {len(labels)} for {labels}"
            )
        self.schedules = schedules
        self.optimizer = schedules[0].optimizer
        self._step_count = 0  # Accelerate writes to it

    @property
    def last_epoch(self) -> int:  # type: ignore[override]  # kept in one place: the schedules
        """Accepted optimizer steps so far."""
        return self.schedules[0].steps

    @property
    def base_lrs(self) -> list[float | Tensor]:  # type: ignore[override]  # kept in one place: the groups
        """Copies of the peaks of the first schedule, one per group."""
        return self.schedules[0].base_lrs

    def step(self, epoch: int | None = None) -> None:
        """Set the numbers for the next optimizer step; call it after ``optimizer.step()``, as often as you like."""
        self._step_count += 1
        for schedule in self.schedules:
            schedule.step(epoch)

    def finish(self) -> None:
        """Check every schedule at the end of training, see ``Schedule.finish``."""
        for schedule in self.schedules:
            schedule.finish()

    def get_lr(self) -> list[float | Tensor]:
        """Return what the first schedule sets at the current position."""
        return self.schedules[0].get_lr()

    def get_last_lr(self) -> list[float | Tensor]:
        """Return copies of what the first schedule last set, one per group."""
        return self.schedules[0].get_last_lr()

    def state_dict(self) -> dict[str, Any]:
        """Return the states of the schedules: numbers and strings only."""
        return {"format": FORMAT, "schedules": [schedule.state_dict() for schedule in self.schedules]}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue from a saved position, see ``Schedule.load_state_dict``.

        Raises:
            ValueError: another number of schedules, or one that does not fit.
        """
        saved = state_dict.get("schedules")
        if not isinstance(saved, list) or len(saved) != len(self.schedules):
            count = f"{len(saved)} schedules" if isinstance(saved, list) else f"the keys {sorted(state_dict)}"
            raise ValueError(f"not the state of {len(self.schedules)} schedules together: it has {count}")
        for schedule, state in zip(self.schedules, saved):
            schedule._check_state(state)
        for schedule, state in zip(self.schedules, saved):
            schedule.load_state_dict(state)
