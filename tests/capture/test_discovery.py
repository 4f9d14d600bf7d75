"""What the probe learns of real architectures with random parameters: blocks, layers, prefix tokens, token streams."""

from __future__ import annotations

import pytest
import timm
import torch
import torchvision
from torch import nn
from toy_models import SIZE, WIDTH, Block, Matmul, Projected, ToyAttention, ToyViT, images, sharpen, toy
from transformers import ViTConfig, ViTModel

from collapse_probe.capture.capture import discover_plan, record
from collapse_probe.capture.discovery import block_paths
from collapse_probe.capture.recorder import PassLog

pytestmark = pytest.mark.usefixtures("one_thread")


def make(name, **settings):
    torch.manual_seed(0)
    return timm.create_model(name, **settings).eval()


SMALL = {"depth": 2, "embed_dim": 48, "num_heads": 3}
ISOTROPIC = {
    "vit_tiny_patch16_224": ({**SMALL, "img_size": 48}, 48, (0,)),
    "deit_tiny_distilled_patch16_224": ({**SMALL, "img_size": 48}, 48, (0, 1)),
    "vit_small_patch14_reg4_dinov2": ({**SMALL, "img_size": 42}, 42, (0, 1, 2, 3, 4)),
    "vit_base_patch16_siglip_224": ({**SMALL, "img_size": 48}, 48, ()),
    "beit_base_patch16_224": ({**SMALL, "img_size": 48}, 48, (0,)),
    "eva02_tiny_patch14_224": ({**SMALL, "img_size": 42}, 42, (0,)),
    "cait_xxs24_224": ({**SMALL, "img_size": 48}, 48, ()),
}


@pytest.mark.parametrize("name", ISOTROPIC)
def test_isotropic_models(name):
    settings, size, prefix = ISOTROPIC[name]
    plan = discover_plan(make(name, **settings), (size, size))
    assert plan.blocks == ("blocks.0", "blocks.1")
    assert plan.prefix == prefix
    assert (plan.tokens, plan.width, plan.grid) == (9 + len(prefix), 48, (3, 3))
    assert plan.patch_shapes == ((9, 48),) * 3
    assert plan.groups() == {(3, plan.tokens, plan.tokens): [0, 1]}
    assert [plan.layers[i].owner for i in plan.map_layers] == ["blocks.0.attn", "blocks.1.attn"]
    assert all(layer.mixed == (name.startswith("cait")) for layer in plan.layers if layer.block is not None)
    assert max(plan.check.row_sum, 0 if plan.layers[0].mixed else plan.check.output) < 1e-5
    assert plan.notes == ()


@pytest.mark.parametrize(
    ("name", "owners"),
    [
        ("vit_base_patch16_siglip_224", ["attn_pool"]),
        ("cait_xxs24_224", ["blocks_token_only.0.attn", "blocks_token_only.1.attn"]),
    ],
)
def test_pooling_is_no_block(name, owners):
    settings, size, _ = ISOTROPIC[name]
    layers = discover_plan(make(name, **settings), (size, size)).layers
    pools = [layer for layer in layers if layer.block is None]
    assert [layer.owner for layer in pools] == owners
    assert all(layer.queries == 1 and "pooling" in layer.reason for layer in pools)


def test_token_streams_are_timms_own():
    model = make("vit_tiny_patch16_224", **SMALL, img_size=48)
    pictures = images(2, size=(48, 48))
    with torch.no_grad(), record(model, discover_plan(model, (48, 48))) as recording:
        model(pictures)
        own = model.forward_intermediates(pictures, intermediates_only=True, output_fmt="NLC", norm=False)
    assert all(torch.equal(recording.last.patches(i + 1), tokens) for i, tokens in enumerate(own))
    assert torch.equal(recording.last.patches(0), recording.last.tokens[0][:, 1:])


def test_a_class_token_that_comes_later_is_no_patch():
    model = make("convit_tiny", depth=2, embed_dim=16, num_heads=3, local_up_to_layer=1, img_size=48)
    with torch.no_grad(), record(model, discover_plan(model, (48, 48))) as recording:
        model(images(2, size=(48, 48)))
        first = model.blocks[0]
        own = first.attn.get_attention(first.norm1(recording.last.tokens[0]))
    plan = recording.last.plan
    assert plan.groups() == {(3, 9, 9): [0], (3, 10, 10): [1]}
    assert plan.patch_shapes == ((9, 48),) * 3
    assert torch.equal(recording.last.patches(2), recording.last.tokens[2][:, 1:])
    assert torch.equal(recording.last.maps(0, "weights"), own)
    assert not torch.equal(recording.last.maps(0, "probs"), own)


