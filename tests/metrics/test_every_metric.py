"""Every metric that findings hold is on the page: drawn on its scale, told in words, with what its settings say."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from factories import make_gallery, nulls_of, similarity, synthetic, with_interval

from collapse_probe.metrics.metric import Metric, Variant
from collapse_probe.registry import METRICS
from collapse_probe.report.findings.figures import (
    FIGURES,
    attention_variants,
    caption_of,
    draw_all,
    family_figures,
    undrawn,
)
from collapse_probe.report.findings.figures import shown as shown_by_its_own
from collapse_probe.report.findings.metric_figures import ceiling, family_figure, lines
from collapse_probe.report.findings.outliers import outlier_places, places_of
from collapse_probe.report.findings.page import render, sections
from collapse_probe.report.findings.tables import sensitivity_tables
from collapse_probe.results.findings import Description, Findings, Gallery, MetricResult, Nulls

BLOCKS, HEADS = 4, 3
NAMES = [name for base, kind in METRICS.items() for name in (base, *(f"{base}@{suffix}" for suffix in kind.variants))]


def reading_for(name: str, dims: tuple[str, ...] | None = None) -> MetricResult:
    """A made-up reading with the axes and the settings that the metric of this name has."""
    base, *suffixes = name.split("@")
    kind = METRICS[base]
    dims = kind.dims if dims is None else dims
    dims = ("block", "block") if {"depth", "directions"} & set(suffixes) and base == "weight-similarity" else dims
    sizes = {"block": BLOCKS, "depth": BLOCKS + 1, "head": HEADS, "matrix": 6, "threshold": 3}
    rng = np.random.default_rng(len(name))
    values = rng.uniform(0.2, 0.9, tuple(sizes.get(dim, 2) for dim in dims))
    if len(dims) == 2 and dims[0] == dims[1]:
        values = similarity(sizes[dims[0]], 0.5, rng)
    settings = dict(kind.defaults)
    for suffix in suffixes:
        settings |= kind.variants[suffix].settings
    details = {"uniform": [0.3] * BLOCKS, "largest": [5.0, None, 5.0, 5.0], "ratio_above": 0.9, "tokens": [50] * BLOCKS}
    details["matrices"] = ["q", "k", "v", "proj", "fc1", "fc2"]
    details["outlier_map"] = np.full((BLOCKS + 1, 2, 2), 0.1)
    details["outlier_share"] = [0.1] * (BLOCKS + 1)
    fresh = Nulls({"untrained": values * 0.9}, {"untrained": 4})
    facts = {"settings": settings, "details": details, "nulls": fresh, **with_interval(values)}
    facts["description"] = kind.describe(*suffixes)
    return MetricResult(dims, f"what {name} is", **facts)


def findings_with(*names: str) -> Findings:
    return replace(synthetic(BLOCKS, gallery=False), metrics={name: reading_for(name) for name in names})


def shown(findings: Findings) -> set[str]:
    """The readings that a family's figure or one of their own shows."""
    own = {name for name in findings.metrics if shown_by_its_own(name)}
    return own | {name for names in family_figures(findings).values() for name in names}


def test_every_reading_of_every_metric_is_in_a_figure_and_in_a_section():
    findings = findings_with(*NAMES)
    assert shown(findings) == set(NAMES)
    keys = {*family_figures(findings), *FIGURES}
    arranged = [key for part in sections(findings, keys) for key in (*part.figures, *part.aside)]
    assert sorted(arranged) == sorted(keys)


@pytest.mark.parametrize("name", NAMES)
def test_a_reading_alone_draws_something(name):
    assert draw_all(findings_with(name)), name


@pytest.mark.parametrize("name", NAMES)
def test_every_metric_and_variant_has_words(name):
    base, *suffixes = name.split("@")
    stated = METRICS[base].describe(*suffixes)
    assert stated.title != base, "no title"
    assert stated.seen, "not said what its figure shows"
    assert stated.limits, "not said what it does not say"
    assert stated.panel not in ("", base, *suffixes), "no title of its panel"
    assert stated.unit != "value", "no unit"


def test_an_unknown_metric_is_drawn_and_told_by_its_definition():
    findings = findings_with("token-rank")
    result = replace(findings.metrics["token-rank"], description=Description("my-own", panel="my-own"))
    findings = replace(findings, metrics={"my-own": result})
    assert family_figures(findings) == {"my-own": ["my-own"]}
    caption = caption_of("my-own", family_figures(findings), findings)
    assert (caption.title, caption.seen) == ("my-own", "what token-rank is")
    assert "my-own" in draw_all(findings)


