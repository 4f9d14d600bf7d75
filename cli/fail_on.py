"""`--fail-on NAME OP NUMBER`: exit with code 3 where a number of the summary passes a threshold; `--junit`: as test cases."""

from __future__ import annotations

import difflib
import math
import operator
import os
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import click

from collapse_probe.errors import SettingError

Numbers = Mapping[str, "float | int | None"]
OPERATORS = {
    "<": operator.lt,
    "<=": operator.le,
    ">": operator.gt,
    ">=": operator.ge,
    "==": operator.eq,
    "!=": operator.ne,
}
SYNTAX = re.compile(r"\s*([A-Za-z_]\w*)\s*([<>=!]=|[<>])\s*([-+]?(?:\d+\.?\d*|\.\d+)(?:[eE][-+]?\d+)?)\s*")
TRIPPED = 3
ILLEGAL = re.compile("[^\t\n\r\x20-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")


@dataclass(frozen=True)
class Threshold:
    """`number` that the value called `name` in a summary is compared with."""

    text: str
    name: str
    sign: str
    number: float

    def line(self, numbers: Numbers) -> str | None:
        """One line where the threshold trips, else None; an undefined value trips. SettingError for an unknown name."""
        if self.name not in numbers:
            near = difflib.get_close_matches(self.name, numbers, n=3, cutoff=0.5)
            known = f"did you mean {' or '.join(near)}?" if near else f"there are {', '.join(sorted(numbers))}"
            raise SettingError(f"--fail-on names {self.name!r}, which the summary does not hold; {known}")
        value, text = numbers[self.name], f"threshold {self.text!r}"
        if value is None or value != value:
            return f"{text} cannot be decided and counts as tripped: {self.name} is undefined"
        return f"{text} tripped: {self.name} is {value:.6g}" if OPERATORS[self.sign](value, self.number) else None


POINTS, BOUNDS = ("", "_row", "_centred", "_probs"), ("", "_ci_low", "_ci_high")
SUMMARY = (
    *("images", "accuracy", "attention_entropy_share", "head_similarity_mean", "image_similarity_mean"),
    *("feature_similarity_adjacent", "attention_entropy_mean", "patch_diversity_last"),
    *(f"{name}{point}_adjacent" for name in ("attention_similarity", "other_token", "kappa") for point in POINTS),
    *(f"similar_blocks{point}{end}" for point in ("", "_probs") for end in (*BOUNDS, "_corrected", "_pairs")),
)
OF_WEIGHTS = re.compile(r"(weight_(rank|similarity|orthogonality)|hyperspherical_energy)\w*_(mean|adjacent)(_untrained)?")
EFFECTS = re.compile(r"images|accuracy|(share|mean|uniform|identity|skip)_(largest|all)_(kl|agreement|accuracy_change)")


def check_names(rules: Sequence[Threshold], command: str) -> None:
    """Wrong usage for a name that no run of the command has in its summary, as far as no plug-in brings others."""
    from collapse_probe.registry import METRICS, loaded_plugins

    names = {f"{name}{end}": None for name in SUMMARY for end in BOUNDS}
    if command == "compare":
        names |= {f"{name}_difference": None for name in names}
    for rule in () if loaded_plugins or METRICS.has_entry_points else rules:
        name = rule.name.removesuffix("_difference") if command == "compare" else rule.name
        known = EFFECTS.fullmatch(name) if command == "intervene" else rule.name in names or OF_WEIGHTS.fullmatch(name)
        if not known:
            near = difflib.get_close_matches(rule.name, names, n=3, cutoff=0.5) if command != "intervene" else ()
            hint = f"did you mean {' or '.join(near)}?" if near else "the summary that --json prints has them"
            raise click.BadParameter(f"no run of {command} has a number {rule.name!r}; {hint}", param_hint="'--fail-on'")


def thresholds(texts: Sequence[str], command: str = "") -> list[Threshold]:
    """The thresholds of `--fail-on`, read before any work is done.

    Wrong usage for anything but NAME OP NUMBER, a number that is too large, and a name that no run of `command` has.
    """
    rules = []
    for text in texts:
        match = SYNTAX.fullmatch(text)
        if match is None:
            message = f"expected NAME OP NUMBER, OP one of {' '.join(OPERATORS)}, as in 'similar_blocks > 4'; came {text!r}"
            raise click.BadParameter(message, param_hint="'--fail-on'")
        if not math.isfinite(number := float(match[3])):
            raise click.BadParameter(f"{match[3][:40]} is too large for a number", param_hint="'--fail-on'")
        rules.append(Threshold(text.strip(), match[1], match[2], number))
    if command:
        check_names(rules, command)
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
