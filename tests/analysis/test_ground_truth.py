"""The verdict on models whose truth is known by construction: it never says collapsed or not collapsed of the other."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

import collapse_probe as cp
from collapse_probe.models.vit import ViT
from collapse_probe.results.rules import FEWEST_IMAGES

SIDE, PATCH, WIDTH, DEPTH = 32, 8, 48, 6
TOKENS = (SIDE // PATCH) ** 2 + 1
METRICS = ("attention-similarity", "attention-similarity@row", "attention-entropy", "patch-diversity")


def drawn(seed, *shape, scale=1.0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * scale


class Attention(nn.Module):
    """Attention whose logits [B, H, N, N] are what `logits(block, signal)` says of the image's own tokens."""

    def __init__(self, block, heads, logits):
        super().__init__()
        self.block, self.heads, self.logits = block, heads, logits
        self.value, self.out = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x, signal):
        images, tokens, width = x.shape
        value = self.value(x).view(images, tokens, self.heads, -1).transpose(1, 2)
        mixed = self.logits(self.block, signal).softmax(-1) @ value
        return self.out(mixed.transpose(1, 2).reshape(images, tokens, width))


class Block(nn.Module):
    def __init__(self, *about):
        super().__init__()
        self.norm, self.attn = nn.LayerNorm(WIDTH), Attention(*about)

    def forward(self, x, signal):
        return x + 0.1 * self.attn(self.norm(x), signal)


class GivenMaps(nn.Module):
    """A ViT with the maps that `logits(block, signal)` gives; `signal` [B, N, 4] is what the image says of every token."""

    def __init__(self, logits, heads, depth=DEPTH, constant=0.0):
        super().__init__()
        self.patch_embed = nn.Conv2d(3, WIDTH, PATCH, PATCH)
        self.cls_token, self.pos_embed = nn.Parameter(drawn(1, 1, 1, WIDTH)), nn.Parameter(drawn(2, 1, TOKENS, WIDTH) * 0.3)
        self.blocks = nn.ModuleList(Block(i, heads, logits) for i in range(depth))
        self.head, self.constant = nn.Linear(WIDTH, 3), constant

    def forward(self, images):
        x = self.patch_embed(images).flatten(2).transpose(1, 2)
        x = torch.cat([self.cls_token.expand(len(x), -1, -1), x], 1) + self.pos_embed
        signal = x[..., :4]
        for block in self.blocks:
            x = block(x, signal)
            if self.constant:
                x = (1 - self.constant) * x + self.constant * x.mean(1, keepdim=True)
        return self.head(x[:, 0])


def of_image(i, signal, heads, scale=2.0):
    """Maps that depend on the image, by a form of block number i."""
    form = drawn(50 + i, heads, 4, 4)
    return torch.einsum("bnc,hcd,bmd->bhnm", signal, form, signal) * scale / 2


def fixed(seed, signal, heads, scale=2.0, rank_one=False):
    """Maps that are the same for every image, and for every query where `rank_one`."""
    logits = drawn(seed, heads, 1 if rank_one else TOKENS, TOKENS, scale=scale)
    return logits.expand(len(signal), heads, TOKENS, TOKENS)


def sink(keys, signal, heads, seed):
    """Every query attends to one key (of each head its own, if several), up to nothing."""
    to = nn.functional.one_hot(torch.tensor(keys), TOKENS).float() * 60
    return fixed(seed, signal, heads, 1.0) + to.view(1, -1, 1, TOKENS)


def noisy(i, s, h):
    return of_image(0, s, h) + fixed(200 + i, s, h, 0.5)


