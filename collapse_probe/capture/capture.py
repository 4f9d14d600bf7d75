"""Listen to a model for the length of a `with`: prove that it is heard rightly, and leave nothing behind."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from collapse_probe.capture.discovery import (
    as_tokens,
    attention_like,
    call_frames,
    heads_queries_keys,
    make_plan,
    module_class,
    read_tap,
    regular,
    sizes_of,
)
from collapse_probe.capture.operators import tensors_in
from collapse_probe.capture.plan import Plan, SelfCheck
from collapse_probe.capture.recorder import AttentionEvent, Recorder, Recording, ear
from collapse_probe.capture.trace import Trace
from collapse_probe.distributed import unwrap
from collapse_probe.errors import CaptureError, ModelError, NoAttentionFoundError

ROW_SUM_TOLERANCE = 1e-4
OUTPUT_TOLERANCE = {torch.bfloat16: 5e-2, torch.float16: 1e-2}
FLOAT32_TOLERANCE = {"highest": 2e-4, "high": 5e-3, "medium": 5e-2}
"""By torch.get_float32_matmul_precision, which may replace float32 by TensorFloat32 or bfloat16."""
CHECKED_ROWS = 8


class Recordings:
    """What `listen` yields: `last`, the Trace of the newest forward pass, and the model's `plan`."""

    def __init__(self, model: nn.Module, plan: Plan | None) -> None:
        self.model, self.plan = model, plan
        self._last: Trace | None = None
        self._ear: Recorder | None = None

    @property
    def last(self) -> Trace:
        """The trace of the newest forward pass; raises CaptureError where none was heard."""
        if self._last is None:
            raise CaptureError(
                "no forward pass was heard: call the model itself, inside the `with`, in the thread that entered it"
            )
        return self._last

    def take(self) -> Trace:
        """`last`, and forget it, so that its memory can go."""
        trace = self.last
        self._last = None
        return trace

    def _on_forward(self, heard: Recording) -> None:
        self._last = None
        if self.plan is None:
            self.plan = plan_from(self.model, heard)
            assert self._ear is not None
            self._ear.thorough, self._ear.watched = False, call_frames(self.plan.taps)
        self._last = _trace(self.plan, heard)


@contextmanager
def record(model: nn.Module, plan: Plan | None = None) -> Iterator[Recordings]:
    """Hear the tokens and attention of every block of `model` in each forward pass inside the `with`.

    Without a `plan` (from `probe`) the first forward pass makes one; give it two different images or more, so
    that prefix tokens can be told from patches. Raises NoAttentionFoundError or CaptureError where attention
    cannot be heard.
    """
    model = unwrap(model)
    listener = Recordings(model, plan)
    watched = frozenset() if plan is None else call_frames(plan.taps)
    with ear(model, listener._on_forward, thorough=plan is None, watched=watched) as listener._ear:
        yield listener


def discover_plan(model: nn.Module, size: tuple[int, int], channels: int = 3, seed: int = 0) -> Plan:
    """Run two noise images [2, channels, *size] through the model, plainly and captured; check the capture.

    The outputs must be equal bit for bit, rows of every softmax must sum to one, and A·V and the logsumexp
    must agree with what each fused kernel returned. Raises CaptureError with the number where they do not, and
    ModelError where the model itself fails.
    """
    model = unwrap(model)
    heard: list[Recording] = []
    with torch.inference_mode(False), torch.no_grad():
        images = noise(model, size, channels, seed)
        try:
            plain = model(images)
        except Exception as error:
            shape = f"[2, {channels}, {size[0]}, {size[1]}]"
            text = f"the model failed on noise images {shape} ({error}); if it takes another size, give img_size"
            raise ModelError(text) from error
        with ear(model, heard.append, thorough=True, examine=_examine):
            captured = model(images)
        if not heard:
            raise CaptureError("the model's forward was not called through its own __call__: nothing could be heard")
        if not same(plain, captured):
            raise CaptureError(f"two passes over the same images differ: {_why_different(plain, model(images))}")
    return plan_from(model, heard[0])


def _why_different(plain: object, again: object) -> str:
    if same(plain, again):
        return "listening changed the model's output; please report this model"
    if any(bool(torch.isnan(x).any()) for x in tensors_in((plain,))):
        return "the model's output holds NaN; check its weights and its precision"
    return "the model is not deterministic (dropout or random drops are on): call eval() first"


