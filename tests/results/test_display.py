"""Results show themselves: short texts, cards, tables, figures, pages; wrong names are answered with the nearest."""

from __future__ import annotations

import inspect
import re
import textwrap
import warnings
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch
from factories import findings_of, small_vit, synthetic
from matplotlib.figure import Figure

import collapse_probe as cp
from collapse_probe.errors import UnknownNameError
from collapse_probe.results.comparison import Comparison
from collapse_probe.results.findings import CSV_COLUMNS, Findings
from collapse_probe.results.intervention import Effect, Interventions
from collapse_probe.results.overview.display import PAGES, Shown
from collapse_probe.results.overview.headline import headlines, spark
from collapse_probe.results.sweep import FINISHED, CellResult, Sweep


@pytest.fixture(scope="module")
def findings():
    return synthetic()


@pytest.fixture(scope="module")
def comparison():
    rng = np.random.default_rng(0)
    one, other = (findings_of(*rng.uniform(0.2, 0.8, (2, 6, 3))) for _ in range(2))
    return cp.compare({"plain": one, "fixed": other})


@pytest.fixture(scope="module")
def interventions():
    effects = tuple(Effect("share", (b,), 0.1 * b, (0.05 * b, 0.2 * b), 0.9, (0.8, 0.95)) for b in (1, 2, 3))
    parts = {"model": {"address": "some:model"}, "data": {"images": 8, "address": "photos"}, "run": {}, "kinds": {}}
    return Interventions(
        **parts, plain={"accuracy": None}, single={"share": effects}, cumulative={"share": effects}, similarity={}
    )


@pytest.fixture(scope="module")
def sweep():
    cells = tuple(
        CellResult(name=f"{d}-{s}", values={"depth": d}, seed=s, status=FINISHED, numbers={"kappa_adjacent": d / 10 + s / 100})
        for d in (2, 4)
        for s in (0, 1)
    )
    return Sweep(recipe={"name": "digits"}, varied={"depth": [2, 4]}, seeds=[0, 1], changes={}, data={}, run={}, cells=cells)


def all_four(request):
    return [request.getfixturevalue(name) for name in ("findings", "comparison", "interventions", "sweep")]


def test_the_text_of_every_result_is_short_and_says_what_it_is_of(request):
    for each, words in zip(
        all_four(request),
        ("vit_b_32 on 64 images of photos", "plain: κ", "some:model", "Sweep of digits: depth 2, 4"),
        strict=True,
    ):
        text = repr(each)
        assert words in text
        assert len(text.splitlines()) <= 5
        assert len(text) < 900


def test_the_text_of_findings_holds_the_verdict_and_kappa(findings):
    lines = repr(findings).splitlines()
    assert len(lines) == 5
    assert lines[1] == findings_verdict(findings)
    assert lines[2].startswith(f"κ {np.nanmean(np.diagonal(findings.matrix('attention-similarity', 'kappa'), -1)):.3f}")
    assert "raw similarity" in lines[2]
    assert "(chance level " in lines[2]


def findings_verdict(findings):
    from collapse_probe.results.verdict import verdict_of

    return textwrap.shorten(verdict_of(findings).sentences[0], 160, placeholder=" …")


def test_the_card_shows_numbers_chance_level_untrained_copy_and_the_heatmap(findings):
    card = findings._repr_html_()
    kappa, raw, *_ = headlines(findings)
    for words in (kappa.written, raw.written, f"{raw.chance:.3f}", f"{raw.untrained:.3f}", "<svg", "untrained copy"):
        assert words in card
    assert raw.chance == pytest.approx(np.diagonal(findings.matrix("attention-similarity", "other_token"), -1).mean())
    assert len(card) < 60_000


def test_names_in_a_card_are_text(findings):
    bad = "<script>alert(1)</script>"
    card = replace(findings, model={**findings.model, "name": bad, "address": bad})._repr_html_()
    assert "<script" not in card
    assert "&lt;script&gt;" in card


def test_the_card_of_a_comparison_has_a_row_for_each_subject(comparison, interventions):
    card = comparison._repr_html_()
    assert card.count("<tr>") == 3
    assert "plain" in card
    assert "fixed" in card
    assert interventions._repr_html_().startswith("<pre>Interventions")


def test_the_untrained_copy_of_kappa_is_the_highest_of_its_copies():
    found = cp.analyze("ours:digits-tied-mhsa", "bundled:digits", limit=4, metrics="attention-similarity", null_images=4)
    (kappa, *_) = headlines(found)
    untrained = found.metrics["attention-similarity"].nulls.untrained_beyond["other_token"]
    assert kappa.untrained == pytest.approx(np.diagonal(untrained, -1).mean())
    assert list(found.metrics) == ["attention-similarity"]


