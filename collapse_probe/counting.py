"""Similar blocks of two subjects: both counts, and how sure their difference is over images."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from collapse_probe.findings import Findings
from collapse_probe.metrics.attention.similar_blocks import CORRECTED_ABOVE, count_above, count_corrected
from collapse_probe.statistics import bootstrap

Array = NDArray[np.float64]
Indices = NDArray[np.int64]
Draw = Callable[[Indices], Array]

NULL, KAPPA = "/other_token", "/kappa"
"""What stands behind a metric's name where images.npz holds its null, and where a comparison holds its
kappa.
"""


@dataclass(frozen=True)
class CountDifference:
    """Similar blocks of two subjects at one threshold: the counts, and the bootstrap interval of second −
    first.
    """

    name: str
    threshold: float
    first: float
    second: float
    ci95: tuple[float, float]


def count_differences(first: Findings, second: Findings, names: Iterable[str], seed: int = 0) -> list[CountDifference]:
    """The counts among the metrics `names` of two findings on the same images in the same order.

    Undefined ends where the findings hold no values of single images, or one image only.
    """
    found: list[CountDifference] = []
    for name in names:
        base, *variant = name.split("@")
        if base == "similar-blocks":
            source = "@".join(["attention-similarity", *variant])
            found += _of_metric(name, source, first, second, seed)
    return found


def _of_metric(name: str, source: str, first: Findings, second: Findings, seed: int) -> Iterable[CountDifference]:
    one, other = first.metrics[name], second.metrics[name]
    assert one.values is not None
    assert other.values is not None
    real = [f.images.get(source) for f in (first, second)]
    null = [f.images.get(source + NULL) for f in (first, second)]
    images = len(first.images.get("names", ()))
    for at, threshold in enumerate(one.settings["thresholds"]):
        draw = None if real[0] is None or real[1] is None else _raw(real[0].T, real[1].T, threshold)
        ends = _ends(draw, images, seed)
        yield CountDifference(name, float(threshold), float(one.values[at]), float(other.values[at]), ends)
    counts = [reading.settings.get("corrected", {}).get("value") for reading in (one, other)]
    if None not in counts:
        held = [part.T for part in (*real, *null) if part is not None]
        draw = _corrected(*held) if len(held) == 4 else None
        ends = _ends(draw, images, seed)
        yield CountDifference(name + KAPPA, CORRECTED_ABOVE, float(counts[0]), float(counts[1]), ends)


def _raw(first: Array, second: Array, threshold: float) -> Draw:
    """The difference of the counts for drawn images; both arguments [pairs, images]."""
    return lambda chosen: count_above(second[:, chosen], threshold) - count_above(first[:, chosen], threshold)


def _corrected(first: Array, second: Array, first_null: Array, second_null: Array) -> Draw:
    def draw(chosen: Indices) -> Array:
        one = count_corrected(first[:, chosen], first_null[:, chosen])
        return count_corrected(second[:, chosen], second_null[:, chosen]) - one

    return draw


def _ends(draw: Draw | None, images: int, seed: int) -> tuple[float, float]:
    if draw is None or images < 2:
        return float("nan"), float("nan")
    _, bounds = bootstrap(draw, images, seed)
    return float(bounds[0]), float(bounds[1])
