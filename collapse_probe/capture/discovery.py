"""From the log of one forward pass to the plan: whose attention it is, and where tokens are read."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

from torch import Tensor, nn

from collapse_probe.capture.plan import Frame, Layer, Plan, SelfCheck, Tap
from collapse_probe.capture.recorder import AttentionEvent, ModuleCall, PassLog, steady_tokens
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
        if layout and _fits(x, layout, images):
            assert isinstance(x, Tensor)
            return _SEQUENCES[layout](x)
    return None


def layout_of(block: nn.Module, value: object, images: int) -> str:
    """How the axes of a block's output are laid out, "" where no tensor in it is a token sequence.

    With four axes, that of the channels is as long as some vector of the block's parameters; where two axes
    are, a block with convolutions keeps its channels first.
    """
    widths = {len(p) for p in block.parameters() if p.ndim == 1}
    for x in value if isinstance(value, tuple) else (value,):
        for layout in ("BND", "NBD"):
            if _fits(x, layout, images):
                return layout
        if isinstance(x, Tensor) and _fits(x, "BDhw", images):
            first, last = x.shape[1] in widths, x.shape[3] in widths
            if first and last:
                last = not any(isinstance(module, nn.Conv2d) for module in block.modules())
            if first or last:
                return "BhwD" if last else "BDhw"
    return ""


def _fits(x: object, layout: str, images: int) -> bool:
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
    paths: dict[str, str | None] = {}
    for owner in dict.fromkeys(owners):
        parts = owner.split(".") if owner else []
        children = [".".join(parts[:n]) for n in range(len(parts), 0, -1)]
        children = [c for c in children if isinstance(modules[c.rpartition(".")[0]], _CONTAINERS)]
        has_mlp = [c for c in children if any(p.ndim >= 2 and id(p) not in attention for p in modules[c].parameters())]
        paths[owner] = next(iter(has_mlp or children), None)
    return paths


def make_plan(model: nn.Module, log: PassLog, check: SelfCheck) -> Plan:
    """Read the log of one thorough forward pass, of at least two different images, into a Plan."""
    paths = block_paths(model, [event.attention.owner for event in log.events])
    frames = [_block_call(event, paths[event.attention.owner]) for event in log.events]
    blocks = list(
        dict.fromkeys(f for event, f in zip(log.events, frames, strict=True) if f is not None and not _is_pool(event))
    )
    inputs = {frame: _tap(model, frame, _input_place(frame, log), log) for frame in dict.fromkeys(frames) if frame is not None}
    layers = []
    for event, frame in zip(log.events, frames, strict=True):
        a, tokens_BND = event.attention, _tokens_at(inputs[frame], log) if frame else None
        number = next((number for path, number in reversed(event.stack) if path == a.owner), 0)
        block = blocks.index(frame) if frame in blocks and not _is_pool(event) else None
        length = None if tokens_BND is None else tokens_BND.shape[1]
        reason = _reason(event, log.images, length, module_class(model, a.owner))
        layers.append(Layer(a.owner, number, block, a.operation, *a.signature, a.mixed, reason))
    outputs = [_tap(model, frame, _output_place(frame, log), log) for frame in blocks]
    taps = (inputs[blocks[0]], *outputs) if blocks else ()
    first = _tokens_at(taps[0], log) if taps else None
    prefix: tuple[int, ...] = ()  # positions that are bitwise the same for different images do not come from the image
    for call in log.calls:
        if taps and (call.path, call.number) == (taps[0].path, taps[0].call):
            same = steady_tokens(call.input, log.images) if call.steady is None else call.steady
            prefix = () if same is None or all(same) else tuple(i for i, steady in enumerate(same) if steady)
    tokens, width = (0, 0) if first is None else (first.shape[1], first.shape[2])
    event_bytes = sum(event.held_bytes() for event in log.events)
    names = [path for path, _ in blocks]
    images = log.input if log.input is not None and log.input.ndim == 4 else None
    return Plan(
        blocks=tuple(f"{path} (call {number + 1})" if names.count(path) > 1 else path for path, number in blocks),
        layers=tuple(layers),
        taps=taps,
        prefix=prefix,
        tokens=tokens,
        width=width,
        patch_shapes=tuple(_patch_shape(_tokens_at(tap, log), tokens, prefix, log) for tap in taps),
        grid=_grid(tokens - len(prefix), log, _calls_in(blocks[0], log)[0]) if blocks else None,
        bytes_per_image=event_bytes // max(log.images, 1) + len(taps) * tokens * width * 4,
        check=check,
        notes=() if log.images > 1 else ("the plan was made from one image: class and register tokens are unknown",),
        image_size=None if images is None else (images.shape[-2], images.shape[-1]),
        adjacent=(True,) * max(sum(layer.block is not None for layer in layers) - 1, 0),
    )


def read_tap(tap: Tap, log: PassLog) -> object:
    """The tensor or tuple of tensors that passed where the tap points; CaptureError where nothing did."""
    for call in log.calls:
        if (call.path, call.number) == (tap.path, tap.call):
            return call.input if tap.side == "input" else call.output
    raise CaptureError(
        f"module {tap.path!r} did not run in this forward pass as it did in the probe: a depth that depends "
        "on the data cannot be analysed"
    )


def _tokens_at(tap: Tap, log: PassLog) -> Tensor | None:
    return as_tokens(read_tap(tap, log), log.images, tap.layout)


def _block_call(event: AttentionEvent, path: str | None) -> Frame | None:
    """The block's path and the number of its call; a group that is never called counts with its owner."""
    if path is None:
        return None
    for frame in event.stack:
        if frame[0] == path:
            return frame
    return path, next((number for p, number in reversed(event.stack) if p.startswith(path + ".")), 0)


