"""What each similarity would be with nothing to find, beside what it is."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from collapse_probe.agreement import Agreement
from collapse_probe.findings import Nulls, Reading
from collapse_probe.statistics import beyond, interval, kappa, kappa_stderr

Array = NDArray[np.float64]
NO_TWIN = "no untrained twin was measured"
ONE_IMAGE = "needs two different images"
NO_KAPPA_INTERVAL = "undefined: how kappa's null varies with the images was not kept"


def between_blocks(fold: Agreement, heads: bool) -> Nulls:
    """The nulls of a block × block similarity; `heads` says whether its vectors have heads to confuse.

    `spread` holds `other_token_ci95` [blocks, blocks, 2] and `beyond_p` [blocks, blocks], the one-sided p of a paired t test
    over images that the pair is more alike than with the wrong tokens.
    """
    real, real_error, n = fold.mean("real")
    token, token_error, _ = fold.mean("other_token")
    corrected = kappa(real, token)
    with np.errstate(divide="ignore", invalid="ignore"):
        covariance = (fold.cross_moment() - real * token) / (n - 1)
    error = kappa_stderr((real, real_error), (token, token_error), covariance)
    values: dict[str, Array | None] = {
        "untrained": None,
        "other_token": token,
        "other_image": fold.across_images()["real"],
        "other_head": fold.mean("other_head")[0] if heads else None,
        "kappa": corrected,
    }
    reasons = {} if heads else {"other_head": "patch embeddings have no heads"}
    found = finished(values, reasons, int(n.max(initial=0)), interval(corrected, error, n))
    spread = np.sqrt(np.maximum(real_error**2 + token_error**2 - 2 * covariance, 0.0))
    return replace(
        found, spread={"other_token_ci95": interval(token, token_error, n), "beyond_p": beyond(real - token, spread, n)}
    )


def finished(values: dict[str, Array | None], reasons: dict[str, str], images: int, kappa_ci95: Array | None) -> Nulls:
    """Nulls with a reason for whatever is undefined everywhere, and the number of images behind each."""
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
    taken = {name: images for name, value in values.items() if value is not None}
    return Nulls(values=values, images=taken, reasons=reasons, kappa_ci95=kappa_ci95)


def untrained_only() -> Nulls:
    """For a metric that is no similarity: the untrained twin is all there is to compare with."""
    return Nulls(values={"untrained": None}, images={}, reasons={"untrained": NO_TWIN})


def with_untrained(reading: Reading, twin: Reading | None, images: int, reason: str = NO_TWIN) -> Reading:
    """The reading with the values of its untrained twin, or with the reason why there are none."""
    if reading.nulls is None:
        return reading
    values, reasons, taken = dict(reading.nulls.values), dict(reading.nulls.reasons), dict(reading.nulls.images)
    values["untrained"] = None if twin is None else twin.values
    if values["untrained"] is None:
        reasons["untrained"] = reason
    else:
        reasons.pop("untrained", None)
        taken["untrained"] = images
    return replace(reading, nulls=replace(reading.nulls, values=values, reasons=reasons, images=taken))


def with_twins(reading: Reading, twins: Mapping[int, Reading], images: int) -> Reading:
    """The reading with the mean over untrained twins by seed, and with several how they spread over the seeds.

    `spread["untrained_seeds"]`: the `seeds`, the standard deviation `sd` (n − 1) and the range `low`, `high` over them, with
    the metric's dims. Seeds are few: look at the range before the deviation.
    """
    first = next(iter(twins.values()))
    held = [twin.values for twin in twins.values() if twin.values is not None]
    if len(held) < 2 or reading.nulls is None:
        return with_untrained(reading, first, images)
    values = np.stack(held)
    found = with_untrained(reading, replace(first, values=values.mean(0)), images)
    assert found.nulls is not None
    spread = {"seeds": list(twins), "sd": values.std(0, ddof=1), "low": values.min(0), "high": values.max(0)}
    return replace(found, nulls=replace(found.nulls, spread={**found.nulls.spread, "untrained_seeds": spread}))
