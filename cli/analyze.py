"""`collapse-probe analyze`: one pass over the data, all metrics, findings and report."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click
from collapse_probe.cli import options
from collapse_probe.cli.fail_on import failing, stop_if_tripped, thresholds


@click.command("analyze", cls=options.Command, context_settings={"help_option_names": ["-h", "--help"]})
@options.model
@options.data_if_needed
@options.level
@options.preset
@options.running
@options.measuring
@options.surer
@options.remedies
@failing
@options.records
@options.keeping
@click.option(
    "--part",
    type=options.Share(),
    metavar="K/N",
    help="Measure every N-th image, from the K-th on, into one state file in the output folder; `merge` adds the parts.",
)
@options.output
@options.answering()
@options.plugin
@options.talking
@options.across_processes
def command(
    data: str | None,
    output: str | None,
    as_json: str | None,
    no_page: bool,
    quiet: bool,
    verbose: int,
    fail_on: tuple[str, ...],
    junit: str | None,
    part: tuple[int, int] | None,
    **flags: Any,
) -> None:
    """Measure the collapse of one model over a data set: one pass, all metrics, findings and report."""
    from collapse_probe.cli.console import Talk
    from collapse_probe.cli.output import keep, of_findings, output_folder, prepare, tell

    from collapse_probe.analysis.state.phases import IMAGES, LOAD, PAGE, PROBE, UNTRAINED, WEIGHTS

    rules = thresholds(fail_on, "analyze")
    options.check_metrics(flags["levels"], flags["presets"], flags["metrics"], data)
    if part is not None:
        check_part_flags(output, as_json, fail_on, flags["until_ci"], data)
    elif output is not None:
        prepare(output, quiet)

    talk, drawn = Talk(quiet), [] if no_page or part is not None else [PAGE]
    with talk.stages(LOAD, PROBE, WEIGHTS if data is None else IMAGES, UNTRAINED, *drawn):
        options.load_libraries()
        from collapse_probe.analysis.analyze import analyze
        from collapse_probe.analysis.merge import analyze_part
        from collapse_probe.distributed import rank_and_world
        from collapse_probe.metrics.metric import of_level
        from collapse_probe.metrics.presets import with_presets

        names = (*of_level(*flags.pop("levels")), *with_presets(flags["metrics"], flags["presets"]))
        flags["metrics"] = tuple(dict.fromkeys(names))
        images, subject = options.open_subject(data, flags)
        folder = None if part else output_folder(output, as_json, Path("findings") / subject.name.replace("/", "-"))
        talk.say(f"model {subject.source}:{subject.name}, weights {subject.weights}")
        talk.say("preprocessing " + ", ".join(f"{k} {v}" for k, v in subject.preprocess.description.items()))
        talk.say("no data: the weights alone" if images is None else options.data_line(images))
        flags |= {"command": options.command_line(), "report": talk.say}
        talk.begin(PROBE)
        if part is not None and output is not None:
            with talk.bar(None if images.count is None else -(-(images.count - part[0] + 1) // part[1])) as progress:
                file = analyze_part(subject, images, part, output, **flags, progress=progress)
        else:
            if folder is None and (flags["resume"] or flags["max_time"]):
                raise click.UsageError("--resume and --max-time need an output folder for the state: give -o.")
            with talk.bar(0 if images is None else images.count) as progress:
                findings = analyze(subject, images, save_to=folder, **flags, progress=progress)
        first = rank_and_world()[0] == 0
        if first and part is None:
            talk.begin(PAGE)
            keep(findings, folder, no_page)
    if not first:
        return
    if part is not None:
        click.echo(file)
        return
    from collapse_probe.cli.summary import answer

    tell(findings, folder, answer(findings), of_findings(findings), as_json, no_page)
    stop_if_tripped(rules, {"": findings.summary}, junit)


def check_part_flags(
    output: str | None, as_json: str | None, fail_on: tuple[str, ...], until_ci: float | None, data: str | None
) -> None:
    """Wrong usage where flags cannot go with a part: it has no findings, and sees its own images alone."""
    from collapse_probe.files import check_writable

    if output is None:
        raise click.UsageError("--part writes a state file: name its folder with -o.")
    for flag, given in (("--json", as_json is not None), ("--fail-on", fail_on), ("--until-ci", until_ci is not None)):
        if given:
            raise click.UsageError(f"{flag} looks at all images, and --part sees its own alone: use it with `merge`.")
    if data is None:
        raise click.UsageError("--part is a part of the images: give --data.")
    check_writable(output)