def _calls_in(frame: Frame, log: PassLog) -> list[int]:
    """Positions in the call log of the block itself, or of the modules of a group that is never called."""
    path, number = frame
    own = [i for i, c in enumerate(log.calls) if (c.path, c.number) == frame]
    return own or [i for i, c in enumerate(log.calls) if c.path.startswith(path + ".") and c.number == number]


def _tap(model: nn.Module, frame: Frame, place: Tap, log: PassLog) -> Tap:
    """A place with the layout of what passed there."""
    return replace(place, layout=layout_of(model.get_submodule(frame[0]), read_tap(place, log), log.images))


def _input_place(frame: Frame, log: PassLog) -> Tap:
    """What enters the block: its first positional tensor, or that of the first module in it that got one."""
    first, *later = log.calls[_calls_in(frame, log)[0] :]
    inside = (c for c in later if c.path.startswith(frame[0] + "."))
    call = first if first.input is not None else next((c for c in inside if c.input is not None), first)
    return Tap(call.path, call.number, "input")


def _output_place(frame: Frame, log: PassLog) -> Tap:
    inside = _calls_in(frame, log)
    first = log.calls[inside[0]]
    if (first.path, first.number) == frame:
        return Tap(*frame, "output")
    group = first.stack  # the group is no module call: read what the next module receives
    for call in log.calls[inside[-1] + 1 :]:
        if call.stack[: len(group)] != group:
            break
        if call.stack == group and call.input is not None:
            return Tap(call.path, call.number, "input")
    return Tap(*group[-1], "output")


def _is_pool(event: AttentionEvent) -> bool:
    queries, keys = event.attention.shape[-2:]
    return queries == 1 and keys > 1


def _reason(event: AttentionEvent, images: int, tokens: int | None, owner_class: str) -> str:
    """Why maps are not between a block's tokens; empty where they are."""
    *leading, queries, keys = event.attention.shape
    if _is_pool(event):
        return "a pooling query, not token attention"
    if len(leading) != 2 or leading[0] != images:
        return f"attention inside windows ({leading} maps of {queries} × {keys} for {images} images)"
    q, fits = event.attention.q, tokens is None or tokens <= queries <= tokens + MOST_ADDED_TOKENS
    named = any(word in owner_class.lower() for word in _CHANNEL_ATTENTION)
    if named or (not fits and q is not None and q.shape[-1] == tokens):
        return f"channel attention (maps of {queries} × {keys} channels)"
    if not fits:
        return f"attention between {queries} × {keys} positions, not between the block's {tokens} tokens"
    return ""


def _patch_shape(tokens_BND: Tensor | None, tokens: int, prefix: tuple[int, ...], log: PassLog) -> tuple[int, int] | None:
    """Patches and width, without prefix tokens and those that were added on the way.

    Where patches were merged on the way, their grid tells if the prefix is still there.
    """
    if tokens_BND is None:
        return None
    _, here, width = tokens_BND.shape
    patches, without = tokens - len(prefix), here - len(prefix)
    if patches <= here <= max(tokens, patches + MOST_ADDED_TOKENS):
        return patches, width
    merged = not _rectangle(here, log.input) and _rectangle(without, log.input)
    return (without if merged else here), width


def _grid(patches: int, log: PassLog, before: int) -> tuple[int, int] | None:
    """Rows and columns of the patches, as some module made them before block 0 or from the image's shape."""
    for call in reversed(log.calls[:before]):
        x = call.output
        if isinstance(x, Tensor) and x.ndim == 4 and len(x) == log.images:
            for shape in (x.shape[2:], x.shape[1:3]):
                if shape[0] * shape[1] == patches:
                    return int(shape[0]), int(shape[1])
    return _rectangle(patches, log.input)


def _rectangle(patches: int, images: Tensor | None) -> tuple[int, int] | None:
    """The factorisation in which square patches cover the image, up to less than one patch at its borders."""
    if patches < 1 or images is None or images.ndim != 4:
        return None
    height, width = images.shape[-2:]
    shapes = [(rows, patches // rows) for rows in range(1, patches + 1) if patches % rows == 0]
    rows, columns = min(shapes, key=lambda s: abs(s[0] * width - s[1] * height))
    return (rows, columns) if abs(rows * width - columns * height) < max(height, width) else None


def call_frames(taps: Sequence[Tap]) -> frozenset[Frame]:
    """The module calls that a recording with a plan has to watch."""
    return frozenset((tap.path, tap.call) for tap in taps)


def module_class(model: nn.Module, path: str) -> str:
    """The class name of a module, for error texts."""
    return type(model.get_submodule(path)).__name__


def attention_like(model: nn.Module, calls: Sequence[ModuleCall]) -> list[str]:
    """Modules that ran, have parameters and are called attention by their class or name."""
    paths = []
    for path in dict.fromkeys(call.path for call in calls):
        name = f"{path.rpartition('.')[2]} {module_class(model, path)}".lower()
        if ("attn" in name or "attention" in name) and next(model.get_submodule(path).parameters(), None) is not None:
            paths.append(path)
    return paths
