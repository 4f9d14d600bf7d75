"""The number that each rule of the verdict is about, read off findings with its interval, place by place."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from collapse_probe.results.findings import Findings, MetricResult
from collapse_probe.results.readings import (
    Absent,
    adjacent,
    at_last,
    entropy_share,
    last_of_twin,
    null_interval,
    require_null,
    require_result,
)
from collapse_probe.results.rules import BY_NAME, RULES, Rule
from collapse_probe.statistics.intervals import Array, half_width, interval, mean_parts, parts_stderr, quotient_bounds

NO_INTERVAL_OF_NULL = "decided by its value: no interval is taken of this null"
ROW_ALONE = "the interval is that of the row similarity alone"
ONE_SET = "decided by its value: a model has one set of weights, which is no sample"
AS_STORED = "decided by its value: a fact of the run"


@dataclass(frozen=True)
class Quantity:
    """A rule's number at each place: `values` [places], NaN where undefined, and `low` and `high` of its 95 % interval.

    `places` are numbers of blocks or depths, as `axis` says; a pair of neighbouring blocks goes by the later one. Without
    `low` the number has no interval by its nature, and `note` says why; NaN there means that there are too few images.
    """

    values: Array
    places: tuple[int, ...]
    axis: str = "block"
    low: Array | None = None
    high: Array | None = None
    note: str = ""


def quantity(name: str, findings: Findings) -> Quantity | str:
    """The number that rule `name` is about, or why these findings do not hold it."""
    try:
        return READERS[name](findings, BY_NAME[name].metric)
    except Absent as absent:
        return str(absent)


def _pairs(values: Array, bounds: Array | None = None, note: str = "") -> Quantity:
    """Of each block with the block before, from what runs over pairs of blocks."""
    places = tuple(range(1, len(values) + 1))
    if bounds is None:
        return Quantity(values, places, "pair", note=note)
    return Quantity(values, places, "pair", bounds[..., 0], bounds[..., 1], note)


def _kappa(findings: Findings, metric: str) -> Quantity:
    reading, _ = require_result(findings, metric)
    found = adjacent(require_null(reading, metric, "kappa"))
    bounds = None if reading.nulls is None else reading.nulls.kappa_ci95
    none = "decided by its value: the findings hold no interval of kappa"
    return _pairs(found, None if bounds is None else _neighbours(bounds), "" if bounds is not None else none)


def _neighbours(bounds: Array) -> Array:
    return np.stack([adjacent(bounds[..., end]) for end in (0, 1)], axis=-1)


def _wrong_token(findings: Findings, metric: str) -> Quantity:
    reading, _ = require_result(findings, metric)
    found = adjacent(require_null(reading, metric, "other_token"))
    by_image = findings.images.get(f"{metric}/other_token")
    if by_image is None or by_image.shape[1:] != found.shape:
        return _of_null(reading, "other_token", found)
    _, parts, defined = mean_parts(by_image)
    return _pairs(found, interval(found, parts_stderr(parts, defined.sum(0)), defined.sum(0)))


def _of_null(reading: MetricResult, role: str, found: Array) -> Quantity:
    bounds = null_interval(reading, role)
    return _pairs(found, note=NO_INTERVAL_OF_NULL) if bounds is None else _pairs(found, _neighbours(bounds))


def _wrong_head(findings: Findings, metric: str) -> Quantity:
    reading, _ = require_result(findings, metric)
    return _of_null(reading, "other_head", adjacent(require_null(reading, metric, "other_head")))


def _beyond_heads(findings: Findings, metric: str) -> Quantity:
    reading, values = require_result(findings, metric)
    row, head = adjacent(values), adjacent(require_null(reading, metric, "other_head"))
    independent = query_independent(pairs_of(findings))
    if not independent.any():
        raise Absent("no neighbouring blocks have maps that are query-independent, not near-uniform, and tell heads apart")
    room = np.where(independent & (head < 1), 1 - head, np.nan)
    beyond = (row - head) / room
    if reading.ci95 is None:
        return _pairs(beyond, None, ROW_ALONE)
    of_head = null_interval(reading, "other_head")
    head_reach = np.zeros_like(head) if of_head is None else half_width(_neighbours(of_head))
    reach = np.hypot(half_width(_neighbours(reading.ci95)), (1 - beyond) * head_reach) / room
    return _pairs(beyond, np.stack([beyond - reach, beyond + reach], axis=-1), ROW_ALONE if of_head is None else "")


def _raw(findings: Findings, metric: str) -> Quantity:
    reading, values = require_result(findings, metric)
    return _pairs(adjacent(values), None if reading.ci95 is None else _neighbours(reading.ci95))


def _share(findings: Findings, metric: str) -> Quantity:
    require_result(findings, metric)
    share = entropy_share(findings)
    assert share is not None
    places = tuple(range(len(share.mean)))
    if share.ci95 is None:
        return Quantity(share.mean, places, note="decided by its value: the findings hold no interval over heads")
    return Quantity(share.mean, places, low=share.ci95[:, 0], high=share.ci95[:, 1])


def _share_of_pairs(findings: Findings, metric: str) -> Quantity:
    of = _share(findings, metric)
    ends = None if of.low is None or of.high is None else np.stack([_paired(of.low), _paired(of.high)], axis=-1)
    return _pairs(_paired(of.values), ends, of.note)


def _paired(values: Array) -> Array:
    return (values[1:] + values[:-1]) / 2


def _share_of_kinds(*wanted: str) -> Callable[[Findings, str], Quantity]:
    def read(findings: Findings, metric: str) -> Quantity:
        require_result(findings, metric)
        kinds = [kind for kind in kinds_of(pairs_of(findings)) if kind != "undefined"]
        share = sum(kind in wanted for kind in kinds) / len(kinds) if kinds else np.nan
        return Quantity(np.array([share]), (), "model", note="decided by the values of the pairs")

    return read


def _depth(at: int, values: Array, bounds: Array, note: str = "") -> Quantity:
    return Quantity(values, (at,), "depth", bounds[:, 0], bounds[:, 1], note)


def _last(findings: Findings, metric: str) -> Quantity:
    return _depth(*at_last(findings, metric))


def _last_cosine(findings: Findings, metric: str) -> Quantity:
    at, values, bounds = at_last(findings, metric)
    return _depth(at, 1 - values, 1 - bounds[:, ::-1])


def _last_over_twin(findings: Findings, metric: str) -> Quantity:
    at, values, bounds = at_last(findings, metric)
    fresh, reach, note = last_of_twin(findings, metric)
    fresh = np.where(fresh > 0, fresh, np.nan)
    return _depth(at, values / fresh, quotient_bounds(values, half_width(bounds), fresh, reach), note)


def _last_less_twin(findings: Findings, metric: str) -> Quantity:
    at, values, bounds = at_last(findings, metric)
    fresh, fresh_reach, note = last_of_twin(findings, metric)
    more, reach = values - fresh, np.hypot(half_width(bounds), fresh_reach)
    return _depth(at, more, np.stack([more - reach, more + reach], axis=-1), note)


def _over_twin(findings: Findings, metric: str) -> Quantity:
    reading, values = require_result(findings, metric)
    fresh = require_null(reading, metric, "untrained")
    both = np.isfinite(values) & np.isfinite(fresh) & (fresh > 0)
    count = both.sum(1)
    ratios = np.where(both, values / np.where(both, fresh, 1.0), 0.0).sum(1) / np.maximum(count, 1)
    return Quantity(np.where(count > 0, ratios, np.nan), tuple(range(len(values))), note=ONE_SET)


def _fact(holds: bool) -> Quantity:
    return Quantity(np.array([float(holds)]), (), "model", note=AS_STORED)


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
    raw = _raw(findings, "attention-similarity").values

    def values(read: Callable[[Findings, str], Quantity], metric: str) -> Array:
        try:
            found = read(findings, metric).values
        except Absent:
            return np.full(len(raw), np.nan)
        return found if found.shape == raw.shape else np.full(len(raw), np.nan)

    return Pairs(
        raw=raw,
        null=values(_wrong_token, "attention-similarity"),
        kappa=values(_kappa, "attention-similarity"),
        row=values(_raw, "attention-similarity@row"),
        row_head=values(_wrong_head, "attention-similarity@row"),
        share=values(_share_of_pairs, "attention-entropy"),
    )


def query_independent(pairs: Pairs) -> NDArray[np.bool_]:
    """Which pairs have maps that ignore the query and tell heads apart: there rows say what columns cannot."""
    found = [classify(pairs, i) in ("shared-row", "query-independent") for i in range(len(pairs.raw))]
    return np.array(found, dtype=np.bool_)


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


READERS: Mapping[str, Callable[[Findings, str], Quantity]] = {
    "shared": _kappa,
    "query-independent": _wrong_token,
    "same-everywhere": _wrong_head,
    "shared-row": _beyond_heads,
    "high-raw": _raw,
    "near-uniform": _share_of_pairs,
    "mostly-query-independent": _share_of_kinds("query-independent", "same-everywhere"),
    "mostly-explained": _share_of_kinds("near-uniform", "explained"),
    "entropy-collapse": _share,
    "parallel-patches": _last_cosine,
    "less-diverse-than-untrained": _last_over_twin,
    "constant-tokens": _last,
    "constant-tokens-composite": _last,
    "less-high-frequency-than-untrained": _last_over_twin,
    "lower-rank-than-untrained": _last_over_twin,
    "outlier-tokens": _last_less_twin,
    "norm-above-150": _last,
    "weights-lost-rank": _over_twin,
    "rows-more-alike": _over_twin,
    "untrained": lambda findings, _: _fact(str(findings.model.get("weights", "")).startswith("random")),
    "mixed-maps": lambda findings, _: _fact(bool(findings.model.get("mixes_maps"))),
}


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
