"""`collapse-probe cite`: a methods paragraph and the BibTeX of what a folder of results used."""

from __future__ import annotations

import click
from collapse_probe.cli import options


@click.command("cite", context_settings={"help_option_names": ["-h", "--help"]})
@click.argument("folder", metavar="DIR")
@options.talking
def command(folder: str, quiet: bool, verbose: int) -> None:
    """Print how the results in DIR were measured, as a paragraph for a paper, and BibTeX of what they rest on."""
    from collapse_probe.cli.output import open_results

    from collapse_probe.results.citing.methods import bibtex, methods

    results = open_results(folder)
    click.echo(f"{methods(results)}\n\n{bibtex(results)}")
