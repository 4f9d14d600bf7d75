"""The Gram anchor: DINOv3's loss, a frozen copy that is saved with the run, and patches that stay while a model learns."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from collapse_probe.capture.gradients import GradientTrace, ViTParts
from collapse_probe.errors import CaptureError, SettingError
from collapse_probe.metrics.functional.gram import gram_drift
from collapse_probe.models.vit import ViT
from collapse_probe.registry import PENALTIES
from collapse_probe.training.penalties.base import Inputs, ModelPenalties
from collapse_probe.training.penalties.gram_anchor import Anchor
from tests.models.official_fixes import wave

# facebookresearch/dinov3 at 6876159a11b4df116f30f667f8c9888617df0751, dinov3/loss/gram_loss.py:
# GramLoss(remove_neg=True) and (remove_neg=False) of wave(2, 5, 4, phase=0.1) and wave(2, 5, 4, phase=1.7), in float64,
# and the first six numbers of its gradient
OFFICIAL = {
    "zero": (0.09845453683676453, [-0.06292173, -0.032101779, -0.00638188, -0.095637474, 0.040483317, 0.044683087]),
    "keep": (0.3067511369248529, [-0.036905317, -0.01922758, -0.04449359, -0.199995972, 0.139917095, 0.132930891]),
}


def small() -> ViT:
    torch.manual_seed(0)
    return ViT(image_size=8, patch_size=2, depth=2, width=16, heads=2, classes=3, init_std=0.3)


class Given(Anchor):
    """An anchor whose patches are given."""

    def __init__(self, patches):
        super().__init__(nn.Identity())
        self.given = patches

    def patches(self, images, place):
        return self.given


@pytest.mark.parametrize("negatives", OFFICIAL)
def test_the_loss_and_its_gradient_are_those_of_dinov3(negatives):
    tokens = wave(2, 5, 4, phase=0.1).requires_grad_()
    trace = GradientTrace(ViTParts(small().requires_grad_(False)))
    trace.passed["normed"], trace.patch_count, trace.input = tokens, 5, torch.zeros(2, 3, 8, 8)
    penalty = PENALTIES["gram-anchor"](negatives=negatives)
    loss = penalty.loss(trace, Inputs(own=Given(wave(2, 5, 4, phase=1.7))))
    expected, first = OFFICIAL[negatives]
    assert loss.item() == pytest.approx(expected, abs=1e-6)
    np.testing.assert_allclose(torch.autograd.grad(loss, tokens)[0].flatten()[:6], first, atol=1e-6)


def term(penalties, model, images):
    with penalties.recording():
        logits = model(images)
    return penalties.terms()["gram-anchor"], logits


def test_it_starts_at_zero_and_its_anchor_never_moves():
    model, images = small().train(), torch.randn(4, 3, 8, 8)
    penalties = ModelPenalties(model, {"gram-anchor": {}})
    assert not [*penalties.parameters()], "no optimizer sees the anchor"
    assert term(penalties, model, images)[0].item() < 1e-12
    before = {name: tensor.clone() for name, tensor in penalties.state_dict().items() if name != "steps"}
    assert {f"own.gram-anchor.model.{name}" for name in model.state_dict()} == set(before)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter))
    penalties.train()
    found, _ = term(penalties, model, images)
    assert found.item() > 1e-3
    found.backward()
    assert all(torch.equal(tensor, before[name]) for name, tensor in penalties.state_dict().items() if name in before)
    assert not any(module.training for module in penalties.own.modules() if module is not penalties.own)


def test_a_run_that_goes_on_has_the_anchor_that_it_began_with():
    model, images = small(), torch.randn(4, 3, 8, 8)
    penalties, state = ModelPenalties(model, {"gram-anchor": {}}), {}
    state = {name: tensor.clone() for name, tensor in penalties.state_dict().items()}
    with torch.no_grad():
        model.blocks[0].mlp.fc1.weight.add_(torch.randn_like(model.blocks[0].mlp.fc1.weight))
    expected = term(penalties, model, images)[0].item()
    resumed = ModelPenalties(model, {"gram-anchor": {}})
    assert term(resumed, model, images)[0].item() < 1e-12
    resumed.load_state_dict(state)
    assert term(resumed, model, images)[0].item() == pytest.approx(expected, rel=1e-6)


def test_the_anchor_can_be_a_checkpoint(tmp_path):
    model, other, images = small(), small(), torch.randn(4, 3, 8, 8)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    torch.save(other.state_dict(), path := tmp_path / "earlier.pth")
    penalties = ModelPenalties(model, {"gram-anchor": {"anchor": str(path), "depth": 2}})
    found, _ = term(penalties, model, images)
    with torch.no_grad():
        ours, theirs = (depth_two(each, images) for each in (model, other))
    assert found.item() == pytest.approx(gram_drift(ours, theirs).mean().item(), rel=1e-5)
    with pytest.raises(SettingError, match=r"'start' or a checkpoint file, and there is no 'nowhere\.pth'"):
        PENALTIES["gram-anchor"](anchor="nowhere.pth")
    with penalties.recording():
        model(images_BCHW=images)
    with pytest.raises(CaptureError, match="images as its first argument"):
        penalties.terms()


def depth_two(model, images):
    """The patches that leave the second block."""
    taken = []
    handle = model.blocks[1].register_forward_hook(lambda _, __, out: taken.append(out[:, 1:]))
    model(images)
    handle.remove()
    return taken[0]


def test_while_a_model_learns_its_patches_stay_nearer_to_the_anchor():
    images, labels = torch.randn(16, 3, 8, 8), torch.arange(16) % 3
    drift = {}
    for weight in (0.0, 10.0):
        model = small().train()
        penalties = ModelPenalties(model, {"gram-anchor": {}})
        optimiser = torch.optim.Adam(model.parameters(), lr=3e-3)
        for _ in range(30):
            found, logits = term(penalties, model, images)
            optimiser.zero_grad()
            (F.cross_entropy(logits, labels) + weight * found).backward()
            optimiser.step()
        drift[weight] = found.item()
    assert drift[10.0] < 0.5 * drift[0.0]
