"""The verdict: whether attention has collapsed, in a few sentences, each made from a rule and how it came out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np

from collapse_probe.results.findings import Findings, MetricResult
from collapse_probe.results.outcomes import Outcome, verdict_table
from collapse_probe.results.quantities import SHARED_BY, Pairs, kinds_of, pairs_of, share_of_kinds
from collapse_probe.results.readings import adjacent, mean, not_loaded, null_of, partial_sentence, result_of, weights_only
from collapse_probe.results.rules import BY_NAME, FEWEST_IMAGES
from collapse_probe.results.text import interval, no_neighbours, number, numbered, sentence_case, with_reasons

Sentence = tuple[str, str]
"""A sentence, and the name of the rule behind it."""
Depth = tuple[str, bool | None, list[Sentence]]
"""Whether attention has collapsed across depth: the case, the answer and its two sentences."""
WEIGHTS_ONLY, NOT_JUDGED = "weights-only", "not-judged"
LEVELS = {"attention": "Attention", "tokens": "Tokens", "weights": "Weights"}
FAILURES = {
    "parallel-patches": "Collapse within the image",
    "constant-tokens": "Collapse within the image",
    "constant-tokens-composite": "Collapse within the image",
    "entropy-collapse": "Collapse of the attention entropy",
}
"""The rules that are a collapse of their own, and in which sense; without one across depth they are said first."""
MOST_LISTED = 2  # rules or metrics that are named one by one
OPEN = {
    WEIGHTS_ONLY: "Only the parameters were measured, without images: how alike maps or tokens are is not judged here.",
    NOT_JUDGED: "Whether attention has collapsed across depth is not judged here: attention-similarity was not asked for.",
}
ONE_SET = "A model has one set of parameters, which is no sample: their numbers have no interval."
MEANS = {"weight-rank": "effective rank over the full one", "weight-similarity": "|cosine| between rows"}


@dataclass(frozen=True)
class Verdict:
    """What is said of one run, of a pair of subjects, of a kind of replacement or of a curve; `label` says of which.

    `sentences` are the answer, `caveats` what it does not mean. The `case` of a run is shared, query-independent, near-uniform,
    explained, distinct, undecided or not-applicable; where attention-similarity was not asked for, weights-only (all metrics
    are of the weights) or not-judged. `collapsed` is whether its attention has collapsed across depth: True, False, or None
    where the numbers cannot tell. `rules` and `caveat_rules` name the rule behind each sentence and caveat of a run (shared
    where none of them holds), `pairs` the rule that each of its neighbouring pairs of blocks fell under, `shared` the places
    of those in which attention has collapsed.
    """

    case: str
    sentences: tuple[str, ...]
    caveats: tuple[str, ...] = ()
    collapsed: bool | None = None
    label: str = ""
    rules: tuple[str, ...] = ()
    caveat_rules: tuple[str, ...] = ()
    pairs: tuple[str, ...] = ()
    shared: tuple[int, ...] = ()

    @property
    def alike(self) -> tuple[int, int]:
        """In how many of a run's pairs of neighbouring blocks attention has collapsed, and how many are compared."""
        return len(self.shared), sum(kind != "undefined" for kind in self.pairs)


def with_verdict(findings: Findings) -> Findings:
    """The findings with how each rule came out (`verdict`) and what that says (`answer`)."""
    table = verdict_table(findings)
    return replace(findings, verdict=[each.plain() for each in table], answer=asdict(judge(findings, table)))


def verdict_of(findings: Findings) -> Verdict:
    """The verdict that the findings hold; computed where they were stored without one, or without the pairs it is about."""
    stored: dict[str, Any] = {key: tuple(v) if isinstance(v, list) else v for key, v in findings.answer.items()}
    whole = stored and ("shared" in stored or not stored.get("collapsed"))
    return Verdict(**stored) if whole else judge(findings)


