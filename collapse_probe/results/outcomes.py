"""How each rule of the verdict comes out: its number read off findings with its interval, place by place, and the answer."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

import numpy as np

from collapse_probe.results.findings import Findings, MetricResult
from collapse_probe.results.readings import (
    Absent,
    adjacent,
    entropy_share,
    is_untrained,
    not_loaded,
    null_ci95,
    of_neighbours,
    require_null,
    require_result,
)
from collapse_probe.results.rules import BY_NAME, RULES, Rule
from collapse_probe.statistics.intervals import Array, half_width, interval, mean_parts, parts_stderr, quotient_bounds

NO_INTERVAL_OF_NULL = "decided by its value: no interval is taken of this null"
ROW_ALONE = "the interval is that of the row similarity alone"
ONE_SET = "decided by its value: a model has one set of weights, which is no sample"
TWIN_EXACT = "the twin's own sampling error is not counted"


@dataclass(frozen=True)
class Quantity:
    """A rule's number at each place: `values` [places], NaN where undefined, and its 95 % interval `ci95` [places, 2].

    `places` are numbers of blocks or depths, as `axis` says; a pair of neighbouring blocks goes by the later one. Without
    `ci95` the number has no interval by its nature, and `note` says why; NaN there means that there are too few images.
    """

    values: Array
    places: tuple[int, ...]
    axis: str = "block"
    ci95: Array | None = None
    note: str = ""

    @property
    def reach(self) -> Array:
        """Half the length of each interval, [places]; 0 where none is taken."""
        return np.zeros_like(self.values) if self.ci95 is None else half_width(self.ci95)


Reader = Callable[[Findings, str], Quantity]
"""Reads a rule's number off findings, from the metric of that name; raises Absent."""


def _of_pairs(values: Array, ci95: Array | None, note: str = "") -> Quantity:
    return Quantity(values, tuple(range(1, len(values) + 1)), "pair", ci95, note)


def _adjacent_ci95(result: MetricResult, ci95: Array | None) -> Array | None:
    return None if ci95 is None else adjacent(result, ci95)


def similarity(findings: Findings, metric: str) -> Quantity:
    """The similarity of each block with the block before, where that is its neighbour in depth."""
    result = require_result(findings, metric)
    return _of_pairs(adjacent(result, result.array), _adjacent_ci95(result, result.ci95))


def of_null(role: str, note: str = NO_INTERVAL_OF_NULL) -> Reader:
    """Reads a null of each block with the block before, or its kappa; `note` says what it means that there is no interval."""

    def read(findings: Findings, metric: str) -> Quantity:
        result = require_result(findings, metric)
        values = adjacent(result, require_null(result, metric, role))
        ci95 = _adjacent_ci95(result, null_ci95(result, role))
        return _of_pairs(values, ci95, note if ci95 is None else "")

    return read


kappa = of_null("kappa", "decided by its value: the findings hold no interval of kappa")
other_head = of_null("other_head")


def other_token(findings: Findings, metric: str) -> Quantity:
    """What different tokens of two neighbouring blocks agree on; its interval from the single images, where they are kept."""
    found, by_image = of_null("other_token")(findings, metric), findings.images.get(f"{metric}/other_token")
    if by_image is None or by_image.shape[1:] != found.values.shape:
        return found
    _, parts, defined = mean_parts(by_image)
    count = defined.sum(0)
    return _of_pairs(found.values, interval(found.values, parts_stderr(parts, count), count))


def rows_beyond_heads(findings: Findings, metric: str) -> Quantity:
    """(row similarity − wrong-head null) / (1 − wrong-head null), in pairs of blocks whose maps ignore the query."""
    rows, heads = similarity(findings, metric), other_head(findings, metric)
    ignoring = np.array([kind in ("shared-row", "query-independent") for kind in kinds_of(pairs_of(findings))], dtype=np.bool_)
    if not ignoring.any():
        raise Absent("no neighbouring blocks have maps that are query-independent, not near-uniform, and tell heads apart")
    room = np.where(ignoring & (heads.values < 1), 1 - heads.values, np.nan)
    beyond = (rows.values - heads.values) / room
    if rows.ci95 is None:
        return _of_pairs(beyond, None, ROW_ALONE)
    reach = np.hypot(rows.reach, (1 - beyond) * heads.reach) / room
    return _of_pairs(beyond, np.stack([beyond - reach, beyond + reach], axis=-1), ROW_ALONE if heads.ci95 is None else "")


