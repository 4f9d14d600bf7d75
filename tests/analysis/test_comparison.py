"""Comparing subjects: pairing by image, what is refused, what is measured beside, and the folder."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from factories import findings_of, small_vit
from torch import nn

from collapse_probe.analysis.analyze import measured
from collapse_probe.analysis.compare import compare
from collapse_probe.analysis.comparison.pairing import pair_up
from collapse_probe.analysis.comparison.subjects import ModelOptions, natural, open_subjects, stem, unique
from collapse_probe.analysis.measurement import RunSettings
from collapse_probe.analysis.outputs import labels_for, logits_in, mean_kl
from collapse_probe.data.images import open_data
from collapse_probe.errors import CheckpointError, DataError, OutputError, SettingError
from collapse_probe.models.cost import measure_cost
from collapse_probe.models.loading import resolve
from collapse_probe.report.comparison.verdict import verdicts
from collapse_probe.results.comparison import Comparison
from collapse_probe.results.findings import Findings

LABELS = ("one", "other")
QUICK = {"batch_size": 8, "null_images": 0}


@pytest.fixture(scope="module")
def digits():
    return open_data("bundled:digits", limit=12)


@pytest.fixture(scope="module")
def models(digits):
    """A model, the same again, one with block 2 copied out of block 1, and a deeper one."""
    copied = small_vit(sharpness=6.0)
    copied.blocks[2].load_state_dict(copied.blocks[1].state_dict())
    named = {
        "plain": small_vit(sharpness=6.0),
        "again": small_vit(sharpness=6.0),
        "copied": copied,
        "deeper": small_vit(sharpness=6.0, depth=5),
    }
    return compare(named, digits, **QUICK)


@pytest.fixture
def made():
    """Two findings of eight images, three pairs of blocks."""
    rng = np.random.default_rng(0)
    return [findings_of(*rng.uniform(0.2, 0.8, (2, 8, 3))) for _ in range(2)]


def test_a_model_with_itself_differs_by_exactly_nothing(models):
    pair = models.pairs[0]
    assert {"attention-similarity", "attention-similarity/kappa", "patch-diversity", "accuracy"} <= set(pair.differences)
    for name, difference in pair.differences.items():
        for paired in (difference.paired, difference.overall):
            assert (paired.difference == 0).all()
            known = np.isfinite(paired.ci95).all(1)  # not of what is the same in every image
            assert set(paired.interval) <= ({"Tango"} if name == "accuracy" else {"identical", "none"}), name
            assert (paired.ci95[known] == 0).all() != (name == "accuracy")
            assert (paired.p[known] == 1).all()
            assert (paired.q[known] == 1).all()
    (low, high), *_ = pair.differences["accuracy"].paired.ci95
    assert low < 0 < high, "answers that were the same need not be on other images"
    assert "identical" in pair.differences["attention-similarity/kappa"].overall.interval
    assert all(count.first == count.second and count.ci95 == (0, 0) for count in pair.counts)
    assert (pair.agreement.top1, pair.agreement.kl) == (1.0, 0.0)
    said = verdicts(models)[0]
    assert said.case == "same"
    assert "no difference" in said.sentences[0]


def test_a_copied_block_is_found(models):
    kappa = models.pairs[1].differences["attention-similarity/kappa"]
    assert kappa.places == (1, 2, 3)
    assert kappa.places[int(np.argmax(np.abs(kappa.paired.difference)))] == 2
    assert kappa.paired.difference[1] > 0.3
    assert kappa.paired.q[1] < 0.01
    assert kappa.paired.difference[0] == 0  # block 1 and 0 stayed as they were
    said = verdicts(models)[1]
    assert said.case == "blocks"
    assert "block 2 attends more like block 1 than in plain" in said.sentences[0]


def test_other_depths_are_compared_by_summary_and_say_so(models):
    pair = models.pairs[2]
    assert set(pair.differences) == {"accuracy"}
    assert "plain has 3 pairs, deeper has 4 pairs" in pair.not_comparable["attention-similarity"]
    assert [(c.first, c.second) for c in pair.counts]  # counts need no blocks in common
    said = verdicts(models)[2]
    assert said.case == "by-summary"
    assert "cannot be paired block by block" in said.sentences[0]


def test_the_difference_is_that_of_the_findings(models):
    plain, copied = models.subjects["plain"], models.subjects["copied"]
    found = models.pairs[1].differences
    for name in ("attention-similarity", "attention-similarity@row", "feature-similarity"):
        expected = np.diagonal(copied.matrix(name) - plain.matrix(name), -1)
        np.testing.assert_allclose(found[name].paired.difference, expected, atol=1e-9)
        kappas = [f.metrics[name].nulls.values["kappa"] for f in (plain, copied)]
        np.testing.assert_allclose(found[f"{name}/kappa"].paired.difference, np.diagonal(kappas[1] - kappas[0], -1), atol=1e-9)
    for name in ("head-similarity", "patch-diversity"):
        np.testing.assert_allclose(found[name].paired.difference, copied.matrix(name) - plain.matrix(name), atol=1e-9)
    entropy = [f.metrics["attention-entropy"].head_mean[0] for f in (plain, copied)]
    np.testing.assert_allclose(found["attention-entropy"].paired.difference, entropy[1] - entropy[0], atol=1e-9)


def test_accuracy_and_cost_are_measured(models):
    plain, deeper = models.subjects["plain"], models.subjects["deeper"]
    assert plain.summary["accuracy"] == np.mean(plain.images["top1"] == plain.images["label"])
    assert models.pairs[1].differences["accuracy"].overall.first[0] == pytest.approx(plain.summary["accuracy"])
    assert deeper.run["cost"]["flops"] > 1.2 * plain.run["cost"]["flops"] > 0
    assert plain.run["cost"]["parameters"] == plain.model["parameters"]
    assert plain.run["cost"]["images_per_second"] > 0
    assert 0 < models.pairs[1].agreement.kl < 5
    assert models.numbers("deeper")["accuracy_difference"] == deeper.summary["accuracy"] - plain.summary["accuracy"]
    assert models.numbers("plain")["similar_blocks_difference"] == 0


def test_saved_and_loaded_it_is_the_same(models, tmp_path):
    models.save(tmp_path / "out")
    content = json.loads((tmp_path / "out" / "comparison.json").read_text())
    assert content["schema"] == "collapse-probe/comparison/1"
    assert [s["folder"] for s in content["subjects"]] == [f"subjects/{label}" for label in models.subjects]
    back = Comparison.load(tmp_path / "out")
    assert back.to_json() == models.to_json() == content
    again = compare({label: tmp_path / "out" / "subjects" / label for label in ("plain", "copied")})
    first, second = again.pairs[0].differences, models.pairs[1].differences
    for name in second:
        np.testing.assert_array_equal(first[name].paired.difference, second[name].paired.difference)
        np.testing.assert_array_equal(first[name].paired.ci95, second[name].paired.ci95)
    assert again.pairs[0].agreement.top1 == models.pairs[1].agreement.top1
    assert again.pairs[0].agreement.kl is None


def test_labels_that_no_file_system_takes_get_folders_of_their_own(made, tmp_path):
    one, other = made
    compare({"a/b": one, "a:b": other, "…": other}).save(tmp_path / "out")
    assert sorted(p.name for p in (tmp_path / "out" / "subjects").iterdir()) == ["a-b", "a-b-2", "subject"]
    assert list(Comparison.load(tmp_path / "out").subjects) == ["a/b", "a:b", "…"]


def test_a_folder_that_is_no_comparison_is_refused(tmp_path):
    with pytest.raises(OutputError, match="no comparison"):
        Comparison.load(tmp_path)
    (tmp_path / "comparison.json").write_text('{"schema": "other/1"}')
    with pytest.raises(OutputError, match="other/1"):
        Comparison.load(tmp_path)


def test_images_are_paired_by_name_in_whatever_order(made):
    one, other = made
    order = np.random.default_rng(1).permutation(8)
    shuffled = replace(other, images={key: values[order] for key, values in other.images.items()})
    straight, turned = pair_up(one, other, LABELS), pair_up(one, shuffled, LABELS)
    for name, difference in straight.differences.items():
        np.testing.assert_array_equal(turned.differences[name].paired.p, difference.paired.p)
        np.testing.assert_array_equal(turned.differences[name].paired.difference, difference.paired.difference)


@pytest.mark.parametrize(
    ("names", "said"),
    [
        (["image 0", "image 9", *[f"image {i}" for i in range(2, 8)]], "'image 1' is only in one"),
        ([f"image {i}" for i in range(9)], "'image 8' is only in other"),
        (["image 0", "image 0", *[f"image {i}" for i in range(1, 8)]], "'image 0' is 1 times in one, 2 times in other"),
    ],
)
def test_other_images_are_refused_naming_the_first_difference(made, names, said):
    raw = np.full((len(names), 3), 0.5)
    with pytest.raises(DataError, match=said) as caught:
        pair_up(made[0], findings_of(raw, raw, names=names), LABELS)
    assert "names_sha256" in str(caught.value)


def test_findings_without_names_are_told_apart_by_their_fingerprint(made):
    bare = [replace(f, images={}) for f in made]
    assert pair_up(*bare, LABELS).differences == {}
    other = replace(bare[1], data={**bare[1].data, "names_sha256": "f" * 64})
    with pytest.raises(DataError, match="ffffffffffff"):
        pair_up(bare[0], other, LABELS)


def test_undefined_images_are_left_out_and_counted(made):
    one, other = made
    holed = one.images["attention-similarity"].copy()
    holed[:3, 1] = np.nan
    pair = pair_up(replace(one, images={**one.images, "attention-similarity": holed}), other, LABELS)
    for name in ("attention-similarity", "attention-similarity/kappa"):
        assert pair.differences[name].paired.left_out.tolist() == [0, 3, 0]
        assert pair.differences[name].paired.images.tolist() == [8, 5, 8]


def test_the_softmax_of_a_plain_model_is_what_multiplies_its_values(made):
    one, other = made
    metrics = {**other.metrics, "attention-similarity@probs": other.metrics["attention-similarity"]}
    images = {**other.images}
    for key in ("attention-similarity", "attention-similarity/other_token"):
        images[key.replace("similarity", "similarity@probs")] = other.images[key] + 0.1
    mixed = replace(other, metrics=metrics, images=images, model={**other.model, "mixes_maps": True})
    pair = pair_up(one, mixed, LABELS)
    plain, probs = (pair.differences[f"attention-similarity{at}"].paired for at in ("", "@probs"))
    np.testing.assert_array_equal(plain.first, probs.first)
    np.testing.assert_allclose(probs.difference - plain.difference, 0.1)
    assert "attention-similarity@probs" not in pair_up(one, other, LABELS).differences


def test_models_need_data(made):
    with pytest.raises(DataError, match="--data"):
        compare({"model": small_vit(), "folder": made[0]})


def test_a_module_comes_back_as_it_was(digits):
    model = small_vit(depth=2).train()
    compare({"one": model, "other": small_vit(seed=1, depth=2)}, digits, metrics=("patch-diversity",), **QUICK)
    assert model.training
    assert all(module.training for module in model.modules())


class TestLineup:
    def test_checkpoints_of_a_folder_in_natural_order(self, tmp_path):
        for epoch in (10, 2, 1):
            torch.save(nn.Linear(1, 1).state_dict(), tmp_path / f"epoch-{epoch}.pth")
        (tmp_path / "log.txt").write_text("no checkpoint")
        specs, trajectory = open_subjects([tmp_path], ModelOptions("timm:vit_tiny_patch16_224"))
        assert [spec.label for spec in specs] == ["epoch-1", "epoch-2", "epoch-10"]
        assert trajectory
        assert not open_subjects([tmp_path, "timm:deit_tiny_patch16_224"], ModelOptions("timm:x"))[1]

    def test_what_words_stand_for(self, made, tmp_path):
        made[0].save(tmp_path / "runs" / "a")
        torch.save({}, tmp_path / "b.pth.tar")
        words = [tmp_path / "runs" / "a", str(tmp_path / "b.pth.tar"), "timm:vit_tiny_patch16_224", "hf-hub:org/vit"]
        specs, _ = open_subjects(words, ModelOptions("timm:vit_tiny_patch16_224"))
        assert [(spec.label, spec.is_model) for spec in specs] == [
            ("a", False),
            ("b", True),
            ("vit_tiny_patch16_224", True),
            ("vit", True),
        ]
        assert isinstance(specs[0].open(), Findings)

    def test_too_few_missing_and_empty(self, made, tmp_path):
        with pytest.raises(SettingError, match="two or more subjects"):
            open_subjects([made[0]], ModelOptions())
        with pytest.raises(CheckpointError, match="neither findings"):
            open_subjects([tmp_path, made[0]], ModelOptions())
        with pytest.raises(CheckpointError, match=r"no checkpoint .*a\.pth"):
            open_subjects([made[0], tmp_path / "a.pth"], ModelOptions("timm:vit_tiny_patch16_224"))

    def test_a_checkpoint_of_no_known_layout_asks_for_its_model(self, tmp_path):
        torch.save(nn.Linear(2, 2).state_dict(), tmp_path / "a.pth")
        with pytest.raises(CheckpointError, match="--model"):
            open_subjects([tmp_path / "a.pth"] * 2, ModelOptions())[0][0].open()

    def test_one_model_with_a_fix_stands_beside_itself_without(self):
        specs, _ = open_subjects(["timm:vit_tiny_patch16_224"], ModelOptions(fixes=("attn-scale",)))
        assert [spec.label for spec in specs] == ["vit_tiny_patch16_224", "vit_tiny_patch16_224+attn-scale"]

    def test_names(self, tmp_path):
        assert unique(["a", "a", "a (2)", "b"]) == ["a", "a (2)", "a (2) (2)", "b"]
        assert len(set(unique(["x" * 90, "x" * 90]))) == 2
        assert stem(tmp_path / "model.v1.pth.tar") == "model.v1"
        assert sorted(["e10", "E2", "e1"], key=natural) == ["e1", "E2", "e10"]


def test_an_official_deepvit_checkpoint_tells_its_own_architecture(tmp_path):
    import timm

    from collapse_probe.analysis.comparison.subjects import deepvit_of

    model = timm.create_model("deepvit_patch16_224_re_attn_16b", num_classes=3)
    torch.save({"state_dict": {f"module.{k}": v for k, v in model.state_dict().items()}}, tmp_path / "a.pth")
    assert deepvit_of(tmp_path / "a.pth") == ("ours:deepvit_patch16_224_re_attn_16b", {"num_classes": 3})


class TestOutputs:
    @pytest.mark.parametrize("output", [torch.zeros(2, 3, 4), torch.zeros(2, 1), (torch.zeros(2, 3),), {"logits": 1}])
    def test_an_output_that_is_no_vector_of_logits(self, output):
        assert isinstance(logits_in(output, 2), str)

    def test_outputs_are_in_the_order_of_the_findings(self):
        pixels, settings = torch.randn(5, 3, 64, 64), RunSettings(null_images=0, metrics=("patch-diversity",), device="cpu")
        subject = resolve(small_vit())
        found, outputs = measured(subject, pixels, settings, keep_logits=True)
        with torch.no_grad():
            expected = subject.model(pixels)
        assert outputs.names == tuple(found.images["names"].tolist()) == tuple("01234")
        assert outputs.logits == pytest.approx(expected.numpy(), abs=1e-6)

    def test_labels_are_classes_of_the_data(self, photos):
        digits, loader = open_data("bundled:digits", limit=5), [torch.zeros(2, 3, 4, 4)]
        assert labels_for(digits.names[::-1], digits, 10)[0].tolist() == digits.labels[::-1]
        assert labels_for(digits.names, digits, 1000) == (None, "the data have 10 classes, the output 1000")
        assert labels_for(["a"], open_data(str(photos)), 2, {}) == (None, "the data have no labels")
        assert labels_for(["b", "a"], loader, 2, {"a": 1, "b": 0})[0].tolist() == [0, 1]
        assert labels_for(["b", "a"], loader, 2, {"a": 1}) == (None, "the data have no labels")
        assert labels_for(["b", "a"], loader, 2, {"a": 2, "b": 0}) == (None, "the labels run to 2, the output has 2 classes")

    def test_the_divergence_is_that_of_the_formula(self):
        first = np.log(np.array([[0.75, 0.25]], dtype=np.float32))
        second = np.zeros((1, 2), dtype=np.float32)
        assert mean_kl(first, second) == pytest.approx(0.75 * np.log(1.5) + 0.25 * np.log(0.5), abs=1e-6)
        assert mean_kl(first + 9, first) == pytest.approx(0, abs=1e-6)


def test_operations_are_counted_whether_attention_is_fused_or_not():
    fused, plain = small_vit(), small_vit()
    for block in plain.blocks:
        block.attn.fused_attn = False
    found = [measure_cost(model, (3, 64, 64), 2) for model in (fused, plain)]
    assert found[0].flops == found[1].flops
    linear = sum(2 * p.numel() * 17 for n, p in fused.blocks.named_parameters() if p.ndim == 2)
    attention = 4 * 2 * 2 * 17 * 17 * 64  # blocks, two products, two operations, tokens², width
    rest = 2 * 3 * 16 * 16 * 64 * 16 + 2 * 64 * 10  # patches and head
    assert found[0].flops == linear + attention + rest


def test_a_subject_that_cannot_be_opened_is_told():
    with pytest.raises(OutputError, match=r"the subject x+ cannot be opened \(File name too long\)"):
        compare(["x" * 5000, "y"])
