"""Records a model inside a `with`: checks that the capture is right, and leaves nothing behind."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_unflatten

from collapse_probe.capture.attention_operators import OperatorCall, tensors_in
from collapse_probe.capture.blocks import notes_beside, nothing_heard
from collapse_probe.capture.discovery import (
    as_tokens,
    call_frames,
    check_and_sketch,
    errors_of,
    make_plan,
    nonfinite_place,
    patch_shape,
    read_tap,
    steady_at,
)
from collapse_probe.capture.layers import frame_of, is_attention, read_layers
from collapse_probe.capture.plan import Plan, SelfCheck, Tap
from collapse_probe.capture.recorder import AttentionEvent, PassLog, Recorder
from collapse_probe.capture.trace import Trace
from collapse_probe.devices import floating_like, modes_kept
from collapse_probe.distributed import unwrap
from collapse_probe.downloads import first_line
from collapse_probe.errors import CaptureError, ModelError, NoAttentionFoundError, NonFiniteError
from collapse_probe.input_errors import why_failed
from collapse_probe.seeding import random_kept, random_states, seed_all

ROW_SUM_TOLERANCE = {torch.bfloat16: 4e-2, torch.float16: 5e-3}
"""By the type of an eager softmax, whose entries are rounded to it; in float32 the rows sum to one within FLOAT32_ROW_SUM."""
FLOAT32_ROW_SUM = 1e-4
OUTPUT_TOLERANCE = {torch.bfloat16: 5e-2, torch.float16: 1e-2}
FLOAT32_TOLERANCE = {"highest": 2e-4, "high": 5e-3, "medium": 5e-2}
"""By torch.get_float32_matmul_precision, which may replace float32 by TensorFloat32 or bfloat16."""
UNHEARD = "the model's forward was not called through its own __call__: nothing could be recorded"
MOST_ROWS = 0.5
"""Of the queries of the first block, that change with one patch of the image; where more do, tokens are not told from
channels."""


class Recording:
    """What `record` yields: `last`, the Trace of the newest forward pass, and the model's `plan`."""

    def __init__(self, model: nn.Module, plan: Plan | None, values: bool = False, middles: bool = False) -> None:
        self.model, self.plan, self.middles = model, plan, middles
        self._last: Trace | None = None
        self.recorder = Recorder(model, self._on_forward, values=values)
        if plan is not None:
            self._follow(plan)

    def __repr__(self) -> str:
        held = "nothing recorded yet: call the model inside the `with`" if self._last is None else f".last is {self._last!r}"
        return f"<Recording of {type(self.model).__name__}: {held}>"

    @property
    def last(self) -> Trace:
        """The trace of the newest forward pass; raises CaptureError where there was none."""
        if self._last is None:
            raise CaptureError(
                "no forward pass was recorded: call the model itself, inside the `with`, in the thread that entered it"
            )
        return self._last

    def take(self) -> Trace:
        """`last`, and forget it, so that its memory can go."""
        trace = self.last
        self._last = None
        return trace

    def _follow(self, plan: Plan) -> None:
        self.plan = plan
        taps = [tap for tap in (*plan.taps, *(plan.middles if self.middles else ())) if tap is not None]
        self.recorder.watched, self.recorder.by_hand = call_frames(taps), plan.by_hand

    def before_forward(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """A forward pre-hook of the model: without a plan, make one with noise of the kind of this very input."""
        if self.plan is None and not self.recorder.resting:
            with self.recorder.paused(), modes_kept(model):
                model.eval()
                self._follow(_plan_for(model, args, kwargs))

    def _on_forward(self, log: PassLog) -> None:
        self._last = None
        if self.plan is None:
            raise CaptureError(UNHEARD)
        came = () if log.input is None else tuple(log.input.shape[1:])
        if self.plan.input_shape and came != self.plan.input_shape:
            raise CaptureError(
                f"inputs of shape {list(came)} came, but the plan of this model was made for {list(self.plan.input_shape)} "
                "(channels, height, width); make a plan for this shape, and give every batch in it"
            )
        attention = read_layers(self.plan, log)

        def read(tap: Tap | None) -> Tensor | None:
            return None if tap is None else as_tokens(read_tap(tap, log), log.images, tap.layout)

        tokens = tuple(map(read, self.plan.taps))
        middles = tuple(map(read, self.plan.middles)) if self.middles else ()
        self._last = Trace(self.plan, log.images, tokens, attention, log.output, middles)


@contextmanager
def record(model: nn.Module, plan: Plan | None = None, *, values: bool = False, middles: bool = False) -> Iterator[Recording]:
    """Record the tokens and attention of every block of `model` in each forward pass inside the `with`.

    Without a `plan` (from `discover_plan`) the first forward pass makes one: before it, the model runs on noise of the shape
    and type of its input, in eval mode, with the random numbers left as they were. With `values` each trace also holds what the
    maps multiply (`trace.attention[layer].v`), with `middles` the stream between attention and MLP (`trace.middles[block]`).
    Raises NoAttentionFoundError or CaptureError where attention cannot be captured.
    """
    model = unwrap(model)
    check_module(model)
    recording = Recording(model, plan, values, middles)
    with recording.recorder.attached():
        hook = model.register_forward_pre_hook(recording.before_forward, with_kwargs=True) if plan is None else None
        try:
            yield recording
        finally:
            if hook is not None:
                hook.remove()


def discover_plan(
    model: nn.Module,
    size: tuple[int, int] = (224, 224),
    channels: int = 3,
    seed: int = 0,
    *,
    blocks: str | None = None,
) -> Plan:
    """Run two noise images [2, channels, *size] through the model, plainly and captured; check the capture.

    `blocks` is a pattern (`stages.*.blocks.*`) for the paths of the modules that are blocks, where these are not found. The
    outputs must be equal bit for bit, rows of every softmax must sum to one, and A·V and the logsumexp must agree with what
    each fused kernel returned. A pass in which the second image is another one tells whose maps are whose, and in a pass over
    three images they must be read in the same way. All passes draw the same random numbers, and leave the generators as they
    were. Raises CaptureError with the number where anything disagrees, ModelError where the model itself fails, and
    NonFiniteError where the model's numbers are NaN or infinite.
    """
    model = unwrap(model)
    check_module(model)
    images, other = (noise(model, size, channels, s) for s in (seed, seed + 1))
    return _probe(model, (images,), {}, (torch.stack([images[0], other[1]]),), {}, seed, blocks)


def plan_again(model: nn.Module, plan: Plan, size: tuple[int, int] = (224, 224), channels: int = 3, seed: int = 0) -> Plan:
    """The plan of a model made as the one that `plan` is of, but with other weights: checked in one pass, not found in four.

    In a captured pass over two noise images [2, channels, *size] the same attention must run in the same places, with the same
    prefix tokens, and agree with this model's own kernels as in `discover_plan`. Raises CaptureError where it does not, and
    NonFiniteError.
    """
    model, logs = unwrap(model), list[PassLog]()
    check_module(model)
    with torch.inference_mode(False), torch.no_grad(), _seeded(model, seed), _thorough(model, logs):
        output = model(noise(model, size, channels, seed))
    if not logs:
        raise CaptureError(UNHEARD)
    _check_finite(model, logs[0], output)
    read_layers(plan, logs[0])
    for tap, expected in zip(plan.taps, plan.patch_shapes, strict=True):
        tokens = as_tokens(read_tap(tap, logs[0]), logs[0].images, tap.layout)
        if expected is not None and patch_shape(tokens, plan.tokens, plan.prefix, logs[0]) != expected:
            raise CaptureError(f"the tokens at the {tap.side} of {tap.path} are others than {expected} (patches, width)")
    if plan.patch_shapes[:1] not in ((), (None,)):
        prefix = tuple(i for i, same in enumerate(steady_at(plan.taps[0], logs[0]) or ()) if same)
        if prefix != plan.prefix:
            raise CaptureError(f"the prefix tokens are {prefix}, not {plan.prefix}")
    return replace(plan, check=self_check(logs[0].events))


def check_module(model: nn.Module) -> None:
    """Raise CaptureError for a module in which nothing can be heard."""
    kind = type(model).__name__
    if isinstance(model, torch.jit.ScriptModule):
        raise CaptureError(
            f"{kind} is a TorchScript module, in which attention cannot be heard; give the model it was made from"
        )
    if any(weight.is_meta for weight in (*model.parameters(), *model.buffers())):
        raise CaptureError(f"{kind} has weights on the meta device, which hold no numbers; load or initialise them first")


def _probe(
    model: nn.Module,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    other_args: tuple[Any, ...],
    other_kwargs: dict[str, Any],
    seed: int = 0,
    blocks: str | None = None,
    nested: bool = False,
) -> Plan:
    """The plan of a model from passes over two images, and over two of which the second is another one."""
    logs: list[PassLog] = []

    def run(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, bool]:
        with _seeded(model, seed):
            before = random_states()
            return model(*args, **kwargs), not same(random_states(), before)

    def recorded(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        with _thorough(model, logs, nested):
            return run(args, kwargs)[0]

    with torch.inference_mode(False), torch.no_grad():
        try:
            plain, random = run(args, kwargs)
        except Exception as error:
            raise ModelError(why_failed(model, next(tensors_in((*args, *kwargs.values())), torch.empty(0)), error)) from error
        captured = recorded(args, kwargs)
        if not logs:
            raise CaptureError(UNHEARD)
        _check_finite(model, logs[0], plain)
        if not same(plain, captured):
            if same(plain, run(args, kwargs)[0]):
                why = "the recording changed the model's output; please report this model"
            else:
                why = "the model does not give the same output for the same images and the same random seed"
            raise CaptureError(f"two passes over the same images differ: {why}")
        if random and model.training:
            raise CaptureError("the model is in training mode and draws at random (dropout or random drops): call eval() first")
        recorded(other_args, other_kwargs)
    plan = _plan_of(model, logs[0], logs[1], blocks)
    if doubtful := _as_many_channels_as_tokens(model, plan, logs[0]):
        with torch.inference_mode(False), torch.no_grad():
            recorded(*_one_patch_changed(plan, args, kwargs))
        plan = _without_channels(plan, doubtful, logs[0], logs[-1])
    args, kwargs = _three_images((args, kwargs), (other_args, other_kwargs))
    plan = _at_another_batch_size(model, plan, args, kwargs, nested)
    drawn = "the model draws random numbers in eval mode too: what it shows of an image changes from pass to pass"
    return replace(plan, notes=(*plan.notes, drawn)) if random else plan


def _thorough(model: nn.Module, logs: list[PassLog], nested: bool = False) -> AbstractContextManager[Recorder]:
    """Record passes into `logs` with all that a plan needs, each attention checked against its kernel."""
    return Recorder(model, logs.append, thorough=True, on_operator=check_and_sketch).attached(nested)


def _check_finite(model: nn.Module, log: PassLog, output: Any) -> None:
    if place := nonfinite_place(log, output):
        raise NonFiniteError(
            f"{type(model).__name__} gives NaN or infinite numbers for the probe's noise images: {place}; check its "
            "weights and its precision",
            place,
        )


@contextmanager
def _seeded(model: nn.Module, seed: int) -> Iterator[None]:
    """Seed what a model may draw from, on its device too, and leave the generators as they were."""
    with random_kept(floating_like(model).device):
        seed_all(seed)
        yield


def _three_images(first: Any, second: Any) -> Any:
    """The probe's input, and one image more."""
    leaves, spec = tree_flatten(first)
    both = [
        torch.cat([x, y[1:]]) if isinstance(x, Tensor) and x.ndim and len(x) == 2 else x
        for x, y in zip(leaves, tree_flatten(second)[0], strict=True)
    ]
    return tree_unflatten(both, spec)


def _at_another_batch_size(model: nn.Module, plan: Plan, args: tuple[Any, ...], kwargs: dict[str, Any], nested: bool) -> Plan:
    """The plan without layers whose maps are read otherwise when a third image joins: attention between images, say."""
    logs: list[PassLog] = []

    def shapes_alone(call: OperatorCall, events: list[AttentionEvent]) -> None:
        for event in events:
            event.sketch()

    with torch.inference_mode(False), torch.no_grad(), _seeded(model, 0):
        try:
            with Recorder(model, logs.append, by_hand=plan.by_hand, on_operator=shapes_alone).attached(nested):
                model(*args, **kwargs)
        except Exception as error:  # a model that takes two images alone
            why = f"the model did not run on three images ({first_line(error)})"
            note = f"{why}: whether its maps follow the number of images could not be checked"
            return replace(plan, notes=(*plan.notes, note))
    layers = []
    for layer in plan.layers:
        try:
            read_layers(replace(plan, layers=(replace(layer, reason=""),)), logs[0])
            layers.append(layer)
        except CaptureError:
            why = layer.reason or "its maps do not follow the images of a batch: another number of images gives other ones"
            layers.append(replace(layer, reason=why, windows=1, partition="", parts=()))
    there = [bool(layer.parts) for layer in layers if layer.on_axis and layer.block is not None]
    adjacent = tuple(fed and all(pair) for fed, pair in zip(plan.adjacent, itertools.pairwise(there), strict=True))
    return replace(plan, layers=tuple(layers), adjacent=adjacent)


def _as_many_channels_as_tokens(model: nn.Module, plan: Plan, log: PassLog) -> list[int]:
    """The layers whose maps could run over channels by their shape: a head is as wide as there are queries.

    Not those of a class that attends between tokens elsewhere in the model, where the numbers differ.
    """
    sure, doubtful = set(), []
    for index in plan.token_layers:
        layer = plan.layers[index]
        calls = [e.attention for e in log.events if frame_of(e) == layer.parts[0].frame]
        widths = {a.q.shape[-1] for a in calls if a.q is not None}
        if not widths and layer.block is not None:  # of what enters the block, or leaves it
            around = [plan.width, *(shape[1] for shape in plan.patch_shapes[layer.block : layer.block + 2] if shape)]
            widths = {width // max(layer.heads, 1) for width in around}
        if layer.queries == layer.keys and layer.queries in widths:
            doubtful.append(index)
        else:
            sure.add(type(model.get_submodule(layer.owner)))
    return [i for i in doubtful if type(model.get_submodule(plan.layers[i].owner)) not in sure]


def _one_patch_changed(plan: Plan, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The probe's input with other noise in the first patch of the second image."""
    rows, columns = plan.grid or (2, 2)

    def one(x: Any) -> Any:
        if not isinstance(x, Tensor) or x.ndim != 4 or not x.is_floating_point():
            return x
        changed = x.clone()
        changed[1, :, : x.shape[2] // rows, : x.shape[3] // columns] *= -1
        return changed

    leaves, spec = tree_flatten((args, kwargs))
    changed: tuple[tuple[Any, ...], dict[str, Any]] = tree_unflatten([one(x) for x in leaves], spec)
    return changed


def _without_channels(plan: Plan, doubtful: list[int], log: PassLog, near: PassLog) -> Plan:
    """The plan without layers whose maps change everywhere with one patch, before anything mixed the tokens: channels do."""
    first = plan.layers[doubtful[0]]
    rows = []
    for before, after in zip(log.events, near.events, strict=True):
        if frame_of(before) == first.parts[0].frame:
            moved = (before.sample[0] != after.sample[0]).any(-1)
            rows.append(moved.flatten(0, -2).any(0).float().mean())
    if rows and 0 < float(max(rows)) <= MOST_ROWS:
        return plan
    why = (
        f"its maps of {first.queries} × {first.keys} may be of tokens or of channels, of which there are as many; "
        "probe it with images of another size"
    )
    layers = [replace(layer, reason=why) if i in doubtful else layer for i, layer in enumerate(plan.layers)]
    return replace(plan, layers=tuple(layers))


def _plan_for(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Plan:
    """The plan for a caller's own input: noise of the same shapes and types, two images of it, in place of its numbers."""
    leaves, spec = tree_flatten((args, kwargs))
    first = next((x for x in leaves if isinstance(x, Tensor) and x.is_floating_point() and x.ndim > 1), None)
    if any(isinstance(x, (list, tuple)) and len({y.shape for y in x if isinstance(y, Tensor)}) > 1 for x in args):
        why = (
            "images of several sizes in one call are packed or nested in the model, and its maps cannot be told apart by image"
        )
        raise CaptureError(f"{why}; give images of one size, as one tensor")
    if first is None:
        raise CaptureError("the model was called without a tensor of images: attention of its images cannot be told apart")
    count = len(first)
    if any(isinstance(x, Tensor) and x.is_nested for x in leaves):
        raise CaptureError("nested tensors cannot be captured: give a padded batch")

    def like(seed: int, noisy: bool) -> Any:
        def one(x: Any) -> Any:
            if not isinstance(x, Tensor) or x.ndim == 0 or len(x) != count:
                return x
            if noisy and x.is_floating_point():
                return _two(x.shape[1:], x, seed)
            return x[:2] if count > 1 else x[:1].expand(2, *x.shape[1:])

        return tree_unflatten([one(x) for x in leaves], spec)

    def mixed(a: Any, b: Any) -> Any:
        flat_a, flat_b = (tree_flatten(x)[0] for x in (a, b))
        both = [
            torch.stack([x[0], y[1]])
            if isinstance(x, Tensor) and x is not y and x.is_floating_point() and x.ndim and len(x) == 2
            else x
            for x, y in zip(flat_a, flat_b, strict=True)
        ]
        return tree_unflatten(both, spec)

    (args_one, kwargs_one), two = like(0, True), like(1, True)
    args_two, kwargs_two = mixed((args_one, kwargs_one), two)
    return _probe(model, args_one, kwargs_one, args_two, kwargs_two, nested=True)


def noise(model: nn.Module, size: tuple[int, int], channels: int, seed: int) -> Tensor:
    """Two seeded noise images on the model's device and in its dtype."""
    return _two((channels, *size), floating_like(model), seed)


def _two(shape: Sequence[int], like: Tensor, seed: int) -> Tensor:
    """Two inputs of seeded noise, on the device and in the dtype of a tensor."""
    return torch.randn(2, *shape, generator=torch.Generator().manual_seed(seed)).to(like.device, like.dtype)


def same(a: Any, b: Any) -> bool:
    """Whether two model outputs hold the same tensors, bit for bit."""
    if isinstance(a, Tensor):
        return isinstance(b, Tensor) and torch.equal(a, b)
    if isinstance(a, dict):
        return isinstance(b, dict) and a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return isinstance(b, (list, tuple)) and len(a) == len(b) and all(map(same, a, b))
    return True


def _plan_of(model: nn.Module, log: PassLog, again: PassLog, blocks: str | None = None) -> Plan:
    """The plan of a thorough recording, after every check that it can be trusted."""
    heard = [event for event in log.events if is_attention(event, log) or event.attention.shape[-1] > 1]
    if not heard:
        raise NoAttentionFoundError(nothing_heard(model, log))
    if [(frame_of(a), a.attention.shape) for a in log.events] != [(frame_of(b), b.attention.shape) for b in again.events]:
        raise CaptureError(
            "another image made the model run other attention calls; a model whose depth depends on the data (early exit, "
            "random drops) cannot be analysed"
        )
    plan = make_plan(model, log, again, self_check(log.events), blocks)
    if not plan.map_layers:
        owner = heard[0].attention.owner or type(model).__name__
        reasons = "; ".join(dict.fromkeys(layer.reason for layer in plan.layers if layer.reason))
        way_out = "name the paths of the blocks by a pattern (blocks_pattern, --blocks-pattern 'stages.*.*')"
        if not heard[0].attention.owner:
            way_out = "it ran in no module that the model registers: keep the blocks in an nn.ModuleList"
        raise NoAttentionFoundError(
            f"attention was found in {owner}, but in no block that attends between its own tokens"
            + (f" ({reasons})" if reasons else f"; {way_out}")
        )
    return replace(plan, notes=(*plan.notes, *notes_beside(model, log, plan)))


def self_check(events: list[AttentionEvent]) -> SelfCheck:
    worst = [math.nan] * 3
    for event in events:
        errors = event.errors or errors_of(event)
        a = event.attention
        kind = a.q.dtype if a.q is not None else torch.float32
        tolerance = OUTPUT_TOLERANCE.get(kind, FLOAT32_TOLERANCE[torch.get_float32_matmul_precision()])
        rows = FLOAT32_ROW_SUM if a.probs is None else ROW_SUM_TOLERANCE.get(a.probs.dtype, FLOAT32_ROW_SUM)
        if errors[0] > rows or errors[1] > tolerance or errors[2] > tolerance:
            raise CaptureError(
                f"the captured attention of {a.owner or 'the model'} is not the model's: rows sum to one within "
                f"{errors[0]:.1e}, A·V agrees with the kernel within {errors[1]:.1e}, the logsumexp within {errors[2]:.1e}; "
                "please report this model"
            )
        worst = [
            new if math.isnan(old) else max(old, new) if not math.isnan(new) else old
            for old, new in zip(worst, errors, strict=True)
        ]
    return SelfCheck(*worst)
