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
from matplotlib.collections import LineCollection, PolyCollection, QuadMesh
from matplotlib.figure import Figure

from collapse_probe.report.findings.curves import adjacent_blocks, entropy, per_block, similar_blocks
from collapse_probe.report.findings.figures import (
    FIGURES,
    attention_variants,
    caption_of,
    draw_all,
    probs_and_weights,
)
from collapse_probe.report.gallery import Layout, attention_gallery, overlay, spread_of, times_uniform
from collapse_probe.report.heatmaps import SIGNED, UNSIGNED, scale_of, short
from collapse_probe.report.style import ROLES, curve, png, printable, save, svg, whole_ticks
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
def drawn(blocks: int, narrow: bool) -> dict[str, Figure]:
    return draw_all(synthetic(blocks), narrow=narrow)


def heatmaps(figure: Figure | None) -> list[Axes]:
    assert figure is not None
    return [axes for axes in figure.axes if axes.collections and isinstance(axes.collections[0], QuadMesh)]


def cells(axes: Axes) -> np.ma.MaskedArray:
    mesh = axes.collections[0]
    return np.ma.asarray(mesh.get_array())


def line(axes: Axes, role: str) -> np.ndarray:
    (found,) = [one for one in axes.lines if one.get_label() == ROLES[role].label]
    return np.asarray(found.get_ydata())


def without(findings: Findings, *names: str) -> Findings:
    return replace(findings, metrics={k: v for k, v in findings.metrics.items() if k not in names})


def with_values(findings: Findings, name: str, values: np.ndarray) -> Findings:
    return replace(findings, metrics={**findings.metrics, name: replace(findings.metrics[name], values=values)})


@pytest.mark.parametrize(("blocks", "narrow"), [(12, False), (12, True), (32, False), (32, True)])
def test_every_figure_is_drawn_and_nothing_leaves_its_edges(blocks: int, narrow: bool) -> None:
    figures = drawn(blocks, narrow)
    assert set(figures) == NAMES
    for name, figure in figures.items():
        if name == "attention-gallery":
            continue
        width, height = figure.get_size_inches() * figure.dpi
        box = figure.get_tightbbox().transformed(figure.dpi_scale_trans)
        assert box.x0 >= -2, name
        assert box.y0 >= -2, name
        assert box.x1 <= width + 2, name
        assert box.y1 <= height + 2, name


def test_drawing_leaves_no_trace_in_matplotlib() -> None:
    before = dict(matplotlib.rcParams)
    figures = draw_all(synthetic(4))
    assert svg(figures["per-block"])
    assert png(figures["per-block"])
    assert dict(matplotlib.rcParams) == before
    assert not sys.modules["matplotlib.pyplot"].get_fignums()


def test_heatmaps_show_the_matrices_on_fixed_scales() -> None:
    findings = synthetic(12)
    reading = findings.metrics["attention-similarity"]
    raw, kappa = heatmaps(attention_similarity(findings))
    np.testing.assert_array_equal(cells(raw), reading.values)
    assert raw.collections[0].get_clim() == (0.0, 1.0)
    assert kappa.collections[0].get_clim() == (-1.0, 1.0)
    expected = reading.nulls.values["kappa"]
    np.testing.assert_array_equal(cells(kappa).mask, np.isnan(expected))
    np.testing.assert_array_equal(cells(kappa).compressed(), expected[np.isfinite(expected)])


def test_the_scale_does_not_follow_the_data() -> None:
    pale = with_values(synthetic(4), "attention-similarity", np.full((4, 4), 0.3))
    raw, _ = heatmaps(attention_similarity(pale))
    assert raw.collections[0].get_clim() == (0.0, 1.0)


def test_undefined_cells_are_hatched_and_explained() -> None:
    figure = attention_similarity(synthetic(12))
    assert figure is not None
    _, kappa = heatmaps(figure)
    assert kappa.patch.get_hatch()
    (legend,) = figure.legends
    assert "undefined" in legend.get_texts()[0].get_text()
    whole = attention_similarity(synthetic(12, nulls=False))
    assert whole is not None
    assert not whole.legends


def test_a_negative_value_widens_the_scale_to_minus_one() -> None:
    raw, _ = heatmaps(attention_similarity(synthetic(12, signed=True)))
    assert raw.collections[0].get_clim() == (-1.0, 1.0)
    assert scale_of(np.array([0.0, 1.0, np.nan])) is UNSIGNED
    assert scale_of(np.array([0.5]), np.array([-0.2])) is SIGNED


def test_numbers_stand_in_cells_where_they_fit() -> None:
    raw, _ = heatmaps(attention_similarity(synthetic(12)))
    assert len(raw.texts) == 144
    assert raw.texts[1].get_text() == short(synthetic(12).matrix("attention-similarity")[0, 1])
    large, _ = heatmaps(attention_similarity(synthetic(32)))
    assert not large.texts


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


