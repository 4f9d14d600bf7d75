"""`collapse-probe analyze`: one pass over the data, all metrics, findings and report."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click
from collapse_probe.cli import options


@click.command("analyze", context_settings={"help_option_names": ["-h", "--help"]})
@options.model
@options.data_if_needed
@options.level
@options.preset
@options.running
@options.measuring
@options.surer
@options.remedies
@options.failing
@options.output
@click.option("--json", "as_json", is_flag=True, help="Print findings.json on stdout; a folder is written only with -o.")
@options.plugin
@options.talking
@options.across_processes
def command(
    data: str | None, output: str | None, as_json: bool, quiet: bool, verbose: int, fail_on: tuple[str, ...], **flags: Any
) -> None:
    """Measure the collapse of one model over a data set: one pass, all metrics, findings and report."""
    from collapse_probe.cli.fail_on import stop_if_tripped, thresholds
    from collapse_probe.cli.output import deliver, output_folder, prepare

    rules = thresholds(fail_on, "analyze")
    options.check_metrics(flags["levels"], flags["presets"], flags["metrics"], data)
    if output is not None:
        prepare(output, quiet)

    from collapse_probe.cli.console import Talk, answer

    from collapse_probe.analysis.analyze import analyze
    from collapse_probe.distributed import rank_and_world
    from collapse_probe.metrics.metric import of_level
    from collapse_probe.metrics.presets import with_presets
    from collapse_probe.report.findings.page import write_report

    talk = Talk(quiet)
    names = (*of_level(*flags.pop("levels")), *with_presets(flags["metrics"], flags["presets"]))
    flags["metrics"] = tuple(dict.fromkeys(names))
    images, subject = options.open_subject(data, flags)
    folder = output_folder(output, as_json, Path("findings") / subject.name.replace("/", "-"))
    talk.say(f"model {subject.source}:{subject.name}, weights {subject.weights}")
    talk.say("preprocessing " + ", ".join(f"{k} {v}" for k, v in subject.preprocess.description.items()))
    talk.say("no data: the weights alone" if images is None else f"data {images.address}, {len(images)} images")
    with talk.bar(0 if images is None else len(images)) as progress:
        findings = analyze(subject, images, **flags, command=options.command_line(), progress=progress, report=talk.say)
    if rank_and_world()[0] == 0:
        deliver(findings, folder, write_report, answer(findings), as_json)
        stop_if_tripped(rules, {"": findings.summary})
