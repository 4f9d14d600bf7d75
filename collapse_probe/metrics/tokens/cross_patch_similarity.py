"""Do the patches at two depths point the same ways, whichever patch is set against which?"""

from __future__ import annotations

import torch
from torch import Tensor

from collapse_probe.capture.plan import Plan
from collapse_probe.capture.trace import Trace
from collapse_probe.metrics.accumulators import Means
from collapse_probe.metrics.coverage import depth_neighbours
from collapse_probe.metrics.functional.geometry import padded, unit
from collapse_probe.metrics.metric import MATRICES, Need
from collapse_probe.metrics.token_metric import WITH_PREFIX, TokenMetric, sequence
from collapse_probe.registry import METRICS

GRAM_BYTES = 8 * 2**20


def cross_cosine(unit_BND: Tensor, other_BMD: Tensor) -> Tensor:
    """Sum over all pairs of |u_i·v_j| of unit (or zero) vectors, [B, N, D] and [B, M, D] -> [B] in float64."""
    (images, n, _), m = unit_BND.shape, other_BMD.shape[1]
    step = max(1, GRAM_BYTES // (n * m * 4))
    spans = [slice(i, i + step) for i in range(0, images, step)]
    parts = [(padded(unit_BND[span]) @ padded(other_BMD[span]).transpose(1, 2)).abs_().sum((1, 2)) for span in spans]
    return torch.cat(parts).cpu().to(torch.float64)


def cross_patch_cosine(one_BND: Tensor, other_BMD: Tensor) -> Tensor:
    """Mean over all pairs (i, j) of |cos(x_i, y_j)|, i = j included, [B, N, D] and [B, M, D] -> [B], 0 … 1.

    1/(NM) Σ_ij |x_i·y_j|/(‖x_i‖‖y_j‖) (Diverse-ViT, arXiv 2203.06345, across layers). Pairs with a zero vector have no angle
    and do not count; NaN where no pair has one.

    >>> cross_patch_cosine(torch.eye(2)[None], torch.tensor([[[-1.0, 0.0]]])).item()
    0.5
    """
    (u, u_valid), (v, v_valid) = unit(one_BND), unit(other_BMD)
    pairs = (u_valid.sum(1) * v_valid.sum(1)).cpu().to(torch.float64)
    return torch.where(pairs > 0, cross_cosine(u, v) / pairs.clamp_min(1), torch.nan)


class CrossPatches(Means):
    """Per image the mean absolute cosine between the tokens at every two depths of the same width."""

    def __init__(self, plan: Plan, prefix: bool) -> None:
        super().__init__()
        depths = len(plan.taps)
        self.depths, self.prefix = depths, prefix
        self.neighbours = torch.tensor(depth_neighbours(plan), dtype=torch.bool)
        self.add_means(value=(depths, depths))

    def end_batch(self, trace: Trace) -> dict[str, Tensor]:
        """Add one batch; each depth with the depth before is kept by image."""
        values = torch.full((trace.images, self.depths, self.depths), torch.nan, dtype=torch.float64)
        units: dict[int, tuple[Tensor, Tensor]] = {}
        for depth in range(self.depths):
            tokens_BND = sequence(trace, depth, self.prefix)
            if tokens_BND is None:
                continue
            unit_BND, valid_BN = unit(tokens_BND)
            units[depth] = unit_BND, valid_BN.sum(1).cpu().to(torch.float64)
            for before, (other_BND, others) in units.items():
                if other_BND.shape[2] == unit_BND.shape[2]:
                    pairs = units[depth][1] * others
                    mean = cross_cosine(unit_BND, other_BND) / pairs.clamp_min(1)
                    values[:, depth, before] = values[:, before, depth] = torch.where(pairs > 0, mean, torch.nan)
        self.add_images("value", values)
        return {"value": torch.where(self.neighbours, values.diagonal(-1, 1, 2), torch.nan)}


class CrossPatchSimilarity(TokenMetric):
    """Mean absolute cosine between any patch at one depth and any patch at another (Diverse-ViT)."""

    name = "cross-patch-similarity"
    summary = "mean absolute cosine between any two patches at two depths (Diverse-ViT)"
    dims = ("depth", "depth")
    collapsed = "high"
    title = "How alike any two patches at two depths are"
    seen = (
        "Mean absolute cosine between every patch at one depth and every patch at another, of one image; right, where there is "
        f"one, the untrained copy. {MATRICES}"
    )
    limits = "A common direction of all tokens alone makes it high."
    failure_types = ("tokens",)
    formula = r"\frac{1}{NM} \sum_{i,j} |\cos(x_i, y_j)|"
    value_range = "0 to 1"
    source = "Diverse-ViT, arXiv 2203.06345, and its released code"
    traps = "A patch counts with itself, so that a depth against itself never falls below 1/N."
    panel = "patch tokens"
    unit = "|cosine|"
    defaults = {"prefix": False}
    variants = {"all": WITH_PREFIX}

    @property
    def definition(self) -> str:
        which = "all tokens, prefix tokens included" if self.settings["prefix"] else "patch tokens, prefix tokens out"
        return (
            f"1/(NM) Σ_ij |cos(x_i, y_j)| between the {which}, of one image at two depths of the residual stream (before any "
            "final norm), averaged over images (Diverse-ViT, arXiv 2203.06345). i = j counts, so that the diagonal never falls "
            "below 1/N; 1 − patch-diversity leaves it out. Depths of other widths are not compared."
        )

    def accumulators(self) -> list[Need]:
        prefix = bool(self.settings["prefix"])
        return [(("cross-patches", prefix), lambda: CrossPatches(self.plan, prefix))]


METRICS.add(CrossPatchSimilarity.name, CrossPatchSimilarity)
