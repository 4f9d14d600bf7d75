"""What each similarity would be with nothing to find, beside what it is."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from collapse_probe.metrics.pairwise_cosine import PairwiseCosine
from collapse_probe.results.findings import MetricResult, Nulls
from collapse_probe.statistics.intervals import Array, beyond, closed
from collapse_probe.statistics.kappa import kappa, kappa_interval
from collapse_probe.statistics.pair_tests import above_rounding

NO_TWIN = "no untrained copy was measured"
OF_MANY = "rank_over_images"
"""What details call the number of images on which a result depends: results of other numbers are not compared."""
ONE_IMAGE = "needs two different images"
NO_KAPPA_INTERVAL = "undefined: how kappa's chance level varies with the images was not kept"
OPEN_KAPPA = "with so few images the room that kappa's chance level leaves cannot be told from 0"
NO_PAIR_INTERVAL = "none: a mean over all pairs of images, of which the run keeps one sum and not how it varies with the images"
NO_NULL_INTERVAL = "none: how this chance level varies with the images was not kept"
BEYOND = ("other_token", "other_head", "other_key")
"""The nulls beyond which blocks can agree."""
SAMPLED = ("other_token", "other_image", "other_head", "other_key")
"""The nulls that are means over images or pairs of images."""


def between_blocks(cosines: PairwiseCosine, no_heads: str = "") -> dict[str, Any]:
    """values, stderr, ci95, details and nulls of a block × block similarity, as a MetricResult takes them.

    `no_heads` says why its vectors have no heads to confuse; empty where they have. `beyond_p` of the nulls is that of
    `beyond`: that the pair is more alike than the chance level; 1 where the difference is within rounding.
    """
    real, real_error, n = cosines.mean("real")
    token, moments = cosines.mean("other_token")[0], cosines.moments()
    values: dict[str, Array | None] = {
        "untrained": None,
        "other_token": token,
        "other_image": cosines.across_images()["real"],
        "other_head": None if no_heads else cosines.mean("other_head")[0],
        "kappa": kappa(real, token),
    }
    if cosines.by_rows_of_maps:
        values["other_key"] = cosines.mean("other_key")[0]
    intervals = {name: cosines.bounds(name) for name in BEYOND if values.get(name) is not None}
    reasons = {"other_head": no_heads} if no_heads else {}
    nulls = with_reasons(values, reasons, int(n.max(initial=0)), intervals, closed(kappa_interval(moments)))
    more, error, skewness = moments.along(-1.0, 1.0)
    return {
        "values": real,
        "stderr": real_error,
        "ci95": cosines.bounds("real"),
        "details": {"tokens_for_other_image": [len(sample) for sample in cosines.samples]},
        "nulls": replace(nulls, beyond_p=above_rounding(beyond(more, error, moments.images, skewness), real - token)),
    }


def with_reasons(
    values: Mapping[str, Array | None],
    reasons: Mapping[str, str],
    images: int,
    intervals: Mapping[str, Array] | None = None,
    kappa_ci95: Array | None = None,
) -> Nulls:
    """Nulls taken on so many images, with a reason for whatever is undefined everywhere and for every missing interval.

    `intervals` holds the 95 % intervals [..., 2] of nulls by name.
    """
    values, reasons = dict(values), dict(reasons)
    for name, value in values.items():
        if value is not None and not np.isfinite(value).any():
            values[name] = None
            reasons.setdefault(name, ONE_IMAGE if name == "other_image" else "undefined: there is nothing to compare with")
        if name == "kappa" and values[name] is None:
            reasons[name] = "undefined: the chance level is 1 itself, so that nothing is left to agree beyond it"
    if (corrected := values.get("kappa")) is not None:
        without = np.isfinite(corrected) & ~np.isfinite(kappa_ci95).all(-1) if kappa_ci95 is not None else None
        if without is None:
            reasons["kappa_ci95"] = NO_KAPPA_INTERVAL
        elif without.any():
            reasons["kappa_ci95"] = f"{without.sum()} of {np.isfinite(corrected).sum()} have none: {OPEN_KAPPA}"
    reasons.setdefault("untrained", NO_TWIN)
    ci95 = {name: bounds for name, bounds in (intervals or {}).items() if values.get(name) is not None}
    for name in SAMPLED:
        if values.get(name) is not None and name not in ci95:
            reasons[f"{name}_ci95"] = NO_PAIR_INTERVAL if name == "other_image" else NO_NULL_INTERVAL
    counts = {name: images for name, value in values.items() if value is not None}
    return Nulls(values=values, images=counts, reasons=reasons, kappa_ci95=kappa_ci95, ci95=ci95)


def untrained_only() -> Nulls:
    """For a metric that is no similarity: the untrained copy is all there is to compare with."""
    return Nulls(values={"untrained": None}, images={}, reasons={"untrained": NO_TWIN})


def with_twins(result: MetricResult, twins: Mapping[int, MetricResult], images: int, reason: str = "") -> MetricResult:
    """The result with the mean over its untrained copies by seed, or with the reason why there are none.

    `ci95["untrained"]` of the nulls is the twins' interval over their images. They saw the same images, so that the mean of
    their intervals is taken, which is never too narrow; it says nothing of seeds. With several twins `untrained_seeds` holds
    the `seeds`, the standard deviation `sd` (n − 1) and the range `low`, `high` over them, with the metric's dims. Seeds are
    few: look at the range before the deviation. `untrained_beyond` holds, for each null that the twins have themselves, the
    highest over the twins of their own (real − null)/(1 − null).
    """
    if result.nulls is None:
        return result
    nulls = result.nulls
    measured = [twin for twin in twins.values() if twin.values is not None]
    here, there = result.details.get(OF_MANY), [twin.details.get(OF_MANY) for twin in measured]
    if other := [count for count in there if count != here]:
        reason = (
            f"the untrained copy saw {other[0]} images, these are of {here}, and a rank over images grows with their number"
        )
        measured = []
    if not measured:
        values, reasons = {**nulls.values, "untrained": None}, {**nulls.reasons, "untrained": reason or NO_TWIN}
        return replace(result, nulls=replace(nulls, values=values, reasons=reasons))
    by_seed = np.stack([twin.values for twin in measured if twin.values is not None])
    bounds = [twin.ci95 for twin in measured if twin.ci95 is not None]
    ci95 = dict(nulls.ci95)
    if len(bounds) == len(measured):
        ci95["untrained"] = np.mean(bounds, axis=0)
    seeds = None
    if len(measured) > 1:
        seeds = {"seeds": list(twins), "sd": by_seed.std(0, ddof=1), "low": by_seed.min(0), "high": by_seed.max(0)}
    p = [twin.nulls.beyond_p for twin in measured if twin.nulls is not None and twin.nulls.beyond_p is not None]
    nulls = replace(
        nulls,
        values={**nulls.values, "untrained": by_seed.mean(0)},
        images={**nulls.images, "untrained": images},
        reasons={name: text for name, text in nulls.reasons.items() if name != "untrained"},
        ci95=ci95,
        untrained_seeds=seeds,
        untrained_beyond_p=np.stack(p) if len(p) == len(measured) else None,
        untrained_beyond=_beyond_of(measured),
    )
    return replace(result, nulls=nulls)


def _beyond_of(twins: Sequence[MetricResult]) -> dict[str, Array]:
    """For each null of the twins the highest (real − null)/(1 − null) over them, NaN where all are undefined."""
    highest = {}
    for name in BEYOND:
        each = [(twin.array, twin.nulls.values.get(name)) for twin in twins if twin.nulls is not None]
        shares = [kappa(real, null) for real, null in each if null is not None]
        if shares:
            highest[name] = np.fmax.reduce(shares)
    return highest
