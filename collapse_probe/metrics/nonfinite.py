"""Which weights of a model, and of which images the activations, are not finite: what no number may be taken from."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import chain

import torch
from torch import Tensor, nn

from collapse_probe.capture.attention_operators import tensors_in
from collapse_probe.capture.plan import Layer
from collapse_probe.capture.trace import Attention, Trace
from collapse_probe.results.text import spans

MOST_NAMED = 3
RUNNING = "running_"
"""How buffers of statistics begin; in others an infinity may be meant, as in a mask or a smallest value so far."""


def nonfinite_weights(model: nn.Module) -> list[str]:
    """The parameters and buffers that hold NaN or infinities where none is meant: each name, how many values, of how many.

    Infinities in buffers that are no running statistics, and −∞ in frozen parameters, may be masks: where they are not, the
    activations show it.
    """
    named = ((name, p, "" if p.requires_grad else "-") for name, p in model.named_parameters())
    buffers = ((name, b, "" if name.rpartition(".")[2].startswith(RUNNING) else "+-") for name, b in model.named_buffers())
    ill = []
    for name, tensor, allowed in chain(named, buffers):
        if tensor.is_meta or tensor.layout != torch.strided or not (tensor.is_floating_point() or tensor.is_complex()):
            continue
        values = torch.view_as_real(tensor.detach()) if tensor.is_complex() else tensor.detach()
        if values.element_size() < 2:  # there is little arithmetic in eight bits
            values = values.float()
        if bool(torch.isfinite(values.sum())):
            continue
        meant = [sign(values) for mark, sign in (("+", torch.isposinf), ("-", torch.isneginf)) if mark in allowed]
        bad = ~torch.isfinite(values)
        for each in meant:
            bad &= ~each
        if count := int(bad.sum()):
            ill.append(f"{name} ({count:,} of {values.numel():,} values {_kind(values[bad])})")
    return ill


def nonfinite_images(trace: Trace, pixels: Tensor) -> dict[int, str]:
    """The images of a batch whose activations are not finite, each with the place where that is first seen.

    Looked at are the tokens at every depth, the logits of every attention (before a kernel makes 0 of what is not finite), the
    maps of eager attention, and the model's output. What a mask hides is −∞ by intent, as is what is −∞ for all images.
    """
    doubtful = _doubtful(trace)
    places = ((i, next(_places(trace, pixels, i), "")) for i in torch.nonzero(doubtful).flatten().tolist())
    return {i: place for i, place in places if place}


def _doubtful(trace: Trace) -> Tensor:
    """Which images [B] may have something that is not finite, from sums and norms alone: one reading of each tensor."""
    images, sums = trace.images, list[Tensor]()
    for tensor in chain(trace.tokens, _outputs(trace)):
        if tensor is not None:
            sums.append(tensor.reshape(images, -1).sum(1, dtype=_wide(tensor)))
    for attention in trace.attention:
        if not _whole(attention, images):
            continue
        if attention.q is None:
            assert attention.probs is not None  # a softmax with one value that is not finite has no other in its row
            sums.append(attention.probs[..., 0].reshape(images, -1).sum(1, dtype=_wide(attention.probs)))
            continue
        q, k = (_norms(x, images) for x in (attention.q, attention.k))
        sums.append(q * k * attention.scale)  # no logit is larger
        if (bias := attention.bias) is not None and bias.is_floating_point():
            one = bias if bias.ndim == 4 and len(bias) > 1 and bias.stride(0) else bias.reshape(1, -1)
            sums.append(one.flatten(1).amax(1).reshape(-1, max(len(one) // images, 1)).amax(1).expand(images))
    device = sums[0].device if sums else torch.device("cpu")
    totals = [each.detach().to(device, torch.float32) for each in sums]
    if not totals:
        return torch.zeros(images, dtype=torch.bool)
    doubtful: Tensor = ~torch.isfinite(torch.stack(totals)).all(0)
    return doubtful


def _norms(x: Tensor | None, images: int) -> Tensor:
    """The largest length of the queries or keys [B·windows, H, N, K] of every image, all heads of a token together: [B]."""
    assert x is not None
    by_token: Tensor = torch.linalg.vector_norm(x.transpose(1, 2), dim=(2, 3), dtype=_wide(x))
    return by_token.reshape(images, -1).amax(1)


def _wide(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def _whole(attention: Attention, images: int) -> bool:
    """Whether an attention was captured with the images along its first axis."""
    first = attention.probs if attention.q is None else attention.q
    return first is not None and first.ndim == 4 and first.numel() > 0 and len(first) % images == 0


def _outputs(trace: Trace) -> Iterator[Tensor]:
    """What the model returned for each image, −∞ for all images of several left out."""
    for tensor in tensors_in((trace.output,)):
        if not tensor.is_nested and tensor.ndim > 0 and tensor.is_floating_point() and len(tensor) == trace.images:
            yield tensor


def _places(trace: Trace, pixels: Tensor, image: int) -> Iterator[str]:
    """Where an image's activations are not finite, in the order of the pass."""
    if bad := _kind(pixels[image]):
        yield f"its pixels hold {bad}"
    plan, depth = trace.plan, 0
    layers = [*zip(plan.layers, trace.attention, strict=True)]
    for depth, tokens in enumerate(trace.tokens):
        if tokens is not None and (bad := _kind(tokens[image])):
            where = f"leave block {depth - 1}" if depth else "enter block 0"
            yield f"{bad} in the tokens that {where}"
        for layer, attention in layers:
            if layer.block == depth and _whole(attention, trace.images):
                yield from _heads(layer, attention, trace, image)
    for layer, attention in layers:
        if layer.block is None and _whole(attention, trace.images):
            yield from _heads(layer, attention, trace, image)
    for output in _outputs(trace):
        meant = torch.isneginf(output).all(0) if trace.images > 1 else torch.isneginf(output[image])
        if bad := _kind(output[image].masked_fill(meant, 0.0)):
            yield f"{bad} in the model's output"


