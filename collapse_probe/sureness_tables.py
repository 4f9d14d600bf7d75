"""How sure the findings are, as tables: tests, the rules of the verdict, images at both ends, classes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from collapse_probe.findings import Findings
from collapse_probe.headlines import HEADLINES
from collapse_probe.permutation import LEVEL
from collapse_probe.readings import RAW_THRESHOLD
from collapse_probe.sureness import against_seeds
from collapse_probe.tables import Table
from collapse_probe.words import DASH, interval, number

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
        return f"number of similar blocks (raw > {RAW_THRESHOLD:g})" if name == "similar_blocks" else name.replace("_", " ")
    headline = HEADLINES[name]
    return f"{headline.words}, {headline.unit}" if headline.unit else headline.words


def _upper(text: str) -> str:
    return text[:1].upper() + text[1:]
