"""The weight level as a user meets it: without data, beside other metrics, from the shell and from Python."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from factories import small_vit

import collapse_probe as cp
from collapse_probe.capture.weights.matrices import NAMES
from collapse_probe.errors import DataError
from collapse_probe.metrics.metric import of_level
from collapse_probe.models.vit import ViT, ViTSettings
from collapse_probe.registry import METRICS
from collapse_probe.report.findings.metric_figures import family_figure, weights
from collapse_probe.results.findings import Findings
from collapse_probe.results.verdict import judge

MODEL = ["-m", "timm:vit_tiny_patch16_224", "--no-pretrained", "--img-size", "32"]
MODEL += ["--model-kwargs", "depth=3 num_classes=7 embed_dim=48 num_heads=3 patch_size=8"]
EVERY = of_level("weights")
PLAIN = tuple(name for name in EVERY if METRICS[name].dims == ("block", "matrix"))


def test_without_data_the_whole_folder_is_written(run):
    code, out, err = run("analyze", "--level", "weights", *MODEL, "-o", "out")
    assert code == 0
    names = {str(p.relative_to("out")) for p in Path("out").rglob("*") if p.is_file()}
    files = {"findings.json", "blocks.csv", "matrices.npz", "images.npz", "report.html", "figures/weights.svg"}
    assert files <= names
    assert "no data: the weights alone" in err
    assert "effective rank over the full one" in out
    found = Findings.load("out")
    none = {"address": None, "names_sha256": None, "bundled": False, "trained_on": None}
    assert found.data == {"images": 0, "skipped": [], **none}
    assert set(found.metrics) == set(EVERY)
    assert found.metrics["qk-spectrum"].values.shape == (3, 3)
    for name in PLAIN:
        reading = found.metrics[name]
        assert reading.dims == ("block", "matrix")
        assert reading.values.shape == (3, len(NAMES))
        assert np.isfinite(reading.values).all()
        assert reading.nulls.values["untrained"].shape == (3, len(NAMES))
        assert reading.nulls.images == {"untrained": 0}
        assert reading.stderr is None
        assert "no sample" in reading.details["intervals"]
        assert np.load("out/matrices.npz")[name] == pytest.approx(reading.values)
    page = Path("out/report.html").read_text(encoding="utf-8")
    assert 'id="weights"' in page


def test_every_number_of_the_weights_is_in_blocks(run):
    assert run("analyze", "--level", "weights", "--metric", "weight-similarity@depth", *MODEL, "-o", "out")[0] == 0
    found, table = Findings.load("out"), pd.read_csv("out/blocks.csv")
    of_heads = table[table.metric == "qk-spectrum"]
    assert of_heads.value.tolist() == pytest.approx(found.matrix("qk-spectrum").ravel().tolist())
    table = table[table.metric != "qk-spectrum"]
    assert table[["head", "stderr", "ci_low", "ci_high"]].isna().all(axis=None)
    assert set(table.metric) == {f"{name}/{matrix}" for name in PLAIN for matrix in NAMES} | {"weight-similarity@depth"}
    for name in PLAIN:
        for m, matrix in enumerate(NAMES):
            rows = table[table.metric == f"{name}/{matrix}"]
            assert rows.block.tolist() == [0, 1, 2]
            assert rows.value.tolist() == pytest.approx(found.matrix(name)[:, m].tolist())
    across = table[table.metric == "weight-similarity@depth"]
    assert across.block.tolist() == [1, 2]
    assert across.value.tolist() == pytest.approx(np.diagonal(found.matrix("weight-similarity@depth"), -1).tolist())


def test_the_twins_of_several_seeds_are_averaged_and_their_spread_is_kept():
    options = {"pretrained": False, "img_size": 32, "model_kwargs": {"depth": 2, "embed_dim": 48, "num_heads": 3}}
    name = "timm:vit_tiny_patch16_224"
    given = {"metrics": ("weight-rank", "weight-similarity@depth"), **options}
    found = cp.analyze(name, null_seeds=3, **given)
    alone = [cp.analyze(name, seed=seed, null_images=0, **given) for seed in (1, 2, 3)]  # fresh parameters of these seeds
    for metric in given["metrics"]:
        each = np.stack([other.matrix(metric) for other in alone])
        nulls = found.metrics[metric].nulls
        spread = nulls.untrained_seeds
        assert nulls.values["untrained"] == pytest.approx(each.mean(0), rel=1e-6)
        assert spread["seeds"] == [1, 2, 3]
        assert spread["sd"] == pytest.approx(each.std(0, ddof=1), rel=1e-4, abs=1e-9)
        assert (spread["low"], spread["high"]) == (pytest.approx(each.min(0)), pytest.approx(each.max(0)))
        assert (spread["sd"] > 0).any()
    assert "untrained copies of the weights: fresh parameters with seeds [1, 2, 3]" in found.run["notes"]
    assert "mean of 3 untrained copies" in judge(found).sentences[1]
    one = cp.analyze(name, **given)
    assert one.metrics["weight-rank"].nulls.untrained_seeds is None
    assert one.metrics["weight-rank"].nulls.values["untrained"] == pytest.approx(alone[0].matrix("weight-rank"))
    none = cp.analyze(name, null_seeds=3, null_images=0, **given)
    assert "no null images were asked for" in none.metrics["weight-rank"].nulls.reasons["untrained"]


def test_both_figures_of_the_weights_draw_every_matrix_and_its_twin():
    options = {"pretrained": False, "img_size": 32, "model_kwargs": {"depth": 2, "embed_dim": 48, "num_heads": 3}}
    found = cp.analyze("timm:vit_tiny_patch16_224", metrics=("weight-rank", "weight-rank@stable"), **options)
    own, family = weights(found), family_figure(found, ["weight-rank@stable"])
    full = np.asarray(found.metrics["weight-rank"].details["full_rank"])
    for figure, name, scale in ((own, "weight-rank", full), (family, "weight-rank@stable", 1.0)):
        axes = figure.panels[0].axes
        drawn = {line.get_label(): line.get_ydata() for line in axes.lines}
        dashed = [line.get_ydata() for line in axes.lines if line.get_label() == "_"]
        values, fresh = found.matrix(name) / scale, found.metrics[name].nulls.values["untrained"] / scale
        for m, matrix in enumerate(NAMES):
            assert drawn[matrix] == pytest.approx(values[:, m])
            assert dashed[m] == pytest.approx(fresh[:, m])
        assert "untrained copy" in drawn
        low, high = axes.get_ylim()
        assert low <= 0
        assert high > max(values.max(), fresh.max())
    assert judge(found).sentences[0] == "The model is untrained, and no rule about weights holds."


def test_the_numbers_are_those_of_the_models_own_matrices(run):
    model = small_vit(depth=2)
    found = cp.analyze(model, metrics=("weight-rank", "weight-similarity"))
    for b, block in enumerate(model.blocks):
        matrices = [*block.attn.qkv.weight.chunk(3), block.attn.proj.weight, block.mlp.fc1.weight, block.mlp.fc2.weight]
        for m, weight in enumerate(matrices):
            w = weight.detach().double().numpy()
            sigma = np.linalg.svd(w, compute_uv=False)
            shares = sigma / sigma.sum()
            assert found.matrix("weight-rank")[b, m] == pytest.approx(np.exp(-(shares * np.log(shares)).sum()), rel=1e-8)
            rows = w / np.linalg.norm(w, axis=1, keepdims=True)
            off = np.abs(rows @ rows.T)[~np.eye(len(w), dtype=bool)]
            assert found.matrix("weight-similarity")[b, m] == pytest.approx(off.mean(), rel=1e-6)
    reasons = found.metrics["weight-rank"].nulls.reasons
    assert reasons["untrained"] == "the model came as an object, and its architecture cannot be made anew"


def test_report_json_and_thresholds_work_without_images(run):
    code, out, _ = run("analyze", "--level", "weights", *MODEL, "-o", "out", "--json=full")
    assert code == 0
    content = json.loads(out)
    assert content["data"]["images"] == 0
    assert content["metrics"]["weight-rank"]["stderr"] is None
    Path("out/report.html").unlink()
    assert run("report", "out")[0] == 0
    assert Path("out/report.html").stat().st_size > 10_000
    metric = ["--metric", "weight-rank@share", "--null-images", "0", "--json=full"]
    assert run("analyze", *MODEL, *metric, "--fail-on", "weight_rank_share_mean > 0.5")[0] == 3
    assert run("analyze", *MODEL, *metric, "--fail-on", "weight_rank_share_mean < 0.5")[0] == 0


@pytest.mark.parametrize("words", [[], ["--level", "all"], ["--level", "weights", "--metric", "patch-diversity"]])
def test_what_needs_images_asks_for_data(run, words):
    code, _, err = run("analyze", *MODEL, *words, "-o", "out")
    assert code == 2
    assert "--data" in err
    assert not Path("out").exists()
    with pytest.raises(DataError, match="patch-diversity needs images"):
        cp.analyze(small_vit(depth=1), metrics=("patch-diversity",))


def test_an_unknown_level_or_metric_is_refused(run):
    assert run("analyze", *MODEL, "--level", "heads")[0] == 2
    code, _, err = run("analyze", *MODEL, "--metric", "weight-rnak")
    assert code == 1
    assert "did you mean 'weight-rank'" in err


def test_beside_metrics_of_images(photos):
    kwargs = {"img_size": 32, "depth": 2, "embed_dim": 48, "num_heads": 3, "patch_size": 8}
    options = {"model_kwargs": {k: v for k, v in kwargs.items() if k != "img_size"}, "img_size": 32, "pretrained": False}
    names = ("patch-diversity", "weight-rank", "attention-entropy", "weight-similarity@depth")
    found = cp.analyze("timm:vit_tiny_patch16_224", str(photos), metrics=names, null_images=2, **options)
    assert tuple(found.metrics) == names
    assert found.data["images"] == 6
    assert set(found.images) == {"names", "patch-diversity", "attention-entropy"}
    assert {"patch_diversity_last", "weight_rank_mean", "weight_similarity_depth_adjacent_untrained"} <= set(found.summary)
    assert found.metrics["patch-diversity"].nulls.images["untrained"] == 2
    alone = cp.analyze("timm:vit_tiny_patch16_224", metrics=("weight-rank",), **options)
    assert alone.matrix("weight-rank") == pytest.approx(found.matrix("weight-rank"))
    given = cp.analyze("timm:vit_tiny_patch16_224", str(photos), metrics=("weight-rank",), **options)
    assert given.data["images"] == 0
    assert any("images were not used" in note for note in given.run["notes"])


def test_levels_and_metrics_add_up(run, photos):
    words = ["--level", "tokens", "--metric", "weight-rank", "--null-images", "0", "--data", photos, "--limit", "2"]
    code, out, _ = run("analyze", *MODEL, *words, "--json=full")
    assert code == 0
    tokens = [name for name, kind in METRICS.items() if ".tokens." in kind.__module__]
    assert list(json.loads(out)["metrics"]) == [*tokens, "weight-rank"]


def test_tied_blocks_are_one_matrix_and_collapsed_weights_show():
    shape = {"image_size": 32, "patch_size": 8, "width": 48, "depth": 3, "heads": 4, "classes": 3}
    tied = cp.analyze(ViT(ViTSettings(**shape, tied=True)), metrics=("weight-similarity@depth", "weight-similarity@directions"))
    assert tied.matrix("weight-similarity@depth") == pytest.approx(1)
    assert tied.matrix("weight-similarity@directions") == pytest.approx(1)
    model = ViT(ViTSettings(**shape))
    with torch.no_grad():
        weight = model.blocks[1].attn.qkv.weight
        weight[:48] = weight[:1]
    found = cp.analyze(model, metrics=PLAIN)
    healthy, sick = ((b, NAMES.index("q")) for b in (0, 1))
    assert found.matrix("weight-similarity")[sick] == pytest.approx(1, abs=1e-5)
    assert found.matrix("weight-rank")[sick] == pytest.approx(1, abs=1e-3)
    for name in PLAIN:
        worse = found.matrix(name)[sick] - found.matrix(name)[healthy]
        assert worse < 0 if name == "weight-rank" else worse > 0, name


def test_the_callers_model_is_left_alone():
    model = small_vit(depth=1).train()
    before = {name: p.clone() for name, p in model.state_dict().items()}
    cp.analyze(model, metrics=EVERY)
    assert model.training
    assert all(torch.equal(p, before[name]) for name, p in model.state_dict().items())
