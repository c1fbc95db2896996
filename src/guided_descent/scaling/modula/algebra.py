"""The algebra of masses and sensitivities, on trees that are declared or read off a model.

Source: Large et al. 2024, 2405.14813; Bernstein and Newhouse 2024, 2410.21265.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase

from guided_descent.routing import Block
from guided_descent.routing.names import near
from guided_descent.scaling.base import Blocks


class Module:
    """A part of a network, with its weights: what ``Atom``, ``Bond``, ``Sequence`` and the others have in common."""

    @property
    def sensitivity(self) -> float:
        """How many times longer the change of its output is than that of its input, at most."""
        raise TypeError(f"{type(self).__name__} does not define sensitivity")

    @property
    def mass(self) -> float:
        """The sum of the masses of its atoms."""
        return math.fsum(self.masses().values())

    def masses(self) -> dict[str, float]:
        """The mass of each atom, by name."""
        raise TypeError(f"{type(self).__name__} does not define masses")

    def after(self) -> dict[str, float]:
        """The sensitivity of the output to the output of each atom: products along a way, summed over the ways."""
        raise TypeError(f"{type(self).__name__} does not define after")

    def weighed(self, factor: float, pattern: str) -> Module:
        """The same module with the masses of the atoms that match a glob multiplied."""
        raise TypeError(f"{type(self).__name__} does not define weighed")

    def tare(self, mass: float = 1.0, pattern: str = "*") -> Module:
        """The same module with masses scaled to a total: the share of a compound in the learning, whatever its depth.

        Args:
            mass: Total mass of the atoms that match.
            pattern: Glob on their names, such as ``"blocks.*"``.

        Raises:
            ValueError: None that has a mass matches, or ``mass`` is negative.
        """
        _check("mass", mass)
        now = math.fsum(m for name, m in self.masses().items() if fnmatchcase(name, pattern))
        if now == 0:
            raise ValueError(f"no atom with a mass matches {pattern!r}; there are {', '.join(self.masses()) or 'none'}")
        return self.weighed(mass / now, pattern)

    def targets(self, target: float = 1.0) -> dict[str, float]:
        """How far each atom may move in its norm, so that the output moves by ``target`` in all.

        An atom gets ``target m / (M s)``, its share of the mass M of the whole over the sensitivity s of what comes
        after it; 0 without mass. It is what the recursion gives: ``t m0 / (m s1)`` and ``t m1 / m`` for the first and
        the second module of a composition of mass m, and ``t m_i / m`` for the members of a tuple.
        """
        masses, after, mass = self.masses(), self.after(), self.mass
        return {name: target * m / (mass * after[name]) if m else 0.0 for name, m in masses.items()}

    def apply(self, blocks: Blocks, needed: Collection[str]) -> dict[str, tuple[Block, ...]]:
        """The blocks with ``lr_scale`` multiplied by their targets; see ``Parametrization``."""
        targets = self.targets()
        used: set[str] = set()

        def scaled(name: str, block: Block) -> Block:
            found = next((each for each in (block.key, name, name.removesuffix(".weight")) if each in targets), None)
            if found is None and name in needed:
                raise ValueError(
                    f"the modular norm does not name {block.key!r}, which is to be dualized: the forward pass does not "
                    f"reach it, or the declared tree lacks modula.Atom({name!r})"
                )
            if found is None:
                return block
            used.add(found)
            return replace(block, lr_scale=block.lr_scale * targets[found])

        made = {name: tuple(scaled(name, block) for block in own) for name, own in blocks.items()}
        for name in targets:
            if name not in used:
                raise ValueError(
                    f"the modular norm names {name!r}, which is no weight here; the nearest are: {near(name, blocks)}"
                )
        return made


@dataclass(frozen=True)
class Atom(Module):
    """A weight: a Linear, a Conv2d, an Embedding, or another one with a norm.

    Attributes:
        name: Full name of the module, of the parameter, or of one map in it, such as ``attn.in_proj_weight.q``.
        mass: Its share in the learning, relative to other atoms; one of 0 is not moved.
        sensitivity: Its own, for weights of norm 1.
    """

    name: str
    mass: float = 1.0
    sensitivity: float = 1.0

    def __post_init__(self) -> None:
        _check("mass", self.mass)
        _check("sensitivity", self.sensitivity, above=True)

    def masses(self) -> dict[str, float]:
        """Its own."""
        return {self.name: self.mass}

    def after(self) -> dict[str, float]:
        """Nothing comes after it."""
        return {self.name: 1.0}

    def weighed(self, factor: float, pattern: str) -> Module:
        """Its mass multiplied, where its name matches."""
        return replace(self, mass=self.mass * factor) if fnmatchcase(self.name, pattern) else self


@dataclass(frozen=True)
class Bond(Module):
    """A module without weights, such as a nonlinearity: 1 / sqrt(2) for ReLU, 1 for what changes no lengths."""

    sensitivity: float = 1.0

    def __post_init__(self) -> None:
        _check("sensitivity", self.sensitivity, above=True)

    def masses(self) -> dict[str, float]:
        """None."""
        return {}

    def after(self) -> dict[str, float]:
        """None."""
        return {}

    def weighed(self, factor: float, pattern: str) -> Module:
        """It has no mass."""
        return self


def Scale(factor: float) -> Bond:
    """Multiplication by a number: of sensitivity ``|factor|``.

    Raises:
        ValueError: The factor is 0.
    """
    return Bond(abs(factor))


class Compound(Module):
    """Modules that are put together; a name stands for the atom of that name."""

    def __init__(self, *modules: Module | str) -> None:
        self.modules = tuple(Atom(each) if isinstance(each, str) else each for each in modules)
        for each in self.modules:
            if not isinstance(each, Module):
                raise TypeError(f"{type(self).__name__} takes modules or names of weights, got {each!r}")

    def __eq__(self, other: object) -> bool:
        return type(self) is type(other) and self.modules == getattr(other, "modules", None)

    def __hash__(self) -> int:
        return hash((type(self), self.modules))

    def __repr__(self) -> str:
        return f"{type(self).__name__}({', '.join(map(repr, self.modules))})"

    def masses(self) -> dict[str, float]:
        """Those of all members; an atom that occurs twice is one weight."""
        return {name: m for each in self.modules for name, m in each.masses().items()}

    def weighed(self, factor: float, pattern: str) -> Module:
        """The same of each member."""
        return type(self)(*(each.weighed(factor, pattern) for each in self.modules))


class Sequence(Compound):
    """Modules one after another, the first one first: masses add and sensitivities multiply."""

    @property
    def sensitivity(self) -> float:
        """The product."""
        return math.prod(each.sensitivity for each in self.modules)

    def after(self) -> dict[str, float]:
        """What comes after an atom in its member, times the members that follow."""
        follow = [Sequence(*self.modules[i + 1 :]).sensitivity for i in range(len(self.modules))]
        return _added((each.after(), s) for each, s in zip(self.modules, follow))


class Tuple(Compound):
    """Modules side by side, of one input or several: masses add, and so do sensitivities."""

    @property
    def sensitivity(self) -> float:
        """The sum."""
        return math.fsum(each.sensitivity for each in self.modules)

    def after(self) -> dict[str, float]:
        """That of each member: the output is all of theirs."""
        return _added((each.after(), 1.0) for each in self.modules)


class Sum(Tuple):
    """The sum of the outputs of modules with one input, which has the numbers of their tuple."""


def Residual(*branch: Module | str, skip: float = 1.0, scale: float = 1.0, depth: int | None = None) -> Sum:
    """``skip x + scale f(x)``, with f the modules of the branch in their order.

    Args:
        *branch: Modules or names of atoms.
        skip: Factor of the input; 0 leaves it out.
        scale: Factor of the branch.
        depth: Number L of residual blocks in a stack, for the factors ``1 - 1/L`` and ``1/L``, under which the
            sensitivity of a stack does not grow with its depth.

    Raises:
        ValueError: ``scale`` is 0, or ``depth`` is less than 1.
    """
    if depth is not None:
        if depth < 1:
            raise ValueError(f"depth={depth} must be at least 1: it is the number of residual blocks")
        skip, scale = 1 - 1 / depth, 1 / depth
    way = Sequence(*branch, Scale(scale))
    return Sum(Scale(skip), way) if skip else Sum(way)


@dataclass(frozen=True)
class Network(Module):
    """What has been read off a model: its atoms, each with what comes after it."""

    weights: Mapping[str, float]
    following: Mapping[str, float]
    sensitivity: float = 1.0

    def masses(self) -> dict[str, float]:
        """As read."""
        return dict(self.weights)

    def after(self) -> dict[str, float]:
        """As read."""
        return dict(self.following)

    def weighed(self, factor: float, pattern: str) -> Module:
        """Other masses for the atoms that match."""
        changed = {name: m * factor if fnmatchcase(name, pattern) else m for name, m in self.weights.items()}
        return replace(self, weights=changed)


def flat(names: Iterable[str]) -> Tuple:
    """All weights side by side, each with a mass of 1: for weights of which nothing else is known."""
    return Tuple(*names)


def _added(members: Iterable[tuple[Mapping[str, float], float]]) -> dict[str, float]:
    found: dict[str, float] = {}
    for after, factor in members:
        for name, s in after.items():
            found[name] = found.get(name, 0.0) + factor * s
    return found


def _check(name: str, value: float, *, above: bool = False) -> None:
    if not math.isfinite(value) or value < 0 or (above and value == 0):
        raise ValueError(f"{name}={value} must be a finite number {'above 0' if above else 'of at least 0'}")
