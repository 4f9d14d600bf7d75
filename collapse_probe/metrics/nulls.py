"""What each similarity would be with nothing to find, beside what it is."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import numpy as np

from collapse_probe.metrics.pairwise_cosine import PairwiseCosine
from collapse_probe.results.findings import MetricResult, Nulls
from collapse_probe.statistics.intervals import Array, beyond, interval, kappa, kappa_stderr

NO_TWIN = "no untrained twin was measured"
ONE_IMAGE = "needs two different images"
NO_KAPPA_INTERVAL = "undefined: how kappa's null varies with the images was not kept"
NO_PAIR_INTERVAL = "none: a mean over all pairs of images, of which the run keeps one sum and not how it varies with the images"
NO_NULL_INTERVAL = "none: how this null varies with the images was not kept"
SAMPLED = ("other_token", "other_image", "other_head")
"""The nulls that are means over images or pairs of images."""


def between_blocks(fold: PairwiseCosine, heads: bool) -> Nulls:
    """The nulls of a block × block similarity; `heads` says whether its vectors have heads to confuse.

    `spread` holds `other_token_ci95` and, where there are heads, `other_head_ci95` [blocks, blocks, 2], and `beyond_p`
    [blocks, blocks], the one-sided p of a paired t test over images that the pair is more alike than with the wrong tokens.
    """
    real, real_error, n = fold.mean("real")
    token, token_error, _ = fold.mean("other_token")
    head, head_error, with_head = fold.mean("other_head")
    corrected = kappa(real, token)
    with np.errstate(divide="ignore", invalid="ignore"):
        covariance = (fold.cross_moment() - real * token) / (n - 1)
    error = kappa_stderr((real, real_error), (token, token_error), covariance)
    values: dict[str, Array | None] = {
        "untrained": None,
        "other_token": token,
        "other_image": fold.across_images()["real"],
        "other_head": head if heads else None,
        "kappa": corrected,
    }
    reasons = {} if heads else {"other_head": "patch embeddings have no heads"}
    intervals = {"other_token": interval(token, token_error, n)}
    if heads:
        intervals["other_head"] = interval(head, head_error, with_head)
    found = finished(values, reasons, int(n.max(initial=0)), interval(corrected, error, n), intervals)
    spread = np.sqrt(np.maximum(real_error**2 + token_error**2 - 2 * covariance, 0.0))
    return replace(found, spread={**found.spread, "beyond_p": beyond(real - token, spread, n)})


def finished(
    values: Mapping[str, Array | None],
    reasons: Mapping[str, str],
    images: int,
    kappa_ci95: Array | None,
    intervals: Mapping[str, Array] | None = None,
) -> Nulls:
    """Nulls with a reason for whatever is undefined everywhere, and the number of images behind each.

    `intervals` holds the 95 % intervals [..., 2] of nulls by name, kept in `spread` as NAME_ci95; a null without one has a
    reason of that name.
    """
    values, reasons = dict(values), dict(reasons)
    for name, value in values.items():
        if value is not None and not np.isfinite(value).any():
            values[name] = None
            reasons.setdefault(name, ONE_IMAGE if name == "other_image" else "undefined: there is nothing to compare with")
        if name == "kappa" and values[name] is None:
            reasons[name] = "undefined: the wrong-token null is 1 itself, so that nothing is left to agree beyond it"
    if kappa_ci95 is None and values.get("kappa") is not None:
        reasons["kappa_ci95"] = NO_KAPPA_INTERVAL
    reasons.setdefault("untrained", NO_TWIN)
    sure = {name: bounds for name, bounds in (intervals or {}).items() if values.get(name) is not None}
    for name in SAMPLED:
        if values.get(name) is not None and name not in sure:
            reasons[f"{name}_ci95"] = NO_PAIR_INTERVAL if name == "other_image" else NO_NULL_INTERVAL
    taken = {name: images for name, value in values.items() if value is not None}
    spread = {f"{name}_ci95": bounds for name, bounds in sure.items()}
    return Nulls(values=values, images=taken, reasons=reasons, kappa_ci95=kappa_ci95, spread=spread)


def untrained_only() -> Nulls:
    """For a metric that is no similarity: the untrained twin is all there is to compare with."""
    return Nulls(values={"untrained": None}, images={}, reasons={"untrained": NO_TWIN})


def with_twins(result: MetricResult, twins: Mapping[int, MetricResult], images: int, reason: str = "") -> MetricResult:
    """The result with the mean over its untrained twins by seed, or with the `reason` why there are none.

    `spread["untrained_ci95"]` [..., 2] is the twin's own interval over its images, where it has one. With several twins
    `spread["untrained_seeds"]` holds the `seeds`, the standard deviation `sd` (n − 1) and the range `low`, `high` over them,
    with the metric's dims. Seeds are few: look at the range before the deviation. The twins saw the same images, so that the
    interval of their mean over images is taken as the mean of theirs, which is never too narrow; it says nothing of seeds.
    """
    if result.nulls is None:
        return result
    nulls, measured = result.nulls, [twin for twin in twins.values() if twin.values is not None]
    if not measured:
        reasons = {**nulls.reasons, "untrained": reason or NO_TWIN}
        return replace(result, nulls=replace(nulls, values={**nulls.values, "untrained": None}, reasons=reasons))
    values = np.stack([twin.values for twin in measured if twin.values is not None])
    bounds = [twin.ci95 for twin in measured if twin.ci95 is not None]
    spread = dict(nulls.spread)
    if len(bounds) == len(measured):
        spread["untrained_ci95"] = np.mean(bounds, axis=0)
    if len(measured) > 1:
        extent = {"sd": values.std(0, ddof=1), "low": values.min(0), "high": values.max(0)}
        spread["untrained_seeds"] = {"seeds": list(twins), **extent}
    nulls = replace(
        nulls,
        values={**nulls.values, "untrained": values.mean(0)},
        reasons={name: text for name, text in nulls.reasons.items() if name != "untrained"},
        images={**nulls.images, "untrained": images},
        spread=spread,
    )
    return replace(result, nulls=nulls)
