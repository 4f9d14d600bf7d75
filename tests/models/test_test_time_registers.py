"""Test-time registers: planted register neurons are found, as the official code finds them, and their work goes to a token."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from torch import nn

import collapse_probe as cp
from collapse_probe.data.images import open_data
from collapse_probe.errors import ModelError, SettingError
from collapse_probe.models.architecture import Architecture
from collapse_probe.models.calibration import calibrated
from collapse_probe.models.fixes.apply import apply
from collapse_probe.models.fixes.test_time_registers import PUBLISHED, score_neurons, signed_max
from collapse_probe.models.loading import resolve
from collapse_probe.outliers import outliers
from collapse_probe.registry import FIXES

OFFICIAL = json.loads(Path(__file__).with_name("official_register_neurons.json").read_text(encoding="utf-8"))
NAME = "vit_tiny_patch16_224"
SMALL = {"img_size": 32, "patch_size": 8, "depth": 4, "embed_dim": 48, "num_heads": 3, "num_classes": 5}
PLANTED = {(1, 17), (1, 40)}
PATCHES = (5, 11)


def small(planted=True):
    """A small model in which two neurons of block 1 make two patches long, if these are planted."""
    torch.manual_seed(0)
    model = timm.create_model(NAME, **SMALL).eval()
    for module in model.modules():
        if isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, std=0.1)
    if planted:
        with torch.no_grad():
            for patch in PATCHES:
                model.pos_embed[0, 1 + patch, 7] += 8
            for _, neuron in sorted(PLANTED):
                first, second = model.blocks[1].mlp.fc1, model.blocks[1].mlp.fc2
                first.weight[neuron] = 0
                first.weight[neuron, 7] = 4
                first.bias[neuron] = -8 - neuron / 20
                second.weight[:, neuron] = 2 * torch.randn(48)
    return model


def images(count=6):
    return torch.randn(count, 3, 32, 32, generator=torch.Generator().manual_seed(1))


def with_fix(model, **settings):
    apply(model, "test-time-registers", **settings)
    fix, site = model.sites[0]
    return fix, site


def behind_last(model, pixels):
    """The norms of all tokens behind the last block."""
    taken = []
    handle = model.blocks[-1].register_forward_hook(lambda _, __, out: taken.append(out.norm(dim=-1)))
    model(pixels)
    handle.remove()
    return taken[0]


def test_planted_neurons_are_found_and_their_patches_are_long_no_more():
    model, pixels = small(), images()
    before = behind_last(model, pixels)
    assert outliers(before[:, 1:])[:, PATCHES].all()
    fix, site = with_fix(model, neurons=2)
    said = fix.calibrate(lambda: iter([pixels[:4], pixels[4:]]), site)
    assert {(int(b), int(n)) for b, n in model.register_neurons.chosen.nonzero()} == PLANTED
    assert "of 6 of 6 images are longer than 3 times the median and median + 6 MAD behind block 3" in said
    assert "(block:neuron) 1:17, 1:40, of blocks up to 1" in said
    after = behind_last(model, pixels)
    assert after.shape == (6, 1 + 1 + 16)
    assert (after[:, 1] > 0.9 * before[:, 1:].max(1).values).all(), "the added token is as long as the patches were"
    assert (after[:, 2:][:, PATCHES] < 0.2 * before[:, 1:][:, PATCHES]).all(), "and these are not"
    assert model.num_prefix_tokens == 2


@pytest.mark.parametrize("sparse", [False, True])
def test_neurons_are_ranked_as_the_official_code_ranks_them(sparse):
    # find_register_neurons of nickjiang2378/test-time-registers on the activations of this very model
    wave = OFFICIAL["inputs"]
    acts = torch.tensor(wave["activations"], dtype=torch.float64)  # [images, layers, tokens, neurons]
    flags = torch.tensor(wave["norms"]) > wave["threshold"]
    scores = [score_neurons(acts[:, layer], flags, sparse).mean(0) for layer in range(acts.shape[1])]
    best = torch.stack(scores).flatten().topk(10)
    pairs = [[int(i) // acts.shape[-1], int(i) % acts.shape[-1]] for i in best.indices]
    theirs = OFFICIAL["sparse" if sparse else "plain"]
    assert pairs == [row[:2] for row in theirs]
    np.testing.assert_allclose(best.values, [row[2] for row in theirs], rtol=0, atol=1e-5)


@pytest.mark.parametrize("maximum", ["neuron", "layer"])
def test_activations_move_by_the_equation(maximum):
    fix, site = with_fix(small(planted=False), maximum=maximum, count=2)
    site.home.register_neurons.chosen[1, :3] = True
    acts = torch.randn(2, 1 + 2 + 16, 192, generator=torch.Generator().manual_seed(2))
    moved = fix.neurons_of(acts, replace(site, block=1))
    expected = acts.clone()
    for image in range(2):
        values = [max(acts[image, :, n].tolist(), key=abs) for n in range(3)]
        values = [max(values, key=abs)] * 3 if maximum == "layer" else values
        expected[image, 1:3, :3] = torch.tensor(values)
        expected[image, 3:, :3] = 0
    assert torch.equal(moved, expected)
    assert torch.equal(fix.neurons_of(acts, replace(site, block=2)), acts), "other blocks keep theirs"
    assert signed_max(torch.tensor([[2.0, -2.5]]), 1).item() == -2.5


def test_a_model_without_outliers_is_refused_and_stays_as_it_was():
    model, pixels = small(planted=False), images()
    fix, site = with_fix(model, threshold=1000.0)
    with pytest.raises(ModelError, match="no patch of 6 images is longer than 1000 behind block 3: there is nothing to move"):
        fix.calibrate(lambda: iter([pixels]), site)
    fix, site = with_fix(small(planted=False))
    with pytest.raises(ModelError, match=r"longer than 3 times the median .* \(the longest has 1\.\d+ times the median"):
        fix.calibrate(lambda: iter([pixels]), site)
    assert not model.register_neurons.chosen.any()
    assert not model.register_neurons.searching


def test_the_settings_of_the_authors_are_taken_over():
    assert PUBLISHED["dinov2-l14"] == {"neurons": 50, "threshold": 150.0, "outlier_block": -2, "highest_block": 17}
    model, pixels = small(), images()
    fix, site = with_fix(model, like="dinov2-l14")
    with pytest.raises(SettingError, match="the model has blocks 0 to 3"):
        fix.calibrate(lambda: iter([pixels]), site)
    for wrong in ({"threshold": -1.0}, {"outlier_block": None}, {"highest_block": "last"}, {"like": "dinov3"}):
        with pytest.raises(SettingError, match=next(iter(wrong))):
            FIXES["test-time-registers"](**wrong)
    with pytest.raises(ModelError, match="class-attention cannot stand beside test-time-registers"):
        apply(model, "class-attention")
    with pytest.raises(SettingError, match="test-time-registers needs no training"):
        Architecture(model="timm:vit_tiny_patch16_224", fixes={"test-time-registers": {}}).build(0)


@pytest.fixture
def path(tmp_path):
    torch.save(small().state_dict(), tmp_path / "planted.pth")
    return tmp_path / "planted.pth"


def test_one_comparison_gives_before_and_after(path):
    comparison = cp.compare(
        [path],
        "bundled:digits",
        model=f"timm:{NAME}",
        model_kwargs=SMALL,
        fixes="test-time-registers:neurons=2",
        metrics=("token-norm", "token-norm@outliers"),
        limit=12,
        null_images=4,
    )
    before, after = comparison.subjects.values()
    assert any("moved are the neurons (block:neuron) 1:17, 1:40" in note for note in after.run["notes"])
    shares = [np.asarray(each.metrics["token-norm@outliers"].values)[-1] for each in (before, after)]
    assert shares[0] >= 2 / 16
    assert shares[1] < shares[0] / 2


def test_a_trained_model_without_outliers_is_refused_by_the_comparison():
    with pytest.raises(ModelError, match=r"no patch of 32 images is longer than .*: there is nothing to move"):
        cp.compare(["ours:digits-mhsa"], "bundled:digits", fixes="test-time-registers", metrics="token-norm", limit=32)


def test_what_was_found_is_saved_loaded_and_given_to_the_untrained_copy(path, tmp_path):
    data = open_data("bundled:digits", limit=12)
    subject = calibrated(
        resolve(f"timm:{NAME}", ["test-time-registers:neurons=2"], checkpoint=path, model_kwargs=SMALL), data, device="cpu"
    )
    twin = subject.fresh(5)
    assert torch.equal(twin.register_neurons.chosen, subject.model.register_neurons.chosen)
    assert not torch.equal(twin.blocks[0].attn.qkv.weight, subject.model.blocks[0].attn.qkv.weight)
    torch.save(subject.model.state_dict(), tmp_path / "found.pth")
    again = resolve(f"timm:{NAME}", checkpoint=tmp_path / "found.pth", model_kwargs=SMALL)
    assert torch.equal(again.model(images()), subject.model(images()))
    assert calibrated(again, data, device="cpu").notes[-1] == "test-time-registers: what it needs is in the checkpoint"
    with pytest.raises(SettingError, match="give a data address or an ImageSet"):
        calibrated(resolve(f"timm:{NAME}", ["test-time-registers"], pretrained=False, model_kwargs=SMALL), None)
