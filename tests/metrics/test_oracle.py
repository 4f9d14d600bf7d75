"""Every fast path of the default attention metrics against the oracle, which never forms two maps; and what breaks it."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import oracle
import pytest
import timm
import torch
import toy_models
from factories import small_vit
from torch import nn

from collapse_probe.analysis.measurement import Measurement, RunSettings, make_metrics
from collapse_probe.capture.capture import discover_plan, record
from collapse_probe.data.loading import Batch
from collapse_probe.metrics.coverage import compared_pairs
from collapse_probe.metrics.functional import neighbours
from collapse_probe.models.loading import resolve

NAMES = ("attention-similarity", "attention-similarity@row", "attention-similarity@centred", "attention-entropy")
SMALL = {"img_size": 64, "patch_size": 16, "embed_dim": 48, "depth": 3, "num_heads": 4, "num_classes": 5}


def peaked(model, scale=1.5):
    """Queries and keys so large that maps are far from uniform."""
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if p.ndim == 2 and any(word in name for word in ("qkv", "query", "key", "in_proj", "q_proj", "k_proj")):
                p.copy_(torch.randn(p.shape, generator=generator) * scale / p.shape[1] ** 0.5)
            if "relative_position_bias_table" in name:
                p.copy_(torch.randn(p.shape, generator=generator))
    return model.eval()


def registers():
    return small_vit(sharpness=6.0, reg_tokens=4)


def distilled():
    from timm.models.deit import VisionTransformerDistilled

    return peaked(VisionTransformerDistilled(**SMALL))


def beit():
    from timm.models.beit import Beit

    return peaked(Beit(**SMALL, use_rel_pos_bias=True))


def eva():
    from timm.models.eva import Eva

    return peaked(Eva(**SMALL, use_rot_pos_emb=True))


def swin():
    settings = {"embed_dim": 16, "depths": (4, 2), "num_heads": (2, 4), "num_classes": 5}
    model = timm.models.SwinTransformer(img_size=64, patch_size=4, window_size=4, **settings)
    for module in model.modules():
        if hasattr(module, "fused_attn"):
            module.fused_attn = True
    return peaked(model)


def torchvision_vit():
    from torchvision.models import VisionTransformer

    return peaked(VisionTransformer(64, 16, 3, 4, 48, 96))


def transformers_vit(kind="ViT"):
    transformers = pytest.importorskip("transformers")
    settings = {"hidden_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 96}
    config = getattr(transformers, f"{kind}Config")(image_size=64, patch_size=16, **settings)
    config._attn_implementation = "sdpa"
    return peaked(getattr(transformers, f"{kind}Model")(config))


def deepvit():
    from collapse_probe.models.deepvit import DeepViT, DeepViTSettings

    return peaked(DeepViT(DeepViTSettings(width=48, depth=3, heads=4, image_size=64, classes=5)))


MODELS = {
    "timm ViT": lambda: small_vit(sharpness=6.0),
    "near-uniform": lambda: small_vit(sharpness=0.3),
    "registers": registers,
    "distilled DeiT": distilled,
    "BEiT, biased": beit,
    "EVA, rotary": eva,
    "Swin, windows and masks": swin,
    "torchvision": torchvision_vit,
    "transformers ViT": transformers_vit,
    "transformers DINOv2": lambda: transformers_vit("Dinov2"),
    "DeepViT without mixing": deepvit,
    **{f"toy {kind.__name__}": lambda kind=kind: toy_models.toy(kind, 3) for kind in toy_models.FUSED},
}


def size_of(model):
    return toy_models.SIZE if isinstance(model, toy_models.ToyViT) else (64, 64)


def traced(model, images, dtype=None):
    model = nn.Module.to(model, dtype) if dtype else model
    plan = discover_plan(model, size_of(model))
    with torch.no_grad(), record(model, plan) as recordings:
        model(images.to(dtype) if dtype else images)
    return recordings.take()


def measured(trace, names=NAMES):
    """The numbers of a trace, and those of its single images, on the path on which every model is measured."""

    class Given(Measurement):
        def _traced(self, model, pixels):
            return trace

    settings = RunSettings(device="cpu", null_images=0, gallery_images=0)
    run = Given(resolve(nn.Identity()), trace.plan, make_metrics(trace.plan, names), settings)
    run.update(Batch((), tuple(f"{i}.png" for i in range(trace.images)), torch.zeros(trace.images, *trace.plan.input_shape)))
    table = run.table()
    return run.results(table), run.per_image(table)


def check(trace, given=None):
    """Compare the numbers of a trace with the oracle's of the same queries and keys; how many pairs of blocks were compared.

    `given` is another trace that the library is shown instead.
    """
    results, single = measured(given or trace)
    plan, pairs = trace.plan, 0
    layers = [plan.layers[i] for i in plan.map_layers]
    parts = [oracle.Softmax.of(trace.attention[i]) for i in plan.map_layers]
    for place, (layer, part) in enumerate(zip(layers, parts, strict=True)):
        entropies = oracle.entropies(part).mean((0, 2)).numpy()
        found = results["attention-entropy"].values[place]
        np.testing.assert_allclose(found[: layer.heads], entropies, rtol=0, atol=2e-6)
        for other in range(place + 1):
            found = results["attention-similarity"].values[place, other]
            if not np.isfinite(found):
                continue
            pairs += 1
            columns = oracle.cosines(parts[other], part, layer.windows)
            null = results["attention-similarity"].nulls.values["other_token"][place, other]
            np.testing.assert_allclose(found, columns["real"].mean(), rtol=0, atol=1e-6)
            np.testing.assert_allclose(null, columns["other_token"].mean(), rtol=0, atol=1e-6)
            rows = oracle.cosines(parts[other], part, layer.windows, "row")["real"]
            np.testing.assert_allclose(results[NAMES[1]].values[place, other], rows.mean(), rtol=0, atol=1e-6)
            centred = oracle.cosines(parts[other], part, layer.windows, centred=True)["real"]
            np.testing.assert_allclose(results[NAMES[2]].values[place, other], centred.mean(), rtol=0, atol=1e-6)
            if other == place - 1:
                for name, each in zip(NAMES, (columns["real"], rows, centred), strict=False):
                    np.testing.assert_allclose(single[name][:, other], each, rtol=0, atol=1e-5)
    return pairs


@pytest.mark.parametrize("name", MODELS)
def test_the_numbers_of_every_model_are_the_oracles(name):
    model = MODELS[name]()
    images = torch.randn(3, 3, *size_of(model), generator=torch.Generator().manual_seed(1))
    trace = traced(model, images)
    blocks = len(trace.plan.map_layers)
    assert check(trace) >= blocks + 1


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("sharpness", [0.3, 1.0, 6.0])
def test_the_numbers_are_the_oracles_in_every_dtype(dtype, sharpness):
    images = torch.randn(3, 3, 64, 64, generator=torch.Generator().manual_seed(1))
    assert check(traced(small_vit(sharpness=sharpness), images, dtype)) == 10


def test_the_identity_holds_for_no_map_that_is_mixed():
    mixed = traced(toy_models.toy(toy_models.Gated, 2), toy_models.images())
    with pytest.raises(ValueError, match="no softmax of queries and keys"):
        oracle.Softmax.of(mixed.attention[0])
    cait = timm.create_model("cait_xxs24_224", img_size=64, depth=2, num_classes=5).eval()
    talking = traced(cait, torch.randn(2, 3, 64, 64))
    with pytest.raises(ValueError, match="no softmax of queries and keys"):
        oracle.Softmax.of(talking.attention[talking.plan.map_layers[0]])


def broken(trace, **change):
    """The trace with something of its second attention changed."""
    place = trace.plan.map_layers[1]
    attention = list(trace.attention)
    attention[place] = replace(attention[place], logsumexp=None, **{k: f(attention[place]) for k, f in change.items()})
    return replace(trace, attention=tuple(attention))


@pytest.mark.parametrize(
    ("kind", "change"),
    [
        (toy_models.ToyAttention, {"k": lambda a: -a.k}),
        (toy_models.ToyAttention, {"scale": lambda a: a.scale * 1.01}),
        (toy_models.ToyAttention, {"q": lambda a: a.q.flip(1)}),
        (toy_models.ToyAttention, {"k": lambda a: a.k.roll(1, 2)}),
        (toy_models.Masked, {"bias": lambda a: None}),
        (toy_models.Masked, {"bias": lambda a: a.bias.mT}),
        (toy_models.Biased, {"bias": lambda a: -a.bias}),
        (toy_models.Biased, {"bias": lambda a: a.bias.mT}),
        (toy_models.Causal, {"causal": lambda a: False}),
        (toy_models.Scaled, {"scale": lambda a: a.q.shape[-1] ** -0.5}),
    ],
    ids=[
        "sign",
        "scale",
        "heads",
        "tokens",
        "no mask",
        "mask turned",
        "sign of the bias",
        "bias turned",
        "no causal mask",
        "own scale",
    ],
)
def test_the_oracle_disagrees_with_what_is_broken(kind, change):
    trace = traced(toy_models.toy(kind, 3), toy_models.images())
    check(trace)
    with pytest.raises(AssertionError):
        check(trace, broken(trace, **change))


ALONE = "neighbour-similarity"


@pytest.mark.parametrize(
    ("name", "few"),
    [
        ("timm ViT", 1),
        ("toy Causal", 1),
        ("timm ViT", 3000),
        ("BEiT, biased", 3000),
        ("toy Blind", 3000),
        ("toy Padded", 2**24),
    ],
)
def test_neighbours_alone_are_those_of_the_whole(name, few, monkeypatch):
    monkeypatch.setitem(neighbours.TILE_BYTES, "cpu", few)
    compare_neighbours(MODELS[name](), 2)


def test_neighbours_alone_inside_windows():
    swin_of_one_partition = MODELS["Swin, windows and masks"]()
    for module in swin_of_one_partition.modules():
        if hasattr(module, "shift_size"):
            module.shift_size = module.target_shift_size = (0, 0)
            module.attn_mask = None
    compare_neighbours(swin_of_one_partition, 4)


def compare_neighbours(model, pairs):
    trace = traced(model, torch.randn(3, 3, *size_of(model), generator=torch.Generator().manual_seed(1)))
    results, single = measured(trace, (NAMES[0], ALONE))
    whole, alone = results[NAMES[0]], results[ALONE]

    def before(values):
        return np.concatenate([np.full((1, *values.shape[2:]), np.nan), np.moveaxis(np.diagonal(values, -1), -1, 0)])

    assert np.isfinite(alone.values).sum() == sum(compared_pairs(trace.plan)) >= pairs
    assert np.isfinite(alone.nulls.kappa_ci95).all(-1).sum() >= pairs
    np.testing.assert_allclose(alone.values, before(whole.values), rtol=0, atol=1e-6)
    np.testing.assert_allclose(alone.ci95, before(whole.ci95), rtol=0, atol=1e-5)
    np.testing.assert_allclose(single[ALONE][:, 1:], single[NAMES[0]], rtol=0, atol=1e-6)
    for null in ("other_token", "kappa"):
        np.testing.assert_allclose(alone.nulls.values[null], before(whole.nulls.values[null]), rtol=0, atol=1e-5)
    np.testing.assert_allclose(alone.nulls.kappa_ci95, before(whole.nulls.kappa_ci95), rtol=0, atol=1e-4)
    for null in ("other_head", "other_image"):
        assert alone.nulls.values[null] is None
        assert "attention-similarity does" in alone.nulls.reasons[null]


def test_neighbours_alone_of_maps_that_are_mixed():
    trace = traced(toy_models.toy(toy_models.Changed, 3), toy_models.images())
    for point in ("", "@probs"):
        whole, alone = measured(trace, (NAMES[0] + point, ALONE + point))[0].values()
        np.testing.assert_allclose(alone.values[1:], np.diag(whole.values, -1), rtol=0, atol=1e-6)


def test_neighbours_alone_ask_for_no_tile(monkeypatch):
    trace = traced(small_vit(sharpness=6.0), torch.randn(2, 3, 64, 64))
    monkeypatch.setattr(type(trace), "tiles", lambda self, budget: pytest.fail("a tile was asked for"))
    assert np.isfinite(measured(trace, (ALONE,))[0][ALONE].values).sum() == 3


@pytest.mark.parametrize("kind", [toy_models.ToyAttention, toy_models.Matmul, toy_models.Biased])
def test_neighbours_alone_lose_no_column_to_underflow(kind):
    model = toy_models.toy(kind, 3)
    with torch.no_grad():
        for block in model.blocks:
            block.attn.q.weight *= 20  # so peaked that whole columns are as small as 1e-30
    trace = traced(model, toy_models.images())
    smallest = min(maps.amax(-2).min() for maps in (trace.maps(i) for i in range(3)))
    assert 0 < smallest < 1e-24
    whole, alone = measured(trace, (NAMES[0], ALONE))[0].values()
    np.testing.assert_allclose(alone.values[1:], np.diag(whole.values, -1), rtol=0, atol=1e-6)
    np.testing.assert_allclose(alone.nulls.values["other_token"][1:], np.diag(whole.nulls.values["other_token"], -1), atol=1e-6)