def entropy_of_blocks(findings: Findings, metric: str) -> Quantity:
    """Attention entropy over log N, mean over the heads of each block."""
    require_result(findings, metric)
    share = entropy_share(findings)
    assert share is not None
    note = "decided by its value: the findings hold no interval over heads" if share.ci95 is None else ""
    return Quantity(share.mean, tuple(range(len(share.mean))), ci95=share.ci95, note=note)


def entropy_of_pairs(findings: Findings, metric: str) -> Quantity:
    """The same, mean over each block and the block before, where that is its neighbour in depth."""
    blocks, result = entropy_of_blocks(findings, metric), require_result(findings, metric)
    parts = (None if part is None else (part[1:] + part[:-1]) / 2 for part in (blocks.values, blocks.ci95))
    values, ci95 = (None if part is None else of_neighbours(result, part) for part in parts)
    assert values is not None
    return _of_pairs(values, ci95, blocks.note)


def share_of_pairs(*kinds: str) -> Reader:
    """The share of the neighbouring pairs that are of one of `kinds`."""

    def read(findings: Findings, metric: str) -> Quantity:
        require_result(findings, metric)
        share = share_of_kinds(kinds_of(pairs_of(findings)), *kinds)
        return Quantity(np.array([share]), (), "model", note="decided by the values of the pairs")

    return read


def share_of_kinds(found: tuple[str, ...], *kinds: str) -> float:
    """How many of the defined pairs are of one of `kinds`; NaN where none is defined."""
    defined = [kind for kind in found if kind != "undefined"]
    return sum(kind in kinds for kind in defined) / len(defined) if defined else np.nan


def at_last_depth(findings: Findings, metric: str) -> Quantity:
    """The number after the last block."""
    result = require_result(findings, metric)
    ci95 = np.full((len(result.array), 2), np.nan) if result.ci95 is None else result.ci95
    return Quantity(result.array[-1:], (len(result.array) - 1,), "depth", ci95[-1:])


def cosine_at_last_depth(findings: Findings, metric: str) -> Quantity:
    """One minus the number after the last block."""
    last = at_last_depth(findings, metric)
    assert last.ci95 is not None
    return Quantity(1 - last.values, last.places, "depth", 1 - last.ci95[:, ::-1])


def last_over_twin(findings: Findings, metric: str) -> Quantity:
    """The number after the last block over that of the untrained twin."""
    last, twin = at_last_depth(findings, metric), _last_of_twin(findings, metric)
    fresh = np.where(twin.values > 0, twin.values, np.nan)
    ci95 = quotient_bounds(last.values, last.reach, fresh, twin.reach)
    return replace(last, values=last.values / fresh, ci95=ci95, note=twin.note)


def last_less_twin(findings: Findings, metric: str) -> Quantity:
    """The number after the last block less that of the untrained twin."""
    last, twin = at_last_depth(findings, metric), _last_of_twin(findings, metric)
    more, reach = last.values - twin.values, np.hypot(last.reach, twin.reach)
    return replace(last, values=more, ci95=np.stack([more - reach, more + reach], axis=-1), note=twin.note)


def _last_of_twin(findings: Findings, metric: str) -> Quantity:
    result = require_result(findings, metric)
    fresh, ci95 = require_null(result, metric, "untrained")[-1:], null_ci95(result, "untrained")
    return Quantity(fresh, (), "depth", None if ci95 is None else ci95[-1:], TWIN_EXACT if ci95 is None else "")


def matrices_over_twin(findings: Findings, metric: str) -> Quantity:
    """Each matrix's number over that of the untrained twin, mean over the matrices of a block."""
    result = require_result(findings, metric)
    fresh = require_null(result, metric, "untrained")
    both = np.isfinite(result.array) & np.isfinite(fresh) & (fresh > 0)
    count = both.sum(1)
    ratios = np.where(both, result.array / np.where(both, fresh, 1.0), 0.0).sum(1) / np.maximum(count, 1)
    return Quantity(np.where(count > 0, ratios, np.nan), tuple(range(len(ratios))), note=ONE_SET)


def fact(holds: Callable[[Mapping[str, Any]], bool]) -> Reader:
    """1 where what `holds` says of the model is so, else 0."""
    note = "decided by its value: a fact of the run"
    return lambda findings, _: Quantity(np.array([float(holds(findings.model))]), (), "model", note=note)


@dataclass(frozen=True)
class Pairs:
    """The numbers of each neighbouring pair of blocks that its kind depends on; NaN where undefined or not measured."""

    raw: Array
    null: Array
    kappa: Array
    row: Array
    row_head: Array
    share: Array


