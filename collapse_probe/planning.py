"""From what was heard of one forward pass to the plan: which attention belongs to which block, where tokens are read."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from collapse_probe.ear import Call, Event, Frame, Hearing
from collapse_probe.errors import CaptureError
from collapse_probe.trace import Attention, Layer, Plan, SelfCheck, Tap

MOST_ADDED_TOKENS = 8
"""A block may add this many tokens of its own (a class token) before it attends."""
_CONTAINERS = (nn.ModuleList, nn.Sequential, nn.ModuleDict)


def block_paths(model: nn.Module, owners: Sequence[str]) -> dict[str, str | None]:
    """For each attention owner the dotted path of its block, None where no container of blocks is around it.

    The block is the innermost child of a container that has a matrix outside all attention owners (its MLP), else
    the innermost child of a container.
    """
    modules = dict(model.named_modules(remove_duplicate=False))
    attention = {id(p) for owner in owners for p in modules[owner].parameters()} if "" not in owners else set()
    found: dict[str, str | None] = {}
    for owner in dict.fromkeys(owners):
        parts = owner.split(".") if owner else []
        children = [".".join(parts[:n]) for n in range(len(parts), 0, -1)]
        children = [c for c in children if isinstance(modules[c.rpartition(".")[0]], _CONTAINERS)]
        has_mlp = [
            c for c in children if any(p.ndim >= 2 and id(p) not in attention for p in modules[c].parameters())
        ]
        found[owner] = (has_mlp or children or [None])[0]  # type: ignore[list-item]
    return found


def make_plan(model: nn.Module, heard: Hearing, check: SelfCheck) -> Plan:
    """Read one thorough Hearing (of at least two different images) into a Plan; raises CaptureError where it cannot."""
    events = [regular(event, heard.images) for event in heard.events]
    paths = block_paths(model, [event.attention.owner for event in events])
    instances = [_instance(event, paths[event.attention.owner]) for event in events]
    widths = {frame: _width(model, frame[0]) for frame in dict.fromkeys(instances) if frame is not None}
    sizes = {frame: _input_tokens(frame, heard, width) for frame, width in widths.items()}
    main = [f for event, f in zip(events, instances, strict=True) if f is not None and not _is_pool(event)]
    blocks = list(dict.fromkeys(main))
    layers = tuple(
        _layer(event, frame, blocks, None if frame is None else sizes[frame], heard.images)
        for event, frame in zip(events, instances, strict=True)
    )
    taps = tuple(_taps(blocks, heard, widths)) if blocks else ()
    first = as_tokens(read_tap(taps[0], heard), heard.images, taps[0].width) if taps else None
    prefix = _prefix(first)
    tokens, width = (0, 0) if first is None else (first.shape[1], first.shape[2])
    return Plan(
        blocks=tuple(_block_name(frame, blocks) for frame in blocks),
        layers=layers,
        taps=taps,
        prefix=prefix,
        tokens=tokens,
        width=width,
        patch_shapes=tuple(_patch_shape(tap, heard, tokens, prefix) for tap in taps),
        grid=_grid(tokens - len(prefix), heard.input),
        bytes_per_image=_bytes_per_image(events, len(taps), tokens * width),
        check=check,
    )


def regular(event: Event, images: int) -> Event:
    """The event with maps as [B, H, N, N], where they came as [B·H, N, N]."""
    a = event.attention
    if a.probs is not None and a.probs.ndim == 3:
        shape = (images, -1) if images and len(a.probs) % images == 0 else (-1, 1)
        for name in ("probs", "weights"):
            tensor = getattr(a, name)
            if tensor is not None:
                setattr(a, name, tensor.reshape(*shape, *tensor.shape[-2:]))
    return event


def sizes_of(attention: Attention) -> tuple[tuple[int, ...], int, int]:
    """Leading sizes, queries and keys of an attention call."""
    if attention.q is not None and attention.k is not None:
        return tuple(attention.q.shape[:-2]), attention.q.shape[-2], attention.k.shape[-2]
    assert attention.probs is not None
    return tuple(attention.probs.shape[:-2]), attention.probs.shape[-2], attention.probs.shape[-1]


def read_tap(tap: Tap, heard: Hearing) -> object:
    """The tensor (or tuple of tensors) that passed where the tap points; raises CaptureError where nothing did."""
    for call in heard.calls:
        if (call.path, call.number) == (tap.path, tap.call):
            return call.input if tap.side == "input" else call.output
    raise CaptureError(f"module {tap.path!r} did not run in this forward pass as it did in the probe: a depth that depends on the data cannot be analysed")


def as_tokens(value: object, images: int, width: int | None) -> Tensor | None:
    """A block's output as a token sequence [B, N, D]: from [B, N, D], [B, h, w, D] or [B, D, h, w]; None otherwise."""
    candidates = value if isinstance(value, tuple) else (value,)
    for x in candidates:
        if not isinstance(x, Tensor) or len(x) != images or not x.is_floating_point():
            continue
        if x.ndim == 3:
            return x
        if x.ndim == 4 and width is not None and x.shape[-1] == width:
            return x.flatten(1, 2)
        if x.ndim == 4 and width is not None and x.shape[1] == width:
            return x.flatten(2).transpose(1, 2)
    return None


