"""`collapse-probe compare`: two or more subjects side by side on the same images."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click
from collapse_probe.cli import options
from collapse_probe.cli.fail_on import failing, stop_if_tripped, thresholds


@click.command("compare", cls=options.Command, context_settings={"help_option_names": ["-h", "--help"]})
@click.argument("subjects", nargs=-1, metavar="SUBJECT...")
@click.option(
    "-m", "--model", metavar="ADDRESS", help="The architecture of the subjects that are checkpoints; alone, the subject."
)
@options.architecture
@options.data_address("--data", "The images; findings folders need none.")
@options.part_of_data
@click.option("--cka", is_flag=True, help="Also the CKA between each model's depths and the first's.")
@click.option("--gram-drift", is_flag=True, help="Also how far patch similarities have moved from the first model.")
@options.running
@options.measuring
@options.remedies
@failing
@options.records
@options.keeping
@options.output
@options.answering()
@options.plugin
@options.talking
@options.across_processes
def command(
    output: str | None,
    as_json: str | None,
    no_page: bool,
    quiet: bool,
    verbose: int,
    fail_on: tuple[str, ...],
    junit: str | None,
    **flags: Any,
) -> None:
    """Set two or more subjects side by side on the same images; each is compared with the first.

    A SUBJECT is a model address, a checkpoint file (with --model for its architecture), a findings folder,
    or a folder of checkpoints: alone, its checkpoints in natural order are shown over the training. A
    --fix goes into every model after the first; one model alone is compared with itself with the fix.
    """
    from collapse_probe.cli.console import Talk
    from collapse_probe.cli.output import keep, of_comparison, output_folder, tell

    from collapse_probe.analysis.state.phases import IMAGES, LOAD, PAGE, PROBE, UNTRAINED

    if not flags["subjects"]:
        if flags["model"] is None:
            raise click.UsageError("Missing argument 'SUBJECT...'.")
        flags |= {"subjects": (flags["model"],), "model": None}
    rules = thresholds(fail_on, "compare")
    options.check_metrics((), (), flags["metrics"], flags["data"] or "")
    folder = output_folder(output, as_json, Path("comparison"))
    if folder is None and (flags["resume"] or flags["max_time"]):
        raise click.UsageError("--resume and --max-time need an output folder for the state: give -o.")
    talk, drawn = Talk(quiet), [] if no_page else [PAGE]
    with talk.stages(LOAD, PROBE, IMAGES, UNTRAINED, *drawn):
        options.load_libraries()
        from collapse_probe.analysis.compare import compare
        from collapse_probe.distributed import rank_and_world

        comparison = compare(
            **flags,
            save_to=folder,
            watch=lambda label, total: talk.bar(total),
            report=talk.say,
            command=options.command_line(),
        )
        first = rank_and_world()[0] == 0
        if first:
            talk.begin(PAGE)
            keep(comparison, folder, no_page)
    if first:
        from collapse_probe.cli.summary import answers

        from collapse_probe.report.comparison.verdict import verdicts

        said = verdicts(comparison)
        text = answers(said, subjects=comparison.subjects)
        tell(comparison, folder, text, of_comparison(comparison, said), as_json, no_page)
        stop_if_tripped(rules, {label: comparison.numbers(label) for label in comparison.subjects}, junit)
