"""From the log of one forward pass to the plan: whose attention it is, and where tokens are read."""

from __future__ import annotations

import fnmatch
import itertools
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

from torch import Tensor, nn

from collapse_probe.capture.layout import axes_of, with_windows
from collapse_probe.capture.plan import HEAD, WINDOW, Axis, Frame, Layer, Part, Plan, SelfCheck, Tap
from collapse_probe.capture.recorder import AttentionEvent, ModuleCall, PassLog, steady_tokens
from collapse_probe.capture.softmax_tracking import BY_HAND, LINEAR
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
_HEAD_COUNTS = ("num_heads", "num_attention_heads", "n_heads", "n_head", "nhead", "heads", "num_head", "nheads")
_PARTITIONS = ("shift", "window", "partition", "dilat", "grid")


# ---- which modules are blocks ----


def block_paths(model: nn.Module, log: PassLog, owners: Sequence[str], pattern: str | None = None) -> dict[str, str | None]:
    """For each attention owner the dotted path of its block, None where nothing around it repeats.

    With a `pattern` (`stages.*.blocks.*`) the block is the innermost module around the attention whose path matches. Otherwise
    it is the innermost child of a container that has a matrix outside all attention owners (its MLP), else the innermost child
    of a container. Where several children of one container inside such a block attend one after the other, these are the
    blocks, and what is around them is a stage. Blocks kept as attributes have no container: then the innermost module with an
    MLP counts.
    """
    modules = dict(model.named_modules(remove_duplicate=False))
    owners = list(dict.fromkeys(owners))
    attention = {id(w) for owner in owners if owner for w in _weights(modules[owner])}

    def has_mlp(path: str) -> bool:
        return any(w.ndim >= 2 and id(w) not in attention for w in _weights(modules[path]))

    paths: dict[str, str | None] = {}
    loose: dict[str, str] = {}
    for owner in owners:
        parts = owner.split(".") if owner else []
        around = [".".join(parts[:n]) for n in range(len(parts), 0, -1)]
        if pattern is not None:
            paths[owner] = next((path for path in around if _matches(path, pattern)), None)
            continue
        children = [path for path in around if isinstance(modules[path.rpartition(".")[0]], _CONTAINERS)]
        found = [path for path in children if has_mlp(path)]
        paths[owner] = next(iter(found or children), None)
        if not children:
            loose[owner] = next((path for path in around if has_mlp(path)), owner)
    if pattern is not None:
        return paths
    for stage in {path for path in paths.values() if path}:
        inside = [owner for owner in owners if paths[owner] == stage]
        below = {owner: child for owner in inside if (child := _child_below(owner, stage, modules)) is not None}
        if len(set(below.values())) > 1 and _one_after_another(list(dict.fromkeys(below.values())), log):
            paths |= below
    classes = Counter(type(modules[path]) for path in dict.fromkeys(loose.values()))
    called = Counter(call.path for call in log.calls)
    for owner, path in loose.items():
        if path and (classes[type(modules[path])] > 1 or called[path] > 1 or not any(paths.values())):
            paths[owner] = path
    return paths


def _matches(path: str, pattern: str) -> bool:
    """Whether a path has as many parts as a pattern, and each fits: `*` stands for one part or a piece of it."""
    parts, wanted = path.split("."), pattern.split(".")
    return len(parts) == len(wanted) and all(map(fnmatch.fnmatchcase, parts, wanted))


def _weights(module: nn.Module) -> Iterator[Tensor]:
    """Parameters and buffers: frozen weights may be kept as buffers."""
    yield from module.parameters()
    yield from module.buffers()


def _child_below(owner: str, stage: str, modules: dict[str, nn.Module]) -> str | None:
    """The outermost child of a container inside a stage that the owner is in or is."""
    parts = owner.split(".")
    for n in range(stage.count(".") + 2, len(parts) + 1):
        if isinstance(modules[".".join(parts[: n - 1])], _CONTAINERS):
            return ".".join(parts[:n])
    return None


