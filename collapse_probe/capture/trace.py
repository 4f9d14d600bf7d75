"""What is kept of one batch: tokens and attention of every block, and the plan that says which is which.

The dimension key, used as suffixes throughout: B images, H heads, N tokens, P patches, D width, K head width,
L blocks (or attention layers), R and C the queries and keys inside a tile.
"""

from __future__ import annotations

import copy
import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields, is_dataclass, replace
from typing import Any

import torch
from torch import Tensor

from collapse_probe.capture.plan import MapGroup, Plan

TILE_BYTES = {"cpu": 8 * 2**20, "cuda": 512 * 2**20, "mps": 128 * 2**20}
TRACE_BYTES = {"cpu": 128 * 2**20, "cuda": 8 * 2**30, "mps": 1 * 2**30}
ALL = slice(None)
Place = tuple[slice, slice, slice, slice]
"""Which images, heads, queries and keys."""


def budget_line(plan: Plan, device: torch.device) -> str:
    """One line on the memory that a capture takes."""
    per_image = plan.bytes_per_image / 2**20
    tile = tile_bytes(plan, device) / 2**20
    step = micro_batch(plan, device)
    return f"maps are recomputed in tiles of {tile:.1f} MiB; {per_image:.1f} MiB are held per image, {step} images at a time"


def tile_bytes(plan: Plan, device: torch.device) -> int:
    """Bytes of the largest tile of maps."""
    largest = 0
    for group in plan.map_groups():
        images, heads, rows, columns = tile_shape(group, TILE_BYTES[device.type])
        maps = images * group.windows * heads * len(group.positions)
        largest = max(largest, maps * max(rows * group.keys, columns * group.queries) * 4)
    return largest


