"""`collapse-probe demo`: the bundled pairs on bundled data, and the story that they tell."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
from collapse_probe.cli import options

from collapse_probe.analysis.compare import compare
from collapse_probe.analysis.intervene import intervene
from collapse_probe.data.splits import split_data
from collapse_probe.report.demo import LABELS, PAIRS, Demonstration
from collapse_probe.results.comparison import Comparison
from collapse_probe.results.intervention import Interventions

DATA = "bundled:digits"
NULL_IMAGES = 32
SHARING_IMAGES = 96
Report = Callable[[str], None]


def demonstrate(*, seed: int = 0, device: str = "auto", report: Report | None = None, watch: Any = None) -> Demonstration:
    """Compare the bundled pairs, then let their blocks use the map of the block before."""
    say = report or (lambda text: None)
    images = split_data(DATA).held_out
    comparisons: dict[str, Comparison] = {}
    sharing: dict[str, dict[str, Interventions]] = {}
    for pair, names in PAIRS.items():
        say(f"the {pair}: {' and '.join(names)} on {len(images)} held-out digits")
        subjects = {label: f"ours:{name}" for label, name in zip(LABELS, names, strict=True)}
        facts: dict[str, Any] = {"seed": seed, "device": device, "null_images": NULL_IMAGES, "gallery_images": 2}
        comparisons[pair] = compare(subjects, images, watch=watch, command="collapse-probe demo", **facts)
        say(f"the {pair}: what sharing the maps of neighbouring blocks costs")
        few = images.subset(SHARING_IMAGES, seed)
        sharing[pair] = {
            label: intervene(address, few, ("share",), seed=seed, device=device) for label, address in subjects.items()
        }
    return Demonstration(comparisons, sharing)


@click.command("demo", context_settings={"help_option_names": ["-h", "--help"]})
@click.option("-o", "--output", default="demo", show_default=True, metavar="DIR", help="The output folder.")
@options.talking
def command(output: str, quiet: bool, verbose: int) -> None:
    """Compare the trained pairs that ship with the package, on digits that they have not seen; needs no network."""
    from collapse_probe.cli.console import Talk

    from collapse_probe.files import check_writable, new_folder
    from collapse_probe.models.sources.ours import FOLDER
    from collapse_probe.report.demo import PAGE, told, write_story

    talk, folder = Talk(quiet), Path(output)
    check_writable(folder)
    shown = demonstrate(report=talk.say)
    with new_folder(folder) as inside:
        write_story(shown, inside, json.loads((FOLDER / "spread.json").read_text(encoding="utf-8")))
    for title, sentences in told(shown):
        click.echo("\n".join([title, *(f"  {sentence}" for sentence in sentences), ""]))
    click.echo(f"open this page in a browser: {(folder / PAGE).absolute().as_uri()}")
