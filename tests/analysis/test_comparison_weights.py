"""Comparing the weights of models: which numbers are set against each other, and that nothing is tested."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from collapse_probe.cli.main import main
from factories import small_vit

import collapse_probe as cp
from collapse_probe.analysis.compare import compare
from collapse_probe.capture.weights.matrices import NAMES
from collapse_probe.data.images import open_data
from collapse_probe.report.comparison.page import paired, render
from collapse_probe.report.comparison.verdict import verdicts, weights_sentence
from collapse_probe.results.comparison import Comparison

METRICS = ("weight-rank", "weight-similarity", "weight-similarity@depth")


def spoiled(block=2):
    """A small model in which one block's fc1 has rank one."""
    model = small_vit()
    with torch.no_grad():
        weight = model.blocks[block].mlp.fc1.weight
        weight.copy_(torch.outer(weight[:, 0], weight[0]))
    return model


@pytest.fixture(scope="module")
def both():
    return {"healthy": cp.analyze(small_vit(), metrics=METRICS), "spoiled": cp.analyze(spoiled(), metrics=METRICS)}


@pytest.fixture(scope="module")
def compared(both):
    return compare(both)


def test_every_matrix_of_every_block_is_set_against_its_like(both, compared):
    (pair,) = compared.pairs
    first, second = both.values()
    assert set(pair.differences) == {f"{name}/{m}" for name in METRICS[:2] for m in NAMES} | {METRICS[2]}
    assert pair.not_comparable == {}
    for name in METRICS[:2]:
        for m, matrix in enumerate(NAMES):
            found = pair.differences[f"{name}/{matrix}"]
            assert (found.axis, found.places) == ("block", (0, 1, 2, 3))
            for b in range(4):
                assert found.paired.difference[b] == second.matrix(name)[b, m] - first.matrix(name)[b, m]
            assert found.overall.first[0] == pytest.approx(sum(first.matrix(name)[:, m]) / 4)
    depth = pair.differences[METRICS[2]]
    assert depth.places == (1, 2, 3)
    for at, b in enumerate(depth.places):
        assert depth.paired.second[at] == second.matrix(METRICS[2])[b, b - 1]


def test_a_model_is_no_sample(compared):
    for difference in compared.pairs[0].differences.values():
        for numbers in (difference.paired, difference.overall):
            assert np.isnan([numbers.p, numbers.q, numbers.effect]).all()
            assert set(numbers.interval) == {"none"}
            assert np.isnan(numbers.ci95).all()
            assert (numbers.images == 0).all()


def test_the_difference_is_told_where_it_is(both, compared):
    text = weights_sentence(compared.pairs[0], *both.values())
    first, second = (found.matrix("weight-rank") for found in both.values())
    at = (2, NAMES.index("fc1"))
    assert "weight-similarity@depth" not in text
    means = f"weight-rank {second.mean():.3f} against {first.mean():.3f}"
    assert f"{means} (largest difference: fc1 of block 2, {second[at]:.3f} against {first[at]:.3f})" in text
    again = compare({"one": both["healthy"], "other": both["healthy"]})
    assert "No number of the weights differs between one and other" in weights_sentence(
        again.pairs[0], *again.subjects.values()
    )


def test_the_answer_is_about_the_weights(both, compared):
    (answer,) = verdicts(compared)
    assert answer.case == "weights"
    assert answer.sentences == (weights_sentence(compared.pairs[0], *both.values()),)
    assert answer.caveats == ("A model is no sample of weights: these differences have no interval and no p-value.",)
    assert "raw similarity" not in " ".join(answer.sentences)


def test_equal_weights_have_no_interval_either(both):
    found = compare({"one": both["healthy"], "other": both["healthy"]})
    for difference in found.pairs[0].differences.values():
        assert (difference.paired.difference == 0).all()
        assert np.isnan(difference.paired.ci95).all()
        assert difference.equal
        assert difference.unsampled


def test_a_matrix_that_neither_model_has_is_no_difference(both):
    reading = both["healthy"].metrics["weight-rank"]
    holes = np.where(np.arange(4)[:, None] == 1, np.nan, reading.values)
    bare = replace(both["healthy"], metrics={"weight-rank": replace(reading, values=holes)})
    other = replace(bare, metrics={"weight-rank": replace(reading, values=np.where(holes > 0, holes, 1.0))})
    assert all(d.equal for d in compare({"one": bare, "again": bare}).pairs[0].differences.values())
    assert not any(d.equal for d in compare({"one": bare, "other": other}).pairs[0].differences.values())