class Changing(nn.Module):
    """Plain blocks, before the second of which `change` makes other tokens of the tokens; a class token comes first."""

    def __init__(self, change):
        super().__init__()
        self.patches, self.cls = nn.Conv2d(3, 24, 8, 8), nn.Parameter(torch.randn(1, 1, 24))
        layer = nn.TransformerEncoderLayer(24, 3, 48, batch_first=True)
        self.blocks, self.change = nn.TransformerEncoder(layer, 3, enable_nested_tensor=False).layers, change

    def forward(self, x):
        x = self.patches(x).flatten(2).transpose(1, 2)
        x = self.blocks[0](torch.cat([self.cls.expand(len(x), -1, -1), x], 1))
        x = self.change(x, torch.ones_like(x[:, :2]))
        return self.blocks[2](self.blocks[1](x))


@pytest.mark.parametrize(
    ("change", "patches"),
    [
        (lambda x, more: torch.cat([x[:, :1], more, x[:, 1:]], 1), (12, 24)),
        (lambda x, more: torch.cat([x, more], 1), None),  # registers at the end
        (lambda x, more: x[:, :9], None),  # 8 patches are kept, and 9 tokens are a grid of 3 × 3
        (lambda x, more: x[:, :11], None),  # nor does the number of 10 patches say anything
        (lambda x, more: torch.cat([x[:, :1], x[:, 1:7] + x[:, 7:]], 1), (6, 24)),
        (lambda x, more: x[:, 1:], (12, 24)),
    ],
)
def test_where_patches_cannot_be_told_there_are_none(change, patches):
    torch.manual_seed(0)
    plan = discover_plan(Changing(change).eval(), (32, 24))
    assert plan.patch_shapes == ((12, 24), (12, 24), patches, patches)
    assert plan.prefix == (0,)


class EncoderDecoder(nn.Module):
    def __init__(self, queries):
        super().__init__()
        self.patches, self.queries = nn.Conv2d(3, 24, 8, 8), nn.Parameter(torch.randn(1, queries, 24))
        self.model = nn.Transformer(24, 3, 2, 2, 48, batch_first=True)

    def forward(self, x):
        return self.model(self.patches(x).flatten(2).transpose(1, 2), self.queries.expand(len(x), -1, -1))


@pytest.mark.filterwarnings("ignore:enable_nested_tensor")
@pytest.mark.parametrize("queries", [5, 12])
def test_a_decoder_is_no_neighbour_of_its_encoder(queries):
    """Also where it has as many queries as there are patches: what reads the encoder is no head of self-attention."""
    torch.manual_seed(0)
    plan = discover_plan(EncoderDecoder(queries).eval(), (32, 24))
    assert plan.adjacent == (True, False, True)
    assert [plan.layers[i].signature for i in plan.map_layers] == [(3, 12, 12)] * 2 + [(3, queries, queries)] * 2
    assert plan.patch_shapes == ((12, 24),) * 3 + (None,) * 2
    assert [entry.why for entry in plan.left_out] == [f"cross attention: {queries} tokens attend to 12 others"]


def test_windows_have_reasons():
    swin = make(
        "swin_tiny_patch4_window7_224",
        img_size=64,
        depths=(2, 2),
        num_heads=(2, 4),
        embed_dim=16,
        window_size=4,
    )
    plan = discover_plan(swin, (64, 64))
    assert plan.blocks == tuple(f"layers.{s}.blocks.{b}" for s in (0, 1) for b in (0, 1))
    assert plan.patch_shapes == ((256, 16),) * 3 + ((64, 32),) * 2
    assert plan.grid == (16, 16)
    assert all("windows" in layer.reason for layer in plan.layers)
    assert plan.groups() == {}


def test_windows_of_torchvision():
    torch.manual_seed(0)
    swin = torchvision.models.SwinTransformer([4, 4], 16, [2, 1], [2, 4], [4, 4]).eval()
    plan = discover_plan(swin, (64, 64))
    assert plan.blocks == ("features.1.0", "features.1.1", "features.3.0")
    assert plan.taps[0].layout == "BhwD"
    assert plan.patch_shapes == ((256, 16), (256, 16), (256, 16), (64, 32))
    assert all("windows" in layer.reason for layer in plan.layers)


