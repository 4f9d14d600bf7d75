"""From what was heard of one forward pass to the plan: whose attention it is, and where tokens are read."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

from torch import Tensor, nn

from collapse_probe.capture.plan import Layer, Plan, SelfCheck, Tap
from collapse_probe.capture.recorder import AttentionEvent, ModuleCall, Recording, steady_tokens
from collapse_probe.capture.softmax_tracking import Frame
from collapse_probe.capture.trace import Attention
from collapse_probe.errors import CaptureError

_SEQUENCES: dict[str, Callable[[Tensor], Tensor]] = {
    "BND": lambda x: x,
    "NBD": lambda x: x.transpose(0, 1),
    "BhwD": lambda x: x.flatten(1, 2),
    "BDhw": lambda x: x.flatten(2).transpose(1, 2),
}


def as_tokens(value: object, images: int, layout: str) -> Tensor | None:
    """A block's output in a known layout as a token sequence [B, N, D]; None where there is none."""
    for x in value if isinstance(value, tuple) else (value,):
        if layout and _is_tokens(x, layout, images):
            assert isinstance(x, Tensor)
            return _SEQUENCES[layout](x)
    return None


def layout_of(block: nn.Module, value: object, images: int) -> str:
    """How the axes of a block's output are laid out, "" where no tensor in it is a token sequence.

    With four axes, that of the channels is as long as some vector of the block's parameters; where two axes
    are, a block with convolutions keeps its channels first.
    """
    widths = {len(p) for p in block.parameters() if p.ndim == 1}
    convolves = any(isinstance(module, nn.Conv2d) for module in block.modules())
    for x in value if isinstance(value, tuple) else (value,):
        for layout in ("BND", "NBD"):
            if _is_tokens(x, layout, images):
                return layout
        if isinstance(x, Tensor) and _is_tokens(x, "BDhw", images):
            first, last = x.shape[1] in widths, x.shape[3] in widths
            if first or last:
                return "BhwD" if last and not (first and convolves) else "BDhw"
    return ""


def _is_tokens(x: object, layout: str, images: int) -> bool:
    if not isinstance(x, Tensor) or x.ndim != len(layout) or not x.is_floating_point():
        return False
    return x.shape[layout.index("B")] == images


MOST_ADDED_TOKENS = 8
"""A block may add this many tokens of its own (a class token) before it attends."""
_CONTAINERS = (nn.ModuleList, nn.Sequential, nn.ModuleDict)
_CHANNEL_ATTENTION = ("xca", "channel", "covariance")


def block_paths(model: nn.Module, owners: Sequence[str]) -> dict[str, str | None]:
    """For each attention owner the dotted path of its block, None where no container of blocks is around it.

    The block is the innermost child of a container that has a matrix outside all attention owners (its MLP),
    else the innermost child of a container.
    """
    modules = dict(model.named_modules(remove_duplicate=False))
    attention = {id(p) for owner in owners for p in modules[owner].parameters()} if "" not in owners else set()
    found: dict[str, str | None] = {}
    for owner in dict.fromkeys(owners):
        parts = owner.split(".") if owner else []
        children = [".".join(parts[:n]) for n in range(len(parts), 0, -1)]
        children = [c for c in children if isinstance(modules[c.rpartition(".")[0]], _CONTAINERS)]
        has_mlp = [c for c in children if any(p.ndim >= 2 and id(p) not in attention for p in modules[c].parameters())]
        found[owner] = (has_mlp or children or [None])[0]  # type: ignore[list-item]
    return found


def make_plan(model: nn.Module, heard: Recording, check: SelfCheck) -> Plan:
    """Read one thorough Hearing, of at least two different images, into a Plan."""
    events = [regular(event, heard.images) for event in heard.events]
    paths = block_paths(model, [event.attention.owner for event in events])
    instances = [_instance(event, paths[event.attention.owner]) for event in events]
    main = [f for event, f in zip(events, instances, strict=True) if f is not None and not _is_pool(event)]
    blocks = list(dict.fromkeys(main))
    inputs = {frame: _input_tap(model, frame, heard) for frame in dict.fromkeys(instances) if frame is not None}
    layers = tuple(
        _layer(model, event, blocks, frame, _tokens_at(inputs[frame], heard) if frame else None, heard.images)
        for event, frame in zip(events, instances, strict=True)
    )
    taps = (inputs[blocks[0]], *(_output_tap(model, frame, heard) for frame in blocks)) if blocks else ()
    first = _tokens_at(taps[0], heard) if taps else None
    prefix = _prefix(taps[0], heard) if taps else ()
    tokens, width = (0, 0) if first is None else (first.shape[1], first.shape[2])
    grid = _grid(tokens - len(prefix), heard, _calls_in(blocks[0], heard)[0]) if blocks else None
    return Plan(
        blocks=tuple(_block_name(frame, blocks) for frame in blocks),
        layers=layers,
        taps=taps,
        prefix=prefix,
        tokens=tokens,
        width=width,
        patch_shapes=tuple(_patch_shape(_tokens_at(tap, heard), tokens, prefix, heard) for tap in taps),
        grid=grid,
        bytes_per_image=_bytes_per_image(events, heard.images, len(taps) * tokens * width),
        check=check,
        notes=() if heard.images > 1 else ("the plan was made from one image: class and register tokens are unknown",),
        image_size=_image_size(heard.input),
    )


