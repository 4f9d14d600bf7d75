"""The first screen: an answer in three rows, the headline numbers on scales, the closest blocks, and one small figure."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from collapse_probe.report.findings.cards import entropy_ends
from collapse_probe.report.heatmaps import SIGNED, Scale, mosaic, scale_of
from collapse_probe.report.sheet import FAINT, Sheet, coordinate, words
from collapse_probe.results.findings import Findings
from collapse_probe.results.outcomes import verdict_table
from collapse_probe.results.readings import (
    adjacent,
    entropy_share,
    mean,
    null_ci95,
    null_of,
    result_of,
    weights_only,
)
from collapse_probe.results.rules import BY_NAME, FEWEST_IMAGES, KAPPA_ABOVE
from collapse_probe.results.text import DASH, interval, number, numbered
from collapse_probe.results.verdict import Verdict
from collapse_probe.statistics.intervals import Array

Tone = Literal["good", "bad", "unsure", "none"]
SYMBOLS: Mapping[Tone, str] = {"good": "✓", "bad": "✗", "unsure": "?", "none": "–"}
"""A badge says by a sign, a word and a colour how a row comes out."""
SAID: Mapping[str, tuple[Tone, str, str]] = {
    "near-uniform": (
        "good",
        "no collapse",
        "Maps look alike only because attention is nearly uniform: no more than chance would give.",
    ),
    "explained": ("good", "no collapse", "Maps look alike, but no more than chance would give."),
    "distinct": ("good", "no collapse", f"Adjacent blocks attend differently: κ is above {KAPPA_ABOVE:g} in no pair."),
    "query-independent": (
        "unsure",
        "ignores the query",
        "In most pairs every token attends with the same row, whatever it asks for.",
    ),
    "as-untrained": (
        "unsure",
        "as untrained",
        "Blocks attend alike, but in an untrained copy as much: the architecture alone may cause it.",
    ),
    "weights-only": ("none", "not measured", "Only the parameters were measured, without images."),
    "not-judged": ("none", "not measured", "Similarity of attention maps was not asked for in this run."),
    "not-applicable": ("none", "not applicable", "Attention maps of blocks cannot be compared here; the reason stands below."),
}
"""Badge and sentence of the first row by the case of the verdict, where attention has not collapsed."""
CLOSEST = 3  # pairs of blocks that are named
LEAST = 0.01  # a κ below it is no agreement worth a name


@dataclass(frozen=True)
class Row:
    """One of the three answers: its badge (sign, word, value), one sentence, how sure, and compared with what."""

    title: str
    tone: Tone
    word: str
    value: str
    sentence: str
    sure: str
    against: str

    @property
    def symbol(self) -> str:
        """The sign of the badge."""
        return SYMBOLS[self.tone]


def rows(findings: Findings, verdict: Verdict) -> list[Row]:
    """Attention across depth, tokens within an image and entropy, each answered."""
    if weights_only(findings):
        return []
    outcomes = _outcomes(findings)
    return [_depth(findings, verdict), _tokens(findings, outcomes), _entropy(findings, outcomes)]


def headline(findings: Findings, answers: list[Row], verdict: Verdict) -> str:
    """The answer of the page in a few words."""
    if not answers:
        return "Parameters only: nothing about attention"
    bad = [row for row in answers if row.tone == "bad"]
    if bad:
        return f"Collapse: {', '.join(row.title[0].lower() + row.title[1:] for row in bad)}"
    first = answers[0]
    if first.tone == "good":
        all_good = all(row.tone == "good" for row in answers)
        return "No attention collapse" if all_good else "No collapse of attention across depth"
    open_answers = {
        "not measured": "Attention collapse was not judged",
        "not applicable": "Attention collapse cannot be judged",
    }
    return open_answers.get(first.word, "Undecided whether attention has collapsed")


def closest(findings: Findings) -> str:
    """The pairs of adjacent blocks that agree most beyond chance, highest first, by name and with their intervals."""
    result = result_of(findings, "attention-similarity")
    kappa = None if result is None else null_of(result, "kappa")
    if result is None or kappa is None:
        return ""
    values, ends = adjacent(result, kappa), null_ci95(result, "kappa")
    around = None if ends is None else adjacent(result, ends)
    order = [at for at in np.argsort(-np.nan_to_num(values, nan=-np.inf)).tolist() if np.isfinite(values[at])][:CLOSEST]
    said = []
    for at in order:
        sure = "" if around is None or not np.isfinite(around[at]).all() else f", 95 % CI {interval(around[at])}"
        said.append(f"block {at + 1} with block {at}: κ {number(values[at])}{sure}")
    if order and values[order[0]] < LEAST:
        return f"No adjacent blocks agree beyond chance: the largest κ is {number(values[order[0]])}."
    return f"Closest adjacent blocks: {'; '.join(said)}." if said else ""


def badge(collapsed: bool | None, case: str, alike: tuple[int, int]) -> tuple[Tone, str]:
    """Sign and words of a verdict in the cell of a table."""
    if collapsed:
        return "bad", f"collapsed in {alike[0]} of {alike[1]} pairs"
    return SAID.get(case, ("unsure", "undecided", ""))[:2]


def _outcomes(findings: Findings) -> dict[str, Mapping[str, Any]]:
    stored = findings.verdict or [each.plain() for each in verdict_table(findings)]
    return {str(row["rule"]): row for row in stored}


def _images(findings: Findings) -> str:
    images = int(findings.data.get("images") or 0)
    return f"{images:,} image{'' if images == 1 else 's'}"


def _sure(findings: Findings, ends: Any) -> str:
    text = interval(ends)
    return _images(findings) if text == DASH else f"95 % CI {text}, {_images(findings)}"


def _depth(findings: Findings, verdict: Verdict) -> Row:
    title, result = "Attention across depth", result_of(findings, "attention-similarity")
    summary = findings.summary
    kappa = None if result is None else mean(adjacent(result, null_of(result, "kappa")))
    value = "" if kappa is None else f"κ {number(kappa, 2)}"
    ends = (summary.get("kappa_adjacent_ci_low"), summary.get("kappa_adjacent_ci_high"))
    sure = "" if result is None else _sure(findings, None if kappa is None or None in ends else ends)
    chance = None if result is None else mean(adjacent(result, null_of(result, "other_token")))
    fresh = None if result is None else mean(adjacent(result, null_of(result, "untrained")))
    parts = [f"chance level {number(chance)}"] if chance is not None else []
    parts += [f"untrained copy {number(fresh)}"] if fresh is not None else []
    raw = None if result is None else mean(adjacent(result, result.array))
    against = f"Raw similarity {number(raw)} against {' and '.join(parts)}." if raw is not None and parts else ""
    _, compared = verdict.alike
    total = len(verdict.pairs)
    tone, word, sentence = _depth_said(findings, verdict, compared)
    if total and compared <= total / 2 and tone in ("good", "unsure"):
        tone, word = "unsure", "mostly not comparable"
        sentence = f"Only {compared} of {total} adjacent pairs can be compared; the reasons stand below."
    return Row(title, tone, word, value, sentence, sure, against)


def _depth_said(findings: Findings, verdict: Verdict, compared: int) -> tuple[Tone, str, str]:
    """Badge and sentence of the first row."""
    at, pairs = verdict.shared, f"{compared} adjacent pairs"
    shared = len(at)
    tied = set(np.flatnonzero(findings.model.get("shares_weights") or ()))
    if verdict.collapsed:
        if at and tied.issuperset(at):
            same = f"In {shared} of {pairs} both blocks have the same parameters, and attend alike by construction."
            return "bad", "collapsed by construction", same
        if verdict.case == "query-independent":
            return "bad", "collapsed", f"In {shared} of {pairs} every query attends with the same row as in the block before."
        return "bad", "collapsed", f"In {shared} of {pairs} a block attends like the one before, beyond chance."
    if (findings.data.get("images") or 0) < FEWEST_IMAGES and verdict.case == "undecided":
        return "unsure", "too few images", f"{_images(findings)} are too few to tell; at least {FEWEST_IMAGES} are needed."
    return SAID.get(
        verdict.case, ("unsure", "undecided", "Some adjacent pairs are too close to call; the reasons stand below.")
    )


def _tokens(findings: Findings, outcomes: Mapping[str, Mapping[str, Any]]) -> Row:
    title = "Tokens within an image"
    result = result_of(findings, "patch-diversity")
    if result is None or not len(result.array) or not np.isfinite(result.array[-1]):
        return Row(title, "none", "not measured", "", "Patch diversity has no value in this run.", "", "")
    row, limit = outcomes.get("parallel-patches", {}), 1 - BY_NAME["parallel-patches"].threshold
    value = float(result.array[-1])
    tone, word, sentence = _answered(
        row.get("answer"),
        f"After the last block the patches of an image are nearly parallel (diversity below {limit:.1g}).",
        f"After the last block the patches of an image still differ (diversity above {limit:.1g}).",
        f"Too close to call: the interval of patch diversity includes the limit {limit:.1g}.",
        findings,
    )
    if tone == "good" and outcomes.get("less-diverse-than-untrained", {}).get("answer") == "yes":
        tone, word = "unsure", "less than untrained"
        sentence = "Patches still differ, but less than half as much as in the untrained copy."
    fresh = null_of(result, "untrained")
    if tone == "bad" and fresh is not None and fresh[-1] < limit:
        sentence = "After the last block the patches of an image are nearly parallel; so they are in the untrained copy."
    against = (
        "" if fresh is None or not np.isfinite(fresh[-1]) else f"Untrained copy {number(fresh[-1])}; 0 means all patches alike."
    )
    ends = None if result.ci95 is None else result.ci95[-1]
    return Row(title, tone, word, f"diversity {number(value, 2)}", sentence, _sure(findings, ends), against)


def _entropy(findings: Findings, outcomes: Mapping[str, Mapping[str, Any]]) -> Row:
    title, share = "Attention entropy", entropy_share(findings)
    average = None if share is None else mean(share.mean)
    if share is None or average is None:
        return Row(title, "none", "not measured", "", "Attention entropy has no value in this run.", "", "")
    row = outcomes.get("entropy-collapse", {})
    low = BY_NAME["entropy-collapse"].threshold
    sharp = [place["at"] for place in row.get("places") or () if place["answer"] == "yes" and place["at"] is not None]
    blocks = numbered(sharp) if len(sharp) <= 3 else f"{len(sharp)} blocks"
    uniform = average > BY_NAME["near-uniform"].threshold
    tone, word, sentence = _answered(
        row.get("answer"),
        f"In {blocks} heads attend to hardly more than one key (entropy below {low:g} of uniform).",
        "Attention is spread over nearly all tokens."
        if uniform
        else f"No block attends to single keys alone (entropy below {low:g} of uniform).",
        f"Too close to call: in some block the interval includes the limit {low:g} of uniform.",
        findings,
    )
    word = "no collapse, nearly uniform" if uniform and tone == "good" else word
    against = "" if share.untrained is None else f"Untrained copy {number(mean(share.untrained), 2)}; 1 is uniform attention."
    ends = entropy_ends(findings)
    return Row(title, tone, word, f"{number(average, 2)} of uniform", sentence, _sure(findings, ends), against)


def _answered(answer: Any, yes: str, no: str, unsure: str, findings: Findings) -> tuple[Tone, str, str]:
    """Badge and sentence of a row that one rule decides."""
    if answer == "yes":
        return "bad", "collapsed", yes
    if answer == "no":
        return "good", "no collapse", no
    if answer == "undecided":
        few = (findings.data.get("images") or 0) < FEWEST_IMAGES
        if few:
            return "unsure", "too few images", f"{_images(findings)} are too few to tell; at least {FEWEST_IMAGES} are needed."
        return "unsure", "undecided", unsure
    return "none", "not judged", "The rule that decides this does not apply here."


SIDE, BETWEEN, HEAD, FOOT = 150.0, 16.0, 34.0, 16.0  # pixels of a small matrix and around it


@dataclass(frozen=True)
class Small:
    """Raw similarity and κ of every two blocks as two small matrices, without numbers."""

    raw: Array
    kappa: Array | None

    @property
    def size(self) -> tuple[float, float]:
        """Width and height in pixels."""
        return 2 * SIDE + BETWEEN if self.kappa is not None else SIDE, HEAD + SIDE + FOOT

    @property
    def label(self) -> str:
        """What it shows, in words."""
        said = []
        for name, values in (("raw similarity", self.raw), ("κ", self.kappa)):
            if values is not None:
                apart = values[~np.eye(len(values), dtype=bool)]
                known = apart[np.isfinite(apart)]
                ends = f"{number(known.min(), 2)} to {number(known.max(), 2)}" if known.size else "undefined"
                said.append(f"{name} between different blocks {ends}")
        return f"Every block with every other, {len(self.raw)} by {len(self.raw)}: {'; '.join(said)}"

    def body(self, name: str) -> str:
        """Two mosaics with a title each."""
        parts = [_tile(0, "Raw similarity", "of attention maps", self.raw, scale_of(self.raw))]
        if self.kappa is not None:
            parts.append(_tile(SIDE + BETWEEN, "Beyond chance", "κ: 0 chance, 1 identical", self.kappa, SIGNED))
        return "".join(parts)


def _tile(x: float, title: str, under: str, values: Array, scale: Scale) -> str:
    blocks = len(values)
    place = f'transform="translate({coordinate(x)} {HEAD:g}) scale({SIDE / blocks:.5g})" shape-rendering="crispEdges"'
    ground = f'<path fill="{FAINT}" d="M0 0h{blocks}v{blocks}h-{blocks}z"/>'
    ends = words("block 0", x, HEAD + SIDE + 12, size=10) + words(
        str(blocks - 1), x + SIDE, HEAD + SIDE + 12, size=10, anchor="end"
    )
    return f"{words(title, x, 13, size=13)}{words(under, x, 28, size=11)}<g {place}>{ground}{mosaic(values, scale)}</g>{ends}"


def small_figure(findings: Findings) -> Sheet | None:
    """The small figure of the first screen; None where no similarity of blocks was measured."""
    result = result_of(findings, "attention-similarity")
    if result is None or not np.isfinite(result.array).any():
        return None
    return Sheet((Small(result.array, null_of(result, "kappa")),)).called("at-a-glance")
