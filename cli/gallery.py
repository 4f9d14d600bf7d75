"""`collapse-probe gallery`: many models on the same images, a page each and one table over all; resumable."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Any

import click
from collapse_probe.cli import options

FAILED, INTERRUPTED = 1, 130


@click.command("gallery", cls=options.Command, context_settings={"help_option_names": ["-h", "--help"]})
@click.argument("models", metavar="FILE", type=click.Path(exists=True, dir_okay=False))
@options.data
@options.running
@options.count("--null-images", least=0, default=64, says="Images for the untrained copy; 0 leaves it out.")
@click.option("-o", "--output", required=True, metavar="DIR", help="The folder of the site.")
@options.plugin
@options.talking
@options.across_processes
def command(models: str, data: str, output: str, quiet: bool, verbose: int, **flags: Any) -> None:
    """Measure every model that FILE names on the same images: one page a model, and one table over all.

    FILE has one model a line: ADDRESS, or LABEL = ADDRESS, with flags of its own after it (--checkpoint,
    --no-pretrained, --img-size, --model-kwargs, ...); # begins a comment. Run again with the same folder,
    models that were measured are kept, one that was stopped goes on, failed ones are tried again. The
    exit code is 1 where one failed.
    """
    from collapse_probe.cli.console import Talk
    from collapse_probe.cli.output import prepare

    words = lines_of(Path(models))
    options.load_libraries()

    from collapse_probe.analysis.survey import Entry, survey
    from collapse_probe.data.images import ImageSet, open_data
    from collapse_probe.distributed import rank_and_world

    prepare(output, quiet)
    talk = Talk(quiet)
    entries = [Entry(label, address, how) for label, address, how in words]
    images = open_data(data, seed=flags["seed"], **{key: flags.pop(key) for key in ("split", "limit", "max_pixels")})
    if not isinstance(images, ImageSet):
        raise click.UsageError(f"{data} is a stream, of which no two models see the same images for sure; give a set of files.")
    talk.say(options.data_line(images))
    try:
        result = survey(entries, images, output, command=options.command_line(), say=talk.say, **flags)
    except KeyboardInterrupt:
        click.echo(f"interrupted; the same command with -o {output} goes on", err=True)
        raise click.exceptions.Exit(INTERRUPTED) from None
    if rank_and_world()[0] > 0:
        return
    from collapse_probe.files import INDEX
    from collapse_probe.report.survey.page import headline

    click.echo(headline(result))
    click.echo(f"page: {Path(output) / INDEX}")
    if result.failed:
        row = result.failed[0]
        line = f"error: {len(result.failed)} of {len(result.rows)} models failed, the first: {row.label} ({row.reason})"
        click.echo(f"{line}; the same command tries them again", err=True)
        raise click.exceptions.Exit(FAILED)


@click.command("line")
@click.argument("address")
@click.option("--checkpoint")
@options.architecture
@click.option("--fix", "fixes", multiple=True)
@click.option("--fix-blocks", "blocks", callback=options.block_numbers)
def _line(**flags: Any) -> None:
    """What a line of the list may hold; never run."""


def lines_of(path: Path) -> list[tuple[str, str, dict[str, Any]]]:
    """Label, address and flags of every line of a list; wrong usage where a line cannot be read, by its number."""
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise click.UsageError(f"{path} cannot be read as a list of models: {error}") from error
    entries: list[tuple[str, str, dict[str, Any]]] = []
    for at, line in enumerate(text.splitlines(), 1):
        try:
            if line.lstrip().startswith("#"):
                continue
            label, named, rest = line.partition(" = ")
            words = shlex.split(rest if named else line, comments=True)
            if not words and not (named and label.strip()):
                continue
            flags = _line.make_context("line", words).params
        except (ValueError, click.ClickException) as error:
            why = error.format_message() if isinstance(error, click.ClickException) else str(error)
            raise click.UsageError(f"{path}, line {at}: {line.strip()[:80]!r} is no model: {why}") from error
        address = flags.pop("address")
        entries.append((label.strip() if named else address, address, flags))
    if not entries:
        raise click.UsageError(f"{path} names no model; expected one a line: ADDRESS, or LABEL = ADDRESS")
    return entries