def regular(event: AttentionEvent, images: int) -> AttentionEvent:
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


def heads_queries_keys(attention: Attention) -> tuple[int, int, int]:
    """What an attention call is compared by."""
    leading, queries, keys = sizes_of(attention)
    return leading[-1] if leading else 1, queries, keys


def read_tap(tap: Tap, heard: Recording) -> object:
    """The tensor or tuple of tensors that passed where the tap points; CaptureError where nothing did."""
    for call in heard.calls:
        if (call.path, call.number) == (tap.path, tap.call):
            return call.input if tap.side == "input" else call.output
    raise CaptureError(
        f"module {tap.path!r} did not run in this forward pass as it did in the probe: a depth that depends "
        "on the data cannot be analysed"
    )


def _instance(event: AttentionEvent, path: str | None) -> Frame | None:
    """The block's path and the number of its call; a group that is never called counts with its owner."""
    if path is None:
        return None
    for frame in event.stack:
        if frame[0] == path:
            return frame
    return path, next((number for p, number in reversed(event.stack) if p.startswith(path + ".")), 0)


def _calls_in(frame: Frame, heard: Recording) -> list[int]:
    """Positions in the call log of the block itself, or of the modules of a group that is never called."""
    path, number = frame
    own = [i for i, c in enumerate(heard.calls) if (c.path, c.number) == frame]
    if own:
        return own
    inside = (i for i, c in enumerate(heard.calls) if c.path.startswith(path + ".") and c.number == number)
    return list(inside)


def _input_tap(model: nn.Module, frame: Frame, heard: Recording) -> Tap:
    """What enters the block: its first positional tensor, or that of the first module in it that got one."""
    block, images = model.get_submodule(frame[0]), heard.images
    first, *later = heard.calls[_calls_in(frame, heard)[0] :]
    inside = (c for c in later if c.path.startswith(frame[0] + "."))
    call = first if first.input is not None else next((c for c in inside if c.input is not None), first)
    return Tap(call.path, call.number, "input", layout_of(block, call.input, images))


def _output_tap(model: nn.Module, frame: Frame, heard: Recording) -> Tap:
    tap = _output_place(frame, heard)
    return replace(tap, layout=layout_of(model.get_submodule(frame[0]), read_tap(tap, heard), heard.images))


def _output_place(frame: Frame, heard: Recording) -> Tap:
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


def _tokens_at(tap: Tap, heard: Recording) -> Tensor | None:
    return as_tokens(read_tap(tap, heard), heard.images, tap.layout)


def _is_pool(event: AttentionEvent) -> bool:
    _, queries, keys = sizes_of(event.attention)
    return queries == 1 and keys > 1


def _layer(
    model: nn.Module,
    event: AttentionEvent,
    blocks: list[Frame],
    frame: Frame | None,
    first: Tensor | None,
    images: int,
) -> Layer:
    heads, queries, keys = heads_queries_keys(event.attention)
    owner, block = event.attention.owner, blocks.index(frame) if frame in blocks else None
    channels = any(word in module_class(model, owner).lower() for word in _CHANNEL_ATTENTION)
    return Layer(
        owner=owner,
        call=next((number for path, number in reversed(event.stack) if path == owner), 0),
        block=None if _is_pool(event) else block,
        operation=event.attention.operation,
        heads=heads,
        queries=queries,
        keys=keys,
        mixed=event.attention.mixed,
        reason=_reason(event, images, None if first is None else first.shape[1], channels),
    )


