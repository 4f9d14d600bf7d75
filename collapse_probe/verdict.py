"""The answer in two sentences, made from rules over the findings that tests can turn around."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from collapse_probe.findings import Findings, Reading
from collapse_probe.summary import adjacent, mean

Array = NDArray[np.float64]

SHARED_KAPPA = 0.5
HIGH_RAW = 0.9
SAME_WHATEVER_TOKEN = 0.98
NEAR_UNIFORM_SHARE = 0.9
MAJORITY = 0.5


@dataclass(frozen=True)
class Rule:
    """One rule behind the sentences: which number, on which side of which threshold, means what, and what it does not say."""

    name: str
    number: str
    threshold: float
    direction: str
    means: str
    does_not_say: str


RULES = (
    Rule(
        "shared",
        "kappa of attention-similarity with the block before (columns)",
        SHARED_KAPPA,
        "above",
        "the two blocks attend alike token by token, beyond what other tokens' attention explains",
        "that either block is useless, or that sharing their map would cost nothing",
    ),
    Rule(
        "query-independent",
        "other_token null of attention-similarity with the block before (columns)",
        SAME_WHATEVER_TOKEN,
        "above",
        "columns are alike whichever tokens are compared: every query attends alike, or nearly uniformly",
        "whether the blocks attend to the same tokens; the row version against other_head says that",
    ),
    Rule(
        "shared-row",
        "(row similarity − other_head) / (1 − other_head), where maps are query-independent",
        SHARED_KAPPA,
        "above",
        "the blocks share one row of attention, more than different heads do",
        "anything about maps that depend on the query",
    ),
    Rule(
        "high-raw",
        "attention-similarity with the block before (columns)",
        HIGH_RAW,
        "above",
        "DeepViT would count the block as similar",
        "that the network learned it: near-uniform maps score as high without training",
    ),
    Rule(
        "near-uniform",
        "attention entropy over log N, mean of the two blocks' heads",
        NEAR_UNIFORM_SHARE,
        "above",
        "attention is spread over nearly all tokens",
        "that the block does nothing: small differences from uniform may matter",
    ),
)


@dataclass(frozen=True)
class Verdict:
    """The answer. `case` is shared, query-independent, near-uniform, explained, distinct or not-applicable.

    `collapsed` is True, False, or None where the numbers cannot tell. `sentences` are the answer and what the nulls explain
    of it; `caveats` what that does not mean; `pairs` the name of the rule that each adjacent pair of blocks fell under.
    """

    case: str
    collapsed: bool | None
    sentences: tuple[str, ...]
    caveats: tuple[str, ...] = ()
    pairs: tuple[str, ...] = ()


@dataclass(frozen=True)
class _Pairs:
    """The numbers of each adjacent pair of blocks that the rules read; NaN where undefined."""

    raw: Array
    null: Array
    kappa: Array
    kappa_low: Array
    row: Array
    row_head: Array
    share: Array


def judge(findings: Findings) -> Verdict:
    """The verdict on one run's findings."""
    reading = findings.metrics.get("attention-similarity")
    if reading is None or reading.values is None or reading.nulls is None:
        why = "it was not measured" if reading is None else reading.not_applicable or "it has no values"
        return Verdict("not-applicable", None, (f"Similarity between blocks cannot be judged here: {why}.",))
    pairs = _pairs(findings.metrics, reading)
    if not np.isfinite(pairs.raw).any():
        text = "Similarity between blocks cannot be judged here: no two neighbouring blocks have maps of one shape."
        return Verdict("not-applicable", None, (text,))
    kinds = tuple(classify(pairs, i) for i in range(len(pairs.raw)))
    return _say(pairs, kinds, findings)


