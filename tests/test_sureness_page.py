"""How sure the findings are, on the page: tests, settling numbers, images at both ends, classes, rules."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
from synthetic import synthetic

from collapse_probe.convergence_figure import convergence
from collapse_probe.findings import Findings
from collapse_probe.outcomes import judged
from collapse_probe.page import render
from collapse_probe.sureness_tables import certainty, classes_table, extremes_tables, pair_tests_table, rules_table

NAME = "attention_similarity_adjacent"


def stored(**parts) -> Findings:
    return replace(synthetic(3, gallery=False), sureness=parts)


def outcome_of(q, enough=True):
    return {
        "q": q, "level": 0.05, "significant": sum(x <= 0.05 for x in q), "tested": len(q), "smallest_p": 2.0**-12,
        "images": 12, "enough_images": enough, "test": "sign flips", "assumption": "signs could be exchanged",
        "sentence": "Too few images to tell.", "all_pairs": {"significant": 2, "tested": 3, "test": "paired t"},
    }  # fmt: skip


def test_the_tests_say_how_many_pairs_are_beyond_their_null():
    table = pair_tests_table(
        stored(tests={"attention-similarity": outcome_of([0.0004, 0.2]), "other": outcome_of([0.01, 0.04])})
    )
    first, second = (dict(zip(table.header, row, strict=True)) for row in table.rows)
    assert first["pairs above their null"] == "1 of 2"
    assert first["largest q among them"] == "< 0.001"
    assert second["largest q among them"] == "0.040"
    assert first["all pairs"] == "2 of 3 (paired t)"
    assert table.notes == ("signs could be exchanged",)


def test_too_few_images_are_no_negative_result():
    table = pair_tests_table(stored(tests={"attention-similarity": outcome_of([0.5, 0.5], enough=False)}))
    assert table.rows[0][1] == "too few images to tell"
    assert table.notes[0] == "attention-similarity: Too few images to tell."


def settling(images=6):
    value = np.linspace(0.5, 0.6, images).tolist()
    low, high = ([v + d for v in value] for d in (-0.05, 0.05))
    numbers = {NAME: {"value": value, "ci_low": low, "ci_high": high, "tolerance": 0.01, "half_width": 0.05, "settled": False}}
    return {"sizes": list(range(2, 2 + images)), "numbers": numbers, "sentences": ["Too few images to tell it."]}


def test_settling_numbers_are_drawn_with_their_intervals():
    findings = stored(convergence=settling())
    (axes,) = convergence(findings).axes
    drawn = {line.get_label(): line for line in axes.lines}["measured (95 % interval)"]
    np.testing.assert_allclose(drawn.get_ydata(), settling()["numbers"][NAME]["value"])
    np.testing.assert_allclose(drawn.get_xdata(), settling()["sizes"])
    assert axes.get_title(loc="left") == "raw similarity of neighbouring blocks"
    assert convergence(findings, True) is not None
    assert convergence(stored()) is None
    assert certainty(findings).sentences == ("Too few images to tell it.",)


def test_images_at_both_ends_are_named_and_the_collapsed_end_is_said():
    entry = {
        "highest": [{"name": "<b>.png", "value": 0.9}, {"name": "b", "value": 0.8}],
        "lowest": [{"name": "c", "value": 0.1}, {"name": "d", "value": 0.2}],
        "median": 0.5, "images": 9, "collapsed": "high",
    }  # fmt: skip
    findings = stored(extremes={"numbers": {NAME: entry}, "warning": "Ends of 9 values."})
    (table,) = extremes_tables(findings)
    assert table.header == ("", "highest (the collapsed end)", "value", "lowest", "value")
    assert table.rows[0] == ("1", "<b>.png", "0.900", "c", "0.100")
    assert table.notes == ("Median of 9 images: 0.500.",)
    html = render(findings, {})
    assert "&lt;b&gt;.png" in html
    assert "Ends of 9 values." in html


def test_classes_that_differ_are_outlined():
    entry = {
        "value": [0.5, 0.9, None],
        "ci_low": [0.4, 0.8, None],
        "ci_high": [0.6, 1.0, None],
        "p": [0, 0, 0],
        "q": [0.3, 1e-5, None],
    }
    classes = {"names": ["cat", "dog", "one"], "images": [5, 6, 1], "numbers": {NAME: entry}, "test": "Welch"}
    table = classes_table(stored(classes=classes))
    assert table.rows[1] == ("dog", "6", "0.900", "0.800 … 1.000", "< 0.001")
    assert table.rows[2] == ("one", "1", "–", "–", "–")
    assert table.marked == {(1, 2), (1, 4)}


def test_every_rule_of_the_verdict_is_a_row():
    findings = judged(synthetic(4, gallery=False))
    table = rules_table(findings)
    assert len(table.rows) == len(findings.verdict)
    assert {row[5] for row in table.rows} <= {"yes", "no", "undecided", "not applicable"}
    assert all(len(row) == len(table.header) for row in table.rows)
    assert "Every rule behind this answer" in render(findings, {})
    assert rules_table(synthetic(4, gallery=False)) is None


def test_findings_that_say_nothing_of_it_have_no_such_section():
    assert "How sure" not in render(stored(), {})
