"""Listens to a model and says whether what was heard is right: against its own maps, with nothing changed or left behind."""

from __future__ import annotations

import itertools
import warnings
from dataclasses import dataclass, field

import torch
from odd_attention import TRUTH
from torch import Tensor
from torch.nn.modules import module as nn_module

from collapse_probe.capture.capture import discover_plan, record
from collapse_probe.errors import CollapseProbeError

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
TOLERANCE = {torch.float32: 2e-4, torch.bfloat16: 8e-2, torch.float16: 1e-2}  # logits of about 20, rounded to 8 or 11 bits
BATCHES = (1, 3, 5)
RIGHT, REFUSED, WRONG, ABSENT = "right", "refused", "WRONG", "does not run"


@dataclass
class Verdict:
    """What became of one model in one precision."""

    family: str
    name: str
    precision: str
    outcome: str = RIGHT
    heard: str = ""
    left_out: tuple[str, ...] = ()
    why: list[str] = field(default_factory=list)

    def wrong(self, text):
        self.outcome = WRONG
        self.why.append(text)


class Deliberate(Exception):
    """Raised inside a model, to see what a capture leaves behind."""


def tensors(value):
    """Every tensor of an output."""
    if isinstance(value, Tensor):
        return [value]
    if hasattr(value, "values"):
        value = list(value.values())
    return [t for item in value for t in tensors(item)] if isinstance(value, (list, tuple)) else []


def residue():
    """What a capture could leave behind."""
    hooks = (nn_module._global_forward_hooks, nn_module._global_forward_pre_hooks, nn_module._global_backward_hooks)
    modes = torch.utils._python_dispatch._get_current_dispatch_mode_stack()
    return [len(h) for h in hooks], len(modes)


def pictures(count, channels, size, dtype, seed):
    return torch.randn(count, channels, *size, generator=torch.Generator().manual_seed(seed)).to(dtype)


def same(a, b):
    a, b = tensors(a), tensors(b)
    return len(a) == len(b) and all(
        x.shape == y.shape and torch.equal(x.nan_to_num(), y.nan_to_num()) for x, y in zip(a, b, strict=True)
    )


@torch.no_grad()
def own_maps(model, images):
    """(block, probs, weights) that the model itself says it used."""
    TRUTH[0] = []
    try:
        model(images)
        return TRUTH[0]
    finally:
        TRUTH[0] = None


def distance(a, b):
    if a.shape != b.shape:
        return float("inf")
    return float((a.double() - b.double()).abs().max())


def close(measured, truth):
    """How far the maps of one block are from its own: entries in order, as heads of one, or in another order."""
    best = float("inf")
    options = [truth] if len(truth) == 1 else [list(p) for p in itertools.permutations(truth)] if len(truth) < 4 else [truth]
    for option in options:
        if len(measured) == len(option):
            best = min(best, max(distance(m, t) for m, t in zip(measured, option, strict=True)))
        if (
            len(measured) <= len(option)
            and len({t.shape[:1] + t.shape[2:] for t in option}) == len({m.shape[:1] + m.shape[2:] for m in measured}) == 1
        ):
            best = min(best, distance(torch.cat(measured, 1), torch.cat(option, 1)))
    return best


def left_out(plan):
    return tuple(f"{', '.join(entry.names)}: {entry.why}" for entry in plan.left_out)


def places_of(plan):
    """By block: the layers that hold its maps; blocks that were not captured have none."""
    places = {}
    for index in plan.map_layers:
        layer = plan.layers[index]
        places.setdefault(layer.block, [])
        if layer.heads and layer.queries:
            places[layer.block].append(index)
    return [places[block] for block in sorted(places)]


def check(name, case, size, precision):
    """One hand-written model in one precision."""
    verdict, dtype = Verdict("hand-written", name, precision), DTYPES[precision]
    torch.manual_seed(0)
    model = case.make().eval().to(dtype)
    plan = probed(verdict, model, size, case.channels)
    if plan is None:
        return verdict
    blocks = places_of(plan)
    if case.never:
        verdict.outcome = REFUSED
        verdict.why += [entry.why for entry in plan.left_out]
        if not all(plan.layers[layer].reason for layers in blocks for layer in layers):
            verdict.wrong("maps were heard, and there are none")
        return verdict
    reasons = [plan.layers[layer].reason for layers in blocks for layer in layers]
    if not all(case.says in reason for reason in reasons):
        verdict.wrong(f"the reasons {sorted(set(reasons))} do not say {case.says!r}")
    before = residue()
    for batch in BATCHES:
        check_batch(verdict, model, plan, pictures(batch, case.channels, size, dtype, batch), dtype)
        if verdict.outcome == WRONG:
            break
    check_unchanged(verdict, model, plan, pictures(2, case.channels, size, dtype, 9))
    if residue() != before:
        verdict.wrong("something is left behind")
    if len(plan.map_layers) == len(blocks) and all(blocks) and not any(reasons):
        neighbours = tuple(i not in case.apart for i in range(len(blocks) - 1))
        if tuple(plan.adjacent) != neighbours:
            verdict.wrong(f"neighbours are {neighbours}, not {plan.adjacent}")
    return verdict


def probed(verdict, model, size, channels):
    """The model's plan; None where it is refused."""
    before = residue()
    plan = None
    try:
        plan = discover_plan(model, size, channels)
    except CollapseProbeError as error:
        verdict.outcome = REFUSED
        verdict.why.append(str(error))
    except Exception as error:
        verdict.wrong(f"traceback: {type(error).__name__}: {error}")
    if residue() != before:
        verdict.wrong("something is left behind after the probe")
    if plan is not None:
        verdict.left_out = left_out(plan)
        blocks = places_of(plan)
        verdict.heard = f"{sum(map(bool, blocks))} of {len(blocks)} blocks"
    return plan


