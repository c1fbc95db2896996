"""What a part is: the one interface that the author of a method implements.

A part is a frozen dataclass that names group keys and never holds a number. It declares its state in ``slots`` and, in
``update``, reads the gradient ``x.g``, the parameter ``x.p`` and the running direction ``x.u`` and writes only the
direction and its own state. It knows nothing of groups, ranks or modules. ``Parts`` puts parts into the order in which
every optimizer of this library runs.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import TYPE_CHECKING, Any, ClassVar, Literal, TypeAlias, TypeVar

import torch
from torch import Tensor

from guided_descent.linalg.workspace import Workspace
from guided_descent.parts.rows import Number, Rows, Scalar
from guided_descent.routing.roles import Block

if TYPE_CHECKING:
    from guided_descent.capture import LayerIO

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
    "average",
)
#: Slots whose parts write the parameter, through ``x.w``.
WRITERS = frozenset({"decay_before", "step", "decay_after", "average"})

Unit: TypeAlias = Literal["element", "block", "matrix"]
Hyper: TypeAlias = Mapping[str, Any]  # one group's numbers, by key
State: TypeAlias = dict[str, Any]  # slot name -> Rows (parameter-shaped), stacked Tensor (factor) or 0-d Tensor (group)
Count: TypeAlias = int | Sequence[int] | Tensor  # how often something happened to every block, or to each [B]
Found: TypeAlias = Mapping[str, Tensor]  # results of slow work, by name, each [B, ...]
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
        copies: Whether a ``param`` slot holds, when its parameter's first update begins, a copy of the parameter.
        basis: How a geometry that changes its basis carries the slot along: a ``vector`` is rotated, a ``square`` of
            coordinates follows by permutation, ``none`` stays.
        packs: How a ``param`` slot may be held in few bits, with errors of some percent of each element: ``signed``, or
            ``unsigned`` where it is never negative. The default keeps it whole: say, what differences are taken of.
    """

    layout: Literal["param", "factor", "group"] = "param"
    shape: tuple[int, ...] = ()
    dtype: torch.dtype | None = None
    fill: float = 0.0
    copies: bool = False
    basis: Literal["none", "vector", "square"] = "none"
    packs: Literal["", "signed", "unsigned"] = ""


@dataclass(frozen=True)
class Needs:
    """What a part asks of the training loop and of the engine.

    Attributes:
        evaluations: Gradient evaluations in one step; more than 1 needs ``step(closure)`` with a re-callable closure.
        apart: Whether the gradient of the last evaluation is handed over beside the first one, as ``x.probed``; else
            it takes its place.
        layer_io: Whether it reads the inputs and output gradients of layers; see ``Part.observe``.
        before: Whether it reads ``x.before``, the parameters as they were before this update.
    """

    evaluations: int = 1
    apart: bool = False
    layer_io: bool = False
    before: bool = False


@dataclass(frozen=True)
class Task:
    """One piece of slow work on a block, such as the factorisation of one side: never divided, never forgotten.

    Attributes:
        flops: What it costs; tasks are spread over the period by cost.
        results: Shape, dtype and fill of what it finds, by name; held in the state while it waits to land.
    """

    flops: float
    results: Mapping[str, Slot] = field(default_factory=dict, hash=False)


@dataclass(frozen=True)
class Policy:
    """When slow work is redone.

    Attributes:
        period: Steps between two refreshes of a task; 0: never.
        staggered: Whether tasks are spread over the period by cost, or all fall on one step.
        tolerance: A task whose ``drift`` is not above it is skipped; 0 skips none.
        lag: Steps between the start of a task and its landing. 0: it is done at once; else on a background thread.
        crowded: Every so many steps, from the first, there is other work: the dearest tasks keep out of them. 0: never.
    """

    period: int = 0
    staggered: bool = True
    tolerance: float = 0.0
    lag: int = 0
    crowded: int = 0


def key(name: str | None = None) -> Any:
    """A field of a part that holds the name of a group key, which the part reads as ``h[self.field]``.

    Args:
        name: The default name; empty for none, which reads nothing. Without it the field has no default.
    """
    metadata = {"kind": "key"}
    return field(metadata=metadata) if name is None else field(default=name, metadata=metadata)


