"""The few numbers that stand for a run: what `summary` holds and `--fail-on` reads."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from collapse_probe.data.images import ImageSet
from collapse_probe.results.findings import MetricResult
from collapse_probe.results.readings import Summary, adjacent, mean
from collapse_probe.results.rules import RAW_ABOVE
from collapse_probe.statistics.breakdowns import classes_of, convergence_of, extremes_of
from collapse_probe.statistics.estimates import PerImageValues, per_image_values
from collapse_probe.statistics.intervals import Array
from collapse_probe.statistics.paired import controlled
from collapse_probe.statistics.permutation import ASSUMPTION, LEVEL, NULL, SignFlips, sign_flips


def pair_tests(table: Mapping[str, NDArray[Any]], readings: Mapping[str, MetricResult], seed: int = 0) -> dict[str, Any]:
    """The tests of every block × block similarity whose single images were kept with their null, as plain data by metric.

    Adjacent pairs by `sign_flips`; all pairs by the paired t test of the run's sums. `q` is p with the false discovery rate
    controlled (Benjamini–Hochberg) over the pairs of the metric.
    """
    names = [name for name in table if name + NULL in table and len(table[name])]
    if not names:
        return {}
    each = [np.asarray(table[name] - table[name + NULL], dtype=np.float64) for name in names]
    places = np.cumsum([0, *(part.shape[1] for part in each)])
    found = sign_flips(np.concatenate(each, axis=1), seed=seed)
    tests = {}
    for name, part, first, last in zip(names, each, places, places[1:], strict=False):
        one = SignFlips(found.p[first:last], found.smallest[first:last], found.permutations, found.exact)
        reading = readings.get(name)
        tests[name] = _plain(part, one) | ({} if reading is None else {"all_pairs": _all_pairs(reading)})
    return tests


def _plain(differences: Array, found: SignFlips) -> dict[str, Any]:
    """One metric's test of adjacent pairs, with what its images could have shown at most."""
    pairs, images = differences.shape[1], int(np.isfinite(differences).any(1).sum())
    smallest = float(np.nanmin(found.smallest, initial=1.0))
    q = controlled(found.p)
    enough = smallest <= LEVEL
    significant = int((q <= LEVEL).sum())
    tested = int(np.isfinite(found.p).sum())
    said = f"{significant} of {tested} neighbouring pairs are more alike than with the wrong tokens (FDR {LEVEL:g})."
    if not enough:
        said = f"Too few images to tell: with {images} the smallest p-value is {smallest:.2g}, above {LEVEL:g}."
    return {
        "null": "other_token",
        "alternative": "real > other_token",
        "test": "sign-flip permutation over images, one-sided" + (", exact" if found.exact else ", Monte Carlo"),
        "permutations": found.permutations,
        "exact": found.exact,
        "images": images,
        "pairs": [[block, block - 1] for block in range(1, pairs + 1)],
        "p": found.p,
        "q": q,
        "level": LEVEL,
        "significant": significant,
        "tested": tested,
        "smallest_p": smallest,
        "enough_images": enough,
        "assumption": ASSUMPTION,
        "sentence": said,
    }


def _all_pairs(reading: MetricResult) -> dict[str, Any] | None:
    """p and q [blocks, blocks] of the paired t test of every pair of different blocks; None where the sums were not kept."""
    if reading.nulls is None or "beyond_p" not in reading.nulls.spread:
        return None
    p = np.array(reading.nulls.spread["beyond_p"], dtype=np.float64)
    np.fill_diagonal(p, np.nan)
    q, (rows, columns) = np.full(p.shape, np.nan), np.tril_indices(len(p), -1)
    q[rows, columns] = q[columns, rows] = controlled(p[rows, columns])
    below = q[rows, columns]
    return {
        "test": "paired t over images, one-sided",
        "p": p,
        "q": q,
        "significant": int((below <= LEVEL).sum()),
        "tested": int(np.isfinite(below).sum()),
    }


