"""`collapse-probe demo`: the bundled pairs on bundled data, and the story that they tell."""

from __future__ import annotations

from pathlib import Path

import click
from collapse_probe.cli import options


@click.command("demo", context_settings={"help_option_names": ["-h", "--help"]})
@click.option("-o", "--output", default="demo", show_default=True, metavar="DIR", help="The output folder.")
@options.talking
def command(output: str, quiet: bool, verbose: int) -> None:
    """Compare the trained pairs that ship with the package, on digits that they have not seen; needs no network."""
    from collapse_probe.cli.talk import Talk

    from collapse_probe.demonstration import demonstrate, told
    from collapse_probe.folders import check_writable, new_folder
    from collapse_probe.story import PAGE, write_story

    talk, folder = Talk(quiet), Path(output)
    check_writable(folder)
    shown = demonstrate(report=talk.say)
    with new_folder(folder) as inside:
        write_story(shown, inside)
    for title, sentences in told(shown):
        click.echo("\n".join([title, *(f"  {sentence}" for sentence in sentences), ""]))
    click.echo(f"open this page in a browser: {(folder / PAGE).absolute().as_uri()}")
