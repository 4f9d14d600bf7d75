"""`--fail-on`: thresholds over the numbers of a run, and the exit code that says that one tripped."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import click

from collapse_probe.thresholds import Numbers, Threshold, read

TRIPPED = 3


def thresholds(texts: Sequence[str]) -> list[Threshold]:
    """The expressions read, before any work is done; SettingError for one that cannot be."""
    return [read(text) for text in texts]


def stop_if_tripped(rules: Sequence[Threshold], numbers: Mapping[str, Numbers]) -> None:
    """Exit with TRIPPED, and a line on stderr for each threshold that trips for any of the subjects by label.

    An empty label stands for the only subject. One that cannot be decided trips.
    """
    lines = [
        f"{label}: {rule.line(held)}" if label else rule.line(held)
        for rule in rules
        for label, held in numbers.items()
        if rule.check(held).tripped
    ]
    for line in lines:
        click.echo(line, err=True)
    if lines:
        click.get_current_context().exit(TRIPPED)
