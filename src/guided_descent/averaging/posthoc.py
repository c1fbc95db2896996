"""Post-hoc averages: snapshots of two power-function averages, from which one of any width is made after training."""

from __future__ import annotations

import math
import os
import secrets
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from guided_descent.schedules.curves import check_steps

from .evaluating import EvaluationSource
from .power import FORMAT, PowerEMA, exponent_of, gamma_to_sigma
from .swa import crossed
from .weights import check_names, full, is_writer

Snapshot: TypeAlias = Mapping[str, Any] | str | os.PathLike[str]
_RCOND = 1e-12
_POOR = 0.05


@dataclass(frozen=True, eq=False)
class Synthesis:
    """An average made of snapshots; a source for ``evaluating`` and ``export``.

    Attributes:
        weights: The average by canonical name.
        buffers: The averaged buffers, where the snapshots have any.
        coefficients: What each snapshot was multiplied by; they add up to 1.
        error: Distance of the profile that was made from the one that was wanted, relative to the latter's norm.
    """

    weights: Mapping[str, Tensor]
    buffers: Mapping[str, Tensor]
    coefficients: tuple[float, ...]
    error: float

    def evaluation_weights(self, model: nn.Module) -> Mapping[str, Tensor]:
        """Return the average by canonical name."""
        return self.weights

    def evaluation_buffers(self, model: nn.Module) -> Mapping[str, Tensor]:
        """Return the averaged buffers by canonical name.

        Raises:
            ValueError: the snapshots hold none.
        """
        if not self.buffers:
            raise ValueError(
                'these snapshots hold no buffers; choose buffers="live" or the batches to re-estimate from'
            )
        return self.buffers


@torch.no_grad()
def synthesize(
    snapshots: Iterable[Snapshot],
    *,
    sigma: float | None = None,
    gamma: float | None = None,
    at: int | None = None,
    dtype: torch.dtype = torch.float32,
) -> Synthesis:
    """Make the power-function average of another width, or of an earlier time, out of snapshots.

    The combination sum_i x_i p_i of the snapshots' profiles p_i(s) = (g_i+1) s^g_i / t_i^(g_i+1) that is nearest to the
    wanted profile in the mean square: A x = b with A_ij = <p_i, p_j> and b_i = <p_i, p>, then x / sum(x). Snapshots
    given as paths are read one at a time.

    Args:
        snapshots: what ``PowerEMA.snapshot()`` returned, or files of it.
        sigma: relative width of the average to make.
        gamma: its exponent, in place of ``sigma``.
        at: accepted steps that it is over; None (default): those of the last snapshot.
        dtype: of the result; sums are taken in float64.

    Raises:
        ValueError: no snapshots, such that do not belong together, or a number out of range.

    Source: Karras et al. 2023, arXiv:2312.02696.
    """
    wanted, kept = exponent_of(sigma, gamma), list(snapshots)
    profiles = [_profile(_read(snapshot)) for snapshot in kept]
    if not profiles:
        raise ValueError("there are no snapshots to make an average from; take some with snapshot()")
    last = max(ticks for ticks, _ in profiles)
    at = last if at is None else check_steps("at", at)
    if at > last:
        raise ValueError(f"at={at} lies after the last snapshot, which is over {last} steps")
    x, error = coefficients(profiles, (at, wanted))
    if error > _POOR:
        warnings.warn(
            f"sigma={gamma_to_sigma(wanted):.4g} at {at} steps is met to {error:.1%} only by {len(kept)} snapshots: "
            "take them more often, or choose a width nearer to those that were tracked",
            RuntimeWarning,
            stacklevel=2,
        )
    sums: dict[str, dict[str, Tensor]] = {"weights": {}, "buffers": {}}
    for number, (factor, snapshot) in enumerate(zip(x, kept, strict=True)):
        held = _read(snapshot)
        for part, total in sums.items():
            if number:
                check_names(f"snapshot {number} ({part})", held[part], total)
            for name, tensor in held[part].items():
                if name not in total:
                    total[name] = torch.zeros_like(tensor, dtype=torch.promote_types(tensor.dtype, torch.float64))
                total[name].add_(tensor, alpha=factor)
    made = {
        part: {name: tensor.to(_narrow(tensor, dtype)) for name, tensor in total.items()}
        for part, total in sums.items()
    }
    return Synthesis(made["weights"], made["buffers"], tuple(x), error)