def test_axes_that_no_figure_shows_are_named():
    odd = replace(reading_for("token-rank"), dims=("block", "head", "token"), values=np.zeros((2, 2, 2)))
    findings = replace(findings_with(), metrics={"odd": odd})
    ((name, reason),) = undrawn(findings)
    assert name == "odd"
    assert "block × head × token" in reason
    assert "block × head × token" in render(findings, {})


def test_the_variants_of_a_metric_stand_aside_where_the_plain_one_is_there():
    findings = findings_with("token-rank", "token-rank@stable")
    assert family_figures(findings) == {"token-rank": ["token-rank"], "token-rank-variants": ["token-rank@stable"]}
    (part,) = sections(findings, family_figures(findings))
    assert (part.figures, part.aside) == (("token-rank",), ("token-rank-variants",))
    assert family_figures(findings_with("token-rank@stable")) == {"token-rank": ["token-rank@stable"]}


def test_the_panel_of_heads_shows_the_numbers_of_the_findings():
    reading = replace(reading_for("attention-distance"), head_mean=None)
    one = lines(reading)
    np.testing.assert_allclose(one.values, reading.values.mean(1))
    np.testing.assert_allclose(one.others["untrained"], 0.9 * reading.values.mean(1))
    np.testing.assert_array_equal(one.reference, [0.3] * BLOCKS)
    figure = family_figure(replace(findings_with(), metrics={"attention-distance": reading}), ["attention-distance"])
    (axes,) = (panel.axes for panel in figure.panels)
    drawn = {line.get_label(): np.asarray(line.get_ydata()) for line in axes.lines}
    np.testing.assert_allclose(drawn["measured"], reading.values.mean(1))  # without an interval none is named
    np.testing.assert_array_equal(drawn["one head"], reading.values.ravel())
    np.testing.assert_array_equal(drawn["uniform attention"], [0.3] * BLOCKS)
    assert axes.get_ylabel() == "pixels"


def test_a_reference_stands_only_at_the_unit_that_it_is_of():
    assert lines(reading_for("map-rank")).reference is not None
    assert lines(reading_for("map-rank@residual")).reference is None


def test_ranks_are_logarithmic_and_shares_end_at_one():
    for name, scale, ends in (("map-rank", "log", None), ("rank-residual", "linear", (-0.03, 1.03))):
        axes = family_figure(findings_with(name), [name]).panels[0].axes
        assert axes.get_yscale() == scale
        if ends is not None:
            np.testing.assert_allclose(axes.get_ylim(), ends)


def test_panels_of_one_unit_share_their_scale():
    names = [name for name in NAMES if name.startswith("attention-sink")]
    findings = findings_with(*names)
    plain = family_figure(findings, names[:1]).panels[0].axes
    assert {panel.axes.get_ylim() for panel in family_figure(findings, names[1:]).panels} == {plain.get_ylim()}


@pytest.mark.parametrize(("value", "end"), [(32.1, 40.0), (0.06, 0.06), (1.0, 1.0), (1.01, 1.5), (0.0, 1.0), (99.0, 100.0)])
def test_scales_end_at_round_numbers(value, end):
    assert ceiling(value) == pytest.approx(end)


def test_the_untrained_twin_stands_beside_a_matrix_without_kappa():
    figure = family_figure(findings_with("layer-cka"), ["layer-cka"])
    assert [panel.title for panel in figure.panels[0].maps] == ["patch tokens", "untrained copy"]
    rolled = replace(reading_for("attention-rollout"), nulls=nulls_of(similarity(BLOCKS, 0.5, np.random.default_rng(0)), None))
    figure = family_figure(replace(findings_with(), metrics={"attention-rollout": rolled}), ["attention-rollout"])
    assert figure.views == ("raw similarity", "chance level", "κ")


def test_probs_alone_are_drawn_among_the_variants():
    assert attention_variants(findings_with("attention-similarity@probs")) is not None


def test_everything_undefined_still_draws():
    for name in ("attention-distance", "token-rank", "map-rank", "layer-cka", "weight-rank@stable"):
        reading = reading_for(name)
        empty = replace(reading, values=np.full_like(reading.values, np.nan), ci95=None, nulls=None)
        assert family_figure(replace(findings_with(), metrics={name: empty}), [name]) is not None


def rolled(**facts) -> Findings:
    gallery = make_gallery(BLOCKS)
    kept = Gallery(gallery.names, gallery.pictures, gallery.maps, gallery.query, **facts)
    return replace(synthetic(BLOCKS), gallery=kept)


