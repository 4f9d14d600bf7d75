"""Numbers from which nothing can be read say so: constant outputs, and images that the model was trained on."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import timm
import torch
from collapse_probe.cli.summary import answer
from factories import small_vit

from collapse_probe.analysis.analyze import analyze
from collapse_probe.analysis.compare import compare
from collapse_probe.analysis.intervene import intervene
from collapse_probe.analysis.summary import pair_tests
from collapse_probe.data.images import open_data
from collapse_probe.data.splits import split_data
from collapse_probe.models.loading import resolve
from collapse_probe.report.comparison.verdict import verdicts as comparison_verdicts
from collapse_probe.report.intervention.page import render
from collapse_probe.report.intervention.verdict import NOT_READABLE
from collapse_probe.report.intervention.verdict import verdicts as intervention_verdicts
from collapse_probe.results.findings import MetricResult, Nulls
from collapse_probe.results.readings import trained_on

TINY = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2}
DIGITS, ENTROPY = "ours:digits-tied-mhsa", {"metrics": ("attention-entropy",), "null_images": 0, "gallery_images": 0}


def pictures(count=6):
    return [torch.randn(count, 3, 32, 32, generator=torch.Generator().manual_seed(0))]


def vit_with_head(change):
    vit = small_vit(**TINY)
    with torch.no_grad():
        change(vit.head)
    return vit


def zero(head):
    head.weight.zero_()


def rounding(head):
    head.weight.mul_(1e-9)
    head.bias.add_(1.0)


def tiny(head):
    head.weight.mul_(1e-9)
    head.bias.zero_()


def one_answer(head):
    head.bias[3] += 100


@pytest.mark.parametrize("change", [zero, rounding])
def test_replacing_attention_under_a_constant_head_reads_nothing(change):
    found = intervene(vit_with_head(change), pictures(), "share", blocks=[1], img_size=32)
    (verdict,) = intervention_verdicts(found)
    assert verdict.case == NOT_READABLE
    assert verdict.sentences[0].startswith(
        "Nothing can be read from replacing attention here: the model gives the same logits for"
    )
    assert "top answers" not in " ".join(verdict.sentences)
    assert "Nothing can be read" in render(found)


def test_a_small_head_is_read_and_one_answer_is_a_caveat():
    (verdict,) = intervention_verdicts(intervene(vit_with_head(tiny), pictures(), "share", blocks=[1], img_size=32))
    assert verdict.case != NOT_READABLE
    found = intervene(vit_with_head(one_answer), pictures(), "share", blocks=[1], img_size=32)
    (verdict,) = intervention_verdicts(found)
    assert found.plain["answers"] == 1
    assert any("the same answer to every image" in caveat for caveat in verdict.caveats)


def test_a_comparison_says_which_subject_answers_nothing():
    given = {"metrics": ("attention-similarity",), "null_images": 0, "gallery_images": 0, "img_size": 32}
    found = compare({"own": vit_with_head(tiny), "fresh": vit_with_head(zero)}, pictures(), **given)
    (verdict,) = comparison_verdicts(found)
    said = [caveat for caveat in verdict.caveats if "same logits for all images" in caveat]
    assert [caveat.partition(" gives")[0] for caveat in said] == ["fresh"]
    found = compare({"own": vit_with_head(tiny), "fresh": vit_with_head(zero)}, pictures(1), **given)
    assert not any("same logits" in caveat for caveat in comparison_verdicts(found)[0].caveats)  # one image is all there is


def test_one_image_that_was_trained_on_is_told_in_plain_words():
    assert trained_on({"trained_on": 1, "images": 1}) == "The model was trained on this image."
    assert trained_on({"trained_on": 0, "images": 1}) == "The image was not trained on: it was held out."
    assert trained_on({"trained_on": 1437, "images": 1797}).startswith("The model was trained on 1,437 of these 1,797 images:")


def test_bundled_models_say_how_many_of_their_images_they_were_trained_on():
    some = open_data("bundled:digits", limit=40)
    train = set(split_data("bundled:digits").train.names)
    count = len(train & set(some.names))
    assert 0 < count < 40
    found = analyze(DIGITS, some, **ENTROPY)
    assert found.data["trained_on"] == count
    said = f"The model was trained on {count} of these 40 images: numbers and accuracy are not those of unseen images."
    assert said in found.run["notes"]
    held_out = analyze(DIGITS, split_data("bundled:digits").held_out.subset(8), **ENTROPY)
    assert held_out.data["trained_on"] == 0
    assert "None of these 8 images was trained on: they were held out." in held_out.run["notes"]


@pytest.mark.parametrize("case", ["untrained", "other data", "own loader"])
def test_nothing_is_said_where_nothing_is_known(case):
    images = open_data("bundled:photos" if case == "other data" else "bundled:digits", limit=4)
    subject = resolve(DIGITS, pretrained=False if case == "untrained" else None)
    given = [torch.stack([subject.preprocess.transform(images[i]) for i in range(4)])] if case == "own loader" else images
    found = analyze(subject, given, **ENTROPY)
    assert found.data["trained_on"] is None
    assert not any("trained on" in note for note in found.run["notes"])


def test_comparison_intervention_and_terminal_say_it_too():
    def known(result):
        return replace(result, data={**result.data, "trained_on": 4})

    said, given = "The model was trained on 4 of these 6 images", {"null_images": 0, "gallery_images": 0, "img_size": 32}
    (images,) = pictures()
    replaced = known(intervene(small_vit(**TINY), [(images, torch.arange(6))], "share", blocks=[1], img_size=32))
    assert any(caveat.startswith(said) for caveat in intervention_verdicts(replaced)[0].caveats)
    assert "(4 of the 6 images were trained on)" in render(replaced)
    models = {"one": small_vit(**TINY), "other": small_vit(seed=1, **TINY)}
    compared = compare(models, [images], metrics=("attention-similarity",), **given)
    compared = replace(compared, subjects={label: known(findings) for label, findings in compared.subjects.items()})
    assert sum(said in caveat for caveat in comparison_verdicts(compared)[0].caveats) == 2
    assert f"Note: {said}" in answer(compared.subjects["one"])


@pytest.mark.parametrize(("difference", "significant"), [(3e-6, 0), (-3e-6, 0), (1e-4, 2)])
def test_differences_within_the_rounding_of_float32_are_never_found(difference, significant):
    rng = np.random.default_rng(0)
    null = rng.uniform(0.2, 0.9, (64, 2))
    real, token = (np.full((3, 3), np.nan) for _ in range(2))
    token[[1, 2], [0, 1]] = null.mean(0)
    real[[1, 2], [0, 1]] = (null + difference + rng.normal(0, 1e-7, null.shape)).mean(0)
    p = np.where(np.isfinite(real), 1e-6, np.nan)
    nulls = Nulls({"other_token": token}, {"other_token": 64}, {}, beyond_p=p)
    test = pair_tests({"x": MetricResult(("block", "block"), "", values=real, nulls=nulls)})["x"]
    assert test["tested"] == 2
    assert test["significant"] == test["all_pairs"]["significant"] == significant
    assert test["within_rounding"] == (2 if not significant else 0)
    assert ("within the rounding of float32" in test["sentence"]) == (not significant)


def swin(seed):
    """A model with five pairs of consecutive blocks, of which one has maps of the same tokens."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return timm.models.SwinTransformer(
            img_size=64, patch_size=4, window_size=4, embed_dim=24, depths=(2, 2, 2), num_heads=(1, 2, 4), num_classes=4
        ).eval()


