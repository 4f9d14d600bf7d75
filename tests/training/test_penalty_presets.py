"""The presets are what the published code trains with, and a model can pay them."""

from __future__ import annotations

import pytest
import torch

from collapse_probe.errors import UnknownNameError
from collapse_probe.models.vit import ViT
from collapse_probe.training.penalties.base import MixedLabels, ModelPenalties
from collapse_probe.training.penalties.presets import PRESETS, preset

RELEASED = {
    "deepvit": {"block-cosine": 0.1},
    "diverse-vit": {
        "patch-mixing": 1,
        "patch-cosine": 0.5,
        "patch-contrastive": 0.5,
        "attention-cosine": 1e-4,
        "conditional-orthogonality": 5e-4,
    },
    "patch-diversification": {"patch-mixing": 1, "patch-contrastive": 1},
}


@pytest.mark.parametrize("name", RELEASED)
def test_coefficients_are_the_released_ones(name):
    assert {key: weight for key, (_, weight) in preset(name).items()} == RELEASED[name]
    assert all(penalty.name == key for key, (penalty, _) in preset(name).items())


def test_settings_are_the_released_ones():
    deepvit, diverse, patch = (preset(name) for name in RELEASED)
    block = deepvit["block-cosine"][0]
    assert (block.pairs, block.axis, block.point) == (12, "head", "weights")
    assert diverse["patch-cosine"][0].form == "repository"
    assert diverse["patch-contrastive"][0].form == "diverse-vit"
    assert diverse["patch-mixing"][0].replaces_criterion
    assert (diverse["attention-cosine"][0].blocks, diverse["attention-cosine"][0].point) == ((0,), "probs")
    orthogonality = diverse["conditional-orthogonality"][0]
    assert (orthogonality.level, orthogonality.estimate, orthogonality.blocks) == ("weights", "power", None)
    assert orthogonality.matrices == ("query", "key", "value")
    assert {penalty.form for penalty, _ in patch.values()} == {"repository"}
    assert not any(penalty.replaces_criterion for penalty, _ in patch.values())


def test_an_unknown_preset_is_answered_with_the_nearest():
    assert list(PRESETS) == sorted(RELEASED)
    with pytest.raises(UnknownNameError, match="diverse-vit"):
        preset("diverse_vit")


@pytest.mark.parametrize("name", RELEASED)
def test_a_model_pays_a_preset(name):
    torch.manual_seed(0)
    model = ViT(image_size=8, patch_size=2, depth=3, width=16, heads=2, classes=3).train()
    chosen = preset(name)
    penalties = ModelPenalties(model, {key: penalty for key, (penalty, _) in chosen.items()})
    with penalties.recording():
        model(torch.randn(2, 3, 8, 8))
    labels = MixedLabels(torch.eye(3)[:2])
    terms = penalties.terms(labels)
    sum(weight * terms[key] for key, (_, weight) in chosen.items()).backward()
    assert list(terms) == list(chosen)
    assert all(p.grad.isfinite().all() for p in penalties.parameters())
    assert model.blocks[0].attn.qkv.weight.grad.abs().sum() > 0
