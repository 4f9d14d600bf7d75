"""Comparison and figures → one HTML file that opens from disk, in the look of the report."""

from __future__ import annotations

from collections.abc import Mapping
from importlib import resources
from pathlib import Path

from jinja2 import Environment, StrictUndefined
from matplotlib.figure import Figure

from collapse_probe import contrast_tables as tables
from collapse_probe.captions import Caption
from collapse_probe.colophon import provenance
from collapse_probe.contrast import CASES, answers
from collapse_probe.contrast_figures import CAPTIONS, draw_all
from collapse_probe.figures import save
from collapse_probe.page import NARROW_DPI, WIDE_DPI, Plate, data_url
from collapse_probe.side_by_side import METHODS, Comparison
from collapse_probe.words import plain

PAGE = "report.html"


def write_comparison(comparison: Comparison, folder: str | Path) -> Path:
    """Write figures/ and report.html into an existing folder, from the comparison alone; returns the page."""
    figures = draw_all(comparison)
    save(figures, folder)
    path = Path(folder) / PAGE
    path.write_text(render(comparison, figures), encoding="utf-8")
    return path


def render(comparison: Comparison, figures: Mapping[str, Figure] | None = None) -> str:
    """One self-contained HTML page; `figures` (as `draw_all` makes them) are drawn where not given."""
    figures = draw_all(comparison) if figures is None else figures
    narrow = draw_all(comparison, narrow=True)
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    first = comparison.subjects[comparison.first]
    pairs = comparison.pairs[-1:] if comparison.trajectory else comparison.pairs
    return environment.from_string(_file("comparison.html")).render(
        style=_style(),
        labels=list(comparison.subjects),
        images=plain(first.data.get("images")),
        data=plain(first.data.get("address")),
        answers=answers(comparison),
        cases=CASES,
        subjects=tables.subjects(comparison),
        plates=[_plate(name, figure, narrow.get(name)) for name, figure in figures.items()],
        pairs=[(pair, tables.paired(pair), tables.agreement(pair)) for pair in pairs],
        methods=METHODS,
        run=[(key.replace("_", " "), plain(value)) for key, value in comparison.run.items()],
        provenance=[(label, provenance(findings)) for label, findings in comparison.subjects.items()],
    )


def _file(name: str) -> str:
    return resources.files("collapse_probe").joinpath(name).read_text(encoding="utf-8")


def _style() -> str:
    """The style sheet of the report's page, so that both look alike."""
    return _file("page.html").partition("<style>")[2].partition("</style>")[0]


def _plate(name: str, figure: Figure, narrow: Figure | None) -> Plate:
    width, height = (round(96 * inches) for inches in figure.get_size_inches())
    return Plate(
        name=name,
        source=data_url(figure, WIDE_DPI),
        narrow="" if narrow is None else data_url(narrow, NARROW_DPI),
        width=width,
        height=height,
        caption=CAPTIONS.get(name, Caption(name, "", "")),
        notes=(),
    )
