"""`collapse-probe intervene`: what blocks and their attention are worth, by changing them while the model runs."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import click
from collapse_probe.cli import options
from collapse_probe.cli.fail_on import failing, stop_if_tripped, thresholds

from collapse_probe.errors import OutputError

KINDS = ("share", "mean", "donor", "uniform", "identity", "skip")
STATES = ("zero", "mean", "noise", "donor")
EDITS = ("zero-value", "mean-value", "donor-value", "redirect")
PARTS = ("block", "attention", "mlp")


@click.command("intervene", cls=options.Command, context_settings={"help_option_names": ["-h", "--help"]})
@options.model
@options.data
@click.option(
    "--replace",
    multiple=True,
    type=click.Choice(KINDS),
    help="What stands in for a block's map: share (the map of the block before), mean (the block's mean map over the images), "
    "donor (the map of another image), "
    "uniform (the same weight for every key), identity (every token itself), or skip: the whole attention branch is left out. "
    "May be given several times.  [default: share, where nothing else is asked for]",
)
@click.option(
    "--drop",
    multiple=True,
    type=click.Choice(PARTS),
    help="Leave out each block, its attention or its MLP: one at a time, and greedily, each time the one that costs least "
    "after those that are gone. A third of the images chooses the order (256 at most), another settles how many can go (512 at "
    "most), all others give the price.",
)
@click.option(
    "--prefix",
    multiple=True,
    type=click.Choice(STATES),
    help="What stands in for the states of prefix tokens at the input of a block (of registers, where there are some, else of "
    "the class token), beside the same at as many random patch tokens: zero, mean (over the images), noise (of the same "
    "length), donor (another image's).",
)
@click.option(
    "--sinks",
    multiple=True,
    type=click.Choice(EDITS),
    help="What is done to attention sinks, in every head of a block in which an image has one (90 % of the queries give one "
    "key half of their attention or more): another value there, or no attention to it; beside it the same at a random patch "
    "token.",
)
@options.count("--window", least=1, default=1, says="With --drop: also every N consecutive blocks together.")
@options.count("--keep", least=0, says="With --drop: go on until N of the model's blocks are left.  [default: 1]")
@click.option(
    "--export",
    type=click.Path(dir_okay=False),
    metavar="FILE",
    help="With --drop block: write the model without blocks (.safetensors, .pth), with the logits of the run to the bit, and "
    "print how timm loads it. Without which: with --keep N those that go first until N are left; else those of --blocks; "
    "else as many as can go.",
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
    """Replace the attention maps of blocks, or leave blocks out: what it changes in logits and accuracy, and what can go."""
    from collapse_probe.cli.console import Talk
    from collapse_probe.cli.output import keep, of_interventions, output_folder, prepare, tell

    from collapse_probe.analysis.state.phases import CHOSEN, IMAGES, LOAD, PAGE, PROBE, REPLACED, UNTRAINED

    rules = thresholds(fail_on, "intervene")
    if output is not None:
        prepare(output, quiet)
    talk, drawn, chosen = Talk(quiet), [] if no_page else [PAGE], [CHOSEN] * len(flags["drop"])
    with talk.stages(LOAD, PROBE, IMAGES, UNTRAINED, *chosen, REPLACED, *drawn):
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
            flags["replace"] = flags["replace"] or None
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
        if exported := interventions.run.get("export"):
            say_exported(exported, bool(as_json))
        stop_if_tripped(rules, {"": interventions.summary}, junit)


def say_exported(exported: Mapping[str, Any], on_stderr: bool) -> None:
    """How the exported model is loaded; exit code 1 where none was written."""
    if exported["file"] is None:
        raise OutputError(f"no model was exported: {exported['why']}")
    lines = [f"model: {exported['file']}, {exported['depth']} blocks", *(f"  {line}" for line in exported["lines"])]
    if "flags" in exported:
        lines.append(f"  collapse-probe analyze {exported['flags']} --data …")
    click.echo("\n".join(lines), err=on_stderr)
