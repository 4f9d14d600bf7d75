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
    from collapse_probe.folders import new_folder

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
    from collapse_probe.findings import Findings
    from collapse_probe.page import write_report

    write_report(Findings.load(folder), inside)


def _comparison(folder: Path, inside: Path) -> None:
    from collapse_probe.comparison_page import write_comparison
    from collapse_probe.side_by_side import Comparison

    write_comparison(Comparison.load(folder), inside)


def _interventions(folder: Path, inside: Path) -> None:
    from collapse_probe.effects import Interventions
    from collapse_probe.intervention_page import write_interventions

    write_interventions(Interventions.load(folder), inside)


def _sweep(folder: Path, inside: Path) -> None:
    from collapse_probe.sweep_page import write_sweep
    from collapse_probe.sweep_results import Sweep

    write_sweep(Sweep.load(folder), inside)