def judge(findings: Findings, table: Sequence[Outcome] | None = None) -> Verdict:
    """The verdict on one run's findings, from how its rules came out (`table`, as `verdict_table` gives it)."""
    outcomes = {outcome.rule.name: outcome for outcome in (verdict_table(findings) if table is None else table)}
    kinds: tuple[str, ...] = ()
    collapsed: bool | None = None
    others = _other_rules(outcomes)
    similarity = findings.metrics.get("attention-similarity")
    if similarity is None:
        case = WEIGHTS_ONLY if weights_only(findings) else NOT_JUDGED
        others = others or _no_rule_holds(findings, outcomes)
        means = _means_of_weights(findings) if case == WEIGHTS_ONLY else []
        sentences = [*others, *means, (OPEN[case], "shared")]
    elif why := _not_applicable(findings, similarity):
        first = f"Whether attention has collapsed across depth cannot be judged here: {why}."
        case, sentences = "not-applicable", [(first, "shared"), *others]
    else:
        pairs = pairs_of(findings)
        kinds = kinds_of(pairs)
        case, collapsed, across_depth = _across_depth(findings, pairs, kinds, outcomes)
        compared = _uncompared(findings, kinds)
        most = sum(kind != "undefined" for kind in kinds) > len(kinds) / 2  # else it is said first of how few pairs this is
        own = [] if collapsed else [each for each in others if each[1] in FAILURES]
        rest = [each for each in others if each not in own]
        sentences = [*own, *([*across_depth, *compared] if most else [*compared, *across_depth]), *rest]
    if any(result.description.level == "attention" for result in findings.metrics.values()) or similarity is not None:
        sentences = [*((text, "shared") for text in not_heard(findings)), *sentences]
    if part := not_loaded(findings.model):
        sentences.insert(0, (f"{part}.", "loaded-in-part"))
    if ill := findings.run.get("nonfinite"):
        sentences.insert(0, (str(ill["sentence"]), "shared"))
    if missing := partial_sentence(findings.data):
        sentences.insert(0, (missing, "shared"))
    few = case != WEIGHTS_ONLY and (findings.data.get("images") or 0) < FEWEST_IMAGES
    caveats = _caveats(outcomes, bool(kinds), few)
    caveats += [(ONE_SET, "shared")] if case == WEIGHTS_ONLY else []
    texts, rules = zip(*sentences, strict=True)
    notes, note_rules = zip(*caveats, strict=True) if caveats else ((), ())
    shared = tuple(_shared_pairs(findings, kinds, outcomes)[0]) if collapsed else ()
    return Verdict(case, texts, notes, collapsed, rules=rules, caveat_rules=note_rules, pairs=kinds, shared=shared)


def _not_applicable(findings: Findings, similarity: MetricResult) -> str:
    """Why the similarity of blocks cannot be judged although it was asked for; empty where it can."""
    if similarity.values is None or similarity.nulls is None:
        return similarity.not_applicable or "it has no values"
    if np.isfinite(pairs_of(findings).raw).any():
        return ""
    return no_neighbours(_reasons(findings))


def not_heard(findings: Findings) -> list[str]:
    """A sentence on the blocks whose attention could not be captured; empty where there are none."""
    names = [
        str(each["where"])
        for each in findings.model.get("left_out") or ()
        if str(each["why"]).startswith(("not captured", "not heard"))
    ]
    count = sum(len(each["blocks"]) for each in findings.model.get("left_out") or () if str(each["where"]) in names)
    if not names:
        return []
    if count < 2:
        return [f"Block {names[0]} could not be captured: its neighbours are not compared."]
    return [f"Blocks {', '.join(names)} could not be captured: their neighbours are not compared."]


def _uncompared(findings: Findings, kinds: tuple[str, ...]) -> list[Sentence]:
    """Which pairs of consecutive blocks are not compared, and why; empty where all are."""
    if not (reasons := _reasons(findings)):
        return []
    compared = sum(kind != "undefined" for kind in kinds)
    few = f"{compared} of {len(kinds)} pairs of consecutive blocks are compared"
    return [(f"{few}; without the block before: {with_reasons(reasons)}.", "shared")]


def _reasons(findings: Findings) -> dict[str, list[int]]:
    """The blocks that are not compared with the block before, by the reason."""
    return {str(each["why"]): list(each["blocks"]) for each in findings.model.get("uncompared") or ()}


