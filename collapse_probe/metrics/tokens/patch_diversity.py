"""Are the patches of an image still different from one another?"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from collapse_probe.capture.trace import Trace
from collapse_probe.metrics.accumulators import PerImage
from collapse_probe.metrics.functional.geometry import padded, unit
from collapse_probe.metrics.metric import CURVE, Need
from collapse_probe.metrics.token_metric import TokenMetric
from collapse_probe.registry import METRICS

GRAM_BYTES = 8 * 2**20
PANELS, LEAST_PANEL = 4, 32


def patch_cosine(patches_BPD: Tensor) -> Tensor:
    """P(h), the mean absolute cosine between different patches of an image, [B, P, D] -> [B], 0 … 1.

    P = 1/(n(n−1)) Σ_{i≠j} |cos(h_i, h_j)| (Patch Diversification, arXiv 2104.12753). Pairs with a zero patch have no
    angle and do not count; NaN where fewer than two patches have a direction.

    >>> patch_cosine(torch.tensor([[[1.0, 0.0], [-2.0, 0.0], [0.0, 3.0]]])).item()
    0.3333333432674408
    """
    unit_BPD, valid_BP = unit(patches_BPD)
    total = absolute_products(padded(unit_BPD)) - unit_BPD.square().sum((-2, -1))
    n = valid_BP.sum(-1).to(total.dtype)
    pairs = n * (n - 1)
    return torch.where(pairs > 0, total / pairs.clamp_min(1), torch.nan)


def absolute_products(rows_BPD: Tensor) -> Tensor:
    """Sum over all i and j of |<h_i, h_j>|, [B, P, D] -> [B]; of two panels of rows once, since it is the same both ways."""
    total = rows_BPD.new_zeros(len(rows_BPD))
    step = max(LEAST_PANEL, -(-rows_BPD.shape[1] // PANELS))
    for first in range(0, rows_BPD.shape[1], step):
        panel = rows_BPD[:, first : first + step]
        sums_BQ = (panel @ rows_BPD[:, first:].mT).abs_().sum(1)
        own = sums_BQ[:, : panel.shape[1]].sum(1)
        total += own + 2 * (sums_BQ.sum(1) - own)
    return total


def diversity(trace: Trace) -> Tensor:
    """1 − P at every depth, [B, depths]; NaN where a depth has no patches."""
    columns = []
    for depth in range(len(trace.tokens)):
        patches = trace.patches(depth)
        if patches is None:
            columns.append(torch.full((trace.images,), torch.nan, device=trace.device))
            continue
        step = max(1, GRAM_BYTES // (patches.shape[1] ** 2 * 4))
        parts = [patch_cosine(patches[i : i + step]) for i in range(0, trace.images, step)]
        columns.append(1 - torch.cat(parts))
    return torch.stack(columns, dim=1)


class PatchDiversity(TokenMetric):
    """One minus the mean absolute cosine between different patches (Patch Diversification)."""

    name = "patch-diversity"
    summary = "one minus the mean absolute cosine between different patches of an image"
    dims = ("depth",)
    collapsed = "low"
    title = "Patch diversity"
    seen = f"One minus the mean absolute cosine of two patches. {CURVE}"
    limits = "Patches can grow alike while attention stays diverse, and the other way round."
    failure_types = ("tokens",)
    formula = r"1 - \frac{1}{n(n-1)} \sum_{i \ne j} |\cos(h_i, h_j)|"
    value_range = "0 (all patches parallel) to 1 (all orthogonal)"
    source = "Patch Diversification, arXiv 2104.12753, as 1 − P"
    traps = (
        "With signed cosines opposite patches would cancel. Prefix tokens, or the place behind the final norm, change "
        "the number: both are left out."
    )
    panel = "patch tokens"
    unit = "1 − mean |cosine|"
    top = 1.0

    @property
    def definition(self) -> str:
        return (
            "1 − P, P = 1/(n(n−1)) Σ_{i≠j} |cos(h_i, h_j)| over the n patch tokens of one image (prefix tokens out), on the "
            "residual stream, averaged over images (Patch Diversification, arXiv 2104.12753). 0: all patches are parallel."
        )

    def accumulators(self) -> list[Need]:
        return [(("patch-diversity",), lambda: PerImage(diversity, (len(self.plan.taps),)))]

    def details(self, accumulator: PerImage) -> dict[str, Any]:
        return {"prefix": False}


METRICS.add(PatchDiversity.name, PatchDiversity)
