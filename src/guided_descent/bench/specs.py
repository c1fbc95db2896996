"""Optimizers as text, the way the command line and the tables write them: ``muon:lr=0.02,momentum=0.95``."""

from __future__ import annotations

import ast
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

from guided_descent.bench.files import BenchError
from guided_descent.bench.store import OptimizerSpec

TORCH_LBFGS = "torch_lbfgs"
OPENING, CLOSING = "([{", ")]}"


def parse_optimizer(text: str) -> OptimizerSpec:
    """Read ``name`` or ``name:key=value,key=value``; values are Python literals or bare words, keys may be dotted.

    Args:
        text: For example ``adamw``, ``adamw:lr=3e-3,betas=(0.9,0.95)`` or ``muon:lr=0.02,aux.lr=1e-3``.

    Raises:
        BenchError: No name, a pair without ``=``, a key that stands twice.

    Example:
        >>> parse_optimizer("muon:lr=0.02,aux.lr=1e-3,nesterov=true,scale=original").hyper
        {'lr': 0.02, 'aux': {'lr': 0.001}, 'nesterov': True, 'scale': 'original'}
    """
    name, _, rest = text.strip().partition(":")
    if not name.strip():
        raise BenchError(f"{text!r} names no optimizer; write it as name or name:key=value,key=value")
    hyper: dict[str, Any] = {}
    for pair in _split(rest):
        key, equals, value = (part.strip() for part in pair.partition("="))
        if not (key and equals and value):
            raise BenchError(f"{pair.strip()!r} in {text!r} is no key=value pair; write for example {name}:lr=0.01")
        place = hyper
        *parents, last = key.split(".")
        for parent in parents:
            place = place.setdefault(parent, {})
            if not isinstance(place, dict):
                raise BenchError(f"{key!r} in {text!r}: {parent!r} already has the value {place!r}; give it once")
        if last in place:
            raise BenchError(f"{key!r} stands twice in {text!r}; give it once")
        place[last] = _value(value)
    label = name if not hyper else f"{name} {format_hyper(hyper)}"
    return OptimizerSpec(name.strip(), hyper, label)


def known_optimizers() -> list[str]:
    """Every name an optimizer may have here, sorted: the recipes, the solvers, and torch's L-BFGS beside them."""
    import guided_descent
    from guided_descent.solvers import SOLVERS

    return sorted([*guided_descent.list_optimizers(), *SOLVERS, TORCH_LBFGS])


def format_hyper(hyper: Mapping[str, Any]) -> str:
    """Hyperparameters as text.

    Example:
        >>> format_hyper({"lr": 0.02, "aux": {"lr": 0.001}})
        'lr=0.02 aux.lr=0.001'
    """
    return " ".join(f"{key}={value:g}" if isinstance(value, float) else f"{key}={value}" for key, value in _flat(hyper))


def unique_labels(specs: Sequence[OptimizerSpec]) -> list[OptimizerSpec]:
    """The specs with a number behind a label that already stood: an A/A comparison needs two names.

    Example:
        >>> [spec.label for spec in unique_labels([OptimizerSpec("adamw")] * 3)]
        ['adamw', 'adamw (2)', 'adamw (3)']
    """
    seen: dict[str, int] = {}
    result = []
    for spec in specs:
        seen[spec.label] = count = seen.get(spec.label, 0) + 1
        result.append(spec if count == 1 else replace(spec, label=f"{spec.label} ({count})"))
    return result


def _flat(hyper: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in hyper.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield prefix + key, value


def _split(text: str) -> Iterator[str]:
    """Split at commas that are in no bracket."""
    depth, start = 0, 0
    for place, letter in enumerate(text):
        depth += (letter in OPENING) - (letter in CLOSING)
        if letter == "," and depth == 0:
            yield text[start:place]
            start = place + 1
    if text[start:].strip():
        yield text[start:]


def _value(text: str) -> Any:
    if text.lower() in ("true", "false"):
        return text.lower() == "true"
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text
