"""The program: its commands, each loaded when it is asked for, and the one place where an error becomes a message."""

from __future__ import annotations

import importlib
import io
import logging
import os
import sys
from collections.abc import Sequence
from typing import NoReturn

import click

from collapse_probe import __version__
from collapse_probe.errors import CollapseProbeError

COMMANDS = {
    "analyze": "Measure the collapse of one model over a data set: the main job.",
    "compare": "Set two or more models, checkpoints or findings side by side on the same images.",
    "train": "Train a recipe, with any fixes and penalties, and watch for collapse.",
    "sweep": "Train and measure a recipe over a grid of depths, widths, fixes and seeds: one table, one page.",
    "intervene": "Say what the attention of each block is worth: replace its map, report the change in logits and accuracy.",
    "report": "Rebuild figures and page from a findings folder.",
    "doctor": "Say whether a model can be probed, block by block.",
    "ls": "List models, metrics, fixes, penalties, recipes or data.",
    "demo": "The main job on bundled data; needs no network.",
}
FAILED = 1
INTERRUPTED = 130


class Commands(click.Group):
    """The commands by name; `--help` shows them without importing any."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """In the order of COMMANDS."""
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, name: str) -> click.Command | None:
        """Import the command's module."""
        if name not in COMMANDS:
            return None
        command: click.Command = importlib.import_module(f"collapse_probe.cli.{name}").command
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Names and lines, from the table alone."""
        with formatter.section("Commands"):
            formatter.write_dl(list(COMMANDS.items()))


@click.group(cls=Commands, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="collapse-probe")
def group() -> None:
    """Tell whether a Vision Transformer's attention has collapsed, and whether a fix cures it."""


def main(arguments: Sequence[str] | None = None) -> NoReturn:
    """Run the program and exit: 0 done, 1 failed, 2 wrong usage."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")  # a console need not be UTF-8
    os.environ["MPLBACKEND"] = "agg"  # a notebook's own, inherited, need not be installed here
    words = list(sys.argv[1:] if arguments is None else arguments)
    verbose = any(word == "--verbose" or (word.startswith("-v") and set(word[1:]) == {"v"}) for word in words)
    logging.basicConfig(level=logging.INFO if verbose else logging.ERROR, format="%(name)s: %(message)s", stream=sys.stderr)
    try:
        code = group.main(args=words, prog_name="collapse-probe", standalone_mode=False, obj=tuple(words))
    except (click.exceptions.Abort, KeyboardInterrupt) as error:
        text = str(error.__cause__ or error)  # click raises Abort from KeyboardInterrupt
        click.echo(f"interrupted; {text or 'no output was written'}", err=True)
        code = INTERRUPTED
    except click.ClickException as error:
        error.show()
        code = error.exit_code
    except CollapseProbeError as error:
        if verbose:
            raise
        click.echo(f"error: {one_line(error)}", err=True)
        code = FAILED
    except Exception as error:
        if verbose:
            raise
        click.echo(f"error: {type(error).__name__}: {one_line(error)} (-v shows where)", err=True)
        code = FAILED
    sys.exit(code if isinstance(code, int) else 0)


def one_line(error: BaseException) -> str:
    """An error's text on one line."""
    return " ".join(str(error).split()) or type(error).__name__
