"""The number of each rule of the verdict, read off findings place by place, with its interval and how far chance reaches."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from collapse_probe.results.findings import Findings, MetricResult
from collapse_probe.results.readings import (
    Absent,
    adjacent,
    entropy_share,
    null_ci95,
    of_neighbours,
    over_heads,
    require_null,
    require_result,
)
from collapse_probe.results.rules import BEYOND_WEIGHTS, BY_NAME
from collapse_probe.statistics.intervals import Array, half_width, quotient_bounds
from collapse_probe.statistics.kappa import PairMoments, kappa_interval
from collapse_probe.statistics.kappa import kappa as beyond

NO_INTERVAL_OF_NULL = "decided by its value: no interval is taken of this null"
ONE_SIDE = "the interval is that of the similarity alone"
TAIL = 0.025
"""What an interval may miss at each end; over all pairs of blocks together, where a rule is about pairs."""
LOWEST = 0.99
ONE_SET = "decided by its value: a model has one set of parameters, which is no sample"
TWIN_EXACT = "the copy's own sampling error is not counted"


@dataclass(frozen=True)
class Quantity:
    """A rule's number at each place: `values` [places], NaN where undefined, and its 95 % interval `ci95` [places, 2].

    `places` are numbers of blocks or depths, as `axis` says; a pair of neighbouring blocks goes by the later one. Without
    `ci95` the number has no interval by its nature, and `note` says why; NaN there means that there are too few images.
    `simultaneous` [places, 2] covers all places together, and decides where it is given; `chance` is what a number must also
    exceed to be told from chance agreement of the parameters.
    """

    values: Array
    places: tuple[int, ...]
    axis: str = "block"
    ci95: Array | None = None
    note: str = ""
    simultaneous: Array | None = None
    chance: float | None = None

    def only(self, places: NDArray[np.bool_]) -> Quantity:
        """The same, undefined at all other places."""
        return replace(self, values=np.where(places, self.values, np.nan))

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


other_head = of_null("other_head")
other_token = of_null("other_token")


def share_beyond(role: str) -> Reader:
    """Reads (real − null)/(1 − null) of each block with the block before, for one of its nulls.

    The interval is that of the single images where they are kept; `chance` is `chance_of_weights` over all pairs of blocks.
    """

    def read(findings: Findings, metric: str) -> Quantity:
        result = require_result(findings, metric)
        real, null = similarity(findings, metric), of_null(role)(findings, metric)
        values = beyond(real.values, null.values)
        if not np.isfinite(values).any():
            raise Absent(f"the {role.replace('_', '-')} null of {metric} is 1 itself: nothing is left to agree beyond it")
        chance = chance_of_weights(beyond(result.array, require_null(result, metric, role)))
        kept = [findings.images.get(key) for key in (metric, f"{metric}/{role}")]
        images = [each for each in kept if each is not None and each.shape[1:] == values.shape]
        if len(images) == len(kept):
            moments, pairs = PairMoments.of(*images), max(int(np.isfinite(values).sum()), 1)
            single, together = (kappa_interval(moments, TAIL / n) for n in (1, pairs))
            return replace(_of_pairs(values, single), simultaneous=together, chance=chance)
        with np.errstate(divide="ignore", invalid="ignore"):
            reach = np.hypot(real.reach, (1 - values) * null.reach) / (1 - null.values)
        note = "" if null.ci95 is not None else ONE_SIDE
        around = None if real.ci95 is None else np.stack([values - reach, values + reach], axis=-1)
        return replace(_of_pairs(values, around, note), chance=chance)

    return read


def kappa(findings: Findings, metric: str) -> Quantity:
    """Kappa of each block with the block before."""
    stored = of_null("kappa", "decided by its value: the findings hold no interval of kappa")(findings, metric)
    try:
        shares = share_beyond("other_token")(findings, metric)
    except Absent:
        return stored
    return replace(stored, simultaneous=shares.simultaneous, chance=shares.chance)


def same_row(findings: Findings, metric: str) -> Quantity:
    """(row similarity − level of other keys) / (1 − that level), in pairs of blocks where neither queries nor heads differ."""
    shares = share_beyond("other_key")(findings, metric)
    untold = np.isfinite(pairs_of(findings).beyond_keys)
    if not untold.any():
        raise Absent("in all neighbouring pairs of blocks the rows of different queries, or those of different heads, differ")
    return shares.only(untold)


def best_order(findings: Findings, metric: str) -> Quantity:
    """The share of each block with the block before under the order of heads that makes them most alike, if it is another."""
    result = require_result(findings, metric)
    if "head_order_share" not in result.details:
        raise Absent("heads have no other order, or were not compared one by one")
    values = of_neighbours(result, np.array(result.details["head_order_share"], dtype=np.float64))
    return _of_pairs(values, None, "decided by its value: no interval is taken of a best order")


def beyond_untrained(findings: Findings, metric: str) -> Quantity:
    """(share − twins' share)/(1 − twins' share), of pairs of blocks that share their attention; the twins' is at least 0."""
    pairs = pairs_of(findings)
    kinds, values = kinds_of(pairs), np.full(len(pairs.raw), np.nan)
    absent = "no neighbouring blocks share their attention"
    for kind, (name, role) in SHARED_BY.items():
        at = np.array([each == kind for each in kinds])
        if not at.any():
            continue
        result = require_result(findings, name)
        twins = {} if result.nulls is None else result.nulls.untrained_beyond
        if role not in twins:
            absent = "no untrained copy was measured"
            continue
        highest = np.maximum(np.nan_to_num(adjacent(result, twins[role])), 0.0)
        with np.errstate(divide="ignore", invalid="ignore"):
            values[at] = ((pairs.share_of(kind) - highest) / (1 - highest))[at]
    if not np.isfinite(values).any():
        raise Absent(absent)
    return _of_pairs(values, None, "decided by its value: the copies' own sampling error is not counted")


