"""The first screen: three answers with a sign, a word and a value, in sentences that are short and true."""

from __future__ import annotations

import itertools
from dataclasses import replace

import numpy as np
import pytest
from factories import TOKENS, findings_of, synthetic

from collapse_probe.report.findings.answer import SAID, SYMBOLS, closest, headline, rows, small_figure
from collapse_probe.report.findings.cards import Bar, Mark, entropy_ends, key_numbers
from collapse_probe.report.findings.page import render
from collapse_probe.results.findings import Findings
from collapse_probe.results.rules import BY_NAME, KAPPA_ABOVE
from collapse_probe.results.verdict import Verdict, judge, with_verdict

MOST_WORDS = 20
IMAGES = 40


def with_pairs(raw: float, chance: float, pairs: int = 3) -> Findings:
    """Findings of attention similarity alone, every pair alike as given in each of forty images, give or take."""
    noise = np.random.default_rng(0).normal(0, 0.002, (IMAGES, pairs))
    return with_verdict(findings_of(raw + noise, np.full((IMAGES, pairs), chance)))


def with_rule(findings: Findings, rule: str, answer: str, **facts: object) -> Findings:
    """The findings with one rule that came out as given."""
    others = [row for row in findings.verdict if row["rule"] != rule]
    return replace(findings, verdict=[*others, {"rule": rule, "answer": answer, "places": [], **facts}])


@pytest.mark.parametrize(
    ("raw", "chance", "tone", "says"),
    [
        (0.9, 0.1, "bad", "In 3 of 3 adjacent pairs a block attends like the one before, beyond chance."),
        (0.3, 0.29, "good", f"Adjacent blocks attend differently: κ is above {KAPPA_ABOVE:g} in no pair."),
    ],
)
def test_attention_across_depth_is_answered_by_the_verdict(raw, chance, tone, says):
    findings = with_pairs(raw, chance)
    verdict = judge(findings)
    first = rows(findings, verdict)[0]
    assert (first.tone, first.symbol, first.sentence) == (tone, SYMBOLS[tone], says)
    assert first.tone == ("bad" if verdict.collapsed else "good")
    kappa = findings.summary["kappa_adjacent"]
    assert first.value == f"κ {kappa:.2f}"
    assert f"{IMAGES} images" in first.sure
    assert f"chance level {chance:.3f}" in first.against
    assert "untrained copy 0.9" in first.against


def test_blocks_that_share_their_parameters_are_alike_by_construction():
    findings = with_pairs(0.9, 0.1)
    tied = replace(findings, model={**findings.model, "shares_weights": [True, True, True]})
    first = rows(tied, judge(findings))[0]
    assert (first.tone, first.word) == ("bad", "collapsed by construction")
    assert first.sentence == "In 3 of 3 adjacent pairs both blocks have the same parameters, and attend alike by construction."
    one_of_its_own = replace(findings, model={**findings.model, "shares_weights": [True, False, True]})
    assert rows(one_of_its_own, judge(findings))[0].word == "collapsed"


def test_the_headline_names_what_has_collapsed_and_nothing_else():
    bad, good = with_pairs(0.9, 0.1), with_pairs(0.3, 0.29)
    assert headline(bad, rows(bad, judge(bad)), judge(bad)) == "Collapse: attention across depth"
    said = headline(good, rows(good, judge(good)), judge(good))
    assert said == "No collapse of attention across depth"  # tokens and entropy were not measured here
    assert headline(good, [], judge(good)) == "Parameters only: nothing about attention"


@pytest.mark.parametrize(
    ("answer", "tone", "word"),
    [
        ("yes", "bad", "collapsed"),
        ("no", "good", "no collapse"),
        ("undecided", "unsure", "undecided"),
        ("not applicable", "none", "not judged"),
    ],
)
def test_tokens_and_entropy_are_answered_by_their_rules(answer, tone, word):
    findings = with_rule(with_rule(with_verdict(synthetic(6)), "parallel-patches", answer), "entropy-collapse", answer)
    _, tokens, entropy = rows(findings, judge(findings))
    assert (tokens.tone, tokens.word) == (tone, word)
    assert (entropy.tone, entropy.word.partition(",")[0]) == (tone, word)
    assert tokens.value == f"diversity {findings.matrix('patch-diversity')[-1]:.2f}"


def test_too_few_images_are_said_and_not_judged():
    findings = with_verdict(findings_of(np.full((3, 2), 0.9), np.full((3, 2), 0.1)))
    first = rows(findings, judge(findings))[0]
    assert (first.tone, first.word) == ("unsure", "too few images")
    assert first.sentence == "3 images are too few to tell; at least 16 are needed."


def test_where_hardly_any_pair_is_compared_that_is_the_answer():
    findings = with_pairs(0.3, 0.29)
    verdict = replace(judge(findings), pairs=("undefined",) * 10 + ("distinct",))
    first = rows(findings, verdict)[0]
    assert (first.tone, first.word) == ("unsure", "mostly not comparable")
    assert first.sentence.startswith("Only 1 of 11 adjacent pairs can be compared")