def _reason(event: AttentionEvent, images: int, tokens: int | None, channels: bool) -> str:
    """Why maps are not between a block's tokens; empty where they are."""
    leading, queries, keys = sizes_of(event.attention)
    if _is_pool(event):
        return "a pooling query, not token attention"
    if len(leading) != 2 or leading[0] != images:
        return f"attention inside windows ({list(leading)} maps of {queries} × {keys} for {images} images)"
    q, fits = event.attention.q, tokens is None or tokens <= queries <= tokens + MOST_ADDED_TOKENS
    if channels or (not fits and q is not None and q.shape[-1] == tokens):
        return f"channel attention (maps of {queries} × {keys} channels)"
    if not fits:
        return f"attention between {queries} × {keys} positions, not between the block's {tokens} tokens"
    return ""


def _block_name(frame: Frame, blocks: list[Frame]) -> str:
    repeated = sum(path == frame[0] for path, _ in blocks) > 1
    return f"{frame[0]} (call {frame[1] + 1})" if repeated else frame[0]


def _prefix(tap: Tap, heard: Recording) -> tuple[int, ...]:
    """Positions that are bitwise the same for different images: tokens that do not come from the image."""
    call = next(c for c in heard.calls if (c.path, c.number) == (tap.path, tap.call))
    same = steady_tokens(call.input, heard.images) if call.steady is None else call.steady
    if same is None or all(same):
        return ()
    return tuple(i for i, steady in enumerate(same) if steady)


def _patch_shape(found: Tensor | None, tokens: int, prefix: tuple[int, ...], heard: Recording) -> tuple[int, int] | None:
    """Patches and width, without prefix tokens and those that were added on the way.

    Where patches were merged on the way, their grid tells if the prefix is still there.
    """
    if found is None:
        return None
    here, patches, without = found.shape[1], tokens - len(prefix), found.shape[1] - len(prefix)
    if patches <= here <= max(tokens, patches + MOST_ADDED_TOKENS):
        return patches, found.shape[2]
    merged = not _rectangle(here, heard.input) and _rectangle(without, heard.input)
    return (without if merged else here), found.shape[2]


def _grid(patches: int, heard: Recording, before: int) -> tuple[int, int] | None:
    """Rows and columns of the patches, as some module made them before block 0 or from the image's shape."""
    for call in reversed(heard.calls[:before]):
        x = call.output
        if isinstance(x, Tensor) and x.ndim == 4 and len(x) == heard.images:
            for shape in (x.shape[2:], x.shape[1:3]):
                if shape[0] * shape[1] == patches:
                    return int(shape[0]), int(shape[1])
    return _rectangle(patches, heard.input)


def _rectangle(patches: int, images: Tensor | None) -> tuple[int, int] | None:
    """The factorisation in which square patches cover the image, up to less than one patch at its borders."""
    if patches < 1 or images is None or images.ndim != 4:
        return None
    height, width = images.shape[-2:]
    shapes = [(rows, patches // rows) for rows in range(1, patches + 1) if patches % rows == 0]
    rows, columns = min(shapes, key=lambda s: abs(s[0] * width - s[1] * height))
    return (rows, columns) if abs(rows * width - columns * height) < max(height, width) else None


def _image_size(images: Tensor | None) -> tuple[int, int] | None:
    return None if images is None or images.ndim != 4 else (images.shape[-2], images.shape[-1])


def _bytes_per_image(events: Sequence[AttentionEvent], images: int, token_elements: int) -> int:
    """Bytes held of one image: the memory behind q, k and maps (often v's too), and the tokens in float32."""
    held = sum(sum(event.storages().values()) for event in events)  # a probe lets go of one event's before the next's
    return held // max(images, 1) + token_elements * 4


def call_frames(taps: Sequence[Tap]) -> frozenset[Frame]:
    """The module calls that a steady run has to watch."""
    return frozenset((tap.path, tap.call) for tap in taps)


def module_class(model: nn.Module, path: str) -> str:
    """The class name of a module, for error texts."""
    return type(model.get_submodule(path)).__name__


def attention_like(model: nn.Module, calls: Sequence[ModuleCall]) -> list[str]:
    """Modules that ran and are called attention by their class or name."""
    found = []
    for call in calls:
        name = f"{call.path.rpartition('.')[2]} {module_class(model, call.path)}".lower()
        weighs = next(model.get_submodule(call.path).parameters(), None) is not None
        if weighs and ("attn" in name or "attention" in name):
            found.append(call.path)
    return list(dict.fromkeys(found))
