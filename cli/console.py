"""What a command says while it works: lines on stderr, and on a terminal one live display of its phases beneath them."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager

import click
from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TaskProgressColumn, TextColumn, TimeRemainingColumn
from rich.text import Text

from collapse_probe.analysis.state.phases import IMAGES, Phase
from collapse_probe.processes.launchers import announced

PLAIN_WIDTH = 160
LINE_EVERY = 10.0
WIDEST = 100  # columns of the live display


class Stages(Progress):
    """The live display: a line with the phases of the work, and beneath it the one under way, with a bar where it is counted.

    It is gone when the work ends; lines that were said stay.
    """

    def __init__(self, names: Iterable[str], console: Console) -> None:
        self.names = list(names)
        self.seconds: dict[str, float] = {}
        self.current = ""
        self.begun = time.perf_counter()
        columns = (SpinnerColumn(), TextColumn("{task.description}"), BarColumn(), TextColumn("{task.fields[detail]}"))
        super().__init__(*columns, console=console, transient=True)
        self.task = self.add_task("", total=None, detail="")

    def begin(self, name: str) -> None:
        """The phase before has ended, and this one begins; phases that come after it have not been yet."""
        if name == self.current:
            return
        now = time.perf_counter()
        if self.current:
            self.seconds[self.current] = now - self.begun
        if name not in self.names:
            self.names.insert(self.names.index(self.current) + 1 if self.current in self.names else 0, name)
        self.seconds = {each: its for each, its in self.seconds.items() if self.names.index(each) < self.names.index(name)}
        self.current, self.begun = name, now
        self.update(self.task, description=name, total=None, completed=0, detail="", refresh=True)

    def counted(self, done: int, total: int | None, seconds: float) -> None:
        """How far the work under way is, in images, after so many seconds."""
        speed = done / max(seconds, 1e-9)
        left = "" if not total or not done else f", {max(total - done, 0) / max(speed, 1e-9):.0f} s left"
        of = f"{done:,}" if total is None else f"{done:,} of {total:,}"
        self.update(self.task, total=total, completed=done, detail=f"{of}, {speed:.1f}/s{left}")

    def strip(self) -> Text:
        """All phases on one line: those that are over with their seconds, the one under way, those to come."""
        text = Text(no_wrap=True, overflow="ellipsis")
        passed = self.names.index(self.current) if self.current else 0
        for at, name in enumerate(self.names):
            if at < passed and name not in self.seconds:
                continue  # it was not needed
            text.append("  " if text else "")
            if name == self.current:
                text.append(f"▸ {name}", style="bold")
            elif name in self.seconds:
                text.append(f"✓ {name} {self.seconds[name]:.1f} s", style="green")
            else:
                text.append(f"· {name}", style="dim")
        return text

    def get_renderables(self) -> Iterator[Text | object]:  # type: ignore[override]  # what rich calls a renderable
        """The line of phases, then the bar."""
        yield self.strip()
        yield self.make_tasks_table(self.tasks)


class Talk:
    """Lines on stderr, unless they were asked to be left out or another process speaks for all."""

    def __init__(self, quiet: bool) -> None:
        launch = announced()
        self.silent = quiet or (launch is not None and launch.rank > 0)
        self.live: Progress | None = None  # the display that is shown

    @property
    def on_terminal(self) -> bool:
        """Whether somebody watches."""
        return not self.silent and sys.stderr.isatty()

    def say(self, text: str) -> None:
        """One line on stderr, above the display where there is one; a `Phase` moves that on as well."""
        if isinstance(self.live, Stages) and isinstance(text, Phase):
            self.live.begin(text.name)
        if self.live is not None:
            self.live.console.print(text, markup=False, highlight=False)
        elif not self.silent:
            click.echo(text, err=True)

    def begin(self, phase: str) -> None:
        """A phase begins of which there is nothing to say."""
        if isinstance(self.live, Stages):
            self.live.begin(phase)

    @contextmanager
    def stages(self, *names: str) -> Iterator[None]:
        """A display of these phases inside the `with`, the first of them under way; lines alone where nobody watches."""
        if not self.on_terminal or self.live is not None:
            yield
            return
        stages = Stages(names, self._console())
        stages.begin(names[0])
        with self.shown(stages):
            yield

    @contextmanager
    def shown(self, progress: Progress) -> Iterator[None]:
        """Lines go above this display inside the `with`."""
        with progress:
            self.live = progress
            try:
                yield
            finally:
                self.live = None

    @staticmethod
    def _console() -> Console:
        console = Console(stderr=True)
        console.width = min(console.width, WIDEST)
        return console

    @contextmanager
    def steps(self, shares: Mapping[str, float]) -> Iterator[Callable[[str], Callable[[int, int], None]]]:
        """One bar over work of several parts, whose shares of all are known beforehand.

        Yields what begins a part and gives its callback for (done, of how many); parts elsewhere than on a terminal are lines.
        """
        if not self.on_terminal:

            def begin(name: str) -> Callable[[int, int], None]:
                self.say(name)
                return lambda done, of: None

            yield begin
            return
        columns = (TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TimeRemainingColumn())
        progress = Progress(*columns, console=Console(stderr=True))
        with self.shown(progress):
            task, names = progress.add_task("", total=sum(shares.values())), list(shares)

            def start(name: str) -> Callable[[int, int], None]:
                before = sum(shares[each] for each in names[: names.index(name)])
                progress.update(task, description=name, completed=before)
                return lambda done, of: progress.update(task, completed=before + shares[name] * done / max(of, 1))

            yield start
            progress.update(task, completed=sum(shares.values()))

    @contextmanager
    def bar(self, total: int | None) -> Iterator[Callable[[int, int], None]]:
        """A callback for images done: the bar of the display, which is shown if it was not; now and then a line elsewhere."""
        if not self.on_terminal:
            yield self._lines(total)
            return
        with self.stages(IMAGES):
            stages, start = self.live, time.perf_counter()
            if not isinstance(stages, Stages):  # a bar over several parts is shown, which counts for itself
                yield lambda done, skipped: None
                return
            yield lambda done, skipped: stages.counted(done + skipped, total, time.perf_counter() - start)

    def _lines(self, total: int | None) -> Callable[[int, int], None]:
        start = last = time.perf_counter()

        def move(done: int, skipped: int) -> None:
            nonlocal last
            now = time.perf_counter()
            if now - last < LINE_EVERY:
                return
            last, speed = now, done / (now - start)
            left = "" if total is None else f" of {total}, {max(total - done - skipped, 0) / max(speed, 1e-9):.0f} s left"
            self.say(f"{done}{left}, {speed:.1f} images/s")

        return move


def table() -> Console:
    """A console for tables on stdout: as wide as the terminal, or wide enough where there is none."""
    return Console(width=None if sys.stdout.isatty() else PLAIN_WIDTH, highlight=False)