def test_attention_between_channels_is_not_between_tokens():
    model = make("xcit_nano_12_p16_224", img_size=64, depth=2)
    for size in (64, 96):  # 16 tokens, then 36; heads are 32 wide
        plan = discover_plan(model, (size, size))
        assert [layer.owner for layer in plan.layers] == [
            "blocks.0.attn", "blocks.1.attn", "cls_attn_blocks.0.attn", "cls_attn_blocks.1.attn"
        ]  # fmt: skip
        assert all("channel attention" in plan.layers[i].reason for i in plan.map_layers)
        assert plan.groups() == {}


def test_stages_are_groups():
    pvt = discover_plan(make("pvt_v2_b0", depths=(2, 1, 1, 1)), (64, 64))
    assert pvt.groups() == {(1, 256, 4): [0, 1], (2, 64, 4): [2], (5, 16, 4): [3], (8, 4, 4): [4]}
    assert [shape[0] for shape in pvt.patch_shapes] == [256, 256, 256, 64, 16, 4]
    pit = discover_plan(make("pit_ti_224", img_size=64), (64, 64))
    assert list(pit.groups()) == [(2, 50, 50), (4, 17, 17), (8, 5, 5)]
    assert pit.prefix == (0,)
    assert [shape[0] for shape in pit.patch_shapes] == [49] * 3 + [16] * 6 + [4] * 4


def test_patches_leave_the_class_token_out_after_merging_too():
    model = make("pit_ti_224", img_size=64)
    with torch.no_grad(), record(model, discover_plan(model, (64, 64))) as recording:
        model(images(2, size=(64, 64)))
    for depth, tokens in enumerate(recording.last.tokens):
        assert torch.equal(recording.last.patches(depth), tokens[:, 1:])


def test_tokens_with_channels_first():
    model = make("coatnet_pico_rw_224", img_size=64)
    plan = discover_plan(model, (64, 64))
    assert plan.patch_shapes[:4] == ((64, 128), (16, 256), (16, 256), (16, 256))
    assert plan.taps[1].layout == "BDhw"
    with torch.no_grad(), record(model, plan) as recording:
        model(images(2, size=(64, 64)))
    assert [t.shape[1:] for t in recording.last.tokens] == list(plan.patch_shapes)


def test_torchvision():
    torch.manual_seed(0)
    vit = torchvision.models.VisionTransformer(48, 16, 2, 4, 32, 64).eval()
    plan = discover_plan(vit, (48, 48))
    assert plan.blocks == ("encoder.layers.encoder_layer_0", "encoder.layers.encoder_layer_1")
    assert {layer.operation for layer in plan.layers} == {"aten::_native_multi_head_attention"}
    assert (plan.prefix, plan.tokens, plan.grid) == ((0,), 10, (3, 3))
    assert plan.check.output < 1e-5


@pytest.mark.parametrize("kind", ["sdpa", "eager"])
def test_transformers(kind):
    size = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 64}
    torch.manual_seed(0)
    twin, model = (
        ViTModel._from_config(ViTConfig(**size, image_size=48, patch_size=16), attn_implementation=name).eval()
        for name in ("eager", kind)
    )
    sharpen(twin)
    model.load_state_dict(twin.state_dict())
    plan, pictures = discover_plan(model, (48, 48)), images(2, size=(48, 48))
    with torch.no_grad(), record(model, plan) as recording:
        model(pixel_values=pictures)
        own = model(pictures, output_hidden_states=True).hidden_states
        maps = twin(pictures, output_attentions=True).attentions
    assert len(plan.blocks) == len(maps) == 3
    assert (plan.prefix, plan.grid) == ((0,), (3, 3))
    assert all(map(torch.equal, recording.last.tokens[:3], own))
    for i, attn in enumerate(maps):
        captured = recording.last.maps(i)
        assert torch.equal(captured, attn) if kind == "eager" else torch.allclose(captured, attn, atol=1e-5)


# ---- the rules by themselves ----


class SequenceFirst(ToyViT):
    """Tokens as [N, B, D] inside the blocks, as torch's own layers have them by default."""

    def forward(self, x):
        tokens = self.embed(x).transpose(0, 1)
        for block in self.blocks:
            tokens = block(tokens)
        return self.head(tokens.mean(0))


class Turned(Projected):
    def forward(self, x):
        return super().forward(x.transpose(0, 1)).transpose(0, 1)


