"""Which maps belong to which image, head, window and block: kinds of models that were once read wrongly without a word."""

from __future__ import annotations

import math

import pytest
import timm
import torch
import torch.nn.functional as F
from torch import nn
from toy_models import HEADS, SIZE, TOKENS, WIDTH, Block, Matmul, ToyAttention, ToyViT, heads_of, images, sharpen, toy

from collapse_probe.capture.capture import discover_plan, record
from collapse_probe.errors import CaptureError


def maps_of(model, pictures, plan=None, point="probs"):
    with torch.no_grad(), record(model, plan or discover_plan(model, SIZE)) as recording:
        model(pictures)
    trace = recording.last
    return [trace.maps(i, point) for i in trace.plan.map_layers], trace.plan


def true_maps(model, pictures):
    """The maps of every block from its own q and k, in float64."""
    tokens, found = model.embed(pictures), []
    with torch.no_grad():
        for block in model.blocks:
            normed = block.norm1(tokens)
            q, k = (heads_of(x).double() for x in (block.attn.q(normed), block.attn.kv(normed).chunk(2, -1)[0]))
            found.append(torch.softmax(q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1]), -1))
            tokens = block(tokens)
    return found


class Folded(ToyAttention):
    """[B, H, N, K] folded before a fused kernel or an eager product, and unfolded behind it."""

    fused = False

    def fold(self, x):
        raise NotImplementedError

    def unfold(self, x, batch):
        raise NotImplementedError

    def mix(self, q, k, v):
        q, k, v = (self.fold(x).contiguous() for x in (q, k, v))
        if self.fused:
            mixed = F.scaled_dot_product_attention(q, k, v)
        else:
            mixed = torch.softmax(q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1]), -1) @ v
        return self.unfold(mixed, self.batch)

    def forward(self, x):
        self.batch = len(x)
        return super().forward(x)


class BatchHeads(Folded):
    def fold(self, x):
        return x.flatten(0, 1)

    def unfold(self, x, batch):
        return x.unflatten(0, (batch, HEADS))


class HeadsBatch(Folded):
    def fold(self, x):
        return x.transpose(0, 1).flatten(0, 1)

    def unfold(self, x, batch):
        return x.unflatten(0, (HEADS, batch)).transpose(0, 1)


class HeadsFirst(Folded):
    def fold(self, x):
        return x.transpose(0, 1)

    def unfold(self, x, batch):
        return x.transpose(0, 1)


class AxesApart(Folded):
    """Five axes: pairs of heads."""

    def fold(self, x):
        return x.unflatten(1, (2, -1)).permute(1, 0, 2, 3, 4)

    def unfold(self, x, batch):
        return x.permute(1, 0, 2, 3, 4).flatten(1, 2)


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("kind", [BatchHeads, HeadsBatch, HeadsFirst, AxesApart])
def test_maps_of_the_right_image_and_head_at_any_batch_size(kind, fused):
    model = toy(type("Kind", (kind,), {"fused": fused}))
    plan = discover_plan(model, SIZE)
    for count in (1, 2, 5):
        found, _ = maps_of(model, images(count), plan)
        for mine, true in zip(found, true_maps(model, images(count)), strict=True):
            torch.testing.assert_close(mine.double(), true, rtol=0, atol=1e-5)


class BetweenImages(Matmul):
    """The tokens of one place in all images attend to one another: nothing of this is within an image."""

    def mix(self, q, k, v):
        q, k, v = (x.permute(2, 1, 0, 3) for x in (q, k, v))
        return super().mix(q, k, v).permute(2, 1, 0, 3)


def test_attention_between_images_is_left_out():
    model = ToyViT([Block(Matmul()), Block(BetweenImages())])
    plan = discover_plan(model, SIZE)
    assert [plan.layers[i].owner for i in plan.token_layers] == ["blocks.0.attn"]
    assert plan.adjacent == (False,)
    assert "image" in plan.layers[1].reason


