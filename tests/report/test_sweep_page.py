"""What a sweep says and shows: sentences that turn with the numbers, intervals over seeds, others' figures as theirs."""

from __future__ import annotations

import html
import math

import numpy as np
import pytest
from scipy import stats

from collapse_probe.report.sweep.figures import PUBLISHED_COLOUR, draw_all, drawings
from collapse_probe.report.sweep.page import by_cell, means, render, trouble, write_sweep
from collapse_probe.report.sweep.verdict import (
    BEYOND,
    EXPLAINED,
    GONE,
    NEITHER,
    PARTLY,
    against_twin,
    caveats,
    headline,
    verdicts,
)
from collapse_probe.results.sweep import (
    FAILED,
    FALLS,
    FINISHED,
    FLAT,
    ONE_SEED,
    PUBLISHED,
    RISES,
    UNCLEAR,
    CellResult,
    Sweep,
    estimate,
    label_of,
    trend,
)

RECIPE = {"name": "toy", "architecture": {"vit": {"heads": 4, "init_std": 0.07}, "embedding_std": None}}


def outcome(values, seed=0, raw=0.0, kappa=0.1, accuracy=0.9, fresh=0.0, **more):
    """A finished cell with these numbers."""
    name = ",".join(f"{key}={value}" for key, value in {**values, "seed": seed}.items())
    numbers = {
        "similar_blocks": raw,
        "similar_blocks_corrected": 0.0,
        "kappa_adjacent": kappa,
        "attention_similarity_adjacent": 0.9,
        "pairs": float(values.get("depth", 8)) - 1,
    }
    numbers |= {"similar_blocks_probs": 3.0} if values.get("fix") else {}
    twin = {**numbers, "similar_blocks": fresh, "kappa_adjacent": 0.0}
    facts = {"accuracy": accuracy, "loss": 0.1, "parameters": 10, "train_seconds": 2.0, "measure_seconds": 1.0}
    held = {**facts, "status": FINISHED, "numbers": numbers, "untrained": twin, "names_sha256": "same", **more}
    return CellResult(name=name, values=values, seed=seed, **held)


def sweep_of(cells, varied, notes=()):
    seeds = sorted({cell.seed for cell in cells})
    facts = {"changes": {}, "data": {"data": "toys"}, "run": {"device": "cpu"}}
    return Sweep(recipe=RECIPE, varied=varied, seeds=seeds, cells=tuple(cells), notes=notes, **facts)


def deep(raw, seeds=2, fixes=(None, "re-attention"), **numbers):
    """A sweep over depth 8, 16, 24 whose raw counts are `raw` in every curve, a seventh of the pairs more with each seed."""
    cells = [
        outcome({"depth": depth, "fix": fix}, seed, raw=count + seed * (depth - 1) / 7, **numbers)
        for seed in range(seeds)
        for depth, count in zip((8, 16, 24), raw, strict=True)
        for fix in fixes
    ]
    return sweep_of(cells, {"depth": [8, 16, 24], "fix": list(fixes)})


def points_of(values, key="accuracy"):
    """Cells with these values: [place][seed]."""
    return [(x, [outcome({}, seed, **{key: v}) for seed, v in enumerate(row)]) for x, row in values.items()]


def test_the_interval_over_seeds_is_the_t_interval():
    values = [0.2, 0.5, 0.3]
    held = estimate(values)
    low, high = stats.t.interval(0.95, 2, loc=np.mean(values), scale=stats.sem(values))
    assert held.mean == pytest.approx(np.mean(values))
    assert held.ci95 == pytest.approx((low, high))
    assert held.seeds == 3


@pytest.mark.parametrize(("values", "mean"), [([0.4], 0.4), ([0.4, math.nan], 0.4), ([], math.nan)])
def test_fewer_than_two_seeds_have_no_interval(values, mean):
    held = estimate(values)
    assert held.mean == pytest.approx(mean, nan_ok=True)
    assert held.ci95 is None


@pytest.mark.parametrize(
    ("values", "case"),
    [
        ({8: [0.1], 16: [0.2], 24: [0.2]}, ONE_SEED),
        ({8: [0.3], 16: [0.2], 24: [0.1]}, ONE_SEED),
        ({8: [0.1], 16: [0.3], 24: [0.2]}, ONE_SEED),
        ({8: [0.2], 16: [0.2], 24: [0.2]}, FLAT),
        ({24: [0.2, 0.21], 8: [0.1, 0.11], 16: [0.15, 0.16]}, RISES),
        ({8: [0.1, 0.11, 0.1], 16: [0.2, 0.21, 0.2], 24: [0.3, 0.31, 0.31]}, RISES),
        ({8: [0.3, 0.3, 0.3], 16: [0.2, 0.2, 0.21], 24: [0.1, 0.11, 0.1]}, FALLS),
        ({8: [0.1, 0.9], 16: [0.5, 0.5], 24: [0.9, 0.2]}, UNCLEAR),
        ({8: [0.2, 0.3], 16: [0.2, 0.3], 24: [0.2, 0.3]}, FLAT),
    ],
)
def test_a_trend_has_its_case(values, case):
    assert trend(points_of(values), "accuracy").case == case


