"""Figures: drawn data is the findings' data, on fixed scales, and files come out the same twice."""

from __future__ import annotations

import functools
import math
import sys
from dataclasses import replace

import matplotlib
import numpy as np
import pytest
from factories import TOKENS, make_gallery, synthetic
from matplotlib.axes import Axes
from matplotlib.collections import LineCollection, PolyCollection
from matplotlib.figure import Figure
from PIL import Image

from collapse_probe.report.findings.curves import adjacent_blocks, entropy, per_block, similar_blocks
from collapse_probe.report.findings.figures import (
    FIGURES,
    attention_variants,
    caption_of,
    draw_all,
    probs_and_weights,
)
from collapse_probe.report.gallery import attention_gallery, overlays, spread_of, times_uniform
from collapse_probe.report.heatmaps import SIGNED, UNDEFINED, UNSIGNED, Heatmap, Switch, scale_of, short, whole_ticks
from collapse_probe.report.html import save
from collapse_probe.report.photographs import Photographs
from collapse_probe.report.sheet import Sheet
from collapse_probe.report.style import ROLES, Chart, curve, printable
from collapse_probe.results.findings import Findings
from collapse_probe.results.readings import adjacent

attention_similarity, feature_similarity = (FIGURES[name].draw for name in ("attention-similarity", "feature-similarity"))

NAMES = {
    "attention-similarity",
    "attention-adjacent",
    "similar-blocks",
    "attention-gallery",
    "attention-variants",
    "attention-entropy",
    "per-block",
    "feature-similarity",
}


@functools.cache
def drawn(blocks: int) -> dict[str, Sheet | Photographs]:
    return draw_all(synthetic(blocks))


def heatmaps(sheet: Sheet | None) -> list[Heatmap]:
    """Every matrix of a figure, those that share a place in the order of their switch."""
    assert sheet is not None
    apart = [panel.maps if isinstance(panel, Switch) else (panel,) for panel in sheet.panels]
    return [panel for maps in apart for panel in maps if isinstance(panel, Heatmap)]


def charts(sheet: Sheet | None) -> list[Axes]:
    assert sheet is not None
    return [panel.axes for panel in sheet.panels if isinstance(panel, Chart)]


def ends(panel: Heatmap) -> tuple[float, float]:
    return panel.scale.low, panel.scale.high


def line(axes: Axes, role: str) -> np.ndarray:
    (found,) = [one for one in axes.lines if one.get_label() == ROLES[role].label]
    return np.asarray(found.get_ydata())


def without(findings: Findings, *names: str) -> Findings:
    return replace(findings, metrics={k: v for k, v in findings.metrics.items() if k not in names})


def with_values(findings: Findings, name: str, values: np.ndarray) -> Findings:
    return replace(findings, metrics={**findings.metrics, name: replace(findings.metrics[name], values=values)})


@pytest.mark.parametrize("blocks", [12, 32])
def test_every_figure_is_drawn_and_no_word_of_a_chart_leaves_its_edges(blocks: int) -> None:
    figures = drawn(blocks)
    assert set(figures) == NAMES
    for name, figure in figures.items():
        assert figure.content(), name
        for axes in charts(figure) if isinstance(figure, Sheet) else ():
            whole, inner = axes.get_tightbbox(), axes.get_figure()
            assert whole is not None
            assert inner is not None
            width, height = inner.bbox.size
            assert whole.x0 >= 0, name
            assert whole.y0 >= 0, name
            assert whole.x1 <= width, name
            assert whole.y1 <= height, name


def test_drawing_leaves_no_trace_in_matplotlib() -> None:
    before = dict(matplotlib.rcParams)
    assert draw_all(synthetic(4))["per-block"].content()
    assert dict(matplotlib.rcParams) == before
    assert "matplotlib.pyplot" not in sys.modules or not sys.modules["matplotlib.pyplot"].get_fignums()


def test_heatmaps_show_the_matrices_on_fixed_scales() -> None:
    findings = synthetic(12)
    reading = findings.metrics["attention-similarity"]
    raw, chance, kappa = heatmaps(attention_similarity(findings))
    np.testing.assert_array_equal(raw.values, reading.values)
    np.testing.assert_array_equal(chance.values, reading.nulls.values["other_token"])
    assert ends(raw) == ends(chance) == (0.0, 1.0)
    assert ends(kappa) == (-1.0, 1.0)
    np.testing.assert_array_equal(kappa.values, reading.nulls.values["kappa"])


