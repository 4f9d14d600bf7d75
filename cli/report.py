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
        _write(place, inside)
    click.echo(f"report: {place / 'report.html'}")


def _write(folder: Path, inside: Path) -> None:
    """Draw what `folder` holds into `inside`."""
    if (folder / "comparison.json").exists():
        from collapse_probe.report.comparison.page import write_comparison
        from collapse_probe.results.comparison import Comparison

        write_comparison(Comparison.load(folder), inside)
    elif (folder / "interventions.json").exists():
        from collapse_probe.report.intervention.page import write_interventions
        from collapse_probe.results.intervention import Interventions

        write_interventions(Interventions.load(folder), inside)
    elif (folder / "sweep.json").exists():
        from collapse_probe.report.sweep.page import write_sweep
        from collapse_probe.results.sweep import Sweep

        write_sweep(Sweep.load(folder), inside)
    else:
        from collapse_probe.report.findings.page import write_report
        from collapse_probe.results.findings import Findings

        write_report(Findings.load(folder), inside)
