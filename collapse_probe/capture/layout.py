"""Which axis of an attention call's tensors runs over images, heads or windows, and the same tensors as [B·W, H, N, …].

Nothing is taken from the order in which people usually write axes: one image of two is changed, and what changes with it is
its own.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

import torch
from torch import Tensor

from collapse_probe.capture.plan import HEAD, IMAGE, WINDOW, Axis, Part
from collapse_probe.capture.trace import Attention
from collapse_probe.errors import CaptureError

DEPENDS = "a model whose attention depends on the data or on their number (early exit, pruned tokens) cannot be analysed"
Samples = Sequence[tuple[Tensor, ...]]
"""Of each of some equal attention calls: a part of its logits, or of its q and its k, [leading axes …, N, few]."""


def axes_of(first: Samples, second: Samples) -> tuple[Axis, ...] | None:
    """The factors of the axis of the calls and of every leading axis, from two passes that differ in the second of two images.

    Without the images where nothing differs (maps that depend on no image); None where what differs belongs to both images.
    """
    moves = _moved(first, second)
    if moves is None:
        return None
    axes: list[Axis] = [((HEAD, n),) if n > 1 else () for n in moves.shape]
    if not bool(moves.any()):
        for axis, size in enumerate(moves.shape):
            if size == 2 and all(_alike(sample[0], axis) for sample in first):
                axes[axis] = ((IMAGE, 0),)
                break
        return tuple(axes)
    for axis, size in enumerate(moves.shape):
        along = moves.movedim(axis, 0).flatten(1).any(1)
        inner = int(along.long().argmax())  # how many places of the first image come before the first of the second
        place = torch.arange(size, device=along.device)
        if inner and size % (2 * inner) == 0 and bool((along == (place // inner % 2 == 1)).all()):
            factors = ((HEAD, size // (2 * inner)), (IMAGE, 0), (HEAD, inner))
            axes[axis] = tuple(factor for factor in factors if factor[1] != 1)
            return tuple(axes)
    return None


def _moved(first: Samples, second: Samples) -> Tensor | None:
    """Where the samples of the calls differ, [calls, leading axes …]; None where the passes do not match."""
    rows = []
    for before, after in zip(first, second, strict=True):
        if [x.shape for x in before] != [x.shape for x in after]:
            return None
        parts = [((x != y) & ~(x.isnan() & y.isnan())).any(-1).any(-1) for x, y in zip(before, after, strict=True)]
        whole = parts[0]
        for part in parts[1:]:  # keys may be shared by several heads
            if part.ndim == whole.ndim and all(m in (n, 1) for m, n in zip(part.shape, whole.shape, strict=True)):
                whole = whole | part
        rows.append(whole)
    return torch.stack(rows)


def _alike(sample: Tensor, axis: int) -> bool:
    """Whether the two places along an axis (0: the calls) hold the same."""
    return axis > 0 and torch.equal(sample.select(axis - 1, 0), sample.select(axis - 1, 1))


def with_windows(axes: tuple[Axis, ...], windows: int) -> tuple[Axis, ...] | None:
    """The same axes where `windows` of the factors that are no images are windows; None where it cannot be told which.

    A factor that shares its axis with the images is preferred: whoever folds windows folds them into the batch.
    """
    places = [(i, j) for i, axis in enumerate(axes) for j, (role, _) in enumerate(axis) if role == HEAD]
    fitting = []
    for start, stop in itertools.combinations(range(len(places) + 1), 2):
        if math.prod(axes[i][j][1] for i, j in places[start:stop]) == windows:
            fitting.append(places[start:stop])
    folded = [some for some in fitting if all(any(role == IMAGE for role, _ in axes[i]) for i, _ in some)]
    chosen = folded if folded else fitting
    if len(chosen) != 1:
        return None
    return tuple(
        tuple((WINDOW if (i, j) in chosen[0] else role, n) for j, (role, n) in enumerate(axis)) for i, axis in enumerate(axes)
    )


def arranged(x: Tensor, axes: Sequence[Axis], images: int, tail: int, shared: bool = False, few: bool = False) -> Tensor:
    """A tensor [calls, leading axes …, tail axes …] as [images · windows, heads, tail axes …].

    Where `shared`, an axis that is the same for all images and windows, or for all heads, may stay of size one; where `few`, as
    of keys, several heads may share one.
    """
    factors = [(role, images if role == IMAGE else size) for axis in axes for role, size in axis]
    sizes: list[int] = []
    for size, axis in zip(x.shape, axes, strict=False):
        expected = [images if role == IMAGE else n for role, n in axis]
        if size == 1 and (shared or few):
            expected = [1] * len(axis)
        elif size != math.prod(expected):
            heads = [i for i, (role, _) in enumerate(axis) if role == HEAD]
            others = math.prod(expected) // math.prod(expected[i] for i in heads)
            if not few or len(heads) != 1 or size % others:
                came = " × ".join(map(str, expected)) or "1"
                raise CaptureError(
                    f"an attention call came with an axis of {size} where the probe found {came} (images, windows, heads); "
                    f"{DEPENDS}"
                )
            expected[heads[0]] = size // others  # keys that several heads share
        sizes += expected
    order = [i for wanted in (IMAGE, WINDOW, HEAD) for i, (role, _) in enumerate(factors) if role == wanted]
    split = x.reshape(*sizes, *x.shape[x.ndim - tail :]).permute(*order, *range(len(sizes), len(sizes) + tail))
    if not any(role == IMAGE for role, _ in factors):
        split, order = split.unsqueeze(0), [-1, *order]
    full = [images if i < 0 else factors[i][1] for i in order]
    rows = sum(i < 0 or factors[i][0] != HEAD for i in order)
    lead = list(split.shape[: len(full)])
    if not shared or any(n > 1 for n in lead[:rows]):
        lead[:rows] = full[:rows]
    if shared and any(n > 1 for n in lead[rows:]):
        lead[rows:] = full[rows:]
    split = split.expand(*lead, *split.shape[len(full) :])
    return split.reshape(math.prod(lead[:rows]), math.prod(lead[rows:]), *split.shape[len(full) :])


def is_plain(part: Part) -> bool:
    """Whether a call's tensors are [B, H, N, …] as they come."""
    return len(part.queries) == 1 and part.axes in (((), ((IMAGE, 0),), ((HEAD, part.of(HEAD)),)), ((), ((IMAGE, 0),), ()))


