"""`collapse-probe report`: figures and page again, from a folder alone."""

from __future__ import annotations

from pathlib import Path

import click
from collapse_probe.cli import options


@click.command("report", context_settings={"help_option_names": ["-h", "--help"]})
@click.argument("folder", metavar="DIR")
@options.talking
def command(folder: str, quiet: bool, verbose: int) -> None:
    """Rebuild figures and page from what DIR holds (findings, a comparison, interventions, a sweep); needs no model."""
    from collapse_probe.files import new_folder

    place = Path(folder)
    with new_folder(place) as inside:
        if (place / "comparison.json").exists():
            _comparison(place, inside)
        elif (place / "interventions.json").exists():
            _interventions(place, inside)
        elif (place / "sweep.json").exists():
            _sweep(place, inside)
        else:
            _findings(place, inside)
    click.echo(f"report: {place / 'report.html'}")


def _findings(folder: Path, inside: Path) -> None:
    from collapse_probe.report.findings.page import write_report
    from collapse_probe.results.findings import Findings

    write_report(Findings.load(folder), inside)


def _comparison(folder: Path, inside: Path) -> None:
    from collapse_probe.report.comparison.page import write_comparison
    from collapse_probe.results.comparison import Comparison

    write_comparison(Comparison.load(folder), inside)


def _interventions(folder: Path, inside: Path) -> None:
    from collapse_probe.report.intervention.page import write_interventions
    from collapse_probe.results.intervention import Interventions

    write_interventions(Interventions.load(folder), inside)


def _sweep(folder: Path, inside: Path) -> None:
    from collapse_probe.report.sweep.page import write_sweep
    from collapse_probe.results.sweep import Sweep

    write_sweep(Sweep.load(folder), inside)
