"""What a command does with its result: it writes the folder, and prints the answer or the JSON."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import click

Summary = Mapping[str, "float | int | None"]


def output_folder(output: str | None, as_json: bool, default: Path) -> Path | None:
    """The folder to write, which must take a run's files; None where JSON on stdout is all that was asked for."""
    if as_json and output is None:
        return None
    folder = Path(output or default)
    prepare(folder)
    return folder


def prepare(folder: str | Path, quiet: bool = False) -> None:
    """Raise OutputError unless a folder can take a run's files; clear what dead runs left there, and say so on stderr."""
    from collapse_probe.files import check_output
    from collapse_probe.processes.launchers import announced

    launch = announced()
    if launch is None or launch.rank == 0:  # no other process writes
        say_tidied(folder, quiet)
        check_output(folder)


def say_tidied(folder: str | Path, quiet: bool = False) -> None:
    """Put in order what stopped runs left of their work on a folder, and say so on stderr."""
    from collapse_probe.files import tidy

    for line in tidy(folder):
        if not quiet:
            click.echo(line, err=True)


def deliver(result: Any, folder: Path | None, page: Callable[..., object], text: str, as_json: bool) -> None:
    """Write the folder with the page that `page` draws, and print the JSON or `text`."""
    from collapse_probe.files import write_with_page

    if folder is not None:
        write_with_page(folder, result, page)
    if as_json:
        click.echo(json.dumps(result.to_json(), allow_nan=False))
    else:
        click.echo(text)
        click.echo(f"\nreport: {folder / 'report.html'}" if folder is not None else "")


def answer_lines(answers: Iterable[Any]) -> list[str]:
    """The sentences of answers, with their caveats."""
    lines: list[str] = []
    for answer in answers:
        lines += [*answer.sentences, *(f"Note: {caveat}" for caveat in answer.caveats), ""]
    return lines


def summary_lines(summaries: Mapping[str, Summary]) -> list[str]:
    """Summaries side by side, a column each under its label (no head where the label is empty)."""
    names = list(dict.fromkeys(name for summary in summaries.values() for name in summary))
    columns = [
        [label, *("–" if summary.get(name) is None else f"{summary[name]:.6g}" for name in names)]
        for label, summary in summaries.items()
    ]
    width, widths = max(map(len, names)) + 2, [max(len(column[0]), 12) if column[0] else 0 for column in columns]
    rows = zip(["", *(f"  {name}" for name in names)], *columns, strict=True)
    lines = [
        "  ".join([f"{name:<{width}}", *(f"{cell:>{w}}" for cell, w in zip(cells, widths, strict=True))])
        for name, *cells in rows
    ]
    return lines if any(summaries) else lines[1:]
