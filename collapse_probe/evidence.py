"""The evidence behind findings: what one metric read, what it would read with nothing to find, a few images with their maps."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]


@dataclass(frozen=True)
class Nulls:
    """What a metric would read with nothing to find.

    `values` maps untrained, other_token, other_image, other_head and kappa to arrays with the metric's dims, or to
    None where `reasons` says why; `images` says on how many images each was taken; `kappa_ci95` [..., 2]; `spread`: see nulls.
    """

    values: Mapping[str, Array | None]
    images: Mapping[str, int]
    reasons: Mapping[str, str] = field(default_factory=dict)
    kappa_ci95: Array | None = None
    spread: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Reading:
    """One metric: `values` with axes `dims`, `stderr` of the same shape, `ci95` with one more axis (low, high).

    `head_mean` holds, for a metric with a head axis, its mean over heads as (values, stderr, ci95) over blocks.
    A metric that does not apply has `not_applicable` (the reason) and no values.
    """

    dims: tuple[str, ...]
    definition: str
    values: Array | None = None
    stderr: Array | None = None
    ci95: Array | None = None
    collapsed: str | None = None
    point: str | None = None
    settings: Mapping[str, Any] = field(default_factory=dict)
    nulls: Nulls | None = None
    head_mean: tuple[Array, Array, Array] | None = None
    not_applicable: str | None = None


@dataclass(frozen=True)
class Gallery:
    """A few of the images with the attention map of every block, for the report.

    `pictures` uint8 [I, height, width, 3] (the model's own crop), `maps` float64 [I, blocks, rows, columns]
    (attention paid to each patch, mean over heads and over the queries that `query` names). `rollouts`, of the same shape,
    is the same for attention rollout up to each block, from the mean over heads, where that was measured.
    """

    names: tuple[str, ...]
    pictures: NDArray[np.uint8]
    maps: Array
    query: str
    rollouts: Array | None = None
