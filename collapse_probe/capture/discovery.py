"""From the log of one forward pass to the plan: whose attention it is, where tokens are read, whether it is the model's."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from collapse_probe.capture.attention_operators import OperatorCall, tensors_in
from collapse_probe.capture.blocks import Span, block_paths, chains, middle_tap, unheard_blocks
from collapse_probe.capture.layers import (
    MOST_ADDED_TOKENS,
    attends_elsewhere,
    by_blocks,
    call_groups,
    cross_attention,
    frame_of,
    is_attention,
    is_pool,
    layer_of,
)
from collapse_probe.capture.plan import Frame, Layer, Plan, SelfCheck, Tap
from collapse_probe.capture.recorder import AttentionEvent, ModuleCall, PassLog, steady_tokens
from collapse_probe.capture.softmax_tracking import BY_HAND
from collapse_probe.capture.trace import expand_heads
from collapse_probe.errors import CaptureError

CHECKED_ROWS = 8
HIDDEN = -60.0
"""A logit below which a key has no weight that float32 could hold beside others; masks add −100, the type's least number or
−∞."""
LONGEST_PATCH = 4
"""How many times as long as wide a patch may be, for a module's output to be taken for the grid of patches."""
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


# ---- the plan ----


def make_plan(model: nn.Module, log: PassLog, again: PassLog, check: SelfCheck, pattern: str | None = None) -> Plan:
    """Read the log of one thorough forward pass over two different images into a Plan.

    In the pass `again` the second image was another one.
    """
    groups = call_groups(log, again)
    paths = block_paths(model, log, [group.frame[0] for group in groups], pattern)
    around = {id(group): _block_call(group.events[0], paths[group.frame[0]]) for group in groups}
    unheard = unheard_blocks(model, log, [f for f in around.values() if f is not None])
    heard = [f for group in groups if (f := around[id(group)]) is not None and not is_pool(group)]
    started = {call: i for i, call in enumerate((c.path, c.number) for c in log.calls)}
    frames = sorted(dict.fromkeys([*heard, *unheard]), key=lambda f: started[_first_call(f, log)])
    blocks, feeds = chains(frames, log)
    places = {*blocks, *(f for f in around.values() if f)}
    inputs = {f: _tap(model, f, _input_place(f, log), log) for f in places}
    after = {f: _tap(model, f, _output_place(f, log), log) for f in places}
    layers: list[Layer] = []
    for group in groups:
        frame = around[id(group)]
        block = blocks.index(frame) if frame in blocks and not is_pool(group) else None
        before, later = (_lengths_at(inputs[frame], log), _lengths_at(after[frame], log)) if frame else ([], [])
        before += [n for n in [_own_length(group.frame, log)] if n is not None and n not in before]
        entering = _tokens_at(inputs[frame], log) if frame else None
        width = 0 if entering is None else entering.shape[2]
        layer = layer_of(model, group, block, before, later[0] if later else None, width)
        if not layer.reason and attends_elsewhere(group, log):
            layer = replace(layer, reason=cross_attention(layer.queries, layer.keys))
        layers.append(layer)
    layers += [
        Layer(path, number, blocks.index((path, number)), "", 0, 0, 0, reason=f"not captured: {why}")
        for (path, number), why in unheard.items()
    ]
    layers = by_blocks(layers, blocks)
    axis = [layer for layer in layers if layer.on_axis]
    heard_at = [bool(layer.parts) for layer in axis]
    adjacent = tuple(
        heard_at[i] and heard_at[i + 1] and a.block is not None and b.block == a.block + 1 and feeds[a.block]
        for i, (a, b) in enumerate(itertools.pairwise(axis))
    )
    outputs = [after[frame] for frame in blocks]
    taps = (inputs[blocks[0]], *outputs) if blocks else ()
    first = _tokens_at(taps[0], log) if taps else None
    steady = steady_at(taps[0], log) if taps else None
    latents = _of_latents(blocks, feeds, inputs, log)
    prefix = () if steady is None or latents[0] else tuple(i for i, same in enumerate(steady) if same)
    tokens, width = (0, 0) if first is None else (first.shape[1], first.shape[2])
    event_bytes = sum(event.held_bytes() for event in log.events)
    called = [path for path, _ in blocks]
    titles = [f"{path} (call {number + 1})" if called.count(path) > 1 else path for path, number in blocks]
    images = log.input if log.input is not None and log.input.ndim == 4 else None
    grid = _grid(tokens - len(prefix), log, _calls_in(blocks[0], log)[0]) if blocks and not latents[0] else None
    shapes = tuple(
        None if of_latents else patch_shape(_tokens_at(tap, log), tokens, prefix, log)
        for tap, of_latents in zip(taps, [*latents[:1], *latents], strict=True)
    )
    return Plan(
        blocks=tuple(titles),
        layers=tuple(layers),
        taps=taps,
        prefix=prefix,
        tokens=tokens,
        width=width,
        patch_shapes=shapes,
        grid=grid,
        bytes_per_image=event_bytes // max(log.images, 1) + len(taps) * tokens * width * 4,
        check=check,
        notes=tuple(_notes(log, layers, latents, feeds, titles)),
        image_size=None if images is None else (images.shape[-2], images.shape[-1]),
        adjacent=adjacent,
        frames=tuple(dict.fromkeys(frame_of(event) for event in log.events)),
        input_shape=() if log.input is None else tuple(log.input.shape[1:]),
        by_hand=any(event.attention.operation == BY_HAND for event in log.events),
        middles=tuple(middle_tap(f, _call_at(inputs[f], log), inputs[f].layout, log) for f in blocks),
    )