class HalfTheImages(Matmul):
    """Two calls for the halves of any batch: of two images, one call each."""

    def mix(self, q, k, v):
        parts = zip(*(x.tensor_split(2) for x in (q, k, v)), strict=True)
        return torch.cat([super(HalfTheImages, self).mix(*part) for part in parts])


def test_calls_that_follow_the_number_of_images_otherwise_are_left_out():
    plan = discover_plan(ToyViT([Block(Matmul()), Block(HalfTheImages())]), SIZE)
    assert [plan.layers[i].owner for i in plan.token_layers] == ["blocks.0.attn"]
    assert "another number of images" in plan.layers[1].reason
    assert plan.adjacent == (False,)


class OneImageAtATime(Matmul):
    def mix(self, q, k, v):
        return torch.cat([super(OneImageAtATime, self).mix(*(x[i : i + 1] for x in (q, k, v))) for i in range(len(q))])


class SomeQueries(Matmul):
    def mix(self, q, k, v):
        return torch.cat([super(SomeQueries, self).mix(part, k, v) for part in q.split(5, 2)], 2)


@pytest.mark.parametrize("kind", [OneImageAtATime, SomeQueries])
def test_calls_for_parts_of_a_batch_are_one_map(kind):
    model = toy(kind)
    for count in (1, 3):
        found, plan = maps_of(model, images(count))
        assert plan.groups() == {(HEADS, TOKENS, TOKENS): [0, 1]}
        for mine, true in zip(found, true_maps(model, images(count)), strict=True):
            torch.testing.assert_close(mine.double(), true, rtol=0, atol=1e-5)


# ---- blocks ----


class Head(nn.Module):
    def __init__(self):
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(WIDTH, WIDTH // HEADS) for _ in range(3))

    def forward(self, x):
        return F.scaled_dot_product_attention(self.q(x), self.k(x), self.v(x))


class ByHeads(nn.Module):
    """One module for each head."""

    def __init__(self):
        super().__init__()
        self.heads = nn.ModuleList(Head() for _ in range(HEADS))

    def forward(self, x):
        return torch.cat([head(x) for head in self.heads], -1)


class Two(nn.Module):
    """Two attentions beside one another."""

    def __init__(self):
        super().__init__()
        self.one, self.two = ToyAttention(), Matmul()

    def forward(self, x):
        return self.one(x) + self.two(x)


@pytest.mark.parametrize(("kind", "heads"), [(ByHeads, HEADS), (Two, 2 * HEADS)])
def test_calls_of_one_block_are_its_heads(kind, heads):
    model = sharpen(ToyViT([Block(kind()) for _ in range(3)]))
    found, plan = maps_of(model, images(3))
    assert plan.blocks == ("blocks.0", "blocks.1", "blocks.2")
    assert plan.groups() == {(heads, TOKENS, TOKENS): [0, 1, 2]}
    assert "counted as the heads of one map" in plan.notes[0]
    with torch.no_grad():
        inside, normed = model.blocks[0].attn, model.blocks[0].norm1(model.embed(images(3)))
        for i, head in enumerate(getattr(inside, "heads", ())):
            q, k = head.q(normed), head.k(normed)
            true = torch.softmax(q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1]), -1)
            torch.testing.assert_close(found[0][:, i], true, rtol=0, atol=1e-5)


class Towers(nn.Module):
    """Two stacks that do not feed one another; `twice`: one stack, called for two pictures."""

    def __init__(self, twice):
        super().__init__()
        self.left = toy()
        self.right = self.left if twice else toy()

    def forward(self, x):
        return self.left(x) + self.right(x.flip(-1))


@pytest.mark.parametrize("twice", [False, True])
def test_stacks_side_by_side_are_no_depth(twice):
    plan = discover_plan(Towers(twice).eval(), SIZE)
    assert len(plan.blocks) == 4
    assert plan.adjacent == (True, False, True)
    (note,) = [note for note in plan.notes if "2 stacks of blocks do not feed one another" in note]
    assert f"{plan.blocks[0]} … {plan.blocks[1]}; {plan.blocks[2]} … {plan.blocks[3]};" in note
    assert len(set(plan.blocks)) == 4


