"""The answer in a few sentences, each made from a rule of the verdict and how it came out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np

from collapse_probe.results.findings import Findings, MetricResult
from collapse_probe.results.outcomes import Outcome, Pairs, kinds_of, pairs_of, verdict_table
from collapse_probe.results.readings import adjacent, mean, null_of, result_of, weights_only
from collapse_probe.results.rules import BY_NAME
from collapse_probe.results.text import DASH, interval, number, spans
from collapse_probe.statistics.intervals import Array

Said = tuple[str, str]
"""A sentence, and the name of the rule that it comes from."""
WEIGHTS_ONLY, NOT_JUDGED = "weights-only", "not-judged"
QUESTION = "shared"  # the rule that was not asked; behind what is said where no rule holds
ABOUT = {"attention": "attention", "tokens": "the tokens", "weights": "the weights"}
MOST_LISTED = 2  # rules that a sentence can hold
REST = {
    WEIGHTS_ONLY: "Only the weights were measured, without images: how alike attention maps or tokens are is not judged here.",
    NOT_JUDGED: "Whether attention has collapsed across depth is not judged here: attention-similarity was not asked for.",
}
ONE_SET = "A model has one set of weights: it is no sample of anything, so that no number of the weights has an interval."
MEANS = {"weight-rank": "effective rank over the full one", "weight-similarity": "|cosine| between rows"}


@dataclass(frozen=True)
class Verdict:
    """What is said of one run, of a pair of subjects, of a kind of replacement or of a curve; `label` says of which.

    `sentences` are the answer, `caveats` what it does not mean. The `case` of a run is shared, query-independent, near-uniform,
    explained, distinct, undecided or not-applicable; where attention-similarity was not asked for, weights-only (all metrics
    are of the weights) or not-judged. `collapsed` is whether its attention has collapsed across depth: True, False, or None
    where the numbers cannot tell. `rules` and `caveat_rules` name the rule behind each sentence and caveat of a run (shared
    where none of them holds), `pairs` the rule that each of its neighbouring pairs of blocks fell under.
    """

    case: str
    sentences: tuple[str, ...]
    caveats: tuple[str, ...] = ()
    collapsed: bool | None = None
    label: str = ""
    rules: tuple[str, ...] = ()
    caveat_rules: tuple[str, ...] = ()
    pairs: tuple[str, ...] = ()


def unasked(findings: Findings, outcomes: Mapping[str, Outcome], found: Sequence[Said]) -> tuple[str, list[Said]]:
    """The case and its sentences; `found` are those of the rules that answer yes, which then come first."""
    case = WEIGHTS_ONLY if weights_only(findings) else NOT_JUDGED
    asked = [outcome for outcome in outcomes.values() if outcome.rule.spoken and outcome.answer != "not applicable"]
    more = (
        []
        if found
        else [_nothing_found(asked, outcomes["untrained"].answer == "yes") if asked else _no_rule(findings, outcomes)]
    )
    if case == WEIGHTS_ONLY:
        more += _means(findings)
    elif not found and len(asked) <= MOST_LISTED:
        more += [_compared(outcome) for outcome in asked if outcome.answer == "no"]
    return case, [*found, *((text, QUESTION) for text in (*more, REST[case]))]


def _nothing_found(asked: Sequence[Outcome], untrained: bool) -> str:
    """What the rules that were asked say where none answers yes."""
    unsure = [outcome for outcome in asked if outcome.answer == "undecided"]
    levels = _joined(dict.fromkeys(ABOUT[outcome.rule.level] for outcome in asked))
    if unsure and len(asked) == 1:
        return f"It cannot be told from these images whether {unsure[0].rule.says}."
    if unsure:
        return f"None of {len(asked)} rules about {levels} holds for certain; {len(unsure)} cannot be told from these images."
    if untrained:
        return f"The model is untrained, and no rule about {levels} holds."
    if len(asked) > MOST_LISTED:
        return f"No sign of collapse in what was measured: none of {len(asked)} rules about {levels} holds."
    return f"No sign that {', or that '.join(outcome.rule.says for outcome in asked)}."


def _compared(outcome: Outcome) -> str:
    """The number of one rule that does not hold, beside its threshold."""
    rule, among = outcome.rule, ""
    if len(outcome.places) > 1:
        furthest = "highest" if rule.direction == "above" else "lowest"
        among = f" where it is {furthest} ({outcome.axis} {next(p.at for p in outcome.places if p.value == outcome.value)})"
    quantity = f"{rule.quantity[0].upper()}{rule.quantity[1:]}"
    return f"{quantity}: {number(outcome.value)}{among}; the rule holds {rule.direction} {rule.threshold:g}."


def _no_rule(findings: Findings, outcomes: Mapping[str, Outcome]) -> str:
    """Why there is no answer although there are numbers, or why there are no numbers."""
    measured = [name for name in findings.metrics if result_of(findings, name) is not None]
    if not findings.metrics:
        return "No metric was asked for: there is nothing to judge."
    if not measured:
        name, reading = next(iter(findings.metrics.items()))
        return f"Nothing of what was asked for can be measured here; {name}: {reading.not_applicable}."
    which = _joined(measured) if len(measured) <= MOST_LISTED else f"any of the {len(measured)} metrics of this run"
    refused = [_refused(findings, o) for o in outcomes.values() if o.rule.spoken and o.rule.metric in measured]
    why = refused[0] if refused else f"no rule is about {which}"
    return f"There are numbers here and no verdict on them: {why}."


def _refused(findings: Findings, outcome: Outcome) -> str:
    """Why a rule about something measured could not be asked."""
    reading = findings.metrics[outcome.rule.metric]
    if "twin" in outcome.rule.quantity and reading.nulls is not None and null_of(reading, "untrained") is None:
        why = reading.nulls.reasons.get("untrained") or "it is defined nowhere"
        return f"{outcome.rule.metric} is held against the untrained twin, which was not measured ({why})"
    return outcome.reason


def _means(findings: Findings) -> list[str]:
    """The means of the two readings of the weights that rules are about (else of the first two), beside their twins'."""
    every = {name: reading for name in findings.metrics if (reading := result_of(findings, name)) is not None}
    chosen = [name for name in MEANS if name in every] or list(every)[:MOST_LISTED]
    parts = [f"{MEANS.get(name, name)} {_mean_of_weights(every[name])}" for name in chosen]
    return [f"In mean over blocks and matrices: {'; '.join(parts)}."] if parts else []