@dataclass(frozen=True)
class Keyed:
    """What reads group keys by the names in its fields."""

    @property
    def keys(self) -> tuple[str, ...]:
        """Group keys it reads: those that its fields of ``key`` name, and those of what it holds."""
        held = [(item, getattr(self, item.name)) for item in fields(self)]
        own = (value for item, value in held if item.metadata.get("kind") == "key" and value)
        return (*own, *(name for _, value in held if isinstance(value, Keyed) for name in value.keys))


def generator(seed: int, name: str, step: int, salt: str, device: torch.device) -> torch.Generator:
    """A random generator that is a function of these alone."""
    text = f"{seed}/{name}/{step}/{salt}"
    number = int.from_bytes(hashlib.blake2b(text.encode(), digest_size=7).digest())
    return torch.Generator(device=device).manual_seed(number)


class Batch:
    """The ``x`` of a part: blocks of one group that share shape, dtype, step and device, ready for arithmetic.

    Attributes:
        g: Gradients, read only.
        probed: Gradients at the point of the probe, read only, for parts with ``needs.apart``.
        w: Parameters in the work dtype, writable; only there for parts in the slots that write parameters.
        before: Scratch with the parameters as they were when ``w`` was opened, for parts with ``needs.before``.
        blocks: The blocks, one for each matrix of the stack, or one for each row where the batch is a list.
        shape: Shape of one block where the batch is stacked.
        step: Number of this update of these rows, from 1; a 0-d tensor in compiled mode.
        first: Whether this is the first update of these rows.
        lr_scale: Multiplier of the learning rate.
        wd_scale: Multiplier of the weight decay; one for each row where the pieces of the blocks differ.
        eps_scale: Multiplier of eps.
        rate: What the learning rate of the decay is to be multiplied by, set by a part that finds learning rates.
        seen: What ``observe`` gathered from the layers for this step, stacked ``[B, ...]``, with ``seen["count"]`` [B]
            the number of backward passes; ``None`` where no block has seen anything. A block that saw nothing has
            zeros.
        curvature: What ``Part.curvature`` names, from the passes before this step, free to be overwritten; ``None``
            where none was wanted.
        labels: The number of labels in it, where labels were drawn.
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
        seen: Mapping[str, Tensor] | None = None,
        probed: Rows | None = None,
    ) -> None:
        block = blocks[0]
        self.g = g
        self.probed = probed
        self.w: Rows | None = None
        self.before: Rows | None = None
        self._read = p
        self.blocks = blocks
        self.shape = block.shape
        self.step = step
        self.first = first
        self.lr_scale = block.lr_scale
        scales = [block.wd_scale * piece.wd_scale for block in blocks for piece in block.pieces]
        self.wd_scale: float | list[float] = scales[0] if len(set(scales)) == 1 else scales
        self.eps_scale = block.eps_scale
        self.rate: Number = 1.0
        self.work = work
        self.seen = seen
        self.curvature: Rows | None = None
        self.labels = 0
        self.held = False
        self.ticks: dict[str, Count] = {}
        self._seed = seed
        self._make = scratch
        self._scratch: Rows | None = None
        self._u = g
        self._over: tuple[Rows, Number] | None = None
        self._factor: Number = 1.0

    @property
    def p(self) -> Rows:
        """Parameters in the work dtype, read only."""
        return self._read()

    @property
    def u(self) -> Rows:
        """The running direction, to read; multiply by ``factor`` where its length matters."""
        if self._over is not None:
            numerator, times = self._over
            self._u.rdiv_(numerator)
            if not (isinstance(times, float) and times == 1.0):
                self._u.mul_(times)
            self._over = None
        return self._u

    def add_to(self, rows: Rows, length: Number) -> None:
        """``rows <- rows + length u``, without ``factor``; divided on the way where the direction is a quotient."""
        if self._over is None:
            rows.add_(self._u, alpha=length)
        else:
            numerator, times = self._over
            rows.addcdiv_(numerator, self._u, value=length * times)

    @property
    def factor(self) -> Number:
        """Scalar that the direction is still to be multiplied by."""
        return self._factor

    def read(self) -> Rows:
        """The direction with ``factor`` applied, to read; copied only where there is a factor."""
        return self.u if isinstance(self._factor, float) and self._factor == 1.0 else self.take()

    def own(self) -> Rows:
        """The direction as scratch that may be overwritten; copied on first use. ``factor`` stays apart."""
        u, now = self._direction(), self.u
        if now is not u:
            u.copy_(now)
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
        self._u, self._over = self._direction(), None
        self._factor = 1.0
        return self._u

    def over(self, numerator: Rows, divisor: Rows | None = None, times: Number = 1.0) -> None:
        """Let the direction be ``times`` a quotient, divided when somebody reads it; ``factor`` starts again at 1.

        A step that divides as it adds saves a pass over memory. The numerator is only read. The divisor is scratch,
        which the quotient overwrites: that of ``fresh`` if left out.
        """
        self._u = self._direction() if divisor is None else divisor
        self._over = (numerator, times)
        self._factor = 1.0

    def become(self, scratch: Rows) -> None:
        """Let the direction be this scratch, of ``spare``, which may be overwritten."""
        self._u = self._scratch = scratch
        self._over = None
        self._factor = 1.0

    def spare(self, tag: str) -> Rows:
        """More scratch of the direction's shape, contents undefined."""
        return self._make(tag)

    def beside(self) -> Rows:
        """Scratch that does not hold the direction, contents undefined: the direction's own while it is lent."""
        return self.spare("beside") if self._u is self._scratch else self._direction()

    def lend(self, rows: Rows) -> None:
        """Let the direction be these rows without copying them; nobody will write into them."""
        self._u, self._over = rows, None
        self._factor = 1.0

    def scale(self, factor: Number) -> None:
        """Multiply the direction by a scalar, at no cost: the step applies it."""
        self._factor = self._factor * factor

    def hold(self) -> None:
        """Leave these parameters alone this time: no decay, no step."""
        self.held = True

    def by_row(self, values: Tensor) -> Scalar:
        """A scalar for each row as the argument of a ``Rows`` method: one number where all rows agree."""
        if isinstance(self.step, Tensor):  # compiled: no look at the values
            return values
        numbers: list[float] = values.tolist()
        return numbers[0] if len(set(numbers)) == 1 else numbers

    def by_block(self, values: Tensor) -> Scalar:
        """The same for a scalar of each block ``[B]``, which all its rows share."""
        pieces = [len(block.pieces) for block in self.blocks]
        if any(count > 1 for count in pieces):
            values = values.repeat_interleave(torch.tensor(pieces, device=values.device))
        return self.by_row(values)

    def tick(self, counter: str, each: Count = 1) -> None:
        """Count an event (an orthogonalisation, a refresh, a fallback) for every block, or by block."""
        self.ticks[counter] = each

    def generator(self, salt: str = "", shared: bool = False) -> torch.Generator:
        """A random generator fixed by (seed, name of the first block, step, salt): equal on every rank, none saved.

        With ``shared`` the block's name is left out: all batches draw the same, however blocks are batched.
        """
        name = "" if shared else self.blocks[0].key
        return generator(self._seed, name, int(self.step), salt, self.g.list[0].device)

    def _direction(self) -> Rows:
        if self._scratch is None:
            self._scratch = self._make("direction")
        return self._scratch


