"""A figure as text: panels, drawn once, which stand side by side or below one another as there is room, and one file of all."""

from __future__ import annotations

import functools
import re
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass, replace
from html import escape
from typing import Protocol

from collapse_probe.files import MADE_BY

FONT = "system-ui, Roboto, Helvetica Neue, DejaVu Sans, Arial, sans-serif"  # of a file; a page has its own
INK, MUTED, FAINT = "#22303c", "#66737f", "#dde3e8"
LETTER = 0.56  # of the font size: about the width of a letter
KEY_SIZE, SWATCH = 11.0, (30.0, 12.0)  # of the words of a key, and its drawing, in pixels
ROW, GAP = 18.0, 14.0  # pixels from row to row of keys, and between panels


def coordinate(value: float) -> str:
    """A length in as few characters as a tenth of a pixel needs.

    >>> coordinate(12.0), coordinate(0.349), coordinate(-0.01)
    ('12', '0.3', '0')
    """
    text = f"{value:.1f}"
    return text.removesuffix(".0").replace("-0", "0") if text.endswith(".0") or text == "-0" else text


def words(
    text: str, x: float, y: float, *, size: float | None = None, anchor: str = "", colour: str = "", turned: bool = False
) -> str:
    """A `text` element; `turned` reads from below."""
    look = f' font-size="{size:g}"' if size is not None else ""
    look += f' text-anchor="{anchor}"' if anchor else ""
    look += f' fill="{colour}"' if colour else ""
    look += f' transform="rotate(-90 {coordinate(x)} {coordinate(y)})"' if turned else ""
    return f'<text x="{coordinate(x)}" y="{coordinate(y)}"{look}>{escape(text, quote=False)}</text>'


def drawing(
    inside: str, width: float, height: float, *, label: str = "", data: str = "", place: tuple[float, float] | None = None
) -> str:
    """An `svg` element around `inside`, named by `label` for who cannot see it; at `place` within another one.

    `data` is JSON for the page's script.
    """
    look = f'class="{MADE_BY}" fill="{INK}" stroke-linejoin="round"'
    box = f'viewBox="0 0 {coordinate(width)} {coordinate(height)}"'
    if place is None:
        named = f' role="img" aria-label="{escape(label)}"' if label else ""
        named += f' data-chart="{escape(data)}"' if data else ""
        return f'<svg xmlns="http://www.w3.org/2000/svg" {box} {look}{named}>{inside}</svg>'
    x, y = map(coordinate, place)
    size = f'x="{x}" y="{y}" width="{coordinate(width)}" height="{coordinate(height)}"'
    return f"<svg {size} {box} {look}>{inside}</svg>"


TAGS, CODES = re.compile(r"<[^>]*>"), re.compile(r'aria-label="[^"]*"|#[0-9a-f]{6}\b')
THEME = {
    **{INK: "ink", MUTED: "muted", FAINT: "faint", "#9aa5ae": "axis", "#ffffff": "ground", "#b9c1c8": "hatch"},
    **{"#eef1f3": "hole", "#6b7680": "copy", "#0b5fa5": "c1", "#d55e00": "c2", "#01855f": "c3", "#b5579b": "c4"},
    **{"#8a6d00": "c5", "#5b4fa2": "c6", "#a8322d": "c7", "#4a7f87": "c8"},
}
"""The variable of a page's style for each colour that is another one in the dark; those of matrices stay."""


def themed(svg: str) -> str:
    """Colours of THEME as variables of a page's style; words stay as they are, and so does what a label says."""

    def variable(found: re.Match[str]) -> str:
        return f"var(--{THEME[found[0]]})" if found[0] in THEME else found[0]

    return TAGS.sub(lambda tag: CODES.sub(variable, tag[0]), svg)


class Panel(Protocol):
    """One part of a figure, which draws itself in pixels of a width and height."""

    @property
    def size(self) -> tuple[float, float]:
        """Width and height."""
        ...

    @property
    def label(self) -> str:
        """What it shows, in words."""
        ...

    def body(self, name: str) -> str:
        """What stands inside its `svg` element; every id in it begins with `name`."""
        ...