def noise(model: nn.Module, size: tuple[int, int], channels: int, seed: int) -> Tensor:
    """Two seeded noise images on the model's device and in its dtype."""
    like = next((p for p in model.parameters() if p.is_floating_point()), torch.empty(()))
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(2, channels, *size, generator=generator).to(like.device, like.dtype)


def plan_from(model: nn.Module, heard: Recording) -> Plan:
    """The plan of a thorough Hearing, after every check that it can be trusted."""
    if not heard.events:
        raise NoAttentionFoundError(_deaf(model, heard))
    if heard.opaque:
        raise CaptureError(_opaque_text(model, heard))
    heard.events = [regular(event, heard.images) for event in heard.events]
    notes = _incomplete(model, heard)
    plan = make_plan(model, heard, _self_check(heard.events))
    if not plan.map_layers:
        raise NoAttentionFoundError(_homeless(model, heard.events[0].attention.owner))
    return replace(plan, notes=(*plan.notes, *notes))


def same(a: Any, b: Any) -> bool:
    """Whether two model outputs hold the same tensors, bit for bit."""
    if isinstance(a, Tensor):
        return isinstance(b, Tensor) and torch.equal(a, b)
    if isinstance(a, dict):
        return isinstance(b, dict) and a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return isinstance(b, (list, tuple)) and len(a) == len(b) and all(map(same, a, b))
    return True


def _trace(plan: Plan, heard: Recording) -> Trace:
    events = [regular(event, heard.images) for event in heard.events]
    if [event.attention.owner for event in events] != [layer.owner for layer in plan.layers]:
        raise CaptureError(
            f"this batch ran {len(events)} attention calls, the probe {len(plan.layers)}, or in another "
            "order; a model whose depth depends on the data (early exit, random drops) cannot be analysed"
        )
    for event, layer in zip(events, plan.layers, strict=True):
        if (found := heads_queries_keys(event.attention)) != layer.signature:
            raise CaptureError(
                f"{layer.owner} has {found} heads, queries and keys in this batch, {layer.signature} in the "
                "probe; probe the model with images of the batch's own size"
            )
    tokens = tuple(as_tokens(read_tap(tap, heard), heard.images, tap.layout) for tap in plan.taps)
    attention = tuple(event.attention for event in events)
    return Trace(plan=plan, images=heard.images, tokens=tokens, attention=attention, output=heard.output)


def _examine(event: AttentionEvent, images: int) -> None:
    """Check an event while its tensors are there, then keep no more than their shapes: a probe holds no batch of maps."""
    event.errors = _errors(regular(event, images))
    event.sketch()


@torch.no_grad()
def _errors(event: AttentionEvent) -> tuple[float, float, float]:
    """Errors of the rows' sums, of A·V and of the logsumexp; NaN where there is nothing to compare with."""
    a, output, logsumexp = event.attention, math.nan, math.nan
    leading, queries, _ = sizes_of(a)
    if len(leading) != 2:
        return 0.0, output, logsumexp
    if a.q is None:
        assert a.probs is not None
        return _row_error(a.probs.float()), output, logsumexp
    chosen = slice(0, queries if event.finish else min(CHECKED_ROWS, queries))
    logits = a.logits(slice(None), slice(None), chosen, slice(None))
    probs = torch.softmax(logits, -1).nan_to_num(0.0)
    if a.logsumexp is not None:
        expected = a.logsumexp[:, :, chosen]
        logsumexp = _worst((torch.logsumexp(logits, -1) - expected) / expected.abs().clamp_min(1.0))
    if event.value is not None and event.out is not None:
        output = _output_error(event, probs, chosen)
    return _row_error(probs), output, logsumexp