def test_the_slope_of_a_trend_is_the_mean_of_the_slopes_of_the_seeds():
    found = trend(points_of({0: [0.0, 1.0], 2: [4.0, 2.0]}), "accuracy")
    assert found.slope.mean == pytest.approx((2.0 + 0.5) / 2)
    assert found.slope.seeds == 2


def test_a_number_known_in_one_place_has_no_trend():
    assert trend(points_of({8: [0.1], 16: [math.nan]}), "accuracy") is None
    assert trend([(8, [outcome({}, 0)]), (16, [outcome({}, 1)])], "accuracy") is None


@pytest.mark.parametrize(
    ("pairs", "case"),
    [
        ([(5, 3), (9, 8)], BEYOND),
        ([(5, 5), (9, 15)], EXPLAINED),
        ([(5, 3), (9, 15)], PARTLY),
        ([(0, 0), (0, 0)], NEITHER),
        ([(0, 0), (0, 4)], GONE),
    ],
)
def test_the_untrained_twin_has_its_case(pairs, case):
    points = [
        (depth, [outcome({"depth": depth}, raw=raw, fresh=fresh)]) for depth, (raw, fresh) in zip((8, 16), pairs, strict=True)
    ]
    assert against_twin(points) == case


def test_the_sentences_turn_with_the_numbers():
    up, down = deep((2.0, 9.0, 20.0), fresh=1.0), deep((20.0, 9.0, 2.0), fresh=30.0)
    assert "the share of adjacent blocks that count as similar by raw similarity rises in both curves" in headline(up)
    assert "the share of adjacent blocks that count as similar by raw similarity falls in both curves" in headline(down)
    first = verdicts(up)[0]
    assert first.label == "no fix"
    assert "rises: 0.357 at depth 8, 0.941 at depth 24 (2.5 of 7 and 21.6 of 23 pairs)" in first.sentences[0]
    assert "over 2 seeds" in first.sentences[0]
    assert "count fewer everywhere (1, 1, 1)" in first.sentences[1]
    assert "no collapse that training brought" in verdicts(down)[0].sentences[1]


def test_curves_that_differ_are_named_or_counted():
    def told(fixes):
        cells = [
            outcome({"depth": d, "fix": fix}, seed, raw=(d - 7 + 0.1 * seed) * (at == 0))
            for d in (8, 16)
            for at, fix in enumerate(fixes)
            for seed in range(2)
        ]
        return headline(sweep_of(cells, {"depth": [8, 16], "fix": fixes}))

    assert "raw similarity rises (no fix), stays the same (a)" in told([None, "a"])
    assert "raw similarity rises in 1 of 4 curves, stays the same in 3 of 4 curves" in told([None, "a", "b", "c"])


def test_a_count_that_grows_with_the_depth_alone_is_no_trend():
    same_share = [outcome({"depth": d}, seed, raw=0.5 * (d - 1)) for d in (9, 17, 25) for seed in range(2)]
    text = headline(sweep_of(same_share, {"depth": [9, 17, 25]}))
    assert "similar by raw similarity stays the same" in text
    fewer = [outcome({"depth": d}, seed, raw=2 + 0.05 * (d + seed)) for d in (9, 17, 25) for seed in range(2)]
    assert "similar by raw similarity falls" in headline(sweep_of(fewer, {"depth": [9, 17, 25]}))


def test_one_seed_is_told_as_one_seed():
    alone = deep((2.0, 9.0, 20.0), seeds=1)
    assert "one seed each, which ranks nothing" in headline(alone)
    assert "one seed each, no interval" in verdicts(alone)[0].sentences[0]
    assert any(text.startswith("One seed each") for text in caveats(alone))
    assert not any(word in text for text in [headline(alone), *verdicts(alone)[0].sentences] for word in ("rises", "falls"))
    assert not any("95 %" in sentence for answer in verdicts(alone) for sentence in answer.sentences)
    assert "One seed: no intervals." in drawings(alone)["similar-blocks-by-depth"].seen


def test_published_counts_are_shown_as_what_they_are_and_only_over_depth():
    over_depth, over_width = deep((2.0, 9.0, 20.0)), sweep_of([outcome({"width": w}) for w in (16, 32)], {"width": [16, 32]})
    assert any("no target" in text for text in caveats(over_depth))
    assert "ImageNet" in drawings(over_depth)["similar-blocks-by-depth"].seen
    for kind in ("kappa", "accuracy"):
        assert "ImageNet" not in drawings(over_depth)[f"{kind}-by-depth"].seen
    raw = draw_all(over_depth)["similar-blocks-by-depth"].panels[0].axes
    stars = [line for line in raw.get_lines() if line.get_color() == PUBLISHED_COLOUR]
    assert {tuple(line.get_ydata()) for line in stars} == {(5, 11, 15), (0, 0, 0)}
    assert all(tuple(line.get_xdata()) == (16, 24, 32) for line in stars)
    assert all("published" in line.get_label() for line in stars)
    for figures in (draw_all(over_width), {k: v for k, v in draw_all(over_depth).items() if not k.startswith("similar")}):
        lines = [line for figure in figures.values() for panel in figure.panels for line in panel.axes.get_lines()]
        assert lines
        assert not any(line.get_color() == PUBLISHED_COLOUR for line in lines)
    page = render(over_width)
    assert "DeepViT" not in page
    assert set(PUBLISHED["similar_blocks"]) == {"ViT", "DeepViT"}


