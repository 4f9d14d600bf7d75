"""What cannot be heard is an error that names the module and the way out: nothing is silently missing."""

from __future__ import annotations

import threading

import numpy as np
import pytest
import timm
import torch
import torch.nn.functional as F
import torchvision
from torch import nn
from toy_models import SIZE, WIDTH, Block, ToyAttention, ToyViT, images, toy

from collapse_probe.capture.capture import discover_plan, record
from collapse_probe.errors import CaptureError, ModelError, NoAttentionFoundError, NonFiniteError

pytestmark = pytest.mark.usefixtures("one_thread")


@torch.library.custom_op("toys::flash_attn_forward", mutates_args=(), schema="(Tensor q, Tensor k, Tensor v) -> Tensor")
def flash_attn_forward(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    return F.scaled_dot_product_attention(q, k, v).clone()


class Opaque(ToyAttention):
    def mix(self, q, k, v):
        return flash_attn_forward(q, k, v)


class Sigmoid(ToyAttention):
    def mix(self, q, k, v):
        return torch.sigmoid(self.logits(q, k)) @ v


class Linear(ToyAttention):
    def mix(self, q, k, v):
        return F.elu(q) @ (F.elu(k).transpose(-1, -2) @ v)


@torch.library.custom_op("toys::varlen_attention", mutates_args=(), schema="(Tensor q, Tensor k, Tensor v) -> Tensor")
def varlen_attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    return q @ (k.transpose(-1, -2) @ v)


class Varlen(ToyAttention):
    def mix(self, q, k, v):
        return varlen_attention(q, k, v)


@pytest.mark.parametrize(
    ("attention", "error", "words"),
    [
        (Opaque, NoAttentionFoundError, ["toys::flash_attn_forward", "scaled_dot_product_attention"]),
        (Varlen, NoAttentionFoundError, ["toys::varlen_attention", "eager attention"]),
        (Sigmoid, NoAttentionFoundError, ["weights that are no softmax", "Sigmoid"]),
        (Linear, NoAttentionFoundError, ["linear attention", "Linear"]),
    ],
)
def test_attention_without_a_map_to_hear(attention, error, words):
    with pytest.raises(error) as raised:
        discover_plan(toy(attention), SIZE)
    for word in ["blocks.0.attn", *words]:
        assert word in str(raised.value)
    model = toy(attention)
    with torch.no_grad(), record(model), pytest.raises(error):
        model(images())


@pytest.mark.parametrize(
    ("attention", "words"),
    [
        (Opaque, "runs inside toys::flash_attn_forward"),
        (Sigmoid, "weights that are no softmax"),
        (Linear, "linear attention"),
    ],
)
def test_a_block_that_cannot_be_heard_is_listed_and_is_no_neighbour(attention, words):
    model = ToyViT([Block(ToyAttention()), Block(attention()), Block(ToyAttention()), Block(ToyAttention())])
    plan = discover_plan(model, SIZE)
    assert plan.blocks == ("blocks.0", "blocks.1", "blocks.2", "blocks.3")
    assert [plan.layers[i].block for i in plan.token_layers] == [0, 2, 3]
    assert plan.adjacent == (False, False, True)
    assert "not captured: blocks.1.attn" in plan.layers[1].reason
    assert words in plan.layers[1].reason
    assert [left.names for left in plan.left_out] == [("blocks.1",)]


class Sometimes(ToyAttention):
    """Skips its softmax when told to."""

    plain = True

    def mix(self, q, k, v):
        return super().mix(q, k, v) if self.plain else v


def test_a_block_of_the_same_class_that_does_not_attend_is_listed():
    model = ToyViT([Block(Sometimes()) for _ in range(3)])
    model.blocks[1].attn.plain = False
    plan = discover_plan(model, SIZE)
    assert plan.adjacent == (False, False)
    assert plan.layers[1].reason == "not captured: blocks.1.attn (Sometimes) ran without a softmax that multiplies values"


def test_a_shared_block_is_accounted_for_at_every_call():
    class Tiring(ToyAttention):
        """Attends at every other call only."""

        calls = 0

        def mix(self, q, k, v):
            self.calls += 1
            return super().mix(q, k, v) if self.calls % 2 else v

    plan = discover_plan(ToyViT([Block(Tiring())] * 2), SIZE)
    assert plan.blocks == ("blocks.0 (call 1)", "blocks.0 (call 2)")
    assert plan.adjacent == (False,)
    assert plan.layers[1].reason.startswith("not captured: ")


@pytest.mark.parametrize(
    ("make", "size", "words"),
    [
        (torchvision.models.resnet18, 64, "ResNet has no attention"),
        (lambda: timm.create_model("efficientvit_b0"), 64, "LiteMLA.*linear attention"),
    ],
)
def test_models_without_softmax_attention(make, size, words):
    with pytest.raises(NoAttentionFoundError, match=words):
        discover_plan(make().eval(), (size, size))


class Dropping(ToyAttention):
    def mix(self, q, k, v):
        return F.dropout(super().mix(q, k, v), 0.5)


def test_a_model_that_draws_at_random():
    model = toy(Dropping)
    before = torch.get_rng_state()
    assert "draws random numbers in eval mode too" in discover_plan(model, SIZE).notes[0]
    assert torch.equal(before, torch.get_rng_state())
    with pytest.raises(CaptureError, match=r"training mode and draws at random.*eval\(\)"):
        discover_plan(model.train(), SIZE)


def test_all_generators_are_seeded_in_the_probe_and_left_alone():
    class Masking(ToyViT):
        """Drops patches at random, drawn from NumPy."""

        def embed(self, x):
            kept = np.random.permutation(12)[:8] + 1  # noqa: NPY002
            return super().embed(x)[:, [0, *kept.tolist()]]

    model = Masking([Block(ToyAttention())]).eval()
    before = np.random.get_state()[1].tolist()  # noqa: NPY002
    plan = discover_plan(model, SIZE)
    assert np.random.get_state()[1].tolist() == before  # noqa: NPY002
    assert "draws random numbers" in plan.notes[0]
    assert (plan.tokens, plan.prefix) == (9, (0,))


def test_a_model_of_two_images_alone_is_said_to_be_unchecked():
    class Pair(ToyViT):
        def forward(self, x):
            if len(x) > 2:
                raise ValueError("two images at most")
            return super().forward(x)

    plan = discover_plan(Pair([Block(ToyAttention())]).eval(), SIZE)
    assert "did not run on three images (ValueError: two images at most)" in plan.notes[0]


def test_a_model_that_is_not_deterministic():
    class Counting(ToyAttention):
        passes = 0

        def mix(self, q, k, v):
            self.passes += 1
            return super().mix(q, k, v) * self.passes

    with pytest.raises(CaptureError, match="does not give the same output for the same images"):
        discover_plan(toy(Counting), SIZE)


def test_a_model_that_gives_nan():
    model = toy()
    with torch.no_grad():
        model.head.weight.fill_(torch.nan)
    with pytest.raises(NonFiniteError, match="in its output; check its weights"):
        discover_plan(model, SIZE)


class EarlyExit(ToyViT):
    """Stops after one block where the image is dark."""

    def forward(self, x):
        tokens = self.embed(x)
        for block in self.blocks if x.mean() > -5 else self.blocks[:1]:
            tokens = block(tokens)
        return self.head(tokens.mean(1))


def test_a_depth_that_depends_on_the_data():
    model = EarlyExit([Block(ToyAttention()) for _ in range(2)]).eval()
    with torch.no_grad(), record(model, discover_plan(model, SIZE)) as recording:
        model(images())
        with pytest.raises(CaptureError, match="ran attention in 1 module calls, the probe in 2"):
            model(images() - 10)
        with pytest.raises(CaptureError, match="no forward pass was recorded"):
            _ = recording.last


def test_images_of_another_size_than_the_probes():
    model = toy()
    with torch.no_grad(), record(model, discover_plan(model, SIZE)):
        with pytest.raises(CaptureError, match=r"shape \[3, 32, 32\] came, .* made for \[3, 32, 24\]"):
            model(images(size=(32, 32)))
        model(images())


def test_nothing_recorded_is_an_error_when_it_is_read():
    model = toy()
    plan = discover_plan(model, SIZE)
    with torch.no_grad(), record(model, plan) as recording:
        with pytest.raises(CaptureError, match="no forward pass was recorded"):
            _ = recording.last
        for elsewhere in (model.embed, lambda x: model.blocks[0](model.embed(x))):
            elsewhere(images())
        runner = threading.Thread(target=model, args=(images(),))
        runner.start()
        runner.join()
        with pytest.raises(CaptureError, match="in the thread that entered it"):
            recording.take()
        model(images())
        assert recording.take().images == 3


def test_another_thread_is_not_recorded_while_this_one_is():
    model, others = toy(), []
    plan = discover_plan(model, SIZE)

    def elsewhere(*_):
        runner = threading.Thread(target=lambda: others.append(model(images(1, seed=5))))
        model.blocks[1]._forward_pre_hooks.clear()
        runner.start()
        runner.join()

    model.blocks[1].register_forward_pre_hook(elsewhere)
    with torch.no_grad(), record(model, plan) as recording:
        model(images())
    assert len(others) == 1
    assert [len(a.q) for a in recording.last.attention] == [3, 3]


def test_inference_mode_must_begin_before_the_recording():
    model = toy()
    plan = discover_plan(model, SIZE)
    with (
        record(model, plan),
        torch.inference_mode(),
        pytest.raises(CaptureError, match=r"use torch\.no_grad"),
    ):
        model(images())
    with torch.inference_mode():
        assert discover_plan(model, SIZE) == plan


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
@pytest.mark.filterwarnings("ignore:Converting mask without torch.bool dtype")
def test_nested_tensors():
    class Nested(ToyViT):
        def __init__(self):
            super().__init__([])
            layer = nn.TransformerEncoderLayer(WIDTH, 4, 64, batch_first=True)
            self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=True)
            self.eval()

        def forward(self, x):
            tokens = self.embed(x)
            padding = torch.arange(tokens.shape[1]) >= tokens.shape[1] - torch.arange(len(x))[:, None]
            return self.encoder(tokens, src_key_padding_mask=padding).mean(1)

    with pytest.raises(CaptureError, match="enable_nested_tensor=False"):
        discover_plan(Nested(), SIZE)


def test_a_model_that_fails_on_the_probes_images_says_which_size_it_got():
    model = timm.create_model("vit_tiny_patch16_224", img_size=32, depth=1, embed_dim=24, num_heads=2).eval()
    with pytest.raises(ModelError, match=r"failed on noise images \[2, 3, 48, 48\] .* give img_size"):
        discover_plan(model, (48, 48))
