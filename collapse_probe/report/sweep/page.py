"""Sweep and figures → one HTML file that opens from disk, in the look of the report."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path

from collapse_probe.report.html import Figure, Table, paper, plates_of, write_page
from collapse_probe.report.sweep.figures import draw_all, drawings
from collapse_probe.report.sweep.verdict import caveats, headline, mean, verdicts
from collapse_probe.results.sweep import FINISHED, PUBLISHED, UNTRAINED, CellResult, Sweep, spelled
from collapse_probe.results.text import DASH, facts, number, plain

COLUMNS = {
    "similar_blocks": ("similar blocks", 1),
    UNTRAINED + "similar_blocks": ("the same, untrained copy", 1),
    "similar_blocks_probs": ("the same, softmax map", 1),
    "similar_blocks_corrected": ("similar blocks by κ", 1),
    "kappa_adjacent": ("κ", 3),
    UNTRAINED + "kappa_adjacent": ("κ, untrained copy", 3),
    "attention_similarity_adjacent": ("raw similarity", 3),
    "patch_diversity_last": ("patch diversity", 3),
    "accuracy": ("accuracy", 3),
}
COUNTS = ("similar blocks", "the same")  # how the titles of counts begin: whole numbers in a single cell


def write_sweep(sweep: Sweep, folder: str | Path) -> Path:
    """Write figures/ and report.html into an existing folder, from the numbers alone; returns the page."""
    figures = draw_all(sweep)
    return write_page(folder, figures, render(sweep, figures))


def render(sweep: Sweep, figures: Mapping[str, Figure] | None = None) -> str:
    """One self-contained HTML page; `figures` are drawn where not given."""
    return paper(
        "sweep.html",
        name=plain(sweep.recipe.get("name")),
        varied="; ".join(f"{name} {', '.join(map(spelled, each))}" for name, each in sweep.varied.items()) or "nothing varied",
        seeds="one seed" if len(sweep.seeds) == 1 else f"{len(sweep.seeds)} seeds",
        data=plain(sweep.data.get("data")),
        done=f"{len(sweep.finished)} of {len(sweep.cells)} cells finished",
        trouble=trouble(sweep),
        headline=headline(sweep),
        verdicts=verdicts(sweep),
        caveats=caveats(sweep),
        plates=plates_of(drawings(sweep), draw_all(sweep) if figures is None else figures),
        means=means(sweep),
        cells=by_cell(sweep),
        with_published="depth" in sweep.axes,
        published=facts(PUBLISHED),
        provenance=[
            ("Recipe that was varied", facts(sweep.recipe)),
            ("Changed in all cells", facts(sweep.changes) or [("nothing", DASH)]),
            ("Data", facts(sweep.data)),
            ("Run", facts(sweep.run)),
        ],
    )


def trouble(sweep: Sweep) -> str:
    """What is missing, in one sentence; empty where every cell is finished."""
    waiting = len(sweep.cells) - len(sweep.finished) - len(sweep.failed)
    parts = [f"{count} {word}" for count, word in ((len(sweep.failed), "failed"), (waiting, "not run")) if count]
    return f"Of {len(sweep.cells)} cells {' and '.join(parts)}." if parts else ""


def _columns(sweep: Sweep) -> dict[str, tuple[str, int]]:
    """The columns in which any finished cell has a number."""
    return {key: column for key, column in COLUMNS.items() if any(math.isfinite(c.number(key)) for c in sweep.finished)}


def means(sweep: Sweep) -> Table:
    """The mean over seeds of every number, with its interval, for each combination of values."""
    columns = _columns(sweep)
    rows = tuple(
        (label or "all cells", str(len(cells)), *(mean(cells, key, digits) for key, (_, digits) in columns.items()))
        for label, cells in sweep.groups.items()
    )
    return Table(("cell", "seeds", *(title for title, _ in columns.values())), rows, ())


def by_cell(sweep: Sweep) -> Table:
    """Every cell, with the reason where it failed."""
    columns = _columns(sweep)
    rows = tuple(_row(cell, columns) for cell in sweep.cells)
    header = ("folder", *(title for title, _ in columns.values()), "parameters", "training, s", "measuring, s", "status")
    return Table(header, rows, (), words=frozenset({len(header) - 1}))


def _row(cell: CellResult, columns: Mapping[str, tuple[str, int]]) -> tuple[str, ...]:
    numbers = (number(cell.number(key), 0 if title.startswith(COUNTS) else digits) for key, (title, digits) in columns.items())
    size = DASH if cell.parameters is None else f"{cell.parameters:,}"
    status = cell.status if cell.status == FINISHED or not cell.reason else f"{cell.status}: {cell.reason}"
    return (cell.name, *numbers, size, number(cell.train_seconds, 0), number(cell.measure_seconds, 1), status)
