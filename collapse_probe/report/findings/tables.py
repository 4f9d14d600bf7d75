"""The numbers of a page: the strip of key numbers and the table over blocks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from collapse_probe.report.html import Table
from collapse_probe.report.style import NULL_LABELS
from collapse_probe.results.findings import Findings, MetricResult
from collapse_probe.results.readings import (
    NULLS,
    adjacent,
    against_seeds,
    corrected_count,
    entropy_share,
    mean,
    null_ci95,
    null_of,
    pair_count,
    result_of,
)
from collapse_probe.results.rules import KAPPA_ABOVE, RAW_ABOVE
from collapse_probe.results.text import DASH, interval, number, plain
from collapse_probe.statistics.estimates import HEADLINES
from collapse_probe.statistics.intervals import Array
from collapse_probe.statistics.permutation import LEVEL


@dataclass(frozen=True)
class Card:
    """One key number: its value, the interval or count beside it, and what it would be without training."""

    label: str
    value: str
    detail: str = ""
    reference: str = ""


def key_numbers(findings: Findings) -> list[Card]:
    """The strip of key numbers; what was not measured is left out."""
    cards = [*_similarity_cards(findings), _counts(findings), _entropy(findings), _diversity(findings)]
    return [card for card in cards if card is not None]


def _similarity_cards(findings: Findings) -> list[Card]:
    reading = result_of(findings, "attention-similarity")
    if reading is None or reading.values is None or len(reading.values) < 2:
        return []
    token, kappa = _pairs(null_of(reading, "other_token")), _pairs(null_of(reading, "kappa"))
    fresh = mean(_pairs(null_of(reading, "untrained")))
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
    detail = _mean_interval(findings, "kappa_adjacent", null_ci95(reading, "kappa"))
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


def _why(reading: MetricResult, role: str) -> str:
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
    above = KAPPA_ABOVE if corrected is None else corrected.above
    return Card(
        "similar blocks, raw / corrected",
        f"{count:g} / {DASH if corrected is None else f'{corrected.value:g}'}",
        f"of {pair_count(findings)} pairs: raw above {RAW_ABOVE:g}, κ above {above:g}",
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
    reading = result_of(findings, "patch-diversity")
    if reading is None or reading.values is None or not len(reading.values):
        return None
    fresh = null_of(reading, "untrained")
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
    similarity = result_of(findings, "attention-similarity")
    if similarity is not None:
        columns |= _similarity_columns(similarity)
        notes.append("Block 0 has no block before it, so nothing to be compared with.")
        notes += [f"{NULL_LABELS[r]}: {_why(similarity, r)}." for r in (*NULLS, "kappa") if null_of(similarity, r) is None]
        kappa = null_of(similarity, "kappa")
        if kappa is not None and not np.isfinite(adjacent(kappa)).all():
            notes.append("κ is undefined where the other-token null is 1: nothing is left to be explained.")
        if similarity.stderr is not None and not np.isfinite(adjacent(similarity.stderr)).all():
            notes.append("Standard errors and intervals need at least two images.")
    share, raw = entropy_share(findings), result_of(findings, "attention-entropy")
    if share is not None and raw is not None:
        nats = share.mean * np.log(share.keys)
        columns["entropy, nats"] = [number(v, 2) for v in nats]
        columns["entropy / log N"] = [number(v, 2) for v in share.mean]
    diversity = result_of(findings, "patch-diversity")
    if diversity is not None and diversity.values is not None:
        columns["patch diversity"] = [number(v) for v in diversity.values[1:]]
    return columns, notes


def _similarity_columns(reading: MetricResult) -> dict[str, list[str]]:
    assert reading.values is not None
    columns = {"adjacent similarity": _cells(reading.values), "stderr": _cells(reading.stderr, 4)}
    columns["95 % interval"] = _intervals(reading.ci95, len(reading.values))
    for role in (*NULLS, "kappa"):
        columns[NULL_LABELS[role]] = _cells(null_of(reading, role), rows=len(reading.values))
    columns["κ, 95 % interval"] = _intervals(null_ci95(reading, "kappa"), len(reading.values))
    return columns


def _cells(matrix: Array | None, digits: int = 3, rows: int = 0) -> list[str]:
    if matrix is None:
        return [DASH] * rows
    return [DASH, *(number(value, digits) for value in adjacent(matrix))]


def _intervals(ci95: Array | None, rows: int) -> list[str]:
    return [DASH] * rows if ci95 is None else [DASH, *(interval(ends) for ends in adjacent(ci95))]


DECIDED = {
    "paper": "the paper decides where its code differs",
    "code": "the authors' code decides where the paper differs",
}


@dataclass(frozen=True)
class Followed:
    """One preset: its name, version and summary, its metrics and sources as (name, value), and the table of its choices."""

    name: str
    version: str
    summary: str
    facts: tuple[tuple[str, str], ...]
    choices: Table


def followed(findings: Findings) -> list[Followed]:
    """The presets as the findings hold them; empty where none was asked for."""
    return [_followed(name, record) for name, record in findings.presets.items()]


def _followed(name: str, record: Mapping[str, Any]) -> Followed:
    source: Mapping[str, Any] = record.get("source") or {}
    follows = str(record.get("follows"))
    facts = [("metrics", ", ".join(map(str, record.get("metrics") or ())))]
    facts += [(part, plain(source.get(part))) for part in ("paper", "code")]
    facts.append(("where they differ", DECIDED.get(follows, follows)))
    choices = record.get("choices") or ()
    rows = tuple((str(row["choice"]), str(row["value"]), str(row["follows"])) for row in choices)
    table = Table(("choice", "as it is made here", "decided by"), rows, (), f"The choices of {name}", words=frozenset((1, 2)))
    return Followed(name, str(record.get("version")), str(record.get("summary") or ""), tuple(facts), table)


SIDES = {"before": "blocks before", "both": "blocks on each side"}
NOTE = (
    "Blocks whose similarity ratio is above {above:g}, of those that have neighbours, with the 95 % interval of the number; "
    "outlined: the choice drawn above. "
    "DeepViT leaves these choices open, so that no cell is the paper's own. With the mean as threshold a vector counts when it "
    "is not below the mean of its block, which about half of them are by chance."
)


def sensitivity_tables(findings: Findings) -> list[Table]:
    """One table for each kind of attention vector: rows direction and k, columns thresholds, cells "n of m (low … high)"."""
    found: dict[tuple[str, ...], list[MetricResult]] = {}
    for name, reading in findings.metrics.items():
        if name.partition("@")[0] == "similarity-ratio" and reading.values is not None and reading.details.get("sensitivity"):
            settings = reading.settings
            centred = ", centred" if settings.get("centred") else ""
            kind = (f"{settings.get('axis', 'column')}s{centred} of {settings.get('point', 'weights')}",)
            found.setdefault(kind, []).append(reading)
    return [_table(kind[0], readings) for kind, readings in found.items()]


def _table(kind: str, readings: Sequence[MetricResult]) -> Table:
    rows: Sequence[Mapping[str, Any]] = readings[0].details["sensitivity"]
    thresholds = list(dict.fromkeys(row["threshold"] for row in rows))
    lines = list(dict.fromkeys((row["direction"], row["k"]) for row in rows))
    cells = [["–"] * len(thresholds) for _ in lines]
    for row in rows:
        ends = row.get("ci95")
        text = f"{row['similar_blocks']} of {row['blocks']}" + ("" if ends is None else f" ({ends[0]:g} … {ends[1]:g})")
        cells[lines.index((row["direction"], row["k"]))][thresholds.index(row["threshold"])] = text
    marked = {
        (lines.index((s["direction"], s["k"])), thresholds.index(s["threshold"]) + 1)
        for s in (reading.settings for reading in readings)
        if (s.get("direction"), s.get("k")) in lines and s.get("threshold") in thresholds
    }
    header = ("nearest blocks", *(t if isinstance(t, str) else f"cosine > {plain(t)}" for t in thresholds))
    return Table(
        tuple("threshold: mean" if name == "mean" else name for name in header),
        tuple((_line(*line), *row) for line, row in zip(lines, cells, strict=True)),
        (NOTE.format(above=readings[0].details.get("ratio_above", 0.9)),),
        title=f"Similar blocks under every choice, {kind}",
        marked=frozenset(marked),
    )


def _line(direction: str, k: int) -> str:
    sides = SIDES.get(direction, direction)
    return f"{k} {sides if k > 1 else sides.replace('blocks', 'block')}"


MOST_CLASSES = 60


@dataclass(frozen=True)
class Certainty:
    """What the section on how sure the findings are holds."""

    sentences: tuple[str, ...]
    tables: tuple[Table, ...]
    extremes: tuple[Table, ...]
    warning: str


def certainty(findings: Findings) -> Certainty:
    """Everything that the findings say about how sure they are; empty where nothing was stored."""
    kept = findings.sureness
    sentences = [*((kept.get("convergence") or {}).get("sentences") or ())]
    whole = findings.metrics.get("attention-similarity")
    beyond = "" if whole is None else against_seeds(whole)
    sentences += [f"{_upper(beyond)}."] if beyond else []
    found = [table for table in (pair_tests_table(findings), classes_table(findings)) if table is not None]
    warning = str((kept.get("extremes") or {}).get("warning") or "")
    return Certainty(tuple(sentences), tuple(found), tuple(extremes_tables(findings)), warning)


def rules_table(findings: Findings) -> Table | None:
    """Every rule behind the answer and how it came out, as the findings hold it."""
    if not findings.verdict:
        return None
    header = (
        "what is asked",
        "number",
        "value",
        "95 % interval",
        "yes if",
        "answer",
        "where and why",
        "does not say",
        "source",
    )
    rows = [
        (
            _upper(str(row["says"])),
            f"{row['metric']}: {row['quantity']}" if row.get("metric") else str(row["quantity"]),
            number(row["value"]),
            interval(row["ci95"]),
            f"{row['direction']} {row['threshold']:g}",
            str(row["answer"]),
            str(row["reason"]),
            str(row["does_not_say"]),
            str(row["source"]),
        )
        for row in findings.verdict
    ]
    notes = (
        "Value and interval are those of the block, pair or depth that goes furthest; intervals of single places are not "
        "corrected for their number.",
    )
    return Table(header, tuple(rows), notes, words=frozenset((1, 6, 7, 8)))


def pair_tests_table(findings: Findings) -> Table | None:
    """For each similarity how many neighbouring pairs are more alike than with the wrong tokens."""
    tests: Mapping[str, Any] = findings.sureness.get("tests") or {}
    if not tests:
        return None
    header = ("metric", "pairs above their null", "largest q among them", "smallest p possible", "images", "all pairs", "test")
    rows = [(name, *_test(found)) for name, found in tests.items()]
    sentences = tuple(f"{name}: {found['sentence']}" for name, found in tests.items() if not found["enough_images"])
    notes = (*sentences, *dict.fromkeys(str(found["assumption"]) for found in tests.values()))
    return Table(
        header, tuple(rows), notes, "Is a pair of blocks more alike than with the wrong tokens?", words=frozenset((6,))
    )


def _test(found: Mapping[str, Any]) -> tuple[str, ...]:
    passed = [q for q in found["q"] if q is not None and q <= found["level"]]
    whole = found.get("all_pairs")
    return (
        f"{found['significant']} of {found['tested']}" if found["enough_images"] else "too few images to tell",
        _q(max(passed)) if passed else DASH,
        f"{found['smallest_p']:.2g}",
        str(found["images"]),
        DASH if whole is None else f"{whole['significant']} of {whole['tested']} ({whole['test']})",
        str(found["test"]),
    )


def extremes_tables(findings: Findings) -> list[Table]:
    """The images at both ends of every headline number."""
    extremes: Mapping[str, Any] = findings.sureness.get("extremes") or {}
    found = []
    for name, entry in (extremes.get("numbers") or {}).items():
        titles = sides(entry)
        rows = tuple(
            (str(at + 1), *_image(entry["highest"], at), *_image(entry["lowest"], at)) for at in range(len(entry["highest"]))
        )
        words = _upper(words_of(name))
        note = f"Median of {entry['images']} images: {number(entry['median'])}."
        header = ("", titles[0], "value", titles[1], "value")
        found.append(Table(header, rows, (note,), words, words=frozenset((1, 3))))
    return found


def sides(entry: Mapping[str, Any]) -> tuple[str, str]:
    """What the two ends of a number are called, highest first; the collapsed end is said to be it."""
    sick = {"high": "highest", "low": "lowest"}.get(entry["collapsed"] or "")
    highest, lowest = (f"{end} (the collapsed end)" if end == sick else end for end in ("highest", "lowest"))
    return highest, lowest


def _image(listed: Sequence[Mapping[str, Any]], at: int) -> tuple[str, str]:
    return (str(listed[at]["name"]), number(listed[at]["value"])) if at < len(listed) else (DASH, DASH)


def classes_table(findings: Findings) -> Table | None:
    """The headline numbers class by class; outlined: q at most LEVEL against all other images."""
    classes: Mapping[str, Any] = findings.sureness.get("classes") or {}
    if not classes:
        return None
    numbers: Mapping[str, Any] = classes["numbers"]
    header = ["class", "images"]
    for name in numbers:
        header += [words_of(name), "95 % interval", "q"]
    rows, marked = [], set()
    for at, (label, images) in enumerate(zip(classes["names"][:MOST_CLASSES], classes["images"], strict=False)):
        row = [str(label), str(images)]
        for entry in numbers.values():
            q = entry["q"][at]
            if q is not None and q <= LEVEL:
                marked |= {(at, len(row)), (at, len(row) + 2)}
            row += [number(entry["value"][at]), _ends(entry, at), _q(q)]
        rows.append(tuple(row))
    more = len(classes["names"]) - len(rows)
    notes = [f"Outlined: q ≤ {LEVEL:g}. {classes['test']}. A class with fewer than two images has no interval."]
    notes += [f"{more} more classes are in findings.json."] if more > 0 else []
    return Table(tuple(header), tuple(rows), tuple(notes), "Class by class", frozenset(marked))


def _q(value: float | None) -> str:
    return "< 0.001" if value is not None and value < 0.001 else number(value)


def _ends(entry: Mapping[str, Any], at: int) -> str:
    low, high = entry["ci_low"][at], entry["ci_high"][at]
    return DASH if low is None or high is None else interval((low, high))


def words_of(name: str) -> str:
    """A headline number in words, with its unit."""
    if name not in HEADLINES:
        return f"number of similar blocks (raw > {RAW_ABOVE:g})" if name == "similar_blocks" else name.replace("_", " ")
    headline = HEADLINES[name]
    return f"{headline.words}, {headline.unit}" if headline.unit else headline.words


def _upper(text: str) -> str:
    return text[:1].upper() + text[1:]