def _shared_pairs(
    findings: Findings, kinds: tuple[str, ...], outcomes: Mapping[str, Outcome]
) -> tuple[list[int], list[int], set[int]]:
    """The pairs that share their attention more than an untrained copy does, all that share it, and those of tied blocks."""
    shared = [i for i, kind in enumerate(kinds) if kind in SHARED_BY and i + 1 in outcomes[kind].at("yes")]
    tied = set(np.flatnonzero(findings.model.get("shares_weights") or ()).tolist())
    untrained = set(outcomes["beyond-untrained"].at("no")) - {i + 1 for i in tied}
    return [i for i in shared if i + 1 not in untrained], shared, tied


def _across_depth(findings: Findings, pairs: Pairs, kinds: tuple[str, ...], outcomes: Mapping[str, Outcome]) -> Depth:
    total = sum(kind != "undefined" for kind in kinds)
    images = findings.data.get("images") or 0
    if images < FEWEST_IMAGES:
        first = (
            f"Too few images to tell whether attention has collapsed across depth: {images}, and at least {FEWEST_IMAGES} are "
            "needed."
        )
        return "undecided", None, [(first, "shared"), (_on_average(findings, pairs), "shared")]
    own, shared, tied = _shared_pairs(findings, kinds, outcomes)
    if own:
        more = _as_untrained(kinds, [i for i in shared if i not in own], total, "Besides, ")
        if set(outcomes["beyond-untrained"].at("no")) & {i + 1 for i in own if i in tied}:
            more.append(("Untrained copies share their attention as much: it comes with the architecture.", "beyond-untrained"))
        return _shared(pairs, kinds, own, total, [i for i in own if i in tied], more)
    if shared:
        why = _as_untrained(kinds, shared, total, "It cannot be told from the architecture whether attention has collapsed: ")
        return "as-untrained", None, [*why, (_on_average(findings, pairs), "shared")]
    unsure = {name: outcomes[name].at("undecided") for name in SHARED_BY}
    untold = [i + 1 for i, kind in enumerate(kinds) if kind == "untold"]
    if not any(unsure.values()) and not untold:
        if BY_NAME["mostly-query-independent"].holds(share_of_kinds(kinds, "query-independent", "same-everywhere")):
            return _query_independent(pairs, kinds, total)
        return _not_shared(findings, pairs, kinds, total)
    return _undecided(findings, pairs, outcomes, unsure, untold, total)


def _compared_pairs(total: int, kinds: tuple[str, ...]) -> str:
    pairs = f"{total} neighbouring pairs of blocks"
    return pairs if total == len(kinds) else f"the {pairs} that can be compared"


def _shared(
    pairs: Pairs, kinds: tuple[str, ...], shared: list[int], total: int, tied: list[int], more: list[Sentence]
) -> Depth:
    """Pairs that share their attention: how many, by what, and what is the same by construction (`tied`)."""
    names = list(dict.fromkeys(kinds[i] for i in shared))
    ways = {
        "shared-row": ", every head with a row of its own kind",
        "same-row": ", every query of every head with the same row",
        "other-order": ", under other head numbers",
    }
    ignoring = all(BY_NAME["query-independent"].holds(float(pairs.queries[i])) for i in shared) and "shared" not in names
    by_row = ", every query with the same row" if ignoring else ways.get(names[0], "") if len(names) == 1 else ""
    what = f"{numbered([i + 1 for i in shared])} attend{'s' if len(shared) == 1 else ''} like the block before{by_row}"
    where = f"in {len(shared)} of {_compared_pairs(total, kinds)}"
    first = f"Attention has collapsed across depth {where}: {what}."
    if len(tied) == len(shared):
        first = f"Attention is the same across depth by construction {where}, which share their parameters: {what}."
    sentences = [(first, names[0])]
    for name in names:
        at = [i for i in shared if kinds[i] == name]
        which = "There" if len(names) == 1 else f"In {numbered([i + 1 for i in at])}"
        sentences.append((f"{which} {_numbers_of(name, pairs, at)}", name))
    if tied and len(tied) < len(shared):
        sentences.append((f"Of these, {numbered([i + 1 for i in tied])} share parameters with the block before.", "shared"))
    return "query-independent" if ignoring else "shared", True, [*sentences, *more]


