"""How the headline numbers settle as images come in, and whether there were enough of them."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from collapse_probe.headlines import HEADLINES, SIMILARITY, Estimate, Kept
from collapse_probe.statistics import count_bounds, mean_parts, parts_stderr

Array = NDArray[np.float64]
SIZES = 20
COUNT, COUNT_ABOVE, COUNT_TOLERANCE = "similar_blocks", 0.9, 1.0
MOST_NEEDED = 10_000_000
"""Beyond so many images the estimate of how many would do says nothing."""


def sizes_for(images: int) -> list[int]:
    """About twenty numbers of images from 2 to all, evenly spaced in their logarithm; none for fewer than two images.

    >>> sizes_for(6)
    [2, 3, 4, 5, 6]
    """
    if images < 2:
        return []
    return sorted({round(size) for size in np.geomspace(2, images, SIZES).tolist()})


def convergence_of(kept: Kept, seed: int = 0) -> dict[str, Any]:
    """Running values and 95 % intervals of the headline numbers, as plain data; {} with fewer than two images.

    `sizes`: numbers of images. `numbers`: by name `value`, `ci_low` and `ci_high` at every size (NaN where undefined), the
    `half_width` at the end, the `tolerance` it is held against, whether it is `settled`, and `images_needed`: about how many
    images would bring it there (half-width falls with the root of their number; None for a count). `sentences`: what
    there were too few images for.
    """
    sizes = sizes_for(len(kept))
    order = np.random.default_rng(seed).permutation(len(kept))
    steps = [kept.only(order[:size]) if size < len(kept) else kept for size in sizes]
    running = [step.estimates() for step in steps]
    found = {name: _curve(name, [step.get(name) for step in running]) for name in (running[-1] if running else {})}
    if SIMILARITY in kept.values and steps:
        found[COUNT] = _count_curve(steps)
    if not found:
        return {}
    return {
        "sizes": sizes,
        "order": f"the first images of a shuffle with seed {seed}, so that a sorted data set does not bend the curves",
        "numbers": found,
        "sentences": [said for name, curve in found.items() if (said := _sentence(name, curve, len(kept)))],
    }


def _curve(name: str, running: list[Estimate | None]) -> dict[str, Any]:
    undefined = (math.nan, math.nan)
    ends = [undefined if step is None else step.ci95 for step in running]
    last = running[-1]
    assert last is not None
    return {
        "value": [math.nan if step is None else step.value for step in running],
        "ci_low": [low for low, _ in ends],
        "ci_high": [high for _, high in ends],
        **_settled(last.half_width, HEADLINES[name].tolerance, last.images),
    }


def _settled(half_width: float, tolerance: float, images: int | None) -> dict[str, Any]:
    needed = None
    if images is not None and math.isfinite(half_width):
        needed = min(max(math.ceil(images * (half_width / tolerance) ** 2), 2), MOST_NEEDED)
    settled = bool(half_width <= tolerance)
    return {"half_width": half_width, "tolerance": tolerance, "settled": settled, "images_needed": needed}


def _count_curve(steps: list[Kept]) -> dict[str, Any]:
    """The count of similar blocks with the bounds that similar-blocks has."""
    values, ends = [], []
    for step in steps:
        means, parts, defined = mean_parts(step.values[SIMILARITY])
        values.append(float((means > COUNT_ABOVE).sum()))
        ends.append(count_bounds(means, parts_stderr(parts, defined.sum(0)), defined.sum(0), COUNT_ABOVE).tolist())
    low, high = ends[-1]
    return {
        "value": values,
        "ci_low": [low for low, _ in ends],
        "ci_high": [high for _, high in ends],
        **_settled((high - low) / 2, COUNT_TOLERANCE, None),
    }


def _sentence(name: str, curve: Mapping[str, Any], images: int) -> str:
    """What there were too few images for; empty where the interval is narrow enough."""
    if curve["settled"]:
        return ""
    words, unit = (HEADLINES[name].words, HEADLINES[name].unit) if name in HEADLINES else ("number of similar blocks", "")
    unit = f" {unit}" if unit else ""
    if not math.isfinite(curve["half_width"]):
        return f"Too few images to tell the {words}: {images} give no interval."
    said = (
        f"Too few images to tell the {words} to within ± {curve['tolerance']:g}{unit}: with {images} images its 95 % "
        f"interval is ± {curve['half_width']:.2g}{unit}"
    )
    needed = curve["images_needed"]
    return said + (f"; about {needed} would do." if needed is not None and needed < MOST_NEEDED else ".")
