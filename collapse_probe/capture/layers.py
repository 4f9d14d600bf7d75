"""The attention calls of each module as layers: heads, windows, and why some are no attention between a block's tokens."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from collapse_probe.capture.attention_operators import LINEAR
from collapse_probe.capture.layout import DEPENDS, axes_of, joined, read_part, with_windows
from collapse_probe.capture.plan import HEAD, IMAGE, WINDOW, Axis, Frame, Layer, Part, Plan
from collapse_probe.capture.recorder import AttentionEvent, PassLog
from collapse_probe.capture.trace import Attention
from collapse_probe.errors import CaptureError

MOST_ADDED_TOKENS = 8
"""A block may add this many tokens of its own (a class token) before it attends."""
_CHANNEL_ATTENTION = ("xca", "channel", "covariance")
_HEAD_COUNTS = ("num_heads", "num_attention_heads", "n_heads", "n_head", "nhead", "heads", "num_head", "nheads")
_PARTITIONS = ("shift", "window", "partition", "dilat", "grid")


def frame_of(event: AttentionEvent) -> Frame:
    """The call of the module to which an attention call belongs."""
    owner = event.attention.owner
    return owner, next((number for path, number in reversed(event.stack) if path == owner), 0)


def is_attention(event: AttentionEvent, log: PassLog) -> bool:
    """False for a softmax that is half of linear attention, or a gate over one element: neither is a map between tokens."""
    if not event.direct:
        return True
    return not (event.made or event.index in log.again or event.attention.shape[-1] == 1)


@dataclass(frozen=True)
class CallGroup:
    """Attention calls of one module call that belong together, the queries of each, and their axes (None: not known)."""

    frame: Frame
    events: list[AttentionEvent]
    queries: tuple[int, ...]
    axes: tuple[Axis, ...] | None
    linear: bool = False


def call_groups(log: PassLog, again: PassLog) -> list[CallGroup]:
    """The attention calls by module call and shape, with their axes; `again` is a pass in which the second image was
    another."""
    by_frame: dict[Frame, list[AttentionEvent]] = {}
    halves: dict[Frame, CallGroup] = {}
    for event in log.events:
        if is_attention(event, log):
            by_frame.setdefault(frame_of(event), []).append(event)
        elif event.attention.shape[-1] > 1 and frame_of(event) not in halves:
            halves[frame_of(event)] = CallGroup(frame_of(event), [event], (event.attention.shape[-2],), None, linear=True)
    groups = [group for frame, group in halves.items() if frame not in by_frame]
    for frame, events in by_frame.items():
        alike: dict[tuple[int, int, int], list[AttentionEvent]] = {}
        for event in events:
            *lead, queries, keys = event.attention.shape
            alike.setdefault((len(lead), queries, keys), []).append(event)
        for (lead_axes, _, keys), some in list(alike.items()):
            together = [e for e in events if len(e.attention.shape) - 2 == lead_axes and e.attention.shape[-1] == keys]
            lengths = tuple(e.attention.shape[-2] for e in together)
            if some[0] is together[0] and len(together) > 1 and sum(lengths) == keys:  # parts of the queries
                axes = [axes_of(*_samples([e], again)) for e in together]
                if axes[0] is not None and all(a == axes[0] for a in axes):
                    groups.append(CallGroup(frame, together, lengths, axes[0]))
                    alike = {key: rest for key, rest in alike.items() if rest[0] not in together}
        for (_, queries, _), same in alike.items():
            by_shape: dict[tuple[int, ...], list[AttentionEvent]] = {}
            for event in same:
                by_shape.setdefault(event.attention.shape, []).append(event)
            for some in by_shape.values():
                groups.append(CallGroup(frame, some, (queries,), axes_of(*_samples(some, again))))
    return sorted(groups, key=lambda group: group.events[0].index)


def _samples(events: Sequence[AttentionEvent], again: PassLog) -> tuple[list[tuple[Tensor, ...]], list[tuple[Tensor, ...]]]:
    return [event.sample for event in events], [again.events[event.index].sample for event in events]


def attends_elsewhere(group: CallGroup, log: PassLog) -> bool:
    """Whether the queries of a kernel are made from other attention than its keys: those of a decoder and of its encoder."""
    owners = {frame_of(event) for event in log.events}
    attention = sum(call.bit for call in log.calls if (call.path, call.number) in owners)
    return any(queries & attention != keys & attention for queries, keys in (event.sources for event in group.events))


def layer_of(
    model: nn.Module, group: CallGroup, block: int | None, tokens: Sequence[int], after: int | None, width: int
) -> Layer:
    """One layer of a group of calls: its heads, its windows, and why it is no attention between a block's tokens.

    `tokens` are how many tokens enter the block, in all and (where they come in groups) in each group; `after` leave it. They
    are `width` wide.
    """
    (owner, number), event, (queries, keys) = (
        group.frame,
        group.events[0],
        (sum(group.queries), group.events[0].attention.shape[-1]),
    )
    mixed = any(e.attention.mixed for e in group.events)
    layer = Layer(owner, number, block, event.attention.operation, 0, queries, keys, mixed)
    if group.linear:
        heads = next(iter(_stated_heads(model, owner)), 1)
        return replace(
            layer, heads=heads, reason=f"{LINEAR} (a softmax of queries or keys alone), which has no map between tokens"
        )
    if group.axes is None:
        why = "its maps cannot be told apart by image: they change with another image than their own"
        return replace(layer, heads=1, reason=why)
    part = Part(group.frame, group.queries, keys, group.axes)
    others = part.of(HEAD)
    length = next((n for n in (*tokens[:1], *filter(None, [after])) if _has_windows(model, part, owner, n, queries)), None)
    if is_pool(group) or length is None:
        why = _reason(group, queries, keys, tokens, width // others, module_class(model, owner))
        if is_pool(group) and tokens and others >= tokens[0] - MOST_ADDED_TOKENS > 1:
            why = f"every token attends to {keys} keys of its own, not all tokens to the same"
        return replace(layer, heads=others, reason=why, parts=(part,))
    reason = f"attention inside windows ({others} maps of {queries} × {keys} for each image)"
    windows = _windows(model, part, owner, length, queries)
    if windows is None:  # windows and heads share an axis, and it cannot be told which come first
        heads = next((n for n in _stated_heads(model, owner) if others % n == 0), others)
        return replace(layer, heads=heads, reason=f"{reason}, in an order of windows and heads that is not known")
    part = replace(part, axes=windows)
    partition = _partition(model, owner) if part.of(WINDOW) > 1 else ""
    return replace(layer, heads=part.of(HEAD), reason=reason, windows=part.of(WINDOW), partition=partition, parts=(part,))


def _has_windows(model: nn.Module, part: Part, owner: str, tokens: int, queries: int) -> bool:
    """Whether maps of fewer queries than tokens are those of windows, and not of heads whose queries were merged."""
    others = part.of(HEAD)
    if queries >= tokens or others * queries < tokens or others in _stated_heads(model, owner):
        return False
    apart = [axis for axis in part.axes if any(role == HEAD for role, _ in axis)]
    folded = any(len(axis) > 1 for axis in apart)
    return folded or len(apart) > 1 or len(part.axes) > 3 or bool(part.axes[0])


def _windows(model: nn.Module, part: Part, owner: str, tokens: int, queries: int) -> tuple[Axis, ...] | None:
    """The axes with the windows told from the heads; None where that is not possible."""
    others = part.of(HEAD)
    stated = _stated_heads(model, owner)
    fewest = max(1, -(-(tokens - MOST_ADDED_TOKENS) // queries))
    counts = [others // n for n in stated if others % n == 0 and others // n >= fewest]
    if not stated:
        counts = [n for n in range(fewest, others + 1) if others % n == 0]
    found = {n: axes for n in counts if (axes := with_windows(part.axes, n)) is not None}
    exact = [n for n in found if n * queries == tokens] or list(found)  # windows that cover the tokens
    folded = [n for n in exact if not any(WINDOW in dict(axis) and IMAGE not in dict(axis) for axis in found[n])]
    return found[(folded or exact)[0]] if found else None


def _stated_heads(model: nn.Module, owner: str) -> list[int]:
    """What the attention's module, or the modules in it, say is their number of heads."""
    stated = []
    for module in model.get_submodule(owner).modules():
        for name in _HEAD_COUNTS:
            value = getattr(module, name, None)
            if isinstance(value, int) and not isinstance(value, bool) and value > 0:
                stated.append(value)
    return list(dict.fromkeys(stated))


