"""The answer of a command as text: the verdict, then the few numbers that matter beside what chance gives."""

from __future__ import annotations

import io
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from collapse_probe.cli.console import PLAIN_WIDTH
from rich.console import Console
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from collapse_probe.results.findings import Findings
from collapse_probe.results.overview.headline import Headline, headlines, spark
from collapse_probe.results.readings import trained_on
from collapse_probe.results.text import number
from collapse_probe.results.verdict import verdict_of

Summary = Mapping[str, "float | int | None"]
BESIDE = 78  # columns of the numbers, beside which curves stand where there is room


def written(draw: Callable[[Console], None]) -> str:
    """What `draw` prints, in colour and as wide as the terminal; plain, and each sentence on one line, elsewhere."""
    seen = sys.stdout.isatty()
    page = io.StringIO()
    console = Console(
        file=page,
        force_terminal=seen,
        width=None if seen else PLAIN_WIDTH,
        highlight=False,
        soft_wrap=not seen,
        no_color=None if seen else True,  # NO_COLOR decides on a terminal
    )
    draw(console)
    return "\n".join(line.rstrip() for line in page.getvalue().rstrip("\n").split("\n"))


def answer(findings: Findings) -> str:
    """The verdict, the numbers that matter, and what was left out."""

    def draw(console: Console) -> None:
        verdict = verdict_of(findings)
        sentences(console, verdict.sentences, verdict.caveats)
        known = [f"Note: {text}"] if (text := trained_on(findings.data)) else []
        left_out = [f"Left out: {each['where']}: {each['why']}" for each in findings.model.get("left_out", ())]
        settled = (findings.sureness.get("convergence") or {}).get("known") or ()
        for line in (*known, *left_out, *settled):
            console.print(Text(line))
        console.print()
        numbers(console, findings)
        for line in skipped(findings):
            console.print()
            console.print(Text(line))

    return written(draw)


def sentences(console: Console, said: Iterable[str], caveats: Iterable[str] = ()) -> None:
    """An answer, its first sentence in bold, and what it does not mean."""
    for at, sentence in enumerate(said):
        console.print(Text(sentence, style="" if at else "bold"))
    for caveat in caveats:
        console.print(Text(f"Note: {caveat}", style="dim"))


def numbers(console: Console, findings: Findings) -> None:
    """The numbers that matter in a table, with a curve along the blocks: in it where there is room, else below."""
    rows = headlines(findings)
    if not rows:
        names = [name for name, result in findings.metrics.items() if result.values is not None]
        console.print(Text(f"Measured: {', '.join(names) or 'nothing'}. The numbers of each block are in blocks.csv."))
    longest = max((len(each.along) for each in rows), default=0)
    beside = longest > 1 and console.width >= BESIDE + longest
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for name in ("", "", "95 % CI", "chance\nlevel", "untrained\ncopy"):
        table.add_column(name, justify="right" if name else "left", no_wrap=True)
    if beside:
        table.add_column("block by block, 0 to 1", no_wrap=True)
    for each in rows:
        null, fresh = ("" if value is None else number(value, each.digits) for value in (each.chance, each.untrained))
        table.add_row(each.name, each.written, each.interval, null, fresh, *([curve(each)] if beside else []))
    accuracy = findings.summary.get("accuracy")
    if accuracy is not None:
        table.add_row("accuracy", number(accuracy), *([""] * (4 if beside else 3)))
    if table.row_count and console.width >= BESIDE:
        console.print(table)
    elif table.row_count:  # a cell that is cut short would read as another number
        for each in rows:
            console.print(Text(in_words(each)))
        if accuracy is not None:
            console.print(Text(f"accuracy {number(accuracy)}"))
    if not beside and longest > 1:
        for each in rows[:1]:
            blocks = f"blocks {each.first}–{each.first + len(each.along) - 1}"
            console.print(Text(f"{each.name}, {blocks}: {curve(each, console.width - len(each.name) - len(blocks) - 4)}"))
    images = findings.summary.get("images")
    if images:
        console.print(Text(f"{images:,} image{'' if images == 1 else 's'}; --json prints every number of the summary"))


def in_words(each: Headline) -> str:
    """A number and what stands beside it, as a line."""
    beside = (("95 % CI", each.interval), ("chance level", each.chance), ("untrained copy", each.untrained))
    known = (
        (name, value if isinstance(value, str) else number(value, each.digits))
        for name, value in beside
        if value not in (None, "")
    )
    return "; ".join([f"{each.name} {each.written}", *(f"{name} {value}" for name, value in known)])


def curve(each: Headline, most: int = PLAIN_WIDTH) -> str:
    """The curve of a number; means of neighbouring blocks where it has more than `most`."""
    values = np.array(each.along, dtype=np.float64)
    if len(values) > most > 0:
        parts = np.array_split(values, most)
        values = np.array([part[np.isfinite(part)].mean() if np.isfinite(part).any() else np.nan for part in parts])
    return spark(values.tolist(), each.low, each.high)


def skipped(findings: Findings) -> list[str]:
    """Which images were not measured, and why."""
    left_out = findings.data.get("left_out", {})
    ill = [each for each in findings.data.get("skipped") or () if each["reason"] not in left_out]
    lines = []
    if ill:
        first = f"{ill[0]['name']} ({ill[0]['reason']})"
        said = "1 image was skipped" if len(ill) == 1 else f"{len(ill):,} images were skipped, the first"
        lines.append(f"{said}: {first}")
    if left_out:
        lines.append(f"Left out of the data: {', '.join(f'{count:,} × {reason}' for reason, count in left_out.items())}")
    return lines


def answers(
    said: Iterable[Any], summaries: Mapping[str, Summary] | None = None, subjects: Mapping[str, Findings] | None = None
) -> str:
    """Several answers, then the subjects side by side, or all numbers of one summary."""

    def draw(console: Console) -> None:
        for each in said:
            sentences(console, each.sentences, each.caveats)
            console.print()
        if subjects:
            side_by_side(console, subjects)
        if summaries:
            console.print(listed(summaries))

    return written(draw)


def side_by_side(console: Console, subjects: Mapping[str, Findings]) -> None:
    """A row for each number, a column for each subject; a row for each subject where there are many."""
    found = {label: headlines(findings) for label, findings in subjects.items()}
    names = list(dict.fromkeys(each.name for rows in found.values() for each in rows))
    cells = {label: {each.name: each.written for each in rows} for label, rows in found.items()}
    if any(findings.summary.get("accuracy") is not None for findings in subjects.values()):
        names.append("accuracy")
        for label, findings in subjects.items():
            cells[label]["accuracy"] = number(findings.summary.get("accuracy"))
    down, across = (list(subjects), names) if len(subjects) > 3 else (names, list(subjects))
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    table.add_column("")
    for name in across:
        table.add_column(Text(name), justify="right")
    for name in down:
        words = (cells[each].get(name, "–") if down is names else cells[name].get(each, "–") for each in across)
        table.add_row(Text(name), *words)
    console.print(table)


def listed(summaries: Mapping[str, Summary]) -> Padding:
    """Every name of some summaries with its numbers."""
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), show_header=any(summaries))
    for label in ("", *summaries):
        table.add_column(Text(label), justify="right" if label else "left")
    for name in dict.fromkeys(name for summary in summaries.values() for name in summary):
        values: Sequence[float | int | None] = [summary.get(name) for summary in summaries.values()]
        table.add_row(name, *("–" if value is None else f"{value:.6g}" for value in values))
    return Padding(table, (0, 0, 0, 2))
