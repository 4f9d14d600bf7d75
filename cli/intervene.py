"""`collapse-probe intervene`: what the attention of each block is worth, by replacing its map while the model runs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click
from collapse_probe.cli import options

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
@options.failing
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
    **flags: Any,
) -> None:
    """Replace the attention maps of blocks, one at a time and from the last block down: the change in logits and accuracy."""
    from collapse_probe.cli.fail_on import stop_if_tripped, thresholds
    from collapse_probe.cli.output import answer_lines, deliver, of_interventions, output_folder, prepare, summary_lines

    rules = thresholds(fail_on, "intervene")
    if output is not None:
        prepare(output, quiet)

    options.load_libraries()
    from collapse_probe.cli.console import Talk

    from collapse_probe.analysis.intervene import intervene
    from collapse_probe.distributed import rank_and_world

    talk = Talk(quiet)
    images, subject = options.open_subject(data, flags)
    folder = output_folder(output, as_json, Path("interventions") / subject.name.replace("/", "-"))
    talk.say(f"model {subject.source}:{subject.name}, weights {subject.weights}")
    talk.say(options.data_line(images))
    if folder is None and (flags["resume"] or flags["max_time"]):
        raise click.UsageError("--resume and --max-time need an output folder for the state: give -o.")
    flags |= {"save_to": folder, "command": options.command_line(), "report": talk.say}
    with talk.bar(images.count) as progress:
        interventions = intervene(subject, images, **flags, progress=progress)
    if rank_and_world()[0] == 0:
        from collapse_probe.report.intervention.verdict import verdicts

        answers = verdicts(interventions)
        text = "\n".join([*answer_lines(answers), *summary_lines({"": interventions.summary})])
        deliver(interventions, folder, text, of_interventions(interventions, answers), as_json, no_page)
        stop_if_tripped(rules, {"": interventions.summary})
