"""Have the patches become copies of the class token?"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from collapse_probe.capture.plan import Plan
from collapse_probe.capture.trace import Trace
from collapse_probe.metrics.accumulators import GROUPS, Means, group_of
from collapse_probe.metrics.coverage import NO_PATCHES, has_patches
from collapse_probe.metrics.functional.geometry import unit
from collapse_probe.metrics.metric import CURVE, Need, Record, mean_over_images
from collapse_probe.metrics.nulls import with_reasons
from collapse_probe.metrics.token_metric import TokenMetric, class_and_patches, in_parts
from collapse_probe.registry import METRICS
from collapse_probe.results.findings import MetricResult
from collapse_probe.statistics.intervals import Array, interval, jackknife


def direction_and_mean(tokens_BND: Tensor) -> dict[str, Tensor]:
    """Of the class token, which stands first, the direction; of the patches behind it the mean direction; [B, D] each.

    Their inner product is the mean cosine between the class token and the patches. Patches of zeros do not count; NaN where
    the class token or every patch is zero.
    """
    directions, valid = unit(tokens_BND)
    count = valid[:, 1:].sum(1)
    mean = directions[:, 1:].sum(1) / count.clamp_min(1)[:, None]
    return {
        "class": torch.where(valid[:, :1], directions[:, 0], torch.nan),
        "patches": torch.where(count[:, None] > 0, mean, torch.nan),
    }


class ClassPatchSums(Means):
    """By depth the mean cosine, and the sums by groups of images that give its mean over all pairs of different images.

    Σ_{a≠b} c_a · m_b = (Σ_a c_a) · (Σ_b m_b) − Σ_a c_a · m_a of the class tokens' directions c and the patches' means m.
    """

    def __init__(self, plan: Plan) -> None:
        super().__init__()
        self.depths = [depth for depth, shape in enumerate(plan.patch_shapes) if shape is not None]
        count = len(plan.patch_shapes)
        self.add_means(value=(count,))
        self.add_state("images", GROUPS, count)
        self.add_state("own", GROUPS, count)
        for depth in self.depths:
            shape = plan.patch_shapes[depth]
            assert shape is not None
            self.add_state(f"sums_{depth}", 2, GROUPS, shape[1])

    def start_batch(self, trace: Trace, names: Sequence[str]) -> None:
        self._groups = torch.tensor([group_of(name) for name in names])

    def end_batch(self, trace: Trace) -> dict[str, Tensor]:
        """Add one batch; mean cosines [B, depths] are kept by image."""
        cosines = torch.full((trace.images, len(trace.tokens)), torch.nan, dtype=torch.float64)
        for depth in self.depths:
            found = class_and_patches(trace, depth)
            if found is None:
                continue
            both = in_parts(direction_and_mean, torch.cat([found[0][:, None], found[1]], 1))
            own = (both["class"] * both["patches"]).sum(-1)
            cosines[:, depth] = own
            defined = own.isfinite()
            groups, sums = self._groups[defined], self.state(f"sums_{depth}")
            for place, name in enumerate(("class", "patches")):
                sums[place].index_add_(0, groups.to(sums.device), both[name][defined].to(sums.device))
            for name, values in (("own", own[defined]), ("images", torch.ones(len(groups), dtype=torch.float64))):
                state = self.state(name)[:, depth]
                state += torch.zeros(GROUPS, dtype=torch.float64).index_add_(0, groups, values).to(state.device)
        self.add_images("value", cosines)
        return {"value": cosines}

    def across_images(self) -> tuple[Array, Array]:
        """The mean over all pairs of different images, by depth, and its 95 % interval by a jackknife over groups of images."""
        images, own = self.array("images"), self.array("own")
        without = ~np.eye(GROUPS, dtype=bool)
        values, left_out = np.full(images.shape[1], np.nan), np.full(images.shape, np.nan)
        for depth in self.depths:
            sums = self.array(f"sums_{depth}")
            values[depth] = self._mean(sums.sum(1), own[:, depth].sum(), images[:, depth].sum())
            for group in np.flatnonzero(images[:, depth]):
                rest = without[group]
                left_out[group, depth] = self._mean(sums[:, rest].sum(1), own[rest, depth].sum(), images[rest, depth].sum())
        stderr, groups = jackknife(left_out)
        return values, interval(values, stderr, max(groups, 1))

    @staticmethod
    def _mean(sums: Array, own: float, images: float) -> float:
        pairs = images * (images - 1)
        return float((sums[0] @ sums[1] - own) / pairs) if pairs else np.nan


class ClsPatchSimilarity(TokenMetric):
    """Mean cosine between the class token and the patches of an image."""

    name = "cls-patch-similarity"
    summary = "mean cosine between the class token and the patches, beside the class token of another image"
    dims = ("depth",)
    title = "Class token and patches"
    seen = (
        "Mean cosine between the class token and the patches of its image, and between the class token of one image and the "
        f"patches of others. {CURVE}"
    )
    limits = (
        "One direction that all tokens of all images share raises it whatever the picture: only the distance from the class "
        "tokens of other images is about this image. Rising over checkpoints it is a sign that patches turn into copies of "
        "the global token, and no proof."
    )
    failure_types = ()
    formula = r"\frac{1}{n} \sum_i \cos(x_{\mathrm{cls}},\, x_i)"
    value_range = "−1 to 1"
    source = (
        "this project; DINOv3, arXiv 2508.10104, is reported to watch it over training, which no code that was read confirms"
    )
    traps = (
        "Before the final norm; after it the cosine is another. In a model with registers and no class token the first prefix "
        "token is a register."
    )
    panel = "class token and patches"
    unit = "cosine"

    @property
    def definition(self) -> str:
        return (
            "Mean over images of the mean cosine between the first prefix token (the class token in models that have one) and "
            "the patch tokens of the same image, on the residual stream, before any final norm. Compared with the class token "
            "of another image: the mean over all pairs of different images, exact from sums over images, its interval a "
            f"jackknife over {GROUPS} groups of images by a hash of their names. Depths without a class token are undefined."
        )

    def inapplicable(self) -> str:
        """There must be patches, and a prefix token beside them."""
        if missing := super().inapplicable():
            return missing
        if not has_patches(self.plan):
            return NO_PATCHES
        return "" if self.plan.prefix else "the model has no class token among its tokens"

    def accumulators(self) -> list[Need]:
        return [(("cls-patch",), lambda: ClassPatchSums(self.plan))]

    def compute(self, accumulators: Sequence[Any], records: Sequence[Record]) -> MetricResult:
        """The mean over images, beside that over pairs of different images."""
        (sums,) = accumulators
        across, ci95 = sums.across_images()
        images = int(sums.array("images").sum(0).max(initial=0))
        nulls = with_reasons({"untrained": None, "other_image": across}, {}, images, {"other_image": ci95})
        return self.result(**mean_over_images(sums), details={"first_prefix": self.plan.prefix[0]}, nulls=nulls)


METRICS.add(ClsPatchSimilarity.name, ClsPatchSimilarity)
