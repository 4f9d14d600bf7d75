"""Is a pair of blocks more alike than its null? A sign-flip permutation test over images, with false discoveries controlled."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from collapse_probe.statistics.intervals import Array

PERMUTATIONS = 9999
LEVEL = 0.05
"""The false discovery rate at which a pair counts as more alike than its null."""
SHOWN = "attention-similarity"
"""The metric of which the test of all pairs is drawn, as dots on its kappa."""
FLIPPED = 1000
"""With more images than this, so many groups of them (every thousandth image) are flipped instead."""
FLIPS_AT_ONCE = 2_000_000
TIE = 1e-12
NULL = "/other_token"
ROUNDING = 1e-5
"""Cosines are taken in float32: a mean difference of no more than this is not told from its rounding, however many images."""
ASSUMPTION = (
    "If two blocks agreed on nothing, the similarity of an image's right tokens and that of its wrong tokens could be "
    "exchanged, so that their difference would be as likely to have either sign, image by image and independently (the images "
    "are a sample; all pairs of an image are flipped together). A significant pair is more alike than chance, however little: "
    "kappa says how much."
)


@dataclass(frozen=True)
class SignFlips:
    """One-sided p-values [places] that a mean over images is above 0, and the smallest that so many images can give."""

    p: Array
    smallest: Array
    permutations: int
    exact: bool


def sign_flips(differences: Array, *, seed: int = 0, permutations: int = PERMUTATIONS) -> SignFlips:
    """Paired sign-flip test of differences [images, places] -> [places].

    p is the share of sign patterns with a sum at least as large as the one seen: of all 2ⁿ where these are no more than
    `permutations` + 1, else (1 + count)/(1 + `permutations`) over seeded random patterns, the same for every place. A place is
    tested on its defined images; differences of 0 leave it fewer signs to flip. NaN where no image is defined. Beyond `FLIPPED`
    images each of as many groups of them has one sign: the sum of a group is as symmetric as its images, so p stays exact.

    >>> sign_flips(np.array([[1.0, 1.0], [2.0, -1.0], [0.5, np.nan]])).p.tolist()
    [0.125, 0.75]
    """
    defined = np.isfinite(differences)
    sums = _grouped(np.where(defined, differences, 0.0))
    images = len(sums)
    exact = 2**images <= permutations + 1
    seen = sums.sum(0)
    count = np.zeros(sums.shape[1])
    for signs in _all_signs(images) if exact else _random_signs(images, permutations, seed):
        count += (signs @ sums >= seen - TIE * np.abs(sums).sum(0)).sum(0)
    p = count / 2.0**images if exact else (1 + count) / (1 + permutations)
    floor = np.exp2(-np.count_nonzero(sums, axis=0).astype(np.float64))
    smallest = floor if exact else np.maximum(floor, 1 / (1 + permutations))
    known = defined.any(0)
    return SignFlips(np.where(known, p, np.nan), np.where(known, smallest, np.nan), 2**images if exact else permutations, exact)


def above_rounding(p: Array, difference: Array) -> Array:
    """One-sided p-values, 1 where the mean difference is no larger than `ROUNDING`; NaN stays.

    >>> above_rounding(np.array([0.001, 0.001, np.nan]), np.array([0.2, 2e-6, 0.0])).tolist()
    [0.001, 1.0, nan]
    """
    return np.where(np.isfinite(p) & ~(difference > ROUNDING), 1.0, p)


def _grouped(differences: Array) -> Array:
    """Sums over every `FLIPPED`-th image, [images, places] -> [at most `FLIPPED`, places]."""
    images, places = differences.shape
    if images <= FLIPPED:
        return differences
    padded = np.concatenate([differences, np.zeros((-images % FLIPPED, places))])
    return np.asarray(padded.reshape(-1, FLIPPED, places).sum(0))


def _all_signs(images: int) -> Iterator[Array]:
    yield _signs((np.arange(2**images)[:, None] >> np.arange(images)) & 1)


def _random_signs(images: int, permutations: int, seed: int) -> Iterator[Array]:
    generator = np.random.default_rng(seed)
    step = max(1, FLIPS_AT_ONCE // images)
    for start in range(0, permutations, step):
        rows = min(step, permutations - start)
        packed = generator.integers(0, 256, (rows, (images + 7) // 8), dtype=np.uint8)
        yield _signs(np.unpackbits(packed, axis=1, count=images))


def _signs(bits: NDArray[Any]) -> Array:
    return 1.0 - 2.0 * bits.astype(np.float64)


def pairs_tested(tests: Mapping[str, Any], name: str) -> Mapping[str, Any] | None:
    """The test of all pairs of blocks of one metric in what `pair_tests` gives (or the same read from a file), or None."""
    test: Mapping[str, Any] | None = (tests.get(name) or {}).get("all_pairs")
    return test


def beyond_null(tested: Mapping[str, Any]) -> NDArray[np.bool_]:
    """Which pairs of blocks [blocks, blocks] that test found more alike than their null; False where q is undefined."""
    return np.array(tested["q"], dtype=np.float64) <= LEVEL