def summary_of(readings: Mapping[str, MetricResult]) -> Summary:
    """The mean of each weight reading over what is defined, and that of its untrained twin.

    Keys are the metric's name with underscores and `_mean`, or `_adjacent` for the mean over neighbouring blocks.
    """
    found: Summary = {}
    for name, reading in readings.items():
        across = reading.dims == ("block", "block")
        key = name.replace("-", "_").replace("@", "_")
        fresh = None if reading.nulls is None else reading.nulls.values.get("untrained")
        for ending, values in (("", reading.values), ("_untrained", fresh)):
            numbers = None if values is None else mean(adjacent(values) if across else values)
            if not ending or fresh is not None:
                found[f"{key}_{'adjacent' if across else 'mean'}{ending}"] = numbers
    return found


def summarise(readings: Mapping[str, MetricResult], images: int) -> Summary:
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


def _similarity(reading: MetricResult, key: str) -> Summary:
    nulls = {} if reading.nulls is None else reading.nulls.values
    return {
        f"attention_similarity{key}_adjacent": mean(adjacent(reading.values)),
        f"other_token{key}_adjacent": mean(adjacent(nulls.get("other_token"))),
        f"kappa{key}_adjacent": mean(adjacent(nulls.get("kappa"))),
    }


def _counts(reading: MetricResult, key: str) -> Summary:
    if reading.values is None or reading.ci95 is None:
        return {f"similar_blocks{key}": None, f"similar_blocks{key}_corrected": None}
    at = list(reading.settings["thresholds"]).index(RAW_ABOVE)
    low, high = (float(b) if np.isfinite(b) else None for b in reading.ci95[at])
    return {
        f"similar_blocks{key}": int(reading.values[at]),
        f"similar_blocks{key}_ci_low": low,
        f"similar_blocks{key}_ci_high": high,
        f"similar_blocks{key}_corrected": int(reading.details["corrected"]["value"]),
    }


def _entropy(reading: MetricResult) -> Summary:
    if reading.values is None:
        return {"attention_entropy_mean": None, "attention_entropy_share": None}
    share = np.asarray(reading.details["share"], dtype=np.float64)
    return {"attention_entropy_mean": mean(reading.values), "attention_entropy_share": mean(share)}


def sureness(
    table: Mapping[str, NDArray[Any]],
    readings: Mapping[str, MetricResult],
    *,
    heads: Array | None = None,
    images: object = None,
    labels: Mapping[str, int] | None = None,
    seed: int = 0,
) -> dict[str, dict[str, Any]]:
    """`tests`, `convergence`, `extremes` and `classes` of a run by name, as plain data; each empty where nothing can be said.

    `table` is the content of images.npz, `heads` the heads of every block; `images` gives the labels where it is an ImageSet
    that has some, else `labels` may hold them by image name. See `pair_tests`, `convergence_of`, `extremes_of` and `classes_of`
    for what each holds.
    """
    kept = per_image_values(table, heads)
    own, class_names = labels_of(images)
    return {
        "tests": pair_tests(table, readings, seed),
        "convergence": convergence_of(kept, RAW_ABOVE, seed),
        "extremes": extremes_of(kept),
        "classes": classes_of(kept, labels or None if own is None else own, class_names),
    }


def labels_of(images: object) -> tuple[dict[str, int] | None, Sequence[str]]:
    """The class of every image by its name and the names of the classes; None where there are no labels."""
    if not isinstance(images, ImageSet) or images.labels is None:
        return None, ()
    return dict(zip(images.names, images.labels, strict=True)), images.class_names


def bounds_of(kept: PerImageValues) -> Summary:
    """The ends of the headline means' 95 % intervals, for the summary: NAME_ci_low and NAME_ci_high; None with one image."""
    found: Summary = {}
    for name, estimate in kept.estimates().items():
        for end, value in zip(("low", "high"), estimate.ci95, strict=True):
            found[f"{name}_ci_{end}"] = value if value == value else None
    return found
