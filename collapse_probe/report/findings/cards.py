"""The headline numbers, each with its place on a scale: where this model, its untrained copy and collapse lie."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from collapse_probe.report.sheet import coordinate
from collapse_probe.results.findings import Findings
from collapse_probe.results.readings import (
    adjacent,
    corrected_count,
    counts_of,
    entropy_share,
    mean,
    null_ci95,
    null_of,
    pair_count,
    result_of,
)
from collapse_probe.results.rules import BY_NAME, KAPPA_ABOVE, RAW_ABOVE
from collapse_probe.results.text import DASH, interval, number
from collapse_probe.statistics.intervals import Array

SAME = 1e-6  # two means that differ by less are one


@dataclass(frozen=True)
class Mark:
    """A place on a scale of numbers: the model's own, or one that it is read against."""

    at: float
    words: str
    kind: Literal["own", "copy", "chance"] = "own"


@dataclass(frozen=True)
class Bar:
    """Where a number lies between the two ends of what it can be, with the side that counts as collapsed shaded.

    `ends` are the words at both ends, `interval` the 95 % CI, `collapsed` the shaded part.
    """

    low: float
    high: float
    ends: tuple[str, str]
    marks: tuple[Mark, ...]
    interval: tuple[float, float] | None = None
    collapsed: tuple[float, float] | None = None

    def share(self, value: float) -> str:
        """How far from the low end a value lies, in percent, within the bar."""
        return coordinate(100 * min(max((value - self.low) / (self.high - self.low), 0.0), 1.0))

    def span(self, ends: tuple[float, float]) -> tuple[str, str]:
        """Where a part begins and how wide it is, in percent."""
        low, high = (min(max((end - self.low) / (self.high - self.low), 0.0), 1.0) for end in ends)
        return coordinate(100 * low), coordinate(100 * (high - low))

    @property
    def label(self) -> str:
        """All of it in words."""
        marks = ", ".join(f"{mark.words} {number(mark.at)}" for mark in self.marks)
        shaded = "" if self.collapsed is None else f"; shaded as collapsed: {self.collapsed[0]:g} to {self.collapsed[1]:g}"
        return f"{marks}; from {self.ends[0]} to {self.ends[1]}{shaded}"


@dataclass(frozen=True)
class Card:
    """One headline number: its value, its interval or what it counts, what it is compared with, and its place on a scale."""

    label: str
    value: str
    detail: str = ""
    reference: str = ""
    bar: Bar | None = None


def key_numbers(findings: Findings) -> list[Card]:
    """Every headline number of the first screen; what was not measured is left out."""
    return [*_similarity_cards(findings), *_count_card(findings), *_diversity_card(findings), *_entropy_card(findings)]


def entropy_ends(findings: Findings) -> tuple[float, float] | None:
    """The 95 % CI of the mean entropy as a share of log N; None where the one that is stored is of another mean.

    That is so where blocks have different N, or different numbers of heads, over all of which the stored one is a mean.
    """
    share = entropy_share(findings)
    stored = [findings.summary.get(f"attention_entropy_mean{end}") for end in ("", "_ci_low", "_ci_high")]
    average = None if share is None else mean(share.mean)
    if share is None or average is None or share.unit == "log N" or None in stored:
        return None
    scale = float(np.log(share.keys[np.isfinite(share.mean)][0]))
    value, low, high = (float(each) / scale for each in stored if each is not None)
    return (low, high) if abs(value - average) < SAME else None


def _similarity_cards(findings: Findings) -> tuple[Card, ...]:
    result = result_of(findings, "attention-similarity")
    if result is None or len(result.array) < 2:
        return ()
    kappa, fresh = adjacent(result, null_of(result, "kappa")), mean(adjacent(result, null_of(result, "untrained")))
    raw = adjacent(result, result.array)
    compared, measured = int(np.isfinite(raw).sum()), mean(raw)
    undefined = compared - int(np.isfinite(kappa).sum())
    token, average = mean(adjacent(result, null_of(result, "other_token"))), mean(kappa)
    raw_ends, ends = (
        _mean_ends(findings, result, name, around)
        for name, around in (("attention_similarity_adjacent", result.ci95), ("kappa_adjacent", null_ci95(result, "kappa")))
    )
    detail, beside = _in_words(ends), f"undefined for {undefined} of {compared} pairs" if undefined else ""
    if average is None:
        detail, beside = why_no_null(result, "kappa") if compared else "no two adjacent blocks are compared", ""
    marks = [Mark(token, "chance level", "chance")] if token is not None else []
    marks += [Mark(fresh, "untrained copy", "copy")] if fresh is not None else []
    scale = of_kappa = None
    if measured is not None:
        low = min([0.0, measured, *(mark.at for mark in marks)])
        words_low = number(low, 2) if low else "0"
        scale = Bar(low, 1.0, (words_low, "1: identical"), (*marks, Mark(measured, "this model")), raw_ends)
    if average is not None:
        words_low = "0: chance" if average >= 0 else number(average, 2)
        own = Mark(average, "this model")
        of_kappa = Bar(min(0.0, average), 1.0, (words_low, "1: identical"), (own,), ends, (KAPPA_ABOVE, 1.0))
    return (
        Card("raw similarity of adjacent pairs", number(measured), _in_words(raw_ends), _beside_copy(fresh), scale),
        Card("chance level (other tokens)", number(token), "the same, for other tokens"),
        Card("κ: agreement beyond chance", number(average), detail, beside, of_kappa),
    )


