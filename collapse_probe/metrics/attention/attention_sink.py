"""Does a head pour its attention into one key?"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from collapse_probe.capture.plan import Plan
from collapse_probe.capture.trace import MapTile, Trace
from collapse_probe.errors import SettingError
from collapse_probe.metrics.map_metric import HeadMeans, MapMetric, RowMeans, by_head, patch_places, prefix_places
from collapse_probe.metrics.metric import DOTS, Need, Variant, no_token_maps
from collapse_probe.metrics.nulls import untrained_only
from collapse_probe.registry import METRICS
from collapse_probe.results.findings import MetricResult
from collapse_probe.statistics.intervals import Array

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


def prefix_mass(plan: Plan, trace: Trace, tile: MapTile) -> Tensor:
    """The mass that each query of a tile gives to prefix tokens, [b, h, L, R]; NaN where a layer has none."""
    keys = prefix_places(plan, plan.layers[plan.map_layers[tile.positions[0]]].keys)
    if not keys:
        return torch.full(tile.probs.shape[:-1], torch.nan, device=tile.probs.device)
    return tile.probs[..., keys].sum(-1)


class PeakMeans(HeadMeans):
    """Per image, block and head the mass on the most attended key, and whether that is a prefix token."""

    def __init__(self, plan: Plan, patches_only: bool) -> None:
        super().__init__(plan)
        self.plan, self.patches_only = plan, patches_only
        self.add_means(on_prefix=self.shape)

    def start_batch(self, trace: Trace, names: Sequence[str]) -> None:
        """Make room for a batch: peaks over patch keys and over prefix keys."""
        self._peaks = torch.full((2, trace.images, *self.shape), -torch.inf)

    def add_tile(self, tile: MapTile) -> None:
        """Raise the peaks to those of a tile's keys."""
        patches = patch_places(self.plan, self.plan.layers[self.plan.map_layers[tile.positions[0]]].keys)
        if not tile.whole_columns or (self.patches_only and patches is None):
            return
        held = tile.tokens("column")
        means_bhLC = received(tile.probs)
        for target, wanted in zip(self._peaks, self._kinds(held, patches), strict=True):
            if wanted:
                peak = means_bhLC[..., wanted].amax(-1).transpose(1, 2).cpu()
                place = torch.tensor(tile.positions)
                target[tile.images, place, tile.heads] = torch.maximum(target[tile.images, place, tile.heads], peak)

    @staticmethod
    def _kinds(held: list[int], patches: list[int] | None) -> tuple[list[int], list[int]]:
        """Places in the tile of patch keys and of others; all are patches where nobody knows."""
        inside = set(held if patches is None else patches)
        return [i for i, t in enumerate(held) if t in inside], [i for i, t in enumerate(held) if t not in inside]

    def end_batch(self, trace: Trace) -> dict[str, Tensor]:
        """Close the batch."""
        patch, prefix = self._peaks
        peak = patch if self.patches_only else torch.maximum(patch, prefix)
        known = torch.isfinite(patch) | torch.isfinite(prefix)
        self.add_images("on_prefix", torch.where(known, (prefix > patch).double(), torch.nan))
        return self.add_heads(value=torch.where(torch.isfinite(peak), peak, torch.nan))


class AttentionSink(MapMetric):
    """Mass on the most attended key, or on the prefix tokens."""

    name = "attention-sink"
    summary = "how much attention goes to the one key that receives most, or to the prefix tokens"
    dims = ("block", "head")
    title = "How much attention one key receives"
    seen = f"Share of all attention that goes to the key which receives most of it. {DOTS} Dotted: uniform attention."
    limits = "A sink is no collapse by itself: a head may park its attention on a token where it does nothing."
    panel = "the most attended key"
    unit = "share of attention"
    reference = ("uniform", "uniform attention")
    defaults = {"keys": "any", "point": "probs"}
    variants = {
        "prefix": Variant({"keys": "prefix"}, "all prefix tokens together"),
        "patches": Variant({"keys": "patch"}, "the most attended patch"),
    }

    def __init__(self, plan: Plan, **settings: Any) -> None:
        super().__init__(plan, **settings)
        if self.settings["keys"] not in KEYS:
            raise SettingError(f"keys must be one of {', '.join(KEYS)}, not {self.settings['keys']!r}")

    def inapplicable(self) -> str:
        """There must be maps over tokens, and prefix tokens where these are asked for."""
        if no_token_maps(self.plan):
            return no_token_maps(self.plan)
        keys = [self.plan.layers[i].keys for i in self.plan.token_layers]
        if self.settings["keys"] == "prefix" and not any(prefix_places(self.plan, n) for n in keys):
            return "the model has no prefix tokens (class, distillation or register tokens)"
        if self.settings["keys"] == "patch" and all(patch_places(self.plan, n) is None for n in keys):
            return "no block attends to the model's patches"
        return ""

    @property
    def definition(self) -> str:
        """The definition in words."""
        on_prefix = "details.on_prefix is the share of images in which the most attended key is a prefix token. "
        on_prefix = on_prefix if self.settings["keys"] == "any" else ""
        return (
            f"Mean over images of {KEYS[self.settings['keys']]}, on the softmax (probs), all queries counted. 1: every query "
            f"attends to one key alone (to prefix tokens alone); uniform attention gives details.uniform. {on_prefix}A "
            "sink is no collapse by itself: a head may park its attention where it does nothing."
        )

    def needs(self) -> dict[str, Need]:
        """Masses by block and head."""
        keys = self.settings["keys"]
        if keys == "prefix":
            return {"sink": (("prefix-mass",), lambda: RowMeans(self.plan, partial(prefix_mass, self.plan)))}
        return {"sink": (("attention-sink", keys), lambda: PeakMeans(self.plan, keys == "patch"))}

    def read(self, folds: Mapping[str, Any], records: Mapping[str, Mapping[str, Array]]) -> MetricResult:
        """Masses, with what uniform attention would give."""
        details = {"uniform": self._uniform()}
        if self.settings["keys"] == "any":
            details["on_prefix"] = folds["sink"].mean("on_prefix")[0]
        return self.reading(**by_head(folds["sink"]), point="probs", details=details, nulls=untrained_only())

    def _uniform(self) -> Array:
        layers = [self.plan.layers[i] for i in self.plan.map_layers]
        prefix = self.settings["keys"] == "prefix"
        shares = [(len(prefix_places(self.plan, layer.keys)) if prefix else 1) / max(layer.keys, 1) for layer in layers]
        return np.array([np.nan if layer.reason else share for layer, share in zip(layers, shares, strict=True)])

    def per_image(self, records: Mapping[str, Mapping[str, Array]]) -> Array | None:
        """Mean over heads, [images, blocks]."""
        return records["sink"]["value"]


METRICS.add(AttentionSink.name, AttentionSink)