def pairs_of(findings: Findings) -> Pairs:
    """The numbers of the neighbouring pairs; `attention-similarity` must have values."""
    raw = similarity(findings, "attention-similarity").values

    def values(read: Reader, metric: str) -> Array:
        try:
            found = read(findings, metric).values
        except Absent:
            return np.full(len(raw), np.nan)
        return found if found.shape == raw.shape else np.full(len(raw), np.nan)

    return Pairs(
        raw=raw,
        null=values(other_token, "attention-similarity"),
        kappa=values(kappa, "attention-similarity"),
        row=values(similarity, "attention-similarity@row"),
        row_head=values(other_head, "attention-similarity@row"),
        share=values(entropy_of_pairs, "attention-entropy"),
    )


def kinds_of(pairs: Pairs) -> tuple[str, ...]:
    """The kind of each neighbouring pair; see `classify`."""
    return tuple(classify(pairs, i) for i in range(len(pairs.raw)))


def classify(pairs: Pairs, i: int) -> str:
    """The rule that the pair of block i + 1 with block i falls under, by its values: the first that holds."""

    def holds(name: str, values: Array) -> bool:
        return BY_NAME[name].holds(float(values[i]))

    if not np.isfinite(pairs.raw[i]):
        return "undefined"
    if holds("shared", pairs.kappa):
        return "shared"
    uniform = holds("near-uniform", pairs.share)
    if holds("query-independent", pairs.null) and not uniform:
        if holds("same-everywhere", pairs.row_head):
            return "same-everywhere"
        with np.errstate(divide="ignore", invalid="ignore"):
            beyond = (pairs.row - pairs.row_head) / (1 - pairs.row_head)
        return "shared-row" if holds("shared-row", beyond) else "query-independent"
    if holds("high-raw", pairs.raw):
        return "near-uniform" if uniform else "explained"
    return "distinct"


READERS: Mapping[str, Reader] = {
    "shared": kappa,
    "query-independent": other_token,
    "same-everywhere": other_head,
    "shared-row": rows_beyond_heads,
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

    yes: it holds with the whole interval at one place at least. undecided: nowhere, but somewhere the interval holds the
    threshold, or there are too few images for an interval. no: at every place the interval lies on the other side. Intervals
    are those of single places, not corrected for their number. not applicable: the number was not measured, is refused or
    undefined. `reason` says it in words; `axis` is pair, block, depth or model.
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
    alone = rule.level in ("attention", "tokens") and (findings.data.get("images") or 0) < 2
    places = tuple(_place(rule, quantity, i, alone) for i in range(len(quantity.values)))
    answer = next((answer for answer in ORDER if any(place.answer == answer for place in places)), None)
    if answer is None:
        reason = f"{rule.quantity} is defined nowhere"
        return Outcome(rule, "not applicable", None, None, reason, quantity.axis, places)
    furthest = max if rule.direction == "above" else min
    shown = furthest((place for place in places if place.answer == answer), key=lambda place: place.value)
    return Outcome(rule, answer, shown.value, shown.ci, _reason(rule, answer, places, quantity), quantity.axis, places)


def _place(rule: Rule, quantity: Quantity, i: int, alone: bool) -> Place:
    """The rule at place i; `alone`: there is one image, from which nothing can be told."""
    at, value = quantity.places[i] if quantity.places else None, float(quantity.values[i])
    if not np.isfinite(value):
        return Place(at, value, None, "not applicable")
    if quantity.ci95 is None:
        return Place(at, value, None, "undecided" if alone else "yes" if rule.holds(value) else "no")
    low, high = (float(end) for end in quantity.ci95[i])
    if not (np.isfinite(low) and np.isfinite(high)):
        return Place(at, value, None, "undecided")
    held = [rule.holds(number) for number in (low, value, high)]
    return Place(at, value, (low, high), "yes" if all(held) else "undecided" if any(held) else "no")


def _reason(rule: Rule, answer: Answer, places: tuple[Place, ...], quantity: Quantity) -> str:
    here = [place for place in places if place.answer == answer]
    defined = sum(place.answer != "not applicable" for place in places)
    where = f"{len(here)} of {defined} {quantity.axis}s: " if defined > 1 else ""
    side, by_interval = f"{rule.direction} {rule.threshold:g}", quantity.ci95 is not None
    if answer == "yes":
        why = f"{side}{' with the whole interval' if by_interval else ''}"
    elif answer == "no":
        why = f"not {side}{' anywhere in the interval' if by_interval else ''}"
    elif any(place.ci for place in here):
        why = f"the interval includes {rule.threshold:g}"
    else:
        why = "no interval: more images are needed"
    return where + why + (f" ({quantity.note})" if quantity.note else "")
