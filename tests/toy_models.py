"""A small Vision Transformer that takes any attention and can also say what its maps are.

`reference(model, images)` runs a model plainly and returns, for every attention call, the maps in float64 that
follow from that call's own queries and keys: (probs, weights). The library has no part in it.
"""

from __future__ import annotations

import copy
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


def masked_softmax(logits, seen):
    """Softmax over what may be seen; a query that may see nothing has a row of zeros."""
    return torch.softmax(logits.masked_fill(~seen, -math.inf), -1).nan_to_num(0.0)


SEEN = torch.rand(TOKENS, TOKENS, generator=torch.Generator().manual_seed(7)) > 0.4
SEEN |= torch.eye(TOKENS, dtype=torch.bool)
BLIND = SEEN.clone()
BLIND[3] = False
BIAS = torch.randn(1, HEADS, TOKENS, TOKENS, generator=torch.Generator().manual_seed(8))
CAUSAL = torch.ones(TOKENS, TOKENS, dtype=torch.bool).tril()


class Masked(ToyAttention):
    """A fused kernel with a bool mask."""

    seen = SEEN

    def mix(self, q, k, v):
        return F.scaled_dot_product_attention(q, k, v, attn_mask=self.seen)

    def reference(self, q, k):
        probs = masked_softmax(self.logits(q, k), self.seen)
        return probs, probs


class Blind(Masked):
    """A bool mask that leaves one query nothing to see."""

    seen = BLIND


class Padded(Masked):
    """A bool mask of its own for each image, over keys."""

    def mix(self, q, k, v):
        return F.scaled_dot_product_attention(q, k, v, attn_mask=self.hidden(len(q)))

    def reference(self, q, k):
        probs = masked_softmax(self.logits(q, k), self.hidden(len(q)))
        return probs, probs

    @staticmethod
    def hidden(count):
        return (torch.arange(TOKENS) < TOKENS - torch.arange(count)[:, None])[:, None, None, :]


class Biased(ToyAttention):
    """A fused kernel with a float bias, as in BEiT."""

    def mix(self, q, k, v):
        return F.scaled_dot_product_attention(q, k, v, attn_mask=BIAS)

    def logits(self, q, k):
        return super().logits(q, k) + BIAS.double()


class Causal(Masked):
    """A fused kernel with is_causal."""

    seen = CAUSAL

    def mix(self, q, k, v):
        return F.scaled_dot_product_attention(q, k, v, is_causal=True)


class Scaled(ToyAttention):
    """A fused kernel with a scale of its own."""

    def mix(self, q, k, v):
        return F.scaled_dot_product_attention(q, k, v, scale=0.6)

    def logits(self, q, k):
        return q @ k.transpose(-1, -2) * 0.6


class Grouped(ToyAttention):
    """A fused kernel with fewer heads for keys than for queries."""

    kv_heads = HEADS // 2

    def mix(self, q, k, v):
        return F.scaled_dot_product_attention(q, k, v, enable_gqa=True)

    def logits(self, q, k):
        return super().logits(q, k.repeat_interleave(2, 1))


class Wide(ToyAttention):
    """Values wider than keys: PyTorch takes its math path."""

    def mix(self, q, k, v):
        return F.scaled_dot_product_attention(q, k, torch.cat([v, v], -1)).chunk(2, -1)[0]


class Matmul(ToyAttention):
    """Eager attention."""

    def mix(self, q, k, v):
        return self.logits(q, k).softmax(-1) @ v


class Einsum(Matmul):
    def mix(self, q, k, v):
        attn = torch.einsum("bhid,bhjd->bhij", q, k).div(math.sqrt(q.shape[-1])).softmax(-1)
        return torch.einsum("bhij,bhjd->bhid", attn, v)


