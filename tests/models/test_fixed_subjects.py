"""Subjects changed before they are measured: fixes put in and BatchNorm recalibrated, and everything says so."""

from __future__ import annotations

import pytest
import torch
from collapse_probe.cli.options import blocks_in
from torch import nn

from collapse_probe.analysis.analyze import measure
from collapse_probe.analysis.measurement import RunSettings
from collapse_probe.data.images import open_data
from collapse_probe.errors import CheckpointError, ModelError, SettingError, UnknownNameError
from collapse_probe.models.batchnorm import recalibrated
from collapse_probe.models.loading import resolve, with_fixes

ADDRESS = "timm:vit_tiny_patch16_224"


def subject(**settings):
    return resolve(ADDRESS, pretrained=False, img_size=32, model_kwargs={"depth": 3, "num_classes": 5}, **settings)


@pytest.fixture
def images():
    return torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))


def test_a_neutral_fix_changes_nothing_but_the_names(images):
    plain = subject()
    expected = plain.model(images)
    fixed = with_fixes(subject(), ["re-attention"], [1, 2])
    torch.testing.assert_close(fixed.model(images), expected)
    assert fixed.address == f"{ADDRESS} + re-attention in blocks 1, 2 (neutral)"
    assert fixed.name == "vit_tiny_patch16_224+re-attention"
    assert fixed.notes[-1] == "fixes put into the model: re-attention in blocks 1, 2 (neutral)"
    assert [b for m in fixed.model.fixes for b in m.blocks] == [1, 2]


def test_settings_of_ones_own_and_several_fixes(images):
    fixed = with_fixes(subject(), ["re-attention:norm=batch"])
    assert "norm=batch, init=random" in fixed.address
    assert not torch.allclose(fixed.model(images), subject().model(images))
    two = with_fixes(subject(), ["attn-scale:init=0.5", "layer-scale"])
    assert [m.name for m in two.model.fixes] == ["attn-scale", "layer-scale"]
    assert two.name.endswith("+attn-scale+layer-scale")


def test_the_untrained_twin_carries_the_fix():
    fixed = with_fixes(subject(), ["re-attention:norm=batch"], [1])
    twin = fixed.fresh(7)
    assert [m.blocks for m in twin.fixes] == [(1,)]
    assert twin.state_dict().keys() == fixed.model.state_dict().keys()
    again = fixed.fresh(7)
    assert all(torch.equal(a, b) for a, b in zip(twin.state_dict().values(), again.state_dict().values(), strict=True))


def test_the_global_generator_is_left_alone():
    torch.manual_seed(3)
    expected = torch.rand(1)
    torch.manual_seed(3)
    with_fixes(subject(), ["re-attention:norm=batch"])
    assert torch.rand(1) == expected


def test_no_fix_is_no_change():
    plain = subject()
    assert with_fixes(plain, []) is plain


@pytest.mark.parametrize(
    ("fixes", "blocks", "error", "said"),
    [
        ([], [1], SettingError, "no fix"),
        (["re-atention"], None, UnknownNameError, "re-attention"),
        (["re-attention:nrm=batch"], None, SettingError, "nrm"),
        (["re-attention:batch"], None, SettingError, "SETTING=VALUE"),
        (["re-attention"], [9], SettingError, "0 to 2"),
        (["registers"], [1], SettingError, "whole model"),
        (["attn-scale", "attn-scale"], None, ModelError, "already"),
    ],
)
def test_what_cannot_be_is_refused(fixes, blocks, error, said):
    with pytest.raises(error, match=said):
        with_fixes(subject(), fixes, blocks)


def test_a_model_without_a_place_for_it_is_refused():
    other = resolve("timm:resnet10t", pretrained=False)
    with pytest.raises(ModelError, match="no list of blocks"):
        with_fixes(other, ["re-attention"])


@pytest.mark.parametrize(("text", "expected"), [("3", [3]), ("6-8", [6, 7, 8]), ("0, 4-5,2", [0, 2, 4, 5])])
def test_blocks_in_words(text, expected):
    assert blocks_in(text) == expected


