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

TILE_BYTES = {"cpu": 4 * 2**20, "cuda": 512 * 2**20, "mps": 128 * 2**20}
TRACE_BYTES = {"cpu": 128 * 2**20, "cuda": 8 * 2**30, "mps": 1 * 2**30}
ALL = slice(None)


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


def micro_batch(plan: Plan, device: torch.device, images: int | None = None) -> int:
    """How many images go through the model at a time, so that what is held of them stays within the budget; `images` are
    split evenly, because a few left over cost nearly as much as many.
    """
    most = max(1, TRACE_BYTES[device.type] // max(plan.bytes_per_image, 1))
    return most if images is None else math.ceil(images / math.ceil(images / most)) if images else 1


@dataclass
class Attention:
    """The attention of one layer for one batch: q and k (a fused kernel) or the map itself (eager attention).

    q [B, H, N, K], k [B, H or fewer, N, K], `bias` broadcast to [B, H, N, N] or None (bool: True may be
    seen); `probs` [B, H, N, N] the softmax, `weights` what multiplies V where that is another map, else None.
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
        for name in ("q", "k", "bias", "logsumexp", "probs", "weights"):
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

    def maps(
        self, images: slice = ALL, heads: slice = ALL, rows: slice = ALL, columns: slice = ALL, sums: Tensor | None = None
    ) -> dict[str, Tensor]:
        """`probs` and `weights` [b, h, R, C] in float32.

        `sums` [b, H, N, 1] is filled with each query's logsumexp where all keys are asked for, and read where some are.
        """
        if self.q is None:
            assert self.probs is not None
            probs = self.probs[images, heads, rows, columns].float()
        else:
            logits, masked = self.logits(images, heads, rows, columns), self.bias is not None or self.causal
            if sums is None:
                probs = torch.softmax(logits, dim=-1)
                highest = logits.amax(-1, keepdim=True) if masked else None
            else:
                if columns == slice(0, self.shape[-1]):
                    sums[:, heads, rows] = torch.logsumexp(logits, dim=-1, keepdim=True)
                highest = sums[:, heads, rows]
                probs = logits.sub_(highest).exp_()
            if masked:
                assert highest is not None
                probs = probs.masked_fill(highest == -torch.inf, 0.0)  # a query that may see nothing attends to nothing
        return {
            "probs": probs,
            "weights": probs if self.weights is None else self.weights[images, heads, rows, columns].float(),
        }


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
Place = tuple[slice, slice, slice, slice]
"""Which images, heads, queries and keys a tile holds."""


class MapTile:
    """The maps of all layers of one group, for some images and heads and some of their queries or keys.

    `positions` are the layers' places on the `block` axis. `probs` and `weights` are [b, h, L, R, C] in float32, the same
    object where the model multiplies V by its softmax; b are the `images`, or for maps inside windows all `windows` of the
    first image, then those of the next (see `over_windows`). A tile with `whole_rows` holds every key of its queries, one with
    `whole_columns` every query of its keys; small maps come as tiles that hold both. Heads come one tile after the other before
    the next queries or keys: `last_heads` marks the end of the heads, `last_tokens` that no further queries (or keys) follow.
    """

    def __init__(
        self, group: MapGroup, place: Place, maps: dict[str, Tensor], whole: Sequence[str], last: tuple[bool, bool]
    ) -> None:
        self.group, self.positions, self.windows = group, group.positions, group.windows
        self.images, self.heads, self.rows, self.columns = place
        self.probs, self.weights = maps["probs"], maps["weights"]
        self.whole_rows, self.whole_columns = "row" in whole, "column" in whole
        self.last_heads, self.last_tokens = last
        self.derived: dict[tuple[object, ...], tuple[Tensor, Tensor]] = {}  # what metrics share of this tile's maps

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


@dataclass(frozen=True)
class Trace:
    """What was captured of one batch: `tokens[d]` [B, N, D] at each depth, `attention` by layer.

    Depth 0 is the sequence that enters the first block; None stands where a depth has no token sequence.
    `output` is what the model returned.
    """

    plan: Plan
    images: int
    tokens: tuple[Tensor | None, ...]
    attention: tuple[Attention, ...]
    output: object

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
        )

    def patches(self, depth: int) -> Tensor | None:
        """The patch tokens at `depth` in float32, [B, P, D]; prefix tokens are left out."""
        tokens_BND, shape = self.tokens[depth], self.plan.patch_shapes[depth]
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

        Maps that are too large come twice: by queries, which also gives the logsumexp of each, then by keys.
        """
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
                sums: list[Tensor | None] = [None] * len(layers)
                if not small:
                    count = (images.stop - images.start) * windows
                    sums = [None if a.q is None else torch.empty(count, *a.q.shape[1:3], 1, device=a.q.device) for a in layers]
                for parts, whole in passes:
                    for (queries_of, keys_of), some in itertools.product(parts, heads):
                        place = (images, some, queries_of, keys_of)
                        inside = slice(images.start * windows, images.stop * windows)
                        maps = [a.maps(inside, *place[1:], of_queries) for a, of_queries in zip(layers, sums, strict=True)]
                        stacked = dict.fromkeys(POINTS, torch.stack([m["probs"] for m in maps], dim=2))
                        if any(a.mixed for a in layers):
                            stacked["weights"] = torch.stack([m["weights"] for m in maps], dim=2)
                        del maps  # the stacked ones alone stay in memory while the tile is in use
                        last = (some is heads[-1], (queries_of, keys_of) == parts[-1])
                        yield MapTile(group, place, stacked, whole, last)


def tile_shape(group: MapGroup, budget: int) -> tuple[int, int, int, int]:
    """Images, heads, queries and keys of a tile within `budget` bytes: whole maps while one head's fit, else parts of them."""
    heads, queries, keys, layers = group.heads, group.queries, group.keys, len(group.positions) * group.windows
    one_head = layers * queries * keys * 4
    if heads * one_head <= budget:
        return budget // (heads * one_head), heads, queries, keys
    if one_head <= budget:
        return 1, budget // one_head, queries, keys
    rows, columns = (max(1, budget // (layers * length * 4)) for length in (keys, queries))
    return 1, 1, min(rows, queries), min(columns, keys)


def _spans(size: int, step: int) -> list[slice]:
    return [slice(start, min(start + step, size)) for start in range(0, size, step)]