def test_the_scale_does_not_follow_the_data() -> None:
    pale = with_values(synthetic(4), "attention-similarity", np.full((4, 4), 0.3))
    raw, _, _ = heatmaps(attention_similarity(pale))
    assert ends(raw) == (0.0, 1.0)


def test_undefined_cells_are_hatched_and_explained() -> None:
    figure = attention_similarity(synthetic(12))
    assert figure is not None
    assert [key.words for key in figure.below] == [UNDEFINED]
    whole = attention_similarity(synthetic(12, nulls=False))
    assert whole is not None
    assert not whole.below


def test_a_negative_value_widens_the_scale_to_minus_one() -> None:
    raw, _, _ = heatmaps(attention_similarity(synthetic(12, signed=True)))
    assert ends(raw) == (-1.0, 1.0)
    assert scale_of(np.array([0.0, 1.0, np.nan])) is UNSIGNED
    assert scale_of(np.array([0.5]), np.array([-0.2])) is SIGNED


def with_tests(findings: Findings, q: np.ndarray) -> Findings:
    """The findings with a test of all pairs, as it comes back from a file: undefined is None."""
    plain = [[None if np.isnan(x) else float(x) for x in row] for row in q]
    below = q[np.tril_indices(len(q), -1)]
    whole = {"q": plain, "test": "paired t", "significant": int((below <= 0.05).sum()), "tested": len(below)}
    other = {**whole, "q": np.zeros((len(q) + 1, len(q) + 1)).tolist()}
    tests = {"attention-similarity": {"all_pairs": whole}, "feature-similarity": {"all_pairs": other}}
    return replace(findings, sureness={"tests": tests})


def pairs_of(blocks: int) -> np.ndarray:
    """Made-up q of all pairs, symmetric, some below and some above the level; on the diagonal undefined."""
    q = np.random.default_rng(blocks).uniform(0, 0.15, (blocks, blocks))
    q = np.maximum(q, q.T)
    np.fill_diagonal(q, np.nan)
    q[1, 0] = q[0, 1] = 0.05
    return q


@pytest.mark.parametrize("blocks", [4, 12, 32])
def test_a_dot_stands_where_a_pair_passes_its_test(blocks: int) -> None:
    q = pairs_of(blocks)
    figure = attention_similarity(with_tests(synthetic(blocks), q))
    raw, _, kappa = heatmaps(figure)
    expected = {(row, column) for row in range(blocks) for column in range(row) if q[row, column] <= 0.05}
    assert 1 <= len(expected) < blocks * (blocks - 1) / 2
    assert kappa.marked is not None
    assert set(map(tuple, np.argwhere(kappa.marked).tolist())) == expected
    assert raw.marked is None
    assert figure is not None
    assert "dot (below the diagonal): more alike than the chance level, q ≤ 0.05" in [key.words for key in figure.below]
    np.testing.assert_array_equal(raw.beside["q"], q)  # the cells of the first say the numbers of all


def test_without_a_test_of_all_pairs_the_figure_stays_as_it_was() -> None:
    def text(findings: Findings, name: str = "attention-similarity") -> bytes:
        return draw_all(findings, names=[name])[name].content()

    before = text(synthetic(12))
    neighbours = replace(synthetic(12), sureness={"tests": {"attention-similarity": {"all_pairs": None}}})
    assert text(neighbours) == before
    assert b"circle" not in text(with_tests(synthetic(12), np.full((12, 12), 0.5)))
    assert b"circle" in text(with_tests(synthetic(12), pairs_of(12)))
    tested = text(with_tests(synthetic(12), pairs_of(12)), "feature-similarity")
    assert tested == text(synthetic(12), "feature-similarity")


