"""What interventions report: the numbers against a slow reference, the sentences against their rules, folder and page."""

from __future__ import annotations

import copy
import html
import json
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from factories import small_vit
from torch import nn

import collapse_probe as cp
from collapse_probe.analysis.intervention.effects import effects_of
from collapse_probe.capture.edits.replacement import KINDS
from collapse_probe.data.images import ImageSet, open_data
from collapse_probe.errors import DataError, ModelError, OutputError, SettingError
from collapse_probe.models.loading import resolve
from collapse_probe.report.intervention.figures import draw_all
from collapse_probe.report.intervention.page import render, write_interventions
from collapse_probe.report.intervention.verdict import MIXED, ONLY_ALONE, SPARED, USED, case_of, headline, verdicts
from collapse_probe.results.intervention import Effect, Interventions

SIZE = 64


@pytest.fixture(scope="module")
def model():
    return small_vit(sharpness=6.0, depth=3)


@pytest.fixture(scope="module")
def digits():
    return open_data("bundled:digits", limit=12)


@pytest.fixture(scope="module")
def found(model, digits):
    return cp.intervene(model, digits, tuple(KINDS))


def pixels_and_labels(images: ImageSet, model):
    transform = resolve(model).preprocess.transform
    return torch.stack([transform(images[i]) for i in range(len(images))]), torch.tensor(images.labels)


class Zeros(nn.Module):
    def forward(self, x, *_, **__):
        return torch.zeros_like(x)


@torch.no_grad()
def test_the_numbers_are_those_of_a_model_changed_by_hand(model, digits, found):
    pixels, labels = pixels_and_labels(digits, model)
    plain = model(pixels).double()
    changed = copy.deepcopy(model)
    for first in (2, 1, 0):
        changed.blocks[first].attn = Zeros()
        effect = found.cumulative["skip"][2 - first]
        assert effect.blocks == tuple(range(first, 3))
        other = changed(pixels).double()
        kl = F.kl_div(other.log_softmax(1), plain.log_softmax(1), log_target=True, reduction="batchmean")
        right = [(x.argmax(1) == labels).double().mean() for x in (plain, other)]
        assert effect.kl == pytest.approx(float(kl), rel=1e-4)
        assert effect.agreement == pytest.approx(float((plain.argmax(1) == other.argmax(1)).double().mean()))
        assert effect.accuracy == pytest.approx(float(right[1]))
        assert effect.accuracy_change == pytest.approx(float(right[1] - right[0]))
        assert effect.kl_ci95[0] <= effect.kl <= effect.kl_ci95[1]
        assert effect.agreement_ci95[0] <= effect.agreement <= effect.agreement_ci95[1]
    assert found.plain["accuracy"] == pytest.approx(float((plain.argmax(1) == labels).double().mean()))


def test_the_sets_and_what_does_not_apply(found):
    assert [e.blocks for e in found.single["uniform"]] == [(0,), (1,), (2,)]
    assert [e.blocks for e in found.cumulative["share"]] == [(2,), (1, 2)]
    assert found.single["share"][0].not_applicable == "there is no block before it"
    assert found.cumulative["mean"][0] == replace(found.single["mean"][2])
    assert len(found.similarity["raw"]) == len(found.similarity["kappa"]) == 2


def test_some_blocks_alone(model, digits):
    some = cp.intervene(model, digits, "uniform", blocks=[2, 0])
    assert [e.blocks for e in some.single["uniform"]] == [(0,), (2,)]
    assert [e.blocks for e in some.cumulative["uniform"]] == [(2,), (0, 2)]


def test_batches_do_not_matter(model, digits, found):
    small = cp.intervene(model, digits, tuple(KINDS), batch_size=5)
    for kind in KINDS:
        for one, other in zip(found.single[kind], small.single[kind], strict=True):
            assert one.not_applicable == other.not_applicable
            if one.kl is not None:
                assert one.kl == pytest.approx(other.kl, rel=1e-3, abs=1e-9)


