"""How long are the patch embeddings, and which of them are far longer than the rest?"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from collapse_probe.capture.plan import Plan
from collapse_probe.capture.trace import Trace
from collapse_probe.errors import SettingError
from collapse_probe.metrics.accumulators import Means
from collapse_probe.metrics.metric import CURVE, Need, Variant
from collapse_probe.metrics.token_metric import TokenMetric, in_parts, sequence
from collapse_probe.outliers import DEVIATIONS, outliers
from collapse_probe.registry import METRICS
from collapse_probe.statistics.intervals import Array

REGISTERS_THRESHOLD = 150.0
SHARE_UNIT = "share of tokens"
NO_INTERVAL = "outlier_map has none: it is a picture of where outliers sit, and no single place is to be read as a number"


class NormSums(Means):
    """By depth the mean norm, the share of outliers, and how often each place of the grid holds one."""

    def __init__(self, plan: Plan, deviations: float, threshold: float | None) -> None:
        super().__init__()
        self.deviations, self.threshold, depths = deviations, threshold, len(plan.taps)
        self.places = 0 if plan.grid is None else plan.grid[0] * plan.grid[1]
        self.add_means(norm=(depths,), share=(depths,))
        self.add_state("outliers", depths, self.places)
        self.add_state("images", depths)

    def end_batch(self, trace: Trace) -> dict[str, Tensor]:
        """Add one batch; mean norms and shares [B, depths] are kept by image."""
        shape = trace.images, len(trace.tokens)
        by_depth = {name: torch.full(shape, torch.nan, dtype=torch.float64) for name in ("norm", "share")}
        for depth in range(len(trace.tokens)):
            patches_BPD = sequence(trace, depth, prefix=False)
            if patches_BPD is None:
                continue
            norms_BP = in_parts(lambda x: {"norm": x.norm(dim=-1)}, patches_BPD)["norm"]
            flagged_BP = outliers(norms_BP, self.deviations, self.threshold).to(torch.float64)
            by_depth["norm"][:, depth], by_depth["share"][:, depth] = norms_BP.mean(1), flagged_BP.mean(1)
            if flagged_BP.shape[1] == self.places:
                self.state("outliers")[depth] += flagged_BP.sum(0).to(self.state("outliers").device)
                self.state("images")[depth] += trace.images
        for name, values in by_depth.items():
            self.add_images(name, values)
        return by_depth

    def where(self, grid: tuple[int, int] | None) -> Array | None:
        """The share of images that have an outlier at each place, [depths, rows, columns]; None without a grid."""
        if grid is None:
            return None
        images = self.array("images")[:, None]
        with np.errstate(invalid="ignore", divide="ignore"):
            shares: Array = np.where(images > 0, self.array("outliers") / images, np.nan)
        return shares.reshape(-1, *grid)


class TokenNorm(TokenMetric):
    """Norms of the patch embeddings and the share of high-norm outliers (Darcet et al., arXiv 2309.16588)."""

    name = "token-norm"
    summary = "mean norm of the patch embeddings; share and place of high-norm outliers"
    dims = ("depth",)
    title = "How long the patch embeddings are, and which stand out"
    seen = f"Mean ℓ2 norm of the patch tokens on the residual stream. {CURVE}"
    limits = (
        "Norms grow along the residual stream of most networks. High-norm outliers are a known habit of large trained models; "
        "a threshold taken from one model does not fit another."
    )
    failure_types = ()
    formula = r"\frac{1}{n} \sum_i \|x_i\|_2"
    value_range = "0 upwards; the shares 0 to 1"
    source = "Darcet et al., arXiv 2309.16588"
    traps = (
        "Behind the final norm all norms are alike and no outlier is seen. The threshold of 150 was chosen by hand for DINOv2."
    )
    panel = "mean norm"
    unit = "ℓ2 norm"
    defaults = {"value": "norm", "deviations": DEVIATIONS, "threshold": None}
    quantity_from = "value"
    variants = {
        "outliers": Variant({"value": "share"}, "outliers above the image's own threshold", unit=SHARE_UNIT),
        "150": Variant({"value": "share", "threshold": REGISTERS_THRESHOLD}, "tokens with a norm above 150", unit=SHARE_UNIT),
    }

    def __init__(self, plan: Plan, **settings: Any) -> None:
        super().__init__(plan, **settings)
        if not self.settings["deviations"] > 0:
            raise SettingError(f"outliers lie above the median: deviations must be above 0, not {self.settings['deviations']}")

    @property
    def definition(self) -> str:
        deviations, fixed = self.settings["deviations"], self.settings["threshold"]
        limit = (
            f"the image's own median + {deviations:g} · MAD at that depth (MAD: the median absolute deviation)"
            if fixed is None
            else f"{fixed:g} (chosen by hand for DINOv2 in arXiv 2309.16588: other models have other scales)"
        )
        what = {
            "norm": "Mean ℓ2 norm of the patch tokens",
            "share": f"Share of the patch tokens whose ℓ2 norm is above {limit}",
        }
        return (
            f"{what[self.settings['value']]}, prefix tokens out, on the residual stream before any final norm (which would "
            "make all norms alike), averaged over images. details.outlier_share is the share of tokens above "
            f"{limit}, with its interval, details.outlier_map the share of images with such a token at each place, by "
            "depth, row and column."
        )

    def accumulators(self) -> list[Need]:
        key = (self.settings["deviations"], self.settings["threshold"])
        return [(("token-norm", *key), lambda: NormSums(self.plan, *key))]

    def details(self, accumulator: NormSums) -> dict[str, Any]:
        """The share of outliers by depth, and at which places of the grid they are."""
        return {
            "prefix": False,
            "outlier_share": accumulator.mean("share")[0],
            "outlier_share_ci95": accumulator.bounds("share"),
            "outlier_map": accumulator.where(self.plan.grid),
            "intervals": NO_INTERVAL,
        }


METRICS.add(TokenNorm.name, TokenNorm)