class Attributes(nn.Module):
    """Blocks as attributes, or one block that is called again; no list holds them."""

    def __init__(self, looped):
        super().__init__()
        whole = toy(depth=3)
        self.embed, self.head = whole.patches, whole.head
        self.names = ["block0"] * 3 if looped else ["block0", "block1", "block2"]
        for name, block in zip(dict.fromkeys(self.names), whole.blocks, strict=False):
            setattr(self, name, block)

    def forward(self, x):
        tokens = self.embed(x).flatten(2).transpose(1, 2)
        for name in self.names:
            tokens = getattr(self, name)(tokens)
        return self.head(tokens.mean(1))


@pytest.mark.parametrize("looped", [False, True])
def test_blocks_without_a_list(looped):
    plan = discover_plan(Attributes(looped).eval(), SIZE)
    loops = ("block0 (call 1)", "block0 (call 2)", "block0 (call 3)")
    assert plan.blocks == (loops if looped else ("block0", "block1", "block2"))
    assert plan.adjacent == (True, True)


class Stage(nn.Module):
    """Attention and MLP as entries of one list: the stage is no block."""

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList()
        for _ in range(3):
            self.layers += [ToyAttention(), nn.Sequential(nn.LayerNorm(WIDTH), nn.Linear(WIDTH, WIDTH))]

    def forward(self, x):
        for layer in self.layers:
            x = x + layer(x)
        return x


def test_a_stage_is_no_block():
    plan = discover_plan(sharpen(ToyViT([Stage()])), SIZE)
    assert plan.blocks == ("blocks.0.layers.0", "blocks.0.layers.2", "blocks.0.layers.4")
    assert plan.adjacent == (True, True)
    assert plan.groups() == {(HEADS, TOKENS, TOKENS): [0, 1, 2]}


class Grouping(nn.Module):
    """Blocks, and behind them one more that is kept as an attribute: the stage is not its block."""

    def __init__(self):
        super().__init__()
        self.layers, self.last = nn.Sequential(Block(ToyAttention()), Block(ToyAttention())), Block(ToyAttention())

    def forward(self, x):
        return self.last(self.layers(x))


def test_what_has_blocks_inside_is_no_block():
    plan = discover_plan(sharpen(ToyViT([Grouping(), Grouping()])), SIZE)
    of_one = ("layers.0", "layers.1", "last")
    assert plan.blocks == tuple(f"blocks.{stage}.{name}" for stage in (0, 1) for name in of_one)
    assert plan.adjacent == (True,) * 5


def test_blocks_by_a_pattern():
    model = sharpen(ToyViT([Stage(), Stage()]))
    assert discover_plan(model, SIZE, blocks="blocks.*").blocks == ("blocks.0", "blocks.1")
    with pytest.raises(CaptureError, match="no block that attends"):
        discover_plan(model, SIZE, blocks="stages.*")


# ---- what is no map between tokens ----


class SoftQueries(ToyAttention):
    """Efficient attention: a softmax of the queries over channels, one of the keys over tokens, and no map between tokens."""

    num_heads = HEADS

    def mix(self, q, k, v):
        return q.softmax(-1) @ (k.softmax(-2).transpose(-1, -2) @ v)


def test_half_of_linear_attention_is_no_map():
    for size in (SIZE, (8, 56)):  # in the second, 8 tokens and heads of width 8
        plan = discover_plan(ToyViT([Block(ToyAttention()), Block(SoftQueries())]), size)
        assert [plan.layers[i].owner for i in plan.token_layers] == ["blocks.0.attn"]
        assert plan.layers[1].reason.startswith("linear attention")
        assert plan.layers[1].heads == HEADS
        assert plan.adjacent == (False,)


class Crossed(ToyAttention):
    """Attention between the channels of a head."""

    def mix(self, q, k, v):
        q, k, v = (x.transpose(-1, -2).contiguous() for x in (q, k, v))
        return super().mix(q, k, v).transpose(-1, -2)