def _instance(event: Event, path: str | None) -> Frame | None:
    """The block's path with the number of its call; a group that is never called itself counts with its owner."""
    if path is None:
        return None
    for frame in event.stack:
        if frame[0] == path:
            return frame
    return path, next((number for p, number in reversed(event.stack) if p.startswith(path)), 0)


def _calls_in(frame: Frame, heard: Hearing) -> list[int]:
    """Positions in the call log of the block itself, or of the modules of a group that is never called itself."""
    path, number = frame
    own = [i for i, c in enumerate(heard.calls) if (c.path, c.number) == frame]
    if own:
        return own
    inside = (i for i, c in enumerate(heard.calls) if c.path.startswith(path + ".") and c.number == number)
    return list(inside)


def _taps(blocks: list[Frame], heard: Hearing, widths: dict[Frame, int | None]) -> list[Tap]:
    first = heard.calls[_calls_in(blocks[0], heard)[0]]
    taps = [Tap(first.path, first.number, "input"), *(_output_tap(frame, heard) for frame in blocks)]
    return [replace(tap, width=widths[frame]) for tap, frame in zip(taps, [blocks[0], *blocks], strict=True)]


def _output_tap(frame: Frame, heard: Hearing) -> Tap:
    inside = _calls_in(frame, heard)
    if (heard.calls[inside[0]].path, heard.calls[inside[0]].number) == frame:
        return Tap(frame[0], frame[1], "output")
    group = heard.calls[inside[0]].stack  # the group is no module call: read what the next module receives
    for call in heard.calls[inside[-1] + 1 :]:
        if call.stack[: len(group)] != group:
            break
        if call.stack == group and call.input is not None:
            return Tap(call.path, call.number, "input")
    parent = group[-1]
    return Tap(parent[0], parent[1], "output")


def _input_tokens(frame: Frame, heard: Hearing, width: int | None) -> int | None:
    tokens = as_tokens(heard.calls[_calls_in(frame, heard)[0]].input, heard.images, width)
    return None if tokens is None else tokens.shape[1]


def _is_pool(event: Event) -> bool:
    _, queries, keys = sizes_of(event.attention)
    return queries == 1 and keys > 1


def _layer(event: Event, frame: Frame | None, blocks: list[Frame], tokens: int | None, images: int) -> Layer:
    leading, queries, keys = sizes_of(event.attention)
    block = blocks.index(frame) if frame in blocks else None
    heads = leading[-1] if leading else 1
    return Layer(
        owner=event.attention.owner,
        call=next((number for path, number in reversed(event.stack) if path == event.attention.owner), 0),
        block=None if _is_pool(event) else block,
        operation=event.attention.operation,
        heads=heads,
        queries=queries,
        keys=keys,
        mixed=event.attention.mixed,
        reason=_reason(event, leading, (queries, keys), tokens, images),
    )