def test_a_model_whose_maps_are_all_the_same_loses_nothing_by_sharing(digits):
    model = small_vit(depth=3)
    with torch.no_grad():
        for block in model.blocks:
            block.attn.qkv.weight[:64] = 0
            block.attn.qkv.bias[:64] = 0
    same = cp.intervene(model, digits, ("share", "uniform", "mean"))
    for kind in same.single:
        assert all(e.kl == pytest.approx(0, abs=1e-8) for e in same.single[kind] if e.kl is not None)
        assert all(e.agreement == 1 for e in same.cumulative[kind])
    assert {a.case for a in verdicts(same)} == {SPARED}


def test_a_loader_with_labels_and_one_without(model):
    images = torch.randn(6, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(0))
    labels = torch.arange(6)
    with_labels = cp.intervene(model, [(images[:4], labels[:4]), (images[4:], labels[4:])], img_size=SIZE)
    without = cp.intervene(model, [images], img_size=SIZE)
    assert with_labels.plain["accuracy"] is not None
    assert without.plain["accuracy"] is None
    assert without.single["share"][1].accuracy is None
    assert with_labels.single["share"][1].kl == pytest.approx(without.single["share"][1].kl, rel=1e-4)


def test_the_folder_holds_everything(found, tmp_path):
    found.save(tmp_path / "out")
    back = Interventions.load(tmp_path / "out")
    assert json.dumps(back.to_json()) == json.dumps(found.to_json())
    assert back.single == found.single
    np.testing.assert_array_equal(back.images["kl"], found.images["kl"])
    assert back.images["kl"].shape == (len(found.plain["conditions"]), 12)
    assert found.summary["images"] == 12
    with pytest.raises(OutputError, match="interventions"):
        Interventions.load(tmp_path)
    (tmp_path / "interventions.json").write_text('{"schema": "other"}')
    with pytest.raises(OutputError, match="other"):
        Interventions.load(tmp_path)


def test_the_page_stands_alone(found, tmp_path):
    page = write_interventions(found, tmp_path).read_text(encoding="utf-8")
    assert {p.name for p in (tmp_path / "figures").iterdir()} == {
        f"{name}.svg" for name in ("one-at-a-time", "cumulative", "beside-similarity")
    }
    assert "http://" not in page.replace("http://www.w3.org", "")
    assert "https://" not in page
    for answer in verdicts(found):
        assert html.escape(answer.sentences[0].split("(")[0], quote=False).replace("'", "&#39;") in page
    assert "there is no block before it" in page


def test_figures_name_what_stands_along_their_axes(found):
    drawings = draw_all(found)
    for name, label in {"one-at-a-time": "block", "cumulative": "first replaced block b"}.items():
        assert drawings[name].content().decode().count(f">{label}</text>") == 3


def test_one_image_and_one_block_have_intervals_of_shares_alone(model, digits):
    one = cp.intervene(model, digits.subset(1), "identity", blocks=[1])
    effect = one.single["identity"][0]
    assert effect.kl is not None
    assert effect.kl_ci95 is None
    assert effect.agreement_ci95 == pytest.approx((0.206549, 1.0), abs=1e-5)
    assert verdicts(one)[0].sentences[0] == "Only block 1 of 3 was tried."
    assert len(verdicts(one)[0].sentences) == 3
    assert "one-at-a-time" in draw_all(one)
    assert "cumulative" not in draw_all(one)
    assert render(one)


def effect(agreement, kl=0.1, blocks=(1,)):
    return Effect("share", blocks, kl=kl, agreement=agreement)


@pytest.mark.parametrize(
    ("single", "whole", "case"),
    [
        ([0.99, 0.96], 0.95, SPARED),
        ([0.99, 0.96], 0.94, ONLY_ALONE),
        ([0.99, 0.5], 0.94, MIXED),
        ([0.94, 0.5, 0.99], 0.4, USED),
    ],
)
def test_each_case_has_its_rule(single, whole, case):
    assert case_of([effect(a) for a in single], effect(whole)) == case


