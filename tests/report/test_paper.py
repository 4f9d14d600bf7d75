"""Figures for papers: the numbers beside each are those of the results, and the files are what journals take."""

from __future__ import annotations

import struct
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
from click.testing import CliRunner
from collapse_probe.cli.main import group
from factories import findings_of, small_vit, synthetic

from collapse_probe.analysis.compare import compare
from collapse_probe.analysis.intervene import intervene
from collapse_probe.data.images import open_data
from collapse_probe.errors import OutputError
from collapse_probe.report.heatmaps import UNSIGNED, scale_of
from collapse_probe.report.paper import DOTS, SIZES, Matrix, PaperFigure, draw, figures_of, ratio_or_cosine
from collapse_probe.results.findings import Findings, Nulls
from collapse_probe.results.readings import adjacent, null_of
from collapse_probe.results.sweep import FINISHED, CellResult, Sweep

INCH = 0.0254


def report(folder, *options):
    result = CliRunner().invoke(group, ["report", str(folder), *options], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.output


def numbers(folder, name):
    return pd.read_csv(folder / "figures" / "paper" / f"{name}.csv")


@pytest.fixture
def saved(tmp_path):
    synthetic(8).save(tmp_path / "out")
    return tmp_path / "out"


def test_the_numbers_beside_a_figure_are_those_of_the_findings(saved):
    assert "deepvit-figure-3, deepvit-figure-4, deepvit-figure-6" in report(saved, "--style", "paper")
    findings = Findings.load(saved)
    similarity, features = findings["attention-similarity"], findings["feature-similarity"]
    three, four, six = (numbers(saved, f"deepvit-figure-{k}") for k in (3, 4, 6))
    measured = three[(three.panel == "a") & (three.series == "measured, 95 % CI")]
    np.testing.assert_allclose(measured.value, adjacent(similarity, similarity.array))
    np.testing.assert_allclose(measured[["ci_low", "ci_high"]], adjacent(similarity, similarity.ci95))
    assert measured.x.tolist() == [str(block) for block in range(1, 8)]
    chance = three[(three.panel == "a") & (three.series == "chance level")]
    np.testing.assert_allclose(chance.value, adjacent(similarity, null_of(similarity, "other_token")))
    counts = three[(three.panel == "b") & (three.series == "measured, 95 % CI")]
    assert counts.value.tolist() == [*findings["similar-blocks"].array, 1.0]
    assert counts.x.tolist() == ["> 0.8", "> 0.9", "> 0.95", "κ > 0.5"]
    heads = three[(three.panel == "c") & (three.series == "measured, 95 % CI")]
    np.testing.assert_allclose(heads.value, findings["head-similarity"].array)
    np.testing.assert_allclose(four[four.series == "measured, 95 % CI"].value, features.array[:, -1])
    for series, matrix in (("raw similarity", similarity.array), ("κ", null_of(similarity, "kappa"))):
        drawn = six[six.series == series].pivot(index="y", columns="x", values="value")
        np.testing.assert_allclose(drawn, matrix)


def test_a_pdf_has_one_column_or_two_and_letters_that_stay_letters(saved):
    report(saved, "--figures", "pdf")
    for name, width in (("deepvit-figure-4", SIZES["paper"].single), ("deepvit-figure-6", SIZES["paper"].double)):
        pdf = (saved / "figures" / "paper" / f"{name}.pdf").read_bytes()
        box = pdf.partition(b"/MediaBox [ 0 0 ")[2].split()[:2]
        assert float(box[0]) == pytest.approx(72 * width)
        assert b"/FontType 42" in pdf or b"/CIDFontType2" in pdf
        assert b"CreationDate" not in pdf
    first = {path.name: path.read_bytes() for path in (saved / "figures" / "paper").iterdir()}
    report(saved, "--figures", "pdf")
    assert first == {path.name: path.read_bytes() for path in (saved / "figures" / "paper").iterdir()}


def test_pictures_have_the_resolution_that_is_asked_of_print(saved):
    report(saved, "--figures", "png")
    header = (saved / "figures" / "paper" / "deepvit-figure-6.png").read_bytes()[16:24]
    assert struct.unpack(">II", header)[0] == round(DOTS * SIZES["paper"].double)
    report(saved, "--style", "screen", "--figures", "svg")
    assert b"<svg" in (saved / "figures" / "screen" / "deepvit-figure-6.svg").read_bytes()
    assert not (saved / "figures" / "paper").exists()  # figures/ is what was asked for last


def test_subjects_of_a_comparison_stand_side_by_side(tmp_path):
    rng = np.random.default_rng(0)
    subjects = {"one": findings_of(*rng.uniform(0.2, 0.8, (2, 6, 3))), "<two>": findings_of(*rng.uniform(0.2, 0.8, (2, 6, 3)))}
    compare(subjects).save(tmp_path / "out")
    report(tmp_path / "out", "--style", "paper")
    six = numbers(tmp_path / "out", "deepvit-figure-6")
    drawn = six[six.series == "<two>: raw similarity"].pivot(index="y", columns="x", values="value")
    np.testing.assert_allclose(drawn, subjects["<two>"].matrix("attention-similarity"))


def test_what_replacing_maps_costs(tmp_path):
    interventions = intervene(small_vit(depth=3), open_data("bundled:digits", limit=4), ["uniform"])
    interventions.save(tmp_path / "out")
    report(tmp_path / "out", "--style", "paper")
    table = numbers(tmp_path / "out", "replaced-maps")
    alone = table[table.panel == "a"]
    assert alone.x.tolist() == [0, 1, 2]
    effects = [
        each.accuracy_change if each.accuracy_change is not None else each.kl for each in interventions.single["uniform"]
    ]
    np.testing.assert_allclose(alone.value, effects)
    assert table[table.panel == "b"].x.tolist() == [0, 1, 2]  # the first of the blocks that are replaced


def test_a_matrix_that_is_not_symmetric_keeps_its_rows_and_columns():
    values = np.arange(9.0).reshape(3, 3)
    panel = Matrix("one", values, UNSIGNED, "block", np.stack([values - 1, values + 1], -1))
    table = PaperFigure([[panel]]).table
    for column, expected in (("value", values), ("ci_low", values - 1), ("ci_high", values + 1)):
        np.testing.assert_allclose(table.pivot(index="y", columns="x", values=column), expected)


def test_counts_of_a_sweep_along_depth():
    def cell(depth, raw):
        found = {"similar_blocks": float(raw), "similar_blocks_corrected": 0.0, "pairs": float(depth - 1)}
        facts = {"numbers": found, "untrained": {**found, "similar_blocks": float(depth - 1)}}
        return CellResult(name=f"depth={depth}", values={"depth": depth}, seed=0, status=FINISHED, **facts)

    facts = {"recipe": {"name": "toy"}, "seeds": (0,), "changes": {}, "data": {}, "run": {}, "notes": ()}
    sweep = Sweep(varied={"depth": (4, 8)}, cells=(cell(4, 1), cell(8, 5)), **facts)
    (figure,) = figures_of(sweep).values()
    table = figure.table
    assert table[(table.panel == "a") & (table.series == "trained")].value.tolist() == [1.0, 5.0]
    assert table[(table.panel == "a") & (table.series == "trained: untrained copy")].value.tolist() == [3.0, 7.0]
    assert table[table.panel == "b"].value.tolist() == [0.0] * 4


def test_findings_without_any_of_them_are_told_and_keep_their_page(tmp_path):
    whole = synthetic(4)
    few = Findings(
        model=whole.model, data=whole.data, run=whole.run, metrics={"patch-diversity": whole["patch-diversity"]}, summary={}
    )
    few.save(tmp_path / "out")
    report(tmp_path / "out")
    before = (tmp_path / "out" / "report.html").read_bytes()
    with pytest.raises(OutputError, match="nothing here belongs"):
        report(tmp_path / "out", "--style", "paper")
    assert (tmp_path / "out" / "report.html").read_bytes() == before


def test_subjects_whose_names_are_shortened_alike_stay_apart():
    rng = np.random.default_rng(0)
    labels = ("runs/a-long-name/step-000100/model.safetensors", "runs/a-long-name/step-000200/model.safetensors")
    figures = figures_of(compare({label: findings_of(*rng.uniform(0.2, 0.8, (2, 6, 3))) for label in labels}))
    measured = figures["deepvit-figure-3"].table.query("panel == 'a'")
    assert not measured.duplicated(["series", "x"]).any()
    assert figures["deepvit-figure-6"].table.series.nunique() == 4


@pytest.mark.parametrize("negative", ["raw", "kappa"])
def test_the_colour_bar_of_one_subject_reaches_as_far_as_either_matrix(negative):
    raw, kappa = figures_of(synthetic(4))["deepvit-figure-6"].panels[0]
    shifted = [replace(each, values=each.values * sign, scale=scale_of(each.values * sign)) for each, sign in (
        (raw, -1.0 if negative == "raw" else 1.0), (kappa, -1.0 if negative == "kappa" else 1.0))]  # fmt: skip
    sheet = draw(PaperFigure([shifted]), SIZES["paper"])
    assert sheet.axes[-1].get_ylim() == (-1.0, 1.0)


def test_counts_of_the_untrained_copy_stand_beside_those_measured():
    whole = synthetic(8)
    similar = replace(whole["similar-blocks"], nulls=Nulls({"untrained": np.array([7.0, 6.0, 4.0])}, {"untrained": 16}))
    table = figures_of(replace(whole, metrics={**whole.metrics, "similar-blocks": similar}))["deepvit-figure-3"].table
    copies = table[(table.panel == "b") & (table.series == "untrained copy")]
    assert copies.value.tolist() == [7.0, 6.0, 4.0]
    assert copies.x.tolist() == ["> 0.8", "> 0.9", "> 0.95"]


def test_the_ratio_is_drawn_where_every_subject_has_it():
    whole = synthetic(4)
    by_head, ends = np.random.default_rng(0).uniform(size=(4, 2)), np.tile([0.1, 0.9], (4, 2, 1))
    mean = (by_head.mean(1), np.full(4, 0.1), np.tile([0.2, 0.8], (4, 1)))
    ratio = replace(whole["patch-diversity"], dims=("block", "head"), values=by_head, ci95=ends, head_mean=mean)
    findings = replace(whole, metrics={**whole.metrics, "similarity-ratio": ratio})
    tints = {"one": "#000000", "two": "#ffffff"}
    drawn = ratio_or_cosine({"one": findings, "two": findings}, tints)
    assert drawn.title == "similarity ratio"
    np.testing.assert_allclose(drawn.lines[0].values, by_head.mean(1))
    np.testing.assert_allclose(drawn.lines[0].ci95, mean[2])
    bare = replace(findings, metrics={**findings.metrics, "similarity-ratio": replace(ratio, ci95=None, head_mean=None)})
    np.testing.assert_allclose(ratio_or_cosine({"": bare}, {"": "#000000"}).lines[0].values, by_head.mean(1))
    assert ratio_or_cosine({"one": findings, "two": whole}, tints).title == "attention, with the block before"