def test_the_caption_says_what_a_dot_means_only_where_pairs_were_tested() -> None:
    plain = caption_of("attention-similarity", {}, synthetic(12))
    assert plain == FIGURES["attention-similarity"]
    findings = with_tests(synthetic(12), pairs_of(12))
    found = caption_of("attention-similarity", {}, findings)
    whole = findings.sureness["tests"]["attention-similarity"]["all_pairs"]
    assert found.seen.startswith(plain.seen)
    assert "(q ≤ 0.05: paired t, " in found.seen
    assert found.seen.endswith(f"here {whole['significant']} of 66.")
    assert found.limits.endswith("No dot does not show that κ is 0: more images find more pairs.")
    assert caption_of("feature-similarity", {}, findings) == FIGURES["feature-similarity"]
    bare = with_tests(synthetic(12, nulls=False), pairs_of(12))
    assert caption_of("attention-similarity", {}, bare) == plain


def test_without_kappa_one_panel_remains() -> None:
    assert len(heatmaps(attention_similarity(synthetic(12, nulls=False)))) == 1
    assert len(heatmaps(feature_similarity(synthetic(12)))) == 3


def test_variants_are_drawn_and_centred_ones_around_zero() -> None:
    row, centred, _, _ = heatmaps(attention_variants(synthetic(12)))
    assert ends(row) == (0.0, 1.0)
    assert ends(centred) == (-1.0, 1.0)
    bare = without(synthetic(12), "attention-similarity@row", "attention-similarity@centred")
    assert attention_variants(bare) is None


def test_probs_stand_beside_weights_on_one_scale() -> None:
    findings = synthetic(12, signed=True)
    assert probs_and_weights(findings) is None
    probs = synthetic(12).metrics["attention-similarity"]
    both = replace(findings, metrics={**findings.metrics, "attention-similarity@probs": probs})
    left, right = heatmaps(probs_and_weights(both))
    np.testing.assert_array_equal(left.values, probs.values)
    np.testing.assert_array_equal(right.values, findings.matrix("attention-similarity"))
    assert ends(left) == ends(right) == (-1.0, 1.0)
    assert set(draw_all(both, names=["probs-and-weights"])) == {"probs-and-weights"}


def test_adjacent_curves_are_the_findings() -> None:
    findings = synthetic(12)
    reading = findings.metrics["attention-similarity"]
    top, bottom = charts(adjacent_blocks(findings))
    np.testing.assert_array_equal(line(top, "measured"), adjacent(reading, reading.values))
    for role in ("untrained", "other_token", "other_image"):
        np.testing.assert_array_equal(line(top, role), adjacent(reading, reading.nulls.values[role]))
    assert ROLES["other_head"].label not in [one.get_label() for one in top.lines]
    np.testing.assert_array_equal(line(bottom, "measured"), adjacent(reading, reading.nulls.values["kappa"]))
    assert top.get_xlim() == bottom.get_xlim()
    levels = {one.get_ydata()[0] for one in top.lines if len(set(one.get_ydata())) == 1}
    assert {0.8, 0.9, 0.95} <= levels


def test_the_band_is_the_interval() -> None:
    findings = synthetic(12)
    ci95 = adjacent(findings.metrics["attention-similarity"], findings.metrics["attention-similarity"].ci95)
    first, _ = charts(adjacent_blocks(findings))
    (band,) = [c for c in first.collections if isinstance(c, PolyCollection)]
    corners = band.get_paths()[0].vertices
    for block, (low, high) in enumerate(ci95, start=1):
        heights = corners[corners[:, 0] == block][:, 1]
        assert {heights.min(), heights.max()} == {low, high}


def test_no_band_leaves_its_axes() -> None:
    findings = synthetic(12)
    reading = findings.metrics["attention-similarity"]
    kappa = np.full_like(reading.values, -0.2)
    nulls = replace(
        reading.nulls,
        values={**reading.nulls.values, "kappa": kappa},
        kappa_ci95=np.stack([kappa - 0.9, kappa + 0.9], -1),
    )
    wide = replace(reading, ci95=np.stack([reading.values - 3, reading.values], -1), nulls=nulls)
    for axes in charts(adjacent_blocks(replace(findings, metrics={**findings.metrics, "attention-similarity": wide}))):
        bands = [c for c in axes.collections if isinstance(c, PolyCollection)]
        lowest = min(band.get_paths()[0].vertices[:, 1].min() for band in bands)
        assert axes.get_ylim()[0] < lowest < 0


