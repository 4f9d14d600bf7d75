"""The attention gallery: the map of every block laid over the picture, on one scale for all of them."""

from __future__ import annotations

import io
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
from PIL import Image

from collapse_probe.report.colours import SHADES, Ramp, ramp
from collapse_probe.report.photographs import Album, Photographs, Pixels, data_url, resized
from collapse_probe.report.style import printable
from collapse_probe.results.findings import Findings, Gallery
from collapse_probe.results.text import number, visible
from collapse_probe.statistics.breakdowns import pictured
from collapse_probe.statistics.estimates import per_image_values
from collapse_probe.statistics.intervals import Array

FOLD = 8.0  # the scale runs from 1/8 to 8 times uniform attention
MOST_PICTURES, MOST_ROLLED, MOST_SHOTS = 4, 2, 3
LONGEST = 320  # pixels of a picture on the page
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


LEVELS = 64  # colours of a map: eleven steps for each doubling
FLAT = (
    1.25  # maps that nowhere give a patch more than so many times, or less than one over that, uniform attention are not drawn
)


@dataclass(frozen=True)
class Shot:
    """One image of the gallery: its picture, and one small picture of all its maps, tile beside tile.

    Column b of the tiles is block b; row 0 is the mean over heads, then comes each head, then each cell of patches.
    """

    name: str
    place: str
    picture: str
    size: tuple[int, int]
    tiles: str


@dataclass(frozen=True)
class Player:
    """The attention gallery: for every image the maps of all blocks, and with a script block, head or patch to choose."""

    shots: tuple[Shot, ...]
    blocks: tuple[int, ...]
    grid: tuple[int, int]
    heads: int
    cells: tuple[int, int]
    query: str
    ticks: tuple[tuple[float, str], ...]
    pooled: bool
    album: Callable[[], Photographs]
    name: str = "figure"
    suffix = "jpg"

    def called(self, name: str) -> Player:
        """The same under a name."""
        return replace(self, name=name)

    @property
    def rows(self) -> int:
        """Tiles from top to bottom."""
        return 1 + self.heads + self.cells[0] * self.cells[1]

    @property
    def stops(self) -> list[tuple[str, str]]:
        """The colours along the scale, as a page's gradient takes them."""
        return [(f"{100 * at:.0f}%", SHADES_OVER_GREY.codes[round(at * 255)]) for at in np.linspace(0, 1, 13).tolist()]

    def content(self) -> bytes:
        """The maps of all blocks over the pictures, as one picture of photographs."""
        return self.album().content()


def attention_gallery(findings: Findings) -> Player | None:
    """Each picture and the maps of every block that has one over it, all on one scale; None where no map leaves uniform."""
    gallery = findings.gallery
    if gallery is None or not gallery.names or is_flat(findings):
        return None
    order = chosen(findings)
    maps = times_uniform(findings, gallery)
    spread, scale = spread_of(maps[list(order)]), float(findings.model.get("tokens") or maps[0, 0].size)
    heads = gallery.maps[:, :, None][:, :, :0] if gallery.heads is None else gallery.heads
    patches = gallery.patches
    rows, columns = heads.shape[-2:]
    cells = (0, 0) if patches is None else (int(patches.shape[2]), int(patches.shape[3]))
    shots = []
    for at, place in order.items():
        parts = [_fitted(gallery.maps[at], (rows, columns))[:, None], heads[at]]
        parts += [] if patches is None else [patches[at].reshape(len(patches[at]), -1, rows, columns)]
        tiles = spread.place(scale * np.concatenate(parts, 1))  # [blocks, tiles, rows, columns]
        sheet = tiles.transpose(1, 2, 0, 3).reshape(tiles.shape[1] * rows, -1)
        small = resized(gallery.pictures[at], _within(gallery.pictures.shape[1:3]))
        url = data_url(_jpeg(small), "jpeg")
        shots.append(
            Shot(visible(gallery.names[at]), place, url, (small.shape[1], small.shape[0]), data_url(_png(sheet), "png"))
        )
    pooled = (rows, columns) != gallery.maps.shape[-2:]
    blocks = gallery.blocks or tuple(range(gallery.maps.shape[1]))
    ticks = tuple((100 * (at + 1) / 2, text) for at, text in spread.ticks.items())
    whole = replace(gallery, **{key: getattr(gallery, key)[list(order)] for key in ("pictures", "maps")})
    whole = replace(whole, names=tuple(gallery.names[at] for at in order))
    album = partial(_laid_over, findings, whole, ATTENTION)
    return Player(tuple(shots), blocks, (rows, columns), heads.shape[2], cells, gallery.query, ticks, pooled, album)


