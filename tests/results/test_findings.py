"""Findings: the folder, its schema, and that it is written whole or not at all."""

from __future__ import annotations

import json
import math
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
from factories import small_vit, synthetic

import collapse_probe as cp
from collapse_probe.errors import OutputError, UnknownNameError
from collapse_probe.files import check_writable, new_folder
from collapse_probe.results.findings import CSV_COLUMNS, Description, Findings, MetricResult, Nulls
from collapse_probe.statistics.intervals import mean_parts, parts_interval

NULL_NAMES = {"untrained", "other_token", "other_image", "other_head", "kappa"}


@pytest.fixture(scope="module")
def found(photos):
    return cp.analyze(small_vit(sharpness=8), str(photos), img_size=64, batch_size=4, gallery_images=2)


def test_the_folder_holds_the_schema(found, tmp_path):
    found.save(tmp_path / "out")
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert names == {"findings.json", "blocks.csv", "matrices.npz", "images.npz", "gallery.npz", "manifest.json"}
    content = json.loads((tmp_path / "out" / "findings.json").read_text())
    assert content["schema"] == "collapse-probe/findings/1"
    parts = {"schema", "model", "data", "run", "metrics", "summary", "presets", "sureness", "verdict", "answer"}
    assert set(content) == parts
    model = {"address", "source", "name", "weights", "checkpoint", "checkpoint_sha256", "class", "parameters", "blocks"}
    assert model | {"heads", "tokens", "prefix_tokens", "width", "preprocess"} <= set(content["model"])
    assert {"address", "images", "skipped", "names_sha256", "bundled"} <= set(content["data"])
    run = {"device", "dtype", "batch_size", "world_size", "seed", "seconds", "images_per_second", "peak_memory_bytes"}
    assert run | {"command", "versions", "created"} <= set(content["run"])
    entry = content["metrics"]["attention-similarity"]
    facts = {"dims", "values", "stderr", "ci95", "collapsed", "point", "settings", "details", "description", "definition"}
    assert facts | {"nulls", "not_applicable"} <= set(entry)
    assert set(entry["nulls"]) >= NULL_NAMES
    assert "images" in entry["nulls"]


def test_every_null_is_a_number_or_has_a_reason(found):
    for name, reading in found.metrics.items():
        for null, value in reading.nulls.values.items():
            if value is None:
                assert reading.nulls.reasons[null], (name, null)
            else:
                assert value.shape == reading.values.shape
                assert reading.nulls.images[null] > 0
    for name in ("attention-similarity", "head-similarity", "image-similarity", "feature-similarity"):
        assert set(found.metrics[name].nulls.values) == NULL_NAMES


def test_loading_gives_back_what_was_saved(found, tmp_path):
    again = Findings.load(found.save(tmp_path / "out"))
    assert again.to_json() == json.loads(json.dumps(found.to_json()))
    assert again.images["names"].tolist() == found.images["names"].tolist()
    for name in found.metrics:
        assert again.matrix(name) == pytest.approx(found.matrix(name), nan_ok=True)
    assert again.gallery.names == found.gallery.names
    assert (again.gallery.pictures == found.gallery.pictures).all()


def test_blocks_is_a_long_table(found, tmp_path):
    table = found.blocks
    assert list(table.columns) == CSV_COLUMNS
    adjacent = table[table.metric == "attention-similarity"]
    assert adjacent.block.tolist() == [1, 2, 3]
    assert adjacent.value.tolist() == pytest.approx(np.diag(found.matrix("attention-similarity"), -1).tolist())
    heads = table[(table.metric == "attention-entropy") & table["head"].notna()]
    assert len(heads) == 16
    means = table[(table.metric == "attention-entropy") & table["head"].isna()]
    assert means.value.tolist() == pytest.approx(found.matrix("attention-entropy").mean(1).tolist())
    stored = pd.read_csv(found.save(tmp_path / "out") / "blocks.csv")
    assert stored.value.tolist() == pytest.approx(table.value.tolist(), nan_ok=True)


