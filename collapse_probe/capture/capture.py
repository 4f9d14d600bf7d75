"""Records a model inside a `with`: checks that the capture is right, and leaves nothing behind."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from collapse_probe.capture.attention_operators import OperatorCall, tensors_in
from collapse_probe.capture.discovery import as_tokens, attention_like, call_frames, make_plan, module_class, read_tap
from collapse_probe.capture.plan import Plan, SelfCheck
from collapse_probe.capture.recorder import AttentionEvent, PassLog, Recorder
from collapse_probe.capture.trace import Trace
from collapse_probe.devices import floating_like
from collapse_probe.distributed import unwrap
from collapse_probe.errors import CaptureError, ModelError, NoAttentionFoundError
from collapse_probe.input_errors import why_failed

ROW_SUM_TOLERANCE = 1e-4
OUTPUT_TOLERANCE = {torch.bfloat16: 5e-2, torch.float16: 1e-2}
FLOAT32_TOLERANCE = {"highest": 2e-4, "high": 5e-3, "medium": 5e-2}
"""By torch.get_float32_matmul_precision, which may replace float32 by TensorFloat32 or bfloat16."""
CHECKED_ROWS = 8


class Recording:
    """What `record` yields: `last`, the Trace of the newest forward pass, and the model's `plan`."""

    def __init__(self, model: nn.Module, plan: Plan | None) -> None:
        self.plan = plan
        self._last: Trace | None = None
        watched = frozenset() if plan is None else call_frames(plan.taps)
        self.recorder = Recorder(model, self._on_forward, thorough=plan is None, watched=watched)

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

    def _on_forward(self, log: PassLog) -> None:
        self._last = None
        if self.plan is None:
            self.plan = _plan_of(self.recorder.model, log)
            self.recorder.thorough, self.recorder.watched = False, call_frames(self.plan.taps)
        attention = tuple(event.attention for event in log.events)
        if [a.owner for a in attention] != [layer.owner for layer in self.plan.layers]:
            raise CaptureError(
                f"this batch ran {len(attention)} attention calls, the probe {len(self.plan.layers)}, or in another "
                "order; a model whose depth depends on the data (early exit, random drops) cannot be analysed"
            )
        for a, layer in zip(attention, self.plan.layers, strict=True):
            if a.signature != layer.signature:
                raise CaptureError(
                    f"{layer.owner} has {a.signature} heads, queries and keys in this batch, {layer.signature} in the "
                    "probe; probe the model with images of the batch's own size"
                )
        tokens = tuple(as_tokens(read_tap(tap, log), log.images, tap.layout) for tap in self.plan.taps)
        self._last = Trace(self.plan, log.images, tokens, attention, log.output)


@contextmanager
def record(model: nn.Module, plan: Plan | None = None) -> Iterator[Recording]:
    """Record the tokens and attention of every block of `model` in each forward pass inside the `with`.

    Without a `plan` (from `discover_plan`) the first forward pass makes one; give it two different images or more, so that
    prefix tokens can be told from patches. Raises NoAttentionFoundError or CaptureError where attention cannot be captured.
    """
    recording = Recording(unwrap(model), plan)
    with recording.recorder.attached():
        yield recording


def discover_plan(model: nn.Module, size: tuple[int, int], channels: int = 3, seed: int = 0) -> Plan:
    """Run two noise images [2, channels, *size] through the model, plainly and captured; check the capture.

    The outputs must be equal bit for bit, rows of every softmax must sum to one, and A·V and the logsumexp
    must agree with what each fused kernel returned. Raises CaptureError with the number where they do not, and
    ModelError where the model itself fails.
    """
    model = unwrap(model)
    logs: list[PassLog] = []
    with torch.inference_mode(False), torch.no_grad():
        images = noise(model, size, channels, seed)
        try:
            plain = model(images)
        except Exception as error:
            raise ModelError(why_failed(model, images, error)) from error
        with Recorder(model, logs.append, thorough=True, on_operator=_check_and_sketch).attached():
            captured = model(images)
        if not logs:
            raise CaptureError("the model's forward was not called through its own __call__: nothing could be recorded")
        if not same(plain, captured):
            if same(plain, model(images)):
                why = "the recording changed the model's output; please report this model"
            elif any(bool(torch.isnan(x).any()) for x in tensors_in((plain,))):
                why = "the model's output holds NaN; check its weights and its precision"
            else:
                why = "the model is not deterministic (dropout or random drops are on): call eval() first"
            raise CaptureError(f"two passes over the same images differ: {why}")
    return _plan_of(model, logs[0])


def noise(model: nn.Module, size: tuple[int, int], channels: int, seed: int) -> Tensor:
    """Two seeded noise images on the model's device and in its dtype."""
    like = floating_like(model)
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(2, channels, *size, generator=generator).to(like.device, like.dtype)


def same(a: Any, b: Any) -> bool:
    """Whether two model outputs hold the same tensors, bit for bit."""
    if isinstance(a, Tensor):
        return isinstance(b, Tensor) and torch.equal(a, b)
    if isinstance(a, dict):
        return isinstance(b, dict) and a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return isinstance(b, (list, tuple)) and len(a) == len(b) and all(map(same, a, b))
    return True