def test_tokens_that_are_sequence_first():
    torch.manual_seed(0)
    model = sharpen(SequenceFirst([Block(Turned({"batch_first": False}, {"need_weights": False})) for _ in range(2)]))
    plan = discover_plan(model, SIZE)
    assert (plan.prefix, plan.tokens, plan.taps[0].layout) == ((0,), 13, "NBD")
    with torch.no_grad(), record(model, plan) as recording:
        model(images(13))
    assert [t.shape for t in recording.last.tokens] == [(13, 13, WIDTH)] * 3
    assert torch.equal(recording.last.tokens[0][:, 0], model.class_token[0].expand(13, -1))


def test_blocks_called_by_keyword():
    class Keyword(ToyViT):
        def forward(self, x):
            tokens = self.embed(x)
            for block in self.blocks:
                tokens = block(x=tokens)
            return self.head(tokens.mean(1))

    model = Keyword([Block(Matmul()) for _ in range(2)])
    plan = discover_plan(model, SIZE)
    assert (plan.prefix, plan.tokens) == ((0,), 13)
    with torch.no_grad(), record(model, plan) as recording:
        model(images())
        assert torch.equal(recording.last.tokens[0], model.embed(images()))


def test_the_prefix_does_not_depend_on_the_callers_images():
    barred = images(3)
    barred[:, :, :8] = 0  # patches that are the same in all images
    for pictures in (images(1), images(1).expand(3, -1, -1, -1), barred):
        model = toy().train()
        model.patches = nn.Sequential(model.patches, nn.Dropout(0.5))
        with torch.no_grad(), record(model) as recording:
            model(pictures)
        assert (recording.plan.prefix, recording.plan.grid) == ((0,), (4, 3))
        assert model.training


@pytest.mark.parametrize(
    ("size", "patch", "grid"),
    [((32, 24), 8, (4, 3)), ((30, 46), 8, (3, 5)), ((16, 80), 8, (2, 10)), ((48, 48), 8, (6, 6))],
)
@pytest.mark.parametrize("convolution", [True, False])
def test_grid(size, patch, grid, convolution):
    class Folded(ToyViT):
        def embed(self, x):
            if convolution:
                return super().embed(x)
            rows, columns = (s // patch for s in x.shape[-2:])
            folded = x[..., : rows * patch, : columns * patch].unfold(2, patch, patch).unfold(3, patch, patch)
            return folded.flatten(4).permute(0, 2, 3, 1, 4).flatten(1, 2).flatten(2) @ torch.ones(3 * patch**2, WIDTH)

    assert discover_plan(Folded([Block(ToyAttention())]), size).grid == grid


def test_the_grid_of_patches_that_are_not_square():
    model = toy()
    model.patches = nn.Conv2d(3, WIDTH, (8, 4), (8, 4))
    assert discover_plan(model, SIZE).grid == (4, 6)


def test_patches_in_no_rectangle_have_no_grid():
    class Odd(ToyViT):
        def embed(self, x):
            return super().embed(x)[:, :13]

    assert discover_plan(Odd([Block(ToyAttention())]), (32, 32)).grid is None


@pytest.mark.parametrize("fused", [True, False])
def test_channel_attention_that_nobody_named(fused):
    class Crossed(ToyAttention):
        def mix(self, q, k, v):
            q, k, v = (x.transpose(-1, -2).contiguous() for x in (q, k, v))
            mixed = super().mix(q, k, v) if fused else self.logits(q, k).softmax(-1) @ v
            return mixed.transpose(-1, -2)

    plan = discover_plan(toy(Crossed), SIZE)
    assert all(layer.reason == "channel attention (maps of 8 × 8 channels)" for layer in plan.layers)
    assert plan.groups() == {}


def test_the_block_is_the_innermost_list_entry_with_a_matrix_of_its_own():
    inner = nn.ModuleDict({"attend": nn.Sequential(nn.LayerNorm(4), nn.Linear(4, 4)), "feed": nn.Linear(4, 4)})
    model = nn.ModuleDict({"stages": nn.ModuleList([nn.Sequential(inner)]), "pool": nn.Linear(4, 4)})
    found = block_paths(model, PassLog(), ["stages.0.0.attend.1", "pool"])
    assert found == {"stages.0.0.attend.1": "stages.0.0", "pool": "pool"}
    assert block_paths(nn.Linear(2, 2), PassLog(), [""]) == {"": None}
    found = block_paths(model, PassLog(), ["stages.0.0.attend.1", "pool"], pattern="stages.*")
    assert found == {"stages.0.0.attend.1": "stages.0", "pool": None}
