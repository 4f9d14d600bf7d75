"""The official DeepViT family: counts, keys, the block equations, and configurations read from weights."""

from __future__ import annotations

from dataclasses import replace
from functools import cache, partial
from typing import Any
from unittest import mock

import numpy as np
import pytest
import timm
import torch
import torch.nn.functional as F
from scipy.special import erf
from torch import Tensor

from collapse_probe.capture.capture import record
from collapse_probe.errors import CheckpointError, ModelError
from collapse_probe.models.batchnorm import recalibrate
from collapse_probe.models.deepvit import FAMILY, DeepViT, DeepViTSettings, settings_from

Arrays = dict[str, np.ndarray]
PARAMETERS = {
    "deepvit_patch16_224_re_attn_16b": 24_426_664,
    "deepvit_patch16_224_re_attn_24b": 36_261_448,
    "deepvit_patch16_224_re_attn_32b": 48_096_232,
    "deepvit_s": 27_312_632,
    "deepvit_l": 58_883_708,
    "deepvit_l_384": 59_043_308,
    "deepvit_patch16_224_mhsa_12b": 18_507_112,
    "deepvit_patch16_224_mhsa_16b": 24_423_784,
    "deepvit_patch16_224_mhsa_24b": 36_257_128,
    "deepvit_patch16_224_mhsa_32b": 48_090_472,
}
ENTRIES = {
    "deepvit_patch16_224_re_attn_16b": 312,
    "deepvit_patch16_224_re_attn_24b": 464,
    "deepvit_patch16_224_re_attn_32b": 616,
    "deepvit_s": 247,
    "deepvit_l": 488,
    "deepvit_l_384": 488,
}
RE_ATTENDING = {
    **{f"deepvit_patch16_224_re_attn_{n}b": range(n) for n in (16, 24, 32)},
    "deepvit_s": range(11, 16),
    "deepvit_l": range(20, 32),
    "deepvit_l_384": range(20, 32),
}
TINY = DeepViTSettings(12, 3, (1, 2), "cnn", transform_scale=True, residual_scale=0.5, heads=3, image_size=32, classes=5)


@cache
def on_meta(name: str) -> Any:
    on_cpu = partial(torch.linspace, device="cpu")  # whose values older timm reads while it builds
    with torch.device("meta"), mock.patch("torch.linspace", on_cpu):
        return timm.create_model(name)


def official_layout(width: int, depth: int, mixing: range, cnn: bool, positions: int) -> dict[str, tuple[int, ...]]:
    """Every key and shape of the official state dict."""
    norm = {
        "weight": (12,),
        "bias": (12,),
        "running_mean": (12,),
        "running_var": (12,),
        "num_batches_tracked": (),
    }
    shapes: dict[str, tuple[int, ...]] = {
        "cls_token": (1, 1, width),
        "pos_embed": (1, positions, width),
        "norm.weight": (width,),
        "norm.bias": (width,),
        "head.weight": (1000, width),
        "head.bias": (1000,),
        "patch_embed.proj.weight": (width, 64, 8, 8) if cnn else (width, 3, 16, 16),
        "patch_embed.proj.bias": (width,),
    }
    if cnn:
        shapes |= {"patch_embed.conv1.weight": (64, 3, 7, 7), "patch_embed.conv2.weight": (64, 64, 3, 3)}
        for bn in ("bn1", "bn2"):
            shapes |= {f"patch_embed.{bn}.{leaf}": (64,) if shape else () for leaf, shape in norm.items()}
    for i in range(depth):
        inside = {
            "norm1.weight": (width,),
            "norm1.bias": (width,),
            "attn.qkv.weight": (3 * width, width),
            "attn.qkv.bias": (3 * width,),
            "attn.proj.weight": (width, width),
            "attn.proj.bias": (width,),
            "norm2.weight": (width,),
            "norm2.bias": (width,),
            "mlp.fc1.weight": (3 * width, width),
            "mlp.fc1.bias": (3 * width,),
            "mlp.fc2.weight": (width, 3 * width),
            "mlp.fc2.bias": (width,),
        }
        if i in mixing:
            inside |= {"attn.reatten_matrix.weight": (12, 12, 1, 1), "attn.reatten_matrix.bias": (12,)}
            inside |= {f"attn.var_norm.{leaf}": shape for leaf, shape in norm.items()}
        shapes |= {f"blocks.{i}.{key}": shape for key, shape in inside.items()}
    return shapes


