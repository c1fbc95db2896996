"""What all commands share: the application, option types, reading optimizers, checking a task, showing progress."""

from __future__ import annotations

import copy
import difflib
import inspect
import json
import shlex
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

import typer
from rich.console import Console

from guided_descent.bench.ranks import MODES, launched
from guided_descent.cli.errors import EXIT_CODES, FAILED, OK, CommandError

if TYPE_CHECKING:
    from guided_descent.bench.display import Display
    from guided_descent.bench.problem import Problem
    from guided_descent.bench.store import OptimizerSpec, Run
    from guided_descent.catalogue import Description

DEFAULT_PROBLEM, DEFAULT_STEPS = "lm-source", 300
DEFAULT_OPTIMIZERS = ("adamw", "nadamw", "muon", "soap")

command_line: list[str] = []  # the arguments of this call, for the record

app = typer.Typer(
    name="guided-descent",
    help="Choose, run and compare optimizers for PyTorch.\n\n"
    "Start with [bold]guided-descent compare[/bold]: in a few minutes it trains four optimizers on real text and "
    "writes a report page. Every command has --help with examples, and --json.",
    epilog=" ".join(EXIT_CODES.split()),
    add_completion=False,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
)


def count(least: int, text: str, default: str | None = None) -> Any:
    """An option for a whole number that must not be below ``least``; ``default`` is what the help shows for None."""

    def check(value: int | None) -> int | None:
        if value is not None and value < least:
            raise typer.BadParameter(f"{value} is too small, it must be {least} or more")
        return value

    return typer.Option(callback=check, help=text, show_default=default or True)


def check_parallel(mode: str | None) -> str | None:
    """Refuse an unknown way to share a run, and ranks that would each train the whole of it."""
    if mode is not None and mode not in MODES:
        raise typer.BadParameter(f"{mode!r} is unknown, it must be {' or '.join(MODES)}")
    if mode is None and (launched() or (0, 1))[1] > 1:
        raise typer.BadParameter("a launcher started several processes, and each would train the whole run: add ddp")
    return mode


Json = Annotated[bool, typer.Option("--json", help="Print JSON on stdout and nothing else there.")]
Optimizers = Annotated[
    list[str] | None,
    typer.Option(
        "--optimizer",
        "-o",
        metavar="NAME[:KEY=VALUE,...]",
        help="An optimizer, with hyperparameters if wanted: -o muon:lr=0.02,momentum=0.95. Repeat for more.",
    ),
]
Steps = Annotated[int | None, count(1, "Optimizer steps per run.", "the task's own number")]
Workers = Annotated[int, count(0, "Worker processes of one thread each; 0: this process.")]
Out = Annotated[Path, typer.Option(help="Folder for runs and results; made if missing.", file_okay=False)]
EvalEvery = Annotated[int | None, count(1, "Steps between evaluations.", "the task's own number")]


F = TypeVar("F", bound=Callable[..., Any])


def command(name: str | None = None, *, examples: Sequence[str], more: Sequence[str] = ()) -> Callable[[F], F]:
    """Register a command: its docstring is its help, with the lines of a paragraph joined, and the examples follow.

    Those in ``more`` are started by another program.
    """

    def register(function: F) -> F:
        paragraphs = (inspect.getdoc(function) or "").split("\n\n")
        text = "\n\n".join(" ".join(paragraph.split()) for paragraph in paragraphs)
        lines = [*(f"guided-descent {line}" for line in examples), *more]
        epilog = "\n\n".join(["[bold]Examples[/bold]", *(f"[dim]$[/dim] {line}" for line in lines)])
        return app.command(name, help=text, epilog=epilog)(function)

    return register


def _version(wanted: bool) -> None:
    if wanted:
        from importlib.metadata import version

        print(f"guided-descent {version('guided-descent')}")
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[bool, typer.Option("--version", callback=_version, is_eager=True, help="Print it.")] = False,
) -> None:
    """Common options."""


def print_json(document: Any) -> None:
    """Print a document on stdout; numbers that are not finite are null."""
    from guided_descent.bench.files import to_json

    print(json.dumps(to_json(document), indent=1))


def read_specs(texts: Sequence[str] | None, default: Sequence[str] = ()) -> list[OptimizerSpec]:
    """Read optimizers and refuse unknown names, with the nearest known one."""
    from guided_descent.bench.specs import known_optimizers, parse_optimizer

    specs = [parse_optimizer(text) for text in texts or default]
    for spec in specs:
        check_known(spec.name, known_optimizers())
    return specs


def check_known(name: str, names: Sequence[str]) -> None:
    """Refuse an unknown optimizer and name the nearest known one."""
    if name not in names:
        near = difflib.get_close_matches(name.lower().replace("-", "_"), names, 1, 0.5)
        hint = f"did you mean {near[0]!r}? " if near else ""
        raise CommandError(f"unknown optimizer {name!r}; {hint}guided-descent list shows all {len(names)}")


def check_task(problem: str, specs: Sequence[OptimizerSpec], seed: int = 0) -> Problem:
    """Load the task and build every optimizer on it once, so that mistakes show before anything runs."""
    from guided_descent.bench.problem import load_problem
    from guided_descent.bench.runner import build_optimizer

    task = load_problem(problem, seed)
    for spec in specs:
        try:
            build_optimizer(copy.deepcopy(task.model), spec)
        except (TypeError, ValueError, KeyError) as error:
            text = error.args[0] if isinstance(error, KeyError) and error.args else error
            raise CommandError(f"optimizer {spec.name!r}: {text}") from error
    return task


def default(description: Description, name: str) -> Any:
    """The documented default of a hyperparameter, or an en dash where the optimizer has none of this name."""
    return next((item["default"] for item in description.hyperparameters if item["name"] == name), "–")


def display(title: str = "runs") -> Display:
    """Progress on stderr."""
    from guided_descent.bench.display import Display

    return Display(Console(stderr=True), title, outcome)


def follow(problem: str, spec: OptimizerSpec, **options: Any) -> int:
    """Train as a rank that does not lead: nothing is printed and no file is touched."""
    from guided_descent.bench.pool import Stopped
    from guided_descent.bench.runner import train

    result = train(problem, spec, **options)
    if result.signal is not None:
        raise Stopped(result.signal)
    return OK if result.status == "complete" else FAILED


def outcome(run: Run) -> str:
    """How a run ended, in a few words."""
    if run.result is None or run.result.final is None:
        return f"{run.status} after {run.result.steps if run.result else 0} steps"
    return f"{run.config.metric} {run.result.final:.4f} {run.config.unit}".rstrip()


def this_command() -> str:
    """This command as one would type it."""
    return shlex.join(["guided-descent", *command_line])