def _mean_of_weights(reading: MetricResult) -> str:
    full = reading.details.get("full_rank") if reading.settings.get("measure") == "effective" else None
    scale = 1.0 if full is None else np.asarray(full, dtype=np.float64)
    parts = [part for part in (reading.values, null_of(reading, "untrained")) if part is not None]
    own, *fresh = (number(mean(adjacent(part) if len(set(reading.dims)) == 1 else part / scale)) for part in parts)
    seeds = {} if reading.nulls is None else reading.nulls.spread.get("untrained_seeds", {})
    twin = f"mean of {len(seeds['seeds'])} untrained twins" if seeds else "untrained twin"
    return f"{own} ({twin} {fresh[0]})" if fresh else own


def _joined(words: Mapping[str, None] | Sequence[str]) -> str:
    first, last = list(words)[:-1], list(words)[-1]
    return f"{', '.join(first)} and {last}" if first else last


Outcomes = Mapping[str, Outcome]
LEVELS = {"attention": "Attention", "tokens": "Tokens", "weights": "Weights"}


def judge(findings: Findings, table: Sequence[Outcome] | None = None) -> Verdict:
    """The verdict on one run's findings, from how its rules came out (`table`, as `verdict_table` gives it)."""
    outcomes = {outcome.rule.name: outcome for outcome in (verdict_table(findings) if table is None else table)}
    kinds: tuple[str, ...] = ()
    collapsed: bool | None = None
    spoken = _spoken(outcomes)
    if "attention-similarity" not in findings.metrics:
        case, sentences = unasked(findings, outcomes, spoken)
    elif why := _why_not(findings):
        case, sentences = "not-applicable", [(f"Similarity between blocks cannot be judged here: {why}.", "shared"), *spoken]
    else:
        pairs = pairs_of(findings)
        kinds = kinds_of(pairs)
        case, collapsed, said = _depth(pairs, kinds, outcomes, _numbers(pairs, _kappa_ends(findings)))
        sentences = [*said, *spoken]
    caveats = _caveats(outcomes, measured=bool(kinds), weights=case == WEIGHTS_ONLY)
    return Verdict(
        case,
        tuple(text for text, _ in sentences),
        tuple(text for text, _ in caveats),
        collapsed,
        rules=tuple(rule for _, rule in sentences),
        caveat_rules=tuple(rule for _, rule in caveats),
        pairs=kinds,
    )


def with_verdict(findings: Findings) -> Findings:
    """The findings with how each rule came out (`verdict`) and what that says (`answer`)."""
    table = verdict_table(findings)
    return replace(findings, verdict=[each.plain() for each in table], answer=asdict(judge(findings, table)))


