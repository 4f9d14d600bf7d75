"""What is recorded in training is what the capture records, carries gradients, changes nothing and leaves nothing behind."""

from __future__ import annotations

import pytest
import timm
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from collapse_probe.capture.capture import record
from collapse_probe.capture.gradients import Requests, ViTParts, record_with_gradients
from collapse_probe.errors import CaptureError, ModelError, SettingError
from collapse_probe.models.deepvit import DeepViT, DeepViTSettings
from collapse_probe.models.vit import ViT

DEPTH = 3


def ours(fixes=None, **changes):
    return ViT(
        image_size=8, patch_size=4, depth=DEPTH, width=16, heads=2, classes=3, init_std=0.3, fixes=fixes or {}, **changes
    )


def theirs(fused=True, name="vit_tiny_patch16_224", **changes):
    small = {"img_size": 32, "embed_dim": 24, "depth": DEPTH, "num_heads": 3, "num_classes": 4}
    model = timm.create_model(name, **small, **changes)
    for block in model.blocks:
        block.attn.fused_attn = fused
    return model


def deepvit():
    settings = DeepViTSettings(width=24, depth=DEPTH, re_attention=(1, 2), heads=3, image_size=32, classes=4)
    return DeepViT(settings)


MODELS = {
    "ours": ours,
    "ours with registers": lambda: ours(registers=2),
    "ours tied": lambda: ours(tied=True),
    "ours re-attention": lambda: ours({"re-attention": {}}),
    "ours re-attention layer": lambda: ours({"re-attention": {"norm": "layer"}}),
    "ours talking heads": lambda: ours({"talking-heads": {}}),
    "ours attn-scale": lambda: ours({"attn-scale": {}}),
    "ours refiner": lambda: ours({"refiner": {}}),
    "ours temperature": lambda: ours({"temperature": {}}),
    "ours shared attention": lambda: ours({"shared-attention": {"blocks": range(1, 3)}}),
    "timm fused": theirs,
    "timm eager": lambda: theirs(fused=False),
    "timm qk_norm": lambda: theirs(qk_norm=True),
    "timm registers": lambda: theirs(reg_tokens=3),
    "timm distilled": lambda: theirs(name="deit_tiny_distilled_patch16_224"),
    "timm average pool": lambda: theirs(global_pool="avg", class_token=False),
    "deepvit": deepvit,
}
every = pytest.mark.parametrize("name", MODELS)


def made(name):
    torch.manual_seed(0)
    model = MODELS[name]()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return model, torch.randn(4, 3, *(2 * [8 if name.startswith("ours") else 32]))


def wanted(model, *places, maps=True):
    return Requests(frozenset(places), frozenset(range(len(model.blocks)) if maps else ()))


def trace_of(model, images, *places, maps=True):
    with record_with_gradients(ViTParts(model), wanted(model, *places, maps=maps)) as newest:
        model(images)
    return newest[0]


@every
@pytest.mark.parametrize("autocast", [False, True], ids=["float32", "bfloat16"])
def test_maps_and_tokens_are_those_of_the_capture(name, autocast):
    model, images = made(name)
    model.eval()
    with record(model) as recording:
        model(images)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        trace = trace_of(model, images, *range(DEPTH + 1))
        with record(model, recording.plan) as recording:
            model(images)
    capture = recording.last
    for block in range(DEPTH):
        for point in ("probs", "weights"):
            torch.testing.assert_close(trace.maps(block, point).detach(), capture.maps(block, point), rtol=0, atol=2e-6)
    for depth in range(DEPTH + 1):
        assert torch.equal(trace.patches(depth), capture.patches(depth))
    assert trace.maps(1).requires_grad
    assert trace.patches(DEPTH).requires_grad


@every
def test_recording_changes_no_output_and_no_gradient(name):
    model, images = made(name)
    model.train()
    found = []
    for hear in (False, True):
        torch.manual_seed(1)
        model.zero_grad()
        with record_with_gradients(ViTParts(model), wanted(model, 1, "embedded", "normed") if hear else Requests()):
            logits = model(images)
        logits = logits[0] if isinstance(logits, tuple) else logits
        logits.square().sum().backward()
        found.append([logits.detach(), *(p.grad for p in model.parameters() if p.grad is not None)])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def hooks_of(model):
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