@dataclass(frozen=True)
class Part(Keyed):
    """One idea of an optimizer, as tensor functions over a batch and declared state.

    Subclasses are frozen dataclasses whose fields name group keys (``betas: str = key("betas")``) or choose structure.
    Class attributes:

    - ``slot``: where it runs, one of ``ORDER``; ``part.at("momentum")`` moves an instance.
    - ``unit``: ``element`` (any cut of the tensors will do), ``block`` (needs whole tensors, say for a norm) or
      ``matrix`` (works on ``x.u.stack``, a stack of same-shape blocks).
    - ``needs``: what it asks of the training loop.
    - ``reads_gradient``: whether its slow work reads the gradient of the step. It then runs before the update, and
      ``inputs`` finds the gradient of its rows as ``s["gradient"]``, ``[B, m, n]``, in scratch memory.
    - ``joint``: whether its group state is one for all groups of a recipe: 0-d tensors on the CPU, which ``combine``
      advances once in a step with the numbers of the first group; see ``agrees``.
    """

    slot: ClassVar[str] = "estimate"
    unit: ClassVar[Unit] = "element"
    needs: ClassVar[Needs] = Needs()
    reads_gradient: ClassVar[bool] = False
    joint: ClassVar[bool] = False
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

    def slots(self, block: Block) -> dict[str, Slot]:
        """State it keeps for a block, by slot name."""
        return {}

    def takes(self, block: Block) -> bool:
        """Whether it joins the parts of this block, where the user adds it to a recipe with ``add=``."""
        return True

    def among(self, parts: tuple[Part, ...]) -> tuple[Part, ...]:
        """What it leaves of the parts that it is added to: all, unless it takes the place of some."""
        return parts

    def check(self, h: Hyper) -> None:
        """Raise ValueError where it cannot work with these numbers; called before a step changes anything."""

    @property
    def reads_parameter(self) -> bool:
        """Whether ``update``, ``sums`` or ``probe`` reads ``x.p``, so that sharded parameters are brought together."""
        return False

    def begin(self, s: State, h: Hyper, step: int) -> None:
        """Advance scalar state, once for each block and step, before ``update`` sees any cut of its tensors."""

    def update(self, x: Batch, s: State, h: Hyper, total: Mapping[str, Tensor]) -> None:
        """Write the direction (``x.take()``, ``x.fresh()``, ``x.lend()``, ``x.scale()``) and the state ``s``."""
        raise TypeError(f"{type(self).__name__} does not define update")

    def sums(self, x: Batch, s: State, h: Hyper) -> dict[str, Tensor]:
        """Scalars that the engine adds over all batches, groups and ranks before ``update`` gets them as ``total``.

        Called once in a step, so that it may advance the state on its way.
        """
        return {}

    def agrees(self, h: Hyper) -> Mapping[str, Any]:
        """Numbers in which the groups that share its state must agree, by name; for parts that are ``joint``."""
        return {}

    @property
    def multiplies(self) -> bool:
        """Whether the engine is to multiply its ``directions`` by the Gauss-Newton matrix G of the batch.

        It needs ``step(objective)`` with an objective that has ``products``, such as ``solvers.Objective``.
        """
        return False

    def directions(self, x: Batch, s: State, h: Hyper) -> tuple[Rows, ...]:
        """Displacements of the parameters, ``v_1 ... v_k``; the total then holds ``products``, ``v_i^T G v_j`` [k, k].

        The vectors are those of all batches together, zero where a parameter has none, and G is exact: it couples
        layers. Called after ``sums``, and read at once.
        """
        return ()

    def combine(self, total: Mapping[str, Tensor], shared: State, h: Hyper) -> None:
        """Fold the totals into the group's shared scalars, once in a step."""

    def probe(self, x: Batch, s: State, h: Hyper, total: Mapping[str, Tensor]) -> None:
        """Write the displacement at which the next gradient is taken; for parts with ``needs.evaluations > 1``."""

    def evaluate(self, x: Batch, s: State, h: Hyper) -> None:
        """Turn the parameters ``x.w`` into the weights to evaluate; for parts that keep an average."""

    # -- whether to step at all --------------------------------------------------------------------------------------

    def gauge(self, x: Batch, h: Hyper) -> dict[str, Tensor]:
        """Scalars of the raw gradients, added as in ``sums``, from which ``refuses`` judges before anything changes."""
        return {}

    def refuses(self, total: Mapping[str, Tensor], shared: State, h: Hyper) -> str:
        """Why this step is to be left out, or nothing; it changes nothing itself.

        A refused step is a skipped one. Where no part refuses, ``combine`` gets the total to remember.
        """
        return ""

    # -- what the passes tell ----------------------------------------------------------------------------------------

    @property
    def curvature(self) -> str:
        """The estimate of the curvature's diagonal that it reads as ``x.curvature``; ``""`` is none.

        ``rademacher`` or ``normal``: ``z * (H z)`` with the Hessian H of the loss and a random z of +-1, or normal.
        ``labels``: the gradient of the mean loss at labels drawn from the model, of which there are ``x.labels``.
        """
        return ""

    @property
    def observes_state(self) -> bool:
        """Whether ``observe`` reads the state, which every rank must then hold."""
        return False

    def observes(self, h: Hyper, step: int) -> bool:
        """Whether it wants to see the layers, or the curvature, in the passes that lead to update number ``step``."""
        return self.needs.layer_io or bool(self.curvature)

    def turns(self, h: Hyper) -> int:
        """Steps over which its blocks take turns to be observed, balanced by ``capture_flops``; 1: all in one step.

        The first step observes all of them.
        """
        return 1

    def capture_flops(self, block: Block) -> float:
        """What the observation of a block costs, with the work that it causes in the update."""
        return 1.0

    def observe(self, seen: dict[str, Tensor], io: LayerIO, s: State, block: Block, h: Hyper) -> None:
        """Fold one layer's input and output gradient into ``seen``: raw sums, which the engine adds over ranks.

        Called inside backward, once for each micro-batch. ``seen`` is empty at first and comes back stacked as
        ``x.seen`` in the update. ``s`` holds this block's factor state, without the batch axis. Where the block is a
        part of the layer, ``io`` holds that part.
        """
        raise TypeError(f"{type(self).__name__} does not define observe")

    # -- what the step did -------------------------------------------------------------------------------------------

    def judges(self, h: Hyper, step: int) -> bool:
        """Whether it wants to know what update number ``step`` did to the loss of its batch: one more evaluation."""
        return False

    def judge(self, shared: State, h: Hyper, before: float, after: float) -> None:
        """Learn from the loss of a batch before and after the update; ``shared`` is the group's state."""

    # -- slow work: task by task, in three acts ------------------------------------------------------------------------

    def policy(self, h: Hyper) -> Policy:
        """When its tasks are redone; the first update is the part's own business."""
        return Policy()

    def tasks(self, block: Block) -> dict[str, Task]:
        """Its slow work on a block, by name."""
        return {}

    def inputs(self, task: str, s: State, h: Hyper) -> tuple[Tensor, ...]:
        """The state that a task reads, each ``[B, ...]``."""
        return ()

    def drift(self, inputs: Sequence[Tensor], h: Hyper) -> Tensor:
        """How far the last result is from right for these inputs ``[B]``, to be compared with the tolerance."""
        raise TypeError(f"{type(self).__name__} does not define drift: it has no tolerance")

    def solve(self, inputs: Sequence[Tensor], h: Hyper) -> Found:
        """The slow work: a pure function, run here or on another thread. Results as the task declares, each [B, ...].

        The names ``fallbacks`` and ``failed`` [B] are counted by the engine; ``failed`` rows must be kept as they are.
        """
        raise TypeError(f"{type(self).__name__} does not define solve")

    def land(self, x: Batch, s: State, h: Hyper, task: str, found: Found) -> None:
        """Take the results into the state and carry along what depends on it."""
        raise TypeError(f"{type(self).__name__} does not define land")

    # -- cost ----------------------------------------------------------------------------------------------------------

    def idle(self, h: Hyper) -> bool:
        """Whether the part does nothing at these numbers, so that the engine leaves it out."""
        return False

    def flops(self, block: Block) -> float:
        """Floating point operations for a block and step, refreshes excluded."""
        return 0.0

    def scratch(self, block: Block) -> int:
        """Bytes of scratch for each block beside the direction; sizes the slices of a stacked batch."""
        return 0

    @property
    def gauges(self) -> bool:
        """Whether it may refuse a step."""
        return type(self).gauge is not Part.gauge

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
        self.checking = tuple(part for part in self._parts if type(part).check is not Part.check)
        self.judging = tuple(part for part in self._parts if type(part).judges is not Part.judges)
        self.curvature = tuple(part for part in self._parts if part.curvature)
        self.joint = tuple(part for part in self._parts if part.joint)
        self.layer_io = any(part.needs.layer_io for part in self._parts)
        self.evaluations = max((part.needs.evaluations for part in self._parts), default=1)
        self.before = any(part.needs.before for part in self._parts)
        self.probing = self._only("take gradients at points of their own", lambda part: part.needs.evaluations > 1)
        self.average = self._only("keep averages to evaluate", lambda part: type(part).evaluate is not Part.evaluate)

    def _only(self, what: str, is_one: Callable[[Part], bool]) -> Part | None:
        """The part of a kind of which there may be one."""
        found = [part for part in self._parts if is_one(part)]
        if len(found) > 1:
            names = " and ".join(type(part).__name__ for part in found)
            raise ValueError(f"{names} {what}, and a parameter can have one of them: leave the others out")
        return found[0] if found else None

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
        """The same parts with others added, each in its slot; a step rule takes the place of the step."""
        kept = self._parts
        for part in others:
            kept = part.among(kept)
        return Parts(*kept, *others)

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