@dataclass(frozen=True)
class Key:
    """What something in a figure stands for: a swatch of SWATCH pixels, and its words."""

    words: str
    swatch: str

    @property
    def picture(self) -> str:
        """The swatch as an element of a page."""
        return themed(drawing(self.swatch, *SWATCH))


@dataclass(frozen=True)
class Part:
    """A panel that has been drawn."""

    body: str
    size: tuple[float, float]
    label: str
    data: str = ""

    @property
    def text(self) -> str:
        """The panel as an `svg` element of a page."""
        return themed(drawing(self.body, *self.size, label=self.label, data=self.data))


@dataclass(frozen=True)
class Sheet:
    """A figure: panels in rows of `columns`, None leaving a gap, keys above them and beneath.

    `name` begins every id; `small` panels stay several in a row on a phone. `views` are the words of a switch between what its
    panels show, the first two of which may `blink`; the file, which has no switch, then holds `filed`.
    """

    places: tuple[Panel | None, ...]
    columns: int = 1
    above: tuple[Key, ...] = ()
    below: tuple[Key, ...] = ()
    small: bool = False
    name: str = "figure"
    views: tuple[str, ...] = ()
    filed: Sheet | None = None
    blink: bool = False
    suffix = "svg"

    def called(self, name: str) -> Sheet:
        """The same under a name."""
        safe = re.sub(r"[^\w-]", "_", name)
        return replace(self, name=safe, filed=None if self.filed is None else replace(self.filed, name=safe))

    @property
    def panels(self) -> list[Panel]:
        """The panels without the gaps."""
        return [place for place in self.places if place is not None]

    @functools.cached_property
    def parts(self) -> list[Part | None]:
        """Every panel drawn, once."""
        return [
            None
            if panel is None
            else Part(panel.body(f"{self.name}-{at}"), panel.size, panel.label, getattr(panel, "data", ""))
            for at, panel in enumerate(self.places)
        ]

    def content(self) -> bytes:
        """All of it as one file, the parts as the page has them, those of a switch side by side."""
        if self.filed is not None:
            return self.filed.content()
        sizes = [(0.0, 0.0) if part is None else part.size for part in self.parts]
        rows = [range(at, min(at + self.columns, len(sizes))) for at in range(0, len(sizes), self.columns)]
        wide = max(width for width, _ in sizes)
        whole = max(len(rows[0]) * (wide + GAP) + GAP, 260.0)
        inside, top = _keys(self.above, whole - 2 * GAP, GAP)
        for row in rows:
            for column, at in enumerate(row):
                if (part := self.parts[at]) is not None:
                    inside += drawing(part.body, *part.size, place=(GAP + column * (wide + GAP), top))
            top += max(sizes[at][1] for at in row) + GAP
        more, top = _keys(self.below, whole - 2 * GAP, top)
        ground = '<rect width="100%" height="100%" fill="#fff"/>'
        return (drawing(f'{ground}<g font-family="{FONT}">{inside}{more}</g>', whole, top) + "\n").encode()


def _keys(keys: Sequence[Key], room: float, top: float) -> tuple[str, float]:
    """Keys in rows no wider than `room`, from `top` down, and where they end."""
    inside, x = "", 0.0
    for key in keys:
        lines = textwrap.wrap(key.words, max(int((room - SWATCH[0] - 6) / (LETTER * KEY_SIZE)), 20))
        wide = SWATCH[0] + 6 + LETTER * KEY_SIZE * max(map(len, lines)) + 16
        if x and x + wide > room:
            x, top = 0.0, top + ROW
        inside += drawing(key.swatch, *SWATCH, place=(GAP + x, top))
        for at, line in enumerate(lines):
            inside += words(line, GAP + x + SWATCH[0] + 6, top + 10 + at * ROW, size=KEY_SIZE)
        top += (len(lines) - 1) * ROW
        x += wide
    return inside, top + ROW + 6 if keys else top