def dots(axes: Axes) -> set[tuple[int, int]]:
    """The cells (row, column) that carry a dot; each dot lies inside of its cell."""
    return {(int(y), int(x)) for one in axes.lines for x, y in one.get_xydata()}


@pytest.mark.parametrize("narrow", [False, True])
@pytest.mark.parametrize("blocks", [4, 12, 32])
def test_a_dot_stands_where_a_pair_passes_its_test(blocks: int, narrow: bool) -> None:
    q = pairs_of(blocks)
    figure = attention_similarity(with_tests(synthetic(blocks), q), narrow)
    raw, kappa = heatmaps(figure)
    expected = {(row, column) for row in range(blocks) for column in range(row) if q[row, column] <= 0.05}
    assert 1 <= len(expected) < blocks * (blocks - 1) / 2
    assert dots(kappa) == expected
    assert dots(raw) == set()
    assert figure is not None
    (legend,) = figure.legends
    said = " ".join(text.get_text().replace("\n", " ") for text in legend.get_texts())
    assert "dot (below the diagonal): more alike than with the wrong tokens, q ≤ 0.05" in said
    box, (width, height) = figure.get_tightbbox(), figure.get_size_inches()
    assert box.x0 >= -0.02
    assert box.y0 >= -0.02
    assert box.x1 <= width + 0.02
    assert box.y1 <= height + 0.02


def test_dots_leave_the_numbers_in_their_cells_alone() -> None:
    figure = attention_similarity(with_tests(synthetic(12), pairs_of(12)), narrow=True)
    assert figure is not None
    _, kappa = heatmaps(figure)
    assert dots(kappa)
    renderer = figure.canvas.get_renderer()  # type: ignore[attr-defined]
    numbers = [text.get_window_extent(renderer) for text in kappa.texts]
    for one in kappa.lines:
        reach = one.get_markersize() / 2 * figure.dpi / 72
        for x, y in kappa.transData.transform(one.get_xydata()):
            near = [box for box in numbers if box.x0 <= x <= box.x1 and box.y0 <= y + reach and y - reach <= box.y1]
            assert not near


def test_without_a_test_of_all_pairs_the_figure_stays_as_it_was() -> None:
    before = svg(attention_similarity(synthetic(12)))
    neighbours = replace(synthetic(12), sureness={"tests": {"attention-similarity": {"all_pairs": None}}})
    assert svg(attention_similarity(neighbours)) == before
    assert svg(attention_similarity(with_tests(synthetic(12), np.full((12, 12), 0.5)))) == before
    assert svg(attention_similarity(with_tests(synthetic(12), pairs_of(12)))) != before
    assert svg(feature_similarity(with_tests(synthetic(12), pairs_of(12)))) == svg(feature_similarity(synthetic(12)))


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
    assert len(heatmaps(feature_similarity(synthetic(12)))) == 2


def test_variants_are_drawn_and_centred_ones_around_zero() -> None:
    row, _, centred, _ = heatmaps(attention_variants(synthetic(12)))
    assert row.collections[0].get_clim() == (0.0, 1.0)
    assert centred.collections[0].get_clim() == (-1.0, 1.0)
    bare = without(synthetic(12), "attention-similarity@row", "attention-similarity@centred")
    assert attention_variants(bare) is None


def test_probs_stand_beside_weights_on_one_scale() -> None:
    findings = synthetic(12, signed=True)
    assert probs_and_weights(findings) is None
    probs = synthetic(12).metrics["attention-similarity"]
    both = replace(findings, metrics={**findings.metrics, "attention-similarity@probs": probs})
    left, right = heatmaps(probs_and_weights(both))
    np.testing.assert_array_equal(cells(left), probs.values)
    np.testing.assert_array_equal(cells(right), findings.matrix("attention-similarity"))
    assert left.collections[0].get_clim() == right.collections[0].get_clim() == (-1.0, 1.0)
    assert set(draw_all(both, names=["probs-and-weights"])) == {"probs-and-weights"}


def test_adjacent_curves_are_the_findings() -> None:
    findings = synthetic(12)
    reading = findings.metrics["attention-similarity"]
    figure = adjacent_blocks(findings)
    assert figure is not None
    top, bottom = figure.axes
    np.testing.assert_array_equal(line(top, "measured"), adjacent(reading, reading.values))
    for role in ("untrained", "other_token", "other_image"):
        np.testing.assert_array_equal(line(top, role), adjacent(reading, reading.nulls.values[role]))
    assert ROLES["other_head"].label not in [one.get_label() for one in top.lines]
    np.testing.assert_array_equal(line(bottom, "measured"), adjacent(reading, reading.nulls.values["kappa"]))
    assert top.get_shared_x_axes().joined(top, bottom)
    levels = {one.get_ydata()[0] for one in top.lines if len(set(one.get_ydata())) == 1}
    assert {0.8, 0.9, 0.95} <= levels


