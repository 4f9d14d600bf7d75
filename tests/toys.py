"""A small Vision Transformer that takes any attention and can also say what its maps are.

`reference(model, images)` runs a model plainly and returns, for every attention call, the maps in float64 that
follow from that call's own queries and keys: (probs, weights). The library has no part in it.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import nn

WIDTH, HEADS, SIZE = 32, 4, (32, 24)
TOKENS = 13


def images(count=3, seed=1, size=SIZE):
    return torch.randn(count, 3, *size, generator=torch.Generator().manual_seed(seed))


def heads_of(x, heads=HEADS):
    return x.unflatten(-1, (heads, -1)).transpose(1, 2)


class ToyAttention(nn.Module):
    """Attention with one way, `mix`, of computing it; `reference` says which maps that way has."""

    kv_heads = HEADS

    def __init__(self):
        super().__init__()
        self.q = nn.Linear(WIDTH, WIDTH)
        self.kv = nn.Linear(WIDTH, 2 * WIDTH * self.kv_heads // HEADS)
        self.out = nn.Linear(WIDTH, WIDTH)
        self.records = None

    def forward(self, x):
        q, (k, v) = heads_of(self.q(x)), (heads_of(y, self.kv_heads) for y in self.kv(x).chunk(2, -1))
        if self.records is not None:
            self.records.append(self.reference(q.double(), k.double()))
        return self.out(self.mix(q, k, v).transpose(1, 2).flatten(2))

    def mix(self, q, k, v):
        return F.scaled_dot_product_attention(q, k, v)

    def reference(self, q, k):
        probs = torch.softmax(self.logits(q, k), -1)
        return probs, probs

    def logits(self, q, k):
        return q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1])


class Block(nn.Module):
    def __init__(self, attention):
        super().__init__()
        self.norm1, self.attn, self.norm2 = nn.LayerNorm(WIDTH), attention, nn.LayerNorm(WIDTH)
        self.mlp = nn.Sequential(nn.Linear(WIDTH, 2 * WIDTH), nn.GELU(), nn.Linear(2 * WIDTH, WIDTH))

    def forward(self, x):
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class ToyViT(nn.Module):
    """Patches of 8 × 8, a class token, whatever blocks it is given, and maps that are far from uniform."""

    def __init__(self, blocks, seed=0):
        super().__init__()
        self.patches = nn.Conv2d(3, WIDTH, 8, 8)
        self.class_token = nn.Parameter(torch.zeros(1, 1, WIDTH))
        self.blocks = nn.ModuleList(blocks)
        self.head = nn.Linear(WIDTH, 5)
        sharpen(self, seed)

    def embed(self, x):
        patches = self.patches(x).flatten(2).transpose(1, 2)
        return torch.cat([self.class_token.expand(len(x), -1, -1), patches], 1)

    def forward(self, x):
        tokens = self.embed(x)
        for block in self.blocks:
            tokens = block(tokens)
        return self.head(tokens.mean(1))


def sharpen(model, seed=0, scale=1.5):
    """Weights drawn so wide that attention is far from uniform."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            fan = parameter.shape[-1] if parameter.ndim > 1 else 4
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * scale / math.sqrt(fan))
    return model.eval()


def toy(attention=ToyAttention, depth=2):
    return ToyViT([Block(attention()) for _ in range(depth)])


@torch.no_grad()
def reference(model, pictures):
    """(probs, weights) in float64 of every attention call of a plain forward pass."""
    records = []
    owners = [module for module in model.modules() if hasattr(module, "records")]
    for owner in owners:
        owner.records = records
    model(pictures)
    for owner in owners:
        owner.records = None
    return records
