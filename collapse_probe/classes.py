"""The headline numbers class by class, where the images have labels."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from scipy import stats

from collapse_probe.headlines import Array, Estimate, Kept
from collapse_probe.paired import controlled

FEWEST = 2
"""Images that a class must have for an interval."""
TEST = (
    "Welch's t test of a class against all other images, two-sided, on what each image contributes; q: Benjamini–Hochberg over "
    "the classes of a number"
)


def classes_of(kept: Kept, labels: Mapping[str, int] | None, class_names: Sequence[str] = ()) -> dict[str, Any]:
    """Every class' headline numbers, as plain data; {} where there are no labels or just one class.

    `names` and `images` of the classes; by number `value`, `ci_low`, `ci_high` (95 % t interval over the images of the
    class; kappa by the delta method), `p` and `q` of the class against the rest. NaN where a class has fewer than two images.
    """
    if labels is None:
        return {}
    of_image = np.array([labels.get(name, -1) for name in kept.names], dtype=np.int64)
    found = sorted(set(of_image[of_image >= 0].tolist()))
    if len(found) < FEWEST:
        return {}
    members = [np.flatnonzero(of_image == label) for label in found]
    by_class = [kept.only(chosen).estimates() if len(chosen) >= FEWEST else {} for chosen in members]
    return {
        "names": [class_names[label] if label < len(class_names) else str(label) for label in found],
        "images": [len(chosen) for chosen in members],
        "numbers": {
            name: _number(whole, [held.get(name) for held in by_class], members) for name, whole in kept.estimates().items()
        },
        "test": TEST,
    }


def _number(whole: Estimate, by_class: Sequence[Estimate | None], members: Sequence[Any]) -> dict[str, Any]:
    ends = [(math.nan, math.nan) if one is None else one.ci95 for one in by_class]
    p = _against_the_rest(whole, members)
    return {
        "value": [math.nan if one is None else one.value for one in by_class],
        "ci_low": [low for low, _ in ends],
        "ci_high": [high for _, high in ends],
        "p": p,
        "q": controlled(p),
    }


def _against_the_rest(whole: Estimate, members: Sequence[Any]) -> Array:
    """Welch's p-values [classes] of the images of a class against all others, from sums."""
    parts = whole.parts
    n = np.array([whole.defined[chosen].sum() for chosen in members], dtype=np.float64)
    total = np.array([parts[chosen].sum() for chosen in members])
    square = np.array([np.square(parts[chosen]).sum() for chosen in members])
    rest_n, rest_total, rest_square = whole.images - n, parts.sum() - total, np.square(parts).sum() - square
    with np.errstate(invalid="ignore", divide="ignore"):
        spread, rest_spread = (
            np.sqrt(np.maximum(squares - sums**2 / count, 0.0) / (count - 1))
            for count, sums, squares in ((n, total, square), (rest_n, rest_total, rest_square))
        )
        testable = (n >= FEWEST) & (rest_n >= FEWEST) & (spread + rest_spread > 0)
        p = np.full(len(n), np.nan)
        p[testable] = stats.ttest_ind_from_stats(
            *(side[testable] for side in (total / n, spread, n, rest_total / rest_n, rest_spread, rest_n)), equal_var=False
        ).pvalue
    return p
