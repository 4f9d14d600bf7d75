"""Two maps that are subtracted after they multiplied the same values are captured as the one signed map that is in effect."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from collapse_probe.analysis.analyze import analyze
from collapse_probe.analysis.intervene import intervene
from collapse_probe.capture.capture import record
from collapse_probe.errors import CaptureError
from collapse_probe.models.fixes.apply import apply
from collapse_probe.training.penalties.base import ModelPenalties

vision_transformer = pytest.importorskip("timm.models.vision_transformer")
SIZES: dict[str, Any] = {"img_size": 32, "patch_size": 8, "embed_dim": 24, "depth": 2, "num_heads": 3, "num_classes": 5}
with_timms_own = pytest.mark.skipif(not hasattr(vision_transformer, "DiffAttention"), reason="older timm has no DiffAttention")


def peaked(model: nn.Module) -> Any:
    torch.manual_seed(0)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.3)
    return model.eval()


def of_timm(fused: bool) -> Any:
    model = peaked(VisionTransformer(**SIZES, attn_layer="diff"))
    for block in model.blocks:
        block.attn.fused_attn = fused
    return model


def with_fix() -> Any:
    return peaked(apply(VisionTransformer(**SIZES), "differential"))


MAKERS = {
    "timm, fused": pytest.param(lambda: of_timm(True), marks=with_timms_own),
    "timm, eager": pytest.param(lambda: of_timm(False), marks=with_timms_own),
    "our fix": pytest.param(with_fix),
}


@pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS.keys())
def test_the_signed_map_times_the_values_is_what_the_model_computed(make: Any) -> None:
    model, given, values = make(), [], []
    for block in model.blocks:
        block.attn.sub_norm.register_forward_pre_hook(lambda _, args: given.append(args[0]))
        block.attn.qkv.register_forward_hook(lambda _, __, out: values.append(out.chunk(3, -1)[2]))
    expected = model(images := torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(1)))
    given.clear()
    values.clear()
    with torch.no_grad(), record(model) as recording:
        recorded = model(images)
    given, values = given[-2:], values[-2:]
    assert torch.equal(recorded, expected)
    layers = [recording.plan.layers[i] for i in recording.plan.map_layers]
    assert [(layer.heads, layer.mixed) for layer in layers] == [(3, True)] * 2
    for i, (out, v) in enumerate(zip(given, values, strict=True)):
        map_BHNN, probs_BHNN = (recording.last.maps(i, point) for point in ("weights", "probs"))
        v_BHNK = v.unflatten(-1, (3, 8)).transpose(1, 2)
        torch.testing.assert_close(map_BHNN @ v_BHNK, out, rtol=0, atol=1e-5)
        assert map_BHNN.min() < -0.01, "the map is signed"
        torch.testing.assert_close(probs_BHNN.sum(-1), torch.ones(2, 3, 17))
        assert probs_BHNN.min() >= 0, "and the softmax map a distribution"


class Pair(nn.Module):
    """One block whose attention is the sum of two fused kernels, in one of several ways."""

    def __init__(self, way: str) -> None:
        super().__init__()
        self.way, self.qkv, self.first = way, nn.Linear(16, 80), nn.Linear(16, 16)
        self.factor = nn.Parameter(torch.tensor([0.2, 0.6])[:, None, None])

    def forward(self, x: Tensor) -> Tensor:
        q, k, r, s, v = self.qkv(x).unflatten(-1, (5, 2, 8)).permute(2, 0, 3, 1, 4)
        other = 2 * v if self.way == "other values" else v
        a, b = F.scaled_dot_product_attention(q, k, v), F.scaled_dot_product_attention(r, s, other)
        ways = {
            "number": lambda: a - 0.3 * b,
            "alpha": lambda: torch.sub(a, b, alpha=0.3),
            "by head": lambda: a - self.factor * b,
            "mean": lambda: 0.5 * a + 0.5 * b,
            "turned": lambda: (a.transpose(1, 2) - 0.3 * b.transpose(1, 2)).transpose(1, 2),
            "other values": lambda: a - 0.3 * b,
            "by channel": lambda: a - torch.linspace(0, 1, 8) * b,
        }
        self.made = ways[self.way]()
        return x + self.first(self.made.transpose(1, 2).flatten(2))


class Pairs(nn.Module):
    def __init__(self, way: str) -> None:
        super().__init__()
        self.embed = nn.Linear(16, 16)
        self.blocks = nn.Sequential(Pair(way), Pair(way))

    def forward(self, x: Tensor) -> Tensor:
        return self.blocks(self.embed(x))


@pytest.mark.parametrize("way", ["number", "alpha", "by head", "mean", "turned"])
def test_sums_of_fused_kernels_on_the_same_values_are_one_map(way: str) -> None:
    model = peaked(Pairs(way))
    with torch.no_grad(), record(model) as recording:
        model(torch.randn(2, 7, 16, generator=torch.Generator().manual_seed(0)))
    assert [(recording.plan.layers[i].heads, recording.plan.layers[i].mixed) for i in recording.plan.map_layers] == [
        (2, True)
    ] * 2
    block, made = model.blocks[1], recording.last.maps(1, "weights")
    entered = recording.last.tokens[1]
    v_BHNK = block.qkv(entered).unflatten(-1, (5, 2, 8)).permute(2, 0, 3, 1, 4)[4]
    torch.testing.assert_close(made @ v_BHNK, block.made, rtol=0, atol=1e-5)


@pytest.mark.parametrize("way", ["other values", "by channel"])
def test_what_is_no_map_on_one_set_of_values_stays_two(way: str) -> None:
    model = peaked(Pairs(way))
    with torch.no_grad(), record(model) as recording:
        model(torch.randn(2, 7, 16, generator=torch.Generator().manual_seed(0)))
    assert not any(recording.plan.layers[i].mixed for i in recording.plan.map_layers)


@with_timms_own
def test_a_map_that_is_never_formed_is_not_replaced() -> None:
    with pytest.raises(CaptureError, match=r"a sum of several kernels' maps, .* TIMM_FUSED_ATTN=0"):
        intervene(of_timm(True), torch.randn(4, 3, 32, 32), replace="uniform")
    done = intervene(of_timm(False), torch.randn(4, 3, 32, 32), replace="uniform")
    assert len(done.single["uniform"]) == 2


ATTENTION_PENALTIES = {
    "attention-cosine": {},
    "attention-entropy": {},
    "attention-contrastive": {},
    "hyperspherical-separation": {"level": "attention"},
}


@pytest.mark.parametrize("name", ATTENTION_PENALTIES)
@pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS.keys())
def test_penalties_of_one_softmax_map_refuse_and_those_of_tokens_do_not(make: Any, name: str) -> None:
    model, images = make(), torch.randn(2, 3, 32, 32)
    penalties = ModelPenalties(model, {name: ATTENTION_PENALTIES[name]})
    with penalties.recording():
        model(images)
    with pytest.raises(CaptureError, match="as in differential attention, no penalty is defined: take one of tokens"):
        penalties.terms(torch.tensor([0, 1]))
    tokens = ModelPenalties(model, {"patch-cosine": {}})
    with tokens.recording():
        model(images)
    assert torch.isfinite(tokens.terms(torch.tensor([0, 1]))["patch-cosine"])


@pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS.keys())
def test_the_form_of_a_whole_head_is_not_taken_of_halves_that_meet_apart(make: Any) -> None:
    found = analyze(make(), torch.randn(2, 3, 32, 32), metrics="qk-spectrum", null_images=0)["qk-spectrum"]
    assert found.values is None
    assert found.not_applicable is not None
    assert "merges several softmax maps" in found.not_applicable or "2 attention layers run" in found.not_applicable
