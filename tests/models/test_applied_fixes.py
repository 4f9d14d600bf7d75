"""Fixes in timm models that exist: nothing is lost, nothing is renamed, nothing changes at the neutral
setting.
"""

from __future__ import annotations

import copy
import inspect
import pickle
from functools import partial
from typing import Any
from unittest import mock

import pytest
import timm
import torch
import torch.nn.functional as F
from timm.models.deit import VisionTransformerDistilled
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from collapse_probe.capture.capture import record
from collapse_probe.errors import ModelError, SettingError, UnknownNameError
from collapse_probe.models.fixes.apply import apply, open_sockets
from collapse_probe.models.vit import ViT
from collapse_probe.registry import FIXES

TINY = {"img_size": 32, "patch_size": 8, "embed_dim": 24, "depth": 3, "num_heads": 3, "num_classes": 5}
MODELS: dict[str, Any] = {
    "plain": lambda: VisionTransformer(**TINY),
    "distilled": lambda: VisionTransformerDistilled(**TINY),
    "registers": lambda: VisionTransformer(**TINY, reg_tokens=2, no_embed_class=True),
    "qk_norm": lambda: VisionTransformer(**TINY, qk_norm=True, init_values=0.3),
    "average": lambda: VisionTransformer(**TINY, class_token=False, global_pool="avg"),
    "clip": lambda: VisionTransformer(**TINY, pre_norm=True, drop_path_rate=0.1),
}
NEUTRAL = sorted(name for name in FIXES if FIXES[name].neutral is not None)
NEEDS_MAP = [name for name in NEUTRAL if FIXES[name](**FIXES[name].neutral).needs_map]


@pytest.fixture
def images() -> Tensor:
    return torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(1))


def make(kind: str = "plain") -> Any:
    torch.manual_seed(0)
    model = MODELS[kind]().eval()
    for module in model.modules():
        if isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, std=0.2)
    return model


def on_meta(name: str) -> Any:
    on_cpu = partial(torch.linspace, device="cpu")  # whose values older timm reads while it builds
    with torch.device("meta"), mock.patch("torch.linspace", on_cpu):
        return timm.create_model(name)


@pytest.mark.parametrize("kind", list(MODELS))
def test_open_sockets_change_nothing(kind: str, images: Tensor) -> None:
    model = make(kind)
    expected, keys = model(images), list(model.state_dict())
    open_sockets(model)
    open_sockets(model)
    assert torch.equal(model(images), expected)
    assert list(model.state_dict()) == keys
    assert model.fixes == ()


@pytest.mark.parametrize("kind", list(MODELS))
@pytest.mark.parametrize("name", NEUTRAL)
def test_the_neutral_setting_keeps_the_logits(name: str, kind: str, images: Tensor) -> None:
    model = make(kind)
    before, parameters = dict(model.state_dict()), dict(model.named_parameters())
    expected = model(images)
    assert apply(model, name, **FIXES[name].neutral) is model
    if name in NEEDS_MAP:
        torch.testing.assert_close(model(images), expected, rtol=0, atol=1e-5)
    else:
        assert torch.equal(model(images), expected), "no map, no rounding"
    after = model.state_dict()
    assert before.keys() <= after.keys()
    assert all(dict(model.named_parameters())[key] is parameters[key] for key in parameters)


@pytest.mark.parametrize("name", list(FIXES))
@pytest.mark.parametrize("training", [True, False])
def test_what_a_fix_adds_has_the_mode_and_dtype_of_the_model(name: str, training: bool) -> None:
    model = apply(make().double().train(training), name)
    assert {module.training for module in model.modules()} == {training}
    assert {tensor.dtype for tensor in model.state_dict().values() if tensor.is_floating_point()} == {torch.float64}


@pytest.mark.parametrize("name", [name for name in NEEDS_MAP if name != "refiner"])
def test_without_the_fused_kernel_the_logits_are_equal_to_the_bit(name: str, images: Tensor) -> None:
    model = make()
    for block in model.blocks:
        block.attn.fused_attn = False
    expected = model(images)
    apply(model, name, **FIXES[name].neutral)
    assert torch.equal(model(images), expected)


@pytest.mark.parametrize("name", list(FIXES))
def test_a_fixed_model_is_our_vit_with_the_same_fix(name: str, images: Tensor) -> None:
    theirs = make()
    chosen = {} if FIXES[name].home == "model" or name == "shared-attention" else {"blocks": [1, 2]}
    apply(theirs, name, **chosen)
    theirs.train()(images)  # running statistics move
    theirs.eval()
    ours = ViT(image_size=32, patch_size=8, width=24, depth=3, heads=3, classes=5, fixes={name: chosen}).eval()
    ours.load_state_dict(theirs.state_dict())
    torch.testing.assert_close(ours(images), theirs(images))
    assert ours.num_prefix_tokens == theirs.num_prefix_tokens
    assert ours.fixes == theirs.fixes


