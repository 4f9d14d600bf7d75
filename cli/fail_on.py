"""`--fail-on NAME OP NUMBER`: exit with code 3 where a number of the summary passes a threshold."""

from __future__ import annotations

import difflib
import math
import operator
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

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


def stop_if_tripped(rules: Sequence[Threshold], numbers: Mapping[str, Numbers]) -> None:
    """Exit with TRIPPED, and a line on stderr for each threshold that trips for any of the subjects by label.

    An empty label stands for the only subject.
    """
    lines = [(label, rule.line(values)) for rule in rules for label, values in numbers.items()]
    tripped = [f"{label}: {line}" if label else line for label, line in lines if line]
    for line in tripped:
        click.echo(line, err=True)
    if tripped:
        click.get_current_context().exit(TRIPPED)