def chosen(findings: Findings) -> dict[int, str]:
    """The images to show, by their places in the gallery, and why: where they lie by the headline number."""
    gallery = findings.gallery
    assert gallery is not None
    found = pictured(findings.sureness.get("extremes") or {})
    values = {} if found is None else _values(findings, found[0])
    known = {at: values[name] for at, name in enumerate(gallery.names) if name in values}
    if found is None or len(known) < MOST_SHOTS:
        return dict.fromkeys(range(min(len(gallery.names), MOST_SHOTS)), "")
    name, entry = found
    median, low = float(entry["median"]), entry["collapsed"] == "low"
    most, least = (choose(known, key=known.__getitem__) for choose in ((min, max) if low else (max, min)))
    typical = min(known, key=lambda at: (at in (most, least), abs(known[at] - median)))
    said = {typical: "closest to the median", most: "most collapsed", least: "least collapsed"}
    words = {"kappa_adjacent": "κ", "attention_similarity_adjacent": "raw similarity"}.get(name, "patch diversity")
    of = f"of the {len(known)} images kept"
    return {at: f"{why} {of}: {words} {number(known[at])}, median of all {number(median)}" for at, why in said.items()}


def _values(findings: Findings, name: str) -> dict[str, float]:
    """The headline number of every image, by its name."""
    each = per_image_values(findings.images).each().get(name) if "names" in findings.images else None
    if each is None:
        return {}
    pairs = zip(map(str, findings.images["names"]), each.tolist(), strict=True)
    return {image: value for image, value in pairs if math.isfinite(value)}


def is_flat(findings: Findings) -> bool:
    """Whether no map of the gallery, of a head neither, shows anything but uniform attention."""
    gallery = findings.gallery
    if gallery is None or not gallery.names:
        return False
    scale = float(findings.model.get("tokens") or gallery.maps[0, 0].size)
    parts = [part for part in (gallery.maps, gallery.heads) if part is not None]
    ends = [float(choose(scale * part)) for part in parts for choose in (np.nanmin, np.nanmax) if part.size]
    return bool(ends) and min(ends) > 1 / FLAT and max(ends) < FLAT


def _fitted(maps: Array, shape: tuple[int, int]) -> Array:
    """Maps [blocks, rows, columns] as means over the squares that `shape` leaves."""
    if maps.shape[1:] == shape:
        return maps
    side = -(-maps.shape[1] // shape[0])
    more = (0, shape[0] * side - maps.shape[1]), (0, shape[1] * side - maps.shape[2])
    padded = np.pad(maps, ((0, 0), *more), constant_values=np.nan)
    return np.asarray(np.nanmean(padded.reshape(len(maps), shape[0], side, shape[1], side), (2, 4)))


def _within(shape: tuple[int, ...]) -> tuple[int, int]:
    height, width = shape[:2]
    scale = min(LONGEST / max(height, width), 1.0)
    return max(round(width * scale), 1), max(round(height * scale), 1)


def _jpeg(picture: Pixels) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(picture).save(buffer, "jpeg", quality=78, optimize=True)
    return buffer.getvalue()


def _png(positions: Array) -> bytes:
    """Positions in −1 … 1 as a small picture of LEVELS colours, which covers what lies beneath as far as `COVER` says."""
    steps = np.round((np.nan_to_num(positions) + 1) / 2 * (LEVELS - 1)).astype(np.uint8)
    places = np.linspace(0, SHADES - 1, LEVELS).round().astype(int)
    picture = Image.fromarray(steps, "P")
    picture.putpalette(COLOURS.table[places].tobytes())
    buffer = io.BytesIO()
    picture.save(buffer, "png", optimize=True, transparency=bytes((255 * COVER[places]).round().astype(np.uint8)))
    return buffer.getvalue()


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