def _numbers_of(kind: str, pairs: Pairs, at: list[int]) -> str:
    """The numbers by which the pairs `at`, of one kind, share their attention."""
    row, head, key, order = (number(mean(part[at])) for part in (pairs.row, pairs.row_head, pairs.row_key, pairs.order))
    return {
        "shared": f"the raw similarity is {_beyond_chance(pairs, at)}",
        "shared-row": f"rows agree at {row} between the same heads of the two blocks, and at {head} between other heads.",
        "same-row": f"rows agree at {row} whichever queries and heads are compared, and at {key} between other keys.",
        "other-order": (
            f"heads of the same number agree at {row} by rows; paired as they are most alike, they reach {order} of what other "
            "heads leave."
        ),
    }[kind]


def _as_untrained(kinds: tuple[str, ...], at: list[int], total: int, start: str) -> list[Sentence]:
    """What is said, after `start`, of pairs that share their attention, and in untrained copies do so as well."""
    if not at:
        return []
    blocks = f"{numbered([i + 1 for i in at])} attend{'s' if len(at) == 1 else ''} like the block before"
    where = f"in {len(at)} of {_compared_pairs(total, kinds)} {blocks}"
    return [(f"{start}{where}, and in untrained copies, with fresh parameters, they do so about as much.", "beyond-untrained")]


def _query_independent(pairs: Pairs, kinds: tuple[str, ...], total: int) -> Depth:
    at = [i for i, k in enumerate(kinds) if k in ("query-independent", "same-everywhere")]
    everywhere = kinds.count("same-everywhere") > len(at) / 2
    rest = "all heads and blocks with nearly the same one" if everywhere else "each block with a row of its own"
    first = (
        f"Attention ignores the query in {len(at)} of {_compared_pairs(total, kinds)}: every token attends with the same "
        f"row, and {rest}."
    )
    second = (
        f"The rows of different queries of a block agree at {number(mean(pairs.queries[at]))}; across depth rows agree at "
        f"{number(mean(pairs.row[at]))} between the same heads of neighbouring blocks and at "
        f"{number(mean(pairs.row_head[at]))} between other heads."
    )
    rule = "same-everywhere" if everywhere else "query-independent"
    return "query-independent", None if everywhere else False, [(first, "mostly-query-independent"), (second, rule)]


def _undecided(
    findings: Findings,
    pairs: Pairs,
    outcomes: Mapping[str, Outcome],
    unsure: Mapping[str, list[int]],
    untold: list[int],
    total: int,
) -> Depth:
    if untold and not any(unsure.values()):
        measured = bool(np.isfinite(pairs.row).any())
        first = (
            f"It cannot be told whether attention has collapsed across depth: in {len(untold)} of {total} neighbouring pairs "
            f"({numbered(untold)} with the block before) "
            + (
                "rows agree more than keys explain, and there is one head, so that nothing tells what any two heads share."
                if measured
                else "columns are alike whichever tokens are compared, and attention-similarity@row was not measured."
            )
        )
        return (
            "undecided",
            None,
            [(first, "same-row" if measured else "columns-alike"), (_on_average(findings, pairs), "shared")],
        )
    blocks = sorted({block for blocks in unsure.values() for block in blocks})
    rule = next(name for name, at in unsure.items() if at)
    of_rules = [outcomes[name].reason for name, at in unsure.items() if at]
    reasons = dict.fromkeys(reason.partition(": ")[2] or reason for reason in of_rules)
    first = (
        f"It cannot be told whether attention has collapsed across depth: {len(blocks)} of {total} neighbouring pairs "
        f"({numbered(blocks)} with the block before) are undecided ({'; '.join(reasons)})."
    )
    return "undecided", None, [(first, rule), (_on_average(findings, pairs), "shared")]