def _partition(model: nn.Module, owner: str) -> str:
    """What the modules around windowed attention say of their windows; "" where they say nothing."""
    said: dict[str, str] = {}
    parts = owner.split(".")
    for n in (len(parts), len(parts) - 1):
        module = model.get_submodule(".".join(parts[:n]))
        for name, value in vars(module).items():
            if any(word in name.lower() for word in _PARTITIONS) and isinstance(value, (int, tuple, list, bool)):
                said[name] = str(value)
    kind = module_class(model, owner)
    return f"{kind}: " + ", ".join(f"{name}={value}" for name, value in sorted(said.items())) if said else ""


def cross_attention(queries: int, keys: int) -> str:
    """The reason why attention to another sequence is left out."""
    return f"cross attention: {queries} tokens attend to {keys} others"


def by_blocks(layers: Sequence[Layer], blocks: Sequence[Frame]) -> list[Layer]:
    """The layers in the order of their blocks, calls that are one block's heads together, and which of them stand on the
    axis."""
    ordered: list[list[Layer]] = []
    for block, frame in enumerate(blocks):
        inside = [layer for layer in layers if layer.block == block]
        square = any(not layer.reason and layer.queries == layer.keys for layer in inside)
        inside = [
            replace(layer, reason=cross_attention(layer.queries, layer.keys))
            if (square or (layer.owner, layer.call) == frame) and not layer.reason and layer.queries != layer.keys
            else layer
            for layer in inside
        ]
        readers = {layer.queries for layer in inside if layer.reason}  # latents that read the tokens
        inside = [
            replace(layer, reason=f"attention to {layer.keys} latents that read the tokens, not between the tokens")
            if not layer.reason and layer.queries != layer.keys and layer.keys in readers
            else layer
            for layer in inside
        ]
        merged: dict[object, Layer] = {}
        for layer in inside:
            key = (layer.queries, layer.keys) if not layer.reason else id(layer)
            if (first := merged.get(key)) is None:
                merged[key] = layer
            else:
                joint = replace(first, heads=first.heads + layer.heads, parts=first.parts + layer.parts)
                merged[key] = replace(joint, mixed=first.mixed or layer.mixed)
        some = list(merged.values())
        tokens = [layer for layer in some if not layer.reason]
        ordered.append([replace(layer, on_axis=layer in tokens if tokens else True) for layer in some])
    beside = [layer for some in ordered for layer in some if not layer.on_axis]
    places = [[layer for layer in some if layer.on_axis] for some in ordered]
    series = itertools.zip_longest(*places)  # blocks with two kinds of maps: all of one kind, then all of the other
    on_axis = [layer for some in series for layer in some if layer is not None]
    return on_axis + beside + [replace(layer, on_axis=False) for layer in layers if layer.block is None]