def _heads(layer: Layer, attention: Attention, trace: Trace, image: int) -> Iterator[str]:
    """The heads of one attention whose logits (or maps, where those were not captured) are not finite for an image."""
    windows = len(attention.probs if attention.q is None else attention.q) // trace.images  # type: ignore[arg-type]
    inside = slice(image * windows, (image + 1) * windows)
    kinds = dict[int, str]()
    for head in range(layer.heads):
        for values in _suspects(attention, inside, slice(head, head + 1)):
            if bad := _kind(values):
                kinds[head] = bad
    if attention.q is None and len(kinds) == layer.heads and _handled(layer, trace, image):
        return
    if kinds:
        what = "map" if attention.q is None else "attention logits"
        heads = f"heads {spans([*kinds])}" if len(kinds) > 1 else f"head {next(iter(kinds))}"
        where = f"block {layer.block}" if layer.block is not None else layer.owner or "the model"
        yield f"{' and '.join(dict.fromkeys(kinds.values()))} in the {what} of {where}, {heads} of {layer.heads}"


def _handled(layer: Layer, trace: Trace, image: int) -> bool:
    """Whether rows without a number are a mask's doing, that hides all keys in all heads: the tokens that follow are finite."""
    tokens = None if layer.block is None else trace.tokens[layer.block + 1]
    return tokens is not None and not _kind(tokens[image])


def _suspects(attention: Attention, inside: slice, head: slice) -> Iterator[Tensor]:
    """What should be finite of one head: the products of q and k, a few rows at a time, and the mask but for its −∞."""
    if attention.q is None:
        maps = attention.maps(inside, head)
        yield maps["probs"]
        yield maps["weights"]
        return
    unmasked = Attention(attention.owner, attention.operation, attention.q, attention.k, scale=attention.scale)
    queries, keys = attention.shape[-2:]
    step = max(1, 2**22 // keys)
    for first in range(0, queries, step):
        yield unmasked.logits(inside, head, slice(first, first + step))
    if attention.bias is not None and attention.bias.is_floating_point():
        bias = attention.bias.reshape((1,) * (4 - attention.bias.ndim) + attention.bias.shape)
        part = bias[inside if len(bias) > 1 else slice(None), head if bias.shape[1] > 1 else slice(None)]
        yield part.masked_fill(torch.isneginf(part), 0.0)


def _kind(values: Tensor) -> str:
    """NaN, inf or both; empty where all values are finite."""
    kinds = [name for name, test in (("NaN", torch.isnan), ("inf", torch.isinf)) if bool(test(values).any())]
    return " and ".join(kinds)


def some(texts: Sequence[str]) -> str:
    """The first few of some texts, and how many more there are."""
    rest = len(texts) - MOST_NAMED
    return "; ".join(texts[:MOST_NAMED]) + (f"; and {rest} more" if rest > 0 else "")


def nonfinite_error(ill: Sequence[tuple[str, str]], seen: int, amp: str | None) -> str:
    """What is said where the activations of images are not finite and this is not to happen; `seen` images were run so far."""
    ways = [f"try it without {amp} (--amp)"] if amp else []
    if len(ill) < seen:
        ways.append("leave such images out and count them (--on-nonfinite skip, on_nonfinite='skip')")
    return (
        f"the activations of {len(ill)} of the {seen} images read so far are not finite, first of {ill[0][0]} ({ill[0][1]}); "
        + (", or ".join(ways) or "check the model's weights and its precision")
    )


def all_ill(ill: Sequence[tuple[str, str]]) -> str:
    """What is said where the activations of no image are finite."""
    return f"the activations of all {len(ill)} images are not finite, first of {ill[0][0]} ({ill[0][1]})"
