"""Findings and figures → one HTML file that opens from disk, on a phone and on paper."""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jinja2 import Environment, PackageLoader, StrictUndefined
from matplotlib.collections import QuadMesh
from matplotlib.figure import Figure
from PIL import Image

from collapse_probe.both_ends import both_ends
from collapse_probe.captions import Caption
from collapse_probe.colophon import definitions, not_measured, provenance, skipped, weights_alone
from collapse_probe.drawing import pixels, svg
from collapse_probe.family_figures import family_figures, undrawn
from collapse_probe.figures import draw_all, save
from collapse_probe.findings import Findings
from collapse_probe.outlier_places import without_outliers
from collapse_probe.preset_tables import followed
from collapse_probe.ratio_tables import sensitivity_tables
from collapse_probe.readings import held, null
from collapse_probe.sections import caption_of, sections
from collapse_probe.sureness_tables import certainty, rules_table
from collapse_probe.tables import Table, key_numbers, per_block
from collapse_probe.words import plain

NARROW_DPI, WIDE_DPI, PHOTOGRAPH_DPI = 160, 150, 150
PHOTOGRAPH_MOST = 250_000  # bytes
LINES_MOST = 60_000  # bytes of an svg beyond which pixels are tried
STEP = 4  # of 256 shades of red, green and blue: what a drawing in pixels is rounded to
UNTRAINED = "The model is untrained"  # how the caveat begins that the banner says already


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
    listed, more = skipped(findings)
    untrained, verdict = str(findings.model.get("weights") or "").startswith("random"), judge(findings)
    return paper(
        "findings.html",
        name=plain(findings.model.get("name")),
        weights=plain(findings.model.get("weights")),
        subject=looked_at(findings),
        weights_alone=weights_alone(findings),
        verdict=verdict,
        caveats=[caveat for caveat in verdict.caveats if not (untrained and caveat.startswith(UNTRAINED))],
        untrained=untrained,
        rules=rules_table(findings),
        cards=key_numbers(findings),
        sections=_filled(findings, figures),
        absent=[*not_measured(findings), *undrawn(findings)],
        sure=certainty(findings),
        both_ends=both_ends(findings),
        table=per_block(findings),
        definitions=definitions(findings),
        presets=followed(findings),
        provenance=provenance(findings),
        skipped=listed,
        skipped_more=more,
    )


def looked_at(findings: Findings) -> str:
    """The images that findings are of, in words."""
    if weights_alone(findings):
        return "weights alone, no images"
    return f"{plain(findings.data.get('images'))} images of {plain(findings.data.get('address'))}"


def paper(template: str, **content: Any) -> str:
    """The page that `template` makes of `content`; templates share one layout and the macros for tables and figures."""
    environment = Environment(
        loader=PackageLoader("collapse_probe", ""),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template(template).render(**content)


def plate_of(name: str, figure: Figure, narrow: Figure | None, caption: Caption, *, sharp: bool = True, **more: Any) -> Plate:
    """`figure` and its version for phones as a plate; `more` are the plate's further fields."""
    width, height = (round(96 * inches) for inches in figure.get_size_inches())
    phone = "" if narrow is None else data_url(narrow, NARROW_DPI, sharp=False)
    return Plate(name, data_url(figure, WIDE_DPI, sharp=sharp), phone, width, height, caption, **more)


def data_url(figure: Figure, dpi: float, *, sharp: bool = True) -> str:
    """`figure` as a data URL: lines as svg where `sharp` and few, else as webp like heatmaps; photographs as jpeg."""
    if any(axes.images for axes in figure.axes):
        kind, content = "jpeg", _photograph(pixels(figure, min(dpi, PHOTOGRAPH_DPI)))
    elif not sharp or any(isinstance(part, QuadMesh) for axes in figure.axes for part in axes.collections):
        kind, content = "webp", _in_pixels(figure, dpi)
    else:
        kind, content = "svg+xml", svg(figure)
        if len(content) > LINES_MOST and len(drawn := _in_pixels(figure, dpi)) < len(content):
            kind, content = "webp", drawn
    return f"data:image/{kind};base64,{base64.b64encode(content).decode('ascii')}"


def _in_pixels(figure: Figure, dpi: float) -> bytes:
    whole = np.asarray(pixels(figure, dpi))
    rounded = np.where(whole > 255 - STEP, 255, (whole + STEP // 2) // STEP * STEP).astype(np.uint8)
    return _saved(Image.fromarray(rounded), "webp", lossless=True, quality=30, method=2)


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


def _filled(findings: Findings, figures: Mapping[str, Figure]) -> list[dict[str, Any]]:
    """The sections of the page with their plates."""
    narrow, families = draw_all(findings, narrow=True, names=figures), family_figures(findings)

    def plates(names: tuple[str, ...]) -> list[Plate]:
        return [
            plate_of(
                name,
                figures[name],
                narrow.get(name),
                caption_of(name, families, findings),
                notes=tuple(_notes(findings, name)),
                metrics=tuple(families.get(name, ())),
                sharp=name not in families,
                tables=tuple(sensitivity_tables(findings)) if name == "similarity-ratio" else (),
            )
            for name in names
        ]

    return [
        {"title": part.title, "anchor": part.anchor, "plates": plates(part.figures), "aside": plates(part.aside)}
        for part in sections(findings, figures)
    ]


def _notes(findings: Findings, name: str) -> list[str]:
    """What a caption must say about these findings alone."""
    gallery = findings.gallery
    if name in ("attention-gallery", "rollout-gallery") and gallery is not None:
        drawn = "the attention" if name == "attention-gallery" else "the rollout"
        return [f"Here {drawn} of {gallery.query} is drawn, a mean over heads."]
    if name.startswith("token-norm"):
        rules = without_outliers(findings)
        return [f"No token of any image stands out by the rule “{rule}”." for rule in rules] if name == "token-norm" else []
    reading = held(findings, name)
    if name not in ("attention-similarity", "feature-similarity", "attention-rollout") or reading is None:
        return []
    if null(reading, "kappa") is not None:
        return []
    reasons = {} if reading.nulls is None else reading.nulls.reasons
    reason = reasons.get("kappa", "the other-token null was not taken, or is 1 everywhere")
    return [f"κ is not drawn here: {reason}."]
