"""Findings and figures → one HTML file that opens from disk, on a phone and on paper."""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

from jinja2 import Environment, StrictUndefined
from matplotlib.collections import QuadMesh
from matplotlib.figure import Figure
from PIL import Image

from collapse_probe.captions import CAPTIONS, Caption
from collapse_probe.colophon import definitions, not_measured, provenance, skipped
from collapse_probe.drawing import pixels, svg
from collapse_probe.figures import draw_all, save
from collapse_probe.findings import Findings
from collapse_probe.readings import held, null
from collapse_probe.tables import key_numbers, per_block
from collapse_probe.words import plain

NARROW_DPI, WIDE_DPI = 190, 150
PHOTOGRAPH_MOST = 450_000  # bytes


@dataclass(frozen=True)
class Plate:
    """One figure on the page: its data URL (and one for phones), its size in CSS pixels and its caption."""

    name: str
    source: str
    narrow: str
    width: int
    height: int
    caption: Caption
    notes: tuple[str, ...]


def write_report(findings: Findings, folder: str | Path) -> Path:
    """Write figures/ and report.html into an existing folder, from the findings alone; returns the page."""
    figures = draw_all(findings)
    save(figures, folder)
    path = Path(folder) / "report.html"
    path.write_text(render(findings, figures), encoding="utf-8")
    return path


def render(findings: Findings, figures: Mapping[str, Figure] | None = None) -> str:
    """One self-contained HTML page with `figures`, or with all that `draw_all` makes."""
    from collapse_probe.verdict import judge

    figures = draw_all(findings) if figures is None else figures
    narrow = draw_all(findings, narrow=True, names=figures)
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    text = resources.files("collapse_probe").joinpath("page.html").read_text(encoding="utf-8")
    listed, more = skipped(findings)
    return environment.from_string(text).render(
        name=plain(findings.model.get("name")),
        weights=plain(findings.model.get("weights")),
        images=plain(findings.data.get("images")),
        data=plain(findings.data.get("address")),
        verdict=judge(findings),
        untrained=str(findings.model.get("weights") or "").startswith("random"),
        cards=key_numbers(findings),
        plates=[_plate(findings, name, figure, narrow.get(name)) for name, figure in figures.items()],
        absent=not_measured(findings),
        table=per_block(findings),
        definitions=definitions(findings),
        provenance=provenance(findings),
        skipped=listed,
        skipped_more=more,
    )


def data_url(figure: Figure, dpi: float) -> str:
    """`figure` as a data URL: lines as svg, heatmaps as lossless webp, photographs as jpeg."""
    if any(axes.images for axes in figure.axes):
        kind, content = "jpeg", _photograph(pixels(figure, dpi))
    elif any(isinstance(part, QuadMesh) for axes in figure.axes for part in axes.collections):
        kind, content = "webp", _saved(pixels(figure, dpi), "webp", lossless=True, quality=30, method=2)
    else:
        kind, content = "svg+xml", svg(figure)
    return f"data:image/{kind};base64,{base64.b64encode(content).decode('ascii')}"


def _photograph(picture: Image.Image) -> bytes:
    """A jpeg of at most PHOTOGRAPH_MOST bytes where any quality allows it."""
    for quality in (86, 76, 64, 50, 35, 20):
        content = _saved(picture, "jpeg", quality=quality, optimize=True)
        if len(content) <= PHOTOGRAPH_MOST:
            break
    return content


def _saved(picture: Image.Image, kind: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, kind, **options)
    return buffer.getvalue()


def _plate(findings: Findings, name: str, figure: Figure, narrow: Figure | None) -> Plate:
    width, height = (round(96 * inches) for inches in figure.get_size_inches())
    return Plate(
        name=name,
        source=data_url(figure, WIDE_DPI),
        narrow="" if narrow is None else data_url(narrow, NARROW_DPI),
        width=width,
        height=height,
        caption=CAPTIONS.get(name, Caption(name, "", "")),
        notes=tuple(_notes(findings, name)),
    )


def _notes(findings: Findings, name: str) -> list[str]:
    """What a caption must say about these findings alone."""
    if name == "attention-gallery" and findings.gallery is not None:
        return [f"Here the attention of {findings.gallery.query} is drawn, a mean over heads."]
    reading = held(findings, name)
    if name not in ("attention-similarity", "feature-similarity") or reading is None:
        return []
    if null(reading, "kappa") is not None:
        return []
    reasons = {} if reading.nulls is None else reading.nulls.reasons
    reason = reasons.get("kappa", "the other-token null was not taken, or is 1 everywhere")
    return [f"κ is not drawn here: {reason}."]