def test_the_family_is_registered_with_timm() -> None:
    assert timm.list_models("*deepvit*") == sorted(PARAMETERS)
    assert set(FAMILY) == set(PARAMETERS)


@pytest.mark.parametrize("name", list(PARAMETERS))
def test_counts_keys_and_shapes_are_the_official_ones(name: str) -> None:
    model = on_meta(name)
    assert sum(p.numel() for p in model.parameters()) == PARAMETERS[name]
    settings = FAMILY[name]
    mixing = RE_ATTENDING.get(name, range(0))
    positions = 577 if name == "deepvit_l_384" else 197
    wanted = official_layout(settings.width, settings.depth, mixing, settings.stem == "cnn", positions)
    assert {key: tuple(value.shape) for key, value in model.state_dict().items()} == wanted
    assert len(wanted) == ENTRIES.get(name, len(wanted))
    assert settings.re_attention == tuple(mixing)


@pytest.mark.parametrize(("name", "numel"), [("deepvit_s", 383), ("deepvit_l", 558)])
def test_buffers_are_the_official_ones(name: str, numel: int) -> None:
    assert sum(buffer.numel() for buffer in on_meta(name).buffers()) == numel


@pytest.mark.parametrize("name", list(PARAMETERS))
def test_hidden_details_follow_from_the_name(name: str) -> None:
    model = on_meta(name)
    large = name in ("deepvit_s", "deepvit_l", "deepvit_l_384")
    assert {block.residual_scale for block in model.blocks} == {0.5 if large else 1.0}
    scales = {each.settings["scale"] for each in model.fixes}
    assert scales == ({33**-0.5} if name == "deepvit_s" else {1.0} if name in RE_ATTENDING else set())
    data = model.pretrained_cfg
    assert data["mean"] == data["std"] == (0.5, 0.5, 0.5)
    assert data["interpolation"] == "bicubic"
    assert data["crop_pct"] == (1.0 if name == "deepvit_l_384" else 0.9)
    assert data["input_size"] == ((3, 384, 384) if name == "deepvit_l_384" else (3, 224, 224))
    assert data["num_classes"] == 1000
    assert not data.get("url")


def test_re_attention_starts_at_random_as_officially() -> None:
    torch.manual_seed(0)
    model = DeepViT(replace(FAMILY["deepvit_patch16_224_re_attn_16b"], depth=8, re_attention=tuple(range(8))))
    theta = torch.stack([block.attn.reatten_matrix.weight for block in model.blocks])
    assert theta.abs().max().item() == pytest.approx(12**-0.5, rel=0.02)
    assert theta.std().item() == pytest.approx(6**-1, rel=0.05)
    assert model.cls_token.std().item() == pytest.approx(0.02, rel=0.2)
    assert model.blocks[0].attn.qkv.weight.std().item() == pytest.approx(0.02, rel=0.02)


