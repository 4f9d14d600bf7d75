"""A gallery: every model on the same images, a page each, one table; run again it goes on, and one fault stops none."""

from __future__ import annotations

import json
from dataclasses import replace

import click
import numpy as np
import pandas as pd
import pytest
from click.testing import CliRunner
from collapse_probe.cli.gallery import lines_of
from collapse_probe.cli.main import group
from factories import findings_of

from collapse_probe.report.survey.page import headline, render
from collapse_probe.results.findings import Findings
from collapse_probe.results.survey import Survey, row_of
from collapse_probe.results.verdict import verdict_of, with_verdict

TINY = "--no-pretrained --img-size 32 --model-kwargs depth=2 --model-kwargs num_classes=4"
MODELS = f"""# two that work, one that does not
plain & <simple> = timm:vit_tiny_patch16_224 {TINY}

timm:vit_tiny_patch16_224 {TINY} --fix re-attention:norm=batch   # the same with a fix
wrong = timm:vit_tinny
"""


def gallery(folder, text=MODELS, *options, data="bundled:photos", limit=4):
    (folder / "models.txt").write_text(text, encoding="utf-8")
    words = ["gallery", str(folder / "models.txt"), "--data", data, "--limit", str(limit), "-o", str(folder / "site"), *options]
    return CliRunner().invoke(group, words)


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    folder = tmp_path_factory.mktemp("gallery")
    result = gallery(folder)
    assert result.exit_code == 1, result.output
    assert "1 of 3 models failed, the first: wrong (UnknownNameError" in result.output
    return folder / "site"


def test_the_table_holds_what_each_model_s_own_findings_say(site):
    table = pd.read_csv(site / "gallery.csv")
    assert table.status.tolist() == ["finished", "finished", "failed"]
    assert table.model.tolist() == ["plain & <simple>", "timm:vit_tiny_patch16_224", "wrong"]
    rows = Survey.load(site).rows
    for row in rows[:2]:
        findings = Findings.load(site / row.folder)
        for name in ("kappa_adjacent", "attention_similarity_adjacent", "patch_diversity_last"):
            assert row.numbers[name] == findings.summary[name]
        assert row.numbers["sink_largest"] == pytest.approx(np.nanmax(findings["attention-sink"].array.mean(1)))
        assert row.model["untrained"]
        verdict = verdict_of(findings)
        assert (row.collapsed, row.alike) == (verdict.collapsed, verdict.alike)
    assert "did you mean" in rows[2].reason


def test_the_page_links_to_every_model_and_trusts_no_name(site):
    page = (site / "index.html").read_text(encoding="utf-8")
    for row in Survey.load(site).finished:
        assert f'href="{row.folder}/report.html"' in page
        assert (site / row.folder / "report.html").is_file()
    assert "plain &amp; &lt;simple&gt;" in page
    assert "<simple>" not in page
    assert "2 of these 2 models have random parameters" in page


def test_run_again_it_keeps_what_was_measured_alike_and_measures_the_rest(site):
    stamps = {row.label: (site / row.folder / "findings.json").stat().st_mtime_ns for row in Survey.load(site).finished}
    result = gallery(site.parent, MODELS.replace("depth=2", "depth=3", 1), limit=4)
    kept, other = result.output.count("measured before, kept"), Survey.load(site)
    assert kept == 1
    first, second = other.finished
    assert first.model["blocks"] == 3
    assert second.model["blocks"] == 2
    assert (site / first.folder / "findings.json").stat().st_mtime_ns > stamps[first.label]
    assert (site / second.folder / "findings.json").stat().st_mtime_ns == stamps[second.label]
    result = gallery(site.parent, MODELS.replace("depth=2", "depth=3", 1), limit=3)
    assert "measured before" not in result.output
    assert [row.images for row in Survey.load(site).finished] == [3, 3]


def test_the_report_is_drawn_again_from_the_folder(site):
    (site / "index.html").unlink()
    result = CliRunner().invoke(group, ["report", str(site)])
    assert result.exit_code == 0, result.output
    assert "index.html" in result.output
    assert (site / "index.html").is_file()
    assert json.loads((site / "gallery.json").read_text())["schema"] == "collapse-probe/survey/1"


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("vit_b_32 --bogus 3\n", "line 1: 'vit_b_32 --bogus 3' is no model: No such option"),
        ("# nothing\n\n", "names no model"),
        ("a = \n", "line 1"),
        ("vit_b_32 'open\n", "No closing quotation"),
    ],
)
def test_a_list_that_cannot_be_read_is_told_by_its_line(tmp_path, text, said):
    path = tmp_path / "list.txt"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(click.UsageError, match="no model") as caught:
        lines_of(path)
    assert said in str(caught.value.message)


def test_a_label_that_comes_twice_is_told_before_anything_is_measured(tmp_path):
    result = gallery(tmp_path, "one = timm:vit_tinny\none = vit_b_32\n")
    assert "names 'one' twice" in str(result.exception)


def test_a_line_that_is_commented_out_is_no_model(tmp_path):
    path = tmp_path / "list.txt"
    path.write_text("# old = vit_b_32\n  # older = vit_b_16\nnew = vit_l_16  # a = b\n", encoding="utf-8")
    assert [(label, address) for label, address, _ in lines_of(path)] == [("new", "vit_l_16")]


def test_one_shared_pair_of_an_untrained_model_is_said_to_be_that():
    raw, null = np.full((20, 5), 0.5), np.full((20, 5), 0.4)
    raw[:, 2] = 0.99
    findings = with_verdict(findings_of(raw, null, weights="random (seed 0)"))
    row = row_of(findings, "fresh", {}, "models/fresh")
    assert (row.collapsed, row.alike) == (True, (1, 5))
    survey = Survey((row,), {"address": "photos", "images": 20})
    assert headline(survey) == "In 1 of 1 models (1 of them untrained) some adjacent blocks attend alike beyond chance"
    assert "collapsed in 1 of 5 pairs" in render(survey)


def test_findings_that_were_stored_without_their_shared_pairs_are_judged_again():
    raw, null = np.full((20, 5), 0.5), np.full((20, 5), 0.4)
    raw[:, 2] = 0.99
    findings = with_verdict(findings_of(raw, null))
    older = replace(findings, answer={name: value for name, value in findings.answer.items() if name != "shared"})
    assert verdict_of(older) == verdict_of(findings)
    assert verdict_of(older).alike == (1, 5)
