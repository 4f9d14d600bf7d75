"""Which pairs of blocks are more alike than their null, in these weights and in untrained ones, at a false discovery rate."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from collapse_probe.statistics.intervals import Array
from collapse_probe.statistics.paired import controlled

LEVEL = 0.05
"""The false discovery rate at which a pair counts as more alike than its null."""
FEWEST_IMAGES = 16
"""From so many images on the test holds its level on what models give (docs/intervals.md); below, no pair is counted."""
SHOWN = "attention-similarity"
"""The metric of which the test of all pairs is drawn, as dots on its kappa."""
ROUNDING = 1e-5
"""Cosines are taken in float32: a mean difference of no more than this is not told from its rounding, however many images."""
TEST = "paired t over images, guarded against skewness, one-sided"
ASSUMPTION = (
    "The test is of one set of parameters: whether the mean similarity of the same tokens is above that of other ones over "
    "all images like these, of which the measured ones are an independent sample. A significant pair is more alike than "
    "chance, however little (κ says how much), and pairs of untrained networks pass as well: what counts is how many more "
    "pass than in the untrained copy, on as many images, for more images find smaller differences. From 16 images on the test "
    "errs little more often than it says on maps of trained models; where rare images far below the others decide, more often."
)


def above_rounding(p: Array, difference: Array) -> Array:
    """One-sided p-values, 1 where the mean difference is no larger than `ROUNDING`; NaN stays.

    >>> above_rounding(np.array([0.001, 0.001, np.nan]), np.array([0.2, 2e-6, 0.0])).tolist()
    [0.001, 1.0, nan]
    """
    return np.where(np.isfinite(p) & ~(difference > ROUNDING), 1.0, p)


def neighbours_test(p: Array, rounded: int, images: int, untrained_p: Array | None, untrained_images: int) -> dict[str, Any]:
    """The test of neighbouring pairs from their p [pairs], as plain data, beside that of the untrained copies [seeds, pairs].

    In `rounded` of the pairs the difference is within rounding.
    """
    q = _controlled(p, images)
    twins = None
    if untrained_p is not None and untrained_images >= FEWEST_IMAGES:
        passed = [int((controlled(each) <= LEVEL).sum()) for each in untrained_p]
        twins = {"significant": passed, "tested": int(np.isfinite(untrained_p[0]).sum()), "images": untrained_images}
    significant, tested, enough = int((q <= LEVEL).sum()), int(np.isfinite(p).sum()), images >= FEWEST_IMAGES
    sentence = (
        f"{significant} of {tested} neighbouring pairs are more alike than the chance level (FDR {LEVEL:g}, {images} "
        f"images); {_of_twins(twins, untrained_p is not None)}."
    )
    if rounded:
        sentence += f" In {rounded} the difference is within the rounding of float32 ({ROUNDING:g}): none is found there."
    if not enough:
        sentence = f"Too few images to tell: {images}, and the test can be relied on from {FEWEST_IMAGES} on."
    return {
        "null": "other_token",
        "alternative": "real > other_token",
        "test": TEST,
        "images": images,
        "pairs": [[block, block - 1] for block in range(1, len(p) + 1)],
        "p": p,
        "q": q,
        "level": LEVEL,
        "significant": significant,
        "tested": tested,
        "rounding": ROUNDING,
        "within_rounding": rounded,
        "enough_images": enough,
        "untrained": twins,
        "assumption": ASSUMPTION,
        "sentence": sentence,
    }


def _of_twins(twins: Mapping[str, Any] | None, measured: bool) -> str:
    if twins is None:
        return "the untrained copy has too few images for the test" if measured else "no untrained copy was tested beside them"
    low, high = min(twins["significant"]), max(twins["significant"])
    which = "copy" if len(twins["significant"]) == 1 else f"copies of {len(twins['significant'])} seeds"
    count = f"{low}" if low == high else f"{low} to {high}"
    return f"in the untrained {which} {count} of {twins['tested']} ({twins['images']} images)"


def all_pairs_test(p: Array, images: int) -> dict[str, Any]:
    """The test of every pair of different blocks from p [blocks, blocks], as plain data."""
    p = p.copy()
    np.fill_diagonal(p, np.nan)
    q, (rows, columns) = np.full(p.shape, np.nan), np.tril_indices(len(p), -1)
    q[rows, columns] = q[columns, rows] = _controlled(p[rows, columns], images)
    below = q[rows, columns]
    return {
        "test": TEST,
        "p": p,
        "q": q,
        "significant": int((below <= LEVEL).sum()),
        "tested": int(np.isfinite(p[rows, columns]).sum()),
    }


def _controlled(p: Array, images: int) -> Array:
    """q of p; NaN with too few images."""
    return controlled(p) if images >= FEWEST_IMAGES else np.full(p.shape, np.nan)


def pairs_tested(tests: Mapping[str, Any], name: str) -> Mapping[str, Any] | None:
    """The test of all pairs of blocks of one metric in what `pair_tests` gives (or the same read from a file), or None."""
    test: Mapping[str, Any] | None = (tests.get(name) or {}).get("all_pairs")
    return test


def beyond_null(tested: Mapping[str, Any]) -> NDArray[np.bool_]:
    """Which pairs of blocks [blocks, blocks] that test found more alike than their null; False where q is undefined."""
    return np.array(tested["q"], dtype=np.float64) <= LEVEL
