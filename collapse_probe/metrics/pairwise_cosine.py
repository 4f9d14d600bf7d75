"""How alike unit vectors are across blocks, and how alike they would be across other tokens, heads and images.

The mean cosine over any set of pairs is a difference of inner products of sums. With x[h, t] the unit vectors of one
block and y[h, t] those of another:

    same head and token          T1 = Σ_h Σ_t  <x_ht, y_ht>
    same head, any token         T2 = Σ_h      <Σ_t x_ht, Σ_t y_ht>
    any head, same token         T3 =     Σ_t  <Σ_h x_ht, Σ_h y_ht>
    any head, any token          T4 =          <Σ_ht x_ht, Σ_ht y_ht>

so that T2 − T1 is the sum over all wrong tokens: the exact mean of the wrong-token null over every permutation without
fixed points, with no permutation drawn. The same sums over images (vectors added over images first) give the wrong-image null.
The same formulas over the number of defined vectors give the number of defined pairs. With the sums of the entries of single
vectors, <1, x_ht> <1, y_ht> − <x_ht, y_ht> is in the same way the sum over all wrong keys.
"""

from __future__ import annotations

import itertools
import zlib
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from collapse_probe.capture.plan import Plan
from collapse_probe.capture.trace import MapTile, Trace, by_window
from collapse_probe.metrics.accumulators import GROUPS, Means, group_of
from collapse_probe.metrics.coverage import depth_neighbours, groups_of
from collapse_probe.metrics.functional.geometry import gram, padded
from collapse_probe.metrics.functional.unit_vectors import UnitVectors, length_of, span_grams, unit_into
from collapse_probe.statistics.intervals import Array, jackknife
from collapse_probe.statistics.kappa import MONOMIALS, PairMoments, kappa

STATE_BUDGET = 48 * 2**20
"""Bytes that the sum over images of one kind of vector may take; beyond it a seeded sample of tokens is summed."""
SAMPLED_TOKENS = 16
BY_IMAGE = ("real", "other_token", "other_head", "other_key")
"""What is kept of every image for neighbouring blocks."""
SPARE_BYTES = 8 * 2**20


def seeded_sample(tokens: list[int], size: int, seed: int = 0) -> list[int]:
    """A seeded subset of tokens in their order; all of them where `size` is large enough."""
    if size >= len(tokens):
        return tokens
    order = sorted(tokens, key=lambda t: zlib.crc32(f"{seed}/{t}".encode()))
    return sorted(order[:size])


def unit_vectors(tile: MapTile, point: str, axis: str, centred: bool, without: tuple[int, ...] = ()) -> UnitVectors:
    """Rows or columns of a tile as unit vectors; see `unit` and `centred_unit`.

    Tokens in `without` are left out as queries and as keys. A tile keeps the last of them for the metrics that share them, in
    memory that the next ones, also those of the next tile, are written to.
    """
    if tile.weights is tile.probs:
        point = "probs"
    key = (point, axis, centred, without)
    if tile.derived.get("key") != key:
        tile.derived.pop("unit vectors", None)
        maps, dim = tile.maps(point), -1 if axis == "row" else -2
        if without:
            rows = [t - tile.rows.start for t in tile.tokens("row", without)]
            columns = [t - tile.columns.start for t in tile.tokens("column", without)]
            maps = maps[..., rows, :][..., columns]
        room = tile.memory.get(maps.shape)
        if room is None:
            room = tile.memory[maps.shape] = UnitVectors.room(maps.shape, maps.device)
        lengths = ("lengths", point, axis, without)
        if lengths not in tile.derived:
            tile.derived[lengths] = length_of(maps, dim)
        valid = unit_into(room.matrices, maps, tile.derived[lengths], dim, centred)
        tile.derived |= {"key": key, "unit vectors": replace(room, valid=valid)}
    made: UnitVectors = tile.derived["unit vectors"]
    return made


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


