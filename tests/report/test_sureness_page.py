"""How sure the findings are, on the page: tests, settling numbers, images at both ends, classes, rules."""

from __future__ import annotations

import base64
import io
from dataclasses import replace

import numpy as np
from factories import synthetic
from PIL import Image

from collapse_probe.report.findings.curves import convergence
from collapse_probe.report.findings.page import both_ends, render
from collapse_probe.report.findings.tables import certainty, classes_table, extremes_tables, pair_tests_table, rules_table
from collapse_probe.results.findings import Findings
from collapse_probe.results.verdict import with_verdict

NAME = "attention_similarity_adjacent"


def stored(**parts) -> Findings:
    return replace(synthetic(3, gallery=False), sureness=parts)


def outcome_of(q, enough=True):
    return {
        "q": q, "level": 0.05, "significant": sum(x <= 0.05 for x in q), "tested": len(q),
        "untrained": {"significant": [1, 2], "tested": 2, "images": 64},
        "images": 12, "enough_images": enough, "test": "paired t", "assumption": "of one set of weights",
        "sentence": "Too few images to tell.", "all_pairs": {"significant": 2, "tested": 3, "test": "paired t"},
    }  # fmt: skip


def test_the_tests_say_how_many_pairs_are_beyond_their_null():
    table = pair_tests_table(
        stored(tests={"attention-similarity": outcome_of([0.0004, 0.2]), "other": outcome_of([0.01, 0.04])})
    )
    first, second = (dict(zip(table.header, row, strict=True)) for row in table.rows)
    assert first["pairs above chance level"] == "1 of 2"
    assert first["largest q among them"] == "< 0.001"
    assert second["largest q among them"] == "0.040"
    assert first["all pairs"] == "2 of 3 (paired t)"
    assert first["untrained copy"] == "1, 2 of 2 (64 images)"
    assert table.notes == ("of one set of weights",)


def test_too_few_images_are_no_negative_result():
    table = pair_tests_table(stored(tests={"attention-similarity": outcome_of([0.5, 0.5], enough=False)}))
    assert table.rows[0][1] == "too few images to tell"
    assert table.notes[0] == "attention-similarity: Too few images to tell."


def settling(images=6):
    value = np.linspace(0.5, 0.6, images).tolist()
    low, high = ([v + d for v in value] for d in (-0.05, 0.05))
    numbers = {NAME: {"value": value, "ci_low": low, "ci_high": high, "tolerance": 0.01, "half_width": 0.05, "settled": False}}
    return {
        "sizes": list(range(2, 2 + images)),
        "numbers": numbers,
        "sentences": ["Too few images to tell it."],
        "known": ["It is known."],
    }


def test_settling_numbers_are_drawn_with_their_intervals():
    findings = stored(convergence=settling())
    (axes,) = (panel.axes for panel in convergence(findings).panels)
    drawn = {line.get_label(): line for line in axes.lines}["measured (95 % CI)"]
    np.testing.assert_allclose(drawn.get_ydata(), settling()["numbers"][NAME]["value"])
    np.testing.assert_allclose(drawn.get_xdata(), settling()["sizes"])
    assert axes.get_title(loc="left") == "raw similarity of neighbouring blocks"
    assert convergence(stored()) is None
    assert certainty(findings)["sentences"] == ["It is known.", "Too few images to tell it."]


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


def with_thumbnails(findings, names):
    """The findings with a small picture of one colour for each of `names`."""
    pictures = {name: np.full((12, 20, 3), 40 * at, dtype=np.uint8) for at, name in enumerate(names)}
    return replace(findings, thumbnails=pictures)


def two_ends(collapsed="high", highest=("a/<b>.png", "b"), lowest=("c", "d")):
    listed = {
        end: [{"name": name, "value": 0.5 + at / 10} for at, name in enumerate(names)]
        for end, names in (("highest", highest), ("lowest", lowest))
    }
    return {**listed, "median": 0.25, "images": 9, "collapsed": collapsed}


def test_images_at_both_ends_are_shown_with_name_and_value():
    numbers = {NAME: two_ends(highest=("other",)), "kappa_adjacent": two_ends()}
    findings = with_thumbnails(stored(extremes={"numbers": numbers, "warning": "Ends."}), ["a/<b>.png", "b", "c", "d"])
    found = both_ends(findings)
    assert (found["words"], found["median"], found["images"]) == ("Kappa of neighbouring blocks", "0.250", 9)
    assert [end["title"] for end in found["ends"]] == ["Highest (the collapsed end)", "Lowest"]
    assert [[(i["name"], i["value"]) for i in end["images"]] for end in found["ends"]] == [
        [("a/<b>.png", "0.500"), ("b", "0.600")],
        [("c", "0.500"), ("d", "0.600")],
    ]
    for at, image in enumerate(found["ends"][0]["images"] + found["ends"][1]["images"]):
        drawn = Image.open(io.BytesIO(base64.b64decode(image["source"].removeprefix("data:image/jpeg;base64,"))))
        assert drawn.size == (image["width"], image["height"]) == (20, 12)
        assert abs(np.asarray(drawn).astype(int) - 40 * at).max() <= 2
    html = render(findings, {})
    assert html.count('<img src="data:image/jpeg') == 4
    assert html.index('id="ends"') < html.index("Images at the two ends of every number, by name")
    assert "a/<wbr>&lt;b&gt;.png" in html
    assert html.count("Ends.") == 1


def test_an_end_whose_picture_is_missing_leaves_it_out_and_none_leaves_the_names():
    numbers = {"patch_diversity_last": two_ends("low")}
    findings = with_thumbnails(stored(extremes={"numbers": numbers, "warning": ""}), ["b", "c"])
    highest, lowest = both_ends(findings)["ends"]
    assert tuple([i["name"] for i in end["images"]] for end in (highest, lowest)) == (["b"], ["c"])
    assert lowest["title"] == "Lowest (the collapsed end)"
    bare = stored(extremes={"numbers": numbers, "warning": "Ends."})
    assert both_ends(bare) is None
    assert 'id="ends"' not in render(bare, {})
    assert both_ends(with_thumbnails(stored(), ["b"])) is None


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
    assert table.rows[1] == ("dog", "6", "0.900", "[0.800, 1.000]", "< 0.001")
    assert table.rows[2] == ("one", "1", "–", "–", "–")
    assert table.marked == {(1, 2), (1, 4)}


def test_every_rule_of_the_verdict_is_a_row():
    findings = with_verdict(synthetic(4, gallery=False))
    table = rules_table(findings)
    assert len(table.rows) == len(findings.verdict)
    assert {row[5] for row in table.rows} <= {"yes", "no", "undecided", "not applicable"}
    assert all(len(row) == len(table.header) for row in table.rows)
    html = render(findings, {})
    assert html.count("what is asked") == 1
    assert html.index('href="#rules"') < html.index("Block by block") < html.index('id="rules"') < html.index("what is asked")
    assert rules_table(synthetic(4, gallery=False)) is None


def test_findings_that_say_nothing_of_it_have_no_such_section():
    assert "How sure" not in render(stored(), {})
