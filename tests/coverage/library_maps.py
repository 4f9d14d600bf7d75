"""What a model of a library computes: every kernel call and softmax of a plain pass, in float64, without what is tested."""

from __future__ import annotations

import itertools
import math
import re
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from coverage_bench import TOLERANCE, WRONG, Verdict, check_unchanged, pictures, probed, recorded, residue
from torch import Tensor

from collapse_probe.capture.capture import record
from collapse_probe.errors import CollapseProbeError

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
QUERIES_AND_KEYS = re.compile(r"(qkv|query|key|in_proj|(^|[._])(q|k|kv|qk|to_q|to_k|to_kv|q_proj|k_proj|to_qkv)([._]|$))")
BATCHES = (1, 3, 5)
SOFTMAX = Tensor.softmax


@dataclass
class Softmax:
    """One map of a pass: [.., queries, keys] in float64, the module that ran, and whether a kernel made it."""

    owner: str
    maps: Tensor
    kernel: bool


def peaked(model, seed=0):
    """Weights of queries and keys drawn so wide that maps are far from uniform."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if p.ndim in (2, 4) and QUERIES_AND_KEYS.search(name) and p.is_floating_point():
                fan = math.prod(p.shape[1:])
                p.copy_(torch.randn(p.shape, generator=generator) * 1.5 / math.sqrt(fan))
    return model


@contextmanager
def _instead(place, name, function):
    own = getattr(place, name)
    setattr(place, name, function(own))
    try:
        yield
    finally:
        setattr(place, name, own)


@contextmanager
def softmaxes(model):
    """The list of every softmax and kernel map of the passes inside the `with`."""
    found, stack, handles = [], [], []
    for name, module in model.named_modules():
        handles.append(module.register_forward_pre_hook(lambda m, a, name=name: stack.append(name)))
        handles.append(module.register_forward_hook(lambda m, a, o: stack.pop() and None, always_call=True))

    def note(maps, kernel):
        found.append(Softmax(stack[-1] if stack else "", maps, kernel))

    def soft(own):
        def softmax(x, dim=None, *args, **kwargs):
            if isinstance(dim, int) and x.ndim > 1:
                note(SOFTMAX(x.detach().double(), dim).movedim(dim, -1), False)
            return own(x, dim, *args, **kwargs)

        return softmax

    def fused(own):
        def attention(query, key, value, attn_mask=None, dropout_p=0.0, is_causal=False, scale=None, enable_gqa=False):
            q, k = query.detach().double(), key.detach().double()
            k = k.repeat_interleave(q.shape[-3] // k.shape[-3], -3) if enable_gqa else k
            logits = q @ k.mT * (q.shape[-1] ** -0.5 if scale is None else scale)
            if is_causal:
                logits = logits.masked_fill(torch.ones(logits.shape[-2:], dtype=torch.bool).triu(1), -math.inf)
            if attn_mask is not None:
                mask = attn_mask.detach()
                logits = logits.masked_fill(~mask, -math.inf) if mask.dtype == torch.bool else logits + mask.double()
            note(SOFTMAX(logits, -1).nan_to_num(0.0), True)
            more = {"enable_gqa": True} if enable_gqa else {}
            return own(query, key, value, attn_mask, dropout_p, is_causal, scale=scale, **more)

        return attention

    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with (
            _instead(torch, "softmax", soft),
            _instead(Tensor, "softmax", soft),
            _instead(F, "scaled_dot_product_attention", fused),
        ):
            yield found
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)
        for handle in handles:
            handle.remove()


def single(maps, queries, keys):
    """[maps, queries, keys], whatever came before; None where these are no such maps."""
    if maps.shape[-1] != keys or maps.ndim < 2 or maps.numel() % (queries * keys):
        return None
    if maps.shape[-2] == queries:
        return maps.reshape(-1, queries, keys)
    axes = [i for i in range(maps.ndim - 1) if maps.shape[i] == queries]
    return maps.movedim(axes[-1], -2).reshape(-1, queries, keys) if axes else None


def error_of(measured, softmax, images=1):
    """How far measured maps [B(·windows), H, N, N] are from a softmax's, whatever the order of its leading axes."""
    queries, keys = measured.shape[-2:]
    own, true = measured.reshape(-1, queries, keys).double(), softmax.maps
    if single(true, queries, keys) is None or true.numel() != own.numel():
        return math.inf
    if 3 < true.ndim < 6 and images > 1 and len(true) % images == 0 and len(true) > images:  # [B·H, …], [B·windows, …]
        apart = Softmax(softmax.owner, true.unflatten(0, (images, -1)), softmax.kernel)
        return min(error_of(measured, softmax), error_of(measured, apart))
    if true.ndim > 3 and measured.shape[1] not in true.shape[:-1]:  # windows or images that were taken for heads
        return math.inf
    if true.shape[-2] != queries:
        return float((own - single(true, queries, keys)).abs().max())
    leading = range(true.ndim - 2)
    orders = itertools.permutations(leading) if len(leading) < 5 else [tuple(leading)]
    return min(float((own - true.permute(*o, -2, -1).reshape(own.shape)).abs().max()) for o in orders)


