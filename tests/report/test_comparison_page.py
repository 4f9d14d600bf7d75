"""Figures and page of a comparison: what is drawn when, that it repeats, and that the page stands alone."""

from __future__ import annotations

import re
from dataclasses import replace

import numpy as np
import pytest
from factories import findings_of, small_vit

from collapse_probe.analysis.compare import compare
from collapse_probe.analysis.comparison.pairing import pair_up
from collapse_probe.data.images import open_data
from collapse_probe.models.loading import resolve, with_fixes
from collapse_probe.report.comparison.curves import colours
from collapse_probe.report.comparison.figures import FIGURES, difference_scale, draw_all
from collapse_probe.report.comparison.page import paired, render, subjects, write_comparison
from collapse_probe.report.comparison.verdict import verdicts
from collapse_probe.report.style import evenly_spaced
from collapse_probe.results.comparison import Comparison
from collapse_probe.results.readings import untrained_summary
from collapse_probe.results.rules import FALSE_DISCOVERY_RATE
from collapse_probe.results.text import number


@pytest.fixture(scope="module")
def mixed():
    """An untrained ViT and the same with Re-attention, on real photographs."""
    options = {"pretrained": False, "img_size": 32, "model_kwargs": {"depth": 3, "num_classes": 4}}
    plain, other = (resolve("timm:vit_tiny_patch16_224", **options) for _ in range(2))
    subjects = {"<plain> & simple": plain, "re-attention": with_fixes(other, ["re-attention:norm=batch"])}
    return compare(subjects, "bundled:photos", limit=6, batch_size=6, null_images=4)


@pytest.fixture(scope="module")
def course():
    """Five checkpoints of something, made by hand."""
    rng = np.random.default_rng(0)
    steps = {f"epoch-{i}": findings_of(*rng.uniform(0.3, 0.6 + 0.08 * i, (2, 6, 3))) for i in range(5)}
    first = steps["epoch-0"]
    pairs = tuple(pair_up(first, f, ("epoch-0", n)) for n, f in steps.items() if f is not first)
    return Comparison(steps, pairs, True, {"command": "made up"})


def test_every_figure_has_its_caption():
    assert all(each.title and each.seen for each in FIGURES.values())


def test_two_models_of_which_one_mixes_fill_all_but_the_course(mixed):
    assert set(draw_all(mixed)) == set(FIGURES) - {"course", "cross-cka", "gram-drift"}


def test_probs_stand_beside_weights_only_where_a_subject_mixes():
    digits = open_data("bundled:digits", limit=4)
    found = compare({"a": small_vit(depth=2), "b": small_vit(1, depth=2)}, digits, null_images=0, batch_size=4)
    assert "probs-and-weights" not in draw_all(found)


def test_a_training_draws_its_course(course):
    figures = draw_all(course)
    assert "course" in figures
    titles = [panel.axes.get_title(loc="left") for panel in figures["course"].panels]
    assert any("raw similarity" in title for title in titles)
    assert any(title.startswith("κ") for title in titles)


def test_drawn_twice_it_is_the_same(mixed):
    one, other = (FIGURES["adjacent"].draw(mixed).content() for _ in range(2))
    assert one == other


def test_all_subjects_share_one_scale(mixed):
    raw, kappa = FIGURES["matrices"].draw(mixed).panels
    for place in (raw, kappa):
        first, second, difference = place.maps
        assert first.scale == second.scale
        np.testing.assert_array_equal(difference.values, second.values - first.values)
        assert (difference.scale.low, difference.scale.high) == (-difference.scale.high, difference.scale.high)
        assert np.nanmax(np.abs(difference.values)) <= difference.scale.high
        assert [*first.beside] == [second.title.rpartition(": ")[0], difference.title.rpartition(": ")[0]]
    panels = FIGURES["probs-and-weights"].draw(mixed).panels
    assert len(panels) >= 2
    assert len({panel.scale for panel in panels}) == 1


