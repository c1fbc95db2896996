"""What a part is: the one interface that the author of a method implements.

A part is a frozen dataclass that names group keys and never holds a number. It declares its state in ``slots`` and, in
``update``, reads the gradient ``x.g``, the parameter ``x.p`` and the running direction ``x.u`` and writes only the
direction and its own state. It knows nothing of groups, ranks or modules. ``Parts`` puts parts into the order in which
every optimizer of this library runs.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, Literal, TypeAlias, TypeVar

import torch
from torch import Tensor

from guided_descent.linalg.workspace import Workspace
from guided_descent.parts.rows import Number, Rows, Scalar
from guided_descent.routing.roles import Block

#: The slots of one update, in the order in which they run.
ORDER = (
    "clip",
    "decay_gradient",
    "estimate",
    "geometry",
    "decay_direction",
    "scale",
    "decay_update",
    "momentum",
    "mask",
    "decay_before",
    "step",
    "decay_after",
)
#: Slots whose parts write the parameter, through ``x.w``.
WRITERS = frozenset({"decay_before", "step", "decay_after"})

Unit: TypeAlias = Literal["element", "block", "matrix"]
Hyper: TypeAlias = Mapping[str, Any]  # one group's numbers, by key
State: TypeAlias = dict[str, Any]  # slot name -> Rows (parameter-shaped), stacked Tensor (factor) or 0-d Tensor (group)
Self = TypeVar("Self", bound="Part")


@dataclass(frozen=True)
class Slot:
    """One state tensor of a part.

    Attributes:
        layout: ``param``: shaped, placed and saved like the parameter; ``factor``: its own ``shape`` for each block,
            stacked ``[B, *shape]`` over a batch; ``group``: one tensor for the whole group.
        shape: Shape of a factor or group tensor; ignored for ``param``.
        dtype: Storage dtype; ``None`` is the work dtype (float32, or float64 for float64 parameters).
        fill: Initial value of every element.
        basis: How a geometry that changes its basis carries the slot along: a ``vector`` is rotated, a ``square`` of
            coordinates follows by permutation, ``none`` stays.
    """

    layout: Literal["param", "factor", "group"] = "param"
    shape: tuple[int, ...] = ()
    dtype: torch.dtype | None = None
    fill: float = 0.0
    basis: Literal["none", "vector", "square"] = "none"


@dataclass(frozen=True)
class Needs:
    """What a part asks of the training loop.

    Attributes:
        evaluations: Gradient evaluations in one step; more than 1 needs ``step(closure)`` with a re-callable closure.
    """

    evaluations: int = 1


class Batch:
    """The ``x`` of a part: blocks of one group that share shape, dtype, step and device, ready for arithmetic.

    Attributes:
        g: Gradients, read only.
        w: Parameters in the work dtype, writable; only there for parts in the slots that write parameters.
        blocks: The blocks, one for each matrix of the stack, or one for each row where the batch is a list.
        shape: Shape of one block where the batch is stacked.
        step: Number of this update of these rows, from 1; a 0-d tensor in compiled mode.
        first: Whether this is the first update of these rows.
        lr_scale: Multiplier of the learning rate.
        wd_scale: Multiplier of the weight decay.
        eps_scale: Multiplier of eps.
        work: Scratch memory.
    """

    def __init__(
        self,
        *,
        g: Rows,
        p: Callable[[], Rows],
        blocks: tuple[Block, ...],
        scratch: Callable[[str], Rows],
        step: Number,
        first: bool,
        work: Workspace,
        seed: int = 0,
    ) -> None:
        block = blocks[0]
        self.g = g
        self.w: Rows | None = None
        self._read = p
        self.blocks = blocks
        self.shape = block.shape
        self.step = step
        self.first = first
        self.lr_scale = block.lr_scale
        self.wd_scale = block.wd_scale
        self.eps_scale = block.eps_scale
        self.work = work
        self.held = False
        self.ticks: dict[str, int | Sequence[int]] = {}
        self._seed = seed
        self._make = scratch
        self._scratch: Rows | None = None
        self._u = g
        self._factor: Number = 1.0

    @property
    def p(self) -> Rows:
        """Parameters in the work dtype, read only."""
        return self._read()

    @property
    def u(self) -> Rows:
        """The running direction, to read; multiply by ``factor`` where its length matters."""
        return self._u

    @property
    def factor(self) -> Number:
        """Scalar that the direction is still to be multiplied by."""
        return self._factor

    def read(self) -> Rows:
        """The direction with ``factor`` applied, to read; copied only where there is a factor."""
        return self._u if isinstance(self._factor, float) and self._factor == 1.0 else self.take()

    def own(self) -> Rows:
        """The direction as scratch that may be overwritten; copied on first use. ``factor`` stays apart."""
        u = self._direction()
        if self._u is not u:
            u.copy_(self._u)
            self._u = u
        return u

    def take(self) -> Rows:
        """The direction as scratch that may be overwritten, with ``factor`` applied."""
        u = self.own()
        if not (isinstance(self._factor, float) and self._factor == 1.0):
            u.mul_(self._factor)
            self._factor = 1.0
        return u

    def fresh(self) -> Rows:
        """Scratch that becomes the direction, contents undefined: for a part that writes every element."""
        self._u = self._direction()
        self._factor = 1.0
        return self._u

    def spare(self, tag: str) -> Rows:
        """More scratch of the direction's shape, contents undefined."""
        return self._make(tag)

    def lend(self, rows: Rows) -> None:
        """Let the direction be these rows without copying them; nobody will write into them."""
        self._u = rows
        self._factor = 1.0

    def scale(self, factor: Number) -> None:
        """Multiply the direction by a scalar, at no cost: the step applies it."""
        self._factor = self._factor * factor

    def hold(self) -> None:
        """Leave these parameters alone this time: no decay, no step."""
        self.held = True

    def by_row(self, values: Tensor) -> Scalar:
        """A factor-shaped scalar ``[B]`` as the argument of a ``Rows`` method: one number where all rows agree."""
        if isinstance(self.step, Tensor):  # compiled: no look at the values
            return values
        numbers: list[float] = values.tolist()
        return numbers[0] if len(set(numbers)) == 1 else numbers

    def tick(self, counter: str, each: Sequence[int] | int = 1) -> None:
        """Count an event (an orthogonalisation, a refresh, a fallback) for every block, or by block."""
        self.ticks[counter] = each

    def generator(self, salt: str = "") -> torch.Generator:
        """A random generator fixed by (seed, name of the first block, step, salt): equal on every rank, none saved."""
        text = f"{self._seed}/{self.blocks[0].key}/{int(self.step)}/{salt}"
        number = int.from_bytes(hashlib.blake2b(text.encode(), digest_size=7).digest())
        return torch.Generator(device=self.g.list[0].device).manual_seed(number)

    def _direction(self) -> Rows:
        if self._scratch is None:
            self._scratch = self._make("direction")
        return self._scratch


