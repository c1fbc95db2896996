"""Observing: what the capture layer sees, handed to the parts that ask for it, and kept until the next step."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from guided_descent.capture import Capture, LayerIO
from guided_descent.capture.tap import Fisher
from guided_descent.engine.binding import Plan
from guided_descent.engine.refresh import phases
from guided_descent.parallel.boxes import local
from guided_descent.parts.base import Part
from guided_descent.routing.roles import Block

if TYPE_CHECKING:
    from guided_descent.engine.engine import Engine


class Observer:
    """Feeds the parts that read layers, in the passes that lead to a step for which one of them asks.

    Args:
        engine: The engine.
        model: The model, for the hooks.
        layers: The layers to watch, by name.
        blocks: The blocks that each layer's weight (and bias) makes, by the layer's name.
        fisher: Which gradients they see: ``mc``, ``exact``, ``empirical`` or ``forward``.
        loss: The loss, from which labels are sampled.
        scaler: The ``GradScaler`` that scales the loss.
    """

    def __init__(
        self,
        engine: Engine,
        model: nn.Module,
        layers: Mapping[str, nn.Module],
        blocks: Mapping[str, Sequence[Block]],
        *,
        fisher: Fisher,
        loss: Any,
        scaler: Any = None,
    ) -> None:
        self.engine = engine
        self.blocks = blocks
        self.users = Counter(block.key for own in blocks.values() for block in own)
        self.armed = False
        self.watched: set[str] = set()  # layers that this step observes
        self.turns: tuple[Plan, dict[tuple[Part, int], dict[str, int]]] | None = None
        self.seen: dict[str, dict[str, Tensor]] = {}
        self.reached: set[str] = set()  # blocks that have been seen at some step
        self.capture = Capture(
            model,
            layers,
            self._observe,
            fisher=fisher,
            loss=loss,
            seed=engine.groups[0]["seed"],
            rank=0 if engine.process_group is None else torch.distributed.get_rank(engine.process_group),
            scaler=scaler,
        )
        self.arm()

    def arm(self) -> None:
        """Forget what was seen, and watch the layers if a part wants to see the passes before the next step."""
        self.seen.clear()
        number = self.engine.groups[0]["steps"] + 1
        self.watched = {
            layer for layer, blocks in self.blocks.items() if any(self._parts(block, number) for block in blocks)
        }
        self.armed = bool(self.watched)
        if self.armed:
            self.capture.arm(number, self.watched)
        else:
            self.capture.disarm()

    def _parts(self, block: Block, number: int) -> list[Part]:
        """The parts that want to see a block's layer in the passes before update ``number``."""
        entry = self.engine.bind_current().entries.get(block.key)
        if entry is None:
            return []
        h = self.engine.groups[entry.group]
        wanting = (part for part in entry.parts if part.needs.layer_io and part.observes(h, number))
        return [part for part in wanting if self._turn(part, part.turns(h), block, number)]

    def _turn(self, part: Part, turns: int, block: Block, number: int) -> bool:
        """Whether it is a block's turn; blocks of all groups take turns together."""
        if turns == 1 or number == 1:
            return True
        plan = self.engine.bind_current()
        if self.turns is None or self.turns[0] is not plan:
            self.turns = plan, {}
        found = self.turns[1]
        if (part, turns) not in found:
            costs = {key: part.capture_flops(entry.block) for key, entry in plan.entries.items() if part in entry.parts}
            found[part, turns] = phases(costs, turns)
        return (number - 1) % turns == found[part, turns][block.key]

    def seen_by(self, blocks: Sequence[Block]) -> Mapping[str, Tensor] | None:
        """What these blocks have seen, stacked; zeros for those that saw nothing; ``None`` where none did."""
        rows = [self.seen.get(block.key, {}) for block in blocks]
        shapes = {name: value for row in rows for name, value in row.items()}
        if not shapes:
            return None
        return {
            name: torch.stack([row[name] if name in row else torch.zeros_like(like) for row in rows])
            if len(rows) > 1
            else rows[0][name][None]
            for name, like in shapes.items()
        }

    @torch.no_grad()
    def reduce(self) -> None:
        """Note the number of passes, and add the sums over the ranks.

        Raises:
            RuntimeError: Labels are to be sampled, and nobody has said from which loss; or a weight has a gradient
                though its layer was not called.
        """
        if not self.armed:
            return
        if not self.seen and self.capture.loss is None and self.capture.fisher in ("mc", "exact"):
            raise RuntimeError(
                f"fisher={self.capture.fisher!r} samples labels from the model's output and must know the loss: build "
                "with loss='cross_entropy' (or another of guided_descent.capture.LOSSES), call "
                "optimizer.curvature_pass(out, 'cross_entropy') before the backward pass, or use fisher='empirical'"
            )
        if self.engine.process_group is not None:
            self._add_ranks()
        self._check_unseen()
        for sums in filter(None, self.seen.values()):
            like = next(iter(sums.values()))
            sums["count"] = torch.tensor(float(self.capture.passes), device=like.device, dtype=torch.float64)

    @torch.no_grad()
    def _observe(self, layer: str, io: LayerIO) -> None:
        plan = self.engine.bind_current()
        number = self.engine.groups[0]["steps"] + 1
        for block in self.blocks.get(layer, ()):
            if block.key not in plan.entries:  # frozen until now: its first statistics come with the next pass
                self.reached.add(block.key)
                continue
            state: dict[str, Tensor] = {}
            if block.key in plan.places:  # else another rank has it, and no part of it reads it here
                bucket, i = plan.places[block.key]
                state = {name: stack[i] for name, stack in bucket.stacks.items()}
            for part in self._parts(block, number):
                part.observe(
                    self.seen.setdefault(block.key, {}),
                    _part_of(io, block, self.users[block.key]),
                    state,
                    block,
                    self.engine.groups[plan.entries[block.key].group],
                )

    def _check_unseen(self) -> None:
        """A layer that the passes went around would never be trained: say so before anything changes."""
        if not self.seen:
            return  # no pass went through the model at all: its blocks wait
        self.reached |= {key for key, sums in self.seen.items() if sums}
        for layer in sorted(self.watched):
            for block in self.blocks[layer]:
                entry = self.engine.bind_current().entries.get(block.key)
                if block.key in self.reached or entry is None:
                    continue
                grads = [local(p.tensor.grad) for p in entry.owners if p.tensor.grad is not None]
                if any(bool(g.any()) for g in grads):
                    raise RuntimeError(
                        f"{block.pieces[0].name!r} has a gradient, but its layer {layer!r} was not called in the "
                        "passes before this step: the model uses the weight directly, or checkpoints with "
                        "use_reentrant=True. Call the layer, checkpoint with use_reentrant=False, or give the weight "
                        f"to another recipe: rules=[guided_descent.rule({block.pieces[0].name!r}, recipe='adamw')]"
                    )

    def _add_ranks(self) -> None:
        """Sums over ranks, as one message for each dtype; a rank that has not seen a block adds zeros."""
        dist = torch.distributed
        mine = {
            key: {name: (tuple(value.shape), value.dtype) for name, value in sums.items()}
            for key, sums in self.seen.items()
        }
        all_ranks: list[Any] = [None] * dist.get_world_size(self.engine.process_group)
        dist.all_gather_object(all_ranks, mine, group=self.engine.process_group)
        device = next(iter(self.engine.groups[0]["params"])).device
        union: dict[str, dict[str, Any]] = {}
        for theirs in all_ranks:
            for key, shapes in theirs.items():
                union.setdefault(key, {}).update(shapes)
        for key in union:
            for name, (shape, dtype) in union[key].items():
                sums = self.seen.setdefault(key, {})
                if name not in sums:
                    sums[name] = torch.zeros(shape, dtype=dtype, device=device)
        places = [(key, name) for key in sorted(union) for name in sorted(union[key])]
        for dtype in sorted({self.seen[key][name].dtype for key, name in places}, key=str):
            chosen = [self.seen[key][name] for key, name in places if self.seen[key][name].dtype == dtype]
            flat = torch.cat([value.reshape(-1) for value in chosen])
            dist.all_reduce(flat, group=self.engine.process_group)
            for value, part in zip(chosen, torch.split(flat, [value.numel() for value in chosen])):
                value.copy_(part.view_as(value))


def _part_of(io: LayerIO, block: Block, users: int) -> LayerIO:
    """What one block of a layer's weight sees: its rows of the output, its columns of the input, its bias or none."""
    index = block.pieces[0].index
    changes: dict[str, Any] = {"bias": io.bias and len(block.pieces) == 2, "users": users}
    if index and io.kind == "linear":
        if io.d is not None:
            changes["d"] = io.d[..., index[0]]
        if len(index) > 1:
            changes["a"] = io.a[..., index[1]]
            changes["inputs"] = changes["a"].shape[-1]
    return dataclasses.replace(io, **changes)