@pytest.mark.parametrize("breaks", [False, True])
def test_nothing_is_left_behind(breaks):
    model, images = made("timm fused")
    before, modes = hooks_of(model), torch._C._len_torch_function_stack()
    if breaks:
        model.blocks[1].attn.proj = nn.Linear(5, 5)
        with pytest.raises(RuntimeError):
            trace_of(model, images, 0)
    else:
        trace_of(model, images, 0)
    assert hooks_of(model) == before
    assert torch._C._len_torch_function_stack() == modes


def test_a_broken_pass_does_not_spoil_the_next():
    model, images = made("ours")
    with record_with_gradients(ViTParts(model), wanted(model, DEPTH)) as newest:
        with pytest.raises(ModelError):
            model(images[..., :4])
        model(images)
    assert newest[0].maps(2).shape == (4, 2, 5, 5)


def test_of_several_passes_the_newest_is_recorded():
    model, images = made("ours")
    model.eval()
    with record_with_gradients(ViTParts(model), wanted(model, 1)) as newest:
        model(images)
        model(images[:2])
    assert newest[0].tokens(1).shape[0] == 2
    assert newest[0].maps(0).shape[0] == 2


@pytest.mark.parametrize("name", ["ours", "timm eager", "timm qk_norm", "ours re-attention"])
def test_gradients_of_a_map_are_those_of_the_formula(name):
    model, images = made(name)
    model.eval().double()
    trace = trace_of(model, images.double())
    weight = torch.randn(trace.maps(0, "weights").shape, generator=torch.Generator().manual_seed(3))
    (trace.maps(0, "weights") * weight).sum().backward()
    grad = model.blocks[0].attn.qkv.weight.grad[5]
    step = 1e-3
    found = []
    for sign in (1, -1):
        with torch.no_grad():
            model.blocks[0].attn.qkv.weight[5] += sign * step
            found.append((trace_of(model, images.double()).maps(0, "weights") * weight).sum())
            model.blocks[0].attn.qkv.weight[5] -= sign * step
    assert grad.sum().item() == pytest.approx(((found[0] - found[1]) / (2 * step)).item(), rel=2e-2, abs=2e-3)


class Checkpointed(nn.Module):
    """A block under checkpointing."""

    def __init__(self, block, reentrant):
        super().__init__()
        self.block, self.attn, self.reentrant = block, block.attn, reentrant

    def forward(self, x):
        return checkpoint(self.block, x, use_reentrant=self.reentrant)


def test_checkpointing_is_recorded_with_its_gradients():
    grads = []
    for checkpointed in (False, True):
        model, images = made("ours")
        if checkpointed:
            model.blocks = nn.Sequential(*(Checkpointed(block, False) for block in model.blocks))
        trace = trace_of(model, images, DEPTH)
        (trace.maps(2).square().sum() + trace.patches(DEPTH).sum()).backward()
        grads.append(model.patch_embed.proj.weight.grad)
    torch.testing.assert_close(grads[0], grads[1])


def test_timm_checkpointing_is_recorded_with_its_gradients():
    grads = []
    for checkpointed in (False, True):
        model, images = made("timm fused")
        model.train().set_grad_checkpointing(checkpointed)
        trace = trace_of(model, images, DEPTH)
        (trace.maps(2).square().sum() + trace.patches(DEPTH).sum()).backward()
        grads.append(model.patch_embed.proj.weight.grad)
    torch.testing.assert_close(grads[0], grads[1])


def test_attention_without_a_graph_is_refused_and_without_grad_read():
    model, images = made("ours")
    with torch.no_grad():
        trace = trace_of(model, images, 1)
        assert trace.maps(0).sum().item() == pytest.approx(4 * 2 * 5, abs=1e-4)
    with pytest.raises(CaptureError, match="no gradient"):
        trace.tokens(1)
    with torch.no_grad():
        trace = trace_of(model, images)
    with pytest.raises(CaptureError, match="no gradient"):
        trace.maps(0)


class Writer(nn.Module):
    """Attention that writes into its softmax after use, or hides its softmax."""

    def __init__(self, how):
        super().__init__()
        self.how, self.qkv = how, nn.Linear(16, 48)

    def forward(self, x, **_):
        q, k, v = self.qkv(x).unflatten(-1, (3, 2, 8)).permute(2, 0, 3, 1, 4)
        if self.how == "hidden":
            scores = (q @ k.mT).exp()
            return (scores / scores.sum(-1, keepdim=True) @ v).transpose(1, 2).flatten(2)
        attn = (q @ k.mT).softmax(-1)
        if self.how == "unknown":
            return (attn[..., None] * v[:, :, None]).sum(-2).transpose(1, 2).flatten(2)
        out = (attn.detach().clone() @ v).transpose(1, 2).flatten(2)
        with torch.no_grad():
            attn.mul_(2)
        return out


