"""Weights and activations that are NaN or infinite: named with block, head and image, never averaged away in silence."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import timm
import torch
from factories import small_vit, trace_of
from toy_models import SIZE, Blind, Masked, ToyAttention, toy

from collapse_probe.analysis.analyze import analyze
from collapse_probe.analysis.compare import compare
from collapse_probe.analysis.intervene import intervene
from collapse_probe.analysis.intervention.runner import ReplacementRunner
from collapse_probe.capture.capture import record
from collapse_probe.errors import NonFiniteError
from collapse_probe.metrics.nonfinite import nonfinite_images, nonfinite_weights
from collapse_probe.report.intervention.verdict import verdicts

NAN, INF = float("nan"), float("inf")
TINY = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 3, "num_heads": 2}
ILL = [1, 4]
FAST = {"img_size": 32, "batch_size": 4, "null_images": 0, "gallery_images": 0}
METRICS = ("attention-similarity", "similar-blocks", "image-similarity", "attention-entropy", "patch-diversity", "layer-cka")


def model(**settings):
    return small_vit(**{**TINY, **settings})


def pictures(count=6, ill=ILL):
    """Noise, in batches of three; the bright ones are those of which a `poisoned` model makes something that is not finite."""
    images = torch.randn(count, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    images[ill] += 3
    return [*images.split(3)]


def poisoned(place, value=NAN, into=model, **settings):
    """A model with finite weights whose module at `place` gives `value` in its first numbers for bright images."""
    vit, bright = into(**settings), []
    vit.register_forward_pre_hook(lambda module, args: bright.append(args[0].mean((1, 2, 3)) > 1))

    def poison(module, args, output):
        output = output.clone()
        output[bright[-1].repeat_interleave(len(output) // len(bright[-1])), ..., :1] = value  # in all windows of an image
        return output

    vit.get_submodule(place).register_forward_hook(poison)
    return vit


@pytest.mark.parametrize(
    ("name", "value", "where"),
    [
        ("blocks.2.attn.qkv.weight", NAN, "attention logits of blocks.2.attn, head 0"),
        ("blocks.1.attn.qkv.bias", INF, "attention logits of blocks.1.attn, head 0"),
        ("blocks.0.mlp.fc1.weight", -INF, "attention logits of blocks.1.attn, heads 0, 1"),
        ("head.weight", NAN, "in its output"),
    ],
)
def test_weights_that_are_not_finite_are_named_with_where_they_are_felt(name, value, where):
    vit = model()
    with torch.no_grad():
        vit.get_parameter(name).view(-1)[0] = value
    kind = "NaN" if np.isnan(value) else "inf"
    with pytest.raises(NonFiniteError, match=rf"{name} \(1 of [\d,]+ values {kind}\).*{where}"):
        analyze(vit, pictures(), **FAST)


def test_weights_that_nothing_uses_are_an_error_or_said_first():
    vit = model()
    vit.unused = torch.nn.Parameter(torch.full((3,), NAN))
    with pytest.raises(NonFiniteError, match=r"unused \(3 of 3 values NaN\); noise images do not show it"):
        analyze(vit, pictures(), **FAST)
    found = analyze(vit, pictures(), on_nonfinite="skip", **FAST)
    assert found.answer["sentences"][0] == found.run["notes"][0] == found.run["nonfinite"]["sentence"]
    assert "unused (3 of 3 values NaN)" in found.run["notes"][0]
    assert found.data["images"] == 6


def test_what_is_meant_to_be_infinite_is_no_illness():
    vit = model()
    vit.register_buffer("mask", torch.full((4, 4), -INF).triu(1))
    vit.register_buffer("least", torch.tensor(INF))
    vit.bias_table = torch.nn.Parameter(torch.tensor([0.0, -INF]), requires_grad=False)
    vit.register_buffer("counts", torch.tensor([1, 2]))
    assert nonfinite_weights(vit) == []
    vit.register_buffer("running_var", torch.tensor([1.0, INF]))
    vit.register_buffer("angles", torch.tensor([1.0, NAN, 0.5]))
    vit.half_of_it = torch.nn.Parameter(torch.tensor([60000.0, 60000.0]).half())  # whose sum overflows
    assert nonfinite_weights(vit) == ["running_var (1 of 2 values inf)", "angles (1 of 3 values NaN)"]


PLACES = {
    "blocks.1.attn.qkv": "NaN in the attention logits of block 1, head 0 of 2",
    "blocks.1.norm1": "NaN in the attention logits of block 1, heads 0–1 of 2",
    "blocks.0.mlp": "NaN in the tokens that leave block 0",
    "patch_embed": "NaN in the tokens that enter block 0",
    "head": "NaN in the model's output",
}


@pytest.mark.parametrize("place", PLACES)
def test_an_image_whose_activations_are_not_finite_stops_the_run(place):
    with pytest.raises(
        NonFiniteError, match=rf"1 of the 3 images read so far .* first of 1 \({PLACES[place]}\).*--on-nonfinite"
    ):
        analyze(poisoned(place), pictures(), **FAST)


@pytest.mark.parametrize(("place", "fused"), [*((place, True) for place in PLACES), ("blocks.1.attn.qkv", False)])
def test_such_images_are_left_out_of_every_number_and_named(place, fused):
    vit = poisoned(place)
    for block in vit.blocks:
        block.attn.fused_attn = fused
    found = analyze(vit, pictures(), on_nonfinite="skip", metrics=METRICS, **FAST)
    finite = torch.cat(pictures())[[i for i in range(6) if i not in ILL]]
    alone = analyze(vit, [finite[:2], finite[2:]], metrics=METRICS, **FAST)
    for name, result in found.metrics.items():
        within = 1e-12 if name == "layer-cka" else 0  # whose sums run in the order of the names
        np.testing.assert_allclose(result.array, alone.metrics[name].array, rtol=within, err_msg=name)
    assert found.images["names"].tolist() == ["0", "2", "3", "5"]
    assert found.data["images"] == found.summary["images"] == 4
    where = PLACES[place] if fused or "logits" not in PLACES[place] else PLACES[place].replace("attention logits", "map")
    assert [(each["name"], each["reason"]) for each in found.data["skipped"]] == [
        (str(i), f"its activations are not finite: {where}") for i in ILL
    ]
    said = f"2 of 6 images are left out of every number, because of activations that are not finite (2 × {where})."
    assert found.run["notes"][0] == found.answer["sentences"][0] == said


def test_where_all_images_are_ill_nothing_is_measured():
    everything = pictures(ill=[*range(6)])
    with pytest.raises(
        NonFiniteError, match=r"all 6 images are not finite, first of 0 \(inf in the tokens that leave block 1\)"
    ):
        analyze(poisoned("blocks.1.mlp", INF), everything, on_nonfinite="skip", **FAST)
    with pytest.raises(NonFiniteError, match=r"of the 3 images read so far .*check the model's weights and its precision$"):
        analyze(poisoned("blocks.1.mlp", INF), everything, **FAST)


def test_pixels_that_are_not_finite_are_said_to_be():
    images = pictures()
    images[1][1, 0, 3, 3] = NAN
    with pytest.raises(NonFiniteError, match=r"first of 4 \(its pixels hold NaN\)"):
        analyze(model(), images, **FAST)


def test_an_overflow_of_float16_is_found_where_float32_has_none():
    vit = model()
    with torch.no_grad():
        vit.blocks[1].mlp.fc2.bias += 7e4
    assert analyze(vit, pictures(), metrics=("attention-entropy",), **FAST).data["skipped"] == []
    with pytest.raises(NonFiniteError, match=r"inf in the tokens that leave block 1.*try it without float16 \(--amp\)"):
        analyze(vit, pictures(), metrics=("attention-entropy",), amp=True, amp_dtype="float16", **FAST)


def test_products_of_finite_queries_and_keys_may_overflow():
    vit = model()
    vit.blocks[1].attn.qkv.register_forward_hook(lambda module, args, out: out * 1e20)
    with pytest.raises(NonFiniteError, match=r"attention logits of blocks\.1\.attn, heads 0, 1"):
        analyze(vit, pictures(), **FAST)


class HandMasked(ToyAttention):
    """A softmax by hand over a mask that leaves one query nothing to see: its row is NaN, and made 0 afterwards."""

    def mix(self, q, k, v):
        return torch.softmax(self.logits(q, k).masked_fill(~Blind.seen, -INF), -1).nan_to_num(0.0) @ v


@pytest.mark.parametrize("attention", [Masked, Blind, HandMasked])
def test_a_query_that_may_see_nothing_is_no_illness(attention):
    images = [torch.randn(3, 3, *SIZE, generator=torch.Generator().manual_seed(1))]
    found = analyze(toy(attention), images, metrics=("attention-similarity",), null_images=0)
    assert found.data["skipped"] == []
    assert np.isfinite(found.metrics["attention-similarity"].array).all()


def test_a_mask_hides_no_illness():
    """A captured map with a mask is 0 only for queries that may see nothing, and NaN where the queries are."""
    vit = toy(Blind)
    with record(vit) as recording:
        vit(torch.randn(3, 3, *SIZE))
    attention = recording.last.attention[0]
    attention.q = attention.q.clone()
    attention.q[1, 2] = NAN
    maps = attention.maps()["probs"]
    assert bool(torch.isnan(maps[1, 2, [0, 1, 2, 4]]).all())
    assert maps[0, :, 3].abs().max() == 0
    assert bool(torch.isfinite(maps[0]).all())
    assert nonfinite_images(recording.last, torch.zeros(3, 3, 2, 2)) == {
        1: "NaN in the attention logits of block 0, head 2 of 4"
    }


def test_maps_of_one_head_inside_windows_are_told_apart_by_image():
    swin = timm.models.SwinTransformer(
        img_size=32, patch_size=4, window_size=4, embed_dim=16, depths=(2,), num_heads=(2,)
    ).eval()
    ill = poisoned("layers.0.blocks.1.attn.qkv", into=lambda: swin)
    with pytest.raises(NonFiniteError, match=r"first of 1 \(NaN in the map of block 1, head 0 of 2\)"):
        analyze(ill, pictures(), metrics=("attention-entropy",), **FAST)


def test_maps_that_came_as_they_are_tell_their_head_and_image():
    maps = np.full((3, 2, 4, 5, 5), 0.2)
    maps[2, 1, 3, 0] = NAN
    trace = trace_of(maps)
    assert nonfinite_images(trace, torch.zeros(3, 3, 4, 4)) == {2: "NaN in the map of block 1, head 3 of 4"}


def test_a_class_that_is_ruled_out_for_all_images_is_no_illness():
    vit = model()
    vit.head.register_forward_hook(lambda module, args, out: out.index_fill(1, torch.tensor([2]), -INF))
    assert analyze(vit, pictures(), metrics=("attention-entropy",), **FAST).data["skipped"] == []
    once = poisoned("head", -INF)
    with pytest.raises(NonFiniteError, match="inf in the model's output"):
        analyze(once, pictures(), metrics=("attention-entropy",), **FAST)


def test_subjects_of_a_comparison_leave_out_the_same_images():
    subjects = {"well": model(depth=2), "ill": poisoned("blocks.1.attn.qkv", depth=2), "later": poisoned("head", depth=2)}
    given = {"metrics": ("attention-similarity",), **FAST}
    with pytest.raises(NonFiniteError, match="first of 1"):
        compare(subjects, pictures(), **given)
    found = compare(subjects, pictures(), on_nonfinite="skip", **given)
    for label, findings in found.subjects.items():
        assert findings.images["names"].tolist() == ["0", "2", "3", "5"], label
        assert [each["name"] for each in findings.data["skipped"]] == ["1", "4"]
        assert "in ill, NaN in the attention logits of block 1, head 0 of 2" in str(findings.data["skipped"]) or label == "ill"
    assert all(pair.images == 4 for pair in found.pairs)


def test_interventions_leave_out_what_a_replacement_makes_infinite(monkeypatch):
    plainly = ReplacementRunner.run

    def run(self, images, edit, *more, **options):
        ran = plainly(self, images, edit, *more, **options)
        bright = (images.mean((1, 2, 3)) > 1) & bool(edit)
        return replace(ran, output=ran.output.masked_fill(bright[:, None], INF))

    monkeypatch.setattr(ReplacementRunner, "run", run)
    vit, images = model(depth=2), pictures(ill=[4])
    with pytest.raises(NonFiniteError, match=r"first of 4 \(its logits, with identity in block 1\).*--on-nonfinite skip"):
        intervene(vit, images, "identity", blocks=[1], img_size=32)
    found = intervene(vit, images, "identity", blocks=[1], img_size=32, on_nonfinite="skip")
    assert found.images["names"].tolist() == ["0", "1", "2", "3", "5"]
    assert [each["name"] for each in found.data["skipped"]] == ["4"]
    assert found.data["images"] == 5
    sentence = "1 of 6 images is left out of every number, because of activations that are not finite (1 × its logits, with"
    assert all(verdict.sentences[0].startswith(sentence) for verdict in verdicts(found))
