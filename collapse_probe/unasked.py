"""The answer of a run that was not asked how alike the attention of blocks is: what the rules about what it measured say."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from collapse_probe.families import family_of
from collapse_probe.findings import Findings, Reading
from collapse_probe.outcomes import Outcome
from collapse_probe.readings import held, null
from collapse_probe.summary import adjacent, mean
from collapse_probe.words import number

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


def weights_only(findings: Findings) -> bool:
    """Whether all that was asked for is about the weights."""
    return bool(findings.metrics) and all(of_weights(name, reading) for name, reading in findings.metrics.items())


def of_weights(name: str, reading: Reading) -> bool:
    """Whether a reading is about the weights, which need no images."""
    return family_of(name).level == "weights" or "matrix" in reading.dims


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
    measured = [name for name in findings.metrics if held(findings, name) is not None]
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
    if "twin" in outcome.rule.quantity and reading.nulls is not None and null(reading, "untrained") is None:
        why = reading.nulls.reasons.get("untrained") or "it is defined nowhere"
        return f"{outcome.rule.metric} is held against the untrained twin, which was not measured ({why})"
    return outcome.reason


def _means(findings: Findings) -> list[str]:
    """The means of the two readings of the weights that rules are about (else of the first two), beside their twins'."""
    every = {name: reading for name in findings.metrics if (reading := held(findings, name)) is not None}
    chosen = [name for name in MEANS if name in every] or list(every)[:MOST_LISTED]
    parts = [f"{MEANS.get(name, name)} {_mean(every[name])}" for name in chosen]
    return [f"In mean over blocks and matrices: {'; '.join(parts)}."] if parts else []


def _mean(reading: Reading) -> str:
    full = reading.settings.get("full_rank") if reading.settings.get("measure") == "effective" else None
    scale = 1.0 if full is None else np.asarray(full, dtype=np.float64)
    parts = [part for part in (reading.values, null(reading, "untrained")) if part is not None]
    own, *fresh = (number(mean(adjacent(part) if len(set(reading.dims)) == 1 else part / scale)) for part in parts)
    seeds = {} if reading.nulls is None else reading.nulls.spread.get("untrained_seeds", {})
    twin = f"mean of {len(seeds['seeds'])} untrained twins" if seeds else "untrained twin"
    return f"{own} ({twin} {fresh[0]})" if fresh else own


def _joined(words: Mapping[str, None] | Sequence[str]) -> str:
    first, last = list(words)[:-1], list(words)[-1]
    return f"{', '.join(first)} and {last}" if first else last
