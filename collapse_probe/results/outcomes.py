"""How each rule of the verdict comes out: yes, no or undecided, place by place, and why."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal

import numpy as np

from collapse_probe.results.findings import Findings
from collapse_probe.results.quantities import (
    Quantity,
    Reader,
    alike_queries,
    at_last_depth,
    best_order,
    beyond_untrained,
    cosine_at_last_depth,
    depths_less_twin,
    entropy_of_blocks,
    entropy_of_pairs,
    fact,
    heads_less_twin,
    kappa,
    last_less_twin,
    last_over_twin,
    matrices_over_twin,
    other_head,
    other_token,
    same_row,
    share_beyond,
    share_of_pairs,
    similarity,
)
from collapse_probe.results.readings import Absent, is_untrained, not_loaded
from collapse_probe.results.rules import FEWEST_IMAGES, RULES, Rule

READERS: Mapping[str, Reader] = {
    "shared": kappa,
    "shared-row": share_beyond("other_head"),
    "same-row": same_row,
    "other-order": best_order,
    "beyond-untrained": beyond_untrained,
    "columns-alike": other_token,
    "query-independent": alike_queries,
    "same-everywhere": other_head,
    "high-raw": similarity,
    "near-uniform": entropy_of_pairs,
    "mostly-query-independent": share_of_pairs("query-independent", "same-everywhere"),
    "mostly-explained": share_of_pairs("near-uniform", "explained"),
    "entropy-collapse": entropy_of_blocks,
    "parallel-patches": cosine_at_last_depth,
    "less-diverse-than-untrained": last_over_twin,
    "less-high-frequency-than-untrained": last_over_twin,
    "lower-rank-than-untrained": last_over_twin,
    "outlier-tokens": last_less_twin,
    "massive-activations": depths_less_twin,
    "heads-switched-off": heads_less_twin,
    "one-value-for-all": heads_less_twin,
    "weights-lost-rank": matrices_over_twin,
    "rows-more-alike": matrices_over_twin,
    "untrained": fact(is_untrained),
    "loaded-in-part": fact(lambda model: bool(not_loaded(model))),
    "mixed-maps": fact(lambda model: bool(model.get("mixes_maps"))),
}
"""How a rule reads its number, where that is not the metric's value at the last depth."""


Answer = Literal["yes", "no", "undecided", "not applicable"]
ORDER: tuple[Answer, ...] = ("yes", "undecided", "no")
"""A rule comes out as the first of these that any place says."""


@dataclass(frozen=True)
class Place:
    """A rule at one block, pair of blocks (the later one's number) or depth; at None where it is about the whole model."""

    at: int | None
    value: float
    ci: tuple[float, float] | None
    answer: Answer


@dataclass(frozen=True)
class Outcome:
    """How one rule came out. `value` and `ci` are those of the place that goes furthest among the places with this answer.

    yes: it holds with the whole interval at one place at least, and goes further than chance agreement.
    undecided: nowhere, but somewhere the interval holds the threshold, chance agreement reaches as far, or the
    images are too few (fewer than `FEWEST_IMAGES`, or for an interval). no: at every place the interval lies on the other side.
    `ci` is that of a single place; of pairs of blocks the intervals that cover all pairs together decide. not applicable: the
    number was not measured, is refused or undefined. `reason` says it in words; `axis` is pair, block, depth or
    model.
    """

    rule: Rule
    answer: Answer
    value: float | None
    ci: tuple[float, float] | None
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


def outcome(rule: Rule, findings: Findings) -> Outcome:
    """How one rule comes out."""
    try:
        quantity = READERS.get(rule.name, at_last_depth)(findings, rule.metric)
    except Absent as absent:
        return Outcome(rule, "not applicable", None, None, str(absent))
    images = findings.data.get("images") or 0
    few = images if rule.level in ("attention", "tokens") and images < FEWEST_IMAGES else None
    places = tuple(_place(rule, quantity, i, few is not None) for i in range(len(quantity.values)))
    answer = next((answer for answer in ORDER if any(place.answer == answer for place in places)), None)
    if answer is None:
        reason = f"{rule.quantity} is defined nowhere"
        return Outcome(rule, "not applicable", None, None, reason, quantity.axis, places)
    furthest = max if rule.direction == "above" else min
    shown = furthest((place for place in places if place.answer == answer), key=lambda place: place.value)
    return Outcome(rule, answer, shown.value, shown.ci, _reason(rule, answer, places, quantity, few), quantity.axis, places)


def _place(rule: Rule, quantity: Quantity, i: int, few: bool) -> Place:
    """The rule at place i; `few`: there are too few images to judge by."""
    at, value = quantity.places[i] if quantity.places else None, float(quantity.values[i])
    if not np.isfinite(value):
        return Place(at, value, None, "not applicable")
    ends, ci = [value, value], None
    if quantity.ci95 is not None:
        low, high = (float(end) for end in quantity.ci95[i])
        ci = (low, high) if np.isfinite([low, high]).all() else None
        ends = [low, high] if quantity.simultaneous is None else [float(end) for end in quantity.simultaneous[i]]
    if few or np.isnan(ends).any():
        return Place(at, value, ci, "undecided")
    held = [rule.holds(number) for number in (ends[0], value, ends[1])]
    if all(held) and quantity.chance is not None and ends[0] <= quantity.chance:
        return Place(at, value, ci, "undecided")
    return Place(at, value, ci, "yes" if all(held) else "undecided" if any(held) else "no")


def _reason(rule: Rule, answer: Answer, places: tuple[Place, ...], quantity: Quantity, few: int | None) -> str:
    here = [place for place in places if place.answer == answer]
    defined = sum(place.answer != "not applicable" for place in places)
    where = f"{len(here)} of {defined} {quantity.axis}s: " if defined > 1 else ""
    side, by_interval = f"{rule.direction} {rule.threshold:g}", quantity.ci95 is not None
    if answer == "yes":
        why = f"{side}{' with the whole interval' if by_interval else ''}"
    elif answer == "no":
        why = f"not {side}{' anywhere in the interval' if by_interval else ''}"
    elif few is not None:
        why = f"{few} images are too few to judge by, at least {FEWEST_IMAGES} are needed"
    elif quantity.chance is not None and quantity.chance > rule.threshold and any(rule.holds(place.value) for place in here):
        why = f"chance agreement of the parameters reaches {quantity.chance:.2f} in this model"
    elif any(place.ci for place in here):
        why = f"the interval includes {rule.threshold:g}"
    else:
        why = "no interval: more images are needed"
    return where + why + (f" ({quantity.note})" if quantity.note else "")
