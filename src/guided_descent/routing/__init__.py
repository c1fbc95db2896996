"""From a model to a table of blocks: what each parameter is, how it is read as matrices, and why."""

from guided_descent.routing.infer import named_parameters, route
from guided_descent.routing.names import canonical_name
from guided_descent.routing.roles import Block, Piece, Role
from guided_descent.routing.rules import Rule, rule
from guided_descent.routing.table import Entry, Table, check_not_flattened

__all__ = [
    "Block",
    "Entry",
    "Piece",
    "Role",
    "Rule",
    "Table",
    "canonical_name",
    "check_not_flattened",
    "named_parameters",
    "route",
    "rule",
]
