"""The verdict of a comparison: the first rule that fits the numbers of a pair gives its case and its sentences."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

from collapse_probe.results.comparison import ACCURACY, KAPPA, PROBS, Comparison, Difference, Pair
from collapse_probe.results.findings import Findings
from collapse_probe.results.readings import (
    adjacent,
    is_untrained,
    mean,
    not_loaded,
    null_of,
    partial_sentence,
    trained_on,
    weights_only,
)
from collapse_probe.results.rules import FALSE_DISCOVERY_RATE, NOTABLE, OF_ARCHITECTURE, RAW_ABOVE, ROUNDING
from collapse_probe.results.text import DASH, interval, number, p_value, sentence_case, spans, with_reasons
from collapse_probe.results.verdict import MEANS, MOST_LISTED, Verdict, not_heard
from collapse_probe.statistics.paired import Paired

RAW = "attention-similarity"
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
SUMMARIES = {  # by their names, with decimals
    "κ": ("kappa_adjacent", 3),
    "raw similarity": ("attention_similarity_adjacent", 3),
    "similar blocks": ("similar_blocks", 0),
    "corrected by κ": ("similar_blocks_corrected", 0),
    "patch diversity": ("patch_diversity_last", 3),
    "accuracy": (ACCURACY, 3),
}
NO_SAMPLE = "A model is no sample of weights: these differences have no interval and no p-value."
SEED_CAVEAT = (
    "One training run each: intervals and tests cover the choice of images, not the run. It ranks no way of training above "
    "another, because another seed may differ by more."
)


def verdicts(comparison: Comparison) -> tuple[Verdict, ...]:
    """One verdict for each subject after the first; for the checkpoints of one training a single one for all."""
    if comparison.trajectory:
        return (over_training(comparison),)
    first = comparison.subjects[comparison.first]
    return tuple(verdict_of_pair(pair, first, comparison.subjects[pair.second]) for pair in comparison.pairs)


def verdict_of_pair(pair: Pair, first: Findings, second: Findings) -> Verdict:
    """The verdict of one pair; its `case` is one of CASES."""
    case, *sentences = _case(pair, first, second)
    if case != "same":
        parts = []
        for noun, name in (("raw similarity", RAW), ("κ", RAW + KAPPA)):
            if (difference := pair.differences.get(name)) and np.isfinite(difference.paired.difference).any():
                parts.append(f"{noun} {_both(difference)} ({_change(difference.overall, 0, 'p')})")
        sentences += [f"Mean over adjacent blocks: {'; '.join(parts)}."] if parts else []
        probs = pair.differences.get(RAW + PROBS)
        if probs is not None and bool(first.model.get("mixes_maps")) != bool(second.model.get("mixes_maps")):
            who = f"{pair.first} and {pair.second}"
            sentences.append(f"Before the mixing, the raw similarities of the softmax maps of {who} are {_both(probs)}.")
        sentences.append(_outputs(pair))
    caveats = tuple(_caveats(case, pair, first, second))
    sentences = [*_said_first({pair.first: first, pair.second: second}), *filter(None, sentences)]
    return Verdict(case, tuple(sentences), caveats, label=f"{pair.second} compared with {pair.first}")


def _said_first(subjects: Mapping[str, Findings]) -> list[str]:
    """What stands above all: weights and images that are not finite, and each subject whose checkpoint lacks weights."""
    ill = {label: str(f.run["nonfinite"]["sentence"]) for label, f in subjects.items() if f.run.get("nonfinite")}
    alike = len({*ill.values()}) == 1 and len(ill) == len(subjects)
    said = [*{*ill.values()}] if alike else [f"{label}: {text}" for label, text in ill.items()]
    parts = {label: not_loaded(findings.model) for label, findings in subjects.items()}
    few = {label: text for label, findings in subjects.items() if (text := _few_pairs(findings))}
    said += (
        [sentence_case(next(iter(few.values())))]
        if len({*few.values()}) == 1 and len(few) == len(subjects)
        else [f"{label}: {text}" for label, text in few.items()]
    )
    said = [*(f"{label}: {text}" for label, f in subjects.items() if (text := partial_sentence(f.data))), *said]
    return [*said, *(f"{label}: {part}." for label, part in parts.items() if part)]


def _few_pairs(findings: Findings) -> str:
    """How many pairs of consecutive blocks can be compared, and why not all; empty where all can be, or none was asked for."""
    result = findings.metrics.get(RAW)
    reasons = {str(each["why"]): list(each["blocks"]) for each in findings.model.get("uncompared") or ()}
    if result is None or result.values is None or not reasons:
        return ""
    pairs = np.isfinite(adjacent(result, result.values))
    compared = f"{pairs.sum()} of {len(pairs)} pairs of consecutive blocks can be compared"
    return f"{compared}; not with the block before: {with_reasons(reasons)}."


def _case(pair: Pair, first: Findings, second: Findings) -> tuple[str, ...]:
    """The case and its sentences."""
    raw, kappa = pair.differences.get(RAW), pair.differences.get(RAW + KAPPA)
    who = f"{pair.first} and {pair.second}"
    if raw is None:
        if weights_only(first) and weights_only(second):
            return "weights", weights_sentence(pair, first, second)
        return "by-summary", _by_summary(pair, first, second, pair.not_comparable.get(RAW, "it has no values of single images"))
    if not np.isfinite(raw.paired.difference).any():
        return "by-summary", _by_summary(pair, first, second, "no pair of blocks has a value in both")
    if all(difference.equal for difference in pair.differences.values()):
        every = f"on {pair.images} images every number that can be paired is the same in both, in every block"
        return "same", f"There is no difference between {who}: {every} (p = 1 throughout)."
    mixes, contrast = [bool(each.model.get("mixes_maps")) for each in (first, second)], raw.overall.difference[0]
    if mixes[0] != mixes[1] and abs(contrast) >= NOTABLE:
        if is_untrained(first.model) and is_untrained(second.model):
            mixing, other = (pair.first, pair.second) if mixes[0] else (pair.second, pair.first)
            alike = next((c for c in pair.counts if c.name == "similar-blocks" and c.threshold == RAW_ABOVE), None)
            counts = "" if alike is None else f"; {alike.first:g} and {alike.second:g} similar blocks at {RAW_ABOVE:g}"
            return (
                "without-training",
                f"The contrast exists without any training: {who} are untrained, and their raw similarities are "
                f"{_both(raw)}{counts}.",
                f"It comes from {mixing} mixing its maps after the softmax, which {other} does not do, and is no evidence that "
                "the mixing cures a collapse.",
            )
        twins = [mean(adjacent(each.metrics[RAW], null_of(each.metrics[RAW], "untrained"))) for each in (first, second)]
        if twins[0] is not None and twins[1] is not None and (twins[1] - twins[0]) / contrast >= OF_ARCHITECTURE:
            return "architecture", (
                f"The raw similarity is {number(raw.overall.second[0])} in {pair.second} and {number(raw.overall.first[0])} in "
                f"{pair.first}, but their untrained copies differ as well ({number(twins[1])} and {number(twins[0])}): the "
                "contrast comes with the architecture, not with what was learned."
            )
    difference, noun = (raw, "raw similarity") if kappa is None else (kappa, "κ")
    if notable(difference).any():
        return "blocks", _blocks(pair, difference, noun)
    if kappa is not None and notable(raw).any():
        return "raw-only", (
            f"{who} differ in raw similarity ({_both(raw)}), but not beyond what the chance level explains: κ is "
            f"{_both(kappa)}, and no block differs in it by {NOTABLE:g} or more."
        )
    if unsure(difference).any():
        return "too-few", _too_few(pair, difference, noun)
    ends = difference.paired.ci95[np.isfinite(difference.paired.ci95)]
    reach = f"{pair.images} images are too few for intervals" if pair.images > 1 else "one image is too few for intervals"
    if len(ends):
        without = int(np.isfinite(difference.paired.difference).sum()) - len(ends)
        which = f"the {len(ends)} blocks that have one" if without else "all blocks"
        reach = f"the intervals of {which} stay within ±{number(np.abs(ends).max())}"
    count = int((difference.paired.q <= FALSE_DISCOVERY_RATE).sum())
    if not count:
        return "none", f"These {pair.images} images show no difference in {noun} between {who}; {reach}."
    return "small", (
        f"{who} differ little: no pair of blocks by {NOTABLE:g} or more in {noun} ({count} of {difference.paired.places} "
        f"differ at all at a false discovery rate of {FALSE_DISCOVERY_RATE:g}; {reach})."
    )


@np.errstate(invalid="ignore")
def notable(difference: Difference) -> NDArray[np.bool_]:
    """Which places differ by NOTABLE or more, with the false discovery rate held at FALSE_DISCOVERY_RATE."""
    paired = difference.paired
    return (np.abs(paired.difference) >= NOTABLE) & (paired.q <= FALSE_DISCOVERY_RATE)


@np.errstate(invalid="ignore")
def unsure(difference: Difference) -> NDArray[np.bool_]:
    """Which places differ by NOTABLE or more with an interval without 0, but not when their number is corrected for."""
    paired = difference.paired
    excludes_zero = (paired.ci95[:, 0] > 0) | (paired.ci95[:, 1] < 0)
    return (np.abs(paired.difference) >= NOTABLE) & excludes_zero & (paired.q > FALSE_DISCOVERY_RATE)


def _largest(difference: Difference, among: NDArray[np.bool_]) -> int:
    """The position among some whose difference is the largest."""
    return int(np.argmax(np.where(among, np.abs(difference.paired.difference), -1.0)))


def _blocks(pair: Pair, difference: Difference, noun: str) -> str:
    paired, which = difference.paired, notable(difference)
    at = _largest(difference, which)
    block, count = difference.places[at], int(which.sum())
    where = spans([place for place, differs in zip(difference.places, which, strict=True) if differs])
    where = f"block {where}" if count == 1 else f"blocks {where}, most in block {block}"
    return (
        f"{pair.second} differs from {pair.first} in {where}: block {block} attends "
        f"{'more' if paired.difference[at] > 0 else 'less'} like block {block - 1} than in {pair.first} ({noun} "
        f"{number(paired.second[at])} against {number(paired.first[at])}, {_change(paired, at, 'q')}); "
        f"{count} of {paired.places} pairs of blocks differ by {NOTABLE:g} or more."
    )


def _too_few(pair: Pair, difference: Difference, noun: str) -> str:
    paired = difference.paired
    at = _largest(difference, unsure(difference))
    return (
        f"{pair.images} images are too few to tell over {paired.places} pairs of blocks. Block {difference.places[at]} "
        f"differs most: {noun} {number(paired.second[at])} in {pair.second} against {number(paired.first[at])} in "
        f"{pair.first}, {_change(paired, at, 'p')}, but q {p_value(paired.q[at])} over all pairs. More images are needed."
    )


def _by_summary(pair: Pair, first: Findings, second: Findings, reason: str) -> str:
    parts = []
    for noun, (key, digits) in SUMMARIES.items():
        sides = [findings.summary.get(key) for findings in (first, second)]
        parts += [] if None in sides else [f"{noun} {number(sides[0], digits)} and {number(sides[1], digits)}"]
    return (
        f"{pair.first} and {pair.second} cannot be paired block by block ({RAW}: {reason}); by their summaries: "
        f"{', '.join(parts) or 'nothing that both have'}."
    )


def weights_sentence(pair: Pair, first: Findings, second: Findings) -> str:
    """What is said of two models of which the weights alone were measured."""
    who, metrics = f"{pair.first} and {pair.second}", {}
    for name in (name for name in first.metrics if name in second.metrics):
        parts = {key: d for key, d in pair.differences.items() if key == name or key.startswith(f"{name}/")}
        if parts := {key: d for key, d in parts.items() if np.isfinite(d.paired.difference).any()}:
            metrics[name] = parts
    if not metrics:
        why = "; ".join(f"{name}: {reason}" for name, reason in pair.not_comparable.items()) or "nothing was measured"
        return f"The weights of {who} cannot be compared block by block ({why})."
    if not any(np.nan_to_num(d.paired.difference).any() for parts in metrics.values() for d in parts.values()):
        return f"No number of the weights differs between {who}: {', '.join(metrics)}."
    names = [name for name in MEANS if name in metrics] or list(metrics)[:MOST_LISTED]
    numbers = "; ".join(_weight_metric(name, metrics[name]) for name in names)
    return f"The weights of {pair.second} against those of {pair.first}, mean over blocks and matrices: {numbers}."


def _weight_metric(name: str, parts: Mapping[str, Difference]) -> str:
    """The means of both sides over all matrices (`parts` NAME/MATRIX, or NAME alone), and where they differ most."""
    first, second = (np.nanmean([getattr(part.overall, side)[0] for part in parts.values()]) for side in ("first", "second"))
    key, part = max(parts.items(), key=lambda item: float(np.nanmax(np.abs(item[1].paired.difference))))
    at = int(np.nanargmax(np.abs(part.paired.difference)))
    matrix = key.removeprefix(name).removeprefix("/")
    where = f"{matrix} of block {part.places[at]}" if matrix else f"block {part.places[at]}"
    ends = f"{number(part.paired.second[at])} against {number(part.paired.first[at])}"
    return f"{name} {number(second)} against {number(first)} (largest difference: {where}, {ends})"


def _outputs(pair: Pair) -> str:
    """Accuracy and agreement, as far as they are known; else empty."""
    parts = []
    if accuracy := pair.differences.get(ACCURACY):
        parts.append(f"accuracy {_both(accuracy)} ({_change(accuracy.overall, 0, 'p')})")
    if pair.agreement.top1 is not None:
        kl = "" if pair.agreement.kl is None else f", KL {pair.agreement.kl:.3g} nats"
        ends = pair.agreement.top1_ci95
        sure = "" if ends is None else f" (95 % CI {interval([100 * end for end in ends], 1)})"
        parts.append(f"the same top answer on {100 * pair.agreement.top1:.1f} % of the images{sure}{kl}")
    return f"Outputs: {'; '.join(parts)}." if parts else ""


def _both(difference: Difference) -> str:
    """The means over blocks of both subjects."""
    return f"{number(difference.overall.first[0])} and {number(difference.overall.second[0])}"


def _change(paired: Paired, at: int, test: str) -> str:
    """The difference at one place with its interval and its `test`: p or q."""
    value = p_value(getattr(paired, test)[at])
    return f"difference {number(paired.difference[at])}, 95 % CI {interval(paired.ci95[at])}, {test} {value}"


def _caveats(case: str, pair: Pair, first: Findings, second: Findings) -> list[str]:
    caveats = []
    untrained = [label for label, f in ((pair.first, first), (pair.second, second)) if is_untrained(f.model)]
    if untrained and case != "without-training":
        who = f"{untrained[0]} is" if len(untrained) == 1 else f"{' and '.join(untrained)} are"
        caveats.append(f"{who} untrained: the numbers describe architecture and initialisation, nothing learned.")
    both = ((pair.first, first), (pair.second, second))
    caveats += [f"{label}: {text}" for label, f in both if (text := trained_on(f.data))]
    caveats += [
        f"{label} gives the same logits for all images: its answers, their agreement and their accuracy say nothing of it."
        for label, f in both
        if (f.run.get("outputs") or {}).get("logit_spread", 1.0) <= ROUNDING and int(f.data["images"]) > 1
    ]
    caveats += [f"{label}: {text}" for label, f in both for text in not_heard(f)]
    left_out = {name: int(d.paired.left_out[d.paired.images > 0].max(initial=0)) for name, d in pair.differences.items()}
    if any(left_out.values()):
        most = max(left_out, key=lambda name: left_out[name])
        count = f"at most {left_out[most]} of {pair.images} ({most})"
        caveats.append(f"Images where a number is undefined are left out of its pairs: {count}.")
    return caveats if case == "same" else [*caveats, NO_SAMPLE if case == "weights" else SEED_CAVEAT]


def over_training(comparison: Comparison) -> Verdict:
    """The verdict of the checkpoints of one training, from the first to the last."""
    labels, pair = list(comparison.subjects), comparison.pairs[-1]
    head, counts = [], []
    for noun, (key, digits) in SUMMARIES.items():
        values = [number(findings.summary.get(key), digits) for findings in comparison.subjects.values()]
        difference = pair.differences.get({"κ": RAW + KAPPA, "raw similarity": RAW}.get(noun, ""))
        change = "" if difference is None else f" (change, 95 % CI {interval(difference.overall.ci95[0])})"
        if key in ("similar_blocks", "similar_blocks_corrected", ACCURACY):
            counts += [] if set(values) == {DASH} else [f"{sentence_case(noun)}: {', '.join(values)}."]
        else:
            head.append(f"{noun} {values[0]} → {values[-1]}{change}")
    first = f"From {labels[0]} to {labels[-1]}, over {len(labels)} checkpoints: {', '.join(head)}."
    known = trained_on(comparison.subjects[labels[-1]].data)
    caveats = (*([known] if known else []), "This is one training run: another seed may take another course.", SEED_CAVEAT)
    label = f"{labels[-1]} compared with {labels[0]}"
    sentences = [*_said_first(comparison.subjects), *filter(None, (first, " ".join(counts), _outputs(pair)))]
    return Verdict("course", tuple(sentences), caveats, label=label)