def verdict_of(findings: Findings) -> Verdict:
    """The verdict that the findings hold; computed where they were stored without one."""
    stored: dict[str, Any] = {key: tuple(v) if isinstance(v, list) else v for key, v in findings.answer.items()}
    return Verdict(**stored) if stored else judge(findings)


def _why_not(findings: Findings) -> str:
    """Why the similarity of blocks cannot be judged although it was asked for; empty where it can."""
    reading = findings.metrics["attention-similarity"]
    if reading.values is None or reading.nulls is None:
        return reading.not_applicable or "it has no values"
    return "" if np.isfinite(pairs_of(findings).raw).any() else "no two neighbouring blocks have maps of one shape"


def _depth(pairs: Pairs, kinds: tuple[str, ...], outcomes: Outcomes, numbers: str) -> tuple[str, bool | None, list[Said]]:
    """Whether attention has collapsed across depth: the case, the answer and its two sentences (`numbers` a second one)."""
    total = sum(kind != "undefined" for kind in kinds)
    sure = [i for i, k in enumerate(kinds) if k in ("shared", "shared-row") and i + 1 in outcomes[k].at("yes")]
    if sure:
        return _shared(pairs, kinds, sure, total)
    unsure = {name: outcomes[name].at("undecided") for name in ("shared", "shared-row")}
    ignoring = BY_NAME["mostly-query-independent"].holds(_part(kinds, "query-independent", "same-everywhere"))
    if ignoring and not unsure["shared"]:
        return _query_independent(pairs, kinds, total, sure=not unsure["shared-row"])
    if any(unsure.values()):
        return _undecided(unsure, total, numbers)
    return _apart(pairs, kinds, total, numbers)


def _undecided(unsure: Mapping[str, list[int]], total: int, numbers: str) -> tuple[str, bool | None, list[Said]]:
    found = sorted({block for blocks in unsure.values() for block in blocks})
    first = (
        f"It cannot be told from these images whether attention has collapsed across depth: in {len(found)} of {total} "
        f"neighbouring pairs ({_blocks(found)} with the block before) the interval is missing or holds the threshold."
    )
    rule = next(name for name, blocks in unsure.items() if blocks)
    return "undecided", None, [(first, rule), (numbers, "shared")]


def _apart(pairs: Pairs, kinds: tuple[str, ...], total: int, numbers: str) -> tuple[str, bool | None, list[Said]]:
    """Where no pair shares its attention: whether raw similarity is high all the same."""
    explained = kinds.count("near-uniform") + kinds.count("explained")
    if BY_NAME["mostly-explained"].holds(_part(kinds, "near-uniform", "explained")):
        uniform = kinds.count("near-uniform") >= kinds.count("explained")
        share = mean(pairs.share)
        spread = f": each query spreads its attention over nearly all tokens (entropy {_percent(share)} of uniform)"
        first = (
            f"This is not collapse: {explained} of {total} neighbouring pairs of blocks score above "
            f"{BY_NAME['high-raw'].threshold:g} in raw similarity, but no more than chance would give"
            f"{spread if uniform and share is not None else ''}."
        )
        return "near-uniform" if uniform else "explained", False, [(first, "mostly-explained"), (numbers, "shared")]
    first = (
        "No collapse between neighbouring blocks: their attention maps are distinct"
        + (
            f", {explained} high raw similarit{'y is' if explained == 1 else 'ies are'} explained by the nulls"
            if explained
            else ""
        )
        + f" (kappa above {BY_NAME['shared'].threshold:g} in 0 of {total} pairs)."
    )
    return "distinct", False, [(first, "shared"), (numbers, "shared")]


def _part(kinds: tuple[str, ...], *wanted: str) -> float:
    defined = [kind for kind in kinds if kind != "undefined"]
    return sum(kind in wanted for kind in defined) / max(len(defined), 1)


def _shared(pairs: Pairs, kinds: tuple[str, ...], shared: list[int], total: int) -> tuple[str, bool | None, list[Said]]:
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
        return "query-independent", True, [(first, "shared-row"), (second, "shared-row")]
    at = [i for i in shared if kinds[i] == "shared"]
    second = (
        f"Other tokens' attention explains {_mean(pairs.null, at)} of a raw similarity of {_mean(pairs.raw, at)} there; of "
        f"what is left to agree, {_percent(mean(pairs.kappa[at]))} does (kappa {_mean(pairs.kappa, at)})."
    )
    return "shared", True, [(first, "shared"), (second, "shared")]


