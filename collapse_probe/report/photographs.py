"""Photographs with maps laid over them: one picture for a whole figure, whose parts the page places as there is room."""

from __future__ import annotations

import base64
import functools
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
from matplotlib.font_manager import FontProperties, findfont
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from collapse_probe.files import MADE_BY
from collapse_probe.report.colours import Ramp
from collapse_probe.report.sheet import INK

Pixels = NDArray[np.uint8]
GAP, BAND = 6, 30  # pixels between tiles, and for a line of words
BAR = (640, 14, 76)  # width and height of a colour bar, and the height of all that belongs to it
QUALITIES = (84, 74, 62, 48, 34, 20)
MOST_BYTES = 250_000
WORDS, NUMBERS = 20, 20  # pixels of letters


@dataclass(frozen=True)
class Window:
    """A part of the picture, in pixels, and what is seen there; a `large` one takes the room of four."""

    x: int
    y: int
    width: int
    height: int
    words: str
    large: bool = False

    @property
    def box(self) -> str:
        """Its `viewBox`."""
        return f"{self.x} {self.y} {self.width} {self.height}"


@dataclass(frozen=True)
class Strip:
    """Tiles that belong together under a heading: a photograph as the model sees it, then its maps; `note` says whose."""

    heading: str
    note: str
    windows: tuple[Window, ...]

    @property
    def label(self) -> str:
        """What it shows, in words."""
        whose = f", {self.note}" if self.note else ""
        return f"{self.heading}{whose}: {self.windows[0].words}, then {self.windows[1].words} to {self.windows[-1].words}"


@dataclass(frozen=True)
class Photographs:
    """A figure of photographs: one picture, whose parts are `strips` and colour `bars`. `name` begins its id."""

    picture: Pixels
    strips: tuple[Strip, ...]
    bars: tuple[Window, ...]
    name: str = "figure"
    suffix = "jpg"

    def called(self, name: str) -> Photographs:
        """The same under a name."""
        return replace(self, name=name)

    @functools.cached_property
    def file(self) -> bytes:
        """The picture as JPEG, in the best quality that MOST_BYTES hold."""
        picture = Image.fromarray(self.picture)
        for quality in QUALITIES:
            buffer = io.BytesIO()
            picture.save(buffer, "jpeg", quality=quality, optimize=True, comment=MADE_BY.encode())
            if buffer.tell() <= MOST_BYTES:
                break
        return buffer.getvalue()

    def content(self) -> bytes:
        """All of it as one file, which the page holds too."""
        return self.file

    @property
    def url(self) -> str:
        """The file as a data URL."""
        return data_url(self.file, "jpeg")

    @property
    def width(self) -> int:
        """Pixels from left to right."""
        return int(self.picture.shape[1])

    @property
    def height(self) -> int:
        """Pixels from top to bottom."""
        return int(self.picture.shape[0])


class Album:
    """Puts tiles and words on one white picture, from the top down; the photograph stands left of its maps."""

    def __init__(self, columns: int, tile: tuple[int, int], large: bool) -> None:
        self.columns, (self.wide, self.tall), self.large = columns, tile, large
        self.across = columns + (2 if large else 1)
        self.width = max(self.across * (self.wide + GAP) + GAP, BAR[0] + 2 * BAND)
        self.rows: list[Pixels] = []
        self.top = 0
        self.strips: list[Strip] = []
        self.bars: list[Window] = []

    def _add(self, height: int) -> Pixels:
        row = np.full((height, self.width, 3), 255, dtype=np.uint8)
        self.rows.append(row)
        self.top += height
        return row

    def heading(self, text: str) -> None:
        """A line of words."""
        row = self._add(BAND)
        row[:] = written(row, [(text, GAP, BAND / 2, "lm")])

    def strip(self, heading: str, note: str, photograph: Pixels, maps: Sequence[Pixels], numbers: Sequence[int]) -> None:
        """A photograph and the maps of its blocks, each with its number."""
        top, rows = self.top, max(-(-len(maps) // self.columns), 2 if self.large else 1)
        row = self._add(rows * (self.tall + GAP))
        span = 2 if self.large else 1
        size = (span * self.wide + (span - 1) * GAP, span * self.tall + (span - 1) * GAP)
        row[: size[1], GAP : GAP + size[0]] = resized(photograph, size)
        windows = [Window(GAP, top, *size, "the picture", self.large)]
        said = []
        for at, (tile, number) in enumerate(zip(maps, numbers, strict=True)):
            down, along = divmod(at, self.columns)
            x, y = GAP + (span + along) * (self.wide + GAP), down * (self.tall + GAP)
            row[y : y + self.tall, x : x + self.wide] = tile
            said.append((str(number), x + 4, y + 3, "la"))
            windows.append(Window(x, top + y, self.wide, self.tall, f"block {number}"))
        row[:] = written(row, said, boxed=True)
        self.strips.append(Strip(heading, note, tuple(windows)))

    def bar(self, colours: Ramp, ticks: Mapping[float, str], label: str) -> None:
        """A colour bar with words at positions from −1 to 1, and what it measures beneath."""
        top, (width, height, whole) = self.top, BAR
        row = self._add(whole)
        left = (self.width - width) // 2
        row[8 : 8 + height, left : left + width] = colours.table[np.linspace(0, 255, width).round().astype(int)]
        said = [(text, left + round((at + 1) / 2 * width), 8 + height + 4, "ma") for at, text in ticks.items()]
        row[:] = written(row, [*said, (label, self.width / 2, whole - 12, "mm")])
        self.bars.append(Window(left - BAND, top, width + 2 * BAND, whole, label))

    def photographs(self) -> Photographs:
        """What was put together."""
        return Photographs(np.concatenate(self.rows), tuple(self.strips), tuple(self.bars))


@functools.cache
def _font(size: int) -> ImageFont.FreeTypeFont:
    return ImageFont.truetype(findfont(FontProperties(family="DejaVu Sans")), size)


def written(pixels: Pixels, words: Sequence[tuple[str, float, float, str]], *, boxed: bool = False) -> Pixels:
    """`pixels` with words at places, each with Pillow's anchor; `boxed` ones on white."""
    picture = Image.fromarray(pixels)
    draw, font = ImageDraw.Draw(picture), _font(NUMBERS if boxed else WORDS)
    for text, x, y, anchor in words:
        if boxed:
            left, top, right, bottom = draw.textbbox((x, y), text, font=font, anchor=anchor)
            draw.rectangle((left - 3, top - 3, right + 2, bottom + 2), fill="white")
        draw.text((x, y), text, fill=INK, font=font, anchor=anchor)
    return np.asarray(picture)


def data_url(content: bytes, kind: str) -> str:
    """A picture's file as a data URL."""
    return f"data:image/{kind};base64,{base64.b64encode(content).decode('ascii')}"


def resized(picture: Pixels, size: tuple[int, int]) -> Pixels:
    """A picture of another width and height."""
    return np.asarray(Image.fromarray(picture).resize(size, Image.Resampling.LANCZOS), dtype=np.uint8)
