"""What figures and tables both take out of a reading: adjacent pairs, the nulls that are there, shares of log N."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from collapse_probe.findings import Array, Findings, Reading

NULLS = ("other_token", "other_image", "other_head", "untrained")


def held(findings: Findings, name: str) -> Reading | None:
    """The reading called `name` where it is there and has values."""
    reading = findings.metrics.get(name)
    return None if reading is None or reading.values is None else reading


def adjacent(matrix: Array) -> Array:
    """The entries (b, b − 1) of a block × block array: [L, L, …] -> [L − 1, …]."""
    later = np.arange(1, len(matrix))
    return np.asarray(matrix[later, later - 1])


def null(reading: Reading, role: str) -> Array | None:
    """One null of `reading` (or its "kappa"), or None where it has none or no defined value."""
    values = None if reading.nulls is None else reading.nulls.values.get(role)
    return values if values is not None and np.isfinite(values).any() else None


def nulls(reading: Reading) -> dict[str, Array]:
    """The nulls of `reading` that hold any defined value, without kappa."""
    found = {role: null(reading, role) for role in NULLS}
    return {role: values for role, values in found.items() if values is not None}


def kappa_ci95(reading: Reading) -> Array | None:
    """The interval of kappa, or None."""
    return None if reading.nulls is None else reading.nulls.kappa_ci95


def mean(values: Array | None) -> float | None:
    """Mean over the defined entries, or None where there is none."""
    if values is None or not np.isfinite(values).any():
        return None
    return float(np.nanmean(np.where(np.isfinite(values), values, np.nan)))


@dataclass(frozen=True)
class Entropy:
    """Attention entropy as a share of log N, N keys: 1 is uniform attention, 0 is one key."""

    tokens: float
    heads: Array
    mean: Array
    ci95: Array | None
    untrained: Array | None


def entropy_share(findings: Findings) -> Entropy | None:
    """The attention entropy of `findings` in shares of log N: heads [L, H], mean over heads [L], its interval [L, 2]."""
    reading = held(findings, "attention-entropy")
    tokens = None if reading is None else reading.settings.get("tokens")
    if reading is None or reading.values is None or not isinstance(tokens, (int, float)) or tokens <= 1:
        return None
    scale = math.log(tokens)
    fresh = null(reading, "untrained")
    if reading.head_mean is not None:
        average, ci95 = reading.head_mean[0], reading.head_mean[2] / scale
    else:
        average, ci95 = _over_heads(reading.values), None
    untrained = None if fresh is None else _over_heads(fresh) / scale
    return Entropy(float(tokens), reading.values / scale, average / scale, ci95, untrained)


def _over_heads(values: Array) -> Array:
    counts = np.isfinite(values).sum(1)
    return np.where(counts > 0, np.nansum(values, axis=1) / np.maximum(counts, 1), np.nan)
