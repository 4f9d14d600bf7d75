"""The program: its commands, each loaded when it is asked for, and the one place where an error becomes a message."""

from __future__ import annotations

import atexit
import contextlib
import importlib
import io
import logging
import os
import signal
import sys
import threading
from collections.abc import Iterator, Sequence
from typing import Any, NoReturn

import click

from collapse_probe import __version__
from collapse_probe.errors import CollapseProbeError, OutOfTimeError

COMMANDS = {
    "analyze": "Measure the collapse of one model over a data set: the main job.",
    "compare": "Set two or more models, checkpoints or findings side by side on the same images.",
    "train": "Train a recipe, with any fixes and penalties, and watch for collapse.",
    "sweep": "Train and measure a recipe over a grid of depths, widths, fixes and seeds: one table, one page.",
    "intervene": "Say what each block and its attention are worth: replace its map or leave it out; which blocks can go.",
    "merge": "Add the parts of one measurement, or take what a stopped run left: findings and page.",
    "gallery": "Measure every model of a list on the same images: a page each, and one table over all.",
    "cite": "Print a methods paragraph, and BibTeX of what a findings folder used.",
    "report": "Rebuild figures and page from a findings folder.",
    "doctor": "Say whether a model can be probed, block by block.",
    "ls": "List models, metrics, fixes, penalties, recipes or data.",
    "demo": "The main job on bundled data; needs no network.",
}
FAILED, OUT_OF_TIME = 1, 4
SIGNALLED, INTERRUPTED = 128, 130  # 128 and the number of the signal


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


class StderrHandler(logging.StreamHandler[Any]):
    """Writes to what stderr is at the time: a live display puts something in its place that writes above it."""

    @property
    def stream(self) -> Any:
        """Where lines go now."""
        return sys.stderr

    @stream.setter
    def stream(self, value: Any) -> None:
        pass


@click.group(cls=Commands, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="collapse-probe")
def group() -> None:
    """Tell whether a Vision Transformer's attention has collapsed, and whether a fix cures it."""


def main(arguments: Sequence[str] | None = None) -> NoReturn:
    """Run the program and exit: 0 done, 1 failed, 2 wrong usage, 3 a threshold tripped, 4 stopped by --max-time."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")  # a console need not be UTF-8
    os.environ["MPLBACKEND"] = "agg"  # a notebook's own, inherited, need not be installed here
    words = list(sys.argv[1:] if arguments is None else arguments)
    verbose = any(word == "--verbose" or (word.startswith("-v") and set(word[1:]) == {"v"}) for word in words)
    level = logging.INFO if verbose else logging.ERROR
    logging.basicConfig(level=level, format="%(name)s: %(message)s", handlers=[StderrHandler()])
    signals: list[int] = []
    try:
        with ended_as_interrupted(signals):
            code = group.main(args=words, prog_name="collapse-probe", standalone_mode=False, obj=tuple(words))
    except (click.exceptions.Abort, KeyboardInterrupt) as error:
        cause = error.__cause__ or error  # click raises Abort from KeyboardInterrupt and EOFError
        if isinstance(cause, EOFError):
            click.echo(f"error: EOFError: {one_line(cause)} (-v shows where)", err=True)
            code = FAILED
        else:
            with contextlib.suppress(OSError):  # the terminal may be gone
                click.echo(f"interrupted; {str(cause) or 'no output was written'}", err=True)
            code = INTERRUPTED
    except click.ClickException as error:
        error.show()
        code = error.exit_code
    except OutOfTimeError as error:
        click.echo(f"stopped: {one_line(error)}", err=True)
        code = OUT_OF_TIME
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
    if code == INTERRUPTED and signals:
        code = SIGNALLED + signals[0]
    code = code if isinstance(code, int) else 0
    if arguments is None:
        end_process(code)
    sys.exit(code)


def end_process(code: int) -> None:
    """End this process at once where nothing is left to do but to free its memory, which takes Python and torch a second.

    What was registered for the end is run, and output is written; where that fails, or a thread is still at work or a debugger
    or profiler looks on, this returns, and Python ends in its own way.
    """
    others = [thread for thread in threading.enumerate() if thread is not threading.current_thread() and not thread.daemon]
    if sys.gettrace() or sys.getprofile() or others:
        return
    atexit._run_exitfuncs()
    try:
        sys.stdout.flush()
        sys.stderr.flush()
    except (OSError, ValueError, AttributeError):  # a full disk, a closed pipe, no stream at all
        return
    os._exit(code)


@contextlib.contextmanager
def ended_as_interrupted(signals: list[int]) -> Iterator[None]:
    """SIGTERM and SIGHUP end the work as Ctrl-C does; their numbers come into `signals`, and the second one changes nothing.

    A signal that is ignored (nohup) stays ignored, and one that the caller handles stays handled.
    """
    before: dict[int, Any] = {}

    def interrupt(number: int, frame: object) -> None:
        signals.append(number)
        if len(signals) == 1:
            raise KeyboardInterrupt

    try:
        for name in ("SIGTERM", "SIGHUP"):
            number = getattr(signal, name, None)  # Windows has no SIGHUP
            if number is not None and signal.getsignal(number) is signal.SIG_DFL:
                with contextlib.suppress(ValueError):  # not in the main thread
                    before[number] = signal.signal(number, interrupt)
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def one_line(error: BaseException) -> str:
    """An error's text on one line."""
    return " ".join(str(error).split()) or type(error).__name__
