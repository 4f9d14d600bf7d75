"""In how many directions do the embeddings of different images differ?"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from collapse_probe.capture.plan import Plan
from collapse_probe.capture.trace import Trace
from collapse_probe.errors import SettingError
from collapse_probe.metrics.accumulators import GROUPS, Accumulator, group_of
from collapse_probe.metrics.functional.embeddings import (
    FIRST_RANK,
    LAST_RANK,
    RANKME_EPSILON,
    decay_exponent,
    rankme,
    spectrum,
)
from collapse_probe.metrics.metric import BESIDE_TWIN, Need, Record, Variant
from collapse_probe.metrics.nulls import OF_MANY, untrained_only
from collapse_probe.metrics.token_metric import TokenMetric, class_and_patches
from collapse_probe.registry import METRICS
from collapse_probe.results.findings import MetricResult
from collapse_probe.statistics.intervals import interval, jackknife

GROUP_BYTES = 256 * 2**20
"""Bytes that the moments of all groups of images may take; where they take more, one sum is kept and no interval given."""
NO_LIDAR = (
    "LiDAR needs several augmented views of each image, and a run has each image once; the classes of a data set are not views "
    "(arXiv 2312.04000). With views of your own: collapse_probe.metrics.functional.embeddings.lidar"
)
NO_INTERVAL = f"none: the second moments of {GROUPS} groups of images, which a jackknife needs, would take more than 256 MiB"
MEASURES = {
    "rankme": "exp(−Σ p log p), p = σ/Σσ + ε with ε = {epsilon:g} (RankMe), σ the singular values",
    "alpha": "α of λ_j ∝ j^(−α), by least squares of log λ_j on log j over the ranks {first} to {last} or as far as there are "
    "any, weighted by 1/j (α-ReQ), λ the eigenvalues of the covariance",
    "lidar": "LiDAR",
}


class EmbeddingMoments(Accumulator):
    """Σ x and Σ x xᵀ over images of one embedding x for each image and depth, by groups of images where these fit."""

    def __init__(self, plan: Plan, token: str) -> None:
        super().__init__()
        self.token = token
        self.widths = {depth: shape[1] for depth, shape in enumerate(plan.patch_shapes) if shape is not None}
        size = GROUPS * 8 * sum(width**2 for width in self.widths.values())
        self.groups = GROUPS if size <= GROUP_BYTES else 1
        self.add_state("images", self.groups, len(plan.patch_shapes))
        for depth, width in self.widths.items():
            self.add_state(f"first_{depth}", self.groups, width)
            self.add_state(f"second_{depth}", self.groups, width, width)

    def start_batch(self, trace: Trace, names: Sequence[str]) -> None:
        self._groups = torch.tensor([group_of(name) % self.groups for name in names])

    def end_batch(self, trace: Trace) -> dict[str, Tensor]:
        """Add one batch; a rank over images is no mean over them, so nothing is kept by image."""
        for depth in self.widths:
            embeddings_BD = self._embeddings(trace, depth)
            if embeddings_BD is None:
                continue
            first, second = self.state(f"first_{depth}"), self.state(f"second_{depth}")
            wide = embeddings_BD.to(first.device, torch.float64)
            for group in sorted(set(self._groups.tolist())):
                own = wide[(self._groups == group).to(wide.device)]
                first[group] += own.sum(0)
                second[group] += own.mT @ own
                self.state("images")[group, depth] += len(own)
        return {}

    def _embeddings(self, trace: Trace, depth: int) -> Tensor | None:
        """The class token, or the mean patch in float64, [B, D]; None where the depth has none."""
        if self.token == "cls":
            found = class_and_patches(trace, depth)
            return None if found is None else found[0]
        patches_BPD = trace.patches(depth)
        if patches_BPD is None:
            return None
        patches_BPD = patches_BPD.cpu() if patches_BPD.device.type == "mps" else patches_BPD
        return patches_BPD.mean(1, dtype=torch.float64)

    def moments(self, depth: int, centred: bool, without: int | None = None) -> tuple[Tensor, int]:
        """Σ x xᵀ, about the mean where `centred`, and the number of images; of all groups but one where that is named."""
        kept = [group for group in range(self.groups) if group != without]
        first, second, images = (self.state(name)[kept].cpu() for name in (f"first_{depth}", f"second_{depth}", "images"))
        count, total, products = int(images[:, depth].sum()), first.sum(0), second.sum(0)
        if centred and count:
            products = products - torch.outer(total, total) / count
            rounding = torch.finfo(products.dtype).eps * second.sum(0).diagonal().amax() * len(products)
            products = torch.where(products.diagonal().sum() > rounding, products, 0.0)
        return products, count


class EmbeddingRank(TokenMetric):
    """The rank of one embedding an image over all images: RankMe and α-ReQ, by depth."""

    name = "embedding-rank"
    summary = "rank of the images' embeddings over all images: RankMe, @alpha α-ReQ; of the mean patch, @cls of the class token"
    dims = ("depth",)
    collapsed = "low"
    title = "In how many directions the embeddings of images differ"
    seen = (
        "Effective rank over images of one embedding for each image and depth, on a logarithmic scale from 1, with its 95 % "
        f"interval where the sums for one fit in memory. {BESIDE_TWIN} Dotted: the largest rank that so many images can have."
    )
    limits = (
        "It can rise while dense features get worse: the authors of a dense measure (arXiv 2510.17299) report that RankMe, "
        "α-ReQ and LiDAR go with worse dense performance. It grows with the number of images until these are many times the "
        "channels: compare at one number of images only. A direction that all images share lowers it (@centred takes it off)."
    )
    failure_types = ()
    formula = r"\exp\left(-\sum_k p_k \log p_k\right), \quad p_k = \sigma_k / \sum_l \sigma_l + \epsilon"
    value_range = "1 to the smaller of images and channels; @alpha 0 upwards"
    source = (
        "RankMe, arXiv 2210.02885; @alpha α-ReQ (Agrawal et al. 2022) and its authors' code (kumarkrishna/fastssl); "
        "@lidar LiDAR, arXiv 2312.04000"
    )
    traps = (
        "Implementations differ in ε (1e-7, 1e-5) and in whether the mean is taken off; fewer images than channels bound it by "
        "their number. token-rank is of the tokens of one image, this of one embedding for each of many images. The ranks over "
        "which α is fitted differ between scripts of its own authors."
    )
    panel = "RankMe of the mean patch"
    unit = "rank"
    logarithmic = True
    reference = ("most", "largest possible")
    defaults = {
        "measure": "rankme",
        "token": "patches",
        "centred": False,
        "epsilon": RANKME_EPSILON,
        "first": FIRST_RANK,
        "last": LAST_RANK,
    }
    choices = {"measure": MEASURES, "token": ("patches", "cls")}
    variants = {
        "cls": Variant({"token": "cls"}, "of the class token"),
        "centred": Variant({"centred": True}, "mean embedding taken off"),
        "alpha": Variant({"measure": "alpha"}, "decay of the spectrum", unit="exponent α"),
        "lidar": Variant({"measure": "lidar"}, "LiDAR"),
    }

    def __init__(self, plan: Plan, **settings: Any) -> None:
        super().__init__(plan, **settings)
        if self.settings["epsilon"] < 0:
            raise SettingError(f"epsilon is added to shares: 0 or more, not {self.settings['epsilon']}")
        if not 1 <= self.settings["first"] < self.settings["last"]:
            raise SettingError(f"ranks run from first to last, not {self.settings['first']} to {self.settings['last']}")

    @property
    def centred(self) -> bool:
        """Whether the mean embedding is taken off; α is of the covariance always."""
        return bool(self.settings["centred"]) or self.settings["measure"] == "alpha"

    @property
    def definition(self) -> str:
        which = "the mean patch token" if self.settings["token"] == "patches" else "the first prefix token (the class token)"
        mean = "about their mean" if self.centred else "as they are (their mean is not taken off)"
        what = MEASURES[self.settings["measure"]].format(**self.settings)
        return (
            f"{what} of the matrix of {which} of all images (one row an image) at one depth of the residual stream, before "
            f"any final norm, {mean}; from sums of x and x xᵀ over images in float64, exact for any order and parts. Its "
            f"standard error is a jackknife over {GROUPS} groups of images by a hash of their names, where the sums of all "
            "groups fit in 256 MiB. Of n images the rank is at most n. It can rise while dense features get worse."
        )

    def inapplicable(self) -> str:
        """There must be patches, and a class token where that is asked for."""
        if missing := super().inapplicable():
            return missing
        if self.settings["measure"] == "lidar":
            return NO_LIDAR
        cls = self.settings["token"] == "cls"
        return "the model has no class token among its tokens" if cls and not self.plan.prefix else ""

    def accumulators(self) -> list[Need]:
        token = self.settings["token"]
        return [(("embedding-moments", token), lambda: EmbeddingMoments(self.plan, token))]

    def compute(self, accumulators: Sequence[Any], records: Sequence[Record]) -> MetricResult:
        """The rank at each depth, with the jackknife's interval where the groups were kept."""
        (moments,) = accumulators
        depths = len(self.plan.patch_shapes)
        values, largest, images = np.full(depths, np.nan), np.full(depths, np.nan), 0
        left_out = np.full((moments.groups, depths), np.nan)
        for depth, width in moments.widths.items():
            values[depth], count = self._value(moments, depth)
            images = max(images, count)
            if count > 1:
                largest[depth] = min(count - self.centred, width)
                for group in range(moments.groups) if moments.groups > 1 else ():
                    if moments.state("images")[group, depth] > 0:
                        left_out[group, depth] = self._value(moments, depth, group)[0]
        if images < 2:
            return self.not_applicable("a rank over images needs two images or more")
        stderr, groups = jackknife(left_out)
        few = [width for width in moments.widths.values() if images <= width]
        covers = f"of {images:,} images for {min(few):,} channels or more: the rank can be at most {images:,}" if few else ""
        details: dict[str, Any] = {OF_MANY: images, "most": largest}
        details |= {"intervals": NO_INTERVAL} if moments.groups == 1 else {}
        return self.result(
            values,
            stderr=stderr,
            ci95=interval(values, stderr, max(groups, 1)),
            details=details,
            nulls=untrained_only(),
            covers=covers,
        )

    def _value(self, moments: EmbeddingMoments, depth: int, without: int | None = None) -> tuple[float, int]:
        products, count = moments.moments(depth, self.centred, without)
        if count < 2:
            return np.nan, count
        eigenvalues = spectrum(products, count - self.centred)
        if self.settings["measure"] == "alpha":
            return decay_exponent(eigenvalues, self.settings["first"], self.settings["last"]).item(), count
        return rankme(eigenvalues.sqrt(), self.settings["epsilon"]).item(), count


METRICS.add(EmbeddingRank.name, EmbeddingRank)