def _one_after_another(paths: Sequence[str], log: PassLog) -> bool:
    """Whether each of some modules reads what the one before it gave."""
    spans = [_Span.of(path, None, log) for path in paths]
    return all(later.read & earlier.bits for earlier, later in itertools.pairwise(spans))


@dataclass(frozen=True)
class _Span:
    """The module calls that make up one call of a block, as bits, and the calls whose results they read."""

    bits: int
    read: int

    @classmethod
    def of(cls, path: str, number: int | None, log: PassLog) -> _Span:
        """`number` None: all calls of the module."""
        own = [c for c in log.calls if c.path == path and number in (None, c.number)]
        own = own or [c for c in log.calls if c.path.startswith(path + ".") and number in (None, c.number)]
        bits, read = 0, 0
        for call in own:
            bits, read = bits | call.bit, read | call.read
        return cls(bits, read)


def _chains(frames: Sequence[Frame], log: PassLog) -> tuple[list[Frame], list[bool]]:
    """The blocks with those after one another that feed each other, and for each two whether the first one feeds the second.

    A block feeds another where the other reads what was made from its output, and no further block stands between.
    """
    spans = {frame: _Span.of(*frame, log) for frame in frames}
    before = {f: [e for e in frames if e != f and spans[f].read & spans[e].bits & ~spans[f].bits] for f in frames}
    nearest = {f: [e for e in before[f] if not any(e in before[k] for k in before[f] if k != e)] for f in frames}
    chains: list[list[Frame]] = []
    for frame in frames:
        fed_by = nearest[frame][0] if len(nearest[frame]) == 1 else None
        chain = next((c for c in chains if c[-1] == fed_by), None)
        if chain is None:
            chains.append([frame])
        else:
            chain.append(frame)
    order = [frame for chain in chains for frame in chain]
    return order, [nearest[later] == [earlier] for earlier, later in itertools.pairwise(order)]


# ---- the calls of each module, and how their axes are read ----


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
class _Group:
    """Attention calls of one module call that belong together, the queries of each, and their axes (None: not known)."""

    frame: Frame
    events: list[AttentionEvent]
    queries: tuple[int, ...]
    axes: tuple[Axis, ...] | None


def _groups(log: PassLog, again: PassLog) -> list[_Group]:
    """The attention calls by module call and shape, with their axes; `again` is a pass in which the second image was
    another."""
    by_frame: dict[Frame, list[AttentionEvent]] = {}
    for event in log.events:
        if is_attention(event, log):
            by_frame.setdefault(frame_of(event), []).append(event)
    groups = []
    for frame, events in by_frame.items():
        alike: dict[tuple[int, int, int], list[AttentionEvent]] = {}
        for event in events:
            *lead, queries, keys = event.attention.shape
            alike.setdefault((len(lead), queries, keys), []).append(event)
        for (lead_axes, _, keys), some in list(alike.items()):
            together = [e for e in events if len(e.attention.shape) - 2 == lead_axes and e.attention.shape[-1] == keys]
            lengths = tuple(e.attention.shape[-2] for e in together)
            if (
                some[0] is together[0] and len(together) > 1 and sum(lengths) == keys and 1 not in lengths
            ):  # parts of the queries
                axes = [axes_of(*_samples([e], again)) for e in together]
                if axes[0] is not None and all(a == axes[0] for a in axes):
                    groups.append(_Group(frame, together, lengths, axes[0]))
                    alike = {key: rest for key, rest in alike.items() if rest[0] not in together}
        for (_, queries, _), some in alike.items():
            groups.append(_Group(frame, some, (queries,), axes_of(*_samples(some, again))))
    return sorted(groups, key=lambda group: group.events[0].index)


def _samples(events: Sequence[AttentionEvent], again: PassLog) -> tuple[list[tuple[Tensor, ...]], list[tuple[Tensor, ...]]]:
    return [event.sample for event in events], [again.events[event.index].sample for event in events]


# ---- the plan ----


