"""Which matrix is which: found by what the blocks multiply by, in every kind of model, or left out with the reason."""

from __future__ import annotations

import pytest
import timm
import torch
from torch import nn
from torch.nn.utils import parametrizations
from torchvision.models import VisionTransformer as TorchvisionViT
from toy_models import GROUPED_IS_FUSED, HEADS, SIZE, WIDTH, Block, ToyAttention, ToyViT, sharpen, toy

from collapse_probe.capture.capture import discover_plan, noise
from collapse_probe.capture.weights.matrices import CHECKED, CONVENTION, NAMES, ORDERED, STATED, role_by_name
from collapse_probe.capture.weights.recording import record_matrices
from collapse_probe.models.vit import ViT, ViTSettings

TINY = {"img_size": 32, "patch_size": 8, "embed_dim": 48, "depth": 2, "num_heads": 4, "num_classes": 3}
OURS = {"image_size": 32, "patch_size": 8, "width": 48, "depth": 3, "heads": 4, "classes": 3}


def heard(model, size=(32, 32), perturbed=True):
    if perturbed:
        sharpen(model)
    model.eval()
    plan = discover_plan(model, size)
    return record_matrices(model, noise(model, size, 3, 0), plan.blocks)


def expect(matrices, block, **expected):
    """The matrices of a block are exactly these tensors."""
    found = matrices.by_block[block]
    assert set(found) == set(expected), matrices.reasons()
    for name, weight in expected.items():
        assert torch.equal(found[name].weight, weight), name


def hows(matrices, block=0):
    return {name: matrices.by_block[block][name].how for name in matrices.by_block[block]}


def thirds(weight):
    return dict(zip("qkv", weight.chunk(3), strict=True))


def test_fused_qkv_of_timm():
    model = timm.create_model("vit_tiny_patch16_224", **{**TINY})
    found = heard(model)
    for i, block in enumerate(model.blocks):
        mlp = {"fc1": block.mlp.fc1.weight, "fc2": block.mlp.fc2.weight}
        expect(found, i, **thirds(block.attn.qkv.weight), proj=block.attn.proj.weight, **mlp)
    assert set(hows(found).values()) == {CHECKED, ORDERED}
    assert {m.heads for name, m in found.by_block[0].items() if name in "qkv"} == {4}
    assert found.by_block[0]["q"].by_head.shape == (4, 12, 48)


def test_fast_path_of_torch_layers_and_torchvision():
    model = TorchvisionViT(image_size=32, patch_size=8, num_layers=2, num_heads=4, hidden_dim=48, mlp_dim=96)
    found = heard(model)
    for i, layer in enumerate(model.encoder.layers):
        attention = layer.self_attention
        mlp = {"fc1": layer.mlp[0].weight, "fc2": layer.mlp[3].weight}
        expect(found, i, **thirds(attention.in_proj_weight), proj=attention.out_proj.weight, **mlp)
    assert hows(found)["k"] in (STATED, CHECKED)


class EncoderViT(ToyViT):
    """The encoder layers of torch.nn, whose fast path runs a whole block as one operator."""

    def __init__(self, **kwargs):
        layer = nn.TransformerEncoderLayer(WIDTH, HEADS, 2 * WIDTH, batch_first=True, activation="gelu", **kwargs)
        super().__init__(nn.TransformerEncoder(layer, 2, enable_nested_tensor=False).layers)


def test_a_whole_encoder_layer_in_one_operator_and_outside_it():
    model = EncoderViT()
    for fast in (True, False):
        torch.backends.mha.set_fastpath_enabled(fast)
        try:
            found = heard(model, SIZE)
        finally:
            torch.backends.mha.set_fastpath_enabled(True)
        for i, block in enumerate(model.blocks):
            mlp = {"fc1": block.linear1.weight, "fc2": block.linear2.weight}
            expect(found, i, **thirds(block.self_attn.in_proj_weight), proj=block.self_attn.out_proj.weight, **mlp)
        assert hows(found)["q"] == (STATED if fast else CHECKED)