def _count_card(findings: Findings) -> tuple[Card, ...]:
    count, corrected = findings.summary.get("similar_blocks"), corrected_count(findings)
    if count is None:
        return ()
    low, high = (findings.summary.get(f"similar_blocks_ci_{end}") for end in ("low", "high"))
    ends = [] if low is None or high is None else [f"raw [{low:g}, {high:g}]"]
    if corrected is not None and corrected.ci95 is not None:
        ends.append(f"κ [{corrected.ci95[0]:g}, {corrected.ci95[1]:g}]")
    above = KAPPA_ABOVE if corrected is None else corrected.above
    pairs = f"{pair_count(findings)} {'compared ' if findings.model.get('uncompared') else ''}pairs"
    detail = f"of {pairs}: raw above {RAW_ABOVE:g}, κ above {above:g}"
    value = f"{count:g} / {DASH if corrected is None else f'{corrected.value:g}'}"
    raw = counts_of(findings).get(f"raw > {RAW_ABOVE:g}")
    said = [f"95 % CI {', '.join(ends)}"] if ends else []
    said += [] if raw is None or raw.untrained is None else [f"untrained copy, raw: {raw.untrained:g}"]
    return (Card("similar blocks, raw / by κ", value, detail, "; ".join(said)),)


def _diversity_card(findings: Findings) -> tuple[Card, ...]:
    result = result_of(findings, "patch-diversity")
    if result is None or not len(result.array):
        return ()
    value, fresh = float(result.array[-1]), null_of(result, "untrained")
    low, high = (float("nan"),) * 2 if result.ci95 is None else map(float, result.ci95[-1])
    ends = (low, high) if np.isfinite([low, high]).all() else None
    copy = None if fresh is None or not np.isfinite(fresh[-1]) else float(fresh[-1])
    bar = None
    if np.isfinite(value):
        marks = (*_copy_mark(copy), Mark(value, "this model"))
        bar = Bar(0.0, 1.0, ("0: all alike", "1"), marks, ends, (0.0, 1 - BY_NAME["parallel-patches"].threshold))
    return (Card("patch diversity after the last block", number(value), _in_words(ends), _beside_copy(copy), bar),)


def _copy_mark(value: float | None) -> tuple[Mark, ...]:
    return () if value is None else (Mark(value, "untrained copy", "copy"),)


def _entropy_card(findings: Findings) -> tuple[Card, ...]:
    share = entropy_share(findings)
    average = None if share is None else mean(share.mean)
    if share is None or average is None:
        return ()
    copy, ends = mean(share.untrained), entropy_ends(findings)
    marks = (*_copy_mark(copy), Mark(average, "this model"))
    bar = Bar(0.0, 1.0, ("0: one key", "1: uniform"), marks, ends, (0.0, BY_NAME["entropy-collapse"].threshold))
    detail = f"of {share.unit}; 1 is uniform attention"
    return (Card("attention entropy", number(average, 2), detail, _beside_copy(copy, 2), bar),)


def _beside_copy(value: float | None, digits: int = 3) -> str:
    return "" if value is None else f"untrained copy {number(value, digits)}"


def _in_words(ends: Any) -> str:
    text = interval(ends)
    return "" if text == DASH else f"95 % CI {text}"


def _mean_ends(findings: Findings, result: Any, name: str, ci95: Array | None) -> tuple[float, float] | None:
    """The interval of a mean over adjacent pairs: the summary's, as the answer quotes it.

    Without one (no values of single images) the mean of the pairs' ends, wide enough for any dependence.
    """
    low, high = (findings.summary.get(f"{name}_ci_{end}") for end in ("low", "high"))
    if ci95 is not None and (low is None or high is None):
        low, high = (mean(adjacent(result, ci95)[:, end]) for end in (0, 1))
    return None if low is None or high is None else (float(low), float(high))


def why_no_null(result: Any, role: str) -> str:
    """Why there is no value of a chance level, of the untrained copy or of κ."""
    if result.nulls is None:
        return "not taken in this run"
    return str(result.nulls.reasons.get(role, "the chance level is 1" if role == "kappa" else "not taken in this run"))