def make_plan(model: nn.Module, log: PassLog, again: PassLog, check: SelfCheck, pattern: str | None = None) -> Plan:
    """Read the log of one thorough forward pass over two different images into a Plan.

    In the pass `again` the second image was another one.
    """
    groups = _groups(log, again)
    paths = block_paths(model, log, [group.frame[0] for group in groups], pattern)
    around = {id(group): _block_call(group.events[0], paths[group.frame[0]]) for group in groups}
    unheard = unheard_blocks(model, log, [f for f in around.values() if f is not None])
    heard = [f for group in groups if (f := around[id(group)]) is not None and not _is_pool(group)]
    started = {call: i for i, call in enumerate((c.path, c.number) for c in log.calls)}
    frames = sorted(dict.fromkeys([*heard, *unheard]), key=lambda f: started[_first_call(f, log)])
    blocks, feeds = _chains(frames, log)
    inputs = {f: _tap(model, f, _input_place(f, log), log) for f in {*blocks, *(f for f in around.values() if f)}}
    layers: list[Layer] = []
    for group in groups:
        frame = around[id(group)]
        tokens_BND = _tokens_at(inputs[frame], log) if frame else None
        length = None if tokens_BND is None else tokens_BND.shape[1]
        block = blocks.index(frame) if frame in blocks and not _is_pool(group) else None
        layers.append(_layer_of(model, group, block, length, log))
    layers += [
        Layer(path, number, blocks.index((path, number)), "", 0, 0, 0, reason=f"not heard: {why}")
        for (path, number), why in unheard.items()
    ]
    layers = _by_blocks(layers, len(blocks))
    axis = [layer for layer in layers if layer.on_axis]
    heard_at = [bool(layer.parts) for layer in axis]
    adjacent = tuple(
        heard_at[i] and heard_at[i + 1] and a.block is not None and b.block == a.block + 1 and feeds[a.block]
        for i, (a, b) in enumerate(itertools.pairwise(axis))
    )
    outputs = [_tap(model, frame, _output_place(frame, log), log) for frame in blocks]
    taps = (inputs[blocks[0]], *outputs) if blocks else ()
    first = _tokens_at(taps[0], log) if taps else None
    steady = _steady_at(taps[0], log) if taps else None
    latents = steady is not None and all(steady)
    prefix = () if steady is None or latents else tuple(i for i, same in enumerate(steady) if same)
    tokens, width = (0, 0) if first is None else (first.shape[1], first.shape[2])
    event_bytes = sum(event.held_bytes() for event in log.events)
    names = [path for path, _ in blocks]
    images = log.input if log.input is not None and log.input.ndim == 4 else None
    grid = _grid(tokens - len(prefix), log, _calls_in(blocks[0], log)[0]) if blocks and not latents else None
    shapes = tuple(_patch_shape(_tokens_at(tap, log), tokens, prefix, log) for tap in taps)
    return Plan(
        blocks=tuple(f"{path} (call {number + 1})" if names.count(path) > 1 else path for path, number in blocks),
        layers=tuple(layers),
        taps=taps,
        prefix=prefix,
        tokens=tokens,
        width=width,
        patch_shapes=tuple(None for _ in taps) if latents else shapes,
        grid=grid,
        bytes_per_image=event_bytes // max(log.images, 1) + len(taps) * tokens * width * 4,
        check=check,
        notes=tuple(_notes(model, log, layers, latents, feeds, blocks)),
        image_size=None if images is None else (images.shape[-2], images.shape[-1]),
        adjacent=adjacent,
        frames=tuple(dict.fromkeys(frame_of(event) for event in log.events)),
        input_shape=() if log.input is None else tuple(log.input.shape[1:]),
        by_hand=any(event.attention.operation == BY_HAND for event in log.events),
    )