def test_the_width_says_what_did_not_change_with_it():
    over_width = sweep_of([outcome({"width": w}) for w in (16, 32)], {"width": [16, 32]})
    assert any("heads 4, init_std 0.07 stayed" in text for text in caveats(over_width))
    assert not any("stayed" in text for text in caveats(deep((1.0, 2.0, 3.0))))


def test_the_curves_hold_means_and_intervals_of_the_cells():
    found = deep((2.0, 9.0, 20.0))
    raw = draw_all(found)["similar-blocks-by-depth"].panels[0].axes
    container = next(c for c in raw.containers if c.get_label() == "no fix")
    line, _, bars = container
    assert line.get_ydata() == pytest.approx([2.5, 9 + 15 / 14, 20 + 23 / 14])
    low, high = estimate([2.0, 3.0]).ci95
    assert [y for _, y in bars[0].get_segments()[0]] == pytest.approx([low, high])
    labels = {c.get_label() for c in raw.containers}
    assert {"no fix", "no fix, untrained", "re-attention", "re-attention, untrained", "re-attention, its softmax"} == labels


def test_every_varied_number_has_its_figures_and_words_alone_have_theirs():
    both = sweep_of(
        [outcome({"depth": d, "width": w, "lr": lr}) for d in (8, 16) for w in (16, 32) for lr in (1e-4, 1e-1, 1e-2)],
        {"lr": [1e-4, 1e-1, 1e-2], "width": [16, 32], "depth": [8, 16]},
    )
    assert both.axes == ("depth", "width", "lr")
    assert len(draw_all(both)) == 9
    words = sweep_of([outcome({"fix": fix}) for fix in (None, "layer-scale")], {"fix": [None, "layer-scale"]})
    axes = draw_all(words)["accuracy-by-fix"].panels[0].axes
    assert [label.get_text() for label in axes.get_xticklabels()] == ["none", "layer-scale"]
    assert [answer.label for answer in verdicts(words)] == ["no fix", "layer-scale"]
    assert "no number was varied" in headline(words)


def failing():
    bad = CellResult(name="depth=24,seed=0", values={"depth": 24}, seed=0, status=FAILED, reason="<b>no & more</b>")
    return sweep_of([outcome({"depth": 8}), outcome({"depth": 16}), bad], {"depth": [8, 16, 24]}, notes=("A note.",))


def test_failed_cells_are_told_and_drawn_nowhere():
    found = failing()
    page = render(found)
    assert trouble(found) == "Of 3 cells 1 failed."
    assert html.escape("failed: <b>no & more</b>") in page
    assert "<b>no &" not in page
    assert any("1 of 3 cells failed" in text for text in caveats(found))
    assert "A note." in page
    assert [place for place, _ in found.series("depth")[""]] == [8, 16]


def test_nothing_finished_is_told_without_figures():
    waiting = sweep_of([CellResult(name="depth=8,seed=0", values={"depth": 8}, seed=0)], {"depth": [8, 16]})
    assert draw_all(waiting) == {}
    page = render(waiting)
    assert "None of the 1 cells is finished." in page
    assert "1 not run" in page


def test_cells_on_other_images_are_told():
    mixed = sweep_of([outcome({"depth": 8}), outcome({"depth": 16}, names_sha256="other")], {"depth": [8, 16]})
    assert any("not all trained and validated on the same images" in text for text in caveats(mixed))
    assert not any("same images: their" in text for text in caveats(deep((1.0, 2.0, 3.0))))


def test_the_tables_hold_every_cell_and_the_means_of_its_seeds():
    found = deep((2.0, 9.0, 20.0))
    table = by_cell(found)
    assert [row[0] for row in table.rows] == [cell.name for cell in found.cells]
    assert all(len(row) == len(table.header) for row in table.rows)
    averaged = means(found)
    assert [row[1] for row in averaged.rows] == ["2"] * 6
    assert averaged.rows[0][averaged.header.index("similar blocks")].startswith("2.5 (")


def test_the_page_stands_alone_and_a_folder_holds_its_figures(tmp_path):
    page = write_sweep(deep((2.0, 9.0, 20.0)), tmp_path).read_text(encoding="utf-8")
    names = {f"{kind}-by-depth" for kind in ("similar-blocks", "kappa", "accuracy")}
    assert {p.name for p in (tmp_path / "figures").iterdir()} == {f"{name}.svg" for name in names}
    assert "http://" not in page.replace("http://www.w3.org", "")
    assert "https://" not in page
    for answer in verdicts(deep((2.0, 9.0, 20.0))):
        assert html.escape(answer.sentences[0], quote=False) in page


def test_labels_read_as_a_reader_would_say_them():
    assert label_of({"fix": "re-attention", "tied": True, "ema": None}) == "re-attention, tied True, no ema"
