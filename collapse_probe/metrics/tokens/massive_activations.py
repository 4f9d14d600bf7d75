"""Does a handful of numbers in the residual stream dwarf all others?"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from collapse_probe.capture.plan import Plan
from collapse_probe.capture.trace import Trace
from collapse_probe.metrics.accumulators import Means
from collapse_probe.metrics.coverage import NO_PATCHES, has_patches
from collapse_probe.metrics.metric import CURVE, Need, Variant
from collapse_probe.metrics.token_metric import TokenMetric, in_parts, sequence
from collapse_probe.registry import METRICS
from collapse_probe.statistics.intervals import Array

QUANTITIES = {
    "ratio": "the largest |x| over the median of |x|",
    "top1": "the largest |x|",
    "top2": "the second largest |x|",
    "top3": "the third largest |x|",
    "median": "the median of |x|",
    "kurtosis": "the mean over tokens of the excess kurtosis of a token's channels, m₄/m₂² − 3 about the token's own mean",
    "massive": "whether the largest |x| is above 100 and above 1,000 times the median of |x|",
}
LARGEST = 3
MASSIVE, TIMES_MEDIAN = 100.0, 1000.0
KINDS = ("first prefix token", "other prefix tokens", "patches")


def largest_activations(tokens_BND: Tensor) -> tuple[dict[str, Tensor], Tensor, Tensor]:
    """The numbers of QUANTITIES but the kurtosis, [B] each, and the token and the channel of the largest |x|, [B] each.

    The median of an even number of entries is the lower of the two in the middle. Of equal entries the first counts.
    """
    sizes = tokens_BND.abs().flatten(1)
    top = sizes.topk(LARGEST, dim=1)
    median = sizes.median(1).values
    ratio = torch.where(median > 0, top.values[:, 0] / median, torch.nan)
    place = (sizes == top.values[:, :1]).int().argmax(1)
    found = {f"top{i + 1}": top.values[:, i] for i in range(LARGEST)}
    found |= {"median": median, "ratio": ratio}
    found["massive"] = ((found["top1"] > MASSIVE) & (found["top1"] > TIMES_MEDIAN * median)).to(sizes.dtype)
    width = tokens_BND.shape[-1]
    return found, place // width, place % width


def excess_kurtosis(tokens_BND: Tensor) -> Tensor:
    """Mean over tokens of m₄/m₂² − 3 over a token's channels, [B, N, D] -> [B], −2 … D − 3; 0 in the mean for normal channels.

    Tokens whose channels are all equal have none and do not count; NaN where no token is left.

    >>> round(excess_kurtosis(torch.tensor([[[1.0, -1.0, 1.0, -1.0]]])).item(), 6)
    -2.0
    """
    apart = tokens_BND - tokens_BND.mean(-1, keepdim=True)
    spread = apart.square().mean(-1)
    scaled = apart / torch.where(spread > 0, spread, 1.0).sqrt()[..., None]
    kurtosis = scaled.pow(4).mean(-1) - 3
    return torch.where(spread > 0, kurtosis, torch.nan).nanmean(-1)


def kinds_of(plan: Plan, depth: int, tokens: int) -> Tensor:
    """Of which of KINDS each token at a depth is, [N], as numbers.

    Tokens that a model adds on the way come first, and which is which is not known: all count as the second kind.
    """
    shape = plan.patch_shapes[depth]
    assert shape is not None
    extra = tokens - shape[0]
    kinds = torch.full((tokens,), 2)
    if extra == len(plan.prefix):
        for place in plan.prefix:
            kinds[place] = 0 if place == plan.prefix[0] else 1
    else:
        kinds[:extra] = 1
    return kinds


class MassiveSums(Means):
    """By depth the quantities, and in how many images which channel, and which kind of token, holds the largest |x|."""

    def __init__(self, plan: Plan, prefix: bool) -> None:
        super().__init__()
        self.plan, self.prefix = plan, prefix
        depths = len(plan.taps)
        self.add_means(**dict.fromkeys(QUANTITIES, (depths,)))
        self.add_state("kinds", depths, len(KINDS))
        for depth, shape in enumerate(plan.patch_shapes):
            if shape is not None:
                self.add_state(f"channels_{depth}", shape[1])

    def end_batch(self, trace: Trace) -> dict[str, Tensor]:
        """Add one batch; per image [B, depths] by quantity."""
        shape = trace.images, len(trace.tokens)
        by_depth = {name: torch.full(shape, torch.nan, dtype=torch.float64) for name in QUANTITIES}
        for depth in range(len(trace.tokens)):
            tokens_BND = sequence(trace, depth, self.prefix) if self.plan.patch_shapes[depth] is not None else None
            if tokens_BND is None or tokens_BND[0].numel() < LARGEST:
                continue
            found, token, channel = largest_activations(tokens_BND)
            found |= in_parts(lambda x: {"kurtosis": excess_kurtosis(x)}, tokens_BND)
            for name, values in found.items():
                by_depth[name][:, depth] = values.cpu()
            kinds = kinds_of(self.plan, depth, tokens_BND.shape[1]) if self.prefix else torch.full(tokens_BND.shape[1:2], 2)
            self._count(self.state("kinds")[depth], kinds[token.cpu()])
            self._count(self.state(f"channels_{depth}"), channel)
        for name, values in by_depth.items():
            self.add_images(name, values)
        return by_depth

    @staticmethod
    def _count(state: Tensor, places: Tensor) -> None:
        state += places.cpu().bincount(minlength=len(state)).to(state.device, state.dtype)

    def carriers(self) -> dict[str, Any]:
        """By depth the channel that holds the largest |x| in most images, in which share of them, and the shares of KINDS."""
        kinds, depths = self.array("kinds"), len(self.plan.taps)
        images = kinds.sum(1)
        channels: list[int | None] = [None] * depths
        shares = np.full(depths, np.nan)
        for depth in range(depths):
            if images[depth]:
                counts = self.array(f"channels_{depth}")
                channels[depth], shares[depth] = int(counts.argmax()), counts.max() / images[depth]
        with np.errstate(invalid="ignore", divide="ignore"):
            by_kind: Array = kinds / images[:, None]
        return {"channel": channels, "channel_share": shares, "kinds": list(KINDS), "kind_share": by_kind}


class MassiveActivations(TokenMetric):
    """The largest activations of the residual stream, and where they are (Sun et al., arXiv 2402.17762)."""

    name = "massive-activations"
    summary = "largest |activation| over the median one; which channel and which token carries it; kurtosis of channels"
    dims = ("depth",)
    title = "Massive activations"
    seen = (
        "How many times the largest activation of an image exceeds its median one, in absolute value, on a logarithmic scale. "
        f"{CURVE}"
    )
    limits = (
        "One channel that outweighs all others is a known habit of large trained models and no failure by itself. It is what "
        "cosines, norms and CKA of that depth mostly see: read these beside it."
    )
    failure_types = ()
    formula = r"\max_{t,c} |x_{tc}| \;/\; \mathrm{median}_{t,c} |x_{tc}|"
    value_range = "1 upwards; @share 0 to 1; @kurtosis −2 to D − 3"
    source = "Sun et al., arXiv 2402.17762, and its code (locuslab/massive-activations, main_vit.py)"
    traps = (
        "Before the final norm; after it the values are others. Sizes depend on the model's scale, ratios do not. The rule of "
        "@share (above 100 and above 1,000 times the median) is what others say of the paper; its code draws curves alone."
    )
    panel = "largest over median |activation|"
    unit = "times the median"
    logarithmic = True
    defaults = {"value": "ratio", "prefix": True}
    choices = {"value": QUANTITIES}
    quantity_from = "value"
    variants = {
        "top1": Variant({"value": "top1"}, "largest |activation|", unit="|activation|"),
        "top2": Variant({"value": "top2"}, "second largest |activation|", unit="|activation|"),
        "top3": Variant({"value": "top3"}, "third largest |activation|", unit="|activation|"),
        "median": Variant({"value": "median"}, "median |activation|", unit="|activation|"),
        "kurtosis": Variant({"value": "kurtosis"}, "excess kurtosis of a token's channels", unit="excess kurtosis"),
        "share": Variant({"value": "massive"}, "images with an activation above 100 and 1,000 medians", unit="share of images"),
        "patches": Variant({"prefix": False}, "patches alone"),
    }

    @property
    def definition(self) -> str:
        which = "all tokens (prefix tokens included)" if self.settings["prefix"] else "the patch tokens (prefix tokens out)"
        what = QUANTITIES[self.quantity]
        return (
            f"Mean over images of {what}, over {which} and channels of one image on the residual stream, before any final "
            "norm. details.channel is the channel that holds the largest |x| in most images, details.channel_share in which "
            "share of them; details.kind_share says in which share of images it sits on the first prefix token (the class "
            "token in models that have one), on others (registers, a distillation token) and on patches. Scaling the stream "
            "changes no ratio, no kurtosis and no place."
        )

    def inapplicable(self) -> str:
        return super().inapplicable() or ("" if has_patches(self.plan) else NO_PATCHES)

    def accumulators(self) -> list[Need]:
        prefix = bool(self.settings["prefix"])
        return [(("massive-activations", prefix), lambda: MassiveSums(self.plan, prefix))]

    def details(self, accumulator: MassiveSums) -> dict[str, Any]:
        return {"prefix": bool(self.settings["prefix"]), **accumulator.carriers()}


METRICS.add(MassiveActivations.name, MassiveActivations)
