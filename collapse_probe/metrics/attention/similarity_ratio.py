"""What share of a block's attention vectors is like those of its neighbours: the ratio of DeepViT's Figure 3a."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from itertools import product
from typing import Any

import numpy as np
import torch
from torch import Tensor

from collapse_probe.capture.plan import Plan
from collapse_probe.capture.trace import MapTile, Trace
from collapse_probe.errors import SettingError
from collapse_probe.metrics.accumulators import Means
from collapse_probe.metrics.coverage import covered_pairs, groups_of, no_pair
from collapse_probe.metrics.map_metric import BY_ROWS, CENTRED, OF_PROBS, MapMetric
from collapse_probe.metrics.metric import CURVE, Need, Record, Variant
from collapse_probe.metrics.nulls import untrained_only
from collapse_probe.metrics.pairwise_cosine import unit_vectors
from collapse_probe.registry import METRICS
from collapse_probe.results.findings import MetricResult
from collapse_probe.statistics.intervals import Array, count_bounds

DIRECTIONS = ("before", "both")
NEAREST = (1, 2, 3, 5)
THRESHOLDS: tuple[float | str, ...] = (0.7, 0.8, 0.9, 0.95, "mean")
SIMILAR_ABOVE = 0.9
"""A block is similar where its ratio is above this."""
ROUNDING = 1e-6
"""Cosines and shares nearer than this are taken as equal."""


@dataclass(frozen=True)
class Choice:
    """What DeepViT leaves open: how many nearest blocks count (`k`, on each side), from which side, and above what.

    `threshold` is a cosine, or "mean" for the image's own mean over the heads and tokens of the block.
    """

    k: int = 1
    threshold: float | str = 0.9
    direction: str = "before"

    def __post_init__(self) -> None:
        if self.k not in NEAREST or self.threshold not in THRESHOLDS or self.direction not in DIRECTIONS:
            raise SettingError(
                f"the similarity ratio takes k from {NEAREST}, threshold from {THRESHOLDS} and direction from {DIRECTIONS}, "
                f"not {self.k}, {self.threshold!r} and {self.direction!r}"
            )


CHOICES = tuple(Choice(k, t, d) for d, k, t in product(DIRECTIONS, NEAREST, THRESHOLDS))


def nearest_mean(cosines: Tensor, k: int, direction: str) -> Tensor:
    """Mean cosine of every vector with those of the nearest blocks, [offsets, B, L, V] -> [B, L, V].

    `cosines[d − 1, :, l]` are those of block l with block l − d, NaN where there is none. The k blocks before, or up to k on
    each side; near an end those that there are. NaN where a vector has no cosine with any of them.
    """
    parts = list(cosines[:k])
    if direction == "both":
        for d, before in enumerate(cosines[:k], 1):
            after = torch.full_like(before, torch.nan)
            after[:, : max(before.shape[1] - d, 0)] = before[:, d:]
            parts.append(after)
    total, n = torch.zeros_like(parts[0]), torch.zeros_like(parts[0])
    for part in parts:
        defined = torch.isfinite(part)
        total += torch.where(defined, part, 0.0)
        n += defined
    return torch.where(n > 0, total / n.clamp_min(1), torch.nan)


def share_above(similarity: Tensor, threshold: float | str) -> Tensor:
    """Share of the defined vectors whose similarity is above the threshold, [B, L, V] -> [B, L].

    With "mean": not below the mean over the image's own vectors of the block, so that identical blocks have the share 1.

    >>> share_above(torch.tensor([[[0.95, 0.5, 0.99, 0.2]]]), 0.9).item()
    0.5
    """
    defined = torch.isfinite(similarity)
    if threshold == "mean":
        above = similarity >= similarity.nanmean(-1, keepdim=True) - ROUNDING
    else:
        above = similarity > float(threshold)
    n = defined.sum(-1)
    return torch.where(n > 0, (above & defined).sum(-1).double() / n.clamp_min(1), torch.nan)


def sensitivity(ratios: Array, bounds: Callable[[float], Array], choices: Sequence[Choice] = CHOICES) -> list[dict[str, Any]]:
    """How many blocks are similar under each choice, with the interval of that count, as plain numbers.

    `ratios` are means over images [choices, blocks] and `bounds(tail)` their intervals; that of the count is None with
    one image. A ratio can also equal `SIMILAR_ABOVE`: nine of ten vectors are not more than 0.9, however rounded.

    >>> ends = np.array([[[np.nan, np.nan], [0.8, 1.0], [0.3, 0.5]]])
    >>> sensitivity(np.array([[np.nan, 0.95, 0.4]]), lambda tail: ends, [Choice(1, 0.9, "before")])
    [{'k': 1, 'threshold': 0.9, 'direction': 'before', 'similar_blocks': 1, 'blocks': 2, 'ci95': [0.0, 1.0]}]
    """
    rows = []
    for at, (choice, mean) in enumerate(zip(choices, ratios, strict=True)):
        ci95 = count_bounds(mean, partial(_of_choice, bounds, at), SIMILAR_ABOVE + ROUNDING)
        row = {
            "similar_blocks": int((mean - SIMILAR_ABOVE > ROUNDING).sum()),
            "blocks": int(np.isfinite(mean).sum()),
            "ci95": ci95.tolist() if np.isfinite(ci95).all() else None,
        }
        rows.append({**asdict(choice), **row})
    return rows


def _of_choice(bounds: Callable[[float], Array], at: int, tail: float) -> Array:
    return np.asarray(bounds(tail)[at])


class NeighbourCosines(Means):
    """Per image and block the similarity ratio under every choice, from the cosines with the nearest blocks.

    Blocks are near along an unbroken chain of neighbours in depth. Block l of a group stands at its place less that of the
    group's first one, so that other groups' blocks between leave a gap.
    """

    def __init__(self, plan: Plan, point: str, axis: str, centred: bool, choice: Choice) -> None:
        super().__init__()
        self.point, self.axis, self.centred, self.choice = point, axis, centred, choice
        self.groups, self.blocks, self.adjacent = groups_of(plan, self.windowed), len(plan.map_layers), plan.adjacent
        self.add_means(ratio=(len(CHOICES), self.blocks))

    def start_batch(self, trace: Trace, names: Sequence[str]) -> None:
        self._cosines = []  # by group of layers: offset, image, block, head and token
        for group in self.groups:
            tokens = group.queries if self.axis == "row" else group.keys
            places = group.positions[-1] - group.positions[0] + 1
            shape = (max(NEAREST), trace.images, places, group.heads, tokens)
            self._cosines.append(torch.full(shape, torch.nan, device=trace.wide_device))

    def add_tile(self, tile: MapTile) -> None:
        if not tile.whole(self.axis):
            return
        units = unit_vectors(tile, self.point, self.axis, self.centred)
        vectors, valid = units.matrices, units.valid
        target = self._cosines[self.groups.index(tile.group)]
        span, first = tile.rows if self.axis == "row" else tile.columns, tile.positions[0]
        for later, place in enumerate(tile.positions):
            for earlier, before in enumerate(tile.positions[:later]):
                if place - before <= max(NEAREST) and all(self.adjacent[before:place]):
                    cosines = (vectors[:, :, later] * vectors[:, :, earlier]).sum(-1 if self.axis == "row" else -2)
                    cosines = torch.where(valid[:, :, later] & valid[:, :, earlier], cosines, torch.nan)
                    target[place - before - 1, tile.images, place - first, tile.heads, span] = cosines.to(target.device)

    def end_batch(self, trace: Trace) -> dict[str, Tensor]:
        """Ratios under every choice go into the sums; those under this one, [B, blocks], are kept by image."""
        shape = (trace.images, len(CHOICES), self.blocks)
        ratios = torch.full(shape, torch.nan, dtype=torch.float64, device=trace.wide_device)
        for group, cosines in zip(self.groups, self._cosines, strict=True):
            inside = [place - group.positions[0] for place in group.positions]
            means = {(k, d): nearest_mean(cosines.flatten(3), k, d)[:, inside] for k, d in product(NEAREST, DIRECTIONS)}
            for place, choice in enumerate(CHOICES):
                ratios[:, place, group.positions] = share_above(means[choice.k, choice.direction], choice.threshold)
        del self._cosines
        self.add_images("ratio", ratios)
        return {"ratio": ratios[:, CHOICES.index(self.choice)]}


class SimilarityRatio(MapMetric):
    """The share of a block's attention vectors that are like those of the nearest blocks (DeepViT Fig. 3a)."""

    name = "similarity-ratio"
    summary = "share of a block's attention vectors that are like those of the nearest blocks (DeepViT Fig. 3a)"
    dims = ("block",)
    collapsed = "high"
    title = "What share of a block's attention vectors is like its neighbours'"
    seen = (
        "A reading of DeepViT's Figure 3a: the share of (head, token) vectors whose cosine with those of the nearest blocks is "
        f"above a threshold. {CURVE} Dotted: 0.9, above which the block counts as similar."
    )
    limits = (
        "The paper leaves threshold, number and side of the neighbours open, and these decide the count: see the table. Raw "
        "cosines near 1 are also what near-uniform attention gives without any training."
    )
    failure_types = ("depth",)
    formula = r"\frac{1}{H N} \#\{\, (h,t) : \cos(A^l[h,:,t],\, A^{l-1}[h,:,t]) > 0.9 \,\}"
    value_range = "0 to 1"
    source = "DeepViT, arXiv 2103.11886, Fig. 3a, by this project's reading"
    traps = (
        "With a mean as the threshold maps that agree by chance give about one half. Of the choices left open by the "
        "paper each changes the number."
    )
    panel = "the nearest block before, cosine above 0.9"
    unit = "share of vectors"
    top = 1.0
    reference = ("ratio_above", "counted as similar above")
    defaults = {**asdict(Choice()), "axis": "column", "centred": False, "point": "weights"}
    quantity = "ratio"
    variants = {
        "mean": Variant({"threshold": "mean"}, "threshold: the image's own mean"),
        "both": Variant({"direction": "both"}, "the nearest block on each side"),
        "nearest-3": Variant({"k": 3}, "the three nearest blocks before"),
        "row": BY_ROWS,
        "centred": CENTRED,
        "probs": OF_PROBS,
    }

    def __init__(self, plan: Plan, **settings: Any) -> None:
        super().__init__(plan, **settings)
        self.choice = Choice(self.settings["k"], self.settings["threshold"], self.settings["direction"])

    def inapplicable(self) -> str:
        """There must be two neighbouring blocks with comparable maps."""
        return super().inapplicable() or no_pair(self.plan)

    @property
    def definition(self) -> str:
        sides = "before it" if self.choice.direction == "before" else "on each side of it"
        above = f"above {self.choice.threshold}"
        if self.choice.threshold == "mean":
            above = "not below its mean over the heads and tokens of that image and block"
        return (
            f"Share of the {self.settings['axis']}s A[h, t] of a block (heads h, tokens t; prefix tokens included), on "
            f"{self.map_name}, whose mean cosine with the same {self.settings['axis']} of the {self.choice.k} nearest "
            f"block(s) {sides} is {above}; per image, then averaged over images. DeepViT (arXiv 2103.11886, Fig. 3a) leaves "
            "number, side and threshold open: these are our readings. details.similar_blocks counts the blocks with a ratio "
            f"above {SIMILAR_ABOVE} (interval: from those surely above it to those not surely below it, by one-sided bounds "
            "at 5 % over the number of blocks), and details.sensitivity that count, with such an interval, under every other "
            "choice. With the mean as threshold maps that are alike or not by chance give about one half."
        )

    def accumulators(self) -> list[Need]:
        key = (self.point, self.settings["axis"], self.settings["centred"], self.choice)
        return [(("similarity-ratio", *key), lambda: NeighbourCosines(self.plan, *key))]

    def compute(self, accumulators: Sequence[Any], records: Sequence[Record]) -> MetricResult:
        """The ratios under this choice; how many blocks that makes similar, under this choice and all others."""
        (means,) = accumulators
        mean, stderr, _ = means.mean("ratio")
        at, table = CHOICES.index(self.choice), sensitivity(mean, lambda tail: means.bounds("ratio", tail))
        count = {"value": float(table[at]["similar_blocks"]), "ci95": table[at]["ci95"]}
        details = {"ratio_above": SIMILAR_ABOVE, "similar_blocks": count, "sensitivity": table}
        facts: dict[str, Any] = {
            "covers": covered_pairs(self.plan),
            "stderr": stderr[at],
            "ci95": means.bounds("ratio")[at],
        }
        return self.result(mean[at], **facts, details=details, nulls=untrained_only())


METRICS.add(SimilarityRatio.name, SimilarityRatio)