class EagerCrossed(Crossed, Matmul):
    pass


@pytest.mark.parametrize("kind", [Crossed, EagerCrossed])
def test_as_many_channels_as_tokens(kind):
    for size in ((16, 24), (8, 56)):  # 7 and 8 tokens; heads are 8 wide
        plan = discover_plan(toy(kind), size)
        assert not plan.token_layers
        assert all("channel" in layer.reason for layer in plan.layers)
    for size in ((16, 24), (8, 56)):
        assert len(discover_plan(toy(Matmul if kind is EagerCrossed else ToyAttention), size).token_layers) == 2


def test_channels_of_inputs_without_a_picture_cannot_be_told_from_tokens():
    class OfPatches(ToyViT):
        """Takes patches [B, N, D], of which none can be changed alone by its place in a picture."""

        def embed(self, x):
            return x

    for kind in (EagerCrossed, Matmul):
        model = OfPatches([Block(kind())]).eval()
        with torch.no_grad(), record(model) as recording:
            model(torch.randn(3, 8, WIDTH))  # 8 tokens; heads are 8 wide
        assert "may be of tokens or of channels" in recording.last.plan.layers[0].reason


class Reads(nn.Module):
    """Latents attend to the tokens."""

    def __init__(self):
        super().__init__()
        self.q, self.kv = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, 2 * WIDTH)

    def forward(self, latents, tokens):
        k, v = (heads_of(x) for x in self.kv(tokens).chunk(2, -1))
        return latents + F.scaled_dot_product_attention(heads_of(self.q(latents)), k, v).transpose(1, 2).flatten(2)


class Latents(ToyViT):
    """Latents read the image, then attend among themselves; `before`: blocks over the image's own tokens come first."""

    def __init__(self, before):
        super().__init__([Block(ToyAttention()) for _ in range(2)])
        self.before = nn.ModuleList([Block(ToyAttention()) for _ in range(2 * before)])
        self.latents, self.read = nn.Parameter(torch.randn(1, 12, WIDTH)), Reads()
        sharpen(self)

    def forward(self, x):
        tokens = self.embed(x)
        for block in self.before:
            tokens = block(tokens)
        latents = self.read(self.latents.expand(len(x), -1, -1), tokens)
        for block in self.blocks:
            latents = block(latents)
        return self.head(latents.mean(1))


def test_latents_are_no_patches():
    plan = discover_plan(Latents(before=False), SIZE)
    assert plan.patch_shapes == (None,) * 3
    assert (plan.prefix, plan.grid) == ((), None)
    assert any("latents" in note for note in plan.notes)
    plan = discover_plan(Latents(before=True), SIZE)
    assert plan.patch_shapes[:3] == ((12, WIDTH),) * 3
    assert (plan.prefix, plan.grid) == ((0,), (4, 3))


# ---- windows ----


def make(name, **settings):
    torch.manual_seed(0)
    return timm.create_model(name, **settings).eval()


def test_windows_of_maxvit_are_told_from_heads():
    plan = discover_plan(make("maxvit_pico_rw_256", img_size=64), (64, 64))
    assert plan.blocks[:2] == ("stages.0.blocks.0.attn_block", "stages.0.blocks.0.attn_grid")
    first, second = plan.layers[:2]
    assert (first.heads, first.windows, first.queries) == (second.heads, second.windows, second.queries) == (1, 64, 4)
    assert first.partition != second.partition


def test_pixels_within_a_patch_are_windows():
    plan = discover_plan(make("tnt_s_patch16_224", img_size=64), (64, 64))
    inner = [layer for layer in plan.layers if layer.owner.endswith("attn_in")]
    assert len(inner) == 12
    assert all("windows" in layer.reason and (layer.heads, layer.windows) == (4, 16) for layer in inner)
    assert plan.groups() == {(6, 17, 17): list(range(12))}


