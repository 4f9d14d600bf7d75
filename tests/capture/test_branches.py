"""What the maps multiply, and the residual stream between attention and MLP: kept on request, and those of the model."""

from __future__ import annotations

import pytest
import timm
import torch
from timm.models.vision_transformer import ParallelScalingBlock, ResPostBlock
from torch import nn
from torchvision.models import VisionTransformer, swin_transformer
from toy_models import (
    HEADS,
    SIZE,
    WIDTH,
    Block,
    Bmm,
    Changed,
    Einsum,
    EinsumValuesFirst,
    Grouped,
    InPlace,
    Matmul,
    OneKey,
    ToyAttention,
    ToyViT,
    ValuesFirst,
    heads_of,
    images,
    sharpen,
    toy,
)

from collapse_probe.capture.capture import discover_plan, record


def traced(model, size=SIZE, count=3):
    plan, pictures = discover_plan(model, size), images(count, size=size)
    with torch.no_grad(), record(model, plan, values=True, middles=True) as recording:
        model(pictures)
    return recording.last, pictures


@pytest.mark.parametrize(
    "attention", [ToyAttention, Grouped, Matmul, Einsum, Bmm, Changed, InPlace, ValuesFirst, EinsumValuesFirst]
)
def test_the_values_are_what_the_maps_multiply(attention):
    model = toy(attention)
    trace, _ = traced(model)
    for block, attending, tokens in zip(model.blocks, trace.attention, trace.tokens, strict=False):
        with torch.no_grad():
            own = heads_of(block.attn.kv(block.norm1(tokens)).chunk(2, -1)[1], attention.kv_heads)
        assert attending.v is not None
        assert torch.equal(attending.v, own)
        mixed = attending.maps()["weights"] @ attending.v.repeat_interleave(HEADS // attention.kv_heads, 1)
        with torch.no_grad():
            branch = block.attn.out(mixed.transpose(1, 2).flatten(2))
        torch.testing.assert_close(branch, block.attn(block.norm1(tokens)), rtol=1e-4, atol=1e-5)


def test_values_that_are_multiplied_elementwise_are_not_told():
    trace, _ = traced(toy(OneKey))
    assert [attending.v for attending in trace.attention] == [None, None]


def test_nothing_is_kept_that_was_not_asked_for():
    model = toy()
    with torch.no_grad(), record(model, discover_plan(model, SIZE)) as recording:
        model(images())
    assert recording.last.middles == ()
    assert all(attending.v is None for attending in recording.last.attention)


def test_the_middle_of_a_block_is_the_stream_behind_its_attention():
    model = toy()
    trace, pictures = traced(model)
    assert [tap.path for tap in trace.plan.middles] == ["blocks.0.norm2", "blocks.1.norm2"]
    with torch.no_grad():
        tokens = model.embed(pictures)
        for block, middle in zip(model.blocks, trace.middles, strict=True):
            expected = tokens + block.attn(block.norm1(tokens))
            assert torch.equal(middle, expected)
            tokens = block(tokens)
    first = trace.first(2)
    assert torch.equal(first.middles[0], trace.middles[0][:2])
    assert torch.equal(first.attention[0].v, trace.attention[0].v[:2])


class BranchFirst(Block):
    def forward(self, x):
        x = self.attn(self.norm1(x)) + x
        return self.mlp(self.norm2(x)) + x


class InPlaceSum(Block):
    def forward(self, x):
        x = x.clone()
        shortcut = self.keep(x)
        shortcut += self.attn(self.norm1(x))
        return shortcut + self.mlp(self.norm2(shortcut))

    def keep(self, x):
        return x


class Parallel(Block):
    def forward(self, x):
        return x + self.attn(self.norm1(x)) + self.mlp(self.norm2(x))


class PostNorm(Block):
    def forward(self, x):
        x = self.norm1(x + self.attn(x))
        return self.norm2(x + self.mlp(x))


class MLPFirst(Block):
    def forward(self, x):
        x = x + self.mlp(self.norm1(x))
        return x + self.attn(self.norm2(x))


class Halved(Block):
    def forward(self, x):
        x = torch.add(x, self.attn(self.norm1(x)), alpha=0.5)
        return x + self.mlp(self.norm2(x))


@pytest.mark.parametrize(
    ("block", "there"),
    [(BranchFirst, True), (Parallel, False), (PostNorm, False), (MLPFirst, False), (Halved, False), (InPlaceSum, False)],
)
def test_a_middle_is_where_both_branches_are_added_one_after_the_other(block, there):
    plan = discover_plan(ToyViT([block(ToyAttention()) for _ in range(2)]), SIZE)
    assert [tap is not None for tap in plan.middles] == [there, there]


def timm_vit(**settings):
    return timm.create_model("vit_tiny_patch16_224", img_size=32, patch_size=8, depth=2, **settings)


@pytest.mark.parametrize(
    ("make", "expected"),
    [
        (lambda: timm_vit(init_values=0.1), 2),
        (lambda: timm_vit(block_fn=ResPostBlock), 2),
        (lambda: timm_vit(block_fn=ParallelScalingBlock), 0),
        (lambda: timm.create_model("swin_tiny_patch4_window7_224", img_size=32, window_size=4, depths=(2, 1, 1, 1)), 5),
        (lambda: VisionTransformer(32, 8, 2, 2, 16, 32), 2),
        (lambda: swin_transformer.SwinTransformer([4, 4], 16, [1, 1], [2, 2], [4, 4]), 2),
    ],
)
def test_libraries_models_say_where_their_branches_are_added(make, expected):
    """The stream there is the block's input plus what the attention branch gave, to rounding."""
    model = sharpen(make())
    plan = discover_plan(model, (32, 32))
    found = [tap for tap in plan.middles if tap is not None]
    assert len(found) == expected
    if expected:
        with torch.no_grad(), record(model, plan, middles=True) as recording:
            model(images(2, size=(32, 32)))
        trace = recording.last
        for middle, before, after in zip(trace.middles, trace.tokens, trace.tokens[1:], strict=False):
            assert middle.shape == (before if before.shape == middle.shape else after).shape


def test_layer_scale_counts_as_part_of_the_branch():
    model, kept = sharpen(timm_vit(init_values=0.1)), []
    for block in model.blocks:
        block.ls1.register_forward_hook(lambda module, given, output: kept.append(output))
    trace, _ = traced(model, (32, 32))
    for tokens, middle, branch in zip(trace.tokens, trace.middles, kept[-2:], strict=False):
        torch.testing.assert_close(middle - tokens, branch, rtol=1e-4, atol=1e-5)


def test_one_operator_for_a_whole_block_has_no_middle():
    layer = nn.TransformerEncoderLayer(WIDTH, HEADS, 2 * WIDTH, batch_first=True, norm_first=True)

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.patches = nn.Conv2d(3, WIDTH, 8, 8)
            self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)

        def forward(self, x):
            return self.encoder(self.patches(x).flatten(2).transpose(1, 2)).mean(1)

    model = Model().eval()
    with torch.no_grad():
        assert discover_plan(model, SIZE).middles == (None, None)
