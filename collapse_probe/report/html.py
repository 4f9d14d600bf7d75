"""Findings and figures → one HTML file that opens from disk, on a phone and on paper."""

from __future__ import annotations

import base64
import functools
import hashlib
import io
import re
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup, escape
from PIL import Image

from collapse_probe.files import FIGURE_FOLDER, PAGE
from collapse_probe.report.gallery import Player
from collapse_probe.report.photographs import Photographs, data_url
from collapse_probe.report.sheet import Sheet
from collapse_probe.results.findings import Findings
from collapse_probe.results.glossary import GLOSSARY
from collapse_probe.results.readings import weights_only
from collapse_probe.results.text import plain, visible

Figure = Sheet | Photographs | Player
"""What a page shows and its folder holds: panels as SVG, photographs as one picture, or maps to choose from."""


@dataclass(frozen=True)
class Caption:
    """The title of a figure, what is seen in it, and what must not be read out of it."""

    title: str
    seen: str
    limits: str


@dataclass(frozen=True)
class Drawing(Caption):
    """One figure of a page: its caption, and what draws it from results; None where these have nothing to draw."""

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


@dataclass(frozen=True)
class Plate:
    """One figure on the page: what was drawn, its caption, and what stands below."""

    name: str
    figure: Figure
    caption: Caption
    notes: tuple[str, ...] = ()
    metrics: tuple[str, ...] = ()
    tables: tuple[Table, ...] = ()


def looked_at(findings: Findings) -> str:
    """The images that findings are of, in words."""
    if weights_only(findings):
        return "parameters alone, no images"
    return f"{plain(findings.data.get('images'))} images of {plain(findings.data.get('address'))}"


def paper(template: str, **content: Any) -> str:
    """The page that `template` makes of `content`; templates share one layout and the macros for tables and figures."""
    environment = _environment().overlay()
    linked: set[str] = set()
    environment.filters["linked"] = functools.partial(_linked, linked)
    script, policy = _script()
    return environment.get_template(template).render(script=Markup(script), policy=policy, glossary=GLOSSARY, **content)


@functools.cache
def _environment() -> Environment:
    environment = Environment(
        loader=PackageLoader("collapse_probe.report", "templates"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["visible"] = visible
    return environment


@functools.cache
def _script() -> tuple[str, str]:
    """The script of every page, and the policy that lets this script run and nothing else, and nothing be fetched."""
    text = (Path(__file__).parent / "templates" / "page.js").read_text(encoding="utf-8")
    digest = base64.b64encode(hashlib.sha256(text.encode()).digest()).decode("ascii")
    return text, f"default-src 'none'; script-src 'sha256-{digest}'; {POLICY}"


POLICY = "img-src data:; style-src 'unsafe-inline'; base-uri 'none'; form-action 'none'"
SPELLINGS = {spelling: term.anchor for term in GLOSSARY for spelling in (term.word, *term.also)}
SPELLING = re.compile(rf"(?<![\w-])(?:{'|'.join(map(re.escape, sorted(SPELLINGS, key=len, reverse=True)))})(?![\w-])")


def _linked(linked: set[str], text: str) -> Markup:
    """`text` as HTML, each word of the glossary linked to its meaning where the page says it first."""

    def link(found: re.Match[str]) -> str:
        anchor = SPELLINGS[found[0]]
        if anchor in linked:
            return found[0]
        linked.add(anchor)
        return f'<a class="term" href="#{anchor}">{found[0]}</a>'

    return Markup(SPELLING.sub(link, str(escape(text))))


def write_page(folder: str | Path, figures: Mapping[str, Figure], page: str) -> Path:
    """Write `figures` into figures/ and `page` as report.html into an existing folder; returns the page's path."""
    save(figures, folder)
    path = Path(folder) / PAGE
    path.write_text(page, encoding="utf-8")
    return path


def save(figures: Mapping[str, Figure], folder: str | Path) -> None:
    """Write each figure as figures/NAME.svg, or .jpg where it is of photographs, into `folder`: what the page shows."""
    inside = Path(folder) / FIGURE_FOLDER
    inside.mkdir(parents=True, exist_ok=True)
    for name, figure in figures.items():
        (inside / f"{name}.{figure.suffix}").write_bytes(figure.content())


def draw_figures(drawings: Mapping[str, Drawing], results: Any, *, names: Collection[str] | None = None) -> dict[str, Figure]:
    """Every figure (of `names`) that these results fill, by name, in the order of `drawings`."""
    made = {name: each.draw(results) for name, each in drawings.items() if names is None or name in names}
    return {name: figure.called(name) for name, figure in made.items() if figure is not None}


def plates_of(drawings: Mapping[str, Drawing], figures: Mapping[str, Figure]) -> list[Plate]:
    """A plate for each of these figures."""
    return [Plate(name, figure, drawings[name]) for name, figure in figures.items()]


def picture_url(picture: Image.Image, kind: str, **options: Any) -> str:
    """`picture` as a data URL: jpeg or webp, saved with these options of PIL."""
    buffer = io.BytesIO()
    picture.save(buffer, kind, **options)
    return data_url(buffer.getvalue(), kind)