MAPS = {
    "image maps of their own": (lambda i, s, h: of_image(i, s, h), False),
    "weight-tied": (lambda i, s, h: of_image(0, s, h), True),
    "one copied pair": (lambda i, s, h: of_image(1 if i == 2 else i, s, h), True),
    "half the blocks copied": (lambda i, s, h: of_image(min(i, DEPTH // 2), s, h), True),
    "copied with noise": (noisy, True),
    "image-independent, of their own": (lambda i, s, h: fixed(i, s, h), False),
    "image-independent, shared": (lambda i, s, h: fixed(0, s, h), True),
    "rank one, shared row": (lambda i, s, h: fixed(0, s, h, rank_one=True), True),
    "rank one, own rows": (lambda i, s, h: fixed(i, s, h, rank_one=True), False),
    "rank one, shared row under other heads": (lambda i, s, h: fixed(0, s, h, rank_one=True).roll(i, 1), True),
    "the same maps under other heads": (lambda i, s, h: of_image(0, s, h).roll(i, 1), True),
    "rows mostly shared": (lambda i, s, h: fixed(0, s, h, 4.0, True) + fixed(300 + i, s, h, 0.6), True),
    "high entropy, shared row": (lambda i, s, h: fixed(7, s, h, 0.5, True), True),
    "high entropy, one row for all heads": (lambda i, s, h: fixed(7, s, 1, 0.5, True).expand(-1, h, -1, -1), True),
    "high entropy, own rows": (lambda i, s, h: fixed(7 + i, s, h, 0.5, True), False),
    "one sink for all": (lambda i, s, h: sink([0] * h, s, h, 400 + i), True),
    "a sink a block": (lambda i, s, h: sink([i + 1] * h, s, h, 400 + i), False),
    "a sink a block and head": (lambda i, s, h: sink([(5 * i + 3 * g) % TOKENS for g in range(h)], s, h, 400 + i), False),
    "near-uniform": (lambda i, s, h: of_image(i, s, h) * 1e-3, False),
    "one-hot, of their own": (lambda i, s, h: fixed(500 + i, s, h, 60.0), False),
    "one-hot by image, shared": (lambda i, s, h: of_image(0, s, h, 100.0), True),
}
ONE_HEAD = [name for name in MAPS if "heads" not in name]


def analysed(model, images, seed=0, **more):
    pictures = [drawn(seed, images, 3, SIDE, SIDE)]
    return cp.analyze(model, pictures, img_size=SIDE, gallery_images=0, metrics=METRICS, **more)


def answer_of(name, heads, images, seed=0):
    torch.manual_seed(seed)
    logits, _ = MAPS[name]
    return analysed(GivenMaps(lambda i, s: logits(i, s, heads), heads), images, seed).answer


def untrained(seed, **shape):
    torch.manual_seed(100 + seed)
    return ViT(**{"classes": 10, "image_size": 8, "patch_size": 2, "mlp_ratio": 2.0, **shape})


UNTRAINED = {
    "one narrow head": {"depth": 12, "width": 32, "heads": 1},
    "four heads": {"depth": 12, "width": 64, "heads": 4},
    "shallow": {"depth": 6, "width": 32, "heads": 2},
    "one wide head": {"depth": 8, "width": 64, "heads": 1},
    "deep": {"depth": 24, "width": 64, "heads": 4},
}


def on_digits(model, images):
    return cp.analyze(model, "bundled:digits", limit=images, null_images=0, gallery_images=0, metrics=METRICS).answer


@pytest.mark.parametrize("name", MAPS)
def test_the_verdict_is_right(name):
    answer = answer_of(name, 3, FEWEST_IMAGES)
    assert answer["collapsed"] is MAPS[name][1], answer["sentences"]


@pytest.mark.parametrize("name", ["rows mostly shared", "high entropy, own rows", "weight-tied"])
def test_one_head_alone_tells_no_untruth(name):
    answer = answer_of(name, 1, FEWEST_IMAGES)
    assert answer["collapsed"] in (MAPS[name][1], None), answer["sentences"]


@pytest.mark.parametrize("images", [2, FEWEST_IMAGES - 1])
@pytest.mark.parametrize("name", ["weight-tied", "near-uniform"])
def test_few_images_are_too_few(name, images):
    answer = answer_of(name, 2, images)
    assert (answer["case"], answer["collapsed"]) == ("undecided", None)
    assert answer["sentences"][0].startswith(f"Too few images to tell whether attention has collapsed across depth: {images},")
    assert not any("collapsed across depth in" in each or "not collapse" in each for each in answer["sentences"])


@pytest.mark.parametrize("name", ["one narrow head", "four heads"])
def test_an_untrained_network_is_not_called_collapsed(name):
    for seed in range(2):
        assert on_digits(untrained(seed, **UNTRAINED[name]), 32)["collapsed"] is not True


def test_a_block_copied_by_its_weights_is_found_in_an_untrained_network():
    model = untrained(0, **UNTRAINED["four heads"])
    with torch.no_grad():
        for block in model.blocks:
            block.attn.qkv.weight *= 8
    model.blocks[5].attn.load_state_dict(model.blocks[4].attn.state_dict())
    answer = on_digits(model, 32)
    assert answer["collapsed"] is True
    assert "block 5 attends like the block before" in answer["sentences"][0]


def test_tokens_that_are_one_are_said_before_maps_that_differ():
    found = analysed(GivenMaps(lambda i, s: of_image(i, s, 3), 3, constant=0.9), FEWEST_IMAGES)
    assert found.answer["collapsed"] is False
    assert found.answer["sentences"][0].startswith("Collapse within the image: the patches of an image have become nearly")
    assert found.answer["sentences"][1].startswith("No collapse across depth")


def test_vectors_without_a_direction_are_counted():
    found = analysed(GivenMaps(lambda i, s: fixed(i, s, 2) * (60 if i == 1 else 1), 2), FEWEST_IMAGES)
    assert any(note.startswith("attention-similarity: columns that are zero in float32") for note in found.run["notes"])
    share = found.metrics["attention-similarity"].details["left_out"]
    assert share[1] > 0.01
    assert share[0] == share[2] == 0


@pytest.mark.slow
@pytest.mark.parametrize("name", MAPS)
def test_the_verdict_is_right_for_all_heads_images_and_draws(name):
    for heads in (1, 2, 4) if name in ONE_HEAD else (2, 4):
        for images in (2, 3, 5, 8, 16, 64):
            for seed in range(2):
                answer = answer_of(name, heads, images, seed)
                assert answer["collapsed"] in (MAPS[name][1], None), (heads, images, seed, answer["sentences"])
                assert images >= FEWEST_IMAGES or answer["collapsed"] is None


@pytest.mark.slow
@pytest.mark.parametrize("images", [16, 64])
@pytest.mark.parametrize("name", UNTRAINED)
def test_no_untrained_network_is_called_collapsed(name, images):
    for seed in range(12):
        answer = on_digits(untrained(seed, **UNTRAINED[name]), images)
        assert answer["collapsed"] is not True, (seed, answer["sentences"])


@pytest.mark.slow
@pytest.mark.parametrize("own", np.linspace(0.6, 1.4, 9))
def test_near_the_threshold_no_answer_is_wrong(own):
    """Maps between shared and their own: what 16 or 64 images say is never against what 512 images measure."""
    model = GivenMaps(lambda i, s: of_image(0, s, 2) + own * of_image(1 + i, s, 2), 2)
    kappa = np.diag(analysed(model, 512, 99).metrics["attention-similarity"].nulls.values["kappa"], -1)
    for images in (16, 64):
        for seed in range(6):
            collapsed = analysed(model, images, seed).answer["collapsed"]
            assert not (collapsed is True and (kappa < 0.5).all()), (images, seed, kappa)
            assert not (collapsed is False and (kappa > 0.5).any()), (images, seed, kappa)
