"""The colours of heatmaps, as tables of their own: the library that they come from costs more to import than a page to draw."""

from __future__ import annotations

import functools
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from collapse_probe.statistics.intervals import Array

SHADES = 256
ANCHORS = 52  # of a part of a ramp
LIGHT = 0.245  # a relative luminance from which white and ink, of 0.033, are equally far


@dataclass(frozen=True)
class Ramp:
    """Colours between 0 and 1: between its anchors, evenly spaced and given as RRGGBB, they are mixed evenly."""

    anchors: tuple[str, ...]

    @functools.cached_property
    def table(self) -> NDArray[np.uint8]:
        """Red, green and blue of SHADES even steps, [SHADES, 3]."""
        known = np.array([[int(anchor[at : at + 2], 16) for at in (0, 2, 4)] for anchor in self.anchors], dtype=np.float64)
        places = np.linspace(0, len(known) - 1, SHADES)
        mixed = [np.interp(places, np.arange(len(known)), channel) for channel in known.T]
        return np.stack(mixed, 1).round().astype(np.uint8)

    @functools.cached_property
    def codes(self) -> tuple[str, ...]:
        """The same as `#rrggbb`."""
        return tuple("#{:02x}{:02x}{:02x}".format(*each) for each in self.table.tolist())

    @functools.cached_property
    def dark(self) -> tuple[bool, ...]:
        """Whether white letters stand out more than dark ones: where the relative luminance (WCAG) is at most LIGHT."""
        share = self.table / 255
        linear = np.where(share <= 0.03928, share / 12.92, ((share + 0.055) / 1.055) ** 2.4)
        return tuple((linear @ [0.2126, 0.7152, 0.0722] <= LIGHT).tolist())

    def index(self, positions: Array) -> NDArray[np.intp]:
        """The steps of `table` that positions in 0 … 1 fall on, clipped at the ends; NaN counts as 0."""
        return np.clip(np.nan_to_num(positions) * (SHADES - 1), 0, SHADES - 1).round().astype(np.intp)

    def spread(self, count: int) -> list[str]:
        """`count` codes along the ramp, its two ends left out."""
        return [self.codes[at] for at in self.index(np.arange(1, count + 1) / (count + 1)).tolist()]

    def before(self, other: Ramp) -> Ramp:
        """A ramp that comes from the end of this one to its start, where `other` begins: two of as many anchors."""
        return Ramp((*self.anchors[::-1], *other.anchors[1:]))

    def upto(self, end: float) -> Ramp:
        """The ramp from its start to the position `end`."""
        return Ramp(tuple(self.codes[at][1:] for at in self.index(np.linspace(0, end, ANCHORS)).tolist()))


def ramp(anchors: str) -> Ramp:
    """A ramp of anchors with blanks between them."""
    return Ramp(tuple(anchors.split()))


AMBER = ramp("def5e5 efe6c9 f3cf9d eeb16c e09144 cb7228 ad5716 8a400d 66300c 4a260d")
"""From the first colour of MAKO to dark amber."""

# seaborn's mako_r, vlag and flare
MAKO = ramp(
    "def5e5 d4f1dc caedd4 c0e9cc b5e5c4 a9e1bd 9cdeb7 8edbb3 7fd7af 70d4ad 62cfac 57cbad 4fc5ad "
    "48c0ad 43baad 3fb5ad 3bafad 38aaac 36a4ab 359fab 3499aa 3493a8 348ea7 3488a6 3483a5 357da3 "
    "3578a2 3572a1 366ca0 37669e 38619d 3a5b9b 3c5598 3e4f94 40498e 414387 413e7f 403a76 3f366d "
    "3d3164 3b2d5b 382953 35254a 312142 2e1e39 291a31 251729 201322 1b0f1a 160b13 11070c 0b0405"
)
VLAG = ramp(
    "2369bd 316fbc 3d74bc 4879bc 517fbc 5b84bd 6489be 6c8ebf 7594c0 7d99c2 859ec4 8da4c6 95a9c8 "
    "9dafcb a5b5ce adbbd1 b5c0d4 bdc6d7 c5cddb cdd3df d5d9e3 dde0e7 e6e6ec eeedf0 f5f2f4 f9f5f5 "
    "faf4f3 f9efee f6e8e7 f2e0df efd8d6 ebd0ce e7c8c6 e4c0be e1b9b6 deb1ae daa9a7 d7a29f d49a97 "
    "d19290 ce8b88 cb8481 c87c7a c57572 c16d6b be6664 bb5e5d b75756 b44f4f b04748 ac3f42 a9373b"
)
FLARE = ramp(
    "edb081 edab7e eca67b eca178 eb9c75 eb9872 ea936f ea8e6c e98969 e88466 e87f64 e77a62 e67560 "
    "e5705e e36b5d e2665c e0615c de5d5c dc585c da545d d7505e d44c60 d04962 cc4663 c84465 c44267 "
    "c04068 bb3f6a b63d6b b13c6c ad3b6d a8396e a3386f 9f376f 9a3670 953470 913371 8c3271 873171 "
    "833070 7e2f70 792e6f 752d6f 702c6e 6b2b6c 662a6b 62296a 5d2868 582766 542665 4f2463 4b2362"
)
