"""What one batch leaves behind: tokens and attention of every block, and the plan that says which is which.

The dimension key, used as suffixes throughout: B images, H heads, N tokens, P patches, D width, K head width,
L blocks (or attention layers), R and C the queries and keys inside a tile.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from collapse_probe.capture.plan import Plan

TILE_BYTES = {"cpu": 4 * 2**20, "cuda": 512 * 2**20, "mps": 128 * 2**20}
TRACE_BYTES = {"cpu": 128 * 2**20, "cuda": 8 * 2**30, "mps": 1 * 2**30}


def budget_line(plan: Plan, device: torch.device) -> str:
    """One line on what listening costs in memory."""
    held = plan.bytes_per_image / 2**20
    tile = tile_bytes(plan, device) / 2**20
    step = micro_batch(plan, device)
    return f"maps are recomputed in tiles of {tile:.1f} MiB; {held:.1f} MiB are held per image, {step} images at a time"


def tile_bytes(plan: Plan, device: torch.device) -> int:
    """Bytes of the largest tile of maps."""
    largest = 0
    for signature, positions in plan.groups().items():
        images, heads, rows, columns = tile_shape(signature, len(positions), TILE_BYTES[device.type])
        largest = max(largest, images * heads * len(positions) * max(rows * signature[2], columns * signature[1]) * 4)
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

    def logits(self, images: slice, heads: slice, rows: slice, columns: slice) -> Tensor:
        """The scaled, masked logits in float32 [b, h, R, C]; only where q and k were heard."""
        assert self.q is not None
        assert self.k is not None
        k_BHNK = self.k[images]
        if k_BHNK.shape[1] != self.q.shape[1]:
            k_BHNK = k_BHNK.repeat_interleave(self.q.shape[1] // k_BHNK.shape[1], dim=1)
        q_bhRK = self.q[images, heads, rows].float() * self.scale
        logits = q_bhRK @ k_BHNK[:, heads, columns].float().transpose(-1, -2)
        if self.bias is not None:
            logits = logits + additive(self.bias, images, heads, rows, columns)
        if self.causal:
            logits = logits.masked_fill(_future(self.q.shape[2], self.k.shape[2], rows, columns, logits), -torch.inf)
        return logits


def additive(bias: Tensor, images: slice, heads: slice, rows: slice, columns: slice) -> Tensor:
    """The part of a mask or bias for some images, heads, queries and keys, as a float32 term of the logits."""
    part = bias.reshape((1,) * (4 - bias.ndim) + bias.shape)
    wanted = (images, heads, rows, columns)
    part = part[tuple(w if size > 1 else slice(None) for w, size in zip(wanted, part.shape, strict=True))]
    if part.dtype == torch.bool:
        return torch.zeros(part.shape, device=part.device).masked_fill(~part, -torch.inf)
    return part.float()


def _future(queries: int, keys: int, rows: slice, columns: slice, like: Tensor) -> Tensor:
    r = torch.arange(queries, device=like.device)[rows]
    c = torch.arange(keys, device=like.device)[columns]
    return c[None, :] > r[:, None]


def maps_of(
    heard: Attention, images: slice, heads: slice, rows: slice, columns: slice, sums: Tensor | None = None
) -> dict[str, Tensor]:
    """probs and weights [b, h, R, C]. `sums` [b, H, N, 1] takes each query's logsumexp where all keys are here, or gives it."""
    if heard.q is None:
        assert heard.probs is not None
        probs = heard.probs[images, heads, rows, columns].float()
    else:
        assert heard.k is not None
        logits = heard.logits(images, heads, rows, columns)
        if sums is None:
            probs = torch.softmax(logits, dim=-1)
        else:
            if columns == slice(0, heard.k.shape[2]):
                sums[:, heads, rows] = torch.logsumexp(logits, dim=-1, keepdim=True)
            probs = logits.sub_(sums[:, heads, rows]).exp_()
        if heard.bias is not None or heard.causal:
            probs = probs.nan_to_num(0.0)  # a query that may see nothing attends to nothing
    weights = probs if heard.weights is None else heard.weights[images, heads, rows, columns].float()
    return {"probs": probs, "weights": weights}


POINTS = ("probs", "weights")
AXES = ("column", "row")
Place = tuple[slice, slice, slice, slice]
"""Which images, heads, queries and keys a tile holds."""


class MapTile:
    """The maps of all layers of one signature, for some images and heads and some of their queries or keys.

    `positions` are the layers' places on the `block` axis. `probs` and `weights` are [b, h, L, R, C] in float32, the same
    object where the model multiplies V by its softmax. A tile with `whole_rows` holds every key of its queries, one with
    `whole_columns` every query of its keys; small maps come as tiles that hold both. Heads come one tile after the other before
    the next queries or keys: `last_heads` marks the end of the heads, `last_tokens` that no further queries (or keys) follow.
    """

    def __init__(
        self, positions: list[int], place: Place, maps: dict[str, Tensor], whole: frozenset[str], last: tuple[bool, bool]
    ) -> None:
        self.positions = positions
        self.images, self.heads, self.rows, self.columns = place
        self.probs, self.weights = maps["probs"], maps["weights"]
        self.whole_rows, self.whole_columns = "row" in whole, "column" in whole
        self.last_heads, self.last_tokens = last
        self.derived: dict[tuple[object, ...], tuple[Tensor, Tensor]] = {}  # what metrics share of this tile's maps

    def whole(self, axis: str) -> bool:
        """Whether the vectors along `axis` are complete here."""
        return self.whole_rows if axis == "row" else self.whole_columns

    def maps(self, point: str) -> Tensor:
        """The maps at `point`, [b, h, L, R, C]."""
        return self.probs if point == "probs" else self.weights

    def tokens(self, axis: str, without: tuple[int, ...] = ()) -> list[int]:
        """Which tokens this tile holds vectors of: keys for columns, queries for rows."""
        span = self.rows if axis == "row" else self.columns
        return [t for t in range(span.start, span.stop) if t not in without]