class PairwiseCosine(Means):
    """Mean cosines between blocks over all heads and tokens, real and null, for vectors that a child class supplies.

    Per image: real, other_token, other_head, other_both, other_key [blocks, blocks], with the moments that kappa needs; over
    pairs of different images: the first four, from sums over images. `neighbours` are the consecutive blocks that are kept by
    image, undefined where the two are none.
    """

    by_rows_of_maps: bool = False

    def __init__(self, neighbours: Sequence[bool], groups: Sequence[VectorGroup], axis: str) -> None:
        super().__init__()
        self.neighbours, self.blocks = torch.tensor(neighbours, dtype=torch.bool), len(neighbours) + 1
        self.groups, self.token_dim = list(groups), -2 if axis == "row" else -1
        square = (self.blocks, self.blocks)
        self.add_means(real=square, other_token=square, other_head=square, other_both=square, other_key=square)
        self.add_moments("both", square, MONOMIALS)
        self.add_state("defined_vectors", self.blocks)
        self.add_state("images", 1)
        self.add_state("own_sums", 4, *square)
        self.add_state("own_pairs", 4, *square)
        self.samples = []  # the tokens whose vectors are summed over images
        for group in groups:
            size = group.windows * group.heads * len(group.positions) * group.length * len(group.tokens) * 8
            self.samples.append(group.tokens if size <= STATE_BUDGET else seeded_sample(group.tokens, SAMPLED_TOKENS))
        self.sampled = any(len(s) < len(g.tokens) for s, g in zip(self.samples, groups, strict=True))
        for g, (group, sample) in enumerate(zip(groups, self.samples, strict=True)):
            blocks_here = len(group.positions)
            shape = (len(sample), group.length) if axis == "row" else (group.length, len(sample))
            self.add_state(f"over_images_{g}", group.windows, group.heads, blocks_here, *shape)
            self.add_state(f"defined_{g}", group.windows, group.heads, blocks_here, len(sample))

    def start_batch(self, trace: Trace, names: Sequence[str]) -> None:
        tensors = (t for a in trace.attention for t in (a.q, a.probs) if t is not None)
        device = next(t.device for t in (*tensors, *trace.tokens) if t is not None)
        self._pairs = PairSums(trace.images, self.blocks, device)
        self._own = PairSums(trace.images, self.blocks, device) if self.sampled else self._pairs
        self._scratch: Tensor | None = None

    def _wide(self, like: Tensor) -> Tensor:
        """Memory for vectors in the states' precision, the same for all of a batch."""
        if self._scratch is None or self._scratch.shape != like.shape:
            self._scratch = torch.empty(like.shape, dtype=torch.float64, device=self.state("images").device)
        return self._scratch

    def absorb(self, part: Part, tokens: list[int], vectors: UnitVectors) -> None:
        """Take the unit vectors of some heads and tokens of some images."""
        g = next(i for i, group in enumerate(self.groups) if group.positions == part.positions)
        group, sample = self.groups[g], self.samples[g]
        self._pairs.add(part, vectors, self.token_dim, group.tokens.index(tokens[0]), group)
        place_of = {token: place for place, token in enumerate(sample)}
        inside = [i for i, token in enumerate(tokens) if token in place_of]
        if not inside:
            return
        if len(inside) < len(tokens):
            vectors = vectors.pick(self.token_dim, inside)
        first = place_of[tokens[inside[0]]]
        total = self.state(f"over_images_{g}").narrow(self.token_dim, first, len(inside))
        by_image, heads = by_window(vectors.matrices, part.windows), range(*part.heads.indices(group.heads))
        for i, head in enumerate(heads):  # one head at a time, so that its sum stays in the cache for the next image
            of_head, wide = total[:, head], self._wide(by_image[0, :, i])
            for one_image in by_image[:, :, i]:
                of_head += wide.copy_(one_image)
        defined = self.state(f"defined_{g}")[:, part.heads]
        defined[..., first : first + len(inside)] += by_window(vectors.valid, part.windows).sum(0).to(defined.device)
        if self.sampled:
            own = replace(group, tokens=sample)
            self._own.add(part, vectors, self.token_dim, first, own)

    def end_batch(self, trace: Trace) -> dict[str, Tensor]:
        self._pairs.finish()
        self._own.finish()
        cosines = mean_cosines(self._pairs.sums, self._pairs.pairs)
        cosines["other_key"] = ratio(self._pairs.other_keys, self._pairs.pairs[0])
        for name, values in cosines.items():
            self.add_images(name, values)
        self.add_images("both", *(1 - cosines[name].to(self.state("both_count")) for name in ("real", "other_token")))
        self.add("defined_vectors", self._pairs.pairs[0].diagonal(0, -2, -1).sum(0))
        self.add("own_sums", self._own.sums.sum(1))
        self.add("own_pairs", self._own.pairs.sum(1))
        self.add("images", torch.tensor([float(trace.images)]))
        among = self.neighbours.to(cosines["real"].device)
        adjacent = {name: torch.where(among, cosines[name].diagonal(-1, -2, -1), torch.nan) for name in BY_IMAGE}
        return adjacent | {"within": cosines["other_head"].diagonal(0, -2, -1)}

    def across_images(self) -> dict[str, Array]:
        """real, other_token, other_head, other_both between different images, [blocks, blocks]; NaN with one image."""
        own_sums, own_pairs = self.state("own_sums"), self.state("own_pairs")
        whole = PairSums(1, self.blocks, own_sums.device)
        for g, group in enumerate(self.groups):
            vectors = UnitVectors.of(self.state(f"over_images_{g}"), self.state(f"defined_{g}"))
            part = Part(slice(0, 1), group.positions, slice(0, group.heads), True, True, group.windows)
            whole.add(part, vectors, self.token_dim, 0, replace(group, tokens=self.samples[g]))
        whole.finish()
        cosines = mean_cosines(whole.sums[:, 0] - own_sums, whole.pairs[:, 0] - own_pairs)
        return {name: values.cpu().numpy() for name, values in cosines.items()}

    def moments(self) -> PairMoments:
        """Those of real and other_token over images, for kappa."""
        return PairMoments.of_sums(self.array("both_count"), self.array("both_moments"))


