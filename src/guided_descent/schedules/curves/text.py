"""Curves from text: what ``repr`` writes, ``parse`` reads. Nothing of the text is executed."""

from __future__ import annotations

import ast
import difflib
from collections.abc import Callable, Mapping

from .base import Curve
from .endless import inverse_sqrt, power, powers, restarts, step
from .shapes import COOLDOWNS, constant, rise, warmup

#: Every function that makes a curve, by name.
FUNCTIONS: dict[str, Callable[..., Curve]] = {
    "warmup": warmup,
    "rise": rise,
    "constant": constant,
    **dict(sorted(COOLDOWNS.items())),
    **{make.__name__: make for make in (inverse_sqrt, power, step, powers, restarts)},
}

GRAMMAR = (
    "curves joined by >>, such as warmup(200) >> constant(7800) >> linear(2000); a number may scale: 0.5 * linear(9)"
)


def parse(text: str, more: Mapping[str, Callable[..., Curve]] | None = None) -> Curve:
    """Return the curve that a text writes as ``repr`` does.

    Args:
        text: calls of the functions of this package with numbers and words, ``>>``, and ``*`` by a number. A quotient
            such as ``1/3`` is a number.
        more: further functions by name.

    Raises:
        ValueError: it is no such text, or a curve in it is impossible.

    Example:
        >>> parse("warmup(200) >> cosine(800, floor=1/10)")
        warmup(200) >> cosine(800, floor=0.1)
    """
    try:
        tree = ast.parse(text.strip(), mode="eval")
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        raise ValueError(f"curve {text!r} cannot be read; write {GRAMMAR}") from error
    try:
        curve = _value(tree.body, FUNCTIONS | dict(more or {}))
    except (TypeError, ZeroDivisionError, OverflowError, RecursionError) as error:
        raise ValueError(f"curve {text!r}: {error}; write {GRAMMAR}") from error
    if not isinstance(curve, Curve):
        raise ValueError(f"curve {text!r} is {curve!r} and no curve; write {GRAMMAR}")
    return curve


def _value(node: ast.expr, functions: Mapping[str, Callable[..., Curve]]) -> Curve | float | str | bool | None:
    match node:
        case ast.Constant(value=bool() | int() | float() | str() | None as value):
            return value
        case ast.UnaryOp(op=ast.USub(), operand=ast.Constant(value=int() | float() as value)):
            return -value
        case ast.BinOp(left=left, op=ast.RShift(), right=right):
            a, b = _value(left, functions), _value(right, functions)
            if isinstance(a, Curve) and isinstance(b, Curve):
                return a >> b
            raise TypeError(">> joins two curves")
        case ast.BinOp(left=left, op=ast.Mult(), right=right):
            by, scaled = _value(left, functions), _value(right, functions)
            if isinstance(by, Curve):
                by, scaled = scaled, by
            if isinstance(scaled, Curve) and isinstance(by, int | float):
                return by * scaled
            raise TypeError("* takes a number and a curve")
        case ast.BinOp(left=left, op=ast.Div(), right=right):
            over, under = _value(left, functions), _value(right, functions)
            if isinstance(over, int | float) and isinstance(under, int | float):
                return over / under
            raise TypeError("/ takes two numbers")
        case ast.Call(func=ast.Name(id=name), args=positional, keywords=keywords):
            if name not in functions:
                near = difflib.get_close_matches(name, functions, 1)
                hint = f"did you mean {near[0]!r}? " if near else ""
                raise TypeError(f"there is no curve {name!r}; {hint}There are {', '.join(functions)}")
            given = {word.arg: _value(word.value, functions) for word in keywords if word.arg is not None}
            if len(given) < len(keywords):
                raise TypeError("** cannot be read")
            return functions[name](*(_value(each, functions) for each in positional), **given)
    raise TypeError(f"{ast.unparse(node)} cannot be read")
