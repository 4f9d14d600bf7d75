"""Which images the report shows: a few spread over the data, and in small those at both ends of the headline number."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from collapse_probe.data import ImageSet, seeded_order
from collapse_probe.extremes import pictured
from collapse_probe.overlay import as_seen, spread_out
from collapse_probe.processes import rank_and_world
from collapse_probe.stopping import FEWEST
from collapse_probe.subject import Preprocess

Pixels = NDArray[np.uint8]
LONGEST = 144  # pixels of a thumbnail's longer side


def wanted(images: ImageSet | Iterable[Any], count: int, seed: int | None) -> frozenset[str]:
    """The names of `count` images for the gallery; with a seed, of those that a run which may stop early reads in any case."""
    if isinstance(images, ImageSet):
        order = range(len(images)) if seed is None else seeded_order(images, seed)[:FEWEST]
        return spread_out([images.names[i] for i in order], count)
    return frozenset(str(i) for i in range(count))


def thumbnails(extremes: Mapping[str, Any], images: object, preprocess: Preprocess) -> dict[str, Pixels]:
    """The images that `extremes` pictures, by name, as the model saw them: uint8 [height, width, 3], LONGEST at most.

    They are read once more by name. Empty where they cannot be (a caller's own loader can be run through once), and in every
    process but the first, which alone writes the findings.
    """
    chosen = pictured(extremes)
    if chosen is None or not isinstance(images, ImageSet) or rank_and_world()[0] > 0:
        return {}
    places = {name: place for place, name in enumerate(images.names)}
    found = {}
    for name in (str(image["name"]) for end in ("highest", "lowest") for image in chosen[1][end]):
        try:
            picture = images[places[name]]
        except Exception:  # gone since the run read it; Pillow has no common base for its errors
            continue
        found[name] = _small(as_seen(preprocess.transform(picture).float(), preprocess.description))
    return found


def _small(picture: Pixels) -> Pixels:
    height, width = picture.shape[:2]
    scale = min(1.0, LONGEST / max(height, width))
    size = (max(round(width * scale), 1), max(round(height * scale), 1))
    return np.asarray(Image.fromarray(picture).resize(size, Image.Resampling.LANCZOS), dtype=np.uint8)