def parts_error(measured, free, tolerance, images):
    """The same where a layer's heads come from several softmaxes, one after the other."""
    worst, first, owners = 0.0, 0, set()
    while first < measured.shape[1]:
        before = dict(free)
        sizes = {s.maps.numel() // (len(measured) * math.prod(measured.shape[2:])) for s in free.values()}
        sizes = [size for size in sorted(sizes) if 0 < size <= measured.shape[1] - first]
        errors = ((nearest(measured[:, first : first + size], free, tolerance, images), size) for size in sizes)
        found = next(((error, size) for error, size in errors if error <= tolerance), None)
        owners |= {re.sub(r"\d+", "#", s.owner) for i, s in before.items() if i not in free}
        if found is None or len(owners) > 1:  # modules of other names are no heads of one attention
            return math.inf
        worst, first = max(worst, found[0]), first + found[1]
    return worst


def nearest(measured, free, tolerance, images):
    """The error against the first softmax that is within the tolerance, which is then no longer free; else the least error."""
    least = math.inf
    for i, softmax in free.items():
        least = min(least, error := error_of(measured, softmax, images))
        if error <= tolerance:
            del free[i]
            return error
    return least


def check_row(row, precision, batches=BATCHES):
    """One model of a library in one precision."""
    verdict, dtype = Verdict(f"{row.library}: {row.family}", row.name, precision), DTYPES[precision]
    torch.manual_seed(0)
    try:
        model = peaked(row.make()).eval().to(dtype)
        with torch.no_grad():
            model(pictures(2, 3, (row.size, row.size), dtype, 0))
    except Exception as error:  # the library's own, in this precision
        verdict.outcome = "does not run"
        verdict.why.append(f"{type(error).__name__}: {error}".split("\n")[0][:200])
        return verdict
    plan = probed(verdict, model, (row.size, row.size), 3)
    if plan is None:
        return verdict
    before = residue()
    for batch in batches:
        images = pictures(batch, 3, (row.size, row.size), dtype, batch)
        check_maps(verdict, model, plan, images, dtype)
        if verdict.outcome == WRONG:
            return verdict
    if row.tokens is not None:
        check_tokens(verdict, model, plan, pictures(3, 3, (row.size, row.size), dtype, 3), row.tokens)
    check_unchanged(verdict, model, plan, pictures(2, 3, (row.size, row.size), dtype, 9))
    if residue() != before:
        verdict.wrong("something is left behind")
    return verdict


def check_maps(verdict, model, plan, images, dtype):
    torch.manual_seed(1)  # for models that draw at random, as masked autoencoders do
    with torch.no_grad(), softmaxes(model) as true:
        model(images)
    torch.manual_seed(1)
    trace = recorded(verdict, model, plan, images)
    if trace is None:
        return
    free = dict(enumerate(true))
    for index, layer in enumerate(trace.plan.layers):
        measured = trace.maps(index, "probs") if layer.heads else torch.empty(0)
        if not measured.numel():
            if not layer.reason:
                verdict.wrong(f"batch of {len(images)}, {layer.owner}: nothing was heard, and no reason is given")
            continue
        error = nearest(measured, free, TOLERANCE[dtype], len(images))
        if error > TOLERANCE[dtype]:
            error = min(error, parts_error(measured, free, TOLERANCE[dtype], len(images)))
        if error > TOLERANCE[dtype]:
            off = "no softmax of this shape" if error == math.inf else f"off by {error:.1e}"
            verdict.wrong(f"batch of {len(images)}, {layer.owner}: {off}, maps {list(measured.shape)} {layer.reason}")
            return
    listed = [name for entry in plan.left_out for name in entry.names]
    said = " ".join([*listed, *plan.notes, *(layer.owner for layer in plan.layers)])
    for softmax in free.values():
        attends = softmax.kernel or ("att" in softmax.owner.lower() and softmax.maps.ndim > 2 and softmax.maps.shape[-2] > 1)
        names = [softmax.owner, *(softmax.owner.rpartition(".")[0],)]
        if attends and softmax.maps.shape[-1] > 1 and not any(name and name in said for name in names):
            verdict.wrong(f"{softmax.owner} attends and is not named anywhere, maps {list(softmax.maps.shape)}")
            return


def in_order(tokens):
    """[B, N, D] with the tokens of each image in an order that depends on their values alone."""
    tokens = tokens.double().nan_to_num()
    order = (tokens @ torch.linspace(1, 2, tokens.shape[-1], dtype=torch.float64)).argsort(1)
    return tokens.gather(1, order[..., None].expand(tokens.shape))


def check_tokens(verdict, model, plan, images, own):
    with torch.no_grad():
        torch.manual_seed(1)
        try:
            expected = own(model, images)
        except Exception:
            return
        if not expected or not isinstance(expected, list):
            return
        torch.manual_seed(1)
        try:
            with record(model, plan) as recording:
                model(images)
        except CollapseProbeError:
            return
    compared = 0
    if len(expected) != len(plan.blocks) - (verdict.family.startswith("transformers")):
        return
    for depth, theirs in enumerate(expected, 1):
        for ours in (recording.last.tokens[depth], recording.last.patches(depth)):
            if ours is None:
                continue
            for layout in (theirs, theirs.flatten(2).transpose(1, 2) if theirs.ndim == 4 else theirs):
                if layout.shape == ours.shape:
                    compared += 1
                    if not torch.equal(in_order(layout), in_order(ours)):
                        off = float((layout.float() - ours.float()).abs().max())
                        verdict.wrong(f"tokens after block {depth - 1} are off by {off:.1e}")
                        return
                    break
    verdict.heard += f", tokens of {compared} depths"