def test_every_sentence_is_at_most_twenty_words_and_every_case_has_one():
    findings = with_verdict(synthetic(6))
    said = [sentence for *_, sentence in SAID.values()]
    cases = ("shared", "query-independent", "near-uniform", "explained", "distinct", "undecided", "as-untrained", "not-judged")
    for case, collapsed, answer in itertools.product(cases, (True, None, False), ("yes", "no", "undecided", "not applicable")):
        ruled = with_rule(with_rule(findings, "parallel-patches", answer), "entropy-collapse", answer)
        said += [row.sentence for row in rows(ruled, Verdict(case, (), collapsed=collapsed, pairs=("shared",) * 30))]
    assert len(set(said)) > 15
    assert [sentence for sentence in said if len(sentence.split()) > MOST_WORDS] == []


def test_the_limits_are_those_of_the_rules():
    bars = {card.label: card.bar for card in key_numbers(synthetic(5)) if card.bar is not None}
    assert bars["κ: agreement beyond chance"].collapsed == (KAPPA_ABOVE, 1.0)
    assert bars["patch diversity after the last block"].collapsed == (0.0, 1 - BY_NAME["parallel-patches"].threshold)
    assert bars["attention entropy"].collapsed == (0.0, BY_NAME["entropy-collapse"].threshold)
    assert bars["raw similarity of adjacent pairs"].collapsed is None  # a raw similarity alone is no collapse


def test_a_bar_holds_what_was_measured_in_this_run():
    findings = synthetic(5)
    (bar,) = [card.bar for card in key_numbers(findings) if card.label.startswith("patch diversity")]
    diversity = findings.metrics["patch-diversity"]
    assert [(mark.kind, mark.at) for mark in bar.marks] == [
        ("copy", diversity.nulls.values["untrained"][-1]),
        ("own", diversity.array[-1]),
    ]
    assert bar.interval == tuple(diversity.ci95[-1])
    assert bar.share(diversity.array[-1]) == f"{100 * diversity.array[-1]:.1f}".removesuffix(".0")


def test_an_interval_of_the_entropy_is_shown_only_beside_the_mean_that_it_is_of():
    findings = synthetic(5)
    average = float(findings.matrix("attention-entropy").mean())
    ends = {"attention_entropy_mean_ci_low": average - 0.1, "attention_entropy_mean_ci_high": average + 0.1}

    def found(mean: float) -> tuple[float, float] | None:
        return entropy_ends(replace(findings, summary={**findings.summary, **ends, "attention_entropy_mean": mean}))

    low, high = found(average)
    assert (low, high) == pytest.approx(((average - 0.1) / np.log(TOKENS), (average + 0.1) / np.log(TOKENS)))
    assert found(average + 0.01) is None  # a mean over all heads, where blocks have different numbers of them


def test_a_bar_says_its_numbers_and_keeps_all_within_its_ends():
    bar = Bar(
        -0.5, 1.0, ("−0.50", "1"), (Mark(-0.5, "chance level", "chance"), Mark(2.0, "this model")), (0.25, 3.0), (0.7, 1.0)
    )
    assert [bar.share(mark.at) for mark in bar.marks] == ["0", "100"]
    assert bar.span((0.25, 3.0)) == ("50", "50")
    assert bar.label == "chance level −0.500, this model 2.000; from −0.50 to 1; shaded as collapsed: 0.7 to 1"


def test_the_closest_blocks_are_named_with_their_intervals():
    findings = synthetic(6)
    reading = findings.metrics["attention-similarity"]
    kappa = np.full_like(reading.nulls.values["kappa"], 0.1)
    for later, value in ((2, 0.7), (5, 0.4), (1, 0.2)):
        kappa[later, later - 1] = value
    nulls = replace(reading.nulls, values={**reading.nulls.values, "kappa": kappa}, kappa_ci95=None)
    changed = replace(reading, nulls=nulls)
    said = closest(replace(findings, metrics={**findings.metrics, "attention-similarity": changed}))
    named = ["block 2 with block 1: κ 0.700", "block 5 with block 4: κ 0.400", "block 1 with block 0: κ 0.200"]
    assert said == f"Closest adjacent blocks: {'; '.join(named)}."
    tiny = replace(changed, nulls=replace(changed.nulls, values={**changed.nulls.values, "kappa": kappa / 1000}))
    said = closest(replace(findings, metrics={**findings.metrics, "attention-similarity": tiny}))
    assert said == "No adjacent blocks agree beyond chance: the largest κ is 0.001."
    assert closest(synthetic(3, nulls=False)) == ""


def test_the_small_figure_says_what_it_shows():
    figure = small_figure(synthetic(6))
    assert figure is not None
    (part,) = figure.parts
    values = synthetic(6).matrix("attention-similarity")[~np.eye(6, dtype=bool)]
    assert f"raw similarity between different blocks {values.min():.2f} to {values.max():.2f}" in part.label
    assert small_figure(replace(synthetic(3), metrics={})) is None


def test_a_page_without_images_has_no_rows():
    findings = replace(synthetic(3), metrics={})
    assert [row.tone for row in rows(findings, judge(findings))] == ["none", "none", "none"]
    assert "not measured" in render(findings, {})