def test_a_frame_has_chance_level_kappa_and_intervals_beside_the_value(findings):
    table = findings.frame("attention-similarity")
    assert list(table.columns) == CSV_COLUMNS
    assert CSV_COLUMNS[:7] == ["metric", "block", "head", "value", "stderr", "ci_low", "ci_high"]
    chance, kappa = (
        np.diagonal(findings.matrix("attention-similarity", part), -1).tolist() for part in ("other_token", "kappa")
    )
    assert table.chance_level.tolist() == chance
    assert table.kappa.tolist() == pytest.approx(kappa, nan_ok=True)
    assert (table.kappa_ci_high - table.kappa_ci_low).dropna().to_numpy() == pytest.approx(0.06)
    assert table.untrained.tolist() == np.diagonal(findings.matrix("attention-similarity", "untrained"), -1).tolist()
    assert set(findings.frame("attention-similarity", "patch-diversity").metric) == {"attention-similarity", "patch-diversity"}


def test_the_mean_over_heads_has_the_untrained_copy_beside_it(findings):
    table = findings.frame("attention-entropy")
    means = table[table["head"].isna()]
    fresh = findings.metrics["attention-entropy"].nulls.values["untrained"].mean(1)
    assert means.untrained.tolist() == pytest.approx(fresh.tolist())
    assert means.value.tolist() == findings.metrics["attention-entropy"].head_mean[0].tolist()
    assert means.chance_level.isna().all()


def test_the_csv_holds_the_same_columns(findings, tmp_path):
    stored = pd.read_csv(findings.save(tmp_path / "out") / "blocks.csv")
    assert list(stored.columns) == CSV_COLUMNS
    assert stored.kappa.to_numpy() == pytest.approx(findings.frame().kappa.to_numpy(), nan_ok=True)


def test_every_part_of_a_matrix_can_be_asked_for(findings):
    result = findings.metrics["attention-similarity"]
    assert findings.matrix("attention-similarity", "kappa") is result.nulls.values["kappa"]
    assert findings.matrix("attention-similarity", "chance_level") is result.nulls.values["other_token"]
    assert findings.matrix("attention-similarity", "value_ci_high").tolist() == result.ci95[..., 1].tolist()
    assert findings.matrix("attention-similarity", "stderr") is result.stderr


@pytest.mark.parametrize(
    ("ask", "says"),
    [
        (lambda f: f.matrix("attention_similarity"), "did you mean 'attention-similarity'"),
        (lambda f: f.matrix("kappa"), "stands beside a metric"),
        (lambda f: f.matrix("attention-similarity", "kapa"), "did you mean 'kappa'"),
        (lambda f: f.matrix("attention-similarity", "other_head"), "no other_head here: one head only"),
        (lambda f: f["patch-diversty"], "did you mean 'patch-diversity'"),
        (lambda f: f.frame("patch-diversty"), "did you mean 'patch-diversity'"),
        (lambda f: f.plot("patch-diversty"), "did you mean 'patch-diversity'"),
    ],
)
def test_a_wrong_name_is_answered_with_the_nearest(findings, ask, says):
    with pytest.raises(UnknownNameError, match=re.escape(says)):
        ask(findings)


def test_completion_offers_the_names(findings, comparison):
    assert findings._ipython_key_completions_() == list(findings.metrics)
    assert comparison._ipython_key_completions_() == ["plain", "fixed"]
    assert comparison["fixed"] is comparison.subjects["fixed"]
    with pytest.raises(UnknownNameError, match="did you mean 'fixed'"):
        comparison["fixd"]


def test_a_metric_of_every_kind_is_plotted_with_its_own_numbers(findings):
    for name, result in findings.metrics.items():
        figure = findings.plot(name)
        assert isinstance(figure, Figure)
        square = len(result.dims) == 2 and result.dims[0] == result.dims[1]
        if square:
            assert np.asarray(figure.axes[0].images[0].get_array()).tolist() == result.values.tolist()
        else:
            line = next(each for each in figure.axes[0].lines if str(each.get_label()).startswith("measured"))
            expected = result.values if result.head_mean is None else result.head_mean[0]
            assert np.asarray(line.get_ydata()).tolist() == expected.tolist()


