"""Which images collapse most, and which least."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from collapse_probe.headlines import HEADLINES, Kept

EACH_SIDE = 5
WARNING = (
    "These are the ends of {images} sorted values, not typical ones: the most extreme of many images lies far out even where "
    "all images are alike, and further out the more images there are. Read them as examples to look at."
)
PICTURED = ("kappa_adjacent", "attention_similarity_adjacent", "patch_diversity_last")
"""The number whose ends are shown as pictures: the first of these that the images define."""


def extremes_of(kept: Kept) -> dict[str, Any]:
    """Names and values of the images with the highest and lowest headline numbers, as plain data; {} with fewer than two.

    By number: `highest` and `lowest`, up to five each (no image in both) with the outermost first, each {name, value};
    `median`; `images`; `collapsed`, the end that is the sick one. An image's kappa is the mean of its own over adjacent pairs.
    """
    found: dict[str, Any] = {}
    for name, values in kept.each().items():
        order = np.argsort(values, kind="stable")
        order = order[np.isfinite(values[order])]
        count = min(EACH_SIDE, len(order) // 2)
        if not count:
            continue
        found[name] = {
            "highest": [{"name": kept.names[i], "value": float(values[i])} for i in order[::-1][:count]],
            "lowest": [{"name": kept.names[i], "value": float(values[i])} for i in order[:count]],
            "median": float(np.median(values[order])),
            "images": len(order),
            "collapsed": HEADLINES[name].collapsed,
        }
    return {"numbers": found, "warning": WARNING.format(images=len(kept))} if found else {}


def pictured(extremes: Mapping[str, Any]) -> tuple[str, Mapping[str, Any]] | None:
    """The number whose images at both ends the report shows and its entry in what `extremes_of` gave; None where there is none.

    >>> pictured({"numbers": {"patch_diversity_last": {"images": 4}, "kappa_adjacent": {"images": 3}}})
    ('kappa_adjacent', {'images': 3})
    """
    numbers: Mapping[str, Any] = extremes.get("numbers") or {}
    return next(((name, numbers[name]) for name in PICTURED if name in numbers), None)
