"""`collapse-probe report`: figures and page again, from a findings folder alone."""

from __future__ import annotations

from pathlib import Path

import click
from collapse_probe.cli import options


@click.command("report", context_settings={"help_option_names": ["-h", "--help"]})
@click.argument("folder", metavar="DIR")
@options.talking
def command(folder: str, quiet: bool, verbose: int) -> None:
    """Rebuild figures and page from the findings in DIR; needs no model and no GPU."""
    from collapse_probe.findings import Findings
    from collapse_probe.folders import new_folder
    from collapse_probe.page import write_report

    findings = Findings.load(folder)
    with new_folder(folder) as inside:
        write_report(findings, inside)
    click.echo(f"report: {Path(folder) / 'report.html'}")
