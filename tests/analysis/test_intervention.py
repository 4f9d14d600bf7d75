"""Replaced maps: nothing else changes, and each replacement is what a model changed by hand computes."""

from __future__ import annotations

import copy

import pytest
import timm
import torch
from factories import small_vit
from torch import nn
from toy_models import (
    CHANGED,
    EAGER,
    FUSED,
    SIZE,
    Block,
    Encoder,
    ErasesMap,
    Matmul,
    OneKey,
    Padded,
    Projected,
    ToyAttention,
    ToyViT,
    Wide,
    images,
    sharpen,
    toy,
)

from collapse_probe.capture.attention_operators import storage_of
from collapse_probe.capture.capture import discover_plan, same
from collapse_probe.capture.edits.branches import branches_of
from collapse_probe.capture.edits.replacement import KINDS, Replacement, refusal, replacements_for, replacing, source_of
from collapse_probe.capture.recorder import ModuleTable
from collapse_probe.errors import CaptureError
from collapse_probe.models.vit import ViT, ViTSettings

ALL = FUSED + EAGER + CHANGED
ALONE = [kind for kind in KINDS if kind != "donor"]  # which takes other images beside each image


pytestmark = pytest.mark.usefixtures("one_thread")


def run(model, kind, blocks, pictures, size=SIZE):
    """The model's output with maps replaced, and the plan."""
    plan = discover_plan(model, size)
    branches = branches_of(model, plan, size)
    for block in blocks:
        assert refusal(plan, kind, block, branches) == ""
    means = {}
    if kind == "mean":
        with replacing(model, plan, {}, gather=lambda i, maps: means.__setitem__(i, maps.double().mean(0).float())):
            model(pictures)
    with replacing(model, plan, replacements_for(plan, kind, blocks, branches), means=means):
        return model(pictures)


class ByHand(nn.Module):
    """A toy's attention in float64 from its own description of its maps; `choose` may give another map."""

    def __init__(self, attention, choose):
        super().__init__()
        self.attention, self.choose = attention, choose

    def forward(self, x):
        a = self.attention

        def mix(q, k, v):
            probs, weights = a.reference(q.double(), k.double())
            v = v.repeat_interleave(q.shape[1] // v.shape[1], 1)[:, :, : weights.shape[-1]]
            return (self.choose(probs.double(), weights.double()) @ v.double()).float()

        a.mix = mix
        return a(x)


@torch.no_grad()
def by_hand(model, kind, blocks, pictures):
    """What the toy computes with maps replaced, without the library."""
    model, before, means = copy.deepcopy(model), [], {}

    def chooser(block, gathering):
        def choose(probs, weights):
            if gathering:
                means[block] = weights.mean(0)
                return weights
            if block in blocks and kind == "share":
                weights = before[-1]
            elif block in blocks and kind == "mean":
                weights = means[block].expand_as(weights)
            elif block in blocks and kind == "uniform":
                weights = (probs != 0).double() / (probs != 0).sum(-1, keepdim=True).clamp_min(1)
            elif block in blocks and kind == "identity":
                weights = torch.eye(weights.shape[-1]).double().expand_as(weights)
            before.append(weights)
            return weights

        return choose

    for gathering in (True, False):
        changed = copy.deepcopy(model)
        for i, block in enumerate(changed.blocks):
            block.attn = ByHand(block.attn, chooser(i, gathering))
            if kind == "skip" and i in blocks:
                block.attn = Zeros()
        out = changed(pictures)
    return out


class Zeros(nn.Module):
    def forward(self, x):
        return torch.zeros_like(x)


@pytest.mark.parametrize("attention", ALL, ids=lambda kind: kind.__name__)
def test_with_nothing_replaced_the_output_is_the_plain_one_to_the_bit(attention):
    model, pictures = toy(attention, 3), images(3)
    plan = discover_plan(model, SIZE)
    with torch.no_grad():
        plain = model(pictures)
    with replacing(model, plan, {}):
        assert torch.equal(model(pictures), plain)
    assert torch.equal(run(model, "share", [], pictures), plain)


PAIRS = [(attention, kind) for attention in ALL for kind in ALONE if (attention, kind) != (OneKey, "identity")]


@pytest.mark.parametrize("blocks", [[1], [2], [1, 2]], ids=str)
@pytest.mark.parametrize(("attention", "kind"), PAIRS, ids=lambda x: getattr(x, "__name__", x))
def test_each_replacement_is_what_the_model_changed_by_hand_computes(attention, kind, blocks):
    model, pictures = toy(attention, 3), images(3)
    found, expected = run(model, kind, blocks, pictures), by_hand(model, kind, blocks, pictures)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=2e-4 * float(expected.abs().max()))