def coefficients(profiles: Sequence[tuple[int, float]], target: tuple[int, float]) -> tuple[list[float], float]:
    """Return what to multiply averages by, given as (steps, gamma), to come nearest to another; and how near that is.

    Returns:
        The coefficients, which add up to 1, and the distance of the profiles relative to the norm of the wanted one.
    """
    times = torch.tensor([float(t) for t, _ in profiles], dtype=torch.float64)
    gammas = torch.tensor([float(g) for _, g in profiles], dtype=torch.float64)
    t, g = torch.tensor([target[0]], dtype=torch.float64), torch.tensor([target[1]], dtype=torch.float64)
    inner = _inner(times[:, None], gammas[:, None], times, gammas)
    right = _inner(times[:, None], gammas[:, None], t, g)
    scale = inner.diagonal().rsqrt()[:, None]  # profiles of one length: early ones are high and short
    found = torch.linalg.lstsq(inner * scale * scale.T, right * scale, rcond=_RCOND, driver="gelsd").solution * scale
    found = found / found.sum()
    norm = _inner(t, g, t, g)
    distance = norm - 2 * (found.T @ right) + found.T @ inner @ found
    return found.flatten().tolist(), math.sqrt(max(0.0, float(distance / norm)))


def _inner(ta: Tensor, a: Tensor, tb: Tensor, b: Tensor) -> Tensor:
    """Integral of the product of two profiles: (a+1)(b+1) r^c / ((a+b+1) max(ta, tb)), r <= 1 the times' ratio."""
    exponent = torch.where(ta < tb, b, a)
    ratio = torch.minimum(ta, tb) / torch.maximum(ta, tb)
    return (a + 1) * (b + 1) * ratio**exponent / ((a + b + 1) * torch.maximum(ta, tb))


