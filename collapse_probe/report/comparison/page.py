"""Comparison and figures → one HTML file that opens from disk, with tables of the subjects and of every paired number."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from collapse_probe.report.comparison.figures import FIGURES, draw_all
from collapse_probe.report.comparison.verdict import CASES, RAW, verdicts
from collapse_probe.report.findings.answer import SYMBOLS, badge
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
from collapse_probe.results.readings import untrained_summary, weights_only
from collapse_probe.results.rules import FALSE_DISCOVERY_RATE
from collapse_probe.results.text import DASH, facts, interval, number, p_value, plain
from collapse_probe.results.verdict import verdict_of

MOST_COLUMNS = 4  # subjects that stand side by side
FIRST = (RAW + KAPPA, RAW)  # the quantities that stand above the others
SURE_MARK = f"Marked: q ≤ {FALSE_DISCOVERY_RATE:g} over the blocks. Intervals, p and q of every block are in comparison.csv."
HEADER = ("mean over blocks", "first", "second", "difference", "95 % CI", "p", "effect", "images", "left out")
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
    model, summary, fresh = findings.model, findings.summary, untrained_summary(findings)
    flops, parameters = cost.get("flops"), model.get("parameters")
    verdict = verdict_of(findings)
    tone, word = badge(verdict.collapsed, verdict.case, verdict.alike)
    ends = [summary.get(f"kappa_adjacent_ci_{end}") for end in ("low", "high")]
    around = "" if None in ends else f" {interval(np.array(ends, dtype=np.float64))}"
    counts = [summary.get(f"similar_blocks{what}") for what in ("", "_corrected")]
    pairs = summary.get("similar_blocks_pairs")
    counted = " / ".join(DASH if count is None else f"{count:g}" for count in counts)
    return {
        "subject": label,
        "attention across depth": f"{SYMBOLS[tone]} {word}",
        "κ, 95 % CI": f"{number(summary.get('kappa_adjacent'))}{around}",
        "raw similarity": number(summary.get("attention_similarity_adjacent")),
        "its chance level": number(summary.get("other_token_adjacent")),
        "that of an untrained copy": number(fresh.get("attention_similarity_adjacent")),
        "similar blocks, raw / by κ": f"{counted} of {pairs:g}" if pairs else counted,
        "attention entropy, share of log N": number(summary.get("attention_entropy_share")),
        "patch diversity after the last block": number(summary.get("patch_diversity_last")),
        "accuracy": number(summary.get(ACCURACY)),
        "parameters": DASH if parameters is None else f"{parameters / 1e6:.2f} M",
        "GFLOPs": DASH if flops is None else number(flops / 1e9, 3 if flops < 1e10 else 1),
        "images/s": number(cost.get("images_per_second"), 1),
        "blocks": plain(model.get("blocks")),
    }


def _notes(comparison: Comparison) -> list[str]:
    costs = {label: findings.run.get("cost") or {} for label, findings in comparison.subjects.items()}
    notes = [
        f"images/s: median of plain forward passes on noise, {batch} images at a time, on {device}; GFLOPs: of one image, a "
        "multiplication and an addition are two operations."
        for batch, device in sorted({(cost["batch_size"], cost["device"]) for cost in costs.values() if cost})
    ]
    notes += [f"{label}: weights {plain(f.model.get('weights'))}." for label, f in comparison.subjects.items()]
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
    """The mean of every quantity that was paired, κ and raw similarity first; counts; then differences by block and depth."""
    names = list(dict.fromkeys(name for name in (*FIRST, *pair.differences) if name in pair.differences))
    header = (HEADER[0], pair.first, pair.second, *HEADER[3:])
    bare = all(pair.differences[name].unsampled for name in names)
    columns = OF_WEIGHTS_ALONE if bare else len(header)
    rows = tuple(_mean(name, pair.differences[name])[:columns] for name in names)
    tables = [Table(header[:columns], rows, (), "Means over blocks")] if names else []
    if pair.counts:
        of_counts = ("adjacent pairs", pair.first, pair.second, "difference", "95 % CI")
        counts = tuple(
            (f"{c.name} > {c.threshold:g}", f"{c.first:g}", f"{c.second:g}", number(c.second - c.first, 0), interval(c.ci95, 0))
            for c in pair.counts
        )
        tables.append(Table(of_counts, counts, (), "Counts of similar blocks"))
    axes = dict.fromkeys(each.axis for each in pair.differences.values() if each.axis != "all")
    return [*tables, *(_by_place(pair, axis, [n for n in names if pair.differences[n].axis == axis]) for axis in axes)]


def _mean(name: str, difference: Difference) -> tuple[str, ...]:
    paired = difference.overall
    sides = (number(values[0]) for values in (paired.first, paired.second, paired.difference))
    counts = (DASH, DASH) if difference.unsampled else (str(int(paired.images[0])), str(int(paired.left_out[0])))
    return (name, *sides, interval(paired.ci95[0]), p_value(paired.p[0]), number(paired.effect[0], 2), *counts)


def _by_place(pair: Pair, axis: str, names: Sequence[str]) -> Table:
    """The difference of every quantity along one axis, a row a place; marked where it is beyond the false discovery rate."""
    places = sorted({place for name in names for place in pair.differences[name].places})
    rows, marked = [], set()
    for row, place in enumerate(places):
        cells = [str(place)]
        for column, name in enumerate(names, start=1):
            difference = pair.differences[name]
            at = difference.places.index(place) if place in difference.places else None
            cells.append(DASH if at is None else number(difference.paired.difference[at]))
            if at is not None and difference.paired.q[at] <= FALSE_DISCOVERY_RATE:
                marked.add((row, column))
        rows.append(tuple(cells))
    title = f"{pair.second} − {pair.first}, by {axis}"
    return Table((axis, *names), tuple(rows), (SURE_MARK,) if marked else (), title, frozenset(marked))


def agreement(pair: Pair, comparison: Comparison) -> str:
    """How far the outputs agree, in one line."""
    outputs = pair.agreement
    if outputs.top1 is None:
        weights = all(weights_only(comparison.subjects[label]) for label in (pair.first, pair.second))
        return "none, for the weights alone were compared, without images" if weights else f"not known: {outputs.reason}"
    kl = f"mean KL {outputs.kl:.3g} nats" if outputs.kl is not None else f"KL not known: {outputs.reason}"
    ends = "" if outputs.top1_ci95 is None else f" (95 % CI {interval([100 * end for end in outputs.top1_ci95], 1)})"
    return f"the same top answer on {100 * outputs.top1:.1f} % of {outputs.images} images{ends}; {kl}"


def headline(comparison: Comparison) -> str:
    """The answer of the page in a few words."""
    said = verdicts(comparison)
    if comparison.trajectory:
        return f"{len(comparison.subjects)} checkpoints of one training"
    if len(said) == 1:
        return f"{comparison.pairs[0].second} against {comparison.first}: {CASES[said[0].case]}"
    return f"{len(said)} subjects against {comparison.first}"


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
        headline=headline(comparison),
        methods={name: METHODS[name] for name in OF_WEIGHTS} if bare else METHODS,
        run=facts(comparison.run),
        provenance=[(label, provenance(findings)) for label, findings in comparison.subjects.items()],
    )