@dataclass(frozen=True)
class Part:
    """One idea of an optimizer, as tensor functions over a batch and declared state.

    Subclasses are frozen dataclasses whose fields name group keys or choose structure. Class attributes:

    - ``slot``: where it runs, one of ``ORDER``; ``part.at("momentum")`` moves an instance.
    - ``unit``: ``element`` (any cut of the tensors will do), ``block`` (needs whole tensors, say for a norm) or
      ``matrix`` (works on ``x.u.stack``, a stack of same-shape blocks).
    - ``needs``: what it asks of the training loop.
    """

    slot: ClassVar[str] = "estimate"
    unit: ClassVar[Unit] = "element"
    needs: ClassVar[Needs] = Needs()
    place: str = field(default="", kw_only=True)

    @property
    def where(self) -> str:
        """The slot it runs in."""
        return self.place or self.slot

    def at(self: Self, slot: str) -> Self:
        """The same part in another slot."""
        if slot not in ORDER:
            raise ValueError(f"slot {slot!r} does not exist; choose one of {', '.join(ORDER)}")
        return replace(self, place=slot)

    @property
    def keys(self) -> tuple[str, ...]:
        """Group keys it reads."""
        return ()

    def slots(self, block: Block) -> dict[str, Slot]:
        """State it keeps for a block, by slot name."""
        return {}

    def begin(self, s: State, h: Hyper, step: int) -> None:
        """Advance scalar state, once for each block and step, before ``update`` sees any cut of its tensors."""

    def update(self, x: Batch, s: State, h: Hyper, total: Mapping[str, Tensor]) -> None:
        """Write the direction (``x.take()``, ``x.fresh()``, ``x.lend()``, ``x.scale()``) and the state ``s``."""
        raise TypeError(f"{type(self).__name__} does not define update")

    def sums(self, x: Batch, s: State, h: Hyper) -> dict[str, Tensor]:
        """Scalars that the engine adds over all batches, groups and ranks before ``update`` gets them as ``total``."""
        return {}

    def combine(self, total: Mapping[str, Tensor], shared: State, h: Hyper) -> None:
        """Fold the totals into the group's shared scalars, once in a step."""

    def probe(self, x: Batch, s: State, h: Hyper, total: Mapping[str, Tensor]) -> None:
        """Write the displacement at which the next gradient is taken; for parts with ``needs.evaluations > 1``."""

    def refresh(self, x: Batch, s: State, h: Hyper) -> None:
        """Slow work on the rows that are due; see ``period``."""

    def period(self, h: Hyper) -> int:
        """Steps between refreshes; 0 for a part without slow work."""
        return 0

    def refresh_phase(self, h: Hyper) -> bool:
        """Whether refreshes are spread over the period (true) or fall on one step (false)."""
        return False

    def idle(self, h: Hyper) -> bool:
        """Whether the part does nothing at these numbers, so that the engine leaves it out."""
        return False

    def flops(self, block: Block) -> float:
        """Floating point operations for a block and step, refreshes excluded."""
        return 0.0

    def refresh_flops(self, block: Block) -> float:
        """Floating point operations of one refresh of a block."""
        return 0.0

    def scratch(self, block: Block) -> int:
        """Bytes of scratch for each block beside the direction; sizes the slices of a stacked batch."""
        return 0

    @property
    def has_sums(self) -> bool:
        """Whether it asks for global sums."""
        return type(self).sums is not Part.sums


