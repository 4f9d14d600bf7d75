"""How alike unit vectors are across blocks, and how alike they would be across other tokens, heads and images.

The mean cosine over any set of pairs is a difference of inner products of sums. With x[h, t] the unit vectors of one
block and y[h, t] those of another:

    same head and token          T1 = Σ_h Σ_t  <x_ht, y_ht>
    same head, any token         T2 = Σ_h      <Σ_t x_ht, Σ_t y_ht>
    any head, same token         T3 =     Σ_t  <Σ_h x_ht, Σ_h y_ht>
    any head, any token          T4 =          <Σ_ht x_ht, Σ_ht y_ht>

so that T2 − T1 is the sum over all other tokens: the exact mean of their chance level over every permutation without
fixed points, with no permutation drawn. The same sums over images (vectors added over images first) give the wrong-image null.
The same formulas over the number of defined vectors give the number of defined pairs. With the sums of the entries of single
vectors, <1, x_ht> <1, y_ht> − <x_ht, y_ht> is in the same way the sum over all wrong keys.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from collapse_probe.capture.trace import by_window
from collapse_probe.metrics.functional.geometry import gram, padded
from collapse_probe.metrics.functional.unit_vectors import UnitVectors, span_grams


@dataclass(frozen=True)
class VectorGroup:
    """Vectors that can be compared: their heads, length and tokens, the blocks (positions) that have them, and how many maps
    of a head an image has.
    """

    heads: int
    length: int
    tokens: list[int]
    positions: list[int]
    windows: int = 1


@dataclass(frozen=True)
class Part:
    """What some vectors are a part of: images (each with `windows` maps), blocks and heads, and whether the heads or the tokens
    end with them.
    """

    images: slice
    positions: list[int]
    heads: slice
    last_heads: bool
    last_tokens: bool
    windows: int = 1


class PairSums:
    """T1 … T4 of one batch, from unit vectors that come in parts of their heads and tokens; and the same for defined pairs.

    What the large tensors are needed for is taken of each part as it comes; the sums over tokens and over keys, and which
    vectors are defined, are kept, and `finish` makes the products of all of them at once.
    """

    def __init__(self, images: int, blocks: int, device: torch.device) -> None:
        self.wide = torch.float64 if device.type != "mps" else torch.float32
        self.images, self.device = images, device
        self.sums = torch.zeros(4, images, blocks, blocks, dtype=self.wide, device=device)
        self.pairs = torch.zeros_like(self.sums)
        self.other_keys = torch.zeros_like(self.sums[0])
        self._over_heads: Tensor | None = None
        self._spare: Tensor | None = None  # memory of such a sum that is done
        self._kept: dict[tuple[int, ...], Kept] = {}

    def add(self, part: Part, vectors: UnitVectors, token_dim: int, first: int, group: VectorGroup) -> None:
        """The vectors of some images, heads and tokens of a group, `first` the place of the first of these tokens; b are the
        images, or the windows of the first, then those of the next.
        """
        x = vectors.matrices
        same = span_grams(vectors.flat).sum(1)
        self._into(self.sums[0], part, same)
        if self._over_heads is None and part.last_heads and x.shape[1] == 1:
            self._into(self.sums[2], part, same)
        else:
            over_heads = vectors.flat if x.shape[1] == 1 else vectors.flat.sum(2, keepdim=True)
            if self._over_heads is None:
                self._over_heads = self._copied(over_heads) if over_heads is vectors.flat else over_heads
            else:
                self._over_heads += over_heads
            if part.last_heads:
                self._into(self.sums[2], part, span_grams(self._over_heads).sum(1))
                self._spare, self._over_heads = self._over_heads, None
        kept = self._kept.get(tuple(part.positions))
        if kept is None:
            kept = self._kept[tuple(part.positions)] = Kept.room(self.images, group, x)
        inside = slice(part.images.start * part.windows, part.images.stop * part.windows)
        tokens, key_dim = slice(first, first + x.shape[token_dim]), -3 - token_dim
        kept.over_tokens[inside, part.heads] += x.sum(token_dim)
        kept.over_keys[inside, part.heads, :, tokens] = x.sum(key_dim)
        kept.valid[inside, part.heads, :, tokens] = vectors.valid

    def _copied(self, x: Tensor) -> Tensor:
        spare, self._spare = self._spare, None
        return x.clone() if spare is None or spare.shape != x.shape else spare.copy_(x)

    def finish(self) -> None:
        """Add the products of what was kept."""
        for positions, kept in self._kept.items():
            part = Part(slice(0, self.images), list(positions), slice(0, kept.valid.shape[1]), True, True, kept.windows)
            sums, valid = kept.over_tokens.to(self.wide), kept.valid.to(self.wide)
            counts = valid.sum(-1, keepdim=True)
            for target, vectors in (
                (self.sums[1], sums),
                (self.sums[3], sums.sum(1, keepdim=True)),
                (self.pairs[0], valid),
                (self.pairs[1], counts),
                (self.pairs[2], valid.sum(1, keepdim=True)),
                (self.pairs[3], counts.sum(1, keepdim=True)),
            ):
                self._into(target, part, gram(padded(vectors)).sum(1))
            if kept.keys > 1:
                self._into(self.other_keys, part, gram(padded(kept.over_keys.to(self.wide))).sum(1) / (kept.keys - 1))
                place = torch.tensor(positions, device=self.device)
                same = self.sums[0][:, place[:, None], place]
                self._into(self.other_keys, replace(part, windows=1), same / (1 - kept.keys))
        self._kept.clear()

    def _into(self, target: Tensor, part: Part, value: Tensor) -> None:
        if part.windows > 1:
            value = by_window(value, part.windows).sum(1)
        if part.positions == list(range(target.shape[-1])):
            target[part.images] += value.to(target.dtype)
            return
        place = torch.tensor(part.positions, device=value.device)
        target[part.images, place[:, None], place[None, :]] += value.to(target.dtype)


@dataclass(frozen=True)
class Kept:
    """Of all vectors of a batch: their sums over tokens [B, H, L, D] and over their entries [B, H, L, tokens], and how many
    there are of each, 0 where it is not defined; B are the images, or their windows.
    """

    over_tokens: Tensor
    over_keys: Tensor
    valid: Tensor
    windows: int

    @classmethod
    def room(cls, images: int, group: VectorGroup, like: Tensor) -> Kept:
        """Zeros for the images of a batch, in the dtype and on the device of `like`."""
        shape = (images * group.windows, group.heads, len(group.positions))
        over_keys = like.new_zeros(*shape, len(group.tokens))
        return cls(like.new_zeros(*shape, group.length), over_keys, torch.zeros_like(over_keys), group.windows)

    @property
    def keys(self) -> int:
        """The length of a vector."""
        return self.over_tokens.shape[-1]


def ratio(total: Tensor, number: Tensor) -> Tensor:
    """A sum over a number of pairs; NaN where there is no pair."""
    return torch.where(number > 0.5, total / number.clamp_min(0.5), torch.nan)


def mean_cosines(sums: Tensor, pairs: Tensor) -> dict[str, Tensor]:
    """From T1 … T4 [4, …] and their numbers of pairs: the mean cosines by which of head and token differ."""
    (t1, t2, t3, t4), (n1, n2, n3, n4) = sums, pairs
    return {
        "real": ratio(t1, n1),
        "other_token": ratio(t2 - t1, n2 - n1),
        "other_head": ratio(t3 - t1, n3 - n1),
        "other_both": ratio(t4 - t2 - t3 + t1, n4 - n2 - n3 + n1),
    }
