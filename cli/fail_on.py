"""`--fail-on NAME OP NUMBER`: exit with code 3 where a number of the summary passes a threshold."""

from __future__ import annotations

import difflib
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


def thresholds(texts: Sequence[str]) -> list[Threshold]:
    """The thresholds of `--fail-on`, read before any work is done; wrong usage for anything but NAME OP NUMBER."""
    rules = []
    for text in texts:
        match = SYNTAX.fullmatch(text)
        if match is None:
            message = f"expected NAME OP NUMBER, OP one of {' '.join(OPERATORS)}, as in 'similar_blocks > 4'; came {text!r}"
            raise click.BadParameter(message, param_hint="'--fail-on'")
        rules.append(Threshold(text.strip(), match[1], match[2], float(match[3])))
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
