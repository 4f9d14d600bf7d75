"""`collapse-probe intervene`: what the attention of each block is worth, by replacing its map while the model runs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click
from collapse_probe.cli import options
from collapse_probe.cli.fail_on import failing, stop_if_tripped, thresholds

KINDS = ("share", "mean", "uniform", "identity", "skip")


@click.command("intervene", cls=options.Command, context_settings={"help_option_names": ["-h", "--help"]})
@options.model
@options.data
@click.option(
    "--replace",
    multiple=True,
    default=("share",),
    show_default=True,
    type=click.Choice(KINDS),
    help="What stands in for a block's map: share (the map of the block before), mean (the block's mean map over the images), "
    "uniform (the same weight for every key), identity (every token itself), or skip: the whole attention branch is left out. "
    "May be given several times.",
)
@click.option(
    "--blocks", callback=options.block_numbers, metavar="BLOCKS", help="Which blocks: 6-23, or 0,2,5-7.  [default: all]"
)
@options.running
@options.remedies
@failing
@options.keeping
@options.output
@options.answering()
@options.plugin
@options.talking
@options.across_processes
def command(
    data: str,
    output: str | None,
    as_json: str | None,
    no_page: bool,
    quiet: bool,
    verbose: int,
    fail_on: tuple[str, ...],
    junit: str | None,
    **flags: Any,
) -> None:
    """Replace the attention maps of blocks, one at a time and from the last block down: the change in logits and accuracy."""
    from collapse_probe.cli.console import Talk
    from collapse_probe.cli.output import keep, of_interventions, output_folder, prepare, tell

    from collapse_probe.analysis.state.phases import IMAGES, LOAD, PAGE, PROBE, REPLACED, UNTRAINED

    rules = thresholds(fail_on, "intervene")
    if output is not None:
        prepare(output, quiet)
    talk, drawn = Talk(quiet), [] if no_page else [PAGE]
    with talk.stages(LOAD, PROBE, IMAGES, UNTRAINED, REPLACED, *drawn):
        options.load_libraries()
        from collapse_probe.analysis.intervene import intervene
        from collapse_probe.distributed import rank_and_world

        images, subject = options.open_subject(data, flags)
        folder = output_folder(output, as_json, Path("interventions") / subject.name.replace("/", "-"))
        talk.say(f"model {subject.source}:{subject.name}, weights {subject.weights}")
        talk.say(options.data_line(images))
        if folder is None and (flags["resume"] or flags["max_time"]):
            raise click.UsageError("--resume and --max-time need an output folder for the state: give -o.")
        flags |= {"save_to": folder, "command": options.command_line(), "report": talk.say}
        talk.begin(PROBE)
        with talk.bar(images.count) as progress:
            interventions = intervene(subject, images, **flags, progress=progress)
        first = rank_and_world()[0] == 0
        if first:
            talk.begin(PAGE)
            keep(interventions, folder, no_page)
    if first:
        from collapse_probe.cli.summary import answers

        from collapse_probe.report.intervention.verdict import verdicts

        said = verdicts(interventions)
        text = answers(said, {"": interventions.summary})
        tell(interventions, folder, text, of_interventions(interventions, said), as_json, no_page)
        stop_if_tripped(rules, {"": interventions.summary}, junit)
