"""Other states for prefix tokens: laws that hold to the bit, controls at other tokens, and how far the patches move."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import timm
import torch

import collapse_probe as cp
from collapse_probe.analysis.intervention.donors import Donors, donor_names, drawn_for
from collapse_probe.analysis.intervention.moves import relative_rms_change, shared_energy_fraction
from collapse_probe.capture.capture import discover_plan
from collapse_probe.capture.edits.places import Places
from collapse_probe.capture.edits.streams import with_states
from collapse_probe.data.images import open_data
from collapse_probe.errors import DataError, SettingError
from collapse_probe.models.loading import resolve
from collapse_probe.report.intervention.page import render
from collapse_probe.report.intervention.verdict import headline, verdicts

pytestmark = pytest.mark.usefixtures("one_thread")
STATES = ("zero", "mean", "noise", "donor")


def registered(seed=0):
    """A small model with a class token and four registers."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = timm.create_model(
            "vit_small_patch14_reg4_dinov2", depth=3, embed_dim=32, num_heads=2, num_classes=10, img_size=56, init_values=1.0
        )
        for parameter in model.parameters():
            if parameter.ndim > 1:
                torch.nn.init.normal_(parameter, std=0.2)
    return model.eval()


@pytest.fixture(scope="module")
def model():
    return registered()


@pytest.fixture(scope="module")
def digits():
    return open_data("bundled:digits", limit=16)


@pytest.fixture(scope="module")
def found(model, digits):
    return cp.intervene(model, digits, prefix=STATES)


def test_the_tokens_are_the_registers_or_the_only_prefix_token(model, found):
    assert found.run["prefix_positions"] == [1, 2, 3, 4]
    assert found.run["last_tokens"] == "norm"
    plain = timm.create_model("vit_tiny_patch16_224", depth=2, embed_dim=24, num_heads=2, img_size=32).eval()
    assert Places(discover_plan(plain, (32, 32))).prefix == (0,)


def test_the_mean_of_a_constant_token_changes_no_bit_and_neither_does_another_image_of_it(found):
    for kind in ("prefix_mean", "prefix_donor"):  # registers enter block 0 alike for all images
        first, *later = found.single[kind]
        assert (first.kl, first.agreement, first.moved, first.shared) == (0, 1, 0, None)
        assert all(effect.kl > 0 and effect.moved > 0 for effect in later)
    assert found.single["prefix_zero"][0].kl > 0


def test_a_donor_that_is_the_image_itself_changes_nothing(model):
    x = torch.randn(2, 9, 4, generator=torch.Generator().manual_seed(0))
    both, at = torch.cat([x, x]), torch.tensor([[1, 2], [3, 8]])
    assert torch.equal(with_states("donor", both, at, None, torch.zeros(2, 2, 4)), both)


def test_each_kind_of_state_is_what_it_says():
    g = torch.Generator().manual_seed(0)
    x, means, noise = torch.randn(4, 9, 5, generator=g), torch.randn(9, 5, generator=g), torch.randn(2, 2, 5, generator=g)
    noise = torch.nn.functional.normalize(noise, dim=2)
    at = torch.tensor([[1, 2], [7, 3]])
    for kind in STATES:
        expected = x.clone()
        for image in range(2):
            for place, token in enumerate(at[image].tolist()):
                expected[image, token] = {
                    "zero": torch.zeros(5),
                    "mean": means[token],
                    "noise": noise[image, place] * x[image, token].norm(),
                    "donor": x[image + 2, token],
                }[kind]
        before = x.clone()
        torch.testing.assert_close(with_states(kind, x, at, means, noise), expected)
        assert torch.equal(x, before)


@torch.no_grad()
def test_the_numbers_are_those_of_a_model_changed_by_hand(model, digits, found):
    transform = resolve(model).preprocess.transform
    pixels = torch.stack([transform(digits[i]) for i in range(len(digits))])

    def forward(change=None):
        x = model._pos_embed(model.patch_embed(pixels))
        for i, block in enumerate(model.blocks):
            if change is not None and i == 1:
                x = change(x)
            x = block(x)
        x = model.norm(x)
        return x[:, 5:].double(), model.forward_head(x).double()

    def zeros(x):
        x = x.clone()
        x[:, 1:5] = 0
        return x

    (base, plain), (new, other) = forward(), forward(zeros)
    effect = found.single["prefix_zero"][1]
    moved = ((new - base).square().sum(2).mean(1) / base.square().sum(2).mean(1)).sqrt()
    change = new - base
    shared = 16 * change.mean(1).square().sum(1) / change.square().sum((1, 2))
    kl = (plain.softmax(1) * (plain.log_softmax(1) - other.log_softmax(1))).sum(1)
    assert effect.kl == pytest.approx(float(kl.mean()), rel=1e-3)
    assert effect.moved == pytest.approx(float(moved.mean()), rel=1e-4)
    assert effect.shared == pytest.approx(float(shared.mean()), rel=1e-4)
    assert effect.moved_ci95[0] <= effect.moved <= effect.moved_ci95[1]