def test_the_main_figures(request):
    titles = ("raw similarity with the block before", "κ with the block before", "one block at a time", "")
    for each, title in zip(all_four(request), titles, strict=True):
        figure = each.plot()
        assert figure.axes[0].get_title(loc="left") == title
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert figure._repr_png_().startswith(b"\x89PNG")


def test_a_sweep_is_plotted_with_its_mean_over_seeds(sweep):
    (axes,) = sweep.plot("kappa_adjacent").axes
    (container,) = axes.containers
    assert container[0].get_ydata().tolist() == pytest.approx([0.205, 0.405])
    with pytest.raises(UnknownNameError, match="did you mean 'kappa_adjacent'"):
        sweep.plot("kapa_adjacent")


def test_a_comparison_is_a_table_and_a_csv(comparison, tmp_path):
    table = comparison.frame()
    stored = pd.read_csv(comparison.save(tmp_path / "out") / "comparison.csv")
    assert list(stored.columns) == list(table.columns)
    assert len(stored) == len(table) == sum(len(d.places) + 1 for pair in comparison.pairs for d in pair.differences.values())
    kappa = comparison.pairs[0].differences["attention-similarity/kappa"]
    rows = table[table.metric == "attention-similarity/kappa"]
    assert rows[rows.place.notna()].difference.tolist() == pytest.approx(kappa.paired.difference.tolist(), nan_ok=True)
    (mean,) = rows[rows.place.isna()].itertuples()
    assert (mean.difference, mean.ci_low) == pytest.approx((kappa.overall.difference[0], kappa.overall.ci95[0, 0]), nan_ok=True)


def test_interventions_are_a_table_and_a_csv(interventions, tmp_path):
    table = interventions.frame()
    stored = pd.read_csv(interventions.save(tmp_path / "out") / "interventions.csv")
    assert stored.kl.tolist() == pytest.approx(table.kl.tolist())
    assert table[table.how == "single"].kl_ci_high.tolist() == pytest.approx([0.2, 0.4, 0.6])


def test_report_writes_numbers_and_page(findings, tmp_path):
    page = findings.report(tmp_path / "out")
    assert page == tmp_path / "out" / "report.html"
    assert "vit_b_32" in page.read_text(encoding="utf-8")
    assert Findings.load(tmp_path / "out").summary == findings.summary


def test_every_result_has_a_page():
    results = {each.__name__ for each in Shown.__subclasses__()}
    assert results == {kind.__name__ for kind in (Findings, Comparison, Interventions, Sweep)}
    assert set(PAGES) == {*results, "Survey"}  # a gallery is a folder of pages, not an answer to look at in a notebook


def examples():
    places = {"findings": Findings, "comparison": Comparison, "interventions": Interventions, "sweep": Sweep}
    for name, kind in places.items():
        for method in ("frame", "matrix", "plot", "report"):
            text = inspect.getdoc(getattr(kind, method, None)) or ""
            if "Example::" in text:
                yield pytest.param(name, text.split("Example::", 1)[1], id=f"{kind.__name__}.{method}")


@pytest.mark.parametrize(("name", "code"), [*examples()])
def test_the_examples_in_docstrings_run(name, code, request, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    lines = textwrap.dedent(code).strip()
    exec(compile(lines, "example", "exec"), {name: request.getfixturevalue(name), "findings": synthetic()})


def test_every_method_that_shows_has_an_example():
    assert len(list(examples())) == 4 + 3 + 3 + 3


def test_a_spark_line_follows_the_numbers():
    assert spark([0.0, 0.5, 1.0, float("nan"), 2.0]) == "▁▅█·█"


def test_a_trace_and_a_recording_are_one_line():
    model = small_vit()
    with cp.record(model) as recording:
        assert "nothing recorded yet" in repr(recording)
        model(torch.rand(2, 3, 64, 64))
    assert "2 images: 4 attention layers, tokens 2 × 17 × 64 at 5 depths" in repr(recording.last)
    for each in (recording, recording.last, recording.last.attention[0], recording.last.plan):
        assert "\n" not in repr(each)
        assert len(repr(each)) < 250


def test_one_name_is_as_good_as_a_list():
    images = torch.rand(2, 3, 64, 64)
    assert list(cp.Probe(small_vit(), metrics="patch-diversity")._settings.metrics) == ["patch-diversity"]
    assert list(cp.analyze(small_vit(), images, metrics="patch-diversity", null_images=0).metrics) == ["patch-diversity"]
    with pytest.raises(UnknownNameError, match="did you mean 'patch-diversity'"):
        cp.analyze(small_vit(), images, metrics="patch-diversty", null_images=0)