def _not_shared(findings: Findings, pairs: Pairs, kinds: tuple[str, ...], total: int) -> Depth:
    """Where no pair shares its attention: whether raw similarity is high all the same."""
    uniform, explained = kinds.count("near-uniform"), kinds.count("explained")
    if BY_NAME["mostly-explained"].holds(share_of_kinds(kinds, "near-uniform", "explained")):
        case, why = "explained", ""
        if uniform >= explained:
            entropy = _percent(mean(pairs.share) or 0.0)
            case, why = "near-uniform", f": each query attends to nearly all tokens (entropy {entropy} of uniform)"
        first = (
            f"This is not collapse across depth: {uniform + explained} of {_compared_pairs(total, kinds)} score above "
            f"{BY_NAME['high-raw'].threshold:g} in raw similarity, but no more than chance would give{why}."
        )
        return case, False, [(first, "mostly-explained"), (_on_average(findings, pairs), "shared")]
    some = " that can be compared" if total < len(kinds) else ""
    first = (
        f"No collapse across depth: the attention maps of neighbouring blocks{some} are distinct "
        f"(κ above {BY_NAME['shared'].threshold:g} in 0 of {total} pairs)."
    )
    return "distinct", False, [(first, "shared"), (_on_average(findings, pairs), "shared")]


def _on_average(findings: Findings, pairs: Pairs) -> str:
    """The numbers of the pairs on average, with the interval of kappa where it is not above 0."""
    ends = [findings.summary.get(f"kappa_adjacent_ci_{end}") for end in ("low", "high")]
    sure = "" if None in ends else f", 95 % CI {interval([end for end in ends if end is not None])}"
    return f"Neighbouring blocks have a raw similarity of {_beyond_chance(pairs, list(range(len(pairs.raw))), sure)}"


def _beyond_chance(pairs: Pairs, at: list[int], sure: str = "") -> str:
    """Raw similarity, the chance level and kappa of the pairs `at`; `sure`: the interval of kappa in words."""
    raw, null, kappa = mean(pairs.raw[at]), mean(pairs.null[at]), mean(pairs.kappa[at])
    text = f"{number(raw)}, against a chance level (other tokens) of {number(null)}"
    if kappa is None:
        return f"{text}: κ is undefined, because nothing is left above that level."
    if kappa <= 0:
        return f"{text}: on average nothing agrees beyond chance (κ {number(kappa)}{sure})."
    return f"{text}: of the agreement that chance cannot explain, {_percent(kappa)} is reached (κ {number(kappa)})."


def _other_rules(outcomes: Mapping[str, Outcome]) -> list[Sentence]:
    """A sentence for each of the other rules that holds."""
    sentences = []
    for name, outcome in outcomes.items():
        rule, blocks = outcome.rule, outcome.at("yes") if outcome.axis == "block" else []
        if rule.spoken and outcome.answer == "yes":
            where = f", {numbered(blocks)}" if blocks else ""
            value = f"{rule.quantity}: {number(outcome.value)}, {rule.direction} {rule.threshold:g}"
            sentences.append((f"{FAILURES.get(name, LEVELS[rule.level])}: {rule.says} ({value}{where}).", name))
    return sentences


def _no_rule_holds(findings: Findings, outcomes: Mapping[str, Outcome]) -> list[Sentence]:
    """What is said of a run without attention-similarity in which no rule answers yes."""
    asked = [outcome for outcome in outcomes.values() if outcome.rule.spoken and outcome.answer != "not applicable"]
    unsure = sum(outcome.answer == "undecided" for outcome in asked)
    levels = " and ".join(dict.fromkeys(LEVELS[outcome.rule.level].lower() for outcome in asked))
    if not asked:
        texts = [_no_answer(findings, outcomes)]
    elif unsure:
        texts = [f"No rule about {levels} holds for certain, and {unsure} cannot be told from these images."]
    elif outcomes["untrained"].answer == "yes":
        texts = [f"The model is untrained, and no rule about {levels} holds."]
    elif len(asked) > MOST_LISTED:
        texts = [f"No sign of collapse in what was measured: none of {len(asked)} rules about {levels} holds."]
    else:
        texts = []
        for each in asked:  # with the number where it is nearest to holding
            rule, at = each.rule, [place.at for place in each.places if place.value == each.value]
            where = f" in {each.axis} {at[0]}" if len(each.places) > 1 else ""
            numbers = f"{rule.quantity}: {number(each.value)}{where}; the rule holds {rule.direction} {rule.threshold:g}"
            texts.append(f"No sign that {rule.says} ({numbers}).")
    return [(text, "shared") for text in texts]


