"""What is heard of nn.MultiheadAttention and nn.TransformerEncoderLayer, on their fast paths and off them."""

from __future__ import annotations

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from mixers import CAUSAL, masked_softmax
from test_capture_kernels import assert_maps, hear
from torch import nn
from toys import HEADS, SIZE, TOKENS, WIDTH, Block, ToyViT, images, reference

from collapse_probe.capture import listen, probe


@pytest.fixture(autouse=True)
def _one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


class Projected(nn.Module):
    """nn.MultiheadAttention as a block's attention; `call` holds what it is called with beside the tokens."""

    def __init__(self, make=None, call=None):
        super().__init__()
        self.inner = nn.MultiheadAttention(WIDTH, HEADS, **{"batch_first": True, **(make or {})})
        self.call, self.records = call or {}, None

    def forward(self, x):
        if self.records is not None:
            self.records.append((probs := multi_head_maps(self.inner, x, self.call), probs))
        if not self.inner.batch_first:
            x = x.transpose(0, 1)
        others = [x if self.inner._qkv_same_embed_dim else x[..., : self.inner.kdim] for _ in range(2)]
        out = self.inner(x, *others, **self.call)[0]
        return out if self.inner.batch_first else out.transpose(0, 1)


def multi_head_maps(layer, x, call):
    """The maps of nn.MultiheadAttention in float64, from its parameters and the documentation."""
    layer, x = copy.deepcopy(layer).double(), x.double()
    if layer._qkv_same_embed_dim:
        weights = layer.in_proj_weight.chunk(3)
    else:
        weights = (layer.q_proj_weight, layer.k_proj_weight, layer.v_proj_weight)
    biases = layer.in_proj_bias.chunk(3)
    q = F.linear(x, weights[0], biases[0])
    k = F.linear(x[..., : layer.kdim], weights[1], biases[1])
    if layer.bias_k is not None:
        k = torch.cat([k, layer.bias_k.expand(len(x), 1, WIDTH)], 1)
    if layer.add_zero_attn:
        k = torch.cat([k, torch.zeros(len(x), 1, WIDTH, dtype=torch.float64)], 1)
    q, k = (y.unflatten(-1, (HEADS, -1)).transpose(1, 2) for y in (q, k))
    logits = q @ k.transpose(-1, -2) / math.sqrt(WIDTH // HEADS)
    seen = torch.ones(len(x), 1, TOKENS, TOKENS, dtype=torch.bool)
    bias = torch.zeros(TOKENS, TOKENS, dtype=torch.float64)
    if (padding := call.get("key_padding_mask")) is not None:
        seen = seen & ~padding[:, None, None, :]
    if (mask := call.get("attn_mask")) is not None:
        seen, bias = (seen & ~mask, bias) if mask.dtype == torch.bool else (seen, mask.double())
    extra = logits.shape[-1] - TOKENS
    return masked_softmax(logits + F.pad(bias, (0, extra)), F.pad(seen, (0, extra), value=True))


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
    plan = probe(model, SIZE)
    with listen(model, plan) as ears:
        model(pictures).sum().backward()
    assert_maps(ears.last, reference(model, pictures))


class Encoder(nn.Module):
    """nn.TransformerEncoderLayer as a whole block."""

    def __init__(self, call=None, **settings):
        super().__init__()
        self.inner = nn.TransformerEncoderLayer(WIDTH, HEADS, 2 * WIDTH, batch_first=True, **settings)
        self.call, self.records = call or {}, None

    def forward(self, x):
        if self.records is not None:
            entered = copy.deepcopy(self.inner.norm1).double()(x.double()) if self.inner.norm_first else x
            call = {
                "attn_mask": self.call.get("src_mask"),
                "key_padding_mask": self.call.get("src_key_padding_mask"),
            }
            self.records.append((probs := multi_head_maps(self.inner.self_attn, entered, call), probs))
        return self.inner(x, **self.call)


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
    plan, expected = probe(model, SIZE), reference(model, pictures)
    with listen(model, plan) as ears:
        model(pictures)
        assert "flash" in ears.last.attention[0].operation
        assert_maps(ears.last, expected)
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
            model(pictures)
        assert_maps(ears.last, expected, tolerance=0.2)
