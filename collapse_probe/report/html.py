"""Findings and figures → one HTML file that opens from disk, on a phone and on paper."""

from __future__ import annotations

import base64
import io
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jinja2 import Environment, PackageLoader, StrictUndefined
from matplotlib.collections import QuadMesh
from matplotlib.figure import Figure
from PIL import Image

from collapse_probe.files import PAGE
from collapse_probe.report.style import pixels, save, svg
from collapse_probe.results.findings import Findings
from collapse_probe.results.readings import weights_only
from collapse_probe.results.text import plain


@dataclass(frozen=True)
class Caption:
    """The title of a figure, what is seen in it, and what must not be read out of it."""

    title: str
    seen: str
    limits: str


@dataclass(frozen=True)
class Drawing(Caption):
    """One figure of a page: its caption, and what draws it from (results, narrow); None where these have nothing to draw."""

    draw: Callable[..., Figure | None]


@dataclass(frozen=True)
class Table:
    """Header, rows of the same length, and notes that explain every dash in them.

    `title` stands above, `marked` (row, column) cells stand out, and the columns `words` hold text that may wrap.
    """

    header: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    notes: tuple[str, ...]
    title: str = ""
    marked: frozenset[tuple[int, int]] = frozenset()
    words: frozenset[int] = frozenset()


NARROW_DPI, WIDE_DPI, PHOTOGRAPH_DPI = 160, 150, 150
PHOTOGRAPH_MOST = 333_000  # letters of its data URL
LINES_MOST = 80_000  # letters of an svg as data URL beyond which pixels are tried
STEP = 4  # of 256 shades of red, green and blue: what a drawing in pixels is rounded to


@dataclass(frozen=True)
class Plate:
    """One figure on the page: its data URL (and one for phones), its size in CSS pixels, its caption, and what stands below."""

    name: str
    source: str
    narrow: str
    width: int
    height: int
    caption: Caption
    notes: tuple[str, ...] = ()
    metrics: tuple[str, ...] = ()
    tables: tuple[Table, ...] = ()


def looked_at(findings: Findings) -> str:
    """The images that findings are of, in words."""
    if weights_only(findings):
        return "weights alone, no images"
    return f"{plain(findings.data.get('images'))} images of {plain(findings.data.get('address'))}"


def paper(template: str, **content: Any) -> str:
    """The page that `template` makes of `content`; templates share one layout and the macros for tables and figures."""
    environment = Environment(
        loader=PackageLoader("collapse_probe.report", "templates"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template(template).render(**content)


def write_page(folder: str | Path, figures: Mapping[str, Figure], page: str) -> Path:
    """Write `figures` into figures/ and `page` as report.html into an existing folder; returns the page's path."""
    save(figures, folder)
    path = Path(folder) / PAGE
    path.write_text(page, encoding="utf-8")
    return path


def plate_of(name: str, figure: Figure, narrow: Figure | None, caption: Caption, *, sharp: bool = True, **more: Any) -> Plate:
    """`figure` and its version for phones as a plate; `more` are the plate's further fields."""
    width, height = (round(96 * inches) for inches in figure.get_size_inches())
    phone = "" if narrow is None else data_url(narrow, NARROW_DPI, sharp=False)
    return Plate(name, data_url(figure, WIDE_DPI, sharp=sharp), phone, width, height, caption, **more)


def draw_figures(
    drawings: Mapping[str, Drawing], results: Any, *, narrow: bool = False, names: Collection[str] | None = None
) -> dict[str, Figure]:
    """Every figure (of `names`) that these results fill, by name, in the order of `drawings`."""
    made = {name: each.draw(results, narrow) for name, each in drawings.items() if names is None or name in names}
    return {name: figure for name, figure in made.items() if figure is not None}


def plates_of(drawings: Mapping[str, Drawing], results: Any, figures: Mapping[str, Figure] | None = None) -> list[Plate]:
    """A plate for each figure that these results fill; `figures` are the wide ones, drawn where not given."""
    wide = draw_figures(drawings, results) if figures is None else figures
    narrow = draw_figures(drawings, results, narrow=True, names=wide)
    return [plate_of(name, figure, narrow.get(name), drawings[name]) for name, figure in wide.items()]


def data_url(figure: Figure, dpi: float, *, sharp: bool = True) -> str:
    """`figure` as a data URL: lines as svg where `sharp` and few, else as webp like heatmaps; photographs as jpeg."""
    if any(axes.images for axes in figure.axes):
        picture = pixels(figure, min(dpi, PHOTOGRAPH_DPI))
        for quality in (86, 76, 64, 50, 35, 20):
            url = picture_url(picture, "jpeg", quality=quality, optimize=True)
            if len(url) <= PHOTOGRAPH_MOST:
                break
        return url
    lines = ""
    if sharp and not any(isinstance(part, QuadMesh) for axes in figure.axes for part in axes.collections):
        lines = _url("svg+xml", svg(figure))
        if len(lines) <= LINES_MOST:
            return lines
    whole = np.asarray(pixels(figure, dpi))
    rounded = np.where(whole > 255 - STEP, 255, (whole + STEP // 2) // STEP * STEP).astype(np.uint8)
    drawn = picture_url(Image.fromarray(rounded), "webp", lossless=True, quality=30, method=2)
    return lines if lines and len(lines) <= len(drawn) else drawn


def picture_url(picture: Image.Image, kind: str, **options: Any) -> str:
    """`picture` as a data URL: jpeg or webp, saved with these options of PIL."""
    buffer = io.BytesIO()
    picture.save(buffer, kind, **options)
    return _url(kind, buffer.getvalue())


def _url(kind: str, content: bytes) -> str:
    return f"data:image/{kind};base64,{base64.b64encode(content).decode('ascii')}"
