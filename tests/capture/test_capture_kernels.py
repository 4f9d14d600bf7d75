"""What is heard at every place where attention can be computed, against maps worked out in float64."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from toy_models import (
    CHANGED,
    EAGER,
    FUSED,
    HEADS,
    SIZE,
    TOKENS,
    WIDTH,
    Block,
    Changed,
    Matmul,
    ToyAttention,
    ToyViT,
    images,
    reference,
    sharpen,
    toy,
)

from collapse_probe.capture.capture import discover_plan, record

pytestmark = pytest.mark.usefixtures("one_thread")


def hear(model, pictures, plan=None):
    """One listened-to pass without gradients; its outputs are the plain ones."""
    with torch.no_grad():
        plain = model(pictures)
        with record(model, plan or discover_plan(model, pictures.shape[-2:])) as recording:
            assert torch.equal(model(pictures), plain)
    return recording.take()


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
    plan = discover_plan(model, SIZE)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        plain = model(pictures)
        with record(model, plan) as recording:
            assert torch.equal(model(pictures), plain)
        expected = reference(model, pictures)
    assert not any(heard.mixed for heard in recording.last.attention)
    assert_maps(recording.last, expected, tolerance=2e-2)


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
    plan = discover_plan(model, SIZE)
    for count in (1, 3):
        trace = hear(model, images(count), plan)
        assert_maps(trace, reference(model, images(count)))


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
