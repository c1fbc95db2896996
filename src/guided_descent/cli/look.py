"""Commands that look: list, describe, explain."""

from __future__ import annotations

from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

import guided_descent
from guided_descent.catalogue import table as optimizer_table
from guided_descent.cli.common import (
    DEFAULT_PROBLEM,
    Json,
    check_known,
    check_task,
    command,
    default,
    print_json,
    read_specs,
)


@command("list", examples=["list", "list --family spectral --json"])
def list_command(
    family: Annotated[str | None, typer.Option(help="Only this family.", show_default="all")] = None,
    as_json: Json = False,
    markdown: Annotated[bool, typer.Option("--markdown", help="The page of all of them, docs/optimizers.md.")] = False,
) -> None:
    """List every optimizer, and the wrappers that any of them can carry: key, family, paper and one line about it."""
    if markdown:
        print(optimizer_table(), end="")
        return
    descriptions = [guided_descent.describe(name) for name in guided_descent.list_optimizers(family=family)]
    more = [] if family else [guided_descent.describe(name) for name in guided_descent.list_optimizers("wrapper")]
    if as_json:
        found = {"optimizers": [description.to_dict() for description in descriptions]}
        print_json(found | ({"wrappers": [description.to_dict() for description in more]} if more else {}))
        return
    table = Table(box=None, pad_edge=False, header_style="bold")
    for title in ("optimizer", "family", "lr", "source", "what it does"):
        table.add_column(title, overflow="fold")
    for description in descriptions + more:
        summary = description.formula.partition("\n")[0]
        table.add_row(
            description.key, description.family, str(default(description, "lr")), description.paper, Text(summary)
        )
    Console().print(table)


@command(examples=["describe muon"])
def describe(
    name: Annotated[str, typer.Argument(help="A key from guided-descent list.")], as_json: Json = False
) -> None:
    """Show one optimizer: formula, hyperparameters with defaults and ranges, source."""
    check_known(name, guided_descent.list_optimizers() + guided_descent.list_optimizers("wrapper"))
    description = guided_descent.describe(name)
    if as_json:
        print_json(description.to_dict())
    else:
        print(description)


@command(examples=["explain muon", "explain soap:lr=3e-3 --problem mypkg.task:make"])
def explain(
    optimizer: Annotated[str, typer.Argument(metavar="NAME[:KEY=VALUE,...]", help="For example muon:lr=0.02.")],
    problem: Annotated[str, typer.Option(help="A workload or package.module:function.")] = DEFAULT_PROBLEM,
    as_json: Json = False,
) -> None:
    """Show which parameter of a model goes to which method, why, and what that costs in memory and arithmetic."""
    (spec,) = read_specs([optimizer])
    task = check_task(problem, [spec])
    explanation = guided_descent.explain(guided_descent.optimizer(spec.name, task.model, **spec.hyper))
    if as_json:
        print_json(explanation.to_dict())
    else:
        print(explanation)
