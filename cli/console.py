"""What a command says while it works: lines and a progress bar on stderr, results on stdout."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

import click
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

from collapse_probe.distributed import rank_and_world
from collapse_probe.results.findings import Findings
from collapse_probe.results.readings import trained_on
from collapse_probe.results.verdict import verdict_of

PLAIN_WIDTH = 160
LINE_EVERY = 10.0


class Talk:
    """Lines on stderr, unless they were asked to be left out or another process speaks for all."""

    def __init__(self, quiet: bool) -> None:
        self.silent = quiet or rank_and_world()[0] > 0
        self.live: Progress | None = None  # the bar that is shown

    def say(self, text: str) -> None:
        """One line on stderr, above the bar where there is one."""
        if self.live is not None:
            self.live.console.print(text, markup=False, highlight=False)
        elif not self.silent:
            click.echo(text, err=True)

    @contextmanager
    def shown(self, progress: Progress) -> Iterator[None]:
        """Lines go above this bar inside the `with`."""
        with progress:
            self.live = progress
            try:
                yield
            finally:
                self.live = None

    @contextmanager
    def steps(self, shares: Mapping[str, float]) -> Iterator[Callable[[str], Callable[[int, int], None]]]:
        """One bar over work of several parts, whose shares of all are known beforehand.

        Yields what begins a part and gives its callback for (done, of how many); parts elsewhere than on a terminal are lines.
        """
        if self.silent or not sys.stderr.isatty():

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
        """A callback for images done; a bar with speed and time left on a terminal, now and then a line elsewhere."""
        if self.silent or not sys.stderr.isatty():
            yield self._lines(total)
            return
        speed_column = TextColumn("{task.fields[speed]}")
        columns = (TextColumn("images"), BarColumn(), MofNCompleteColumn(), speed_column, TimeRemainingColumn())
        progress = Progress(*columns, console=Console(stderr=True))
        with self.shown(progress):
            task, start = progress.add_task("images", total=total, speed=""), time.perf_counter()

            def move(done: int, skipped: int) -> None:
                speed = f"{done / max(time.perf_counter() - start, 1e-9):.1f} images/s"
                progress.update(task, completed=done + skipped, speed=speed)

            yield move

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


def answer(findings: Findings) -> str:
    """The verdict and the summary as text."""
    verdict = verdict_of(findings)
    known = [f"Note: {text}"] if (text := trained_on(findings.data)) else []
    left_out = [f"Left out: {each['where']}: {each['why']}" for each in findings.model.get("left_out", ())]
    settled = (findings.sureness.get("convergence") or {}).get("known") or ()
    lines = [*verdict.sentences, *(f"Note: {caveat}" for caveat in verdict.caveats), *known, *left_out, *settled, ""]
    width = max(len(name) for name in findings.summary)
    for name, value in findings.summary.items():
        lines.append(f"  {name:<{width}}  {'undefined' if value is None else f'{value:.6g}'}")
    left_out = findings.data.get("left_out", {})
    skipped = [each for each in findings.data.get("skipped") or () if each["reason"] not in left_out]
    if skipped:
        first = f"{skipped[0]['name']} ({skipped[0]['reason']})"
        said = "1 image was skipped" if len(skipped) == 1 else f"{len(skipped):,} images were skipped, the first"
        lines.append(f"\n{said}: {first}")
    if left_out:
        lines.append(f"\nLeft out of the data: {', '.join(f'{count:,} × {reason}' for reason, count in left_out.items())}")
    return "\n".join(lines)