def test_windows_and_heads_on_one_axis_in_an_order_that_is_not_known():
    sizes = {"embed_dim": 48, "depth": 4, "num_heads": 3, "window_size": 4, "global_attn_indexes": (1, 3)}
    model = make("samvit_base_patch16", img_size=128, **sizes)
    plan = discover_plan(model, (128, 128))
    assert [i for i, layer in enumerate(plan.layers) if not layer.reason] == [1, 3]
    assert all("not known" in plan.layers[i].reason and plan.layers[i].heads == 3 for i in (0, 2))
    for count in (1, 4):
        with torch.no_grad(), record(model, plan) as recording:
            model(torch.randn(count, 3, 128, 128))
        assert recording.last.maps(1).shape == (count, 3, 64, 64)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_an_eager_softmax_in_half_precision(dtype):
    model = toy(Matmul).to(dtype)
    plan = discover_plan(model, SIZE)
    assert len(plan.token_layers) == 2
    with torch.no_grad(), record(model, plan) as recording:
        model(images().to(dtype))
    assert recording.last.maps(0).sum(-1).sub(1).abs().max() < 4e-2


class Decoding(nn.Module):
    """Self-attention, then attention to as many tokens of another stack."""

    def __init__(self, fused):
        super().__init__()
        self.own, self.other, self.fused = (ToyAttention if fused else Matmul)(), Reads(), fused
        self.norm, self.mlp = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, tokens, memory):
        tokens = tokens + self.own(tokens)
        if self.fused:
            tokens = self.other(tokens, memory)
        else:
            q, (k, v) = heads_of(self.other.q(tokens)), (heads_of(x) for x in self.other.kv(memory).chunk(2, -1))
            mixed = torch.softmax(q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1]), -1) @ v
            tokens = tokens + mixed.transpose(1, 2).flatten(2)
        return tokens + self.mlp(self.norm(tokens))


@pytest.mark.parametrize("fused", [False, True])
def test_as_many_tokens_of_another_stack_are_no_further_heads(fused):
    class Decoder(ToyViT):
        def __init__(self):
            super().__init__([Block(ToyAttention()) for _ in range(2)])
            self.decoder = nn.ModuleList([Decoding(fused) for _ in range(2)])
            self.wanted = nn.Parameter(torch.zeros(1, TOKENS, WIDTH))
            sharpen(self)

        def forward(self, x):
            memory = self.embed(x)
            for block in self.blocks:
                memory = block(memory)
            tokens = self.wanted.expand(len(x), -1, -1)
            for block in self.decoder:
                tokens = block(tokens, memory)
            return self.head(tokens.mean(1))

    plan = discover_plan(Decoder(), SIZE)
    assert plan.groups() == {(HEADS, TOKENS, TOKENS): [0, 1, 2, 3]}
    assert plan.adjacent == (True, False, True)
    assert sum("cross attention" in layer.reason for layer in plan.layers) == 2
    assert plan.patch_shapes[3:] == (None, None)


class Causal(ToyAttention):
    def mix(self, q, k, v):
        return F.scaled_dot_product_attention(q, k, v, is_causal=True)


class CausalByHand(ToyAttention):
    def mix(self, q, k, v):
        hidden = torch.ones(TOKENS, TOKENS, dtype=torch.bool).triu(1)
        return self.logits(q, k).masked_fill(hidden, -torch.inf).softmax(-1) @ v


def test_a_mask_that_blocks_share_is_said():
    for kind in (Causal, CausalByHand):
        notes = discover_plan(toy(kind), SIZE).notes
        assert notes[0].startswith("2 attention layers hide keys by a mask (blocks.0.attn and others)")
    assert discover_plan(toy(), SIZE).notes == discover_plan(toy(Matmul), SIZE).notes == ()
    sizes = {"img_size": 64, "depths": (2,), "num_heads": (2,), "embed_dim": 16, "window_size": 4}
    notes = discover_plan(make("swin_tiny_patch4_window7_224", **sizes), (64, 64)).notes
    assert notes[0].startswith("1 attention layers hide keys by a mask (layers.0.blocks.1.attn)")