class Bmm(Matmul):
    """Maps as [B·H, N, N]."""

    def mix(self, q, k, v):
        flat = [x.flatten(0, 1) for x in (q, k, v)]
        scores = torch.baddbmm(torch.zeros(1), flat[0], flat[1].transpose(1, 2), beta=0, alpha=q.shape[-1] ** -0.5)
        return torch.bmm(scores.softmax(-1), flat[2]).unflatten(0, q.shape[:2])


class OneKey(Matmul):
    """Every query sees one key: the map is a column of ones, and einsum multiplies elementwise."""

    def mix(self, q, k, v):
        attn = self.logits(q, k[:, :, :1]).softmax(-1)
        return torch.einsum("bhij,bhjd->bhid", attn, v[:, :, :1])

    def reference(self, q, k):
        probs = torch.ones(*q.shape[:3], 1, dtype=torch.float64)
        return probs, probs


class Changed(ToyAttention):
    """Eager attention whose map is changed before it multiplies the values; `own` is that changed map."""

    def __init__(self):
        super().__init__()
        self.mixer = nn.Parameter(torch.eye(HEADS))
        self.own = None

    def mix(self, q, k, v):
        self.own = self.change(self.logits(q, k).softmax(-1))
        return self.own @ v

    def change(self, attn):
        return torch.einsum("bhij,hg->bgij", attn, self.mixer.to(attn.dtype))

    def reference(self, q, k):
        probs = torch.softmax(self.logits(q, k), -1)
        return probs, self.change(probs.clone())


class Gated(Changed):
    def change(self, attn):
        gate = torch.sigmoid(self.mixer.to(attn.dtype).diagonal())[:, None, None]
        return gate * attn + (1 - gate) * attn.mean(-1, keepdim=True)


class InPlace(Changed):
    """The softmax's own memory is overwritten before it multiplies the values."""

    def change(self, attn):
        return attn.mul_(self.mixer.to(attn.dtype).diagonal()[:, None, None])


class ValuesFirst(Changed):
    """The changed map is the second operand of the product, and turned."""

    def mix(self, q, k, v):
        self.own = self.change(self.logits(q, k).softmax(-1))
        return (v.transpose(-1, -2) @ self.own.transpose(-1, -2)).transpose(-1, -2)


class EinsumValuesFirst(Changed):
    def mix(self, q, k, v):
        self.own = self.change(self.logits(q, k).softmax(-1))
        return torch.einsum("bhjd,bhij->bhid", v, self.own)


class Merged(Changed):
    """A map of content and one of positions are added, as in ConViT."""

    def change(self, attn):
        place = BIAS.to(attn.dtype).expand(len(attn), -1, -1, -1).softmax(-1)
        merged = 0.3 * attn + 0.7 * place
        return merged / merged.sum(-1, keepdim=True)


class Erases(ToyAttention):
    """Queries and keys are overwritten once the kernel has run, and so is its output once it was used."""

    def mix(self, q, k, v):
        mixed = super().mix(q, k, v)
        kept = mixed.clone()
        for x in (q, k, v, mixed):
            x.zero_()
        return kept


class ErasesMap(Matmul):
    """The map is overwritten once it has multiplied the values."""

    def mix(self, q, k, v):
        attn = self.logits(q, k).softmax(-1)
        mixed = attn @ v
        attn.mul_(0.1)
        return mixed


_GROUPED = torch.zeros(1, 2, 1, 8), torch.zeros(1, 1, 1, 8), torch.zeros(1, 1, 1, 8)
GROUPED_IS_FUSED = torch._fused_sdp_choice(*_GROUPED, enable_gqa=True) != 0
"""On a CPU only later releases of torch have a fused kernel for fewer heads of keys."""
FUSED = [ToyAttention, Masked, Blind, Padded, Biased, Causal, Scaled, *([Grouped] if GROUPED_IS_FUSED else []), Erases]
EAGER = [Wide, *([] if GROUPED_IS_FUSED else [Grouped]), Matmul, Einsum, Bmm, OneKey, ErasesMap]
CHANGED = [Changed, Gated, InPlace, ValuesFirst, EinsumValuesFirst, Merged]


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