def _notes(
    log: PassLog, layers: Sequence[Layer], latents: Sequence[bool], feeds: Sequence[bool], blocks: Sequence[str]
) -> list[str]:
    notes = []
    for event in log.events:
        if not is_attention(event, log) and event.attention.shape[-1] == 1:
            notes.append(f"{event.attention.owner or 'the model'} computes a gate over one element, which is no attention")
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
            f"{merged[0].softmaxes} softmax maps: `weights` is what they become, `probs` is one of them alone"
        )
    lost = [e for e in log.events if e.lost]
    if lost:
        owners = ", ".join(dict.fromkeys(e.attention.owner for e in lost[:3]))
        notes.append(
            f"the softmax in {owners}{' and others' if len(lost) > 3 else ''} runs over {lost[0].lost} key more than "
            "multiplies values: the rows of what is left sum to less than one, and entropy is taken of these"
        )
    masked = list(dict.fromkeys(e.attention.owner for e in log.events if e.masked))
    if masked:
        notes.append(
            f"{len(masked)} attention layers hide keys by a mask ({masked[0] or 'the model'}"
            f"{' and others' if masked[1:] else ''}): where two blocks hide the same ones that is agreement too, in kappa, "
            "and with no training; a share of log N counts the hidden keys in N"
        )
    if any(latents):
        first = blocks[latents.index(True)]
        notes.append(
            f"the tokens of {first} and the blocks that it feeds do not come from the image (latents): they are no patches"
        )
    if not all(feeds):
        stacks = [0, *(i + 1 for i, fed in enumerate(feeds) if not fed)]
        parts = [" … ".join(dict.fromkeys((blocks[a], blocks[b - 1]))) for a, b in itertools.pairwise([*stacks, len(blocks)])]
        notes.append(
            f"{len(stacks)} stacks of blocks do not feed one another and are no neighbours: {'; '.join(parts)}; what is said "
            "of the last block is said of the last stack"
        )
    return list(dict.fromkeys(notes))


def _first_call(frame: Frame, log: PassLog) -> Frame:
    call = log.calls[_calls_in(frame, log)[0]]
    return call.path, call.number


def steady_at(tap: Tap, log: PassLog) -> list[bool] | None:
    """Which positions where the tap points are the same for different images, and so do not come from the image."""
    call = _call_at(tap, log)
    return None if call is None else steady_tokens(call.input, log.images) if call.steady is None else call.steady


def _call_at(tap: Tap, log: PassLog) -> ModuleCall | None:
    return next((call for call in log.calls if (call.path, call.number) == (tap.path, tap.call)), None)


def read_tap(tap: Tap, log: PassLog) -> object:
    """The tensor or tuple of tensors that passed where the tap points; CaptureError where nothing did."""
    if (call := _call_at(tap, log)) is not None:
        return call.input if tap.side == "input" else call.output
    raise CaptureError(
        f"module {tap.path!r} did not run in this forward pass as it did in the probe: a depth that depends "
        "on the data cannot be analysed"
    )


def _tokens_at(tap: Tap, log: PassLog) -> Tensor | None:
    return as_tokens(read_tap(tap, log), log.images, tap.layout)


def _of_latents(blocks: Sequence[Frame], feeds: Sequence[bool], inputs: dict[Frame, Tap], log: PassLog) -> list[bool]:
    """For each block whether its tokens are latents: a sequence that is the same for all images until it attends to them."""
    of_latents: list[bool] = []
    for i, frame in enumerate(blocks):
        if i and feeds[i - 1]:
            of_latents.append(of_latents[-1])
            continue
        steady, tokens = steady_at(inputs[frame], log), _lengths_at(inputs[frame], log)
        reads, before = Span.of(*frame, log).read, log.calls[: _calls_in(frame, log)[0]]
        attending = {f for event in log.events for f in event.stack}
        readers = [c for c in before if c.steady and all(c.steady) and c.bit & reads and (c.path, c.number) in attending]
        of_latents.append(bool(steady and all(steady)) or any(len(c.steady or ()) in tokens for c in readers))
    return of_latents