def _no_answer(findings: Findings, outcomes: Mapping[str, Outcome]) -> str:
    """Why there is no answer although there are numbers, or why there are no numbers."""
    measured = [name for name in findings.metrics if result_of(findings, name) is not None]
    if not measured:
        reasons = [f"; {name}: {result.not_applicable}" for name, result in findings.metrics.items()]
        return f"Nothing of what was asked for can be measured here{''.join(reasons[:1])}."
    which = " and ".join(measured) if len(measured) <= MOST_LISTED else f"any of the {len(measured)} metrics of this run"
    refused = [each.reason for each in outcomes.values() if each.rule.spoken and each.rule.metric in measured]
    return f"There are numbers here and no verdict on them: {refused[0] if refused else f'no rule is about {which}'}."


def _means_of_weights(findings: Findings) -> list[Sentence]:
    """The means of the two metrics of the weights that rules are about (else of the first two), beside their twins'."""
    measured = {name: result for name in findings.metrics if (result := result_of(findings, name)) is not None}
    names = [name for name in MEANS if name in measured] or list(measured)[:MOST_LISTED]
    parts = "; ".join(f"{MEANS.get(name, name)} {_mean_of_weights(measured[name])}" for name in names)
    return [(f"On average over blocks and matrices: {parts}.", "shared")] if parts else []


def _mean_of_weights(result: MetricResult) -> str:
    full = result.details.get("full_rank") if result.settings.get("measure") == "effective" else None
    scale = 1.0 if full is None else np.asarray(full, dtype=np.float64)
    parts = [part for part in (result.values, null_of(result, "untrained")) if part is not None]
    own, *fresh = (number(mean(adjacent(result, part) if len(set(result.dims)) == 1 else part / scale)) for part in parts)
    seeds = {} if result.nulls is None else result.nulls.untrained_seeds or {}
    twin = f"mean of {len(seeds['seeds'])} untrained copies" if seeds else "untrained copy"
    return f"{own} ({twin} {fresh[0]})" if fresh else own


def _caveats(outcomes: Mapping[str, Outcome], maps: bool, few: bool) -> list[Sentence]:
    """What the sentences do not mean; `maps`: whether they speak of attention maps."""
    caveats = []
    for name, outcome in outcomes.items():
        rule, unsure = outcome.rule, outcome.at("undecided")
        if name in SHARED_BY and unsure and not few:
            where = f"For {numbered(unsure)} it is undecided whether {rule.says} ({rule.quantity}: {number(outcome.value)})"
            caveats.append((f"{where}: {outcome.reason}.", name))
        elif rule.spoken and outcome.answer == "undecided" and not few:
            number_of = f"{rule.quantity}: {number(outcome.value)}"
            caveats.append((f"It is undecided whether {rule.says} ({number_of}): {outcome.reason}.", name))
        elif name == "untrained" and outcome.answer == "yes":
            caveats.insert(0, (f"{sentence_case(rule.says)}.", name))
        elif name == "mixed-maps" and outcome.answer == "yes" and maps:
            caveats.append((f"{sentence_case(rule.says)}.", name))
    if few:
        caveats.append((f"No rule about maps or tokens is judged with fewer than {FEWEST_IMAGES} images.", "shared"))
    return [*caveats, *([(BY_NAME["shared"].does_not_say, "shared")] if maps else [])]


def _percent(value: float) -> str:
    return f"{100 * value:.1f} %" if abs(value) < 0.995 or value > 1 else f"{100 * value:.2f} %"