def _self_check(events: list[AttentionEvent]) -> SelfCheck:
    errors = [event.errors or _errors(event) for event in events]
    rows, outputs, sums = ([e for e in found if not math.isnan(e)] for found in zip(*errors, strict=True))
    check = SelfCheck(max(rows), max(outputs, default=math.nan), max(sums, default=math.nan))
    dtype = next((e.attention.q.dtype for e in events if e.attention.q is not None), torch.float32)
    tolerance = OUTPUT_TOLERANCE.get(dtype, FLOAT32_TOLERANCE[torch.get_float32_matmul_precision()])
    if check.row_sum > ROW_SUM_TOLERANCE or check.output > tolerance or check.logsumexp > tolerance:
        raise CaptureError(
            f"the captured attention is not the model's: rows sum to one within {check.row_sum:.1e}, A·V "
            f"agrees with the kernel within {check.output:.1e}, the logsumexp within {check.logsumexp:.1e}; "
            "please report this model"
        )
    return check


def _row_error(probs: Tensor) -> float:
    sums = probs.sum(-1)
    return _worst(torch.where(sums == 0, torch.ones_like(sums), sums) - 1)


def _worst(difference: Tensor) -> float:
    difference = difference[torch.isfinite(difference)]
    return float(difference.abs().max()) if difference.numel() else 0.0


def _output_error(event: AttentionEvent, probs: Tensor, rows: slice) -> float:
    """Largest error of what the kernel would return for these maps, relative to its largest entry."""
    value, out = event.value, event.out
    assert value is not None
    assert out is not None
    if value.shape[1] != probs.shape[1]:
        value = value.repeat_interleave(probs.shape[1] // value.shape[1], dim=1)
    mixed, expected = probs @ value.float(), out.float()
    if event.finish is not None:
        mixed = event.finish(mixed.to(value.dtype)).float()
    else:
        expected = expected[:, :, rows]
    return _worst(mixed - expected) / max(float(expected.abs().max()), 1e-12)


def _deaf(model: nn.Module, heard: Recording) -> str:
    if heard.opaque:
        return _opaque_text(model, heard)
    name = type(model).__name__
    if heard.suspects:
        owner, kind = heard.suspects[0]
        return (
            f"{name} has no softmax attention that can be heard: {owner or name} ({module_class(model, owner)}) "
            f"computes {kind}, which has no attention map; analyse a model with softmax attention"
        )
    like = [path for path in attention_like(model, heard.calls) if path]
    if like:
        return (
            f"{name} has no token attention that can be heard; {like[0]} ({module_class(model, like[0])}) "
            "ran without a softmax whose result multiplies values; analyse a model with softmax attention"
        )
    return f"{name} has no attention: no softmax multiplied any values in it; analyse a Vision Transformer"


def _opaque_text(model: nn.Module, heard: Recording) -> str:
    owner, operator = heard.opaque[0]
    return (
        f"the attention of {owner or 'the model'} ({module_class(model, owner)}) runs inside {operator}, "
        "which cannot be listened to; switch the model to PyTorch's scaled_dot_product_attention or to eager "
        "attention (transformers: attn_implementation='sdpa')"
    )


def _homeless(model: nn.Module, owner: str) -> str:
    return (
        f"attention was heard in {owner or type(model).__name__}, but in no block that attends "
        "between its own tokens; blocks are the children of an nn.ModuleList, nn.Sequential or nn.ModuleDict"
    )


def _incomplete(model: nn.Module, heard: Recording) -> list[str]:
    """Attention that ran unheard beside some that was heard: an error if of the same kind, else a note."""
    owners = {event.attention.owner for event in heard.events}
    classes = {type(model.get_submodule(owner)) for owner in owners if owner}
    inside = {frame for event in heard.events for frame in event.stack}
    ran = [(call.path, call.number) for call in heard.calls]
    lost = [f for f in ran if f[0] and f not in inside and type(model.get_submodule(f[0])) in classes]
    if lost:
        path = lost[0][0]
        raise CaptureError(
            f"only {len(heard.events)} attention calls were heard; {path} ({module_class(model, path)}) ran "
            "without one: it may have no softmax here; please report this model"
        )
    by_hand = [(o, kind) for o, kind in heard.suspects if o not in owners]
    named = [(o, kind) for o, kind in by_hand if o in attention_like(model, heard.calls)]
    if named:
        owner, kind = named[0]
        raise CaptureError(
            f"{owner} ({module_class(model, owner)}) computes {kind}, which cannot be listened to, beside "
            "attention that can; a part of the attention would be missing"
        )
    return [
        f"{o or 'the model'} multiplies products of products ({kind}?); it is not counted as attention"
        for o, kind in dict.fromkeys(by_hand)
    ]
