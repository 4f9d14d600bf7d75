"""A checkpoint that holds a fix is known by its keys: the fix, its blocks and what its weights show of its settings."""

from __future__ import annotations

import pytest
import timm
import torch
from torch import nn

from collapse_probe.errors import CheckpointError, SettingError
from collapse_probe.models.fixes.apply import apply, fixes_by_keys
from collapse_probe.models.loading import resolve
from collapse_probe.registry import FIXES

NAME = "vit_tiny_patch16_224"
SMALL = {"img_size": 32, "depth": 3, "embed_dim": 48, "num_heads": 3, "num_classes": 5}
SETTINGS = {
    "re-attention": [{"norm": "batch"}, {"norm": "none"}, {"norm": "layer"}],
    "talking-heads": [{"where": "both"}, {"where": "logits"}, {"where": "map"}],
    "refiner": [{"expansion": 2, "kernel": 5, "adapt": True}, {"expansion": 3, "kernel": 3, "adapt": False}],
    "registers": [{"count": 4}, {"count": 2}],
    "class-attention": [{"depth": 2, "mlp_ratio": 4.0}, {"depth": 1, "mlp_ratio": 3.0}],
    "temperature": [{"learnable": True}],
    "gated-attention": [{"gate": "elementwise"}, {"gate": "headwise"}],
    "qk-norm": [{"norm": "layer"}, {"norm": "rms"}],
}
NO_TRACE = {
    "contra-norm",
    "drop-attention",
    "exclusive-self-attention",
    "layernorm-scaling",
    "neutreno",
    "shared-attention",
    "value-residual",
}
CASES = [
    (name, settings, blocks)
    for name in FIXES
    if name not in NO_TRACE and name != "skip-attention"
    for settings in SETTINGS.get(name, [{}])
    for blocks in ((None,) if FIXES[name].home == "model" else (None, (1, 2)))
]


def trained(*fixes, blocks=None):
    """A small model whose fixes hold values that no start would give them."""
    torch.manual_seed(1)
    model = timm.create_model(NAME, **SMALL)
    for name, settings in fixes:
        apply(model, name, blocks, **settings)
    for parameter in model.parameters():
        nn.init.normal_(parameter, 0.1, 0.05)
    return model.eval()


def loaded(path, fixes=(), blocks=None, **more):
    return resolve(f"timm:{NAME}", fixes, blocks, checkpoint=path, model_kwargs=SMALL, **more)


@pytest.fixture
def path(tmp_path):
    return tmp_path / "fixed.pth"


@pytest.fixture
def images():
    return torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(("name", "settings", "blocks"), CASES)
def test_every_fix_that_adds_tensors_is_known_by_them(path, images, name, settings, blocks):
    model = trained((name, settings), blocks=blocks)
    torch.save({"state_dict": {f"model.{key}": tensor for key, tensor in model.state_dict().items()}}, path)
    subject = loaded(path)
    assert torch.equal(subject.model(images), model(images))
    (fix,) = subject.model.fixes
    assert (fix.name, fix.blocks) == (name, model.fixes[0].blocks)
    assert settings.items() <= fix.settings.items()
    said = f"{name} in {'blocks 1, 2' if blocks else 'all blocks'}"
    assert f" + {said}" in subject.address
    assert any(note.startswith(f"fixes of the checkpoint, known by its keys: {said}") for note in subject.notes)
    assert all(f"{key}={value}" in subject.address for key, value in settings.items())
    assert subject.fresh(3).state_dict().keys() == model.state_dict().keys()


@pytest.mark.parametrize("name", sorted(NO_TRACE))
def test_the_others_leave_no_trace(name):
    plain = timm.create_model(NAME, **SMALL)
    assert apply(timm.create_model(NAME, **SMALL), name).state_dict().keys() == plain.state_dict().keys()


@pytest.mark.parametrize("name", FIXES)
def test_a_plain_model_holds_none(name):
    model = timm.create_model(NAME, **SMALL)
    assert fixes_by_keys(model, {}) == []
    assert FIXES[name].from_keys({key: tensor.shape for key, tensor in model.state_dict().items()}) is None