@pytest.mark.parametrize("attention", ALL, ids=lambda kind: kind.__name__)
def test_a_donor_lends_its_own_map_and_keeps_it(attention):
    model, pictures = toy(attention, 3), images(4)
    plan = discover_plan(model, SIZE)
    before, after = {}, {}
    with replacing(model, plan, {}, gather=lambda i, maps: before.__setitem__(i, maps)):
        plain = model(pictures)
    with replacing(model, plan, replacements_for(plan, "donor", [1], {}), gather=lambda i, maps: after.__setitem__(i, maps)):
        found = model(pictures)
    torch.testing.assert_close(after[1], torch.cat([before[1][2:]] * 2), rtol=0, atol=0)
    torch.testing.assert_close(found[2:], plain[2:], rtol=1e-4, atol=2e-4 * float(plain.abs().max()))
    itself = torch.cat([pictures[:2]] * 2)
    with torch.no_grad():
        plain = model(itself)
    with replacing(model, plan, replacements_for(plan, "donor", [1, 2], {})):
        same_image = torch.allclose(model(itself), plain, rtol=1e-4, atol=2e-4 * float(plain.abs().max()))
    assert same_image or attention is Padded  # which hides keys by the image's place in the batch


def test_the_replacements_are_different_things():
    pictures = images(3)
    found = [run(toy(Matmul, 3), kind, [1, 2], pictures) for kind in ALONE]
    assert all(not torch.allclose(a, b, atol=1e-2) for i, a in enumerate(found) for b in found[:i])


def test_a_lent_map_stays_when_its_owner_overwrites_it():
    torch.testing.assert_close(run(toy(ErasesMap, 2), "share", [1], images()), run(toy(Matmul, 2), "share", [1], images()))


class KeepsItsMap(Matmul):
    """Keeps the map, and the product with it, for whoever asks later."""

    def mix(self, q, k, v):
        self.newest = self.logits(q, k).softmax(-1)
        self.product = self.newest @ v
        return self.product


def test_modules_read_off_once_serve_every_condition_also_where_one_keeps_its_maps():
    model, pictures = toy(KeepsItsMap, 3), images()
    plan = discover_plan(model, SIZE)
    conditions = [{}, *(replacements_for(plan, "share", blocks, {}) for blocks in ([1], [2], [1, 2]))]
    model(pictures)
    once = ModuleTable.of(model)
    for _ in range(3):
        for replacements in conditions:
            with replacing(model, plan, replacements, modules=once):
                shared = model(pictures)
            with replacing(model, plan, replacements):
                assert torch.equal(shared, model(pictures))
    assert once.fixed == {storage_of(weight) for weight in once.weights}  # held: their memory is nobody else's
    assert any(weight.shape[-2:] == (plan.tokens, plan.tokens) for weight in once.weights)  # also the maps of the first pass