def micro_batch(plan: Plan, device: torch.device, images: int | None = None, more: int = 0) -> int:
    """How many images go through the model at a time, so that what is held of them stays within the budget; `images` are
    split evenly, because a few left over cost nearly as much as many. `more` bytes are held of each beside the plan's.
    """
    most = max(1, TRACE_BYTES[device.type] // max(plan.bytes_per_image + more, 1))
    return most if images is None else math.ceil(images / math.ceil(images / most)) if images else 1


def extra_bytes(plan: Plan, values: bool, middles: bool) -> int:
    """Bytes of an image that a request for values, and one for the stream between attention and MLP, holds; of the latter with
    what the module that reads it gives.
    """
    return plan.tokens * plan.width * 4 * len(plan.blocks) * (values + 2 * middles)


def shaped(shape: Sequence[int]) -> str:
    """A shape in words.

    >>> shaped((2, 17, 64))
    '2 × 17 × 64'
    """
    return " × ".join(map(str, shape))


@dataclass(repr=False)
class Attention:
    """The attention of one layer for one batch: q and k (a fused kernel) or the map itself (eager attention).

    q [B, H, N, K], k [B, H or fewer, N, K], `bias` broadcast to [B, H, N, N] or None (bool: True may be
    seen); `probs` [B, H, N, N] the softmax, `weights` what multiplies V where that is another map, else None. The values
    v [B, H or fewer, N, K] are kept on request, and None where it cannot be told which they are.
    """

    owner: str
    operation: str
    q: Tensor | None = None
    k: Tensor | None = None
    bias: Tensor | None = None
    causal: bool = False
    scale: float = 1.0
    logsumexp: Tensor | None = None
    probs: Tensor | None = None
    weights: Tensor | None = None
    v: Tensor | None = None

    def __repr__(self) -> str:
        mixed = ", mixed after the softmax" if self.mixed else ""
        return f"<Attention of {self.owner or 'the model'}: {self.operation}, maps {shaped(self.shape)}{mixed}>"

    @property
    def mixed(self) -> bool:
        """Whether the model changes the map between the softmax and V."""
        return self.weights is not None

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the map, [B, H, N, N] for token attention."""
        if self.q is None or self.k is None:
            assert self.probs is not None
            return tuple(self.probs.shape)
        return (*self.q.shape[:-1], self.k.shape[-2])

    @property
    def signature(self) -> tuple[int, int, int]:
        """Heads, queries, keys."""
        *leading, queries, keys = self.shape
        return leading[-1] if leading else 1, queries, keys

    def first(self, images: int, of: int) -> Attention:
        """The attention of the first of `of` images; what has no axis of images (and windows) stays as it is."""
        whole = self.probs if self.q is None else self.q
        if whole is None or len(whole) % of:
            return self
        size = len(whole)
        kept = {}
        for name in ("q", "k", "v", "bias", "logsumexp", "probs", "weights"):
            tensor = getattr(self, name)
            if tensor is not None and tensor.ndim > (3 if name == "bias" else 0) and len(tensor) == size:
                kept[name] = tensor[: images * (size // of)]
        return replace(self, **kept)

    def logits(self, images: slice = ALL, heads: slice = ALL, rows: slice = ALL, columns: slice = ALL) -> Tensor:
        """The scaled, masked logits in float32 [b, h, R, C]; only where q and k were captured."""
        assert self.q is not None
        assert self.k is not None
        q = (self.q[images, heads, rows].float() * self.scale).contiguous()
        k = expand_heads(self.k[images], self.q.shape[1])[:, heads, columns].float().contiguous()
        logits = q @ k.transpose(-1, -2)  # of contiguous tensors: the kernel is the same for one image and for many
        if self.bias is not None:
            part = self.bias.reshape((1,) * (4 - self.bias.ndim) + self.bias.shape)
            place = (images, heads, rows, columns)
            part = part[tuple(span if size > 1 else ALL for span, size in zip(place, part.shape, strict=True))]
            if part.dtype == torch.bool:
                part = torch.zeros(part.shape, device=part.device).masked_fill(~part, -torch.inf)
            logits = logits + part.float()
        if self.causal:
            r, c = (torch.arange(size, device=logits.device) for size in self.shape[-2:])
            logits = logits.masked_fill(c[None, columns] > r[rows, None], -torch.inf)
        return logits

    def maps(self, images: slice = ALL, heads: slice = ALL, rows: slice = ALL, columns: slice = ALL) -> dict[str, Tensor]:
        """`probs` and `weights` [b, h, R, C] in float32, of all keys or, where the map itself was captured, of some."""
        if self.q is None:
            assert self.probs is not None
            probs = self.probs[images, heads, rows, columns].float()
        else:
            logits = self.logits(images, heads, rows)
            probs = torch.softmax(logits, dim=-1)
            if self.bias is not None or self.causal:  # a query that may see nothing attends to nothing
                probs = probs.masked_fill(logits.amax(-1, keepdim=True) == -torch.inf, 0.0)
            probs = probs[..., columns]
        return {"probs": probs, "weights": probs if self.weights is None else self._weights(images, heads, rows, columns)}

    def write_maps(
        self, place: Place, probs_bhRC: Tensor, weights_bhRC: Tensor | None, entropy_bhR: Tensor | None, peaks: Tensor | None
    ) -> None:
        """Write the maps at a place where they are wanted, and each query's entropy in nats where it follows from q and k.

        `peaks` [2, b, H, N, 1] hold each query's largest logit and its largest probability: filled where all keys are asked
        for, and read where some are, so that no probability is the difference of two large numbers.
        """
        images, heads, rows, columns = place
        if self.q is None:
            assert self.probs is not None
            probs_bhRC.copy_(self.probs[place])
        else:
            logits = self.logits(images, heads, rows, columns)
            if columns == slice(0, self.shape[-1]):
                torch.softmax(logits, -1, out=probs_bhRC)
                if entropy_bhR is not None or peaks is not None:
                    highest, share = logits.amax(-1, keepdim=True), probs_bhRC.amax(-1, keepdim=True)
                    if self.bias is not None or self.causal:  # a query that may see nothing attends to nothing
                        blind = highest == -torch.inf
                        highest, share = highest.masked_fill_(blind, 0.0), share.masked_fill_(blind, 1.0)
                        probs_bhRC.masked_fill_(blind, 0.0)
                    if peaks is not None:
                        peaks[0][:, heads, rows], peaks[1][:, heads, rows] = highest, share
                    if entropy_bhR is not None:  # log Σ e^(s − s_max) + Σ p (s_max − s): two sums of what is not negative
                        below = logits.sub_(highest).clamp_min_(torch.finfo(logits.dtype).min)  # 0 · log 0 is 0
                        torch.sum(below.mul_(probs_bhRC), -1, out=entropy_bhR).add_(share.squeeze(-1).log()).neg_()
            else:
                assert peaks is not None
                highest, share = peaks[:, :, heads, rows]
                torch.exp(logits.sub_(highest), out=probs_bhRC).mul_(share)
        if weights_bhRC is not None:
            weights_bhRC.copy_(probs_bhRC if self.weights is None else self._weights(*place))

    def _weights(self, images: slice, heads: slice, rows: slice, columns: slice) -> Tensor:
        assert self.weights is not None
        return self.weights[images, heads, rows, columns].float()


def expand_heads(x_BHNK: Tensor, heads: int) -> Tensor:
    """Keys or values for `heads` heads, where several queries' heads share one (grouped queries)."""
    return x_BHNK if x_BHNK.shape[1] == heads else x_BHNK.repeat_interleave(heads // x_BHNK.shape[1], dim=1)


def by_window(values: Tensor, windows: int) -> Tensor:
    """What there is of all windows of the first image, then of the next, [B·windows, ...] -> [B, windows, ...]."""
    return values.reshape(-1, windows, *values.shape[1:])


def first_of(output: Any, images: int, of: int) -> Any:
    """What a model returned for the first of `of` images: tensors whose first axis is the images, also in lists, tuples, dicts
    and dataclasses; all else stays as it is.
    """
    if isinstance(output, Tensor):
        return output[:images] if not output.is_nested and output.ndim and len(output) == of else output
    if isinstance(output, dict):
        kept = copy.copy(output)
        for name, value in output.items():
            kept[name] = first_of(value, images, of)
        return kept
    if isinstance(output, (list, tuple)):
        parts = [first_of(value, images, of) for value in output]
        return type(output)(*parts) if hasattr(output, "_fields") else type(output)(parts)
    if is_dataclass(output) and not isinstance(output, type):
        held = ((field.name, field.init, getattr(output, field.name)) for field in fields(output))
        return replace(output, **{name: first_of(value, images, of) for name, init, value in held if init})
    return output


POINTS = ("probs", "weights")
AXES = ("column", "row")


class MapTile:
    """The maps of all layers of one group, for some images and heads and some of their queries or keys.

    `positions` are the layers' places on the `block` axis. `probs` and `weights` are [b, h, L, R, C] in float32, the same
    object where the model multiplies V by its softmax; b are the `images`, or for maps inside windows all `windows` of the
    first image, then those of the next (see `over_windows`). A tile with `whole_rows` holds every key of its queries, one with
    `whole_columns` every query of its keys; small maps come as tiles that hold both. Heads come one tile after the other before
    the next queries or keys: `last_heads` marks the end of the heads, `last_tokens` that no further queries (or keys) follow.
    `entropy` [b, h, L, R] is that of the queries in nats, where the tile has whole rows and their logarithms were at hand.
    """

    def __init__(
        self,
        group: MapGroup,
        place: Place,
        maps: dict[str, Tensor],
        whole: Sequence[str],
        last: tuple[bool, bool],
        entropy: Tensor | None = None,
        memory: dict[object, Any] | None = None,
    ) -> None:
        self.group, self.positions, self.windows = group, group.positions, group.windows
        self.images, self.heads, self.rows, self.columns = place
        self.probs, self.weights = maps["probs"], maps["weights"]
        self.whole_rows, self.whole_columns = "row" in whole, "column" in whole
        self.last_heads, self.last_tokens = last
        self.entropy = entropy
        self.derived: dict[object, Any] = {}  # what metrics share of this tile's maps
        self.memory = {} if memory is None else memory  # what they write to again for every tile of a batch

    def whole(self, axis: str) -> bool:
        """Whether the vectors along `axis` are complete here."""
        return self.whole_rows if axis == "row" else self.whole_columns

    def over_windows(self, values: Tensor) -> Tensor:
        """The sum over the windows of each image, [b, ...] -> [images, ...]."""
        return values if self.windows == 1 else by_window(values, self.windows).sum(1)

    def maps(self, point: str) -> Tensor:
        """The maps at `point`, [b, h, L, R, C]."""
        return self.probs if point == "probs" else self.weights

    def tokens(self, axis: str, without: tuple[int, ...] = ()) -> list[int]:
        """Which tokens this tile holds vectors of: keys for columns, queries for rows."""
        span = self.rows if axis == "row" else self.columns
        return [t for t in range(span.start, span.stop) if t not in without]


@dataclass(frozen=True, repr=False)
class Trace:
    """What was captured of one batch: `tokens[d]` [B, N, D] at each depth, `attention` by layer.

    Depth 0 is the sequence that enters the first block; None stands where a depth has no token sequence.
    `output` is what the model returned. `middles[l]` [B, N, D], kept on request, is the stream in block l between its attention
    and its MLP; None where it is read by no module.
    """

    plan: Plan
    images: int
    tokens: tuple[Tensor | None, ...]
    attention: tuple[Attention, ...]
    output: object
    middles: tuple[Tensor | None, ...] = ()

    def __repr__(self) -> str:
        tokens = [tuple(each.shape) for each in self.tokens if each is not None]
        shape = f", tokens {shaped(tokens[0])} at {len(tokens)} depths" if tokens else ", no tokens"
        return (
            f"<Trace of {self.images} images: {len(self.attention)} attention layers{shape}; .attention[b], .tokens[d], .plan>"
        )

    @property
    def device(self) -> torch.device:
        """Where the model ran."""
        tensors = (t for a in self.attention for t in (a.q, a.probs))
        return next(t.device for t in (*tensors, *self.tokens) if t is not None)

    @property
    def wide_device(self) -> torch.device:
        """Where float64 sums of a batch are kept: where the model ran, but for MPS, which has no float64."""
        return self.device if self.device.type != "mps" else torch.device("cpu")

    def first(self, images: int) -> Trace:
        """The trace of the first images alone (views): what others in the batch were leaves no mark on it."""
        if images == self.images:
            return self
        return Trace(
            plan=self.plan,
            images=images,
            tokens=tuple(None if x is None else x[:images] for x in self.tokens),
            attention=tuple(attention.first(images, self.images) for attention in self.attention),
            output=first_of(self.output, images, self.images),
            middles=tuple(None if x is None else x[:images] for x in self.middles),
        )

    def patches(self, depth: int) -> Tensor | None:
        """The patch tokens at `depth` in float32, [B, P, D]; prefix tokens are left out."""
        return self.patches_of(self.tokens[depth], depth)

    def patches_of(self, tokens_BND: Tensor | None, depth: int) -> Tensor | None:
        """The patches among tokens laid out as those at a depth, as `patches` gives them."""
        shape = self.plan.patch_shapes[depth]
        if tokens_BND is None or shape is None:
            return None
        extra = tokens_BND.shape[1] - shape[0]
        if extra != len(self.plan.prefix):  # tokens that were added on the way come first
            tokens_BND = tokens_BND[:, extra:]
        elif extra:
            patches = [i for i in range(tokens_BND.shape[1]) if i not in self.plan.prefix]
            first, last = patches[0], patches[-1] + 1
            contiguous = last - first == len(patches)
            tokens_BND = tokens_BND[:, first:last] if contiguous else tokens_BND[:, patches]
        return tokens_BND.float()

    def maps(self, layer: int, point: str = "probs") -> Tensor:
        """The whole map of one layer, [B, H, N, N] in float32: for looking at; the metrics use `tiles`."""
        return self.attention[layer].maps()[point]

    def map_of(self, layer: int, image: int, point: str = "probs") -> Tensor:
        """The whole map of one layer for one image, [H, N, N] in float32."""
        return self.attention[layer].maps(slice(image, image + 1))[point][0]

    def tiles(self, budget: int) -> Iterator[MapTile]:
        """All token maps of the batch in tiles of about `budget` bytes, one group of layers after the other.

        Maps that are too large come twice: by queries, which also gives the scale of each, then by keys.
        """
        memory: dict[object, Any] = {}
        for group in self.plan.map_groups():
            layers = [self.attention[self.plan.map_layers[p]] for p in group.positions]
            queries, keys, windows = group.queries, group.keys, group.windows
            b, h, rows, columns = tile_shape(group, budget)
            heads = _spans(group.heads, h)
            by_query = [(span, slice(0, keys)) for span in _spans(queries, rows)]
            by_key = [(slice(0, queries), span) for span in _spans(keys, columns)]
            small = rows == queries and columns == keys
            passes = [(by_query, AXES)] if small else [(by_query, ("row",)), (by_key, ("column",))]
            for images in _spans(self.images, b):
                peaks: list[Tensor | None] = [None] * len(layers)
                if not small:
                    count = (images.stop - images.start) * windows
                    peaks = [
                        None if a.q is None else a.q.new_empty(2, count, *a.q.shape[1:3], 1, dtype=torch.float32)
                        for a in layers
                    ]
                for parts, whole in passes:
                    for (queries_of, keys_of), some in itertools.product(parts, heads):
                        last = (some is heads[-1], (queries_of, keys_of) == parts[-1])
                        yield _tile(group, layers, (images, some, queries_of, keys_of), peaks, whole, last, memory)


def _tile(
    group: MapGroup,
    layers: Sequence[Attention],
    place: Place,
    peaks: Sequence[Tensor | None],
    whole: Sequence[str],
    last: tuple[bool, bool],
    memory: dict[object, Any],
) -> MapTile:
    """The maps of some layers at a place, written block by block into one tensor: [L, b, h, R, C] in memory."""
    images, heads, rows, columns = place
    inside = slice(images.start * group.windows, images.stop * group.windows)
    b, h, r, c = (span.stop - span.start for span in (inside, heads, rows, columns))
    held = next(t for t in (layers[0].q, layers[0].probs) if t is not None)
    probs_LbhRC = torch.empty(len(layers), b, h, r, c, device=held.device)
    weights_LbhRC = torch.empty_like(probs_LbhRC) if any(a.mixed for a in layers) else None
    known = "row" in whole and all(a.q is not None for a in layers)
    entropy_LbhR = torch.empty(probs_LbhRC.shape[:-1], device=held.device) if known else None
    for i, (attention, of_queries) in enumerate(zip(layers, peaks, strict=True)):
        weights, entropy = (None if x is None else x[i] for x in (weights_LbhRC, entropy_LbhR))
        attention.write_maps((inside, heads, rows, columns), probs_LbhRC[i], weights, entropy, of_queries)
    probs = probs_LbhRC.permute(1, 2, 0, 3, 4)
    maps = {"probs": probs, "weights": probs if weights_LbhRC is None else weights_LbhRC.permute(1, 2, 0, 3, 4)}
    entropy = None if entropy_LbhR is None else entropy_LbhR.permute(1, 2, 0, 3)
    return MapTile(group, place, maps, whole, last, entropy, memory)


def tile_shape(group: MapGroup, budget: int) -> tuple[int, int, int, int]:
    """Images, heads, queries and keys of a tile within `budget` bytes: whole maps while one head's fit, else parts of them.

    Where not all heads fit, one head of several images: what is summed over images then stays in the cache.
    """
    heads, queries, keys, layers = group.heads, group.queries, group.keys, len(group.positions) * group.windows
    one_head = layers * queries * keys * 4
    if heads * one_head <= budget:
        return budget // (heads * one_head), heads, queries, keys
    if one_head <= budget:
        return budget // one_head, 1, queries, keys
    rows, columns = (max(1, budget // (layers * length * 4)) for length in (keys, queries))
    return 1, 1, min(rows, queries), min(columns, keys)


def _spans(size: int, step: int) -> list[slice]:
    return [slice(start, min(start + step, size)) for start in range(0, size, step)]