def test_timm_settings_pass_and_plain_blocks_stay_fused(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[Tensor] = []
    kernel = F.scaled_dot_product_attention
    monkeypatch.setattr(
        F,
        "scaled_dot_product_attention",
        lambda *args, **more: calls.append(args[0]) or kernel(*args, **more),
    )
    model = DeepViT(TINY, num_classes=7, drop_path_rate=0.2)
    assert model(torch.randn(2, 3, 32, 32)).shape == (2, 7)
    assert len(calls) == 1
    assert [getattr(block.drop_path1, "drop_prob", 0.0) for block in model.blocks] == pytest.approx([0, 0.1, 0.2])
    with pytest.raises(ModelError, match=r"takes images of \(32, 32\), not \(48, 32\)"):
        model(torch.randn(2, 3, 48, 32))


def test_the_capture_tells_probs_from_weights() -> None:
    model = DeepViT(TINY).eval()
    with torch.no_grad(), record(model) as recording:
        model(torch.randn(2, 3, 32, 32))
    assert [recording.plan.layers[i].mixed for i in recording.plan.map_layers] == [False, True, True]
    assert recording.plan.prefix == (0,)


# A slow forward pass in NumPy, written from the equations alone.


def conv2d(x: np.ndarray, weight: np.ndarray, stride: int, padding: int) -> np.ndarray:
    x = np.pad(x, ((0, 0), (0, 0), (padding, padding), (padding, padding)))
    windows = np.lib.stride_tricks.sliding_window_view(x, weight.shape[2:], axis=(2, 3))
    return np.einsum("bchwij,ocij->bohw", windows[:, :, ::stride, ::stride], weight, optimize=True)


def batch_norm(x: np.ndarray, p: Arrays, key: str, training: bool) -> np.ndarray:
    mean, var = p[f"{key}.running_mean"], p[f"{key}.running_var"]
    if training:
        mean, var = x.mean((0, 2, 3)), x.var((0, 2, 3))
    gain = p[f"{key}.weight"] / np.sqrt(var + 1e-5)
    return (x - mean[:, None, None]) * gain[:, None, None] + p[f"{key}.bias"][:, None, None]


def layer_norm(x: np.ndarray, p: Arrays, key: str) -> np.ndarray:
    centred = x - x.mean(-1, keepdims=True)
    return centred / np.sqrt((centred**2).mean(-1, keepdims=True) + 1e-6) * p[f"{key}.weight"] + p[f"{key}.bias"]


def linear(x: np.ndarray, p: Arrays, key: str) -> np.ndarray:
    return x @ p[f"{key}.weight"].T + p[f"{key}.bias"]


def attention(x: np.ndarray, p: Arrays, key: str, settings: DeepViTSettings, training: bool) -> np.ndarray:
    images, tokens, width = x.shape
    size = width // settings.heads
    qkv = linear(x, p, f"{key}.qkv").reshape(images, tokens, 3, settings.heads, size)
    q, k, v = (qkv[:, :, i].transpose(0, 2, 1, 3) for i in range(3))
    logits = q @ k.transpose(0, 1, 3, 2) * size**-0.5
    probs = np.exp(logits - logits.max(-1, keepdims=True))
    probs /= probs.sum(-1, keepdims=True)
    if f"{key}.reatten_matrix.weight" in p:
        theta, bias = p[f"{key}.reatten_matrix.weight"][:, :, 0, 0], p[f"{key}.reatten_matrix.bias"]
        probs = np.einsum("hg,bgij->bhij", theta, probs) + bias[:, None, None]
        probs = batch_norm(probs, p, f"{key}.var_norm", training)
        probs = probs * (size**-0.5 if settings.transform_scale else 1.0)
    return linear((probs @ v).transpose(0, 2, 1, 3).reshape(images, tokens, width), p, f"{key}.proj")


def forward(images: np.ndarray, p: Arrays, settings: DeepViTSettings, training: bool) -> np.ndarray:
    x = images
    if settings.stem == "cnn":
        x = np.maximum(batch_norm(conv2d(x, p["patch_embed.conv1.weight"], 2, 3), p, "patch_embed.bn1", training), 0)
        x = np.maximum(batch_norm(conv2d(x, p["patch_embed.conv2.weight"], 1, 1), p, "patch_embed.bn2", training), 0)
    patches = conv2d(x, p["patch_embed.proj.weight"], 8 if settings.stem == "cnn" else 16, 0)
    patches = patches.reshape(*patches.shape[:2], -1).transpose(0, 2, 1) + p["patch_embed.proj.bias"]
    x = np.concatenate((np.repeat(p["cls_token"], len(images), 0), patches), 1) + p["pos_embed"]
    s = settings.residual_scale
    for i in range(settings.depth):
        block = f"blocks.{i}"
        x = x + attention(layer_norm(x * s, p, f"{block}.norm1"), p, f"{block}.attn", settings, training) / s
        hidden = linear(layer_norm(x * s, p, f"{block}.norm2"), p, f"{block}.mlp.fc1")
        hidden = hidden * (1 + erf(hidden / 2**0.5)) / 2
        x = x + linear(hidden, p, f"{block}.mlp.fc2") / s
    return linear(layer_norm(x, p, "norm")[:, 0], p, "head")


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize(
    "settings",
    [
        TINY,
        replace(TINY, transform_scale=False, re_attention=(2,)),
        replace(TINY, stem="patch", transform_scale=False, residual_scale=1.0, re_attention=(0, 1, 2)),
        replace(TINY, stem="patch", transform_scale=False, residual_scale=1.0, re_attention=()),
    ],
    ids=["S", "L", "16b", "mhsa"],
)
def test_the_forward_pass_follows_the_equations(settings: DeepViTSettings, training: bool) -> None:
    torch.manual_seed(0)
    model = DeepViT(settings).double().train(training)
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if tensor.is_floating_point():
            tensor.data.normal_(std=0.5)
        if name.endswith("running_var"):
            tensor.data.abs_().add_(0.5)
    images = torch.randn(2, 3, 32, 32, dtype=torch.float64)
    p = {name: tensor.detach().numpy().copy() for name, tensor in model.state_dict().items()}
    expected = forward(images.numpy(), p, settings, training)
    np.testing.assert_allclose(model(images).detach(), expected, rtol=0, atol=1e-9)
    assert np.abs(expected).max() > 0.1


def test_recalibrated_in_eval_mode_it_is_close_to_train_mode() -> None:
    torch.manual_seed(0)
    model = DeepViT(TINY)
    images = torch.randn(8, 3, 32, 32)
    with torch.no_grad():
        trained = model(images)
        model.eval()
        assert recalibrate(model, [images]) == 1
        torch.testing.assert_close(model(images), trained, rtol=0, atol=5e-3)


# Configurations read from weights.


@pytest.mark.parametrize("name", list(PARAMETERS))
def test_settings_are_read_from_the_weights_with_or_without_the_name(name: str) -> None:
    weights = on_meta(name).state_dict()
    assert settings_from(weights) == settings_from(weights, name) == FAMILY[name]
    wrapped = {f"module.{key}": value for key, value in weights.items()}
    assert settings_from(wrapped, name) == FAMILY[name]


def test_official_spelling_of_names_is_understood() -> None:
    weights = on_meta("deepvit_s").state_dict()
    weights["head.weight"] = torch.empty(10, 396, device="meta")
    assert settings_from(weights, "deepvit_S") == replace(FAMILY["deepvit_s"], classes=10)


def test_a_checkpoint_that_contradicts_its_name_is_refused() -> None:
    large = on_meta("deepvit_l").state_dict()
    with pytest.raises(CheckpointError, match="width is 420 in the weights, 396 in deepvit_s") as error:
        settings_from(large, "deepvit_s")
    assert "they look like deepvit_l or deepvit_l_384" in str(error.value)
    with pytest.raises(CheckpointError, match="image_size is 224 in the weights, 384 in deepvit_l_384"):
        settings_from(large, "deepvit_l_384")
    plain = on_meta("deepvit_patch16_224_mhsa_16b").state_dict()
    with pytest.raises(CheckpointError, match=r"re_attention is \(\) in the weights"):
        settings_from(plain, "deepvit_patch16_224_re_attn_16b")
    with pytest.raises(ModelError, match="no DeepViT is called 'deepvit_m'"):
        settings_from(large, "deepvit_m")


def test_weights_of_something_else_are_refused() -> None:
    with pytest.raises(CheckpointError, match="there is no 'cls_token'"):
        settings_from({"conv1.weight": torch.empty(1)})
    with pytest.raises(CheckpointError, match="no official DeepViT is 12 wide"):
        settings_from(DeepViT(TINY).state_dict())
    odd = on_meta("deepvit_s").state_dict() | {"pos_embed": torch.empty(1, 200, 396, device="meta")}
    with pytest.raises(CheckpointError, match="patches fill no square"):
        settings_from(odd)
