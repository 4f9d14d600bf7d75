"""Ways of computing attention, each with the maps that it should be heard to have."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import nn
from toys import HEADS, TOKENS, ToyAttention


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


FUSED = [ToyAttention, Masked, Blind, Padded, Biased, Causal, Scaled, Grouped, Erases]
EAGER = [Wide, Matmul, Einsum, Bmm, OneKey, ErasesMap]
CHANGED = [Changed, Gated, InPlace, ValuesFirst, EinsumValuesFirst, Merged]