class PostHocEMA:
    """Two power-function averages and their snapshots, from which one of any width is made after training.

    Args:
        model: the module to average.
        folder: where snapshots are written, one file each; None (default): they stay in memory. The files of a sharded
            model hold whole tensors, written by one rank.
        every: accepted steps between snapshots; what can be made afterwards is as sharp as they are frequent.
        sigmas: relative widths of the averages that are tracked; 0.05 and 0.10 by default.
        optimizer: with it, only its accepted steps count (``optimizer.steps``); without, every call of ``update`` does.
        source: averages what this evaluates, such as a schedule-free optimizer; None (default): the live weights.
        dtype: least precision of the shadows, float32 (default) or float64.
        start: accepted steps to let pass before averaging, 0 by default.
        buffers: whether to average floating-point buffers too, for ``evaluating(..., buffers="average")``.

    Raises:
        ValueError: a value out of range.
        TypeError: ``optimizer`` does not count its accepted steps, or ``source`` evaluates nothing.

    Source: Karras et al. 2023, arXiv:2312.02696.

    Example:
        >>> model = torch.nn.Linear(1, 1, bias=False)
        >>> tracked = PostHocEMA(model, every=10)
        >>> for step in range(100):
        ...     _ = torch.nn.init.constant_(model.weight, step)
        ...     tracked.update()
        >>> round(tracked.synthesize(sigma=0.15).weights["weight"].item())  # its mean age is 18 % of the run
        82
    """

    def __init__(
        self,
        model: nn.Module,
        folder: str | os.PathLike[str] | None = None,
        *,
        every: int,
        sigmas: Sequence[float] = (0.05, 0.10),
        optimizer: Optimizer | None = None,
        source: EvaluationSource | None = None,
        dtype: torch.dtype = torch.float32,
        start: int = 0,
        buffers: bool = False,
    ) -> None:
        if not sigmas or len({_label(sigma) for sigma in sigmas}) != len(sigmas):
            raise ValueError(f"sigmas={tuple(sigmas)}: give different widths, such as (0.05, 0.10)")
        self.every = check_steps("every", every)
        self.folder = None if folder is None else Path(folder)
        self.averages = tuple(
            PowerEMA(model, sigma=sigma, optimizer=optimizer, source=source, dtype=dtype, start=start, buffers=buffers)
            for sigma in sigmas
        )
        self._snapshots: list[Any] = []  # names of files, or what they would hold

    @property
    def snapshots(self) -> list[Snapshot]:
        """The snapshots so far: paths, or mappings where there is no folder."""
        return [snapshot if self.folder is None else self.folder / snapshot for snapshot in self._snapshots]

    def update(self) -> None:
        """Take the current weights into the averages, and a snapshot if one is due; call it after ``optimizer.step()``.

        Raises:
            RuntimeError: inside ``evaluating``, or the optimizer has gone back to an earlier step.
            OSError: a snapshot cannot be written.
        """
        first = self.averages[0]
        before = first.ticks
        for average in self.averages:
            average.update()
        if crossed(first.ticks, first.ticks - before, self.every):
            self._snapshots += [self._keep(average) for average in self.averages]

    def synthesize(self, *, sigma: float | None = None, gamma: float | None = None, at: int | None = None) -> Synthesis:
        """Return the average of this width, up to the last snapshot or up to ``at``: see ``synthesize``."""
        return synthesize(self.snapshots, sigma=sigma, gamma=gamma, at=at, dtype=self.averages[0].dtype)

    def state_dict(self) -> dict[str, Any]:
        """Return the averages and the names of the files of the snapshots, or the snapshots themselves."""
        return {
            "format": FORMAT,
            "kind": type(self).__name__,
            "every": self.every,
            "averages": [average.state_dict() for average in self.averages],
            "snapshots": list(self._snapshots),
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue from a saved state; later snapshots are forgotten. Nothing changes when it raises.

        Raises:
            ValueError: another kind of average or other settings; or snapshots in memory where there is a folder, files
                where there is none, or a file that is gone.
            RuntimeError: inside ``evaluating``.
        """
        here = self.state_dict()
        if state_dict.keys() != here.keys() or state_dict["kind"] != here["kind"]:
            raise ValueError(
                f"not the state of a PostHocEMA: kind {state_dict.get('kind')!r}, keys {sorted(state_dict)}"
            )
        if state_dict["format"] > FORMAT:
            raise ValueError(f"the saved PostHocEMA is of format {state_dict['format']}, this version reads {FORMAT}")
        if state_dict["every"] != self.every or len(state_dict["averages"]) != len(self.averages):
            raise ValueError(
                f"the saved PostHocEMA has {len(state_dict['averages'])} averages and a snapshot every "
                f"{state_dict['every']} steps, this one {len(self.averages)} and {self.every}"
            )
        for snapshot in state_dict["snapshots"]:
            if isinstance(snapshot, str) != (self.folder is not None):
                raise ValueError(
                    f"the saved snapshots are {'files' if isinstance(snapshot, str) else 'in memory'}, and "
                    f"folder={self.folder}: make the average as it was made"
                )
            if self.folder is not None and not (self.folder / snapshot).exists():
                raise ValueError(
                    f"the snapshot {self.folder / snapshot} is gone; bring it back, or start a new average"
                )
        matched = [average._matched(saved) for average, saved in zip(self.averages, state_dict["averages"])]
        for average, saved, pairs in zip(self.averages, state_dict["averages"], matched):
            average._adopt(saved, pairs)
        self._snapshots = list(state_dict["snapshots"])

    def _keep(self, average: PowerEMA) -> Any:
        snapshot = average.snapshot()
        if self.folder is None:
            return snapshot
        name = f"steps-{average.ticks:08d}-sigma-{_label(average.sigma)}.pt"
        tensors = [tensor for part in ("weights", "buffers") for tensor in snapshot[part].values()]
        writes = all(is_writer(tensor) for tensor in tensors)
        for part in ("weights", "buffers"):  # every rank takes part in gathering
            snapshot[part] = {
                key: whole for key, tensor in snapshot[part].items() if (whole := full(tensor, writes)) is not None
            }
        if writes:
            self.folder.mkdir(parents=True, exist_ok=True)
            temporary = self.folder / f".{name}.{secrets.token_hex(8)}"  # ranks with a whole model each write the same
            torch.save(snapshot, temporary)
            os.replace(temporary, self.folder / name)
        return name


def _label(sigma: float) -> str:
    return f"{sigma:.4g}"


def _read(snapshot: Snapshot) -> Mapping[str, Any]:
    held: Any = snapshot
    if not isinstance(snapshot, Mapping):
        held = torch.load(snapshot, map_location="cpu", weights_only=True, mmap=True)
    if not isinstance(held, Mapping) or not {"format", "gamma", "ticks", "weights", "buffers"} <= held.keys():
        raise ValueError(f"{snapshot if not isinstance(snapshot, Mapping) else sorted(snapshot)} is no snapshot")
    if held["format"] > FORMAT:
        raise ValueError(f"a snapshot is of format {held['format']}, this version reads up to {FORMAT}")
    return held


def _profile(snapshot: Mapping[str, Any]) -> tuple[int, float]:
    return int(snapshot["ticks"]), float(snapshot["gamma"])


def _narrow(tensor: Tensor, dtype: torch.dtype) -> torch.dtype:
    """The dtype of a result: complex where the tensor is."""
    return torch.promote_types(dtype, torch.complex32) if tensor.is_complex() else dtype
