"""The modular norm: how far each weight of a network may move, by what comes after it.

A network is a tree of modules. Each has a *mass*, its share in the learning, and a *sensitivity*, how many times longer
its output can become than a change of its input. ``targets`` divides one step of the whole network among its weights,
so that the output changes by no more than 1 (to first order); the learning rate then carries over widths and depths.

Example:
    >>> from guided_descent import modula
    >>> tree = modula.Sequence(modula.Atom("0"), modula.Bond(0.5), modula.Atom("2"))
    >>> tree.mass, tree.sensitivity, tree.targets()
    (2.0, 0.5, {'0': 1.0, '2': 0.5})
"""

from guided_descent.scaling.modula.algebra import Atom, Bond, Module, Residual, Scale, Sequence, Sum, Tuple, flat
from guided_descent.scaling.modula.reading import read

__all__ = ["Atom", "Bond", "Module", "Residual", "Scale", "Sequence", "Sum", "Tuple", "flat", "read"]