def test_what_has_no_error_stands_in_blocks_with_blanks(found, tmp_path):
    values = np.arange(6.0).reshape(3, 2)
    square = np.arange(9.0).reshape(3, 3)
    made = {
        "weight-rank": MetricResult(("block", "matrix"), "made up", values=values, details={"matrices": ["q", "fc1"]}),
        "weight-similarity@depth": MetricResult(("block", "block"), "made up", values=square),
        "heads": MetricResult(("block", "head"), "made up", values=values),
        "curve": MetricResult(("depth",), "made up", values=values[:, 0], stderr=values[:, 1]),
        "refused": MetricResult(("block",), "made up", not_applicable="no blocks"),
        "counts": MetricResult(("threshold",), "made up", values=values[:, 0]),
    }
    findings = replace(found, metrics=made)
    table = findings.blocks
    kept = {name: part.drop(columns="metric") for name, part in table.groupby("metric", sort=False)}
    assert list(kept) == ["weight-rank/q", "weight-rank/fc1", "weight-similarity@depth", "heads", "curve"]
    for at, matrix in enumerate(("q", "fc1")):
        rows = kept[f"weight-rank/{matrix}"]
        assert rows.block.tolist() == [0, 1, 2]
        assert rows["head"].isna().all()
        assert rows.value.tolist() == values[:, at].tolist()
    across = kept["weight-similarity@depth"]
    assert (across.block.tolist(), across.value.tolist()) == ([1, 2], [square[1, 0], square[2, 1]])
    assert kept["heads"]["head"].tolist() == [0, 1] * 3
    assert kept["heads"].value.tolist() == values.ravel().tolist()
    assert kept["curve"].stderr.tolist() == values[:, 1].tolist()
    blank = table[table.metric != "curve"][["stderr", "ci_low", "ci_high"]]
    assert blank.isna().all(axis=None)
    lines = (findings.save(tmp_path / "out") / "blocks.csv").read_text(encoding="utf-8").splitlines()
    assert lines[1:3] == ["weight-rank/q,0,,0.0" + 10 * ",", "weight-rank/q,1,,2.0" + 10 * ","]
    pd.testing.assert_frame_equal(Findings.load(tmp_path / "out").blocks, table)


def test_per_image_values_average_to_the_values(found):
    assert np.diag(found.matrix("attention-similarity"), -1) == pytest.approx(found.images["attention-similarity"].mean(0))
    assert found.matrix("patch-diversity") == pytest.approx(found.images["patch-diversity"].mean(0))
    assert found.matrix("head-similarity") == pytest.approx(found.images["head-similarity"].mean(0))


def test_intervals_are_those_of_the_mean(found):
    values = found.images["attention-similarity"]
    reading, n = found.metrics["attention-similarity"], len(values)
    stderr = values.std(0, ddof=1) / math.sqrt(n)
    assert np.diag(reading.stderr, -1) == pytest.approx(stderr, rel=1e-5)
    low, high = (np.diag(reading.ci95[..., end], -1) for end in (0, 1))
    ends = parts_interval(mean_parts(values))
    assert (low, high) == (pytest.approx(ends[:, 0], rel=1e-4), pytest.approx(ends[:, 1], rel=1e-4))
    reach = 2.5705818 * stderr  # the t distribution with 5 degrees of freedom
    assert np.minimum(values.mean(0) - low, high - values.mean(0)) == pytest.approx(reach, rel=1e-3)


def test_unknown_metric_names_those_that_are_there(found):
    with pytest.raises(UnknownNameError, match="attention-similarity"):
        found.matrix("nonsense")


def fail_half_way(goal):
    with new_folder(goal) as inside:
        (inside / "half").write_text("written")
        raise ZeroDivisionError


def test_an_error_leaves_nothing_behind(tmp_path):
    goal = tmp_path / "deep" / "er" / "out"
    with pytest.raises(ZeroDivisionError):
        fail_half_way(goal)
    assert list(tmp_path.iterdir()) == []