class Parts:
    """Parts in the order of the slots; parts of one slot keep the order in which they were given.

    Example:
        >>> from guided_descent.parts import AdamMoments, Decoupled, Descend
        >>> [type(part).__name__ for part in Parts(Decoupled(), Descend(), AdamMoments())]
        ['AdamMoments', 'Decoupled', 'Descend']
    """

    def __init__(self, *parts: Part) -> None:
        for part in parts:
            if not isinstance(part, Part):
                raise TypeError(f"Parts takes Part objects, got {part!r} of type {type(part).__name__}")
        self._parts = tuple(sorted(parts, key=lambda part: ORDER.index(part.where)))
        units = [part.unit for part in self._parts]
        self.unit: Unit = "matrix" if "matrix" in units else "block" if "block" in units else "element"
        self.evaluations = max((part.needs.evaluations for part in self._parts), default=1)

    def __iter__(self) -> Iterator[Part]:
        return iter(self._parts)

    def __len__(self) -> int:
        return len(self._parts)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Parts) and self._parts == other._parts

    def __hash__(self) -> int:
        return hash(self._parts)

    def __repr__(self) -> str:
        return f"Parts({', '.join(map(repr, self._parts))})"

    def __add__(self, others: tuple[Part, ...]) -> Parts:
        """The same parts with others added, each in its slot."""
        return Parts(*self._parts, *others)

    def keys(self) -> set[str]:
        """Every group key that they read."""
        return {key for part in self._parts for key in part.keys}

    def slots(self, block: Block) -> dict[str, Slot]:
        """State of all parts for a block; two parts may not claim one name."""
        found: dict[str, Slot] = {}
        for part in self._parts:
            for name, slot in part.slots(block).items():
                if found.setdefault(name, slot) is not slot:
                    raise ValueError(
                        f"two parts claim the state {name!r} ({type(part).__name__} is the second); rename one of them"
                    )
        return found