def test_what_no_key_shows_is_said_and_can_be_set(path, images):
    model = trained(("re-attention", {"norm": "batch", "scale": 0.5}))
    torch.save(model.state_dict(), path)
    subject = loaded(path)
    assert not torch.equal(subject.model(images), model(images))
    assert "(norm=batch, scale=1.0)" in subject.address
    note = "no key of the checkpoint shows the scale of re-attention: 1.0 is assumed; --fix re-attention:scale=… sets it"
    assert note in subject.notes
    told = loaded(path, ["re-attention:scale=0.5"])
    assert torch.equal(told.model(images), model(images))
    assert not any("assumed" in note for note in told.notes)


def test_other_settings_and_blocks_than_the_files_are_refused(path):
    torch.save(trained(("re-attention", {}), blocks=(1,)).state_dict(), path)
    with pytest.raises(
        CheckpointError, match=r"holds re-attention in blocks \[1\] \(norm=batch\), but norm=layer was asked for"
    ):
        loaded(path, ["re-attention:norm=layer"])
    with pytest.raises(CheckpointError, match=r"blocks \[0, 1\] was asked for"):
        loaded(path, ["re-attention"], [0, 1])
    assert loaded(path, ["re-attention"]).model.fixes[0].settings["norm"] == "batch"


def test_several_fixes_and_one_that_is_added(path, images):
    model = trained(("layer-scale", {}), ("talking-heads", {"where": "map"}))
    torch.save(model.state_dict(), path)
    assert torch.equal(loaded(path).model(images), model(images))
    subject = loaded(path, ["attn-scale"])
    torch.testing.assert_close(subject.model(images), model(images))
    assert [fix.name for fix in subject.model.fixes] == ["layer-scale", "talking-heads", "attn-scale"]
    assert any("holds no weights of what was put into the model (blocks.0.attn.lamb" in note for note in subject.notes)


def test_two_kinds_of_one_fix_in_one_model(path, images):
    model = trained(("re-attention", {"norm": "batch"}), blocks=(0,))
    apply(model, "re-attention", (2,), norm="none")
    torch.save(model.eval().state_dict(), path)
    subject = loaded(path)
    assert torch.equal(subject.model(images), model(images))
    assert (
        "re-attention in blocks 0 (norm=batch, scale=1.0) + re-attention in blocks 2 (norm=none, scale=1.0)" in subject.address
    )


def test_a_model_without_a_place_for_the_fix_says_so(path):
    torch.save(trained(("re-attention", {})).state_dict(), path)
    with pytest.raises(CheckpointError, match="holds parameters of re-attention, for which this model has no place"):
        resolve("timm:beit_base_patch16_224", checkpoint=path, model_kwargs=SMALL, partial=True)


def test_an_official_deepvit_file_in_timms_plain_vit(path):
    import collapse_probe.models.deepvit  # noqa: F401  (registers its family)

    torch.manual_seed(1)
    official = timm.create_model("deepvit_patch16_224_re_attn_16b", img_size=32, num_classes=5).eval()
    torch.save({"state_dict": official.state_dict()}, path)
    sizes = {"img_size": 32, "num_classes": 5, "depth": 16, "embed_dim": 384, "num_heads": 12, "mlp_ratio": 3.0}
    subject = resolve("timm:vit_small_patch16_224", checkpoint=path, model_kwargs=sizes)
    images = torch.randn(2, 3, 32, 32)
    torch.testing.assert_close(subject.model(images), official(images))


def test_blocks_without_attention_are_known_and_the_one_that_lends_with_them(path, images):
    model = trained(("skip-attention", {}), blocks=(1, 2))
    torch.save(model.state_dict(), path)
    subject = loaded(path)
    assert torch.equal(subject.model(images), model(images))
    assert [(fix.name, fix.blocks) for fix in subject.model.fixes] == [("skip-attention", (0, 1, 2))]
    with pytest.raises(SettingError, match=r"blocks must follow one another and lie above 0, not \[0, 1\]"):
        apply(timm.create_model(NAME, **SMALL), "skip-attention", (0, 1))