def test_rollouts_are_drawn_where_they_were_measured_and_survive_the_folder(tmp_path):
    assert FIGURES["rollout-gallery"].draw(rolled()) is None
    rollouts = make_gallery(BLOCKS).maps[:, ::-1]
    findings = rolled(rollouts=rollouts)
    assert FIGURES["rollout-gallery"].draw(findings) is not None
    again = Findings.load(findings.save(tmp_path / "out"))
    np.testing.assert_allclose(again.gallery.rollouts, rollouts, rtol=1e-6)
    assert Findings.load(rolled().save(tmp_path / "without")).gallery.rollouts is None


def ratio(rows=None, **settings) -> MetricResult:
    rows = rows or [
        {"k": k, "threshold": t, "direction": d, "similar_blocks": k + (t == "mean"), "blocks": 11}
        for d in ("before", "both")
        for k in (1, 3)
        for t in (0.7, 0.9, "mean")
    ]
    settings = {**METRICS["similarity-ratio"].defaults, **settings}
    return replace(reading_for("similarity-ratio"), settings=settings, details={"sensitivity": rows})


def test_the_sensitivity_of_the_ratio_is_a_table_with_the_drawn_choice_marked():
    findings = replace(findings_with(), metrics={"similarity-ratio": ratio(), "similarity-ratio@nearest-3": ratio(k=3)})
    (table,) = sensitivity_tables(findings)
    assert table.header == ("nearest blocks", "cosine > 0.7", "cosine > 0.9", "threshold: mean")
    assert [row[0] for row in table.rows] == [
        "1 block before",
        "3 blocks before",
        "1 block on each side",
        "3 blocks on each side",
    ]
    assert table.rows[1] == ("3 blocks before", "3 of 11", "3 of 11", "4 of 11")
    assert table.marked == {(0, 2), (1, 2)}
    assert "DeepViT leaves these choices open" in table.notes[0]
    assert len(sensitivity_tables(replace(findings, metrics={"a": ratio()}))) == 0
    by_row = replace(findings, metrics={"similarity-ratio": ratio(), "similarity-ratio@row": ratio(axis="row")})
    assert len(sensitivity_tables(by_row)) == 2


def test_the_sensitivity_table_shows_the_interval_of_each_count():
    rows = [
        {**row, "ci95": [row["k"] - 1.0, 9.0] if row["threshold"] == 0.9 else None} for row in ratio().details["sensitivity"]
    ]
    (table,) = sensitivity_tables(replace(findings_with(), metrics={"similarity-ratio": ratio(rows)}))
    assert table.rows[1] == ("3 blocks before", "3 of 11", "3 of 11 [2, 9]", "4 of 11")
    assert "with the 95 % interval of the number" in table.notes[0]


def test_the_table_stands_under_its_figure():
    findings = replace(findings_with(), metrics={"similarity-ratio": ratio()})
    html = render(findings)
    assert html.index('id="similarity-ratio"') < html.index("Similar blocks under every choice")
    assert html.count('class="marked"') == 1


def outliers(share: float, **settings) -> MetricResult:
    maps = np.zeros((BLOCKS + 1, 3, 3))
    maps[2, 0, 1] = share
    details = {"outlier_map": maps.tolist(), "outlier_share": maps.mean((1, 2)).tolist()}
    settings = {"deviations": 6.0, "threshold": None, **settings}
    return replace(reading_for("token-norm"), settings=settings, details=details)


def test_outliers_are_drawn_where_they_sit_and_their_absence_is_said():
    findings = replace(
        findings_with(), metrics={"token-norm": outliers(0.15), "token-norm@150": outliers(0.0, threshold=150.0)}
    )
    assert [places.rule for places in places_of(findings)] == ["norm above the image's median + 6 · MAD", "norm above 150"]
    figure = outlier_places(findings)
    assert [panel.title.split(":")[0] for panel in figure.panels] == [str(depth) for depth in range(BLOCKS + 1)]
    assert figure.panels[2].shares[0, 1] == 0.15
    assert figure.panels[2].label == "depth 2: 1.67 %; at one place up to 15 % of the images"
    assert [key.words for key in figure.above] == ["norm above the image's median + 6 · MAD"]
    assert figure.content()
    assert [places.rule for places in places_of(findings) if not places.any] == ["norm above 150"]
    assert "No token of any image stands out by the rule “norm above 150”." in render(findings)
    assert outlier_places(replace(findings_with(), metrics={"token-norm": outliers(0.0)})) is None


def test_a_metric_without_words_takes_its_own_name():
    class Plain(Metric):
        name, variants = "something-new", {"odd": Variant({"odd": True})}

    assert Plain.describe() == Description("something-new", panel="something-new")
    assert Plain.describe("odd") == Description("something-new", panel="odd")
    assert METRICS["token-rank"].describe("centred", "all").panel.count(";") == 1