def chance_of_weights(shares: Array) -> float:
    """How far chance agreement reaches in a model, from the shares of all pairs of its blocks, [L, L] -> 0 … 1.

    Blocks whose weights have nothing to do with one another agree by chance, and as often below as above what their tokens
    explain: so the negative shares measure chance by themselves, whatever the others are. The reach is `BEYOND_WEIGHTS` times
    their root mean square, on the scale of Fisher's z = artanh; 0 where no share is negative.
    """
    below = np.tril(shares, -1)
    below = below[below < 0]
    z = np.arctanh(np.maximum(below, -LOWEST))
    return float(np.tanh(BEYOND_WEIGHTS * np.sqrt(np.square(z).mean()))) if len(z) else 0.0


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
    """The number after the last block over that of the untrained copy."""
    last, twin = at_last_depth(findings, metric), _last_of_twin(findings, metric)
    fresh = np.where(twin.values > 0, twin.values, np.nan)
    ci95 = quotient_bounds(last.values, last.reach, fresh, twin.reach)
    return replace(last, values=last.values / fresh, ci95=ci95, note=twin.note)


def last_less_twin(findings: Findings, metric: str) -> Quantity:
    """The number after the last block less that of the untrained copy."""
    last, twin = at_last_depth(findings, metric), _last_of_twin(findings, metric)
    more, reach = last.values - twin.values, np.hypot(last.reach, twin.reach)
    return replace(last, values=more, ci95=np.stack([more - reach, more + reach], axis=-1), note=twin.note)


def _last_of_twin(findings: Findings, metric: str) -> Quantity:
    result = require_result(findings, metric)
    fresh, ci95 = require_null(result, metric, "untrained")[-1:], null_ci95(result, "untrained")
    return Quantity(fresh, (), "depth", None if ci95 is None else ci95[-1:], TWIN_EXACT if ci95 is None else "")


def depths_less_twin(findings: Findings, metric: str) -> Quantity:
    """The number at every depth less that of the untrained copy."""
    result = require_result(findings, metric)
    fresh = require_null(result, metric, "untrained")
    ci95 = None if result.ci95 is None else result.ci95 - fresh[:, None]
    return Quantity(result.array - fresh, tuple(range(len(fresh))), "depth", ci95, TWIN_EXACT)


def heads_less_twin(findings: Findings, metric: str) -> Quantity:
    """The mean over a block's heads less that of the untrained copy."""
    result = require_result(findings, metric)
    fresh = over_heads(require_null(result, metric, "untrained"))
    if result.head_mean is None:
        return Quantity(over_heads(result.array) - fresh, tuple(range(len(fresh))), note=TWIN_EXACT)
    mean, _, ci95 = result.head_mean
    return Quantity(mean - fresh, tuple(range(len(fresh))), ci95=ci95 - fresh[:, None], note=TWIN_EXACT)


