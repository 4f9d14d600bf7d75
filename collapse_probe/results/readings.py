"""What figures and tables both take out of a reading: adjacent pairs, nulls, shares of log N."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from collapse_probe.results.findings import Findings, MetricResult
from collapse_probe.results.rules import BY_NAME
from collapse_probe.results.text import number
from collapse_probe.statistics.intervals import Array, half_width


def weights_only(findings: Findings) -> bool:
    """Whether all that was asked for is about the weights."""
    return bool(findings.metrics) and all(of_weights(name, reading) for name, reading in findings.metrics.items())


def of_weights(name: str, reading: MetricResult) -> bool:
    """Whether a reading is about the weights, which need no images."""
    return reading.description.level == "weights"


Summary = dict[str, "float | int | None"]
THRESHOLDS = (0.8, 0.9, 0.95)
"""The mean similarities above which similar-blocks counts a block as like the one before."""
COUNTED_ABOVE = BY_NAME["high-raw"].threshold
"""The one among them whose count stands in the summary: that above which a rule calls similarity high."""


def mean(values: Array | None) -> float | None:
    """The mean of what is defined; None where nothing is."""
    if values is None:
        return None
    defined = values[np.isfinite(values)]
    return float(defined.mean()) if defined.size else None


def against_seeds(reading: MetricResult) -> str:
    """Whether a block × block similarity is beyond what untrained twins of several seeds span; empty with one seed."""
    if reading.nulls is None or "untrained_seeds" not in reading.nulls.spread or reading.values is None:
        return ""
    spread = reading.nulls.spread["untrained_seeds"]
    real, low, high = (mean(adjacent(part)) for part in (reading.values, spread["low"], spread["high"]))
    if real is None or low is None or high is None:
        return ""
    where = "above" if real > high else "below" if real < low else "within"
    return (
        f"neighbouring blocks of the model are alike at {number(real)}, {where} what {len(spread['seeds'])} untrained twins of "
        f"different seeds span ({number(low)} to {number(high)}, mean of the lowest and of the highest of each pair)"
    )


def weights_alone(findings: Findings) -> bool:
    """Whether the run read the weights alone, without any image."""
    return findings.data.get("images") == 0 and findings.data.get("address") is None


CORRECTED_ABOVE = 0.5


TWIN_EXACT = "the twin's own sampling error is not counted"


class Absent(Exception):
    """A number is not in the findings; the text says why."""


def require_result(findings: Findings, metric: str) -> tuple[MetricResult, Array]:
    """The reading of a metric and its values; raises Absent."""
    reading = findings.metrics.get(metric)
    if reading is None:
        raise Absent(f"{metric} was not measured in this run")
    if reading.values is None:
        raise Absent(f"{metric} does not apply here: {reading.not_applicable or 'it has no values'}")
    return reading, reading.values


def require_null(reading: MetricResult, metric: str, role: str) -> Array:
    """The values of one of a metric's nulls; raises Absent."""
    found = None if reading.nulls is None else reading.nulls.values.get(role)
    if found is None or not np.isfinite(found).any():
        reasons = {} if reading.nulls is None else reading.nulls.reasons
        raise Absent(f"{role} of {metric} was not taken: {reasons.get(role, 'it is defined nowhere')}")
    return found


def null_interval(reading: MetricResult, role: str) -> Array | None:
    """The 95 % interval [..., 2] of a null; None where it has none, as in findings stored before it was kept."""
    stored = None if reading.nulls is None else reading.nulls.spread.get(f"{role}_ci95")
    return None if stored is None else np.array(stored, dtype=np.float64)


def at_last(findings: Findings, metric: str) -> tuple[int, Array, Array]:
    """The last depth, its value [1] and interval [1, 2] (NaN where there is none); raises Absent."""
    reading, values = require_result(findings, metric)
    bounds = np.full((len(values), 2), np.nan) if reading.ci95 is None else reading.ci95
    return len(values) - 1, values[-1:], bounds[-1:]


def last_of_twin(findings: Findings, metric: str) -> tuple[Array, Array, str]:
    """The untrained twin's last value [1], half the length of its interval, and a note where none was kept; raises Absent."""
    reading, _ = require_result(findings, metric)
    fresh, bounds = require_null(reading, metric, "untrained")[-1:], null_interval(reading, "untrained")
    return (fresh, fresh * 0, TWIN_EXACT) if bounds is None else (fresh, half_width(bounds[-1:]), "")