class WideKeys(nn.Module):
    """nn.MultiheadAttention whose keys have another width, so that its three matrices are apart."""

    def __init__(self):
        super().__init__()
        self.keys = nn.Linear(WIDTH, 20)
        self.inner = nn.MultiheadAttention(WIDTH, HEADS, kdim=20, vdim=20, batch_first=True)

    def forward(self, x):
        keys = self.keys(x)
        return self.inner(x, keys, keys, need_weights=False)[0]


def test_separate_matrices_of_multihead_attention():
    model = toy(WideKeys)
    found, inner = heard(model, SIZE), model.blocks[0].attn.inner
    kept = {"q": inner.q_proj_weight, "k": inner.k_proj_weight, "v": inner.v_proj_weight, "proj": inner.out_proj.weight}
    expect(found, 0, **kept, fc1=model.blocks[0].mlp[0].weight, fc2=model.blocks[0].mlp[2].weight)


class ByHead(ToyAttention):
    """One matrix whose rows are q, k and v of head 0, then of head 1, …; heard through a fused kernel."""

    def __init__(self):
        super().__init__()
        del self.q, self.kv
        self.qkv = nn.Linear(WIDTH, 3 * WIDTH)

    def forward(self, x):
        q, k, v = self.qkv(x).unflatten(-1, (HEADS, 3, -1)).permute(3, 0, 2, 1, 4)
        return self.out(self.mix(q, k, v).transpose(1, 2).flatten(2))


class EagerByHead(ByHead):
    def mix(self, q, k, v):
        return torch.softmax(self.logits(q, k), -1) @ v


def test_rows_that_come_head_by_head_are_sorted_by_what_was_heard():
    for kind in (ByHead, EagerByHead):
        model = toy(kind)
        found, attention = heard(model, SIZE), model.blocks[1].attn
        parts = attention.qkv.weight.reshape(HEADS, 3, -1, WIDTH)
        for i, name in enumerate("qkv"):
            assert torch.equal(found.by_block[1][name].weight, parts[:, i].reshape(WIDTH, WIDTH)), (kind, name)
        assert hows(found)["q"] == CHECKED


class Misnamed(ToyAttention):
    """What is called key asks, and what is called query is asked; the value is called neither."""

    def __init__(self):
        super().__init__()
        del self.q, self.kv
        self.key, self.query, self.other = (nn.Linear(WIDTH, WIDTH) for _ in range(3))

    def forward(self, x):
        v, q, k = heads(self.other(x)), heads(self.key(x)), heads(self.query(x))
        return self.out(self.mix(q, k, v).transpose(1, 2).flatten(2))


def heads(x):
    return x.unflatten(-1, (HEADS, -1)).transpose(1, 2)


class Unnamed(Misnamed):
    def __init__(self):
        super().__init__()
        self.one, self.two, self.three = self.key, self.query, self.other
        del self.key, self.query, self.other

    def forward(self, x):
        v, k, q = heads(self.three(x)), heads(self.two(x)), heads(self.one(x))
        return self.out(self.mix(q, k, v).transpose(1, 2).flatten(2))


def test_values_decide_where_names_are_missing():
    model = toy(Unnamed)
    attention, found = model.blocks[0].attn, heard(model, SIZE)
    for name, layer in {"q": attention.one, "k": attention.two, "v": attention.three}.items():
        assert torch.equal(found.by_block[0][name].weight, layer.weight), name
        assert found.by_block[0][name].how == CHECKED


def test_values_overrule_names():
    model = toy(Misnamed)
    attention, found = model.blocks[0].attn, heard(model, SIZE)
    for name, layer in {"q": attention.key, "k": attention.query, "v": attention.other}.items():
        assert torch.equal(found.by_block[0][name].weight, layer.weight), name