def _query_independent(pairs: Pairs, kinds: tuple[str, ...], total: int, sure: bool) -> tuple[str, bool | None, list[Said]]:
    at = [i for i, k in enumerate(kinds) if k in ("query-independent", "same-everywhere")]
    everywhere = kinds.count("same-everywhere") > len(at) / 2
    first = f"Attention ignores the query in {len(at)} of {total} neighbouring pairs of blocks: every token attends with the "
    first += "same row"
    if everywhere:
        first += ", and all heads and blocks with nearly the same one."
    else:
        first += ", but each block with a row of its own." if sure else "; whether blocks share it, more images must tell."
    second = (
        f"Columns are alike whichever tokens are compared (wrong-token null {_mean(pairs.null, at)}), so that columns "
        f"and kappa say nothing; rows agree at {_mean(pairs.row, at)} between blocks, {_mean(pairs.row_head, at)} across heads."
    )
    rule = "same-everywhere" if everywhere else "query-independent"
    return "query-independent", None if everywhere or not sure else False, [(first, "mostly-query-independent"), (second, rule)]


def _kappa_ends(findings: Findings) -> str:
    """The 95 % interval of the mean of kappa over pairs, as words; a dash where the findings hold none."""
    low, high = (findings.summary.get(f"kappa_adjacent_ci_{end}") for end in ("low", "high"))
    return DASH if low is None or high is None else interval((low, high))


def _numbers(pairs: Pairs, ends: str) -> str:
    raw, null, kappa = mean(pairs.raw), mean(pairs.null), mean(pairs.kappa)
    text = f"Neighbouring blocks are alike at {_number(raw)} in raw cosine, and with the wrong tokens at {_number(null)}"
    if kappa is None:
        return text + "; kappa is undefined, because the wrong-token null is 1 itself."
    if kappa <= 0:
        sure = "" if ends == DASH else f", 95 % {ends}"
        return text + f": in the mean nothing agrees beyond that (kappa {_number(kappa)}{sure})."
    return text + f": of what is left to agree, {_percent(kappa)} does (kappa {_number(kappa)})."


def _spoken(outcomes: Outcomes) -> list[Said]:
    """A sentence for each of the other illnesses that was found."""
    found = []
    for name, outcome in outcomes.items():
        if outcome.rule.spoken and outcome.answer == "yes":
            rule, where = outcome.rule, outcome.at("yes") if outcome.axis == "block" else []
            places = f", {_blocks(where)}" if where else ""
            held = f"{rule.quantity}: {_number(outcome.value)}, {rule.direction} {rule.threshold:g}"
            found.append((f"{LEVELS[rule.level]}: {rule.says} ({held}{places}).", name))
    return found


def _caveats(outcomes: Outcomes, measured: bool, weights: bool) -> list[Said]:
    found = []
    if outcomes["untrained"].answer == "yes":
        found.append((_sentence(outcomes["untrained"].rule.says), "untrained"))
    for name, outcome in outcomes.items():
        unsure = outcome.at("undecided")
        said = "kappa" if name == "shared" else "rows against heads" if name == "shared-row" else ""
        if said and unsure:
            text = f"For {_blocks(unsure)} the interval of {said} is missing or reaches beyond {outcome.rule.threshold:g}"
            found.append((f"{text}: more images are needed.", name))
        elif outcome.rule.spoken and outcome.answer == "undecided":
            text = f"It is undecided whether {outcome.rule.says} ({outcome.rule.quantity}: {_number(outcome.value)})"
            found.append((f"{text}: {outcome.reason}.", name))
    if measured and outcomes["mixed-maps"].answer == "yes":
        found.append((_sentence(outcomes["mixed-maps"].rule.says), "mixed-maps"))
    if measured:
        found.append((BY_NAME["shared"].does_not_say, "shared"))
    if weights:
        found.append((ONE_SET, QUESTION))
    return found


def _sentence(text: str) -> str:
    return f"{text[0].upper()}{text[1:]}."


def _blocks(numbers: list[int]) -> str:
    return f"{'block' if len(numbers) == 1 else 'blocks'} {spans(numbers)}"


def _mean(values: Array, at: list[int]) -> str:
    return _number(mean(values[at]))


def _number(value: float | None) -> str:
    return "an undefined value" if value is None else number(value)


def _percent(value: float | None) -> str:
    if value is None:
        return "an undefined share"
    return f"{100 * value:.1f} %" if abs(value) < 0.995 or value > 1 else f"{100 * value:.2f} %"