def _layer_of(model: nn.Module, group: _Group, block: int | None, tokens: int | None, log: PassLog) -> Layer:
    """One layer of a group of calls: its heads, its windows, and why it is no attention between a block's tokens."""
    (owner, number), event, (queries, keys) = (
        group.frame,
        group.events[0],
        (sum(group.queries), group.events[0].attention.shape[-1]),
    )
    mixed = any(e.attention.mixed for e in group.events)
    layer = Layer(owner, number, block, event.attention.operation, 0, queries, keys, mixed)
    if group.axes is None:
        why = "its maps cannot be told apart by image: they change with another image than their own"
        return replace(layer, heads=1, reason=why)
    part = Part(group.frame, group.queries, keys, group.axes)
    others = part.of(HEAD)
    if _is_pool(group) or tokens is None or not _has_windows(model, part, owner, tokens, queries):
        why = _reason(group, queries, keys, tokens, module_class(model, owner))
        return replace(layer, heads=others, reason=why, parts=(part,))
    reason = f"attention inside windows ({others} maps of {queries} × {keys} for each image)"
    windows = _windows(model, part, owner, tokens, queries)
    if windows is None:
        return replace(layer, heads=others, reason=reason, parts=(part,))
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
    return folded or len(apart) > 1 or bool(part.axes[0])


