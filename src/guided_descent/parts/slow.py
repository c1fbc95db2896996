"""What parts with slow work share: the group keys that say when it is redone."""

from __future__ import annotations

from dataclasses import dataclass

from guided_descent.parts.base import Hyper, Part, Policy, key


@dataclass(frozen=True)
class Slow(Part):
    """A part whose tasks (factorisations, say) are redone as the group says.

    Fields name group keys: ``frequency``: steps between refreshes; ``schedule``: ``staggered`` by cost or ``every``
    task at once; ``tolerance``: drift up to which a refresh is skipped; ``lag``: 0, or the number of steps after which
    work that was started on a background thread is used.
    """

    frequency: str = key("precondition_frequency")
    schedule: str = key("refresh_schedule")
    tolerance: str = key("refresh_tolerance")
    lag: str = key("refresh_lag")

    def policy(self, h: Hyper) -> Policy:
        """When its tasks are redone.

        Raises:
            ValueError: Work that is started would not land before it is due again.
        """
        period, lag = int(h[self.frequency]), int(h[self.lag])
        if lag >= period > 0:
            raise ValueError(f"{self.lag}={lag} must be below the {self.frequency} of {period}, or 0")
        return Policy(period, h[self.schedule] == "staggered", h[self.tolerance], lag)
