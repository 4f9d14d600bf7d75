"""The tables of a comparison's page: the subjects, and every paired number."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from collapse_probe.report.comparison.figures import FIGURES, draw_all
from collapse_probe.report.comparison.verdict import CASES, RAW, verdicts
from collapse_probe.report.findings.provenance import provenance
from collapse_probe.report.html import Table, looked_at, paper, plates_of, write_page
from collapse_probe.results.comparison import ACCURACY, KAPPA, METHODS, OF_WEIGHTS, Comparison, Difference, Pair
from collapse_probe.results.findings import Findings
from collapse_probe.results.readings import weights_only
from collapse_probe.results.text import DASH, facts, interval, number, p_value, plain
from collapse_probe.results.verdict import verdict_of

MOST_COLUMNS = 4  # subjects that stand side by side
FIRST = (RAW + KAPPA, RAW)
HEADER = ("first", "second", "difference", "95 % interval", "kind", "p", "q", "effect", "images", "left out")


OF_A_SAMPLE = HEADER.index("95 % interval")  # from here on columns are about images: weights have none of them


@dataclass(frozen=True)
class Named:
    """A table under a title; `open` says whether the page shows it at once."""

    title: str
    table: Table
    open: bool = False


def subjects(comparison: Comparison) -> Table:
    """What each subject is, costs, answers, and how it is judged; a column each, a row each where there
    are many.
    """
    header = (
        "subject",
        "weights",
        "blocks",
        "parameters",
        "GFLOPs",
        "images/s",
        "accuracy",
        "raw similarity",
        "κ",
        "similar blocks, raw / corrected",
        "patch diversity",
        "verdict alone",
    )
    rows = [_subject(label, findings) for label, findings in comparison.subjects.items()]
    told = [at for at in range(len(header)) if any(row[at] != DASH for row in rows)]
    kept = [tuple(row[at] for at in told) for row in [header, *rows]]
    if len(rows) <= MOST_COLUMNS:
        kept = list(zip(*kept, strict=True))
    return Table(kept[0], tuple(kept[1:]), tuple(_notes(comparison)))


def _subject(label: str, findings: Findings) -> tuple[str, ...]:
    cost: Mapping[str, Any] = findings.run.get("cost") or {}
    summary = findings.summary
    flops, parameters = cost.get("flops"), findings.model.get("parameters")
    counts = (summary.get("similar_blocks"), summary.get("similar_blocks_corrected"))
    return (
        label,
        plain(findings.model.get("weights")),
        plain(findings.model.get("blocks")),
        DASH if parameters is None else f"{parameters / 1e6:.2f} M",
        DASH if flops is None else number(flops / 1e9, 3 if flops < 1e10 else 1),
        number(cost.get("images_per_second"), 1),
        number(summary.get("accuracy")),
        number(summary.get("attention_similarity_adjacent")),
        number(summary.get("kappa_adjacent")),
        " / ".join(DASH if count is None else f"{count:g}" for count in counts),
        number(summary.get("patch_diversity_last")),
        verdict_of(findings).case,
    )


def _notes(comparison: Comparison) -> list[str]:
    found = []
    costs = {label: f.run.get("cost") for label, f in comparison.subjects.items()}
    measured = {(c["batch_size"], c["device"]) for c in costs.values() if c}
    for batch, device in sorted(measured):
        found.append(
            f"images/s: median of plain forward passes on noise, {batch} images at a time, on {device}; "
            "GFLOPs: of one image, a multiplication and an addition are two operations."
        )
    found += [f"{label}: {cost['note']}." for label, cost in costs.items() if cost and cost.get("note")]
    missing = [label for label, cost in costs.items() if not cost]
    if missing:
        found.append(f"{', '.join(missing)}: findings that analyze wrote hold no cost; compare measures it.")
    for label, findings in comparison.subjects.items():
        outputs = findings.run.get("outputs") or {}
        if outputs.get("reason") and findings.summary.get(ACCURACY) is None:
            found.append(f"{label}: no accuracy, {outputs['reason']}.")
        changed = [n for n in findings.run.get("notes", []) if n.startswith(("fixes put", "BatchNorm"))]
        found += [f"{label}: {note}." for note in changed]
    return found


def paired(pair: Pair) -> list[Named]:
    """One table for each quantity that was paired, the counts last; kappa and raw similarity are shown at
    once.
    """
    names = [*(n for n in FIRST if n in pair.differences), *(n for n in pair.differences if n not in FIRST)]
    found = [Named(name, _differences(pair.differences[name]), name == FIRST[0]) for name in names]
    if pair.counts:
        rows = tuple(
            (
                f"{count.name} > {count.threshold:g}",
                f"{count.first:g}",
                f"{count.second:g}",
                number(count.second - count.first, 0),
                interval(count.ci95, 0),
            )
            for count in pair.counts
        )
        table = Table(("count", "first", "second", "difference", "95 % interval"), rows, ())
        found.append(Named("counts of similar blocks", table))
    return found


def _differences(difference: Difference) -> Table:
    whole = difference.overall
    rows = [_row("mean", whole, 0)]
    if difference.axis != "all":
        rows = [_row(str(place), difference.paired, at) for at, place in enumerate(difference.places)] + rows
    kept = 1 + (OF_A_SAMPLE if difference.unsampled else len(HEADER))
    return Table((difference.axis, *HEADER)[:kept], tuple(row[:kept] for row in rows), ())


def _row(name: str, numbers: Any, at: int) -> tuple[str, ...]:
    left = int(numbers.left_out[at])
    q = numbers.q[at] if name != "mean" else np.nan
    return (
        name,
        number(numbers.first[at]),
        number(numbers.second[at]),
        number(numbers.difference[at]),
        interval(numbers.ci95[at]),
        numbers.interval[at],
        p_value(numbers.p[at]),
        p_value(q),
        number(numbers.effect[at], 2),
        str(int(numbers.images[at])),
        str(left),
    )


def agreement(pair: Pair, comparison: Comparison) -> str:
    """How far the outputs agree, in one line."""
    found = pair.agreement
    if found.top1 is None and all(weights_only(comparison.subjects[label]) for label in (pair.first, pair.second)):
        return "none, for the weights alone were compared, without images"
    if found.top1 is None:
        return f"not known: {found.reason}"
    kl = f"mean KL {found.kl:.3g} nats" if found.kl is not None else f"KL not known: {found.reason}"
    return f"the same top answer on {100 * found.top1:.1f} % of {found.images} images; {kl}"


def write_comparison(comparison: Comparison, folder: str | Path) -> Path:
    """Write figures/ and report.html into an existing folder, from the comparison alone; returns the page."""
    figures = draw_all(comparison)
    return write_page(folder, figures, render(comparison, figures))


def render(comparison: Comparison, figures: Mapping[str, Figure] | None = None) -> str:
    """One self-contained HTML page; `figures` (wide, as `draw_all` makes them) are drawn where not given."""
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
        plates=plates_of(FIGURES, comparison, figures),
        pairs=[(pair, paired(pair), agreement(pair, comparison)) for pair in pairs],
        methods={name: METHODS[name] for name in OF_WEIGHTS} if bare else METHODS,
        run=facts(comparison.run),
        provenance=[(label, provenance(findings)) for label, findings in comparison.subjects.items()],
    )
