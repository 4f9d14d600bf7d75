"""What is heard at every place where attention can be computed, against maps worked out in float64."""

from __future__ import annotations

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from mixers import CAUSAL, CHANGED, EAGER, FUSED, Changed, Matmul, masked_softmax
from torch import nn
from toys import HEADS, SIZE, TOKENS, WIDTH, Block, ToyAttention, ToyViT, images, reference, sharpen, toy

from collapse_probe.capture import listen, probe


@pytest.fixture(autouse=True)
def _one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def hear(model, pictures, plan=None):
    """One listened-to pass without gradients; its outputs are the plain ones."""
    with torch.no_grad():
        plain = model(pictures)
        with listen(model, plan or probe(model, pictures.shape[-2:])) as ears:
            assert torch.equal(model(pictures), plain)
    return ears.take()


def assert_maps(trace, expected, tolerance=1e-5):
    """The trace's maps are the expected ones, and far enough from uniform to tell."""
    assert len(trace.plan.map_layers) == len(expected)
    for index, (probs, weights) in zip(trace.plan.map_layers, expected, strict=True):
        for point, values in (("probs", probs), ("weights", weights)):
            heard = trace.maps(index, point)
            assert heard.shape == values.shape
            assert heard.dtype == torch.float32
            assert float((heard.double() - values).abs().max()) < tolerance
        assert probs.shape[-1] == 1 or float(probs.max()) > 2.5 / probs.shape[-1]


@pytest.mark.parametrize("attention", [*FUSED, *EAGER, *CHANGED], ids=lambda a: a.__name__)
def test_maps_are_those_of_an_eager_calculation(attention):
    model, pictures = toy(attention), images()
    expected = reference(model, pictures)
    trace = hear(model, pictures)
    assert_maps(trace, expected)
    assert [layer.owner for layer in trace.plan.layers] == ["blocks.0.attn", "blocks.1.attn"]
    assert [layer.mixed for layer in trace.plan.layers] == [attention in CHANGED] * 2
    assert all(("scaled_dot_product" in layer.operation) == (attention in FUSED) for layer in trace.plan.layers)


def test_a_query_that_sees_nothing_has_a_row_of_zeros():
    trace = hear(toy(FUSED[2]), images())
    assert torch.equal(trace.maps(0)[:, :, 3], torch.zeros(3, HEADS, TOKENS))


@pytest.mark.parametrize("attention", CHANGED, ids=lambda a: a.__name__)
def test_a_changed_map_is_the_models_own_tensor(attention):
    model = toy(attention)
    trace = hear(model, images())
    for index, block in enumerate(model.blocks):
        assert torch.equal(trace.attention[index].weights, block.attn.own)
        assert trace.attention[index].mixed


@pytest.mark.parametrize("attention", [Matmul, *EAGER[2:4], FUSED[0], FUSED[4]], ids=lambda a: a.__name__)
def test_bfloat16_is_not_a_change_of_the_map(attention):
    model, pictures = toy(attention), images()
    plan = probe(model, SIZE)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        plain = model(pictures)
        with listen(model, plan) as ears:
            assert torch.equal(model(pictures), plain)
        expected = reference(model, pictures)
    assert not any(heard.mixed for heard in ears.last.attention)
    assert_maps(ears.last, expected, tolerance=2e-2)


def test_a_softmax_in_a_module_of_its_own():
    class Tempered(nn.Module):
        def __init__(self):
            super().__init__()
            self.temperature = nn.Parameter(torch.ones(()))

        def forward(self, logits):
            return (logits * self.temperature).softmax(-1)

    class Delegating(Matmul):
        def __init__(self):
            super().__init__()
            self.soft = Tempered()

        def mix(self, q, k, v):
            return self.soft(self.logits(q, k)) @ v

        def reference(self, q, k):
            probs = torch.softmax(self.logits(q, k) * self.soft.temperature.double(), -1)
            return probs, probs

    trace = hear(model := toy(Delegating), images())
    assert_maps(trace, reference(model, images()))
    assert [layer.owner for layer in trace.plan.layers] == ["blocks.0.attn", "blocks.1.attn"]


def test_a_softmax_that_multiplies_no_values_is_no_attention():
    class Gating(Block):
        """Softmax over features, which then go through a Linear, over tokens, and one that is only looked at."""

        def forward(self, x):
            looked_at = (x @ x.transpose(-1, -2)).softmax(-1).amax()
            gated = self.mlp(x * x.softmax(-1)) + x.softmax(1).sum(1, keepdim=True)
            return super().forward(x + looked_at * gated)

    model = ToyViT([Gating(ToyAttention()) for _ in range(2)])
    plan = probe(model, SIZE)
    for count in (1, 3):
        trace = hear(model, images(count), plan)
        assert_maps(trace, reference(model, images(count)))


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


def test_a_shared_block_is_heard_at_every_call():
    block = Block(Changed())
    model = ToyViT([block] * 4)
    trace = hear(model, images())
    assert_maps(trace, reference(model, images()))
    assert trace.plan.blocks == tuple(f"blocks.0 (call {n})" for n in (1, 2, 3, 4))
    assert [layer.call for layer in trace.plan.layers] == [0, 1, 2, 3]
    assert not torch.equal(trace.tokens[1], trace.tokens[2])


class Groups(nn.Module):
    """Blocks that are lists and never called, as in vit-pytorch."""

    def __init__(self):
        super().__init__()
        self.patches = nn.Conv2d(3, WIDTH, 8, 8)
        pairs = [nn.ModuleList([nn.Sequential(nn.LayerNorm(WIDTH), Matmul()), nn.Linear(WIDTH, WIDTH)]) for _ in range(3)]
        self.layers, self.norm = nn.ModuleList(pairs), nn.LayerNorm(WIDTH)
        self.seen = []
        sharpen(self)

    def forward(self, x):
        x = self.patches(x).flatten(2).transpose(1, 2)
        self.seen = [x]
        for attend, feed in self.layers:
            x = attend(x) + x
            x = feed(x) + x
            self.seen.append(x)
        return self.norm(x)


def test_groups_of_modules_that_are_never_called_are_blocks():
    model = Groups()
    expected = reference(model, images())
    trace = hear(model, images())
    assert trace.plan.blocks == ("layers.0", "layers.1", "layers.2")
    assert_maps(trace, expected)
    assert all(map(torch.equal, trace.tokens, model.seen))