@pytest.mark.parametrize("text", ["", "a", "3-1", "1,1", "1-3,2", "-2", "1-", "1-2-3", "²"])
def test_words_that_are_no_blocks(text):
    with pytest.raises(SettingError, match="6-11"):
        blocks_in(text)


@pytest.fixture(scope="module")
def pictures():
    return open_data("bundled:photos", limit=6)


def norms(model):
    return [m for m in model.modules() if isinstance(m, nn.BatchNorm2d)]


def test_recalibration_is_done_to_the_model_and_its_twin_and_told(pictures):
    fixed = with_fixes(subject(), ["re-attention:norm=batch"])
    before = [n.running_mean.clone() for n in norms(fixed.model)]
    done = recalibrated(fixed, pictures, 2, batch_size=3, device="cpu")
    assert all(not torch.equal(n.running_mean, b) for n, b in zip(norms(done.model), before, strict=True))
    assert all(n.running_mean.any() for n in norms(done.fresh(1)))
    assert "3 layers re-estimated over 2 batches" in done.notes[-1]
    found = measure(done, pictures, RunSettings(device="cpu", null_images=2, metrics=("patch-diversity",)))
    assert done.notes[-1] in found.run["notes"]


def test_what_was_not_recalibrated_is_told_as_well(pictures):
    plain = subject()
    assert recalibrated(plain, pictures, 0) is plain
    assert "nothing was done" in recalibrated(plain, pictures, 2).notes[-1]
    stored = recalibrated(with_fixes(subject(), ["re-attention:norm=batch"]), pictures, 0)
    assert "nothing was recalibrated" in stored.notes[-1]


def test_recalibration_needs_images_that_can_be_read_twice(pictures):
    fixed = with_fixes(subject(), ["re-attention:norm=batch"])
    with pytest.raises(SettingError, match="twice"):
        recalibrated(fixed, iter([torch.zeros(1, 3, 32, 32)]), 1)
    with pytest.raises(SettingError, match="0 or more"):
        recalibrated(fixed, pictures, -1)


def trained(**settings):
    """A model with re-attention in its last block whose weights, the fix's too, are nobody's defaults."""
    made = with_fixes(subject(), ["re-attention:norm=batch"], [2], **settings).model
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)))
    return made


WHERE = {"pretrained": False, "img_size": 32, "model_kwargs": {"depth": 3, "num_classes": 5}}


def test_a_checkpoint_that_holds_a_fix_loads_after_the_fix_is_in(images, tmp_path):
    made = trained()
    torch.save(made.state_dict(), tmp_path / "reattention.pth")
    found = resolve(ADDRESS, ["re-attention:norm=batch"], [2], checkpoint=tmp_path / "reattention.pth", **WHERE)
    assert torch.equal(found.model(images), made(images))
    assert (found.weights, found.name) == ("checkpoint", "vit_tiny_patch16_224+re-attention")
    assert found.checkpoint_sha256 is not None


def test_a_checkpoint_without_the_fix_loads_too_and_the_notes_say_so(images, tmp_path):
    plain = subject().model
    torch.save(plain.state_dict(), tmp_path / "plain.pth")
    found = resolve(ADDRESS, ["re-attention"], checkpoint=tmp_path / "plain.pth", **WHERE)
    torch.testing.assert_close(found.model(images), plain(images))
    assert found.weights == "checkpoint"
    assert any("holds no weights of what was put into the model" in note for note in found.notes)


def test_a_checkpoint_with_half_of_a_fix_is_refused(tmp_path):
    state = trained().state_dict()
    torch.save({k: v for k, v in state.items() if not k.endswith("reatten_matrix.bias")}, tmp_path / "half.pth")
    with pytest.raises(CheckpointError, match="1 missing in the file"):
        resolve(ADDRESS, ["re-attention:norm=batch"], [2], checkpoint=tmp_path / "half.pth", **WHERE)
    with pytest.raises(CheckpointError, match="1 missing in the file"):
        resolve(ADDRESS, checkpoint=tmp_path / "half.pth", **WHERE)