def test_the_sentences_follow_the_numbers(found):
    single = tuple(effect(a, kl, (b,)) for b, (a, kl) in enumerate([(1.0, 0.01), (0.5, 0.7), (0.97, 0.02)]))
    turned = replace(found, single={"share": single}, cumulative={"share": (single[2], effect(0.6, 0.8, (1, 2)))})
    answer = verdicts(turned)[0]
    assert "in 2 of 3 blocks" in answer.sentences[0]
    assert "block 1 changes the output most (50.0 % of the top answers stay; KL 0.700 nats)" in answer.sentences[0]
    assert "In all 3 together 60.0 %" in answer.sentences[1]
    assert len(answer.sentences) == 2  # one block alone is no "from a block on"
    cumulative = (single[2], effect(0.96, 0.1, (1, 2)), effect(0.6, 0.8, (0, 1, 2)))
    upper = verdicts(replace(turned, cumulative={"share": cumulative}))[0].sentences[2]
    assert upper == "From block 1 on, all maps can be replaced together: 96.0 % of the top answers stay; KL 0.100 nats."
    some = replace(turned, model={**found.model, "blocks": 12}, run={**found.run, "blocks": [0, 1, 2]})
    said = verdicts(replace(some, cumulative={"share": cumulative}))[0].sentences
    assert said[0] == "Only blocks 0–2 of 12 were tried."
    assert said[3].startswith("The maps of blocks 1–2 can be replaced together: 96.0 %")  # of blocks above nothing is known
    fallen = (single[2], effect(0.6, 0.1, (1, 2)), effect(0.99, 0.8, (0, 1, 2)))  # what comes back later does not count
    assert len(verdicts(replace(turned, cumulative={"share": fallen}))[0].sentences) == 2
    assert headline([answer], turned) == "Own attention maps are needed in some blocks"
    assert any("random" in c for c in verdicts(replace(turned, model={**found.model, "weights": "random (seed 0)"}))[0].caveats)
    assert any("raw similarity" in c for c in answer.caveats)


def test_effects_against_numbers_worked_by_hand():
    kl = np.array([[0.0, 0.0, 0.0, 0.0], [0.1, 0.2, 0.3, 0.4]])
    plain, replaced, labels = np.array([0, 1, 2, 1]), np.array([[0, 1, 2, 1], [0, 1, 1, 2]]), np.array([0, 1, 2, 1])
    same, other = effects_of([("mean", (0,)), ("mean", (1,))], kl, plain, replaced, labels)
    assert (same.kl, same.kl_ci95, same.agreement, same.accuracy, same.accuracy_change) == (0, None, 1, 1, 0)
    assert (other.kl, other.agreement, other.accuracy, other.accuracy_change) == (pytest.approx(0.25), 0.5, 0.5, -0.5)
    # Wilson for 2 of 4: (p + z²/2n ± z √(p(1 − p)/n + z²/4n²)) / (1 + z²/n), z = 1.959964
    assert other.agreement_ci95 == pytest.approx((0.150036, 0.849964), abs=1e-5)
    assert same.agreement_ci95 == pytest.approx((4 / (4 + 1.959964**2), 1), abs=1e-5)
    # Tango's interval without a discordant image: ± z²/(n + z²)
    assert same.accuracy_change_ci95 == pytest.approx((-0.489891, 0.489891), abs=1e-5)


@pytest.mark.parametrize(
    ("options", "error", "said"),
    [
        ({"replace": ("shar",)}, SettingError, "share, mean, donor, uniform"),
        ({"replace": ()}, SettingError, "none"),
        ({"blocks": [3]}, SettingError, "blocks 0 to 2"),
        ({"blocks": [0]}, SettingError, "no block before"),
    ],
)
def test_mistakes_are_told(model, digits, options, error, said):
    with pytest.raises(error, match=said):
        cp.intervene(model, digits, **options)


def test_an_iterator_and_a_model_without_logits_are_refused(model):
    images = torch.zeros(2, 3, SIZE, SIZE)
    with pytest.raises(DataError, match="more than once"):
        cp.intervene(model, iter([images]))
    with pytest.raises(ModelError, match="logits"):
        cp.intervene(
            nn.Sequential(model, nn.Unflatten(1, (2, 5))).eval(), [images + torch.randn(2, 3, SIZE, SIZE)], img_size=SIZE
        )


def test_a_module_comes_back_as_it_was(digits):
    model = small_vit(depth=2).train()
    cp.intervene(model, digits, "uniform")
    assert all(module.training for module in model.modules())
