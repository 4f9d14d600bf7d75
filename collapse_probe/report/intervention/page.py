"""Interventions and figures → one HTML file that opens from disk, in the look of the report."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from matplotlib.figure import Figure

from collapse_probe.report.html import Table, paper, plates_of, write_page
from collapse_probe.report.intervention.figures import CAPTIONS, draw_all
from collapse_probe.report.intervention.verdict import verdicts
from collapse_probe.results.intervention import DEFINITIONS, Effect, Interventions
from collapse_probe.results.rules import KEEPS_ANSWERS
from collapse_probe.results.text import DASH, facts, interval, number, plain


def write_interventions(found: Interventions, folder: str | Path) -> Path:
    """Write figures/ and report.html into an existing folder, from the numbers alone; returns the page."""
    figures = draw_all(found)
    return write_page(folder, figures, render(found, figures))


def render(found: Interventions, figures: Mapping[str, Figure] | None = None) -> str:
    """One self-contained HTML page; `figures` (as `draw_all` makes them) are drawn where not given."""
    figures = draw_all(found) if figures is None else figures
    narrow = draw_all(found, narrow=True)
    accurate = found.plain["accuracy"] is not None
    return paper(
        "intervention.html",
        name=plain(found.model.get("name")),
        images=plain(found.data.get("images")),
        data=plain(found.data.get("address")),
        plain_accuracy=f"{found.plain['accuracy']:.1%}" if accurate else f"not known: {found.plain['reason']}",
        verdicts=verdicts(found),
        keeps=f"{KEEPS_ANSWERS:.0%}",
        plates=plates_of(figures, narrow, CAPTIONS),
        tables=[(kind, *_tables(found, kind, accurate)) for kind in found.single],
        refused=[(e.kind, e.blocks[0], e.not_applicable) for es in found.single.values() for e in es if e.not_applicable],
        kinds=found.kinds,
        definitions=DEFINITIONS,
        provenance=[(part, facts(getattr(found, part))) for part in ("model", "data", "run")],
    )


HEADER = ("KL, nats", "95 % interval", "same top answer", "95 % interval", "accuracy", "change, points", "95 % interval")


def _tables(found: Interventions, kind: str, accurate: bool) -> tuple[Table, Table]:
    """The single and the cumulative effects."""
    header = ("blocks", *HEADER[: None if accurate else 4])
    single = tuple(_row(str(e.blocks[0]), e, accurate) for e in found.single[kind] if e.kl is not None)
    together = tuple(_row(_span(e.blocks), e, accurate) for e in found.cumulative[kind])
    return Table(header, single, ()), Table(header, together, ())


def _row(name: str, effect: Effect, accurate: bool) -> tuple[str, ...]:
    cells = [name, number(effect.kl, 4), interval(effect.kl_ci95, 4), _share(effect.agreement)]
    cells.append(_shares(effect.agreement_ci95))
    if accurate:
        change = None if effect.accuracy_change is None else 100 * effect.accuracy_change
        ends = None if effect.accuracy_change_ci95 is None else [100 * end for end in effect.accuracy_change_ci95]
        cells += [_share(effect.accuracy), number(change, 1), interval(ends, 1)]
    return tuple(cells)


def _span(blocks: tuple[int, ...]) -> str:
    whole = blocks == tuple(range(blocks[0], blocks[-1] + 1))
    return f"{blocks[0]}–{blocks[-1]}" if whole and len(blocks) > 1 else ", ".join(map(str, blocks))


def _share(value: float | None) -> str:
    return DASH if value is None else f"{value:.1%}"


def _shares(ends: tuple[float, float] | None) -> str:
    return DASH if ends is None else f"{ends[0]:.1%} … {ends[1]:.1%}"
