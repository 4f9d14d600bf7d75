"""Similar blocks of two subjects: both counts, and how sure their difference is over images."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from collapse_probe.findings import Findings
from collapse_probe.metrics.attention.similar_blocks import CORRECTED_ABOVE
from collapse_probe.statistics import Parts, count_difference_bounds, kappa_parts, mean_parts

Array = NDArray[np.float64]

NULL, KAPPA = "/other_token", "/kappa"
"""What stands behind a metric's name where images.npz holds its null, and where a comparison holds its
kappa.
"""


@dataclass(frozen=True)
class CountDifference:
    """Similar blocks of two subjects at one threshold: the counts, and the interval of second − first, which covers at least
    95 % (`count_difference_bounds`).
    """

    name: str
    threshold: float
    first: float
    second: float
    ci95: tuple[float, float]


def count_differences(first: Findings, second: Findings, names: Iterable[str]) -> list[CountDifference]:
    """The counts among the metrics `names` of two findings on the same images in the same order.

    Undefined ends where the findings hold no values of single images, or one image only.
    """
    found: list[CountDifference] = []
    for name in names:
        base, *variant = name.split("@")
        if base == "similar-blocks":
            source = "@".join(["attention-similarity", *variant])
            found += _of_metric(name, source, first, second)
    return found


def _of_metric(name: str, source: str, first: Findings, second: Findings) -> Iterable[CountDifference]:
    one, other = first.metrics[name], second.metrics[name]
    assert one.values is not None
    assert other.values is not None
    real = [f.images[source] for f in (first, second) if source in f.images]
    null = [f.images[source + NULL] for f in (first, second) if source + NULL in f.images]
    for at, threshold in enumerate(one.settings["thresholds"]):
        ends = _ends([mean_parts(values) for values in real], threshold)
        yield CountDifference(name, float(threshold), float(one.values[at]), float(other.values[at]), ends)
    counts = [reading.settings.get("corrected", {}).get("value") for reading in (one, other)]
    if None not in counts:
        sides = [kappa_parts(*held) for held in zip(real, null, strict=True)] if len(real) == len(null) == 2 else []
        ends = _ends(sides, CORRECTED_ABOVE)
        yield CountDifference(name + KAPPA, CORRECTED_ABOVE, float(counts[0]), float(counts[1]), ends)


def _ends(sides: Sequence[Parts], above: float) -> tuple[float, float]:
    """The interval of the second's count less the first's; NaN without both, or with fewer than two images."""
    if len(sides) != 2 or len(sides[0][1]) < 2:
        return float("nan"), float("nan")
    low, high = count_difference_bounds(sides[0], sides[1], above)
    return float(low), float(high)