def _lengths_at(tap: Tap, log: PassLog) -> list[int]:
    """How many tokens pass where the tap points, in all; and in each group, where they come in groups [B · groups, N, D]."""
    value = read_tap(tap, log)
    if (tokens_BND := as_tokens(value, log.images, tap.layout)) is not None:
        return [tokens_BND.shape[1]]
    for x in value if isinstance(value, tuple) else (value,):
        if isinstance(x, Tensor) and x.ndim == 3 and log.images and len(x) % log.images == 0:
            return [len(x) // log.images * x.shape[1], x.shape[1]]
    return []


def _own_length(frame: Frame, log: PassLog) -> int | None:
    """How many tokens enter the attention's own module: fewer than the block's, where that carries several streams of them."""
    x = next((call.input for call in log.calls if (call.path, call.number) == frame), None)
    return x.shape[1] if isinstance(x, Tensor) and not x.is_nested and x.ndim == 3 and len(x) == log.images else None


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
    value = read_tap(place, log)
    layout = layout_of(model.get_submodule(frame[0]), value, log.images)
    if len(layout) == 4 and log.input is not None and log.input.ndim == 4:
        sides = next(x.shape for x in (value if isinstance(value, tuple) else (value,)) if _fits(x, layout, log.images))
        rows, columns = sides[layout.index("h")], sides[layout.index("w")]
        if not _like_the_image(rows, columns, log.input):
            layout = ""  # a map of something else, such as tokens and streams
    return replace(place, layout=layout)


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


def patch_shape(tokens_BND: Tensor | None, tokens: int, prefix: tuple[int, ...], log: PassLog) -> tuple[int, int] | None:
    """Patches and width, without prefix tokens and those that were added on the way in front; None where the patches cannot be
    told from other tokens.

    Where patches were merged on the way, their grid tells if the prefix is still there.
    """
    if tokens_BND is None:
        return None
    _, here, width = tokens_BND.shape
    patches, without = tokens - len(prefix), here - len(prefix)
    if here in (tokens, patches):
        return patches, width
    if tokens < here <= patches + MOST_ADDED_TOKENS:
        joining = [call.steady for call in log.calls if call.steady and len(call.steady) == here]
        return None if any(any(steady[here - patches :]) for steady in joining) else (patches, width)
    if not prefix:  # where patches were merged they form a grid again; with a token that joined them they form none
        return (here, width) if _rectangle(here, log.input) else None
    if max(prefix) >= here:  # they stood behind the patches: none of them is there any more
        return None
    return (without, width) if not _rectangle(here, log.input) and _rectangle(without, log.input) else None


def _grid(patches: int, log: PassLog, before: int) -> tuple[int, int] | None:
    """Rows and columns of the patches, as some module made them before block 0 or from the image's shape."""
    if log.input is not None and any(_is_film(call.input, log.input) for call in log.calls[:before]):
        return None
    shapes = []
    for call in reversed(log.calls[:before]):
        x = call.output
        if isinstance(x, Tensor) and x.ndim == 4 and len(x) == log.images:
            sides = [(int(rows), int(columns)) for rows, columns in (x.shape[2:], x.shape[1:3])]
            shapes += [(rows, columns) for rows, columns in sides if rows * columns == patches]
    if shapes and log.input is not None and log.input.ndim == 4:
        longer = [_longer_side(rows, columns, log.input) for rows, columns in shapes]
        if min(longer) <= LONGEST_PATCH:
            return shapes[longer.index(min(longer))]
    return _rectangle(patches, log.input)


def _is_film(x: Tensor | None, images: Tensor) -> bool:
    """Whether a module took the images as the frames of films: the patches of several frames form no rectangle."""
    return x is not None and x.ndim == 5 and x.shape[-2:] == images.shape[-2:]


def _longer_side(rows: int, columns: int, images: Tensor) -> float:
    """How many times the longer side of a patch is the shorter one, where a grid of patches covers the images."""
    ratio = images.shape[-2] * columns / (rows * images.shape[-1])
    return max(ratio, 1 / ratio)


def _like_the_image(rows: int, columns: int, images: Tensor) -> bool:
    return _longer_side(rows, columns, images) <= LONGEST_PATCH


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


# ---- the self-check ----


def check_and_sketch(call: OperatorCall, events: list[AttentionEvent]) -> None:
    """Check an event while its tensors are there, then keep only their shapes: a probe holds no batch of maps."""
    for event in events:
        event.nonfinite, event.masked = _nonfinite_heads(event), _is_masked(event)
        event.errors = (0.0, math.nan, math.nan) if event.nonfinite else errors_of(event)
        event.sketch()


def _is_masked(event: AttentionEvent) -> bool:
    """Whether some keys are hidden from some queries: by the kernel's mask, or by logits that leave them no weight."""
    a = event.attention
    if a.causal or a.q is None:
        return a.causal or any(bool((logits < HIDDEN).any()) for logits in event.sample)
    return a.bias is not None and bool((~a.bias if a.bias.dtype == torch.bool else a.bias < HIDDEN).any())


@torch.no_grad()
def errors_of(event: AttentionEvent) -> tuple[float, float, float]:
    """Errors of the rows' sums, of A·V and of the logsumexp; NaN where there is nothing to compare with."""
    a, kernel, output, logsumexp = event.attention, event.kernel, math.nan, math.nan
    if len(a.shape) != 4:
        return 0.0, output, logsumexp
    if a.q is None:
        assert a.probs is not None
        return 0.0 if event.lost else _row_error(a.probs.float()), output, logsumexp
    queries = a.shape[-2]
    rows = slice(0, queries if kernel is not None and kernel.finish else min(CHECKED_ROWS, queries))
    logits = a.logits(rows=rows)
    blind = (logits == -torch.inf).all(-1)  # queries that may see nothing
    probs = torch.softmax(logits, -1).masked_fill(blind[..., None], 0.0)
    if a.logsumexp is not None:
        expected = a.logsumexp[:, :, rows]
        logsumexp = _worst((torch.logsumexp(logits, -1) - expected) / expected.abs().clamp_min(1.0), blind)
    if kernel is not None:
        mixed, expected = kernel.mixed(probs), kernel.out.float()
        if kernel.finish is not None:
            mixed, blind = kernel.finish(mixed.to(kernel.value.dtype)).float(), blind.any(1)
        else:
            expected = expected[:, :, rows]
        largest = expected.masked_fill(blind[..., None], 0.0).abs().max()
        output = _worst(mixed - expected, blind) / max(float(largest), 1e-12)
    return _row_error(probs), output, logsumexp


def _row_error(probs: Tensor) -> float:
    sums = probs.sum(-1)
    return _worst(sums - 1, (sums == 0) | ~torch.isfinite(sums))


def _worst(difference: Tensor, blind: Tensor) -> float:
    """The largest of some differences, but for the queries that may see nothing, of which kernels answer as they like."""
    difference = difference[~blind]
    return float(difference.abs().nan_to_num(torch.inf).max()) if difference.numel() else 0.0


@torch.no_grad()
def _nonfinite_heads(event: AttentionEvent) -> tuple[int, ...]:
    """The heads whose products of q and k, or whose maps where these were not captured, are not finite."""
    a = event.attention
    if len(a.shape) != 4:
        return ()
    if a.q is None:
        assert a.probs is not None
        bad = ~torch.isfinite(a.probs).all(-1)
        hidden = bad.all(1, keepdim=True) & ~bad.flatten(1).all(1)[:, None, None]  # a mask hides keys in all heads
        bad = (bad & ~hidden).any(-1)
    else:
        assert a.k is not None
        q, k = (torch.linalg.vector_norm(x.float(), dim=(2, 3)) for x in (a.q, expand_heads(a.k, a.q.shape[1])))
        bad = ~torch.isfinite(q * k * a.scale)  # no logit is larger
        if a.bias is not None and a.bias.is_floating_point():
            bad = bad | (torch.isnan(a.bias) | torch.isposinf(a.bias)).any(-1).any(-1)
    return tuple(torch.nonzero(bad.any(0)).flatten().tolist())


def nonfinite_place(log: PassLog, output: Any) -> str:
    """Where numbers are first seen not to be finite in a pass of the probe; empty where all are."""
    for event in log.events:
        if event.nonfinite:
            what = "map" if event.attention.q is None else "attention logits"
            heads = f"head{'s' if len(event.nonfinite) > 1 else ''} {', '.join(map(str, event.nonfinite))}"
            return f"first in the {what} of {event.attention.owner or 'the model'}, {heads}"
    floating = (x for x in tensors_in((output,)) if x.is_floating_point() and not x.is_nested)
    return "in its output" if any(bool((torch.isnan(x) | torch.isposinf(x)).any()) for x in floating) else ""