class Rotated(ToyAttention):
    """q and k are changed after their matrices, as by rotary positions: only names and order tell them."""

    def mix(self, q, k, v):
        return super().mix(q * torch.linspace(0.5, 2, q.shape[-1]), (k * k.sign()).roll(1, -1), v)


@pytest.mark.skipif(not GROUPED_IS_FUSED, reason="this torch repeats the keys before it multiplies")
def test_q_and_kv_with_fewer_heads():
    class Grouped(ToyAttention):
        kv_heads = HEADS // 2

        def mix(self, q, k, v):
            return nn.functional.scaled_dot_product_attention(q, k, v, enable_gqa=True)

    model = toy(Grouped)
    found, attention = heard(model, SIZE), model.blocks[0].attn
    k, v = attention.kv.weight.chunk(2)
    mlp = model.blocks[0].mlp
    expect(found, 0, q=attention.q.weight, k=k, v=v, proj=attention.out.weight, fc1=mlp[0].weight, fc2=mlp[2].weight)
    assert [found.by_block[0][name].heads for name in "qkv"] == [HEADS, HEADS // 2, HEADS // 2]


def test_what_no_value_confirms_says_so():
    model = toy(Rotated)
    found, attention = heard(model, SIZE), model.blocks[0].attn
    assert torch.equal(found.by_block[0]["q"].weight, attention.q.weight)
    assert torch.equal(found.by_block[0]["v"].weight, attention.kv.weight.chunk(2)[1])
    assert (hows(found)["q"], hows(found)["v"]) == (CONVENTION, CHECKED)


def test_transformers_names_and_values():
    from transformers import ViTConfig, ViTModel

    shape = {"hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 96}
    for kind in ("sdpa", "eager"):
        model = ViTModel(ViTConfig(**shape, image_size=32, patch_size=8, attn_implementation=kind))
        found = heard(model)
        weights = {name.rpartition(".weight")[0]: p for name, p in model.named_parameters()}
        for role, word in {"q": ("query", "q_proj"), "k": ("key", "k_proj"), "v": ("value", "v_proj")}.items():
            named = next(p for n, p in weights.items() if ".0." in n and n.endswith(word))
            assert torch.equal(found.by_block[0][role].weight, named), role
        assert set(found.by_block[0]) == set(NAMES)
        assert hows(found)["q"] == CHECKED
        assert hows(found)["v"] == CHECKED


def test_gated_mlps_are_put_together_to_one_first_layer():
    class Gated(nn.Module):
        def __init__(self):
            super().__init__()
            self.gate, self.up, self.down = nn.Linear(WIDTH, 40), nn.Linear(WIDTH, 40), nn.Linear(40, WIDTH)

        def forward(self, x):
            return self.down(nn.functional.silu(self.gate(x)) * self.up(x))

    model = toy()
    model.blocks[0].mlp = Gated()
    found, mlp = heard(model, SIZE), model.blocks[0].mlp
    assert torch.equal(found.by_block[0]["fc1"].weight, torch.cat([mlp.gate.weight, mlp.up.weight]))
    assert torch.equal(found.by_block[0]["fc2"].weight, mlp.down.weight)
    assert found.by_block[1]["fc1"].weight.shape == (2 * WIDTH, WIDTH)


def test_our_vit_with_fixes_that_mix_maps():
    for fix in ("re-attention", "talking-heads"):
        model = ViT(ViTSettings(**OURS, fixes={fix: {}}))
        found = heard(model)
        for i, block in enumerate(model.blocks):
            mlp = {"fc1": block.mlp.fc1.weight, "fc2": block.mlp.fc2.weight}
            expect(found, i, **thirds(block.attn.qkv.weight), proj=block.attn.proj.weight, **mlp)


def test_tied_blocks_share_their_matrices():
    model = ViT(ViTSettings(**OURS, tied=True))
    found = heard(model)
    assert len(found.blocks) == 3
    for name in NAMES:
        assert found.by_block[0][name].key == found.by_block[2][name].key
    calls = []
    values = found.over(lambda w: calls.append(1) or w.sum())
    assert len(calls) == len(NAMES)
    assert (values == values[0]).all()


def test_the_weight_in_use_is_what_counts():
    model = toy()
    model.blocks[0].mlp[0] = parametrizations.weight_norm(model.blocks[0].mlp[0])
    found = heard(model, SIZE)
    assert torch.equal(found.by_block[0]["fc1"].weight, model.blocks[0].mlp[0].weight)
    sigma = ViT(ViTSettings(**OURS, fixes={"sigma-reparam": {"gamma": "one"}}))
    found = heard(sigma, perturbed=False)
    for name in ("proj", "fc1", "fc2"):
        top = torch.linalg.matrix_norm(found.by_block[0][name].weight, 2)
        assert 0.9 < top < 1.5, name  # γ = 1 divides by an estimate of the spectral norm
    assert set(found.by_block[0]) == set(NAMES)


def test_a_block_that_cannot_be_told_apart_says_why():
    class Twice(Block):
        def forward(self, x):
            return super().forward(x + self.attn(x))

    model = ToyViT([Twice(ToyAttention()), Block(ToyAttention())])
    found = heard(model, SIZE)
    assert not found.by_block[0]
    assert set(found.missing[0]) == set(NAMES)
    assert "2 attention layers" in found.missing[0]["q"]
    assert set(found.by_block[1]) == set(NAMES)
    assert found.reasons() == [
        f"q, k, v, proj, fc1, fc2 of blocks.0: {found.missing[0]['q']}",
    ]

    class Deep(Block):
        def __init__(self, attention):
            super().__init__(attention)
            layers = [nn.Linear(WIDTH, 40), nn.ReLU(), nn.Linear(40, 24), nn.ReLU(), nn.Linear(24, 40), nn.Linear(40, WIDTH)]
            self.mlp = nn.Sequential(*layers)

    found = heard(ToyViT([Deep(ToyAttention())]), SIZE)
    assert set(found.by_block[0]) == {"q", "k", "v", "proj"}
    assert "no MLP of two layers" in found.missing[0]["fc1"]


def test_an_unequal_split_of_one_matrix_is_not_guessed():
    class Unequal(nn.Module):
        """q and k of 4 channels a head, v of 16, in one matrix."""

        def __init__(self):
            super().__init__()
            self.qkv, self.out = nn.Linear(WIDTH, HEADS * 24), nn.Linear(HEADS * 16, WIDTH)

        def forward(self, x):
            q, k, v = heads(self.qkv(x)).split([4, 4, 16], -1)
            return self.out((torch.softmax(q @ k.mT, -1) @ v).transpose(1, 2).flatten(2))

    found = heard(toy(Unequal), SIZE)
    assert set(found.by_block[0]) == {"proj", "fc1", "fc2"}
    assert "proj reads 64 values, not 32" in found.missing[0]["q"]


def test_hearing_leaves_the_model_as_it_was():
    model = toy()
    model.eval()
    pictures = noise(model, SIZE, 3, 0)
    with torch.no_grad():
        before = model(pictures)
        record_matrices(model, pictures, ("blocks.0", "blocks.1"))
        assert torch.equal(model(pictures), before)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    assert all(p.grad is None for p in model.parameters())


def test_names_of_query_key_and_value():
    for word in ("q", "query", "q_proj", "to_q", "wq", "query_proj", "q_lin", "in_q"):
        assert role_by_name(f"blocks.0.attn.{word}.weight") == "q", word
    for word in ("qkv", "kv", "proj", "norm", "fc1", "quick", "valued"):
        assert role_by_name(f"blocks.0.attn.{word}.weight") == "", word
    assert role_by_name("layers.0.self_attention.v_proj_weight") == "v"
