"""The few numbers that stand for a run: what `summary` holds and `--fail-on` reads."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

from collapse_probe.findings import Reading
from collapse_probe.verdict_rules import BY_NAME

Array = NDArray[np.float64]
Summary = dict[str, "float | int | None"]
THRESHOLDS = (0.8, 0.9, 0.95)
"""The mean similarities above which similar-blocks counts a block as like the one before."""
COUNTED_ABOVE = BY_NAME["high-raw"].threshold
"""The one among them whose count stands in the summary: that above which a rule calls similarity high."""


def adjacent(matrix: Array | None) -> Array:
    """A block × block matrix's values between each block and the block before, [blocks − 1]; empty for None."""
    return np.empty(0) if matrix is None else np.diagonal(matrix, -1).astype(np.float64)


def mean(values: Array) -> float | None:
    """The mean of what is defined; None where nothing is."""
    defined = values[np.isfinite(values)]
    return float(defined.mean()) if defined.size else None


def summarise(readings: Mapping[str, Reading], images: int) -> Summary:
    """Flat names and numbers; None where a metric was not measured or is undefined."""
    found: Summary = {"images": images}
    for name, key in (
        ("attention-similarity", ""),
        ("attention-similarity@row", "_row"),
        ("attention-similarity@centred", "_centred"),
        ("attention-similarity@probs", "_probs"),
    ):
        if name in readings:
            found |= _similarity(readings[name], key)
    for name, key in (("similar-blocks", ""), ("similar-blocks@probs", "_probs")):
        if name in readings:
            found |= _counts(readings[name], key)
    if "attention-entropy" in readings:
        found |= _entropy(readings["attention-entropy"])
    for name in ("head-similarity", "image-similarity", "feature-similarity"):
        if name in readings:
            reading = readings[name]
            values = adjacent(reading.values) if len(reading.dims) == 2 else reading.values
            key = name.replace("-", "_") + ("_adjacent" if len(reading.dims) == 2 else "_mean")
            found[key] = None if values is None else mean(values)
    if "patch-diversity" in readings:
        values = readings["patch-diversity"].values
        found["patch_diversity_last"] = None if values is None or not np.isfinite(values[-1]) else float(values[-1])
    return found


def _similarity(reading: Reading, key: str) -> Summary:
    nulls = {} if reading.nulls is None else reading.nulls.values
    return {
        f"attention_similarity{key}_adjacent": mean(adjacent(reading.values)),
        f"other_token{key}_adjacent": mean(adjacent(nulls.get("other_token"))),
        f"kappa{key}_adjacent": mean(adjacent(nulls.get("kappa"))),
    }


def _counts(reading: Reading, key: str) -> Summary:
    if reading.values is None or reading.ci95 is None:
        return {f"similar_blocks{key}": None, f"similar_blocks{key}_corrected": None}
    at = list(reading.settings["thresholds"]).index(COUNTED_ABOVE)
    low, high = (float(b) if np.isfinite(b) else None for b in reading.ci95[at])
    return {
        f"similar_blocks{key}": int(reading.values[at]),
        f"similar_blocks{key}_ci_low": low,
        f"similar_blocks{key}_ci_high": high,
        f"similar_blocks{key}_corrected": int(reading.settings["corrected"]["value"]),
    }


def _entropy(reading: Reading) -> Summary:
    if reading.values is None:
        return {"attention_entropy_mean": None, "attention_entropy_share": None}
    share = np.asarray(reading.settings["share"], dtype=np.float64)
    return {"attention_entropy_mean": mean(reading.values), "attention_entropy_share": mean(share)}