def matrices_over_twin(findings: Findings, metric: str) -> Quantity:
    """Each matrix's number over that of the untrained copy, mean over the matrices of a block."""
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
    """The numbers of each neighbouring pair of blocks that its kind depends on; NaN where undefined or not measured.

    Of columns: `raw`, the chance level `null` and `kappa`. Of rows: `row`, what it is between other heads and other keys, and
    `queries`, the cosine between the rows of different queries of a block (the lower of the two blocks'). `share` is the
    entropy over log N, `order` the share under another order of the heads.
    """

    raw: Array
    null: Array
    kappa: Array
    row: Array
    row_head: Array
    share: Array
    row_key: Array
    queries: Array
    order: Array

    @property
    def beyond_heads(self) -> Array:
        """(row − other heads)/(1 − other heads)."""
        return beyond(self.row, self.row_head)

    @property
    def beyond_keys(self) -> Array:
        """(row − other keys)/(1 − other keys), NaN where queries or heads differ enough to tell."""
        heads_tell = self.row_head <= BY_NAME["same-everywhere"].threshold
        ignoring = self.queries > BY_NAME["query-independent"].threshold
        return np.where(ignoring & ~heads_tell, beyond(self.row, self.row_key), np.nan)

    def share_of(self, kind: str) -> Array:
        """The number by which pairs of one of the kinds in SHARED_BY share their attention."""
        by_kind = zip(SHARED_BY, (self.kappa, self.beyond_heads, self.beyond_keys, self.order), strict=True)
        return dict(by_kind)[kind]


SHARED_BY = {
    "shared": ("attention-similarity", "other_token"),
    "shared-row": ("attention-similarity@row", "other_head"),
    "same-row": ("attention-similarity@row", "other_key"),
    "other-order": ("attention-similarity@row", "other_head"),
}
"""The kinds of pairs that share their attention, in the order in which they are asked: the metric and the null beyond which."""


def pairs_of(findings: Findings) -> Pairs:
    """The numbers of the neighbouring pairs; `attention-similarity` must have values."""
    raw = similarity(findings, "attention-similarity").values

    def values(read: Reader, metric: str) -> Array:
        try:
            found = read(findings, metric).values
        except Absent:
            return np.full(len(raw), np.nan)
        return found if found.shape == raw.shape else np.full(len(raw), np.nan)

    rows = "attention-similarity@row"
    return Pairs(
        raw=raw,
        null=values(other_token, "attention-similarity"),
        kappa=values(of_null("kappa"), "attention-similarity"),
        row=values(similarity, rows),
        row_head=values(other_head, rows),
        share=values(entropy_of_pairs, "attention-entropy"),
        row_key=values(of_null("other_key"), rows),
        queries=values(alike_queries, rows),
        order=values(best_order, rows),
    )


def alike_queries(findings: Findings, metric: str) -> Quantity:
    """The cosine between the rows of different queries of a block; of each block and the block before the lower."""
    result = require_result(findings, metric)
    within = np.diagonal(require_null(result, metric, "other_token"))
    bounds = null_ci95(result, "other_token")
    values, lower = np.minimum(within[1:], within[:-1]), (within[1:] < within[:-1])
    ci95 = None
    if bounds is not None:
        ends = np.moveaxis(np.diagonal(bounds, axis1=0, axis2=1), 0, -1)
        ci95 = of_neighbours(result, np.where(lower[:, None], ends[1:], ends[:-1]))
    return _of_pairs(of_neighbours(result, values), ci95, NO_INTERVAL_OF_NULL if ci95 is None else "")


def kinds_of(pairs: Pairs) -> tuple[str, ...]:
    """The kind of each neighbouring pair; see `classify`."""
    return tuple(classify(pairs, i) for i in range(len(pairs.raw)))


def classify(pairs: Pairs, i: int) -> str:
    """The rule that the pair of block i + 1 with block i falls under, by its values: the first that holds.

    First whether the two share their attention, by any of the nulls; then what explains a high similarity that they do not
    share. Where columns are alike whichever tokens are compared, rows alone can tell: it stays untold where they were not
    measured, and where they agree but there is only one head to compare.
    """

    def holds(name: str, values: Array) -> bool:
        return BY_NAME[name].holds(float(values[i]))

    if not np.isfinite(pairs.raw[i]):
        return "undefined"
    for kind in SHARED_BY:
        if holds(kind, pairs.share_of(kind)):
            return kind
    if not np.isfinite(pairs.row[i]) and holds("columns-alike", pairs.null):
        return "untold"
    if not np.isfinite(pairs.row_head[i]) and holds("same-row", beyond(pairs.row, pairs.row_key)):
        return "untold"
    uniform = holds("near-uniform", pairs.share)
    if holds("query-independent", pairs.queries) and not uniform:
        return "same-everywhere" if holds("same-everywhere", pairs.row_head) else "query-independent"
    if holds("high-raw", pairs.raw):
        return "near-uniform" if uniform else "explained"
    return "distinct"