def _plan_of(model: nn.Module, log: PassLog) -> Plan:
    """The plan of a thorough recording, after every check that it can be trusted."""
    if log.opaque:
        owner, operator = log.opaque[0]
        error = CaptureError if log.events else NoAttentionFoundError
        raise error(
            f"the attention of {owner or 'the model'} ({module_class(model, owner)}) runs inside {operator}, "
            "which cannot be recorded; switch the model to PyTorch's scaled_dot_product_attention or to eager "
            "attention (transformers: attn_implementation='sdpa')"
        )
    if not log.events:
        name, like = type(model).__name__, [path for path in attention_like(model, log.calls) if path]
        why = f"{name} has no attention: no softmax multiplied any values in it; analyse a Vision Transformer"
        if log.suspects:
            owner, kind = log.suspects[0]
            why = (
                f"{name} has no softmax attention that can be recorded: {owner or name} ({module_class(model, owner)}) "
                f"computes {kind}, which has no attention map; analyse a model with softmax attention"
            )
        elif like:
            why = (
                f"{name} has no token attention that can be recorded; {like[0]} ({module_class(model, like[0])}) "
                "ran without a softmax whose result multiplies values; analyse a model with softmax attention"
            )
        raise NoAttentionFoundError(why)
    notes = _check_complete(model, log)
    plan = make_plan(model, log, _self_check(log.events))
    if not plan.map_layers:
        raise NoAttentionFoundError(
            f"attention was found in {log.events[0].attention.owner or type(model).__name__}, but in no block that attends "
            "between its own tokens; blocks are the children of an nn.ModuleList, nn.Sequential or nn.ModuleDict"
        )
    return replace(plan, notes=(*plan.notes, *notes))


def _check_complete(model: nn.Module, log: PassLog) -> list[str]:
    """Attention that ran unrecorded beside some that was recorded: an error if of the same kind, else a note."""
    owners = {event.attention.owner for event in log.events}
    classes = {type(model.get_submodule(owner)) for owner in owners if owner}
    inside = {frame for event in log.events for frame in event.stack}
    ran = [(call.path, call.number) for call in log.calls]
    missed = [f for f in ran if f[0] and f not in inside and type(model.get_submodule(f[0])) in classes]
    if missed:
        path = missed[0][0]
        raise CaptureError(
            f"only {len(log.events)} attention calls were recorded; {path} ({module_class(model, path)}) ran "
            "without one: it may have no softmax here; please report this model"
        )
    suspects = [(owner, kind) for owner, kind in log.suspects if owner not in owners]
    named = [(owner, kind) for owner, kind in suspects if owner in attention_like(model, log.calls)]
    if named:
        owner, kind = named[0]
        raise CaptureError(
            f"{owner} ({module_class(model, owner)}) computes {kind}, which cannot be recorded, beside "
            "attention that can; a part of the attention would be missing"
        )
    return [
        f"{owner or 'the model'} multiplies products of products ({kind}?); it is not counted as attention"
        for owner, kind in dict.fromkeys(suspects)
    ]


# ---- the self-check ----


def _check_and_sketch(call: OperatorCall, events: list[AttentionEvent]) -> None:
    """Check an event while its tensors are there, then keep only their shapes: a probe holds no batch of maps."""
    for event in events:
        event.errors = _errors(event)
        event.sketch()


@torch.no_grad()
def _errors(event: AttentionEvent) -> tuple[float, float, float]:
    """Errors of the rows' sums, of A·V and of the logsumexp; NaN where there is nothing to compare with."""
    a, kernel, output, logsumexp = event.attention, event.kernel, math.nan, math.nan
    if len(a.shape) != 4:
        return 0.0, output, logsumexp
    if a.q is None:
        assert a.probs is not None
        return _row_error(a.probs.float()), output, logsumexp
    queries = a.shape[-2]
    rows = slice(0, queries if kernel is not None and kernel.finish else min(CHECKED_ROWS, queries))
    logits = a.logits(rows=rows)
    probs = torch.softmax(logits, -1).nan_to_num(0.0)
    if a.logsumexp is not None:
        expected = a.logsumexp[:, :, rows]
        logsumexp = _worst((torch.logsumexp(logits, -1) - expected) / expected.abs().clamp_min(1.0))
    if kernel is not None:
        mixed, expected = kernel.mixed(probs), kernel.out.float()
        if kernel.finish is not None:
            mixed = kernel.finish(mixed.to(kernel.value.dtype)).float()
        else:
            expected = expected[:, :, rows]
        output = _worst(mixed - expected) / max(float(expected.abs().max()), 1e-12)
    return _row_error(probs), output, logsumexp


def _row_error(probs: Tensor) -> float:
    sums = probs.sum(-1)
    return _worst(torch.where(sums == 0, torch.ones_like(sums), sums) - 1)


def _worst(difference: Tensor) -> float:
    difference = difference[torch.isfinite(difference)]
    return float(difference.abs().max()) if difference.numel() else 0.0


def _self_check(events: list[AttentionEvent]) -> SelfCheck:
    errors = [event.errors or _errors(event) for event in events]
    rows, outputs, sums = ([e for e in column if not math.isnan(e)] for column in zip(*errors, strict=True))
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
