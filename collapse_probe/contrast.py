"""What a comparison says: rules over its numbers that choose the sentences, and that tests can turn
around.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from collapse_probe import sentences as say
from collapse_probe.counting import KAPPA
from collapse_probe.findings import Findings
from collapse_probe.paired import SAME
from collapse_probe.pairing import ACCURACY, Difference, Pair
from collapse_probe.readings import adjacent, mean, null
from collapse_probe.sentences import RAW
from collapse_probe.side_by_side import Comparison
from collapse_probe.unasked import weights_only
from collapse_probe.weight_contrast import NO_SAMPLE, contrasted, equal, unsampled
from collapse_probe.words import interval, number

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
    more = () if case == "same" else (say.levels(pair), say.softmax(pair, first, second), say.outputs(pair))
    said = tuple(s for s in (*sentences, *more) if s)
    return Answer(case, pair.first, pair.second, said, tuple(_caveats(case, pair, first, second)))


def _rule(pair: Pair, first: Findings, second: Findings) -> tuple[str, ...]:
    """The case and its sentences."""
    raw, kappa = pair.differences.get(RAW), pair.differences.get(RAW + KAPPA)
    if raw is None and weights_only(first) and weights_only(second):
        return "weights", *contrasted(pair, first, second)
    if raw is None:
        return "by-summary", say.by_summary(pair, first, second)
    if all(_same(difference) for difference in pair.differences.values()):
        return "same", _nothing(pair)
    mixing = bool(first.model.get("mixes_maps")) != bool(second.model.get("mixes_maps"))
    if mixing and abs(raw.overall.difference[0]) >= NOTABLE:
        if untrained(first) and untrained(second):
            labels = (pair.first, pair.second)
            mixes, other = labels if first.model.get("mixes_maps") else labels[::-1]
            return "without-training", *say.without_training(pair, mixes, other)
        twins = _twins(first, second)
        if twins is not None and (twins[1] - twins[0]) / raw.overall.difference[0] >= HALF:
            return "architecture", say.architecture(pair, twins)
    if kappa is not None and notable(kappa):
        return "blocks", say.blocks(pair, RAW + KAPPA, notable(kappa), largest(kappa), NOTABLE)
    if notable(raw):
        if kappa is not None:
            return "raw-only", say.raw_only(pair, NOTABLE)
        return "blocks", say.blocks(pair, RAW, notable(raw), largest(raw), NOTABLE)
    read, noun = (raw, "raw similarity") if kappa is None else (kappa, "κ")
    if untestable(read):
        return "too-few", say.too_few(read, pair, noun, max(untestable(read), key=lambda at: abs(read.paired.difference[at])))
    return _little(pair, read, noun)


def _same(difference: Difference) -> bool:
    """Whether nothing differs: in no image, or in no number of the weights."""
    return equal(difference) if unsampled(difference) else set(difference.paired.interval) == {SAME}


def untrained(findings: Findings) -> bool:
    """Whether the weights are fresh ones."""
    return str(findings.model.get("weights") or "").startswith("random")


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
        values = None if reading is None else null(reading, "untrained")
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
    said_all = tuple(s for s in (head, " ".join(c for c in counts if c), say.outputs(pair)) if s)
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