@pytest.mark.parametrize(("reach", "limit"), [(0.0, 0.02), (0.019, 0.02), (0.021, 0.05), (0.7, 1.0), (1.9, 2.0)])
def test_the_scale_of_differences_is_one_of_a_few(reach, limit):
    scale = difference_scale([np.array([[0.0, -reach], [np.nan, reach / 2]])])
    assert (scale.low, scale.high) == (-limit, limit)


def test_adjacent_curves_do_not_make_much_of_tiny_differences(mixed):
    raw, kappa = (panel.axes for panel in FIGURES["adjacent"].draw(mixed).panels)
    assert raw.get_ylim()[0] <= 0.0
    assert raw.get_ylim()[1] >= 1.0
    assert kappa.get_ylim()[0] <= -0.25
    assert kappa.get_ylim()[1] >= 1.0


def test_other_depths_have_a_place_of_their_own_and_no_difference():
    rng = np.random.default_rng(0)
    one, other = findings_of(*rng.uniform(0.2, 0.8, (2, 6, 3))), findings_of(*rng.uniform(0.2, 0.8, (2, 6, 5)))
    found = compare({"short": one, "long": other})
    figures = draw_all(found)
    assert [type(panel).__name__ for panel in figures["matrices"].panels] == ["Heatmap"] * 4
    assert not figures["matrices"].views
    assert {"matrices", "adjacent"} <= set(figures)
    assert "cannot be paired" in render(found)


def test_colours_tell_subjects_apart(course, mixed):
    assert len(set(colours(course).values())) == 5
    assert len(set(colours(mixed).values())) == 2
    assert evenly_spaced(list("abcdefghij"), 4) == ["a", "d", "g", "j"]


def test_the_page_stands_alone_and_starts_with_the_answer(mixed, tmp_path):
    page = write_comparison(mixed, tmp_path).read_text(encoding="utf-8")
    assert not re.search(r'(?:src|href|srcset)="(?!data:|#)', page)
    assert page.count("<script") == 1
    assert page.count("<h1>") == 1
    assert (
        page.index("<h1>")
        < page.index('aria-label="the subjects"')
        < page.index("exists without any training")
        < page.index("<h2>Pictures")
    )
    assert "&lt;plain&gt; &amp; simple" in page
    assert "<plain>" not in page
    assert page.count("<figure ") == len(FIGURES) - 3
    drawn = FIGURES.keys() - {"course", "cross-cka", "gram-drift"}
    assert {path.stem for path in (tmp_path / "figures").iterdir()} == drawn
    assert (tmp_path / "figures" / "attention-gallery.jpg").exists()
    assert not re.search(r">\s*(nan|None)\s*<", page)


def test_the_page_of_a_training(course):
    page = render(course)
    assert "From epoch-0 to epoch-4, over 5 checkpoints" in page
    assert "<bdi>epoch-4</bdi> against <bdi>epoch-0</bdi>" in page
    assert "<bdi>epoch-2</bdi> against" not in page
    assert "<h1>5 checkpoints of one training</h1>" in page


def test_the_table_of_subjects_stands_upright_for_few_and_leaves_out_what_nobody_has(mixed, course):
    few, many = subjects(mixed), subjects(course)
    assert few.header == ("subject", "<plain> & simple", "re-attention")
    assert [row[0] for row in few.rows][:3] == ["attention across depth", "κ, 95 % CI", "raw similarity"]
    assert "accuracy" not in [row[0] for row in few.rows]
    assert any("BatchNorm" in note for note in few.notes)
    assert many.header[0] == "subject"
    assert [row[0] for row in many.rows] == list(course.subjects)
    assert "GFLOPs" not in many.header


