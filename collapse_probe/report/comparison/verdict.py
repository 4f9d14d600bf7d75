"""What a comparison says: rules over its numbers that choose the sentences, and that tests can turn
around.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from collapse_probe.results.comparison import ACCURACY, KAPPA, PROBS, Comparison, Difference, Pair, equal, unsampled
from collapse_probe.results.findings import Findings
from collapse_probe.results.readings import adjacent, is_untrained, mean, null_of, weights_only
from collapse_probe.results.rules import RAW_ABOVE
from collapse_probe.results.text import interval, number, spans
from collapse_probe.results.verdict import MEANS, MOST_LISTED
from collapse_probe.statistics.paired import SAME, Paired

NO_SAMPLE = "A model is no sample of weights: these differences have no interval and no p-value."


def contrasted(pair: Pair, first: Findings, second: Findings) -> tuple[str, ...]:
    """The sentences about two models of which the weights alone were measured."""
    every = {name: _parts(pair, name) for name in first.metrics if name in second.metrics}
    held = {name: parts for name, parts in every.items() if parts}
    who = f"{pair.first} and {pair.second}"
    if not held:
        why = "; ".join(f"{name}: {reason}" for name, reason in pair.not_comparable.items())
        return (f"The weights of {who} cannot be set against each other block by block ({why or 'nothing was measured'}).",)
    if all((np.nan_to_num(part.paired.difference) == 0).all() for parts in held.values() for part in parts.values()):
        return (f"No number of the weights differs between {who}: {', '.join(held)}.",)
    chosen = [name for name in MEANS if name in held] or list(held)[:MOST_LISTED]
    told = "; ".join(_told(name, held[name]) for name in chosen)
    return (f"The weights of {pair.second} against those of {pair.first}, mean over blocks and matrices: {told}.",)


def _parts(pair: Pair, name: str) -> dict[str, Difference]:
    parts = {key: d for key, d in pair.differences.items() if key == name or key.startswith(f"{name}/")}
    return {key: part for key, part in parts.items() if np.isfinite(part.paired.difference).any()}


def _told(name: str, parts: Mapping[str, Difference]) -> str:
    first, second = (np.nanmean([getattr(part.overall, side)[0] for part in parts.values()]) for side in ("first", "second"))
    key, part = max(parts.items(), key=lambda item: float(np.nanmax(np.abs(item[1].paired.difference))))
    at = int(np.nanargmax(np.abs(part.paired.difference)))
    matrix = key.removeprefix(name).removeprefix("/")
    where = f"{f'{matrix} of ' if matrix else ''}block {part.places[at]}"
    ends = f"{number(part.paired.second[at])} against {number(part.paired.first[at])}"
    return f"{name} {number(second)} against {number(first)} (most apart: {where}, {ends})"


RAW = "attention-similarity"


def overall(difference: Difference, which: int) -> float:
    """The mean over blocks in the first (0) or the second (1) subject."""
    return float((difference.overall.second if which else difference.overall.first)[0])


def p_value(p: float) -> str:
    """A p-value as it should be read.

    >>> p_value(0.0312), p_value(1e-7), p_value(float("nan"))
    ('0.031', '< 0.001', '–')
    """
    return "< 0.001" if p < 0.001 else number(p)


def both(difference: Difference) -> str:
    """The means over blocks of both subjects."""
    return f"{number(overall(difference, 0))} and {number(overall(difference, 1))}"


def moved(paired: Paired, at: int, controlled: bool = False) -> str:
    """The difference at one place with its interval and p-value (or q-value)."""
    p = f"q {p_value(paired.q[at])}" if controlled else f"p {p_value(paired.p[at])}"
    return f"difference {number(paired.difference[at])}, 95 % {interval(paired.ci95[at])}, {p}"


def without_training(pair: Pair, mixes: str, other: str) -> tuple[str, str]:
    """The contrast of two untrained models of which one mixes its maps, and where it comes from."""
    count = next((c for c in pair.counts if c.name == "similar-blocks" and c.threshold == RAW_ABOVE), None)
    counted = "" if count is None else f"; {count.first:g} and {count.second:g} similar blocks at {RAW_ABOVE:g}"
    return (
        f"The contrast exists without any training: neither {pair.first} nor {pair.second} has been trained, "
        f"and yet their raw similarities are {both(pair.differences[RAW])}{counted}.",
        f"It comes from {mixes} mixing its maps after the softmax, which {other} does not do, and is no "
        "evidence that the mixing cures a collapse.",
    )


def architecture(pair: Pair, twins: tuple[float, float]) -> str:
    """A contrast that the untrained twins show as well."""
    raw = pair.differences[RAW]
    return (
        f"{pair.second} reads {number(overall(raw, 1))} in raw similarity against {number(overall(raw, 0))} "
        f"of {pair.first}, but their untrained twins lie apart as well ({number(twins[1])} against "
        f"{number(twins[0])}): the contrast comes with the architecture, not with what was learned."
    )


def blocks(pair: Pair, name: str, found: list[int], largest: int, least: float) -> str:
    """Which blocks differ in the metric `name`: `found` and `largest` are positions among its places."""
    read = pair.differences[name]
    paired, block = read.paired, read.places[largest]
    where = spans([read.places[i] for i in found])
    which = f"block {where}" if len(found) == 1 else f"blocks {where}, most in block {block}"
    more = "more" if paired.difference[largest] > 0 else "less"
    kind = "κ" if name.endswith(KAPPA) else "a raw similarity of"
    return (
        f"{pair.second} differs from {pair.first} in {which}: block {block} attends {more} like block "
        f"{block - 1} than in {pair.first} ({kind} {number(paired.second[largest])} against "
        f"{number(paired.first[largest])}, {moved(paired, largest, controlled=True)}); {len(found)} of "
        f"{paired.places} pairs of blocks differ by {least:g} or more."
    )


def too_few(difference: Difference, pair: Pair, noun: str, at: int) -> str:
    """A difference whose interval excludes 0, on fewer images than a test over all blocks needs."""
    paired, block = difference.paired, difference.places[at]
    smallest = 2.0 ** (1 - int(paired.images[at]))
    return (
        f"{pair.images} images are too few for a test over {paired.places} pairs of blocks: its smallest p is "
        f"{p_value(smallest)}, {p_value(min(1.0, smallest * paired.places))} after correction. Block {block} differs most "
        f"from {pair.first}: {noun} {number(paired.second[at])} in {pair.second} against {number(paired.first[at])}, "
        f"{moved(paired, at)}. More images would tell."
    )


def raw_only(pair: Pair, least: float) -> str:
    """A difference in raw similarity that the null explains."""
    raw, kappa = pair.differences[RAW], pair.differences[RAW + KAPPA]
    return (
        f"{pair.first} and {pair.second} differ in raw similarity ({both(raw)}), but not beyond what the "
        f"wrong-token null explains: κ is {both(kappa)}, and no block differs in it by {least:g} or more."
    )


def by_summary(pair: Pair, first: Findings, second: Findings) -> str:
    """The summaries of two subjects whose blocks cannot be paired."""
    reason = pair.not_comparable.get(RAW, "it has no values of single images")
    parts = []
    for key, said in (("attention_similarity_adjacent", "raw similarity"), ("kappa_adjacent", "κ")):
        parts.append(f"{said} {number(first.summary.get(key))} and {number(second.summary.get(key))}")
    for key, said in (("similar_blocks", "similar blocks"), ("similar_blocks_corrected", "corrected")):
        one, other = first.summary.get(key), second.summary.get(key)
        if one is not None and other is not None:
            parts.append(f"{said} {one:g} and {other:g}")
    who = f"{pair.first} and {pair.second} cannot be paired block by block ({RAW}: {reason})"
    return f"{who}; by their summaries: {', '.join(parts)}."


def levels(pair: Pair) -> str:
    """Raw similarity and kappa of both, and the difference of each, as means over blocks."""
    parts = []
    for name, said in ((RAW, "raw similarity"), (RAW + KAPPA, "κ")):
        difference = pair.differences.get(name)
        if difference is not None:
            parts.append(f"{said} {both(difference)} ({moved(difference.overall, 0)})")
    return f"Mean over neighbouring blocks: {'; '.join(parts)}." if parts else ""


def softmax(pair: Pair, first: Findings, second: Findings) -> str:
    """What the softmax maps say where only one model uses another map; empty elsewhere."""
    probs = pair.differences.get(RAW + PROBS)
    if probs is None or bool(first.model.get("mixes_maps")) == bool(second.model.get("mixes_maps")):
        return ""
    who = f"the maps of {pair.first} and {pair.second}"
    return f"Before the mixing, at the softmax (probs), {who} are alike at {both(probs)}."


def outputs(pair: Pair) -> str:
    """Accuracy and agreement, as far as they are known; else empty."""
    parts = []
    accuracy = pair.differences.get(ACCURACY)
    if accuracy is not None:
        parts.append(f"accuracy {both(accuracy)} ({moved(accuracy.overall, 0)})")
    if pair.agreement.top1 is not None:
        kl = "" if pair.agreement.kl is None else f", KL {pair.agreement.kl:.3g} nats"
        parts.append(f"the same top answer on {100 * pair.agreement.top1:.1f} % of the images{kl}")
    return f"Outputs: {'; '.join(parts)}." if parts else ""


NOTABLE = 0.1  # a difference of similarity, or of kappa, that is worth a sentence
ALPHA = 0.05  # the false discovery rate at which a block's difference counts
HALF = 0.5  # of a contrast that untrained twins show as well: from there on it is the architecture's
CASES = {
    "same": "no difference at all",
    "without-training": "a contrast without training",
    "architecture": "a contrast of the architecture",
    "blocks": "blocks differ",
    "raw-only": "only the raw numbers differ",
    "small": "small differences",
    "too-few": "too few images to tell",
    "none": "no difference found",
    "by-summary": "compared by summary",
    "weights": "weights compared",
    "course": "over training",
}
SEED_CAVEAT = "Intervals and tests cover the choice of images, not the training run: another seed may differ by more."


@dataclass(frozen=True)
class Answer:
    """What is said of one pair of subjects: the `case` among CASES, sentences, and what they do not mean."""

    case: str
    first: str
    second: str
    sentences: tuple[str, ...]
    caveats: tuple[str, ...]


def answers(comparison: Comparison) -> tuple[Answer, ...]:
    """One answer for each subject after the first; of the checkpoints of one training a single one for
    all.
    """
    if comparison.trajectory:
        return (course(comparison),)
    first = comparison.subjects[comparison.first]
    return tuple(answer(pair, first, comparison.subjects[pair.second]) for pair in comparison.pairs)


def answer(pair: Pair, first: Findings, second: Findings) -> Answer:
    """The answer for one pair, from the first rule that fits."""
    case, *sentences = _rule(pair, first, second)
    more = () if case == "same" else (levels(pair), softmax(pair, first, second), outputs(pair))
    said = tuple(s for s in (*sentences, *more) if s)
    return Answer(case, pair.first, pair.second, said, tuple(_caveats(case, pair, first, second)))


def _rule(pair: Pair, first: Findings, second: Findings) -> tuple[str, ...]:
    """The case and its sentences."""
    raw, kappa = pair.differences.get(RAW), pair.differences.get(RAW + KAPPA)
    if raw is None and weights_only(first) and weights_only(second):
        return "weights", *contrasted(pair, first, second)
    if raw is None:
        return "by-summary", by_summary(pair, first, second)
    if all(_same(difference) for difference in pair.differences.values()):
        return "same", _nothing(pair)
    mixing = bool(first.model.get("mixes_maps")) != bool(second.model.get("mixes_maps"))
    if mixing and abs(raw.overall.difference[0]) >= NOTABLE:
        if untrained(first) and untrained(second):
            labels = (pair.first, pair.second)
            mixes, other = labels if first.model.get("mixes_maps") else labels[::-1]
            return "without-training", *without_training(pair, mixes, other)
        twins = _twins(first, second)
        if twins is not None and (twins[1] - twins[0]) / raw.overall.difference[0] >= HALF:
            return "architecture", architecture(pair, twins)
    if kappa is not None and notable(kappa):
        return "blocks", blocks(pair, RAW + KAPPA, notable(kappa), largest(kappa), NOTABLE)
    if notable(raw):
        if kappa is not None:
            return "raw-only", raw_only(pair, NOTABLE)
        return "blocks", blocks(pair, RAW, notable(raw), largest(raw), NOTABLE)
    read, noun = (raw, "raw similarity") if kappa is None else (kappa, "κ")
    if untestable(read):
        return "too-few", too_few(read, pair, noun, max(untestable(read), key=lambda at: abs(read.paired.difference[at])))
    return _little(pair, read, noun)


def _same(difference: Difference) -> bool:
    """Whether nothing differs: in no image, or in no number of the weights."""
    return equal(difference) if unsampled(difference) else set(difference.paired.interval) == {SAME}


def untrained(findings: Findings) -> bool:
    """Whether the weights are fresh ones."""
    return is_untrained(findings.model)


def notable(difference: Difference) -> list[int]:
    """The positions that differ by NOTABLE or more, with the false discovery rate held at ALPHA."""
    paired = difference.paired
    with np.errstate(invalid="ignore"):
        found = (np.abs(paired.difference) >= NOTABLE) & (paired.q <= ALPHA)
    return [int(at) for at in np.flatnonzero(found)]


def untestable(difference: Difference) -> list[int]:
    """The positions that differ by NOTABLE or more, their interval without 0, where the images are too few for the test.

    Of n images the smallest p of a signed-rank test is 2^(1 − n); held against all places it cannot fall to ALPHA.
    """
    paired = difference.paired
    with np.errstate(invalid="ignore"):
        apart = (paired.ci95[:, 0] > 0) | (paired.ci95[:, 1] < 0)
        hopeless = 2.0 ** (1 - paired.images.astype(np.float64)) * paired.places > ALPHA
        found = (np.abs(paired.difference) >= NOTABLE) & apart & hopeless
    return [int(at) for at in np.flatnonzero(found)]


def largest(difference: Difference) -> int:
    """The position among the notable ones whose difference is the largest."""
    return max(notable(difference), key=lambda at: float(abs(difference.paired.difference[at])))


def _twins(first: Findings, second: Findings) -> tuple[float, float] | None:
    """Raw similarity between neighbouring blocks of both untrained twins, where both were measured."""
    found = []
    for findings in (first, second):
        reading = findings.metrics.get(RAW)
        values = None if reading is None else null_of(reading, "untrained")
        found.append(None if values is None else mean(adjacent(values)))
    one, other = found
    return None if one is None or other is None else (one, other)


def _nothing(pair: Pair) -> str:
    who = f"{pair.first} and {pair.second}"
    every = f"on {pair.images} images every number that can be paired is the same in both"
    return f"There is no difference between {who}: {every}, in every block (p = 1 throughout)."


def _little(pair: Pair, read: Difference, noun: str) -> tuple[str, str]:
    ends = read.paired.ci95[np.isfinite(read.paired.ci95)]
    reach = f"±{number(float(np.abs(ends).max()))}" if len(ends) else "no known width: one image is too few"
    who, found = f"{pair.first} and {pair.second}", int((read.paired.q <= ALPHA).sum())
    if not found:
        text = f"These {pair.images} images show no difference in {noun} between {who}"
        return "none", f"{text}; the intervals of all blocks stay within {reach}."
    text = f"{who} differ little: no pair of blocks by {NOTABLE:g} or more in {noun}"
    which = f"{found} of {read.paired.places} differ at all at a false discovery rate of {ALPHA:g}"
    return "small", f"{text} ({which}; the intervals stay within {reach})."


def _caveats(case: str, pair: Pair, first: Findings, second: Findings) -> list[str]:
    found = []
    fresh = [label for label, f in ((pair.first, first), (pair.second, second)) if untrained(f)]
    if fresh and case != "without-training":
        who = f"{fresh[0]} is" if len(fresh) == 1 else f"{' and '.join(fresh)} are"
        found.append(f"{who} untrained: the numbers describe architecture and initialisation, nothing learned.")
    left_out = {name: int(d.paired.left_out.max(initial=0)) for name, d in pair.differences.items()}
    if any(left_out.values()):
        most = max(left_out, key=lambda name: left_out[name])
        count = f"at most {left_out[most]} of {pair.images} ({most})"
        found.append(f"Images where a number is undefined are left out of its pairs: {count}.")
    return found if case == "same" else [*found, NO_SAMPLE if case == "weights" else SEED_CAVEAT]


def course(comparison: Comparison) -> Answer:
    """What happens from the first checkpoint to the last."""
    labels, pair = list(comparison.subjects), comparison.pairs[-1]
    first, last = (comparison.subjects[label].summary for label in (labels[0], labels[-1]))
    parts = []
    for said, key, name in (
        ("κ", "kappa_adjacent", RAW + KAPPA),
        ("raw similarity", "attention_similarity_adjacent", RAW),
    ):
        difference = pair.differences.get(name)
        change = "" if difference is None else f" (change 95 % {interval(difference.overall.ci95[0])})"
        parts.append(f"{said} {number(first.get(key))} → {number(last.get(key))}{change}")
    parts.append(f"patch diversity {number(first.get('patch_diversity_last'))} → ")
    parts[-1] += number(last.get("patch_diversity_last"))
    head = f"From {labels[0]} to {labels[-1]}, over {len(labels)} checkpoints: {', '.join(parts)}."
    counts = [_listed(comparison, *entry) for entry in COURSE]
    said_all = tuple(s for s in (head, " ".join(c for c in counts if c), outputs(pair)) if s)
    caveats = ("This is one training run: another seed may take another course.", SEED_CAVEAT)
    return Answer("course", labels[0], labels[-1], said_all, caveats)


COURSE = (
    ("similar_blocks", "Similar blocks"),
    ("similar_blocks_corrected", "Corrected by κ"),
    (ACCURACY, "Accuracy"),
)


def _listed(comparison: Comparison, key: str, said: str) -> str:
    values = [findings.summary.get(key) for findings in comparison.subjects.values()]
    if all(value is None for value in values):
        return ""
    shown = [number(v) if key == ACCURACY else number(v, 0) for v in values]
    return f"{said}: {', '.join(shown)}."
