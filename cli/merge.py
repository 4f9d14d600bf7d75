"""`collapse-probe merge`: the parts of one measurement, or what an interrupted run left, become findings and page."""

from __future__ import annotations

from pathlib import Path

import click
from collapse_probe.cli import options


@click.command("merge", context_settings={"help_option_names": ["-h", "--help"]})
@click.argument("parts", nargs=-1, required=True, metavar="PART...")
@click.option("--allow-missing", is_flag=True, help="Report what there is where parts or images are missing; the page says so.")
@click.option("--device", default="auto", show_default=True, metavar="NAME", help="For the untrained twin: auto, cpu, cuda, …")
@options.failing
@options.output
@click.option("--json", "as_json", is_flag=True, help="Print findings.json on stdout; a folder is written only with -o.")
@options.plugin
@options.talking
def command(
    parts: tuple[str, ...],
    allow_missing: bool,
    device: str,
    output: str | None,
    as_json: bool,
    quiet: bool,
    verbose: int,
    fail_on: tuple[str, ...],
) -> None:
    """Add the state files of one measurement and write its findings and page.

    A PART is a file that `analyze --part K/N` wrote, or a folder: of such files, or of a run that was stopped. Parts of other
    models, weights, data or settings are refused, and so are images that two parts have seen, and missing ones.
    """
    from collapse_probe.cli.fail_on import stop_if_tripped, thresholds
    from collapse_probe.cli.output import deliver, output_folder

    rules = thresholds(fail_on, "analyze")
    folder = output_folder(output, as_json, Path("findings") / "merged")

    from collapse_probe.cli.console import Talk, answer

    from collapse_probe.analysis.merge import merge

    talk = Talk(quiet)
    findings = merge(parts, allow_missing=allow_missing, device=device, command=options.command_line(), report=talk.say)

    from collapse_probe.report.findings.page import write_report  # with matplotlib, which only the page needs

    deliver(findings, folder, write_report, answer(findings), as_json)
    stop_if_tripped(rules, {"": findings.summary})