def test_the_band_is_the_interval() -> None:
    findings = synthetic(12)
    ci95 = adjacent(findings.metrics["attention-similarity"], findings.metrics["attention-similarity"].ci95)
    figure = adjacent_blocks(findings)
    assert figure is not None
    (band,) = [c for c in figure.axes[0].collections if isinstance(c, PolyCollection)]
    corners = band.get_paths()[0].vertices
    for block, (low, high) in enumerate(ci95, start=1):
        heights = corners[corners[:, 0] == block][:, 1]
        assert {heights.min(), heights.max()} == {low, high}


def test_curves_without_nulls_and_of_one_pair_or_none() -> None:
    bare = adjacent_blocks(synthetic(12, nulls=False))
    assert bare is not None
    assert len(bare.axes) == 1
    assert adjacent_blocks(synthetic(2)) is not None
    assert adjacent_blocks(with_values(synthetic(2), "attention-similarity", np.ones((1, 1)))) is None


def test_per_block_curves_carry_their_references() -> None:
    findings = synthetic(12)
    figure = per_block(findings)
    assert figure is not None
    heads, images, diversity = figure.axes
    np.testing.assert_array_equal(line(heads, "untrained"), findings.metrics["head-similarity"].nulls.values["untrained"])
    np.testing.assert_array_equal(line(images, "measured"), findings.matrix("image-similarity"))
    np.testing.assert_array_equal(line(diversity, "measured"), findings.matrix("patch-diversity"))
    fewer = per_block(without(findings, "image-similarity"))
    assert fewer is not None
    assert len(fewer.axes) == 2


def test_entropy_is_a_share_of_log_n() -> None:
    findings = synthetic(12)
    figure = entropy(findings)
    assert figure is not None
    (heat,) = heatmaps(figure)
    share = findings.matrix("attention-entropy") / math.log(TOKENS)
    np.testing.assert_allclose(cells(heat), share.T)
    assert heat.collections[0].get_clim() == (0.0, 1.0)
    bottom = figure.axes[1]
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
        assert cells(heat).mask.any() == isinstance(tokens, list)  # log 1 is no unit


def test_counts_stand_at_their_values_with_their_intervals() -> None:
    findings = synthetic(12)
    figure = similar_blocks(findings)
    assert figure is not None
    (axes,) = figure.axes
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
    plain = overlay(picture, np.zeros((7, 7)))
    assert (plain.max(-1) == plain.min(-1)).all()
    hot, cold = overlay(picture, np.ones((7, 7))), overlay(picture, -np.ones((7, 7)))
    assert (hot[..., 0] > hot[..., 2]).all()
    assert (cold[..., 2] > cold[..., 0]).all()


@pytest.mark.parametrize("narrow", [False, True])
@pytest.mark.parametrize("blocks", [1, 3, 12, 24, 32])
def test_no_tile_of_the_gallery_hides_another(blocks: int, narrow: bool) -> None:
    layout = Layout.of(blocks, (224, 224), narrow)
    corners = [layout.map_corner(block) for block in range(blocks)]
    assert len({(round(x, 6), round(y, 6)) for x, y in corners}) == blocks
    beside = 0.1 + 2 * layout.tile
    for x, y in corners:
        assert x + layout.tile <= layout.width
        assert y + layout.tall <= layout.height
        assert x >= beside or y >= 2 * layout.tall


def test_gallery_shows_names_that_are_markup_or_have_no_glyph() -> None:
    assert attention_gallery(synthetic(3, images=("$x^{$.png", "猫\n<script>.png"))) is not None
    assert printable("猫\n.png") == "□□.png"
    assert len(printable("x" * 300)) <= 40
    assert attention_gallery(synthetic(3, gallery=False)) is None


def test_undefined_values_everywhere_still_draw() -> None:
    findings = synthetic(4)
    empty = np.full((4, 4), np.nan)
    figures = draw_all(with_values(findings, "attention-similarity", empty))
    assert cells(heatmaps(figures["attention-similarity"])[0]).mask.all()


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
    assert {path.name for path in inside.iterdir()} == {f"{name}.{kind}" for name in NAMES for kind in ("png", "svg")}
    for name, figure in draw_all(findings).items():
        written = (inside / f"{name}.svg").read_bytes()
        assert svg(figure) == written, name
        assert png(figure) == (inside / f"{name}.png").read_bytes(), name
        assert b"<dc:date>" not in written


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
