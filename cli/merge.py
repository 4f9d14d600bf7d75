"""`collapse-probe merge`: the parts of one measurement, or what an interrupted run left, become findings and page."""

from __future__ import annotations

from pathlib import Path

import click
from collapse_probe.cli import options
from collapse_probe.cli.fail_on import failing, stop_if_tripped, thresholds


@click.command("merge", cls=options.Command, context_settings={"help_option_names": ["-h", "--help"]})
@click.argument("parts", nargs=-1, required=True, metavar="PART...")
@click.option("--allow-missing", is_flag=True, help="Report what there is where parts or images are missing; the page says so.")
@click.option("--device", default="auto", show_default=True, metavar="NAME", help="For the untrained copy: auto, cpu, cuda, …")
@failing
@options.output
@options.answering()
@options.plugin
@options.talking
def command(
    parts: tuple[str, ...],
    allow_missing: bool,
    device: str,
    output: str | None,
    as_json: str | None,
    no_page: bool,
    quiet: bool,
    verbose: int,
    fail_on: tuple[str, ...],
    junit: str | None,
) -> None:
    """Add the state files of one measurement and write its findings and page.

    A PART is a file that `analyze --part K/N` wrote, or a folder: of such files, or of a run that was stopped. Parts of other
    models, weights, data or settings are refused, and so are images that two parts have seen, and missing ones.
    """
    from collapse_probe.cli.console import Talk
    from collapse_probe.cli.output import keep, of_findings, output_folder, tell

    from collapse_probe.analysis.state.phases import LOAD, PAGE, UNTRAINED

    rules = thresholds(fail_on, "analyze")
    folder = output_folder(output, as_json, Path("findings") / "merged")
    talk, drawn = Talk(quiet), [] if no_page else [PAGE]
    with talk.stages(LOAD, UNTRAINED, *drawn):
        options.load_libraries()
        from collapse_probe.analysis.merge import merge

        findings = merge(parts, allow_missing=allow_missing, device=device, command=options.command_line(), report=talk.say)
        talk.begin(PAGE)
        keep(findings, folder, no_page)
    from collapse_probe.cli.summary import answer

    tell(findings, folder, answer(findings), of_findings(findings), as_json, no_page)
    stop_if_tripped(rules, {"": findings.summary}, junit)
