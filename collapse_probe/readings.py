"""What figures and tables both take out of a reading: adjacent pairs, nulls, shares of log N."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from collapse_probe.drawing import ROLES
from collapse_probe.findings import Array, Findings, Reading
from collapse_probe.verdict_rules import BY_NAME

RAW_THRESHOLD = BY_NAME["high-raw"].threshold  # above it a pair counts as similar
KAPPA_THRESHOLD = BY_NAME["shared"].threshold  # the same after correction
NULLS = ("other_token", "other_image", "other_head", "untrained")
NULL_LABELS = {**{role: ROLES[role].label for role in NULLS}, "kappa": "κ"}


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
class Corrected:
    """How many adjacent pairs have a kappa above `above`, with its interval where one was taken."""

    value: float
    ci95: Array | None
    above: float


def corrected_count(findings: Findings, name: str = "similar-blocks") -> Corrected | None:
    """The null-corrected count of similar blocks, from the metric's settings or (the plain one) else from the summary."""
    reading = held(findings, name)
    stored = {} if reading is None else reading.settings.get("corrected", {})
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
    reading = held(findings, name)
    stored = None if reading is None else reading.settings.get("pairs")
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
    reading = held(findings, "attention-entropy")
    if reading is None or reading.values is None or "tokens" not in reading.settings:
        return None
    keys = np.broadcast_to(np.asarray(reading.settings["tokens"], dtype=np.float64), len(reading.values))
    scale = np.where(keys > 1, np.log(np.maximum(keys, 2)), np.nan)[:, None]
    fresh = null(reading, "untrained")
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
