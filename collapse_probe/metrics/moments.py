"""Central moments that join: those of a set of images from those of its parts, with no digits lost where values hardly vary."""

from __future__ import annotations

from collections.abc import Sequence
from math import comb

import torch
from torch import Tensor

ONE: tuple[tuple[int, int], ...] = ((1, 0), (2, 0), (3, 0))
"""The powers of x and y of the moments of one number: its mean, then Σ(x − mean)² and Σ(x − mean)³."""


def moments_of(values: Sequence[Tensor], powers: Sequence[tuple[int, int]]) -> tuple[Tensor, Tensor]:
    """How many images define all `values` (x, or x and y, each [B, …] in float64), [...], and their moments [powers, ...].

    For a power of order one the mean, for others the sum Σ (x − mean x)^a (y − mean y)^b; 0 where no image defines them.
    """
    defined = torch.stack([torch.isfinite(each) for each in values]).all(0)
    count = defined.sum(0).to(values[0].dtype)
    means, rest = [], []
    for each in values:
        base = torch.where(defined, each, -torch.inf).amax(0)  # so that equal values have exactly their value as their mean
        base = torch.where(count > 0, base, 0.0)
        apart = torch.where(defined, each - base, 0.0)
        mean = apart.sum(0) / count.clamp_min(1)
        means.append(base + mean)
        rest.append(torch.where(defined, apart - mean, 0.0))
    x, y = rest if len(rest) == 2 else (rest[0], torch.zeros_like(rest[0]))
    sums = [(x**a * y**b).sum(0) for a, b in powers[len(values) :]]
    return count, torch.stack([*means, *sums])


def joined(one: Sequence[Tensor], other: Sequence[Tensor], powers: Sequence[tuple[int, int]]) -> tuple[Tensor, Tensor]:
    """Count and moments of two sets of images together (Chan, Golub & LeVeque 1979; Pébay 2008)."""
    (count, moments), (other_count, other_moments) = one, other
    total = count + other_count
    share = other_count / total.clamp_min(1)
    parts = ((count, dict(zip(powers, moments, strict=True))), (other_count, dict(zip(powers, other_moments, strict=True))))
    first = [power for power in powers if sum(power) == 1]
    mean = {p: parts[0][1][p] + (parts[1][1][p] - parts[0][1][p]) * share for p in first}
    result = [*mean.values()]
    for a, b in powers[len(first) :]:
        whole = torch.zeros_like(total)
        for number, own in parts:
            x, y = (own[p] - mean[p] if p in mean else torch.zeros_like(total) for p in ((1, 0), (0, 1)))
            for i in range(a + 1):
                for j in range(b + 1):
                    if i + j == 1:
                        continue
                    inner = number if i + j == 0 else own[i, j]
                    whole = whole + comb(a, i) * comb(b, j) * inner * x ** (a - i) * y ** (b - j)
        result.append(whole)
    return total, torch.stack(result)
