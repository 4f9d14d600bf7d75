"""Does a head pour its attention into one key?"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from collapse_probe.capture.plan import Plan
from collapse_probe.capture.trace import MapTile, Trace, by_window
from collapse_probe.metrics.coverage import NO_PATCHES, has_patches
from collapse_probe.metrics.map_metric import HeadMeans, HeadMetric, RowMeans, patch_places, prefix_places
from collapse_probe.metrics.metric import DOTS, Need, Variant
from collapse_probe.registry import METRICS

KEYS = {
    "any": "max_j of the mean over queries of p_ij: the mass on the key that the queries attend to most",
    "patch": "max_j of the mean over queries of p_ij over patch keys j alone: the mass on the most attended patch",
    "prefix": "the mean over queries of Σ_j p_ij over the prefix tokens j: the mass on class, distillation and register tokens",
}


def received(probs: Tensor) -> Tensor:
    """What each key receives in the mean over queries, [..., N, M] -> [..., M]; sums to 1 for a softmax.

    >>> received(torch.tensor([[1.0, 0.0], [0.5, 0.5]])).tolist()
    [0.75, 0.25]
    """
    return probs.mean(-2)


def prefix_mass(trace: Trace, tile: MapTile) -> Tensor:
    """The mass that each query of a tile gives to prefix tokens, [b, h, L, R]; NaN where a layer has none."""
    plan = trace.plan
    keys = prefix_places(plan, plan.layers[plan.map_layers[tile.positions[0]]])
    if not keys:
        return torch.full(tile.probs.shape[:-1], torch.nan, device=tile.probs.device)
    return tile.probs[..., keys].sum(-1)


class PeakMeans(HeadMeans):
    """Per image, block and head the mass on the most attended key (mean over windows), and whether that is a prefix token."""

    def __init__(self, plan: Plan, patches_only: bool) -> None:
        super().__init__(plan)
        self.plan, self.patches_only, self.groups = plan, patches_only, plan.map_groups()
        self.add_means(on_prefix=self.shape)

    def start_batch(self, trace: Trace, names: Sequence[str]) -> None:
        self._peaks = [  # by group of layers: over patch keys and over the others, of each image (and window), head and layer
            torch.full((2, trace.images * group.windows, group.heads, len(group.positions)), -torch.inf, device=trace.device)
            for group in self.groups
        ]

    def add_tile(self, tile: MapTile) -> None:
        patches = patch_places(self.plan, self.plan.layers[self.plan.map_layers[tile.positions[0]]])
        if not tile.whole_columns or (self.patches_only and patches is None):
            return
        keys, means_bhLC = tile.tokens("column"), received(tile.probs)
        inside = set(keys if patches is None else patches)  # all keys count as patches where these are not known
        kinds = [i for i, t in enumerate(keys) if t in inside], [i for i, t in enumerate(keys) if t not in inside]
        first, last = tile.images.start * tile.windows, tile.images.stop * tile.windows
        for peaks, places in zip(self._peaks[self.groups.index(tile.group)], kinds, strict=True):
            if places:
                here = peaks[first:last, tile.heads]
                here.copy_(torch.maximum(here, means_bhLC[..., places].amax(-1)))

    def end_batch(self, trace: Trace) -> dict[str, Tensor]:
        value = torch.full((trace.images, *self.shape), torch.nan, device=trace.wide_device)
        on_prefix = torch.full_like(value, torch.nan, dtype=torch.float64)
        for group, peaks in zip(self.groups, self._peaks, strict=True):
            patch, prefix = peaks.to(value.device)
            peak = patch if self.patches_only else torch.maximum(patch, prefix)
            known = torch.isfinite(patch) | torch.isfinite(prefix)
            for target, each in (
                (value, torch.where(torch.isfinite(peak), peak, torch.nan)),
                (on_prefix, torch.where(known, (prefix > patch).double(), torch.nan)),
            ):
                of_images = by_window(each, group.windows).mean(1)
                target[:, group.positions, : group.heads] = of_images.transpose(1, 2)
        self.add_images("on_prefix", on_prefix)
        return self.add_heads(value=value)


class AttentionSink(HeadMetric):
    """Mass on the most attended key, or on the prefix tokens."""

    name = "attention-sink"
    summary = "how much attention goes to the one key that receives most, or to the prefix tokens"
    title = "How much attention one key receives"
    seen = f"Share of all attention that goes to the key which receives most of it. {DOTS} Dotted: uniform attention."
    limits = "A sink is no collapse by itself: a head may park its attention on a token where it does nothing."
    failure_types = ()
    formula = r"\max_j \frac{1}{N} \sum_i p_{ij}"
    value_range = "1/N (uniform) to 1 (all queries on one key)"
    source = "this project; the name after Xiao et al., arXiv 2309.17453"
    traps = "A sink raises similarity between blocks by rows, for all queries look at one key there. Softmax map alone."
    panel = "the most attended key"
    unit = "share of attention"
    reference = ("uniform", "uniform attention")
    windowed = True
    defaults = {"keys": "any", "point": "probs"}
    choices = {"keys": KEYS}
    variants = {
        "prefix": Variant({"keys": "prefix"}, "all prefix tokens together"),
        "patches": Variant({"keys": "patch"}, "the most attended patch"),
    }

    def inapplicable(self) -> str:
        """There must be maps over tokens, and prefix tokens where these are asked for."""
        if missing := super().inapplicable():
            return missing
        layers = [self.layers[place] for place in self.measured]
        if self.settings["keys"] == "prefix" and not any(prefix_places(self.plan, layer) for layer in layers):
            return "the model has no prefix tokens (class, distillation or register tokens)"
        if self.settings["keys"] == "patch" and all(patch_places(self.plan, layer) is None for layer in layers):
            return "no block attends to the model's patches" if has_patches(self.plan) else NO_PATCHES
        return ""

    @property
    def definition(self) -> str:
        on_prefix = "details.on_prefix is the share of images in which the most attended key is a prefix token. "
        on_prefix = on_prefix if self.settings["keys"] == "any" else ""
        return (
            f"Mean over images of {KEYS[self.settings['keys']]}, on the softmax (probs), all queries counted. 1: every query "
            f"attends to one key alone (to prefix tokens alone); uniform attention gives details.uniform. {on_prefix}A "
            "sink is no collapse by itself: a head may park its attention where it does nothing."
        )

    def accumulators(self) -> list[Need]:
        keys = self.settings["keys"]
        if keys == "prefix":
            return [(("prefix-mass",), lambda: RowMeans(self.plan, prefix_mass))]
        return [(("attention-sink", keys), lambda: PeakMeans(self.plan, keys == "patch"))]

    def details(self, accumulator: HeadMeans) -> dict[str, Any]:
        """What uniform attention would give in each block, and how often the most attended key is a prefix token."""
        prefix = self.settings["keys"] == "prefix"
        shares = [(len(prefix_places(self.plan, layer)) if prefix else 1) / max(layer.keys, 1) for layer in self.layers]
        on_prefix = {"on_prefix": accumulator.mean("on_prefix")[0]} if self.settings["keys"] == "any" else {}
        return {"uniform": self.of_measured(shares), **on_prefix}


METRICS.add(AttentionSink.name, AttentionSink)
