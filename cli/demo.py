"""`collapse-probe demo`: compare the bundled pairs of models on bundled data, and write the page about them."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from collapse_probe.cli import options

if TYPE_CHECKING:
    from collapse_probe.report.demo import Demonstration
    from collapse_probe.results.comparison import Comparison
    from collapse_probe.results.findings import Findings
    from collapse_probe.results.intervention import Interventions

DATA = "bundled:digits"
NULL_IMAGES, BATCH = 32, 180
SHARING_IMAGES = 64  # one batch
DROPPING_IMAGES, DROPPED_BLOCKS = 180, range(15, 24)
SINKS = ("sink-kind", "sink-kind@no-op", "sink-kind@broadcast")
COMPARING, SHARING, SINKING, DROPPING, PAGES = 7, 6, 1, 8, 5  # seconds that each part takes, about: for the bar
Begin = Callable[[str], Callable[[int, int], None]]
"""Begins a part of the work by its name, and gives its callback for (done, of how many)."""


@click.command("demo", context_settings={"help_option_names": ["-h", "--help"]})
@click.option("-o", "--output", default="demo", show_default=True, metavar="DIR", help="The output folder.")
@options.talking
@options.across_processes
def command(output: str, quiet: bool, verbose: int) -> None:
    """Compare the trained pairs that ship with the package, on digits that they have not seen; needs no network."""
    options.load_libraries()
    from collapse_probe.cli.console import Talk
    from collapse_probe.cli.output import prepare

    from collapse_probe.distributed import rank_and_world
    from collapse_probe.files import PAGE, new_folder
    from collapse_probe.models.sources.ours import FOLDER
    from collapse_probe.report.demo import chapters, write_demonstration

    folder = Path(output)
    prepare(folder, quiet)
    with Talk(quiet).steps(shares()) as begin:
        demonstration = demonstrate(begin)
        if rank_and_world()[0] > 0:
            return
        begin(WRITING)
        with new_folder(folder) as inside:
            write_demonstration(demonstration, inside, json.loads((FOLDER / "spread.json").read_text(encoding="utf-8")))
    click.echo(told(chapters(demonstration)))
    click.echo(f"open this page in a browser: {(folder / PAGE).absolute().as_uri()}")


def told(chapters: Mapping[str, Sequence[str]]) -> str:
    """What the demonstration shows, as text."""
    from collapse_probe.cli.summary import written
    from rich.console import Console
    from rich.padding import Padding
    from rich.text import Text

    def draw(console: Console) -> None:
        for title, sentences in chapters.items():
            console.print(Text(title, style="bold"))
            for sentence in sentences:
                whole = Text(f"  {sentence}")  # off a terminal nothing is wrapped, and padding would cut it off
                console.print(Padding(Text(sentence), (0, 0, 0, 2)) if console.is_terminal else whole)
            console.print()

    return written(draw) + "\n"


WRITING = "figures and pages"


def shares() -> dict[str, float]:
    """The parts of the work by name, in their order, with the seconds that each takes, about."""
    from collapse_probe.report.demo import LABELS, PAIRS, PRUNED

    parts: dict[str, float] = {}
    for pair in PAIRS:
        parts[compared(pair)] = COMPARING
        for label in LABELS:
            parts |= {shared(pair, label): SHARING, sunk(pair, label): SINKING}
    return {**parts, pruned(*PRUNED): DROPPING, WRITING: PAGES}


def compared(pair: str) -> str:
    """The name of the part that compares the models of a pair."""
    return f"{pair}: two models compared"


def shared(pair: str, label: str) -> str:
    """The name of the part that replaces the maps of a model."""
    return f"{pair}, {label}: what its maps are worth"


def sunk(pair: str, label: str) -> str:
    """The name of the part that looks at what the sinks of a model do."""
    return f"{pair}, {label}: what its sinks do"


def pruned(pair: str, label: str) -> str:
    """The name of the part that leaves out blocks of a model."""
    return f"{pair}, {label}: which blocks can go"


def demonstrate(begin: Begin) -> Demonstration:
    """Compare the models of each pair, measure what sharing maps between neighbouring blocks costs each model and what its
    sinks do, and leave out blocks of one of them.
    """
    from collapse_probe.analysis.analyze import analyze
    from collapse_probe.analysis.compare import compare
    from collapse_probe.analysis.intervene import intervene
    from collapse_probe.data.splits import split_data
    from collapse_probe.report.demo import LABELS, PAIRS, PRUNED, Demonstration

    images = split_data(DATA).held_out
    few = images.subset(SHARING_IMAGES, 0)
    settings: dict[str, Any] = {"seed": 0, "device": "auto", "command": "collapse-probe demo"}
    comparisons: dict[str, Comparison] = {}
    sharing: dict[str, dict[str, Interventions]] = {}
    sinks: dict[str, dict[str, Findings]] = {}
    for pair, names in PAIRS.items():
        subjects = {label: f"ours:{name}" for label, name in zip(LABELS, names, strict=True)}
        move, finished = begin(compared(pair)), count()

        def watch(
            label: str, total: int | None, move: Callable[[int, int], None] = move, finished: Iterator[int] = finished
        ) -> AbstractContextManager[Callable[[int, int], None]]:
            before = next(finished) * len(images)
            return nullcontext(lambda done, skipped: move(before + done + skipped, len(LABELS) * len(images)))

        comparisons[pair] = compare(
            subjects, images, null_images=NULL_IMAGES, gallery_images=2, batch_size=BATCH, watch=watch, **settings
        )
        sharing[pair], sinks[pair] = {}, {}
        for label, address in subjects.items():
            sharing[pair][label] = intervene(
                address, few, ("share",), progress=following(begin(shared(pair, label)), len(few)), **settings
            )
            sinks[pair][label] = analyze(
                address,
                few,
                metrics=SINKS,
                null_images=NULL_IMAGES,
                gallery_images=0,
                progress=following(begin(sunk(pair, label)), len(few)),
                **settings,
            )
    address, move = f"ours:{PAIRS[PRUNED[0]][LABELS.index(PRUNED[1])]}", begin(pruned(*PRUNED))
    many = images.subset(DROPPING_IMAGES, 0)
    dropping = intervene(address, many, drop=("block",), blocks=DROPPED_BLOCKS, progress=following(move, len(many)), **settings)
    return Demonstration(comparisons, sharing, sinks, dropping)


def following(move: Callable[[int, int], None], total: int) -> Callable[[int, int], None]:
    """A callback for images that were measured and skipped, out of so many."""
    return lambda done, skipped: move(done + skipped, total)