def _reason(event: Event, leading: tuple[int, ...], size: tuple[int, int], tokens: int | None, images: int) -> str:
    queries, keys = size
    if _is_pool(event):
        return "a pooling query, not token attention"
    if len(leading) != 2 or leading[0] != images:
        return f"attention inside windows ({list(leading)} maps of {queries} × {keys} for {images} images)"
    q = event.attention.q
    if tokens is not None and queries != tokens:
        if q is not None and q.shape[-1] == tokens:
            return f"channel attention (maps of {queries} × {keys} channels)"
        if abs(queries - tokens) > MOST_ADDED_TOKENS:
            return f"attention between {queries} × {keys} positions, not between the block's {tokens} tokens"
    return ""


def _block_name(frame: Frame, blocks: list[Frame]) -> str:
    repeated = sum(path == frame[0] for path, _ in blocks) > 1
    return f"{frame[0]} (call {frame[1] + 1})" if repeated else frame[0]


def _width(model: nn.Module, path: str) -> int | None:
    """The width of a block's tokens: the length of its first vector of parameters, its first norm's."""
    vectors = (p for p in model.get_submodule(path).parameters() if p.ndim == 1)
    first = next(vectors, None)
    return None if first is None else len(first)


def _prefix(first: Tensor | None) -> tuple[int, ...]:
    """Positions that are the same for different images, bit for bit: tokens that do not come from the image."""
    if first is None or len(first) < 2:
        return ()
    same = (first == first[:1]).flatten(2).all(2).all(0)
    if bool(same.all()):
        return ()
    return tuple(int(i) for i in torch.nonzero(same).flatten())


def _patch_shape(tap: Tap, heard: Hearing, tokens: int, prefix: tuple[int, ...]) -> tuple[int, int] | None:
    found = as_tokens(read_tap(tap, heard), heard.images, tap.width)
    if found is None:
        return None
    return found.shape[1] - (len(prefix) if found.shape[1] == tokens else 0), found.shape[2]


def _grid(patches: int, images: Tensor | None) -> tuple[int, int] | None:
    """Rows and columns of the patches: the factorisation nearest to the image's own shape."""
    if patches < 1 or images is None or images.ndim != 4:
        return None
    height, width = images.shape[-2:]
    shapes = [(rows, patches // rows) for rows in range(1, patches + 1) if patches % rows == 0]
    rows, columns = min(shapes, key=lambda s: abs(s[0] * width - s[1] * height))
    return (rows, columns) if abs(rows * width - columns * height) <= max(height, width) * 1.5 else None


def _bytes_per_image(events: Sequence[Event], depths: int, elements: int) -> int:
    total = depths * elements * 4
    for event in events:
        a = event.attention
        held = [t for t in (a.q, a.k, a.probs, a.weights) if t is not None]
        total += sum(t[0].numel() * t.element_size() for t in held)
    return total


def call_frames(taps: Sequence[Tap]) -> frozenset[Frame]:
    """The module calls that a steady run has to watch."""
    return frozenset((tap.path, tap.call) for tap in taps)


def module_class(model: nn.Module, path: str) -> str:
    """The class name of a module, for error texts."""
    return type(model.get_submodule(path)).__name__


def attention_like(model: nn.Module, calls: Sequence[Call]) -> list[str]:
    """Modules that ran and are called attention by their class or name."""
    found = []
    for call in calls:
        name = f"{call.path.rpartition('.')[2]} {module_class(model, call.path)}".lower()
        weighs = next(model.get_submodule(call.path).parameters(), None) is not None
        if weighs and ("attn" in name or "attention" in name):
            found.append(call.path)
    return list(dict.fromkeys(found))
