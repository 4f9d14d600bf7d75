"""The numbers of a page: the strip of key numbers and the table over blocks."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from itertools import zip_longest
from typing import Any

import numpy as np

from collapse_probe.report.findings.cards import why_no_null
from collapse_probe.report.html import Table
from collapse_probe.report.style import NULL_LABELS
from collapse_probe.results.findings import Findings, MetricResult
from collapse_probe.results.readings import (
    NULLS,
    adjacent,
    against_seeds,
    entropy_share,
    null_ci95,
    null_of,
    result_of,
)
from collapse_probe.results.rules import RAW_ABOVE
from collapse_probe.results.text import DASH, interval, number, numbered, p_value, plain, sentence_case
from collapse_probe.statistics.estimates import HEADLINES
from collapse_probe.statistics.intervals import Array
from collapse_probe.statistics.pair_tests import LEVEL


def uncompared(findings: Findings) -> list[str]:
    """Which blocks are not compared with the block before, and why."""
    stored = [(list(each["blocks"]), each["why"]) for each in findings.model.get("uncompared") or ()]
    return [f"{sentence_case(numbered(blocks))}: not compared with the block before ({why})" for blocks, why in stored]


def per_block(findings: Findings) -> Table:
    """One row a block: similarity with the block before, its nulls, kappa, entropy and patch diversity."""
    columns: dict[str, list[str]] = {}
    notes: list[str] = []
    similarity = result_of(findings, "attention-similarity")
    if similarity is not None:

        def cells(matrix: Array | None, write: Callable[[Any], str] = number) -> list[str]:
            """Cells of each block with the block before: a dash for block 0, and everywhere where nothing was measured."""
            return [DASH] * len(similarity.array) if matrix is None else [DASH, *map(write, adjacent(similarity, matrix))]

        def missing(matrix: Array | None) -> bool:
            """Whether a pair with a similarity has no number of this kind."""
            known = np.isfinite(adjacent(similarity, similarity.array))
            return matrix is not None and not np.isfinite(adjacent(similarity, matrix)[known]).all()

        columns["adjacent similarity"] = cells(similarity.array)
        columns["stderr"] = cells(similarity.stderr, partial(number, digits=4))
        columns["95 % CI"] = cells(similarity.ci95, interval)
        columns |= {NULL_LABELS[role]: cells(null_of(similarity, role)) for role in (*NULLS, "kappa")}
        columns["κ, 95 % CI"] = cells(null_ci95(similarity, "kappa"), interval)
        notes.append("Block 0 has no block before it, so nothing to be compared with.")
        notes += [f"{note}." for note in uncompared(findings)]
        absent = [role for role in (*NULLS, "kappa") if null_of(similarity, role) is None]
        notes += [f"{NULL_LABELS[role]}: {why_no_null(similarity, role)}." for role in absent]
        if "kappa" not in absent and missing(null_of(similarity, "kappa")):
            notes.append("κ is undefined where the chance level is 1: nothing is left to be explained.")
        if missing(similarity.stderr):
            notes.append("Standard errors and intervals need at least two images.")
    share, diversity = entropy_share(findings), result_of(findings, "patch-diversity")
    if share is not None:
        columns["entropy, nats"] = [number(value, 2) for value in share.mean * np.log(np.maximum(share.keys, 1))]
        columns["entropy / log N"] = [number(value, 2) for value in share.mean]
    if diversity is not None:
        columns["patch diversity"] = [number(value) for value in diversity.array[1:]]
    blocks = max((len(cells) for cells in columns.values()), default=0)
    rows = [(str(b), *(cells[b] if b < len(cells) else DASH for cells in columns.values())) for b in range(blocks)]
    return Table(("block", *columns), tuple(rows), tuple(notes))


DECIDED = {
    "paper": "the paper decides where its code differs",
    "code": "the authors' code decides where the paper differs",
}


def followed(findings: Findings) -> list[dict[str, Any]]:
    """Name, version, summary, facts (metrics and sources) and the table of choices of each preset as the findings hold it."""
    presets = []
    for name, record in findings.presets.items():
        source, follows = record.get("source") or {}, str(record.get("follows"))
        facts = (
            ("metrics", ", ".join(map(str, record.get("metrics") or ()))),
            *((part, plain(source.get(part))) for part in ("paper", "code")),
            ("where they differ", DECIDED.get(follows, follows)),
        )
        rows = tuple((str(row["choice"]), str(row["value"]), str(row["follows"])) for row in record.get("choices") or ())
        header = ("choice", "as it is made here", "decided by")
        choices = Table(header, rows, (), f"The choices of {name}", words=frozenset((1, 2)))
        words = {"version": str(record.get("version")), "summary": str(record.get("summary") or "")}
        presets.append({"name": name, **words, "facts": facts, "choices": choices})
    return presets


SIDES = {"before": "before", "both": "on each side"}
NOTE = (
    "Blocks whose similarity ratio is above {above}, of those that have neighbours, with the 95 % interval of the number; "
    "outlined: the choice drawn above. "
    "DeepViT leaves these choices open, so that no cell is the paper's own. With the mean as threshold a vector counts when it "
    "is not below the mean of its block, which about half of them are by chance."
)


def sensitivity_tables(findings: Findings) -> list[Table]:
    """One table for each kind of attention vector: rows direction and k, columns thresholds, cells "n of m (low … high)"."""
    kinds: dict[str, list[MetricResult]] = {}
    for name, result in findings.metrics.items():
        if name.partition("@")[0] == "similarity-ratio" and result.values is not None and result.details.get("sensitivity"):
            settings, centred = result.settings, ", centred" if result.settings.get("centred") else ""
            kind = f"{settings.get('axis', 'column')}s{centred} of {settings.get('point', 'weights')}"
            kinds.setdefault(kind, []).append(result)
    return [_sensitivity_table(kind, results) for kind, results in kinds.items()]


def _sensitivity_table(kind: str, results: Sequence[MetricResult]) -> Table:
    stored: Sequence[Mapping[str, Any]] = results[0].details["sensitivity"]
    thresholds = list(dict.fromkeys(row["threshold"] for row in stored))
    lines = list(dict.fromkeys((row["direction"], row["k"]) for row in stored))
    cells = [[DASH] * len(thresholds) for _ in lines]
    for row in stored:
        ends = "" if row.get("ci95") is None else " [{:g}, {:g}]".format(*row["ci95"])
        at = lines.index((row["direction"], row["k"])), thresholds.index(row["threshold"])
        cells[at[0]][at[1]] = f"{row['similar_blocks']} of {row['blocks']}{ends}"
    marked = {
        (lines.index((s["direction"], s["k"])), thresholds.index(s["threshold"]) + 1)
        for s in (result.settings for result in results)
        if (s.get("direction"), s.get("k")) in lines and s.get("threshold") in thresholds
    }
    titles = [f"threshold: {t}" if isinstance(t, str) else f"cosine > {plain(t)}" for t in thresholds]
    rows = [
        (f"{k} {'block' if k == 1 else 'blocks'} {SIDES.get(way, way)}", *line)
        for (way, k), line in zip(lines, cells, strict=True)
    ]
    note = NOTE.format(above=results[0].details.get("ratio_above", DASH))
    title = f"Similar blocks under every choice, {kind}"
    return Table(("nearest blocks", *titles), tuple(rows), (note,), title, frozenset(marked))


MOST_CLASSES = 60


def certainty(findings: Findings) -> dict[str, Any]:
    """Everything that the findings say about how sure they are: `sentences`, `tables`, `extremes`, `warning`."""
    stored = findings.sureness
    extremes, convergence = stored.get("extremes") or {}, stored.get("convergence") or {}
    whole = findings.metrics.get("attention-similarity")
    beyond = "" if whole is None else against_seeds(whole)
    return {
        "sentences": [
            *(convergence.get("known") or ()),
            *(convergence.get("sentences") or ()),
            *([f"{sentence_case(beyond)}."] if beyond else []),
        ],
        "tables": [table for table in (pair_tests_table(findings), classes_table(findings)) if table is not None],
        "extremes": extremes_tables(findings),
        "warning": str(extremes.get("warning") or ""),
    }


def rules_table(findings: Findings) -> Table | None:
    """Every rule behind the answer and how it came out, as the findings hold it."""
    if not findings.verdict:
        return None
    rows = [
        {
            "what is asked": sentence_case(str(row["says"])),
            "number": f"{row['metric']}: {row['quantity']}" if row.get("metric") else str(row["quantity"]),
            "value": number(row["value"]),
            "95 % CI": interval(row["ci95"]),
            "yes if": f"{row['direction']} {row['threshold']:g}",
            "answer": str(row["answer"]),
            "where and why": str(row["reason"]),
            "does not say": str(row["does_not_say"]),
            "source": str(row["source"]),
        }
        for row in findings.verdict
    ]
    note = (
        "Value and interval are those of the block, pair or depth that goes furthest; intervals of single places are not "
        "corrected for their number."
    )
    return Table(tuple(rows[0]), tuple(tuple(row.values()) for row in rows), (note,), words=frozenset((1, 6, 7, 8)))


def pair_tests_table(findings: Findings) -> Table | None:
    """For each similarity how many neighbouring pairs are more alike than the chance level."""
    tests: Mapping[str, Any] = findings.sureness.get("tests") or {}
    if not tests:
        return None
    rows = []
    for name, test in tests.items():
        passed = [q for q in test["q"] if q is not None and q <= test["level"]]
        whole = test.get("all_pairs")
        row = {
            "metric": name,
            "pairs above chance level": f"{test['significant']} of {test['tested']}",
            "largest q among them": p_value(max(passed)) if passed else DASH,
            "images": str(test["images"]),
            "untrained copy": _twins_test(test.get("untrained")),
            "all pairs": DASH if whole is None else f"{whole['significant']} of {whole['tested']} ({whole['test']})",
            "test": str(test["test"]),
        }
        rows.append(row if test["enough_images"] else {**row, "pairs above chance level": "too few images to tell"})
    sentences = [f"{name}: {test['sentence']}" for name, test in tests.items() if not test["enough_images"]]
    notes = (*sentences, *dict.fromkeys(str(test["assumption"]) for test in tests.values()))
    title = "Is a pair of blocks more alike than the chance level?"
    return Table(tuple(rows[0]), tuple(tuple(row.values()) for row in rows), notes, title, words=frozenset((6,)))


def _twins_test(twins: Mapping[str, Any] | None) -> str:
    """How many pairs of each untrained copy pass the same test."""
    if not twins:
        return DASH
    return f"{', '.join(map(str, twins['significant']))} of {twins['tested']} ({twins['images']} images)"


def extremes_tables(findings: Findings) -> list[Table]:
    """The images at both ends of every headline number."""
    tables = []
    for name, entry in ((findings.sureness.get("extremes") or {}).get("numbers") or {}).items():
        high, low = ([(str(each["name"]), number(each["value"])) for each in entry[end]] for end in ("highest", "lowest"))
        pairs = zip_longest(high, low[: len(high)], fillvalue=(DASH, DASH))
        rows = tuple((str(at), *one, *other) for at, (one, other) in enumerate(pairs, start=1))
        titles, words = sides(entry), sentence_case(words_of(name))
        note = f"Median of {with_undefined(entry)}: {number(entry['median'])}."
        tables.append(Table(("", titles[0], "value", titles[1], "value"), rows, (note,), words, words=frozenset((1, 3))))
    return tables


def with_undefined(entry: Mapping[str, Any]) -> str:
    """How many images have a number, and how many have none."""
    undefined = entry.get("undefined", 0)
    return f"{entry['images']} images" + (f" ({undefined} more have none)" if undefined else "")


def sides(entry: Mapping[str, Any]) -> tuple[str, str]:
    """What the two ends of a number are called, highest first; the collapsed end is said to be it."""
    collapsed = {"high": "highest", "low": "lowest"}.get(entry["collapsed"] or "")
    highest, lowest = (f"{end} (the collapsed end)" if end == collapsed else end for end in ("highest", "lowest"))
    return highest, lowest


def classes_table(findings: Findings) -> Table | None:
    """The headline numbers class by class; outlined: q at most LEVEL against all other images."""
    classes: Mapping[str, Any] = findings.sureness.get("classes") or {}
    numbers: Mapping[str, Any] = classes.get("numbers") or {}
    if not numbers:
        return None
    header = ["class", "images"]
    for name in numbers:
        header += [words_of(name), "95 % CI", "q"]
    rows, marked = [], set()
    for at, (label, images) in enumerate(zip(classes["names"][:MOST_CLASSES], classes["images"], strict=False)):
        row = [str(label), str(images)]
        for entry in numbers.values():
            q = entry["q"][at]
            if q is not None and q <= LEVEL:
                marked |= {(at, len(row)), (at, len(row) + 2)}
            ends = (entry["ci_low"][at], entry["ci_high"][at])
            row += [number(entry["value"][at]), DASH if None in ends else interval(ends), p_value(q)]
        rows.append(tuple(row))
    more = len(classes["names"]) - len(rows)
    notes = [f"Outlined: q ≤ {LEVEL:g}. {classes['test']}. A class with fewer than two images has no interval."]
    notes += [f"{more} more classes are in findings.json."] if more > 0 else []
    return Table(tuple(header), tuple(rows), tuple(notes), "Class by class", frozenset(marked))


def words_of(name: str) -> str:
    """A headline number in words, with its unit."""
    if name not in HEADLINES:
        return f"number of similar blocks (raw > {RAW_ABOVE:g})" if name == "similar_blocks" else name.replace("_", " ")
    headline = HEADLINES[name]
    return f"{headline.words}, {headline.unit}" if headline.unit else headline.words