class MapPairwiseCosine(PairwiseCosine):
    """Cosines between the rows or columns of attention maps; of maps inside windows within each window.

    Sums over images of the cosines between every head of a block and every head of the next tell whether the two have the
    same maps under other head numbers; they are taken of tiles that hold all heads.
    """

    def __init__(self, plan: Plan, point: str, axis: str, centred: bool, without: tuple[int, ...] = ()) -> None:
        self.point, self.axis, self.centred, self.without = point, axis, centred, without
        self.by_rows_of_maps = axis == "row"
        self.windowed, groups = not without, []
        for group in groups_of(plan, self.windowed):
            rows, columns = ([t for t in range(size) if t not in without] for size in (group.queries, group.keys))
            tokens, length = (rows, len(columns)) if axis == "row" else (columns, len(rows))
            groups.append(VectorGroup(group.heads, length, tokens, group.positions, group.windows))
        super().__init__(plan.adjacent, groups, axis)
        self.most_heads = max((group.heads for group in groups), default=1)
        if not centred and not without:
            self.add_state("between_heads", 4, self.blocks - 1, self.most_heads, self.most_heads)

    def add_tile(self, tile: MapTile) -> None:
        """Take the vectors of a tile that holds them whole."""
        if tile.whole(self.axis):
            vectors = unit_vectors(tile, self.point, self.axis, self.centred, self.without)
            tokens = tile.tokens(self.axis, self.without)
            part = Part(tile.images, tile.positions, tile.heads, tile.last_heads, tile.last_tokens, tile.windows)
            self.absorb(part, tokens, vectors)
            if "between_heads" in self.states and tile.heads == slice(0, tile.group.heads) and tile.group.heads > 1:
                self._add_heads(tile.positions, vectors.matrices, vectors.valid)

    def _add_heads(self, positions: list[int], vectors: Tensor, valid: Tensor) -> None:
        """Add, for each block and the one after it, the sums over same tokens and over any, and how many of both there are."""
        pairs = [i for i, (one, other) in enumerate(itertools.pairwise(positions)) if other == one + 1]
        if not pairs:
            return
        heads, later = vectors.shape[1], [i + 1 for i in pairs]
        sums = self.state("between_heads")[:, [positions[i] for i in pairs], :heads, :heads]
        by_block = vectors.transpose(1, 2)
        defined = valid.to(vectors.dtype).transpose(1, 2)
        each = (by_block.flatten(3), by_block.sum(self.token_dim), defined, defined.sum(-1, keepdim=True))
        for kind, x in enumerate(each):
            x = padded(x)
            sums[kind] += (x[:, pairs] @ x[:, later].mT).to(sums).sum(0)
        self.state("between_heads")[:, [positions[i] for i in pairs], :heads, :heads] = sums

    def left_out(self) -> Array:
        """The share of every block's vectors that have no direction, [blocks]; 0 for a block without any."""
        total = np.zeros(self.blocks)
        for group in self.groups:
            total[group.positions] = group.windows * group.heads * len(group.tokens)
        with np.errstate(divide="ignore", invalid="ignore"):
            share: Array = np.where(total > 0, 1 - self.array("defined_vectors") / (total * self.array("images")), 0.0)
        return share

    def best_order(self) -> tuple[Array, Array] | None:
        """Whether neighbouring blocks have the same maps under other head numbers: the share [blocks − 1] and the order.

        The order [blocks − 1, heads] gives every head of a block its own in the next block, so that their cosines sum to the
        most; −1 where there is no head. The share is what (real − null)/(1 − null) is then: for columns the null is that of
        other tokens, for rows that of the heads that are not paired. NaN where the best order is that of the heads' numbers.
        None where no tile held all heads, or there is one head.
        """
        if "between_heads" not in self.states or not self.array("between_heads")[2].any():
            return None
        from scipy.optimize import linear_sum_assignment  # costs a tenth of the start, and is needed at the end

        shares, orders = np.full(self.blocks - 1, np.nan), np.full((self.blocks - 1, self.most_heads), -1)
        for pair, of_pair in enumerate(np.moveaxis(self.array("between_heads"), 1, 0)):
            heads = int(of_pair[2].any(1).sum())
            same, total, number, any_number = of_pair[:, :heads, :heads]
            with np.errstate(divide="ignore", invalid="ignore"):
                cosines = np.nan_to_num(same / number)
            rows, order = linear_sum_assignment(-cosines)
            orders[pair, rows] = order
            if (order == rows).all():
                continue
            paired = np.zeros_like(number, dtype=np.bool_)
            paired[rows, order] = True
            null = cosines[~paired].mean()
            if self.axis == "column":
                null = (total - same)[paired].sum() / (any_number - number)[paired].sum()
            shares[pair] = kappa(cosines[paired].mean(), null)
        return shares, orders


