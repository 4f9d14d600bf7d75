"""What the probe of a model finds out: its blocks, attention layers, prefix tokens, and where tokens are read."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, is_dataclass
from types import UnionType
from typing import Any, Union, get_args, get_origin, get_type_hints

Frame = tuple[str, int]
"""One call of a module: its dotted path, and how often it was called before in this forward pass."""


IMAGE, HEAD, WINDOW = "image", "head", "window"
Axis = tuple[tuple[str, int], ...]
"""The factors of an axis, outermost first: what each runs over, and its size (0 for the images of a batch)."""


@dataclass(frozen=True)
class Part:
    """The attention calls that one module call makes for one layer, and how their tensors are laid out.

    Of the module's calls these are the ones with `keys` keys and one of `queries` as their number of queries: several where
    each call is for some of the queries. `axes` are those of their tensors before the queries; the first one runs over the
    calls themselves, where there are several.
    """

    frame: Frame
    queries: tuple[int, ...]
    keys: int
    axes: tuple[Axis, ...]

    def of(self, role: str) -> int:
        """How many heads, or windows, an image has here."""
        return math.prod(size for axis in self.axes for kind, size in axis if kind == role)

    @property
    def calls(self) -> int:
        """How many calls there are, 0 where there are as many as images (times the other factors)."""
        return math.prod(size for _, size in self.axes[0]) if len(self.queries) == 1 else len(self.queries)


@dataclass(frozen=True)
class SelfCheck:
    """How far the captured attention is from the model's own, on the probe's images.

    `row_sum` |sum of a row − 1|; `output` |A·V − the kernel's output| relative to the output's largest entry (nan where no
    kernel ran); `logsumexp` |ours − the kernel's|, relative where that is above 1 (nan where none gave it).
    """

    row_sum: float
    output: float
    logsumexp: float


@dataclass(frozen=True)
class Layer:
    """One attention of the model, made by the calls in `parts`: one, or several that are the heads of one block.

    `block` is the index of its block, None for attention outside the blocks (pooling heads). `reason` says why its maps cannot
    be compared token by token (a window, a pool, channels); empty for ordinary token attention. `mixed`: what multiplies V is
    another map than the softmax. `windows` is the number of maps that each head of an image has: above 1 its captured tensors
    are [B·windows, H, N, …], the windows of an image one after the other; only layers with the same `partition` put the same
    tokens at the same places of a window ("" where that is not known). Only layers `on_axis` have a place of their own on the
    `block` axis: of a block with token attention, that alone.
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
    windows: int = 1
    partition: str = ""
    parts: tuple[Part, ...] = ()
    on_axis: bool = True

    @property
    def signature(self) -> tuple[int, int, int]:
        """Heads, queries, keys: only layers of one signature are compared with one another."""
        return self.heads, self.queries, self.keys


@dataclass(frozen=True)
class Tap:
    """Where the tokens at one depth are read: the `side` ("input", "output") of call `call` of module `path`.

    `layout` names the axes of the tensor there: "BND", "NBD", "BhwD", "BDhw", or "" where it is no token sequence.
    """

    path: str
    call: int
    side: str
    layout: str = "BND"


@dataclass(frozen=True)
class MapGroup:
    """Layers whose maps can be compared, by their places on the `block` axis; each image has `windows` maps of a head."""

    heads: int
    queries: int
    keys: int
    windows: int
    positions: list[int]


@dataclass(frozen=True)
class LeftOut:
    """Blocks or modules, by their `names`, of which token attention is not measured, and why."""

    names: tuple[str, ...]
    why: str


