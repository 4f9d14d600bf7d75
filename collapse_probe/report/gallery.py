"""The attention gallery: the map of every block laid over the picture, on one scale for all of them."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, replace

import numpy as np
from PIL import Image

from collapse_probe.report.colours import SHADES, Ramp, ramp
from collapse_probe.report.photographs import Album, Photographs, Pixels, resized
from collapse_probe.report.style import printable
from collapse_probe.results.findings import Findings, Gallery
from collapse_probe.statistics.intervals import Array

FOLD = 8.0  # the scale runs from 1/8 to 8 times uniform attention
MOST_PICTURES, MOST_ROLLED = 4, 2
TILE, SMALL_TILE, MANY = 150, 116, 12  # pixels of a map's longer side, and where there are more blocks than MANY
COLOURS = ramp("1d4f9c 6ea4da f2f2f2 f39a3b b3200c")
ATTENTION = "attention to a patch, times uniform attention (1/N)"
ROLLOUT = "rollout from a patch, times an even share (1/N)"
STRENGTH = (0.72, 0.9)  # how far the strongest blue, the strongest red covers the picture
PLACES = np.linspace(-1.0, 1.0, SHADES)
COVER = np.where(PLACES < 0, STRENGTH[0], STRENGTH[1]) * np.abs(PLACES)
"""How far each position covers the picture."""


@dataclass(frozen=True)
class Spread:
    """How a map's value becomes a position in −1 … 1: by doublings around uniform, or linear around 0."""

    signed: bool
    limit: float

    def place(self, times_uniform: Array) -> Array:
        """Times uniform -> −1 … 1, clipped at the ends; NaN stays."""
        if self.signed:
            return np.asarray(np.clip(times_uniform / self.limit, -1.0, 1.0))
        low = np.maximum(times_uniform, 1.0 / self.limit)
        return np.asarray(np.clip(np.log(low) / math.log(self.limit), -1.0, 1.0))

    @property
    def ticks(self) -> dict[float, str]:
        """Positions on the colour bar with their labels."""
        if self.signed:
            return {-1.0: f"−{self.limit:g}×", 0.0: "0", 1.0: f"{self.limit:g}×"}
        return {-1.0: "1/8", -2 / 3: "1/4", -1 / 3: "1/2", 0.0: "1", 1 / 3: "2", 2 / 3: "4", 1.0: "8"}


def times_uniform(findings: Findings, gallery: Gallery) -> Array:
    """The maps, whose rows sum to one over all N tokens, in units of uniform attention (1/N): 1 is what a uniform map pays."""
    return np.asarray(gallery.maps * float(findings.model.get("tokens") or gallery.maps[0, 0].size))


def spread_of(maps: Array) -> Spread:
    """By doublings up to 8 times uniform; for maps with negative entries linear, to the 99th percentile."""
    finite = maps[np.isfinite(maps)]
    if not (finite < 0).any():
        return Spread(False, FOLD)
    reach = max(float(np.quantile(np.abs(finite), 0.99)), 1e-6)
    step = 10.0 ** math.floor(math.log10(reach))
    return Spread(True, math.ceil(reach / step) * step)


def overlays(picture: Pixels, maps: Iterable[Array]) -> list[Pixels]:
    """Each of `maps` [rows, columns], positions in −1 … 1, coloured and laid over the grey `picture` [height, width, 3]."""
    height, width = picture.shape[:2]
    grey = picture.astype(np.float32) @ np.array([0.299, 0.587, 0.114], dtype=np.float32)
    base = (0.38 * 255 + 0.6 * grey)[..., None]
    colours = (COLOURS.table * COVER[:, None]).astype(np.float32)
    clear = (1 - COVER).astype(np.float32)[:, None]
    found = []
    for positions in maps:
        small = Image.fromarray(np.nan_to_num(positions).astype(np.float32))
        smooth = np.asarray(small.resize((width, height), Image.Resampling.BILINEAR))
        at = COLOURS.index((smooth + 1) / 2)
        found.append((base * clear[at] + colours[at]).astype(np.uint8))
    return found


def _over_grey() -> Ramp:
    """How positions look over a picture that is evenly grey."""
    mixed = 0.75 * 255 * (1 - COVER[:, None]) + COLOURS.table * COVER[:, None]
    return Ramp(tuple("{:02x}{:02x}{:02x}".format(*each) for each in mixed.round().astype(int).tolist()))


SHADES_OVER_GREY = _over_grey()


def attention_gallery(findings: Findings) -> Photographs | None:
    """Each picture and then the map of every block that has one over the picture, all on one scale."""
    gallery = findings.gallery
    return _laid_over(findings, gallery, ATTENTION) if gallery is not None and gallery.names else None


def rollout_gallery(findings: Findings) -> Photographs | None:
    """Each picture and then, laid over it, what attention rollout has gathered up to every block."""
    gallery = findings.gallery
    if gallery is None or gallery.rollouts is None or not gallery.names:
        return None
    return _laid_over(findings, replace(gallery, maps=gallery.rollouts[:MOST_ROLLED]), ROLLOUT)


def _laid_over(findings: Findings, gallery: Gallery, unit: str) -> Photographs:
    maps = times_uniform(findings, gallery)[:MOST_PICTURES]
    spread, blocks = spread_of(maps), maps.shape[1]
    album = Album(8 if blocks > MANY else max(min(6, blocks), 4), tile_of(gallery.pictures.shape[1:3], blocks), large=True)
    for at, positions in enumerate(spread.place(maps)):
        name, picture = printable(gallery.names[at], 90), gallery.pictures[at]
        album.heading(name)
        tiles = overlays(resized(picture, (album.wide, album.tall)), positions)
        album.strip(name, "", picture, tiles, gallery.blocks or range(blocks))
    album.bar(SHADES_OVER_GREY, spread.ticks, unit)
    return album.photographs()


def tile_of(shape: tuple[int, ...], blocks: int) -> tuple[int, int]:
    """Width and height in pixels of a map over a picture of `shape` (height, width)."""
    side = TILE if blocks <= MANY else SMALL_TILE
    height, width = shape
    return max(round(side * min(width / height, 1.0)), 1), max(round(side * min(height / width, 1.0)), 1)
