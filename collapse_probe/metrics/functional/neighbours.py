"""Cosines of neighbouring blocks alone, for very long inputs: the columns of two blocks are held at a time, and few of them."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch
from torch import Tensor

from collapse_probe.capture.trace import ALL, TILE_BYTES, Attention, by_window, expand_heads

LEAST_SQUARE = 1e-24
"""A column whose squares sum to less in float32 may be wrong by underflow: then columns are taken relative to their largest."""


def device_of(attention: Attention) -> torch.device:
    """Where an attention's tensors are."""
    return next(tensor.device for tensor in (attention.q, attention.probs) if tensor is not None)


class Columns:
    """The columns of one attention's maps, for some of its maps [B·windows] and heads, a few keys at a time."""

    def __init__(self, attention: Attention, point: str, maps: slice, heads: slice, step: int) -> None:
        self.attention, self.maps, self.heads = attention, maps, heads
        self.captured = attention.q is None or (point == "weights" and attention.mixed)
        self.point, self.plain = point, attention.bias is None and not attention.causal
        self.shape = (maps.stop - maps.start, heads.stop - heads.start, *attention.shape[-2:])
        self.device = device_of(attention)
        if attention.q is None or attention.k is None or self.captured:
            return
        self.queries = attention.q[maps, heads].float() * attention.scale
        self.keys = expand_heads(attention.k[maps], attention.q.shape[1])[:, heads]
        if attention.logsumexp is not None and self.plain:
            sums = attention.logsumexp[maps, heads].float()
        else:
            count = attention.shape[-2]
            spans = (slice(start, min(start + step, count)) for start in range(0, count, step))
            sums = torch.cat([torch.logsumexp(attention.logits(maps, heads, span), -1) for span in spans], dim=2)
        self.sums = sums.masked_fill(sums == -torch.inf, torch.inf)[
            :, :, None
        ]  # a query that may see nothing attends to nothing

    def of(self, keys: slice, relative: bool) -> tuple[Tensor, Tensor]:
        """The columns of some keys as rows [b, h, C, N] and their lengths [b, h, C], 0 for one without direction.

        `relative`: each divided by its largest entry, which no cosine minds.
        """
        if self.captured:
            columns = self.attention.maps(self.maps, self.heads, columns=keys)[self.point].mT.contiguous()
            if relative:
                largest = columns.abs().amax(-1, keepdim=True)
                columns = columns / torch.where(largest >= torch.finfo(torch.float32).tiny, largest, torch.inf)
        else:
            if self.plain:
                logits = self.keys[:, :, keys].float().contiguous() @ self.queries.mT
            else:
                logits = self.attention.logits(self.maps, self.heads, ALL, keys).mT
            logits = logits.sub_(self.sums)
            if relative:
                largest = logits.amax(-1, keepdim=True)
                logits = logits.sub_(torch.where(largest > -87.3, largest, torch.inf))  # as much is left of a float32
            columns = logits.exp_()
        return columns, torch.linalg.vector_norm(columns, dim=-1)


def chain_sums(chain: Sequence[Columns], step: int, relative: bool = False) -> Tensor:
    """Of each two consecutive blocks [4, pairs, b]: the sums over heads of the cosines of the same token and of any two tokens,
    and how many of both are defined. `step` keys are taken at a time.

    Any two tokens: the product of the sums over tokens, which are float64 as what is left of them is a small difference.
    """
    maps, heads, queries, keys = chain[0].shape
    found = torch.zeros(4, len(chain) - 1, maps, dtype=torch.float64, device=chain[0].device)
    over_tokens, defined = found.new_zeros(len(chain), maps, heads, queries), found.new_zeros(len(chain), maps, heads)
    small = torch.zeros((), dtype=torch.bool, device=found.device)
    for start in range(0, keys, step):
        span, before = slice(start, min(start + step, keys)), None
        for block, part in enumerate(chain):
            columns, lengths = part.of(span, relative)
            valid = lengths > 0
            scale = torch.where(valid, lengths.reciprocal(), 0.0)
            small |= (lengths.square() < LEAST_SQUARE).any()
            over_tokens[block] += (scale[:, :, None] @ columns)[:, :, 0]
            defined[block] += valid.sum(-1)
            if before is not None:
                cosines = torch.linalg.vecdot(columns, before[0]) * scale * before[1]
                found[0, block - 1] += cosines.sum((1, 2), dtype=torch.float64)
                found[2, block - 1] += (valid & before[2]).sum((1, 2))
            before = columns, scale, valid
    if small and not relative:
        return chain_sums(chain, step, relative=True)
    found[1] = (over_tokens[1:] * over_tokens[:-1]).sum((2, 3))
    found[3] = (defined[1:] * defined[:-1]).sum(2)
    return found


def neighbour_cosines(chain: Sequence[Attention], point: str, images: int, windows: int = 1) -> Tensor:
    """Mean cosines of the columns of every block of a chain and the next, of the same token and of another, [2, B, pairs].

    Memory grows with the number of tokens; NaN where no two columns have a direction.
    """
    _, heads, queries, keys = chain[0].shape
    vectors = max(1, TILE_BYTES[device_of(chain[0]).type] // (2 * 4 * max(queries, keys)))  # of two blocks
    some_heads = min(heads, max(1, vectors // (windows * keys)))
    step = max(1, vectors // (some_heads * windows))
    parts = []
    for image in range(images):  # one by one, so that its numbers depend on no other
        maps, found = slice(image * windows, (image + 1) * windows), []
        for head in range(0, heads, some_heads):
            span = slice(head, min(head + some_heads, heads))
            found.append(chain_sums([Columns(attention, point, maps, span, step) for attention in chain], step))
        parts.append(torch.stack(found).sum(0))
    over_windows = by_window(torch.cat(parts, -1).movedim(-1, 0), windows).sum(1)
    same, every, same_pairs, every_pairs = over_windows.movedim(0, -1).cpu()
    real = torch.where(same_pairs > 0, same / same_pairs, torch.nan)
    others = every_pairs - same_pairs
    return torch.stack([real, torch.where(others > 0.5, (every - same) / others, torch.nan)]).mT


def chains(compared: Sequence[bool]) -> list[tuple[int, int]]:
    """First and last place of each unbroken chain of neighbours.

    >>> chains([True, True, False, True])
    [(0, 2), (3, 4)]
    """
    found, place = [], 0
    for joined, run in itertools.groupby(compared):
        count = len(list(run))
        if joined:
            found.append((place, place + count))
        place += count
    return found