@dataclass(frozen=True, repr=False)
class Plan:
    """What the probe found in a model.

    `prefix` are the positions of tokens that do not come from the image (class, distillation, register tokens); `patch_shapes`
    are (patches, width) at each depth, None where a depth has no token sequence; `grid` is (rows, columns) of the patches, None
    where they form no rectangle; `image_size` is (height, width) of the input in pixels, None where the input was no image.
    `adjacent` says for each two consecutive places of the `block` axis whether the first gives its output to the second.
    `frames` are the module calls in which attention ran, `input_shape` the shape of one input, `by_hand` says that a softmax is
    written by hand somewhere. `middles` says for each block where the residual stream is read between its attention and its
    MLP; None where it is not (`blocks.NO_MIDDLE`).
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
    notes: tuple[str, ...] = ()
    image_size: tuple[int, int] | None = None
    adjacent: tuple[bool, ...] = ()
    frames: tuple[Frame, ...] = ()
    input_shape: tuple[int, ...] = ()
    by_hand: bool = False
    middles: tuple[Tap | None, ...] = ()

    def __repr__(self) -> str:
        prefix = f"{len(self.prefix)} of them prefix tokens" if self.prefix else "no prefix tokens"
        what = f"{len(self.blocks)} blocks, {len(self.layers)} attention layers, {self.tokens} tokens ({prefix})"
        return f"<Plan: {what}, width {self.width}; .blocks, .layers, .left_out, .notes>"

    @property
    def left_out(self) -> tuple[LeftOut, ...]:
        """Every layer without token attention, and what was not captured, grouped by the reason."""
        places: dict[str, list[str]] = {}
        for layer in self.layers:
            why = layer.reason or ("outside the blocks" if layer.block is None else "")
            if why:
                places.setdefault(why, []).append(layer.owner or "the model")
        return tuple(LeftOut(tuple(dict.fromkeys(names)), why) for why, names in places.items())

    @property
    def token_layers(self) -> list[int]:
        """Indices of the layers inside blocks whose maps run over the image's tokens."""
        return [i for i, layer in enumerate(self.layers) if layer.block is not None and not layer.reason]

    @property
    def map_layers(self) -> list[int]:
        """Indices of the layers that have a place on the `block` axis of the attention metrics, in its order."""
        return [i for i, layer in enumerate(self.layers) if layer.block is not None and layer.on_axis]

    @property
    def adjacent_blocks(self) -> tuple[bool, ...]:
        """Whether each two consecutive blocks are neighbours, as `adjacent` says it of places; [blocks − 1]."""
        of_places = [self.layers[index].block for index in self.map_layers]
        pairs = zip(of_places[:-1], of_places[1:], self.adjacent, strict=True)
        joined = {(first, second) for first, second, adjacent in pairs if adjacent}
        return tuple((b, b + 1) in joined for b in range(len(self.blocks) - 1))

    def map_groups(self) -> list[MapGroup]:
        """The layers with token attention by their signature; those inside windows also by their windows' partition, and where
        that is not known each by itself.
        """
        groups: dict[tuple[object, ...], MapGroup] = {}
        for position, index in enumerate(self.map_layers):
            layer = self.layers[index]
            if not layer.reason or layer.windows > 1:
                partition = (layer.partition or position) if layer.windows > 1 else ""
                group = MapGroup(*layer.signature, layer.windows, [])
                groups.setdefault((*layer.signature, layer.windows, partition), group).positions.append(position)
        return list(groups.values())

    def groups(self) -> dict[tuple[int, int, int], list[int]]:
        """Positions on the `block` axis of the layers that share a signature, token attention between all tokens only."""
        return {(g.heads, g.queries, g.keys): g.positions for g in self.map_groups() if g.windows == 1}


def plan_to_json(plan: Plan) -> dict[str, Any]:
    """A plan in JSON types, for `plan_from_json`."""
    found: dict[str, Any] = json.loads(json.dumps(asdict(plan)))
    return found


def plan_from_json(content: Mapping[str, Any]) -> Plan:
    """The plan behind `plan_to_json`; KeyError, TypeError or ValueError for anything else."""
    plan: Plan = _built(Plan, content)
    return plan


def _built(kind: Any, value: Any) -> Any:
    """A value of JSON types as the type that an annotation names: dataclasses, tuples, unions with None, plain values."""
    origin, arguments = get_origin(kind), get_args(kind)
    if is_dataclass(kind):
        hints = get_type_hints(kind)
        return kind(**{field.name: _built(hints[field.name], value[field.name]) for field in fields(kind)})  # type: ignore[operator]
    if origin in (Union, UnionType):
        inner = next(each for each in arguments if each is not type(None))
        return None if value is None else _built(inner, value)
    if origin is tuple:
        kinds = [arguments[0]] * len(value) if arguments[-1] is Ellipsis else arguments
        return tuple(_built(each, item) for each, item in zip(kinds, value, strict=True))
    if kind is float:
        return float(value)
    if not isinstance(value, kind):
        raise TypeError(f"expected {kind.__name__}, came {type(value).__name__}")
    return value