RAW_THRESHOLD = BY_NAME["high-raw"].threshold  # above it a pair counts as similar
KAPPA_THRESHOLD = BY_NAME["shared"].threshold  # the same after correction
NULLS = ("other_token", "other_image", "other_head", "untrained")


def result_of(findings: Findings, name: str) -> MetricResult | None:
    """The reading called `name` where it is there and has values."""
    reading = findings.metrics.get(name)
    return None if reading is None or reading.values is None else reading


def adjacent(matrix: Array | None) -> Array:
    """The entries (b, b − 1) of a block × block array: [L, L, …] -> [L − 1, …]; empty for None."""
    if matrix is None:
        return np.empty(0)
    later = np.arange(1, len(matrix))
    return np.asarray(matrix[later, later - 1])


def null_of(reading: MetricResult, role: str) -> Array | None:
    """One null of `reading` (or its "kappa"), or None where it has none or no defined value."""
    values = None if reading.nulls is None else reading.nulls.values.get(role)
    return values if values is not None and np.isfinite(values).any() else None


def nulls_of(reading: MetricResult) -> dict[str, Array]:
    """The nulls of `reading` that hold any defined value, without kappa."""
    found = {role: null_of(reading, role) for role in NULLS}
    return {role: values for role, values in found.items() if values is not None}


def kappa_ci95(reading: MetricResult) -> Array | None:
    """The interval of kappa, or None."""
    return None if reading.nulls is None else reading.nulls.kappa_ci95


@dataclass(frozen=True)
class Corrected:
    """How many adjacent pairs have a kappa above `above`, with its interval where one was taken."""

    value: float
    ci95: Array | None
    above: float


def corrected_count(findings: Findings, name: str = "similar-blocks") -> Corrected | None:
    """The null-corrected count of similar blocks, from the metric's details or (the plain one) else from the summary."""
    reading = result_of(findings, name)
    stored = {} if reading is None else reading.details.get("corrected", {})
    value = stored.get("value")
    if value is None and name == "similar-blocks":
        value = findings.summary.get("similar_blocks_corrected")
    if value is None:
        return None
    ends = stored.get("ci95")
    ci95 = None if ends is None or None in ends else np.asarray(ends, dtype=np.float64)
    return Corrected(float(value), ci95, float(stored.get("kappa_above", KAPPA_THRESHOLD)))


def pairs_of(findings: Findings, name: str = "similar-blocks") -> int:
    """How many pairs of adjacent blocks there are."""
    reading = result_of(findings, name)
    stored = None if reading is None else reading.details.get("pairs")
    return int(stored or max(int(findings.model.get("blocks") or 0) - 1, 1))


@dataclass(frozen=True)
class Entropy:
    """Attention entropy as a share of log N: 1 is uniform, 0 is one key; `keys` is N, block by block."""

    keys: Array
    heads: Array
    mean: Array
    ci95: Array | None
    untrained: Array | None

    @property
    def unit(self) -> str:
        """What 1 stands for: log 50, or log N where blocks differ."""
        return f"log {self.keys[0]:.0f}" if len(set(self.keys.tolist())) == 1 else "log N"


def entropy_share(findings: Findings) -> Entropy | None:
    """Attention entropy in shares of log N: `heads` [L, H], `mean` over heads [L], its `ci95` [L, 2]."""
    reading = result_of(findings, "attention-entropy")
    if reading is None or reading.values is None or "tokens" not in reading.details:
        return None
    keys = np.broadcast_to(np.asarray(reading.details["tokens"], dtype=np.float64), len(reading.values))
    scale = np.where(keys > 1, np.log(np.maximum(keys, 2)), np.nan)[:, None]
    fresh = null_of(reading, "untrained")
    if reading.head_mean is not None:
        average, ci95 = reading.head_mean[0], reading.head_mean[2] / scale
    else:
        average, ci95 = over_heads(reading.values), None
    untrained = None if fresh is None else over_heads(fresh / scale)
    return Entropy(keys, reading.values / scale, average / scale[:, 0], ci95, untrained)


def over_heads(values: Array) -> Array:
    """Mean over the heads that are defined, [L, H] -> [L]."""
    counts = np.isfinite(values).sum(1)
    return np.where(counts > 0, np.nansum(values, axis=1) / np.maximum(counts, 1), np.nan)
