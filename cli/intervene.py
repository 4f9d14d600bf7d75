"""`collapse-probe intervene`: what the attention of each block is worth, by replacing its map while the model runs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click
from collapse_probe.cli import options

KINDS = ("share", "mean", "uniform", "identity", "skip")
MEASURING = ("metrics", "presets", "null_images", "null_seeds", "until_ci")  # flags of `running` that are about analyses


@click.command("intervene", context_settings={"help_option_names": ["-h", "--help"]})
@options.model
@options.data
@click.option(
    "--replace",
    "kinds",
    multiple=True,
    type=click.Choice(KINDS),
    default=("share",),
    show_default=True,
    help="What stands in for a block's map: the map of the block before, the block's mean map over the images, the same weight "
    "for every key, every token itself; or the whole attention branch is left out. May be given several times.",
)
@click.option("--blocks", metavar="BLOCKS", help="Which blocks: 6-23, or 0,2,5-7.  [default: all]")
@options.running
@options.remedies
@options.failing
@options.output
@click.option("--json", "as_json", is_flag=True, help="Print interventions.json on stdout; a folder is written only with -o.")
@options.plugin
@options.talking
def command(output: str | None, as_json: bool, quiet: bool, verbose: int, **flags: Any) -> None:
    """Replace the attention maps of blocks, one at a time and from the last block down: the change in logits and accuracy."""
    from collapse_probe.distributed import joined

    with joined():
        run(output=output, as_json=as_json, quiet=quiet, **flags)


command.params = [parameter for parameter in command.params if parameter.name not in MEASURING]


def run(*, model: str, data: str, output: str | None, as_json: bool, quiet: bool, **flags: Any) -> None:
    """Intervene, write the folder, print the answer."""
    from collapse_probe.cli.analyze import command_line, opened
    from collapse_probe.cli.console import Talk
    from collapse_probe.cli.fail_on import stop_if_tripped, thresholds
    from collapse_probe.cli.options import blocks_in

    from collapse_probe.analysis.intervene import intervene
    from collapse_probe.analysis.measurement import RunSettings
    from collapse_probe.data.images import open_data
    from collapse_probe.distributed import rank_and_world
    from collapse_probe.files import check_writable, write_with_page
    from collapse_probe.report.intervention.page import write_interventions

    talk, rules = Talk(quiet), thresholds(flags.pop("fail_on", ()))
    kinds, where = flags.pop("kinds"), flags.pop("blocks")
    blocks = None if where is None else blocks_in(where)
    images = open_data(data, split=flags.pop("split"), limit=flags.pop("limit"), seed=flags["seed"])
    subject = opened(model, images, flags)
    folder = None if as_json and output is None else Path(output or Path("interventions") / subject.name.replace("/", "-"))
    if folder is not None:
        check_writable(folder)
    talk.say(f"model {subject.source}:{subject.name}, weights {subject.weights}")
    talk.say(f"data {images.address}, {len(images)} images")
    settings = RunSettings(**flags, command=command_line())
    with talk.bar(len(images)) as progress:
        found = intervene(subject, images, kinds, blocks, settings=settings, progress=progress, report=talk.say)
    if rank_and_world()[0] > 0:
        return
    if folder is not None:
        write_with_page(folder, found, write_interventions)
    if as_json:
        click.echo(json.dumps(found.to_json(), allow_nan=False))
    else:
        click.echo(told(found))
        click.echo(f"\nreport: {folder / 'report.html'}" if folder is not None else "")
    stop_if_tripped(rules, {"": found.summary})


def told(found: Any) -> str:
    """The answers, and the summary as text."""
    from collapse_probe.report.intervention.verdict import answers

    lines: list[str] = []
    for answer in answers(found):
        lines += [*answer.sentences, *(f"Note: {caveat}" for caveat in answer.caveats), ""]
    width = max(map(len, found.summary))
    lines += [f"  {name:<{width}}  {'–' if value is None else f'{value:.6g}'}" for name, value in found.summary.items()]
    return "\n".join(lines)
