"""Do two depths tell the images apart in the same way?"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from collapse_probe.capture.plan import Plan
from collapse_probe.capture.trace import Trace
from collapse_probe.metrics.metric import MATRICES, Need, Record
from collapse_probe.metrics.minibatch_cka import STRIDE, MinibatchHSIC, minibatch_for
from collapse_probe.metrics.nulls import untrained_only
from collapse_probe.metrics.token_metric import WITH_PREFIX, TokenMetric, sequence
from collapse_probe.registry import METRICS
from collapse_probe.results.findings import MetricResult


class DepthHSIC(MinibatchHSIC):
    """HSIC between the tokens at any two depths, one vector an image and depth."""

    def __init__(self, plan: Plan, prefix: bool) -> None:
        length = sum(patches * width for patches, width in filter(None, plan.patch_shapes))
        super().__init__(len(plan.taps), minibatch_for(length))
        self.prefix = prefix

    def end_batch(self, trace: Trace) -> dict[str, Tensor]:
        """Take the batch; CKA is no mean over images, so nothing is kept by image."""
        self.absorb([sequence(trace, depth, self.prefix) for depth in range(len(trace.tokens))])
        return {}


class LayerCKA(TokenMetric):
    """Minibatch CKA between the patch embeddings at two depths (Nguyen et al., Raghu et al.)."""

    name = "layer-cka"
    summary = "minibatch unbiased linear CKA between the patch embeddings at two depths"
    dims = ("depth", "depth")
    collapsed = "high"
    title = "Which depths tell the images apart in the same way"
    seen = (
        "Unbiased minibatch CKA between the patch embeddings at two depths; right, where there is one, the untrained twin. "
        f"{MATRICES}"
    )
    limits = (
        "High values between neighbouring depths are usual, trained or not, and a few dominant directions can carry all of it. "
        "With few images the estimate is rough."
    )
    panel = "patch tokens"
    unit = "CKA"
    defaults = {"prefix": False}
    variants = {"all": WITH_PREFIX}
    any_order = False

    @property
    def definition(self) -> str:
        which = "all tokens, prefix tokens included," if self.settings["prefix"] else "the patch tokens, prefix tokens out,"
        return (
            f"Linear CKA of {which} flattened to one vector an image, at two depths of the residual stream: the unbiased "
            "HSIC₁ averaged over minibatches of images (one of n weighs n), then HSIC(a, b)/√(HSIC(a, a)·HSIC(b, b)) (arXiv "
            "2010.15327), in float64. Negative values are possible: the estimate is unbiased. details.minibatch is the images "
            f"in one; they are put together by their place (the same remainder by {STRIDE}) in a random order of the data (in "
            "a folder sorted by class neighbours are alike), or in that of a caller's loader, not by the run's batches. One, "
            "two and four processes so find the same number to rounding; W processes group the images by the "
            f"least common multiple of {STRIDE} and W, which gives another estimate of the same number, within its 95 % "
            "interval 19 times in 20 (simulated). The standard error is a jackknife over groups of minibatches, NaN with one."
        )

    def accumulators(self) -> list[Need]:
        prefix = bool(self.settings["prefix"])
        return [(("depth-hsic", prefix), lambda: DepthHSIC(self.plan, prefix))]

    def compute(self, accumulators: Sequence[Any], records: Sequence[Record]) -> MetricResult:
        (hsic,) = accumulators
        values, stderr, ci95, minibatches = hsic.cka()
        if not minibatches:
            return self.not_applicable("unbiased CKA needs four images or more")
        details = {"minibatch": hsic.size, "minibatches": minibatches}
        return self.result(values, stderr=stderr, ci95=ci95, details=details, nulls=untrained_only())


METRICS.add(LayerCKA.name, LayerCKA)
