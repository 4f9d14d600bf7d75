"""The numbers of a page: the strip of key numbers and the table over blocks."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from collapse_probe.findings import Array, Findings, Reading
from collapse_probe.readings import (
    KAPPA_THRESHOLD,
    NULL_LABELS,
    NULLS,
    RAW_THRESHOLD,
    adjacent,
    corrected_count,
    entropy_share,
    held,
    kappa_ci95,
    mean,
    null,
    pairs_of,
)
from collapse_probe.words import DASH, interval, number


@dataclass(frozen=True)
class Card:
    """One key number: its value, the interval or count beside it, and what it would be without training."""

    label: str
    value: str
    detail: str = ""
    reference: str = ""


@dataclass(frozen=True)
class Table:
    """Header, rows of the same length, and notes that explain every dash in them.

    `title` stands above, `marked` (row, column) cells stand out, and the columns `words` hold text that may wrap.
    """

    header: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    notes: tuple[str, ...]
    title: str = ""
    marked: frozenset[tuple[int, int]] = frozenset()
    words: frozenset[int] = frozenset()


def key_numbers(findings: Findings) -> list[Card]:
    """The strip of key numbers; what was not measured is left out."""
    cards = [*_similarity_cards(findings), _counts(findings), _entropy(findings), _diversity(findings)]
    return [card for card in cards if card is not None]


def _similarity_cards(findings: Findings) -> list[Card]:
    reading = held(findings, "attention-similarity")
    if reading is None or reading.values is None or len(reading.values) < 2:
        return []
    token, kappa = _pairs(null(reading, "other_token")), _pairs(null(reading, "kappa"))
    fresh = mean(_pairs(null(reading, "untrained")))
    cards = [
        Card(
            "similarity of adjacent blocks, raw",
            number(mean(_pairs(reading.values))),
            _mean_interval(findings, "attention_similarity_adjacent", reading.ci95),
            "" if fresh is None else f"untrained twin {number(fresh)}",
        ),
        Card("the same with the wrong token", number(mean(token)), "null: what chance gives"),
    ]
    undefined = 0 if kappa is None else int((~np.isfinite(kappa)).sum())
    detail = _mean_interval(findings, "kappa_adjacent", kappa_ci95(reading))
    beside = f"undefined for {undefined} of {len(kappa)} pairs" if undefined and kappa is not None else ""
    if mean(kappa) is None:
        detail, beside = _why(reading, "kappa"), ""
    return [*cards, Card("κ, similarity beyond that null", number(mean(kappa)), detail, beside)]


def _pairs(matrix: Array | None) -> Array | None:
    return None if matrix is None else adjacent(matrix)


def _mean_interval(findings: Findings, name: str, ci95: Array | None) -> str:
    """The interval of a mean over adjacent pairs: the summary's, as the answer quotes it.

    Without one (no values of single images) the mean of the pairs' ends, wide enough for any dependence.
    """
    low, high = (findings.summary.get(f"{name}_ci_{end}") for end in ("low", "high"))
    if ci95 is not None and (low is None or high is None):
        low, high = (mean(adjacent(ci95)[:, end]) for end in (0, 1))
    return "" if low is None or high is None else f"95 %: {interval((low, high))}"


def _why(reading: Reading, role: str) -> str:
    if reading.nulls is None:
        return "not taken in this run"
    fallback = "the other-token null is 1" if role == "kappa" else "not taken in this run"
    return reading.nulls.reasons.get(role, fallback)


def _counts(findings: Findings) -> Card | None:
    count, corrected = findings.summary.get("similar_blocks"), corrected_count(findings)
    if count is None:
        return None
    low, high = (findings.summary.get(f"similar_blocks_ci_{end}") for end in ("low", "high"))
    ends = [] if low is None or high is None else [f"raw {low:g} … {high:g}"]
    if corrected is not None and corrected.ci95 is not None:
        ends.append(f"κ {corrected.ci95[0]:g} … {corrected.ci95[1]:g}")
    above = KAPPA_THRESHOLD if corrected is None else corrected.above
    return Card(
        "similar blocks, raw / corrected",
        f"{count:g} / {DASH if corrected is None else f'{corrected.value:g}'}",
        f"of {pairs_of(findings)} pairs: raw above {RAW_THRESHOLD:g}, κ above {above:g}",
        f"95 %: {', '.join(ends)}" if ends else "",
    )


def _entropy(findings: Findings) -> Card | None:
    share = entropy_share(findings)
    if share is None or mean(share.mean) is None:
        return None
    fresh = mean(share.untrained)
    beside = "" if fresh is None else f"untrained twin {number(fresh, 2)}"
    detail = f"of {share.unit}; 1 is uniform attention"
    return Card("attention entropy", number(mean(share.mean), 2), detail, beside)


def _diversity(findings: Findings) -> Card | None:
    reading = held(findings, "patch-diversity")
    if reading is None or reading.values is None or not len(reading.values):
        return None
    fresh = null(reading, "untrained")
    return Card(
        "patch diversity after the last block",
        number(reading.values[-1]),
        "" if reading.ci95 is None else f"95 %: {interval(reading.ci95[-1])}",
        "" if fresh is None else f"untrained twin {number(fresh[-1])}",
    )


def per_block(findings: Findings) -> Table:
    """One row a block: similarity with the block before, its nulls, kappa, entropy and patch diversity."""
    columns, notes = _columns(findings)
    blocks = max((len(cells) for cells in columns.values()), default=0)
    rows = [
        (str(block), *(cells[block] if block < len(cells) else DASH for cells in columns.values())) for block in range(blocks)
    ]
    return Table(("block", *columns), tuple(rows), tuple(notes))


def _columns(findings: Findings) -> tuple[dict[str, list[str]], list[str]]:
    columns: dict[str, list[str]] = {}
    notes: list[str] = []
    similarity = held(findings, "attention-similarity")
    if similarity is not None:
        columns |= _similarity_columns(similarity)
        notes.append("Block 0 has no block before it, so nothing to be compared with.")
        notes += [f"{NULL_LABELS[r]}: {_why(similarity, r)}." for r in (*NULLS, "kappa") if null(similarity, r) is None]
        kappa = null(similarity, "kappa")
        if kappa is not None and not np.isfinite(adjacent(kappa)).all():
            notes.append("κ is undefined where the other-token null is 1: nothing is left to be explained.")
        if similarity.stderr is not None and not np.isfinite(adjacent(similarity.stderr)).all():
            notes.append("Standard errors and intervals need at least two images.")
    share, raw = entropy_share(findings), held(findings, "attention-entropy")
    if share is not None and raw is not None:
        nats = share.mean * np.log(share.keys)
        columns["entropy, nats"] = [number(v, 2) for v in nats]
        columns["entropy / log N"] = [number(v, 2) for v in share.mean]
    diversity = held(findings, "patch-diversity")
    if diversity is not None and diversity.values is not None:
        columns["patch diversity"] = [number(v) for v in diversity.values[1:]]
    return columns, notes


def _similarity_columns(reading: Reading) -> dict[str, list[str]]:
    assert reading.values is not None
    columns = {"adjacent similarity": _cells(reading.values), "stderr": _cells(reading.stderr, 4)}
    columns["95 % interval"] = _intervals(reading.ci95, len(reading.values))
    for role in (*NULLS, "kappa"):
        columns[NULL_LABELS[role]] = _cells(null(reading, role), rows=len(reading.values))
    columns["κ, 95 % interval"] = _intervals(kappa_ci95(reading), len(reading.values))
    return columns


def _cells(matrix: Array | None, digits: int = 3, rows: int = 0) -> list[str]:
    if matrix is None:
        return [DASH] * rows
    return [DASH, *(number(value, digits) for value in adjacent(matrix))]


def _intervals(ci95: Array | None, rows: int) -> list[str]:
    return [DASH] * rows if ci95 is None else [DASH, *(interval(ends) for ends in adjacent(ci95))]