@dataclass(frozen=True)
class Trace:
    """One batch heard: `tokens[d]` [B, N, D] at each depth, `attention` by layer.

    Depth 0 is the sequence that enters the first block; None stands where a depth has no token sequence.
    `output` is what the model returned.
    """

    plan: Plan
    images: int
    tokens: tuple[Tensor | None, ...]
    attention: tuple[Attention, ...]
    output: object

    def patches(self, depth: int) -> Tensor | None:
        """The patch tokens at `depth` in float32, [B, P, D]; prefix tokens are left out."""
        tokens_BND, shape = self.tokens[depth], self.plan.patch_shapes[depth]
        if tokens_BND is None:
            return None
        extra = 0 if shape is None else tokens_BND.shape[1] - shape[0]
        if extra != len(self.plan.prefix):  # tokens that were added on the way come first
            tokens_BND = tokens_BND[:, extra:]
        elif extra:
            keep = [i for i in range(tokens_BND.shape[1]) if i not in self.plan.prefix]
            first, last = keep[0], keep[-1] + 1
            contiguous = last - first == len(keep)
            tokens_BND = tokens_BND[:, first:last] if contiguous else tokens_BND[:, keep]
        return tokens_BND.float()

    def maps(self, layer: int, point: str = "probs") -> Tensor:
        """The whole map of one layer, [B, H, N, N] in float32: for looking at; the metrics use `tiles`."""
        everything = (slice(None),) * 4
        return maps_of(self.attention[layer], *everything)[point]

    def map_of(self, layer: int, image: int, point: str = "probs") -> Tensor:
        """The whole map of one layer for one image, [H, N, N] in float32."""
        everything = (slice(None),) * 3
        return maps_of(self.attention[layer], slice(image, image + 1), *everything)[point][0]

    def tiles(self, budget: int) -> Iterator[MapTile]:
        """All token maps of the batch in tiles of about `budget` bytes, one signature after the other."""
        for signature, positions in self.plan.groups().items():
            layers = [self.attention[self.plan.map_layers[p]] for p in positions]
            yield from _tiles(layers, positions, signature, self.images, budget)


def tile_shape(signature: tuple[int, int, int], layers: int, budget: int) -> tuple[int, int, int, int]:
    """Images, heads, queries and keys of a tile within `budget` bytes: whole maps while one head's fit, else parts of them."""
    heads, queries, keys = signature
    one_head = layers * queries * keys * 4
    if heads * one_head <= budget:
        return budget // (heads * one_head), heads, queries, keys
    if one_head <= budget:
        return 1, budget // one_head, queries, keys
    rows, columns = (max(1, budget // (layers * length * 4)) for length in (keys, queries))
    return 1, 1, min(rows, queries), min(columns, keys)


def _spans(size: int, step: int) -> list[slice]:
    return [slice(start, min(start + step, size)) for start in range(0, size, step)]


def _tiles(
    layers: list[Attention], positions: list[int], signature: tuple[int, int, int], images: int, budget: int
) -> Iterator[MapTile]:
    """Tiles of whole maps, or one sweep over queries, which also gives the logsumexp, and one over keys."""
    all_heads, queries, keys = signature
    b, h, rows, columns = tile_shape(signature, len(layers), budget)
    everything = (slice(0, queries), slice(0, keys))
    for chosen in _spans(images, b):
        if rows == queries and columns == keys:
            yield from _sweep(layers, positions, chosen, _spans(all_heads, h), [everything], frozenset(AXES), None)
            continue
        sums = [_no_sums(a, chosen) for a in layers]
        by_rows = [(span, everything[1]) for span in _spans(queries, rows)]
        by_columns = [(everything[0], span) for span in _spans(keys, columns)]
        yield from _sweep(layers, positions, chosen, _spans(all_heads, h), by_rows, frozenset({"row"}), sums)
        yield from _sweep(layers, positions, chosen, _spans(all_heads, h), by_columns, frozenset({"column"}), sums)


def _no_sums(heard: Attention, images: slice) -> Tensor | None:
    """Room for the logsumexp of each query [b, H, N, 1], where the map is made from q and k."""
    if heard.q is None:
        return None
    return torch.empty(images.stop - images.start, *heard.q.shape[1:3], 1, device=heard.q.device)


def _sweep(
    layers: list[Attention],
    positions: list[int],
    images: slice,
    heads: list[slice],
    parts: list[tuple[slice, slice]],
    whole: frozenset[str],
    sums: list[Tensor | None] | None,
) -> Iterator[MapTile]:
    for rows, columns in parts:
        for some in heads:
            place = (images, some, rows, columns)
            last = (some is heads[-1], (rows, columns) == parts[-1])
            yield MapTile(positions, place, _stack(layers, place, sums), whole, last)


def _stack(layers: list[Attention], place: Place, sums: list[Tensor | None] | None) -> dict[str, Tensor]:
    found = [maps_of(a, *place, None if sums is None else sums[i]) for i, a in enumerate(layers)]
    probs = torch.stack([maps["probs"] for maps in found], dim=2)
    if not any(a.mixed for a in layers):
        return {"probs": probs, "weights": probs}
    return {"probs": probs, "weights": torch.stack([maps["weights"] for maps in found], dim=2)}
