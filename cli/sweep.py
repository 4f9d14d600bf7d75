"""`collapse-probe sweep`: the same training over a grid, one folder a cell, one table and one page."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click
from collapse_probe.cli import options
from collapse_probe.cli.train import INTERRUPTED, duration, training

FAILED = 1


@click.command("sweep", cls=options.Command, context_settings={"help_option_names": ["-h", "--help"]})
@click.argument("recipe", metavar="[RECIPE]", default="digits-mhsa")
@click.option(
    "--vary",
    "words",
    multiple=True,
    metavar="NAME=V,V,…",
    help="Values of a field of the recipe or its model, or of fix: depth=8,16,24, width=32,64, fix=none,re-attention.",
)
@click.option("--seeds", type=click.IntRange(min=1), default=1, show_default=True, metavar="N", help="Runs of every cell.")
@options.data_address("--eval-data", "Images to measure on.  [default: the held-out ones]")
@click.option("--limit", type=click.IntRange(min=1), metavar="N", help="Measure a seeded draw of them.  [default: all]")
@click.option(
    "--null-images",
    type=click.IntRange(min=0),
    default=64,
    show_default=True,
    metavar="N",
    help="Images for the untrained copy inside each cell's findings.",
)
@click.option("--jobs", type=click.IntRange(min=1), default=1, show_default=True, metavar="N", help="Cells at once.")
@options.answering("The folder is written all the same.")
@training
def command(quiet: bool, verbose: int, **flags: Any) -> None:
    """Train and measure RECIPE (default: digits-mhsa) for every combination of the varied values and every seed.

    Run again with the same folder: finished cells are kept, begun ones go on, failed ones are tried again. A
    cell that fails does not stop the others; the exit code is then 1.
    """
    options.across_processes(run)(quiet=quiet, **flags)


def run(
    *,
    recipe: str,
    words: Sequence[str],
    seeds: int,
    changes: dict[str, Any],
    steps: int | None,
    output: str | None,
    amp: bool,
    amp_dtype: str,
    dry_run: bool,
    as_json: str | None,
    no_page: bool,
    quiet: bool,
    **flags: Any,
) -> None:
    """Sweep, write the page, print the answer; exit with FAILED where a cell failed."""
    from collapse_probe.cli.console import Talk
    from collapse_probe.cli.output import keep, of_sweep, prepare, tell

    from collapse_probe.analysis.state.phases import CELLS, LOAD, PAGE

    talk, vary = Talk(quiet), varied(words, seeds)
    with talk.stages(LOAD, CELLS, *([] if no_page else [PAGE])):
        options.load_libraries()
        from collapse_probe.distributed import rank_and_world
        from collapse_probe.registry import RECIPES
        from collapse_probe.training.sweep import sweep

        named = RECIPES[recipe]()
        changes |= {} if steps is None else {"steps": steps}
        changes |= {"amp": amp_dtype} if amp else {}
        first = rank_and_world()[0] == 0
        folder = Path(output or Path("sweeps") / named.name)
        if not dry_run:
            prepare(folder, quiet)
            talk.begin(CELLS)
            try:
                result = sweep(
                    named,
                    vary,
                    folder,
                    seeds=seeds,
                    changes=changes,
                    watch=lambda total: talk.bar(total),
                    report=talk.say,
                    command=options.command_line(),
                    **flags,
                )
            except KeyboardInterrupt:
                click.echo(f"interrupted; the same command with -o {folder} goes on", err=True)
                raise click.exceptions.Exit(INTERRUPTED) from None
            if first:
                talk.begin(PAGE)
                keep(result, folder, no_page)
    if dry_run:
        if first:
            click.echo(forecasts(named, vary, seeds, changes, flags["device"]))
        return
    if first:
        tell(result, folder, answer_text(result), of_sweep(result), as_json, no_page)
    if result.failed:
        cell = result.failed[0]
        line = f"error: {len(result.failed)} of {len(result.cells)} cells failed, the first: {cell.name} ({cell.reason})"
        if first:
            click.echo(f"{line}; the same command tries them again", err=True)
        raise click.exceptions.Exit(FAILED)


def varied(words: Sequence[str], seeds: int) -> dict[str, list[Any]]:
    """The `--vary` words by name; wrong usage where there is nothing to vary or a name comes twice."""
    from collapse_probe.training.sweep_grid import read_vary

    if not words and seeds == 1:
        raise click.UsageError("Nothing to vary: give --vary NAME=V,V,… (depth=8,16,24), or --seeds above 1.")
    vary: dict[str, list[Any]] = {}
    for name, values in map(read_vary, words):
        if name in vary:
            raise click.UsageError(f"--vary {name} is given twice; write all its values in one: {name}=V,V,…")
        vary[name] = values
    return vary


def answer_text(result: Any) -> str:
    """The answers and the caveats as text."""
    from collapse_probe.cli.summary import sentences, written
    from rich.console import Console
    from rich.text import Text

    from collapse_probe.report.sweep.verdict import caveats, headline, verdicts

    def draw(console: Console) -> None:
        sentences(console, [headline(result)])
        for verdict in verdicts(result):
            console.print()
            if verdict.label:
                console.print(Text(f"{verdict.label}:"))
            for sentence in verdict.sentences:
                console.print(Text(sentence))
        console.print()
        sentences(console, (), caveats(result))

    return written(draw)


def forecasts(recipe: Any, vary: dict[str, list[Any]], seeds: int, changes: dict[str, Any], device: str) -> str:
    """Every cell with its parameters, steps and expected time; cells that differ in their seed alone are tried once."""
    from collapse_probe.training.forecast import forecast
    from collapse_probe.training.sweep import grid_of

    grid, notes = grid_of(recipe, vary, seeds, changes)
    costs: dict[str, Any] = {}
    lines, total = [], 0.0
    for cell in grid:
        key = json.dumps({**cell.recipe.to_json(), "seed": 0}, sort_keys=True)
        if key not in costs:
            costs[key] = forecast(cell.recipe, device=device)
        cost = costs[key]
        total += cost.seconds or 0.0
        steps = "steps not known" if cost.steps is None else f"{cost.steps:,} steps"
        expected = "time not known" if cost.seconds is None else duration(cost.seconds)
        lines.append(f"{cell.name:<44}  {cost.parameters:>12,} parameters  {steps}  {expected}")
    known = all(cost.seconds is not None for cost in costs.values())
    lines.append(f"{len(grid)} cells, {duration(total) if known else 'time not known'} of training one after the other")
    return "\n".join([*lines, *(f"Note: {note}" for note in notes)])
