"""`--fail-on NAME OP NUMBER`: exit with code 3 where a number of the summary passes a threshold; `--junit`: as test cases."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import click

from collapse_probe.errors import SettingError
from collapse_probe.results.summary.thresholds import Numbers, Threshold, check_names, parse

TRIPPED = 3
ILLEGAL = re.compile("[^\t\n\r\x20-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")


def thresholds(texts: Sequence[str], command: str = "", flag: str = "--fail-on") -> list[Threshold]:
    """The thresholds of a flag, read before any work is done.

    Wrong usage for anything but NAME OP NUMBER, a number that is too large, and a name that no run of `command` has.
    """
    try:
        rules = parse(texts)
        if command:
            check_names(rules, command)
    except SettingError as error:
        raise click.BadParameter(str(error), param_hint=f"'{flag}'") from error
    return rules


def failing(function: Callable[..., Any]) -> Callable[..., Any]:
    """The flags of a command that thresholds can stop: `fail_on` and `junit`."""
    says = (
        "Exit with code 3 where this holds of the summary, or is undefined: 'similar_blocks > 4'. May be given several times."
    )
    cases = "Write the thresholds of --fail-on as test cases of JUnit XML."
    junit = click.option("--junit", type=click.Path(dir_okay=False), callback=junit_file, metavar="FILE", help=cases)
    return click.option("--fail-on", multiple=True, is_eager=True, metavar="'NAME OP NUMBER'", help=says)(junit(function))


def junit_file(ctx: click.Context, parameter: click.Parameter, path: str | None) -> str | None:
    """The file of --junit; wrong usage where there is no threshold, or the file cannot be written."""
    if path is None:
        return None
    if not ctx.params.get("fail_on"):
        raise click.BadParameter("it writes the thresholds of --fail-on, and none is given", ctx, parameter)
    folder = Path(path).absolute().parent
    if not folder.is_dir() or not os.access(folder, os.W_OK):
        raise click.BadParameter(f"{folder} is no folder that can be written", ctx, parameter)
    return path


@dataclass(frozen=True)
class Case:
    """How one threshold came out for one subject: `tripped` is the line that says so, `error` why it could not be decided."""

    threshold: Threshold
    label: str
    tripped: str | None = None
    error: SettingError | None = None


def cases_of(rules: Sequence[Threshold], numbers: Mapping[str, Numbers]) -> list[Case]:
    """How every threshold comes out for every subject by label."""
    cases = []
    for rule in rules:
        for label, values in numbers.items():
            try:
                cases.append(Case(rule, label, rule.line(values)))
            except SettingError as error:
                cases.append(Case(rule, label, error=error))
    return cases


def junit_xml(cases: Sequence[Case], command: str) -> bytes:
    """The cases as one suite of JUnit XML: a threshold that trips is a failure, one that cannot be decided an error."""
    counts = {
        "tests": str(len(cases)),
        "failures": str(sum(case.tripped is not None for case in cases)),
        "errors": str(sum(case.error is not None for case in cases)),
    }
    suites = ElementTree.Element("testsuites", {"name": "collapse-probe", **counts})
    suite = ElementTree.SubElement(suites, "testsuite", {"name": legal(command), "skipped": "0", "time": "0", **counts})
    for case in cases:
        where = legal(".".join(["collapse-probe", *command.split()[:1], *([case.label] if case.label else [])]))
        entry = ElementTree.SubElement(
            suite, "testcase", {"classname": where, "name": f"not ({case.threshold.text})", "time": "0"}
        )
        if case.tripped is not None:
            ElementTree.SubElement(entry, "failure", {"type": "threshold", "message": legal(case.tripped)}).text = legal(
                case.tripped
            )
        if case.error is not None:
            ElementTree.SubElement(entry, "error", {"type": "SettingError", "message": legal(str(case.error))})
    ElementTree.indent(suites)
    return b'<?xml version="1.0" encoding="UTF-8"?>\n' + ElementTree.tostring(suites, encoding="utf-8") + b"\n"


def legal(text: str) -> str:
    """The text without the characters that XML cannot hold."""
    return ILLEGAL.sub("�", text)


def stop_if_tripped(rules: Sequence[Threshold], numbers: Mapping[str, Numbers], junit: str | None = None) -> None:
    """Exit with TRIPPED, and a line on stderr for each threshold that trips for any of the subjects by label.

    An empty label stands for the only subject. With `junit` all cases are written there first. SettingError where a threshold
    names what the summary does not hold.
    """
    cases = cases_of(rules, numbers)
    if junit is not None:
        from collapse_probe.files import write_whole

        context = click.get_current_context(silent=True)
        content = junit_xml(cases, "" if context is None else str(context.info_name))
        write_whole(Path(junit), lambda stream: stream.write(content))
    for case in cases:
        if case.error is not None:
            raise case.error
    tripped = [f"{case.label}: {case.tripped}" if case.label else case.tripped for case in cases if case.tripped]
    for line in tripped:
        click.echo(line, err=True)
    if tripped:
        click.get_current_context().exit(TRIPPED)