class TokenPairwiseCosine(PairwiseCosine):
    """Cosines between the patch embeddings of the same token at two depths."""

    def __init__(self, plan: Plan, shapes: Sequence[tuple[int, int] | None]) -> None:
        depths: dict[tuple[int, int], list[int]] = {}
        for depth, shape in enumerate(shapes):
            if shape is not None:
                depths.setdefault(shape, []).append(depth)
        groups = [VectorGroup(1, width, list(range(n)), at) for (n, width), at in depths.items()]
        super().__init__(depth_neighbours(plan), groups, "row")

    def end_batch(self, trace: Trace) -> dict[str, Tensor]:
        """Take the whole batch, a few images at a time."""
        for group in self.groups:
            positions = group.positions
            patches = [p for p in map(trace.patches, positions) if p is not None]
            one_image = sum(p[0].numel() * 4 for p in patches)
            step = max(1, SPARE_BYTES // max(one_image, 1))
            for start in range(0, trace.images, step):
                images = slice(start, min(start + step, trace.images))
                part = Part(images, positions, slice(0, 1), last_heads=True, last_tokens=True)
                self.absorb(part, group.tokens, _units([p[images] for p in patches]))
        return super().end_batch(trace)


def _units(patches: list[Tensor]) -> UnitVectors:
    """The unit vectors of several depths [b, P, D], one depth at a time, for memory."""
    (b, rows, width), device = patches[0].shape, patches[0].device
    room = UnitVectors.room((b, 1, len(patches), rows, width), device)
    valid = [
        unit_into(room.matrices[:, 0, depth], one_depth, length_of(one_depth, -1), -1)
        for depth, one_depth in enumerate(patches)
    ]
    return replace(room, valid=torch.stack(valid, 1)[:, None])


JACKKNIFE_TOKENS = 4


class ImageSpread(Means):
    """Sums by group of images of a few tokens' vectors, for the jackknife of the similarity between images."""

    windowed = True

    def __init__(self, plan: Plan, point: str, axis: str, centred: bool) -> None:
        super().__init__()
        self.point, self.axis, self.centred, self.token_dim = point, axis, centred, -2 if axis == "row" else -1
        self.groups, self.blocks = plan.map_groups(), len(plan.map_layers)
        self.add_state("own", GROUPS, self.blocks)
        self.add_state("own_pairs", GROUPS, self.blocks)
        self.samples = []
        for g, group in enumerate(self.groups):
            sample = seeded_sample(list(range(group.queries if axis == "row" else group.keys)), JACKKNIFE_TOKENS, seed=1)
            self.samples.append(sample)
            shape = (len(sample), group.keys) if axis == "row" else (group.queries, len(sample))
            every = (GROUPS, group.windows, group.heads, len(group.positions))
            self.add_state(f"sums_{g}", *every, *shape)
            self.add_state(f"defined_{g}", *every, len(sample))

    def start_batch(self, trace: Trace, names: Sequence[str]) -> None:
        self._group = torch.tensor([group_of(name) for name in names])

    def add_tile(self, tile: MapTile) -> None:
        """Add the sampled tokens' vectors to the sums of their images' groups."""
        g = self.groups.index(tile.group)
        sample, tokens = self.samples[g], tile.tokens(self.axis)
        places = [i for i, t in enumerate(sample) if t in tokens]
        if not tile.whole(self.axis) or not places:
            return
        units = unit_vectors(tile, self.point, self.axis, self.centred)
        vectors, valid = units.matrices, units.valid
        inside = [tokens.index(sample[i]) for i in places]
        vectors = vectors.index_select(self.token_dim, torch.tensor(inside, device=vectors.device))
        valid = valid[..., inside].to(vectors.dtype)
        sums, defined = self.state(f"sums_{g}")[:, :, tile.heads], self.state(f"defined_{g}")[:, :, tile.heads]
        group, span = self._group[tile.images].to(sums.device), slice(places[0], places[-1] + 1)
        part = sums.narrow(self.token_dim, span.start, len(places))
        part.index_add_(0, group, by_window(vectors, tile.windows).to(sums))
        defined[..., span].index_add_(0, group, by_window(valid, tile.windows).to(sums))
        for name, one in (("own", vectors.square().sum((1, 3, 4))), ("own_pairs", valid.square().sum((1, 3)))):
            own, one = self.state(name), tile.over_windows(one)
            own[:, tile.positions] = own[:, tile.positions].index_add(0, group, one.to(own))

    def stderr(self) -> Array:
        """Standard error [blocks] of the mean cosine between different images: a jackknife that leaves groups out."""
        own, own_pairs = self.state("own"), self.state("own_pairs")
        left_out = torch.full((GROUPS, self.blocks), torch.nan, dtype=torch.float64)
        for g, positions in enumerate(group.positions for group in self.groups):
            sums, defined = self.state(f"sums_{g}").flatten(1, 2), self.state(f"defined_{g}").flatten(1, 2)
            rest, rest_defined = sums.sum(0) - sums, defined.sum(0) - defined
            total = rest.square().sum((1, 3, 4)) - (own.sum(0) - own)[:, positions]
            pairs = rest_defined.square().sum((1, 3)) - (own_pairs.sum(0) - own_pairs)[:, positions]
            cosine = torch.where(pairs > 0.5, total / pairs.clamp_min(0.5), torch.nan)
            empty = defined.sum((1, 2, 3)) == 0
            left_out[:, positions] = torch.where(empty[:, None], torch.nan, cosine).cpu()
        return jackknife(left_out.numpy())[0]
