"""Comparison and figures → one HTML file that opens from disk, in the look of the report."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from matplotlib.figure import Figure

from collapse_probe import contrast_tables as tables
from collapse_probe.captions import Caption
from collapse_probe.colophon import provenance
from collapse_probe.contrast import CASES, answers
from collapse_probe.contrast_figures import CAPTIONS, draw_all
from collapse_probe.figures import save
from collapse_probe.page import looked_at, paper, plate_of
from collapse_probe.side_by_side import METHODS, OF_WEIGHTS, Comparison
from collapse_probe.unasked import weights_only
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
    first = comparison.subjects[comparison.first]
    pairs = comparison.pairs[-1:] if comparison.trajectory else comparison.pairs
    bare = all(weights_only(findings) for findings in comparison.subjects.values())
    return paper(
        "comparison.html",
        labels=list(comparison.subjects),
        subject=looked_at(first),
        answers=answers(comparison),
        cases=CASES,
        subjects=tables.subjects(comparison),
        plates=[
            plate_of(name, figure, narrow.get(name), CAPTIONS.get(name, Caption(name, "", "")))
            for name, figure in figures.items()
        ],
        pairs=[(pair, tables.paired(pair), tables.agreement(pair, comparison)) for pair in pairs],
        methods={name: METHODS[name] for name in OF_WEIGHTS} if bare else METHODS,
        run=[(key.replace("_", " "), plain(value)) for key, value in comparison.run.items()],
        provenance=[(label, provenance(findings)) for label, findings in comparison.subjects.items()],
    )
