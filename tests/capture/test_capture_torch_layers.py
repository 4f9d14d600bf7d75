"""What is heard of nn.MultiheadAttention and nn.TransformerEncoderLayer, on their fast paths and off them."""

from __future__ import annotations

import pytest
import torch
from test_capture_kernels import assert_maps, hear
from toy_models import CAUSAL, SIZE, TOKENS, Block, Encoder, Projected, ToyViT, images, reference

from collapse_probe.capture.capture import discover_plan, record

pytestmark = pytest.mark.usefixtures("one_thread")


PADDING = torch.arange(TOKENS) >= TOKENS - torch.tensor([[0], [2]])
FLOAT_MASK = torch.randn(TOKENS, TOKENS, generator=torch.Generator().manual_seed(3))
FAST, SLOW = {"need_weights": False}, {"need_weights": True}
MULTI_HEAD = {
    "fast": ({}, FAST),
    "fast-with-weights": ({}, SLOW),
    "fast-causal": ({}, {**FAST, "attn_mask": ~CAUSAL}),
    "fast-padding": ({}, {**FAST, "key_padding_mask": PADDING}),
    "fast-both-masks": ({}, {**FAST, "attn_mask": ~CAUSAL, "key_padding_mask": PADDING}),
    "float-mask": ({}, {**FAST, "attn_mask": FLOAT_MASK}),
    "float-mask-with-weights": ({}, {**SLOW, "attn_mask": FLOAT_MASK}),
    "sequence-first": ({"batch_first": False}, FAST),
    "sequence-first-with-weights": ({"batch_first": False}, SLOW),
    "bias-kv": ({"add_bias_kv": True}, FAST),
    "zero-attention": ({"add_zero_attn": True}, SLOW),
    "other-widths": ({"kdim": 16, "vdim": 16}, FAST),
    "other-widths-with-weights": ({"kdim": 16, "vdim": 16}, SLOW),
}


def operations(trace):
    return {layer.operation.removeprefix("aten::") for layer in trace.plan.layers}


@pytest.mark.filterwarnings("ignore:Converting mask without torch.bool dtype")
@pytest.mark.parametrize("name", MULTI_HEAD)
def test_multi_head_attention(name):
    make, call = MULTI_HEAD[name]
    model = ToyViT([Block(Projected(make, call)) for _ in range(2)])
    trace = hear(model, images(2))
    assert_maps(trace, reference(model, images(2)))
    assert [layer.owner for layer in trace.plan.layers] == ["blocks.0.attn.inner", "blocks.1.attn.inner"]
    assert (operations(trace) == {"_native_multi_head_attention"}) == name.startswith("fast")


def test_multi_head_attention_that_is_trained_leaves_its_fast_path():
    model, pictures = ToyViT([Block(Projected(call=FAST)) for _ in range(2)]), images(2)
    plan = discover_plan(model, SIZE)
    with record(model, plan) as recording:
        model(pictures).sum().backward()
    assert_maps(recording.last, reference(model, pictures))


ENCODER_CALLS = {
    "plain": {},
    "causal": {"src_mask": ~CAUSAL},
    "padding": {"src_key_padding_mask": PADDING},
    "both": {"src_mask": ~CAUSAL, "src_key_padding_mask": PADDING},
}


@pytest.mark.filterwarnings("ignore:Converting mask without torch.bool dtype")
@pytest.mark.parametrize("norm_first", [True, False])
@pytest.mark.parametrize("name", ENCODER_CALLS)
def test_encoder_layer(name, norm_first):
    model = ToyViT([Encoder(ENCODER_CALLS[name], norm_first=norm_first, activation="gelu") for _ in range(2)])
    trace = hear(model, images(2))
    assert_maps(trace, reference(model, images(2)))
    assert operations(trace) == {"_transformer_encoder_layer_fwd"}
    assert [layer.owner for layer in trace.plan.layers] == [f"blocks.{i}.inner.self_attn" for i in range(2)]
    assert trace.plan.check.output < 1e-5


def test_a_shared_encoder_layer_is_heard_at_every_call():
    model = ToyViT([Encoder(norm_first=True)] * 2)
    trace = hear(model, images(2))
    assert_maps(trace, reference(model, images(2)))
    assert [layer.call for layer in trace.plan.layers] == [0, 1]


def test_encoder_layer_is_the_same_layer_off_its_fast_path():
    model, pictures = ToyViT([Encoder(norm_first=True) for _ in range(2)]), images(2)
    plan, expected = discover_plan(model, SIZE), reference(model, pictures)
    with record(model, plan) as recording:
        model(pictures)
        assert "flash" in recording.last.attention[0].operation
        assert_maps(recording.last, expected)
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
            model(pictures)
        assert_maps(recording.last, expected, tolerance=0.2)