def test_batches_do_not_matter(model, digits, found):
    small = cp.intervene(model, digits, prefix=STATES, batch_size=5)
    for kind, effects in found.single.items():
        for one, other in zip(effects, small.single[kind], strict=True):
            assert one.kl == pytest.approx(other.kl, rel=1e-3, abs=1e-9)
            assert one.moved == pytest.approx(other.moved, rel=1e-3, abs=1e-6)


def test_moves_against_a_slow_reference():
    rng = np.random.default_rng(0)
    new, base = rng.normal(size=(3, 6, 4)), rng.normal(size=(3, 6, 4))
    counted = np.array([[1, 1, 0, 1, 1, 1], [0, 0, 1, 1, 1, 1], [0, 0, 0, 0, 0, 0]], dtype=bool)
    moved = relative_rms_change(*map(torch.from_numpy, (new, base, counted)))
    shared = shared_energy_fraction(torch.from_numpy(new - base), torch.from_numpy(counted))
    for i in range(2):
        change = (new - base)[i, counted[i]]
        rms = [np.sqrt(np.mean([np.sum(row**2) for row in rows])) for rows in (change, base[i, counted[i]])]
        assert float(moved[i]) == pytest.approx(rms[0] / rms[1])
        alike = len(change) * np.sum(change.mean(0) ** 2) / np.sum(change**2)
        assert float(shared[i]) == pytest.approx(alike)
    assert bool(moved[2].isnan() & shared[2].isnan())
    same = torch.ones(1, 5, 3)
    assert float(shared_energy_fraction(same, torch.ones(1, 5, dtype=torch.bool))) == pytest.approx(1)
    assert bool(shared_energy_fraction(0 * same, torch.ones(1, 5, dtype=torch.bool)).isnan().all())


def test_no_image_lends_to_itself_and_partners_follow_from_names():
    names = [f"{i}.png" for i in range(200)]
    pool = tuple(sorted(donor_names(names, 0)))
    donors = Donors(pool, torch.arange(len(pool))[:, None].float(), 0)
    assert len(pool) == 64
    assert all(pool[donors.partner(name)] != name for name in names)
    assert donor_names(names[::-1], 0) == donor_names(names, 0)
    assert len({donors.partner(name) for name in names}) > 50
    with pytest.raises(DataError, match="2 images or more"):
        donor_names(["one"], 0)


def test_what_is_drawn_follows_from_the_name_and_lies_among_the_patches():
    one = drawn_for(["a", "b"], 0, range(5, 21), 4, 8, torch.device("cpu"))
    other = drawn_for(["b"], 0, range(5, 21), 4, 8, torch.device("cpu"))
    assert torch.equal(one.others[1:], other.others)
    assert torch.equal(one.noise[1:], other.noise)
    assert one.others.min() >= 5
    assert all(len(set(row)) == 4 for row in one.others.tolist())
    torch.testing.assert_close(one.noise.norm(dim=2), torch.ones(2, 4))


def test_the_page_shows_the_control_and_says_when_only_zeros_were_tried(model, digits, found):
    every, only = verdicts(found), verdicts(cp.intervene(model, digits, prefix="zero"))
    assert [answer.label for answer in every] == [f"prefix_{name}" for name in STATES]
    assert all("The same at random patch tokens there:" in answer.sentences[0] for answer in every)
    assert "tokens 1–4, of 5 prefix tokens" in every[0].sentences[0]
    assert not any("Only zeros were tried" in caveat for answer in every for caveat in answer.caveats)
    assert any("zeros overstate" in caveat for caveat in only[0].caveats)
    assert headline(every, found) == "What the states of prefix tokens are worth"
    assert "prefix zero other" in render(found)


def test_a_model_without_prefix_tokens_says_so(digits):
    model = timm.models.VisionTransformer(
        img_size=32, patch_size=8, depth=2, embed_dim=24, num_heads=2, num_classes=3, class_token=False, global_pool="avg"
    ).eval()
    with pytest.raises(SettingError, match="no prefix tokens"):
        cp.intervene(model, digits, prefix="zero", img_size=32)
    with pytest.raises(SettingError, match="zero, mean, noise, donor"):
        cp.intervene(copy.deepcopy(model), digits, prefix="ones")
