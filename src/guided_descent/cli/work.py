"""Commands that work: train, compare, tune, report."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from guided_descent.bench.ranks import MODES, launched
from guided_descent.cli.common import (
    DEFAULT_OPTIMIZERS,
    DEFAULT_PROBLEM,
    DEFAULT_STEPS,
    EvalEvery,
    Json,
    Optimizers,
    Out,
    Steps,
    Workers,
    check_parallel,
    check_task,
    command,
    count,
    display,
    follow,
    outcome,
    print_json,
    read_specs,
    this_command,
)
from guided_descent.cli.errors import FAILED, OK, CommandError


@command(
    examples=[
        "train -o muon:lr=0.02",
        "train mypkg.task:make -o adamw:lr=1e-3,weight_decay=0.1 --steps 1000 --out runs/mine",
        "train mypkg.task:make --checkpoint-every 100 --keep 3 --keep-best 1 --async-checkpoints",
    ],
    more=["torchrun --nproc-per-node 2 -m guided_descent train mypkg.task:make --parallel ddp"],
)
def train(
    problem: Annotated[str, typer.Argument(help="A workload or package.module:function.")] = DEFAULT_PROBLEM,
    optimizer: Annotated[
        str, typer.Option("--optimizer", "-o", metavar="NAME[:KEY=VALUE,...]", help="For example muon:lr=0.02.")
    ] = "adamw",
    seed: Annotated[int, count(0, "Seed of initial weights and data order.")] = 0,
    steps: Steps = None,
    out: Out = Path("runs"),
    eval_every: EvalEvery = None,
    checkpoint_every: Annotated[
        int | None,
        count(0, "Steps between checkpoints; 0: only at an interruption.", "a quarter of the run"),
    ] = None,
    keep: Annotated[int, count(1, "The newest checkpoints that stay.")] = 2,
    keep_best: Annotated[
        int, count(0, "The best states by the task's metric that are saved at evaluations and stay as well.")
    ] = 0,
    async_checkpoints: Annotated[
        bool, typer.Option("--async-checkpoints", help="Write checkpoints in the background while training goes on.")
    ] = False,
    micro_batches: Annotated[
        int, count(1, "Parts of a batch whose gradients are added before a step, to save memory.")
    ] = 1,
    parallel: Annotated[
        str | None,
        typer.Option(
            help=f"Share every batch among the processes that torchrun started: {', '.join(MODES)}.",
            callback=check_parallel,
            show_default="one process",
        ),
    ] = None,
    threads: Annotated[int, count(1, "CPU threads, in each process.")] = 1,
    fresh: Annotated[bool, typer.Option("--fresh", help="Delete what the run's folder holds and start again.")] = False,
    as_json: Json = False,
) -> int:
    """Train one task with one optimizer. A run that was stopped or killed continues, bit for bit.

    SIGTERM and the first Ctrl-C save at the next safe point: after the step that runs, or at once in an evaluation.
    With --parallel another number of processes may continue a run, closely but not bit for bit.
    """
    from guided_descent.bench.pool import Job, run_jobs, train_run

    (spec,) = read_specs([optimizer])
    task = check_task(problem, [spec], seed)
    steps = steps or task.steps
    kwargs = {"seed": seed, "steps": steps, "out": str(out), "eval_every": eval_every, "resume": not fresh}
    kwargs |= {"checkpoint_every": checkpoint_every, "keep": keep, "keep_best": keep_best, "threads": threads}
    kwargs |= {"async_checkpoints": async_checkpoints, "micro_batches": micro_batches, "parallel": parallel}
    if parallel and (launched() or (0, 1))[0]:
        return follow(problem, spec, **kwargs)
    job = Job(f"{spec.label} on {problem}, seed {seed}", steps, train_run, (problem, spec), kwargs)
    (done,) = run_jobs([job], 0, display("run"))
    if as_json:
        print_json({"folder": str(done.path), "config": asdict(done.config), "result": asdict(done.result)})
    else:
        print(f"{outcome(done)} after {done.result.steps} steps, in {done.path}")
    return OK if done.status == "complete" else FAILED


@command(
    examples=[
        "compare",
        "compare mypkg.task:make -o adamw -o muon --seeds 5",
        "compare mlp-digits -o adamw:lr=1e-3 -o soap:lr=3e-3 --out runs/mine",
        "compare mypkg.task:make --tuning runs/tune/tuning.json",
    ]
)
def compare(
    problems: Annotated[
        list[str] | None,
        typer.Argument(
            help="Workloads or package.module:function.", show_default=f"{DEFAULT_PROBLEM} at {DEFAULT_STEPS} steps"
        ),
    ] = None,
    optimizer: Optimizers = None,
    seeds: Annotated[int, count(1, "Runs per optimizer; seeds 100, 101, ...")] = 3,
    steps: Steps = None,
    out: Out = Path("runs/compare"),
    workers: Workers = 2,
    tuning: Annotated[
        str,
        typer.Option(
            help="Where learning rates come from: auto (what comes with the package), none, or a file of tune."
        ),
    ] = "auto",
    timing_rounds: Annotated[int, count(0, "Blocks of 10 steps in the timing pass; 0: no timing.")] = 3,
    eval_every: EvalEvery = None,
    page: Annotated[bool, typer.Option("--report/--no-report", help="Write report.html and PNGs.")] = True,
    as_json: Json = False,
) -> int:
    """Train optimizers with the same budget, judge them fairly, and write a report page.

    Without -o: adamw, nadamw, muon, soap. All of them see the same weights, batches, steps and schedule. A winner is
    named only with 3 seeds or more and equal tuning; hyperparameters typed with -o count as set by hand. The same
    command again continues a stopped comparison.
    """
    from guided_descent.bench.compare import FIRST_SEED, arms_for
    from guided_descent.bench.compare import compare as run_comparison
    from guided_descent.bench.store import slug
    from guided_descent.bench.tuning import Tuning
    from guided_descent.bench.workloads import expand

    if steps is None and not problems:
        steps = DEFAULT_STEPS
    refs = [ref for name in problems or [DEFAULT_PROBLEM] for ref in expand(name)]
    specs = read_specs(optimizer, DEFAULT_OPTIMIZERS)
    chosen = Tuning.load(Path(tuning)) if tuning not in ("auto", "none") else None
    numbers, command, found = list(range(FIRST_SEED, FIRST_SEED + seeds)), this_command(), []
    for ref in refs:
        task = check_task(ref, specs, numbers[0])
        arms, notes = arms_for(specs, ref, steps or task.steps, chosen, tuning == "auto")
        comparison = run_comparison(
            ref,
            arms,
            seeds=numbers,
            steps=steps or task.steps,
            out=out if len(refs) == 1 else out / slug(ref),
            workers=workers,
            timing_rounds=timing_rounds,
            display=display(),
            options={"eval_every": eval_every},
            command=command,
            notes=notes,
        )
        found.append(comparison)
        if page:
            from guided_descent.bench.report import write_report

            write_report(comparison.document, comparison.out)
        if not as_json:
            _show(comparison.document, comparison.out, page)
    if as_json:
        print_json(found[0].document if len(found) == 1 else {"comparisons": [c.document for c in found]})
    return FAILED if any(comparison.failed for comparison in found) else OK


def _show(document: dict[str, Any], out: Path, page: bool) -> None:
    """Table, verdict, small print and where things are."""
    from guided_descent.bench import tables

    console = Console()
    console.print()
    if console.width >= 150:
        console.print(tables.rich_table(document))
    else:
        print("\n".join(tables.stacked(document)))
    console.print()
    console.print(document["verdict"]["sentence"], style="bold", markup=False, highlight=False)
    for note in document["notes"]:
        console.print(f"Note: {note}.", markup=False, highlight=False)
    console.print()
    for name, fact in tables.protocol(document):
        print(f"{name + ':':<24} {fact}")
    print(f"{'results:':<24} {out / ('report.html' if page else 'comparison.json')}")


@command(
    examples=[
        "tune -o adamw -o nadamw -o muon --out runs/tune",
        "tune mypkg.task:make --steps 500 --out runs/tune-mine",
        "compare mypkg.task:make --steps 500 --tuning runs/tune-mine/tuning.json",
    ]
)
def tune(
    problem: Annotated[str, typer.Argument(help="A workload or package.module:function.")] = DEFAULT_PROBLEM,
    optimizer: Annotated[
        list[str] | None, typer.Option("--optimizer", "-o", metavar="NAME", help="An optimizer. Repeat for more.")
    ] = None,
    steps: Steps = None,
    seeds: Annotated[int, count(1, "Seeds per trial: 0, 1, ... (below 100).")] = 2,
    out: Out = Path("runs/tune"),
    workers: Workers = 2,
    eval_every: EvalEvery = None,
    as_json: Json = False,
) -> int:
    """Find hyperparameters with the same number of trials for every optimizer; writes tuning.json for compare.

    12 trials each: six learning rates around the documented default, four values of one more knob (the auxiliary
    learning rate of a hybrid such as muon, else the weight decay), two learning rates around the best. While any best
    is at an end of its grid, and at most twice, every optimizer gets one more. Finished trials are not run again.
    """
    from guided_descent.bench import tuning
    from guided_descent.bench.specs import format_hyper

    specs = read_specs(optimizer, DEFAULT_OPTIMIZERS)
    if fixed := [spec.label for spec in specs if spec.hyper]:
        raise CommandError(f"tune chooses the learning rates itself; give {fixed[0]!r} without hyperparameters")
    task = check_task(problem, specs)
    if steps is None:
        steps = DEFAULT_STEPS if problem == DEFAULT_PROBLEM else task.steps
    result = tuning.tune(
        problem,
        {spec.name: tuning.space_of(spec.name) for spec in specs},
        steps=steps,
        out=out,
        seeds=range(seeds),
        workers=workers,
        display=display("trials"),
        # One evaluation at the end is enough, unless the metric is the training loss since the last one.
        options={"eval_every": eval_every or (steps if task.evaluate else None), "checkpoint_every": 0},
        facts={"command": this_command()},
    )
    path = out / "tuning.json"
    if as_json:
        print(path.read_text(encoding="utf-8"), end="")
        return OK
    for name, trials in result.optimizers.items():
        edge = f" (at the {trials.edge}: no winner can be named)" if trials.edge else ""
        print(f"{name}: {format_hyper(trials.hyper)}{edge}")
        for (lr, knob), mean in trials.means().items():
            print(f"  lr {lr:<10.4g} {trials.space.knob} {knob:<10.4g} {mean:.5g}")
    print(f"use it: guided-descent compare {problem} --steps {steps} --tuning {path}")
    return OK


@command(examples=["report runs/demo"])
def report(
    folder: Annotated[Path, typer.Argument(help="A folder that compare filled.")],
    out: Annotated[
        Path | None, typer.Option(help="Where to write; the same folder if left out.", file_okay=False)
    ] = None,
    as_json: Json = False,
) -> None:
    """Write the report page and its pictures again from the results in a folder."""
    from guided_descent.bench.compare import load_comparison
    from guided_descent.bench.report import write_report

    document = load_comparison(folder)
    paths = write_report(document, out or folder)
    if as_json:
        print_json({"files": [str(path) for path in paths]})
    else:
        print("\n".join(map(str, paths)))
