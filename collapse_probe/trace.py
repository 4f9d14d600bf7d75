"""What one batch leaves behind: tokens and attention of every block, and the plan that says which is which.

The dimension key, used as suffixes throughout: B images, H heads, N tokens, P patches, D width, K head width,
L blocks (or attention layers), R and C the queries and keys inside a tile.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor

from collapse_probe.attention import Attention as Attention
from collapse_probe.attention import maps_of
from collapse_probe.geometry import centred_unit, unit

POINTS = ("probs", "weights")
AXES = ("column", "row")
Place = tuple[slice, slice, slice, slice]
"""Which images, heads, queries and keys a tile holds."""


@dataclass(frozen=True)
class SelfCheck:
    """How far the captured attention is from the model's own, on the probe's images.

    `row_sum` |sum of a row − 1|; `output` |A·V − the kernel's output| relative to the output's largest entry
    (nan where no kernel ran); `logsumexp` |ours − the kernel's|, relative where that is above 1 (nan where
    none gave it).
    """

    row_sum: float
    output: float
    logsumexp: float


@dataclass(frozen=True)
class Layer:
    """One attention call of the model, as the probe found it.

    `block` is the index of its block, None for attention outside the blocks (pooling heads). `reason` says
    why its maps cannot be compared token by token (a window, a pool, channels); empty for ordinary token
    attention. `mixed`: what multiplies V is another map than the softmax.
    """

    owner: str
    call: int
    block: int | None
    operation: str
    heads: int
    queries: int
    keys: int
    mixed: bool = False
    reason: str = ""

    @property
    def signature(self) -> tuple[int, int, int]:
        """Heads, queries, keys: only layers of one signature are compared with one another."""
        return self.heads, self.queries, self.keys


@dataclass(frozen=True)
class Tap:
    """Where the tokens at one depth are read: the `side` ("input", "output") of call `call` of module `path`.

    `layout` names the axes of the tensor there: "BND", "NBD", "BhwD", "BDhw", or "" where it is no token
    sequence.
    """

    path: str
    call: int
    side: str
    layout: str = "BND"


@dataclass(frozen=True)
class Plan:
    """What the probe learned of a model: blocks, attention layers, prefix tokens, where tokens are read.

    `prefix` are the positions of tokens that do not come from the image (class, distillation, register
    tokens); `patch_shapes` are (patches, width) at each depth, None where a depth has no token sequence;
    `grid` is (rows, columns) of the patches, None where they form no rectangle; `image_size` is (height, width) of the input
    in pixels, None where the input was no image.
    """

    blocks: tuple[str, ...]
    layers: tuple[Layer, ...]
    taps: tuple[Tap, ...]
    prefix: tuple[int, ...]
    tokens: int
    width: int
    patch_shapes: tuple[tuple[int, int] | None, ...]
    grid: tuple[int, int] | None
    bytes_per_image: int
    check: SelfCheck
    notes: tuple[str, ...] = field(default=())
    image_size: tuple[int, int] | None = None

    @property
    def token_layers(self) -> list[int]:
        """Indices of the layers inside blocks whose maps run over the image's tokens."""
        return [i for i, layer in enumerate(self.layers) if layer.block is not None and not layer.reason]

    @property
    def map_layers(self) -> list[int]:
        """Indices of the layers inside blocks, in call order: the `block` axis of the attention metrics."""
        return [i for i, layer in enumerate(self.layers) if layer.block is not None]

    def groups(self) -> dict[tuple[int, int, int], list[int]]:
        """Positions on the `block` axis of the layers that share a signature, token attention only."""
        found: dict[tuple[int, int, int], list[int]] = {}
        for position, index in enumerate(self.map_layers):
            if not self.layers[index].reason:
                found.setdefault(self.layers[index].signature, []).append(position)
        return found


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
        self._units: dict[tuple[str, str, bool, tuple[int, ...]], tuple[Tensor, Tensor]] = {}

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

    def unit_vectors(self, point: str, axis: str, centred: bool, without: tuple[int, ...] = ()) -> tuple[Tensor, Tensor]:
        """Rows or columns as unit vectors, [b, h, L, R, C], and which of them are defined, [b, h, L, tokens].

        Tokens in `without` are left out as queries and as keys. Computed once per tile, whoever asks.
        """
        if self.weights is self.probs:
            point = "probs"
        key = (point, axis, centred, without)
        if key not in self._units:
            maps = self.maps(point)
            if without:
                rows = [t - self.rows.start for t in self.tokens("row", without)]
                columns = [t - self.columns.start for t in self.tokens("column", without)]
                maps = maps[..., rows, :][..., columns]
            scaled = centred_unit if centred else unit
            self._units[key] = scaled(maps, dim=-1 if axis == "row" else -2)
        return self._units[key]


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
