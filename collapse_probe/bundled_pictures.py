"""Real pictures that come with scikit-learn and scikit-image, so that a first run needs no network."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from PIL import Image

from collapse_probe.errors import DataError, UnknownNameError
from collapse_probe.pictures import Pictures

Pixels = npt.NDArray[np.uint8]

SIDE = 224  # no crop of a photograph is smaller, in pixels
GRID = (2, 3)  # and no photograph is cut finer: rows, columns
SCIKIT_IMAGE = (
    "astronaut",
    "brick",
    "camera",
    "cat",
    "coffee",
    "coins",
    "grass",
    "gravel",
    "hubble_deep_field",
    "moon",
    "rocket",
)
SCIKIT_LEARN = ("china", "flower")


@dataclass(frozen=True)
class _ArrayReader:
    arrays: tuple[Pixels, ...]  # each [height, width] or [height, width, 3]

    def __call__(self, index: int) -> Image.Image:
        return Image.fromarray(np.ascontiguousarray(self.arrays[index])).convert("RGB")


def digits() -> Pictures:
    """scikit-learn's 1797 handwritten digits, 8×8 greys stretched from 0..16 to 0..255, with their labels."""
    from sklearn.datasets import load_digits

    held = load_digits()
    greys = np.round(held.images * (255 / 16)).astype(np.uint8)
    labels = tuple(int(label) for label in held.target)
    names = tuple(f"{label}/{i:04d}.png" for i, label in enumerate(labels))
    classes = tuple(str(name) for name in held.target_names)
    return Pictures(names, _ArrayReader(tuple(greys)), labels, classes, bundled=True)


def photos() -> Pictures:
    """53 square crops, at least 224 pixels wide, of 13 photographs; no labels.

    Each photograph gives its largest centred square, then the squares of a grid of at most 2×3 cells (fewer
    where a cell would fall under 224 pixels): two scales, and no overlap within one.
    """
    crops = [(f"{name}/{i}.png", crop) for name, photo in _photographs() for i, crop in enumerate(_squares(photo))]
    names = tuple(name for name, _ in crops)
    return Pictures(names, _ArrayReader(tuple(crop for _, crop in crops)), bundled=True)


def _photographs() -> Iterator[tuple[str, Pixels]]:
    import skimage.data
    from sklearn.datasets import load_sample_image

    for name in SCIKIT_IMAGE:
        yield name, getattr(skimage.data, name)()
    for name in SCIKIT_LEARN:
        yield name, load_sample_image(f"{name}.jpg")


def _squares(photo: Pixels) -> Iterator[Pixels]:
    height, width = photo.shape[:2]
    fine = (min(GRID[0], height // SIDE), min(GRID[1], width // SIDE))
    for rows, columns in [(1, 1)] + [fine] * (fine != (1, 1)):
        side = min(height // rows, width // columns)
        for row in range(rows):
            for column in range(columns):
                top = (2 * row + 1) * height // (2 * rows) - side // 2
                left = (2 * column + 1) * width // (2 * columns) - side // 2
                yield photo[top : top + side, left : left + side]


BUNDLED: dict[str, Callable[[], Pictures]] = {"digits": digits, "photos": photos}


def bundled(name: str) -> Pictures:
    """The bundled set of that name. Raises UnknownNameError, or DataError without the extra `demo`."""
    if name not in BUNDLED:
        raise UnknownNameError(f"no bundled data called {name!r}; there are {', '.join(BUNDLED)}")
    try:
        return BUNDLED[name]()
    except ImportError as error:
        way_out = 'pip install "collapse-probe[demo]"'
        raise DataError(f"bundled:{name} needs scikit-learn and scikit-image ({error}); {way_out}") from error
    except OSError as error:  # scikit-image would have to download
        raise DataError(f"bundled:{name} cannot be loaded: {error}") from error