def test_share_is_the_shared_attention_fix():
    settings = ViTSettings(image_size=16, patch_size=8, depth=4, width=16, heads=2, classes=3)
    model = sharpen(ViT(settings))
    fixed = ViT(ViTSettings(**{**vars(settings), "fixes": {"shared-attention": {"source_block": 1, "blocks": [2, 3]}}}))
    fixed.load_state_dict(model.state_dict())
    pictures = torch.randn(3, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = fixed.eval()(pictures)
    torch.testing.assert_close(run(model, "share", [2, 3], pictures, (16, 16)), expected, rtol=1e-4, atol=1e-5)


def hugging_face(implementation):
    from transformers import ViTConfig, ViTForImageClassification

    sizes = {"hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 32}
    config = ViTConfig(**sizes, image_size=32, patch_size=16, num_labels=5, attn_implementation=implementation)
    return ViTForImageClassification(config)


def torchvision_vit():
    from torchvision.models import VisionTransformer

    sizes = {"num_layers": 3, "num_heads": 2, "hidden_dim": 16, "mlp_dim": 32, "num_classes": 5}
    return VisionTransformer(image_size=32, patch_size=16, **sizes)


TIMM = {"img_size": 32, "patch_size": 16, "embed_dim": 16, "depth": 3, "num_heads": 2, "num_classes": 5}
DISTILLED = {key: value for key, value in TIMM.items() if key != "patch_size"}
RE_ATTENTION = {"re-attention": {"norm": "batch"}}
MODELS = {
    "timm": lambda: timm.models.VisionTransformer(**TIMM),
    "timm-layer-scale": lambda: timm.models.VisionTransformer(**TIMM, init_values=0.5),
    "deit-distilled": lambda: timm.create_model("deit_tiny_distilled_patch16_224", **DISTILLED),
    "torchvision": torchvision_vit,
    "hf-sdpa": lambda: hugging_face("sdpa"),
    "hf-eager": lambda: hugging_face("eager"),
    "multi-head": lambda: ToyViT([Block(Projected(call={"need_weights": False})) for _ in range(3)]),
    "multi-head-weights": lambda: ToyViT([Block(Projected(call={"need_weights": True})) for _ in range(3)]),
    "encoder": lambda: ToyViT([Encoder() for _ in range(3)]),
    "encoder-norm-first": lambda: ToyViT([Encoder(norm_first=True) for _ in range(3)]),
}


def made(name):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return sharpen(MODELS[name](), scale=2.0 if name.startswith("encoder") else 1.0)


def size_of(model):
    return SIZE if isinstance(model, ToyViT) else (32, 32)


def output(answer):
    return getattr(answer, "logits", answer)


def zeroed_queries(model, blocks=(1, 2)):
    """A copy in which the queries of some blocks are zeros, so that attention there is uniform."""
    model = copy.deepcopy(model)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if not _in(name, blocks):
                continue
            if "qkv" in name or "in_proj" in name:
                p[: len(p) // 3] = 0
            elif "query" in name or "q_proj" in name:
                p.zero_()
    return model


def zeroed_results(model, blocks=(1, 2)):
    """A copy in which the projection after the attention of some blocks is zero, bias included."""
    model = copy.deepcopy(model)
    found = 0
    with torch.no_grad():
        for name, p in model.named_parameters():
            if _in(name, blocks) and any(w in name for w in ("attn.proj", "out_proj", "attention.output", "o_proj")):
                p.zero_()
                found += 1
    assert found == 2 * len(blocks)
    return model


def _in(name, blocks):
    return any(f".{b}." in f".{name}" or f"layer_{b}." in name for b in blocks)


@pytest.mark.parametrize("name", MODELS)
def test_nothing_replaced_uniform_and_skip_in_other_peoples_models(name):
    model = made(name)
    size = size_of(model)
    pictures = images(3, size=size)
    plan = discover_plan(model, size)
    with torch.no_grad():
        plain = model(pictures)
        uniform = output(zeroed_queries(model)(pictures))
        skipped = output(zeroed_results(model)(pictures))
    with replacing(model, plan, {}):
        assert same(model(pictures), plain)
    found = output(run(model, "uniform", [1, 2], pictures, size))
    torch.testing.assert_close(found, uniform, rtol=1e-3, atol=1e-4)
    assert not torch.allclose(found, output(plain), rtol=0, atol=1e-2)
    torch.testing.assert_close(output(run(model, "skip", [1, 2], pictures, size)), skipped, rtol=1e-3, atol=1e-4)


def test_hooks_and_modes_leave_also_after_an_error():
    model = toy(Matmul, 2)
    plan = discover_plan(model, SIZE)
    with pytest.raises(CaptureError, match="attention call 0"), replacing(model, plan, {}):
        model(images(2, size=(32, 32)))
    with torch.no_grad():
        plain = model(images())
    with replacing(model, plan, replacements_for(plan, "uniform", [0], {})):
        model(images())
    with torch.no_grad():
        assert torch.equal(model(images()), plain)


def test_half_precision_stays_what_it_was():
    model = toy(ToyAttention, 2).bfloat16()
    plan = discover_plan(model, SIZE)
    with replacing(model, plan, replacements_for(plan, "share", [1], {})):
        out = model(images().bfloat16())
    assert out.dtype == torch.bfloat16
    exact = by_hand(toy(ToyAttention, 2), "share", [1], images())
    assert torch.allclose(out.float(), exact, atol=0.1 * float(exact.abs().max()))


def test_what_does_not_apply_says_why():
    plan = discover_plan(toy(ToyAttention, 2), SIZE)
    assert refusal(plan, "share", 0, {}) == "there is no block before it"
    assert source_of(plan, 1) == 0
    assert "the residual is added within" in refusal(plan, "skip", 0, {})
    one_key = discover_plan(toy(OneKey, 2), SIZE)
    assert refusal(one_key, "identity", 1, {}) == "its maps are not square (13 × 1)"


class AddsItself(ToyAttention):
    """An attention module that adds the residual stream itself, beside the block's own."""

    def forward(self, x):
        return x + super().forward(x)


def test_a_branch_that_holds_the_residual_is_not_skipped():
    model = toy(AddsItself, 2)
    plan = discover_plan(model, SIZE)
    branches = branches_of(model, plan, SIZE)
    assert branches == {}
    assert refusal(plan, "skip", 1, branches).startswith("blocks.1.attn: no module")


def test_windows_share_nothing_but_may_be_uniform_or_skipped():
    model = timm.models.SwinTransformer(
        img_size=32, patch_size=4, window_size=4, embed_dim=16, depths=(2, 2), num_heads=(2, 2), num_classes=5
    ).eval()
    plan, pictures = discover_plan(model, (32, 32)), images(2, size=(32, 32))
    branches = branches_of(model, plan, (32, 32))
    for kind in ("share", "mean"):
        assert "window" in refusal(plan, kind, 1, branches)
    with torch.no_grad():
        plain = model(pictures)
    with replacing(model, plan, {}):
        assert torch.equal(model(pictures), plain)
    with replacing(model, plan, replacements_for(plan, "uniform", [0, 1], branches)):
        assert not torch.equal(model(pictures), plain)
    without = copy.deepcopy(model)
    for block in without.layers[0].blocks:
        nn.init.zeros_(block.attn.proj.weight), nn.init.zeros_(block.attn.proj.bias)
    with torch.no_grad():
        expected = without(pictures)
    with replacing(model, plan, replacements_for(plan, "skip", [0, 1], branches)):
        torch.testing.assert_close(model(pictures), expected, rtol=1e-4, atol=1e-5)


def test_maps_that_were_mixed_are_shared_as_they_multiply_the_values():
    settings = ViTSettings(image_size=16, patch_size=8, depth=3, width=16, heads=2, classes=3, fixes=RE_ATTENTION)
    model = sharpen(ViT(settings))
    plan, pictures = discover_plan(model, (16, 16)), images(2, size=(16, 16))
    maps = {}
    with replacing(model, plan, {2: Replacement("share", 1)}, gather=maps.__setitem__):
        model(pictures)
    assert plan.layers[1].mixed
    torch.testing.assert_close(maps[2], maps[1], rtol=0, atol=0)
    assert float(maps[1].min()) < 0


def test_wide_values_on_the_math_path_are_heard_and_replaced():
    assert not torch.allclose(run(toy(Wide, 2), "uniform", [1], images()), toy(Wide, 2)(images()), atol=1e-2)


def test_small_timm_model_with_eager_attention_equals_the_fused_one():
    fused, eager = small_vit(sharpness=6.0), small_vit(sharpness=6.0)
    for block in eager.blocks:
        block.attn.fused_attn = False
    pictures = images(3, size=(64, 64))
    for kind in ALONE:
        found = [run(model, kind, [1, 3], pictures, (64, 64)) for model in (fused, eager)]
        torch.testing.assert_close(*found, rtol=1e-4, atol=1e-5)
