"""The card that a notebook shows for results: the answer, the numbers beside what chance gives, one small heatmap."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from typing import Any

import numpy as np

from collapse_probe.report.heatmaps import UNSIGNED, mosaic
from collapse_probe.report.sheet import coordinate
from collapse_probe.results.comparison import Comparison
from collapse_probe.results.findings import Findings
from collapse_probe.results.overview.headline import Headline, headlines
from collapse_probe.results.overview.text import lines_of, subject
from collapse_probe.results.readings import null_of, result_of
from collapse_probe.results.text import DASH, number
from collapse_probe.results.verdict import verdict_of
from collapse_probe.statistics.intervals import Array

SIDE = 132  # pixels of the heatmap
SPARK = (96.0, 18.0)  # and of a curve beside a number
CELL = "padding:2px 14px 2px 0;white-space:nowrap;text-align:"
MOST_SUBJECTS = 12


def card(results: Any) -> str:
    """The card of findings or a comparison; of others their lines of text."""
    if isinstance(results, Findings):
        return of_findings(results)
    if isinstance(results, Comparison):
        return of_comparison(results)
    return f"<pre>{escape(lines_of(results))}</pre>"


def of_findings(findings: Findings) -> str:
    """Verdict, numbers with interval, chance level and untrained copy, and κ between every two blocks."""
    verdict = verdict_of(findings)
    said = (
        f"<p style='margin:2px 0;max-width:60em'><strong>{escape(verdict.sentences[0])}</strong></p>"
        if verdict.sentences
        else ""
    )
    rows = table(
        ("", "", "95 % CI", "chance level", "untrained copy", "block by block"), [row(each) for each in headlines(findings)]
    )
    notes = "".join(
        f"<p style='margin:2px 0;max-width:60em'><small>Note: {escape(text)}</small></p>" for text in verdict.caveats
    )
    picture = heatmap(findings)
    beside = f"<div>{rows}</div>" + (f"<div>{picture}</div>" if picture else "")
    return (
        f"<div><p style='margin:2px 0'>{escape(subject(findings))}</p>{said}"
        f"<div style='display:flex;flex-wrap:wrap;gap:24px;align-items:flex-start'>{beside}</div>{notes}</div>"
    )


def spark(each: Headline) -> str:
    """A number along the blocks as a small curve on its own scale; gaps where it is undefined."""
    if len(each.along) < 2:
        return ""
    wide, tall = SPARK
    places = (np.clip((np.array(each.along) - each.low) / (each.high - each.low), 0, 1)).tolist()
    step, path, pen = (wide - 2) / (len(places) - 1), "", "M"
    for at, place in enumerate(places):
        if np.isfinite(place):
            path += f"{pen}{coordinate(1 + at * step)} {coordinate(1 + (tall - 2) * (1 - place))}"
        pen = "L" if np.isfinite(place) else "M"
    says = f"{each.name}, block by block, from {each.low:g} to {each.high:g}"
    return (
        f"<svg role='img' aria-label='{escape(says)}' width='{wide:g}' height='{tall:g}'><title>{escape(says)}</title>"
        f"<path d='M0 0H{wide:g}M0 {tall:g}H{wide:g}' stroke='#8884' fill='none'/>"
        f"<path d='{path}' stroke='#0b7fd5' stroke-width='1.6' fill='none'/></svg>"
    )


def row(each: Headline) -> list[str]:
    """The cells of one number."""
    beside = [DASH if value is None else number(value, each.digits) for value in (each.chance, each.untrained)]
    return [each.name, each.written, each.interval or DASH, *beside, spark(each)]


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A small table: cells of text, but for the last column, which is drawn; the first and the last to the left."""

    def cells(tag: str, words: Sequence[str]) -> str:
        last = len(words) - 1
        sides = ["left" if at in (0, last) else "right" for at in range(len(words))]
        inside = [*map(escape, words[:last]), words[last]]
        return "".join(f"<{tag} style='{CELL}{side}'>{word}</{tag}>" for side, word in zip(sides, inside, strict=True))

    body = "".join(f"<tr>{cells('td', each)}</tr>" for each in rows)
    return f"<table style='border-collapse:collapse'><thead><tr>{cells('th', head)}</tr></thead><tbody>{body}</tbody></table>"


def heatmap(findings: Findings) -> str:
    """κ between every two blocks as a small SVG; empty where it was not measured."""
    result = result_of(findings, "attention-similarity")
    if result is None or (kappa := null_of(result, "kappa")) is None or len(kappa) < 3:
        return ""
    return drawn(kappa, "κ between every two blocks, 0 (pale) to 1 (dark)")


def drawn(values: Array, title: str) -> str:
    """A matrix as a small SVG with a caption, which says its range to who cannot see it."""
    rows, columns = values.shape
    known = values[np.isfinite(values)]
    label = f"{title}; {rows} by {columns} cells from {number(known.min(), 2)} to {number(known.max(), 2)}"
    ground = f"<path fill='#eef1f3' d='M0 0h{columns}v{rows}h-{columns}z'/>"
    svg = (
        f"<svg role='img' aria-label='{escape(label)}' width='{SIDE}' height='{SIDE}' viewBox='0 0 {columns} {rows}' "
        f"shape-rendering='crispEdges'><title>{escape(label)}</title>{ground}{mosaic(values, UNSIGNED)}</svg>"
    )
    return f"{svg}<br><small>{escape(title)}</small>"


def of_comparison(comparison: Comparison) -> str:
    """The subjects side by side: a row each, and each one's κ block by block."""
    labels = list(comparison.subjects)
    rows = []
    for label in labels[:MOST_SUBJECTS]:
        numbers = {each.name: each for each in headlines(comparison.subjects[label])}
        kappa, raw = numbers.get("κ of adjacent pairs"), numbers.get("raw similarity")
        count, diversity = (
            next((n for n in numbers.values() if n.name.startswith("similar blocks")), None),
            numbers.get("patch diversity, last"),
        )
        cells = [DASH if each is None else each.written for each in (kappa, raw)]
        chance = DASH if raw is None or raw.chance is None else number(raw.chance)
        fresh = DASH if raw is None or raw.untrained is None else number(raw.untrained)
        more = [DASH if each is None else each.written for each in (count, diversity)]
        rows.append(
            [
                label,
                cells[0],
                DASH if kappa is None else kappa.interval or DASH,
                cells[1],
                chance,
                fresh,
                *more,
                "" if kappa is None else spark(kappa),
            ]
        )
    head = (
        "",
        "κ",
        "95 % CI",
        "raw similarity",
        "chance level",
        "untrained copy",
        "similar blocks",
        "patch diversity",
        "κ block by block",
    )
    rest = f"<p><small>and {len(labels) - MOST_SUBJECTS} more subjects</small></p>" if len(labels) > MOST_SUBJECTS else ""
    return f"<div>{table(head, rows)}{rest}</div>"