def read_part(part: Part, calls: Sequence[Attention], images: int) -> Attention:
    """The attention of equal calls of one module, or of one call, with the axes [B·W, H, N, …]."""
    if is_plain(part) and calls[0].shape[0] == images:
        return calls[0]
    first = calls[0]
    if len(part.queries) > 1:
        return _along_queries([_arranged(part, [call], images) for call in calls])
    same = len(calls) == 1 or all(a.bias is None and not a.causal and a.scale == first.scale for a in calls)
    if first.q is not None and not same:
        calls = [materialised(call) for call in calls]
    return _arranged(part, calls, images)


def _arranged(part: Part, calls: Sequence[Attention], images: int) -> Attention:
    first = calls[0]
    fused = first.q is not None
    changed = any(call.mixed for call in calls)

    def put(tensors: Sequence[Tensor | None], tail: int, shared: bool = False, few: bool = False) -> Tensor | None:
        there = [t for t in tensors if t is not None]
        if len(there) < len(calls):
            return None
        return arranged(there[0].unsqueeze(0) if len(there) == 1 else torch.stack(there), part.axes, images, tail, shared, few)

    bias = None
    if first.q is not None and first.bias is not None:
        bias = put([first.bias.reshape((1,) * (first.q.ndim - first.bias.ndim) + first.bias.shape)], 2, shared=True)
    return Attention(
        first.owner,
        first.operation,
        q=put([call.q for call in calls], 2) if fused else None,
        k=put([call.k for call in calls], 2, few=True) if fused else None,
        bias=bias,
        causal=first.causal,
        scale=first.scale,
        logsumexp=put([call.logsumexp for call in calls], 1),
        probs=put([call.probs for call in calls], 2),
        weights=put([call.probs if call.weights is None else call.weights for call in calls], 2) if changed else None,
        v=put([call.v for call in calls], 2, few=True),
    )


def materialised(attention: Attention) -> Attention:
    """The same attention with its maps in place of queries and keys."""
    if attention.q is None:
        return attention
    return Attention(attention.owner, attention.operation, probs=attention.maps()["probs"], v=attention.v)


def _along_queries(calls: Sequence[Attention]) -> Attention:
    """One map of calls that each computed it for some of the queries."""
    maps = [materialised(call) for call in calls]
    probs = torch.cat([a.probs for a in maps if a.probs is not None], 2)
    changed = [a.probs if a.weights is None else a.weights for a in maps]
    weights = torch.cat([w for w in changed if w is not None], 2) if any(a.mixed for a in maps) else None
    return Attention(maps[0].owner, maps[0].operation, probs=probs, weights=weights, v=maps[0].v)


def joined(parts: Sequence[Attention]) -> Attention:
    """Attention of several modules of one block, with the heads of all of them one after the other."""
    if len(parts) == 1:
        return parts[0]
    first = parts[0]
    values = [a.v for a in parts if a.v is not None and a.v.shape[1] == a.shape[1]]
    alike = len(values) == len(parts) and len({v.shape[-1] for v in values}) == 1
    v = torch.cat(values, 1) if alike else None
    if all(
        a.q is not None and a.k is not None and a.bias is None and not a.causal and a.scale == first.scale
        and a.q.shape[-1] == first.q.shape[-1] and a.q.shape[1] == a.k.shape[1]  # type: ignore[union-attr]
        for a in parts
    ):  # fmt: skip
        q, k = (torch.cat([getattr(a, name) for a in parts], 1) for name in ("q", "k"))
        return Attention(first.owner, first.operation, q, k, scale=first.scale, v=v)
    maps = [materialised(a) for a in parts]
    probs = torch.cat([a.probs for a in maps if a.probs is not None], 1)
    changed = [a.probs if a.weights is None else a.weights for a in maps]
    weights = torch.cat([w for w in changed if w is not None], 1) if any(a.mixed for a in maps) else None
    return Attention(first.owner, first.operation, probs=probs, weights=weights, v=v)


def laid_out(x: Tensor, part: Part, like: Tensor, images: int) -> Tensor:
    """The inverse of what `read_part` does to the maps of a single call: [B·W, H, N, N] -> the shape of the call's own
    `like`."""
    if is_plain(part):
        return x
    factors = [(role, images if role == IMAGE else size) for axis in part.axes[1:] for role, size in axis]
    order = [i for wanted in (IMAGE, WINDOW, HEAD) for i, (role, _) in enumerate(factors) if role == wanted]
    split = x.reshape(*(factors[i][1] for i in order), *x.shape[-2:])
    back = [order.index(i) for i in range(len(order))]
    return split.permute(*back, len(order), len(order) + 1).reshape(like.shape[:-2] + x.shape[-2:])
