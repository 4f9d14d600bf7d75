"""Sentences about a pair of subjects: each takes its numbers and says them, whatever they mean."""

from __future__ import annotations

from collapse_probe.counting import KAPPA
from collapse_probe.findings import Findings
from collapse_probe.paired import Paired
from collapse_probe.pairing import ACCURACY, PROBS, Difference, Pair
from collapse_probe.summary import COUNTED_ABOVE
from collapse_probe.verdict import spans
from collapse_probe.words import interval, number

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
    count = next((c for c in pair.counts if c.name == "similar-blocks" and c.threshold == COUNTED_ABOVE), None)
    counted = "" if count is None else f"; {count.first:g} and {count.second:g} similar blocks at {COUNTED_ABOVE:g}"
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