@pytest.mark.parametrize(("how", "text"), [("writes", "wrote into"), ("hidden", "came 0"), ("unknown", "multiplies V")])
def test_what_cannot_be_recorded_rightly_is_refused(how, text):
    model, images = made("ours")
    model.blocks[1].attn = Writer(how)
    trace = trace_of(model, images)
    trace.maps(0, "weights")
    with pytest.raises(CaptureError, match=text):
        trace.maps(1, "weights")


def test_one_softmax_a_block_is_expected():
    model, images = made("ours")
    once = model.blocks[1].attn.forward
    model.blocks[1].attn.forward = lambda x, **masks: once(once(x, **masks), **masks)
    with pytest.raises(CaptureError, match="came 2; attention penalties are losses of one softmax map"):
        trace_of(model, images).maps(1)


def test_tokens_that_did_not_pass_are_named():
    model, images = made("ours")
    trace = trace_of(model, images, 1)
    with pytest.raises(CaptureError, match="depth 2"):
        trace.tokens(2)
    with record_with_gradients(ViTParts(model), wanted(model, 1)) as newest:
        pass
    with pytest.raises(CaptureError, match=r"recording\(\)"):
        newest[0].patches(1)


def test_a_model_says_what_it_lacks():
    with pytest.raises(ModelError, match="blocks"):
        ViTParts(nn.Linear(2, 2))
    body = ViTParts(ours())
    with pytest.raises(SettingError, match="depths 0 to 3"):
        body.passage(4)
    with pytest.raises(SettingError, match="blocks 0 to 2"):
        body.block_numbers((0, 3))
    bare = nn.Module()
    bare.blocks = nn.ModuleList([nn.Linear(4, 4)])
    for question, missing in (
        (lambda b: b.attention(0), "attn"),
        (lambda b: b.passage("normed"), "norm"),
        (lambda b: b.passage("embedded"), "patch_embed"),
        (lambda b: b.prefix, "num_prefix_tokens"),
        (lambda b: b.width, "embed_dim"),
        (lambda b: b.classes(), "head"),
        (lambda b: b.matrix(0, "fc1"), "fc1"),
        (lambda b: b.grid(5), "no square"),
    ):
        with pytest.raises(ModelError, match=missing):
            question(ViTParts(bare))


def test_matrices_are_the_parts_of_qkv_and_shared_ones_count_once():
    model, images = made("ours")
    trace = trace_of(model, images)
    query, value = trace.matrices((1,), ("query", "value"))
    assert torch.equal(query, model.blocks[1].attn.qkv.weight[:16])
    assert torch.equal(value, model.blocks[1].attn.qkv.weight[32:])
    tied, images = made("ours tied")
    assert len(trace_of(tied, images).matrices((0, 1, 2), ("query", "fc1"))) == 2


def test_the_softmax_is_recorded_before_dropout():
    model, images = made("ours")
    model = ours(attention_dropout=0.5).train()
    trace = trace_of(model, images)
    torch.testing.assert_close(trace.maps(1).sum(-1), torch.ones(4, 2, 5))
    for block in model.blocks:
        block.attn.fused_attn = False
    trace = trace_of(model, images)
    torch.testing.assert_close(trace.maps(1).sum(-1), torch.ones(4, 2, 5))
    assert (trace.maps(1, "weights") == 0).any()


def test_masks_and_grouped_queries_are_recorded():
    class Masked(nn.Module):
        def __init__(self):
            super().__init__()
            self.qkv = nn.Linear(16, 32)

        def forward(self, x, **_):
            q = self.qkv(x).reshape(*x.shape[:2], 4, 8).transpose(1, 2)
            k, v = q[:, :1], q[:, 1:2]
            self.mask = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool).tril()
            return (
                F.scaled_dot_product_attention(q[:, :2], k, v, self.mask, scale=0.3, enable_gqa=True).transpose(1, 2).flatten(2)
            )

    model, images = made("ours")
    model.blocks[0].attn = Masked()
    found = trace_of(model, images).maps(0)
    assert found.shape == (4, 2, 5, 5)
    assert (found.triu(1) == 0).all()
    torch.testing.assert_close(found.sum(-1), torch.ones(4, 2, 5))