def test_blocks_without_a_map_stay_fused(images: Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[Tensor] = []
    kernel = F.scaled_dot_product_attention
    monkeypatch.setattr(
        F,
        "scaled_dot_product_attention",
        lambda *args, **more: calls.append(args[0]) or kernel(*args, **more),
    )
    model = apply(make(), "re-attention", blocks=[2])
    apply(model, "feat-scale")
    model(images)
    assert len(calls) == 2
    for block in model.blocks:
        block.attn.fused_attn = False  # timm's own switch, which stays in force
    model(images)
    assert len(calls) == 2


def test_fine_tuning_moves_the_fix_and_the_model(images: Tensor) -> None:
    model = apply(make("distilled"), "attn-scale", blocks=range(1, 3))
    optimiser = torch.optim.SGD(model.parameters(), lr=0.1)
    model.train()(images).square().sum().backward()
    optimiser.step()
    assert [key for key in model.state_dict() if key.endswith("lamb")] == [f"blocks.{i}.attn.lamb" for i in (1, 2)]
    assert all(model.blocks[i].attn.lamb.any() for i in (1, 2))


def test_a_fixed_model_can_be_copied_and_pickled(images: Tensor) -> None:
    model = make()
    for name in ("registers", "neutreno", "feat-scale", "re-attention"):
        apply(model, name)
    expected = model(images)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(twin(images), expected)
        for parameter in twin.parameters():
            parameter.data.zero_()
        twin(images)
    assert torch.equal(model(images), expected)


def test_timms_own_ways_in_still_work(images: Tensor) -> None:
    model = apply(make(), "registers", count=2)
    final, intermediates = model.forward_intermediates(images, return_prefix_tokens=True)
    assert final.shape == (2, 3 + 16, 24)
    assert intermediates[0][0].shape == (2, 24, 4, 4)
    assert intermediates[0][1].shape == (2, 3, 24)
    model.reset_classifier(7)
    assert model(images).shape == (2, 7)
    checkpointed = apply(make(), "re-attention").train()
    checkpointed.set_grad_checkpointing()
    checkpointed(images).sum().backward()
    assert checkpointed.blocks[0].attn.reatten_matrix.weight.grad is not None


def test_memory_across_blocks_refuses_gradient_checkpointing(images: Tensor) -> None:
    model = apply(make(), "neutreno").train()
    model.set_grad_checkpointing()
    with pytest.raises(ModelError, match="gradient checkpointing"):
        model(images).sum().backward()


@pytest.mark.parametrize("kind", ["distilled", "registers"])
def test_the_capture_records_a_fixed_model(kind: str, images: Tensor) -> None:
    model = apply(make(kind), "re-attention", blocks=[1])
    apply(model, "registers", count=2)
    with torch.no_grad(), record(model) as recording:
        model(images)
    assert [recording.plan.layers[i].mixed for i in recording.plan.map_layers] == [False, True, False]
    assert recording.plan.prefix == tuple(range(model.num_prefix_tokens))


@pytest.mark.skipif(
    "attn_mask" not in inspect.signature(VisionTransformer.forward).parameters,
    reason="older timm has no masks",
)
def test_masks_pass(images: Tensor) -> None:
    plain, fixed = make(), apply(make(), "talking-heads")
    mask = torch.rand(17, 17) > 0.3
    mask.fill_diagonal_(True)
    torch.testing.assert_close(fixed(images, attn_mask=mask), plain(images, attn_mask=mask), rtol=0, atol=1e-5)
    torch.testing.assert_close(fixed(images, is_causal=True), plain(images, is_causal=True), rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("resnet18", "ResNet has no list of blocks"),
        (
            "cait_xxs24_224",
            r"timm\.models\.cait\.TalkingHeadAttn; a fix has its place in timm\.layers\.Attention",
        ),
        ("eva02_tiny_patch14_224", r"block 0 of Eva has timm\.models\.eva\.EvaAttention"),
        ("swin_tiny_patch4_window7_224", "SwinTransformer has no list of blocks"),
        ("mixer_s32_224", "block 0 of MlpMixer has no attention;"),
    ],
)
def test_a_model_without_a_place_is_refused_in_one_line(name: str, message: str) -> None:
    model = on_meta(name)
    before = {name: type(module) for name, module in model.named_modules()}
    with pytest.raises(ModelError, match=message) as error:
        apply(model, "attn-scale")
    assert "\n" not in str(error.value)
    assert {name: type(module) for name, module in model.named_modules()} == before


def test_what_cannot_be_done_is_refused(images: Tensor) -> None:
    with pytest.raises(UnknownNameError, match="did you mean 'refiner'"):
        apply(make(), "refine")
    with pytest.raises(SettingError, match="attn-scale has no setting 'lambda_'; it has init"):
        apply(make(), "attn-scale", lambda_=1)
    with pytest.raises(SettingError, match="from 0 to 2"):
        apply(make(), "attn-scale", blocks=range(2, 4))
    with pytest.raises(ModelError, match="head that reads CLS alone"):
        apply(make("distilled"), "class-attention")
    with pytest.raises(ModelError, match="CLS token"):
        apply(make("average"), "class-attention")
    with pytest.raises(ModelError, match="resamples its positions"):
        apply(VisionTransformer(**TINY, dynamic_img_size=True), "registers")
    with pytest.raises(ModelError, match="already has attn-scale"):
        apply(apply(make(), "attn-scale"), "attn-scale", blocks=[0])


def test_a_fix_on_timms_own_deit(images: Tensor) -> None:
    model = on_meta("deit_tiny_distilled_patch16_224")
    count = sum(p.numel() for p in model.parameters())
    apply(model, "re-attention", blocks=range(6, 12))
    assert all(p.is_meta for p in model.parameters())
    assert sum(p.numel() for p in model.parameters()) == count + 6 * (3 * 3 + 3 + 2 * 3)
