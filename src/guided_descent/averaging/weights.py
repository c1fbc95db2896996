"""The weights and buffers of a model as slots under canonical names, looked up afresh at every use."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from guided_descent.routing.names import canonical_name


@dataclass(frozen=True)
class Slot:
    """A place in a module that holds a tensor; the tensor in it may be replaced between two looks."""

    name: str
    holder: dict[str, Any]
    leaf: str
    is_buffer: bool

    @property
    def tensor(self) -> Tensor:
        """The tensor in the slot now."""
        tensor: Tensor = self.holder[self.leaf]
        return tensor


def slots_of(model: nn.Module, *, aliases: bool = False) -> list[Slot]:
    """Return the slots of a model's parameters and of the buffers that its state dict holds.

    Args:
        model: any module, wrapped or not.
        aliases: False (default) gives a tied tensor once, under its first name; True under each of its names.

    Raises:
        ValueError: two different tensors have one canonical name.
    """
    slots: dict[str, Slot] = {}
    seen: set[int] = set()
    for prefix, module in model.named_modules(remove_duplicate=not aliases):
        for holder, is_buffer in ((module._parameters, False), (module._buffers, True)):
            for leaf, tensor in holder.items():
                if tensor is None or (id(tensor) in seen and not aliases):
                    continue
                if is_buffer and leaf in module._non_persistent_buffers_set:
                    continue
                seen.add(id(tensor))
                name = canonical_name(f"{prefix}.{leaf}" if prefix else leaf)
                if name in slots and slots[name].tensor is not tensor:
                    raise ValueError(f"two tensors are both named {name!r} once the names of wrappers are removed")
                slots.setdefault(name, Slot(name, holder, leaf, is_buffer))
    return list(slots.values())


def local(tensor: Tensor) -> Tensor:
    """Return the part of a tensor that lies on this rank, as an alias: averaging is linear and needs no other part."""
    to_local = getattr(tensor, "to_local", None)  # DTensor
    part: Tensor = tensor if to_local is None else to_local()
    return part


def local_like(value: Tensor, tensor: Tensor) -> Tensor:
    """Return the part of a value that belongs to what this rank has of a tensor; a whole value is cut right here."""
    mesh = getattr(tensor, "device_mesh", None)  # DTensor
    if mesh is not None and not hasattr(value, "device_mesh"):
        from torch.distributed.tensor import distribute_tensor

        placements = getattr(tensor, "placements", None)
        value = distribute_tensor(value.to(tensor.device), mesh, placements, src_data_rank=None)
    return local(value)


def full(tensor: Tensor, wanted: bool) -> Tensor | None:
    """Return a tensor whole and on the CPU, gathered from all ranks that hold parts; None where it is not wanted."""
    gather = getattr(tensor, "full_tensor", None)  # DTensor
    whole: Tensor = tensor if gather is None else gather()
    return whole.cpu() if wanted else None


def is_writer(tensor: Tensor) -> bool:
    """Return whether this rank is the first of those that hold a tensor, and so the one that writes it."""
    mesh = getattr(tensor, "device_mesh", None)
    return mesh is None or not any(mesh.get_coordinate() or [1])


def check_names(what: str, given: Iterable[str], expected: Iterable[str], *, complete: bool = True) -> None:
    """Check that names match.

    Raises:
        ValueError: some are unknown or, where ``complete``, missing; the message names them.
    """
    given, expected = set(given), set(expected)
    unknown, missing = given - expected, (expected - given if complete else set())
    if unknown or missing:
        parts = [f"{label}: {_few(names)}" for label, names in (("unknown", unknown), ("missing", missing)) if names]
        raise ValueError(
            f"{what} does not fit the model; {'; '.join(parts)}. The model must be the one it was made for"
        )


def check_shapes(what: str, given: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> None:
    """Check the shapes of tensors that go by the same names.

    Raises:
        ValueError: some differ; the message names the first.
    """
    for name, tensor in given.items():
        if tensor.shape != expected[name].shape:
            raise ValueError(
                f"{what} has {name!r} as {list(tensor.shape)}, the model as {list(expected[name].shape)}; "
                "the model must be the one it was made for"
            )


def _few(names: set[str], limit: int = 5) -> str:
    shown = sorted(names)[:limit]
    return ", ".join(shown) + (f" and {len(names) - limit} more" if len(names) > limit else "")