def recorded(verdict, model, plan, images):
    """The trace of one batch; None, and the verdict, where it is refused or fails."""
    try:
        with torch.no_grad(), record(model, plan) as recording:
            model(images)
        return recording.last
    except CollapseProbeError as error:
        verdict.outcome = REFUSED
        verdict.why.append(f"batch of {len(images)}: {error}")
    except Exception as error:
        verdict.wrong(f"batch of {len(images)}: traceback: {type(error).__name__}: {error}")
    return None


def check_batch(verdict, model, plan, images, dtype):
    truth = {}
    for block, probs, weights in own_maps(model, images):
        truth.setdefault(block, []).append((probs, weights))
    places = range(len(plan.blocks)) if max(truth) == len(plan.blocks) - 1 else sorted(truth)  # some blocks may have no maps
    truth = [truth.get(block, []) for block in places]
    trace = recorded(verdict, model, plan, images)
    if trace is None:
        return
    blocks = places_of(trace.plan)
    if len(blocks) != len(truth):
        listed = sum(len(entry.names) for entry in trace.plan.left_out)
        if len(blocks) + listed < len(truth):
            verdict.wrong(f"{len(blocks)} blocks of {len(truth)}, {listed} listed")
            return
        if not blocks or len(blocks) > len(truth):
            verdict.wrong(f"{len(blocks)} blocks, and the model has {len(truth)}")
            return
        verdict.why.append(f"{len(truth) - len(blocks)} of {len(truth)} blocks listed, not counted")
        truth = truth[: len(blocks)] if len(blocks) < len(truth) else truth
    silent = [place for place, layers in enumerate(blocks) if not layers]
    if silent:
        verdict.why.append(f"blocks {silent} not captured, and said so")
    for place, (layers, entries) in enumerate(zip(blocks, truth, strict=True)):
        for point, index in (("weights", 1), ("probs", 0)):
            if not layers:
                continue
            if not entries:
                verdict.wrong(f"block {place} has no maps, and some were heard")
                return
            measured = [trace.maps(layer, point) for layer in layers]
            expected = [entry[index] for entry in entries]
            error = close(measured, expected)
            if error <= TOLERANCE[dtype]:
                continue
            shapes = [list(m.shape) for m in measured], [list(e.shape) for e in expected]
            off = "shapes" if error == float("inf") else f"off by {error:.1e}"
            text = f"batch of {len(images)}, block {place}, {point}: {off}; heard {shapes[0]}, true {shapes[1]}"
            reasons = {trace.plan.layers[layer].reason for layer in layers}
            if "" in reasons:
                verdict.wrong(text)
            else:
                verdict.outcome = REFUSED
                verdict.why.append(f"listed: {reasons}; {text}")
            return


def check_unchanged(verdict, model, plan, images):
    """Outputs and gradients bit for bit the same, and nothing left after an exception."""
    with torch.no_grad():
        torch.manual_seed(1)
        plain = model(images)
        torch.manual_seed(1)
        try:
            with record(model, plan):
                captured = model(images)
        except CollapseProbeError:
            return
    if not same(plain, captured):
        verdict.wrong("the outputs change while the model is recorded")
    parameters = [p for p in model.parameters() if p.requires_grad]

    def gradients(output):
        total = sum(t.double().sum() for t in tensors(output) if t.requires_grad)
        return torch.autograd.grad(total, parameters, allow_unused=True) if parameters and isinstance(total, Tensor) else []

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.manual_seed(1)
        try:
            first = gradients(model(images))
        except (RuntimeError, NotImplementedError):
            first = None  # no gradient without the recording either
        if first is not None:
            torch.manual_seed(1)
            try:
                with record(model, plan):
                    output = model(images)
                second = gradients(output)
            except CollapseProbeError:
                second = first
            if not all(
                x is y is None or torch.equal(x.nan_to_num(), y.nan_to_num()) for x, y in zip(first, second, strict=True)
            ):
                verdict.wrong("the gradients change while the model is recorded")
    before, last = residue(), [m for m in model.modules() if not list(m.children())][-1]

    def fail(*args):
        raise Deliberate

    handle = last.register_forward_pre_hook(fail)
    try:
        with torch.no_grad(), record(model, plan):
            model(images)
    except (Deliberate, CollapseProbeError):
        pass
    handle.remove()
    if residue() != before:
        verdict.wrong("something is left behind after an exception")
    torch.manual_seed(1)
    with torch.no_grad():
        if not same(model(images), plain):
            verdict.wrong("the model is not the same after an exception")


def table(verdicts):
    """One line a verdict, what is wrong first."""
    order = {WRONG: 0, ABSENT: 1, REFUSED: 2, RIGHT: 3}
    lines = []
    for v in sorted(verdicts, key=lambda v: (order[v.outcome], v.name)):
        mark = {WRONG: "✗", ABSENT: "?", REFUSED: "–", RIGHT: " "}[v.outcome]
        lines.append(f"{mark} {v.outcome:12} {v.name:45} {v.precision:9} {v.heard:16} {'; '.join(v.why)[:300]}")
    counts = {outcome: sum(v.outcome == outcome for v in verdicts) for outcome in order}
    return "\n".join([*lines, " ".join(f"{outcome}: {count}" for outcome, count in counts.items())])