def test_few_comparable_pairs_are_said_first_in_run_and_comparison():
    given = {"metrics": ("attention-similarity", "similar-blocks"), "null_images": 0, "gallery_images": 0, "img_size": 64}
    images = [torch.randn(6, 3, 64, 64, generator=torch.Generator().manual_seed(0))]
    compared = compare({"one": swin(0), "other": swin(1)}, images, **given)
    (verdict,) = comparison_verdicts(compared)
    assert verdict.sentences[0].startswith(
        "1 of 5 pairs of consecutive blocks can be compared; not with the block before: block"
    )
    own = compared.subjects["one"]
    assert own.answer["sentences"][0].startswith("1 of 5 pairs of consecutive blocks are compared; without the block before")
    assert own.summary["similar_blocks_pairs"] == own.metrics["similar-blocks"].details["pairs"] == 1
    assert "0 of 1 pairs" in answer(own)


def test_where_no_pair_can_be_compared_no_difference_is_denied():
    given = {"metrics": ("attention-similarity",), "null_images": 0, "gallery_images": 0, "img_size": 64}
    models = {"one": swin(0), "other": swin(1)}
    for model in models.values():
        model.layers[2] = torch.nn.Identity()
        model.norm, model.head = torch.nn.LayerNorm(48), torch.nn.Identity()
    images = [torch.randn(6, 3, 64, 64, generator=torch.Generator().manual_seed(0))]
    (verdict,) = comparison_verdicts(compare(models, images, **given))
    assert verdict.case == "by-summary"
    said = " ".join(verdict.sentences)
    assert "0 of 3 pairs" in said
    assert "no difference" not in said
    assert "–" not in said.replace("1–3", "")
