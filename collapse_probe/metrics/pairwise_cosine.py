"""Mean cosines between blocks, streamed over images: of rows and columns of maps, and of patch embeddings, with their nulls."""

from __future__ import annotations

import itertools
import zlib
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from collapse_probe.capture.plan import Plan
from collapse_probe.capture.trace import MapTile, Trace, by_window
from collapse_probe.metrics.accumulators import GROUPS, Means, group_of
from collapse_probe.metrics.coverage import depth_neighbours, groups_of
from collapse_probe.metrics.functional.geometry import as_span, padded
from collapse_probe.metrics.functional.pair_sums import PairSums, Part, VectorGroup, mean_cosines, ratio
from collapse_probe.metrics.functional.unit_vectors import UnitVectors, length_of, unit_into
from collapse_probe.statistics.intervals import Array, jackknife
from collapse_probe.statistics.kappa import MONOMIALS, PairMoments, kappa

STATE_BUDGET = 48 * 2**20
"""Bytes that the sum over images of one kind of vector may take; beyond it a seeded sample of tokens is summed."""
SAMPLED_TOKENS = 16
BY_IMAGE = ("real", "other_token", "other_head", "other_key")
"""What is kept of every image for neighbouring blocks."""
SPARE_BYTES = 8 * 2**20
STEP_BYTES = 4 * 2**20


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
        self._pairs = PairSums(trace.images, self.blocks, trace.device)
        self._own = PairSums(trace.images, self.blocks, trace.device) if self.sampled else self._pairs
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
        by_image, offset = by_window(vectors.matrices, part.windows), part.heads.start
        step = max(1, STEP_BYTES // max(by_image[0, :, :1].numel() * total.element_size(), 1))
        for i in range(0, by_image.shape[2], step):  # a few heads at a time: their sum stays in the cache for the next image
            some = by_image[:, :, i : i + step]
            target, wide = total[:, offset + i : offset + i + some.shape[2]], self._wide(some[0])
            for one_image in some:
                target += wide.copy_(one_image)
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
                self._add_heads(tile.positions, vectors)

    def _add_heads(self, positions: list[int], vectors: UnitVectors) -> None:
        """Add, for each block and the one after it, the sums over same tokens and over any, and how many of both there are."""
        pairs = [i for i, (one, other) in enumerate(itertools.pairwise(positions)) if other == one + 1]
        if not pairs:
            return
        earlier, later, heads = as_span(pairs), as_span([i + 1 for i in pairs]), vectors.flat.shape[2]
        sums = self.state("between_heads")[:, [positions[i] for i in pairs], :heads, :heads]
        defined = vectors.valid.to(vectors.flat.dtype)
        small = (vectors.matrices.sum(self.token_dim), defined, defined.sum(-1, keepdim=True))
        for kind, x_LbhD in enumerate((vectors.flat, *(padded(x.permute(2, 0, 1, 3)) for x in small))):
            sums[kind] += (x_LbhD[earlier] @ x_LbhD[later].mT).to(sums).sum(1)
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


def without_largest(patches: Sequence[Tensor], channels: int) -> list[Tensor]:
    """Patches [b, P, D] at several depths with an image's largest channels at 0, at every depth the same ones.

    A channel is as large as its largest |x| over patches, over the median |x| of the image at that depth, at its largest depth.
    """
    if not channels:
        return [*patches]
    peaks = [
        x.abs().amax(1) / x.abs().flatten(1).median(1).values.clamp_min(torch.finfo(x.dtype).tiny)[:, None] for x in patches
    ]
    largest = torch.stack(peaks).amax(0).topk(min(channels, patches[0].shape[-1]), -1).indices
    kept = torch.ones_like(peaks[0]).scatter(-1, largest, 0.0)
    return [x * kept[:, None] for x in patches]


class TokenPairwiseCosine(PairwiseCosine):
    """Cosines between the embeddings of the same patch at two depths, `without` so many of an image's largest channels."""

    def __init__(self, plan: Plan, shapes: Sequence[tuple[int, int] | None], without: int = 0) -> None:
        self.without = without
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
                self.absorb(part, group.tokens, _units(without_largest([p[images] for p in patches], self.without)))
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