def test_curves_without_nulls_and_of_one_pair_or_none() -> None:
    assert len(charts(adjacent_blocks(synthetic(12, nulls=False)))) == 1
    assert adjacent_blocks(synthetic(2)) is not None
    assert adjacent_blocks(with_values(synthetic(2), "attention-similarity", np.ones((1, 1)))) is None


def test_per_block_curves_carry_their_references() -> None:
    findings = synthetic(12)
    heads, images, diversity = charts(per_block(findings))
    np.testing.assert_array_equal(line(heads, "untrained"), findings.metrics["head-similarity"].nulls.values["untrained"])
    np.testing.assert_array_equal(line(images, "measured"), findings.matrix("image-similarity"))
    np.testing.assert_array_equal(line(diversity, "measured"), findings.matrix("patch-diversity"))
    assert len(charts(per_block(without(findings, "image-similarity")))) == 2


def test_entropy_is_a_share_of_log_n() -> None:
    findings = synthetic(12)
    figure = entropy(findings)
    assert figure is not None
    (heat,) = heatmaps(figure)
    share = findings.matrix("attention-entropy") / math.log(TOKENS)
    np.testing.assert_allclose(heat.values, share.T)
    assert ends(heat) == (0.0, 1.0)
    (bottom,) = charts(figure)
    np.testing.assert_allclose(line(bottom, "measured"), share.mean(1))
    np.testing.assert_allclose(line(bottom, "untrained"), 0.97)


def test_entropy_takes_one_token_count_or_one_for_each_block() -> None:
    findings = synthetic(4)
    reading = findings.metrics["attention-entropy"]
    for tokens in (TOKENS, [TOKENS, 1, 20, 30]):
        changed = replace(reading, details={"tokens": tokens})
        figure = entropy(replace(findings, metrics={"attention-entropy": changed}))
        assert figure is not None
        (heat,) = heatmaps(figure)
        assert np.isnan(heat.values).any() == isinstance(tokens, list)  # log 1 is no unit


def test_counts_stand_at_their_values_with_their_intervals() -> None:
    findings = synthetic(12)
    (axes,) = charts(similar_blocks(findings))
    dots = [one for one in axes.lines if one.get_label() == ROLES["measured"].label]
    expected = [*findings.matrix("similar-blocks"), 1.0]
    assert [float(dot.get_xdata()[0]) for dot in dots] == expected
    bars = [list(one.get_xdata()) for one in axes.lines if len(one.get_xdata()) == 2]
    assert bars == [*map(list, findings.metrics["similar-blocks"].ci95), [0.0, 2.0]]


def test_gallery_puts_all_maps_on_one_scale() -> None:
    findings = synthetic(12)
    gallery = findings.gallery
    assert gallery is not None
    maps = times_uniform(findings, gallery)
    np.testing.assert_allclose(maps.sum((2, 3)), TOKENS)
    spread = spread_of(maps)
    places = spread.place(np.array([1 / 64, 1 / 8, 1.0, 2.0, 8.0, 100.0]))
    np.testing.assert_allclose(places, [-1, -1, 0, 1 / 3, 1, 1], atol=1e-12)
    signed = spread_of(np.array([-3.0, 0.0, 2.0]))
    np.testing.assert_allclose(signed.place(np.array([-3.0, 0.0, 1.5])), [-1, 0, 0.5])


def test_uniform_attention_leaves_the_picture_grey() -> None:
    picture = make_gallery(1).pictures[0]
    plain, hot, cold = (each.astype(int) for each in overlays(picture, [np.full((7, 7), at) for at in (0.0, 1.0, -1.0)]))
    assert (plain.max(-1) - plain.min(-1)).max() <= 2
    assert (hot[..., 0] > hot[..., 2]).all()
    assert (cold[..., 2] > cold[..., 0]).all()


