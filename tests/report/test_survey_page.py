"""The page of a gallery: each number in its column, the highest κ first, and a headline that counts what the pages say."""

from __future__ import annotations

import re

from collapse_probe.report.survey.page import COLUMNS, cells, headline, kappas, render, trouble
from collapse_probe.results.survey import FAILED, FINISHED, WAITING, Survey, SurveyRow

NUMBERS = {
    "kappa_adjacent": 0.11, "kappa_adjacent_ci_low": 0.1, "kappa_adjacent_ci_high": 0.12, "similar_blocks_pairs": 9.0,
    "attention_similarity_adjacent": 0.93, "other_token_adjacent": 0.92, "similar_blocks": 7.0, "similar_blocks_corrected": 3.0,
    "attention_entropy_share": 0.84, "patch_diversity_last": 0.55, "sink_largest": 0.26,
}  # fmt: skip


def row(label, case="undecided", kappa=0.11, status=FINISHED, **more):
    facts = {"parameters": 1234, "blocks": 10, "weights": "trained"}
    numbers = {**NUMBERS, "kappa_adjacent": kappa}
    fresh = {"attention_similarity_adjacent": 0.99}
    parts = {"model": facts, "numbers": numbers, "untrained": fresh, "case": case} if status == FINISHED else {}
    return SurveyRow(label=label, conditions={}, folder=f"models/{label}", status=status, **parts, **more)


def gallery(*rows):
    return Survey(rows, {"images": 8, "address": "photos"}, {})


def test_each_number_stands_in_its_column():
    shown = dict(zip(COLUMNS[2:], cells(row("one"))["texts"], strict=True))
    assert shown == {
        "parameters": "1,234", "blocks": "10", "κ": "0.110", "95 % CI": "[0.100, 0.120]", "raw similarity": "0.930",
        "chance level": "0.920", "untrained copy": "0.990", "similar at 0.9": "7", "at κ 0.5": "3", "of pairs": "9",
        "entropy, share of log N": "0.840", "patch diversity, last": "0.550", "largest sink": "0.260",
    }  # fmt: skip


def test_the_headline_counts_the_collapsed_among_those_that_are_judged():
    rows = (row("one", "shared", collapsed=True), row("two", "distinct"), row("three"), row("four", status=FAILED, reason="no"))
    assert headline(gallery(*rows)) == "In 1 of 3 models some adjacent blocks attend alike beyond chance"
    assert headline(gallery(rows[3])).startswith("No model could be judged")
    assert trouble(gallery(*rows, row("five", status=WAITING))) == "Of 5 models 1 failed and 1 not measured yet."


def test_the_highest_kappa_comes_first_in_the_figure():
    (panel,) = kappas(gallery(row("low", kappa=0.1), row("high", kappa=0.9), row("middle", kappa=0.5))).panels
    assert [tick.get_text() for tick in panel.axes.get_yticklabels()] == ["high", "middle", "low"]


def test_a_model_that_failed_says_why_and_links_nowhere():
    page = render(gallery(row("one"), row("two", status=FAILED, reason="<b>no</b>")))
    assert re.findall(r'href="(models/[^"]*)"', page) == ["models/one/report.html"]
    assert "&lt;b&gt;no&lt;/b&gt;" in page


def test_images_that_a_model_was_trained_on_are_told():
    note = "The model was trained on 5 of these 8 images: numbers and accuracy are not those of unseen images."
    page = render(gallery(row("one", notes=(note, "another note")), row("two")))
    assert page.count(note) == 1
    assert "another note" not in page