def test_the_page_says_nothing_of_images(compared):
    tables = {table.title: table for table in paired(compared.pairs[0])}
    pair = compared.pairs[0]
    means, blocks = tables["Means over blocks"], tables[f"{pair.second} − {pair.first}, by block"]
    assert means.header == ("mean over blocks", pair.first, pair.second, "difference")
    assert {row[0] for row in means.rows} == set(pair.differences)
    assert blocks.header == ("block", *pair.differences)
    assert [row[0] for row in blocks.rows] == ["0", "1", "2", "3"]
    assert not blocks.marked
    text = render(compared)
    assert "no interval and no test, for a model is no sample" in text
    assert "Outputs: none, for the weights alone were compared" in text
    assert "not known" not in text
    for word in ("95 % interval", "bootstrap", "Wilcoxon", "signed-rank", "KL("):
        assert word not in text


def test_beside_images_the_page_says_how_both_were_compared():
    digits, metrics = open_data("bundled:digits", limit=4), ("attention-similarity", "weight-rank")
    found = compare({"a": small_vit(), "b": small_vit(1)}, digits, metrics=metrics, null_images=0, batch_size=4)
    tables = {table.title: table for table in paired(found.pairs[0])}
    means = tables["Means over blocks"]
    rows = {row[0]: row for row in means.rows}
    assert rows["weight-rank/q"][means.header.index("95 % CI") :] == ("–",) * 5
    assert {"attention-similarity", "weight-rank/q"} <= {*tables["b − a, by block"].header}
    text = render(found)
    assert "matched-pairs rank-biserial" in text
    assert "no interval and no test, for a model is no sample" in text


def test_it_survives_its_folder(compared, tmp_path):
    again = Comparison.load(compared.save(tmp_path / "out"))
    assert again.to_json() == json.loads(json.dumps(compared.to_json()))


def test_other_shapes_are_refused(both):
    deeper = cp.analyze(small_vit(depth=5), metrics=METRICS)
    found = compare({"one": both["healthy"], "deeper": deeper})
    (pair,) = found.pairs
    assert pair.differences == {}
    assert pair.not_comparable["weight-rank"] == "other shapes: one has 4 block × 6 matrix, deeper has 5 block × 6 matrix"
    assert "cannot be compared block by block (weight-rank: other shapes" in weights_sentence(pair, *found.subjects.values())
    fewer = replace(both["spoiled"], metrics={"weight-rank": both["spoiled"].metrics["weight-rank"]})
    (pair,) = compare({"one": both["healthy"], "fewer": fewer}).pairs
    assert pair.not_comparable["weight-similarity"] == "not measured in fewer"


def test_weights_stand_beside_what_is_paired_by_image():
    digits, metrics = open_data("bundled:digits", limit=4), ("attention-similarity", "weight-rank")
    found = compare({"a": small_vit(), "b": small_vit()}, digits, metrics=metrics, null_images=0, batch_size=4)
    differences = found.pairs[0].differences
    assert {"attention-similarity", "weight-rank/q", "weight-rank/fc2"} <= set(differences)
    assert verdicts(found)[0].case == "same"


def test_two_folders_of_weights_from_the_shell(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    model = ["-m", "timm:vit_tiny_patch16_224", "--no-pretrained", "--img-size", "32", "--null-images", "0", "-q"]
    model += ["--model-kwargs", "depth=2 embed_dim=48 num_heads=3"]

    def call(*words):
        with pytest.raises(SystemExit) as stop:
            main(list(words))
        return stop.value.code, capsys.readouterr().out

    for seed in ("0", "1"):
        assert call("analyze", "--level", "weights", *model, "--seed", seed, "-o", f"seed-{seed}")[0] == 0
    code, out = call("compare", "seed-0", "seed-1", "-q", "-o", "out")
    assert code == 0
    assert out.startswith("The weights of seed-1 against those of seed-0, mean over blocks and matrices: weight-rank ")
    assert "weight rank mean" in out
    metrics = json.loads(Path("out/comparison.json").read_text(encoding="utf-8"))["pairs"][0]["metrics"]
    assert len(metrics) == 4 * len(NAMES) + 1
    of_heads = [
        np.array(json.loads(Path(f"seed-{s}/findings.json").read_text())["metrics"]["qk-spectrum"]["values"]) for s in "01"
    ]
    assert metrics["qk-spectrum"]["first"] == pytest.approx(of_heads[0].mean(1).tolist())
    assert metrics["qk-spectrum"]["second"] == pytest.approx(of_heads[1].mean(1).tolist())
    assert metrics["weight-rank/q"]["p"] == [None, None]
    page = Path("out/report.html").read_text(encoding="utf-8")
    assert ">weight-rank/fc1</th>" in page
    assert not re.search(r">\s*(nan|None)\s*<", page)
