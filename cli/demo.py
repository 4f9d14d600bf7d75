"""`collapse-probe demo`: compare the bundled pairs of models on bundled data, and write the page about them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from collapse_probe.cli import options

if TYPE_CHECKING:
    from collapse_probe.report.demo import Demonstration

DATA = "bundled:digits"
NULL_IMAGES = 32
SHARING_IMAGES = 96


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
    demonstration = demonstrate(Talk(quiet).say)
    if rank_and_world()[0] > 0:
        return
    with new_folder(folder) as inside:
        write_demonstration(demonstration, inside, json.loads((FOLDER / "spread.json").read_text(encoding="utf-8")))
    for title, sentences in chapters(demonstration).items():
        click.echo("\n".join([title, *(f"  {sentence}" for sentence in sentences), ""]))
    click.echo(f"open this page in a browser: {(folder / PAGE).absolute().as_uri()}")


def demonstrate(report: Callable[[str], None]) -> Demonstration:
    """Compare the models of each pair, and measure what sharing maps between neighbouring blocks costs each model."""
    from collapse_probe.analysis.compare import compare
    from collapse_probe.analysis.intervene import intervene
    from collapse_probe.data.splits import split_data
    from collapse_probe.report.demo import LABELS, PAIRS, Demonstration

    images = split_data(DATA).held_out
    few = images.subset(SHARING_IMAGES, 0)
    settings: dict[str, Any] = {"seed": 0, "device": "auto"}
    comparisons, sharing = {}, {}
    for pair, names in PAIRS.items():
        subjects = {label: f"ours:{name}" for label, name in zip(LABELS, names, strict=True)}
        report(f"the {pair}: {' and '.join(names)} on {len(images)} held-out digits")
        comparisons[pair] = compare(
            subjects, images, command="collapse-probe demo", null_images=NULL_IMAGES, gallery_images=2, **settings
        )
        report(f"the {pair}: what sharing the maps of neighbouring blocks costs")
        sharing[pair] = {label: intervene(address, few, ("share",), **settings) for label, address in subjects.items()}
    return Demonstration(comparisons, sharing)
