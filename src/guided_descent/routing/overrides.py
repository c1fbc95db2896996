"""How a rule changes what was inferred of one parameter, with every mismatch an error."""

from __future__ import annotations

from dataclasses import replace

from torch import Tensor

from guided_descent.routing.kinds import Guess, unusable
from guided_descent.routing.layouts import Layout
from guided_descent.routing.roles import Role
from guided_descent.routing.rules import Rule


def override(rule: Rule, name: str, tensor: Tensor, shape: tuple[int, ...], guess: Guess) -> Guess:
    """The guess as the rule corrects it.

    Raises:
        ValueError: The rule asks for a matrix, a split or heads that the parameter's shape does not allow.
    """
    subject = f"rule {rule.pattern!r} on {name!r} {list(shape)}"
    role = rule.role or guess.role
    if rule.role is None and role is Role.HEAD and rule.split not in (None, 1):
        role = Role.FUSED  # several maps side by side are no head
    if not role.is_matrix:
        for option in ("split", "heads", "transposed"):
            if getattr(rule, option) is not None:
                raise ValueError(
                    f"{subject}: {option}={getattr(rule, option)!r} needs a matrix, but the role is "
                    f"{role.value!r}; narrow the pattern, or declare role='matrix' or role='fused' as well"
                )
        return Guess(role, f"rule {rule.pattern!r}", guess.layout)
    blocked = unusable(tensor, shape)
    if blocked is not None or guess.flattened:
        raise ValueError(f"{subject}: role {role.value!r} is impossible: {(blocked or guess).why}")
    layout = _layout(role, shape, guess, subject)
    if rule.transposed is not None:
        layout = replace(layout, out=int(layout.stacked) + int(rule.transposed))
    if rule.split is not None:
        layout = replace(layout, parts=_parts(rule.split, shape[layout.out], layout, subject))
    if rule.heads is not None:
        first = layout.parts[0][1] if layout.parts else shape[layout.out]
        head, rest = divmod(first, rule.heads)
        sizes = [size for _, size in layout.parts] or [first]
        if rest or any(size % head for size in sizes):
            raise ValueError(f"{subject}: heads={rule.heads} does not divide the rows {sizes} into equal heads")
        layout = replace(layout, head=head)
    if rule.role is None and role is Role.MATRIX and len(layout.parts) > 1:
        role = Role.FUSED
    if rule.role is None and role is Role.FUSED and not layout.parts:
        role = Role.MATRIX
    return Guess(role, f"rule {rule.pattern!r}", layout)


def _layout(role: Role, shape: tuple[int, ...], guess: Guess, subject: str) -> Layout:
    """What was inferred where it fits the role, else the plain reading of the shape."""
    if guess.layout is not None and (role is guess.role or role not in (Role.EXPERT, Role.CONV)):
        keep = role is guess.role or role is Role.FUSED
        return guess.layout if keep else replace(guess.layout, parts=())
    axes = len(shape)
    if role is Role.EXPERT and axes == 3:
        return Layout(out=1, stacked=True)
    if (role is Role.CONV and axes > 2) or (role not in (Role.EXPERT, Role.CONV) and axes == 2):
        return Layout()
    needs = {Role.EXPERT: "3 axes [E, out, in]", Role.CONV: "3 axes or more [out, in, kernel]"}
    hint = "; role='expert' batches over axis 0, role='conv' flattens to (out, rest)" if axes > 2 else ""
    raise ValueError(f"{subject}: role {role.value!r} needs {needs.get(role, '2 axes')}{hint}")


def _parts(split: tuple[int, ...] | int, rows: int, layout: Layout, subject: str) -> tuple[tuple[str, int], ...]:
    if isinstance(split, int):
        if rows % split:
            raise ValueError(f"{subject}: split={split} does not divide its {rows} outputs into equal parts")
        sizes = (rows // split,) * split
    else:
        sizes = split
    if sum(sizes) != rows:
        raise ValueError(f"{subject}: split={sizes} adds up to {sum(sizes)}, but it has {rows} outputs")
    if len(sizes) == 1:
        return ()
    if sizes == tuple(size for _, size in layout.parts):
        return layout.parts
    return tuple((str(position), size) for position, size in enumerate(sizes))