def classify(pairs: _Pairs, i: int) -> str:
    """The rule that the pair of block i + 1 with block i falls under."""
    if not np.isfinite(pairs.raw[i]):
        return "undefined"
    if pairs.kappa[i] > SHARED_KAPPA:
        return "shared"
    if pairs.null[i] > SAME_WHATEVER_TOKEN and not pairs.share[i] > NEAR_UNIFORM_SHARE:
        if pairs.row_head[i] > SAME_WHATEVER_TOKEN:
            return "same-everywhere"
        beyond = (pairs.row[i] - pairs.row_head[i]) / (1 - pairs.row_head[i])
        return "shared-row" if beyond > SHARED_KAPPA else "query-independent"
    if pairs.raw[i] > HIGH_RAW:
        return "near-uniform" if pairs.share[i] > NEAR_UNIFORM_SHARE else "explained"
    return "distinct"


def _pairs(metrics: Mapping[str, Reading], reading: Reading) -> _Pairs:
    assert reading.values is not None
    assert reading.nulls is not None
    raw = adjacent(reading.values)
    missing = np.full(len(raw), np.nan)

    def null(of: Reading | None, name: str) -> Array:
        found = None if of is None or of.nulls is None else of.nulls.values.get(name)
        return missing if found is None else adjacent(found)

    bounds = reading.nulls.kappa_ci95
    row = metrics.get("attention-similarity@row")
    entropy = metrics.get("attention-entropy")
    share = missing
    if entropy is not None and entropy.values is not None:
        by_block = _rows_mean(np.asarray(entropy.settings["share"], dtype=np.float64))
        share = (by_block[1:] + by_block[:-1]) / 2
    return _Pairs(
        raw=raw,
        null=null(reading, "other_token"),
        kappa=null(reading, "kappa"),
        kappa_low=missing if bounds is None else adjacent(bounds[..., 0]),
        row=missing if row is None or row.values is None else adjacent(row.values),
        row_head=null(row, "other_head"),
        share=share,
    )


def _rows_mean(values: Array) -> Array:
    return np.array([np.nan if not np.isfinite(row).any() else row[np.isfinite(row)].mean() for row in values])


def _say(pairs: _Pairs, kinds: tuple[str, ...], findings: Findings) -> Verdict:
    defined = [k for k in kinds if k != "undefined"]
    shared = [i for i, k in enumerate(kinds) if k in ("shared", "shared-row")]
    caveats = _caveats(pairs, kinds, findings)
    numbers = _numbers(pairs)
    total = len(defined)
    if shared:
        return _shared(pairs, kinds, shared, total, caveats)
    counts = {kind: defined.count(kind) for kind in dict.fromkeys(defined)}
    ignoring = counts.get("query-independent", 0) + counts.get("same-everywhere", 0)
    if ignoring > MAJORITY * total:
        return _query_independent(pairs, kinds, ignoring, total, caveats)
    explained = counts.get("near-uniform", 0) + counts.get("explained", 0)
    if explained > MAJORITY * total:
        uniform = counts.get("near-uniform", 0) >= counts.get("explained", 0)
        share = mean(pairs.share)
        spread = f": each query spreads its attention over nearly all tokens (entropy {_percent(share)} of uniform)"
        first = (
            f"This is not collapse: {explained} of {total} neighbouring pairs of blocks score above {HIGH_RAW:g} in raw "
            f"similarity, but no more than chance would give{spread if uniform and share is not None else ''}."
        )
        case = "near-uniform" if uniform else "explained"
        return Verdict(case, False, (first, numbers), caveats, kinds)
    first = (
        "No collapse between neighbouring blocks: their attention maps are distinct"
        + (f", {explained} high raw similarities are explained by the nulls" if explained else "")
        + f" (kappa above {SHARED_KAPPA:g} in 0 of {total} pairs)."
    )
    return Verdict("distinct", False, (first, numbers), caveats, kinds)


