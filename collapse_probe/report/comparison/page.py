"""Comparison and figures → one HTML file that opens from disk, with tables of the subjects and of every paired number."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from collapse_probe.report.comparison.figures import FIGURES, draw_all
from collapse_probe.report.comparison.verdict import CASES, RAW, verdicts
from collapse_probe.report.findings.provenance import provenance
from collapse_probe.report.html import Figure, Table, looked_at, paper, plates_of, write_page
from collapse_probe.results.comparison import (
    ACCURACY,
    KAPPA,
    METHODS,
    OF_WEIGHTS,
    Comparison,
    Difference,
    Pair,
)
from collapse_probe.results.findings import Findings
from collapse_probe.results.readings import weights_only
from collapse_probe.results.text import DASH, facts, interval, number, p_value, plain
from collapse_probe.results.verdict import verdict_of
from collapse_probe.statistics.paired import Paired

MOST_COLUMNS = 4  # subjects that stand side by side
OPEN = RAW + KAPPA  # the table that the page shows at once
HEADER = ("first", "second", "difference", "95 % CI", "kind", "p", "q", "effect", "images", "left out")
OF_WEIGHTS_ALONE = HEADER.index("95 % CI")  # columns that weights have: those from here on are about images


def subjects(comparison: Comparison) -> Table:
    """What each subject is, costs, answers, and how it is judged; a column each, a row each where there are many."""
    columns = [_subject(label, findings) for label, findings in comparison.subjects.items()]
    names = [name for name in columns[0] if any(column[name] != DASH for column in columns)]
    rows = [tuple(names), *(tuple(column[name] for name in names) for column in columns)]
    if len(columns) <= MOST_COLUMNS:
        rows = list(zip(*rows, strict=True))
    return Table(rows[0], tuple(rows[1:]), tuple(_notes(comparison)))


def _subject(label: str, findings: Findings) -> dict[str, str]:
    cost: Mapping[str, Any] = findings.run.get("cost") or {}
    model, summary = findings.model, findings.summary
    flops, parameters = cost.get("flops"), model.get("parameters")
    counts = (summary.get("similar_blocks"), summary.get("similar_blocks_corrected"))
    return {
        "subject": label,
        "weights": plain(model.get("weights")),
        "blocks": plain(model.get("blocks")),
        "parameters": DASH if parameters is None else f"{parameters / 1e6:.2f} M",
        "GFLOPs": DASH if flops is None else number(flops / 1e9, 3 if flops < 1e10 else 1),
        "images/s": number(cost.get("images_per_second"), 1),
        "accuracy": number(summary.get(ACCURACY)),
        "raw similarity": number(summary.get("attention_similarity_adjacent")),
        "κ": number(summary.get("kappa_adjacent")),
        "similar blocks, raw / corrected": " / ".join(DASH if count is None else f"{count:g}" for count in counts),
        "patch diversity": number(summary.get("patch_diversity_last")),
        "verdict alone": verdict_of(findings).case,
    }


def _notes(comparison: Comparison) -> list[str]:
    costs = {label: findings.run.get("cost") or {} for label, findings in comparison.subjects.items()}
    notes = [
        f"images/s: median of plain forward passes on noise, {batch} images at a time, on {device}; GFLOPs: of one image, a "
        "multiplication and an addition are two operations."
        for batch, device in sorted({(cost["batch_size"], cost["device"]) for cost in costs.values() if cost})
    ]
    notes += [f"{label}: {cost['note']}." for label, cost in costs.items() if cost.get("note")]
    if missing := [label for label, cost in costs.items() if not cost]:
        notes.append(f"{', '.join(missing)}: findings that analyze wrote hold no cost; compare measures it.")
    for label, findings in comparison.subjects.items():
        reason = (findings.run.get("outputs") or {}).get("reason")
        if reason and findings.summary.get(ACCURACY) is None:
            notes.append(f"{label}: no accuracy, {reason}.")
        changes = [note for note in findings.run.get("notes", []) if note.startswith(("fixes put", "BatchNorm", "left out"))]
        notes += [f"{label}: {note}." for note in changes]
    return notes


def paired(pair: Pair) -> list[Table]:
    """A table with its title for each quantity that was paired: kappa and raw similarity first, the counts last."""
    names = dict.fromkeys(name for name in (OPEN, RAW, *pair.differences) if name in pair.differences)
    tables = [_differences(name, pair.differences[name]) for name in names]
    if pair.counts:
        header = ("count", "first", "second", "difference", "95 % CI")
        rows = [
            (f"{c.name} > {c.threshold:g}", f"{c.first:g}", f"{c.second:g}", number(c.second - c.first, 0), interval(c.ci95, 0))
            for c in pair.counts
        ]
        tables.append(Table(header, tuple(rows), (), "counts of similar blocks"))
    return tables


def _differences(name: str, difference: Difference) -> Table:
    places = () if difference.axis == "all" else enumerate(difference.places)
    rows = [_row(str(place), difference.paired, at, p_value(difference.paired.q[at])) for at, place in places]
    rows.append(_row("mean", difference.overall, 0, DASH))
    columns = 1 + (OF_WEIGHTS_ALONE if difference.unsampled else len(HEADER))
    return Table((difference.axis, *HEADER)[:columns], tuple(row[:columns] for row in rows), (), name)


def _row(name: str, paired: Paired, at: int, q: str) -> tuple[str, ...]:
    sides = (number(values[at]) for values in (paired.first, paired.second, paired.difference))
    test = (p_value(paired.p[at]), q, number(paired.effect[at], 2))
    counts = (str(int(paired.images[at])), str(int(paired.left_out[at])))
    return (name, *sides, interval(paired.ci95[at]), paired.interval[at], *test, *counts)


def agreement(pair: Pair, comparison: Comparison) -> str:
    """How far the outputs agree, in one line."""
    outputs = pair.agreement
    if outputs.top1 is None:
        weights = all(weights_only(comparison.subjects[label]) for label in (pair.first, pair.second))
        return "none, for the weights alone were compared, without images" if weights else f"not known: {outputs.reason}"
    kl = f"mean KL {outputs.kl:.3g} nats" if outputs.kl is not None else f"KL not known: {outputs.reason}"
    ends = "" if outputs.top1_ci95 is None else f" (95 % CI {interval([100 * end for end in outputs.top1_ci95], 1)})"
    return f"the same top answer on {100 * outputs.top1:.1f} % of {outputs.images} images{ends}; {kl}"


def write_comparison(comparison: Comparison, folder: str | Path) -> Path:
    """Write figures/ and report.html into an existing folder, from the comparison alone; returns the page."""
    figures = draw_all(comparison)
    return write_page(folder, figures, render(comparison, figures))


def render(comparison: Comparison, figures: Mapping[str, Figure] | None = None) -> str:
    """One self-contained HTML page; `figures` are drawn where not given."""
    first = comparison.subjects[comparison.first]
    pairs = comparison.pairs[-1:] if comparison.trajectory else comparison.pairs
    bare = all(weights_only(findings) for findings in comparison.subjects.values())
    return paper(
        "comparison.html",
        labels=list(comparison.subjects),
        subject=looked_at(first),
        verdicts=verdicts(comparison),
        cases=CASES,
        subjects=subjects(comparison),
        plates=plates_of(FIGURES, draw_all(comparison) if figures is None else figures),
        pairs=[(pair, paired(pair), agreement(pair, comparison)) for pair in pairs],
        open=OPEN,
        methods={name: METHODS[name] for name in OF_WEIGHTS} if bare else METHODS,
        run=facts(comparison.run),
        provenance=[(label, provenance(findings)) for label, findings in comparison.subjects.items()],
    )
