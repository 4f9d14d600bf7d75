"""How every rule of the verdict comes out on given findings, as data."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

import numpy as np

from collapse_probe.findings import Findings
from collapse_probe.quantities import Quantity, quantity
from collapse_probe.verdict_rules import RULES, Rule

Answer = Literal["yes", "no", "undecided", "not applicable"]
Bounds = tuple[float, float]


@dataclass(frozen=True)
class Place:
    """A rule at one block, pair of blocks (the later one's number) or depth; at None where it is about the whole model."""

    at: int | None
    value: float
    ci: Bounds | None
    answer: Answer


@dataclass(frozen=True)
class Outcome:
    """How one rule came out. `value` and `ci` are those of the place that goes furthest among the places with this answer.

    yes: it holds with the whole interval at one place at least. undecided: nowhere, but somewhere the interval holds the
    threshold, or there are too few images for an interval. no: at every place the interval lies on the other side. Intervals
    are those of single places, not corrected for their number. not applicable: the number was not measured, is refused or
    undefined. `reason` says it in words; `axis` is pair, block, depth or model.
    """

    rule: Rule
    answer: Answer
    value: float | None
    ci: Bounds | None
    reason: str
    axis: str = "model"
    places: tuple[Place, ...] = ()

    def at(self, answer: Answer) -> list[int]:
        """The blocks or depths with this answer."""
        return [place.at for place in self.places if place.answer == answer and place.at is not None]

    def plain(self) -> dict[str, Any]:
        """As JSON holds it: the rule's own row, then how it came out."""
        row = {key: value for key, value in asdict(self.rule).items() if key not in ("name", "spoken")}
        places = [{"at": p.at, "value": p.value, "ci95": p.ci, "answer": p.answer} for p in self.places]
        outcome = {"answer": self.answer, "value": self.value, "ci95": self.ci, "reason": self.reason}
        return {"rule": self.rule.name, **row, **outcome, "axis": self.axis, "places": places}


def verdict_table(findings: Findings) -> list[Outcome]:
    """How each rule comes out, in the order of the rules."""
    return [outcome(rule, findings) for rule in RULES]


def judged(findings: Findings) -> Findings:
    """The findings with how each rule came out."""
    return replace(findings, verdict=[each.plain() for each in verdict_table(findings)])


def outcome(rule: Rule, findings: Findings) -> Outcome:
    """How one rule comes out."""
    found = quantity(rule.name, findings)
    if isinstance(found, str):
        return Outcome(rule, "not applicable", None, None, found)
    alone = rule.level in ("attention", "tokens") and (findings.data.get("images") or 0) < 2
    places = tuple(_place(rule, found, i, alone) for i in range(len(found.values)))
    answer = _together(places)
    if answer == "not applicable":
        return Outcome(rule, answer, None, None, f"{rule.quantity} is defined nowhere", found.axis, places)
    furthest = max if rule.direction == "above" else min
    shown = furthest((place for place in places if place.answer == answer), key=lambda place: place.value)
    return Outcome(rule, answer, shown.value, shown.ci, _reason(rule, answer, places, found), found.axis, places)


def _place(rule: Rule, found: Quantity, i: int, alone: bool) -> Place:
    at = found.places[i] if found.places else None
    value = float(found.values[i])
    if not np.isfinite(value):
        return Place(at, value, None, "not applicable")
    if found.low is None or found.high is None:
        return Place(at, value, None, "undecided" if alone else _answer(rule.holds(value)))
    low, high = float(found.low[i]), float(found.high[i])
    if not (np.isfinite(low) and np.isfinite(high)):
        return Place(at, value, None, "undecided")
    sides = {rule.holds(low), rule.holds(value), rule.holds(high)}
    return Place(at, value, (low, high), "undecided" if len(sides) > 1 else _answer(sides.pop()))


def _answer(holds: bool) -> Answer:
    return "yes" if holds else "no"


def _together(places: tuple[Place, ...]) -> Answer:
    found = {place.answer for place in places}
    order: tuple[Answer, ...] = ("yes", "undecided", "no")
    return next((answer for answer in order if answer in found), "not applicable")


def _reason(rule: Rule, answer: Answer, places: tuple[Place, ...], found: Quantity) -> str:
    here = [place for place in places if place.answer == answer]
    defined = sum(place.answer != "not applicable" for place in places)
    where = f"{len(here)} of {defined} {found.axis}s: " if defined > 1 else ""
    side = f"{rule.direction} {rule.threshold:g}"
    by_interval = found.low is not None
    said = {
        "yes": f"{side}{' with the whole interval' if by_interval else ''}",
        "no": f"not {side}{' anywhere in the interval' if by_interval else ''}",
        "undecided": f"the interval holds {rule.threshold:g}"
        if any(place.ci for place in here)
        else "no interval: more images are needed",
    }[answer]
    return where + said + (f" ({found.note})" if found.note else "")