@pytest.mark.parametrize("blocks", [2, 3, 12, 24, 32])
def test_no_tile_of_the_gallery_hides_another_and_each_is_the_map_of_its_block(blocks: int) -> None:
    findings = synthetic(blocks)
    player = attention_gallery(findings)
    assert player is not None
    gallery = player.album()
    height, width = gallery.picture.shape[:2]
    seen = np.zeros((height, width), dtype=int)
    for strip in gallery.strips:
        assert [window.words for window in strip.windows[1:]] == [f"block {block}" for block in range(blocks)]
        for window in (*strip.windows, *gallery.bars):
            assert window.x >= 0
            assert window.y >= 0
            assert window.x + window.width <= width
            assert window.y + window.height <= height
        for window in strip.windows:
            seen[window.y : window.y + window.height, window.x : window.x + window.width] += 1
    assert seen.max() == 1
    assert [strip.heading for strip in gallery.strips] == list(findings.gallery.names)
    first = gallery.strips[0].windows[1]
    maps = spread_of(times_uniform(findings, findings.gallery)).place(times_uniform(findings, findings.gallery))
    shown = gallery.picture[first.y : first.y + first.height, first.x : first.x + first.width]
    small = np.asarray(Image.fromarray(findings.gallery.pictures[0]).resize((first.width, first.height), 1))
    expected = overlays(small, [maps[0, 0]])[0]
    np.testing.assert_array_equal(
        shown[first.height // 2 :, first.width // 2 :], expected[first.height // 2 :, first.width // 2 :]
    )


def test_gallery_shows_names_that_are_markup_or_have_no_glyph() -> None:
    assert attention_gallery(synthetic(3, images=("$x^{$.png", "猫\n<script>.png"))) is not None
    assert printable("猫\n.png") == "□□.png"
    assert len(printable("x" * 300)) <= 40
    assert attention_gallery(synthetic(3, gallery=False)) is None


def test_undefined_values_everywhere_still_draw() -> None:
    findings = synthetic(4)
    empty = np.full((4, 4), np.nan)
    figures = draw_all(with_values(findings, "attention-similarity", empty))
    assert np.isnan(heatmaps(figures["attention-similarity"])[0].values).all()
    assert figures["attention-similarity"].content()


def test_a_metric_that_does_not_apply_is_not_drawn() -> None:
    findings = synthetic(4)
    gone = replace(findings.metrics["attention-entropy"], values=None, not_applicable="signed map")
    changed = replace(findings, metrics={**findings.metrics, "attention-entropy": gone})
    assert "attention-entropy" not in draw_all(changed)
    assert draw_all(replace(findings, metrics={}, gallery=None)) == {}


def test_saved_files_are_the_same_byte_for_byte(tmp_path) -> None:
    findings = synthetic(2)
    save(draw_all(findings), tmp_path)
    inside = tmp_path / "figures"
    assert {path.stem for path in inside.iterdir()} == NAMES
    assert {path.name for path in inside.iterdir() if path.suffix != ".svg"} == {"attention-gallery.jpg"}
    for name, figure in draw_all(findings).items():
        written = (inside / f"{name}.{figure.suffix}").read_bytes()
        assert figure.content() == written, name
        assert b"date>" not in written


@pytest.mark.parametrize(
    ("value", "text"),
    [(0.943, ".94"), (-0.05, "−.05"), (0.9999, "1"), (0.999, ".99"), (-0.001, "0"), (-1.0, "−1")],
)
def test_numbers_in_cells_are_short(value: float, text: str) -> None:
    assert short(value) == text


def test_ticks_thin_out() -> None:
    assert whole_ticks(12) == list(range(12))
    assert whole_ticks(32) == list(range(0, 32, 2))
    assert whole_ticks(33, 8) == [0, 8, 16, 24, 32]


def test_a_number_between_two_gaps_is_marked() -> None:
    axes = Figure().subplots()
    values = np.array([np.nan, 0.4, np.nan, 0.5, 0.6])
    curve(axes, np.arange(5.0), values, ROLES["other_token"], np.stack([values - 0.1, values + 0.1], -1))
    marks = [line for line in axes.lines if line.get_marker() == "_"]
    assert [mark.get_xdata().tolist() for mark in marks] == [[1.0]]
    (ends,) = [part for part in axes.collections if isinstance(part, LineCollection)]
    np.testing.assert_allclose(ends.get_segments()[0], [[1.0, 0.3], [1.0, 0.5]])