def _shared(pairs: _Pairs, kinds: tuple[str, ...], shared: list[int], total: int, caveats: tuple[str, ...]) -> Verdict:
    where = spans([i + 1 for i in shared])
    by_row = all(kinds[i] == "shared-row" for i in shared)
    first = (
        f"Attention has collapsed across depth in {len(shared)} of {total} neighbouring pairs of blocks: "
        f"{'block' if len(shared) == 1 else 'blocks'} {where} attend{'s' if len(shared) == 1 else ''} like the block before"
        + (", every query with the same row" if by_row else "")
        + "."
    )
    if by_row:
        second = (
            f"There the maps do not depend on the query, so that columns cannot tell tokens apart; the rows of the "
            f"two blocks agree at {_mean(pairs.row, shared)} against {_mean(pairs.row_head, shared)} for different heads."
        )
        return Verdict("query-independent", True, (first, second), caveats, kinds)
    at = [i for i in shared if kinds[i] == "shared"]
    second = (
        f"Other tokens' attention explains {_mean(pairs.null, at)} of a raw similarity of {_mean(pairs.raw, at)} there; of "
        f"what is left to agree, {_percent(_mean_number(pairs.kappa, at))} does (kappa {_mean(pairs.kappa, at)})."
    )
    return Verdict("shared", True, (first, second), caveats, kinds)


def _query_independent(pairs: _Pairs, kinds: tuple[str, ...], ignoring: int, total: int, caveats: tuple[str, ...]) -> Verdict:
    at = [i for i, k in enumerate(kinds) if k in ("query-independent", "same-everywhere")]
    everywhere = kinds.count("same-everywhere") > len(at) / 2
    first = f"Attention ignores the query in {ignoring} of {total} neighbouring pairs of blocks: every token attends with the "
    first += "same row"
    first += ", and all heads and blocks with nearly the same one." if everywhere else ", but each block with a row of its own."
    second = (
        f"Columns are alike whichever tokens are compared (wrong-token null {_mean(pairs.null, at)}), so that columns "
        f"and kappa say nothing; rows agree at {_mean(pairs.row, at)} between blocks, {_mean(pairs.row_head, at)} across heads."
    )
    return Verdict("query-independent", None if everywhere else False, (first, second), caveats, kinds)


def _numbers(pairs: _Pairs) -> str:
    raw, null, kappa = mean(pairs.raw), mean(pairs.null), mean(pairs.kappa)
    text = f"Neighbouring blocks are alike at {_number(raw)} in raw cosine, and with the wrong tokens at {_number(null)}"
    if kappa is None:
        return text + "; kappa is undefined, because the wrong-token null is 1 itself."
    return text + f": of what is left to agree, {_percent(kappa)} does (kappa {_number(kappa)})."


def _caveats(pairs: _Pairs, kinds: tuple[str, ...], findings: Findings) -> tuple[str, ...]:
    found = []
    if str(findings.model.get("weights", "")).startswith("random"):
        found.append(
            "The model is untrained: these numbers describe its architecture and initialisation, not anything learned."
        )
    unsure = [i + 1 for i, k in enumerate(kinds) if k == "shared" and not pairs.kappa_low[i] > SHARED_KAPPA]
    if unsure:
        found.append(
            f"For blocks {spans(unsure)} the interval of kappa reaches below {SHARED_KAPPA:g}: more images are needed."
        )
    if findings.model.get("mixes_maps"):
        found.append(
            "This model changes its maps after the softmax. The similarity is that of what multiplies V (weights); the "
            "@probs metrics show the softmax itself, which may tell another story."
        )
    found.append(
        "Similar maps are no proof of wasted blocks, distinct maps none of useful ones: values and MLPs are not compared."
    )
    return tuple(found)


def spans(numbers: list[int]) -> str:
    """Block numbers as spans.

    >>> spans([3, 4, 5, 9])
    '3–5, 9'
    """
    runs: list[list[int]] = []
    for n in numbers:
        if runs and n == runs[-1][1] + 1:
            runs[-1][1] = n
        else:
            runs.append([n, n])
    return ", ".join(f"{a}" if a == b else f"{a}–{b}" for a, b in runs)


def _mean_number(values: Array, at: list[int]) -> float | None:
    return mean(values[at])


def _mean(values: Array, at: list[int]) -> str:
    return _number(_mean_number(values, at))


def _number(value: float | None) -> str:
    return "an undefined value" if value is None else f"{value:.3f}"


def _percent(value: float | None) -> str:
    if value is None:
        return "an undefined share"
    return f"{100 * value:.1f} %" if abs(value) < 0.995 or value > 1 else f"{100 * value:.2f} %"
