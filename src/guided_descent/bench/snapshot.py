"""What the checkpoint of a run holds, and how a run takes it up again.

The tree has ``step``, ``evaluated`` (the step of the last evaluation), ``seconds``, ``recent`` (losses since then),
``diverged``, ``metrics_bytes`` and ``metrics_sha256`` (the rows written so far), the state dicts ``model``,
``optimizer`` and ``scheduler``, and ``rng``: the generators of every rank. In format 1 ``rng`` is that of one process
and there is no ``metrics_sha256``.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn
from torch.optim import Optimizer

from guided_descent.bench import environment
from guided_descent.bench.checkpoint import CheckpointError
from guided_descent.bench.ranks import Ranks
from guided_descent.bench.store import METRICS, metrics_fault
from guided_descent.engine import Optimizer as OwnOptimizer

if TYPE_CHECKING:
    from guided_descent.bench.session import Session


def capture(session: Session) -> dict[str, Any]:
    """The tree of a checkpoint; every rank calls it, the lead's is complete."""
    length, checksum = session.writer.sync() if session.writer is not None else (0, "")
    return {
        "step": session.step,
        "evaluated": session.evaluated,
        "seconds": session.seconds,
        "recent": session.recent,
        "diverged": session.diverged,
        "metrics_bytes": length,
        "metrics_sha256": checksum,
        "model": dict(session.model.state_dict()),
        "optimizer": session.optimizer.state_dict(),
        "scheduler": session.scheduler.state_dict(),
        "rng": session.ranks.gather(environment.rng_state()),
    }


def restore(session: Session) -> int:
    """Take up the newest checkpoint that can be used; the number of bytes of the metrics that belong to it."""
    ranks = session.ranks
    latest = session.checkpoints.latest(session.warn, fault_of(session.folder)) if ranks.lead else None
    state = ranks.told(None if latest is None else latest[1])
    if state is None:
        ranks.seed(session.config.seed, 0)
        return 0
    session.step, session.evaluated, session.seconds = state["step"], state["evaluated"], state["seconds"]
    session.recent, session.diverged = state["recent"], state["diverged"]
    check_order(session.model, session.optimizer, list(state["model"]))
    session.model.load_state_dict(state["model"])
    session.optimizer.load_state_dict(state["optimizer"])
    session.scheduler.load_state_dict(state["scheduler"])
    _restore_generators(state["rng"] if isinstance(state["rng"], list) else [state["rng"]], session, ranks)
    return int(state["metrics_bytes"])


def _restore_generators(states: list[dict[str, Any]], session: Session, ranks: Ranks) -> None:
    if ranks.rank < len(states):
        environment.set_rng_state(states[ranks.rank])
    else:
        ranks.seed(session.config.seed, session.step)
    if len(states) != ranks.size:
        session.warn(
            f"{len(states)} {'rank' if len(states) == 1 else 'ranks'} wrote the checkpoint of step {session.step} and "
            f"the run goes on with {ranks.size}: sums are rounded in another order, so it continues closely and not "
            "bit for bit"
        )


def fault_of(folder: Path) -> Callable[[Any], str | None]:
    """Says why a tree does not continue what a run's folder holds, or None."""

    def fault(state: Any) -> str | None:
        return metrics_fault(folder / METRICS, state["metrics_bytes"], state.get("metrics_sha256"))

    return fault


def check_order(model: nn.Module, optimizer: Optimizer, saved: list[str]) -> None:
    """Torch's optimizers match state by position: refuse a model whose tensors stand in another order than the saved.

    Raises:
        CheckpointError: They do, and the optimizer does not go by names; or the model has other tensors.
    """
    here = list(model.state_dict())
    given = {name for group in optimizer.param_groups for name in group.get("param_names", ())}
    by_name = isinstance(optimizer, OwnOptimizer) and given <= set(here)
    if here == saved or (by_name and set(here) == set(saved)):
        return
    pairs = zip([*here, "nothing"], [*saved, "nothing"])
    mine, theirs = next(pair for pair in pairs if pair[0] != pair[1])
    why = f", and {type(optimizer).__name__} matches state by position" if set(here) == set(saved) else ""
    raise CheckpointError(
        f"the model has changed since the checkpoint was written: it has {mine} in the place of {theirs}{why}; "
        "restore the model or start the run afresh"
    )