def test_three_tables_of_a_pair_hold_every_quantity_and_mark_what_differs(mixed):
    pair = mixed.pairs[0]
    tables = {table.title: table for table in paired(pair)}
    along = f"{pair.second} − {pair.first}, by "
    assert list(tables) == ["Means over blocks", "Counts of similar blocks", f"{along}block", f"{along}depth"]
    assert {row[0] for row in tables["Means over blocks"].rows} == set(pair.differences)
    assert tables["Means over blocks"].rows[0][0] == "attention-similarity/kappa"
    blocks = tables[f"{along}block"]
    assert all(len(row) == len(table.header) for table in tables.values() for row in table.rows)
    assert [row[0] for row in blocks.rows] == ["0", "1", "2"]
    column = blocks.header.index("attention-similarity")
    paired_raw = pair.differences["attention-similarity"].paired
    assert [row[column] for row in blocks.rows] == ["–", *(number(value) for value in paired_raw.difference)]
    marked = {row for row, at in blocks.marked if at == column}
    assert marked == {1 + at for at, q in enumerate(paired_raw.q) if q <= FALSE_DISCOVERY_RATE}


def test_a_training_says_that_it_saw_these_images(course):
    seen = {label: replace(each, data={**each.data, "trained_on": 5}) for label, each in course.subjects.items()}
    (verdict,) = verdicts(replace(course, subjects=seen))
    assert verdict.caveats[0].startswith("The model was trained on 5 of these")


def test_every_mark_stands_at_the_difference_that_it_is_of(mixed):
    pair, sure = mixed.pairs[0], {}
    for at, (name, each) in enumerate(mixed.pairs[0].differences.items()):
        q = np.where((np.arange(len(each.places)) + at) % 3 == 0, 0.01, 0.9)
        sure[name] = replace(each, paired=replace(each.paired, q=q))
    pair = replace(pair, differences=sure)
    marks = 0
    for table in paired(pair):
        if ", by " not in table.title:
            continue
        expected = set()
        for column, name in enumerate(table.header[1:], 1):
            each = pair.differences[name]
            places = {str(place) for place, q in zip(each.places, each.paired.q, strict=True) if q <= FALSE_DISCOVERY_RATE}
            expected |= {(row, column) for row, cells in enumerate(table.rows) if cells[0] in places}
        assert table.marked == expected
        marks += len(expected)
    assert marks > 3


def test_the_numbers_of_a_pair_are_those_of_the_comparison(mixed):
    pair = mixed.pairs[0]
    means, counts, *_ = paired(pair)
    assert means.header[1:4] == (pair.first, pair.second, "difference")
    for name, *cells in means.rows:
        overall = pair.differences[name].overall
        assert cells[:3] == [number(values[0]) for values in (overall.first, overall.second, overall.difference)]
    assert len(counts.rows) == len(pair.counts)
    for row, count in zip(counts.rows, pair.counts, strict=True):
        assert row[1:4] == (f"{count.first:g}", f"{count.second:g}", number(count.second - count.first, 0))
    assert any(count.second != count.first for count in pair.counts)


def test_the_numbers_of_a_subject_are_those_of_its_findings(mixed):
    apart = {  # a chance level that is no other number of these findings
        label: replace(each, summary={**each.summary, "other_token_adjacent": 0.123 + at})
        for at, (label, each) in enumerate(mixed.subjects.items())
    }
    table = subjects(replace(mixed, subjects=apart))
    rows = {row[0]: row[1:] for row in table.rows}
    for at, findings in enumerate(apart.values()):
        summary, fresh = findings.summary, untrained_summary(findings)
        assert rows["raw similarity"][at] == number(summary["attention_similarity_adjacent"])
        assert rows["its chance level"][at] == number(summary["other_token_adjacent"])
        assert rows["that of an untrained copy"][at] == number(fresh["attention_similarity_adjacent"])
        counted = (
            f"{summary['similar_blocks']:g} / {summary['similar_blocks_corrected']:g} of {summary['similar_blocks_pairs']:g}"
        )
        assert rows["similar blocks, raw / by κ"][at] == counted
        assert rows["patch diversity after the last block"][at] == number(summary["patch_diversity_last"])


def test_findings_without_anything_to_draw_still_make_a_page():
    bare = replace(findings_of(np.ones((3, 2)), np.ones((3, 2))), metrics={}, images={}, gallery=None)
    found = compare({"one": bare, "other": bare})
    assert draw_all(found) == {}
    assert "nothing that can be drawn" in render(found)