def test_an_existing_folder_keeps_what_is_not_ours(tmp_path):
    goal = tmp_path / "out"
    (goal / "figures").mkdir(parents=True)
    (goal / "mine.txt").write_text("mine")
    (goal / "findings.json").write_text("old")
    with new_folder(goal) as inside:
        (inside / "findings.json").write_text("new")
        (inside / "figures").mkdir()
        (inside / "figures" / "a.png").write_text("png")
    assert (goal / "mine.txt").read_text() == "mine"
    assert (goal / "findings.json").read_text() == "new"
    assert (goal / "figures" / "a.png").exists()
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_a_file_is_no_output_folder(tmp_path):
    (tmp_path / "taken").write_text("")
    with pytest.raises(OutputError, match="is a file"):
        check_writable(tmp_path / "taken")
    with pytest.raises(OutputError, match="cannot be written"):
        check_writable(tmp_path / "taken" / "below")


@pytest.mark.parametrize("text", ["", "{}", '{"schema": "other/2"}', "not json"])
def test_a_folder_that_is_no_findings_folder(tmp_path, text):
    (tmp_path / "findings.json").write_text(text)
    with pytest.raises(OutputError, match="findings"):
        Findings.load(tmp_path)


def test_a_module_is_given_back_as_it_came(photos):
    model = small_vit()
    model.train()
    model.blocks[1].eval()
    cp.analyze(model, str(photos), img_size=64, limit=2, gallery_images=0)
    assert model.training
    assert not model.blocks[1].training
    assert model.blocks[2].training


def test_findings_written_before_details_stood_apart_still_load(tmp_path):
    folder = synthetic(3).save(tmp_path / "out")
    content = json.loads((folder / "findings.json").read_text())
    weights = {"matrices": ["q", "k"], "full_rank": [[4.0, 4.0]]}
    entry = {**content["metrics"]["attention-entropy"], "settings": weights, "dims": ["block", "matrix"]}
    content["metrics"] = {"attention-entropy": content["metrics"]["attention-entropy"], "weight-rank": entry}
    for stored in content["metrics"].values():
        stored["settings"] |= stored.pop("details")
        del stored["description"]
    (folder / "findings.json").write_text(json.dumps(content))
    old = Findings.load(folder)
    assert old.metrics["attention-entropy"].details["tokens"] == [50] * 3
    assert old.metrics["weight-rank"].details["full_rank"] == [[4.0, 4.0]]
    assert {name: result.description.level for name, result in old.metrics.items()} == {
        "attention-entropy": "other",
        "weight-rank": "weights",
    }
    assert old.metrics["weight-rank"].description.title == "weight-rank"


def test_a_description_is_stored_with_its_metric(tmp_path):
    words = {"title": "How far", "seen": "A distance.", "limits": "Not near.", "level": "attention", "panel": "all keys"}
    stated = Description(**words, unit="pixels", top=1.0, logarithmic=True, reference=("uniform", "uniform attention"))
    found = synthetic(3)
    found = replace(found, metrics={"my-own": replace(found.metrics["patch-diversity"], description=stated)})
    assert Findings.load(found.save(tmp_path / "out")).metrics["my-own"].description == stated


def test_the_mean_over_heads_stands_beside_means_of_what_the_heads_have():
    rng = np.random.default_rng(0)
    values, chance, kappa, untrained = rng.uniform(size=(4, 3, 2))
    ends = np.stack([kappa - 0.1, kappa + 0.1], -1)
    nulls = Nulls({"other_token": chance, "kappa": kappa, "untrained": untrained}, {"untrained": 8}, kappa_ci95=ends)
    mean = (values.mean(1), np.full(3, 0.01), np.tile([0.2, 0.8], (3, 1)))
    kept = synthetic()["patch-diversity"]
    result = replace(kept, dims=("block", "head"), values=values, stderr=None, ci95=None, nulls=nulls, head_mean=mean)
    table = replace(synthetic(), metrics={"by-head": result}).frame()
    over = table[table["head"].isna()]
    for column, expected in (("value", values), ("chance_level", chance), ("kappa", kappa), ("untrained", untrained)):
        np.testing.assert_allclose(over[column], expected.mean(1))
        np.testing.assert_allclose(table[table["head"].notna()][column], expected.ravel())
    assert over["kappa_ci_low"].isna().all()
