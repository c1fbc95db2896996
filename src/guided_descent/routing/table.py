"""The routing table: every parameter of a model with its role, its matrix view, its owner and the reason."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property

from guided_descent.routing.names import canonical_name, near
from guided_descent.routing.roles import Block
from guided_descent.routing.rules import Rule


@dataclass(frozen=True)
class Entry:
    """One distinct parameter.

    Attributes:
        name: Canonical full name, the first one under which it is registered.
        aliases: Its other names, when it is tied.
        shape: Global shape.
        trainable: Whether it takes a gradient.
        rule: The first rule that matches any of its names.
        blocks: The blocks that make it up, which cover it exactly once.
        flattened: Whether its module type says that it is a matrix, but it is stored as a 1-D shard.
        lazy: Whether its shape is not known yet (lazy modules before their first batch).
        owner: Type name of the module that owns it; empty when unknown.
    """

    name: str
    aliases: tuple[str, ...]
    shape: tuple[int, ...]
    trainable: bool
    rule: Rule | None
    blocks: tuple[Block, ...]
    flattened: bool = False
    lazy: bool = False
    owner: str = ""


@dataclass(frozen=True)
class Table:
    """The routing table of a model, in the order of ``model.named_parameters()``.

    Attributes:
        parameters: One entry for each distinct parameter, trainable or frozen.
    """

    parameters: tuple[Entry, ...]

    @cached_property
    def blocks(self) -> tuple[Block, ...]:
        """All blocks of all parameters."""
        return tuple(block for entry in self.parameters for block in entry.blocks)

    @cached_property
    def _by_name(self) -> dict[str, Entry]:
        return {name: entry for entry in self.parameters for name in (entry.name, *entry.aliases)}

    def __getitem__(self, name: str) -> Entry:
        found = self._by_name.get(name) or self._by_name.get(canonical_name(name))
        if found is None:
            raise KeyError(f"no parameter is named {name!r}; the nearest names are: {near(name, self._by_name)}")
        return found

    def __contains__(self, name: object) -> bool:
        return name in self._by_name

    def __iter__(self) -> Iterator[Entry]:
        return iter(self.parameters)

    def __len__(self) -> int:
        return len(self.parameters)

    def rows(self) -> list[dict[str, object]]:
        """One plain dict for each block, for printing and JSON."""
        return [
            {
                "parameter": block.key,
                "aliases": list(entry.aliases),
                "role": block.role.value,
                "shape": list(entry.shape),
                "view": list(block.shape),
                "module": block.module,
                "type": entry.owner,
                "trainable": entry.trainable,
                "rule": entry.rule.pattern if entry.rule is not None else None,
                "why": block.why,
            }
            for entry in self.parameters
            for block in entry.blocks
        ]

    def __str__(self) -> str:
        lines = [("parameter", "role", "view", "owner", "why")]
        for row, block in zip(self.rows(), self.blocks, strict=True):
            owner = (block.module or "(root)") if row["type"] else "-"
            view = "x".join(map(str, block.shape)) or "scalar"
            lines.append((block.key, block.role.value, view, owner, block.why))
        widths = [max(len(line[column]) for line in lines) for column in range(4)]
        return "\n".join(
            "  ".join([*(cell.ljust(width) for cell, width in zip(line, widths)), line[4]]).rstrip() for line in lines
        )


def check_not_flattened(entries: Table | Iterable[Entry]) -> None:
    """Raise when a matrix is stored as a flat 1-D shard, on which no matrix method can work.

    Args:
        entries: A table, or those of its entries that a matrix method would take.

    Raises:
        ValueError: Names the parameters, the rule and the ways out.
    """
    flat = [entry for entry in entries if entry.flattened]
    if not flat:
        return
    first = flat[0]
    more = f" (and {len(flat) - 1} more)" if len(flat) > 1 else ""
    raise ValueError(
        f"parameter {first.name!r} of {first.owner or 'the model'} has shape {list(first.shape)}{more}: a flattened "
        "1-D shard, as FSDP1 and ZeRO make them. A matrix method needs whole matrices. Shard with FSDP2 "
        "(torch.distributed.fsdp.fully_shard), which keeps the shapes; or use FSDP1 with use_orig_params=True and "
        "ShardingStrategy.NO_SHARD; or choose an elementwise recipe such as adamw."
    )