def _windows(model: nn.Module, part: Part, owner: str, tokens: int, queries: int) -> tuple[Axis, ...] | None:
    """The axes with the windows told from the heads; None where that is not possible."""
    others = part.of(HEAD)
    stated = _stated_heads(model, owner)
    fewest = max(1, -(-(tokens - MOST_ADDED_TOKENS) // queries))
    counts = [others // n for n in stated if others % n == 0 and others // n >= fewest]
    counts += [n for n in range(fewest, others + 1) if others % n == 0]
    for windows in counts:
        if (axes := with_windows(part.axes, windows)) is not None:
            return axes
    return None


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


def _by_blocks(layers: Sequence[Layer], blocks: int) -> list[Layer]:
    """The layers in the order of their blocks, calls that are one block's heads together, and which of them stand on the
    axis."""
    ordered: list[list[Layer]] = []
    for block in range(blocks):
        inside = [layer for layer in layers if layer.block == block]
        square = any(not layer.reason and layer.queries == layer.keys for layer in inside)
        inside = [
            replace(layer, reason=f"cross attention: {layer.queries} tokens attend to {layer.keys} others")
            if square and not layer.reason and layer.queries != layer.keys
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


def _notes(
    model: nn.Module, log: PassLog, layers: Sequence[Layer], latents: bool, feeds: Sequence[bool], blocks: Sequence[Frame]
) -> list[str]:
    notes = []
    for event in log.events:
        if not is_attention(event, log):
            what = (
                "a gate over one element"
                if event.attention.shape[-1] == 1
                else "linear attention (a softmax of queries or keys)"
            )
            notes.append(f"{event.attention.owner or 'the model'} computes {what}, which has no attention map")
    several = [layer for layer in layers if len(layer.parts) > 1]
    if several:
        owners = ", ".join(part.frame[0] for part in several[0].parts)
        where = f"{len(several)} blocks run several attention calls each, counted as the heads of one map"
        notes.append(f"{where} (in the first one: {owners})")
    merged = [e for e in log.events if e.softmaxes > 1]
    if merged:
        owners = ", ".join(dict.fromkeys(e.attention.owner for e in merged[:3]))
        notes.append(
            f"what multiplies the values in {owners}{' and others' if len(merged) > 3 else ''} is made of "
            f"{merged[0].softmaxes} softmax maps: `weights` is what they become, `probs` is the first of them alone"
        )
    lost = [e for e in log.events if e.lost]
    if lost:
        owners = ", ".join(dict.fromkeys(e.attention.owner for e in lost[:3]))
        notes.append(
            f"the softmax in {owners}{' and others' if len(lost) > 3 else ''} runs over {lost[0].lost} more than "
            "multiplies values (an attention sink): the rows of what multiplies them sum to less than one"
        )
    if latents:
        notes.append("the tokens of the first block do not come from the image (latents): they are no patches")
    if not all(feeds):
        stacks = [0, *(i + 1 for i, fed in enumerate(feeds) if not fed)]
        parts = [
            " … ".join(dict.fromkeys((blocks[a][0], blocks[b - 1][0]))) for a, b in itertools.pairwise([*stacks, len(blocks)])
        ]
        notes.append(f"{len(stacks)} stacks of blocks do not feed one another and are no neighbours: {'; '.join(parts)}")
    return list(dict.fromkeys(notes))


def unheard_blocks(model: nn.Module, log: PassLog, heard: Sequence[Frame]) -> dict[Frame, str]:
    """Calls of modules that are blocks by their class or by what they compute, but in which no attention was heard, and why.

    Candidates are the children of the containers in which blocks that were heard stand, and the modules of their classes.
    """
    paths = {path for path, _ in heard}
    classes = {type(model.get_submodule(path)) for path in paths}
    parents = {path.rpartition(".")[0] for path in paths}
    named = set(attention_like(model, log.calls))
    events = {frame for event in log.events if is_attention(event, log) for frame in event.stack}
    unheard: dict[Frame, str] = {}
    for call in log.calls:
        frame = (call.path, call.number)
        kind = type(model.get_submodule(call.path))
        sibling = call.path.rpartition(".")[0] in parents and isinstance(
            model.get_submodule(call.path.rpartition(".")[0]), _CONTAINERS
        )
        if not call.path or frame in events or frame in heard or not (sibling or kind in classes):
            continue
        if any(path in paths for path in _around(call.path)) or any(path.startswith(call.path + ".") for path in paths):
            continue
        what = _what_ran(log, frame)
        inside = [path for path in named if path == call.path or path.startswith(call.path + ".")]
        if what or (kind in classes and inside):
            where = inside[0] if inside else call.path
            ran = what or "ran without a softmax that multiplies values"
            unheard[frame] = f"{where} ({module_class(model, where)}) {ran}"
    return unheard


def _around(path: str) -> list[str]:
    parts = path.split(".")
    return [".".join(parts[:n]) for n in range(1, len(parts))]


def _what_ran(log: PassLog, frame: Frame) -> str:
    """What a module call computed in place of attention that can be heard; empty where no activations were multiplied."""
    for stack, operator in log.opaque:
        if frame in stack:
            return f"runs inside {operator}, which cannot be recorded"
    for stack, what in log.suspects:
        if frame in stack:
            return f"computes {what}"
    for event in log.events:
        if frame in event.stack:
            return f"computes {LINEAR}" if event.attention.shape[-1] > 1 else ""
    return "multiplies activations, but by no softmax" if frame in log.products else ""


def _first_call(frame: Frame, log: PassLog) -> Frame:
    call = log.calls[_calls_in(frame, log)[0]]
    return call.path, call.number


def _steady_at(tap: Tap, log: PassLog) -> list[bool] | None:
    """Which positions where the tap points are the same for different images, and so do not come from the image."""
    for call in log.calls:
        if (call.path, call.number) == (tap.path, tap.call):
            return steady_tokens(call.input, log.images) if call.steady is None else call.steady
    return None


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


def _is_pool(group: _Group) -> bool:
    return group.queries == (1,) and group.events[0].attention.shape[-1] > 1


def _reason(group: _Group, queries: int, keys: int, tokens: int | None, owner_class: str) -> str:
    """Why maps are not between a block's tokens; empty where they are."""
    if _is_pool(group):
        return "a pooling query, not token attention"
    q, fits = group.events[0].attention.q, tokens is None or tokens <= queries <= tokens + MOST_ADDED_TOKENS
    named = any(word in owner_class.lower() for word in _CHANNEL_ATTENTION)
    if named or (not fits and q is not None and q.shape[-1] == tokens):
        return f"channel attention (maps of {queries} × {keys} channels)"
    if not fits:
        return f"attention between {queries} × {keys} positions, not between the block's {tokens} tokens"
    if tokens is not None and keys > tokens + MOST_ADDED_TOKENS:
        return f"cross attention: the block's {tokens} tokens attend to {keys} others"
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