def is_pool(group: CallGroup) -> bool:
    return not group.linear and group.queries == (1,) and group.events[0].attention.shape[-1] > 1


def _reason(group: CallGroup, queries: int, keys: int, tokens: Sequence[int], head_width: int, owner_class: str) -> str:
    """Why maps are not between a block's tokens; empty where they are."""
    if is_pool(group):
        return "a pooling query, not token attention"
    q = group.events[0].attention.q
    fitting = [n for n in tokens if n <= queries <= n + MOST_ADDED_TOKENS]
    named = any(word in owner_class.lower() for word in _CHANNEL_ATTENTION)
    across = q.shape[-1] in tokens if q is not None else not fitting and queries == keys == head_width
    if named or (tokens and queries not in tokens and across):
        return f"channel attention (maps of {queries} × {keys} channels)"
    if tokens and not fitting:
        return f"attention between {queries} × {keys} positions, not between the block's {tokens[0]} tokens"
    if tokens and keys > max(fitting) + MOST_ADDED_TOKENS:
        return cross_attention(max(fitting), keys)
    return ""


def module_class(model: nn.Module, path: str) -> str:
    """The class name of a module, for error texts."""
    return type(model.get_submodule(path)).__name__


def read_layers(plan: Plan, log: PassLog) -> tuple[Attention, ...]:
    """The attention of every layer of the plan in a forward pass; CaptureError where other calls ran than in the probe."""
    by_frame: dict[Frame, list[Attention]] = {}
    for event in log.events:
        by_frame.setdefault(frame_of(event), []).append(event.attention)
    if [*by_frame] != [*plan.frames]:
        raise CaptureError(
            f"this batch ran attention in {len(by_frame)} module calls, the probe in {len(plan.frames)}, or in another order; "
            f"{DEPENDS}"
        )

    unheard = Attention("", "not captured", probs=torch.empty(0, 0, 0, 0))

    def read(part: Part) -> Attention:
        calls = [a for a in by_frame[part.frame] if a.shape[-1] == part.keys and a.shape[-2] in part.queries]
        expected = part.calls or log.images * math.prod(n for _, n in part.axes[0] if n)
        if len(calls) > expected:  # others of as many queries and keys have other heads
            shape = [math.prod(log.images if role == IMAGE else n for role, n in axis) for axis in part.axes[1:]]
            calls = [a for a in calls if list(a.shape[:-2]) == shape]
        if len(calls) != expected:
            raise CaptureError(
                f"{part.frame[0]} made {len(calls)} attention calls of {part.queries} queries and {part.keys} keys in this "
                f"batch, where the probe on inputs of the same shape makes {expected} expected; {DEPENDS}"
            )
        return read_part(part, calls, log.images)

    def of(layer: Layer) -> Attention:
        if not layer.parts:
            return unheard
        try:
            attention = joined([read(part) for part in layer.parts])
            if attention.signature != layer.signature:
                raise CaptureError(
                    f"{layer.owner} has {attention.signature} heads, queries and keys in this batch, {layer.signature} in the "
                    f"probe on inputs of the same shape; {DEPENDS}"
                )
        except CaptureError:
            if layer.reason and layer.windows == 1:
                return unheard  # maps that are not measured may follow the batch
            raise
        return attention

    return tuple(map(of, plan.layers))
