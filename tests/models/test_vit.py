"""The plain ViT: what it computes, what its settings do, and that attention stays fused where it may."""

from __future__ import annotations

import json
from typing import Any

import pytest
import timm
import torch
import torch.nn.functional as F
from torch import Tensor

from collapse_probe.errors import ModelError, SettingError, UnknownNameError
from collapse_probe.models.vit import DropPath, ViT, ViTSettings

SMALL = {"depth": 4, "width": 24, "heads": 3, "patch_size": 8, "image_size": 32, "classes": 5}


@pytest.fixture
def images() -> Tensor:
    return torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(1))


@pytest.fixture
def fused_calls(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    calls: list[tuple[int, ...]] = []
    kernel = F.scaled_dot_product_attention

    def counting(q: Tensor, *args: Any, **settings: Any) -> Tensor:
        calls.append(tuple(q.shape))
        return kernel(q, *args, **settings)

    monkeypatch.setattr(F, "scaled_dot_product_attention", counting)
    return calls


def test_it_is_timms_vit_with_other_code(images: Tensor) -> None:
    ours = ViT(**SMALL, mlp_ratio=3.0, init_std=0.3).eval()
    timms = timm.models.VisionTransformer(32, 8, 3, 5, embed_dim=24, depth=4, num_heads=3, mlp_ratio=3.0).eval()
    timms.load_state_dict(ours.state_dict())
    torch.testing.assert_close(ours(images), timms(images))
    torch.testing.assert_close(ours.forward_features(images), timms.forward_features(images))


def test_the_map_in_the_open_gives_what_the_fused_kernel_gives(images: Tensor) -> None:
    model = ViT(**SMALL, init_std=0.3).eval()
    fused = model(images)
    for block in model.blocks:
        block.attn.fused_attn = False
    torch.testing.assert_close(model(images), fused)


def test_attention_is_fused_except_where_a_fix_needs_the_map(images: Tensor, fused_calls: list[tuple[int, ...]]) -> None:
    fixes = {"re-attention": {"blocks": [1, 2]}, "temperature": {}, "neutreno": {}, "layer-scale": {}}
    ViT(**SMALL, fixes=fixes)(images)
    assert fused_calls == [(2, 3, 17, 8)] * 2


def test_tied_blocks_share_weights_and_keep_their_own_fixes(images: Tensor) -> None:
    once = sum(p.numel() for p in ViT(**SMALL | {"depth": 1}).parameters())
    tied = ViT(**SMALL, tied=True)
    assert sum(p.numel() for p in tied.parameters()) == once
    fixed = ViT(**SMALL, tied=True, fixes={"attn-scale": {}, "contra-norm": {"blocks": [3]}})
    assert sum(p.numel() for p in fixed.parameters()) == once + 4 * 3
    assert [type(b.norm1).__name__ for b in fixed.blocks] == ["LayerNorm"] * 3 + ["ContraLayerNorm"]
    assert fixed.blocks[0].attn.qkv.weight is fixed.blocks[3].attn.qkv.weight
    untied = ViT(**SMALL).eval()
    untied.load_state_dict(tied.state_dict())
    assert torch.equal(untied(images), tied.eval()(images))


def test_registers_are_a_setting_and_a_fix(images: Tensor) -> None:
    torch.manual_seed(0)
    setting = ViT(**SMALL, registers=3).eval()
    torch.manual_seed(0)
    fix = ViT(**SMALL, fixes={"registers": {"count": 3}}).eval()
    assert setting.num_prefix_tokens == fix.num_prefix_tokens == 4
    assert torch.equal(setting(images), fix(images))
    assert setting.forward_features(images).shape == (2, 1 + 3 + 16, 24)


@pytest.mark.parametrize("init", ["trunc_normal", "xavier", "torch"])
def test_initialisation(init: Any) -> None:
    torch.manual_seed(0)
    model = ViT(**SMALL | {"width": 96}, init=init, init_std=0.1)
    weight, bias = model.blocks[0].mlp.fc1.weight, model.blocks[0].mlp.fc1.bias
    widest = {"trunc_normal": 2.0, "xavier": (6 / (96 + 384)) ** 0.5, "torch": 96**-0.5}[init]
    spread = {"trunc_normal": 0.1, "xavier": widest / 3**0.5, "torch": widest / 3**0.5}[init]
    assert weight.abs().max() <= widest
    assert weight.std().item() == pytest.approx(spread, rel=0.03)
    assert bias.any() == (init == "torch")


def test_dropout_of_every_kind_acts_in_train_mode_only(images: Tensor) -> None:
    for kind in ("dropout", "attention_dropout", "drop_path"):
        model = ViT(**SMALL, **{kind: 0.5}, init_std=0.3)
        assert not torch.equal(model(images), model(images)), kind
        model.eval()
        assert torch.equal(model(images), model(images)), kind


def test_drop_path_keeps_the_mean_and_drops_whole_images() -> None:
    torch.manual_seed(0)
    dropped = DropPath(0.25)(torch.ones(4000, 2, 3))
    assert dropped.mean().item() == pytest.approx(1, abs=0.05)
    assert ((dropped == 0).all((1, 2)) | (dropped == 1 / 0.75).all((1, 2))).all()
    rates = [block.drop_path1.rate for block in ViT(**SMALL, drop_path=0.3).blocks]
    assert rates == pytest.approx([0, 0.1, 0.2, 0.3])


def test_settings_survive_json(images: Tensor) -> None:
    settings = ViTSettings(**SMALL, fixes={"re-attention": {"blocks": range(1, 3), "norm": "layer"}})
    again = ViTSettings(**json.loads(json.dumps(settings.plain())))
    torch.manual_seed(0)
    first = ViT(settings).eval()
    torch.manual_seed(0)
    assert torch.equal(ViT(again).eval()(images), first(images))
    assert first.fixes[0].blocks == (1, 2)
    assert first.settings == settings
    assert ViT(settings, depth=5).settings.depth == 5


def test_a_model_without_classes_returns_cls(images: Tensor) -> None:
    model = ViT(**SMALL | {"classes": 0})
    assert torch.equal(model(images), model.forward_features(images)[:, 0])


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"depth": 0}, "depth"),
        ({"heads": 5}, "multiple of heads"),
        ({"patch_size": 7}, "multiple of patch_size"),
        ({"width": 24.0}, "width"),
        ({"init": "he"}, "init"),
        ({"registers": 2, "fixes": {"registers": {}}}, "registers"),
    ],
)
def test_wrong_settings_are_refused(wrong: dict[str, Any], message: str) -> None:
    with pytest.raises(SettingError, match=message):
        ViT(**SMALL | wrong)


def test_wrong_names_and_images_are_refused() -> None:
    with pytest.raises(UnknownNameError, match="did you mean 'neutreno'"):
        ViT(**SMALL, fixes={"neutrino": {}})
    with pytest.raises(ModelError, match=r"takes images of \(3, 32, 32\), not of \(3, 48, 32\)"):
        ViT(**SMALL)(torch.zeros(1, 3, 48, 32))
